// SPDX-License-Identifier: Apache-2.0
// Attention over the packed INT4 cache, on tensor cores, without dequantizing it first.
//
// For one kv head, the query heads that share it (and, in prefill, neighbouring query tokens) are
// the columns of two small products, eight columns to a tensor-core tile:
//
//   scores  S^T[16 tokens, 8 columns] = K[16, d] q^T        A = K codes from registers
//   output  O^T[16 dims,   8 columns] = V^T[16, 16 tokens] P^T   A = V codes from ldmatrix.trans
//
// Codes become operands by mask and subtraction: (w >> 4i) & 0x000F000F | 0x64006400 is the pair
// (1024 + u, 1024 + u') of fp16, and subtracting 1024 + zero leaves the exact integers u - zero,
// |.| <= 15. So 4 codes cost 3 instructions, zero points need no correction terms, and a token's
// two scales act on the scores: K's multiplies them, V's goes into the weights.
//
// V's scale. With z_t = s_t + log2(scale_t), weight_t * scale_t = exp2(z_t - m) for m = max z: the
// operand P' is in [0, 1] whatever the scales, and the softmax sum is sum P'_t / scale_t.
//
// Query. q (after its Hadamard, if any) is divided by max|q| of the column and rounded to fp16: 11
// bits whatever its range; the factor returns in the softmax scale.
//
// Dimension order. A lane reads 16-byte runs of K, so its nibble pairs are dims (i, i + 4) of each
// run of 8; q is loaded in that same order. V through ldmatrix.trans leaves output rows 4g + i, so
// a lane ends with four neighbouring dims. Neither costs an instruction.
//
//   decode  one warp = 16 tokens at a time of its own; 4 warps and the KV slices (grid) divide the
//   cache;
//           each warp has its own cp.async ring, so the loop has no block barrier. Partial outputs
//           go to the workspace; the combine is the prologue of the transform kernels, which apply
//           the heads Hadamard and quantize for o_proj in the same pass.
//   prefill one warp = 16 columns; 4 warps share tiles of 64 tokens; nothing is split.
#include <algorithm>

#include "device.hpp"
#include "kv_cache.cuh"
#include "transform_launch.hpp"

namespace qr {

constexpr int kTokensPerTile = 16;  // of one mma
constexpr int kColumns = 8;         // of one mma
constexpr int kWarps = 4;
constexpr float kNothing = -1e30f;  // the maximum before any token; finite, so that differences are

struct AttentionParams {
  const void* q;  // element (b, h, t, d) at b * strides[0] + h * strides[1] + t * strides[2] + d
  int64_t strides[3];
  CacheView key, value;
  const int32_t* lengths;  // [batch] tokens before the queries', or null
  const uint8_t* mask;     // [batch, query_tokens, max_length] or null
  float* partials;         // decode: [batch * query_tokens][splits][heads * head_dim]
  float2* statistics;      // decode: [batch * query_tokens][splits][heads]: maximum, sum
  void* y;                 // prefill: [batch * query_tokens][heads * head_dim]
  int64_t capacity, max_length;
  int heads, kv_heads, query_tokens, splits, rotate_q;
  float softmax_scale;
};

// Layout of 16 tokens in shared memory. 16-byte chunks of a token's codes are XORed so that the
// eight rows of an ldmatrix phase, and the quarter-warps of the K reads, cover all banks.
template <int kHeadDim>
struct Tile {
  static constexpr int kRowBytes = kHeadDim / 2, kChunks = kRowBytes / 16;
  static constexpr int kCodeBytes = kTokensPerTile * kRowBytes;
  static constexpr int kScaleBytes = kTokensPerTile * 4;
  // K codes, V codes, K scale, K zero, V scale, V zero
  static constexpr int kBytes = 2 * kCodeBytes + 4 * kScaleBytes;
  static constexpr int kValues = kCodeBytes, kScales = 2 * kCodeBytes;
  static __device__ __forceinline__ int chunk_place(int token, int chunk) {
    const int shift = kHeadDim == 64 ? 2 : kHeadDim == 128 ? 1 : 0;
    return token * kRowBytes + ((chunk ^ ((token >> shift) & (kChunks - 1))) << 4);
  }
};

// A warp's columns: operands, softmax state, sums. kTiles: groups of 8 columns.
// "Column 2q + e" below: lane l holds, in C fragments, columns 2(l % 4) and + 1.
template <int kHeadDim, int kTiles>
struct Columns {
  uint32_t q[kTiles][kHeadDim / 16][2];      // B operands of the scores
  float factor[kTiles][2];                   // score -> exponent of 2, of column 2q + e
  int limit[kTiles][2];                      // last token that column 2q + e may see; -1: unused
  float maximum[kTiles][2], sum[kTiles][2];  // of column 2q + e; the sum is this lane's part
  float output[kTiles][kHeadDim / 16][4];    // O^T fragments, of codes
};

// Reads and prepares the query columns first_column .. + 8 * kTiles of kv head `kv_head`: column c
// is query token c / group, query head kv_head * group + c % group.
template <class T, int kHeadDim, int kTiles>
__device__ __forceinline__ void load_columns(const AttentionParams& p, int batch, int kv_head,
                                             int first_column, int length,
                                             Columns<kHeadDim, kTiles>& columns) {
  constexpr int kEach = kHeadDim / 4;  // dims of a lane: kEach * (l % 4) ..
  const int l = lane(), group = p.heads / p.kv_heads, count = group * p.query_tokens;
#pragma unroll
  for (int tile = 0; tile < kTiles; tile++) {
    const int column = first_column + tile * kColumns + l / 4;
    const bool valid = column < count;
    const int token = valid ? column / group : 0,
              head = kv_head * group + (valid ? column % group : 0);
    const uint16_t* source = static_cast<const uint16_t*>(p.q) + batch * p.strides[0] +
                             head * p.strides[1] + token * p.strides[2] + l % 4 * kEach;
    float v[kEach];
#pragma unroll
    for (int i = 0; i < kEach; i += 8) {
      const uint4 w = *reinterpret_cast<const uint4*>(source + i);
      const uint32_t words[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
      for (int j = 0; j < 4; j++) {
        const float2 pair = unpack_pair<T>(words[j]);
        v[i + 2 * j] = pair.x;
        v[i + 2 * j + 1] = pair.y;
      }
    }
    if (p.rotate_q) hadamard_of_lanes<4>(v, l % 4);
    float amax = 0.f;
#pragma unroll
    for (int i = 0; i < kEach; i++) amax = fmaxf(amax, fabsf(v[i]));
    amax = warp_max<4>(amax);
    const float inverse = amax > 0.f ? __fdiv_rn(1.f, amax) : 0.f;
#pragma unroll
    for (int step = 0; step < kHeadDim / 16; step++) {  // two steps to a run of 8 dims
      const int d = step / 2 * 8 + step % 2 * 2;
      columns.q[tile][step][0] = pack_pair<f16>(v[d] * inverse, v[d + 4] * inverse);
      columns.q[tile][step][1] = pack_pair<f16>(v[d + 1] * inverse, v[d + 5] * inverse);
    }
    const float factor =
        amax * (p.rotate_q ? head_norm<kHeadDim>() : 1.f) * (p.softmax_scale * 1.4426950408889634f);
    const float limit = valid ? static_cast<float>(length + token) : -1.f;
#pragma unroll
    for (int e = 0; e < 2; e++) {
      const int owner = (l % 4 * 2 + e) * 4;  // a lane that prepared column 2q + e
      columns.factor[tile][e] = __shfl_sync(kAllLanes, factor, owner);
      columns.limit[tile][e] = static_cast<int>(__shfl_sync(kAllLanes, limit, owner));
      columns.maximum[tile][e] = kNothing;
      columns.sum[tile][e] = 0.f;
    }
#pragma unroll
    for (int m = 0; m < kHeadDim / 16; m++)
#pragma unroll
      for (int r = 0; r < 4; r++) columns.output[tile][m][r] = 0.f;
  }
}

// Pairs (u - zero) of nibbles i and i + 4 of a word; `bias` is the pair (1024 + zero).
__device__ __forceinline__ uint32_t centred_pair(uint32_t word, int i, uint32_t bias) {
  return subtract_f16x2((word >> (4 * i) & 0x000F000Fu) | 0x64006400u, bias);
}

// Adds 16 tokens, first_token .. , of a tile in shared memory to a warp's columns. Tokens from
// `end` on are not there: their bytes may be anything.
template <int kHeadDim, int kTiles>
__device__ __forceinline__ void attend_tile(const AttentionParams& p, int batch, int first_column,
                                            const unsigned char* tile, int first_token, int end,
                                            Columns<kHeadDim, kTiles>& c) {
  using Layout = Tile<kHeadDim>;
  const int l = lane(), g = l / 4, q = l % 4;
  const float* scales = reinterpret_cast<const float*>(tile + Layout::kScales);

  // ---- scores: rows are tokens g and g + 8
  float scores[kTiles][4];
#pragma unroll
  for (int t = 0; t < kTiles; t++)
#pragma unroll
    for (int r = 0; r < 4; r++) scores[t][r] = 0.f;
  float key_scale[2], value_log[2], value_inverse[2];
  uint32_t bias[2];
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const int token = g + 8 * h;
    const bool there = first_token + token < end;
    key_scale[h] = load_shared<float>(scales + token);
    const float zero = there ? load_shared<float>(scales + 16 + token) : 0.f;
    const float value_scale = there ? load_shared<float>(scales + 32 + token) : 1.f;
    value_log[h] = log2_fast(value_scale);
    value_inverse[h] = reciprocal_fast(value_scale);
    bias[h] = pack_pair<f16>(1024.f + zero, 1024.f + zero);
  }
  constexpr int kRuns = kHeadDim / 32;  // words of K of a lane, a run of 8 dims each
  uint32_t k[2][kRuns];
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const int token = g + 8 * h;
    if constexpr (kHeadDim == 64) {
      const uint2 w = load_shared<uint2>(tile + Layout::chunk_place(token, q >> 1) + (q & 1) * 8);
      k[h][0] = w.x, k[h][1] = w.y;
    } else {
#pragma unroll
      for (int i = 0; i < kRuns / 4; i++) {
        const uint4 w = load_shared<uint4>(tile + Layout::chunk_place(token, q * (kRuns / 4) + i));
        k[h][4 * i] = w.x, k[h][4 * i + 1] = w.y, k[h][4 * i + 2] = w.z, k[h][4 * i + 3] = w.w;
      }
    }
  }
#pragma unroll
  for (int step = 0; step < kHeadDim / 16; step++) {
    const int run = step / 2, i = step % 2 * 2;
    const uint32_t a[4] = {centred_pair(k[0][run], i, bias[0]), centred_pair(k[1][run], i, bias[1]),
                           centred_pair(k[0][run], i + 1, bias[0]),
                           centred_pair(k[1][run], i + 1, bias[1])};
#pragma unroll
    for (int t = 0; t < kTiles; t++) mma_16<f16>(scores[t], a, c.q[t][step]);
  }

  // ---- softmax
  uint32_t weights[kTiles][2];
#pragma unroll
  for (int t = 0; t < kTiles; t++) {
    float z[4];
    float rescale[2];
#pragma unroll
    for (int e = 0; e < 2; e++) {
      float best = kNothing;
      bool seen[2];
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const int token = first_token + g + 8 * h;
        seen[h] = token < end && token <= c.limit[t][e];
        if (p.mask && seen[h]) {
          const int column = first_column + t * kColumns + 2 * q + e, group = p.heads / p.kv_heads;
          seen[h] = p.mask[(static_cast<int64_t>(batch) * p.query_tokens + column / group) *
                               p.max_length +
                           token] != 0;
        }
        z[2 * h + e] = scores[t][2 * h + e] * key_scale[h] * c.factor[t][e] + value_log[h];
        if (seen[h]) best = fmaxf(best, z[2 * h + e]);
      }
#pragma unroll
      for (int s = 4; s < 32; s *= 2) best = fmaxf(best, __shfl_xor_sync(kAllLanes, best, s));
      best = fmaxf(best, c.maximum[t][e]);
      rescale[e] = exp2_fast(c.maximum[t][e] - best);
      c.maximum[t][e] = best;
      float sum = 0.f;
#pragma unroll
      for (int h = 0; h < 2; h++) {
        z[2 * h + e] = seen[h] ? exp2_fast(z[2 * h + e] - best) : 0.f;
        sum = fmaf(z[2 * h + e], value_inverse[h], sum);
      }
      c.sum[t][e] = fmaf(c.sum[t][e], rescale[e], sum);
    }
    // (token g, columns 2q 2q+1) -> (column g, tokens 2q 2q+1): the B operand of the output
    weights[t][0] = transpose_fragment(pack_pair<f16>(z[0], z[1]));
    weights[t][1] = transpose_fragment(pack_pair<f16>(z[2], z[3]));
#pragma unroll
    for (int m = 0; m < kHeadDim / 16; m++)
#pragma unroll
      for (int r = 0; r < 4; r++) c.output[t][m][r] *= rescale[r & 1];
  }

  // ---- output: tokens are now the inner index, two to a register
  uint32_t value_bias[2];
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const int token = 2 * q + 8 * h;
    const float low = first_token + token < end ? load_shared<float>(scales + 48 + token) : 0.f;
    const float high =
        first_token + token + 1 < end ? load_shared<float>(scales + 49 + token) : 0.f;
    value_bias[h] = pack_pair<f16>(1024.f + low, 1024.f + high);
  }
#pragma unroll
  for (int run = 0; run < kHeadDim / 64; run++) {  // 64 dims = two chunks of 16 bytes
    uint32_t r[4];  // (tokens 0..7, chunk 0), (0..7, 1), (8..15, 0), (8..15, 1)
    ldmatrix_x4_transposed(r,
                           tile + Layout::kValues +
                               Layout::chunk_place((l & 7) + (l >> 4) * 8, run * 2 + (l >> 3 & 1)));
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const uint32_t a[4] = {
          centred_pair(r[0], i, value_bias[0]), centred_pair(r[1], i, value_bias[0]),
          centred_pair(r[2], i, value_bias[1]), centred_pair(r[3], i, value_bias[1])};
#pragma unroll
      for (int t = 0; t < kTiles; t++) mma_16<f16>(c.output[t][run * 4 + i], a, weights[t]);
    }
  }
}

// Starts copying 16 tokens of a head to shared memory. Tokens beyond the capacity become zeros.
// `rank` of `ranks` threads.
template <int kHeadDim>
__device__ __forceinline__ void copy_tile(const AttentionParams& p, int64_t head_slot,
                                          int first_token, unsigned char* tile, int rank,
                                          int ranks) {
  using Layout = Tile<kHeadDim>;
  constexpr int kCodeChunks = kTokensPerTile * Layout::kChunks;
  for (int i = rank; i < 2 * kCodeChunks; i += ranks) {
    const bool is_value = i >= kCodeChunks;
    const int chunk = is_value ? i - kCodeChunks : i;
    const int token = chunk / Layout::kChunks, column = chunk % Layout::kChunks;
    const bool there = first_token + token < p.capacity;
    const uint8_t* codes = is_value ? p.value.codes : p.key.codes;
    cp_async16(
        tile + (is_value ? Layout::kValues : 0) + Layout::chunk_place(token, column),
        there ? codes + (head_slot + first_token + token) * Layout::kRowBytes + column * 16 : codes,
        there);
  }
  for (int i = rank; i < 16; i += ranks) {  // four arrays of 16 floats
    const float* source =
        i < 8 ? (i < 4 ? p.key.scale : p.key.zero) : (i < 12 ? p.value.scale : p.value.zero);
    const int token = i % 4 * 4;
    const bool there = first_token + token < p.capacity;
    cp_async16(tile + Layout::kScales + i * 16,
               there ? source + head_slot + first_token + token : source, there);
  }
}

__device__ __forceinline__ int length_before(const AttentionParams& p, int batch) {
  const int length = p.lengths ? p.lengths[batch] : static_cast<int>(p.max_length) - p.query_tokens;
  return max(0, min(length, static_cast<int>(p.max_length) - p.query_tokens));
}

// ----------------------------------------------------------------------------------------------
// decode

constexpr int kDecodeStages = 4;

template <int kHeadDim>
constexpr int decode_shared_bytes() {
  const int ring = kWarps * kDecodeStages * Tile<kHeadDim>::kBytes;
  const int merge = kWarps * kColumns * (kHeadDim + 2) * 4;
  return ring > merge ? ring : merge;
}

// grid: (KV slice, kv head * column tiles + column tile, batch). T: of q. kHeadDim: 64, 128 or 256.
template <class T, int kHeadDim>
__global__ void __launch_bounds__(kWarps * 32) kv_decode_kernel(const AttentionParams p) {
  using Layout = Tile<kHeadDim>;
  QR_DYN_SMEM(shared);
  const int group = p.heads / p.kv_heads, columns_of_head = group * p.query_tokens;
  const int column_tiles = (columns_of_head + kColumns - 1) / kColumns;
  const int batch = blockIdx.z, kv_head = blockIdx.y / column_tiles;
  const int first_column = blockIdx.y % column_tiles * kColumns;
  const int warp = threadIdx.x / 32, l = lane(), g = l / 4, q = l % 4;
  const int before = length_before(p, batch), length = before + p.query_tokens;

  // ---- this slice: whole tiles, dealt to the warps in turn
  const int tiles = (length + kTokensPerTile - 1) / kTokensPerTile;
  const int tiles_per_slice = (tiles + p.splits - 1) / p.splits;
  const int first_tile = blockIdx.x * tiles_per_slice;
  const int end_tile = min(tiles, first_tile + tiles_per_slice);
  const int64_t head_slot = (static_cast<int64_t>(batch) * p.kv_heads + kv_head) * p.capacity;
  unsigned char* ring = shared + warp * kDecodeStages * Layout::kBytes;
  const auto start_copy = [&](int step) {  // the warp's step-th tile
    const int tile = first_tile + warp + step * kWarps;
    if (tile < end_tile)
      copy_tile<kHeadDim>(p, head_slot, tile * kTokensPerTile,
                          ring + step % kDecodeStages * Layout::kBytes, l, 32);
    cp_commit();
  };
#pragma unroll
  for (int s = 0; s < kDecodeStages - 1; s++) start_copy(s);

  Columns<kHeadDim, 1> c;
  load_columns<T>(p, batch, kv_head, first_column, before, c);

  for (int step = 0; first_tile + warp + step * kWarps < end_tile; step++) {
    cp_wait<kDecodeStages - 2>();
    __syncwarp();  // all lanes' copies of this step have landed, and all have left the slot
                   // refilled next
    start_copy(step + kDecodeStages - 1);
    attend_tile(p, batch, first_column, ring + step % kDecodeStages * Layout::kBytes,
                (first_tile + warp + step * kWarps) * kTokensPerTile, length, c);
  }
  cp_wait<0>();
  __syncthreads();  // the rings become merge space

  // ---- merge the warps: [warp][column][head_dim] outputs, then [warp][column] maxima and sums
  float* outputs = reinterpret_cast<float*>(shared);
  float* maxima = outputs + kWarps * kColumns * kHeadDim;
  float* sums = maxima + kWarps * kColumns;
#pragma unroll
  for (int e = 0; e < 2; e++) {
    float sum = c.sum[0][e];
#pragma unroll
    for (int s = 4; s < 32; s *= 2) sum += __shfl_xor_sync(kAllLanes, sum, s);
    if (g == 0) {
      store_shared<float>(maxima + warp * kColumns + 2 * q + e, c.maximum[0][e]);
      store_shared<float>(sums + warp * kColumns + 2 * q + e, sum);
    }
#pragma unroll
    for (int m = 0; m < kHeadDim / 16; m += 4)
#pragma unroll
      for (int h = 0; h < 2; h++) {  // dims 4g..4g+3 of each half of 64
        const int d = m * 16 + h * 32 + 4 * g;
        store_shared<float4>(
            outputs + (warp * kColumns + 2 * q + e) * kHeadDim + d,
            make_float4(c.output[0][m][2 * h + e], c.output[0][m + 1][2 * h + e],
                        c.output[0][m + 2][2 * h + e], c.output[0][m + 3][2 * h + e]));
      }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < kColumns * kHeadDim; i += kWarps * 32) {
    const int column = i / kHeadDim, d = i % kHeadDim;
    if (first_column + column >= columns_of_head) break;
    float maximum = kNothing, sum = 0.f, output = 0.f;
#pragma unroll
    for (int w = 0; w < kWarps; w++)
      maximum = fmaxf(maximum, load_shared<float>(maxima + w * kColumns + column));
#pragma unroll
    for (int w = 0; w < kWarps; w++) {
      const float weight = exp2_fast(load_shared<float>(maxima + w * kColumns + column) - maximum);
      sum = fmaf(weight, load_shared<float>(sums + w * kColumns + column), sum);
      output = fmaf(weight, load_shared<float>(outputs + (w * kColumns + column) * kHeadDim + d),
                    output);
    }
    const int token = (first_column + column) / group;
    const int head = kv_head * group + (first_column + column) % group;
    const int64_t slot =
        (static_cast<int64_t>(batch) * p.query_tokens + token) * p.splits + blockIdx.x;
    p.partials[(slot * p.heads + head) * kHeadDim + d] = output;
    if (d == 0) p.statistics[slot * p.heads + head] = make_float2(maximum, sum);
  }
}

// ---------------------------------------------------------------------------------------------
// prefill

constexpr int kPrefillStages = 2, kPrefillTiles = 4;  // 64 tokens to a stage

template <int kHeadDim>
QR_HOST_DEVICE constexpr int prefill_column_tiles() {
  return kHeadDim == 256 ? 1 : 2;  // of a warp: 64 accumulators a lane in each case
}

// grid: (column block, kv head, batch); a block has kWarps * 8 * kTiles columns. T: of q and y.
template <class T, int kHeadDim>
__global__ void __launch_bounds__(kWarps * 32) kv_prefill_kernel(const AttentionParams p) {
  using Layout = Tile<kHeadDim>;
  constexpr int kTiles = prefill_column_tiles<kHeadDim>(), kWarpColumns = kTiles * kColumns;
  QR_DYN_SMEM(shared);
  const int group = p.heads / p.kv_heads, columns_of_head = group * p.query_tokens;
  const int batch = blockIdx.z, kv_head = blockIdx.y, warp = threadIdx.x / 32, l = lane();
  const int g = l / 4, q = l % 4;
  // Late columns have the most tokens to see: they start first.
  const int block_columns = (gridDim.x - 1 - blockIdx.x) * kWarps * kWarpColumns;
  const int first_column = block_columns + warp * kWarpColumns;
  const int before = length_before(p, batch);
  const int last_column = min(block_columns + kWarps * kWarpColumns, columns_of_head) - 1;
  const int end = before + last_column / group + 1;  // causality ends the loop early
  const int64_t head_slot = (static_cast<int64_t>(batch) * p.kv_heads + kv_head) * p.capacity;

  const int steps = (end + kPrefillTiles * kTokensPerTile - 1) / (kPrefillTiles * kTokensPerTile);
  const auto start_copy = [&](int step) {  // warp w copies tile w of the step
    if (step < steps)
      copy_tile<kHeadDim>(p, head_slot, (step * kPrefillTiles + warp) * kTokensPerTile,
                          shared + (step % kPrefillStages * kPrefillTiles + warp) * Layout::kBytes,
                          l, 32);
    cp_commit();
  };
  static_assert(kPrefillTiles == kWarps, "a warp copies one tile of a step");
#pragma unroll
  for (int s = 0; s < kPrefillStages - 1; s++) start_copy(s);

  Columns<kHeadDim, kTiles> c;
  load_columns<T>(p, batch, kv_head, first_column, before, c);

  for (int step = 0; step < steps; step++) {
    cp_wait<kPrefillStages - 2>();
    __syncthreads();  // the step has landed for all warps, and all have left the slot refilled next
    start_copy(step + kPrefillStages - 1);
#pragma unroll 1
    for (int i = 0; i < kPrefillTiles; i++) {
      const int first_token = (step * kPrefillTiles + i) * kTokensPerTile;
      if (first_token >= end) break;
      attend_tile(p, batch, first_column,
                  shared + (step % kPrefillStages * kPrefillTiles + i) * Layout::kBytes,
                  first_token, end, c);
    }
  }

  // ---- normalize and store: a lane has four neighbouring dims of a column
#pragma unroll
  for (int t = 0; t < kTiles; t++)
#pragma unroll
    for (int e = 0; e < 2; e++) {
      float sum = c.sum[t][e];
#pragma unroll
      for (int s = 4; s < 32; s *= 2) sum += __shfl_xor_sync(kAllLanes, sum, s);
      const float inverse = sum > 0.f ? __fdiv_rn(1.f, sum) : 0.f;
      const int column = first_column + t * kColumns + 2 * q + e;
      if (column >= columns_of_head) continue;
      const int head = kv_head * group + column % group;
      uint16_t* y =
          static_cast<uint16_t*>(p.y) +
          ((static_cast<int64_t>(batch) * p.query_tokens + column / group) * p.heads + head) *
              kHeadDim;
#pragma unroll
      for (int m = 0; m < kHeadDim / 16; m += 4)
#pragma unroll
        for (int h = 0; h < 2; h++) {
          const float (&o)[kHeadDim / 16][4] = c.output[t];
          const int r = 2 * h + e;
          *reinterpret_cast<uint2*>(y + m * 16 + h * 32 + 4 * g) =
              make_uint2(pack_pair<T>(o[m][r] * inverse, o[m + 1][r] * inverse),
                         pack_pair<T>(o[m + 2][r] * inverse, o[m + 3][r] * inverse));
        }
    }
}

// ------------------------------------------------------------------------------------------------
// host

namespace {

constexpr int kMaxDecodeQueries = 8;
constexpr int kMaxSplits = 64;

struct AttentionPlan {
  bool decode;
  int splits;
  size_t partial_bytes, statistic_bytes, row_bytes;  // of the workspace
  size_t workspace_bytes() const { return partial_bytes + statistic_bytes + row_bytes; }
};

size_t rounded_up(size_t bytes) { return (bytes + 255) / 256 * 256; }

int check_attention(const qr_kv_attention_args& a) {
  if (!is_activation_dtype(a.dtype)) return QR_ERROR_UNSUPPORTED_DTYPE;
  QR_RETURN_IF_ERROR(check_cache_shape(a.batch, a.kv_heads, a.head_dim, a.capacity));
  if (a.heads < 1 || a.heads % a.kv_heads || a.heads > 1024) return QR_ERROR_UNSUPPORTED_SHAPE;
  const int64_t n = static_cast<int64_t>(a.heads) * a.head_dim;
  if (n % kBlock || n > 16384) return QR_ERROR_UNSUPPORTED_SHAPE;
  if (a.query_tokens < 1 || a.max_length < a.query_tokens || a.max_length > a.capacity)
    return QR_ERROR_UNSUPPORTED_SHAPE;
  if (a.split_kv < 0 || a.split_kv > kMaxSplits) return QR_ERROR_BAD_ARGUMENT;
  if (a.epilogue != QR_EPILOGUE_STORE && a.epilogue != QR_EPILOGUE_QUANTIZE)
    return QR_ERROR_BAD_ARGUMENT;
  if (a.heads_hadamard.butterflies && a.heads_hadamard.inner != a.head_dim)
    return QR_ERROR_UNSUPPORTED_PLAN;
  return QR_OK;
}

AttentionPlan plan_attention(const qr_kv_attention_args& a) {
  AttentionPlan plan{};
  const int64_t rows = static_cast<int64_t>(a.batch) * a.query_tokens;
  const int64_t n = static_cast<int64_t>(a.heads) * a.head_dim;
  plan.decode = a.query_tokens <= kMaxDecodeQueries;
  if (!plan.decode) {
    const bool transformed = a.heads_hadamard.butterflies || a.epilogue == QR_EPILOGUE_QUANTIZE;
    plan.row_bytes = transformed ? rounded_up(rows * n * 2) : 0;
    return plan;
  }
  const int64_t columns = a.heads / a.kv_heads * a.query_tokens;
  const int64_t blocks = a.batch * a.kv_heads * ((columns + kColumns - 1) / kColumns);
  const int64_t wanted = 4 * std::max(1, device_limits().multiprocessors);  // 16 warps each
  const int64_t most = std::max<int64_t>(1, a.max_length / (kWarps * kTokensPerTile));
  plan.splits = a.split_kv ? a.split_kv
                           : static_cast<int>(std::min<int64_t>(
                                 {(wanted + blocks - 1) / blocks, most, int64_t{kMaxSplits}}));
  plan.partial_bytes = rounded_up(rows * plan.splits * n * sizeof(float));
  plan.statistic_bytes = rounded_up(rows * plan.splits * a.heads * sizeof(float2));
  return plan;
}

template <class T>
int launch_decode(const AttentionParams& p, int head_dim, dim3 grid, cudaStream_t stream) {
  const int threads = kWarps * 32;
  if (head_dim == 64)
    return QR_LAUNCH((kv_decode_kernel<T, 64>), grid, threads, decode_shared_bytes<64>(), stream,
                     p);
  if (head_dim == 128)
    return QR_LAUNCH((kv_decode_kernel<T, 128>), grid, threads, decode_shared_bytes<128>(), stream,
                     p);
  return QR_LAUNCH((kv_decode_kernel<T, 256>), grid, threads, decode_shared_bytes<256>(), stream,
                   p);
}

template <class T, int kHeadDim>
int launch_prefill_of(const AttentionParams& p, int batch, cudaStream_t stream) {
  const int columns = p.heads / p.kv_heads * p.query_tokens;
  const int per_block = kWarps * prefill_column_tiles<kHeadDim>() * kColumns;
  const dim3 grid((columns + per_block - 1) / per_block, p.kv_heads, batch);
  const int shared = kPrefillStages * kPrefillTiles * Tile<kHeadDim>::kBytes;
  return QR_LAUNCH((kv_prefill_kernel<T, kHeadDim>), grid, kWarps * 32, shared, stream, p);
}

template <class T>
int launch_prefill(const AttentionParams& p, int head_dim, int batch, cudaStream_t stream) {
  if (head_dim == 64) return launch_prefill_of<T, 64>(p, batch, stream);
  if (head_dim == 128) return launch_prefill_of<T, 128>(p, batch, stream);
  return launch_prefill_of<T, 256>(p, batch, stream);
}

}  // namespace

}  // namespace qr

extern "C" QR_EXPORT size_t qr_kv_attention_workspace_size(const qr_kv_attention_args* a) {
  if (!a || qr::check_attention(*a) != QR_OK) return 0;
  return qr::plan_attention(*a).workspace_bytes();
}

extern "C" QR_EXPORT int qr_kv_attention(const qr_kv_attention_args* a, void* stream) {
  using namespace qr;
  if (!a) return QR_ERROR_NULL_POINTER;
  QR_RETURN_IF_ERROR(check_attention(*a));
  QR_RETURN_IF_ERROR(check_pointer(a->q));
  QR_RETURN_IF_ERROR(check_strides(a->strides));
  QR_RETURN_IF_ERROR(check_cache(a->key));
  QR_RETURN_IF_ERROR(check_cache(a->value));
  const bool quantize = a->epilogue == QR_EPILOGUE_QUANTIZE;
  if (quantize) {
    QR_RETURN_IF_ERROR(check_pointer(a->codes));
    if (!a->scale) return QR_ERROR_NULL_POINTER;
    if (!is_activation_layout(a->activation_layout)) return QR_ERROR_UNSUPPORTED_LAYOUT;
    if (!(a->clip_ratio > 0 && a->clip_ratio <= 1)) return QR_ERROR_BAD_ARGUMENT;
  } else {
    QR_RETURN_IF_ERROR(check_pointer(a->y));
  }
  const AttentionPlan plan = plan_attention(*a);
  if (plan.workspace_bytes()) {
    if (a->workspace_bytes < plan.workspace_bytes()) return QR_ERROR_WORKSPACE_TOO_SMALL;
    QR_RETURN_IF_ERROR(check_pointer(a->workspace));
  }

  // The transform that ends the operator, checked before anything is launched.
  TransformParams t{};
  t.n = a->heads * a->head_dim;
  t.rows = static_cast<int64_t>(a->batch) * a->query_tokens;
  QR_RETURN_IF_ERROR(plan_rows(a->heads_hadamard, &t));
  t.prologue = QR_PROLOGUE_NONE;
  t.epilogue = a->epilogue;
  t.layout = a->activation_layout;
  t.clip_over_qmax = a->clip_ratio / 7.f;
  t.y = a->y;
  t.codes = a->codes;
  t.scale = a->scale;

  AttentionParams p{};
  p.q = a->q;
  for (int i = 0; i < 3; i++) p.strides[i] = a->strides[i];
  p.key = view_of(a->key);
  p.value = view_of(a->value);
  p.lengths = a->lengths;
  p.mask = a->mask;
  p.capacity = a->capacity;
  p.max_length = a->max_length;
  p.heads = a->heads;
  p.kv_heads = a->kv_heads;
  p.query_tokens = static_cast<int>(a->query_tokens);
  p.rotate_q = a->rotate_q;
  p.softmax_scale = a->softmax_scale;
  const cudaStream_t s = static_cast<cudaStream_t>(stream);
  unsigned char* workspace = static_cast<unsigned char*>(a->workspace);

  if (plan.decode) {
    p.splits = plan.splits;
    p.partials = reinterpret_cast<float*>(workspace);
    p.statistics = reinterpret_cast<float2*>(workspace + plan.partial_bytes);
    const int columns = a->heads / a->kv_heads * p.query_tokens;
    const int64_t tiles = static_cast<int64_t>(a->kv_heads) * ((columns + kColumns - 1) / kColumns);
    if (tiles > 65535) return QR_ERROR_UNSUPPORTED_SHAPE;
    const dim3 grid(plan.splits, static_cast<unsigned>(tiles), a->batch);
    QR_RETURN_IF_ERROR(a->dtype == QR_DTYPE_FP16 ? launch_decode<f16>(p, a->head_dim, grid, s)
                                                 : launch_decode<bf16>(p, a->head_dim, grid, s));
    t.partials = p.partials;
    t.statistics = p.statistics;
    t.splits = plan.splits;
    t.head_dim = a->head_dim;
    t.log_head_dim = a->head_dim == 64 ? 6 : a->head_dim == 128 ? 7 : 8;
    return launch_transform(t, a->dtype, kSourcePartials, s);
  }

  p.y = plan.row_bytes ? static_cast<void*>(workspace) : a->y;
  QR_RETURN_IF_ERROR(a->dtype == QR_DTYPE_FP16 ? launch_prefill<f16>(p, a->head_dim, a->batch, s)
                                               : launch_prefill<bf16>(p, a->head_dim, a->batch, s));
  if (!plan.row_bytes) return QR_OK;
  t.x = workspace;
  t.x_stride = t.n;
  return launch_transform(t, a->dtype, kSourceRow, s);
}
