// SPDX-License-Identifier: Apache-2.0
// INT4 GEMM for a decode step: at most 16 tokens, bound by the bytes of the weights.
//
// A CTA takes 64 output features (one per row of four 16-row warps) and a slice of k; the grid
// covers features x slices, so that even a small matrix keeps every multiprocessor's loads in
// flight. Nothing is read twice and weights never enter shared memory:
//
//   W fragments --LDG.128, kDepth in flight--> registers --(s8: 3 ALU per 8 codes)--+
//                                                                                   +-> mma --> acc
//   X slice --once--> shared memory, in B-operand order --LDS--> registers ---------+
//        acc --int32 atomics--> sums[tile]; a tile's last CTA scales, stores, puts zeros back
//
// Integer sums are exact and commute, so the split over k is deterministic to the bit.
#include "gemm.cuh"
#include "gemm_launch.hpp"

namespace qr {

constexpr int kDecodeThreads = 128;
constexpr int kDecodeTokens = 16;               // two 8-token mma tiles at most
constexpr int kDecodeDepth = 8;                 // weight loads in flight per thread: 4 KB per warp
constexpr int kDecodeMinBlocks = kDecodeDepth;  // k blocks of 64 in the shortest useful slice
constexpr int kDecodeMaxBlocks = 32;            // and in the longest: 32 KB of staged tokens
// CTAs resident on a multiprocessor: what the shared memory of 1 or 2 token tiles allows. 64 or 80
// registers a thread; 8 * 4 or 6 * 4 warps, each with 4 KB of weights in flight.
__host__ __device__ constexpr int decode_ctas(int tiles8) { return tiles8 == 1 ? 8 : 6; }

// Words between the tokens of the totals in shared memory: 64 features and 4 more, so that the four
// token pairs of a warp's accumulators start 8 banks apart.
constexpr int kTotalsPitch = kFragmentRows + 4;

// One lane's share of a block of 64 k by 8 tokens, in shared memory: both s8 operands of two k
// steps (even codes: k 0..15, 16..31; odd codes: likewise), or the one s4 operand.
template <bool kNative>
struct StagedTokens {
  static constexpr int kLaneBytes = kNative ? 8 : 16;
  static constexpr int kTileBytes = 32 * kLaneBytes;
};

// kNative: s4 tensor cores (sm_80..89); else s8 after unpacking.
// kTiles8: 8-token tiles (1: m <= 8, 2: m <= 16).
// kSplit: the tokens come in split order (s8 only); else packed.
template <bool kNative, int kTiles8, bool kSplit>
__global__ void __launch_bounds__(kDecodeThreads, decode_ctas(kTiles8)) gemm_decode_kernel(
    const GemmArgs p) {
#if QR_HAS_S4_MMA
  constexpr bool kHere = true;
#else
  constexpr bool kHere = !kNative;  // see gemm_mma.cu
#endif
  if constexpr (kHere) {
    static_assert(!(kNative && kSplit), "the s4 tensor core reads packed tokens");
    using Staged = StagedTokens<kNative>;
    QR_DYN_SMEM(
        staged);  // [blocks][kTiles8][32 lanes]; then, when k is not split, [token][kTotalsPitch]
    const int thread = threadIdx.x, warp = thread / 32, g = lane() / 4, q = lane() % 4;
    const int block_n = blockIdx.x, blocks_k = p.k / kFragmentColumns;
    const int first = blockIdx.y * p.steps_per_split;
    const int blocks = min(p.steps_per_split, blocks_k - first);

    // ---- start the weights on their way: they depend on nothing, and the rest hides behind them
    const uint8_t* w = p.w + fragment_offset(block_n, first, fragment_blocks_k(p.k)) +
                       warp * kWarpFragmentBytes + lane() * 16;
    uint4 in_flight[kDecodeDepth];
#pragma unroll
    for (int d = 0; d < kDecodeDepth; d++)
      if (d < blocks) in_flight[d] = load_early_16(w + size_t(d) * kFragmentBytes);

    // ---- stage the tokens of this slice in operand order; absent tokens are zero. Eight loads a
    // round are under way together.
    constexpr int kRound = kSplit ? 2 : 4;
    const int places = blocks * kTiles8 * 32;
    for (int base = thread; base < places; base += kRound * kDecodeThreads) {
      uint4 words[kRound];
#pragma unroll
      for (int j = 0; j < kRound; j++) {
        const int i = base + j * kDecodeThreads;
        const int at = i % 32, token = i / 32 % kTiles8 * 8 + at / 4, word = at % 4;
        const int block = first + i / (32 * kTiles8);
        words[j] = uint4{0, 0, 0, 0};
        if (i < places && token < p.m) {
          const uint8_t* q = static_cast<const uint8_t*>(p.q);
          if constexpr (kSplit) {
            const auto chunk = [&](int c) {
              const size_t offset =
                  split_offset(block / 2, token, block % 2 * 4 + c, split_rows(p.m));
              return load_word(q + offset + word * 4);
            };
            words[j] = uint4{chunk(0), chunk(1), chunk(2), chunk(3)};
          } else {
            q += size_t(token) * (p.k / 2) + block * 32 + word * 4;
            words[j].x = load_word(q), words[j].y = load_word(q + 16);
          }
        }
      }
#pragma unroll
      for (int j = 0; j < kRound; j++) {
        const int i = base + j * kDecodeThreads;
        const uint32_t low = words[j].x, high = words[j].y;
        if (i >= places) continue;
        if constexpr (kSplit)
          store_shared(staged + i * Staged::kLaneBytes, words[j]);
        else if constexpr (kNative)
          store_shared(staged + i * Staged::kLaneBytes, uint2{low, high});
        else
          store_shared(staged + i * Staged::kLaneBytes,
                       uint4{even_codes_x16(low), even_codes_x16(high), odd_codes_x16(low),
                             odd_codes_x16(high)});
      }
    }
    __syncthreads();

    // ---- main loop
    int acc[kTiles8][4];
#pragma unroll
    for (int j = 0; j < kTiles8; j++)
#pragma unroll
      for (int r = 0; r < 4; r++) acc[j][r] = 0;
    for (int base = 0; base < blocks; base += kDecodeDepth) {
#pragma unroll
      for (int d = 0; d < kDecodeDepth; d++) {
        const int block = base + d;
        if (block < blocks) {  // the same for all threads
          const unsigned char* tokens =
              staged + block * kTiles8 * Staged::kTileBytes + lane() * Staged::kLaneBytes;
          // The next load goes into the registers that this block's words leave: it may be issued
          // only after their last use, or it would need other registers and a copy that waits for
          // it.
          const auto refill = [&] {
            load_early_16_if(in_flight[d], w + size_t(block + kDecodeDepth) * kFragmentBytes,
                             block + kDecodeDepth < blocks);
          };
          if constexpr (kNative) {
            const uint32_t words[4] = {in_flight[d].x, in_flight[d].y, in_flight[d].z,
                                       in_flight[d].w};
#pragma unroll
            for (int j = 0; j < kTiles8; j++) {
              const uint2 x = load_shared<uint2>(tokens + j * Staged::kTileBytes);
              const uint32_t b[2] = {x.x, x.y};
              mma_s4(acc[j], words, b);
            }
            refill();
          } else {
            const uint32_t even[4] = {
                even_codes_x16(in_flight[d].x), even_codes_x16(in_flight[d].y),
                even_codes_x16(in_flight[d].z), even_codes_x16(in_flight[d].w)};
            const uint32_t odd[4] = {odd_codes_x16(in_flight[d].x), odd_codes_x16(in_flight[d].y),
                                     odd_codes_x16(in_flight[d].z), odd_codes_x16(in_flight[d].w)};
#pragma unroll
            for (int j = 0; j < kTiles8; j++) {
              const uint4 x = load_shared<uint4>(tokens + j * Staged::kTileBytes);
              const uint32_t b_even[2] = {x.x, x.y}, b_odd[2] = {x.z, x.w};
              mma_s8(acc[j], even, b_even);
              mma_s8(acc[j], odd, b_odd);
            }
            refill();
          }
        }
      }
    }
    constexpr int kShift = kNative ? 0 : kSplit ? 4 : 8;  // weights x16; packed tokens x16 as well

    // ---- combine the slices: sums[tile][token][feature], absent tokens left out
    int* totals = reinterpret_cast<int*>(staged);
    if (p.splits == 1) __syncthreads();  // everybody is done with the staged tokens
    int32_t* sums =
        p.splits > 1 ? p.sums + size_t(block_n) * kDecodeTokens * kFragmentRows : nullptr;
#pragma unroll
    for (int j = 0; j < kTiles8; j++)
#pragma unroll
      for (int r = 0; r < 4; r++) {
        const int token = j * 8 + 2 * q + (r & 1), feature = warp * 16 + g + (r >> 1) * 8;
        if (token >= p.m) continue;
        if (p.splits > 1)
          atomic_accumulate(&sums[token * kFragmentRows + feature], acc[j][r] >> kShift);
        else
          store_shared(&totals[token * kTotalsPitch + feature], acc[j][r] >> kShift);
      }
    if (p.splits > 1) {
      thread_fence();  // my sums before my arrival
      __syncthreads();
      if (thread == 0) {
        const int before = atomic_add(&p.counters[block_n], 1);
        if (before == p.splits - 1) p.counters[block_n] = 0;
        store_shared<int>(totals, before == p.splits - 1);  // the staged tokens have served
      }
      __syncthreads();
      if (!load_shared<int>(totals)) return;
      thread_fence();  // their arrivals before their sums
    } else {
      __syncthreads();
    }

    // ---- scale and store: two features a thread, a warp one token's 64
    const int feature = block_n * kFragmentRows + lane() * 2;
    const FeatureTerms f0 = feature_terms(p, feature), f1 = feature_terms(p, feature + 1);
    for (int token = warp; token < p.m; token += kDecodeThreads / 32) {
      int2 s;
      if (p.splits > 1) {
        int32_t* mine = &sums[token * kFragmentRows + lane() * 2];
        s = int2{load_l2(mine), load_l2(mine + 1)};
        mine[0] = 0, mine[1] = 0;  // as the workspace was found
      } else {
        s = load_shared<int2>(&totals[token * kTotalsPitch + lane() * 2]);
      }
      if (feature >= p.n) continue;
      if (p.out_dtype == QR_DTYPE_INT32) {
        int32_t* y = static_cast<int32_t*>(p.y) + token * p.y_stride + feature;
        y[0] = s.x, y[1] = s.y;
      } else {
        const TokenTerms t = token_terms(p, token);
        const uint32_t pair = pack_outputs(
            p.out_dtype, scaled_output(s.x - t.zero * f0.sum, t.scale, f0.scale, f0.bias),
            scaled_output(s.y - t.zero * f1.sum, t.scale, f1.scale, f1.bias));
        *reinterpret_cast<uint32_t*>(static_cast<unsigned char*>(p.y) +
                                     (token * p.y_stride + feature) * 2) = pair;
      }
    }
  } else {
    refuse_architecture();
  }
}

// ------------------------------------------------------------------------------------------ launch

// Slices: as many as fill the machine, unless they would be shorter than the loads in flight; and
// enough that a slice of tokens fits its shared memory.
GemmPlan plan_decode(const DeviceLimits& device, int m, int n, int k, int requested_splits) {
  const int blocks_n = fragment_blocks_n(n), blocks_k = k / kFragmentColumns;
  const int wanted = requested_splits > 0
                         ? requested_splits
                         : ceil_div(device.multiprocessors * decode_ctas(m <= 8 ? 1 : 2), blocks_n);
  const int shortest = requested_splits > 0 ? 1 : kDecodeMinBlocks;
  int per_split = ceil_div(blocks_k, wanted);
  per_split = per_split < shortest           ? shortest
              : per_split > kDecodeMaxBlocks ? kDecodeMaxBlocks
                                             : per_split;
  GemmPlan plan;
  plan.shape = m <= 8 ? 1 : 2;
  plan.tiles = blocks_n;
  plan.steps_per_split = per_split;
  plan.splits = ceil_div(blocks_k, per_split);
  plan.counters = plan.splits > 1 ? size_t(blocks_n) : 0;
  plan.sums = plan.splits > 1 ? size_t(blocks_n) * kDecodeTokens * kFragmentRows : 0;
  return plan;
}

template <bool kNative, int kTiles8, bool kSplit>
static int launch(const GemmPlan& plan, const GemmArgs& args, cudaStream_t stream) {
  const size_t staged = size_t(plan.steps_per_split) * kTiles8 * StagedTokens<kNative>::kTileBytes;
  const size_t totals = size_t(kTiles8) * 8 * kTotalsPitch * sizeof(int);
  const size_t shared = staged > totals ? staged : totals;
  return QR_LAUNCH((gemm_decode_kernel<kNative, kTiles8, kSplit>), dim3(plan.tiles, plan.splits),
                   dim3(kDecodeThreads), shared, stream, args);
}

int launch_decode(const GemmPlan& plan, const GemmArgs& args, bool native, bool split,
                  cudaStream_t stream) {
  if (native)
    return plan.shape == 1 ? launch<true, 1, false>(plan, args, stream)
                           : launch<true, 2, false>(plan, args, stream);
  if (split)
    return plan.shape == 1 ? launch<false, 1, true>(plan, args, stream)
                           : launch<false, 2, true>(plan, args, stream);
  return plan.shape == 1 ? launch<false, 1, false>(plan, args, stream)
                         : launch<false, 2, false>(plan, args, stream);
}

}  // namespace qr
