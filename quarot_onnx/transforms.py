# SPDX-License-Identifier: Apache-2.0
"""Matrices that are given and not constructed: imported from a file, or learned.

A `Transforms` says, place by place, what stands where a Hadamard matrix would. It travels as one
``.safetensors`` file, the format of rotation files: ``R1``, and ``model.layers.N.self_attn.R2``
with the names of SpinQuant's (arXiv 2405.16406); the other names are this project's own. A place
that a file leaves out keeps what the recipe says.

Vectors are rows, as everywhere: a matrix M acts as ``x @ M``. With n = hidden_size, d = head_dim,
H query heads, K cache heads and m = intermediate_size, of ``model.layers.N``:

| tensor | shape | place |
|---|---|---|
| ``R1`` | [n, n] | the residual stream; orthogonal |
| ``self_attn.R2`` | [d, d] | values of every head; orthogonal |
| ``self_attn.value`` | [K, d, d] | values of each cache head; in place of R2 |
| ``self_attn.key`` | [d, d] | keys, and queries by its inverse transpose; in place of R3 |
| ``self_attn.heads`` | [H, H] | o_proj's input, across heads |
| ``mlp.down_A``, ``mlp.down_B`` | [a, a], [b, b] | down_proj's input, a b = m; in place of R4 |
| ``mlp.up`` | [m] | divides up_proj's output, multiplies down_proj's weight |
| ``input_layernorm.scale`` | [n] | multiplies the norm's output |
| ``post_attention_layernorm.scale`` | [n] | the same |
| ``input_layernorm.A``, ``.B`` | [a, a], [b, b] | the input of q, k and v, a b = n |
| ``post_attention_layernorm.A``, ``.B`` | [a, a], [b, b] | that of gate and up |

Orthogonal matrices are refused where they are not, and made so to float64 rounding where they were
stored in fewer bits. All others need only be invertible: their inverses go into weights.
"""

import hashlib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from quarot_onnx.errors import InputError, UnsupportedModelError
from quarot_onnx.export.architectures import LLAMA_MODULES, Dimensions
from quarot_onnx.export.checkpoint import read_tensors
from quarot_onnx.weights import Float64

FILE = "transforms.safetensors"
"""The name in an artifact."""

_ORTHOGONAL_WITHIN = 1e-2  # of max|Q Q^T - 1|: a matrix stored in bfloat16 is within 3e-3
_LARGEST_FACTOR = 1024  # a dense product of this order already costs more than many a linear
_LARGEST_CONDITION = 1e6  # beyond, float32 activations lose what they are transformed for

_ONLINE = {  # the name of a tensor -> of its place in `quarot_onnx.recipe.Learning.places`
    "input_layernorm.A": "inputs",
    "mlp.down_A": "down",
    "post_attention_layernorm.A": "inputs",
    "self_attn.heads": "heads",
    "self_attn.key": "key",
}
_IN_LAYER = re.compile(r"model\.layers\.\d+\.(.+)")
_ATTENTION = "model.layers.{}.self_attn."
_MLP = "model.layers.{}.mlp."
NORMS = ("input_layernorm", "post_attention_layernorm")


@dataclass(frozen=True)
class Transforms:
    """Given matrices and scales by tensor name; float64, checked.

    Attributes:
        tensors: name -> array, as in the module's table.
        source: where they come from, for the manifest.
    """

    tensors: Mapping[str, Float64] = field(default_factory=dict)
    source: str = ""

    @classmethod
    def of(
        cls, tensors: Mapping[str, Float64], dimensions: Dimensions, source: str
    ) -> "Transforms":
        """`tensors`, after each was compared with the model's sizes.

        Raises:
            InputError: an unknown name, a wrong shape, a matrix that is not
                orthogonal where it must be, or one that is singular; names the tensor.
        """
        expected = _shapes(dimensions)
        checked: dict[str, Float64] = {}
        for name, stored in tensors.items():
            if name not in expected:
                raise InputError(
                    f"{source}: tensor {name} has no place in this model; names are R1, "
                    "model.layers.N.self_attn.R2 and those of quarot_onnx/transforms.py"
                )
            where = f"{source}: {name}"
            array = stored.astype(np.float64)
            _require_shape(where, array, expected[name])
            checked[name] = _checked(where, name.rpartition(".")[2], array)
        result = cls(checked, source)
        result._require_all_layers(dimensions.num_layers)
        for layer in range(dimensions.num_layers):
            result._require_factors(layer, dimensions)
        return result

    @classmethod
    def load(cls, path: Path, dimensions: Dimensions) -> "Transforms":
        """The file `path`, checked against the model's sizes.

        Raises:
            InputError: not a readable ``.safetensors`` file, or one of the errors of `of`.
        """
        if path.suffix in (".bin", ".pt", ".pth"):
            raise InputError(
                f"{path}: pickled tensors can run code and are refused; convert them with "
                "safetensors.torch.save_file"
            )
        if not path.is_file():
            raise InputError(f"{path}: no such file; give a .safetensors file of matrices")
        return cls.of(read_tensors(path), dimensions, path.name)

    @classmethod
    def of_artifact(cls, artifact: Path, dimensions: Dimensions) -> "Transforms":
        """Those that an artifact was made with; empty where it has none.

        Raises:
            InputError: the file is damaged.
        """
        path = artifact / FILE
        return cls.load(path, dimensions) if path.exists() else cls()

    def including(self, found: Mapping[str, Float64]) -> "Transforms":
        """These and `found`, which passes have chosen by looking at data."""
        if not found:
            return self
        return Transforms({**self.tensors, **found}, self.source or "calibration")

    def save(self, path: Path) -> None:
        """Write ``.safetensors`` in float64: what is read back is what was applied."""
        path.write_bytes(self._bytes())

    @property
    def sha256(self) -> str:
        """Of the file that `save` writes."""
        return hashlib.sha256(self._bytes()).hexdigest()

    def _bytes(self) -> bytes:
        from safetensors.numpy import save  # noqa: PLC0415

        arrays = {name: np.ascontiguousarray(x) for name, x in sorted(self.tensors.items())}
        return bytes(save(arrays))

    def __bool__(self) -> bool:
        return bool(self.tensors)

    @property
    def places(self) -> list[str]:
        """What is given, without the layers: ``R1``, ``self_attn.R2``, ..."""
        layered = (_IN_LAYER.match(name) for name in self.tensors)
        names = {found[1] for found in layered if found}
        return sorted(names | ({"R1"} & set(self.tensors)))

    @property
    def online(self) -> list[str]:
        """The places whose matrices run as nodes of the graph, by the names of a recipe."""
        return sorted({_ONLINE[place] for place in self.places if place in _ONLINE})

    @property
    def r1(self) -> Float64 | None:
        """R1 [n, n]."""
        return self.tensors.get("R1")

    def value(self, layer: int, num_kv_heads: int) -> Float64 | None:
        """What turns the values of each cache head, [K, d, d]."""
        r2 = self._at(_ATTENTION, layer, "R2")
        if r2 is not None:
            return np.broadcast_to(r2, (num_kv_heads, *r2.shape))
        return self._at(_ATTENTION, layer, "value")

    def key(self, layer: int) -> Float64 | None:
        """What turns the keys, [d, d]."""
        return self._at(_ATTENTION, layer, "key")

    def heads(self, layer: int) -> Float64 | None:
        """What mixes the heads in front of o_proj, [H, H]."""
        return self._at(_ATTENTION, layer, "heads")

    def down(self, layer: int) -> tuple[Float64, Float64] | None:
        """A and B of what turns down_proj's input, ``x @ (A ⊗ B)``."""
        a, b = (self._at(_MLP, layer, f"down_{side}") for side in "AB")
        return None if a is None or b is None else (a, b)

    def up(self, layer: int) -> Float64 | None:
        """What up_proj's output is divided by, [m]."""
        return self._at(_MLP, layer, "up")

    def norm(self, layer: int, which: int) -> Float64 | None:
        """What multiplies the output of a layer's first (0) or second (1) norm, [n]."""
        return self._at("model.layers.{}.", layer, f"{NORMS[which]}.scale")

    def inputs(self, layer: int, which: int) -> tuple[Float64, Float64] | None:
        """A and B of what turns the output of a layer's first (0) or second (1) norm."""
        a, b = (self._at("model.layers.{}.", layer, f"{NORMS[which]}.{side}") for side in "AB")
        return None if a is None or b is None else (a, b)

    def _at(self, place: str, layer: int, name: str) -> Float64 | None:
        return self.tensors.get(place.format(layer) + name)

    def _require_all_layers(self, num_layers: int) -> None:
        """A place is given in every layer or in none, and values have one matrix."""
        layers: dict[str, int] = {}
        for name in self.tensors:
            if found := _IN_LAYER.match(name):
                layers[found[1]] = layers.get(found[1], 0) + 1
        for place, count in layers.items():
            if count != num_layers:
                raise InputError(
                    f"{self.source}: {place} is given for {count} of {num_layers} layers; "
                    "give it for all or none"
                )
        if {"self_attn.R2", "self_attn.value"} <= set(layers):
            raise InputError(
                f"{self.source}: has self_attn.R2 and self_attn.value, which are one place; "
                "keep one"
            )

    def _require_factors(self, layer: int, dimensions: Dimensions) -> None:
        wanted = {"mlp.down_": _intermediate_size(dimensions)}
        wanted |= {f"{norm}.": dimensions.hidden_size for norm in NORMS}
        for place, size in wanted.items():
            sides = (self._at("model.layers.{}.", layer, f"{place}{side}") for side in "AB")
            sizes = [len(x) for x in sides if x is not None]
            if sizes and (len(sizes) == 1 or math.prod(sizes) != size):
                raise InputError(
                    f"{self.source}: layer {layer} has {place}A and {place}B of orders {sizes}, "
                    f"which do not make {size}; give both, with that product"
                )


def balanced_factors(n: int, place: str) -> tuple[int, int]:
    """(a, b) with a b = n and the smallest a + b, a at most b: the cheapest Kronecker product.

    Raises:
        UnsupportedModelError: n has no such factors of at most `_LARGEST_FACTOR`.
    """
    a = next(a for a in range(int(n**0.5), 0, -1) if n % a == 0)
    if n // a > _LARGEST_FACTOR:
        raise UnsupportedModelError(
            f"learning.places: {place} needs a Kronecker product of {n} features, which have no "
            f"factors up to {_LARGEST_FACTOR}; take {place} out"
        )
    return a, n // a


def require_learnable(config_file: Path, model_type: str) -> None:
    """Nothing, for the families that `quarot_onnx.learning` is written for.

    Raises:
        UnsupportedModelError: another one.
    """
    if model_type not in LLAMA_MODULES:
        raise UnsupportedModelError(
            f"{config_file}: learning is written for {', '.join(LLAMA_MODULES)}, not for "
            f"{model_type}; import matrices with --transforms, or leave learning.places empty"
        )


def inverse(matrix: Float64) -> Float64:
    """The inverse of matrices [..., n, n], in float64."""
    return np.linalg.inv(matrix).astype(np.float64)


def _intermediate_size(dimensions: Dimensions) -> int:
    """What down_proj reads; the passes refuse transforms in a mixture of experts."""
    return dimensions.feed_forwards[0].size


def _shapes(dimensions: Dimensions) -> dict[str, tuple[int | None, ...]]:
    """The shape of every tensor that a file may hold; None where any size is legal."""
    n, m, d = dimensions.hidden_size, _intermediate_size(dimensions), dimensions.head_dim
    heads, cache = dimensions.num_heads, dimensions.num_kv_heads
    shapes: dict[str, tuple[int | None, ...]] = {"R1": (n, n)}
    for layer in range(dimensions.num_layers):
        attention, mlp = _ATTENTION.format(layer), _MLP.format(layer)
        shapes |= {
            f"{attention}R2": (d, d),
            f"{attention}value": (cache, d, d),
            f"{attention}key": (d, d),
            f"{attention}heads": (heads, heads),
            f"{mlp}down_A": (None, None),
            f"{mlp}down_B": (None, None),
            f"{mlp}up": (m,),
        }
        for norm in NORMS:
            place = f"model.layers.{layer}.{norm}"
            shapes |= {
                f"{place}.scale": (n,),
                f"{place}.A": (None, None),
                f"{place}.B": (None, None),
            }
    return shapes


def _require_shape(where: str, array: Float64, expected: tuple[int | None, ...]) -> None:
    wanted = tuple(
        found if size is None else size for found, size in zip(array.shape, expected, strict=False)
    )
    square = None not in expected or (array.ndim == 2 and array.shape[0] == array.shape[1])
    if len(array.shape) != len(expected) or array.shape != wanted or not square:
        text = "square" if None in expected else list(expected)
        raise InputError(
            f"{where}: has shape {list(array.shape)} where this model needs {text}; "
            "it belongs to another model"
        )


def _checked(where: str, name: str, array: Float64) -> Float64:
    """The array, orthogonal to rounding where it must be; refused where it cannot be inverted."""
    if array.ndim == 1:
        if not (array > 0).all():
            raise InputError(f"{where}: has scales of 0 or less; a scale is positive")
        return array
    if name in ("R1", "R2"):
        error = np.abs(array @ array.T - np.eye(len(array))).max()
        if error > _ORTHOGONAL_WITHIN:
            raise InputError(
                f"{where}: is not orthogonal, max|Q Q.T - 1| = {error:.2g}; "
                "give a rotation (rows of length 1 that are perpendicular)"
            )
        left, _, right = np.linalg.svd(array)  # the nearest orthogonal matrix
        nearest: Float64 = left @ right
        return nearest
    condition = float(np.max(np.linalg.cond(array)))
    if not condition < _LARGEST_CONDITION:
        raise InputError(
            f"{where}: condition number {condition:.2g}; it must be invertible, below "
            f"{_LARGEST_CONDITION:.0e}"
        )
    return array
