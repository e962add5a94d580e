# SPDX-License-Identifier: Apache-2.0
"""The gate as CI uses it: exit codes, reports, tolerances, hosts side by side."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import onnx
import pytest
import yaml
from onnx import numpy_helper

from quarot_onnx import cli
from quarot_onnx.errors import InputError
from quarot_onnx.export.triton.repository import triton_from_artifact
from quarot_onnx.validate import Stage, Verdict, formats, validate
from quarot_onnx.validate.side_by_side import load_tolerances
from tests.conftest import Exported, HuggingFace
from tests.test_validate import Planted, stage

ROOT = Path(__file__).parents[1]


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of the command line."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["quarot-onnx", *map(str, arguments)])
        patch.setenv("COLUMNS", "120")
        capsys.readouterr()  # what fixtures printed
        try:
            cli.main()
            code = 0
        except SystemExit as ended:
            code = int(ended.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


# --- Faults and exit codes ------------------------------------------------------------------------


def _head(planted: Planted) -> None:
    planted.edit_data("lm_head.weight", lambda values: np.multiply(values, 1.05, out=values))


def _output(planted: Planted) -> None:
    kept = [output for output in planted.graph.graph.output if output.name != "logits"]
    del planted.graph.graph.output[:]
    planted.graph.graph.output.extend(kept)


def _mask(planted: Planted) -> None:
    compare = planted.node("/model/LessOrEqual")
    compare.input[1] = compare.input[0]


def _hadamard(planted: Planted) -> None:
    rotation = planted.node("/model/layers.1/mlp/down_proj/R4")
    constant = np.random.default_rng(0).normal(size=(1, 1, 176)).astype(np.float32)
    planted.graph.graph.node.remove(rotation)
    planted.graph.graph.initializer.append(numpy_helper.from_array(constant, rotation.output[0]))


def _layer(planted: Planted) -> None:
    for kind in ("", "_scale"):
        first, second = (f"model.layers.{i}.self_attn.o_proj.weight{kind}" for i in (0, 2))
        planted.swap_data(first, second)


def _nan(planted: Planted) -> None:
    planted.edit_data("model.embed_tokens.weight", lambda values: values.__setitem__(5, np.nan))


@pytest.mark.parametrize("fault", [_head, _output, _mask, _hadamard, _layer, _nan])
def test_every_fault_ends_with_exit_code_10_and_one_line(
    exported: Exported,
    hugging_face: HuggingFace,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    fault: Callable[[Planted], None],
) -> None:
    planted = Planted(Path(shutil.copytree(exported("llama", "w4a4kv4"), tmp_path / "artifact")))
    fault(planted)
    artifact, junit = planted.save(), tmp_path / "junit.xml"
    code, _, err = run(
        capsys, "validate", artifact, "--reference", hugging_face("llama"), "--junit", junit
    )
    assert code == 10
    assert err.count("\n") == 1
    assert "the artifact must not be used" in err
    suite = ElementTree.parse(junit).getroot()[0]
    assert int(suite.attrib["failures"]) >= 1
    assert len(suite.findall("testcase/failure")) == int(suite.attrib["failures"])


def test_a_sound_artifact_ends_with_exit_code_0_and_writes_every_report(
    exported: Exported,
    hugging_face: HuggingFace,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary.md"))
    names = ("junit.xml", "page.html", "validation.json")
    junit, page, saved = (tmp_path / name for name in names)
    code, out, err = run(
        capsys,
        *("validate", exported("llama", "w4a4kv4"), "--reference", hugging_face("llama")),
        *("--junit", junit, "--html", page, "--save-json", saved, "--json"),
    )
    assert code == 0
    content = json.loads(out)
    assert content == json.loads(saved.read_text())
    suite = ElementTree.parse(junit).getroot()[0]
    assert suite.attrib["failures"] == "0"
    assert [case.attrib["name"] for case in suite] == [s["id"] for s in content["stages"]]
    assert int(suite.attrib["skipped"]) == len(content["skipped"]) > 0
    assert "passed" in page.read_text()
    assert "::error" not in err
    assert "::notice title=validate equivalence skipped::recipe w4a4kv4 quantizes" in err
    assert "| ✓ | outputs |" in (tmp_path / "summary.md").read_text()


def test_a_report_that_cannot_be_written_is_no_failed_gate(
    exported: Exported, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = tmp_path / "nowhere" / "junit.xml"
    code, _, err = run(capsys, "validate", exported("llama", "float"), "--junit", missing)
    assert code == 6
    assert "cannot be written" in err


# --- Reports --------------------------------------------------------------------------------------

ODD = Verdict(
    Path("<out>"),
    (
        Stage("load", "passed", "cache bytes", 3.0, None, 0.5, "runs"),
        Stage("logits", "failed", "L2", float("nan"), 0.1, 0.1, 'a "b" & <c>\x1b[31m 100%\n|d|'),
        Stage("trt", "skipped", detail="no GPU"),
        Stage("quality", "skipped", detail="no reference"),
    ),
    ("trt",),
).as_json()


def test_junit_is_well_formed_for_any_text_and_counts_a_required_skip_as_a_failure() -> None:
    suite = ElementTree.fromstring(formats.as_junit(ODD))[0]
    assert [suite.attrib[key] for key in ("tests", "failures", "skipped")] == ["4", "2", "1"]
    failure = suite.find("testcase[@name='logits']/failure")
    assert failure is not None
    assert 'a "b" & <c>' in failure.attrib["message"]
    assert suite.find("testcase[@name='trt']/failure") is not None
    assert suite.find("testcase[@name='quality']/skipped") is not None


def test_a_page_and_a_summary_escape_what_they_quote() -> None:
    page, summary = formats.as_html(ODD), formats.as_markdown(ODD)
    assert "&lt;c&gt;" in page
    assert "<c>" not in page
    assert "<c>" not in summary
    row = next(line for line in summary.splitlines() if "logits" in line)
    assert "\\|d\\|" in row


def test_annotations_are_one_line_each() -> None:
    lines = formats.as_annotations(ODD).splitlines()
    assert [line.split("::")[1].split()[0] for line in lines] == ["error", "error", "notice"]
    assert "100%25%0A|d|" in lines[0]


# --- Hosts side by side ---------------------------------------------------------------------------


def test_tolerances_of_a_file_decide_about_the_outputs(exported: Exported, tmp_path: Path) -> None:
    artifact, file = exported("llama", "w4a4kv4"), tmp_path / "tolerances.toml"
    file.write_text('["logits*"]\natol = 0.5\nstat = "mean"\n')
    found = stage(validate(artifact, threads=1, tolerances=file), "outputs")
    assert found.status == "passed"
    file.write_text('[logits]\natol = 1.0\n[logits_decode]\nstat = "max"\n')
    found = stage(validate(artifact, threads=1, tolerances=file), "outputs")
    assert found.status == "failed"
    assert "PyTorch | ort-cpu: logits_decode of ort-cpu is" in found.detail


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[logits]\natol = 1.0\n", r"t\.toml: no table for output logits_decode; add \[logits_dec"),
        ("['*']\ntol = 1.0\n", r"t\.toml: \*\.tol: Extra inputs .*; a table has atol, rtol and st"),
        ("['*']\natol = -1.0\n", r"t\.toml: \*\.atol: Input should be greater than or equal to 0"),
        ("['*'\n", r"t\.toml: cannot be read as TOML"),
    ],
)
def test_refuses_a_file_that_leaves_an_output_without_a_tolerance(
    tmp_path: Path, text: str, message: str
) -> None:
    (tmp_path / "t.toml").write_text(text)
    with pytest.raises(InputError, match=message):
        load_tolerances(tmp_path / "t.toml")


def test_hosts_that_disagree_only_in_the_cache_are_told_apart(
    exported: Exported, tmp_path: Path
) -> None:
    planted = Planted(Path(shutil.copytree(exported("llama", "w4a4kv4"), tmp_path / "artifact")))
    append = planted.node("/model/layers.0/self_attn/KvAppend_value")
    scaled = onnx.helper.make_node("Mul", [append.input[2], "factor"], ["scaled_past"])
    append.input[2] = "scaled_past"
    planted.insert_before(append.name, scaled)
    planted.graph.graph.initializer.append(numpy_helper.from_array(np.float32(1000), "factor"))
    verdict = validate(planted.save(), threads=1)
    assert stage(verdict, "logits").status == "passed"
    assert stage(verdict, "outputs").status == "failed"
    assert "logits_decode of ort-cpu" in stage(verdict, "outputs").detail


# --- Polygraphy and GitHub ------------------------------------------------------------------------


def _polygraphy(artifact: Path, *options: object) -> subprocess.CompletedProcess[str]:
    tools = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        [str(artifact / "polygraphy_run.sh"), *map(str, options)],
        env={**os.environ, "PATH": tools},
        cwd="/",
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("overrides", [(), ("kv_cache.io=float",)])
def test_the_shipped_polygraphy_command_passes_and_sees_a_fault(
    exported: Exported, tmp_path: Path, overrides: tuple[str, ...]
) -> None:
    artifact = exported("llama", "w4a4kv4", overrides)
    manifest = json.loads((artifact / "manifest.json").read_text())
    assert {"polygraphy_run.sh", "polygraphy_data.py"} <= set(manifest["files"])
    golden = tmp_path / "golden.json"
    sound = _polygraphy(artifact, "--save-outputs", golden)
    assert sound.returncode == 0, sound.stdout[-2000:] + sound.stderr
    planted = Planted(Path(shutil.copytree(artifact, tmp_path / "artifact")))
    planted.edit_data("lm_head.weight", lambda values: np.multiply(values, 1.05, out=values))
    tolerance = ("--check-error-stat", "mean", "--atol", "1e-4", "--rtol", "0")
    same = _polygraphy(artifact, "--load-outputs", golden, *tolerance)
    assert same.returncode == 0, same.stdout[-2000:]
    scaled = _polygraphy(planted.save(), "--load-outputs", golden, *tolerance)
    assert scaled.returncode == 1
    assert "FAILED" in scaled.stdout


def test_the_action_runs_the_commands_that_exist(capsys: pytest.CaptureFixture[str]) -> None:
    action = yaml.safe_load((ROOT / "action.yml").read_text())
    assert action["runs"]["using"] == "composite"
    script = "\n".join(step["run"] for step in action["runs"]["steps"])
    assert "${{" not in script  # an input pasted into a script could run anything
    for command in ("export", "validate"):
        code, out, _ = run(capsys, command, "--help")
        assert code == 0
        line = next(x for x in script.replace("\\\n", " ").splitlines() if f"x {command} " in x)
        for option in (word for word in line.split() if word.startswith("--")):
            assert option in out


# --- Triton ---------------------------------------------------------------------------------------


def test_a_triton_repository_is_checked_against_its_artifact(
    exported: Exported, tmp_path: Path
) -> None:
    source = exported("llama", "w4a4kv4")
    artifact = Path(shutil.copytree(source, tmp_path / "artifact"))
    tokenizer = ROOT / "examples" / "tiny_llama" / "model" / "tokenizer.json"
    shutil.copyfile(tokenizer, artifact / "tokenizer.json")
    repository = tmp_path / "repository"
    triton_from_artifact(artifact, repository, name="m")

    def triton(artifact: Path = artifact) -> Stage:
        verdict = validate(artifact, threads=1, triton_repository=repository, require=("triton",))
        return stage(verdict, "triton")

    assert triton().status == "passed"
    other = triton(exported("llama", "w4a4kv4", ("seed=3",)))
    assert other.status == "failed"
    assert "m serves another model.onnx" in other.detail
    config = repository / "m" / "config.pbtxt"
    text = config.read_text()
    config.write_text(text.replace('name: "m"', 'name: "n"', 1))
    changed = triton()
    assert changed.status == "failed"
    assert changed.value == 2
    config.write_text(text + "nonsense")
    assert triton().status == "failed"
