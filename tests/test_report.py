# SPDX-License-Identifier: Apache-2.0
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from quarot_onnx.activations import SITES, Activation, Statistics, Surface
from quarot_onnx.errors import InputError, MissingDependencyError, ResourceError
from quarot_onnx.pages import byte_size, number
from quarot_onnx.pipeline import export
from quarot_onnx.recipe import load_recipe
from quarot_onnx.report import report_artifact, write_report
from quarot_onnx.report.content import (
    ModelFacts,
    PassEntry,
    Perplexity,
    ReportContent,
    Sample,
    Size,
    Stage,
    Validation,
    rotation_plan,
)
from tests import models

VOID = {"meta", "link", "br", "hr", "img", "input", "path", "use", "image", "rect", "circle"}
CONFIG = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "hidden_size": 96,
    "intermediate_size": 172,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 2048,
}
PASSES = (
    PassEntry("FuseNormScale", "equivalent", 5),
    PassEntry("FuseR1", "equivalent", 16, "randomized hadamard 12 x 8"),
    PassEntry("InsertHeadsHadamard", "equivalent", 0, "", {"no matrix of order 6": ["o_proj"]}),
    PassEntry("InsertR4", "equivalent", 2, "hadamard 172"),
    PassEntry("QuantizeWeights", "lossy", 14, "4 bits, round to nearest"),
)


def _activations() -> dict[str, Activation]:
    random = np.random.default_rng(0)
    before = random.standard_normal((20, 96)).astype(np.float32)
    before[:, 11] *= 40
    after = random.standard_normal((20, 96)).astype(np.float32)
    statistics = (Statistics(9.61, 55.5, 81.25, 7.77), Statistics(9.0, 50.0, 70.0, 8.0))
    rotated = (Statistics(2.71, 4.44, 3.14, 19.3), Statistics(2.8, 4.5, 3.2, 19.0))
    return {
        site: Activation(site, 96, statistics, rotated, {0: Surface(before, after)})
        for site in SITES
    }


def _content() -> ReportContent:
    return ReportContent(
        title="tiny in four bits",
        model=ModelFacts.from_config(CONFIG, name="tiny", parameters=4_123_456, dtype="float16"),
        recipe="w4a4kv4",
        perplexity=Perplexity(
            13.02, 12.31, 431.2, 212.7, 13.07, "32 windows of 256 tokens", "quarot-onnx eval out"
        ),
        weights=Size(16_400_000, 5_310_000, 4.13, "quarot-onnx inspect out"),
        cache=Size(12_288, 2304),
        validation=Validation(
            (
                Stage("rotations", "passed", "equals Hugging Face", 3.25e-6, 1e-4),
                Stage("decode", "failed", "top-1 agreement", 0.953, 0.96),
                Stage("tensorrt", "skipped", "no GPU here"),
            ),
            "quarot-onnx validate out",
        ),
        passes=PASSES,
        sample=Sample("def read(", "path):\n    return 1", "quarot-onnx generate out"),
        commands=(("Export", "quarot-onnx export model out"),),
        timing=(("export", 11.2), ("evaluation", 61.3)),
    )


class _Page(HTMLParser):
    """Checks that tags nest, and collects text and attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.loads: list[str] = []
        self.text = ""
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self._collect(attributes)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self._collect(attributes)

    def _collect(self, attributes: list[tuple[str, str | None]]) -> None:
        for name, value in attributes:
            assert not name.startswith("on"), f"event handler {name}"
            if name == "id":
                self.ids.append(value or "")
            if name in ("src", "href", "xlink:href", "data", "action", "srcset"):
                self.loads.append(value or "")

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.text += data


def _write(content: ReportContent, directory: Path) -> str:
    path = directory / "report.html"
    write_report(path, content)
    return path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    content = replace(
        _content(), activations=_activations(), activations_text="20 tokens of a text"
    )
    return _write(content, tmp_path_factory.mktemp("report"))


def test_the_page_is_well_formed_and_its_ids_are_unique(page: str) -> None:
    parsed = _Page(page)
    assert parsed.tags.count("svg") == 3 * len(SITES)
    assert len(parsed.ids) == len(set(parsed.ids))


def test_the_page_loads_nothing(page: str) -> None:
    parsed = _Page(page)
    assert "http://" not in page
    assert "https://" not in page
    assert not {"script", "link", "iframe", "object", "embed", "base"} & set(parsed.tags)
    assert all(load.startswith(("#", "data:image/png;base64,")) for load in parsed.loads)
    inside = {f"#{name}" for name in parsed.ids}
    assert all(load in inside for load in parsed.loads if load.startswith("#"))
    assert "@import" not in page
    assert all(target in inside for target in re.findall(r"url\(([^)]*)\)", page))
    assert "default-src 'none'" in page


def test_the_page_holds_every_number_it_was_given(page: str) -> None:
    text = re.sub(r"[ \n]+", " ", _Page(page).text)
    for shown in (
        *("13.02", "12.31", "431.2", "13.07", "212.7", "98.4", "32 windows of 256 tokens"),
        *("16.4\xa0MB", "5.31\xa0MB", "3.09 times", "4.13 bits per weight"),
        *("12.3\xa0kB", "2\u202f304\xa0bytes", "5.33 times"),
        *("3.25e-06", "1.00e-04", "0.953", "0.960", "1 failed, 1 skipped", "no GPU here"),
        *("4,123,456", "2,048", "float16", "11.2\xa0s", "1\xa0min 01\xa0s"),
        *("9.61", "2.71", "81.2", "3.14", "7.77 dB", "19.3 dB", "20 tokens of a text"),
        *("randomized hadamard 12 x 8", "hadamard 172", "no matrix of order 6"),
        *("quarot-onnx eval out", "quarot-onnx inspect out", "quarot-onnx validate out"),
        *("quarot-onnx export model out", "def read(path):"),
    ):
        assert shown in text, shown


def test_the_page_is_small_and_the_same_each_time(page: str, tmp_path: Path) -> None:
    assert len(page) < 2_000_000
    content = replace(
        _content(), activations=_activations(), activations_text="20 tokens of a text"
    )
    assert _write(content, tmp_path) == page


def test_hostile_names_are_text(tmp_path: Path) -> None:
    hostile = "<script>alert(1)</script><img src=x onerror=alert(1)>\"'"
    content = _content()
    content = replace(
        content,
        title=hostile,
        recipe=hostile,
        bits=hostile,
        model=replace(content.model, name=hostile, architecture=hostile),
        passes=(PassEntry("FuseR1", hostile, 1, hostile, {hostile: [hostile]}),),
        sample=Sample(hostile, hostile, hostile),
        validation=Validation((Stage(hostile, "passed", hostile),), hostile),
        commands=((hostile, hostile),),
        timing=((hostile, 1.0),),
    )
    written = _write(content, tmp_path)
    parsed = _Page(written)
    assert "<script" not in written
    assert not {"script", "img"} & set(parsed.tags)
    assert hostile in parsed.text


def test_parts_that_are_missing_are_left_out(tmp_path: Path) -> None:
    full = _content()
    parsed = _Page(_write(ReportContent("a title", full.model, "w4a4kv4"), tmp_path))
    for absent in ("Validation", "Perplexity", "Outliers", "Reproduce", "own words", "None"):
        assert absent not in parsed.text
    assert "a title" in parsed.text


def test_a_diverged_baseline_is_said_and_not_scored(tmp_path: Path) -> None:
    perplexity = Perplexity(13.0, 12.0, float("inf"))
    assert perplexity.damage_removed is None
    parsed = _Page(_write(replace(_content(), perplexity=perplexity), tmp_path))
    assert "∞ at the same bits without rotation" in re.sub(r"[ \n]+", " ", parsed.text)
    assert "Damage removed" not in parsed.text


def test_damage_removed_is_measured_in_log_perplexity() -> None:
    assert Perplexity(20.0, 10.0, 1000.0).damage_removed == pytest.approx(
        1 - np.log(2) / np.log(100)
    )
    assert Perplexity(20.0, 10.0, 10.0).damage_removed is None
    assert Perplexity(20.0).damage_removed is None


def test_the_plan_names_every_rotation_and_what_became_of_it() -> None:
    plan = rotation_plan(_content().model, PASSES)
    assert [(row.name, row.size, row.runs) for row in plan] == [
        ("R1", 96, "fused into weights"),
        ("R2", 16, "not in the recipe"),
        ("heads", 6, "skipped"),
        ("R3", 16, "not in the recipe"),
        ("R4", 172, "online"),
    ]
    assert plan[2].reason == "no matrix of order 6"


def test_the_plan_names_matrices_that_stand_in_place_of_rotations() -> None:
    given = ("FuseValueTransform", "InsertInputTransform", "InsertDownTransform")
    passes = tuple(PassEntry(name, "equivalent", 3, "given 2 x 4") for name in given)
    plan = {row.name: (row.runs, row.matrix) for row in rotation_plan(_content().model, passes)}
    assert plan == {
        "R1": ("not in the recipe", ""),
        "R2": ("fused into weights", "given 2 x 4"),
        "heads": ("not in the recipe", ""),
        "R3": ("not in the recipe", ""),
        "R4": ("online", "given 2 x 4"),
        "inputs": ("online", "given 2 x 4"),
    }


def test_passes_are_read_from_a_manifest() -> None:
    entry = {"name": "FuseR1", "effect": "equivalent", "sites": 3, "detail": "", "skipped": {}}
    assert PassEntry.from_manifest({"passes": [entry]}) == (PassEntry("FuseR1", "equivalent", 3),)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (12.3456, "12.35"),
        (0.05612, "0.05612"),
        (431.0, "431.0"),
        (98765.4, "98\u202f765"),
        (0.0, "0"),
        (1e-6, "1.000e-06"),
        (float("inf"), "∞"),
        (float("nan"), "not a number"),
        (None, "–"),
    ],
)
def test_numbers_have_four_significant_digits(value: float | None, shown: str) -> None:
    assert number(value) == shown


def test_sizes_are_in_decimal_units() -> None:
    sizes = [byte_size(n) for n in (12, 9_999, 12_288, 5_310_000, 40_000_000_000)]
    expected = ["12 bytes", "9\u202f999 bytes", "12.3 kB", "5.31 MB", "40.0 GB"]
    assert [size.replace("\xa0", " ") for size in sizes] == expected


@pytest.mark.parametrize("package", ["jinja2", "matplotlib"])
def test_a_missing_package_says_what_to_install(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    content = replace(_content(), activations=_activations())
    with pytest.raises(MissingDependencyError, match=rf"{package}: .*quarot-onnx\[report\]"):
        write_report(tmp_path / "report.html", content)


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match=r"absent/report.html: cannot be written \(No such"):
        write_report(tmp_path / "absent" / "report.html", _content())


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with ``model``, ``artifact`` and ``text``; the model has a tokenizer."""
    directory = tmp_path_factory.mktemp("exported")
    model = models.save(models.build("llama"), directory / "model")
    words = {f"w{index}": index for index in range(models.COMMON["vocab_size"])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(model / "tokenizer.json"))
    export(model, directory / "artifact", load_recipe("w4a4kv4"))
    (directory / "text").write_text(" ".join(f"w{index % 97}" for index in range(400)))
    return directory


def test_an_artifact_is_reported_from_its_files_alone(exported: Path, tmp_path: Path) -> None:
    evaluation = {
        "perplexity": 131.5,
        "windows": 3,
        "window_length": 16,
        "decode": {"perplexity": 131.6},
        "baselines": {"fp32": 125.5, "unrotated": 777.5, "folded": 555.5},
    }
    stage = {"id": "causality", "status": "passed", "detail": "fine", "value": 0.5}
    report_artifact(
        tmp_path / "report.html",
        exported / "artifact",
        exported / "model",
        exported / "text",
        prompt="w5 w6",
        evaluation=evaluation,
        validation={"stages": [stage]},
    )
    text = re.sub(r"[ \n]+", " ", _Page((tmp_path / "report.html").read_text()).text)
    assert f"{exported.name} in W4A4KV4" in text
    for shown in ("131.5", "131.6", "125.5", "777.5", "555.5", "3 windows of 16 tokens"):
        assert shown in text
    for shown in ("causality", "fine", "the first 256 tokens of text", "w5 w6", "hadamard 44 x 4"):
        assert shown in text
    assert f"--text {exported / 'text'} --reference {exported / 'model'}" in text
    assert "3 layers" in text


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"evaluation": {"score": 1}},
            "evaluation: not what `quarot-onnx eval --save-json` writes",
        ),
        ({"validation": {"stages": [1]}}, "validation: not what `quarot-onnx validate --save"),
    ],
)
def test_results_of_another_kind_are_refused(
    given: dict[str, dict[str, object]], message: str, exported: Path, tmp_path: Path
) -> None:
    page, artifact = tmp_path / "report.html", exported / "artifact"
    with pytest.raises(InputError, match=re.escape(message)):
        report_artifact(page, artifact, exported / "model", exported / "text", **given)
    assert not page.exists()
