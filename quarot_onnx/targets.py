# SPDX-License-Identifier: Apache-2.0
"""Who can run what a recipe makes: one answer per target, with the reasons where it cannot.

The answer comes from the resolved recipe alone. ONNX Runtime runs every recipe, because each
operator of `quarot_onnx.ops` carries its meaning as an ONNX function. TensorRT runs what its own
layers and our plugins (docs/plugins.md) cover. Nothing falls back: where a target is refused here,
no command builds for it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from quarot_onnx.recipe import Recipe


@dataclass(frozen=True)
class Target:
    """One place where a recipe's artifact may run.

    Attributes:
        name: ``onnxruntime`` or ``tensorrt``.
        reasons: why it cannot; empty where it can.
    """

    name: str
    reasons: tuple[str, ...] = ()

    @property
    def is_supported(self) -> bool:
        """Whether it can run the recipe."""
        return not self.reasons


def targets_of(recipe: "Recipe", transformed: Sequence[str] = ()) -> tuple[Target, ...]:
    """Every target, in a fixed order.

    Args:
        recipe: the resolved recipe.
        transformed: places whose given matrices run online (`Transforms.online`).
    """
    reasons = [*_without_plugin(recipe)]
    online = {*recipe.learning.online, *(_place(name) for name in transformed)}
    if online:
        reasons.append(
            f"matrices of {', '.join(sorted(online))} run online: the Hadamard plugins take no "
            "other matrices"
        )
    return Target("onnxruntime"), Target("tensorrt", tuple(reasons))


def _place(tensor: str) -> str:
    """``key`` of ``self_attn.key``, ``down`` of ``mlp.down_A``."""
    return tensor.rpartition(".")[2].removesuffix("_A")


def _without_plugin(recipe: "Recipe") -> Iterator[str]:
    """What the recipe asks of TensorRT that neither its layers nor a plugin does."""
    weights, activations, cache = recipe.weights, recipe.activations, recipe.kv_cache
    for name, bits in (("weights", weights.bits), ("activations", activations.bits)):
        if bits not in (4, 16):
            yield f"{name}.bits = {bits}: the GEMM plugin multiplies codes of 4 bits"
    if weights.bits < 16 and not weights.form.is_per_channel:
        yield "weights with groups or zero points: the GEMM plugin has a scale per output channel"
    if weights.sparsity != "none":
        yield "weights.sparsity: the GEMM plugin multiplies dense codes only"
    if cache.bits < 16 and cache.io == "float":
        yield "kv_cache.io = float: a cache of rounded floats has no plugin"
    elif cache.bits not in (4, 16):
        yield f"kv_cache.bits = {cache.bits}: the cache plugins store codes of 4 bits"
