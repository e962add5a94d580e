// SPDX-License-Identifier: Apache-2.0
// What the cache kernels share: addresses, the Hadamard of one head, argument checks.
#pragma once

#include "common.cuh"

namespace qr {

// One tensor of the cache, with its sizes.
struct CacheView {
  uint8_t* codes;  // [batch, kv_heads, capacity, head_dim / 2], u4, low nibble first
  float* scale;    // [batch, kv_heads, capacity]
  float* zero;     // [batch, kv_heads, capacity], integer-valued
};

inline CacheView view_of(const qr_kv_cache& cache) {
  return {cache.codes, cache.scale, cache.zero};
}

inline int check_cache(const qr_kv_cache& cache) {
  QR_RETURN_IF_ERROR(check_pointer(cache.codes));
  QR_RETURN_IF_ERROR(check_pointer(cache.scale));
  return check_pointer(cache.zero);
}

// The sizes that every cache kernel supports.
inline int check_cache_shape(int32_t batch, int32_t kv_heads, int32_t head_dim, int64_t capacity) {
  if (batch < 1 || batch > 65535 || kv_heads < 1 || kv_heads > 65535)
    return QR_ERROR_UNSUPPORTED_SHAPE;
  if (head_dim != 64 && head_dim != 128 && head_dim != 256) return QR_ERROR_UNSUPPORTED_SHAPE;
  // Scales are copied four at a time.
  if (capacity < 4 || capacity % 4 || capacity > (1 << 30)) return QR_ERROR_UNSUPPORTED_SHAPE;
  return QR_OK;
}

inline int check_strides(const int64_t (&strides)[3]) {
  for (int64_t stride : strides)
    if (stride < 0 || stride % 8) return QR_ERROR_BAD_ARGUMENT;
  return QR_OK;
}

// The Walsh-Hadamard transform, not normalized, of kLanes * kEach values: position lane * kEach +
// i. kLanes neighbouring lanes (a power of two) hold kEach values each.
template <int kLanes, int kEach>
__device__ __forceinline__ void hadamard_of_lanes(float (&v)[kEach], int lane_in_group) {
#pragma unroll
  for (int d = 1; d < kEach; d *= 2)
#pragma unroll
    for (int i = 0; i < kEach; i++)
      if (!(i & d)) {
        const float a = v[i], b = v[i ^ d];
        v[i] = a + b;
        v[i ^ d] = a - b;
      }
#pragma unroll
  for (int d = 1; d < kLanes; d *= 2) {
    const float sign = lane_in_group & d ? -1.f : 1.f;
#pragma unroll
    for (int i = 0; i < kEach; i++) v[i] = fmaf(v[i], sign, __shfl_xor_sync(kAllLanes, v[i], d));
  }
}

// 1 / sqrt(head_dim), rounded once.
template <int kHeadDim>
__device__ __forceinline__ constexpr float head_norm() {
  return kHeadDim == 64 ? 0.125f : kHeadDim == 128 ? 0.08838834764831845f : 0.0625f;
}

}  // namespace qr
