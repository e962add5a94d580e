# SPDX-License-Identifier: Apache-2.0
"""Names on disk become parameters by Hugging Face's rules; what is more than a name is refused."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import transformers
from transformers.core_model_loading import Concatenate, WeightConverter

from quarot_onnx.errors import UnsupportedModelError
from quarot_onnx.export import conversion
from quarot_onnx.export.conversion import stored_names


def _checkpoint(*names: str) -> SimpleNamespace:
    return SimpleNamespace(directory=Path("model"), tensors=dict.fromkeys(names))


def test_a_renamed_head_is_found() -> None:
    names = ("gpt_neox.embed_in.weight", "embed_out.weight")
    assert stored_names(_checkpoint(*names), transformers.GPTNeoXConfig()).names == {
        "gpt_neox.embed_in.weight": "gpt_neox.embed_in.weight",
        "lm_head.weight": "embed_out.weight",
    }


def test_other_names_stay() -> None:
    names = ("model.norm.weight", "model.layers.0.mlp.gate_up_proj.weight")
    found = stored_names(_checkpoint(*names), transformers.Phi3Config())
    assert found.names == dict(zip(names, names, strict=True))


def test_the_tensors_of_experts_are_found_by_number() -> None:
    experts = "model.layers.0.block_sparse_moe.experts"
    names = [f"{experts}.{e}.{w}.weight" for e in (10, 2) for w in ("w1", "w2", "w3")]
    found = stored_names(_checkpoint(*names), transformers.MixtralConfig())
    assert found.names == {}
    assert found.stacks == {
        "model.layers.0.mlp.experts.gate_up_proj": (
            {10: f"{experts}.10.w1.weight", 2: f"{experts}.2.w1.weight"},
            {10: f"{experts}.10.w3.weight", 2: f"{experts}.2.w3.weight"},
        ),
        "model.layers.0.mlp.experts.down_proj": (
            {10: f"{experts}.10.w2.weight", 2: f"{experts}.2.w2.weight"},
        ),
    }


def test_refuses_tensors_that_are_merged_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    rule = WeightConverter(["a.weight", "b.weight"], "ab.weight", [Concatenate(dim=0)])
    monkeypatch.setattr(conversion, "get_checkpoint_conversion_mapping", lambda _: [rule])
    with pytest.raises(UnsupportedModelError) as caught:
        stored_names(_checkpoint("model.a.weight"), transformers.LlamaConfig())
    assert str(caught.value) == (
        "model: tensor model.a.weight is merged with others by the conversion rule for "
        "'a.weight', which is not supported; choose another architecture"
    )
