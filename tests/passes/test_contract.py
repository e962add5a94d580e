# SPDX-License-Identifier: Apache-2.0
"""What every pass promises: valid ONNX after it, once only, equivalent if it says so."""

from collections.abc import Callable

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import quarot_onnx.passes as package
from quarot_onnx.calibration import Calibration
from quarot_onnx.calibration.roundings import Roundings
from quarot_onnx.decoder import Decoder
from quarot_onnx.hadamard import plan
from quarot_onnx.passes import Effect, Pass, pipeline
from quarot_onnx.passes.base import APPLIED
from quarot_onnx.recipe import Recipe, load_recipe, preset_names
from quarot_onnx.rotation import Rotation
from tests import float64, running
from tests.small_decoder import assert_equivalent, invertible, located, logits, refused

BUILD: dict[type[Pass], Callable[[Decoder], Pass]] = {
    package.FuseLayerNormMeanPass: package.FuseLayerNormMeanPass,
    package.FuseNormScalePass: package.FuseNormScalePass,
    package.FuseR1Pass: lambda d: package.FuseR1Pass(
        d, Rotation("randomized_hadamard", d.hidden_size, 0, "R1")
    ),
    package.FuseR2Pass: lambda d: package.FuseR2Pass(d, plan(4)),
    package.SmoothDownInputPass: lambda d: package.SmoothDownInputPass(
        d, lambda: [np.linspace(0.5, 2, 12)] * len(d.layers), "given"
    ),
    package.FuseNormOutputScalePass: lambda d: package.FuseNormOutputScalePass(
        d, {i: (np.linspace(0.5, 2, 8), np.linspace(3, 1, 8)) for i in range(len(d.layers))}
    ),
    package.FuseValueTransformPass: lambda d: package.FuseValueTransformPass(
        d, [invertible(2, 4, 4)] * len(d.layers)
    ),
    package.InsertHeadTransformPass: lambda d: package.InsertHeadTransformPass(
        d, [invertible(4, 4)] * len(d.layers)
    ),
    package.InsertKeyTransformPass: lambda d: package.InsertKeyTransformPass(
        d, [invertible(4, 4)] * len(d.layers)
    ),
    package.InsertDownTransformPass: lambda d: package.InsertDownTransformPass(
        d, [(invertible(3, 3), invertible(4, 4))] * len(d.layers)
    ),
    package.InsertInputTransformPass: lambda d: package.InsertInputTransformPass(
        d, *[[(invertible(2, 2), invertible(4, 4))] * len(d.layers)] * 2
    ),
    package.InsertHeadsHadamardPass: lambda d: package.InsertHeadsHadamardPass(d, plan(4)),
    package.InsertR3Pass: lambda d: package.InsertR3Pass(d, plan(4)),
    package.InsertR4Pass: package.InsertR4Pass,
    package.SplitOutliersPass: lambda d: package.SplitOutliersPass(
        d, lambda: {linear.x.name or "": np.array([1, 3]) for linear in d.linears}
    ),
    package.QuantizeWeightsPass: lambda d: package.QuantizeWeightsPass(d, bits=4, clip_search=True),
    package.QuantizeActivationsPass: lambda d: package.QuantizeActivationsPass(
        d, Roundings(d, Recipe(), None).of_activations, weight_bits=4
    ),
    package.QuantizeKvCachePass: lambda d: package.QuantizeKvCachePass(
        d, Roundings(d, Recipe(), None).of_cache, bits=4, form="packed"
    ),
}
"""How to make each pass for a `small_decoder`."""

BEFORE: dict[type[Pass], type[Pass]] = {
    package.FuseR1Pass: package.FuseNormScalePass,
    package.FuseNormOutputScalePass: package.FuseNormScalePass,
    package.QuantizeActivationsPass: package.QuantizeWeightsPass,
}
"""What must have been applied before."""

SHAPE: dict[type[Pass], dict[str, bool]] = {package.FuseLayerNormMeanPass: {"layer_norms": True}}
"""What the decoder must have."""


def _prepared(kind: type[Pass]) -> Decoder:
    decoder = located(num_layers=2, **SHAPE.get(kind, {}))
    if kind in BEFORE:
        BUILD[BEFORE[kind]](decoder)()
    return decoder


each_pass = pytest.mark.parametrize("kind", BUILD, ids=lambda kind: kind.__name__)


CALIBRATED = {package.CalibrateWeightsPass, package.SearchClipsPass}
"""They run the layers on tokens, which a `small_decoder` has no mask for; tested on their own."""


def test_every_pass_is_under_contract() -> None:
    assert set(Pass.__subclasses__()) == set(BUILD) | CALIBRATED


@each_pass
def test_leaves_valid_onnx(kind) -> None:
    decoder = _prepared(kind)
    BUILD[kind](decoder)()
    onnx.checker.check_model(ir.to_proto(decoder.model), full_check=True)
    names = [node.name for node in decoder.model.graph]
    assert len(set(names)) == len(names)
    values = [v.name for node in decoder.model.graph for v in node.outputs]
    assert len(set(values)) == len(values)


@each_pass
def test_types_and_shapes_of_what_it_adds_are_declared(kind) -> None:
    decoder = _prepared(kind)
    BUILD[kind](decoder)()
    undeclared = [
        v.name
        for node in decoder.model.graph
        if node.domain == "quarot"
        for v in node.outputs
        if v.type is None or v.shape is None
    ]
    assert undeclared == []


@each_pass
def test_reports_its_name_its_effect_and_its_sites(kind) -> None:
    decoder = _prepared(kind)
    report = BUILD[kind](decoder)()
    assert f"{report.name}Pass" == kind.__name__
    assert report.effect is kind.effect
    assert report.sites > 0
    assert report.skipped == {}
    assert decoder.model.metadata_props[APPLIED].split()[-1] == report.name


@each_pass
def test_refuses_to_be_applied_twice(kind) -> None:
    decoder = _prepared(kind)
    BUILD[kind](decoder)()
    name = kind.__name__.removesuffix("Pass")
    with refused(decoder, f"{name}: already applied to this model; apply it once"):
        BUILD[kind](decoder)()


@each_pass
def test_keeps_its_word_about_its_effect(kind) -> None:
    if kind.effect is Effect.EQUIVALENT:

        def apply(decoder: Decoder) -> None:
            if kind in BEFORE:
                BUILD[BEFORE[kind]](decoder)()
            BUILD[kind](decoder)()

        assert_equivalent(apply, num_layers=2, **SHAPE.get(kind, {}))
    else:
        wanted = logits(float64.run, located(num_layers=2).model)
        decoder = _prepared(kind)
        BUILD[kind](decoder)()
        got = logits(running.run, decoder.model)
        assert np.abs(got - wanted).max() > 1e-4 * np.abs(wanted).max()
        assert np.corrcoef(got.ravel(), wanted.ravel())[0, 1] > 0.8


@each_pass
def test_its_docstring_states_the_algebra(kind) -> None:
    module = __import__(kind.__module__, fromlist=["_"])
    assert "before:" in module.__doc__
    assert "after:" in module.__doc__ or "packed:" in module.__doc__


def test_all_equivalent_passes_together_are_equivalent() -> None:
    def apply(decoder: Decoder) -> None:
        for step in pipeline(load_recipe("rotate-only"), decoder):
            assert step().effect is Effect.EQUIVALENT

    assert_equivalent(apply, num_layers=2, tied=True)
    assert_equivalent(apply, num_layers=2, num_heads=6, intermediate_size=13, hidden_size=10)


@pytest.mark.parametrize(
    "shape",
    [
        {"layer_norms": True},
        {"layer_norms": True, "parallel": True},
        {"layer_norms": True, "positions": True, "tied": True},
        {"post_norms": True},
        {"post_norms": True, "hidden_size": 12, "tied": True},
        {"post_norms": True, "hidden_size": 10},
        {"parallel": True, "positions": True},
    ],
    ids=" ".join,
)
def test_all_equivalent_passes_hold_for_every_shape_of_decoder(shape) -> None:
    def apply(decoder: Decoder) -> None:
        for step in pipeline(load_recipe("rotate-only"), decoder):
            step()

    assert_equivalent(apply, num_layers=2, **shape)


@pytest.mark.parametrize("name", preset_names())
def test_the_passes_of_a_recipe_are_the_ones_it_names_in_the_order_of_the_paper(name) -> None:
    recipe = load_recipe(name)
    asked = {
        "FuseLayerNormMean": False,
        "FuseNormScale": recipe.rotations.fold_norm_scale,
        "SmoothDownInput": recipe.smoothing.down_proj,
        "FuseR1": recipe.rotations.r1 != "none",
        "FuseR2": recipe.rotations.r2,
        "InsertHeadsHadamard": recipe.rotations.heads,
        "InsertR3": recipe.rotations.r3,
        "InsertR4": recipe.rotations.r4,
        "SplitOutliers": recipe.outliers.are_split,
        "QuantizeWeights": recipe.weights.bits < 16 and not recipe.weights.is_calibrated,
        "CalibrateWeights": recipe.weights.bits < 16 and recipe.weights.is_calibrated,
        "QuantizeActivations": recipe.activations.bits < 16,
        "QuantizeKvCache": recipe.kv_cache.bits < 16,
        "SearchClips": "perplexity" in (recipe.activations.clip, recipe.kv_cache.clip),
    }
    calibration = Calibration.of(np.zeros((1, 2), np.int64), "zeros")
    names = [step.name for step in pipeline(recipe, located(), calibration)]
    assert names == [name for name, is_asked in asked.items() if is_asked]


def test_layers_are_rotated_alike() -> None:
    decoder = located(num_layers=2)
    for step in pipeline(load_recipe("w4a4kv4"), decoder):
        step()
    kinds = [
        [node.op_type for node in decoder.model.graph if f"/layers.{i}/" in (node.name or "")]
        for i in range(2)
    ]
    assert sorted(kinds[0]) == sorted(kinds[1])
