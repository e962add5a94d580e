# SPDX-License-Identifier: Apache-2.0
import json
import shutil
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from polygraphy.comparator import Comparator, SimpleCompareFunc
from polygraphy.logger import G_LOGGER
from safetensors.torch import load_file, save_file

from quarot_onnx import artifacts
from quarot_onnx.errors import GateError, InputError, UsageError
from quarot_onnx.pipeline import export
from quarot_onnx.recipe import load_recipe
from quarot_onnx.reference import HuggingFaceModel
from quarot_onnx.validate import IDS, Stage, Verdict, validate
from quarot_onnx.validate.agreement import TorchRunner
from quarot_onnx.validate.closeness import Closeness
from tests import models
from tests.conftest import Exported, HuggingFace

EXAMPLE = Path(__file__).parents[1] / "examples" / "tiny_llama" / "model"


DEPLOYED = {"trt", "triton"}
"""Stages of what is built from an artifact, skipped where nothing was."""


class Planted:
    """A copy of an artifact with a fault in it that the manifest's hashes do not show."""

    def __init__(self, artifact: Path) -> None:
        self.artifact = artifact
        self.graph = onnx.load(artifact / artifacts.MODEL, load_external_data=False)

    def node(self, name: str) -> onnx.NodeProto:
        return next(node for node in self.graph.graph.node if node.name == name)

    def initializer(self, name: str) -> onnx.TensorProto:
        return next(tensor for tensor in self.graph.graph.initializer if tensor.name == name)

    def insert_before(self, name: str, *nodes: onnx.NodeProto) -> None:
        held = list(self.graph.graph.node)
        position = next(i for i, node in enumerate(held) if node.name == name)
        del self.graph.graph.node[:]
        self.graph.graph.node.extend([*held[:position], *nodes, *held[position:]])

    def edit_data(self, name: str, edit: Callable[[np.ndarray], None]) -> None:
        """Change the float32 numbers of `name` where they are stored."""
        tensor = self.initializer(name)
        assert tensor.data_type == onnx.TensorProto.FLOAT
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            values = numpy_helper.to_array(tensor).copy()
            edit(values)
            tensor.CopyFrom(numpy_helper.from_array(values, name))
            return
        where = {entry.key: entry.value for entry in tensor.external_data}
        path = self.artifact / artifacts.DATA
        with path.open("r+b") as file:
            file.seek(int(where["offset"]))
            values = np.frombuffer(file.read(int(where["length"])), np.float32).copy()
            edit(values)
            file.seek(int(where["offset"]))
            file.write(values.tobytes())

    def swap_data(self, first: str, second: str) -> None:
        a, b = self.initializer(first), self.initializer(second)
        kept = onnx.TensorProto()
        kept.CopyFrom(a)
        a.CopyFrom(b)
        b.CopyFrom(kept)
        a.name, b.name = first, second

    def save(self) -> Path:
        onnx.save(self.graph, self.artifact / artifacts.MODEL)
        path = self.artifact / artifacts.MANIFEST
        manifest = json.loads(path.read_text(encoding="utf-8"))
        manifest["files"] = {
            name: artifacts.sha256(self.artifact / name) for name in manifest["files"]
        }
        path.write_text(json.dumps(manifest), encoding="utf-8")
        return self.artifact


Plant = Callable[..., Planted]


@pytest.fixture
def plant(exported: Exported, tmp_path: Path) -> Plant:
    def copied(family: str = "llama", recipe: str = "w4a4kv4") -> Planted:
        return Planted(Path(shutil.copytree(exported(family, recipe), tmp_path / "artifact")))

    return copied


def failed(verdict: Verdict) -> set[str]:
    return {stage.id for stage in verdict.stages if stage.status == "failed"}


def stage(verdict: Verdict, name: str) -> Stage:
    return next(stage for stage in verdict.stages if stage.id == name)


# --- Sound artifacts ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "recipe", "overrides", "dtype"),
    [
        ("llama", "w4a4kv4", (), "float32"),
        ("llama", "rotate-only", (), "float32"),
        ("llama", "rotate-only", (), "float16"),
        ("llama", "w8a8kv8", (), "float32"),
        ("llama", "w8a8kv8", ("weights.down_proj_bits=4",), "float32"),
        ("llama", "w4a4kv4", ("kv_cache.io=float",), "float32"),
        ("llama-tied", "w4a4kv4", ("rotations.r1=random_orthogonal",), "float32"),
        ("mistral-sliding", "w6a6kv6", (), "float32"),
        ("qwen2-biases", "w4a4kv4", (), "float16"),
        ("qwen2-biases", "float", (), "float32"),
        ("qwen3-head-dim", "w4a16", (), "float32"),
        ("qwen3-head-dim", "w4a4kv4-unrotated", ("rotations.fold_norm_scale=false",), "float32"),
    ],
)
def test_a_sound_artifact_passes_every_stage(
    exported: Exported,
    hugging_face: HuggingFace,
    family: str,
    recipe: str,
    overrides: tuple[str, ...],
    dtype: str,
) -> None:
    seen: list[Stage] = []
    artifact = exported(family, recipe, overrides, dtype)
    verdict = validate(artifact, hugging_face(family), threads=1, progress=seen.append)
    assert verdict.passed, verdict.failures
    assert tuple(stage.id for stage in verdict.stages) == IDS
    assert verdict.stages == tuple(seen)
    skipped = {stage.id for stage in verdict.stages if stage.status == "skipped"}
    is_lossy = load_recipe(recipe).is_lossy
    assert skipped == DEPLOYED | ({"equivalence"} if is_lossy else set())
    verdict.require_passed()


@pytest.mark.parametrize("recipe", ["w4a4kv4", "rotate-only"])
@pytest.mark.parametrize("family", ["phi3", "gemma2", "opt", "gpt-neox"])
def test_a_sound_artifact_of_another_family_is_compared_with_a_new_export(
    exported: Exported, hugging_face: HuggingFace, family: str, recipe: str
) -> None:
    verdict = validate(exported(family, recipe), hugging_face(family), threads=1)
    assert verdict.passed, verdict.failures
    skipped = {stage.id for stage in verdict.stages if stage.status == "skipped"}
    others = {"equivalence", "logits", "outputs"} if recipe == "w4a4kv4" else {"logits"}
    assert skipped == DEPLOYED | others
    assert stage(verdict, "weights").value == 0
    assert "of Hugging Face's" in stage(verdict, "layers").detail


def test_finds_a_swapped_layer_of_another_family(plant: Plant, hugging_face: HuggingFace) -> None:
    planted = plant("gpt-neox")
    names = [f"gpt_neox.layers.{i}.mlp.dense_h_to_4h.weight" for i in (0, 2)]
    planted.swap_data(*names)
    verdict = validate(planted.save(), hugging_face("gpt-neox"), threads=1)
    assert {"weights", "layers"} <= failed(verdict)
    assert "layers.0, tensor" in stage(verdict, "layers").detail


def test_the_trained_example_passes(traced_once: None, tmp_path: Path) -> None:
    if not EXAMPLE.is_dir():
        pytest.skip("examples/tiny_llama/model is not there")
    export(EXAMPLE, tmp_path / "out", load_recipe("w4a4kv4"))
    verdict = validate(tmp_path / "out", EXAMPLE, threads=1)
    assert verdict.passed, verdict.failures
    quality = stage(verdict, "quality").value
    assert quality is not None
    assert 0.01 < quality < 0.4


def test_without_a_reference_the_stages_that_need_it_are_skipped_visibly(
    exported: Exported,
) -> None:
    verdict = validate(exported("llama", "rotate-only"), threads=1)
    assert verdict.passed
    assert verdict.as_json()["skipped"] == [
        "weights",
        "equivalence",
        "quality",
        "trt",
        "triton",
    ]
    assert stage(verdict, "weights").detail == "no reference was given"


def test_a_required_stage_may_not_be_skipped(exported: Exported) -> None:
    verdict = validate(exported("llama", "rotate-only"), threads=1, require=("equivalence",))
    assert not verdict.passed
    assert verdict.as_json()["failed"] == ["equivalence"]
    with pytest.raises(GateError, match=r"equivalence skipped: no reference was given; the artif"):
        verdict.require_passed()


def test_refuses_to_require_a_stage_that_does_not_exist(exported: Exported) -> None:
    with pytest.raises(UsageError, match="--require logit: no such stage; stages are integrity, "):
        validate(exported("llama", "rotate-only"), require=("logit",))


def test_an_artifact_that_the_runtime_cannot_run_is_skipped_and_not_passed_silently(
    exported: Exported, hugging_face: HuggingFace
) -> None:
    artifact = exported("llama", "w4a4kv4", (), "bfloat16")
    verdict = validate(artifact, hugging_face("llama"), threads=1, require=("load",))
    assert [stage.id for stage in verdict.failures] == ["load"]
    assert "--dtype float32" in stage(verdict, "load").detail
    assert stage(verdict, "structure").status == "passed"
    assert stage(verdict, "weights").status == "passed"
    assert stage(verdict, "layers").detail == "the graph was not loaded"


def test_a_tighter_tolerance_can_be_asked_for(
    exported: Exported, hugging_face: HuggingFace
) -> None:
    artifact = exported("llama", "rotate-only")
    verdict = validate(artifact, hugging_face("llama"), threads=1, tolerance=1e-9)
    assert "equivalence" in failed(verdict)


# --- Planted faults -------------------------------------------------------------------------------


def test_finds_a_file_that_changed(plant: Plant) -> None:
    planted = plant()
    (planted.artifact / "config.json").write_text("{}")
    verdict = validate(planted.artifact, threads=1)
    assert "integrity" in failed(verdict)
    assert "config.json is missing or differs" in stage(verdict, "integrity").detail
    assert "config.json: hidden_size = None; export" in stage(verdict, "structure").detail


@pytest.mark.parametrize("recipe", ["w4a4kv4", "rotate-only"])
def test_finds_a_head_that_is_five_percent_too_large(
    plant: Plant, hugging_face: HuggingFace, recipe: str
) -> None:
    planted = plant(recipe=recipe)
    planted.edit_data("lm_head.weight", lambda values: np.multiply(values, 1.05, out=values))
    verdict = validate(planted.save(), hugging_face("llama"), threads=1)
    expected = {"weights"} if recipe == "w4a4kv4" else {"weights", "equivalence"}
    assert failed(verdict) == expected
    assert "lm_head.weight" in stage(verdict, "weights").detail


def test_finds_a_head_that_the_graph_scales(plant: Plant) -> None:
    planted = plant()
    output = next(n for n in planted.graph.graph.node if "logits" in n.output)
    output.output[list(output.output).index("logits")] = "unscaled"
    planted.graph.graph.initializer.append(numpy_helper.from_array(np.float32(1.05), "factor"))
    planted.graph.graph.node.append(helper.make_node("Mul", ["unscaled", "factor"], ["logits"]))
    verdict = validate(planted.save(), threads=1)
    assert failed(verdict) == {"layers", "logits"}
    assert "the head is off by 0.05" in stage(verdict, "layers").detail


@pytest.mark.parametrize("missing", ["logits", "present.2.value_zero"])
def test_finds_a_missing_output(plant: Plant, missing: str) -> None:
    planted = plant()
    kept = [output for output in planted.graph.graph.output if output.name != missing]
    del planted.graph.graph.output[:]
    planted.graph.graph.output.extend(kept)
    verdict = validate(planted.save(), threads=1)
    assert failed(verdict) == {"structure", "load"}
    assert f"output {missing} is missing" in stage(verdict, "structure").detail


def test_finds_an_output_that_nobody_expects(plant: Plant) -> None:
    planted = plant()
    extra = helper.make_tensor_value_info("/model/Cos_output_0", onnx.TensorProto.FLOAT, None)
    planted.graph.graph.output.append(extra)
    verdict = validate(planted.save(), threads=1)
    assert failed(verdict) == {"structure"}
    assert "output /model/Cos_output_0 is not expected" in stage(verdict, "structure").detail


def _opset(planted: Planted) -> None:
    planted.graph.opset_import[0].version = 22


def _ir_version(planted: Planted) -> None:
    planted.graph.ir_version = 11


def _function(planted: Planted) -> None:
    kept = [f for f in planted.graph.functions if f.name != "KvAppend"]
    del planted.graph.functions[:]
    planted.graph.functions.extend(kept)


def _local_path(planted: Planted) -> None:
    planted.graph.graph.node[3].doc_string = "/home/someone/model.txt, line 3"


def _shape(planted: Planted) -> None:
    planted.graph.graph.output[0].type.tensor_type.shape.dim[2].dim_value = 129


def _element(planted: Planted) -> None:
    planted.graph.graph.input[3].type.tensor_type.elem_type = onnx.TensorProto.INT8


def _location(planted: Planted) -> None:
    planted.initializer("lm_head.weight").external_data[0].value = "../model.onnx_data"


def _extent(planted: Planted) -> None:
    entries = planted.initializer("lm_head.weight").external_data
    next(e for e in entries if e.key == "offset").value = "99999968"


def _length(planted: Planted) -> None:
    planted.initializer("lm_head.weight").dims[0] = 95


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (_opset, "opset 22, expected 23"),
        (_ir_version, "IR version 11, expected 10"),
        (_function, "quarot.KvAppend has no function body"),
        (_local_path, "names a local path (/home/someone/)"),
        (_shape, "output logits has shape [None, None, 129], expected [None, None, 128]"),
        (_element, "input past_key_values.0.key is INT8, expected UINT8"),
        (
            _location,
            "lm_head.weight: its data is in '../model.onnx_data', expected model.onnx_data",
        ),
        (_extent, "lm_head.weight: ends at byte 100049120 of model.onnx_data, which has"),
        (_length, "lm_head.weight: 49152 bytes for shape [95, 128], expected 48640"),
    ],
)
def test_finds_a_structural_fault(
    plant: Plant, edit: Callable[[Planted], None], message: str
) -> None:
    planted = plant()
    edit(planted)
    verdict = validate(planted.save(), threads=1)
    assert "structure" in failed(verdict)
    assert message in stage(verdict, "structure").detail


def test_finds_a_graph_that_is_no_graph(plant: Plant, hugging_face: HuggingFace) -> None:
    planted = plant()
    planted.save()
    (planted.artifact / artifacts.MODEL).write_bytes(b"\xff\xfe<html>")
    verdict = validate(planted.artifact, hugging_face("llama"), threads=1)
    assert {"integrity", "structure", "load", "finite"} <= failed(verdict)
    assert stage(verdict, "structure").detail.endswith("export again")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("model.embed_tokens.weight", np.nan, "embed_tokens.weight has 1 values that are not fini"),
        ("model.layers.1.mlp.up_proj.weight_scale", np.inf, "up_proj.weight_scale has 1 values"),
        ("model.layers.1.mlp.up_proj.weight_scale", -0.01, "weight_scale has scales that are not"),
    ],
)
def test_finds_a_weight_that_is_not_finite_and_calls_it_a_failed_gate(
    plant: Plant, hugging_face: HuggingFace, name: str, value: float, message: str
) -> None:
    planted = plant()
    planted.edit_data(name, lambda values: values.__setitem__(5, value))
    verdict = validate(planted.save(), hugging_face("llama"), threads=1)
    assert failed(verdict) == {"finite"}
    assert message in stage(verdict, "finite").detail
    assert stage(verdict, "layers").status == "skipped"
    with pytest.raises(GateError) as error:
        verdict.require_passed()
    assert error.value.exit_code == 10
    assert "\n" not in str(error.value)
    json.dumps(verdict.as_json(), allow_nan=False)


def test_finds_a_mask_that_is_not_causal(plant: Plant, hugging_face: HuggingFace) -> None:
    planted = plant()
    compare = planted.node("/model/LessOrEqual")
    compare.input[1] = compare.input[0]
    verdict = validate(planted.save(), hugging_face("llama"), threads=1)
    assert "causality" in failed(verdict)
    assert "layers" in failed(verdict)
    value = stage(verdict, "causality").value
    assert value is not None
    assert value > 0.9


def test_finds_a_mask_that_ignores_padding(plant: Plant) -> None:
    planted = plant()
    cast = planted.node("/model/Cast")
    assert cast.input[0] == "attention_mask"
    blind = helper.make_node("Equal", ["attention_mask"] * 2, [cast.output[0]], "/model/Equal")
    planted.graph.graph.node.remove(cast)
    planted.graph.graph.node.insert(0, blind)
    assert failed(validate(planted.save(), threads=1)) == {"padding"}


def test_finds_positions_that_ignore_the_past(plant: Plant) -> None:
    planted = plant()
    unsqueeze = planted.node("/model/rotary_emb/Unsqueeze")
    unsqueeze.input[0] = "restarted"
    planted.graph.graph.initializer.append(numpy_helper.from_array(np.array([1]), "axis_1"))
    planted.insert_before(
        unsqueeze.name,
        helper.make_node("ReduceMin", ["position_ids", "axis_1"], ["first"], keepdims=1),
        helper.make_node("Sub", ["position_ids", "first"], ["restarted"]),
    )
    verdict = validate(planted.save(), threads=1)
    assert "cache" in failed(verdict)
    assert not {"layers", "logits"} & failed(verdict)


@pytest.mark.parametrize("recipe", ["w4a4kv4", "rotate-only"])
def test_finds_a_frozen_hadamard(plant: Plant, hugging_face: HuggingFace, recipe: str) -> None:
    planted = plant(recipe=recipe)
    rotation = planted.node("/model/layers.1/mlp/down_proj/R4")
    constant = np.random.default_rng(0).normal(size=(1, 1, 176)).astype(np.float32)
    name = rotation.output[0]
    planted.graph.graph.node.remove(rotation)
    planted.graph.graph.initializer.append(numpy_helper.from_array(constant, name))
    verdict = validate(planted.save(), hugging_face("llama"), threads=1)
    assert failed(verdict) == {"layers", "logits", "equivalence", "outputs"} - (
        {"equivalence"} if recipe == "w4a4kv4" else set()
    )
    assert "layer 1" in stage(verdict, "layers").detail


def test_finds_logits_that_do_not_depend_on_the_input(plant: Plant) -> None:
    planted = plant()
    gather = next(n for n in planted.graph.graph.node if n.op_type == "Gather")
    planted.graph.graph.initializer.append(numpy_helper.from_array(np.int64(0), "zero"))
    gather.input[1] = "frozen_ids"
    planted.insert_before(
        gather.name, helper.make_node("Mul", ["input_ids", "zero"], ["frozen_ids"])
    )
    verdict = validate(planted.save(), threads=1)
    assert "sensitivity" in failed(verdict)
    assert "changing token 0 does not change the logits" in stage(verdict, "sensitivity").detail


def test_finds_a_hadamard_matrix_that_is_another(plant: Plant) -> None:
    planted = plant()
    planted.edit_data("quarot.hadamard.44x4.A", lambda values: values.reshape(-1).sort())
    assert {"layers"} <= failed(validate(planted.save(), threads=1))


@pytest.mark.parametrize("kind", ["", "_scale"])
def test_finds_swapped_layers(plant: Plant, hugging_face: HuggingFace, kind: str) -> None:
    planted = plant()
    planted.swap_data(
        f"model.layers.0.self_attn.o_proj.weight{kind}",
        f"model.layers.2.self_attn.o_proj.weight{kind}",
    )
    verdict = validate(planted.save(), hugging_face("llama"), threads=1)
    assert failed(verdict) == {"weights"}
    assert "self_attn.o_proj.weight" in stage(verdict, "weights").detail


def test_finds_layers_that_are_swapped_in_the_graph(plant: Plant) -> None:
    planted = plant()
    a, b = (planted.node(f"/model/layers.{i}/mlp/up_proj/Int4Gemm") for i in (0, 1))
    for position in (2, 3):
        a.input[position], b.input[position] = b.input[position], a.input[position]
    assert {"layers", "logits"} <= failed(validate(planted.save(), threads=1))


def test_finds_weights_of_another_seed(
    exported: Exported, hugging_face: HuggingFace, tmp_path: Path
) -> None:
    planted = Planted(Path(shutil.copytree(exported("llama", "w4a4kv4"), tmp_path / "a")))
    path = planted.artifact / artifacts.MANIFEST
    manifest = json.loads(path.read_text())
    manifest["recipe"]["seed"] = 1
    path.write_text(json.dumps(manifest))
    assert failed(validate(planted.save(), hugging_face("llama"), threads=1)) == {"weights"}


@pytest.mark.parametrize(
    ("node", "attribute", "value"),
    [
        ("/model/layers.0/self_attn/KvAppend_key", "clip_ratio", 1.0),
        ("/model/layers.2/self_attn/KvAppend_value", "clip_ratio", 0.9),
        ("/model/layers.1/mlp/down_proj/QuantizeInt4", "clip_ratio", 0.95),
        ("/model/layers.0/self_attn/KvAttention", "scale", 0.21),
    ],
)
def test_finds_an_attribute_that_is_slightly_off(
    plant: Plant, node: str, attribute: str, value: float
) -> None:
    planted = plant()
    found = next(a for a in planted.node(node).attribute if a.name == attribute)
    assert found.f != pytest.approx(value)
    found.f = value
    assert "layers" in failed(validate(planted.save(), threads=1))


GENERAL = (
    "activations.mode=asymmetric",
    "activations.group_size=24",
    "kv_cache.mode=symmetric",
    "kv_cache.bits=3",
)


WEIGHT_GROUPS = ("weights.symmetric=false", "weights.group_size=24")


@pytest.mark.parametrize(
    ("recipe", "overrides"),
    [
        ("w4a4kv4", GENERAL),
        ("w4a4kv4", (*GENERAL, *WEIGHT_GROUPS)),
        ("w4a4kv4", ("weights.group_size=32",)),
        ("w8a8kv8", WEIGHT_GROUPS),
        ("w4a16", WEIGHT_GROUPS),
    ],
)
def test_passes_a_model_with_zero_points_and_groups(
    exported: Exported, hugging_face: HuggingFace, recipe: str, overrides: tuple[str, ...]
) -> None:
    artifact = exported("qwen2-biases", recipe, overrides)
    assert not failed(validate(artifact, hugging_face("qwen2-biases"), threads=1))


@pytest.mark.parametrize("kind", ["scale", "zero"])
def test_finds_swapped_scales_and_zero_points_of_groups(
    exported: Exported, hugging_face: HuggingFace, tmp_path: Path, kind: str
) -> None:
    source = exported("qwen2-biases", "w4a4kv4", (*GENERAL, *WEIGHT_GROUPS))
    planted = Planted(Path(shutil.copytree(source, tmp_path / "artifact")))
    names = [f"model.layers.{i}.mlp.up_proj.weight_{kind}" for i in (0, 2)]
    planted.swap_data(*names)
    assert "weights" in failed(validate(planted.save(), hugging_face("qwen2-biases"), threads=1))


@pytest.mark.parametrize(
    ("node", "attribute", "value"),
    [
        ("/model/layers.1/mlp/down_proj/QuantizeGroups", "symmetric", 1),
        ("/model/layers.0/self_attn/q_proj/QuantizeGroups", "clip_ratio", 0.95),
        ("/model/layers.0/self_attn/KvAppend_key", "symmetric", 0),
        ("/model/layers.1/self_attn/KvAppend_value", "bits", 4),
    ],
)
def test_finds_a_rounding_that_is_not_the_reported_one(
    exported: Exported, tmp_path: Path, node: str, attribute: str, value: float
) -> None:
    source = exported("qwen2-biases", "w4a4kv4", GENERAL)
    planted = Planted(Path(shutil.copytree(source, tmp_path / "artifact")))
    found = next(a for a in planted.node(node).attribute if a.name == attribute)
    setattr(found, "f" if isinstance(value, float) else "i", value)
    assert "layers" in failed(validate(planted.save(), threads=1))


def test_finds_an_artifact_of_another_model(exported: Exported, tmp_path: Path) -> None:
    other = models.save(models.build("llama", seed=1), tmp_path / "other")
    assert failed(validate(exported("llama", "w4a4kv4"), other, threads=1)) == {"weights"}


# --- The reference and the files around -----------------------------------------------------------


def test_a_reference_that_is_not_finite_is_bad_input_and_no_verdict(
    exported: Exported, hugging_face: HuggingFace, tmp_path: Path
) -> None:
    reference = Path(shutil.copytree(hugging_face("llama"), tmp_path / "model"))
    tensors = load_file(reference / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, reference / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"model\.norm\.weight has values that are not finite"):
        validate(exported("llama", "w4a4kv4"), reference, threads=1)


def test_a_reference_that_is_not_there_is_bad_input(exported: Exported, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such directory; give a Hugging Face model directory"):
        validate(exported("llama", "w4a4kv4"), tmp_path / "nothing", threads=1)


def test_a_directory_that_is_no_artifact_is_bad_input(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no manifest\.json; give a directory that"):
        validate(tmp_path)


def test_a_manifest_without_a_recipe_is_bad_input(plant: Plant) -> None:
    planted = plant()
    path = planted.artifact / artifacts.MANIFEST
    path.write_text(json.dumps({**json.loads(path.read_text()), "recipe": {"bits": 4}}))
    with pytest.raises(
        InputError, match=r"manifest\.json: recipe or dtype is damaged; export again"
    ):
        validate(planted.artifact)


def test_a_configuration_that_is_missing_is_a_finding(plant: Plant) -> None:
    planted = plant()
    (planted.artifact / "config.json").unlink()
    verdict = validate(planted.artifact, threads=1)
    assert {"integrity", "structure", "layers"} <= failed(verdict)


# --- Metrics --------------------------------------------------------------------------------------


def test_closeness_sees_a_scale_that_cosine_similarity_does_not() -> None:
    logits = np.random.default_rng(0).normal(size=(3, 7, 11)).astype(np.float32)
    found = Closeness.of(logits * np.float32(1.05), logits)
    assert found.max_ratio == pytest.approx(0.05, rel=1e-3)
    assert found.relative_l2 == pytest.approx(0.05, rel=1e-3)
    assert found.norm_ratio == pytest.approx(1.05, rel=1e-6)
    assert found.kl > 0
    assert found.top1 == 1


def test_closeness_of_the_same_logits_is_zero() -> None:
    logits = np.random.default_rng(0).normal(size=(3, 7, 11)).astype(np.float32)
    assert Closeness.of(logits, logits) == Closeness(0, 0, 1, 0, 1)


def test_the_torch_runner_serves_polygraphys_own_comparisons(hugging_face: HuggingFace) -> None:
    model = HuggingFaceModel(hugging_face("llama"), threads=1)
    ids = np.arange(6, dtype=np.int64)[None]
    feed = OrderedDict(input_ids=ids, attention_mask=np.ones_like(ids))
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL):
        results = Comparator.run(
            [TorchRunner(model, "a"), TorchRunner(model, "b")], data_loader=[feed]
        )
        assert bool(Comparator.compare_accuracy(results, compare_func=SimpleCompareFunc()))


def test_a_verdict_that_is_not_a_number_is_null_in_json() -> None:
    odd = Stage("logits", "failed", "relative L2", float("nan"), 0.1, detail="broken")
    verdict = Verdict(Path("out"), (odd, replace(odd, id="cache", value=float("inf"))))
    content = json.loads(json.dumps(verdict.as_json(), allow_nan=False))
    assert [s["value"] for s in content["stages"]] == [None, None]
    with pytest.raises(GateError, match=r"^out: logits failed \(and cache\): broken; the artifact"):
        verdict.require_passed()
