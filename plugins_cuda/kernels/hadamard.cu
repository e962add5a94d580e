// SPDX-License-Identifier: Apache-2.0
// Hadamard transforms of rows, with a prologue in front and INT4 quantization behind, in one pass.
//
// Three kernels, by what stands between the two ends (transform.cuh):
//
//   plain_rows        nothing, and no exchange: a thread keeps the 64 values that it loads.
//                     RMSNorm + quantize, SiLU(gate) * up + quantize, plain quantize.
//
//   butterfly_rows    powers of two, n = 2^m or blocks of it, or across heads:
//
//      global --LDG.32--> prologue --> butterflies: bit 0, 5 block bits --> fp32 in shared memory
//                                                                                   |
//      codes + scale <-- amax, quantize, pack <-- bits 1..6 in registers <----------+
//                                                  (rows > 4096: 1..3 block bits by shuffle)
//
//   dense_rows        D_1 ⊗ D_2 ⊗ .. ⊗ 2^m: the orders that are not powers of two, on tensor cores:
//
//      global --> prologue --> fp16/bf16 in shared memory --ldmatrix.trans--> mma with ±1 --> fp32
//      in shared memory --> [further factors: fp32 as three bf16 parts, mma with ±1, in place] -->
//      as above
//
//      The first factor multiplies the input itself by ±1, which is exact, and sums in fp32; a
//      further one splits its fp32 input into three bf16 parts (24 bits), exact again. So the whole
//      transform has fp32 accuracy, and no value can overflow 16 bits on the way. On CUDA cores,
//      factor 28 would cost as much time as the memory traffic and 172 six times that.
//
// A block of threads keeps taking rows, and starts the loads of its next row when the present one
// has left the registers for shared memory: loads overlap with butterflies and quantization.
#include <algorithm>
#include <cmath>

#include "dense.cuh"
#include "device.hpp"
#include "transform.cuh"
#include "transform_launch.hpp"

namespace qr {

// ------------------------------------------------------------------------------------- combine
// weights

// kSourcePartials: the weight of every (slice, head) of a row, exp2(m_s - m) / sum, to shared
// memory; a barrier passes.
__device__ __forceinline__ void slice_weights_of(const TransformParams& p, int64_t row, int thread,
                                                 float* weights) {
  const int heads = p.n / p.head_dim;
  for (int head = thread; head < heads && row < p.rows; head += p.threads_per_row) {
    const float2* statistics = p.statistics + row * p.splits * heads + head;
    float maximum = -3e38f, sum = 0.f;
    for (int s = 0; s < p.splits; s++) maximum = fmaxf(maximum, statistics[s * heads].x);
    for (int s = 0; s < p.splits; s++)
      sum += exp2_fast(statistics[s * heads].x - maximum) * statistics[s * heads].y;
    const float inverse = sum > 0.f ? __fdiv_rn(1.f, sum) : 0.f;
    for (int s = 0; s < p.splits; s++)
      store_shared<float>(weights + s * heads + head,
                          exp2_fast(statistics[s * heads].x - maximum) * inverse);
  }
  __syncthreads();
}

// -------------------------------------------------------------------------------------------
// butterflies

// Most threads of a block, which sets the registers of each: 168 hold 64 values and the 32 words of
// the next row. Rows of more than 384 threads (n > 24576) have 128 registers and do without the
// prefetch and without a loop.
QR_HOST_DEVICE constexpr int butterfly_threads(int source, int log_q, bool large) {
  if (large) return kMaxThreads;
  if (source == kSourcePartials) return 256;
  return source == kSourceGate || log_q == 5 ? 384 : 256;
}

// T: f16 or bf16. kSource: where rows come from. kLogQ: block bits inside a thread at the front
// (0..5). kLarge: one row per block of threads, which ends with it.
template <class T, int kSource, int kLogQ, bool kLarge>
__global__ void __launch_bounds__(butterfly_threads(kSource, kLogQ, kLarge), 1) butterfly_rows(
    const TransformParams p) {
  QR_DYN_SMEM(shared);
  // With two inputs there are no registers for it: several blocks per multiprocessor overlap
  // instead. Nor are there on sm_120 where a thread has 168, by four words.
  constexpr bool kPrefetch =
      kSource == kSourceRow && !kLarge &&
      !(kArchitecture >= 1200 && butterfly_threads(kSource, kLogQ, kLarge) > 256);
  using Items = FrontItems<kLogQ>;
  const int thread = threadIdx.x % p.threads_per_row, slot = threadIdx.x / p.threads_per_row;
  float* exchange = reinterpret_cast<float*>(shared) + static_cast<size_t>(slot) * p.n;
  float* slots = reinterpret_cast<float*>(shared) + static_cast<size_t>(p.rows_per_block) * p.n;
  float* slice_weights = slots + 32;
  if constexpr (kSource == kSourcePartials) slice_weights += slot * p.splits * (p.n / p.head_dim);
  const bool active_thread = thread < 2 * p.blocks;
  const int block = active_thread ? dealt_block(thread >> 1, p.rotation) : 0;

  const int64_t step = static_cast<int64_t>(gridDim.x) * p.rows_per_block;
  int64_t first = static_cast<int64_t>(blockIdx.x) * p.rows_per_block;
  uint32_t words[kPairs], up[kSource == kSourceGate ? kPairs : 1];
  if constexpr (kSource != kSourcePartials)
    load_row<kSource, Items>(p, first + slot, thread, words, up);

  for (; first < p.rows; first += step) {
    const int64_t row = first + slot;
    // Items of one or two words have 16 addresses or more: computed where they are used, not kept
    // in registers from row to row.
    const int mine = Items::kItems >= 16 ? opaque(thread) : thread;
    if constexpr (kSource == kSourcePartials) slice_weights_of(p, row, thread, slice_weights);
    apply_prologue<T, kSource, Items>(p, row, mine, words, up, slots, slice_weights);

    // ---- front: bit 0 and the thread's block bits
    float v[kPerThread];  // [word][bit 0]
#pragma unroll
    for (int w = 0; w < kPairs; w++) {
      const float2 pair = unpack_pair<T>(words[w]);
      v[2 * w] = pair.x;
      v[2 * w + 1] = pair.y;
    }
    if (p.butterflies & 1) butterfly(v, 1);
#pragma unroll
    for (int i = 0; i < kLogQ; i++)
      if (p.butterflies >> (7 + i) & 1) butterfly(v, 2 << i);

    // ---- exchange
    if (active_thread) {
#pragma unroll
      for (int i = 0; i < Items::kItems; i++) {
        const int place = exchange_place(Items::first_element(mine, i, p.blocks));
#pragma unroll
        for (int q = 0; q < Items::kWords;
             q++) {  // the swizzle is linear: XOR the word's own share
          const int w = i * Items::kWords + q;
          store_shared<float2>(exchange + ((place ^ block_swizzle(q)) + q * kBlock),
                               make_float2(v[2 * w], v[2 * w + 1]));
        }
      }
    }
    __syncthreads();
    if constexpr (kPrefetch) load_row<kSource, Items>(p, row + step, mine, words, up);

    // ---- back: bits 1..6 in registers, the top block bits between lanes
    read_exchange(exchange, block, thread & 1, v);
#pragma unroll
    for (int i = 1; i <= 6; i++)
      if (p.butterflies >> i & 1) butterfly(v, 1 << (i - 1));
    for (int i = 0; i < p.rotation; i++)
      if (p.butterflies >> (12 + i) & 1) {
        const float sign = thread >> (1 + i) & 1 ? -1.f : 1.f;
#pragma unroll
        for (int q = 0; q < kPerThread; q++)
          v[q] = fmaf(v[q], sign, __shfl_xor_sync(kAllLanes, v[q], 2 << i));
      }
    finish_row<T>(p, row, thread, block, active_thread && row < p.rows, v, slots);
    if constexpr (kLarge) return;
    if constexpr (!kPrefetch && kSource != kSourcePartials)
      load_row<kSource, Items>(p, row + step, mine, words, up);
  }
}

// ---------------------------------------------------------------------------------------- dense
// factors

// Starts copying a row to the input buffer, 16 bytes at a time.
__device__ __forceinline__ void copy_row(const TransformParams& p, int64_t row, int thread,
                                         unsigned char* input) {
  if (thread < 2 * p.blocks && row < p.rows) {
    const uint16_t* x = static_cast<const uint16_t*>(p.x) + row * p.x_stride;
#pragma unroll
    for (int w = 0; w < kPairs; w += 4) {
      const int element = ChunkItems::element(thread, w, p.blocks);
      cp_async16(input + input_place(element), x + element, true);
    }
  }
  cp_commit();
}

// One row per block of threads. T, kSource: as above. A plain row never passes through registers on
// its way in: the copy of the next one fills the input buffer as soon as the first factor is done
// with it.
// The combination of slices has rows of 16384 elements at most, and needs more registers.
QR_HOST_DEVICE constexpr int dense_threads(int source) {
  return source == kSourcePartials ? 256 : kMaxThreads;
}

template <class T, int kSource>
__global__ void __launch_bounds__(dense_threads(kSource)) dense_rows(const TransformParams p) {
  QR_DYN_SMEM(shared);
  constexpr bool kCopies = kSource == kSourceRow;
  const int thread = threadIdx.x, warp = thread / 32, warps = p.threads_per_row / 32;
  float* exchange = reinterpret_cast<float*>(shared);
  unsigned char* input = shared + static_cast<size_t>(p.n) * 4;  // [n] of T
  unsigned char* zeros = input + static_cast<size_t>(p.n) * 2;
  float* slots = reinterpret_cast<float*>(zeros + 16);
  float* slice_weights = slots + 32;
  const bool active_thread = thread < 2 * p.blocks;
  const int block = active_thread ? thread >> 1 : 0;
  if (thread < 4) store_shared<uint32_t>(zeros + 4 * thread, 0);
  if constexpr (kCopies) copy_row(p, blockIdx.x, thread, input);

  for (int64_t row = blockIdx.x; row < p.rows; row += gridDim.x) {
    // ---- front: the row, after its prologue, in shared memory
    if constexpr (kCopies) cp_wait<0>();
    if (!kCopies || p.prologue == QR_PROLOGUE_RMSNORM) {
      uint32_t words[kPairs], up[kSource == kSourceGate ? kPairs : 1];
      if constexpr (kSource == kSourceGate)
        load_row<kSource, ChunkItems>(p, row, thread, words, up);
      if constexpr (kSource == kSourcePartials) slice_weights_of(p, row, thread, slice_weights);
      if constexpr (kCopies) {  // a thread's own copies, which it has waited for
#pragma unroll
        for (int w = 0; w < kPairs; w += 4) {
          uint4 c = make_uint4(0, 0, 0, 0);
          if (active_thread)
            c = load_shared<uint4>(input + input_place(ChunkItems::element(thread, w, p.blocks)));
          words[w] = c.x, words[w + 1] = c.y, words[w + 2] = c.z, words[w + 3] = c.w;
        }
      }
      apply_prologue<T, kSource, ChunkItems>(p, row, thread, words, up, slots, slice_weights);
      if (active_thread) {
#pragma unroll
        for (int w = 0; w < kPairs; w += 4)
          store_shared<uint4>(input + input_place(ChunkItems::element(thread, w, p.blocks)),
                              make_uint4(words[w], words[w + 1], words[w + 2], words[w + 3]));
      }
    }
    __syncthreads();

    // ---- dense factors
    first_factor<T>(p, input, zeros, exchange, warp, warps);
    __syncthreads();
    if constexpr (kCopies) copy_row(p, row + gridDim.x, thread, input);
    const uint32_t* signs = p.signs;
    for (int f = 1; f < kMaxDense && p.dense[f]; f++) {
      signs += sign_words_of(p.dense[f - 1]);
      further_factor(p, p.dense[f], p.dense_stride[f], signs, exchange, warp, warps);
      __syncthreads();
    }

    // ---- back: bits 1..6 in registers, block bits between lanes
    float v[kPerThread];
    read_exchange(exchange, block, thread & 1, v);
    butterflies_behind(p, thread, v);
    finish_row<T>(p, row, thread, block, active_thread, v, slots);
  }
}

// --------------------------------------------------------------------------------------- no
// transform

// A thread owns chunks of 8 neighbours: 16 bytes in, one word of 8 codes (or 4 + 4 bytes) out.
template <class T, int kSource>
__global__ void __launch_bounds__(kMaxThreads) plain_rows(const TransformParams p) {
  QR_DYN_SMEM(shared);
  float* slots = reinterpret_cast<float*>(shared);
  const int thread = threadIdx.x % p.threads_per_row, slot = threadIdx.x / p.threads_per_row;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * p.rows_per_block + slot;
  const bool active = thread < 2 * p.blocks && row < p.rows;
  uint32_t words[kPairs], up[kSource == kSourceGate ? kPairs : 1];
  load_row<kSource, ChunkItems>(p, row, thread, words, up);
  apply_prologue<T, kSource, ChunkItems>(p, row, thread, words, up, slots, nullptr);

  if (p.epilogue == QR_EPILOGUE_STORE) {
    uint16_t* y = static_cast<uint16_t*>(p.y) + row * p.n;
#pragma unroll
    for (int w = 0; w < kPairs; w += 4)
      if (active)
        store_16(y + ChunkItems::element(thread, w, p.blocks), words[w], words[w + 1], words[w + 2],
                 words[w + 3]);
    return;
  }

  float v[kPerThread];
#pragma unroll
  for (int w = 0; w < kPairs; w++) {
    const float2 pair = unpack_pair<T>(words[w]);
    v[2 * w] = pair.x;
    v[2 * w + 1] = pair.y;
  }
  __syncthreads();  // RMSNorm's use of `slots` is over
  const float scale = row_scale(p, v, active, slots);
  if (active && thread == 0) p.scale[row] = scale;
  const RowDivider divider = row_divider(1.f, scale);
  const int64_t padded_rows = (p.rows + 7) & ~int64_t{7};
#pragma unroll
  for (int i = 0; i < kPerThread / 8; i++) {
    const float* c = v + 8 * i;
    const uint32_t even = four_codes(c[0], c[2], c[4], c[6], divider);
    const uint32_t odd = four_codes(c[1], c[3], c[5], c[7], divider);
    const int element = ChunkItems::element(thread, 4 * i, p.blocks);
    if (!active) continue;
    if (p.layout == QR_LAYOUT_ACTIVATIONS_SPLIT_V1) {
      uint8_t* line =
          static_cast<uint8_t*>(p.codes) + ((element >> 7) * padded_rows + row) * kBlock;
      const int chunk = (element >> 6 & 1) * 4 + (element >> 5 & 1), within = element / 2 & 15;
      const int swizzle = static_cast<int>(row & 7);
      *reinterpret_cast<uint32_t*>(line + ((chunk ^ swizzle) << 4) + within) = even;
      *reinterpret_cast<uint32_t*>(line + (((chunk + 2) ^ swizzle) << 4) + within) = odd;
    } else {
      *reinterpret_cast<uint32_t*>(static_cast<uint8_t*>(p.codes) + row * (p.n / 2) + element / 2) =
          (even & 0x0F0F0F0Fu) | (odd & 0x0F0F0F0Fu) << 4;
    }
  }
}

// -----------------------------------------------------------------------------------------------
// host

namespace {

// Shared memory of a block that runs `rows_per_block` rows.
size_t shared_bytes_of(const TransformParams& p, int source) {
  const size_t reductions = 32 * sizeof(float);
  const size_t weights = source == kSourcePartials
                             ? sizeof(float) * p.rows_per_block * p.splits * (p.n / p.head_dim)
                             : 0;
  const size_t exchange = static_cast<size_t>(p.rows_per_block) * p.n * 4;
  if (p.dense[0]) return exchange + static_cast<size_t>(p.n) * 2 + 16 + reductions + weights;
  return exchange + reductions + weights;
}

// Block bits of a power-of-two row that a thread transforms at the front.
int block_bits_in_front(const TransformParams& p) {
  int log_q = 0;
  while (log_q < 5 && p.blocks % (2 << log_q) == 0) log_q++;
  return log_q;
}

// As many blocks as fit the device at 168 registers a thread: a block then takes its next rows
// itself.
unsigned persistent_blocks(int64_t blocks, int threads, size_t shared_bytes) {
  const int by_registers = 65536 / (threads * 168);
  const DeviceLimits limits = device_limits();
  const int by_shared =
      static_cast<int>(limits.shared_bytes_per_multiprocessor / (shared_bytes + 1024));
  const int64_t resident =
      static_cast<int64_t>(limits.multiprocessors) * std::max(1, std::min(by_registers, by_shared));
  return static_cast<unsigned>(std::min(blocks, resident));
}

template <class T, int kSource>
int launch_butterflies(const TransformParams& p, int64_t blocks, int threads, size_t shared,
                       cudaStream_t stream) {
  const int log_q = block_bits_in_front(p);
  if (threads > butterfly_threads(kSource, log_q, false)) {
    if constexpr (kSource != kSourcePartials)
      if (log_q == 5)
        return QR_LAUNCH((butterfly_rows<T, kSource, 5, true>), static_cast<unsigned>(blocks),
                         threads, shared, stream, p);
    return QR_ERROR_UNSUPPORTED_SHAPE;
  }
  const unsigned grid = persistent_blocks(blocks, threads, shared);
  switch (log_q) {
    case 0:
      return QR_LAUNCH((butterfly_rows<T, kSource, 0, false>), grid, threads, shared, stream, p);
    case 1:
      return QR_LAUNCH((butterfly_rows<T, kSource, 1, false>), grid, threads, shared, stream, p);
    case 2:
      return QR_LAUNCH((butterfly_rows<T, kSource, 2, false>), grid, threads, shared, stream, p);
    case 3:
      return QR_LAUNCH((butterfly_rows<T, kSource, 3, false>), grid, threads, shared, stream, p);
    case 4:
      return QR_LAUNCH((butterfly_rows<T, kSource, 4, false>), grid, threads, shared, stream, p);
    default:
      return QR_LAUNCH((butterfly_rows<T, kSource, 5, false>), grid, threads, shared, stream, p);
  }
}

template <class T, int kSource>
int launch_source(const TransformParams& p, cudaStream_t stream) {
  const int64_t blocks = (p.rows + p.rows_per_block - 1) / p.rows_per_block;
  const int threads = p.threads_per_row * p.rows_per_block;
  if (blocks > 0x7fffffff) return QR_ERROR_UNSUPPORTED_SHAPE;
  if constexpr (kSource != kSourcePartials)
    if (!p.dense[0] && p.butterflies == 0)
      return QR_LAUNCH((plain_rows<T, kSource>), static_cast<unsigned>(blocks), threads,
                       32 * sizeof(float), stream, p);
  if (!fits_a_block(p, kSource)) return QR_ERROR_UNSUPPORTED_SHAPE;
  const size_t shared = shared_bytes_of(p, kSource);
  if (p.dense[0])
    return QR_LAUNCH((dense_rows<T, kSource>), persistent_blocks(blocks, threads, shared), threads,
                     shared, stream, p);
  return launch_butterflies<T, kSource>(p, blocks, threads, shared, stream);
}

}  // namespace

bool fits_a_block(const TransformParams& p, int source) {
  if (p.n > kMaxRow) return false;
  if (p.butterflies == 0 && !p.dense[0]) return true;
  if (shared_bytes_of(p, source) > device_limits().shared_bytes_per_block) return false;
  const int threads = p.threads_per_row * p.rows_per_block;
  if (p.dense[0]) return threads <= dense_threads(source);
  const int log_q = block_bits_in_front(p);
  if (threads <= butterfly_threads(source, log_q, false)) return true;
  return source != kSourcePartials && log_q == 5 && threads <= kMaxThreads;
}

int launch_transform(const TransformParams& p, int dtype, int source, cudaStream_t stream) {
  if (p.rows == 0) return QR_OK;
  if (dtype == QR_DTYPE_FP16) {
    if (source == kSourceGate) return launch_source<f16, kSourceGate>(p, stream);
    if (source == kSourcePartials) return launch_source<f16, kSourcePartials>(p, stream);
    return launch_source<f16, kSourceRow>(p, stream);
  }
  if (source == kSourceGate) return launch_source<bf16, kSourceGate>(p, stream);
  if (source == kSourcePartials) return launch_source<bf16, kSourcePartials>(p, stream);
  return launch_source<bf16, kSourceRow>(p, stream);
}

// Checks a plan against the row length and writes it into the parameters; see docs/kernels.md for
// the table.
int apply_plan(const qr_hadamard_plan& plan, TransformParams* p) {
  p->norm = 1.f;
  p->butterflies = 0;
  p->rotation = 0;
  p->signs = plan.signs;
  for (int f = 0; f < kMaxDense; f++) p->dense[f] = p->dense_stride[f] = 0;
  if (plan.butterflies == 0) {
    for (int f = 0; f < kMaxDense; f++)
      if (plan.dense[f]) return QR_ERROR_UNSUPPORTED_PLAN;
  } else {
    if (!is_power_of_two(plan.butterflies) || !is_power_of_two(plan.inner))
      return QR_ERROR_UNSUPPORTED_PLAN;
    int64_t stride = static_cast<int64_t>(plan.butterflies) * plan.inner;
    double order = plan.butterflies;
    for (int f = kMaxDense - 1; f >= 0; f--) {
      if (plan.dense[f] == 0) {
        if (f + 1 < kMaxDense && plan.dense[f + 1] && f == 0) return QR_ERROR_UNSUPPORTED_PLAN;
        continue;
      }
      if (plan.dense[f] < 4 || plan.dense[f] % 4 || plan.dense[f] > kMaxTiles * 16)
        return QR_ERROR_UNSUPPORTED_PLAN;
      if (f && !plan.dense[f - 1]) return QR_ERROR_UNSUPPORTED_PLAN;
      p->dense[f] = plan.dense[f];
      p->dense_stride[f] = static_cast<int>(stride);
      stride *= plan.dense[f];
      order *= plan.dense[f];
      if (stride > kMaxWideRow) return QR_ERROR_UNSUPPORTED_PLAN;
    }
    if (stride > kMaxWideRow || p->n % stride) return QR_ERROR_UNSUPPORTED_PLAN;
    if (p->dense[0]) {
      // ldmatrix takes 8 neighbouring columns; lanes hold block bits 0..3.
      if (p->dense_stride[0] % 8) return QR_ERROR_UNSUPPORTED_PLAN;
      if (static_cast<int64_t>(plan.butterflies) * plan.inner > 2048)
        return QR_ERROR_UNSUPPORTED_PLAN;
      QR_RETURN_IF_ERROR(check_pointer(plan.signs));
    }
    for (int64_t bit = plan.inner; bit < static_cast<int64_t>(plan.butterflies) * plan.inner;
         bit *= 2)
      p->butterflies |= static_cast<uint32_t>(bit);
    p->norm = static_cast<float>(1.0 / std::sqrt(order));
  }
  return QR_OK;
}

// Fills sizes from p->n, the plan and the number of rows.
int plan_rows(const qr_hadamard_plan& plan, TransformParams* p) {
  if (p->n <= 0 || p->n % kBlock || p->n > kMaxWideRow) return QR_ERROR_UNSUPPORTED_SHAPE;
  p->blocks = p->n / kBlock;
  QR_RETURN_IF_ERROR(apply_plan(plan, p));
  const int threads = 2 * p->blocks;
  const bool several_rows_in_a_warp = threads < 32 && is_power_of_two(threads) && !p->dense[0];
  p->threads_per_row = several_rows_in_a_warp ? threads : (threads + 31) / 32 * 32;
  p->rows_per_block = p->dense[0] ? 1 : std::max(1, 128 / p->threads_per_row);
  int log_blocks = 0;
  while (p->blocks % (2 << log_blocks) == 0) log_blocks++;
  p->rotation = p->dense[0] ? 0 : std::max(0, log_blocks - 5);
  return QR_OK;
}

}  // namespace qr

extern "C" QR_EXPORT size_t qr_transform_workspace_size(const qr_transform_args* a) {
  using namespace qr;
  if (!a || a->rows <= 0 || a->n <= 0 || a->n > kMaxWideRow) return 0;
  TransformParams p{};
  p.n = static_cast<int>(a->n);
  p.rows = a->rows;
  if (plan_rows(a->hadamard, &p) != QR_OK) return 0;
  const int source = a->prologue == QR_PROLOGUE_SILU_MUL ? kSourceGate : kSourceRow;
  return fits_a_block(p, source) ? 0 : wide_workspace_bytes(p);
}

extern "C" QR_EXPORT int qr_transform(const qr_transform_args* a, void* stream) {
  using namespace qr;
  if (!a) return QR_ERROR_NULL_POINTER;
  if (!is_activation_dtype(a->dtype)) return QR_ERROR_UNSUPPORTED_DTYPE;
  if (a->rows < 0 || a->n <= 0 || a->n > kMaxWideRow) return QR_ERROR_UNSUPPORTED_SHAPE;
  if (a->prologue < QR_PROLOGUE_NONE || a->prologue > QR_PROLOGUE_SILU_MUL)
    return QR_ERROR_BAD_ARGUMENT;
  if (a->epilogue != QR_EPILOGUE_STORE && a->epilogue != QR_EPILOGUE_QUANTIZE)
    return QR_ERROR_BAD_ARGUMENT;
  TransformParams p{};
  p.n = static_cast<int>(a->n);
  p.rows = a->rows;
  QR_RETURN_IF_ERROR(plan_rows(a->hadamard, &p));
  p.prologue = a->prologue;
  const int source = a->prologue == QR_PROLOGUE_SILU_MUL ? kSourceGate : kSourceRow;
  const bool wide = !fits_a_block(p, source);
  if (wide) QR_RETURN_IF_ERROR(check_wide_transform(p));
  QR_RETURN_IF_ERROR(check_pointer(a->x));
  if (a->x_stride < a->n || a->x_stride % 8) return QR_ERROR_BAD_ARGUMENT;
  if (a->prologue == QR_PROLOGUE_SILU_MUL) {
    QR_RETURN_IF_ERROR(check_pointer(a->up));
    if (a->up_stride < a->n || a->up_stride % 8) return QR_ERROR_BAD_ARGUMENT;
  }
  if (a->prologue == QR_PROLOGUE_RMSNORM) {
    if (a->norm_weight && !is_aligned(a->norm_weight)) return QR_ERROR_MISALIGNED;
    if (!(a->epsilon >= 0)) return QR_ERROR_BAD_ARGUMENT;
  }
  if (a->epilogue == QR_EPILOGUE_STORE) {
    QR_RETURN_IF_ERROR(check_pointer(a->y));
  } else {
    QR_RETURN_IF_ERROR(check_pointer(a->codes));
    if (!a->scale) return QR_ERROR_NULL_POINTER;
    if (!is_activation_layout(a->activation_layout)) return QR_ERROR_UNSUPPORTED_LAYOUT;
    if (!(a->clip_ratio > 0 && a->clip_ratio <= 1)) return QR_ERROR_BAD_ARGUMENT;
  }
  p.x = a->x;
  p.up = a->up;
  p.norm_weight = a->norm_weight;
  p.x_stride = a->x_stride;
  p.up_stride = a->up_stride;
  p.y = a->y;
  p.codes = a->codes;
  p.scale = a->scale;
  p.epilogue = a->epilogue;
  p.layout = a->activation_layout;
  p.epsilon = a->epsilon;
  p.clip_over_qmax = a->clip_ratio / 7.f;
  if (wide)
    return launch_wide_transform(p, a->dtype, source, a->workspace, a->workspace_bytes,
                                 static_cast<cudaStream_t>(stream));
  return launch_transform(p, a->dtype, source, static_cast<cudaStream_t>(stream));
}

// ------------------------------------------------------------------------------------------- host:
// plans

namespace {

struct MergedFactor {
  int64_t order, twos, core;  // order = twos * core: Sylvester ⊗ the core's matrix
};

// Trailing powers of two -> butterflies; others in front of a core -> part of it. False: too many
// or too large.
bool merge_factors(const int32_t* factors, int32_t count, int64_t* butterflies,
                   MergedFactor* merged, int* merged_count) {
  int64_t twos = 1;
  *merged_count = 0;
  if (count < 0 || (count > 0 && !factors)) return false;
  for (int i = 0; i < count; i++) {
    const int64_t factor = factors[i];
    if (factor < 1) return false;
    if (qr::is_power_of_two(factor)) {
      twos *= factor;
    } else {
      if (factor % 4 || *merged_count == QR_MAX_DENSE_FACTORS || twos * factor > qr::kMaxTiles * 16)
        return false;
      merged[(*merged_count)++] = {twos * factor, twos, factor};
      twos = 1;
    }
    if (twos > qr::kMaxWideRow) return false;
  }
  *butterflies = twos;
  return true;
}

}  // namespace

extern "C" QR_EXPORT size_t qr_hadamard_sign_words(const int32_t* factors, int32_t num_factors) {
  MergedFactor merged[QR_MAX_DENSE_FACTORS];
  int64_t butterflies = 1;
  int count = 0;
  if (!merge_factors(factors, num_factors, &butterflies, merged, &count)) return 0;
  size_t words = 0;
  for (int i = 0; i < count; i++) words += qr::sign_words_of(static_cast<int>(merged[i].order));
  return words;
}

extern "C" QR_EXPORT int qr_make_hadamard_plan(const int32_t* factors, int32_t num_factors,
                                               int32_t inner, const int8_t* matrices,
                                               uint32_t* words, qr_hadamard_plan* plan) {
  using namespace qr;
  if (!plan) return QR_ERROR_NULL_POINTER;
  MergedFactor merged[QR_MAX_DENSE_FACTORS];
  int64_t butterflies = 1;
  int count = 0;
  if (!merge_factors(factors, num_factors, &butterflies, merged, &count) || !is_power_of_two(inner))
    return QR_ERROR_UNSUPPORTED_PLAN;
  if (count && (matrices == nullptr) != (words == nullptr)) return QR_ERROR_NULL_POINTER;
  *plan = qr_hadamard_plan{};
  plan->butterflies = static_cast<int32_t>(butterflies);
  plan->inner = inner;
  for (int f = 0; f < count; f++) {
    const int order = static_cast<int>(merged[f].order), core = static_cast<int>(merged[f].core);
    const int steps = sign_steps_of(order);
    plan->dense[f] = order;
    if (!words) continue;
    for (int word = 0; word < sign_words_of(order); word++) {
      const int lane = word % 32, step = word / 32 % steps, tile = word / 32 / steps;
      uint32_t bits = 0;
      for (int i = 0; i < 4; i++)
        for (int r = 0; r < 4; r++)
          for (int half = 0; half < 2; half++) {
            const int column = tile * 16 + lane / 4 + (r & 1) * 8;  // of H: the result's index
            const int row = (step * 4 + i) * 16 + lane % 4 * 2 + half + (r >> 1) * 8;
            if (row >= order || column >= order) continue;
            // Sylvester's sign is the parity of the common bits of the two indices.
            bool negative = matrices[row % core * core + column % core] < 0;
            for (int common = (row / core) & (column / core); common; common &= common - 1)
              negative = !negative;
            if (negative) bits |= 1u << (15 - (4 * i + r) + 16 * half);
          }
      *words++ = bits;
    }
    matrices += static_cast<size_t>(core) * core;
  }
  return QR_OK;
}
