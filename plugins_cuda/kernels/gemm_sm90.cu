// SPDX-License-Identifier: Apache-2.0
// INT4 GEMM for Hopper (sm_90a) through `wgmma`, which has no s4: codes become bytes.
//
// The weights are the A operand from registers, so they stay 4-bit in global and in shared memory
// and are unpacked on the way into the tensor core. The activations are the B operand, bytes in
// split order, which is already the order that a swizzled wgmma descriptor expects in shared
// memory.
//
//   producer         W fragments --bulk copy--+                 full[slot]   bytes landed
//   (one thread)     X split ------bulk copy--> ring[kStages] ----------> consumers
//                                                   ^                         |
//                                                   '------- empty[slot] -----'   8 warps are done
//
//   2 consumer warpgroups, each kRowBlocks x 64 features and all the tile's tokens:
//     LDS.128 -> unpack 64 codes of k   while   2 kRowBlocks wgmma m64nNk32 of the 64 before run
//     acc >> 4 -> scale -> movmatrix -> shared staging -> 16-byte stores
//
// The large tile is 256 features x 128 tokens, not 128 x 256: a code of W is half a byte and one of
// X a whole one, so per 128 codes of k the first brings 16 + 16 KB into shared memory and the
// second 8 + 32. At the tensor cores' peak (some 4096 products a clock and multiprocessor) that is
// 32 against 40 bytes a clock for each multiprocessor, and L2 has to deliver it to all of them.
// Unpacking costs 24 ALU operations a thread per 64 x 128 codes, against 4 wgmma m64n128k32 of 64
// cycles each.
//
// The grid is persistent: a CTA takes work items (tile, split of k) a grid apart, and the producer
// runs ahead into the next item while the consumers write out the last one. The producer is a
// warpgroup, though one thread of it works, because registers are traded by warpgroup (setmaxnreg):
// each quarter of a multiprocessor holds one warp of each role and 512 registers a lane.
#include "gemm.cuh"
#include "gemm_launch.hpp"
#include "hopper.cuh"

namespace qr {

constexpr int kConsumers = 256;                      // threads: two warpgroups
constexpr int kSm90Threads = kConsumers + 128;       // and the producer's, last
constexpr int kBlockStepBytes = 2 * kFragmentBytes;  // 64 features x 128 codes of W
constexpr int kStepsPerSplitMin = 8;  // a split shorter than this costs more in sums than it fills

// 384 threads start with 168 registers each; the producer's go to the consumers.
constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;
static_assert(kProducerRegisters + 2 * kConsumerRegisters <= 3 * 168, "registers of the block");

// kRowBlocks: blocks of 64 features of a warpgroup. kTokens: tokens of a tile = wgmma's N.
// kStages: ring slots of one 128-code step; the fewer tokens, the more the kernel is bound by the
// bytes of the weights, and the more of them are kept in flight.
template <int kRowBlocks_, int kTokens_, int kStages_>
struct Sm90Shape {
  static constexpr int kRowBlocks = kRowBlocks_, kTokens = kTokens_, kStages = kStages_;
  static constexpr int kBlocks = 2 * kRowBlocks, kFeatures = kBlocks * kFragmentRows;  // of a tile
  static constexpr int kWeightBytes = kBlocks * kBlockStepBytes;
  static constexpr int kSlotBytes = kWeightBytes + kTokens * kStepColumns;
  static constexpr int kStagedTokens = kTokens < 64 ? kTokens : 64;
  static constexpr int kStagingBytes = kStagedTokens * kStagingPitch;  // per warpgroup
  static constexpr int kSharedBytes = kStages * kSlotBytes + 2 * kStagingBytes + 16 * kStages + 16;
  static_assert(kSlotBytes % 1024 == 0, "a slot's token rows start on a swizzle period");
  static_assert(kSharedBytes <= 227 * 1024, "shared memory of a block");
};

// A CTA's next piece of work.
struct WorkItem {
  int tile, first_step, steps;
  TileCoordinates at;
};

template <class S>
__device__ __forceinline__ WorkItem work_item(const GemmArgs& p, int index) {
  const int feature_tiles = ceil_div(p.n, S::kFeatures), token_tiles = ceil_div(p.m, S::kTokens);
  WorkItem item;
  item.tile = index % (feature_tiles * token_tiles);
  item.first_step = index / (feature_tiles * token_tiles) * p.steps_per_split;
  item.steps = min(p.steps_per_split, ceil_div(p.k, kStepColumns) - item.first_step);
  item.at = tile_coordinates(item.tile, feature_tiles, token_tiles);
  return item;
}

// Position in the ring. The parity flips each time round: a consumer waits for `full` of this
// parity, a producer for `empty` of the other one (the first time round that is already complete).
template <int kStages>
struct RingPosition {
  int slot = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void advance() {
    if (++slot == kStages) slot = 0, parity ^= 1;
  }
};

template <class S>
__global__ void __launch_bounds__(kSm90Threads, 1) gemm_sm90_kernel(const GemmArgs p,
                                                                    const int work_items) {
#if QR_HAS_WGMMA
  QR_DYN_SMEM(ring);  // slots | staging of each warpgroup | barriers, flags; slots must start a
                      // swizzle period
  uint64_t* full =
      reinterpret_cast<uint64_t*>(ring + S::kStages * S::kSlotBytes + 2 * S::kStagingBytes);
  uint64_t* empty = full + S::kStages;
  int* last_flag = reinterpret_cast<int*>(empty + S::kStages);  // one per warpgroup
  const int thread = threadIdx.x, warp = thread / 32;

  // ---- barriers
  if (thread == 0) {
    for (int s = 0; s < S::kStages; s++) {
      mbarrier_init(&full[s], 1);   // the producer, plus the bytes that it announces
      mbarrier_init(&empty[s], 8);  // the consumer warps
    }
    mbarrier_init_fence();
  }
  __syncthreads();

  if (thread >= kConsumers) {
    // ---- producer: one thread keeps the ring full
    shrink_registers<kProducerRegisters>();
    if (thread == kConsumers) {
      const int blocks_n = fragment_blocks_n(p.n), blocks_k = fragment_blocks_k(p.k),
                rows = split_rows(p.m);
      RingPosition<S::kStages> at;
      for (int index = blockIdx.x; index < work_items; index += gridDim.x) {
        const WorkItem item = work_item<S>(p, index);
        const int token0 = item.at.token * S::kTokens;
        const int token_bytes =
            min(S::kTokens, rows - token0) * kStepColumns;  // rows after the last stay as they are
#pragma unroll 1
        for (int i = 0; i < item.steps; i++) {
          const int step = item.first_step + i;
          unsigned char* slot = ring + at.slot * S::kSlotBytes;
          mbarrier_wait(&empty[at.slot], at.parity ^ 1);
          mbarrier_arrive_expect(&full[at.slot], S::kWeightBytes + token_bytes);
#pragma unroll
          for (int b = 0; b < S::kBlocks; b++) {
            // Past the last block of rows the last one is read again: its results are dropped.
            const int block_n = min(item.at.feature * S::kBlocks + b, blocks_n - 1);
            bulk_copy(slot + b * kBlockStepBytes,
                      p.w + fragment_offset(block_n, 2 * step, blocks_k), kBlockStepBytes,
                      &full[at.slot]);
          }
          bulk_copy(slot + S::kWeightBytes,
                    static_cast<const uint8_t*>(p.q) + split_offset(step, token0, 0, rows),
                    token_bytes, &full[at.slot]);
          at.advance();
        }
      }
    }
    return;
  }

  // ---- consumers
  grow_registers<kConsumerRegisters>();
  const int group = warp / 4, group_thread = thread % 128;
  const unsigned char* my_weights =
      ring + group * S::kRowBlocks * kBlockStepBytes + group_thread * 16;
  unsigned char* staging = ring + S::kStages * S::kSlotBytes + group * S::kStagingBytes;
  RingPosition<S::kStages> at;
  for (int index = blockIdx.x; index < work_items; index += gridDim.x) {
    const WorkItem item = work_item<S>(p, index);
    constexpr int kCount = S::kTokens / 2;  // accumulators of 64 features x kTokens
    int acc[S::kRowBlocks][kCount];
#pragma unroll
    for (int b = 0; b < S::kRowBlocks; b++)
#pragma unroll
      for (int i = 0; i < kCount; i++) acc[b][i] = 0;

    // Half of the slot's weights, 64 codes of k, as A operands of two wgmma a block: even, odd.
    using Operands = uint32_t[S::kRowBlocks][8];
    const auto unpack = [&](Operands& operands, int half) {
#pragma unroll
      for (int b = 0; b < S::kRowBlocks; b++) {
        const uint4 v = load_shared<uint4>(my_weights + at.slot * S::kSlotBytes +
                                           b * kBlockStepBytes + half * kFragmentBytes);
        const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int r = 0; r < 4; r++) {
          operands[b][r] = even_codes_x16(words[r]);
          operands[b][4 + r] = odd_codes_x16(words[r]);
        }
      }
    };
    // Starts the products of 64 codes of k, and returns when those of the 64 before are done: their
    // operand registers may then be written again, in the shadow of the ones just started.
    const auto multiply = [&](const Operands& operands, int half) {
      const uint64_t tokens = wgmma_descriptor(ring + at.slot * S::kSlotBytes + S::kWeightBytes);
      wgmma_fence();
#pragma unroll
      for (int parity = 0; parity < 2; parity++)  // 32 bytes of a token's row, 2 in a descriptor
#pragma unroll
        for (int b = 0; b < S::kRowBlocks; b++)
          wgmma_s8<S::kTokens>(acc[b], operands[b] + 4 * parity, tokens + 4 * half + 2 * parity);
      wgmma_commit();
      wgmma_wait<1>();
    };

    Operands first_half, second_half;
    mbarrier_wait(&full[at.slot], at.parity);
    unpack(first_half, 0);
    int previous_slot = at.slot;
#pragma unroll 1
    for (int i = 0; i < item.steps; i++) {
      multiply(first_half, 0);
      if (i > 0 && lane() == 0) mbarrier_arrive(&empty[previous_slot]);  // all of the step before
      unpack(second_half, 1);
      multiply(second_half, 1);
      previous_slot = at.slot;
      at.advance();
      if (i + 1 < item.steps) {
        mbarrier_wait(&full[at.slot], at.parity);
        unpack(first_half, 0);
      }
    }
    wgmma_wait<0>();
#pragma unroll
    for (int b = 0; b < S::kRowBlocks; b++)
#pragma unroll
      for (int i = 0; i < kCount; i++) wgmma_pin(acc[b][i]);
    if (lane() == 0) mbarrier_arrive(&empty[previous_slot]);

    // ---- per block of 64 features: combine the splits, scale, transpose, store. The warpgroups
    // know nothing of each other.
    const auto group_sync = [&] { named_barrier(1 + group, 128); };
    constexpr int kShift = 4;          // the weights are times 16
    const int column = warp % 4 * 16;  // of this warp's features in its warpgroup's 64
    const int token0 = item.at.token * S::kTokens;
#pragma unroll
    for (int b = 0; b < S::kRowBlocks; b++) {
      const int block = group * S::kRowBlocks + b;
      const int feature0 = item.at.feature * S::kFeatures + block * kFragmentRows;
      if (p.splits > 1) {
        const size_t part = size_t(item.tile) * S::kBlocks + block;
        const bool last =
            reduce_splits<kCount, 128>(acc[b], p.sums + part * kCount * 128, p.counters + part,
                                       p.splits, group_thread, &last_flag[group], group_sync);
        if (!last) continue;
      }
      const int (*tiles)[4] = reinterpret_cast<const int (*)[4]>(acc[b]);
      if (p.out_dtype == QR_DTYPE_INT32) {
        store_sums<kShift, 1, S::kTokens / 8>(p, tiles, feature0 + column, token0);
        continue;
      }
      FeatureTerms terms[2];
#pragma unroll
      for (int i = 0; i < 2; i++)
        terms[i] = feature_terms(p, feature0 + column + i * 8 + lane() / 4);
#pragma unroll
      for (int t = 0; t < S::kTokens; t += S::kStagedTokens) {
        stage_outputs<kShift, 1, S::kStagedTokens / 8>(p, tiles + t / 8, terms, token0 + t, column,
                                                       staging);
        group_sync();
        copy_staged<kFragmentRows>(p, staging, S::kStagedTokens, feature0, token0 + t, group_thread,
                                   128);
        group_sync();  // staging is free again
      }
    }
  }
#else
  refuse_architecture();
#endif
}

// ------------------------------------------------------------------------------------------ launch

using Sm90Tokens16 = Sm90Shape<1, 16, 16>;
using Sm90Tokens32 = Sm90Shape<1, 32, 14>;
using Sm90Tokens64 = Sm90Shape<1, 64, 11>;
using Sm90Tokens128 = Sm90Shape<1, 128, 8>;
using Sm90Large = Sm90Shape<2, 128, 6>;

template <class S>
static void fill_plan(GemmPlan& plan, int shape, const DeviceLimits& device, int m, int n, int k,
                      int requested_splits) {
  const int steps = ceil_div(k, kStepColumns);
  plan.shape = shape;
  plan.tiles = ceil_div(n, S::kFeatures) * ceil_div(m, S::kTokens);
  int splits = requested_splits > 0 ? requested_splits : device.multiprocessors / plan.tiles;
  const int most = requested_splits > 0 ? steps : steps / kStepsPerSplitMin;
  splits = splits > most ? most : splits;
  plan.steps_per_split = ceil_div(steps, splits < 1 ? 1 : splits);
  plan.splits = ceil_div(steps, plan.steps_per_split);
  plan.counters = plan.splits > 1 ? size_t(plan.tiles) * S::kBlocks : 0;
  plan.sums = plan.splits > 1 ? size_t(plan.tiles) * S::kFeatures * S::kTokens : 0;
}

GemmPlan plan_sm90(const DeviceLimits& device, int m, int n, int k, int requested_splits) {
  GemmPlan plan;
  const auto rounds = [&](int features) {  // tiles of the busiest multiprocessor
    return ceil_div(ceil_div(n, features) * ceil_div(m, 128), device.multiprocessors);
  };
  if (m <= 16)
    fill_plan<Sm90Tokens16>(plan, 0, device, m, n, k, requested_splits);
  else if (m <= 32)
    fill_plan<Sm90Tokens32>(plan, 1, device, m, n, k, requested_splits);
  else if (m <= 64)
    fill_plan<Sm90Tokens64>(plan, 2, device, m, n, k, requested_splits);
  else if (m <= 128 ||
           17 * rounds(Sm90Tokens128::kFeatures) < 16 * 2 * rounds(Sm90Large::kFeatures))
    // Half the tile wastes less in the last round, but brings 24 KB a step for half the products of
    // 32: taken where it is ahead by more than a sixteenth (an estimate).
    fill_plan<Sm90Tokens128>(plan, 3, device, m, n, k, requested_splits);
  else
    fill_plan<Sm90Large>(plan, 4, device, m, n, k, requested_splits);
  return plan;
}

template <class S>
static int launch(const GemmPlan& plan, const GemmArgs& args, const DeviceLimits& device,
                  cudaStream_t stream) {
  const int work_items = plan.tiles * plan.splits, resident = device.multiprocessors;
  return QR_LAUNCH((gemm_sm90_kernel<S>), dim3(work_items < resident ? work_items : resident),
                   dim3(kSm90Threads), S::kSharedBytes, stream, args, work_items);
}

int launch_sm90(const GemmPlan& plan, const GemmArgs& args, const DeviceLimits& device,
                cudaStream_t stream) {
  switch (plan.shape) {
    case 0:
      return launch<Sm90Tokens16>(plan, args, device, stream);
    case 1:
      return launch<Sm90Tokens32>(plan, args, device, stream);
    case 2:
      return launch<Sm90Tokens64>(plan, args, device, stream);
    case 3:
      return launch<Sm90Tokens128>(plan, args, device, stream);
    default:
      return launch<Sm90Large>(plan, args, device, stream);
  }
}

}  // namespace qr
