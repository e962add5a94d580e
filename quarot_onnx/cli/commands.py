# SPDX-License-Identifier: Apache-2.0
"""The commands: arguments in, tables or JSON out; the work is elsewhere.

Heavy modules are imported by the commands that use them, so that ``--help`` answers at once.
"""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from quarot_onnx.cli import tables
from quarot_onnx.cli.output import (
    emit,
    load_json,
    print_json,
    progress_bar,
    progress_phases,
    write,
)
from quarot_onnx.errors import QuarotError, UsageError

if TYPE_CHECKING:
    from quarot_onnx.calibration import Calibration
    from quarot_onnx.recipe import Recipe as Resolved

EXIT_CODES = """Exit codes: 0 ok, 1 a bug, 2 usage or recipe, 3 bad input, 4 unsupported model,
5 environment, 6 disk or memory, 10 accuracy gate failed."""

app = typer.Typer(
    help="Hugging Face decoder LLMs to rotated W4A4KV4 ONNX (QuaRot, arXiv 2404.00456).",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

ModelDir = Annotated[Path, typer.Argument(help="A local Hugging Face directory (safetensors).")]
Artifact = Annotated[Path, typer.Argument(help="A directory that `export` wrote.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON to standard output.")]
SaveJson = Annotated[
    Path | None, typer.Option("--save-json", help="Write the JSON to this file, too.")
]
Recipe = Annotated[str, typer.Option("--recipe", "-r", help="A preset or a .toml file.")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change one value of the recipe; repeatable."),
]
Dtype = Annotated[
    Literal["float32", "float16", "bfloat16"],
    typer.Option(help="The dtype of the float parts."),
]
Runtime = Annotated[
    Literal["ort-cpu", "ort-cuda", "tensorrt"], typer.Option(help="Where the model runs.")
]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads of the runtime.")]
TrustEngine = Annotated[
    bool,
    typer.Option(
        "--trust-engine", help="Run an engine that its manifest does not vouch for: native code."
    ),
]
Text = Annotated[
    str,
    typer.Option(
        "--text",
        metavar="TEXT",
        help="A .txt, .jsonl or .parquet file, `embedded`, or a data set such as wikitext2.",
    ),
]
Windows = Annotated[
    str,
    typer.Option(
        metavar="N|all",
        help="How many windows of text, evenly spaced; `all` reads it as the literature does.",
    ),
]
WindowLength = Annotated[int, typer.Option(min=2, help="Tokens of a window.")]


def main() -> None:
    """Run the command line; the console script."""
    try:
        app(prog_name="quarot-onnx")
    except QuarotError as error:
        _fail(str(error), error.exit_code)
    except MemoryError:
        _fail("memory: exhausted; close other programs or take a larger machine", 6)
    except KeyboardInterrupt:
        _fail("interrupted; nothing was left behind", 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)


def _fail(message: str, code: int) -> None:
    print(f"quarot-onnx: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)


# --- Commands -------------------------------------------------------------------------------------


@app.command()
def export(
    model_dir: ModelDir,
    out_dir: Annotated[Path, typer.Argument(help="Where the artifact goes; created.")],
    recipe: Recipe = "w4a4kv4",
    settings: Settings = None,
    dtype: Dtype = "float32",
    calibration: Annotated[
        str,
        typer.Option(
            help="What calibrated methods look at: a .txt, .jsonl or .parquet file, or one of "
            "embedded, wikitext2, wikitext103, c4, ptb, pile."
        ),
    ] = "embedded",
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Keep what is finished in OUT_DIR.calibration; go on there."),
    ] = False,
    transforms: Annotated[
        Path | None,
        typer.Option(help="Matrices (.safetensors) in place of the recipe's; none is learned."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing artifact.")] = False,
    certify: Annotated[
        bool,
        typer.Option(
            "--certify/--no-certify",
            help="Measure what each rotation changed; costs about as much as the export.",
        ),
    ] = True,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan, sizes and memory; write nothing.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Export a Hugging Face model to a rotated, quantized ONNX artifact."""
    from quarot_onnx.export.checkpoint import Checkpoint  # noqa: PLC0415
    from quarot_onnx.forecast import as_json as forecast_json  # noqa: PLC0415
    from quarot_onnx.forecast import forecast  # noqa: PLC0415
    from quarot_onnx.recipe import load_recipe  # noqa: PLC0415

    resolved = load_recipe(recipe, settings or ())
    if dry_run:
        found = forecast(Checkpoint(model_dir), resolved, dtype, transforms)
        emit(forecast_json(found), as_json, lambda: tables.show_forecast(forecast_json(found)))
        return
    from quarot_onnx.pipeline import export as run_export  # noqa: PLC0415

    with progress_phases() as phase:
        manifest = run_export(
            model_dir,
            out_dir,
            resolved,
            dtype=dtype,
            calibration=_calibration(model_dir, calibration, resolved),
            transforms=transforms,
            force=force,
            certify=certify,
            resume=resume,
            progress=phase("writing weights", "MB"),
            calibrating=phase("calibrating", "steps"),
        )
    emit(manifest, as_json, lambda: tables.show_manifest(out_dir, manifest))


@app.command()
def validate(
    artifact: Artifact,
    reference: Annotated[
        Path | None, typer.Option(help="The Hugging Face directory it was exported from.")
    ] = None,
    require: Annotated[
        list[str] | None, typer.Option(help="A stage that must not be skipped; repeatable.")
    ] = None,
    engine: Annotated[
        Path | None, typer.Option(help="An engine that `build` made of it: stages outputs and trt.")
    ] = None,
    triton_repository: Annotated[
        Path | None, typer.Option(help="A repository that `triton` made of it: stage triton.")
    ] = None,
    tolerances: Annotated[
        Path | None,
        typer.Option(help="TOML: atol, rtol and stat of each output that hosts are compared by."),
    ] = None,
    bisect: Annotated[
        bool,
        typer.Option("--bisect", help="Find the first layer and tensor that leave the reference."),
    ] = False,
    runtime: Runtime = "ort-cpu",
    threads: Threads = None,
    as_json: Json = False,
    save_json: SaveJson = None,
    junit: Annotated[Path | None, typer.Option(help="Write JUnit XML to this file.")] = None,
    page: Annotated[Path | None, typer.Option("--html", help="Write a page to this file.")] = None,
) -> None:
    """Check an artifact against PyTorch; exit code 10 where it is worse or altered."""
    if bisect:
        _bisect(artifact, reference, as_json, save_json)
        return
    from quarot_onnx.validate import formats  # noqa: PLC0415
    from quarot_onnx.validate import validate as run_validate  # noqa: PLC0415

    verdict = run_validate(
        artifact,
        reference,
        require=tuple(require or ()),
        tolerances=tolerances,
        engine=engine,
        triton_repository=triton_repository,
        runtime=runtime,
        threads=threads,
    )
    content = verdict.as_json()
    if junit is not None:
        write(junit, formats.as_junit(content))
    if page is not None:
        write(page, formats.as_html(content))
    if os.environ.get("GITHUB_ACTIONS") == "true":
        sys.stderr.write(formats.as_annotations(content))
        if summary := os.environ.get("GITHUB_STEP_SUMMARY"):
            write(Path(summary), formats.as_markdown(content), mode="a")
    emit(content, as_json, lambda: tables.show_verdict(content), save_json)
    verdict.require_passed()


def _bisect(artifact: Path, reference: Path | None, as_json: bool, save_json: Path | None) -> None:
    from quarot_onnx.validate.subject import Subject  # noqa: PLC0415
    from quarot_onnx.validate.twin import bisect  # noqa: PLC0415

    found = bisect(Subject(artifact, reference))
    content = found.as_json()
    emit(content, as_json, lambda: tables.show_bisection(content), save_json)
    found.require_followed(artifact)


@app.command()
def build(
    artifact: Artifact,
    engine_dir: Annotated[Path, typer.Argument(help="Where the engine goes; created.")],
    onnx_only: Annotated[
        bool, typer.Option("--onnx-only", help="Lower and lint the graph; build no engine.")
    ] = False,
    max_batch: Annotated[int, typer.Option(min=1, help="Rows.")] = 1,
    max_input_len: Annotated[
        int | None, typer.Option(min=1, help="Tokens of one step; 512 at most by default.")
    ] = None,
    max_seq_len: Annotated[int, typer.Option(min=1, help="Tokens of a row: the cache.")] = 2048,
    tensorrt_version: Annotated[
        str | None,
        typer.Option(help="With --onnx-only: the TensorRT to lower for, such as 10.13."),
    ] = None,
    activation_layout: Annotated[
        Literal["packed", "split"],
        typer.Option(help="Of codes between plugins; split is for compute capability 9.0."),
    ] = "packed",
    timing_cache: Annotated[
        Path | None, typer.Option(help="Read and written: what earlier builds measured.")
    ] = None,
    workspace_mb: Annotated[int | None, typer.Option(min=1, help="Scratch memory.")] = None,
    optimization_level: Annotated[
        int | None, typer.Option(min=0, max=5, help="TensorRT's builder level.")
    ] = None,
    weight_streaming: Annotated[
        bool, typer.Option("--weight-streaming", help="Keep weights in host memory.")
    ] = False,
    version_compatible: Annotated[
        bool, typer.Option("--version-compatible", help="Later minor releases can run it.")
    ] = False,
    refit: Annotated[bool, typer.Option("--refit", help="Weights can be replaced.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing directory.")] = False,
    as_json: Json = False,
) -> None:
    """Lower an artifact for TensorRT, lint it, and build its engine."""
    from quarot_onnx.export.tensorrt import engine  # noqa: PLC0415

    limits = engine.Limits(max_batch, max_input_len or min(512, max_seq_len), max_seq_len)
    options = engine.BuildOptions(
        onnx_only=onnx_only,
        tensorrt_version=tensorrt_version,
        activation_layout=activation_layout,
        timing_cache=timing_cache,
        workspace_mb=workspace_mb,
        optimization_level=optimization_level,
        weight_streaming=weight_streaming,
        version_compatible=version_compatible,
        refit=refit,
    )
    with progress_bar("writing weights") as progress:
        manifest = engine.build(
            artifact, engine_dir, limits, options, force=force, progress=progress
        )
    emit(manifest, as_json, lambda: tables.show_build(engine_dir, manifest))


@app.command(name="eval")
def evaluate(
    artifact: Artifact,
    text: Text,
    windows: Windows = "32",
    window_length: WindowLength = 256,
    reference: Annotated[
        Path | None,
        typer.Option(help="Also evaluate this model in fp32, and the recipe without rotations."),
    ] = None,
    decode: Annotated[
        bool, typer.Option("--decode", help="Also token by token through the cache.")
    ] = False,
    runtime: Runtime = "ort-cpu",
    threads: Threads = None,
    trust_engine: TrustEngine = False,
    as_json: Json = False,
    save_json: SaveJson = None,
) -> None:
    """Measure perplexity on a text file."""
    from quarot_onnx.evaluate import evaluate as run_evaluate  # noqa: PLC0415

    with progress_bar("evaluating", "windows") as progress:
        content = run_evaluate(
            artifact,
            text,
            count=_window_count(windows),
            length=window_length,
            reference=reference,
            decode=decode,
            runtime=runtime,
            threads=threads,
            trust_engine=trust_engine,
            progress=progress,
        )
    emit(content, as_json, lambda: tables.show_evaluation(content), save_json)


@app.command()
def generate(
    artifact: Artifact,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="The text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Stop after so many tokens.")] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="Nucleus sampling.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Of the sampling.")] = 0,
    runtime: Runtime = "ort-cpu",
    threads: Threads = None,
    trust_engine: TrustEngine = False,
    as_json: Json = False,
) -> None:
    """Continue a prompt, one token at a time through the quantized cache."""
    from quarot_onnx import runtime as run  # noqa: PLC0415
    from quarot_onnx.runtime import generation  # noqa: PLC0415

    model = run.load_model(artifact, runtime=runtime, threads=threads, trust_engine=trust_engine)
    tokenizer = run.load_tokenizer(artifact)
    ids = generation.generate(
        model,
        tokenizer.encode(prompt),
        max_new_tokens=max_new_tokens,
        eos_token_ids=run.eos_token_ids(artifact),
        temperature=temperature,
        top_p=top_p,
        seed=seed,
    )
    pieces = tokenizer.stream(ids)
    if as_json:
        print_json({"prompt": prompt, "completion": "".join(pieces)})
        return
    sys.stdout.write(prompt)
    for piece in pieces:
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")


@app.command()
def triton(
    artifact: Annotated[Path, typer.Argument(help="What `export` or `build` wrote.")],
    repository: Annotated[Path, typer.Argument(help="Where the repository goes; created.")],
    name: Annotated[
        str | None, typer.Option(help="The model's name; the artifact's directory by default.")
    ] = None,
    runtime: Annotated[
        Literal["ort-cpu", "ort-cuda", "tensorrt"] | None,
        typer.Option(help="Where the model runs; by default TensorRT for what `build` wrote."),
    ] = None,
    engine_model: Annotated[
        bool,
        typer.Option("--engine-model", help="Also the engine alone, for Triton's own backend."),
    ] = False,
    threads: Threads = None,
    max_streams: Annotated[int, typer.Option(min=1, help="Texts in a batch.")] = 16,
    max_waiting: Annotated[int, typer.Option(min=1, help="Requests that wait, at most.")] = 256,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing one.")] = False,
    as_json: Json = False,
) -> None:
    """Write a model repository for Triton Inference Server."""
    from quarot_onnx.export.triton import triton_from_artifact  # noqa: PLC0415

    manifest = triton_from_artifact(
        artifact,
        repository,
        name=name,
        runtime=runtime,
        engine_model=engine_model,
        threads=threads,
        max_streams=max_streams,
        max_waiting=max_waiting,
        force=force,
    )
    emit(manifest, as_json, lambda: tables.show_repository(repository, manifest))


@app.command()
def inspect(
    artifact: Artifact,
    all_layers: Annotated[
        bool, typer.Option("--all-layers", help="Show layers that repeat the first one, too.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show an artifact's decoder: linears, bits, rotations, cache, sizes."""
    from dataclasses import asdict  # noqa: PLC0415

    from quarot_onnx.inspection import inspect as run_inspect  # noqa: PLC0415

    found = asdict(run_inspect(artifact))
    emit(found, as_json, lambda: tables.show_inspection(found, all_layers=all_layers))


@app.command()
def report(
    artifact: Artifact,
    page: Annotated[Path, typer.Argument(help="The HTML file to write.")],
    reference: Annotated[Path, typer.Option(help="The Hugging Face directory.")],
    text: Text,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="The text to continue.")] = "",
    evaluation: Annotated[Path | None, typer.Option(help="What `eval --save-json` wrote.")] = None,
    validation: Annotated[
        Path | None, typer.Option(help="What `validate --save-json` wrote.")
    ] = None,
) -> None:
    """Write one self-contained HTML page: numbers, rotation plan, outliers before and after."""
    from quarot_onnx.report import report_artifact  # noqa: PLC0415

    report_artifact(
        page,
        artifact,
        reference,
        text,
        prompt=prompt,
        evaluation=load_json(evaluation),
        validation=load_json(validation),
    )
    print(f"wrote {page}")


@app.command()
def compare(
    model_dir: ModelDir,
    out_dir: Annotated[
        Path, typer.Argument(help="Where table, JSON and page go; finished runs in it are kept.")
    ],
    recipes: Annotated[
        list[str],
        typer.Option("--recipe", "-r", help="A preset or a .toml file; repeatable."),
    ],
    settings: Settings = None,
    text: Text = "embedded",
    calibration: Annotated[
        str, typer.Option("--calibration", metavar="TEXT", help="What calibrated methods see.")
    ] = "embedded",
    windows: Windows = "32",
    window_length: WindowLength = 256,
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds each recipe runs with.")] = 1,
    baseline: Annotated[
        str | None, typer.Option(help="The recipe whose loss counts as 100 %.")
    ] = None,
    runtime: Runtime = "ort-cpu",
    threads: Threads = None,
    force: Annotated[
        bool, typer.Option("--force", help="Measure again what has been measured.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Export and measure several recipes; write a table, JSON and an HTML page."""
    from quarot_onnx.comparison import compare as run_compare  # noqa: PLC0415
    from quarot_onnx.comparison import rows  # noqa: PLC0415

    with progress_bar("comparing", "runs") as progress:
        content = run_compare(
            model_dir,
            out_dir,
            recipes,
            settings=settings or (),
            seeds=seeds,
            text=text,
            calibration=calibration,
            count=_window_count(windows),
            length=window_length,
            baseline=baseline,
            runtime=runtime,
            threads=threads,
            force=force,
            progress=progress,
        )
    emit(content, as_json, lambda: tables.show_comparison(out_dir, content, rows(content)))


@app.command()
def recipes(
    name: Annotated[str | None, typer.Argument(help="Show this preset as TOML.")] = None,
    as_json: Json = False,
) -> None:
    """List the presets, or show one."""
    from quarot_onnx.recipe import load_recipe, preset_names, preset_text  # noqa: PLC0415

    if name is not None:
        found = load_recipe(name)
        emit(found.as_json(), as_json, lambda: sys.stdout.write(preset_text(name)))
        return
    presets = [load_recipe(preset).as_json() for preset in preset_names()]
    emit(presets, as_json, lambda: tables.show_recipes(presets))


@app.command()
def doctor(as_json: Json = False) -> None:
    """Show what this machine has, what it lacks and how to get it."""
    from dataclasses import asdict  # noqa: PLC0415

    from quarot_onnx.doctor import diagnose  # noqa: PLC0415

    findings = [asdict(finding) for finding in diagnose()]
    emit(findings, as_json, lambda: tables.show_findings(findings))
    if any(finding["is_problem"] for finding in findings):
        raise typer.Exit(5)


def _version(value: bool) -> None:
    if value:
        import importlib.metadata  # noqa: PLC0415

        print(importlib.metadata.version("quarot-onnx"))
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    del version


def _window_count(text: str) -> int | None:
    """``--windows``: a number, or None for all."""
    if text == "all":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise UsageError(f"--windows {text}: must be 1 or more, or `all`")
    return int(text)


def _calibration(model_dir: Path, source: str, recipe: "Resolved") -> "Calibration | None":
    """The tokens of `source` that the methods of `recipe` may look at, if any looks."""
    if not recipe.is_calibrated:
        return None
    from quarot_onnx import texts  # noqa: PLC0415
    from quarot_onnx.calibration import Calibration  # noqa: PLC0415
    from quarot_onnx.runtime import load_tokenizer  # noqa: PLC0415

    found = texts.calibration_windows(
        source,
        load_tokenizer(model_dir),
        count=recipe.calibration.windows,
        length=recipe.calibration.window_length,
        seed=recipe.seed,
    )
    return Calibration.of(found.tokens, found.source)
