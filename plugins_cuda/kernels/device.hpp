// SPDX-License-Identifier: Apache-2.0
// What launches need to know about the current device. Attribute queries neither synchronize nor
// allocate, and are allowed while a stream is captured; each is made once per device.
#pragma once

#include <cstddef>

#include "common.cuh"

namespace qr {

struct DeviceLimits {
  int compute_capability;  // 10 * major + minor
  int multiprocessors;
  size_t shared_bytes_per_block, shared_bytes_per_multiprocessor;
};

// Of the calling thread's current device. With no device: zeros.
const DeviceLimits& device_limits();

}  // namespace qr
