# SPDX-License-Identifier: Apache-2.0
"""Quantized activations: one rounding per token, integer products, shared by readers."""

from typing import Any

import numpy as np
import pytest

from quarot_onnx import ops
from quarot_onnx.decoder import Decoder
from quarot_onnx.ops import groups
from quarot_onnx.passes.quantize_activations import QuantizeActivationsPass
from quarot_onnx.passes.quantize_weights import QuantizeWeightsPass
from quarot_onnx.recipe import Activations
from quarot_onnx.rounding import Choice, activation_sites
from tests import float64, running
from tests.small_decoder import assert_golden, located, logits, refused, text


def _quantize(
    decoder: Decoder,
    bits: int = 4,
    weight_bits: int = 4,
    weight_zeros: bool = False,
    **options: Any,
) -> QuantizeActivationsPass:
    recipe = Activations(**{"bits": bits, "clip_ratio": 0.9} | options)
    return QuantizeActivationsPass(
        decoder,
        lambda: Choice(tuple(activation_sites(decoder, recipe))),
        weight_bits=weight_bits,
        weight_zeros=weight_zeros,
    )


def _quantized(
    bits: int, weight_bits: int, dtype: str = "float", weights: Any = None, **options: Any
) -> Decoder:
    decoder = located(dtype=dtype)
    weights = {"symmetric": True, **(weights or {})}
    QuantizeWeightsPass(decoder, bits=weight_bits, clip_search=True, **weights)()
    _quantize(decoder, bits, weight_bits, not weights["symmetric"], **options)()
    return decoder


def test_golden() -> None:
    decoder = located()
    QuantizeWeightsPass(decoder, bits=4, clip_search=True)()
    before = text(decoder.model)
    report = _quantize(decoder)()
    assert_golden("quantize_activations", before, text(decoder.model))
    assert report.sites == 7
    assert report.detail == "4 bits, per token, 0 of 4 sites asymmetric, clip 0.9"


def test_golden_in_asymmetric_groups() -> None:
    decoder = located()
    QuantizeWeightsPass(decoder, bits=4, clip_search=True)()
    before = text(decoder.model)
    options = {"mode": "asymmetric", "group_size": 4, "down_proj_bits": 8}
    report = _quantize(decoder, **options)()
    assert_golden("quantize_activations_groups", before, text(decoder.model))
    assert (
        report.detail
        == "4 and 8 bits, per token, groups of 4, 4 of 4 sites asymmetric, clip 0.9 to 1"
    )
    assert report.records[3] == {
        "site": "/layers.0/down_proj",
        "readers": ["/layers.0/down_proj"],
        "kind": "down_proj",
        "bits": 8,
        "symmetric": False,
        "clip_ratio": 1.0,
        "group_size": 4,
    }


FORMS = {
    "symmetric": {},
    "asymmetric": {"mode": "asymmetric"},
    "groups": {"group_size": 4},
    "asymmetric groups": {"mode": "asymmetric", "group_size": 4},
    "down_proj at 8 bits": {"down_proj_bits": 8},
    "weight groups": {"weights": {"group_size": 4}},
    "weight zeros": {"weights": {"symmetric": False}},
    "weight zeros in groups": {"weights": {"symmetric": False, "group_size": 2}},
    "all groups": {
        "mode": "asymmetric",
        "group_size": 4,
        "weights": {"symmetric": False, "group_size": 2},
    },
}


CASES = [
    *((4, 4, form, dtype) for form in FORMS for dtype in ("float", "float16")),
    *((*bits, "symmetric", "float") for bits in ((3, 3), (6, 6), (8, 8), (4, 8), (8, 4))),
    *((*bits, "asymmetric groups", "float") for bits in ((3, 3), (8, 8))),
    *((8, 8, form, "float") for form in ("weight groups", "all groups")),
]


@pytest.mark.parametrize(("bits", "weight_bits", "form", "dtype"), CASES)
def test_the_function_is_that_of_rounded_activations(bits, weight_bits, form, dtype) -> None:
    decoder = _quantized(bits, weight_bits, dtype, **FORMS[form])
    actual = logits(running.run, decoder.model).astype(np.float64)

    wanted = logits(_reference_run, decoder.model)
    # One code may fall on the other side of a rounding boundary: a step of it, not more.
    assert np.abs(actual - wanted).max() <= 0.05 * np.abs(wanted).max()
    if dtype == "float":
        assert np.median(np.abs(actual - wanted)) <= 1e-5 * np.abs(wanted).max()


def _reference_run(model, feeds):
    """NumPy in the model's dtype, with the references of the operators."""
    values = {}
    for value in model.graph.inputs:
        values[value] = feeds[value.name]
    for value in model.graph.initializers.values():
        values[value] = value.const_value.numpy()
    for node in model.graph:
        attributes = {name: attribute.value for name, attribute in node.attributes.items()}
        inputs = [values[v] for v in node.inputs]
        if node.op_type == "QuantizeInt4":
            results = ops.quantize_int4(
                inputs[0], bits=attributes["bits"], clip_ratio=attributes["clip_ratio"]
            )
        elif node.op_type == "QuantizeGroups":
            results = groups.quantize_groups(inputs[0], **_options(attributes))
        elif node.op_type in ("Int4Gemm", "Int8Gemm"):
            results = (ops.int4_gemm(*inputs),)
        elif node.op_type.endswith("Asymmetric"):
            results = (groups.gemm_asymmetric(*inputs),)
        elif node.op_type.endswith(("Groups", "WeightZeros")):
            results = (groups.gemm_groups(*inputs, group_size=attributes["group_size"]),)
        else:
            results = (float64._OPERATORS[node.op_type](attributes, *inputs),)
        values.update(zip(node.outputs, results, strict=True))
    return {value.name: values[value] for value in model.graph.outputs}


def _options(attributes: dict[str, Any]) -> dict[str, Any]:
    names = ("bits", "clip_ratio", "group_size", "symmetric")
    return {name: attributes[name] for name in names}


@pytest.mark.parametrize("form", list(FORMS)[:4])
def test_more_bits_are_closer_to_the_float_model(form) -> None:
    wanted = logits(float64.run, located().model)
    errors = []
    for bits in (3, 5, 8):
        decoder = _quantized(bits, 8, clip_ratio=1.0, **FORMS[form])
        errors.append(np.abs(logits(running.run, decoder.model) - wanted).mean())
    assert errors[0] > errors[1] > errors[2] > 0


def test_linears_that_read_the_same_activation_share_one_rounding() -> None:
    decoder = _quantized(4, 4)
    attention, mlp = decoder.layers[0].attention, decoder.layers[0].mlp
    assert attention.q.x is attention.k.x is attention.v.x
    assert mlp.readers[0].x is mlp.readers[1].x
    assert sum(node.op_type == "QuantizeInt4" for node in decoder.model.graph) == 4


@pytest.mark.parametrize(
    ("bits", "weight_bits", "gemm"), [(4, 4, "Int4Gemm"), (6, 4, "Int4Gemm"), (4, 8, "Int8Gemm")]
)
def test_codes_that_could_saturate_take_the_exact_product(bits, weight_bits, gemm) -> None:
    decoder = _quantized(bits, weight_bits)
    assert {linear.node.op_type for linear in decoder.linears} == {gemm}


def test_weights_in_groups_take_the_common_quantizer_s_codes_with_a_zero_point() -> None:
    decoder = _quantized(4, 4, weights={"group_size": 4})
    assert {linear.node.op_type for linear in decoder.linears} == {"Int4GemmGroups"}
    assert {linear.node.attributes["group_size"].as_int() for linear in decoder.linears} == {4}
    quantizers = {linear.node.inputs[0].producer() for linear in decoder.linears}
    assert {node.op_type for node in quantizers} == {"QuantizeGroups"}
    assert all(node.attributes["symmetric"].as_int() for node in quantizers)
    assert all(len(linear.node.inputs) == 5 for linear in decoder.linears)  # without zero points


def test_groups_of_both_sides_are_summed_in_their_common_parts() -> None:
    decoder = located(hidden_size=96, intermediate_size=192)
    QuantizeWeightsPass(decoder, bits=4, clip_search=True, group_size=48)()
    _quantize(decoder, group_size=32)()
    assert {linear.node.attributes["group_size"].as_int() for linear in decoder.linears} == {16}


def test_refuses_groups_with_hardly_a_common_part() -> None:
    decoder = located(hidden_size=48, intermediate_size=96)
    QuantizeWeightsPass(decoder, bits=4, clip_search=True, group_size=24)()
    with refused(
        decoder,
        "/layers.0/q_proj/WeightOnlyGemmGroups: in_features = 48 has groups of 16 in the "
        "activation and of 24 in the weight, which only parts of 8 divide; set "
        "weights.group_size = 16 or activations.group_size = 0",
    ):
        _quantize(decoder, group_size=16)()


def test_refuses_float_weights() -> None:
    decoder = located()
    with refused(
        decoder,
        "/layers.0/q_proj/MatMul: its weight is float; integer products need weights.bits below 16",
    ):
        _quantize(decoder)()


def test_down_proj_alone_has_its_own_bits() -> None:
    decoder = _quantized(4, 4, down_proj_bits=8)
    kinds = {linear.name: linear.node.op_type for linear in decoder.linears}
    assert kinds.pop("/layers.0/down_proj/Int8Gemm") == "Int8Gemm"
    assert set(kinds.values()) == {"Int4Gemm"}
    (node,) = {linear.node.inputs[0].producer() for linear in decoder.linears[-1:]}
    assert node.attributes["bits"].as_int() == 8
    assert node.attributes["clip_ratio"].as_float() == 1


def test_a_row_that_the_groups_do_not_divide_has_as_many_as_the_residual_stream() -> None:
    decoder = located(hidden_size=8, intermediate_size=22)
    sites = {s.kind: s for s in activation_sites(decoder, Activations(group_size=4))}
    assert (sites["qkv"].rounding.group_size, sites["down_proj"].rounding.group_size) == (4, 11)


def test_refuses_groups_that_divide_nothing() -> None:
    decoder = located(hidden_size=8, intermediate_size=13)
    QuantizeWeightsPass(decoder, bits=4, clip_search=True)()
    with refused(
        decoder,
        "/layers.0/down_proj/WeightOnlyGemm: in_features = 13 is no multiple of "
        "activations.group_size = 4, nor of the residual stream's number of groups; "
        "choose a divisor of it",
    ):
        _quantize(decoder, group_size=4)()
