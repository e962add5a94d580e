# SPDX-License-Identifier: Apache-2.0
"""Who can run what a recipe makes: one answer per target, with the reasons where it cannot.

The answer comes from the resolved recipe alone. ONNX Runtime runs every recipe, because each
operator of `quarot_onnx.ops` carries its meaning as an ONNX function. TensorRT runs what
`quarot-onnx build` lowers to our plugins (docs/plugins.md). Nothing falls back: where a target is
refused here, no command builds for it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from quarot_onnx.recipe import Activations, KvCache, Recipe, Weights


@dataclass(frozen=True)
class Target:
    """One place where a recipe's artifact may run.

    Attributes:
        name: ``onnxruntime`` or ``tensorrt``.
        reasons: why it cannot; empty where it can.
    """

    name: str
    reasons: tuple[str, ...] = ()


def targets_of(recipe: "Recipe", transformed: Sequence[str] = ()) -> tuple[Target, ...]:
    """Every target, in a fixed order.

    Args:
        recipe: the resolved recipe.
        transformed: places whose given matrices run online (`Transforms.online`).
    """
    reasons = [*_without_plugin(recipe)]
    online = {*recipe.learning.online, *transformed}
    if online:
        reasons.append(
            f"matrices of {', '.join(sorted(online))} run online: the Hadamard plugins take no "
            "other matrices"
        )
    return Target("onnxruntime"), Target("tensorrt", tuple(reasons))


def _without_plugin(recipe: "Recipe") -> Iterator[str]:
    """What the recipe asks of TensorRT that `build` does not lower to a plugin."""
    yield from _of_weights(recipe.weights)
    if recipe.outliers.are_split:
        yield "outliers: float products beside the codes are untested in TensorRT"
    yield from _of_activations(recipe.activations)
    yield from _of_cache(recipe.kv_cache)


def _of_weights(weights: "Weights") -> Iterator[str]:
    if weights.bits != 4:
        yield f"weights.bits = {weights.bits}: the GEMM plugin multiplies codes of 4 bits"
    elif weights.down_proj_bits not in (None, 4):
        yield (
            f"weights.down_proj_bits = {weights.down_proj_bits}: the GEMM plugin multiplies codes "
            "of 4 bits"
        )
    if weights.bits < 16 and not weights.form.is_per_channel:
        yield "weights with groups or zero points: the GEMM plugin has a scale per output channel"
    if weights.bits < 16 and weights.sparsity != "none":
        yield "weights.sparsity: the GEMM plugin multiplies dense codes only"


def _of_activations(activations: "Activations") -> Iterator[str]:
    if activations.bits != 4:
        yield f"activations.bits = {activations.bits}: the GEMM plugin multiplies codes of 4 bits"
    if activations.bits == 16:
        return
    if activations.mode != "symmetric":
        yield f"activations.mode = {activations.mode}: no kernel writes zero points"
    if activations.group_size:
        size = activations.group_size
        yield f"activations.group_size = {size}: a token has one scale in the plugins"
    if activations.down_proj_bits not in (None, 4):
        yield (
            f"activations.down_proj_bits = {activations.down_proj_bits}: the GEMM plugin "
            "multiplies codes of 4 bits"
        )


def _of_cache(cache: "KvCache") -> Iterator[str]:
    if cache.bits < 16 and cache.io == "float":
        yield "kv_cache.io = float: a cache of rounded floats has no plugin"
    elif cache.bits != 4:
        yield f"kv_cache.bits = {cache.bits}: the cache plugins store codes of 4 bits"
    if cache.bits < 16 and cache.mode != "asymmetric":
        yield f"kv_cache.mode = {cache.mode}: the cache plugins write asymmetric codes"
    if cache.bits < 16 and cache.group_size:
        yield f"kv_cache.group_size = {cache.group_size}: a head has one scale in the plugins"
