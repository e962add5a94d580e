# SPDX-License-Identifier: Apache-2.0
"""Which tensor on disk is which parameter: Hugging Face's own conversion rules, applied lazily.

transformers renames parameters from version to version and states how a checkpoint's tensors become
them. The same rules are applied to names here; no tensor is read.
"""

from collections.abc import Mapping
from typing import Any

import transformers
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming

from quarot_onnx.errors import UnsupportedModelError
from quarot_onnx.export.checkpoint import Checkpoint


def stored_names(
    checkpoint: Checkpoint, config: "transformers.PretrainedConfig"
) -> Mapping[str, str]:
    """Parameter name -> the name of its tensor on disk.

    Raises:
        UnsupportedModelError: a rule does more than rename.
    """
    model: Any = transformers.AutoModelForCausalLM._model_mapping[type(config)]
    rules: list[Any] = []
    for key in (model.__name__, config.model_type):
        rules += get_checkpoint_conversion_mapping(key) or []  # type: ignore[no-untyped-call]
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    others = [rule for rule in rules if rule not in renamings]
    names: dict[str, str] = {}
    for stored in checkpoint.tensors:
        parameter = stored
        for rule in renamings:
            parameter, _ = rule.rename_source_key(parameter)
        for rule in others:
            _, pattern = rule.rename_source_key(parameter)
            if pattern is not None:
                raise UnsupportedModelError(
                    f"{checkpoint.directory}: tensor {stored} is merged with others by the "
                    f"conversion rule for {pattern!r}, which is not supported; "
                    "choose another architecture"
                )
        names[parameter] = stored
    return names
