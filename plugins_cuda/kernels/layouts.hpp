// SPDX-License-Identifier: Apache-2.0
// The byte orders of the GEMM's operands, as offsets. NumPy twin: quarot_onnx/plugins/layouts.py. A
// change of order is a new tag in qr_layout.
//
// Fragment order, QR_LAYOUT_WEIGHTS_FRAGMENTS_V1: the A operand of a tensor core, 16 bytes a lane.
//
//   uint8 [ceil(n/64)] [2 ceil(k/128)] [4 warps] [32 lanes] [16]     (padding is zero codes)
//
// A *word* is 8 consecutive codes of one row (32 bits, low nibble first). In the block of rows
// 64i.. and words 8j.., lane l of warp w holds, with g = l / 4 and q = l % 4, the words
//
//   (16w + g, q)   (16w + g + 8, q)   (16w + g, q + 4)   (16w + g + 8, q + 4)     of (row, word).
//
// That is the operand of mma.m16n8k64.s4 as it stands. Unpacked to bytes, its even codes are the
// operand of one s8 instruction (mma.m16n8k32, wgmma.m64nNk32) and its odd codes that of a second.
// So one order serves all kernels and architectures, with these reasons for its details:
//   * 64 x 64 codes are 2 KB in one piece: a linear copy brings a tile into shared memory, and a
//     decode warp streams 512 adjacent bytes.
//   * 16 bytes a lane: LDG.128 and LDS.128 without bank conflicts. (32 bytes a lane, two k blocks
//     together, would put lanes t and t + 4 on the same banks.)
//   * k padded to 128: a pipeline step is never half empty on the weight side, and whatever
//     integers the activations show beyond k are multiplied by zero.
//
// Split order, QR_LAYOUT_ACTIVATIONS_SPLIT_V1: the B operand of wgmma.m64nNk32.s8, a byte a code.
//
//   int8 [ceil(k/128)] [m rounded up to 8] [128]
//
// A row's 128 bytes are eight chunks of 16: of the first 64 codes the even ones (chunks 0, 1), the
// odd ones (2, 3), then the same of the second 64. Chunk c of row r lies at place c ^ (r % 8), the
// 128-byte swizzle of wgmma, so that the bytes of a tile are in global memory as they must be in
// shared memory: one linear bulk copy loads them, without a tensor map.
#pragma once
#include <cstddef>
#include <cstdint>

#if defined(__CUDACC__)
#define QR_LAYOUT_FN __host__ __device__ __forceinline__
#else
#define QR_LAYOUT_FN inline
#endif

namespace qr {

constexpr int kFragmentRows = 64;        // features in a block (wgmma's M)
constexpr int kFragmentColumns = 64;     // codes of k in a block
constexpr int kFragmentBytes = 2048;     // 64 x 64 nibbles
constexpr int kWarpFragmentBytes = 512;  // a warp's 16 rows of a block: 32 lanes x 16 bytes
constexpr int kStepColumns = 128;        // codes of k in a pipeline step; k is padded to it
constexpr int kMaxK = 131008;            // 64 * 256 * k < 2^31: no accumulator can overflow

QR_LAYOUT_FN constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }
// Blocks along n and along k.
QR_LAYOUT_FN constexpr int fragment_blocks_n(int n) { return ceil_div(n, kFragmentRows); }
QR_LAYOUT_FN constexpr int fragment_blocks_k(int k) { return 2 * ceil_div(k, kStepColumns); }
// Byte offset of a block.
QR_LAYOUT_FN constexpr size_t fragment_offset(int block_n, int block_k, int blocks_k) {
  return (size_t(block_n) * blocks_k + block_k) * kFragmentBytes;
}

// Rows that split order stores for m tokens.
QR_LAYOUT_FN constexpr int split_rows(int m) { return ceil_div(m, 8) * 8; }
// Byte offset of chunk c (16 codes of one parity) of a token's step of 128 codes.
QR_LAYOUT_FN constexpr size_t split_offset(int step, int token, int chunk, int rows) {
  return (size_t(step) * rows + token) * kStepColumns + ((chunk ^ (token & 7)) << 4);
}

}  // namespace qr
