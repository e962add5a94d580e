# SPDX-License-Identifier: Apache-2.0
"""The passes, one per file, and their order: `pipeline` reads like the paper."""

from dataclasses import asdict

from quarot_onnx.calibration import Calibration, Journal, Progress
from quarot_onnx.calibration.roundings import Roundings
from quarot_onnx.decoder import Decoder
from quarot_onnx.hadamard import plan
from quarot_onnx.passes.base import Effect, Pass, Report
from quarot_onnx.passes.calibrate_weights import CalibrateWeightsPass
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
    recipe: Recipe,
    decoder: Decoder,
    calibration: Calibration | None = None,
    *,
    journal: Journal | None = None,
    progress: Progress | None = None,
) -> list[Pass]:
    """The passes of `recipe`, in order, for a decoder whose embeddings are untied.

    A pass that has to look at data gets `calibration`, which is all that it may look at; it keeps
    what it has finished in `journal` and tells `progress` the layers done and the layers in all.
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
        passes.append(InsertR4Pass(decoder, rotations.r4_policy))
    if (weights := recipe.weights).bits < 16:
        if weights.is_calibrated and calibration is not None:
            passes.append(
                CalibrateWeightsPass(
                    decoder, weights, calibration, journal=journal, progress=progress
                )
            )
        else:
            passes.append(QuantizeWeightsPass(decoder, **asdict(weights.form)))
    return passes + _quantize_activations(recipe, decoder, calibration, progress)


def _quantize_activations(
    recipe: Recipe, decoder: Decoder, calibration: Calibration | None, progress: Progress | None
) -> list[Pass]:
    """Activations, then the cache; then a search over what both clip, where one is asked for."""
    roundings = Roundings(decoder, recipe, calibration, progress)
    quantized: list[QuantizeActivationsPass | QuantizeKvCachePass] = []
    searched: list[QuantizeActivationsPass | QuantizeKvCachePass] = []
    if (activations := recipe.activations).bits < 16:
        choose, bits = roundings.of_activations, recipe.weights.bits
        quantized.append(QuantizeActivationsPass(decoder, choose, weight_bits=bits))
        searched += quantized if activations.clip == "perplexity" else []
    if (cache := recipe.kv_cache).bits < 16:
        choose, form = roundings.of_cache, cache.io
        quantized.append(QuantizeKvCachePass(decoder, choose, bits=cache.bits, form=form))
        searched += quantized[-1:] if cache.clip == "perplexity" else []
    if searched and calibration is not None:
        part = calibration.part(recipe.calibration.search_windows)
        return [*quantized, SearchClipsPass(decoder, part, searched, progress)]
    return [*quantized]
