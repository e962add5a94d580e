# SPDX-License-Identifier: Apache-2.0
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from quarot_onnx.artifacts import load_manifest
from quarot_onnx.certificates import Certificate
from quarot_onnx.certificates.interpreter import Section
from quarot_onnx.errors import GateError
from quarot_onnx.export.checkpoint import Checkpoint
from quarot_onnx.passes.base import Pass
from quarot_onnx.passes.fuse_r1 import FuseR1Pass
from quarot_onnx.passes.insert_r4 import InsertR4Pass
from quarot_onnx.pipeline import export, rewrite
from quarot_onnx.recipe import load_recipe
from tests import models
from tests.conftest import Exported, HuggingFace
from tests.running import Decoding

SITES = ("embedding", "layers.0", "layers.1", "layers.2", "head")


@pytest.mark.parametrize("family", models.FAMILIES)
def test_every_rotation_of_every_family_is_certified_at_every_site(
    traced_once: None, hugging_face: HuggingFace, family: str
) -> None:
    checkpoint = Checkpoint(hugging_face(family))
    found = rewrite(checkpoint, load_recipe("w4a4kv4"), "float32", certify=True)
    equivalent = [r.name for r in found.reports[1:] if r.effect.value == "equivalent"]
    assert list(found.certificates) == equivalent
    for exact, rounded in found.certificates.values():
        assert (exact.dtype, rounded.dtype) == ("float64", "float32")
        assert tuple(exact.deviations) == tuple(rounded.deviations) == SITES
        assert exact.worst[1] < 1e-14
        assert 1e-8 < rounded.worst[1] < 5e-6
        assert exact.bound < 1e-8 * rounded.bound


def _plant(monkeypatch: pytest.MonkeyPatch, of: type[Pass], fault: Callable[[Pass], None]) -> None:
    """Every pass of class `of` does `fault` after its own work."""
    honest = of.rewrite

    def rewrite_wrongly(self: Pass) -> object:
        report = honest(self)
        fault(self)
        return report

    monkeypatch.setattr(of, "rewrite", rewrite_wrongly)


def _scale_by_a_billionth_more(done: Pass) -> None:
    done.decoder.layers[1].mlp.down.weight.compose(0, lambda w: w * (1 + 1e-9))


def _forget_a_reader(done: Pass) -> None:
    key = done.decoder.layers[2].attention.k.weight
    key.compose(0, done.rotation.rotate_inputs)


@pytest.mark.parametrize(
    ("where", "fault", "message"),
    [
        (
            InsertR4Pass,
            _scale_by_a_billionth_more,
            r"^InsertR4: layers\.1 deviates .* by \d\.\de-10 in",
        ),
        (FuseR1Pass, _forget_a_reader, r"^FuseR1: layers\.2 deviates from the float model by "),
    ],
)
def test_a_pass_that_changes_the_function_is_named_with_its_site_and_nothing_is_written(
    monkeypatch, traced_once, hugging_face: HuggingFace, tmp_path: Path, where, fault, message
) -> None:
    _plant(monkeypatch, where, fault)
    with pytest.raises(GateError, match=message):
        export(hugging_face("llama"), tmp_path / "out", load_recipe("rotate-only"))
    assert list(tmp_path.iterdir()) == []


def test_the_manifest_states_the_certificates_unless_they_are_declined(
    traced_once: None, hugging_face: HuggingFace, exported: Exported, tmp_path: Path
) -> None:
    export(hugging_face("llama"), tmp_path / "out", load_recipe("rotate-only"))
    by_pass = {e["name"]: e["certificates"] for e in load_manifest(tmp_path / "out")["passes"]}
    exact, _ = by_pass["FuseR1"]
    assert exact["worst"] == exact["deviations"][exact["worst_site"]] < exact["bound"] < 1e-12
    declined = load_manifest(exported("llama", "rotate-only"))["passes"]
    assert not any(entry["certificates"] for entry in declined)


def test_a_deviation_that_is_not_a_number_does_not_hold() -> None:
    assert Certificate("float64", 1.0, {"head": 0.5}).holds
    assert not Certificate("float64", 1.0, {"layers.0": float("nan"), "head": 0.5}).holds


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt-neox"])
def test_the_interpreter_computes_what_onnx_runtime_computes(
    traced_once: None, hugging_face: HuggingFace, exported: Exported, family: str
) -> None:
    found = rewrite(Checkpoint(hugging_face(family)), load_recipe("rotate-only"), "float32")
    graph, decoder = found.model.graph, found.decoder
    ids = np.random.default_rng(1).integers(0, 128, (2, 9))
    feeds = {
        value.name: np.zeros((2, int(value.shape[1]), 0, int(value.shape[3])))
        for value in graph.inputs
        if value.name.startswith("past_key_values.")
    }
    feeds |= {
        "input_ids": ids,
        "attention_mask": np.ones_like(ids),
        "position_ids": np.broadcast_to(np.arange(9), ids.shape),
    }
    logits = next(value for value in graph.outputs if value.name == "logits")
    section = Section.cut(graph, [], [logits])
    (exact,) = section.run(feeds, np.float64, lambda weight: weight.float64())
    (single,) = section.run(feeds, np.float32, lambda weight: weight.float64())
    assert exact.dtype == np.float64
    assert single.dtype == np.float32
    wanted = Decoding(exported(family, "rotate-only") / "model.onnx", batch=2)(ids)
    largest = np.abs(wanted).max()
    assert np.abs(exact - wanted).max() < 1e-5 * largest
    assert 0 < np.abs(exact - single).max() < 1e-5 * largest
    assert len(decoder.states) == len(decoder.layers) + 1
