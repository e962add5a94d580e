# SPDX-License-Identifier: Apache-2.0
"""The passes, one per file, and their order: `pipeline` reads like the paper."""

from collections.abc import Iterable, Iterator
from dataclasses import asdict
from functools import partial
from typing import TypeVar

from quarot_onnx.calibration import Calibration, Journal, Progress
from quarot_onnx.calibration.roundings import Roundings
from quarot_onnx.decoder import Decoder
from quarot_onnx.hadamard import plan
from quarot_onnx.passes.base import Effect, Pass, Report
from quarot_onnx.passes.calibrate_weights import CalibrateWeightsPass
from quarot_onnx.passes.fuse_layer_norm_mean import FuseLayerNormMeanPass
from quarot_onnx.passes.fuse_norm_output_scale import FuseNormOutputScalePass
from quarot_onnx.passes.fuse_norm_scale import FuseNormScalePass
from quarot_onnx.passes.fuse_r1 import FuseR1Pass
from quarot_onnx.passes.fuse_r2 import FuseR2Pass
from quarot_onnx.passes.fuse_value_transform import FuseValueTransformPass
from quarot_onnx.passes.insert_down_transform import InsertDownTransformPass
from quarot_onnx.passes.insert_head_transform import InsertHeadTransformPass
from quarot_onnx.passes.insert_heads_hadamard import InsertHeadsHadamardPass
from quarot_onnx.passes.insert_input_transform import InsertInputTransformPass
from quarot_onnx.passes.insert_key_transform import InsertKeyTransformPass
from quarot_onnx.passes.insert_r3 import InsertR3Pass
from quarot_onnx.passes.insert_r4 import InsertR4Pass
from quarot_onnx.passes.quantize_activations import QuantizeActivationsPass
from quarot_onnx.passes.quantize_kv_cache import QuantizeKvCachePass
from quarot_onnx.passes.quantize_weights import QuantizeWeightsPass
from quarot_onnx.passes.search_clips import SearchClipsPass
from quarot_onnx.passes.search_r1 import SearchR1Pass
from quarot_onnx.passes.smooth_down_input import SmoothDownInputPass, scales_from_calibration
from quarot_onnx.passes.split_outliers import SplitOutliersPass, largest_features
from quarot_onnx.passes.untie_embeddings import untie_embeddings
from quarot_onnx.recipe import Recipe
from quarot_onnx.rotation import residual_rotations
from quarot_onnx.transforms import Transforms

__all__ = ["Effect", "Pass", "Report", "pipeline", "untie_embeddings"]

_Given = TypeVar("_Given")


def pipeline(
    recipe: Recipe,
    decoder: Decoder,
    calibration: Calibration | None = None,
    transforms: Transforms | None = None,
    *,
    journal: Journal | None = None,
    progress: Progress | None = None,
) -> list[Pass]:
    """The passes of `recipe`, in order, for a decoder whose embeddings are untied.

    A pass that has to look at data gets `calibration`, which is all that it may look at; it keeps
    what it has finished in `journal` and tells `progress` the layers done and the layers in all.
    Where `transforms` holds a place's matrices, they stand there in place of the recipe's.
    """
    rotations = recipe.rotations
    passes: list[Pass] = []
    if rotations.fold_norm_scale and any(norm.is_layer_norm for norm in decoder.norms):
        passes.append(FuseLayerNormMeanPass(decoder))
    if rotations.fold_norm_scale:
        passes.append(FuseNormScalePass(decoder))
    passes += _offline(recipe, decoder, calibration, transforms or Transforms())
    passes += _online(recipe, decoder, transforms or Transforms())
    passes += _of_weights(recipe, decoder, calibration, journal, progress)
    return passes + _quantize_activations(recipe, decoder, calibration, journal, progress)


def _of_weights(
    recipe: Recipe,
    decoder: Decoder,
    calibration: Calibration | None,
    journal: Journal | None,
    progress: Progress | None,
) -> Iterator[Pass]:
    """What turns weights into codes, and keeps outlier features out of them."""
    if (outliers := recipe.outliers).are_split and calibration is not None:
        choose = partial(
            largest_features,
            decoder,
            calibration,
            share=outliers.share,
            threshold=outliers.threshold,
        )
        yield SplitOutliersPass(decoder, choose)
    weights = recipe.weights
    if weights.bits == 16:
        return
    if weights.is_calibrated and calibration is not None:
        yield CalibrateWeightsPass(
            decoder, weights, calibration, journal=journal, progress=progress
        )
    else:
        form = asdict(weights.form)
        yield QuantizeWeightsPass(decoder, **form, down_proj_bits=weights.down_proj_bits)


def _quantize_activations(
    recipe: Recipe,
    decoder: Decoder,
    calibration: Calibration | None,
    journal: Journal | None,
    progress: Progress | None,
) -> list[Pass]:
    """Activations, then the cache; then a search over what both clip, where one is asked for."""
    roundings = Roundings(decoder, recipe, calibration, progress)
    quantized: list[QuantizeActivationsPass | QuantizeKvCachePass] = []
    searched: list[QuantizeActivationsPass | QuantizeKvCachePass] = []
    if (activations := recipe.activations).bits < 16:
        choose, bits = roundings.of_activations, recipe.weights.most_bits
        zeros = not recipe.weights.symmetric
        quantized.append(
            QuantizeActivationsPass(decoder, choose, weight_bits=bits, weight_zeros=zeros)
        )
        searched += quantized if activations.clip == "perplexity" else []
    if (cache := recipe.kv_cache).bits < 16:
        choose, form = roundings.of_cache, cache.io
        quantized.append(QuantizeKvCachePass(decoder, choose, bits=cache.bits, form=form))
        searched += quantized[-1:] if cache.clip == "perplexity" else []
    if searched and calibration is not None:
        part = calibration.part(recipe.calibration.search_windows)
        search = SearchClipsPass(decoder, part, searched, journal=journal, progress=progress)
        return [*quantized, search]
    return [*quantized]


def _offline(
    recipe: Recipe, decoder: Decoder, calibration: Calibration | None, given: Transforms
) -> Iterator[Pass]:
    """What is fused into weights and costs nothing at run time."""
    rotations = recipe.rotations
    attention, count = decoder.layers[0].attention, len(decoder.layers)
    if recipe.smoothing.down_proj and calibration is not None:
        alpha = recipe.smoothing.alpha
        scales = partial(scales_from_calibration, decoder, calibration, alpha)
        yield SmoothDownInputPass(decoder, scales, f"from calibration, alpha {alpha:g}")
    if ups := _each(given.up(layer) for layer in range(count)):
        yield SmoothDownInputPass(decoder, lambda: ups, "given")
    if given.r1 is not None or rotations.r1 != "none":
        candidates = residual_rotations(recipe, decoder.hidden_size, given)
        if len(candidates) > 1 and calibration is not None:
            yield SearchR1Pass(decoder, candidates, rotations.post_norm, calibration)
        else:
            yield FuseR1Pass(decoder, candidates[0], rotations.post_norm)
    norms = {i: (given.norm(i, 0), given.norm(i, 1)) for i in range(count)}
    if any(scale is not None for pair in norms.values() for scale in pair):
        yield FuseNormOutputScalePass(decoder, norms)
    if values := _each(given.value(layer, attention.num_kv_heads) for layer in range(count)):
        yield FuseValueTransformPass(decoder, values)
    elif rotations.r2:
        yield FuseR2Pass(decoder, plan(attention.head_dim))


def _online(recipe: Recipe, decoder: Decoder, given: Transforms) -> Iterator[Pass]:
    """What runs as nodes in front of what is quantized."""
    rotations, layers = recipe.rotations, range(len(decoder.layers))
    attention = decoder.layers[0].attention
    inputs = [_each(given.inputs(layer, which) for layer in layers) for which in (0, 1)]
    if any(inputs):
        yield InsertInputTransformPass(decoder, *inputs)
    if heads := _each(given.heads(layer) for layer in layers):
        yield InsertHeadTransformPass(decoder, heads)
    elif rotations.heads:
        yield InsertHeadsHadamardPass(decoder, plan(attention.num_heads, policy="full"))
    if keys := _each(given.key(layer) for layer in layers):
        yield InsertKeyTransformPass(decoder, keys)
    elif rotations.r3:
        yield InsertR3Pass(decoder, plan(attention.head_dim))
    if downs := _each(given.down(layer) for layer in layers):
        yield InsertDownTransformPass(decoder, downs)
    elif rotations.r4:
        yield InsertR4Pass(decoder, rotations.r4_policy)


def _each(found: Iterable[_Given | None]) -> list[_Given]:
    """What is given, for all layers or for none (`Transforms` has made sure)."""
    return [item for item in found if item is not None]
