# SPDX-License-Identifier: Apache-2.0
"""Learning changes the matrices and never the function; what it learns is what is exported."""

from pathlib import Path

import numpy as np
import pytest
import torch

from quarot_onnx.calibration import Calibration, Journal
from quarot_onnx.errors import InputError, UnsupportedModelError
from quarot_onnx.inspection import inspect
from quarot_onnx.learning import learn
from quarot_onnx.learning.matrices import LearnedRotation
from quarot_onnx.learning.rounding import round_weight, rounded
from quarot_onnx.learning.student import Student
from quarot_onnx.pipeline import export
from quarot_onnx.quantizers.rtn import rtn
from quarot_onnx.recipe import Recipe, load_recipe
from quarot_onnx.reference import FakeQuantModel, HuggingFaceModel
from quarot_onnx.rounding import Rounding
from quarot_onnx.runtime import OnnxModel
from quarot_onnx.transforms import FILE, balanced_factors
from quarot_onnx.validate.subject import Subject
from quarot_onnx.validate.twin import bisect
from tests.conftest import HuggingFace

ALL = "learning.places=['r1','value','key','heads','down','up','norms','inputs']"
CALIBRATION = Calibration.of(np.random.default_rng(0).integers(0, 128, (6, 24)), "random tokens")
IDS = np.random.default_rng(1).integers(0, 128, (2, 20))


def _recipe(name: str = "w4a4kv4", *settings: str, places: str = ALL, steps: int = 3) -> Recipe:
    return load_recipe(name, [places, f"learning.steps={steps}", *settings])


def _disturbed(model_dir: Path, recipe: Recipe) -> Student:
    """A student whose parameters are all away from where they start."""
    student = Student(HuggingFaceModel(model_dir).model, recipe)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in [*student.rotations, *student.matrices, *student.scales]:
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
    return student


@pytest.mark.parametrize("family", ["llama", "llama-tied", "qwen2-biases", "qwen3-head-dim"])
@pytest.mark.parametrize("places", [ALL, "learning.places=['r1','r2']"])
def test_without_rounding_every_parameter_leaves_the_function_alone(
    hugging_face: HuggingFace, family, places
) -> None:
    model_dir = hugging_face(family)
    ids = torch.from_numpy(IDS)
    with torch.no_grad():
        wanted = HuggingFaceModel(model_dir).model(input_ids=ids, use_cache=False).logits
        found = _disturbed(model_dir, _recipe("rotate-only", places=places))(ids)
    assert float((found - wanted).abs().max() / wanted.abs().max()) < 2e-5


def test_a_learned_rotation_is_a_rotation() -> None:
    start = torch.linalg.qr(torch.randn(12, 12, dtype=torch.float64))[0]
    rotation = LearnedRotation(start)
    assert torch.equal(rotation.matrix(), start)
    with torch.no_grad():
        rotation.free.normal_()
    matrix = rotation.matrix().detach()
    assert float((matrix @ matrix.T - torch.eye(12)).abs().max()) < 1e-13
    assert float((matrix - start).abs().max()) > 0.1


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", [8, 16])
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_rounding_is_that_of_the_operators(bits, symmetric, group_size) -> None:
    x = np.random.default_rng(0).normal(size=(3, 2, 5, 16)).astype(np.float32)
    x[0, 0, 0] = 0
    rounding = Rounding(bits, symmetric, 0.9, group_size)
    found = rounded(torch.from_numpy(x), rounding)
    np.testing.assert_allclose(found.numpy(), rounding.values(x), rtol=1e-6, atol=1e-6)


def test_the_rounding_of_weights_is_round_to_nearest() -> None:
    x = np.random.default_rng(0).normal(size=(5, 16)).astype(np.float32)
    codes, scale = rtn(x.T.astype(np.float64), bits=4, clip_search=False)
    weight = round_weight(torch.from_numpy(x), 4)
    np.testing.assert_allclose(weight.numpy(), (codes * scale).T, rtol=1e-6)


@pytest.mark.parametrize(
    "settings",
    [
        ("activations.mode='asymmetric'",),
        ("activations.group_size=16", "kv_cache.group_size=8"),
        ("activations.down_proj_bits=8", "kv_cache.mode='symmetric'"),
    ],
)
def test_the_student_rounds_as_the_recipe_says(
    traced_once: None, hugging_face: HuggingFace, tmp_path: Path, settings
) -> None:
    plain = ("weights.bits=8", "weights.clip_search=false", "learning.weight_bits=8")
    recipe = load_recipe("w4a4kv4", [*plain, *settings])
    artifact = tmp_path / "artifact"
    export(hugging_face("llama"), artifact, recipe)
    student = Student(HuggingFaceModel(hugging_face("llama")).model, recipe)
    with torch.no_grad():
        found = student(torch.from_numpy(IDS)).numpy()
    model = FakeQuantModel(artifact)
    wanted, _ = model.step(IDS, model.new_cache(2))
    other = FakeQuantModel(artifact)
    other.settings.is_quantizing = False
    unrounded, _ = other.step(IDS, other.new_cache(2))
    far = np.abs(unrounded - wanted).mean()
    assert np.abs(found - wanted).mean() < 0.3 * far


def test_the_loss_falls_and_two_runs_agree(hugging_face: HuggingFace) -> None:
    recipe = _recipe(steps=30)
    first, second = (learn(hugging_face("llama"), recipe, CALIBRATION) for _ in range(2))
    losses = [record["loss"] for record in first.report.records]
    assert losses[-1] < 0.9 * losses[0]
    assert first.report == second.report
    for name, array in first.transforms.tensors.items():
        np.testing.assert_array_equal(array, second.transforms.tensors[name])


@pytest.mark.parametrize("broken", [26, 60])
def test_a_broken_training_goes_on_to_the_same_matrices(
    hugging_face: HuggingFace, tmp_path: Path, broken
) -> None:
    recipe = _recipe(steps=60)
    steps: list[int] = []

    def interrupt(done: int, _: int) -> None:
        steps.append(done)
        if done == broken:
            raise KeyboardInterrupt

    journal = tmp_path / "journal"
    with pytest.raises(KeyboardInterrupt):
        learn(
            hugging_face("llama"),
            recipe,
            CALIBRATION,
            journal=Journal(journal),
            progress=interrupt,
        )
    steps.clear()
    found = learn(
        hugging_face("llama"),
        recipe,
        CALIBRATION,
        journal=Journal(journal),
        progress=lambda done, _: steps.append(done),
    )
    assert steps == list(range(26 if broken == 26 else 61, 61))
    unbroken = learn(hugging_face("llama"), recipe, CALIBRATION)
    assert found.report == unbroken.report
    for name, array in unbroken.transforms.tensors.items():
        np.testing.assert_array_equal(found.transforms.tensors[name], array)


def test_a_learned_export_is_hugging_faces_function(
    traced_once: None, hugging_face: HuggingFace, tmp_path: Path
) -> None:
    model_dir = hugging_face("qwen2-biases")
    recipe = _recipe("rotate-only", "activations.bits=16", steps=2)
    disturbed = _disturbed(model_dir, recipe).tensors()
    manifest = _export(model_dir, tmp_path / "first", recipe, disturbed)
    assert "LearnTransforms" not in [step["name"] for step in manifest["passes"]]
    found, _ = OnnxModel(tmp_path / "first").step(IDS, OnnxModel(tmp_path / "first").new_cache(2))
    judge = HuggingFaceModel(model_dir)
    wanted, _ = judge.step(IDS, judge.new_cache(2))
    assert np.abs(found - wanted).max() < 2e-5 * np.abs(wanted).max()


def _export(model_dir: Path, out: Path, recipe: Recipe, tensors=None):
    """An export that learns, or one with given tensors."""
    if tensors is None:
        return export(model_dir, out, recipe, calibration=CALIBRATION)
    from safetensors.numpy import save_file  # noqa: PLC0415

    path = out.parent / "given.safetensors"
    save_file({name: np.ascontiguousarray(x) for name, x in tensors.items()}, path)
    return export(model_dir, out, recipe, calibration=CALIBRATION, transforms=path)


def test_an_artifact_carries_what_it_learned_and_can_be_made_from_it_again(
    traced_once: None, hugging_face: HuggingFace, tmp_path: Path
) -> None:
    model_dir, recipe = hugging_face("llama"), _recipe()
    manifest = _export(model_dir, tmp_path / "learned", recipe)
    assert manifest["transforms"]["source"] == "learned"
    (tensorrt,) = [t for t in manifest["targets"] if t["name"] == "tensorrt"]
    assert "down, heads, inputs, key run online" in tensorrt["reasons"][-1]
    export(
        model_dir,
        tmp_path / "again",
        recipe,
        calibration=CALIBRATION,
        transforms=tmp_path / "learned" / FILE,
    )
    for name in ("model.onnx", "model.onnx_data"):
        assert (tmp_path / "learned" / name).read_bytes() == (
            tmp_path / "again" / name
        ).read_bytes()

    followed = bisect(Subject(tmp_path / "learned", model_dir, threads=1))
    assert followed.departure is None
    assert all(site.to_export == 0 for site in followed.sites)
    rotations = {row.name: row.rotation for row in inspect(tmp_path / "learned").linears}
    assert rotations == {
        **dict.fromkeys(
            ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "given 8 x 12"
        ),
        **dict.fromkeys(("mlp.gate_proj", "mlp.up_proj"), "given 8 x 12"),
        "self_attn.o_proj": "given 4 across heads",
        "mlp.down_proj": "given 11 x 16",
        "lm_head": "",
    }

    graph, torch_model = OnnxModel(tmp_path / "learned"), FakeQuantModel(tmp_path / "learned")
    found, _ = graph.step(IDS, graph.new_cache(2))
    wanted, _ = torch_model.step(IDS, torch_model.new_cache(2))
    assert np.median(np.abs(found - wanted).max(axis=-1)) < 1e-4 * np.abs(wanted).max()


def test_refuses_another_architecture(hugging_face: HuggingFace) -> None:
    with pytest.raises(UnsupportedModelError, match="learning is written for llama, mistral"):
        learn(hugging_face("opt"), _recipe(), CALIBRATION)


def test_stops_where_the_loss_is_no_number(hugging_face: HuggingFace) -> None:
    recipe = _recipe("w4a4kv4", "learning.scale_rate=1e30", steps=5)
    with pytest.raises(InputError, match="the loss is nan at step"):
        learn(hugging_face("llama"), recipe, CALIBRATION)


def test_a_kronecker_product_takes_the_nearest_factors() -> None:
    assert balanced_factors(688, "down") == (16, 43)
    assert balanced_factors(11008, "down") == (86, 128)
    with pytest.raises(
        UnsupportedModelError,
        match="down needs a Kronecker product of 2053 features, which have no factors up to 1024",
    ):
        balanced_factors(2053, "down")
