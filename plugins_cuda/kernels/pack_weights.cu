// SPDX-License-Identifier: Apache-2.0
// Operands from packed order into the orders that the GEMM kernels read (layouts.hpp), and the sums
// of weight codes that asymmetric activations need. Weights are reordered once, at load time, so
// one ONNX file serves every architecture. NumPy twin: quarot_onnx/plugins/layouts.py.
#include "gemm_checks.hpp"
#include "gemm_launch.hpp"
#include "gemm_ops.cuh"
#include "layouts.hpp"

namespace qr {

constexpr int kPackThreads = 256;

// A thread writes one lane's 16 bytes. packed: [n, k/2] bytes as words of 8 codes. fragments: see
// layouts.hpp. Rows and words outside the weight are zero codes.
__global__ void __launch_bounds__(kPackThreads) pack_fragments_kernel(const uint32_t* packed,
                                                                      uint4* fragments, int n,
                                                                      int k) {
  const int blocks_k = fragment_blocks_k(k), words = k / 8;
  const int i = blockIdx.x * kPackThreads + threadIdx.x;  // lane of this row of blocks
  if (i >= blocks_k * 128) return;
  const int at = i % 32, warp = i / 32 % 4, g = at / 4, q = at % 4;
  const int row = blockIdx.y * kFragmentRows + warp * 16 + g, word = i / 128 * 8 + q;
  const auto load = [&](int r, int w) -> uint32_t {
    return r < n && w < words ? packed[int64_t(r) * words + w] : 0;
  };
  fragments[int64_t(blockIdx.y) * blocks_k * 128 + i] =
      uint4{load(row, word), load(row + 8, word), load(row, word + 4), load(row + 8, word + 4)};
}

// A warp sums one row of weight codes.
__global__ void __launch_bounds__(kPackThreads) weight_sums_kernel(const uint32_t* packed,
                                                                   int32_t* sums, int n, int k) {
  const int row = blockIdx.x * (kPackThreads / 32) + threadIdx.x / 32;
  if (row >= n) return;  // a whole warp
  int sum = 0;
  for (int w = lane(); w < k / 8; w += 32) {
    const uint32_t word = packed[int64_t(row) * (k / 8) + w];
#pragma unroll
    for (int e = 0; e < 8; e++) sum += int32_t(word << (28 - 4 * e)) >> 28;
  }
#pragma unroll
  for (int s = 1; s < 32; s *= 2) sum += __shfl_xor_sync(kAllLanes, sum, s);
  if (lane() == 0) sums[row] = sum;
}

// Four codes 0..15, one in each byte, to their two's complement value -8..7 as bytes. The high bit
// of each byte keeps the subtraction from borrowing across.
__device__ __forceinline__ uint32_t signed_bytes(uint32_t codes) {
  return (((codes ^ 0x08080808u) | 0x80808080u) - 0x08080808u) ^ 0x80808080u;
}

// A block takes a token; a thread 32 codes (16 bytes) of it at a time, whose even and odd codes are
// one 16-byte chunk each. k beyond the row reads as zero codes; rows of padding are left alone.
__global__ void __launch_bounds__(kPackThreads) split_activations_kernel(const uint8_t* packed,
                                                                         uint8_t* split, int m,
                                                                         int k) {
  const int token = blockIdx.x, rows = split_rows(m);
  const auto even = [](uint32_t w) { return signed_bytes(w & 0x0F0F0F0Fu); };
  const auto odd = [](uint32_t w) { return signed_bytes((w >> 4) & 0x0F0F0F0Fu); };
  for (int i = threadIdx.x; i < ceil_div(k, kStepColumns) * 4; i += kPackThreads) {
    const int step = i / 4, piece = i % 4;
    uint4 v{0, 0, 0, 0};
    if (i * 32 < k) v = *reinterpret_cast<const uint4*>(packed + int64_t(token) * (k / 2) + i * 16);
    const int chunk = piece / 2 * 4 + piece % 2;
    *reinterpret_cast<uint4*>(split + split_offset(step, token, chunk, rows)) =
        uint4{even(v.x), even(v.y), even(v.z), even(v.w)};
    *reinterpret_cast<uint4*>(split + split_offset(step, token, chunk + 2, rows)) =
        uint4{odd(v.x), odd(v.y), odd(v.z), odd(v.w)};
  }
}

}  // namespace qr

using namespace qr;

extern "C" {

size_t qr_weight_bytes(int32_t layout, int64_t n, int64_t k) {
  if (check_weight_shape(n, k) != QR_OK) return 0;
  if (layout == QR_LAYOUT_WEIGHTS_PACKED_V1) return size_t(n) * (k / 2);
  if (layout != QR_LAYOUT_WEIGHTS_FRAGMENTS_V1) return 0;
  return fragment_offset(fragment_blocks_n(int(n)), 0, fragment_blocks_k(int(k)));
}

int qr_pack_weight(int32_t layout, int64_t n, int64_t k, const void* packed, void* out,
                   void* stream) {
  QR_RETURN_IF_ERROR(check_weight_shape(n, k));
  QR_RETURN_IF_ERROR(check_pointer(packed));
  QR_RETURN_IF_ERROR(check_pointer(out));
  if (layout != QR_LAYOUT_WEIGHTS_FRAGMENTS_V1) return QR_ERROR_UNSUPPORTED_LAYOUT;
  const int lanes = fragment_blocks_k(int(k)) * 128;  // of a row of blocks
  return QR_LAUNCH(pack_fragments_kernel,
                   dim3(ceil_div(lanes, kPackThreads), fragment_blocks_n(int(n))),
                   dim3(kPackThreads), 0, static_cast<cudaStream_t>(stream),
                   static_cast<const uint32_t*>(packed), static_cast<uint4*>(out), int(n), int(k));
}

int qr_weight_sums(int64_t n, int64_t k, const void* packed, int32_t* w_sum, void* stream) {
  QR_RETURN_IF_ERROR(check_weight_shape(n, k));
  QR_RETURN_IF_ERROR(check_pointer(packed));
  QR_RETURN_IF_ERROR(check_pointer(w_sum));
  const int rows = kPackThreads / 32;
  return QR_LAUNCH(weight_sums_kernel, dim3(ceil_div(int(n), rows)), dim3(kPackThreads), 0,
                   static_cast<cudaStream_t>(stream), static_cast<const uint32_t*>(packed), w_sum,
                   int(n), int(k));
}

int qr_split_activations(int64_t m, int64_t k, const void* packed, void* split, void* stream) {
  QR_RETURN_IF_ERROR(check_activation_shape(m, k));
  if (m == 0) return QR_OK;
  QR_RETURN_IF_ERROR(check_pointer(packed));
  QR_RETURN_IF_ERROR(check_pointer(split));
  return QR_LAUNCH(split_activations_kernel, dim3(unsigned(m)), dim3(kPackThreads), 0,
                   static_cast<cudaStream_t>(stream), static_cast<const uint8_t*>(packed),
                   static_cast<uint8_t*>(split), int(m), int(k));
}

}  // extern "C"
