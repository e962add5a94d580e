// SPDX-License-Identifier: Apache-2.0
// What the INT4 GEMM kernels share: the problem, the operand orders, the epilogue, split-K.
//
// All of them compute the transpose, D^T[n, m] = W[n, k] X[m, k]^T: weights are the tensor core's A
// operand (rows = output features) and activations its B operand (columns = tokens). Two reasons.
// With few tokens only B shrinks, and B comes in columns of 8: a decode step of 8 tokens wastes
// nothing where the other way round it would waste half of a 16-row A. And the A operand of `wgmma`
// may come from registers, so 4-bit weights are unpacked there and never written back to memory.
//
//   W fragments (global)            X packed or split (global)
//        | 16 bytes a thread             | cp.async / bulk copy
//        v                               v
//   registers: nibbles -> s8 x16    shared memory, swizzled
//        +_______________ tensor core, int32 ______+
//                          v
//   acc >> shift, - zero * w_sum, * scale * w_scale, + bias      one rounding to fp16 / bf16
//
// The exact integer. An s8 operand made of a nibble is 16 times its value (a mask and a shift, no
// sign extension), so the accumulator is 16 or 256 times the sum of products; the epilogue shifts
// it back before it is used, and nothing is lost: 64 * 256 * k < 2^31 for every k < 131072.
#pragma once
#include "common.cuh"
#include "gemm_ops.cuh"
#include "layouts.hpp"

namespace qr {

// ---------------------------------------------------------------------------------- operand orders

// Eight nibbles -> the four even ones, or the four odd ones, as signed bytes times 16.
__device__ __forceinline__ uint32_t even_codes_x16(uint32_t word) {
  return (word << 4) & 0xF0F0F0F0u;
}
__device__ __forceinline__ uint32_t odd_codes_x16(uint32_t word) { return word & 0xF0F0F0F0u; }

// ----------------------------------------------------------------------------------------- problem

// Everything a GEMM kernel reads, by value. Pointers are device pointers.
struct GemmArgs {
  const void* q;         // activation codes: packed or split order
  const float* scale;    // [m] one per token
  const float* zero;     // [m] integer-valued zero point per token, or null (symmetric)
  const uint8_t* w;      // weight codes in fragment order
  const float* w_scale;  // [n] one per output feature
  const int32_t* w_sum;  // [n] sum over k of a feature's codes; read when zero is not null
  const float* bias;     // [n] or null
  void* y;               // [m, n], rows y_stride elements apart
  int64_t y_stride;      // a multiple of 8
  int32_t* counters;     // split-K: arrivals per tile, zero between launches
  int32_t* sums;         // split-K: partial sums per tile, zero between launches
  int m, n, k;           // tokens, output features, inner length
  int out_dtype;         // qr_dtype of y; QR_DTYPE_INT32 stores the exact sums
  int steps_per_split;   // units of k that one split takes: 128 codes (decode: 64)
  int splits;            // parts of k; 1: the workspace is not touched
};

// One output value. Products and sums are rounded one by one (`_rn` forbids contraction to FMA), so
// the result equals the NumPy reference bit for bit. `bias` is -0.0 where there is none: x + -0.0
// is x for every x, where x + 0.0 would turn -0.0 into +0.0.
__device__ __forceinline__ float scaled_output(int sum, float token_scale, float w_scale,
                                               float bias) {
  return __fadd_rn(__fmul_rn(__fmul_rn(__int2float_rn(sum), token_scale), w_scale), bias);
}

// Two values side by side in one 32-bit word, each rounded once.
__device__ __forceinline__ uint32_t pack_outputs(int out_dtype, float low, float high) {
  return out_dtype == QR_DTYPE_BF16 ? pack_pair<bf16>(low, high) : pack_pair<f16>(low, high);
}

// What one output feature brings to the epilogue.
struct FeatureTerms {
  float scale, bias;
  int sum;  // of the weight codes; 0 when symmetric
};

__device__ __forceinline__ FeatureTerms feature_terms(const GemmArgs& p, int feature) {
  const bool ok = feature < p.n;
  FeatureTerms t;
  t.scale = ok ? p.w_scale[feature] : 0.f;
  t.bias = ok && p.bias ? p.bias[feature] : -0.f;
  t.sum = ok && p.zero ? p.w_sum[feature] : 0;
  return t;
}

// What one token brings.
struct TokenTerms {
  float scale;
  int zero;
};

__device__ __forceinline__ TokenTerms token_terms(const GemmArgs& p, int token) {
  const bool ok = token < p.m;
  TokenTerms t;
  t.scale = ok ? p.scale[token] : 0.f;
  t.zero = ok && p.zero ? __float2int_rn(p.zero[token]) : 0;
  return t;
}

// ---------------------------------------------------------------------------------------- L2 order

// Tile number -> (feature tile, token tile). Eight feature tiles are walked through all their token
// tiles before the next eight, so that the CTAs running together share both operands in L2.
struct TileCoordinates {
  int feature, token;
};

__device__ __forceinline__ TileCoordinates tile_coordinates(int tile, int feature_tiles,
                                                            int token_tiles) {
  constexpr int kGroup = 8;
  const int group = tile / (kGroup * token_tiles);
  const int first = group * kGroup;
  const int width = min(kGroup, feature_tiles - first);
  const int within = tile - first * token_tiles;
  return {first + within % width, within / width};
}

// ----------------------------------------------------------------------------------------- split-K

// Adds this CTA's partial sums to the tile's and tells whether it came last. Integer addition is
// exact and commutes, so the result does not depend on the order of arrival: split-K stays
// deterministic to the bit. The last one takes the totals out and puts zeros back, which leaves the
// workspace as it was found.
//
// kCount: accumulators per thread. kThreads: threads that share the tile; `thread` is this one's
// number among them. sums: the tile's [kCount, kThreads] integers (neighbouring threads on
// neighbouring words, whatever the fragment shape). flag: one word of shared memory.
// sync(): a barrier for exactly those threads.
template <int kCount, int kThreads, class Sync>
__device__ __forceinline__ bool reduce_splits(int (&acc)[kCount], int32_t* sums, int32_t* counter,
                                              int splits, int thread, int* flag, Sync sync) {
  int32_t* const mine = sums + thread;  // one address, constant offsets from it
#pragma unroll
  for (int i = 0; i < kCount; i++) atomic_accumulate(mine + i * kThreads, acc[i]);
  thread_fence();  // my sums before my arrival
  sync();
  if (thread == 0) {
    const int before = atomic_add(counter, 1);
    if (before == splits - 1) *counter = 0;
    store_shared<int>(flag, before == splits - 1);
  }
  sync();
  if (!load_shared<int>(flag)) return false;
  thread_fence();  // their arrivals before their sums
#pragma unroll
  for (int i = 0; i < kCount; i++) {
    acc[i] = load_l2(mine + i * kThreads);
    mine[i * kThreads] = 0;
  }
  return true;
}

// ---------------------------------------------------------------------------------------- epilogue

// Row pitch, in bytes, of the shared-memory tile in which outputs change from feature-major (how
// the tensor core leaves them) to token-major (how y lies). 64 features are 128 bytes; 16 more
// shift each row by four banks, so the 8 x 4 words that a warp writes at once fall into 32 banks.
constexpr int kStagingPitch = 64 * 2 + 16;

// Scales one warp's fragments and writes them, transposed, to `staging` [tokens][64 features].
//
// kTiles16 x kTiles8: the warp's 16-feature by 8-token accumulator tiles, acc[i][j][4] in the order
// of mma's C operand: lane l holds features l/4 and l/4 + 8, tokens 2(l%4) and 2(l%4) + 1.
// kShift: the operands' factors of 16, four bits each. terms: of features l/4 + 8h, h = 0, 1, ...
// token0: the warp's first token, row 0 of `staging`. column: its first feature's staging column.
template <int kShift, int kTiles16, int kTiles8>
__device__ __forceinline__ void stage_outputs(const GemmArgs& p, const int (*acc)[4],
                                              const FeatureTerms* terms, int token0, int column,
                                              unsigned char* staging) {
  const int g = lane() / 4, q = lane() % 4;
  constexpr int kBatch = 4;  // token tiles whose terms are fetched together, to hide their latency
#pragma unroll
  for (int batch = 0; batch < kTiles8; batch += kBatch) {
    TokenTerms tokens[kBatch][2];
#pragma unroll
    for (int j = 0; j < kBatch; j++)
#pragma unroll
      for (int r = 0; r < 2; r++)
        if (batch + j < kTiles8)
          tokens[j][r] = token_terms(p, token0 + (batch + j) * 8 + 2 * q + r);
#pragma unroll
    for (int j = batch; j < kTiles8 && j < batch + kBatch; j++) {
#pragma unroll
      for (int i = 0; i < kTiles16; i++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
          const FeatureTerms& f = terms[i * 2 + half];
          const int* c = acc[i * kTiles8 + j] + half * 2;
          float value[2];
#pragma unroll
          for (int r = 0; r < 2; r++) {
            const TokenTerms& t = tokens[j - batch][r];
            value[r] = scaled_output((c[r] >> kShift) - t.zero * f.sum, t.scale, f.scale, f.bias);
          }
          // (feature g, tokens 2q 2q+1) -> (token g, features 2q 2q+1)
          const uint32_t pair = transpose_fragment(pack_outputs(p.out_dtype, value[0], value[1]));
          store_shared(
              staging + (j * 8 + g) * kStagingPitch + (column + i * 16 + half * 8 + 2 * q) * 2,
              pair);
        }
    }
    compiler_fence();  // fetch the next batch's terms only now: registers are short
  }
}

// The exact sums, straight from the fragments, neither corrected nor scaled: y is int32 [m, n]. For
// tests, and for callers that scale elsewhere; its scattered 4-byte stores are not meant to be
// fast.
template <int kShift, int kTiles16, int kTiles8>
__device__ __forceinline__ void store_sums(const GemmArgs& p, const int (*acc)[4], int feature0,
                                           int token0) {
  const int g = lane() / 4, q = lane() % 4;
  int32_t* y = static_cast<int32_t*>(p.y);
#pragma unroll
  for (int j = 0; j < kTiles8; j++) {
#pragma unroll
    for (int i = 0; i < kTiles16; i++)
#pragma unroll
      for (int r = 0; r < 4; r++) {
        const int token = token0 + j * 8 + 2 * q + (r & 1);
        const int feature = feature0 + i * 16 + g + (r >> 1) * 8;
        if (token < p.m && feature < p.n)
          y[token * p.y_stride + feature] = acc[i * kTiles8 + j][r] >> kShift;
      }
    compiler_fence();
  }
}

// Moves staged rows to y in 16-byte pieces: eight lanes take one token's 128 bytes, so a warp
// writes whole lines. kFeatures: staged features (32 or 64). Rows and columns outside y are
// dropped; n is a multiple of 8, so a piece is inside or outside as a whole.
//
// thread, threads: this thread's number among those that copy. tokens: staged rows.
template <int kFeatures>
__device__ __forceinline__ void copy_staged(const GemmArgs& p, const unsigned char* staging,
                                            int tokens, int feature0, int token0, int thread,
                                            int threads) {
  constexpr int kPieces = kFeatures / 8;
  unsigned char* y = static_cast<unsigned char*>(p.y);
  for (int i = thread; i < tokens * kPieces; i += threads) {
    const int piece = i % kPieces, row = i / kPieces;
    // Eight lanes share a shared-memory phase. Where they span two tokens, the second is the fourth
    // after the first, whose banks are the other half: 4 * kStagingPitch = 64 bytes mod 128.
    const int token = kPieces == 8 ? row : row / 8 * 8 + row % 8 / 2 + row % 2 * 4;
    const uint4 values = load_shared<uint4>(staging + token * kStagingPitch + piece * 16);
    if (token0 + token < p.m && feature0 + piece * 8 < p.n)
      *reinterpret_cast<uint4*>(y + ((token0 + token) * p.y_stride + feature0 + piece * 8) * 2) =
          values;
  }
}

}  // namespace qr
