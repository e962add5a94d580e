// SPDX-License-Identifier: Apache-2.0
// Rows in, rows or INT4 codes out: how the transform kernels divide a row, and their two ends.
//
// A row has n elements, n = 128 * blocks. An element index has bits
//
//     [ block (8 bits at most) | 6 ... 1 | 0 ]
//
// and two threads own a block at the end of every kernel: the even one its even-indexed elements,
// the odd one the odd-indexed, 64 values each in registers. Why this split:
//   * Six index bits (1..6) are inside a thread, so six butterfly stages cost 1 FADD per element
//   and
//     stage, with no data movement. Warp shuffles, the usual way, would need five of their 32 lanes
//     per clock and element and be the bottleneck when the output is only half a byte wide.
//   * Low nibbles come from even elements and high nibbles from odd ones: a thread packs its codes
//   as
//     bytes, and one exchange with its neighbour (8 words of 64 codes) makes words of 8 nibbles.
//   * The split activation layout stores evens and odds apart: its 16-byte chunks are a thread's
//   own.
//
// Between the load and this end there is one exchange through shared memory, of fp32 values, so a
// transform of 2^12 is six bits in registers, an exchange, six bits in registers.
#pragma once

#include <type_traits>

#include "common.cuh"

namespace qr {

// Where a row comes from.
enum Source {
  kSourceRow,      // x, optionally with RMSNorm
  kSourceGate,     // SiLU(x) * up
  kSourcePartials  // attention: the weighted sum of the KV slices' partial outputs
};

constexpr int kBlock = 128;     // elements that a pair of threads owns
constexpr int kPerThread = 64;  // of them, one thread's
constexpr int kPairs = 32;      // 32-bit words of input that a thread loads: 64 elements of 16 bits
constexpr int kMaxRow = 32768;  // 512 threads
constexpr int kMaxThreads = kMaxRow / kPerThread;
constexpr int kMaxDense = 3;  // QR_MAX_DENSE_FACTORS

struct TransformParams {
  // ---- in
  const void* x;             // [rows, n], row stride x_stride elements
  const void* up;            // [rows, n], row stride up_stride (kSourceGate)
  const void* norm_weight;   // [n] or null (RMSNorm)
  const float* partials;     // [rows][splits][n] fp32, unnormalized (kSourcePartials)
  const float2* statistics;  // [rows][splits][n / head_dim]: maximum and sum, see kv_attention.cuh
  const uint32_t* signs;     // dense factors, as qr_make_hadamard_plan packs them
  int64_t x_stride, up_stride;
  // ---- out
  void* y;       // [rows, n]
  void* codes;   // in `layout`
  float* scale;  // [rows]
  // ---- sizes
  int64_t rows;
  int n, blocks;                        // blocks = n / 128
  int threads_per_row, rows_per_block;  // threads_per_row divides 32 or is a multiple of it
  int splits, head_dim, log_head_dim;   // kSourcePartials
  int dense[kMaxDense], dense_stride[kMaxDense];  // order; distance of neighbours along the factor
  // ---- what to do
  uint32_t butterflies;  // bit i: transform across bit i of the element index
  int rotation;          // blocks are dealt to threads with their top `rotation` bits first
  int prologue, epilogue, layout;
  float epsilon, clip_over_qmax;
  float norm;  // 1 / sqrt(product of the orders), applied once at the end
};

// ------------------------------------------------------------------------------- the exchange
// buffer

// The part of an fp32 element's place that depends on its block: bits 1..4 of the place are XORed
// with a linear function of the block number, chosen so that in each of these cases the lanes hit
// 32 different banks:
//   * back: 16 consecutive blocks (in the dealt order, rotation 0..3), one element index;
//   * dense factors: 4 consecutive rows of a factor, 8 columns, as the tensor core leaves them, for
//     rows 32, 64, 128, 256, 512 or 1024 elements apart.
QR_HOST_DEVICE constexpr int block_swizzle(int block) {
  return (((block ^ block >> 2 ^ block >> 4 ^ block >> 6) & 1) << 4) |
         (((block ^ block >> 2 ^ block >> 4 ^ block >> 6) & 2) << 2) |
         (((block >> 2 ^ block >> 6) & 1) << 2) | (((block >> 3 ^ block >> 5) & 1) << 1);
}
// Place of an element in the fp32 buffer. Neighbours 2i, 2i + 1 stay neighbours.
QR_HOST_DEVICE constexpr int exchange_place(int element) {
  return element ^ block_swizzle(element >> 7) ^ (((element >> 6) & 1) << 3) ^
         (((element >> 5) & 1) << 4);
}

// ------------------------------------------------------------------------------------------ the
// front

// Which elements a thread loads: kPairs words, each a pair of neighbours.
//
// FrontItems: bit 0 inside a thread, and block bits 0..kLogQ-1: an item is 2^kLogQ words that lie
// 128 elements apart. A row has 64 * blocks >> kLogQ items; neighbouring threads take neighbouring
// pairs, so every load of a warp is one line of 128 bytes.
template <int kLogQ>
struct FrontItems {
  static constexpr int kWords = 1 << kLogQ;       // of an item
  static constexpr int kItems = kPairs >> kLogQ;  // of a thread
  static __device__ __forceinline__ int first_element(int thread, int item, int blocks) {
    const int number = thread + 2 * blocks * item;
    return ((number >> 6) << (7 + kLogQ)) + 2 * (number & 63);
  }
  static __device__ __forceinline__ int element(int thread, int word, int blocks) {
    return first_element(thread, word >> kLogQ, blocks) + (word & (kWords - 1)) * kBlock;
  }
};
// ChunkItems: 8 neighbouring elements per 16-byte load, for rows that are not transformed.
struct ChunkItems {
  static __device__ __forceinline__ int element(int thread, int word, int blocks) {
    return (thread + 2 * blocks * (word >> 2)) * 8 + 2 * (word & 3);
  }
};

// Starts the loads of a row. Threads without elements, and rows past the end, get zeros.
template <int kSource, class Items>
__device__ __forceinline__ void load_row(const TransformParams& p, int64_t row, int thread,
                                         uint32_t (&words)[kPairs],
                                         uint32_t (&up)[kSource == kSourceGate ? kPairs : 1]) {
  const bool valid = row < p.rows && thread < 2 * p.blocks;
  const uint16_t* x = static_cast<const uint16_t*>(p.x) + (valid ? row * p.x_stride : 0);
  const uint16_t* u = static_cast<const uint16_t*>(p.up);
  if constexpr (kSource == kSourceGate) u += valid ? row * p.up_stride : 0;
  if constexpr (std::is_same<Items, ChunkItems>::value) {
#pragma unroll
    for (int w = 0; w < kPairs; w += 4) {
      const int element = Items::element(thread, w, p.blocks);
      const uint4 a = valid ? load_streaming_chunk(x + element) : make_uint4(0, 0, 0, 0);
      words[w] = a.x, words[w + 1] = a.y, words[w + 2] = a.z, words[w + 3] = a.w;
      if constexpr (kSource == kSourceGate) {
        const uint4 b = valid ? load_streaming_chunk(u + element) : make_uint4(0, 0, 0, 0);
        up[w] = b.x, up[w + 1] = b.y, up[w + 2] = b.z, up[w + 3] = b.w;
      }
    }
  } else {
#pragma unroll
    for (int w = 0; w < kPairs; w++) {
      const int element = Items::element(thread, w, p.blocks);
      words[w] = valid ? load_streaming_4(x + element) : 0;
      if constexpr (kSource == kSourceGate) up[w] = valid ? load_streaming_4(u + element) : 0;
    }
  }
}

// Combines kWidth-lane results of a row over its warps; `slots` is shared memory, one float per
// warp of the block, and a barrier passes. kMax: maximum, else sum. The same bits in every thread
// of the row.
template <bool kMax>
__device__ __forceinline__ float reduce_row(const TransformParams& p, float value, float* slots) {
  const int warps = p.threads_per_row / 32;
  if (warps == 0) {  // several rows in a warp
    for (int s = 1; s < p.threads_per_row; s *= 2) {
      const float other = __shfl_xor_sync(kAllLanes, value, s);
      value = kMax ? fmaxf(value, other) : value + other;
    }
    __syncthreads();
    return value;
  }
  value = kMax ? warp_max(value) : warp_sum(value);
  const int warp = static_cast<int>(threadIdx.x / 32), first = warp / warps * warps;
  if (lane() == 0) store_shared<float>(slots + warp, value);
  __syncthreads();
  value = load_shared<float>(slots + first);
  for (int w = 1; w < warps; w++) {
    const float other = load_shared<float>(slots + first + w);
    value = kMax ? fmaxf(value, other) : value + other;
  }
  return value;
}

__device__ __forceinline__ float silu(float gate) {
  return gate * reciprocal_fast(1.f + exp2_fast(gate * -1.4426950408889634f));
}

// The row after its prologue, as pairs of T in `words`: what a separate operator would have stored.
template <class T, int kSource, class Items>
__device__ __forceinline__ void apply_prologue(const TransformParams& p, int64_t row, int thread,
                                               uint32_t (&words)[kPairs],
                                               uint32_t (&up)[kSource == kSourceGate ? kPairs : 1],
                                               float* slots, const float* slice_weights) {
  if constexpr (kSource == kSourceGate) {
#pragma unroll
    for (int w = 0; w < kPairs; w++) {
      const float2 g = unpack_pair<T>(words[w]), u = unpack_pair<T>(up[w]);
      words[w] = pack_pair<T>(silu(g.x) * u.x, silu(g.y) * u.y);
    }
  } else if constexpr (kSource == kSourcePartials) {
    const bool valid = row < p.rows && thread < 2 * p.blocks;
    const int heads = p.n / p.head_dim;
    float2 sum[kPairs];
#pragma unroll
    for (int w = 0; w < kPairs; w++) sum[w] = make_float2(0.f, 0.f);
    if (valid) {
#pragma unroll 1  // a slice at a time: its 32 loads are in flight together
      for (int s = 0; s < p.splits; s++) {
        const float* slice = p.partials + (row * p.splits + s) * p.n;
#pragma unroll
        for (int w = 0; w < kPairs; w++) {
          const int element = Items::element(thread, w, p.blocks);
          const float2 part = *reinterpret_cast<const float2*>(slice + element);
          const float weight =
              load_shared<float>(slice_weights + s * heads + (element >> p.log_head_dim));
          sum[w].x = fmaf(weight, part.x, sum[w].x);
          sum[w].y = fmaf(weight, part.y, sum[w].y);
        }
      }
    }
#pragma unroll
    for (int w = 0; w < kPairs; w++) words[w] = pack_pair<T>(sum[w].x, sum[w].y);
  } else if (p.prologue == QR_PROLOGUE_RMSNORM) {
    float squares = 0.f;
#pragma unroll
    for (int w = 0; w < kPairs; w++) {
      const float2 v = unpack_pair<T>(words[w]);
      squares = fmaf(v.x, v.x, squares);
      squares = fmaf(v.y, v.y, squares);
    }
    squares = reduce_row<false>(p, squares, slots);
    const float factor = __fdiv_rn(
        1.f, __fsqrt_rn(__fadd_rn(__fdiv_rn(squares, static_cast<float>(p.n)), p.epsilon)));
    const uint16_t* weight = static_cast<const uint16_t*>(p.norm_weight);
#pragma unroll
    for (int w = 0; w < kPairs; w++) {
      const float2 v = unpack_pair<T>(words[w]);
      float2 g = make_float2(1.f, 1.f);
      if (weight && thread < 2 * p.blocks)
        g = unpack_pair<T>(
            *reinterpret_cast<const uint32_t*>(weight + Items::element(thread, w, p.blocks)));
      words[w] = pack_pair<T>(v.x * factor * g.x, v.y * factor * g.y);
    }
  }
}

// ------------------------------------------------------------------------------------------- the
// back

// The block of a pair of threads. The top `rotation` bits of the block number come first, so that
// they are lane bits and the butterflies across them can be shuffles (rows longer than 4096; see
// hadamard.cu).
__device__ __forceinline__ int dealt_block(int pair, int rotation) {
  const int period = 5 + rotation, within = pair & ((1 << period) - 1);
  return (pair >> period << period) | ((within & ((1 << rotation) - 1)) << 5) |
         (within >> rotation);
}

// Butterflies across bit i of the position in `v`.
template <int kCount>
__device__ __forceinline__ void butterfly(float (&v)[kCount], int distance) {
#pragma unroll
  for (int i = 0; i < kCount; i++)
    if (!(i & distance)) {
      const float a = v[i], b = v[i ^ distance];
      v[i] = a + b;
      v[i ^ distance] = a - b;
    }
}

// Reads a thread's 64 values from the exchange buffer: v[q] is element 128 * block + 2q + parity.
__device__ __forceinline__ void read_exchange(const float* buffer, int block, int parity,
                                              float (&v)[kPerThread]) {
  const int swizzle = block_swizzle(block);
#pragma unroll
  for (int i = 0; i < 16; i++) {
    const float* place = buffer + block * kBlock + ((2 * i) ^ swizzle) + parity;
#pragma unroll
    for (int j = 0; j < 4; j++) {  // bits 5 and 6 of the index move bits 4 and 3 of the place
      const int q = j * 16 + (i ^ ((j >> 1) << 2) ^ ((j & 1) << 3));
      v[q] = load_shared<float>(place + 32 * j);
    }
  }
}

// Division by a row's scale. x / scale must round as the reference's division does, half to even
// ties included, for less than its eight instructions: with the correctly rounded inverse, one
// multiplication, the exact remainder and one correction give the correctly rounded quotient
// (Markstein 1990, theorem on q + r y). Scales below 1e-30 are lifted by 2^96, else the inverse
// overflows.
struct RowDivider {
  float norm, scale, inverse;
};

__device__ __forceinline__ RowDivider row_divider(float norm, float scale) {
  constexpr float kLift = 79228162514264337593543950336.f;
  const float lift = scale < 1e-30f ? kLift : 1.f;
  return {norm * lift, scale * lift, __fdiv_rn(1.f, scale * lift)};
}

// The nearest codes to x * norm / scale of four values, as the bytes (two's complement) of a word.
__device__ __forceinline__ uint32_t four_codes(float a, float b, float c, float d,
                                               const RowDivider& divider) {
  constexpr float kRound = 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer, half to even
  const float v[4] = {a, b, c, d};
  uint32_t t[4];
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const float x = __fmul_rn(v[i], divider.norm);
    const float near = __fmul_rn(x, divider.inverse);
    const float quotient = fmaf(fmaf(-near, divider.scale, x), divider.inverse, near);
    t[i] = __float_as_uint(__fadd_rn(fminf(fmaxf(quotient, -8.f), 7.f), kRound));
  }
  return __byte_perm(__byte_perm(t[0], t[1], 0x0040), __byte_perm(t[2], t[3], 0x0040), 0x5410);
}

// The scale of the row that v is part of: max|v * norm| * clip / qmax, or 1. A barrier passes.
__device__ __forceinline__ float row_scale(const TransformParams& p, const float (&v)[kPerThread],
                                           bool active, float* slots) {
  float amax = 0.f;
#pragma unroll
  for (int q = 0; q < kPerThread; q++) amax = fmaxf(amax, fabsf(v[q]));
  amax = __fmul_rn(reduce_row<true>(p, active ? amax : 0.f, slots), p.norm);
  return amax == 0.f ? 1.f : __fmul_rn(amax, p.clip_over_qmax);
}

__device__ __forceinline__ void store_16(void* pointer, uint32_t a, uint32_t b, uint32_t c,
                                         uint32_t d) {
  *static_cast<uint4*>(pointer) = make_uint4(a, b, c, d);
}

// The end of a row: v (unnormalized, see read_exchange) as T, or quantized. A barrier passes
// inside, after which the exchange buffer may be overwritten. `block` is valid for idle threads too
// (`active` false).
template <class T>
__device__ __forceinline__ void finish_row(const TransformParams& p, int64_t row, int thread,
                                           int block, bool active, float (&v)[kPerThread],
                                           float* slots) {
  const bool odd = thread & 1;
  if (p.epilogue == QR_EPILOGUE_STORE) {
    __syncthreads();
    uint16_t* y = static_cast<uint16_t*>(p.y) + row * p.n + block * kBlock;
#pragma unroll
    for (int m = 0; m < 16;
         m += 2) {  // pieces of 8 elements: the even thread writes m, the odd one m + 1
      uint32_t mine[2], theirs[2];
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const int q = 4 * m + 2 * i;
        const uint32_t first = pack_pair<T>(v[q] * p.norm, v[q + 1] * p.norm);
        const uint32_t second = pack_pair<T>(v[q + 4] * p.norm, v[q + 5] * p.norm);
        theirs[i] = __shfl_xor_sync(kAllLanes, odd ? first : second, 1);
        mine[i] = odd ? second : first;
      }
      uint32_t out[4];
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const uint32_t even = odd ? theirs[i] : mine[i], other = odd ? mine[i] : theirs[i];
        out[2 * i] = __byte_perm(even, other, 0x5410);
        out[2 * i + 1] = __byte_perm(even, other, 0x7632);
      }
      if (active) store_16(y + (m + odd) * 8, out[0], out[1], out[2], out[3]);
    }
    return;
  }

  const float scale = row_scale(p, v, active, slots);
  if (active && thread == 0) p.scale[row] = scale;
  const RowDivider divider = row_divider(p.norm, scale);

  if (p.layout == QR_LAYOUT_ACTIVATIONS_SPLIT_V1) {
    // Chunks of 16 codes: per 64 codes two of evens, two of odds; the swizzle permutes them in the
    // row.
    const int64_t padded_rows = (p.rows + 7) & ~int64_t{7};
    uint8_t* line = static_cast<uint8_t*>(p.codes) + (block * padded_rows + row) * kBlock;
#pragma unroll
    for (int chunk = 0; chunk < 4; chunk++) {
      uint32_t w[4];
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int q = 16 * chunk + 4 * i;
        w[i] = four_codes(v[q], v[q + 1], v[q + 2], v[q + 3], divider);
      }
      const int place = (chunk >> 1) * 4 + odd * 2 + (chunk & 1);
      if (active)
        store_16(line + ((place ^ static_cast<int>(row & 7)) << 4), w[0], w[1], w[2], w[3]);
    }
    return;
  }

  uint8_t* packed = static_cast<uint8_t*>(p.codes) + row * (p.n / 2) + block * (kBlock / 2);
#pragma unroll
  for (int half = 0; half < 2; half++) {
    uint32_t w[8], out[4];
#pragma unroll
    for (int i = 0; i < 8; i++) {
      const int q = 32 * half + 4 * i;
      w[i] = four_codes(v[q], v[q + 1], v[q + 2], v[q + 3], divider) & 0x0F0F0F0Fu;
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {  // the even thread makes words 0..3 of eight, the odd one 4..7
      const uint32_t theirs = __shfl_xor_sync(kAllLanes, odd ? w[i] : w[4 + i], 1);
      out[i] = odd ? theirs | w[4 + i] << 4 : w[i] | theirs << 4;
    }
    if (active) store_16(packed + half * 32 + odd * 16, out[0], out[1], out[2], out[3]);
  }
}

}  // namespace qr
