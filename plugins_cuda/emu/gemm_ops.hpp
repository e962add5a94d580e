// SPDX-License-Identifier: Apache-2.0
// The emulator's side of kernels/gemm_ops.cuh.
#pragma once

#include "emulation.hpp"

#define QR_HAS_S4_MMA 1

namespace qr {

inline uint32_t load_word(const void* p) {
  uint32_t v;
  memcpy(&v, p, 4);
  return v;
}
inline uint4 load_early_16(const void* p) {
  if (reinterpret_cast<uintptr_t>(p) % 16)
    emu::fail("a misaligned 16-byte load from global memory");
  uint4 v;
  memcpy(&v, p, 16);
  return v;
}
inline void load_early_16_if(uint4& v, const void* p, bool condition) {
  if (condition) v = load_early_16(p);
}
// Blocks run on several operating-system threads, so these are atomic here as well.
inline int load_l2(const int32_t* p) { return __atomic_load_n(p, __ATOMIC_RELAXED); }
inline int atomic_add(int32_t* p, int v) { return __atomic_fetch_add(p, v, __ATOMIC_RELAXED); }
inline void atomic_accumulate(int32_t* p, int v) { atomic_add(p, v); }
inline void thread_fence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline void compiler_fence() {}
[[noreturn]] inline void refuse_architecture() {
  emu::fail("a kernel whose code this architecture does not have");
}

}  // namespace qr
