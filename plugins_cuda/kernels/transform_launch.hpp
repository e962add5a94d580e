// SPDX-License-Identifier: Apache-2.0
// The transform kernels as the rest of the library calls them (attention ends in one).
#pragma once

#include "transform.cuh"

namespace qr {

// From p->n (set by the caller) and a plan: the factors, the norm, the threads of a row. A
// qr_status.
int plan_rows(const qr_hadamard_plan& plan, TransformParams* p);

// Whether the current device can hold a row in one block of threads; if not, it is a wide row.
bool fits_a_block(const TransformParams& p, int source);

// hadamard_wide.cu. The workspace of a wide row's transform.
size_t wide_workspace_bytes(const TransformParams& p);
// Of what plan_rows accepted, what a wide row cannot have. A qr_status.
int check_wide_transform(const TransformParams& p);
int launch_wide_transform(const TransformParams& p, int dtype, int source, void* workspace,
                          size_t workspace_bytes, cudaStream_t stream);

// Launches the kernel that p asks for. dtype: of rows in and out; source: see Source. A qr_status.
int launch_transform(const TransformParams& p, int dtype, int source, cudaStream_t stream);

}  // namespace qr
