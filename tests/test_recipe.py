# SPDX-License-Identifier: Apache-2.0
"""Recipes: presets load, unknown keys and values out of range are refused by name."""

import tomllib
from contextlib import suppress
from pathlib import Path

import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quarot_onnx.errors import UsageError
from quarot_onnx.recipe import Recipe, load_recipe, preset_names


def _refused(name: str, *overrides: str) -> str:
    with pytest.raises(UsageError) as caught:
        load_recipe(name, overrides)
    assert caught.value.exit_code == 2
    message = str(caught.value)
    assert "\n" not in message
    return message


def _file(tmp_path: Path, content: str | bytes) -> str:
    path = tmp_path / "mine.toml"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_loads_and_describes_itself(name) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.description


def test_the_presets_are_those_of_the_paper() -> None:
    recipe = load_recipe("w4a4kv4")
    assert (recipe.weights.bits, recipe.activations.bits, recipe.kv_cache.bits) == (4, 4, 4)
    assert (recipe.activations.clip_ratio, recipe.kv_cache.clip_ratio) == (0.9, 0.95)
    assert recipe.rotations.r1 == "randomized_hadamard"
    eight = load_recipe("w8a8kv8")
    assert (eight.activations.clip_ratio, eight.kv_cache.clip_ratio) == (1.0, 1.0)


def test_only_quantizing_recipes_are_lossy() -> None:
    lossless = {name for name in preset_names() if not load_recipe(name).is_lossy}
    assert lossless == {"float", "rotate-only"}


def test_a_recipe_file_loads(tmp_path: Path) -> None:
    path = _file(tmp_path, 'name = "mine"\nseed = 7\n[weights]\nbits = 8\n')
    recipe = load_recipe(path)
    assert (recipe.name, recipe.seed, recipe.weights.bits) == ("mine", 7, 8)


def test_a_resolved_recipe_loads_again() -> None:
    recipe = load_recipe("w4a4kv4", ["seed=3", "kv_cache.io=float"])
    assert Recipe.model_validate(recipe.model_dump()) == recipe


def test_a_recipe_is_frozen() -> None:
    with pytest.raises(pydantic.ValidationError):
        load_recipe("w4a4kv4").seed = 1


@pytest.mark.parametrize(
    ("override", "read"),
    [
        ("kv_cache.io=float", lambda r: r.kv_cache.io == "float"),
        ('kv_cache.io="float"', lambda r: r.kv_cache.io == "float"),
        ("activations.clip_ratio=1", lambda r: r.activations.clip_ratio == 1.0),
        ("rotations.r4=false", lambda r: r.rotations.r4 is False),
        (" seed = 5 ", lambda r: r.seed == 5),
    ],
)
def test_an_override_changes_one_value(override, read) -> None:
    assert read(load_recipe("w4a4kv4", [override]))


def test_the_last_override_wins() -> None:
    assert load_recipe("w4a4kv4", ["seed=1", "seed=2"]).seed == 2


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("weights.bit=4", "recipe w4a4kv4: unknown key weights.bit; did you mean weights.bits"),
        ("weigths.bits=4", "recipe w4a4kv4: unknown key weigths; did you mean weights.bits"),
        ("weights.bits=9", "recipe w4a4kv4: weights.bits = 9: input should be 2, 3, 4, 5, 6, 7, 8"),
        ("weights.bits=four", "weights.bits = 'four': input should be 2, 3, 4, 5, 6, 7, 8 or 16"),
        ("activations.bits=2", "activations.bits = 2: input should be 3, 4, 5, 6, 7, 8 or 16"),
        ("weights=4", "recipe w4a4kv4: weights = 4: "),
        ("seed=-1", "seed = -1: input should be greater than or equal to 0"),
        ("seed=1.5", "seed = 1.5: input should be a valid integer"),
        ("seed=true", "seed = True: input should be a valid integer"),
        ("activations.clip_ratio=0", "clip_ratio = 0"),
        ("activations.clip_ratio=nan", "clip_ratio = nan"),
        ("kv_cache.clip_ratio=1.1", "clip_ratio = 1.1: input should be less than or equal to 1"),
        ("seed.value=1", "--set seed.value=1: seed is a value and has no keys"),
        ("seed", "--set seed: not KEY=VALUE; for example kv_cache.io=float"),
        ("=4", "--set =4: not KEY=VALUE"),
        ("rotations.fold_norm_scale=false", "rotations.r1 needs rotations.fold_norm_scale = true"),
        (
            'weights={method="obr", sparsity="50%", group_size=32}',
            "weights.sparsity = 50% with weights.group_size = 32; sparse integer products have a "
            "scale per output channel, set weights.group_size = 0",
        ),
        ("weights={act_order=true, group_size=32}", "act_order visits the groups in turn"),
        ("weights.bits=16", "activations.bits = 4 with float weights"),
        ("__class__.__init__=1", "unknown key __class__"),
    ],
)
def test_a_bad_override_is_refused_with_its_key(override, message) -> None:
    assert message in _refused("w4a4kv4", *(["seed=1"] if "seed." in override else []), override)


def test_a_key_like_no_other_lists_the_known_ones() -> None:
    message = _refused("w4a4kv4", "zzzz=1")
    assert "unknown key zzzz; known keys are name, description, seed, rotations." in message


def test_a_misspelt_preset_is_named_with_the_nearest() -> None:
    assert _refused("w4a4kv5") == (
        "recipe 'w4a4kv5': no such preset and not a .toml file; did you mean 'w4a4kv4'"
    )
    assert "presets are float, " in _refused("zzz")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("weights.bits = = 4", "not TOML"),
        (b"\xff\xfe", "not TOML"),
        ("seed = " + "9" * 5000, "not TOML"),
        ("a = " + "[" * 100_000, "not TOML"),
        ("seed = 1\nseed = 2", "not TOML"),
        (b"#" * 1_000_001, "larger than 1000000 bytes"),
    ],
    ids=["syntax", "not UTF-8", "5000 digits", "nesting", "duplicate", "1 MB"],
)
def test_a_broken_file_is_refused_by_name(tmp_path: Path, content, message) -> None:
    path = _file(tmp_path, content)
    refused = _refused(path)
    assert refused.startswith(f"{path}: ")
    assert message in refused


def test_a_missing_file_or_a_directory_is_refused_by_name(tmp_path: Path) -> None:
    missing = tmp_path / "none.toml"
    assert _refused(str(missing)) == (
        f"{missing}: cannot be read (No such file or directory); give a preset or a file"
    )
    (tmp_path / "directory.toml").mkdir()
    assert "cannot be read (Is a directory)" in _refused(str(tmp_path / "directory.toml"))


@given(key=st.text(max_size=20), value=st.text(max_size=30))
def test_any_override_is_taken_or_refused_as_usage(key, value) -> None:
    with suppress(UsageError):
        load_recipe("w4a4kv4", [f"{key}={value}"])


@given(name=st.text(st.characters(exclude_characters="\0/"), max_size=20))
def test_any_name_is_a_preset_or_refused_as_usage(name) -> None:
    try:
        load_recipe(name)
    except UsageError:
        pass
    else:
        assert name in preset_names()


def test_the_presets_hold_no_key_that_is_a_default_of_another_meaning() -> None:
    """Every preset is plain TOML that a user can copy and edit."""
    directory = Path(__file__).parents[1] / "quarot_onnx" / "recipes"
    for name in preset_names():
        content = tomllib.loads((directory / f"{name}.toml").read_text())
        assert Recipe.model_validate(content) == load_recipe(name)


@pytest.mark.parametrize("name", preset_names())
def test_onnx_runtime_runs_every_preset(name) -> None:
    onnxruntime, tensorrt = load_recipe(name).targets()
    assert (onnxruntime.name, onnxruntime.reasons) == ("onnxruntime", ())
    assert tensorrt.name == "tensorrt"


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        ((), None),
        (("kv_cache.bits=16",), "kv_cache.bits = 16: the cache plugins store codes of 4 bits"),
        (("activations.bits=16",), "activations.bits = 16: the GEMM plugin multiplies codes of 4"),
        (("weights.bits=8",), "weights.bits = 8: the GEMM plugin multiplies codes of 4 bits"),
        (("activations.bits=6",), "activations.bits = 6: the GEMM plugin multiplies codes"),
        (("kv_cache.bits=8",), "kv_cache.bits = 8: the cache plugins store codes of 4 bits"),
        (
            ("activations.mode=skew",),
            "activations.mode = skew: no kernel writes zero points",
        ),
        (("activations.group_size=64",), "activations.group_size = 64: a token has one scale"),
        (
            ("activations.down_proj_bits=8",),
            "activations.down_proj_bits = 8: the GEMM plugin multiplies codes of 4 bits",
        ),
        (("activations.clip=perplexity", "kv_cache.clip=error"), None),
        (("kv_cache.mode=symmetric",), "kv_cache.mode = symmetric: the cache plugins write asymm"),
        (("kv_cache.group_size=16",), "kv_cache.group_size = 16: a head has one scale"),
        (("kv_cache.io=float",), "kv_cache.io = float: a cache of rounded floats has no plugin"),
    ],
)
def test_a_recipe_says_what_tensorrt_cannot_run(overrides, reason) -> None:
    reasons = load_recipe("w4a4kv4", overrides).targets()[1].reasons
    if reason is None:
        assert not reasons
    else:
        assert reasons[0].startswith(reason)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("learning.places=['r2','value']",), "r2 and value, which are one place; keep one"),
        (("learning.places=['up','up']",), "names a place twice"),
        (("learning.places=['r1']", "rotations.r1=none"), "has r1 and rotations.r1 = none"),
        (
            ("learning.places=['norms']", "rotations.r1=none", "rotations.fold_norm_scale=false"),
            "learning.places needs rotations.fold_norm_scale = true",
        ),
        (
            ("learning.places=['up']", "smoothing.down_proj=true"),
            "smoothing.down_proj and up in learning.places are one place",
        ),
        (("learning.places=['r5']",), "learning.places.0 = 'r5'"),
    ],
)
def test_places_that_cannot_be_learned_together_are_refused(overrides, message) -> None:
    with pytest.raises(UsageError) as caught:
        load_recipe("w4a4kv4", overrides)
    assert message in str(caught.value)


def test_learned_matrices_run_online_where_no_plugin_takes_them() -> None:
    fused = load_recipe("w4a4kv4", ["learning.places=['r1','value','up','norms']"])
    assert fused.is_calibrated
    assert fused.targets()[1].reasons == ()
    learned = load_recipe("w4a4kv4-learned").targets()[1].reasons
    assert learned == (
        "matrices of down, heads, inputs, key run online: the Hadamard plugins take no other "
        "matrices",
    )


def test_bits_of_down_proj_need_quantized_activations() -> None:
    assert _refused("w4a16", "activations.down_proj_bits=8") == (
        "recipe w4a16: recipe: activations.down_proj_bits = 8 with float activations; "
        "set activations.bits below 16"
    )
