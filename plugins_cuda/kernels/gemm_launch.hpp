// SPDX-License-Identifier: Apache-2.0
// What the dispatcher needs from each GEMM kernel: how it would cut a problem, and its launch.
#pragma once
#include <cstddef>

#include "common.cuh"
#include "device.hpp"

namespace qr {

struct GemmArgs;

// How a kernel cuts (m, n, k). It depends on sizes and device alone: the workspace query and the
// launch make the same one.
struct GemmPlan {
  int shape = 0;            // which tile shape, in the kernel's own numbering
  int tiles = 0;            // output tiles
  int splits = 1;           // parts of k
  int steps_per_split = 0;  // units of k in a part
  size_t counters = 0;      // int32 of workspace for arrivals: one per tile and group of threads
  size_t sums = 0;          // int32 of workspace for partial sums
};

// requested_splits: parts of k; 0 lets the plan choose.
GemmPlan plan_mma(const DeviceLimits& device, int m, int n, int k, int requested_splits);
GemmPlan plan_sm90(const DeviceLimits& device, int m, int n, int k, int requested_splits);
GemmPlan plan_decode(const DeviceLimits& device, int m, int n, int k, int requested_splits);

// native: s4 tensor cores; only with compute capability 8.x.
int launch_mma(const GemmPlan& plan, const GemmArgs& args, bool native, cudaStream_t stream);
// Tokens in split order; only with compute capability 9.0.
int launch_sm90(const GemmPlan& plan, const GemmArgs& args, const DeviceLimits& device,
                cudaStream_t stream);
// split: tokens in split order, else packed.
int launch_decode(const GemmPlan& plan, const GemmArgs& args, bool native, bool split,
                  cudaStream_t stream);

}  // namespace qr
