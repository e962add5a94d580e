# SPDX-License-Identifier: Apache-2.0
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quarot_onnx.comparison import JSON, PAGE, RUNS, TABLE, compare, rows, table
from quarot_onnx.comparison import measure as measure_module
from quarot_onnx.comparison.measure import Bench, Measured
from quarot_onnx.comparison.page import page_of
from quarot_onnx.errors import UnsupportedModelError, UsageError
from quarot_onnx.evaluate import evaluate
from quarot_onnx.pipeline import export
from quarot_onnx.recipe import load_recipe
from quarot_onnx.runtime import Cache, Ids, Logits

EXAMPLES = Path(__file__).parents[1] / "examples"
MODEL = EXAMPLES / "tiny_qwen3" / "model"
RECIPES = ["w4a4kv4", "w4a4kv4-unrotated", "rotate-only"]
SMALL: dict[str, Any] = {"count": 4, "length": 48, "threads": 1}


@pytest.fixture(scope="module")
def done(traced_once: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("comparison")
    compare(MODEL, out, RECIPES, seeds=1, **SMALL)
    return out


@pytest.fixture
def copied(done: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(done, tmp_path / "copied"))


@pytest.fixture
def content(done: Path) -> dict[str, Any]:
    return dict(json.loads((done / JSON).read_text(encoding="utf-8")))


def test_each_row_is_what_eval_measures(
    done: Path, content: dict[str, Any], tmp_path: Path
) -> None:
    export(MODEL, tmp_path / "a", load_recipe("w4a4kv4"), certify=False)
    judged = evaluate(tmp_path / "a", "embedded", reference=MODEL, **SMALL)
    run = content["runs"][0]
    assert run["perplexity"] == pytest.approx(judged["perplexity"], rel=1e-6)
    assert run["kl_divergence"] == pytest.approx(judged["agreement"]["kl_divergence"], rel=1e-4)
    assert content["fp32"] == pytest.approx(judged["baselines"]["fp32"], rel=1e-9)
    assert judged["layer_snr_db"][-1] == pytest.approx(run["layer_snr_db"][-1], abs=1.5)
    assert run["loss"] == pytest.approx(math.log(run["perplexity"] / content["fp32"]))
    assert run["bytes"] == sum(
        (tmp_path / "a" / f).stat().st_size for f in ("model.onnx", "model.onnx_data")
    )


def test_a_recipe_that_quantizes_nothing_loses_nothing(content: dict[str, Any]) -> None:
    run = content["runs"][2]
    assert run["recipe"] == "rotate-only"
    assert run["loss"] == pytest.approx(0, abs=1e-5)
    assert run["top1_agreement"] == 1
    assert min(run["layer_snr_db"]) > 80


def test_noise_and_outliers_tell_rotated_from_unrotated(content: dict[str, Any]) -> None:
    rotated, unrotated, _ = content["runs"]
    assert len(rotated["layer_snr_db"]) == 4
    for ours, theirs in zip(rotated["layer_snr_db"], unrotated["layer_snr_db"], strict=True):
        assert ours > theirs + 3
    name = "mlp.down_proj"
    before = np.mean(rotated["before"][name]["max_over_rms"])
    assert np.mean(rotated["sites"][name]["max_over_rms"]) < before / 2
    assert np.mean(unrotated["sites"][name]["max_over_rms"]) > before / 2


def test_the_page_holds_every_recipe_and_every_figure(done: Path) -> None:
    page = (done / PAGE).read_text(encoding="utf-8")
    for name in RECIPES:
        assert f"<b>{name}</b>" in page
    for heading in ("The table", "Perplexity against bits", "Noise, layer by layer", "Outliers"):
        assert f"<h2>{heading}</h2>" in page
    assert page.count("<svg") == 1 + 2 + 2 * 4  # bits; two lossy recipes; four sites in pairs
    assert "tiny_qwen3" in page
    assert "<script" not in page
    assert "src=" not in page.replace('src="data:', "")


def test_the_table_is_markdown_with_a_line_per_recipe(done: Path) -> None:
    lines = (done / TABLE).read_text(encoding="utf-8").splitlines()
    assert [line.split("|")[1].strip() for line in lines[4:]] == [f"`{name}`" for name in RECIPES]
    assert {line.count("|") for line in lines[2:]} == {12}


def test_finished_runs_are_kept_and_changed_ones_are_measured_again(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[tuple[str, int]] = []
    original = Bench.measure

    def counting(self: Bench, recipe: Any, surfaces: Path) -> dict[str, Any]:
        measured.append((recipe.name, recipe.seed))
        return original(self, recipe, surfaces)

    monkeypatch.setattr(Bench, "measure", counting)
    progress: list[tuple[int, int]] = []
    compare(MODEL, copied, RECIPES, **SMALL, progress=lambda *step: progress.append(step))
    assert measured == []
    assert progress == [(1, 3), (2, 3), (3, 3)]
    (copied / RUNS / "rotate-only-seed0.json").write_text("{", encoding="utf-8")  # damaged
    compare(MODEL, copied, ["rotate-only"], **SMALL)
    assert measured == [("rotate-only", 0)]
    compare(MODEL, copied, ["rotate-only"], **{**SMALL, "length": 32})  # other windows
    assert measured == [("rotate-only", 0)] * 2


def test_a_recipe_that_fails_costs_only_its_row_and_is_tried_again(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(model_dir: Path, out: Path, recipe: Any, **options: Any) -> Any:
        if recipe.name == "w4a16":
            raise UnsupportedModelError("layers.0: <is> too odd; take another")
        return export(model_dir, out, recipe, **options)

    monkeypatch.setattr(measure_module, "export", refuse)
    with pytest.raises(UnsupportedModelError, match=r"1 of 4 runs failed, first w4a16: layers\.0:"):
        compare(MODEL, copied, ["w4a16", *RECIPES], **SMALL)
    content = json.loads((copied / JSON).read_text(encoding="utf-8"))
    assert content["runs"][0]["exit_code"] == 4
    assert len([run for run in content["runs"] if "perplexity" in run]) == 3
    assert "layers.0: &lt;is&gt; too odd" in (copied / PAGE).read_text(encoding="utf-8")
    assert "* `w4a16` seed 0: layers.0: <is> too odd" in (copied / TABLE).read_text(
        encoding="utf-8"
    )
    monkeypatch.undo()
    again = compare(MODEL, copied, ["w4a16"], **SMALL)
    assert "error" not in again["runs"][0]


@pytest.mark.parametrize(
    ("recipes", "options", "message"),
    [
        ([], {}, "--recipe: is missing; give at least one"),
        (["w4a4kv4", "w4a4kv4"], {}, "--recipe: two are named w4a4kv4"),
        (["w4a4"], {}, "recipe 'w4a4': no such preset"),
        (["w4a4kv4"], {"baseline": "w4a16"}, "--baseline w4a16: is not compared; add --recipe"),
        (["w4a4kv4"], {"settings": ["weights.bit=4"]}, "unknown key weights.bit"),
    ],
)
def test_refuses_before_anything_runs(
    recipes: list[str], options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        compare(MODEL, tmp_path / "out", recipes, **options)
    assert not (tmp_path / "out").exists()


def test_calibrated_recipes_look_at_the_calibration_text_and_at_no_other(tmp_path: Path) -> None:
    small = ["calibration.windows=4", "calibration.window_length=32"]
    found = compare(MODEL, tmp_path, ["w4a4kv4-gptq"], settings=small, **SMALL)
    assert (found["text"], found["calibration"]) == ("embedded", "embedded")
    assert found["baseline"] == "w4a4kv4-gptq"
    assert found["runs"][0]["loss"] > 0
    seen = EXAMPLES / "tiny_llama" / "calibration.txt"
    with pytest.raises(UsageError, match="of the evaluation text was seen in calibration"):
        compare(
            MODEL,
            tmp_path,
            ["w4a4kv4-gptq"],
            text=str(seen),
            **{**SMALL, "count": 32, "length": 256},
        )


def test_the_judge_computes_each_window_once() -> None:
    class Counting:
        vocabulary_size = 5
        calls = 0

        def new_cache(self, batch: int) -> Cache:
            return {}

        def step(
            self, input_ids: Ids, cache: Cache, attention_mask: Ids | None = None
        ) -> tuple[Logits, Cache]:
            self.calls += 1
            return input_ids[..., None].astype(np.float32) * np.ones(5, np.float32), cache

    model = Counting()
    judge = measure_module.Remembering(model)
    windows = np.arange(6).reshape(2, 3)
    for part in (windows[:1], windows[1:], windows[:1]):
        logits, _ = judge.step(part, judge.new_cache(1))
        np.testing.assert_array_equal(logits[0, :, 0], part[0])
    assert model.calls == 2


def run(recipe: str, seed: int, perplexity: float, **changes: Any) -> dict[str, Any]:
    return {
        "recipe": recipe,
        "seed": seed,
        "bits": "W4A4KV4",
        "perplexity": perplexity,
        "fp32": 10.0,
        "loss": math.log(perplexity / 10),
        "kl_divergence": 0.1,
        "top1_agreement": 0.8,
        "layer_snr_db": [10.0, None],
        "bytes": 1000,
        "cache_bytes_per_token": 10,
        "seconds": {"export": 1.0},
        "targets": [{"name": "onnxruntime", "reasons": []}, {"name": "tensorrt", "reasons": ["x"]}],
        "before": {},
        "sites": {},
        "sizes": {},
        "layer": 0,
        "passes": [],
        **changes,
    }


def test_seeds_are_averaged_in_log_perplexity_and_the_baseline_is_100_percent() -> None:
    runs = [run("a", 0, 11.0), run("a", 1, 13.0), run("b", 0, 12.0)]
    found = rows({"runs": runs, "baseline": "b"})
    assert [row.recipe for row in found] == ["a", "b"]
    a, b = found
    assert (a.lowest, a.highest, a.count) == (11.0, 13.0, 2)
    assert a.perplexity == pytest.approx(math.sqrt(11 * 13))
    assert a.share == pytest.approx(math.log(1.43) / 2 / math.log(1.2))
    assert (b.share, b.snr_db, b.targets) == (1.0, None, ("onnxruntime",))
    facts = {"windows": 1, "window_length": 2, "text": "t", "calibration": "c", "fp32": 10.0}
    text = table({**facts, "runs": runs, "baseline": "b"})
    assert "| of b |" in text
    assert "| 2: 11.000 to 13.000 |" in text
    assert "| 100% |" in text


def test_choices_are_drawn_and_listed(tmp_path: Path) -> None:
    records = [
        {
            "site": f"model.layers.{layer}.mlp.down_proj",
            "kind": "down_proj",
            "bits": 4,
            "symmetric": layer == 0,
            "clip_ratio": 0.7 + layer / 10,
        }
        for layer in range(2)
    ]
    passes = [{"name": "QuantizeActivations", "effect": "lossy", "sites": 2, "records": records}]
    runs = [run("w4a4kv4-clips", 0, 11.0, passes=passes, layer_snr_db=[10.0, 9.0])]
    content = {
        "runs": runs,
        "baseline": None,
        "fp32": 10.0,
        "windows": 1,
        "window_length": 2,
        "text": "t",
        "calibration": "c",
    }
    page = page_of(content, [Measured.of(runs, None)], tmp_path / "<m>" / "model", tmp_path)
    assert "<h2>What the recipes chose</h2>" in page
    assert "<td>model.layers.1.mlp.down_proj</td>" in page
    assert "Clip ratios that w4a4kv4-clips chose, by layer: 0.700 to 0.800" in page
    assert "<td>no</td>" in page
    assert "&lt;m&gt;" in page
