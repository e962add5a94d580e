// SPDX-License-Identifier: Apache-2.0
// Hadamard transforms of wide rows: those that the shared memory of one block cannot hold (53248
// anywhere; 28672 where a block has 99 KB, as on sm_86, 89 and 120). Three kernels, with the row in
// the caller's workspace between them, as fp32 because nothing may be rounded before the quantizer:
//
//   wide_first     x --> prologue --> the slowest factor, 64 columns a block --> values [rows, n]
//   wide_rest      values --> the other factors, a tile of segments a block --> y,
//                  or values again, and the row's maximum by an atomic
//   wide_quantize  values, maximum --> codes, scale
//
//   The slowest factor combines elements n / order apart, the others stay within segments of n /
//   order neighbours: so each kernel needs only a part of a row. Where all is powers of two, the
//   slowest factor is a Sylvester matrix of order 32 (or less), and a tensor core applies it too.
//
// The order of the atomic maxima does not matter to their result: the codes are deterministic.
// Against the one-pass kernels the row moves three times more often, so this is for the rows that
// have no other way.
#include <algorithm>
#include <numeric>

#include "dense.cuh"
#include "device.hpp"
#include "transform_launch.hpp"

namespace qr {

namespace {

constexpr int kFirstThreads = 256;
constexpr int kColumns = 64;         // of the slowest factor, a block; 128 bytes of 16-bit input
constexpr int kMaxSylvester = 32;    // order of the slowest factor where all is powers of two
constexpr int kRestElements = 2048;  // of a block at least
constexpr int kMaxRestElements = 24576;
constexpr int kQuantizeThreads = 256;

struct WideParams {
  TransformParams row;    // pointers, epilogue, norm; n of the whole row
  TransformParams first;  // the slowest factor as the only one, on a piece of `order * kColumns`
  TransformParams rest;   // the factors behind it, on a tile
  int columns, column_tiles;
  int order, stride;  // of the slowest factor in the row
  int tiles;          // in a row, each rest.n elements
  bool sylvester;
  float* values;     // [rows, n]
  int32_t* maximum;  // [rows]: bits of max |value|, which order as the floats do
};

// ---------------------------------------------------------------------------------- first factor

// Sign words of the Sylvester matrix of the given order (see dense.cuh), to shared memory: the sign
// of an entry is the parity of the common bits of its indices.
__device__ __forceinline__ void sylvester_signs(int order, uint32_t* words) {
  for (int word = static_cast<int>(threadIdx.x); word < sign_words_of(order);
       word += kFirstThreads) {
    const int l = word % 32, tile = word / 32;  // one step of 64 is all of k
    uint32_t bits = 0;
    for (int i = 0; i < 4; i++)
      for (int r = 0; r < 4; r++)
        for (int half = 0; half < 2; half++) {
          const int column = tile * 16 + l / 4 + (r & 1) * 8;
          const int row = i * 16 + l % 4 * 2 + half + (r >> 1) * 8;
          int parity = 0;
          for (int common = row & column; common; common &= common - 1) parity ^= 1;
          bits |= static_cast<uint32_t>(parity) << (15 - (4 * i + r) + 16 * half);
        }
    store_shared<uint32_t>(words + word, bits);
  }
}

// A block: all elements of 64 columns of one row.
template <class T, int kSource>
__global__ void __launch_bounds__(kFirstThreads) wide_first(const WideParams w) {
  QR_DYN_SMEM(shared);
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t row = blockIdx.x / w.column_tiles;
  const int first_column = static_cast<int>(blockIdx.x % w.column_tiles) * kColumns;
  const int piece = w.order * kColumns;
  float* exchange = reinterpret_cast<float*>(shared);
  unsigned char* input = shared + static_cast<size_t>(piece) * 4;  // [order, columns] of T
  unsigned char* zeros = input + static_cast<size_t>(piece) * 2;
  uint32_t* signs = reinterpret_cast<uint32_t*>(zeros + 16);
  if (thread < 4) store_shared<uint32_t>(zeros + 4 * thread, 0);
  if (w.sylvester) sylvester_signs(w.order, signs);
  if (first_column == 0 && thread == 0) w.maximum[row] = 0;

  // ---- the columns, after the prologue, in shared memory
  const uint16_t* x = static_cast<const uint16_t*>(w.row.x) + row * w.row.x_stride;
  const uint16_t* up = static_cast<const uint16_t*>(w.row.up);
  if constexpr (kSource == kSourceGate) up += row * w.row.up_stride;
  for (int i = thread; i < w.order * (kColumns / 8); i += kFirstThreads) {
    const int index = i / (kColumns / 8), column = i % (kColumns / 8) * 8;
    const int at = first_column + column;
    uint4 chunk = make_uint4(0, 0, 0, 0);
    if (at < w.columns) {
      const int element = at / w.stride * w.stride * w.order + at % w.stride + index * w.stride;
      chunk = load_streaming_chunk(x + element);
      if constexpr (kSource == kSourceGate) {
        const uint4 other = load_streaming_chunk(up + element);
        uint32_t words[4] = {chunk.x, chunk.y, chunk.z, chunk.w};
        const uint32_t others[4] = {other.x, other.y, other.z, other.w};
#pragma unroll
        for (int j = 0; j < 4; j++) {
          const float2 g = unpack_pair<T>(words[j]), u = unpack_pair<T>(others[j]);
          words[j] = pack_pair<T>(silu(g.x) * u.x, silu(g.y) * u.y);
        }
        chunk = make_uint4(words[0], words[1], words[2], words[3]);
      }
    }
    store_shared<uint4>(input + input_place(index * kColumns + column), chunk);
  }
  __syncthreads();

  // ---- the factor
  TransformParams piece_of = w.first;
  if (w.sylvester) piece_of.signs = signs;
  first_factor<T>(piece_of, input, zeros, exchange, thread / 32, kFirstThreads / 32);
  __syncthreads();

  // ---- to the workspace, two neighbours at a time
  float* values = w.values + row * w.row.n;
  for (int i = thread; i < piece / 2; i += kFirstThreads) {
    const int index = i / (kColumns / 2), column = i % (kColumns / 2) * 2;
    const int at = first_column + column;
    if (at >= w.columns) continue;
    const int element = at / w.stride * w.stride * w.order + at % w.stride + index * w.stride;
    *reinterpret_cast<float2*>(values + element) =
        load_shared<float2>(exchange + exchange_place(index * kColumns + column));
  }
}

// ------------------------------------------------------------------------------- the other factors

// Where a thread of wide_rest leaves its 64 values for wide_quantize: 4 at a time, the even thread
// of a block and the odd one in turn, so that both write whole sectors of 32 bytes.
__device__ __forceinline__ float* values_of(float* row, int block, int odd, int i) {
  return row + block * kBlock + i * 8 + odd * 4;
}

// A block: a tile of one row. In place: what it reads has left the workspace when it writes.
template <class T>
__global__ void __launch_bounds__(kMaxRestElements / kPerThread) wide_rest(const WideParams w) {
  QR_DYN_SMEM(shared);
  const int thread = static_cast<int>(threadIdx.x), threads = w.rest.threads_per_row;
  const int64_t row = blockIdx.x / w.tiles;
  const int tile = static_cast<int>(blockIdx.x % w.tiles);
  float* exchange = reinterpret_cast<float*>(shared);
  float* slots = exchange + w.rest.n;
  float* values = w.values + row * w.row.n;
  const bool active = thread < 2 * w.rest.blocks;
  const int block = active ? thread >> 1 : 0, odd = thread & 1;

  for (int i = thread; i < w.rest.n / 2; i += threads)
    store_shared<float2>(
        exchange + exchange_place(2 * i),
        *reinterpret_cast<const float2*>(values + static_cast<int64_t>(tile) * w.rest.n + 2 * i));
  __syncthreads();
  const uint32_t* signs = w.row.signs;
  for (int f = 1; f < kMaxDense && w.row.dense[f]; f++) {
    signs += sign_words_of(w.row.dense[f - 1]);
    further_factor(w.rest, w.row.dense[f], w.row.dense_stride[f], signs, exchange, thread / 32,
                   threads / 32);
    __syncthreads();
  }
  float v[kPerThread];
  read_exchange(exchange, block, odd, v);
  butterflies_behind(w.rest, thread, v);

  const int block_in_row = tile * w.rest.blocks + block;
  if (w.row.epilogue == QR_EPILOGUE_STORE) {
    finish_row<T>(w.row, row, thread, block_in_row, active, v, slots);
    return;
  }
  float maximum = 0.f;
#pragma unroll
  for (int q = 0; q < kPerThread; q++) maximum = fmaxf(maximum, fabsf(v[q]));
  maximum = reduce_row<true>(w.rest, active ? maximum : 0.f, slots);
  if (thread == 0) atomic_max(w.maximum + row, __float_as_int(maximum));
  if (!active) return;
#pragma unroll
  for (int i = 0; i < kPerThread / 4; i++)
    *reinterpret_cast<float4*>(values_of(values, block_in_row, odd, i)) =
        make_float4(v[4 * i], v[4 * i + 1], v[4 * i + 2], v[4 * i + 3]);
}

// -------------------------------------------------------------------------------------- quantizer

// A pair of threads: a block of 128 elements.
__global__ void __launch_bounds__(kQuantizeThreads) wide_quantize(const WideParams w) {
  const int64_t pair =
      (static_cast<int64_t>(blockIdx.x) * kQuantizeThreads + static_cast<int>(threadIdx.x)) / 2;
  const bool active = pair < w.row.rows * w.row.blocks;
  const int64_t row = active ? pair / w.row.blocks : 0;
  const int block = active ? static_cast<int>(pair % w.row.blocks) : 0;
  const int odd = static_cast<int>(threadIdx.x & 1);
  float v[kPerThread];
#pragma unroll
  for (int i = 0; i < kPerThread / 4; i++) {
    const float4 part =
        *reinterpret_cast<const float4*>(values_of(w.values + row * w.row.n, block, odd, i));
    v[4 * i] = part.x, v[4 * i + 1] = part.y, v[4 * i + 2] = part.z, v[4 * i + 3] = part.w;
  }
  const float scale = scale_of_maximum(w.row, __int_as_float(w.maximum[row]));
  if (active && block == 0 && odd == 0) w.row.scale[row] = scale;
  store_codes(w.row, row, odd, block, active, v, scale);
}

// ------------------------------------------------------------------------------------------- host

// Splits the factors of p between the kernels.
int plan_wide(const TransformParams& p, WideParams* w) {
  w->row = w->first = w->rest = p;
  w->order = p.dense[0];
  w->stride = p.dense_stride[0];
  w->sylvester = p.dense[0] == 0;
  if (w->sylvester) {
    // The top bits, as many as leave 8 neighbours together; a matrix of order 1 where none do.
    const uint32_t top = p.butterflies & ~7u;
    w->order = 1;
    w->stride = kBlock;
    for (uint32_t bit = kMaxWideRow; bit && w->order < kMaxSylvester; bit >>= 1)
      if (top & bit) {
        w->order *= 2;
        w->stride = static_cast<int>(bit);
        w->rest.butterflies &= ~bit;
      }
  }
  w->columns = p.n / w->order;
  w->column_tiles = (w->columns + kColumns - 1) / kColumns;

  w->first.n = w->order * kColumns;
  w->first.dense[0] = w->order;
  w->first.dense_stride[0] = kColumns;
  for (int f = 1; f < kMaxDense; f++) w->first.dense[f] = 0;

  // A tile is whole segments and whole blocks of 128.
  const int unit = std::lcm(w->stride, kBlock);
  int tile = unit;
  while (p.n % tile || (tile < kRestElements && tile < p.n)) tile += unit;
  if (tile > kMaxRestElements) tile = unit;
  if (tile > kMaxRestElements || p.n % tile) return QR_ERROR_UNSUPPORTED_PLAN;
  w->tiles = p.n / tile;
  w->rest.n = tile;
  w->rest.blocks = tile / kBlock;
  w->rest.threads_per_row = (2 * w->rest.blocks + 31) / 32 * 32;
  return QR_OK;
}

template <class T, int kSource>
int launch_wide(const WideParams& w, cudaStream_t stream) {
  const int64_t first_blocks = w.row.rows * w.column_tiles, rest_blocks = w.row.rows * w.tiles;
  const int64_t threads = w.row.rows * w.row.blocks * 2;
  if (std::max(first_blocks, rest_blocks) > 0x7fffffff) return QR_ERROR_UNSUPPORTED_SHAPE;
  const size_t first_shared = static_cast<size_t>(w.first.n) * 6 + 16 +
                              (w.sylvester ? sign_words_of(w.order) * sizeof(uint32_t) : 0);
  const size_t rest_shared = (static_cast<size_t>(w.rest.n) + 32) * sizeof(float);
  if (std::max(first_shared, rest_shared) > device_limits().shared_bytes_per_block)
    return QR_ERROR_UNSUPPORTED_SHAPE;
  const int first = QR_LAUNCH((wide_first<T, kSource>), static_cast<unsigned>(first_blocks),
                              kFirstThreads, first_shared, stream, w);
  QR_RETURN_IF_ERROR(first);
  const int rest = QR_LAUNCH((wide_rest<T>), static_cast<unsigned>(rest_blocks),
                             w.rest.threads_per_row, rest_shared, stream, w);
  QR_RETURN_IF_ERROR(rest);
  if (w.row.epilogue == QR_EPILOGUE_STORE) return QR_OK;
  return QR_LAUNCH(wide_quantize,
                   static_cast<unsigned>((threads + kQuantizeThreads - 1) / kQuantizeThreads),
                   kQuantizeThreads, 0, stream, w);
}

}  // namespace

size_t wide_workspace_bytes(const TransformParams& p) {
  return (static_cast<size_t>(p.rows) * p.n + (p.rows + 3) / 4 * 4) * sizeof(float);
}

int check_wide_transform(const TransformParams& p) {
  // The norm of a row would need a pass of its own; online Hadamards have none in front.
  if (p.prologue == QR_PROLOGUE_RMSNORM) return QR_ERROR_UNSUPPORTED_SHAPE;
  if (p.butterflies == 0 && !p.dense[0]) return QR_ERROR_UNSUPPORTED_SHAPE;
  WideParams w{};
  return plan_wide(p, &w);
}

int launch_wide_transform(const TransformParams& p, int dtype, int source, void* workspace,
                          size_t workspace_bytes, cudaStream_t stream) {
  if (p.rows == 0) return QR_OK;
  if (workspace_bytes < wide_workspace_bytes(p)) return QR_ERROR_WORKSPACE_TOO_SMALL;
  QR_RETURN_IF_ERROR(check_pointer(workspace));
  WideParams w{};
  QR_RETURN_IF_ERROR(plan_wide(p, &w));
  w.values = static_cast<float*>(workspace);
  w.maximum = reinterpret_cast<int32_t*>(w.values + p.rows * p.n);
  if (dtype == QR_DTYPE_FP16)
    return source == kSourceGate ? launch_wide<f16, kSourceGate>(w, stream)
                                 : launch_wide<f16, kSourceRow>(w, stream);
  return source == kSourceGate ? launch_wide<bf16, kSourceGate>(w, stream)
                               : launch_wide<bf16, kSourceRow>(w, stream);
}

}  // namespace qr
