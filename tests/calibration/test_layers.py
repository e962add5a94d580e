# SPDX-License-Identifier: Apache-2.0
"""A walk through the layers sees what Hugging Face's layers see, whatever memory there is."""

from typing import Any

import numpy as np
import pytest
import torch
import transformers
from numpy.typing import NDArray

from quarot_onnx.calibration import Calibration, walk
from quarot_onnx.decoder import Decoder
from quarot_onnx.errors import InputError
from quarot_onnx.export.checkpoint import Checkpoint
from quarot_onnx.pipeline import rewrite
from quarot_onnx.recipe import load_recipe
from tests.conftest import HuggingFace

Array = NDArray[Any]

CALIBRATION = Calibration.of(np.random.default_rng(0).integers(0, 128, (5, 12)), "random tokens")


def _decoder(hugging_face: HuggingFace, family: str, recipe: str, dtype: str) -> Decoder:
    return rewrite(Checkpoint(hugging_face(family)), load_recipe(recipe), dtype).decoder


def _states(decoder: Decoder) -> list[Array]:
    """In front of each layer but the first."""
    return [run.following() for run in walk(decoder, CALIBRATION)][:-1]


def _close(got: Array, wanted: Array, bound: float) -> bool:
    return bool(np.abs(got - wanted).max() <= bound * np.abs(wanted).max())


@pytest.mark.parametrize("family", ["llama", "gemma2", "opt", "gpt-neox"])
def test_the_states_between_layers_are_hugging_faces(
    traced_once: None, hugging_face: HuggingFace, family
) -> None:
    judge = transformers.AutoModelForCausalLM.from_pretrained(
        hugging_face(family), attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        output = judge(torch.from_numpy(CALIBRATION.tokens), output_hidden_states=True)
    wanted = [state.numpy() for state in output.hidden_states[1:-1]]
    found = _states(_decoder(hugging_face, family, "float", "float32"))
    assert len(found) == len(wanted) == 2
    for got, state in zip(found, wanted, strict=True):
        assert got.shape == (5, 12, 96)
        assert _close(got, state, 1e-5)


def test_a_half_precision_export_is_calibrated_in_float32(
    traced_once: None, hugging_face: HuggingFace
) -> None:
    wanted = _states(_decoder(hugging_face, "llama", "rotate-only", "float32"))
    for dtype in ("float16", "bfloat16"):
        found = _states(_decoder(hugging_face, "llama", "rotate-only", dtype))
        for got, state in zip(found, wanted, strict=True):
            assert _close(got, state, 2e-2)  # cosines and sines have the export's precision


def test_large_states_go_through_files_and_stay_the_same(
    traced_once: None, hugging_face: HuggingFace, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = _decoder(hugging_face, "llama", "rotate-only", "float32")
    wanted = _states(decoder)
    monkeypatch.setattr("quarot_onnx.calibration.layers.HELD_BYTES", 1)
    found = [np.array(run.following()) for run in walk(decoder, CALIBRATION)][:-1]
    for got, state in zip(found, wanted, strict=True):
        np.testing.assert_allclose(got, state, rtol=0, atol=1e-5 * np.abs(state).max())


def test_windows_that_run_one_by_one_are_captured_together_and_alike(
    traced_once: None, hugging_face: HuggingFace, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = walk(_decoder(hugging_face, "mixtral", "rotate-only", "float32"), CALIBRATION)
    run = next(runs)
    (wanted,) = run.capture(run.sites)
    monkeypatch.setattr("quarot_onnx.calibration.layers._RUN_BYTES", 1)
    (found,) = run.capture(run.sites)
    for name, rows in wanted.items():
        np.testing.assert_allclose(found[name], rows, atol=1e-5 * np.abs(rows).max(), err_msg=name)


def test_the_inputs_of_linears_are_captured_behind_the_online_hadamards(
    traced_once: None, hugging_face: HuggingFace
) -> None:
    plain = _decoder(hugging_face, "llama", "float", "float32")
    rotated = _decoder(hugging_face, "llama", "rotate-only", "float32")
    for before, after in zip(walk(plain, CALIBRATION), walk(rotated, CALIBRATION), strict=True):
        (old,), (new,) = before.capture(before.sites), after.capture(after.sites)
        assert list(old) == list(new)
        for linear, turned in zip(before.layer.linears, after.layer.linears, strict=True):
            x, y = old[linear.module], new[turned.module]
            assert x.shape == y.shape == (60, linear.in_features)
            assert not _close(x, y, 0.1)  # rotated
            product = y @ turned.weight.float64()
            if linear.module.endswith(("gate_proj", "up_proj", "q_proj", "k_proj")):
                assert _close(product, x @ linear.weight.float64(), 1e-5)


def test_keys_and_values_are_captured_token_by_token(
    traced_once: None, hugging_face: HuggingFace
) -> None:
    decoder = _decoder(hugging_face, "llama", "float", "float32")
    runs = walk(decoder, CALIBRATION)
    run = next(runs)
    (found,) = run.capture(run.sites)
    attention = run.layer.attention
    value = found[attention.v.module] @ attention.v.weight.float64()
    assert _close(found["/model/layers.0/self_attn/cached_value"], value, 1e-5)
    assert found["/model/layers.0/self_attn/cached_key"].shape == value.shape


def test_keys_and_values_have_names_that_no_linear_has(
    traced_once: None, hugging_face: HuggingFace
) -> None:
    decoder = _decoder(hugging_face, "gpt-neox", "float", "float32")  # a linear is called key
    run = next(walk(decoder, CALIBRATION))
    assert len(run.sites) == len(run.layer.linears) + 2
    key = run.layer.attention.k
    assert run.sites[key.module] is key.x


def test_levels_follow_the_data(traced_once: None, hugging_face: HuggingFace) -> None:
    def levels(family: str) -> list[list[str]]:
        runs = walk(_decoder(hugging_face, family, "float", "float32"), CALIBRATION)
        found = next(runs).levels()
        return [[linear.module.rpartition("/")[2] for linear in level] for level in found]

    llama = levels("llama")
    assert [set(level) for level in llama] == [
        {"q_proj", "k_proj", "v_proj"},
        {"o_proj"},
        {"gate_proj", "up_proj"},
        {"down_proj"},
    ]
    assert len(levels("gpt-neox")) == 2  # both halves read one state


def test_the_states_pass_through_a_layer_as_it_is_when_the_next_is_asked_for(
    traced_once: None, hugging_face: HuggingFace
) -> None:
    decoder = _decoder(hugging_face, "llama", "rotate-only", "float32")
    runs = walk(decoder, CALIBRATION)
    first = next(runs)
    untouched = first.following()
    first.layer.mlp.down.weight.compose(0, np.zeros_like)
    second = next(runs)
    (found,) = second.capture(second.sites)
    before_down = second.layer.attention.q.module
    changed = first.following()
    assert not _close(changed, untouched, 0.01)
    norm = changed / np.sqrt(np.square(changed).mean(axis=-1, keepdims=True) + 1e-6)
    assert _close(found[before_down], norm.reshape(60, 96), 1e-5)


def test_refuses_a_token_outside_the_vocabulary(
    traced_once: None, hugging_face: HuggingFace
) -> None:
    decoder = _decoder(hugging_face, "llama", "float", "float32")
    calibration = Calibration.of(np.array([[1, 128]]), "mine.txt")
    with pytest.raises(InputError) as caught:
        next(walk(decoder, calibration))
    assert str(caught.value) == (
        "mine.txt: token 128 is outside the vocabulary of 128; use the model's own tokenizer"
    )


def test_refuses_a_text_without_tokens() -> None:
    with pytest.raises(InputError) as caught:
        Calibration.of(np.empty((0, 8), np.int64), "empty.txt")
    assert str(caught.value) == (
        "empty.txt: tokens of shape [0, 8]; give at least one window of one token, "
        "[windows, length]"
    )
