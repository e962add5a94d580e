// SPDX-License-Identifier: Apache-2.0
// INT4 GEMM through `mma.sync`, for more tokens than a decode step has.
//
// One template, two instructions:
//   kNative   mma.m16n8k64.s4   sm_80, 86, 89: both operands stay packed all the way into the
//                               tensor core; nothing is unpacked.
//   otherwise mma.m16n8k32.s8   sm_90 and later, where ptxas turns an s4 mma into some hundred ALU
//                               instructions: nibbles become bytes in registers, 3 operations per 8
//                               codes, and both operands get the same treatment, so the order of k
//                               that it leaves (evens, then odds) cancels.
//
//   W fragments --cp.async--> ring[W] --LDS.128--> A registers --------+
//                                                                      +-> mma --> acc --> y
//   X packed ----cp.async--> ring[X] (swizzled) --ldmatrix--> B regs --+
//
// The ring has kStages slots of one 128-code step; a slot is refilled kStages - 1 steps ahead,
// right after the barrier which proves that every warp is done with it. One barrier a step.
#include "gemm.cuh"
#include "gemm_launch.hpp"

namespace qr {

// kWarpsN x kWarpsM: warps along features and along tokens.
// kTiles16: 16-feature tiles of a warp. kTiles8: its 8-token tiles. A 64 x 64 warp tile (4 x 8) is
//   needed to feed a native s4 tensor core: per 64^3 products it reads 4 KB of shared memory, half
//   of what an A100 can deliver in that time; 32 x 32 would need all of it.
// kStages: slots of the ring.
template <int kWarpsN_, int kWarpsM_, int kTiles16_, int kTiles8_, int kStages_>
struct MmaShape {
  static constexpr int kWarpsN = kWarpsN_, kWarpsM = kWarpsM_, kTiles16 = kTiles16_,
                       kTiles8 = kTiles8_, kStages = kStages_;
  static constexpr int kThreads = kWarpsN * kWarpsM * 32;
  static constexpr int kFeatures = kWarpsN * kTiles16 * 16, kTokens = kWarpsM * kTiles8 * 8;
  static constexpr int kWeightBytes = kFeatures / kFragmentRows * 2 * kFragmentBytes;  // per slot
  static constexpr int kTokenRowBytes = kStepColumns / 2;
  static constexpr int kSlotBytes = kWeightBytes + kTokens * kTokenRowBytes;
  static constexpr int kStagingBytes = kWarpsN * kWarpsM * kTiles8 * 8 * kStagingPitch;
  static constexpr int kSharedBytes =
      kStages * kSlotBytes > kStagingBytes ? kStages * kSlotBytes : kStagingBytes;
  static_assert(kFeatures == 128, "tile plans count tiles of 128 features");
  static_assert(kTiles8 % 2 == 0, "ldmatrix.x4 fetches two 8-token tiles");
};

// Rows of 64 bytes: 16-byte chunk c of token row r. Two rows share a 128-byte line, so eight
// consecutive rows of one chunk column would fall on two chunk places of the line; XOR with r / 2
// spreads them over all eight and makes every ldmatrix phase free of conflicts.
__device__ __forceinline__ int token_chunk_offset(int row, int chunk) {
  return row * 64 + ((chunk ^ ((row >> 1) & 3)) << 4);
}

template <class S, bool kNative>
__global__ void __launch_bounds__(S::kThreads) gemm_mma_kernel(const GemmArgs p) {
#if QR_HAS_S4_MMA
  constexpr bool kHere = true;
#else
  constexpr bool kHere =
      !kNative;  // never let ptxas emulate s4: dispatch refuses it, and no code exists
#endif
  if constexpr (kHere) {
    QR_DYN_SMEM(ring);
    const int thread = threadIdx.x, warp = thread / 32;
    const int warp_n = warp % S::kWarpsN, warp_m = warp / S::kWarpsN;
    const TileCoordinates tile =
        tile_coordinates(blockIdx.x, ceil_div(p.n, S::kFeatures), ceil_div(p.m, S::kTokens));
    const int token0 = tile.token * S::kTokens;
    const int blocks_k = fragment_blocks_k(p.k), blocks_n = fragment_blocks_n(p.n);
    const int first_step = blockIdx.y * p.steps_per_split;
    const int steps = min(p.steps_per_split, blocks_k / 2 - first_step);

    // ---- load one step into a slot. Weights are copied in a straight line: the two 64-code blocks
    // of a 64-feature row block lie next to each other. Tokens and chunks outside X become zeros.
    const auto load = [&](int step, unsigned char* slot) {
#pragma unroll
      for (int i = thread; i < S::kWeightBytes / 16; i += S::kThreads) {
        const int row_block = i / (2 * kFragmentBytes / 16), piece = i % (2 * kFragmentBytes / 16);
        const int block_row = tile.feature * (S::kFeatures / kFragmentRows) + row_block;
        const bool ok = block_row < blocks_n;
        cp_async16(slot + i * 16,
                   p.w + fragment_offset(ok ? block_row : 0, 2 * step, blocks_k) + piece * 16, ok);
      }
      const uint8_t* a = static_cast<const uint8_t*>(p.q);
#pragma unroll
      for (int i = thread; i < S::kTokens * 4; i += S::kThreads) {
        const int row = i / 4, chunk = i % 4;
        const bool ok = token0 + row < p.m && step * kStepColumns + chunk * 32 < p.k;
        cp_async16(
            slot + S::kWeightBytes + token_chunk_offset(row, chunk),
            ok ? a + size_t(token0 + row) * (p.k / 2) + step * (kStepColumns / 2) + chunk * 16 : a,
            ok);
      }
    };

    // ---- fill
    int acc[S::kTiles16 * S::kTiles8][4];
#pragma unroll
    for (int i = 0; i < S::kTiles16 * S::kTiles8; i++)
#pragma unroll
      for (int r = 0; r < 4; r++) acc[i][r] = 0;
#pragma unroll
    for (int s = 0; s < S::kStages - 1; s++) {
      if (s < steps) load(first_step + s, ring + s * S::kSlotBytes);
      cp_commit();
    }

    // ---- main loop
    for (int step = 0; step < steps; step++) {
      cp_wait<S::kStages - 2>();  // this step's slot has landed (for my copies)
      __syncthreads();            // for everybody's; and everybody has left the slot refilled next
      const int ahead = step + S::kStages - 1;
      if (ahead < steps) load(first_step + ahead, ring + ahead % S::kStages * S::kSlotBytes);
      cp_commit();
      const unsigned char* slot = ring + step % S::kStages * S::kSlotBytes;
#pragma unroll
      for (int half = 0; half < 2; half++) {  // 64 codes of k
        uint32_t w[S::kTiles16][4], x[S::kTiles8][2];
#pragma unroll
        for (int i = 0; i < S::kTiles16; i++) {
          const int tile16 = warp_n * S::kTiles16 + i;  // of the CTA; four to a row block
          const uint4 v = load_shared<uint4>(slot + (tile16 / 4 * 2 + half) * kFragmentBytes +
                                             tile16 % 4 * kWarpFragmentBytes + lane() * 16);
          w[i][0] = v.x, w[i][1] = v.y, w[i][2] = v.z, w[i][3] = v.w;
        }
#pragma unroll
        for (int j = 0; j < S::kTiles8; j += 2) {
          uint32_t r[4];  // tile j's low and high chunk, then tile j + 1's
          const int row = warp_m * S::kTiles8 * 8 + j * 8 + (lane() & 7) + (lane() >> 4) * 8;
          ldmatrix_x4(
              r, slot + S::kWeightBytes + token_chunk_offset(row, half * 2 + ((lane() >> 3) & 1)));
          x[j][0] = r[0], x[j][1] = r[1], x[j + 1][0] = r[2], x[j + 1][1] = r[3];
        }
        if constexpr (kNative) {
#pragma unroll
          for (int i = 0; i < S::kTiles16; i++)
#pragma unroll
            for (int j = 0; j < S::kTiles8; j++) mma_s4(acc[i * S::kTiles8 + j], w[i], x[j]);
        } else {
#pragma unroll
          for (int odd = 0; odd < 2; odd++) {
            uint32_t xs[S::kTiles8][2];
#pragma unroll
            for (int j = 0; j < S::kTiles8; j++)
#pragma unroll
              for (int r = 0; r < 2; r++)
                xs[j][r] = odd ? odd_codes_x16(x[j][r]) : even_codes_x16(x[j][r]);
#pragma unroll
            for (int i = 0; i < S::kTiles16; i++) {
              uint32_t ws[4];
#pragma unroll
              for (int r = 0; r < 4; r++)
                ws[r] = odd ? odd_codes_x16(w[i][r]) : even_codes_x16(w[i][r]);
#pragma unroll
              for (int j = 0; j < S::kTiles8; j++) mma_s8(acc[i * S::kTiles8 + j], ws, xs[j]);
            }
          }
        }
      }
    }
    __syncthreads();  // the ring becomes staging space

    // ---- combine the splits
    constexpr int kShift = kNative ? 0 : 8;  // unpacked operands are times 16, both
    if (p.splits > 1) {
      constexpr int kCount = S::kTiles16 * S::kTiles8 * 4;
      int* flag = reinterpret_cast<int*>(ring);
      const bool last = reduce_splits<kCount, S::kThreads>(
          reinterpret_cast<int (&)[kCount]>(acc),
          p.sums + size_t(blockIdx.x) * kCount * S::kThreads, p.counters + blockIdx.x, p.splits,
          thread, flag, [] { __syncthreads(); });
      if (!last) return;
      __syncthreads();  // the flag has been read
    }

    // ---- scale, transpose, store; each warp by itself
    const int feature0 = tile.feature * S::kFeatures + warp_n * S::kTiles16 * 16,
              warp_token0 = token0 + warp_m * S::kTiles8 * 8;
    FeatureTerms terms[S::kTiles16 * 2];
#pragma unroll
    for (int i = 0; i < S::kTiles16 * 2; i++)
      terms[i] = feature_terms(p, feature0 + i * 8 + lane() / 4);
    if (p.out_dtype == QR_DTYPE_INT32) {
      store_sums<kShift, S::kTiles16, S::kTiles8>(p, acc, feature0, warp_token0);
      return;
    }
    unsigned char* staging = ring + warp * S::kTiles8 * 8 * kStagingPitch;
    stage_outputs<kShift, S::kTiles16, S::kTiles8>(p, acc, terms, warp_token0, 0, staging);
    __syncwarp();
    copy_staged<S::kTiles16 * 16>(p, staging, S::kTiles8 * 8, feature0, warp_token0, lane(), 32);
  } else {
    refuse_architecture();
  }
}

// ------------------------------------------------------------------------------------------ launch

// Shapes by tokens of a tile; `GemmPlan::shape` counts them.
using Shape32 = MmaShape<4, 1, 2, 4, 4>;
using Shape64 = MmaShape<4, 1, 2, 8, 4>;
using Shape128 = MmaShape<2, 2, 4, 8, 4>;
using Shape256 = MmaShape<2, 4, 4, 8, 4>;

template <class S>
static void fill_plan(GemmPlan& plan, int shape, const DeviceLimits& device, int m, int n, int k,
                      int requested_splits) {
  const int steps = ceil_div(k, kStepColumns);
  plan.shape = shape;
  plan.tiles = ceil_div(n, S::kFeatures) * ceil_div(m, S::kTokens);
  // Split k while half of the machine would stand idle, in parts of at least eight steps.
  int splits = requested_splits > 0 ? requested_splits : device.multiprocessors / plan.tiles;
  const int most = requested_splits > 0 ? steps : steps / 8;
  splits = splits > most ? most : splits;
  plan.steps_per_split = ceil_div(steps, splits < 1 ? 1 : splits);
  plan.splits = ceil_div(steps, plan.steps_per_split);
  plan.counters = plan.splits > 1 ? size_t(plan.tiles) : 0;
  plan.sums = plan.splits > 1 ? size_t(plan.tiles) * S::kFeatures * S::kTokens : 0;
}

GemmPlan plan_mma(const DeviceLimits& device, int m, int n, int k, int requested_splits) {
  GemmPlan plan;
  const int feature_tiles = ceil_div(n, Shape128::kFeatures);
  if (m <= Shape32::kTokens)
    fill_plan<Shape32>(plan, 0, device, m, n, k, requested_splits);
  else if (m <= Shape64::kTokens)
    fill_plan<Shape64>(plan, 1, device, m, n, k, requested_splits);
  else if (m <= Shape128::kTokens ||
           feature_tiles * ceil_div(m, Shape256::kTokens) < device.multiprocessors)
    fill_plan<Shape128>(plan, 2, device, m, n, k, requested_splits);
  else
    fill_plan<Shape256>(plan, 3, device, m, n, k, requested_splits);
  return plan;
}

template <class S, bool kNative>
static int launch(const GemmPlan& plan, const GemmArgs& args, cudaStream_t stream) {
  return QR_LAUNCH((gemm_mma_kernel<S, kNative>), dim3(plan.tiles, plan.splits), dim3(S::kThreads),
                   S::kSharedBytes, stream, args);
}

template <bool kNative>
static int launch(const GemmPlan& plan, const GemmArgs& args, cudaStream_t stream) {
  switch (plan.shape) {
    case 0:
      return launch<Shape32, kNative>(plan, args, stream);
    case 1:
      return launch<Shape64, kNative>(plan, args, stream);
    case 2:
      return launch<Shape128, kNative>(plan, args, stream);
    default:
      return launch<Shape256, kNative>(plan, args, stream);
  }
}

int launch_mma(const GemmPlan& plan, const GemmArgs& args, bool native, cudaStream_t stream) {
  return native ? launch<true>(plan, args, stream) : launch<false>(plan, args, stream);
}

}  // namespace qr
