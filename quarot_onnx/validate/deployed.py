# SPDX-License-Identifier: Apache-2.0
"""Stages ``trt`` and ``triton``: what was made of the artifact for deployment."""

import numpy as np

from quarot_onnx.errors import InputError
from quarot_onnx.export.tensorrt.directory import load_engine_manifest
from quarot_onnx.export.triton.model_config import from_text
from quarot_onnx.manifest import DATA, MODEL, changed_files, load_manifest
from quarot_onnx.validate.closeness import Closeness
from quarot_onnx.validate.side_by_side import run_twice
from quarot_onnx.validate.subject import Subject
from quarot_onnx.validate.verdict import Finding, Skip

_UNRELATED = 2**0.5  # relative L2 of two independent vectors of one norm


def check_engine(subject: Subject) -> Finding:
    """Fails on an engine that was changed, is of another model, or computes something else.

    The first two are seen on every machine; the last needs the GPU that the engine was built for.
    """
    if subject.engine is None:
        raise Skip("no engine was given (--engine)")
    manifest = load_engine_manifest(subject.engine)
    for name in (MODEL, DATA):
        if manifest.get("artifact", {}).get(name) != subject.manifest["files"].get(name):
            raise InputError(
                f"{subject.engine}: was built from another {name} than {subject.artifact}'s; "
                "build it again"
            )
    found = run_twice(subject.engine_model, subject.ids)
    if not all(np.isfinite(logits).all() for logits in found.values()):
        raise InputError(f"{subject.engine}: gives logits that are not finite")
    expected = run_twice(subject.need_model(), subject.ids)
    bound = _UNRELATED / 2
    if subject.has_llama_modules:
        bound = max(subject.tolerance, 1.5 * Closeness.of(*subject.expected).relative_l2)
    distances = {name: Closeness.of(found[name], expected[name]) for name in found}
    worst = max(distances, key=lambda name: distances[name].relative_l2)
    return Finding(
        "relative L2 to the ONNX graph",
        distances[worst].relative_l2,
        bound,
        f"{worst}: {distances[worst]}",
    )


def check_triton(subject: Subject) -> Finding:
    """Fails on a repository that was changed, holds another model or a configuration that is none.

    A server is not started: it says itself what it does not load.
    """
    repository = subject.triton_repository
    if repository is None:
        raise Skip("no repository was given (--triton-repository)")
    problems = [
        f"{name} is missing or differs from manifest.json"
        for name in changed_files(repository, load_manifest(repository))
    ]
    configs = sorted(repository.glob("*/config.pbtxt"))
    if not configs:
        problems.append("holds no model")
    for path in configs:
        model = path.parent.name
        config = from_text(path.read_text(encoding="utf-8"), str(path))
        if config.name != model:
            problems.append(f"{model}/config.pbtxt names the model {config.name!r}")
        held = path.parent / "1" / "artifact"
        if held.is_dir():
            files = load_manifest(held)["files"]
            wanted = subject.manifest["files"]
            problems += [
                f"{model} serves another {name}"
                for name in (MODEL, DATA)
                if files.get(name) not in (wanted.get(name), None)
            ]
    detail = f"{repository}: {problems[0]}" if problems else f"{len(configs)} model as written"
    return Finding("problems of the repository", len(problems), 0, detail)
