# SPDX-License-Identifier: Apache-2.0
"""From a Hugging Face directory to a running artifact, for every supported family."""

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import transformers
from numpy.typing import NDArray

from quarot_onnx.artifacts import changed_files, load_manifest, stored_bytes
from quarot_onnx.errors import InputError, QuarotError, ResourceError, UnsupportedModelError
from quarot_onnx.export.checkpoint import Checkpoint
from quarot_onnx.pipeline import export, rewrite
from quarot_onnx.recipe import load_recipe
from tests import models
from tests.conftest import Exported, HuggingFace
from tests.running import Decoding

Array = NDArray[Any]
each_family = pytest.mark.parametrize("family", models.FAMILIES)

TOKENS = np.random.default_rng(0).integers(0, 128, (2, 12))


@cache
def _judge(directory: Path) -> transformers.PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_pretrained(
        directory, attn_implementation="eager", experts_implementation="eager"
    ).eval()


def _wanted(directory: Path, ids: Array, mask: Array | None = None) -> Array:
    """Hugging Face's logits."""
    mask = np.ones_like(ids) if mask is None else mask
    positions = np.maximum(mask.cumsum(axis=1) - 1, 0)
    with torch.no_grad():
        output = _judge(directory)(
            input_ids=torch.from_numpy(ids),
            attention_mask=torch.from_numpy(mask),
            position_ids=torch.from_numpy(positions),
            use_cache=False,
        )
    return np.asarray(output.logits.float().numpy())


def _deviation(got: Array, wanted: Array) -> float:
    """max|difference| / max|logit|."""
    return float(np.abs(got - wanted).max() / np.abs(wanted).max())


# --- Equivalence ----------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["float", "rotate-only"])
@each_family
def test_logits_equal_hugging_faces(
    exported: Exported, hugging_face: HuggingFace, family, recipe
) -> None:
    artifact, source = exported(family, recipe), hugging_face(family)
    wanted = _wanted(source, TOKENS)
    model = artifact / "model.onnx"

    prefill = Decoding(model, batch=2)(TOKENS)
    assert _deviation(prefill, wanted) <= 1e-5

    chunked = Decoding(model, batch=2)
    pieces = [chunked(TOKENS[:, a:b]) for a, b in ((0, 5), (5, 9), (9, 10), (10, 11), (11, 12))]
    assert _deviation(np.concatenate(pieces, axis=1), wanted) <= 1e-5

    mask = np.ones_like(TOKENS)
    mask[0, :4] = 0
    padded = Decoding(model, batch=2)
    start = padded(TOKENS[:, :9], mask[:, :9])
    rest = padded(TOKENS[:, 9:])
    both = np.concatenate([start, rest], axis=1)
    visible = mask.astype(bool)
    assert _deviation(both[visible], _wanted(source, TOKENS, mask)[visible]) <= 1e-5
    alone = _wanted(source, TOKENS[:1, 4:])
    assert _deviation(both[:1, 4:], alone) <= 1e-5


@pytest.mark.parametrize(
    "options",
    [
        {"attention_bias": True, "mlp_bias": True},
        {"num_attention_heads": 6, "num_key_value_heads": 3},
        {"num_attention_heads": 1, "num_key_value_heads": 1},
        {"hidden_size": 88, "intermediate_size": 101, "head_dim": 22},
        {"hidden_act": "gelu"},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 1e4,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 4.0,
                "original_max_position_embeddings": 128,
            }
        },
    ],
    ids=["biases", "6 heads", "1 head", "no hadamard", "gelu", "linear", "llama3", "yarn"],
)
def test_a_variant_of_llama_rotates_too(tmp_path: Path, traced_once: None, options) -> None:
    source = models.save(models.build("llama", num_hidden_layers=2, **options), tmp_path / "hf")
    export(source, tmp_path / "out", load_recipe("rotate-only"))
    got = Decoding(tmp_path / "out" / "model.onnx", batch=2)(TOKENS)
    assert _deviation(got, _wanted(source, TOKENS)) <= 1e-5


@pytest.mark.parametrize(
    "family", ["llama", "phi3", "gemma2", "gemma3", "opt", "gpt-neox", "mixtral", "qwen2-moe"]
)
def test_weights_at_the_scale_of_an_initialization_rotate_too(
    tmp_path: Path, traced_once: None, family
) -> None:
    sizes = {"hidden_size": 160, "intermediate_size": 320, "num_attention_heads": 4}
    sizes |= {"ffn_dim": 320, "word_embed_proj_dim": 160} if family == "opt" else {}
    model = models.build(family, scale=1.0, num_hidden_layers=2, **_layer_types(family), **sizes)
    source = models.save(model, tmp_path / "hf")
    export(source, tmp_path / "out", load_recipe("rotate-only"))
    got = Decoding(tmp_path / "out" / "model.onnx", batch=2)(TOKENS)
    assert _deviation(got, _wanted(source, TOKENS)) <= 1e-5


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_padding_before_down_proj_changes_nothing(
    tmp_path: Path, traced_once: None, family
) -> None:
    model = models.build(family, num_hidden_layers=1, intermediate_size=101)
    source = models.save(model, tmp_path / "hf")
    pad = ("rotations.r4_policy=pad",)
    manifest = export(source, tmp_path / "out", load_recipe("rotate-only", pad))
    reports = {report["name"]: report for report in manifest["passes"]}
    assert reports["InsertR4"]["detail"] == "hadamard 28 x 4 of 101 padded to 112"
    got = Decoding(tmp_path / "out" / "model.onnx", batch=2)(TOKENS)
    assert _deviation(got, _wanted(source, TOKENS)) <= 1e-5
    export(source, tmp_path / "quantized", load_recipe("w8a8kv8", pad))
    assert _error(tmp_path / "quantized", _wanted(source, TOKENS)) < 0.1


def _layer_types(family: str) -> dict[str, list[str]]:
    both = {"layer_types": ["sliding_attention", "full_attention"]}
    return both if family in ("gemma2", "gemma3") else {}


def test_without_r1_behind_post_norms_gemma_equals_hugging_face(
    exported: Exported, hugging_face: HuggingFace
) -> None:
    artifact = exported("gemma2", "rotate-only", ("rotations.post_norm=skip_r1",))
    reports = {report["name"]: report for report in load_manifest(artifact)["passes"]}
    ((reason, places),) = reports["FuseR1"]["skipped"].items()
    assert reason == "post-norms keep their scale, and rotations.post_norm = skip_r1"
    assert len(places) == 6
    got = Decoding(artifact / "model.onnx", batch=2)(TOKENS)
    assert _deviation(got, _wanted(hugging_face("gemma2"), TOKENS)) <= 1e-5


def test_skipped_rotations_are_in_the_manifest_with_the_reason(tmp_path: Path, traced_once) -> None:
    options = {"num_attention_heads": 6, "num_key_value_heads": 3, "intermediate_size": 101}
    source = models.save(models.build("llama", num_hidden_layers=1, **options), tmp_path / "hf")
    manifest = export(source, tmp_path / "out", load_recipe("w4a4kv4"))
    reports = {report["name"]: report for report in manifest["passes"]}
    ((reason, places),) = reports["InsertHeadsHadamard"]["skipped"].items()
    assert "n=6 is not a multiple of 4" in reason
    assert places == ["/model/layers.0/self_attn/o_proj/MatMul"]
    ((reason, _),) = reports["InsertR4"]["skipped"].items()
    assert "n=101 is odd" in reason


# --- Quantized ------------------------------------------------------------------------------------


def _error(artifact: Path, wanted: Array) -> float:
    """Root of the mean squared difference, relative to that of the logits."""
    got = Decoding(artifact / "model.onnx", batch=2)(TOKENS)
    return float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted))


@each_family
def test_more_bits_are_closer_to_hugging_face(
    exported: Exported, hugging_face: HuggingFace, family
) -> None:
    wanted = _wanted(hugging_face(family), TOKENS)
    error8, error4 = (_error(exported(family, name), wanted) for name in ("w8a8kv8", "w4a4kv4"))
    assert 0 < error8 < error4 / 5
    assert error8 < 0.1
    if family == "llama":
        assert error8 < _error(exported(family, "w6a6kv6"), wanted) < error4


@each_family
def test_the_packed_cache_decodes_what_one_prefill_says(exported: Exported, family) -> None:
    model = exported(family, "w8a8kv8") / "model.onnx"
    prefill = Decoding(model, batch=2)(TOKENS)
    stepping = Decoding(model, batch=2)
    steps = np.concatenate([stepping(TOKENS[:, i : i + 1]) for i in range(12)], axis=1)
    assert _deviation(steps, prefill) <= 0.05
    assert (steps.argmax(-1) == prefill.argmax(-1)).mean() > 0.9


@each_family
def test_a_float_cache_has_the_grid_of_the_packed_one(exported: Exported, family) -> None:
    packed = Decoding(exported(family, "w4a4kv4") / "model.onnx", batch=2)(TOKENS)
    plain = Decoding(exported(family, "w4a4kv4", ("kv_cache.io=float",)) / "model.onnx", batch=2)
    # Rounding amplifies the last bit of a sum into a step of a code, now and then.
    assert np.median(np.abs(plain(TOKENS) - packed)) <= 0.02 * np.abs(packed).max()
    assert set(plain.past) == {
        f"past_key_values.{i}.{kind}" for i in range(3) for kind in ("key", "value")
    }
    assert {array.dtype for array in plain.past.values()} == {np.dtype(np.float32)}


def test_weights_alone_may_be_quantized(exported: Exported, hugging_face: HuggingFace) -> None:
    wanted = _wanted(hugging_face("llama"), TOKENS)
    error4, error8 = (
        _error(exported("llama", "w4a16", bits), wanted) for bits in ((), ("weights.bits=8",))
    )
    assert 0 < error8 < error4 / 5


@pytest.mark.parametrize("recipe", ["rotate-only", "w8a8kv8"])
def test_float16_runs(exported: Exported, hugging_face: HuggingFace, recipe) -> None:
    artifact = exported("llama", recipe, (), "float16")
    decoding = Decoding(artifact / "model.onnx", batch=2)
    got = decoding(TOKENS)
    assert got.dtype == np.float16
    bound = 0.02 if recipe == "rotate-only" else 0.1
    assert _deviation(got.astype(np.float32), _wanted(hugging_face("llama"), TOKENS)) <= bound
    assert np.isfinite(decoding(TOKENS[:, :1])).all()


@pytest.mark.parametrize("recipe", ["rotate-only", "w4a4kv4"])
def test_bfloat16_is_valid_and_stored_in_two_bytes(exported: Exported, recipe) -> None:
    artifact = exported("llama", recipe, (), "bfloat16")
    onnx.checker.check_model(str(artifact / "model.onnx"), full_check=True)
    stored = {t.name: t for t in onnx.load(artifact / "model.onnx").graph.initializer}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert stored[name].data_type == onnx.TensorProto.BFLOAT16
        assert len(stored[name].raw_data) == 2 * 128 * 96


# --- Determinism ----------------------------------------------------------------------------------

_EXPORT = """
import sys
from pathlib import Path
from quarot_onnx.pipeline import export
from quarot_onnx.recipe import load_recipe
export(Path(sys.argv[1]), Path(sys.argv[2]), load_recipe("w4a4kv4", sys.argv[3:]))
"""


def _bytes(artifact: Path) -> dict[str, bytes]:
    """By name; the manifest without what was measured, where two runs differ in the last digits."""
    found = {path.name: path.read_bytes() for path in sorted(artifact.iterdir())}
    manifest = json.loads(found["manifest.json"])
    for entry in manifest["passes"]:
        for certificate in entry["certificates"]:
            assert certificate.pop("worst") <= certificate["bound"]
            del certificate["worst_site"], certificate["deviations"]
    return found | {"manifest.json": json.dumps(manifest).encode()}


def test_two_processes_write_the_same_bytes(
    tmp_path: Path, traced_once: None, hugging_face: HuggingFace
) -> None:
    """Another hash seed, another working directory, other paths, no memory of earlier traces."""
    (tmp_path / "elsewhere").mkdir()
    root = Path(__file__).parents[1]
    environment = os.environ | {"PYTHONHASHSEED": "1234", "PYTHONPATH": str(root)}
    program = [sys.executable, "-c", _EXPORT, str(hugging_face("llama")), str(tmp_path / "out")]
    subprocess.run(
        program, check=True, cwd=tmp_path / "elsewhere", env=environment, capture_output=True
    )
    export(hugging_face("llama"), tmp_path / "here", load_recipe("w4a4kv4"))
    assert _bytes(tmp_path / "out") == _bytes(tmp_path / "here")


def test_another_seed_writes_other_weights(exported: Exported) -> None:
    first, second = (exported("llama", "w4a4kv4", seed) for seed in ((), ("seed=1",)))
    assert (first / "model.onnx_data").read_bytes() != (second / "model.onnx_data").read_bytes()


def test_shards_and_a_single_file_give_the_same_model(
    tmp_path: Path, traced_once: None, exported: Exported
) -> None:
    source = models.save(models.build("llama"), tmp_path / "hf", max_shard_size="200KB")
    assert len(list(source.glob("*.safetensors"))) > 1
    export(source, tmp_path / "out", load_recipe("w4a4kv4"))
    for name in ("model.onnx", "model.onnx_data"):
        single = exported("llama", "w4a4kv4") / name
        assert (tmp_path / "out" / name).read_bytes() == single.read_bytes()


# --- The artifact ---------------------------------------------------------------------------------


def test_the_manifest_describes_the_artifact(exported: Exported) -> None:
    artifact = exported("qwen3-head-dim", "w4a4kv4")
    manifest = load_manifest(artifact)
    assert changed_files(artifact, manifest) == []
    assert manifest["source"]["model_type"] == "qwen3"
    assert list(manifest["source"]["files"]) == ["model.safetensors"]
    weights = manifest["recipe"]["weights"]
    assert (weights["bits"], weights["method"], weights["clip_search"]) == (4, "rtn", True)
    assert manifest["dtype"] == "float32"
    assert [report["name"] for report in manifest["passes"]] == [
        "UntieEmbeddings",
        "FuseNormScale",
        "FuseR1",
        "FuseR2",
        "InsertHeadsHadamard",
        "InsertR3",
        "InsertR4",
        "QuantizeWeights",
        "QuantizeActivations",
        "QuantizeKvCache",
    ]


def test_companion_files_travel_unchanged(
    tmp_path: Path, traced_once: None, hugging_face: HuggingFace
) -> None:
    source = models.save(models.build("llama"), tmp_path / "hf")
    (source / "tokenizer.json").write_text("{}")
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "notes.txt").write_text("private")
    export(source, tmp_path / "out", load_recipe("float"))
    for name in ("config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    assert not (tmp_path / "out" / "notes.txt").exists()
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_the_size_is_near_the_ideal(tmp_path: Path, traced_once: None) -> None:
    """4 bits per linear weight, plus embedding and head, untied, in float32."""
    sizes = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 1000}
    source = models.save(models.build("llama-tied", **sizes, **heads), tmp_path / "hf")
    export(source, tmp_path / "out", load_recipe("w4a4kv4"))
    linear = 4 * (256 * 256 * 2 + 256 * 128 * 2 + 3 * 256 * 688)
    ideal = linear / 2 + 2 * 1000 * 256 * 4
    written = sum(path.stat().st_size for path in (tmp_path / "out").glob("model.onnx*"))
    assert ideal < written <= 1.25 * ideal


def test_the_plan_knows_the_size_before_anything_is_written(
    traced_once: None, hugging_face: HuggingFace, exported: Exported
) -> None:
    planned = stored_bytes(
        rewrite(Checkpoint(hugging_face("llama")), load_recipe("w4a4kv4"), "float32").model
    )
    written = (exported("llama", "w4a4kv4") / "model.onnx_data").stat().st_size
    assert written <= planned * 1.05
    assert planned <= written + 20_000  # what is stored inline


# --- Faults ---------------------------------------------------------------------------------------


def _config(**changes: Any) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        path = directory / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def _tensor(
    name: str, change: Callable[[torch.Tensor], torch.Tensor | None]
) -> Callable[[Path], None]:
    def rewrite_file(directory: Path) -> None:
        from safetensors.torch import load_file, save_file  # noqa: PLC0415

        tensors = load_file(directory / "model.safetensors")
        changed = change(tensors.pop(name))
        if changed is not None:
            tensors[name] = changed
        save_file(tensors, directory / "model.safetensors")

    return rewrite_file


def _cut(directory: Path) -> None:
    content = (directory / "model.safetensors").read_bytes()
    (directory / "model.safetensors").write_bytes(content[:-1])


def _poison(index: tuple[int, ...]) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor[index] = torch.nan
        return tensor

    return change


NORM, UP = "model.layers.1.input_layernorm.weight", "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (_cut, InputError, "model.safetensors: truncated, tensor "),
        (
            _tensor(UP, _poison((3, 5))),
            InputError,
            f"tensor {UP} has 1 values that are not finite (first at [3, 5]); download it again",
        ),
        (
            _tensor(NORM, _poison((7,))),
            InputError,
            f"tensor {NORM} has 1 values that are not finite (first at [7]); download it again",
        ),
        (_tensor(UP, lambda t: None), InputError, f"tensor {UP} is missing from the weights; "),
        (
            _tensor(UP, lambda t: t[:-1].clone()),
            InputError,
            f"tensor {UP} has shape [175, 96] where config.json implies [176, 96]; the two do not",
        ),
        (
            _tensor(UP, lambda t: t.to(torch.int32)),
            UnsupportedModelError,
            f"tensor {UP} has dtype I32; supported are F64, F32, F16, BF16",
        ),
        (
            _config(model_type="mamba"),
            UnsupportedModelError,
            "config.json: model_type 'mamba' is not supported; supported are gemma2, ",
        ),
        (
            _config(num_attention_heads=5),
            InputError,
            "num_key_value_heads = 2 does not divide num_attention_heads = 5",
        ),
        (_config(num_key_value_heads=0), InputError, "num_key_value_heads = 0 does not divide"),
        (
            _config(hidden_size=90, head_dim=None),
            InputError,
            "num_attention_heads = 4 does not divide hidden_size = 90",
        ),
        (_config(num_attention_heads=None), InputError, "num_attention_heads = None; it must be"),
        (_config(hidden_size=-1), InputError, "hidden_size = -1; it must be a whole number from 1"),
        (_config(vocab_size=10**12), InputError, "vocab_size = 1000000000000; it must be"),
        (_config(num_hidden_layers=True), InputError, "num_hidden_layers = True; it must be"),
        (_config(head_dim=0), InputError, "head_dim = 0; RoPE needs a positive even number"),
        (_config(head_dim=15), InputError, "head_dim = 15; RoPE needs a positive even number"),
        (_config(head_dim="x"), InputError, "head_dim = 'x'; RoPE needs a positive even number"),
        (
            _config(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
            UnsupportedModelError,
            "rope type 'dynamic' depends on the length at run time",
        ),
        (
            _config(rope_scaling={"type": "longrope"}),
            UnsupportedModelError,
            "rope type 'longrope' depends on the length at run time",
        ),
        (
            _config(rope_parameters={"rope_type": "spiral", "rope_theta": 1e4}),
            UnsupportedModelError,
            "rope type 'spiral' is not supported; supported are default, linear, llama3, yarn",
        ),
        (
            _config(rope_parameters={"rope_type": "default", "rope_theta": 0}),
            InputError,
            "rope_theta = 0; it must be a positive number",
        ),
        (_config(rope_scaling="big"), InputError, "rope_scaling = 'big'; it must be a table"),
        (
            _config(hidden_act="swoosh"),
            UnsupportedModelError,
            "hidden_act 'swoosh' is not an activation of transformers; ",
        ),
        (
            _config(rms_norm_eps="small"),
            InputError,
            "config.json: transformers refuses it (Validation error for field 'rms_norm_eps'",
        ),
        (
            _config(num_hidden_layers=4),
            InputError,
            "tensor model.layers.3.input_layernorm.weight is missing from the weights; ",
        ),
    ],
    ids=lambda value: "",
)
def test_bad_input_is_refused_and_leaves_nothing(
    tmp_path: Path, traced_once: None, damage, error, message
) -> None:
    source = models.save(models.build("llama"), tmp_path / "hf")
    damage(source)
    (tmp_path / "work").mkdir()
    with pytest.raises(QuarotError) as caught:
        export(source, tmp_path / "work" / "out", load_recipe("w4a4kv4"))
    assert type(caught.value) is error
    assert caught.value.exit_code == {InputError: 3, UnsupportedModelError: 4}[error]
    assert message in str(caught.value)
    assert str(source) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "work").iterdir()) == []


@pytest.mark.parametrize("name", [NORM, UP, "model.embed_tokens.weight"])
def test_numbers_that_overflow_float16_are_named(tmp_path: Path, traced_once: None, name) -> None:
    source = models.save(models.build("llama"), tmp_path / "hf")
    _tensor(name, lambda t: t * 1e7)(source)
    with pytest.raises(
        InputError, match="overflows float16; export with --dtype float32"
    ) as caught:
        export(source, tmp_path / "out", load_recipe("float"), dtype="float16")
    assert name in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_no_space_leaves_nothing(
    tmp_path: Path, traced_once: None, hugging_face: HuggingFace
) -> None:
    source = hugging_face("llama")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(ResourceError) as caught:
            export(source, tmp_path / "out", load_recipe("w4a4kv4"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(caught.value) == (
        f"{tmp_path}/out: no space left while writing; free some or choose another disk"
    )
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_too_small_is_refused_before_writing(
    tmp_path: Path, traced_once: None, hugging_face: HuggingFace, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("quarot_onnx.artifacts.shutil.disk_usage", lambda _: usage)
    with pytest.raises(ResourceError, match=r"out: needs 0\.00 GB and 0\.00 GB are free"):
        export(hugging_face("llama"), tmp_path / "out", load_recipe("w4a4kv4"))
    assert list(tmp_path.iterdir()) == []
