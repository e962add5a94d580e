# SPDX-License-Identifier: Apache-2.0
"""Bugs to plant in the GEMM kernels, one at a time; the suite must catch each (docs/kernels.md).

A mutant replaces ``before`` by ``after`` once, in ``file`` under ``plugins_cuda``; the tests of
``tests`` (a pytest expression over the test files of this folder) are then run on the emulator.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Mutant:
    """One planted bug."""

    name: str
    file: str
    before: str
    after: str
    tests: str


MMA, DECODE, SM90 = (
    "kernels/gemm_mma.cu",
    "kernels/gemm_decode.cu",
    "kernels/gemm_sm90.cu",
)
SHARED, DISPATCH, PACK = (
    "kernels/gemm.cuh",
    "kernels/gemm_dispatch.cu",
    "kernels/pack_weights.cu",
)
PREFILL_MMA = "prefill and (mma_s4-sm80 or mma_s8-sm90)"
PREFILL_WGMMA = "prefill and wgmma"

MUTANTS = (
    # ---- mma.sync
    Mutant(
        "mma: the main loop lacks its barrier",
        MMA,
        "__syncthreads();            // for everybody's",
        ";  // for everybody's",
        PREFILL_MMA,
    ),
    Mutant(
        "mma: waits for one copy group too few",
        MMA,
        "cp_wait<S::kStages - 2>()",
        "cp_wait<S::kStages - 1>()",
        PREFILL_MMA,
    ),
    Mutant(
        "mma: refills the slot that is being read",
        MMA,
        "ring + ahead % S::kStages * S::kSlotBytes",
        "ring + step % S::kStages * S::kSlotBytes",
        PREFILL_MMA,
    ),
    Mutant(
        "mma: reads the slot of the step before",
        MMA,
        "ring + step % S::kStages * S::kSlotBytes",
        "ring + (step + S::kStages - 1) % S::kStages * S::kSlotBytes",
        PREFILL_MMA,
    ),
    Mutant(
        "mma: token rows are not swizzled",
        MMA,
        "((chunk ^ ((row >> 1) & 3)) << 4)",
        "(chunk << 4)",
        "bank_conflicts and mma_s4-sm80",
    ),
    Mutant(
        "mma: B registers swapped",
        MMA,
        "x[j][0] = r[0], x[j][1] = r[1]",
        "x[j][0] = r[1], x[j][1] = r[0]",
        PREFILL_MMA,
    ),
    Mutant(
        "mma: odd codes multiplied twice",
        MMA,
        "xs[j][r] = odd ? odd_codes_x16(x[j][r]) : even_codes_x16(x[j][r])",
        "xs[j][r] = odd_codes_x16(x[j][r])",
        PREFILL_MMA,
    ),
    Mutant(
        "mma: accumulators shifted by one operand's 16 only",
        MMA,
        "kNative ? 0 : 8",
        "kNative ? 0 : 4",
        PREFILL_MMA,
    ),
    Mutant(
        "mma: the ring is reused for staging without a barrier",
        MMA,
        "__syncthreads();  // the ring becomes staging space",
        ";",
        "full_tile and (mma_s4-sm80 or mma_s8-sm90)",
    ),
    Mutant(
        "mma: staged outputs are read before they are all written",
        MMA,
        "__syncwarp();",
        ";",
        "full_tile and (mma_s4-sm80 or mma_s8-sm90)",
    ),
    Mutant(
        "mma: the plan forgets the last, shorter split",
        MMA,
        "plan.splits = ceil_div(steps, plan.steps_per_split)",
        "plan.splits = steps / plan.steps_per_split",
        "how_k_is_split and mma_s4-sm80",
    ),
    # ---- the shared epilogue and split-K
    Mutant(
        "epilogue: product and bias contracted to one fused multiply-add",
        SHARED,
        "return __fadd_rn(__fmul_rn(__fmul_rn(__int2float_rn(sum), token_scale), w_scale), bias);",
        "return fmaf(__int2float_rn(sum) * token_scale, w_scale, bias);",
        "one_by_one and mma_s4-sm80",
    ),
    Mutant(
        "epilogue: the zero point's term has the wrong sign",
        SHARED,
        "(c[r] >> kShift) - t.zero * f.sum",
        "(c[r] >> kShift) + t.zero * f.sum",
        "numpy_formula and mma_s4-sm80",
    ),
    Mutant(
        "epilogue: both tokens of a pair take the first one's scale",
        SHARED,
        "const TokenTerms& t = tokens[j - batch][r];",
        "const TokenTerms& t = tokens[j - batch][0];",
        "numpy_formula and mma_s4-sm80",
    ),
    Mutant(
        "epilogue: columns past n are written",
        SHARED,
        "token0 + token < p.m && feature0 + piece * 8 < p.n",
        "token0 + token < p.m && feature0 + piece * 8 < p.n + 8",
        "left_alone and mma_s4-sm80",
    ),
    Mutant(
        "epilogue: rows past m are written",
        SHARED,
        "token0 + token < p.m && feature0",
        "token0 + token < p.m + 8 && feature0",
        "left_alone and mma_s4-sm80",
    ),
    Mutant(
        "epilogue: staging rows lie on the same banks",
        SHARED,
        "kStagingPitch = 64 * 2 + 16",
        "kStagingPitch = 64 * 2",
        "bank_conflicts and mma_s4-sm80",
    ),
    Mutant(
        "split-K: partial sums are not put back to zero",
        SHARED,
        "mine[i * kThreads] = 0;",
        ";",
        "how_k_is_split and mma_s4-sm80",
    ),
    Mutant(
        "split-K: the arrival counter is not reset",
        SHARED,
        "if (before == splits - 1) *counter = 0;",
        "",
        "how_k_is_split and mma_s4-sm80",
    ),
    Mutant(
        "split-K: the last but one writes the result",
        SHARED,
        "store_shared<int>(flag, before == splits - 1)",
        "store_shared<int>(flag, before == splits - 2)",
        "how_k_is_split and mma_s4-sm80",
    ),
    # ---- decode
    Mutant(
        "decode: staged tokens are read before they are all written",
        DECODE,
        "__syncthreads();\n\n    // ---- main loop",
        "// ---- main loop",
        "decode_sums",
    ),
    Mutant(
        "decode: the weights fetched ahead are one block off",
        DECODE,
        "size_t(block + kDecodeDepth) * kFragmentBytes",
        "size_t(block + kDecodeDepth - 1) * kFragmentBytes",
        "decode_sums",
    ),
    Mutant(
        "decode: nine tokens are taken for eight",
        DECODE,
        "plan.shape = m <= 8 ? 1 : 2",
        "plan.shape = m <= 9 ? 1 : 2",
        "decode_sums",
    ),
    Mutant(
        "decode: even and odd chunks of split tokens mixed up",
        DECODE,
        "uint4{chunk(0), chunk(1), chunk(2), chunk(3)}",
        "uint4{chunk(0), chunk(2), chunk(1), chunk(3)}",
        "decode_sums",
    ),
    Mutant(
        "decode: totals overwrite tokens that a slower warp still reads",
        DECODE,
        "if (p.splits == 1) __syncthreads();",
        "",
        "decode_sums",
    ),
    Mutant(
        "decode: totals of four token pairs share their banks",
        DECODE,
        "kTotalsPitch = kFragmentRows + 4",
        "kTotalsPitch = kFragmentRows",
        "bank_conflicts and decode-sm90",
    ),
    Mutant(
        "decode: sums are not put back to zero",
        DECODE,
        "mine[0] = 0, mine[1] = 0;",
        "",
        "how_k_is_split and decode-sm90",
    ),
    # ---- wgmma, bulk copies, barriers
    Mutant(
        "sm90: consumers do not wait for the copies",
        SM90,
        "        mbarrier_wait(&full[at.slot], at.parity);\n        unpack",
        "        unpack",
        PREFILL_WGMMA,
    ),
    Mutant(
        "sm90: the producer does not wait for a free slot",
        SM90,
        "mbarrier_wait(&empty[at.slot], at.parity ^ 1);",
        "",
        "longest_sum and wgmma",
    ),
    Mutant(
        "sm90: a slot is released while wgmma still reads it",
        SM90,
        "if (i > 0 && lane() == 0) mbarrier_arrive(&empty[previous_slot]);",
        "if (i + 1 < item.steps && lane() == 0) mbarrier_arrive(&empty[at.slot]);",
        "longest_sum and wgmma",
    ),
    Mutant(
        "sm90: operand registers are rewritten under wgmma",
        SM90,
        "wgmma_wait<1>();",
        "",
        PREFILL_WGMMA,
    ),
    Mutant(
        "sm90: accumulators are read before the last wgmma is done",
        SM90,
        "wgmma_wait<0>();",
        "",
        PREFILL_WGMMA,
    ),
    Mutant("sm90: no fence before wgmma", SM90, "wgmma_fence();", "", PREFILL_WGMMA),
    Mutant(
        "sm90: the parity never flips",
        SM90,
        "slot = 0, parity ^= 1;",
        "slot = 0;",
        "longest_sum and wgmma",
    ),
    Mutant(
        "sm90: the barrier is promised fewer bytes than are copied",
        SM90,
        "S::kWeightBytes + token_bytes);",
        "S::kWeightBytes);",
        PREFILL_WGMMA,
    ),
    Mutant(
        "sm90: the descriptor moves half a step along k",
        SM90,
        "tokens + 4 * half + 2 * parity",
        "tokens + 2 * half + parity",
        PREFILL_WGMMA,
    ),
    Mutant(
        "sm90: even and odd codes swapped",
        SM90,
        "operands[b][r] = even_codes_x16(words[r]);",
        "operands[b][r] = odd_codes_x16(words[r]);",
        PREFILL_WGMMA,
    ),
    Mutant(
        "sm90: both blocks of rows use the first one's weights",
        SM90,
        "operands[b] + 4 * parity",
        "operands[0] + 4 * parity",
        PREFILL_WGMMA,
    ),
    Mutant(
        "sm90: the two blocks of rows share their arrival counter",
        SM90,
        "p.counters + part,",
        "p.counters + part / 2,",
        "how_k_is_split and wgmma",
    ),
    Mutant(
        "sm90: seven warps free a slot that eight read",
        SM90,
        "mbarrier_init(&empty[s], 8);",
        "mbarrier_init(&empty[s], 7);",
        "longest_sum and wgmma",
    ),
    Mutant(
        "sm90: a named barrier that waits for both warpgroups",
        SM90,
        "named_barrier(1 + group, 128)",
        "named_barrier(1 + group, 256)",
        "full_tile and wgmma",
    ),
    Mutant(
        "sm90: staging is refilled while others still copy it out",
        SM90,
        "group_sync();  // staging is free again",
        "",
        "full_tile and wgmma",
    ),
    Mutant(
        "sm90: the producer stays in one slot",
        SM90,
        "          at.advance();\n        }\n      }\n    }\n    return;",
        "        }\n      }\n    }\n    return;",
        PREFILL_WGMMA,
    ),
    Mutant(
        "sm90: the swizzle descriptor counts 8-row groups of 512 bytes",
        "emu/hopper.hpp",
        "uint64_t(1024 >> 4) << 32",
        "uint64_t(512 >> 4) << 32",
        PREFILL_WGMMA,
    ),
    # ---- dispatch and packing
    Mutant(
        "dispatch: s4 kernels are allowed on sm_90",
        DISPATCH,
        "device.compute_capability < 90;",
        "device.compute_capability <= 90;",
        "preferred_layouts",
    ),
    Mutant(
        "dispatch: a workspace too small is accepted",
        DISPATCH,
        "args->workspace_bytes < workspace_bytes(plan)",
        "args->workspace_bytes < counter_bytes(plan) / 1024",
        "refuses_what",
    ),
    Mutant(
        "pack: rows past n are read",
        PACK,
        "r < n && w < words",
        "w < words",
        "same_weight_bytes",
    ),
    Mutant(
        "pack: register order (g, q) (g, q+4) (g+8, q) (g+8, q+4)",
        PACK,
        "load(row + 8, word), load(row, word + 4)",
        "load(row, word + 4), load(row + 8, word)",
        "same_weight_bytes",
    ),
    Mutant(
        "pack: split order without its swizzle",
        "kernels/layouts.hpp",
        "((chunk ^ (token & 7)) << 4)",
        "(chunk << 4)",
        "split_activations",
    ),
    Mutant(
        "pack: a borrow runs from byte to byte",
        PACK,
        "(((codes ^ 0x08080808u) | 0x80808080u) - 0x08080808u) ^ 0x80808080u",
        "(codes ^ 0x08080808u) - 0x08080808u",
        "split_activations",
    ),
)
