// SPDX-License-Identifier: Apache-2.0
// Multiplication by dense ±1 factors on tensor cores, from and to the buffers of a block of threads
// (see hadamard.cu for why): the part that whole rows (hadamard.cu) and tiles of rows that do not
// fit a block (hadamard_wide.cu) share.
#pragma once

#include "transform.cuh"

namespace qr {

// Sign fragments of a factor of order K, padded to 16s: word [m tile][4 k steps][lane]. Of lane l,
// k step 4w + i and A register r, the signs of the two halves are bits 15 - (4i + r) and 31 - (4i +
// r), so that a shift brings them to the sign bits of a pair of halves. A[m][k] = H[k][m]: the
// factor transposed, since y[m] = sum_k x[k] H[k][m].
QR_HOST_DEVICE constexpr int tiles_of(int order) { return (order + 15) / 16; }
QR_HOST_DEVICE constexpr int sign_steps_of(int order) { return (tiles_of(order) + 3) / 4; }
QR_HOST_DEVICE constexpr int sign_words_of(int order) {
  return tiles_of(order) * sign_steps_of(order) * 32;
}

template <class T>
__device__ __forceinline__ constexpr uint32_t pair_of_ones();
template <>
__device__ __forceinline__ constexpr uint32_t pair_of_ones<f16>() {
  return 0x3C003C00u;
}
template <>
__device__ __forceinline__ constexpr uint32_t pair_of_ones<bf16>() {
  return 0x3F803F80u;
}

// The ±1 operand of k step i (0..3) of a sign word.
template <class T>
__device__ __forceinline__ void expand_signs(uint32_t word, int i, uint32_t (&a)[4]) {
#pragma unroll
  for (int r = 0; r < 4; r++) a[r] = (word << (4 * i + r) & 0x80008000u) | pair_of_ones<T>();
}

// Byte offset in the 16-bit input buffer. Chunks of 8 elements are XORed, within groups of eight,
// by the digits of the group number: whatever the distance of a factor's rows (8 to 4096 elements),
// the eight rows of an ldmatrix phase fall on different banks.
__device__ __forceinline__ int input_place(int element) {
  const int chunk = element >> 3;
  return ((chunk ^ ((chunk >> 3 ^ chunk >> 6 ^ chunk >> 9) & 7)) << 4) | ((element & 7) << 1);
}

constexpr int kTilesM = 4;     // 16-row tiles of a factor that a warp computes at once
constexpr int kMaxTiles = 12;  // order 192

// First factor: 16-bit input -> fp32 exchange buffer. Warps share pieces of 16 columns x 64 result
// rows; a column is an index of everything but the factor. `zeros`: 16 zero bytes, read for rows
// past the order.
template <class T>
__device__ __forceinline__ void first_factor(const TransformParams& p, const unsigned char* input,
                                             const unsigned char* zeros, float* exchange, int warp,
                                             int warps) {
  const int order = p.dense[0], stride = p.dense_stride[0], l = lane();
  const int tiles = tiles_of(order), sign_steps = sign_steps_of(order);
  const int column_tiles = p.n / order / 8, chunks_m = (tiles + kTilesM - 1) / kTilesM;
  const int pieces = (column_tiles + 1) / 2 * chunks_m;
  for (int piece = warp; piece < pieces; piece += warps) {
    const int first_tile = piece % chunks_m * kTilesM, columns = piece / chunks_m * 2;
    int base[2];  // element of (row 0, first column) of both column tiles
#pragma unroll
    for (int c = 0; c < 2; c++) {
      const int column = min(columns + c, column_tiles - 1) * 8;
      base[c] = column / stride * stride * order + column % stride;
    }
    float sums[kTilesM][2][4];
#pragma unroll
    for (int m = 0; m < kTilesM; m++)
#pragma unroll
      for (int c = 0; c < 2; c++)
#pragma unroll
        for (int r = 0; r < 4; r++) sums[m][c][r] = 0.f;

    const int my_base = l & 16 ? base[1] : base[0];  // lanes 16..31 point at the second column tile
    for (int step = 0; step < sign_steps; step++) {
      uint32_t signs[kTilesM];
#pragma unroll
      for (int m = 0; m < kTilesM; m++)
        signs[m] = p.signs[(min(first_tile + m, tiles - 1) * sign_steps + step) * 32 + l];
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int row = (step * 4 + i) * 16 + (l & 15);
        if ((step * 4 + i) * 16 >= order) break;
        uint32_t b[4];  // k 0..7 and 8..15 of column tile 0, then of tile 1
        ldmatrix_x4_transposed(b,
                               row < order ? input + input_place(my_base + row * stride) : zeros);
#pragma unroll
        for (int m = 0; m < kTilesM; m++) {
          if (first_tile + m >= tiles) break;
          uint32_t a[4];
          expand_signs<T>(signs[m], i, a);
          mma_16<T>(sums[m][0], a, b);
          mma_16<T>(sums[m][1], a, b + 2);
        }
      }
    }

    const int g = l >> 2, q = l & 3;
#pragma unroll
    for (int m = 0; m < kTilesM; m++)
#pragma unroll
      for (int c = 0; c < 2; c++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
          const int row = (first_tile + m) * 16 + half * 8 + g;
          if (row >= order || columns + c >= column_tiles) continue;
          float x = sums[m][c][2 * half], y = sums[m][c][2 * half + 1];
          if (p.butterflies & 1) {
            const float sum = x + y;
            y = x - y;
            x = sum;
          }
          store_shared<float2>(exchange + exchange_place(base[c] + row * stride + 2 * q),
                               make_float2(x, y));
        }
  }
}

// x as a sum of three bf16 values, exactly but for a relative 2^-24.
__device__ __forceinline__ void split_bf16(float x, float y, uint32_t (&parts)[3]) {
#pragma unroll
  for (int i = 0; i < 3; i++) {
    parts[i] = pack_pair<bf16>(x, y);
    const float2 taken = unpack_pair<bf16>(parts[i]);
    x -= taken.x;
    y -= taken.y;
  }
}

// A further factor, in place in the exchange buffer: a warp reads all rows of 8 columns, then
// writes them, so it only races with itself. `signs`: of this factor.
__device__ __forceinline__ void further_factor(const TransformParams& p, int order, int stride,
                                               const uint32_t* signs, float* exchange, int warp,
                                               int warps) {
  const int l = lane(), g = l >> 2, q = l & 3;
  const int tiles = tiles_of(order), sign_steps = sign_steps_of(order), columns = p.n / order;
  for (int first = warp * 8; first < columns; first += warps * 8) {
    const int column = min(first + g, columns - 1);
    const int base = column / stride * stride * order + column % stride;
    float sums[kMaxTiles][4];
#pragma unroll
    for (int m = 0; m < kMaxTiles; m++)
#pragma unroll
      for (int r = 0; r < 4; r++) sums[m][r] = 0.f;

    for (int k = 0; k < tiles; k++) {
      float x[4];  // rows 2q, 2q + 1, 2q + 8, 2q + 9
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int row = k * 16 + 2 * q + (i & 1) + (i >> 1) * 8;
        x[i] =
            row < order ? load_shared<float>(exchange + exchange_place(base + row * stride)) : 0.f;
      }
      uint32_t low[3], high[3];
      split_bf16(x[0], x[1], low);
      split_bf16(x[2], x[3], high);
#pragma unroll
      for (int m = 0; m < kMaxTiles; m++) {
        if (m >= tiles) break;
        uint32_t a[4];
        expand_signs<bf16>(signs[(m * sign_steps + k / 4) * 32 + l] << (4 * (k & 3)), 0, a);
#pragma unroll
        for (int part = 0; part < 3; part++) {
          const uint32_t b[2] = {low[part], high[part]};
          mma_16<bf16>(sums[m], a, b);
        }
      }
    }
    __syncwarp();
#pragma unroll
    for (int m = 0; m < kMaxTiles; m++)
#pragma unroll
      for (int r = 0; r < 4; r++) {
        const int row = m * 16 + g + (r >> 1) * 8, mine = first + 2 * q + (r & 1);
        if (row >= order || mine >= columns) continue;
        store_shared<float>(exchange + exchange_place(mine / stride * stride * order +
                                                      mine % stride + row * stride),
                            sums[m][r]);
      }
  }
}

// What is left behind dense factors: bits 1..6 in registers, block bits 7..10 between lanes, of
// which consecutive pairs hold consecutive blocks.
__device__ __forceinline__ void butterflies_behind(const TransformParams& p, int thread,
                                                   float (&v)[kPerThread]) {
#pragma unroll
  for (int i = 1; i <= 6; i++)
    if (p.butterflies >> i & 1) butterfly(v, 1 << (i - 1));
  for (int i = 0; i < 4; i++)
    if (p.butterflies >> (7 + i) & 1) {
      const float sign = thread >> (1 + i) & 1 ? -1.f : 1.f;
#pragma unroll
      for (int q = 0; q < kPerThread; q++)
        v[q] = fmaf(v[q], sign, __shfl_xor_sync(kAllLanes, v[q], 2 << i));
    }
}

}  // namespace qr
