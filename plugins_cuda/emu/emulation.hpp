// SPDX-License-Identifier: Apache-2.0
// The emulator's side of the vocabulary in kernels/common.cuh.
#pragma once

#include "async_copy.hpp"
#include "scheduler.hpp"
#include "shared_memory.hpp"
#include "types.hpp"
#include "warp.hpp"

#define QR_DYN_SMEM(name) unsigned char* name = emu::block->shared
#define QR_SHARED static thread_local  // one block at a time per operating-system thread

#define QR_LAUNCH(kernel, grid, block, shared_bytes, stream, ...)                   \
  ((void)(stream),                                                                  \
   emu::launch(dim3(grid), dim3(block), shared_bytes, [=] { kernel(__VA_ARGS__); }) \
       ? QR_OK                                                                      \
       : QR_ERROR_LAUNCH)

namespace qr {

inline float to_f32(f16 x) { return emu::float_from_half(x.bits); }
inline float to_f32(bf16 x) { return emu::float_from_bfloat(x.bits); }
template <class T>
T from_f32(float x);
template <>
inline f16 from_f32<f16>(float x) {
  return {emu::half_from_float(x)};
}
template <>
inline bf16 from_f32<bf16>(float x) {
  return {emu::bfloat_from_float(x)};
}
template <class T>
inline uint32_t pack_pair(float low, float high) {
  return from_f32<T>(low).bits | static_cast<uint32_t>(from_f32<T>(high).bits) << 16;
}
template <class T>
inline float2 unpack_pair(uint32_t word) {
  return {to_f32(T{static_cast<uint16_t>(word)}), to_f32(T{static_cast<uint16_t>(word >> 16)})};
}
inline uint32_t subtract_f16x2(uint32_t a, uint32_t b) {
  const float2 x = unpack_pair<f16>(a), y = unpack_pair<f16>(b);
  return pack_pair<f16>(x.x - y.x, x.y - y.y);
}
inline float exp2_fast(float x) { return std::exp2(x); }
inline float reciprocal_fast(float x) { return 1.0f / x; }
inline float log2_fast(float x) { return std::log2(x); }

template <class T>
inline T load_shared(const void* pointer, int site = __builtin_LINE()) {
  return emu::shared_load<T>(pointer, site);
}
template <class T>
inline void store_shared(void* pointer, T value, int site = __builtin_LINE()) {
  emu::shared_store<T>(pointer, value, site);
}
inline uint32_t load_streaming_4(const void* pointer) {
  return *static_cast<const uint32_t*>(pointer);
}
inline uint4 load_streaming_chunk(const void* pointer) {
  return *static_cast<const uint4*>(pointer);
}

inline void cp_async16(void* shared, const void* global, bool valid) {
  emu::async_copy(shared, global, 16, valid ? 16 : 0);
}
inline void cp_async4(void* shared, const void* global, bool valid) {
  emu::async_copy(shared, global, 4, valid ? 4 : 0);
}
inline void cp_commit() { emu::async_commit(); }
template <int kPending>
inline void cp_wait() {
  emu::async_wait(kPending);
}

inline void ldmatrix_x4(uint32_t (&r)[4], const void* row) { emu::ldmatrix(r, 4, false, row); }
inline void ldmatrix_x4_transposed(uint32_t (&r)[4], const void* row) {
  emu::ldmatrix(r, 4, true, row);
}
inline uint32_t transpose_fragment(uint32_t value) { return emu::transpose_8x8(value); }
inline void mma_s4(int (&c)[4], const uint32_t* a, const uint32_t* b) {
  emu::mma<8>(emu::kMmaS4, c, a, b, emu::nibble);
}
inline void mma_s8(int (&c)[4], const uint32_t* a, const uint32_t* b) {
  emu::mma<4>(emu::kMmaS8, c, a, b, emu::byte);
}
template <class T>
void mma_16(float (&c)[4], const uint32_t* a, const uint32_t* b);
template <>
inline void mma_16<f16>(float (&c)[4], const uint32_t* a, const uint32_t* b) {
  emu::mma<2>(emu::kMmaF16, c, a, b, emu::half);
}
template <>
inline void mma_16<bf16>(float (&c)[4], const uint32_t* a, const uint32_t* b) {
  emu::mma<2>(emu::kMmaBf16, c, a, b, emu::bfloat);
}

}  // namespace qr
