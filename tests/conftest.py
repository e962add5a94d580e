# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: PLC0415  # torch takes 3 s, which most tests do not need
"""Models and artifacts that many tests look at: built once per session, never written to."""

import fcntl
import os
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import hypothesis
import pytest

hypothesis.settings.register_profile("machine", deadline=None)  # it may be busy
hypothesis.settings.load_profile("machine")

HuggingFace = Callable[[str], Path]
Exported = Callable[..., Path]


@pytest.fixture(scope="session")
def traced_once() -> Iterator[None]:
    """Exports in this process trace each configuration once: 3 s, of which a test needs a copy."""
    import torch

    from quarot_onnx.export import trace

    torch.set_num_threads(1)
    traced: dict[str, Any] = {}
    original = trace.trace

    def remembered(config: Any) -> Any:
        key = f"{type(config).__name__} {config.to_json_string(use_diff=False)}"
        if key not in traced:
            traced[key] = original(config)
        return traced[key].clone()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trace, "trace", remembered)
        yield


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that the test processes of one session have in common."""
    base = tmp_path_factory.getbasetemp()
    directory = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    (directory / "shared").mkdir(exist_ok=True)
    return directory / "shared"


def _once(target: Path, build: Callable[[Path], object]) -> Path:
    """`target`, built by the first process that asks for it."""
    with Path(f"{target}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            build(target)
    return target


@pytest.fixture(scope="session")
def hugging_face(shared: Path) -> HuggingFace:
    """Family of `tests.models` -> its directory, as Hugging Face saves it. Read only."""
    from tests import models

    @cache
    def saved(family: str) -> Path:
        return _once(shared / family, lambda path: models.save(models.build(family), path))

    return saved


@pytest.fixture(scope="session")
def exported(traced_once: None, hugging_face: HuggingFace, shared: Path) -> Exported:
    """(family, recipe, overrides, dtype) -> the artifact. Read only."""
    from quarot_onnx.pipeline import export
    from quarot_onnx.recipe import load_recipe

    @cache
    def artifact(
        family: str, recipe: str, overrides: tuple[str, ...] = (), dtype: str = "float32"
    ) -> Path:
        source = hugging_face(family)
        target = shared / "-".join([family, recipe, *overrides, dtype])
        resolved = load_recipe(recipe, overrides)
        options: dict[str, Any] = {"dtype": dtype, "certify": False}
        return _once(target, lambda path: export(source, path, resolved, **options))

    return artifact


@pytest.fixture(scope="session")
def embedded(traced_once: None, shared: Path) -> Path:
    """The embedded model as `w4a4kv4`. Read only."""
    from quarot_onnx.pipeline import export
    from quarot_onnx.recipe import load_recipe

    source = Path(__file__).parents[1] / "examples" / "tiny_llama" / "model"
    recipe = load_recipe("w4a4kv4")
    return _once(shared / "embedded", lambda path: export(source, path, recipe))
