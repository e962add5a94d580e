# SPDX-License-Identifier: Apache-2.0
"""The passes, one per file, and their order: `pipeline` reads like the paper."""

from quarot_onnx.calibration import Calibration
from quarot_onnx.calibration.roundings import Roundings
from quarot_onnx.decoder import Decoder
from quarot_onnx.hadamard import plan
from quarot_onnx.passes.base import Effect, Pass, Report
from quarot_onnx.passes.fuse_layer_norm_mean import FuseLayerNormMeanPass
from quarot_onnx.passes.fuse_norm_scale import FuseNormScalePass
from quarot_onnx.passes.fuse_r1 import FuseR1Pass
from quarot_onnx.passes.fuse_r2 import FuseR2Pass
from quarot_onnx.passes.insert_heads_hadamard import InsertHeadsHadamardPass
from quarot_onnx.passes.insert_r3 import InsertR3Pass
from quarot_onnx.passes.insert_r4 import InsertR4Pass
from quarot_onnx.passes.quantize_activations import QuantizeActivationsPass
from quarot_onnx.passes.quantize_kv_cache import QuantizeKvCachePass
from quarot_onnx.passes.quantize_weights import QuantizeWeightsPass
from quarot_onnx.passes.search_clips import SearchClipsPass
from quarot_onnx.passes.untie_embeddings import untie_embeddings
from quarot_onnx.recipe import Recipe
from quarot_onnx.rotation import Rotation

__all__ = ["Effect", "Pass", "Report", "pipeline", "untie_embeddings"]


def pipeline(
    recipe: Recipe, decoder: Decoder, calibration: Calibration | None = None
) -> list[Pass]:
    """The passes of `recipe`, in order, for a decoder whose embeddings are untied.

    A pass that has to look at data gets `calibration`, which is all that it may look at.
    """
    rotations, seed = recipe.rotations, recipe.seed
    attention = decoder.layers[0].attention
    passes: list[Pass] = []
    if rotations.fold_norm_scale and any(norm.is_layer_norm for norm in decoder.norms):
        passes.append(FuseLayerNormMeanPass(decoder))
    if rotations.fold_norm_scale:
        passes.append(FuseNormScalePass(decoder))
    if rotations.r1 != "none":
        residual = Rotation(rotations.r1, decoder.hidden_size, seed, "R1")
        passes.append(FuseR1Pass(decoder, residual, rotations.post_norm))
    if rotations.r2:
        passes.append(FuseR2Pass(decoder, plan(attention.head_dim)))
    if rotations.heads:
        passes.append(InsertHeadsHadamardPass(decoder, plan(attention.num_heads, policy="full")))
    if rotations.r3:
        passes.append(InsertR3Pass(decoder, plan(attention.head_dim)))
    if rotations.r4:
        passes.append(InsertR4Pass(decoder))
    if (weights := recipe.weights).bits < 16:
        passes.append(
            QuantizeWeightsPass(decoder, bits=weights.bits, clip_search=weights.clip_search)
        )
    roundings = Roundings(decoder, recipe, calibration)
    searched: list[QuantizeActivationsPass | QuantizeKvCachePass] = []
    if (activations := recipe.activations).bits < 16:
        choose = roundings.of_activations
        quantize = QuantizeActivationsPass(decoder, choose, weight_bits=weights.bits)
        passes.append(quantize)
        searched += [quantize] if activations.clip == "perplexity" else []
    if (cache := recipe.kv_cache).bits < 16:
        choose = roundings.of_cache
        pack = QuantizeKvCachePass(decoder, choose, bits=cache.bits, form=cache.io)
        passes.append(pack)
        searched += [pack] if cache.clip == "perplexity" else []
    if searched and calibration is not None:
        part = calibration.part(recipe.calibration.search_windows)
        passes.append(SearchClipsPass(decoder, part, searched))
    return passes
