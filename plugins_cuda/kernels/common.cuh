// SPDX-License-Identifier: Apache-2.0
// The vocabulary of the kernels. Kernel sources use these names and plain C++, never inline PTX or
// vendor types, so that one source compiles with nvcc for a GPU and with g++ for the emulator in
// emu/.
//
//   launching        QR_LAUNCH, QR_DYN_SMEM
//   numbers          f16, bf16, to_f32, from_f32, pack_pair, unpack_pair, rounded_to, exp2_fast,
//   log2_fast,
//                    reciprocal_fast, subtract_f16x2
//   warps            lane, warp_max, warp_min, warp_sum, __shfl_xor_sync, __syncwarp
//   shared memory    load_shared, store_shared
//   global memory    load_streaming_4, load_streaming_chunk
//   async copies     cp_async16, cp_async4, cp_commit, cp_wait
//   tensor cores     ldmatrix_x4, ldmatrix_x4_transposed, transpose_fragment, mma_s4, mma_s8,
//   mma_16
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "../include/quarot_kernels.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#else
#include "../emu/emulation.hpp"
#endif

#define QR_HOST_DEVICE __host__ __device__ __forceinline__

#if defined(__CUDACC__)

namespace qr {

using f16 = __half;
using bf16 = __nv_bfloat16;

// ------------------------------------------------------------------------------------------
// launching

// All shared memory of a kernel, as one array of the size that the launch gave.
#define QR_DYN_SMEM(name) extern __shared__ __align__(1024) unsigned char name[]
#define QR_SHARED __shared__

// Launches and returns a qr_status. Kernel names with commas go in parentheses.
#define QR_LAUNCH(kernel, grid, block, shared_bytes, stream, ...)                 \
  [&]() -> int {                                                                  \
    if ((shared_bytes) > 48 * 1024 &&                                             \
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, \
                             static_cast<int>(shared_bytes)) != cudaSuccess)      \
      return qr::refused_launch();                                                \
    kernel<<<grid, block, shared_bytes, stream>>>(__VA_ARGS__);                   \
    return cudaPeekAtLastError() == cudaSuccess ? QR_OK : qr::refused_launch();   \
  }()

// Takes the error out of the runtime, so that it does not surface in somebody else's call.
inline int refused_launch() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction
             ? QR_ERROR_ARCHITECTURE
             : QR_ERROR_LAUNCH;
}

// -------------------------------------------------------------------------------------------
// numbers

__device__ __forceinline__ float to_f32(f16 x) { return __half2float(x); }
__device__ __forceinline__ float to_f32(bf16 x) { return __bfloat162float(x); }
template <class T>
__device__ __forceinline__ T from_f32(float x);
template <>
__device__ __forceinline__ f16 from_f32<f16>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ __forceinline__ bf16 from_f32<bf16>(float x) {
  return __float2bfloat16_rn(x);
}

// Two values, each rounded once, in one word: `low` in bits 0..15.
template <class T>
__device__ __forceinline__ uint32_t pack_pair(float low, float high);
template <>
__device__ __forceinline__ uint32_t pack_pair<f16>(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}
template <>
__device__ __forceinline__ uint32_t pack_pair<bf16>(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}
template <class T>
__device__ __forceinline__ float2 unpack_pair(uint32_t word);
template <>
__device__ __forceinline__ float2 unpack_pair<f16>(uint32_t word) {
  return __half22float2(reinterpret_cast<const __half2&>(word));
}
template <>
__device__ __forceinline__ float2 unpack_pair<bf16>(uint32_t word) {
  return make_float2(__uint_as_float(word << 16), __uint_as_float(word & 0xFFFF0000u));
}

// fp16 lanes of a word: a - b. Exact for integers below 2048.
__device__ __forceinline__ uint32_t subtract_f16x2(uint32_t a, uint32_t b) {
  const __half2 d =
      __hsub2(reinterpret_cast<const __half2&>(a), reinterpret_cast<const __half2&>(b));
  return reinterpret_cast<const uint32_t&>(d);
}

// 2^x with a relative error of 2^-22, and 2^-inf = 0.
__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float reciprocal_fast(float x) { return __fdividef(1.f, x); }
__device__ __forceinline__ float log2_fast(float x) { return __log2f(x); }

// --------------------------------------------------------------------------------------------
// memory

template <class T>
__device__ __forceinline__ T load_shared(const void* pointer) {
  return *static_cast<const T*>(pointer);
}
template <class T>
__device__ __forceinline__ void store_shared(void* pointer, T value) {
  *static_cast<T*>(pointer) = value;
}

// Data that nobody reads again soon: it does not displace anything in L1.
__device__ __forceinline__ uint32_t load_streaming_4(const void* pointer) {
  uint32_t value;
  asm("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(value) : "l"(pointer));
  return value;
}
__device__ __forceinline__ uint4 load_streaming_chunk(const void* pointer) {
  uint4 v;
  asm("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
      : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
      : "l"(pointer));
  return v;
}

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// 16 bytes from global to shared memory, around the registers; zeros where `valid` is false.
__device__ __forceinline__ void cp_async16(void* shared, const void* global, bool valid) {
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
               "l"(global), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void cp_async4(void* shared, const void* global, bool valid) {
  const int bytes = valid ? 4 : 0;
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(shared)),
               "l"(global), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void cp_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until all but the newest kPending groups of this thread have landed.
template <int kPending>
__device__ __forceinline__ void cp_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// -------------------------------------------------------------------------------------- tensor
// cores

// Four 8x8 matrices of 16-bit elements; lanes 8i..8i+7 point at the rows of matrix i. Lane l
// receives row l/4, columns 2(l%4) and +1 of each.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
// The same, each matrix transposed: lane l receives rows 2(l%4) and +1 of column l/4.
__device__ __forceinline__ void ldmatrix_x4_transposed(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
// An 8x8 matrix of 16-bit elements, spread over the warp as fragments are, transposed.
__device__ __forceinline__ uint32_t transpose_fragment(uint32_t value) {
  uint32_t result;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(value));
  return result;
}

// c += a b, m16n8k64, signed nibbles. Only for sm_80..89: later architectures emulate it.
__device__ __forceinline__ void mma_s4(int (&c)[4], const uint32_t* a, const uint32_t* b) {
  asm volatile(
      "mma.sync.aligned.m16n8k64.row.col.s32.s4.s4.s32 "
      "{%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// c += a b, m16n8k32, signed bytes.
__device__ __forceinline__ void mma_s8(int (&c)[4], const uint32_t* a, const uint32_t* b) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 "
      "{%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// c += a b, m16n8k16, fp16 or bf16 operands, fp32 sums.
template <class T>
__device__ __forceinline__ void mma_16(float (&c)[4], const uint32_t* a, const uint32_t* b);
template <>
__device__ __forceinline__ void mma_16<f16>(float (&c)[4], const uint32_t* a, const uint32_t* b) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
template <>
__device__ __forceinline__ void mma_16<bf16>(float (&c)[4], const uint32_t* a, const uint32_t* b) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

}  // namespace qr

#endif  // __CUDACC__

namespace qr {

// ------------------------------------------------------------------- both backends, built on the
// above

constexpr unsigned kAllLanes = 0xFFFFFFFFu;

__device__ __forceinline__ int lane() { return static_cast<int>(threadIdx.x % 32); }

// x as it would be after a round trip through T.
template <class T>
__device__ __forceinline__ float rounded_to(float x) {
  return to_f32(from_f32<T>(x));
}

// Reductions over kWidth neighbouring lanes, the same bits in every lane; kWidth a power of two.
template <int kWidth = 32>
__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int s = 1; s < kWidth; s *= 2) x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, s));
  return x;
}
template <int kWidth = 32>
__device__ __forceinline__ float warp_min(float x) {
#pragma unroll
  for (int s = 1; s < kWidth; s *= 2) x = fminf(x, __shfl_xor_sync(kAllLanes, x, s));
  return x;
}
template <int kWidth = 32>
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int s = 1; s < kWidth; s *= 2) x += __shfl_xor_sync(kAllLanes, x, s);
  return x;
}

// ------------------------------------------------------------------------------------- host:
// arguments

inline bool is_aligned(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
}
inline bool is_power_of_two(int64_t x) { return x > 0 && (x & (x - 1)) == 0; }
inline bool is_activation_dtype(int32_t dtype) {
  return dtype == QR_DTYPE_FP16 || dtype == QR_DTYPE_BF16;
}
inline bool is_activation_layout(int32_t layout) {
  return layout == QR_LAYOUT_ACTIVATIONS_PACKED_V1 || layout == QR_LAYOUT_ACTIVATIONS_SPLIT_V1;
}

// A required pointer: there and aligned, else the status to return.
inline int check_pointer(const void* pointer) {
  if (!pointer) return QR_ERROR_NULL_POINTER;
  return is_aligned(pointer) ? QR_OK : QR_ERROR_MISALIGNED;
}

#define QR_RETURN_IF_ERROR(expression)    \
  do {                                    \
    const int status_ = (expression);     \
    if (status_ != QR_OK) return status_; \
  } while (0)

}  // namespace qr
