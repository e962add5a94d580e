# SPDX-License-Identifier: Apache-2.0
"""Names on disk become parameters by Hugging Face's rules; what is more than a name is refused."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import transformers

from quarot_onnx.errors import UnsupportedModelError
from quarot_onnx.export.conversion import stored_names


def _checkpoint(*names: str) -> SimpleNamespace:
    return SimpleNamespace(directory=Path("model"), tensors=dict.fromkeys(names))


def test_a_renamed_head_is_found() -> None:
    names = ("gpt_neox.embed_in.weight", "embed_out.weight")
    assert stored_names(_checkpoint(*names), transformers.GPTNeoXConfig()) == {
        "gpt_neox.embed_in.weight": "gpt_neox.embed_in.weight",
        "lm_head.weight": "embed_out.weight",
    }


def test_other_names_stay() -> None:
    names = ("model.norm.weight", "model.layers.0.mlp.gate_up_proj.weight")
    found = stored_names(_checkpoint(*names), transformers.Phi3Config())
    assert found == dict(zip(names, names, strict=True))


def test_refuses_tensors_that_are_merged() -> None:
    name = "model.layers.0.block_sparse_moe.experts.1.w1.weight"
    with pytest.raises(UnsupportedModelError) as caught:
        stored_names(_checkpoint(name), transformers.MixtralConfig())
    assert str(caught.value) == (
        f"model: tensor {name} is merged with others by the conversion rule for "
        "'.experts.*.w1.weight', which is not supported; choose another architecture"
    )
