# SPDX-License-Identifier: Apache-2.0
"""Models and artifacts that many tests look at: built once per session, never written to."""

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import onnx_ir as ir
import pytest
import torch
import transformers

from quarot_onnx.export import trace
from quarot_onnx.pipeline import export
from quarot_onnx.recipe import load_recipe
from tests import models

HuggingFace = Callable[[str], Path]
Exported = Callable[..., Path]


@pytest.fixture(scope="session")
def traced_once() -> Iterator[None]:
    """Exports in this process trace each configuration once: 3 s, of which a test needs a copy."""
    torch.set_num_threads(1)
    traced: dict[str, ir.Model] = {}
    original = trace.trace

    def remembered(config: transformers.PretrainedConfig) -> ir.Model:
        key = f"{type(config).__name__} {config.to_json_string(use_diff=False)}"
        if key not in traced:
            traced[key] = original(config)
        return traced[key].clone()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trace, "trace", remembered)
        yield


@pytest.fixture(scope="session")
def hugging_face(tmp_path_factory: pytest.TempPathFactory) -> HuggingFace:
    """Family of `tests.models` -> its directory, as Hugging Face saves it. Read only."""

    @cache
    def saved(family: str) -> Path:
        return models.save(models.build(family), tmp_path_factory.mktemp("hf") / family)

    return saved


@pytest.fixture(scope="session")
def exported(
    traced_once: None, hugging_face: HuggingFace, tmp_path_factory: pytest.TempPathFactory
) -> Exported:
    """(family, recipe, overrides, dtype) -> the artifact. Read only."""

    @cache
    def artifact(
        family: str, recipe: str, overrides: tuple[str, ...] = (), dtype: str = "float32"
    ) -> Path:
        target = tmp_path_factory.mktemp("artifact") / f"{family}-{recipe}"
        export(hugging_face(family), target, load_recipe(recipe, overrides), dtype=dtype)
        return target

    return artifact
