# SPDX-License-Identifier: Apache-2.0
"""How each activation and each cached head is rounded: bits, mode, clip, features per scale.

A `Site` is a place where a quantizer goes: the input that one or more linears read, or the keys or
values of a layer as they enter the cache. The recipe gives every site a `Rounding`; calibrated
methods change some of them (`quarot_onnx.calibration.roundings`).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import onnx_ir as ir

from quarot_onnx.decoder import Decoder
from quarot_onnx.errors import InputError, UnsupportedModelError
from quarot_onnx.export.architectures import Dimensions
from quarot_onnx.hadamard import plan
from quarot_onnx.handles import Linear
from quarot_onnx.ops import Array, Float32, groups
from quarot_onnx.recipe import Activations, KvCache, Recipe

_FLOAT_BITS = 16
_FEWEST = 16  # features of a sum, where groups do not fit: scaling costs more than summing below


@dataclass(frozen=True)
class Rounding:
    """A quantizer of rows of features.

    Attributes:
        bits: of a code, 3 to 8.
        symmetric: no zero point.
        clip_ratio: the part of the range that codes cover.
        group_size: features that share a scale; those of a whole row (a token of an activation, a
            head of a token of the cache) where there are no groups.
    """

    bits: int
    symmetric: bool
    clip_ratio: float
    group_size: int

    def values(self, x: Array) -> Float32:
        """What the codes of x [..., features] stand for."""
        return groups.fake_quantize_groups(x.astype("float32"), **self.attributes)

    @property
    def attributes(self) -> dict[str, Any]:
        """As attributes of a node of `quarot_onnx.ops`."""
        return {**asdict(self), "symmetric": int(self.symmetric)}

    @property
    def mode(self) -> str:
        """``symmetric`` or ``asymmetric``."""
        return "symmetric" if self.symmetric else "asymmetric"


@dataclass(frozen=True, eq=False)
class Site:
    """A value that is rounded.

    Attributes:
        layer: the index of its layer.
        name: the module of the first linear that reads it, or `Attention.cache_site`.
        readers: the modules of all linears that read it; of the cache, the name alone.
        kind: ``qkv``, ``o_proj``, ``gate_up``, ``down_proj``, ``keys`` or ``values``.
        value: what the graph holds.
        features: of a row.
        rounding: by the recipe.
    """

    layer: int
    name: str
    readers: tuple[str, ...]
    kind: str
    value: ir.Value
    features: int
    rounding: Rounding

    def describe(self) -> dict[str, Any]:
        """For the report of a pass."""
        return {"site": self.name, "readers": list(self.readers), "kind": self.kind}

    @property
    def is_cached(self) -> bool:
        """Whether it is keys or values."""
        return self.kind in ("keys", "values")

    @property
    def has_groups(self) -> bool:
        """Whether a row has more than one scale."""
        return self.rounding.group_size < self.features


def activation_sites(decoder: Decoder, activations: Activations) -> list[Site]:
    """The distinct inputs of the linears of all layers, in the order of computation.

    Raises:
        UnsupportedModelError: the groups do not divide an input.
    """
    sites: list[Site] = []
    for layer in decoder.layers:
        kinds = {layer.attention.o.node: "o_proj"}
        for mlp in layer.mlps:
            kinds |= {reader.node: "gate_up" for reader in mlp.readers} | {
                mlp.down.node: "down_proj"
            }
        readers: dict[ir.Value, list[Linear]] = {}
        for linear in layer.linears:
            readers.setdefault(rounded_value(linear), []).append(linear)
        for x, linears in readers.items():
            first = linears[0]
            kind = kinds.get(first.node, "qkv")
            sites.append(
                Site(
                    layer.index,
                    first.module,
                    tuple(linear.module for linear in linears),
                    kind,
                    x,
                    first.in_features,
                    input_rounding(
                        activations, kind, first.in_features, decoder.hidden_size, first.name
                    ),
                )
            )
    return sites


def input_rounding(
    activations: Activations, kind: str, features: int, hidden_size: int, where: str
) -> Rounding:
    """What the recipe says of the input of a linear, before anything is measured.

    Args:
        activations: of the recipe.
        kind: `Site.kind`.
        features: of the input.
        hidden_size: of the residual stream.
        where: the linear, for messages.

    Raises:
        UnsupportedModelError: the groups do not divide the input.
    """
    bits, clip_ratio = activations.bits, activations.clip_ratio
    if kind == "down_proj" and activations.down_proj_bits is not None:
        bits, clip_ratio = activations.down_proj_bits, activations.down_proj_clip_ratio
    size = _group_size(activations.group_size, features, hidden_size, where)
    return Rounding(bits, activations.mode != "asymmetric", clip_ratio, size)


def summed_features(where: str, features: int, of_input: int, of_weight: int) -> int:
    """Features that have one scale on both sides: the largest number that divides both groups.

    Raises:
        UnsupportedModelError: they are few, though either group is larger; names `where`.
    """
    shared = math.gcd(of_input, of_weight)
    if shared < min(of_input, of_weight, _FEWEST):
        raise UnsupportedModelError(
            f"{where}: in_features = {features} has groups of {of_input} in the activation "
            f"and of {of_weight} in the weight, which only parts of {shared} divide; set "
            f"weights.group_size = {of_input} or activations.group_size = 0"
        )
    return shared


def require_groups(recipe: Recipe, sizes: Dimensions, online: Sequence[str]) -> None:
    """Nothing, where the recipe's groups fit the model: known before a weight is read.

    Args:
        recipe: activations, cache and weights.
        sizes: of the model.
        online: places whose learned or given matrices run online.

    Raises:
        UnsupportedModelError: names the kind of linear.
    """
    hidden, rotations = sizes.hidden_size, recipe.rotations
    inputs = [("q_proj", "qkv", hidden), ("o_proj", "o_proj", sizes.num_heads * sizes.head_dim)]
    inputs.append(("gate_proj", "gate_up", hidden))
    for network in sizes.feed_forwards:
        has_r4 = rotations.r4 and "down" not in online
        rotated = plan(network.size, policy=rotations.r4_policy if has_r4 else "full")
        inputs.append((network.name, "down_proj", rotated.padded_size))
    for where, kind, features in inputs if recipe.activations.bits < _FLOAT_BITS else ():
        of_input = input_rounding(recipe.activations, kind, features, hidden, where).group_size
        summed_features(where, features, of_input, recipe.weights.form.rows(features))
    if recipe.kv_cache.bits < _FLOAT_BITS:
        cache_rounding(recipe.kv_cache, sizes.head_dim, "attention")


def moved_rows(node: ir.Node | None) -> ir.Value | None:
    """The rows that `node` copies or groups for the experts of a mixture, if that is what it does.

    Rounding a row and moving it commute.
    """
    if node is None or node.attributes.get_int("axis", 0) != 0:
        return None
    return node.inputs[0] if node.op_type in ("Gather", "Split") else None


def rounded_value(linear: Linear) -> ir.Value:
    """What is rounded for `linear`: its input, before rows of it were copied or grouped."""
    value = linear.x
    while (rows := moved_rows(value.producer())) is not None:
        value = rows
    return value


def _group_size(asked: int, features: int, hidden_size: int, where: str) -> int:
    """Features that share a scale; 0 asks for the whole row.

    Where `asked` does not divide the row, the row has as many groups as the residual stream, as in
    QuaRot's code for down_proj.
    """
    if asked == 0 or asked >= features:
        return features
    if features % asked == 0:
        return asked
    count = hidden_size // asked
    if hidden_size % asked or features % count:
        raise UnsupportedModelError(
            f"{where}: in_features = {features} is no multiple of activations.group_size = "
            f"{asked}, nor of the residual stream's number of groups; choose a divisor of it"
        )
    return features // count


def cache_sites(decoder: Decoder, cache: KvCache) -> list[Site]:
    """The keys and values of all layers as they enter the cache.

    Raises:
        UnsupportedModelError: the groups do not divide a head.
    """
    sites = []
    for layer in decoder.layers:
        attention = layer.attention
        rounding = cache_rounding(cache, attention.head_dim, attention.node.name or "")
        for append, kind in ((attention.key_append, "key"), (attention.value_append, "value")):
            name = attention.cache_site(kind)
            new = append.inputs[1]
            assert new is not None
            sites.append(
                Site(layer.index, name, (name,), f"{kind}s", new, attention.head_dim, rounding)
            )
    return sites


def cache_rounding(cache: KvCache, head_dim: int, where: str) -> Rounding:
    """What the recipe says of keys and values, before anything is measured; `where`: for messages.

    Raises:
        UnsupportedModelError: the groups do not divide a head.
    """
    size = min(cache.group_size or head_dim, head_dim)
    if head_dim % size:
        raise UnsupportedModelError(
            f"{where}: head_dim = {head_dim} is no multiple of kv_cache.group_size = {size}; "
            f"choose a divisor of {head_dim}"
        )
    return Rounding(cache.bits, cache.mode == "symmetric", cache.clip_ratio, size)


@dataclass(frozen=True, eq=False)
class Quantizer:
    """A node that rounds a site.

    Attributes:
        site: what it rounds.
        node: with the attribute ``clip_ratio``.
    """

    site: Site
    node: ir.Node

    @property
    def clip_ratio(self) -> float:
        """As it is now."""
        return self.node.attributes["clip_ratio"].as_float()

    def set_clip_ratio(self, clip_ratio: float) -> None:
        """Change the node."""
        self.node.attributes["clip_ratio"] = ir.AttrFloat32("clip_ratio", clip_ratio)


@dataclass(frozen=True)
class Choice:
    """The sites of a pass, each with the rounding that was decided for it.

    Attributes:
        sites: in the order of computation.
        measured: site -> what the decision rests on, for the report.
    """

    sites: tuple[Site, ...]
    measured: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def records(self) -> list[dict[str, Any]]:
        """One entry per site: what was decided, and what was measured."""
        return [
            {
                **site.describe(),
                **asdict(site.rounding),
                **self.measured.get(site.name, {}),
            }
            for site in self.sites
        ]

    def describe(self, row: str) -> str:
        """One phrase: ``4 bits, per token, clip 0.9``; `row` says what a row is."""
        roundings = [site.rounding for site in self.sites]
        bits = " and ".join(str(b) for b in sorted({r.bits for r in roundings}))
        parts = [f"{bits} bits", row]
        sizes = sorted({s.rounding.group_size for s in self.sites if s.has_groups})
        if sizes:
            parts.append(f"groups of {' and '.join(str(size) for size in sizes)}")
        asymmetric = sum(not r.symmetric for r in roundings)
        parts.append(f"{asymmetric} of {len(roundings)} sites asymmetric")
        clips = sorted({r.clip_ratio for r in roundings})
        parts.append(f"clip {' to '.join(f'{c:g}' for c in dict.fromkeys((clips[0], clips[-1])))}")
        return ", ".join(parts)


_ROUNDING = tuple(each.name for each in fields(Rounding))


def roundings_of(manifest: Mapping[str, Any]) -> dict[str, Rounding]:
    """What an artifact's passes report: the rounding of each linear's module and cache site.

    Raises:
        InputError: a record does not say all of it.
    """
    found: dict[str, Rounding] = {}
    for report in manifest["passes"]:
        for record in report.get("records", ()):
            for name in record.get("readers", ()):
                try:
                    if report["name"] in ("QuantizeActivations", "QuantizeKvCache"):
                        found[name] = Rounding(**{key: record[key] for key in _ROUNDING})
                    elif report["name"] == "SearchClips":
                        found[name] = replace(found[name], clip_ratio=record["clip_ratio"])
                except KeyError as error:
                    raise InputError(
                        f"manifest.json: {report['name']}'s record of {name} has no "
                        f"{error.args[0]}; export again"
                    ) from error
    return found
