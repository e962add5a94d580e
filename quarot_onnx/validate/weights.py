# SPDX-License-Identifier: Apache-2.0
"""Stage ``weights``: every initializer against the checkpoint.

What an initializer should be is computed here a second time, from the recipe and Hugging Face's
names alone, so that a mistake of a pass is not repeated by its judge.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from quarot_onnx.errors import GateError
from quarot_onnx.export.architectures import dimensions
from quarot_onnx.export.checkpoint import CheckpointSource
from quarot_onnx.hadamard import plan
from quarot_onnx.rotation import residual_rotations
from quarot_onnx.transforms import NORMS, Transforms
from quarot_onnx.validate.closeness import relative_error
from quarot_onnx.validate.subject import Subject
from quarot_onnx.validate.verdict import Finding
from quarot_onnx.weights import Float64

_Given = TypeVar("_Given")

_BLOCK = 1 << 24  # numbers of an embedding that are compared at once


def check_weights(subject: Subject) -> Finding:
    """Fails on a weight that is not the checkpoint's, folded, rotated and rounded as it should be.

    Swapped layers, a wrong scale, another seed, another model: a graph that computes faithfully
    with the wrong numbers.
    """
    subject.need_reference()
    subject.need_finite()
    if not subject.has_llama_modules:
        from quarot_onnx.validate.twin import check_initializers  # noqa: PLC0415  # imports torch

        return check_initializers(subject)
    errors = list(_weight_errors(subject))
    name, worst = max(errors, key=lambda item: math.inf if math.isnan(item[1]) else item[1])
    detail = f"{len(errors)} tensors; furthest from the checkpoint is {name}"
    return Finding("error over what rounding explains", worst, 1.0, detail)


def _weight_errors(subject: Subject) -> Iterator[tuple[str, float]]:
    """Each initializer's name and its error, as a fraction of what rounding it once explains."""
    from quarot_onnx.reference import (  # noqa: PLC0415  # imports torch
        outlier_features,
        read_initializers,
    )

    held = read_initializers(subject.artifact)
    expected = _ExpectedWeights(subject)
    float_bound = 2 * subject.epsilon
    weights = subject.recipe.weights
    for name, tensor in held.items():
        if not name.startswith(("model.", "lm_head.")) or name.endswith(("_scale", "_zero")):
            continue
        module, _, kind = name.rpartition(".")
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            yield name, _table_error(expected, name, tensor.numpy()) / float_bound
            continue
        found = tensor.numpy().astype(np.float64)
        if len(tensor.shape) == 1:
            wanted = expected.bias(module) if kind == "bias" else expected.norm(name)
            yield name, relative_error(found, wanted) / float_bound
            continue
        wanted = expected.linear(module)
        features = outlier_features(held, module)
        if kind == "weight_outliers":
            wanted = wanted[features]
        elif features is not None:
            wanted[features] = 0
        if found.shape != wanted.shape:
            raise GateError(f"initializer {name} has shape {found.shape}, not {wanted.shape}")
        scale = held.get(f"{name}_scale")
        if scale is None:
            yield name, relative_error(found, wanted) / float_bound
        else:
            steps = scale.numpy().astype(np.float64)
            zero = held.get(f"{name}_zero")
            grouped = found.reshape(1 if steps.ndim == 1 else len(steps), -1, found.shape[1])
            if zero is not None:
                grouped -= zero.numpy().astype(np.float64)[:, None]
            grouped *= steps if steps.ndim == 1 else steps[:, None]
            found = grouped.reshape(found.shape)
            form = weights.down_proj_form if module.endswith("down_proj") else weights.form
            if weights.sparsity == "none":
                yield name, _rounding_error(found, wanted, form.bits, len(grouped))
            else:
                # A mask by importance may take any half of a column, and what is kept makes up for
                # it: without the text, a weight has to be nearer to the checkpoint's than zeros.
                yield name, relative_error(found, wanted)


def _rounding_error(found: Float64, wanted: Float64, bits: int, groups: int) -> float:
    """Of a dequantized weight [in, out], as a fraction of what rounding to `bits` explains.

    Each column of `wanted` has a scale for each of `groups` groups of its rows.
    """
    top = 2 ** (bits - 1) - 1
    by_group = wanted.reshape(groups, -1, wanted.shape[1])
    step = np.abs(by_group).max(axis=1, keepdims=True) / top
    step[step == 0] = 1
    nearest = (np.rint(by_group / step) * step).reshape(wanted.shape)  # without any clip
    naive = relative_error(nearest, wanted)
    # Error feedback (GPTQ) moves weights further than rounding to nearest does, hence the
    # factor 2. What is rounded keeps its length but for the error squared (the best code
    # book for a weight is shorter by that) and the error's chance overlap with the weight, four
    # standard deviations of it.
    power = float((wanted * wanted).sum())
    length = float((found * wanted).sum()) / power
    overlap = 4 * math.sqrt(float(np.square((nearest - wanted) * wanted).sum())) / power
    excess = abs(length - 1) / (2 * naive**2 + overlap)
    return max(relative_error(found, wanted) / (2 * naive), excess)


def _table_error(expected: "_ExpectedWeights", name: str, found: NDArray[Any]) -> float:
    """Of the embedding [V, n] or the head [n, V], a block of tokens at a time."""
    is_head = name == "lm_head.weight"
    width, tokens = found.shape if is_head else found.shape[::-1]
    worst = 0.0
    block = max(1, _BLOCK // width)
    for start in range(0, tokens, block):
        part = slice(start, start + block)
        if is_head:
            source = expected.tensor(name, transposed=True, index=(slice(None), part))
            wanted, held = expected.reader(source, "model.norm"), found[:, part]
        else:
            source = expected.tensor(name, transposed=False, index=(part, slice(None)))
            wanted, held = expected.writer(source), found[part]
        worst = max(worst, relative_error(held.astype(np.float64), wanted))
    return worst


def _solved(a: Float64, b: Float64, weight: Float64) -> Float64:
    """W of ``(A ⊗ B) W`` = `weight` [a * b, out]."""
    by_b = np.linalg.solve(b, weight.reshape(len(a), len(b), -1))
    solved: Float64 = np.linalg.solve(a, by_b.reshape(len(a), -1)).reshape(weight.shape)
    return solved


class _ExpectedWeights:
    """What the recipe says an artifact stores, before rounding, from the checkpoint; float64.

    Linear weights are [in, out].
    """

    def __init__(self, subject: Subject) -> None:
        self.checkpoint = subject.checkpoint
        rotations, config = subject.recipe.rotations, subject.config
        self.rotations = rotations
        self.num_heads, self.head_dim = subject.num_heads, subject.head_dim
        sizes = dimensions(config)
        self.num_kv_heads = sizes.num_kv_heads
        self.given = Transforms.of_artifact(subject.artifact, sizes)
        self.r1 = None
        if self.given.r1 is not None or rotations.r1 != "none":
            (self.r1, *_) = residual_rotations(subject.recipe, sizes.hidden_size, self.given)
        self.r2, self.heads = plan(self.head_dim), plan(self.num_heads, policy="full")
        self.r4 = plan(config["intermediate_size"], policy=rotations.r4_policy)

    def tensor(self, name: str, *, transposed: bool, index: tuple[slice, ...] = ()) -> Float64:
        """The checkpoint's tensor, or the part of it at `index`."""
        stored = name
        if name == "lm_head.weight" and name not in self.checkpoint.tensors:
            stored = "model.embed_tokens.weight"
        entry = self.checkpoint.tensor(stored)
        source = CheckpointSource(entry, transposed)
        return source.read(index or tuple(slice(None) for _ in entry.shape))

    def norm(self, name: str) -> Float64:
        """What is left of the scale of norm `name`."""
        scale = self.tensor(name, transposed=False)
        is_folded = self.rotations.fold_norm_scale and not name.endswith(
            ("q_norm.weight", "k_norm.weight")
        )
        if not is_folded:
            return scale
        given = self._of_norm(name.removesuffix(".weight"), self.given.norm)
        return np.ones_like(scale) if given is None else given

    def _of_norm(self, norm: str, given: Callable[[int, int], _Given | None]) -> _Given | None:
        """What the transforms give to `norm`; None for norms that are not in front of a half."""
        last = norm.rpartition(".")[2]
        return given(_layer_of(norm), NORMS.index(last)) if last in NORMS else None

    def reader(self, weight: Float64, norm: str) -> Float64:
        """A weight [in, out] that reads the residual stream behind `norm`."""
        if self.rotations.fold_norm_scale:
            weight = self.tensor(f"{norm}.weight", transposed=False)[:, None] * weight
        weight = weight if self.r1 is None else self.r1.rotate_inputs(weight)
        given = self._of_norm(norm, self.given.norm)
        weight = weight if given is None else weight / given[:, None]
        factors = self._of_norm(norm, self.given.inputs)
        return weight if factors is None else _solved(*factors, weight)

    def writer(self, weight: Float64) -> Float64:
        """A weight [..., out] that is added to the residual stream."""
        return weight if self.r1 is None else self.r1.rotate_outputs(weight)

    def values(self, layer: int, values: Float64) -> Float64:
        """What becomes of v_proj's outputs, the last axis."""
        matrices = self.given.value(layer, self.num_kv_heads)
        if matrices is None:
            return self.by_head(values)
        turned: Float64 = np.empty_like(values)
        for h, matrix in enumerate(matrices):
            head = slice(h * self.head_dim, (h + 1) * self.head_dim)
            turned[..., head] = values[..., head] @ matrix
        return turned

    def heads_and_values_undone(self, layer: int, weight: Float64) -> Float64:
        """o_proj's weight [in, out] behind the transforms of its input."""
        split = weight.reshape(self.num_heads, self.head_dim, -1)
        matrices = self.given.value(layer, self.num_kv_heads)
        if matrices is None:
            split = self.by_head(weight.T).T.reshape(split.shape)
        else:
            shared = self.num_heads // self.num_kv_heads
            split = np.stack(
                [np.linalg.solve(matrices[h // shared], x) for h, x in enumerate(split)]
            )
        across = self.given.heads(layer)
        if across is not None:
            flat = np.linalg.solve(across, split.reshape(self.num_heads, -1)).astype(np.float64)
            return flat.reshape(weight.shape)
        if self.rotations.heads and self.heads.kind == "full":
            split = np.einsum("hdo,hg->gdo", split, self.heads.matrix())
        return split.reshape(weight.shape)

    def down_undone(self, layer: int, weight: Float64) -> Float64:
        """down_proj's weight [in, out] behind the transform of its input."""
        given = self.given.down(layer)
        if given is not None:
            return _solved(*given, weight)
        if self.rotations.r4 and self.r4.kind != "none":
            return self.r4.apply(weight, axis=0)
        return weight

    def by_head(self, values: Float64) -> Float64:
        """R2 on the last axis, head by head."""
        if not self.rotations.r2 or self.r2.kind == "none":
            return values
        matrix = self.r2.matrix()
        split = values.reshape(*values.shape[:-1], -1, len(matrix))
        return (split @ matrix).reshape(values.shape)

    def linear(self, module: str) -> Float64:
        """The weight of linear `module` of a layer."""
        weight = self.tensor(f"{module}.weight", transposed=True)
        layer, role = module.rsplit(".", 2)[0], module.rpartition(".")[2]
        index = _layer_of(module)
        if role in ("q_proj", "k_proj", "v_proj"):
            weight = self.reader(weight, f"{layer}.input_layernorm")
            return self.values(index, weight) if role == "v_proj" else weight
        up = self.given.up(index)
        if role in ("gate_proj", "up_proj"):
            weight = self.reader(weight, f"{layer}.post_attention_layernorm")
            return weight if up is None or role == "gate_proj" else weight / up
        if role == "o_proj":
            weight = self.heads_and_values_undone(index, weight)
        else:
            weight = self.down_undone(index, weight if up is None else weight * up[:, None])
        return self.writer(weight)

    def bias(self, module: str) -> Float64:
        """The bias of linear `module` of a layer."""
        values = self.tensor(f"{module}.bias", transposed=False)
        role = module.rpartition(".")[2]
        if role == "v_proj":
            return self.values(_layer_of(module), values)
        return self.writer(values) if role in ("o_proj", "down_proj") else values


def _layer_of(module: str) -> int:
    """3 of ``model.layers.3.mlp.down_proj``."""
    return int(module.split(".")[2])
