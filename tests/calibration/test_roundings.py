# SPDX-License-Identifier: Apache-2.0
"""Modes and clips are those of the least error, or those that the shape of the rows asks for."""

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from quarot_onnx.calibration import Calibration
from quarot_onnx.calibration.roundings import Shape, best_clip, decide, relative_error
from quarot_onnx.errors import UsageError
from quarot_onnx.export.checkpoint import Checkpoint
from quarot_onnx.passes import Report
from quarot_onnx.pipeline import rewrite
from quarot_onnx.recipe import Activations, KvCache, load_recipe
from quarot_onnx.rounding import Rounding
from tests.conftest import HuggingFace

Array = NDArray[Any]

CALIBRATION = Calibration.of(np.random.default_rng(0).integers(0, 128, (4, 12)), "random tokens")

_RNG = np.random.default_rng(0)
ROWS = {
    "gaussian": _RNG.normal(size=(300, 64)),
    "positive": np.abs(_RNG.normal(size=(300, 64))),
    "shifted": _RNG.normal(size=(300, 64)) + 1.5,
    "skewed": _RNG.exponential(size=(300, 64)) - 1,
    "one-sided outlier": np.concatenate(
        [_RNG.normal(size=(300, 63)), np.full((300, 1), 20.0)], axis=1
    ),
}
ROWS = {name: rows.astype(np.float32) for name, rows in ROWS.items()}


def _rounding(bits: int = 4, symmetric: bool = True, group_size: int = 64) -> Rounding:
    return Rounding(bits, symmetric, 0.9, group_size)


# --- The measure ----------------------------------------------------------------------------------


def test_every_row_counts_the_same_however_large_it_is() -> None:
    rows = ROWS["gaussian"].copy()
    before = relative_error(rows, _rounding())
    rows[::2] *= 1000
    assert relative_error(rows, _rounding()) == pytest.approx(before, rel=1e-4)


def test_rows_of_zeros_do_not_count() -> None:
    rows = np.concatenate([ROWS["gaussian"], np.zeros((5000, 64), np.float32)])
    expected = relative_error(ROWS["gaussian"], _rounding())
    assert relative_error(rows, _rounding()) == pytest.approx(expected)
    assert relative_error(rows[300:], _rounding()) == 0


def test_shapes_are_those_of_the_distributions() -> None:
    gaussian, positive = Shape.of(ROWS["gaussian"]), Shape.of(ROWS["positive"])
    # Of 64 numbers of a Gaussian: E|skewness| = sqrt(2/π * 6/64), E|mean/σ| = sqrt(2/π / 64).
    assert gaussian.skewness == pytest.approx(0.24, abs=0.04)
    assert gaussian.off_centre == pytest.approx(0.1, abs=0.02)
    assert positive.off_centre == pytest.approx(1.32, abs=0.1)  # sqrt(2/π) / sqrt(1 - 2/π)
    assert Shape.of(ROWS["skewed"]).skewness > 1.3
    assert Shape.of(np.ones((3, 8), np.float32)) == Shape(0.0, 0.0)


# --- Clips ----------------------------------------------------------------------------------------


@given(
    rows=st.sampled_from(list(ROWS)),
    bits=st.integers(3, 8),
    symmetric=st.booleans(),
    group_size=st.sampled_from([16, 64]),
)
@settings(max_examples=12, deadline=None)
def test_no_clip_of_the_whole_grid_is_better_than_the_one_found(
    rows, bits, symmetric, group_size
) -> None:
    found, error = best_clip(ROWS[rows], _rounding(bits, symmetric, group_size))
    assert error == relative_error(ROWS[rows], found)
    grid = [replace(found, clip_ratio=clip / 100) for clip in range(22, 101, 2)]
    assert error <= 1.001 * min(relative_error(ROWS[rows], each) for each in grid)


def test_fewer_bits_want_a_smaller_clip() -> None:
    clips = [best_clip(ROWS["gaussian"], _rounding(bits))[0].clip_ratio for bits in (3, 4, 6, 8)]
    assert clips == sorted(clips)
    assert clips[0] < 0.75
    assert clips[-1] > 0.95


# --- Modes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "mode"),
    [
        ("gaussian", "symmetric"),
        ("positive", "asymmetric"),
        ("shifted", "asymmetric"),
        ("skewed", "asymmetric"),
        ("one-sided outlier", "asymmetric"),
    ],
)
def test_skewed_and_off_centre_rows_get_a_zero_point(rows, mode) -> None:
    decision = decide(ROWS[rows], _rounding(), Activations(mode="skew"))
    assert decision.rounding.mode == mode
    assert decision.rounding.clip_ratio == 0.9
    assert decision.measured["skewness"] == Shape.of(ROWS[rows]).skewness


def test_each_threshold_of_the_recipe_decides() -> None:
    shape = Shape.of(ROWS["skewed"])
    for skewness, off_centre, mode in (
        (shape.skewness - 0.01, 9.0, "asymmetric"),
        (shape.skewness + 0.01, 9.0, "symmetric"),
        (9.0, shape.off_centre - 0.01, "asymmetric"),
        (9.0, shape.off_centre + 0.01, "symmetric"),
    ):
        section = KvCache(mode="skew", skewness=skewness, off_centre=off_centre)
        assert decide(ROWS["skewed"], _rounding(), section).rounding.mode == mode


@pytest.mark.parametrize("clip", ["fixed", "error"])
@pytest.mark.parametrize("rows", ROWS)
def test_the_mode_of_the_least_error_is_chosen(rows, clip) -> None:
    decision = decide(ROWS[rows], _rounding(), Activations(mode="error", clip=clip))
    errors = {}
    for symmetric in (True, False):
        each = _rounding(symmetric=symmetric)
        each = each if clip == "fixed" else best_clip(ROWS[rows], each)[0]
        errors[each.mode] = relative_error(ROWS[rows], each)
    assert decision.rounding.mode == min(errors, key=lambda mode: errors[mode])
    for mode, error in errors.items():
        assert decision.measured[f"{mode}_snr_db"] == pytest.approx(-10 * np.log10(error))


# --- On a model -----------------------------------------------------------------------------------


def _reports(hugging_face: HuggingFace, recipe: str, *overrides: str) -> dict[str, Report]:
    rewritten = rewrite(
        Checkpoint(hugging_face("llama")), load_recipe(recipe, overrides), "float32", CALIBRATION
    )
    nodes = {node.name: node for node in rewritten.model.graph}
    reports = {report.name: report for report in rewritten.reports}
    for record in reports["QuantizeActivations"].records:  # what is reported is what is there
        kind = "QuantizeInt4" if record["symmetric"] else "QuantizeGroups"
        node = nodes[f"{record['site']}/{kind}"]
        assert node.attributes["clip_ratio"].as_float() == np.float32(record["clip_ratio"])
        assert node.attributes["bits"].as_int() == record["bits"]
    return reports


def test_decisions_are_reported_and_are_in_the_graph(
    traced_once: None, hugging_face: HuggingFace
) -> None:
    reports = _reports(hugging_face, "w4a4kv4-error")
    activations, cache = reports["QuantizeActivations"], reports["QuantizeKvCache"]
    kinds = [record["kind"] for record in activations.records]
    assert kinds[:4] == ["qkv", "o_proj", "gate_up", "down_proj"]
    assert {record["kind"] for record in cache.records} == {"keys", "values"}
    layers = {record["site"].split("/")[2] for record in cache.records}
    assert len(activations.records) == 4 * len(layers)
    assert len(cache.records) == 2 * len(layers)
    for record in (*activations.records, *cache.records):
        best = max(record["symmetric_snr_db"], record["asymmetric_snr_db"])
        mode = "symmetric" if record["symmetric"] else "asymmetric"
        assert record[f"{mode}_snr_db"] == best
        assert 5 < best < 40


def test_a_fixed_section_beside_a_calibrated_one_is_left_alone(
    traced_once: None, hugging_face: HuggingFace
) -> None:
    reports = _reports(hugging_face, "w4a4kv4", "kv_cache.clip=error", "seed=1")
    assert {r["clip_ratio"] for r in reports["QuantizeActivations"].records} == {0.9}
    assert all("snr_db" not in key for r in reports["QuantizeActivations"].records for key in r)
    assert all("asymmetric_snr_db" in r for r in reports["QuantizeKvCache"].records)


def test_a_recipe_that_measures_asks_for_a_text(
    traced_once: None, hugging_face: HuggingFace
) -> None:
    for name in ("w4a4kv4-skew", "w4a4kv4-error", "w4a4kv4-gbs", "w3a3kv3-gbs"):
        with pytest.raises(UsageError, match=f"recipe {name}: has a method that looks at text"):
            rewrite(Checkpoint(hugging_face("llama")), load_recipe(name), "float32")


def test_only_chosen_modes_and_clips_need_a_text() -> None:
    modes, clips = ("symmetric", "asymmetric", "skew", "error"), ("fixed", "error", "perplexity")
    for mode, clip in itertools.product(modes, clips):
        section = Activations(mode=mode, clip=clip)
        assert section.is_calibrated == (mode in ("skew", "error") or clip != "fixed")
