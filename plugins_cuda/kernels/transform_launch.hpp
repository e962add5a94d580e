// SPDX-License-Identifier: Apache-2.0
// The transform kernels as the rest of the library calls them (attention ends in one).
#pragma once

#include "transform.cuh"

namespace qr {

// From p->n (set by the caller) and a plan: the factors, the norm, the threads of a row. A
// qr_status.
int plan_rows(const qr_hadamard_plan& plan, TransformParams* p);

// Launches the kernel that p asks for. dtype: of rows in and out; source: see Source. A qr_status.
int launch_transform(const TransformParams& p, int dtype, int source, cudaStream_t stream);

}  // namespace qr
