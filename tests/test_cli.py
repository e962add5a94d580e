# SPDX-License-Identifier: Apache-2.0
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from quarot_onnx import cli
from quarot_onnx.artifacts import MANIFEST
from quarot_onnx.calibration import Calibration
from quarot_onnx.errors import UnsupportedModelError
from quarot_onnx.pipeline import export
from quarot_onnx.recipe import load_recipe
from tests.conftest import Exported, HuggingFace


@dataclass
class Result:
    code: int
    out: str
    err: str


Run = Callable[..., Result]


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], traced_once: None
) -> Run:
    """The console script in this process: arguments -> exit code and what it printed."""

    def call(*arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["quarot-onnx", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "120")
        capsys.readouterr()  # what fixtures printed
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        captured = capsys.readouterr()
        return Result(int(stopped.value.code or 0), captured.out, captured.err)

    return call


def test_help_answers_at_once_without_heavy_modules() -> None:
    code = (
        "import sys; sys.argv = ['quarot-onnx', '--help']\n"
        "from quarot_onnx.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'onnx', 'onnx_ir', 'onnxruntime', 'numpy', 'pydantic'}\n"
        "print(sorted(heavy & set(sys.modules)), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"
    assert "accuracy gate failed" in done.stdout


def test_export_writes_an_artifact_and_says_what_each_pass_did(
    run: Run, hugging_face: HuggingFace, tmp_path: Path
) -> None:
    result = run("export", hugging_face("llama"), tmp_path / "out", "--recipe", "w4a4kv4")
    assert result.code == 0
    assert (tmp_path / "out" / "model.onnx").is_file()
    for line in ("FuseR1", "randomized hadamard 12 x 8", "QuantizeKvCache", "wrote"):
        assert line in result.out
    assert result.err == ""  # no progress bar in a pipe


def test_export_prints_the_manifest_as_json(
    run: Run, hugging_face: HuggingFace, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    result = run("export", hugging_face("llama"), out, "-r", "rotate-only", "--json")
    assert json.loads(result.out) == json.loads((out / MANIFEST).read_text())


def test_a_dry_run_prints_the_plan_and_writes_nothing(
    run: Run, hugging_face: HuggingFace, tmp_path: Path
) -> None:
    arguments = ("export", hugging_face("qwen3-head-dim"), tmp_path / "out", "--dry-run")
    table, plain = run(*arguments), run(*arguments, "--json")
    assert "R4: down_proj input" in table.out
    assert "44 x 4" in table.out
    plan = json.loads(plain.out)
    assert {site["name"]: site["runs"] for site in plan["sites"]} == {
        "R1": "offline",
        "R2": "offline",
        "heads": "online",
        "R3": "online",
        "R4": "online",
    }
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "overrides", [(), ("weights.group_size=16",), ("weights.symmetric=false", "weights.bits=8")]
)
def test_a_dry_run_forecasts_the_sizes_that_the_export_has(
    run: Run, hugging_face: HuggingFace, exported: Exported, overrides: tuple[str, ...]
) -> None:
    options = ["--dry-run", "--json", *(f"--set={override}" for override in overrides)]
    plan = json.loads(run("export", hugging_face("llama"), "unused", *options).out)
    artifact = exported("llama", "w4a4kv4", overrides)
    stored = (artifact / "model.onnx_data").stat().st_size
    assert plan["weight_bytes"] + plan["float_bytes"] == pytest.approx(stored, rel=0.02)
    found = json.loads(run("inspect", artifact, "--json").out)
    assert found["weight_bytes"] == pytest.approx(stored, rel=0.1)  # and small ones kept inline


def test_a_dry_run_plans_learned_and_given_matrices(
    run: Run, hugging_face: HuggingFace, tmp_path: Path
) -> None:
    arguments = ("export", hugging_face("llama"), tmp_path / "out", "--dry-run", "--json")
    recipe = ("-r", "w4a4kv4-learned-g64", "--set=activations.group_size=48")
    learned = json.loads(run(*arguments, *recipe).out)
    assert [(site["name"], site["how"], site["cost"]) for site in learned["sites"]] == [
        ("R1", "learned 96", 0),
        ("R2", "learned 24", 0),
        ("qkv", "learned 8 x 12", 96 * 20),
        ("heads", "learned 4", 4 * 4 * 24),
        ("R3", "learned 24", 24 * 24 * 2 * 4),
        ("gate_up", "learned 8 x 12", 96 * 20),
        ("R4", "learned 11 x 16", 176 * 27),
    ]
    file = tmp_path / "matrices.safetensors"
    places = (f"model.layers.{layer}.mlp.down_" for layer in range(3))
    sizes = (("A", 4), ("B", 44))
    save_file({f"{place}{side}": np.eye(n) for place in places for side, n in sizes}, file)
    given = json.loads(run(*arguments, "--transforms", file).out)
    assert [site["how"] for site in given["sites"]] == [
        "randomized hadamard 12 x 8",
        "hadamard 12 x 2",
        "hadamard 2 x 2",
        "hadamard 12 x 2",
        "given 4 x 44",
    ]
    assert run(*arguments[:-1], "--transforms", file).code == 0
    assert list(tmp_path.iterdir()) == [file]


def test_a_dry_run_says_that_a_given_r1_does_not_run_behind_post_norms(
    run: Run, hugging_face: HuggingFace, tmp_path: Path
) -> None:
    size = json.loads((hugging_face("gemma2") / "config.json").read_text())["hidden_size"]
    save_file({"R1": np.eye(size)}, tmp_path / "r1.safetensors")
    options = ("--dry-run", "--json", "--transforms", tmp_path / "r1.safetensors")
    plan = json.loads(run("export", hugging_face("gemma2"), tmp_path / "out", *options).out)
    site = plan["sites"][0]
    assert (site["name"], site["runs"], site["how"]) == ("R1", "skipped", f"given {size}")
    assert "post-norms keep their scale" in site["reason"]


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        (
            "llama",
            ("--set=activations.group_size=24", "--set=weights.group_size=32"),
            "q_proj: in_features = 96 has groups of 24 in the activation and of 32 in the weight, "
            "which only parts of 8 divide; set weights.group_size = 24 or activations.group_size "
            "= 0",
        ),
        (
            "llama",
            ("--set=activations.group_size=7",),
            "q_proj: in_features = 96 is no multiple of activations.group_size = 7",
        ),
        (
            "llama",
            ("--set=kv_cache.group_size=7",),
            "attention: head_dim = 24 is no multiple of kv_cache.group_size = 7",
        ),
        ("llama", ("--transforms=none.safetensors",), "none.safetensors: no such file; give a"),
        ("gemma2", ("-r", "w4a4kv4-learned"), "config.json: learning is written for llama, mist"),
    ],
)
def test_a_dry_run_refuses_what_does_not_fit_the_model(
    run: Run, hugging_face: HuggingFace, tmp_path: Path, family, options, message
) -> None:
    result = run("export", hugging_face(family), tmp_path / "out", "--dry-run", *options)
    assert result.code != 0
    assert message in result.err
    assert len(result.err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_groups_that_do_not_fit_are_refused_before_anything_is_calibrated(
    traced_once: None, hugging_face: HuggingFace, tmp_path: Path
) -> None:
    groups = ["activations.group_size=24", "weights.group_size=32"]
    tokens = np.zeros((1, 4), np.int64)
    with pytest.raises(UnsupportedModelError, match=r"^q_proj: in_features = 96 has groups of 24"):
        export(
            hugging_face("llama"),
            tmp_path / "out",
            load_recipe("w4a4kv4-gptq", groups),
            calibration=Calibration.of(tokens, "zeros"),
        )


@pytest.mark.parametrize("recipe", ["w4a4kv4", "w4a4kv4-learned"])
def test_a_dry_run_does_not_import_torch(hugging_face: HuggingFace, tmp_path: Path, recipe) -> None:
    code = (
        "import sys\n"
        "from quarot_onnx.cli import main\n"
        f"arguments = [{str(hugging_face('llama'))!r}, 'out', '--dry-run', '-r', {recipe!r}]\n"
        "sys.argv[1:] = ['export', *arguments]\n"
        "try: main()\n"
        "except SystemExit as stopped: assert not stopped.code\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, capture_output=True)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("export", "nowhere", "out"), 3, "no such directory"),
        (("export", "MODEL", "out", "--recipe", "w4a4kv"), 2, "did you mean 'w4a4kv4'"),
        (("export", "MODEL", "out", "--set", "weigths.bits=4"), 2, "did you mean weights.bits"),
        (("export", "MODEL", "out", "--set", "weights.bits=9"), 2, "7, 8 or 16"),
        (("export", "MODEL", "out", "--set", "weights.bits"), 2, "not KEY=VALUE"),
        (("inspect", "MODEL"), 3, "manifest.json"),
        (("generate", "MODEL", "-p", "x"), 3, "manifest.json"),
        (("eval", "MODEL", "--text", "nowhere.txt"), 3, "manifest.json"),
        (("validate", "MODEL"), 3, "manifest.json"),
    ],
)
def test_a_mistake_is_one_line_with_its_exit_code(
    run: Run,
    hugging_face: HuggingFace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    code: int,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    model = str(hugging_face("llama"))
    result = run(*(model if argument == "MODEL" else argument for argument in arguments))
    assert result.code == code
    assert message in result.err
    assert len(result.err.strip().splitlines()) == 1
    assert result.err.startswith("quarot-onnx: ")
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_option_is_a_usage_error(run: Run) -> None:
    assert run("export", "--no-such-option").code == 2


def test_inspect_shows_bits_and_rotations(run: Run, exported: Exported) -> None:
    artifact = exported("llama", "w4a4kv4")
    found = json.loads(run("inspect", artifact, "--json").out)
    rows = {row["name"]: row for row in found["linears"] if row["layer"] == 2}
    assert rows["mlp.down_proj"]["rotation"] == "44 x 4"
    assert rows["self_attn.o_proj"]["rotation"] == "2 x 2 across heads"
    assert {(r["weight_bits"], r["activation_bits"]) for r in rows.values()} == {(4, 4)}
    head = [row for row in found["linears"] if row["layer"] is None]
    assert [(row["name"], row["weight_bits"]) for row in head] == [("lm_head", 32)]
    table = run("inspect", artifact)
    assert re.search(r"R1 +residual stream +fused +randomized", table.out)
    assert "layer 0 (of 3)" in table.out
    assert "past_key_values.0.key_scale" in table.out


def test_inspect_of_a_damaged_graph_is_bad_input(
    run: Run, exported: Exported, tmp_path: Path
) -> None:
    artifact = exported("llama", "w4a4kv4")
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / MANIFEST).write_bytes((artifact / MANIFEST).read_bytes())
    (damaged / "model.onnx").write_bytes(b"not protobuf")
    result = run("inspect", damaged)
    assert result.code == 3
    assert "model.onnx" in result.err


def test_recipes_are_listed_and_shown(run: Run) -> None:
    names = [recipe["name"] for recipe in json.loads(run("recipes", "--json").out)]
    assert {"float", "rotate-only", "w4a4kv4", "w4a4kv4-unrotated", "w8a8kv8"} <= set(names)
    assert "clip_ratio = 0.95" in run("recipes", "w4a4kv4").out
    assert run("recipes", "nothing-like-it").code == 2


def test_doctor_reports_packages_and_what_is_missing(run: Run) -> None:
    findings = {entry["name"]: entry for entry in json.loads(run("doctor", "--json").out)}
    assert findings["onnxruntime"]["found"]
    assert findings["torch"]["found"]
    for entry in findings.values():
        assert entry["found"] or entry["remedy"]


def test_doctor_finds_two_runtimes_in_one_place(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quarot_onnx.doctor._version", lambda package: "1.0")
    result = run("doctor")
    assert result.code == 5
    assert "both install the same module" in result.out


def test_the_version_is_the_package_s(run: Run) -> None:
    assert run("--version").out.strip() == "0.1.0"


def test_a_closed_pipe_is_no_error(exported: Exported) -> None:
    artifact = exported("llama", "w4a4kv4")
    code = "from quarot_onnx.cli import main; main()"
    with subprocess.Popen(
        [sys.executable, "-c", code, "inspect", str(artifact), "--json", "--all-layers"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        errors = process.stderr.read()
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
    assert b"Traceback" not in errors
