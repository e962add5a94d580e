# SPDX-License-Identifier: Apache-2.0
"""Every plugin node of a lowered model, created from the node's own attributes and run.

The graph is what `quarot-onnx build` gives TensorRT. Its other nodes run in onnx's reference
implementation; at a plugin node the plugin and the operator's reference compute from the same
inputs and are compared, and the reference's result goes on, so that nothing accumulates.
"""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quarot_onnx import artifacts, ops
from quarot_onnx.export.tensorrt.lowering import Target, lower
from quarot_onnx.pipeline import export
from quarot_onnx.plugins import layouts
from quarot_onnx.recipe import load_recipe
from tests import models
from tests.plugins.harness import Host
from tests.tensorrt import executor


@pytest.fixture(scope="module")
def artifact(traced_once: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sizes that the kernels take without padding, with a factor of 44, which has signs."""
    base = tmp_path_factory.mktemp("lowered_for_plugins")
    sizes = {"hidden_size": 256, "intermediate_size": 1408, "head_dim": 64}
    model = models.build("llama", num_hidden_layers=1, **sizes)
    source = models.save(model, base / "model")
    export(source, base / "artifact", load_recipe("w4a4kv4"), dtype="float16")
    return base / "artifact"


def compare(name: str, expected: list[np.ndarray], made: list[np.ndarray]) -> None:
    """Codes may differ by one where the fused kernel does not round what the operators round."""
    for wanted, found in zip(expected, made, strict=True):
        assert found.shape == wanted.shape, name
        assert found.dtype == wanted.dtype, name
        if name == "Int4Gemm":
            np.testing.assert_array_equal(found, wanted)
        elif found.dtype == np.int8:
            codes = [ops.unpack_int4(x.view(np.uint8)).astype(np.int16) for x in (wanted, found)]
            difference = np.abs(codes[0] - codes[1])
            assert difference.max() <= 1, name
            assert (difference > 0).mean() < 0.02, name
        else:
            wide = wanted.astype(np.float64), found.astype(np.float64)
            distance = np.linalg.norm(wide[0] - wide[1]) / np.linalg.norm(wide[0])
            assert distance < 2 * np.finfo(np.float16).eps, (name, distance)


def _without_padding(name: str, outputs: list[np.ndarray], layout: str) -> list[np.ndarray]:
    """Rows that pad split order are not written."""
    if name != "QuantizeInt4" or layout == "packed":
        return outputs
    q, scale = outputs
    return [layouts.packed_from_split(q, scale.size, q.shape[0] * 128).view(np.int8), scale]


@pytest.mark.parametrize("layout", ["packed", "split"])
def test_every_plugin_node_computes_what_its_operator_computes(
    host: Host, artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: Any
) -> None:
    ran: Counter[str] = Counter()

    def beside(reference: type[Any]) -> type[Any]:
        name = reference.__name__

        def plugin(self: Any, *inputs: np.ndarray, **attributes: Any) -> Any:
            expected = reference.plugin(self, *inputs, **attributes)
            compare(
                name,
                _without_padding(name, list(expected), layout),
                _without_padding(name, host.run(name, attributes, inputs), layout),
            )
            ran[name] += 1
            return expected

        return type(name, (reference,), {"plugin": plugin})

    monkeypatch.setattr(executor, "PLUGINS", [beside(plugin) for plugin in executor.PLUGINS])
    artifacts.save_model(lower(artifact, Target(activation_layout=layout)), tmp_path)
    engine = executor.Engine(tmp_path / artifacts.MODEL, 2, 20)
    random = np.random.default_rng(0)
    for length in (9, 1):
        engine.step(random.integers(0, 128, (2, length)))
    assert ran == {"QuantizeInt4": 8, "Int4Gemm": 8, "KvAppend": 4, "KvAttention": 2}
