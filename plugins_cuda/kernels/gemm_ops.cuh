// SPDX-License-Identifier: Apache-2.0
// The device operations that the GEMM kernels use beyond common.cuh, each a thin name for one
// instruction. Kernels use names only, never inline PTX, so that the same sources run under emu/.
#pragma once
#include "common.cuh"

#if defined(__CUDACC__)

// s4 tensor cores exist on 7.5 to 8.9. Later, ptxas accepts mma.s4 and emulates it.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
#define QR_HAS_S4_MMA 1
#else
#define QR_HAS_S4_MMA 0
#endif

namespace qr {

// 32 bits that no thread writes during the kernel.
__device__ __forceinline__ uint32_t load_word(const void* p) {
  return __ldg(static_cast<const uint32_t*>(p));
}
// 16 bytes that are read once: they pass L1 by. Volatile: the load stays where it is written, ahead
// of its use.
__device__ __forceinline__ uint4 load_early_16(const void* p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return v;
}
// The same into registers that hold something already, which stays when `condition` is false.
__device__ __forceinline__ void load_early_16_if(uint4& v, const void* p, bool condition) {
  asm volatile(
      "{\n.reg .pred wanted;\nsetp.ne.s32 wanted, %5, 0;\n"
      "@wanted ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];\n}"
      : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w)
      : "l"(p), "r"(int(condition)));
}
// A word that other CTAs have added to: read where atomics happen, in L2.
__device__ __forceinline__ int load_l2(const int32_t* p) { return __ldcg(p); }
__device__ __forceinline__ int atomic_add(int32_t* p, int v) { return atomicAdd(p, v); }
// The same without reading the old value: nothing waits for it.
__device__ __forceinline__ void atomic_accumulate(int32_t* p, int v) {
  asm volatile("red.relaxed.gpu.global.add.s32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}
__device__ __forceinline__ void thread_fence() { __threadfence(); }
// Ends the launch with an error: code for another architecture was asked for.
__device__ __forceinline__ void refuse_architecture() { __trap(); }
// Keeps the compiler from moving memory accesses across.
__device__ __forceinline__ void compiler_fence() { asm volatile("" ::: "memory"); }

}  // namespace qr

#else
#include "../emu/gemm_ops.hpp"
#endif
