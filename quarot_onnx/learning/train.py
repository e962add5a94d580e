# SPDX-License-Identifier: Apache-2.0
"""Train the matrices of a recipe end to end: the rounded model against itself in float.

The loss is KL(p_float || p_rounded) of the next token, averaged over every position of a batch of
calibration windows. SpinQuant (arXiv 2405.16406) trains R1 and R2 on the cross-entropy of the text;
the float model's distribution says more per token, and does not reward learning the text. Weights
stay float by default, as there: GPTQ or rounding to nearest comes after. Nothing but the matrices
is trained, so the model in float is the same function before and after.
"""

import copy
import io
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from quarot_onnx.calibration import Calibration, Journal
from quarot_onnx.errors import InputError
from quarot_onnx.export.architectures import dimensions
from quarot_onnx.learning.student import Student
from quarot_onnx.passes.base import Effect, Report
from quarot_onnx.recipe import Recipe
from quarot_onnx.reference import HuggingFaceModel
from quarot_onnx.transforms import Transforms, require_learnable

_WARM_UP = 10  # steps until the learning rate is reached
_RECORDS = 10  # losses in the report
_CHECKPOINT_STEPS = 25
_BETAS = (0.9, 0.95)

Progress = Callable[[int, int], None]
"""Called with the steps done and the steps in all."""


@dataclass(frozen=True)
class Learned:
    """The result of a training.

    Attributes:
        transforms: matrices by place, checked and saved in the form in which they are imported.
        report: the loss on the way.
    """

    transforms: Transforms
    report: Report


def learn(
    model_dir: Path,
    recipe: Recipe,
    calibration: Calibration,
    *,
    journal: Journal | None = None,
    progress: Progress | None = None,
) -> Learned:
    """Train the places of ``recipe.learning`` on `calibration`.

    The same model, recipe and calibration give the same matrices on one machine; their last bits
    depend on the matrix products of PyTorch there.

    Args:
        model_dir: a Hugging Face directory of a model with Llama's modules.
        recipe: places, steps and rates; bits and clips to train under.
        calibration: windows of tokens; all have one length.
        journal: where every 25th step is kept; a run that finds one goes on from there and ends
            with the matrices of an unbroken one.
        progress: called after every step.

    Raises:
        UnsupportedModelError: another architecture.
        InputError: damaged weights, or the loss stopped being a number.
    """
    teacher = HuggingFaceModel(model_dir)
    config: Any = teacher.config
    require_learnable(model_dir / "config.json", config.model_type)
    student = Student(copy.deepcopy(teacher.model), recipe)
    losses = _train(student, teacher.model, recipe, calibration, journal or Journal(), progress)
    sizes = dimensions(config.to_dict())
    transforms = Transforms.of(student.tensors(), sizes, "learned")
    every = max(1, len(losses) // _RECORDS)
    records = [
        {"site": f"step {i + 1}", "loss": sum(losses[i - every + 1 : i + 1]) / every}
        for i in range(every - 1, len(losses), every)
    ]
    detail = (
        f"{', '.join(recipe.learning.places)}; {len(losses)} steps of {recipe.learning.batch} "
        f"windows, KL {losses[0]:.4f} -> {records[-1]['loss']:.4f}"
    )
    report = Report("LearnTransforms", Effect.EQUIVALENT, len(transforms.tensors), detail)
    return Learned(transforms, Report(**{**vars(report), "records": records}))


def _train(
    student: Student,
    teacher: torch.nn.Module,
    recipe: Recipe,
    calibration: Calibration,
    journal: Journal,
    progress: Progress | None,
) -> list[float]:
    """The loss of every step."""
    settings = recipe.learning
    groups = (
        (student.rotations, settings.rotation_rate),
        (student.matrices, settings.matrix_rate),
        (student.scales, settings.scale_rate),
    )
    optimizer = torch.optim.Adam(
        [{"params": parameters, "lr": rate} for parameters, rate in groups if parameters],
        betas=_BETAS,
    )
    rates = [group["lr"] for group in optimizer.param_groups]
    checkpoint = _Checkpoint(journal, student, optimizer)
    losses = checkpoint.load()
    tokens = torch.from_numpy(calibration.tokens)
    batches = _batches(len(tokens), settings.batch, settings.steps, recipe.seed)
    for step, rows in islice(enumerate(batches), len(losses), None):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * _schedule(step, settings.steps)
        with torch.no_grad():
            target = teacher(input_ids=tokens[rows], use_cache=False).logits.log_softmax(dim=-1)
        logits = student(tokens[rows]).log_softmax(dim=-1)
        loss = functional.kl_div(logits, target, log_target=True, reduction="sum")
        loss = loss / target[..., 0].numel()
        if not bool(torch.isfinite(loss)):
            raise InputError(
                f"learning: the loss is {loss.item()} at step {step + 1}; lower "
                "learning.matrix_rate, rotation_rate or scale_rate"
            )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.item()))
        if (step + 1) % _CHECKPOINT_STEPS == 0 or step + 1 == settings.steps:
            checkpoint.save(losses)
        if progress is not None:
            progress(step + 1, settings.steps)
    return losses


class _Checkpoint:
    """What the next step depends on, in a journal; the last one stays until the next is whole."""

    def __init__(
        self, journal: Journal, student: Student, optimizer: torch.optim.Optimizer
    ) -> None:
        self.journal = journal
        self.parameters = [*student.rotations, *student.matrices, *student.scales]
        self.optimizer = optimizer
        self.held = ""

    def save(self, losses: list[float]) -> None:
        """After ``len(losses)`` steps."""
        name = "learning.a" if self.held != "learning.a" else "learning.b"
        buffer = io.BytesIO()
        values = [parameter.detach() for parameter in self.parameters]
        torch.save((values, self.optimizer.state_dict()), buffer)
        self.journal.keep(name, np.frombuffer(buffer.getbuffer(), np.uint8))
        self.journal.finish("learning", {"losses": losses, "state": name})
        self.held = name

    def load(self) -> list[float]:
        """The losses of the steps that need not be done again; parameters are as behind them."""
        record = self.journal.record("learning")
        if record is None:
            return []
        self.held = record["state"]
        kept = io.BytesIO(self.journal.array(self.held).tobytes())
        parameters, state = torch.load(kept, weights_only=True)
        with torch.no_grad():
            for parameter, value in zip(self.parameters, parameters, strict=True):
                parameter.copy_(value)
        self.optimizer.load_state_dict(state)
        return list(record["losses"])


def _schedule(step: int, steps: int) -> float:
    """The part of the learning rate: a short warm-up, then half a cosine to 0."""
    return min(1.0, (step + 1) / _WARM_UP) * (1 + math.cos(math.pi * step / steps)) / 2


def _batches(windows: int, batch: int, steps: int, seed: int) -> Iterator[torch.Tensor]:
    """Rows of each step: every window once, in a random order, before any comes again."""
    generator = torch.Generator().manual_seed(seed)
    batch = min(batch, windows)
    order = torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        if len(order) < batch:
            order = torch.randperm(windows, generator=generator)
        yield order[:batch]
        order = order[batch:]
