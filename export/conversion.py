# SPDX-License-Identifier: Apache-2.0
"""Which tensor on disk is which parameter: Hugging Face's own conversion rules, applied lazily.

transformers renames parameters from version to version, stacks the tensors of experts, and states
how a checkpoint's tensors become its parameters. The same rules are applied to names here; no
tensor is read.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import transformers
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
)

from quarot_onnx.errors import InputError, UnsupportedModelError
from quarot_onnx.export.canonical import Reading
from quarot_onnx.export.checkpoint import Checkpoint, CheckpointSource, Rows

Parts = tuple[Mapping[int, str], ...]
"""For each part of a stack's features, in order: number of the expert -> tensor on disk."""


@dataclass(frozen=True)
class StoredNames:
    """Where the parameters of a model are in a checkpoint.

    Attributes:
        checkpoint: the checkpoint.
        names: parameter -> the tensor that is it, under its name on disk.
        stacks: parameter -> the tensors, one for each expert, that are stacked to it.
    """

    checkpoint: Checkpoint
    names: Mapping[str, str]
    stacks: Mapping[str, Parts]

    def source(self, parameter: str, how: Reading) -> CheckpointSource:
        """What `how` reads of `parameter`.

        Raises:
            InputError: the checkpoint lacks a tensor of it.
        """
        if how.index is None or parameter not in self.stacks:
            entry = self.checkpoint.tensor(self.names.get(parameter, parameter))
            return CheckpointSource(entry, how.transposed, how.rows, how.index)
        start = 0
        for part in self.stacks[parameter]:
            if how.index not in part:
                raise InputError(
                    f"{self.checkpoint.directory}: {parameter} has no tensor for expert "
                    f"{how.index}; download the model again or check config.json"
                )
            entry = self.checkpoint.tensor(part[how.index])
            size = entry.shape[0] if entry.shape else 0
            rows = how.rows or Rows(size, 0, size)
            if start <= rows.start and rows.stop <= start + size:
                within = Rows(size, rows.start - start, rows.stop - start)
                is_whole = within == Rows(size, 0, size)
                return CheckpointSource(entry, how.transposed, None if is_whole else within)
            start += size
        raise InputError(
            f"{self.checkpoint.directory}: the tensors of {parameter} for expert {how.index} have "
            f"{start} rows where config.json implies more; the two do not belong together"
        )

    def tensors(self, parameter: str) -> list[str]:
        """Every tensor on disk that belongs to `parameter`."""
        if parameter in self.stacks:
            return [name for part in self.stacks[parameter] for name in part.values()]
        return [self.names[parameter]] if parameter in self.names else []


def stored_names(checkpoint: Checkpoint, config: "transformers.PretrainedConfig") -> StoredNames:
    """Where each parameter of `config`'s causal model is in `checkpoint`.

    Raises:
        UnsupportedModelError: a rule does more than rename tensors and stack those of experts.
    """
    model: Any = transformers.AutoModelForCausalLM._model_mapping[type(config)]
    rules: list[Any] = []
    for key in (model.__name__, config.model_type):
        rules += get_checkpoint_conversion_mapping(key) or []  # type: ignore[no-untyped-call]
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if rule not in renamings]
    names: dict[str, str] = {}
    stacks: dict[str, tuple[dict[int, str], ...]] = {}
    for stored in checkpoint.tensors:
        renamed = stored
        for rule in renamings:
            renamed, _ = rule.rename_source_key(renamed)
        for rule in converters:
            parameter, pattern = rule.rename_source_key(renamed)
            if pattern is not None:
                number = _expert(rule, renamed, pattern)
                if number is None:
                    raise UnsupportedModelError(
                        f"{checkpoint.directory}: tensor {stored} is merged with others by the "
                        f"conversion rule for {pattern!r}, which is not supported; "
                        "choose another architecture"
                    )
                parts = stacks.setdefault(parameter, tuple({} for _ in rule.source_patterns))
                parts[rule.source_patterns.index(pattern)][number] = stored
                break
        else:
            names[renamed] = stored
    return StoredNames(checkpoint, names, stacks)


def _expert(rule: Any, name: str, pattern: str) -> int | None:
    """The expert whose tensor `name` is, if `rule` stacks experts and does nothing else."""
    if not isinstance(rule, WeightConverter) or len(rule.target_patterns) != 1:
        return None
    stack, *rest = rule.operations
    stacks = isinstance(stack, MergeModulelist) and stack.dim == 0
    joins = [isinstance(step, Concatenate) and step.dim == 1 for step in rest]
    if not stacks or joins != [True] * (len(rule.source_patterns) > 1):
        return None
    number = re.search(re.escape(pattern).replace(r"\*\.", r"(\d+)\."), name)
    return int(number[1]) if number is not None else None
