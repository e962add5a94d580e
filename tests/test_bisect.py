# SPDX-License-Identifier: Apache-2.0
"""``validate --bisect``: the first layer and tensor where an artifact leaves its reference."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from quarot_onnx.errors import GateError
from quarot_onnx.validate.subject import Subject
from quarot_onnx.validate.twin import Bisection, bisect
from tests import models
from tests.conftest import Exported, HuggingFace
from tests.test_gate import _hadamard, _head, _layer, _mask, _nan, run
from tests.test_validate import Planted


def _bisected(artifact: Path, reference: Path) -> Bisection:
    return bisect(Subject(artifact, reference, threads=1))


@pytest.mark.parametrize("recipe", ["w4a4kv4", "rotate-only"])
@pytest.mark.parametrize("family", models.FAMILIES)
def test_a_sound_artifact_of_any_family_follows_its_reference_to_the_end(
    exported: Exported, hugging_face: HuggingFace, family: str, recipe: str
) -> None:
    found = _bisected(exported(family, recipe), hugging_face(family))
    assert found.departure is None
    assert [s.name for s in found.sites] == [
        "embedding",
        *(f"layers.{i}" for i in range(3)),
        "head",
    ]
    assert all(site.to_hugging_face < 5e-6 for site in found.sites)
    assert all(site.to_export == 0 for site in found.sites)
    rounded = [site.rounding for site in found.sites if site.name.startswith("layers")]
    assert all(0.02 < r < 0.8 for r in rounded) if recipe == "w4a4kv4" else rounded == [0.0] * 3


def _gate(planted: Planted) -> None:
    scale = "model.layers.2.mlp.up_proj.weight_scale"
    planted.edit_data(scale, lambda values: np.multiply(values, 1.03, out=values))


@pytest.mark.parametrize(
    ("fault", "site", "tensor", "detail"),
    [
        (_head, "head", "logits", "initializer lm_head.weight is off by 0.05"),
        (_layer, "layers.0", "o_proj/Int4Gemm", "layers.0.self_attn.o_proj.weight is off by "),
        (_gate, "layers.2", "up_proj/Int4Gemm", "layers.2.mlp.up_proj.weight_scale is off by 0.03"),
        (_hadamard, "layers.1", "down_proj/R4_y", "the artifact's graph has no such tensor"),
        (_mask, "layers.0", "/model/LessOrEqual", "so the node itself was altered"),
        (_nan, "embedding", "embed_tokens/Gather", "embed_tokens.weight is off by nan"),
    ],
)
def test_the_first_layer_and_tensor_of_a_fault_are_named(
    exported: Exported,
    hugging_face: HuggingFace,
    tmp_path: Path,
    fault: Callable[[Planted], None],
    site: str,
    tensor: str,
    detail: str,
) -> None:
    planted = Planted(Path(shutil.copytree(exported("llama", "w4a4kv4"), tmp_path / "artifact")))
    fault(planted)
    found = _bisected(planted.save(), hugging_face("llama"))
    assert found.departure is not None
    assert found.departure.site == site == found.sites[-1].name
    assert tensor in found.departure.tensor
    assert detail in found.departure.detail
    with pytest.raises(GateError, match=rf"leaves its reference at {site}, tensor "):
        found.require_followed(planted.artifact)


def test_another_model_is_found_at_the_embedding(exported: Exported, tmp_path: Path) -> None:
    other = models.save(models.build("llama", seed=1), tmp_path / "other")
    found = _bisected(exported("llama", "rotate-only"), other)
    assert found.departure is not None
    assert found.departure.site == "embedding"


def test_the_command_prints_the_parts_and_ends_with_10_where_the_artifact_is_bad(
    capsys, exported: Exported, hugging_face: HuggingFace, tmp_path: Path
) -> None:
    artifact = exported("llama", "w4a4kv4")
    code, out, _ = run(
        capsys, "validate", artifact, "--reference", hugging_face("llama"), "--bisect"
    )
    assert code == 0
    assert "follows its reference to the end" in out
    planted = Planted(Path(shutil.copytree(artifact, tmp_path / "artifact")))
    _layer(planted)
    options = ["--reference", hugging_face("llama"), "--bisect", "--json"]
    code, out, err = run(capsys, "validate", planted.save(), *options)
    assert code == 10
    assert json.loads(out)["departure"]["site"] == "layers.0"
    assert err.count("\n") == 1
    assert "leaves its reference at layers.0, tensor /model/layers.0/self_attn/o_proj" in err


def test_the_command_asks_for_the_reference(capsys, exported: Exported) -> None:
    code, _, err = run(capsys, "validate", exported("llama", "w4a4kv4"), "--bisect")
    assert code == 2
    assert "give --reference" in err
