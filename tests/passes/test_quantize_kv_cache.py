# SPDX-License-Identifier: Apache-2.0
"""The quantized cache: packed with scales and zeros as I/O, or on the same grid in float."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quarot_onnx import ops
from quarot_onnx.decoder import Decoder
from quarot_onnx.passes.quantize_kv_cache import QuantizeKvCachePass
from quarot_onnx.recipe import KvCache
from quarot_onnx.rounding import Choice, cache_sites
from tests import float64, running
from tests.small_decoder import assert_golden, feeds, located, logits, refused, text


def _quantize(
    decoder: Decoder, bits: int = 4, form: str = "packed", **options: Any
) -> QuantizeKvCachePass:
    recipe = KvCache(bits=bits, io=form, **options)
    return QuantizeKvCachePass(
        decoder, lambda: Choice(tuple(cache_sites(decoder, recipe))), bits=bits, form=form
    )


FORMS = {
    "asymmetric": {},
    "symmetric": {"mode": "symmetric"},
    "groups": {"group_size": 2},
    "symmetric groups": {"mode": "symmetric", "group_size": 2},
}


@pytest.mark.parametrize("form", ["packed", "float"])
def test_golden(form) -> None:
    decoder = located()
    before = text(decoder.model)
    report = _quantize(decoder, form=form)()
    assert_golden(f"quantize_kv_cache_{form}", before, text(decoder.model))
    assert report.sites == 2
    assert report.detail == (
        f"4 bits, per token and head, 2 of 2 sites asymmetric, clip 0.95, {form} cache"
    )


def test_golden_in_groups() -> None:
    decoder = located()
    before = text(decoder.model)
    report = _quantize(decoder, bits=3, mode="symmetric", group_size=2)()
    assert_golden("quantize_kv_cache_groups", before, text(decoder.model))
    assert report.records[0] == {
        "site": "/layers.0/cached_key",
        "readers": ["/layers.0/cached_key"],
        "kind": "keys",
        "bits": 3,
        "symmetric": True,
        "clip_ratio": 0.95,
        "group_size": 2,
    }


@pytest.mark.parametrize("bits", [3, 4, 6, 8])
@given(
    kind=st.sampled_from(list(FORMS)),
    heads=st.sampled_from([(4, 2), (6, 1), (2, 2)]),
    head_dim=st.sampled_from([2, 4, 24]),
    dtype=st.sampled_from(["float", "float16"]),
    num_layers=st.sampled_from([1, 2]),
)
@settings(max_examples=10, deadline=None)
def test_the_packed_cache_computes_what_the_float_cache_does(
    bits, kind, heads, head_dim, dtype, num_layers
) -> None:
    options = {"head_dim": head_dim, "dtype": dtype, "num_layers": num_layers}
    options |= {"num_heads": heads[0], "num_kv_heads": heads[1]}
    packed, plain = located(**options), located(**options)
    _quantize(packed, bits, **FORMS[kind])()
    _quantize(plain, bits, "float", **FORMS[kind])()
    a, b = (logits(running.run, d.model).astype(np.float64) for d in (packed, plain))
    # A second layer's code may fall on the other side of a rounding boundary. In float32, products
    # with bytes up to 255 cancel to values of a few steps, which costs 5 bits.
    bound = 0.1 if num_layers == 2 else 64 * (1e-3 if dtype == "float16" else 32 * 1e-7)
    assert np.abs(a - b).max() <= bound * np.abs(b).max()


def test_the_packed_cache_holds_the_codes_of_the_float_keys() -> None:
    plain, packed = located(), located()
    _quantize(packed)()
    past = {"length": 3, "past": 0}
    keys = running.run(plain.model, feeds(plain.model, **past))["present.0.key"]
    outputs = running.run(packed.model, feeds(packed.model, **past))
    codes, scale, zero = ops.quantize_kv(keys)
    np.testing.assert_array_equal(outputs["present.0.key"], ops.pack_kv(codes))
    np.testing.assert_array_equal(outputs["present.0.key_scale"], scale)
    np.testing.assert_array_equal(outputs["present.0.key_zero"], zero)


@pytest.mark.parametrize("kind", FORMS)
@pytest.mark.parametrize("form", ["packed", "float"])
def test_more_bits_are_closer_to_the_float_model(form, kind) -> None:
    wanted = logits(float64.run, located().model)
    errors = []
    for bits in (3, 5, 8):
        decoder = located()
        _quantize(decoder, bits, form, clip_ratio=1.0, **FORMS[kind])()
        errors.append(np.abs(logits(running.run, decoder.model) - wanted).mean())
    assert errors[0] > errors[1] > errors[2] > 0


def test_scales_and_zeros_follow_their_codes_in_the_interface() -> None:
    decoder = located()
    _quantize(decoder)()
    for values, prefix in (
        (decoder.model.graph.inputs, "past_key_values"),
        (decoder.model.graph.outputs, "present"),
    ):
        names = [v.name for v in values if v.name.startswith(prefix)]
        assert names == [
            f"{prefix}.0.{kind}{part}"
            for kind in ("key", "value")
            for part in ("", "_scale", "_zero")
        ]
    shapes = {v.name: [str(n) for n in v.shape] for v in decoder.model.graph.inputs}
    assert shapes["past_key_values.0.key"] == ["B", "2", "P", "2"]
    assert shapes["past_key_values.0.key_scale"] == ["B", "2", "P", "1"]


def test_refuses_an_odd_head_dim() -> None:
    decoder = located()
    object.__setattr__(decoder.layers[0].attention, "head_dim", 5)
    with refused(
        decoder,
        "/layers.0/Attention: head_dim = 5 is odd, two codes do not fill bytes; "
        "set kv_cache.io=float",
    ):
        _quantize(decoder)()


def _capped() -> Decoder:
    edit = ("Attention <scale = 0.5>", "Attention <scale = 0.5, softcap = 0.7>")
    return located(replace=edit)


def test_a_softcap_stays_on_the_scores() -> None:
    wanted = logits(float64.run, _capped().model)
    plain = logits(float64.run, located().model)
    decoder = _capped()
    _quantize(decoder, 8, clip_ratio=1.0)()
    (attention,) = (node for node in decoder.model.graph if "KvAttention" in node.op_type)
    assert attention.op_type == "KvAttentionSoftcapInt8"
    assert attention.attributes["softcap"].as_float() == np.float32(0.7)
    got = logits(running.run, decoder.model)
    assert np.abs(got - wanted).max() < np.abs(plain - wanted).max() / 5


def test_a_softcap_over_a_float_cache_stays_in_the_attention() -> None:
    decoder = _capped()
    assert _quantize(decoder, form="float")().sites == 2
    assert "softcap" in decoder.layers[0].attention.node.attributes


def test_a_softcap_over_groups_stays_in_the_attention() -> None:
    wanted = logits(float64.run, _capped().model)
    decoder = _capped()
    _quantize(decoder, 8, group_size=2, clip_ratio=1.0)()
    assert "softcap" in decoder.layers[0].attention.node.attributes
    got = logits(running.run, decoder.model)
    assert np.abs(got - wanted).max() < 0.02 * np.abs(wanted).max()


def test_a_cache_of_3_bits_is_stored_as_that_of_4() -> None:
    shapes = []
    for bits in (3, 4):
        decoder = located()
        _quantize(decoder, bits)()
        shapes.append([(v.name, v.dtype, str(v.shape)) for v in decoder.model.graph.inputs])
    assert shapes[0] == shapes[1]


def test_a_group_has_a_scale_of_its_own_in_the_interface() -> None:
    decoder = located()
    _quantize(decoder, group_size=2)()
    shapes = {v.name: [str(n) for n in v.shape] for v in decoder.model.graph.outputs}
    assert shapes["present.0.key"] == ["B", "2", "T", "2"]
    assert shapes["present.0.value_zero"] == ["B", "2", "T", "2"]


def test_refuses_groups_that_do_not_divide_a_head() -> None:
    decoder = located()
    with refused(
        decoder,
        "/layers.0/Attention: head_dim = 4 is no multiple of kv_cache.group_size = 3; "
        "choose a divisor of 4",
    ):
        _quantize(decoder, group_size=3)()
