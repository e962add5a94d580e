# SPDX-License-Identifier: Apache-2.0
"""Trace a Hugging Face decoder with fake weights, one layer of each kind.

No weight is read: parameters are fake tensors, so a 70B configuration traces as fast as a small
one. Hooks turn what differs between modelling files into three marker operators,
``quarot::KvAppend``, ``quarot::KvAttention``, which every model calls after RoPE with
un-repeated K and V, and ``quarot::GroupedLinear``:

* the attention interface emits ``KvAttention(q, k, v, mask)``, with the sinks of heads behind it,
* the cache layer's ``update`` emits ``KvAppend(past, new)``,
* the mask interface always builds the boolean mask, so that causality is in the graph,
* the experts interface sorts tokens by expert and emits ``GroupedLinear(x, weights, counts)``.
"""

import logging
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import onnx_ir as ir
import onnxscript.optimizer
import torch
import transformers
from accelerate import init_empty_weights
from onnxscript.rewriter import onnx_fusions
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.exporters.exporter_onnx import _ONNX_TRANSLATION_TABLE
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.masking_utils import sdpa_mask

from quarot_onnx.errors import UnsupportedModelError

OPSET = 23  # 24 loses RMSNormalization and RotaryEmbedding, 27 does not load in ONNX Runtime
MARKER_DOMAIN = "quarot"
TIED = "quarot.tied"
"""Initializer metadata: the name of the other parameter that it is tied to."""

IMPLEMENTATION = "quarot_marker"

# Sizes of the example inputs: none is 0 or 1, which torch.export would specialize.
_BATCH, _SEQUENCE, _PAST = 2, 3, 5


def _marker(
    op: str, inputs: list[torch.Tensor], attributes: dict[str, Any], shape: list[Any]
) -> Any:
    return torch.onnx.ops.symbolic(
        f"{MARKER_DOMAIN}::{op}", inputs, attributes, dtype=inputs[-1].dtype, shape=shape, version=1
    )


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """HF's attention interface: q [B, Hq, S, D], k and v [B, Hkv, T, D] -> [B, S, Hq, D]."""
    sinks = kwargs.get("s_aux")
    if sinks is not None and softcap:
        raise UnsupportedModelError(
            f"{type(module).__name__}: attention sinks together with a softcap are not supported; "
            "choose a model without one of them"
        )
    if attention_mask is None:
        raise UnsupportedModelError(
            f"{type(module).__name__}: the attention got no mask, so causality would be lost; "
            "this modelling code cannot be traced"
        )
    # torch.onnx.ops.symbolic takes the dtype of its last tensor from us: q, k, v share theirs.
    output = torch.onnx.ops.symbolic(
        f"{MARKER_DOMAIN}::KvAttention",
        [query, key, value, attention_mask, *([] if sinks is None else [sinks])],
        {
            "scale": float(query.shape[-1] ** -0.5 if scaling is None else scaling),
            "softcap": float(softcap or 0.0),
        },
        dtype=query.dtype,
        shape=[*query.shape[:3], value.shape[-1]],
        version=1,
    )
    return output.transpose(1, 2), None


def _mask(*args: Any, **kwargs: Any) -> torch.Tensor | None:
    """HF's boolean mask [B, 1, S, T], never skipped in favour of an ``is_causal`` flag."""
    mask: torch.Tensor | None = sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": False})
    return mask


def _onnx(
    op: str,
    inputs: list[torch.Tensor],
    attributes: dict[str, Any],
    like: torch.Tensor,
    shape: list[Any] | None = None,
) -> Any:
    """An operator of ONNX as it is; its output has `like`'s dtype, and its shape for None."""
    size = list(like.shape) if shape is None else shape
    return torch.onnx.ops.symbolic(op, inputs, attributes, dtype=like.dtype, shape=size)


def _argsort(numbers: torch.Tensor) -> Any:
    """Where each of the sorted `numbers` [n] stands among them; equal ones keep their order."""
    count = _onnx("Shape", [numbers], {}, numbers, [1])
    _, order = torch.onnx.ops.symbolic_multi_out(
        "TopK",
        [numbers, count],
        {"axis": 0, "largest": 0, "sorted": 1},
        dtypes=[torch.int64, torch.int64],
        shapes=[list(numbers.shape)] * 2,
    )
    return order


def _rows(x: torch.Tensor, numbers: torch.Tensor) -> Any:
    """Rows of x [N, n] by their numbers [m]: [m, n]."""
    return _onnx("Gather", [x, numbers], {"axis": 0}, x, [numbers.shape[0], x.shape[1]])


def _experts(
    module: Any, hidden: torch.Tensor, expert: torch.Tensor, share: torch.Tensor
) -> torch.Tensor:
    """HF's experts interface: every token visits the experts that its router chose.

    Args:
        module: the stacks of weights, [E, out, in] or (``is_transposed``) [E, in, out].
        hidden: the tokens [N, hidden_size].
        expert: the numbers of the K experts of each token [N, K].
        share: what each of them counts [N, K].

    Returns:
        The weighted sums [N, hidden_size].

    Rows are sorted by expert, so that each expert computes its own rows and no others.
    """
    chosen = expert.shape[-1]
    numbers = expert.reshape(-1)
    order = _argsort(numbers)
    token = _onnx("Div", [order, torch.tensor(chosen)], {}, order)
    counts = (numbers[:, None] == torch.arange(module.num_experts)).long().sum(dim=0)

    def grouped(x: torch.Tensor, name: str) -> Any:
        weight = getattr(module, name)
        bias = [getattr(module, f"{name}_bias")] if module.has_bias else []
        return torch.onnx.ops.symbolic(
            f"{MARKER_DOMAIN}::GroupedLinear",
            [x, weight, counts, *bias],
            {"transposed": int(not module.is_transposed)},
            dtype=x.dtype,
            shape=[x.shape[0], weight.shape[2 if module.is_transposed else 1]],
            version=1,
        )

    x = _rows(hidden, token)
    if module.has_gate:
        inner = module._apply_gate(grouped(x, "gate_up_proj"))
    else:
        inner = module.act_fn(grouped(x, "up_proj"))
    y = grouped(inner, "down_proj")
    if module.has_post_expert_norm:
        raise UnsupportedModelError(
            f"{type(module).__name__}: a norm behind the experts is not supported; "
            "choose a model without"
        )
    back = _rows(y, _argsort(order)).reshape(-1, chosen, y.shape[-1])
    total: torch.Tensor = (back * share[..., None]).sum(dim=1)
    return total


class _MarkerLayer(DynamicLayer):  # type: ignore[no-untyped-call]  # untyped in transformers
    """A cache layer whose update is one marker per tensor; past and present [B, Hkv, P|T, D]."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.keys, self.values = keys, values
        self.dtype, self.device = keys.dtype, keys.device
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        def append(past: torch.Tensor | None, new: torch.Tensor, kind: str) -> Any:
            assert past is not None
            batch, heads, length, size = new.shape
            return _marker(
                "KvAppend",
                [past, new],
                {"kind": kind},
                [batch, heads, past.shape[2] + length, size],
            )

        keys = append(self.keys, key_states, "key")
        values = append(self.values, value_states, "value")
        self.keys, self.values = keys, values
        return keys, values


class _FlatCache(torch.nn.Module):
    """The model with its cache as a flat list k0, v0, k1, v1, ... in and out."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        past: list[torch.Tensor],
    ) -> tuple[Any, ...]:
        cache = (
            DynamicCache()
        )  # without a config: sliding layers keep the whole cache, the mask slides
        layers = [_MarkerLayer(*past[i : i + 2]) for i in range(0, len(past), 2)]
        cache.layers = list(layers)
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        )
        return (output.logits, *(t for layer in layers for t in (layer.keys, layer.values)))


def _fake_model(config: transformers.PretrainedConfig, mode: FakeTensorMode) -> Any:
    """The model of `config` with fake parameters and real buffers (RoPE tables)."""
    with init_empty_weights(include_buffers=False):
        model: Any = transformers.AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
        model.eval()
    with mode:
        for module in model.modules():
            for name, parameter in list(module._parameters.items()):
                if parameter is not None:
                    empty = torch.empty(parameter.shape, dtype=parameter.dtype)
                    module._parameters[name] = torch.nn.Parameter(empty, requires_grad=False)
        model.tie_weights()  # making parameters fake one by one untied them
    return model


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's notes on its own internals, which a user cannot act on."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir", "torch")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def _ordered_sets(model: Any) -> Iterator[None]:
    """Loops of the modelling file over sets go in the order in which items were added.

    Gemma 3 makes the RoPE tables of its kinds of layers in such a loop. Hashes of strings change
    from process to process, and with them the order of the nodes and their names.
    """
    module = sys.modules[type(model).__module__]
    vars(module)["set"] = dict.fromkeys
    try:
        yield
    finally:
        del vars(module)["set"]


def trace(config: transformers.PretrainedConfig) -> ir.Model:
    """The ONNX graph of `config`'s causal model, with markers and without weights.

    Args:
        config: a (shallow) configuration; every layer in it is traced.

    Returns:
        A model whose weight initializers have no value (``const_value is None``), HF parameter
        names, and the exporter's metadata on each node.

    Raises:
        UnsupportedModelError: the modelling code takes part in none of the hooks.
    """
    transformers.AttentionInterface.register(IMPLEMENTATION, _attention)
    transformers.AttentionMaskInterface.register(IMPLEMENTATION, _mask)
    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, _experts)
    config._attn_implementation = IMPLEMENTATION
    config._experts_implementation = IMPLEMENTATION
    config.dtype = torch.float32
    layers = config.num_hidden_layers
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    past_names = [f"past_key_values.{i}.{kind}" for i in range(layers) for kind in ("key", "value")]
    mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())
    with _quiet(), _default_dtype(torch.float32), torch.no_grad():
        model = _fake_model(config, mode)
        with mode, _ordered_sets(model):
            total = _SEQUENCE + _PAST
            program = torch.onnx.export(
                _FlatCache(model),
                (
                    torch.zeros(_BATCH, _SEQUENCE, dtype=torch.long),
                    torch.ones(_BATCH, total, dtype=torch.long),
                    torch.zeros(_BATCH, _SEQUENCE, dtype=torch.long),
                    [torch.zeros(_BATCH, heads, _PAST, head_dim) for _ in past_names],
                ),
                dynamo=True,
                dynamic_shapes=(
                    {0: "batch_size", 1: "sequence_length"},
                    {0: "batch_size", 1: "total_sequence_length"},
                    {0: "batch_size", 1: "sequence_length"},
                    [{0: "batch_size", 2: "past_sequence_length"} for _ in past_names],
                ),
                input_names=["input_ids", "attention_mask", "position_ids", *past_names],
                output_names=[
                    "logits",
                    *(n.replace("past_key_values", "present") for n in past_names),
                ],
                opset_version=OPSET,
                custom_translation_table=_ONNX_TRANSLATION_TABLE,
                optimize=False,
                verbose=False,
            )
        if program is None:
            raise UnsupportedModelError(f"{config.model_type}: torch.onnx.export gave no program")
        traced = program.model
        _hide_weights(traced)
        onnxscript.optimizer.optimize(traced)
        onnx_fusions.fuse(traced)
        _restore_weights(traced, model.get_expanded_tied_weights_keys(all_submodels=True))
    return traced


def _hide_weights(model: ir.Model) -> None:
    """Make fake weights graph inputs, so that the optimizer neither folds nor renames them."""
    for name, value in list(model.graph.initializers.items()):
        raw = getattr(value.const_value, "raw", None)
        if isinstance(raw, FakeTensor) or isinstance(getattr(raw, "data", None), FakeTensor):
            value.const_value = None
            value.metadata_props["quarot.weight"] = name
            model.graph.initializers.pop(name)
            model.graph.inputs.append(value)


def _restore_weights(model: ir.Model, tied: Mapping[str, str]) -> None:
    """Undo `_hide_weights`; a tied parameter gets the name of its source, not of its last user."""
    for value in [v for v in model.graph.inputs if "quarot.weight" in v.metadata_props]:
        model.graph.inputs.remove(value)
        name = value.metadata_props.pop("quarot.weight").removeprefix("model.")
        if name in tied:
            value.metadata_props[TIED] = name
        value.name = tied.get(name, name)
        model.graph.initializers[value.name] = value
