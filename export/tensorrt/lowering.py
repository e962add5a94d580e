# SPDX-License-Identifier: Apache-2.0
"""An artifact's graph in the form that TensorRT's parser and the plugins take.

`lower` is the order of the steps; each module states what stays equal. What comes out is a strongly
typed graph: the dtypes in it are those that TensorRT runs. Inputs are ``input_ids``,
``position_ids`` INT64 [B, S], ``lengths`` INT32 [B] and the caches INT8 and FLOAT
[B, H, capacity, .]; outputs are ``logits`` [B, S, V] and the caches, each the memory of its input.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import onnx
import onnx_ir as ir

from quarot_onnx import artifacts, ops
from quarot_onnx.errors import InputError, UnsupportedModelError, UsageError
from quarot_onnx.export.tensorrt.attention import fix_cache, require_head_dims
from quarot_onnx.export.tensorrt.linears import lower_hadamards, lower_linears
from quarot_onnx.export.tensorrt.skeleton import Skeleton
from quarot_onnx.export.tensorrt.standard_forms import (
    replace_rms_normalizations,
    replace_rotary_embeddings,
)
from quarot_onnx.plugins.layouts import Layout

PLUGINS = ("Hadamard", "HadamardHeads", "QuantizeInt4", "Int4Gemm", "KvAppend", "KvAttention")
"""The operators that have a plugin (``docs/plugins.md``)."""

OLDEST = (10, 7)
"""The first TensorRT whose parser prefers plugins to local functions."""
_NEW_FORMS = (10, 15)  # RMSNormalization and RotaryEmbedding
_OPSET, _OLD_OPSET = 23, 20
_BITS = 4
_FLOATS = {"float16": onnx.TensorProto.FLOAT16, "bfloat16": onnx.TensorProto.BFLOAT16}

ActivationLayout = Literal["packed", "split"]
"""The order of activation codes between plugins; split is the one of compute capability 9.0."""


@dataclass(frozen=True)
class Target:
    """What the graph is lowered for.

    Attributes:
        version: of TensorRT, major and minor.
        activation_layout: what `QuantizeInt4` writes and `Int4Gemm` reads.
    """

    version: tuple[int, int] = (11, 4)
    activation_layout: ActivationLayout = "packed"

    def __post_init__(self) -> None:
        if self.version < OLDEST:
            raise UsageError(
                f"TensorRT {self.version[0]}.{self.version[1]}: is older than "
                f"{OLDEST[0]}.{OLDEST[1]}, whose parser first takes these plugins; use a newer one"
            )


def target_version(text: str) -> tuple[int, int]:
    """Major and minor of a version such as ``10.15.1``.

    Raises:
        UsageError: it is none.
    """
    parts = text.split(".")
    if len(parts) < 2 or not (parts[0].isdigit() and parts[1].isdigit()):
        raise UsageError(f"TensorRT {text}: is no version; give one such as 11.4")
    return int(parts[0]), int(parts[1])


def lower(artifact: Path, target: Target) -> ir.Model:
    """The graph of `artifact` for TensorRT, with lazy weights.

    Raises:
        InputError: the artifact is damaged.
        UnsupportedModelError: a dtype, an operator or a size that TensorRT cannot take.
    """
    manifest = artifacts.load_manifest(artifact)
    dtype = manifest.get("dtype")
    if dtype not in _FLOATS:
        raise UnsupportedModelError(
            f"{artifact}: its float parts are {dtype}; the kernels take float16 and bfloat16, "
            "export with --dtype float16"
        )
    skeleton = Skeleton(artifact, _FLOATS[dtype])
    _require_plugins(skeleton, artifact)
    require_head_dims(skeleton)
    _require_types(skeleton)
    fix_cache(skeleton, _longest(artifact))
    lower_hadamards(skeleton)
    layouts = {"packed": Layout.ACTIVATIONS_PACKED_V1, "split": Layout.ACTIVATIONS_SPLIT_V1}
    lower_linears(skeleton, layouts[target.activation_layout])
    is_new = target.version >= _NEW_FORMS
    if not is_new:
        replace_rms_normalizations(skeleton)
        replace_rotary_embeddings(skeleton)
    return skeleton.finish(_OPSET if is_new else _OLD_OPSET)


def _require_plugins(skeleton: Skeleton, artifact: Path) -> None:
    """Refuse an operator without a plugin, and codes that are not of 4 bits.

    Raises:
        UnsupportedModelError: names the node.
    """
    found = [node for node in skeleton.graph.nodes if node.domain == ops.DOMAIN]
    what: str | None = None
    for node in found:
        if node.op not in PLUGINS:
            what = f"{node.op} has no TensorRT plugin"
        elif node.attrs.get("bits", _BITS) != _BITS:
            what = f"bits = {node.attrs['bits']}, the plugins take {_BITS}"
        elif node.op == "Int4Gemm" and _type(skeleton, node.inputs[2]) != ir.DataType.INT4:
            what = "its weight codes are not INT4"
        if what is not None:
            raise UnsupportedModelError(
                f"{node.name}: {what}; TensorRT takes recipes of 4 bits with a packed cache, such "
                "as w4a4kv4, run this one with --runtime ort-cpu or ort-cuda"
            )
    missing = {"QuantizeInt4", "Int4Gemm", "KvAppend", "KvAttention"} - {node.op for node in found}
    if missing:
        raise UnsupportedModelError(
            f"{artifact}: has no {sorted(missing)[0]} node; TensorRT takes recipes of 4 bits with "
            "a packed cache, such as w4a4kv4"
        )


def _type(skeleton: Skeleton, tensor: Any) -> ir.DataType | None:
    weight = skeleton.weights.get(tensor.name)
    return None if weight is None else weight.dtype


def _require_types(skeleton: Skeleton) -> None:
    """Refuse a graph whose ``quarot`` nodes do not know their shapes.

    Raises:
        InputError: names the tensor.
    """
    for node in skeleton.nodes(*PLUGINS):
        for value in (node.inputs[0], *node.outputs):
            if value.shape is None or not isinstance(value.shape[-1], int):
                raise InputError(f"{value.name}: has no static last dimension; export again")


def _longest(artifact: Path) -> int:
    path = artifact / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        longest = int(config.get("max_position_embeddings") or 4096)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: cannot be read ({error}); export again") from error
    return max(longest, 16)
