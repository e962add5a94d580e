# SPDX-License-Identifier: Apache-2.0
"""The lowered graph computes what the artifact's graph computes, plugins by their references."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx.reference import ReferenceEvaluator

from quarot_onnx import artifacts
from quarot_onnx.errors import UnsupportedModelError, UsageError
from quarot_onnx.export.tensorrt.kernel_shapes import takes_hadamard
from quarot_onnx.export.tensorrt.lint import problems
from quarot_onnx.export.tensorrt.lowering import Target, lower, target_version
from quarot_onnx.export.tensorrt.skeleton import Skeleton
from quarot_onnx.export.tensorrt.standard_forms import (
    replace_rms_normalizations,
    replace_rotary_embeddings,
)
from quarot_onnx.pipeline import export
from quarot_onnx.recipe import load_recipe
from tests import models
from tests.conftest import Exported
from tests.tensorrt.executor import Engine, Source

Lowered = Callable[..., Path]


def _save(artifact: Path, directory: Path, target: Target) -> Path:
    directory.mkdir()
    artifacts.save_model(lower(artifact, target), directory)
    model = directory / artifacts.MODEL
    onnx.checker.check_model(str(model))
    graph = onnx.load(model, load_external_data=False)
    assert problems(graph, target.version) == []
    return model


@pytest.fixture(scope="module")
def kernel_sized(traced_once: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact whose sizes the kernels take without padding: 44 is no power of two."""
    base = tmp_path_factory.mktemp("kernel_sized")
    model = models.build("llama", hidden_size=256, intermediate_size=1408, head_dim=64)
    source = models.save(model, base / "model")
    export(source, base / "artifact", load_recipe("w4a4kv4"), dtype="float16")
    return base / "artifact"


def _compare(artifact: Path, lowered: Path, steps: tuple[int, ...]) -> list[float]:
    """Relative distance of the logits, step by step."""
    source, engine = Source(artifact / artifacts.MODEL, 2), Engine(lowered, 2, 20)
    random = np.random.default_rng(0)
    found = []
    for length in steps:
        ids = random.integers(0, 128, (2, length))
        expected, logits = source.step(ids), engine.step(ids)
        found.append(float(np.linalg.norm(logits - expected) / np.linalg.norm(expected)))
    return found


# --- The same function ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "dtype", "target"),
    [
        ("llama", "float16", Target()),
        ("llama", "bfloat16", Target(activation_layout="split")),
        ("llama", "float16", Target((10, 7))),
        ("mistral-sliding", "float16", Target()),
        ("qwen2-biases", "float16", Target((10, 15))),
        ("phi3", "float16", Target((10, 14))),
        ("gpt-neox", "float16", Target((10, 7))),
        ("gemma3", "float16", Target()),
    ],
)
def test_a_lowered_graph_computes_what_the_artifact_computes(
    exported: Exported, tmp_path: Path, family: str, dtype: str, target: Target
) -> None:
    artifact = exported(family, "w4a4kv4", (), dtype)
    lowered = _save(artifact, tmp_path / "lowered", target)
    errors = _compare(artifact, lowered, (9, 1, 2, 1))
    # The same codes and sums; attention sums in another order, so that a tie may round otherwise.
    # Norms in elementary operators round otherwise too: see the test of them alone.
    assert max(errors) < 0.25, errors
    if target.version >= (10, 15):
        assert min(errors) < 1e-3, errors


def test_sizes_of_the_kernels_need_no_fallback(kernel_sized: Path, tmp_path: Path) -> None:
    lowered = _save(kernel_sized, tmp_path / "lowered", Target())
    # R3 as one matrix of 64 in place of 8 x 8 rounds otherwise; another rotation would give 1.
    assert max(_compare(kernel_sized, lowered, (9, 1, 1))) < 0.2
    nodes = onnx.load(lowered, load_external_data=False).graph.node
    counts = {op: sum(n.op_type == op for n in nodes) for op in {n.op_type for n in nodes}}
    layers = 3
    assert counts["MatMul"] == 1  # the head; no Hadamard by products
    assert "Pad" not in counts
    assert "Hadamard" not in counts  # R3 in the cache plugins, R4 in the quantizer
    assert "HadamardHeads" not in counts
    assert counts["QuantizeInt4"] == counts["Int4Gemm"] == 4 * layers
    assert counts["Split"] == 2 * layers
    assert counts["KvAppend"] == 2 * layers
    assert counts["KvAttention"] == layers
    assert counts["Transpose"] == 3 * layers  # of q, k and v; the output is token-major
    down = next(n for n in nodes if n.name == "/model/layers.0/mlp/down_proj/QuantizeInt4")
    assert [i for i in down.input if "signs" in i] == ["quarot.hadamard.44x32.signs"]


def test_rows_of_different_lengths_do_not_see_each_other(
    exported: Exported, tmp_path: Path
) -> None:
    artifact = exported("mistral-sliding", "w4a4kv4", (), "float16")
    lowered = _save(artifact, tmp_path / "lowered", Target())
    random = np.random.default_rng(1)
    ids = random.integers(0, 128, (2, 9))
    both, alone = Engine(lowered, 2, 20), Engine(lowered, 1, 20)
    logits = both.step(ids, real=np.array([9, 4], np.int32))
    expected = alone.step(ids[1:, :4])
    np.testing.assert_allclose(logits[1, :4], expected[0], rtol=0, atol=1e-3)
    following = random.integers(0, 128, (2, 1))
    np.testing.assert_allclose(
        both.step(following)[1], alone.step(following[1:])[0], rtol=0, atol=1e-3
    )


def test_weights_are_read_once_and_only_when_written(exported: Exported) -> None:
    model = lower(exported("llama", "w4a4kv4", (), "float16"), Target())
    weight = model.graph.initializers["model.layers.0.self_attn.q_k_v_proj.weight"].const_value
    assert weight is not None
    assert type(weight).__name__ == "LazyTensor"
    assert list(weight.shape.numpy()) == [3, 2, 4, 32, 16]  # 96 + 48 + 48 rows, 96 padded to 128


def test_the_graphs_cache_is_of_fixed_capacity_and_int8(exported: Exported) -> None:
    model = lower(exported("llama", "w4a4kv4", (), "float16"), Target())
    inputs = {value.name: value for value in model.graph.inputs}
    assert set(list(inputs)[:2]) | {"lengths"} == {"input_ids", "position_ids", "lengths"}
    key = inputs["past_key_values.2.key"]
    assert str(key.dtype) == "INT8"
    assert [str(size) for size in key.shape or ()] == ["batch_size", "2", "capacity", "32"]
    outputs = {value.name: value for value in model.graph.outputs}
    assert str(outputs["present.2.key"].shape) == str(key.shape)
    assert not model.functions


def test_norms_and_rotations_for_old_parsers_are_those_of_the_standard(tmp_path: Path) -> None:
    (tmp_path / artifacts.MODEL).write_bytes(
        onnx.parser.parse_model(
            """<ir_version: 10, opset_import: ["" : 23]>
            standard (float16[B, 2, S, 24] x, float16[24] scale,
                      float16[B, S, 8] c, float16[B, S, 8] s)
              => (float16[B, 2, S, 24] y)
            {
              normed = RMSNormalization <axis = -1, epsilon = 1e-5> (x, scale)
              y = RotaryEmbedding <rotary_embedding_dim = 16> (normed, c, s)
            }"""
        ).SerializeToString()
    )
    skeleton = Skeleton(tmp_path, onnx.TensorProto.FLOAT16)
    for node in skeleton.nodes("RMSNormalization"):
        node.outputs[0].shape, node.outputs[0].dtype = node.inputs[0].shape, np.dtype(np.float16)
    replace_rms_normalizations(skeleton)
    replace_rotary_embeddings(skeleton)
    lowered = ir.to_proto(skeleton.finish(20))
    assert not {"RMSNormalization", "RotaryEmbedding"} & {n.op_type for n in lowered.graph.node}
    random = np.random.default_rng(0)
    shapes = {"x": (3, 2, 5, 24), "scale": (24,), "c": (3, 5, 8), "s": (3, 5, 8)}
    feed = {name: random.normal(size=shape).astype(np.float16) for name, shape in shapes.items()}
    (expected,) = ReferenceEvaluator(skeleton.proto).run(None, feed)
    (found,) = ReferenceEvaluator(lowered).run(None, feed)
    np.testing.assert_allclose(found, expected, rtol=0, atol=4 * 2.0**-10 * np.abs(expected).max())


# --- Refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "recipe", "overrides", "dtype", "message"),
    [
        ("llama", "w4a4kv4", (), "float32", r"its float parts are float32; .* --dtype float16"),
        ("llama", "w8a8kv8", (), "float16", r"bits = 8, the plugins take 4; .* such as w4a4kv4"),
        ("llama", "w6a6kv6", (), "float16", r"bits = 6, the plugins take 4"),
        ("llama", "w4a16", (), "float16", r"WeightOnlyGemm has no TensorRT plugin"),
        ("llama", "w4a4kv4", ("kv_cache.io=float",), "float16", r"KvFakeQuantize has no TensorRT"),
        ("llama", "rotate-only", (), "float16", r"Hadamard|has no"),
        ("gemma2", "w4a4kv4", (), "float16", r"KvAttentionSoftcap has no TensorRT plugin"),
        ("gpt-oss", "w4a4kv4", (), "float16", r"KvAttentionSinks has no TensorRT plugin"),
        (
            "mixtral",
            "w4a4kv4",
            (),
            "float16",
            r"read by Gather, as those of experts .* dense models",
        ),
    ],
)
def test_refuses_what_has_no_plugin_and_says_what_to_do(
    exported: Exported,
    family: str,
    recipe: str,
    overrides: tuple[str, ...],
    dtype: str,
    message: str,
) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        lower(exported(family, recipe, overrides, dtype), Target())


def test_refuses_a_tensorrt_that_is_too_old_or_no_version() -> None:
    with pytest.raises(UsageError, match=r"TensorRT 10\.6: is older than 10\.7"):
        Target(target_version("10.6"))
    with pytest.raises(UsageError, match="TensorRT ten: is no version; give one such as"):
        target_version("ten")
    assert target_version("10.13.2") == (10, 13)


# --- Sizes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "factors", "inner", "takes"),
    [
        (4096, [64, 64], 1, True),
        (14336, [28, 512], 1, True),
        (11008, [172, 64], 1, True),
        (688, [172, 4], 1, False),  # not a multiple of 128
        (18176, [284, 64], 1, False),  # a factor above 192
        (4096, [32], 128, True),
        (96, [4], 24, False),  # a head of 24 features
        (1536, [12, 128], 1, True),
        (4096, [64], 1, True),  # in blocks
    ],
)
def test_knows_which_hadamards_the_kernels_take(
    n: int, factors: list[int], inner: int, takes: bool
) -> None:
    assert takes_hadamard(n, factors, inner) is takes
