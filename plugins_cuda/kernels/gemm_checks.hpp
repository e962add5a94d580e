// SPDX-License-Identifier: Apache-2.0
// The shapes that the GEMM entry points take, in one table. All others are refused with
// QR_ERROR_UNSUPPORTED_SHAPE.
//
//   m  tokens            0 .. 2^20; 0 does nothing; QR_GEMM_DECODE: at most 16
//   n  output features   8 .. 2^20, a multiple of 8   (a 16-byte store is inside y or outside)
//   k  inner length      64 .. 131008, a multiple of 64   (a block of weights; no int32 overflow)
//   y_stride             n or more; a multiple of 8 unless y is int32
#pragma once
#include "common.cuh"
#include "layouts.hpp"

namespace qr {

constexpr int64_t kMaxTokens = 1 << 20, kMaxFeatures = 1 << 20;

inline int check_weight_shape(int64_t n, int64_t k) {
  const bool ok = n >= 8 && n <= kMaxFeatures && n % 8 == 0 && k >= kFragmentColumns &&
                  k <= kMaxK && k % kFragmentColumns == 0;
  return ok ? QR_OK : QR_ERROR_UNSUPPORTED_SHAPE;
}

inline int check_activation_shape(int64_t m, int64_t k) {
  const bool ok =
      m >= 0 && m <= kMaxTokens && k >= kFragmentColumns && k <= kMaxK && k % kFragmentColumns == 0;
  return ok ? QR_OK : QR_ERROR_UNSUPPORTED_SHAPE;
}

inline int check_optional_pointer(const void* pointer) {
  return pointer ? check_pointer(pointer) : QR_OK;
}

}  // namespace qr
