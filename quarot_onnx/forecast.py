# SPDX-License-Identifier: Apache-2.0
"""What an export would do, from config.json and the weight headers alone: ``export --dry-run``.

Nothing is traced and no weight is read, so the answer comes at once, on a machine without torch.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from quarot_onnx.export.architectures import (
    TRANSPOSED_STACKS,
    Dimensions,
    FeedForward,
    check_config,
    dimensions,
)
from quarot_onnx.export.checkpoint import Checkpoint
from quarot_onnx.hadamard import Plan, Policy, plan
from quarot_onnx.ops import PACKED_BITS
from quarot_onnx.recipe import Recipe
from quarot_onnx.rotation import Rotation
from quarot_onnx.rounding import require_groups
from quarot_onnx.transforms import Transforms, balanced_factors, require_learnable

FLOAT_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}

_POLICIES: tuple[Policy, ...] = ("full", "block", "pad")

_NO_FAST_FORM = "post-norms keep their scale, and the matrix has no fast form to run behind them"
_RUNTIME_BYTES = 600_000_000  # the interpreter with torch, transformers and a traced layer


@dataclass(frozen=True)
class Site:
    """One rotation of the plan.

    Attributes:
        name: R1, R2, heads, R3 or R4; qkv or gate_up where QuaRot has no rotation.
        where: what it turns.
        size: the dimension.
        how: factors of the Hadamard, or the kind of matrix.
        runs: ``offline`` (fused into weights), ``online`` (a node) or ``skipped``.
        cost: multiply-adds per token and layer of the online part.
        suppression: by how much the peak of a single outlier shrinks; None where the matrix is
        learned or given.
        reason: why it is skipped or not a full Hadamard.
        candidates: what each policy would do, where they differ; the first is the recipe's.
    """

    name: str
    where: str
    size: int
    how: str
    runs: str
    cost: int
    suppression: float | None
    reason: str = ""
    candidates: tuple["Candidate", ...] = ()


@dataclass(frozen=True)
class Candidate:
    """What a policy of ``rotations.r4_policy`` makes of a site.

    Attributes:
        policy: its name.
        how: factors of the Hadamard and what they act on.
        size: the features behind it, zeros included.
        cost: multiply-adds per token and layer of the online part, and of the padded columns.
        suppression: by how much the peak of a single outlier shrinks.
    """

    policy: str
    how: str
    size: int
    cost: int
    suppression: float


@dataclass(frozen=True)
class Forecast:
    """The plan of an export.

    Attributes:
        model_type: from config.json.
        recipe: the recipe's name.
        dtype: of the float parts.
        layers, parameters: of the model.
        sites: the rotations.
        weight_bytes: linears of the layers as stored, with scales.
        float_bytes: embedding, head, norms and biases.
        cache_bytes_per_token: all layers, as the graph's inputs hold them.
        float_cache_bytes_per_token: the same in float32.
        peak_memory_bytes: an estimate of the export's peak.
    """

    model_type: str
    recipe: str
    dtype: str
    layers: int
    parameters: int
    sites: tuple[Site, ...]
    weight_bytes: int
    float_bytes: int
    cache_bytes_per_token: int
    float_cache_bytes_per_token: int
    peak_memory_bytes: int


def forecast(
    checkpoint: Checkpoint, recipe: Recipe, dtype: str, transforms: Path | None = None
) -> Forecast:
    """The plan of exporting `checkpoint` with `recipe`, and with the matrices of a file.

    Raises:
        InputError, UnsupportedModelError: what the export itself would refuse for its
        configuration.
    """
    config = checkpoint.config
    config_file = checkpoint.directory / "config.json"
    check_config(config_file, config)
    sizes = dimensions(config)
    if transforms is not None:
        given = Transforms.load(transforms, sizes)
        online, source, orders = given.online, "given", _given(given)
    else:
        if recipe.learning.places:
            require_learnable(config_file, config["model_type"])
        learning = recipe.learning
        online, source, orders = learning.online, "learned", _learned(learning.places, sizes)
    require_groups(recipe, sizes, online)
    layers = sizes.num_layers
    matrices = list(_linears(checkpoint, sizes))
    linear_count = sum(rows * columns for rows, columns in matrices)
    parameters = sum(_count(entry.shape) for entry in checkpoint.tensors.values())
    embedding = sizes.vocabulary_size * sizes.hidden_size
    routers = sum(_count(shape) for shape in _routers(checkpoint, sizes))
    vectors = sum(entry.shape[0] for entry in checkpoint.tensors.values() if len(entry.shape) == 1)
    return Forecast(
        model_type=config["model_type"],
        recipe=recipe.name,
        dtype=dtype,
        layers=layers,
        parameters=parameters,
        sites=tuple(_with_matrices(_sites(recipe, sizes), sizes, orders, source)),
        weight_bytes=_stored(linear_count, recipe.weights.bits, dtype)
        + (_scale_bytes(recipe, matrices) if recipe.weights.bits < 16 else 0),
        float_bytes=(2 * embedding + vectors + routers) * FLOAT_BYTES[dtype],
        cache_bytes_per_token=2
        * layers
        * sizes.num_kv_heads
        * _cache_bytes(recipe, sizes.head_dim, dtype),
        float_cache_bytes_per_token=2 * layers * sizes.num_kv_heads * sizes.head_dim * 4,
        peak_memory_bytes=_RUNTIME_BYTES + 24 * max((_count(m) for m in matrices), default=0),
    )


def _scale_bytes(recipe: Recipe, matrices: Iterable[tuple[int, int]]) -> int:
    """Of the scales, and of the zero points where they are stored, of matrices [out, in]."""
    form = recipe.weights.form
    scales = sum(rows * (columns // form.rows(columns)) for rows, columns in matrices)
    is_float = recipe.activations.bits == 16
    has_zeros = not form.symmetric or (is_float and not form.is_per_channel)
    return (5 if has_zeros else 4) * scales


def _matrices(checkpoint: Checkpoint) -> Iterator[tuple[int, int]]:
    """[out, in] of every matrix of a layer; of stacks, of each expert."""
    is_transposed = checkpoint.config["model_type"] in TRANSPOSED_STACKS
    for name, entry in checkpoint.tensors.items():
        if ".layers." in name and len(entry.shape) in (2, 3):
            *stack, rows, columns = entry.shape
            if stack and is_transposed:
                rows, columns = columns, rows
            yield from [(rows, columns)] * _count(tuple(stack))


def _is_router(shape: tuple[int, int], sizes: Dimensions) -> bool:
    """Whether a matrix stays float: a router, the gate of a shared expert, a stack of biases."""
    return bool(sizes.num_experts) and shape[0] in (1, sizes.num_experts)


def _linears(checkpoint: Checkpoint, sizes: Dimensions) -> Iterator[tuple[int, int]]:
    yield from (shape for shape in _matrices(checkpoint) if not _is_router(shape, sizes))


def _routers(checkpoint: Checkpoint, sizes: Dimensions) -> Iterator[tuple[int, int]]:
    yield from (shape for shape in _matrices(checkpoint) if _is_router(shape, sizes))


def _count(shape: tuple[int, ...]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product


def _stored(count: int, bits: int, dtype: str) -> int:
    if bits == 16:
        return count * FLOAT_BYTES[dtype]
    return count // 2 if bits <= 4 else count


def _cache_bytes(recipe: Recipe, head_dim: int, dtype: str) -> int:
    cache = recipe.kv_cache
    if cache.bits == 16 or cache.io == "float":
        return head_dim * FLOAT_BYTES[dtype]
    groups = head_dim // min(cache.group_size or head_dim, head_dim)
    return (head_dim // 2 if cache.bits <= PACKED_BITS else head_dim) + 8 * groups


Orders = dict[str, tuple[int, ...]]
"""Of the matrices of a layer that are learned or given, by `Site.name`."""


def _learned(places: Sequence[str], sizes: Dimensions) -> Orders:
    """What a training of `places` makes."""
    d, hidden = sizes.head_dim, sizes.hidden_size
    found: Orders = {}
    for place in places:
        match place:
            case "r1":
                found["R1"] = (hidden,)
            case "r2" | "value":
                found["R2"] = (d,)
            case "key":
                found["R3"] = (d,)
            case "heads":
                found["heads"] = (sizes.num_heads,)
            case "down":
                found["R4"] = balanced_factors(sizes.feed_forwards[0].size, place)
            case "inputs":
                found["qkv"] = found["gate_up"] = balanced_factors(hidden, place)
    return found


def _given(transforms: Transforms) -> Orders:
    """What a file has for the first layer."""
    found = {
        "R1": [transforms.r1],
        "R2": [transforms.value(0, 1)],
        "R3": [transforms.key(0)],
        "heads": [transforms.heads(0)],
        "R4": transforms.down(0) or (),
        "qkv": transforms.inputs(0, 0) or (),
        "gate_up": transforms.inputs(0, 1) or (),
    }
    orders = {
        name: tuple(len(x.T) for x in given if x is not None) for name, given in found.items()
    }
    return {name: each for name, each in orders.items() if each}


def _with_matrices(
    planned: Iterable[Site], sizes: Dimensions, orders: Orders, source: str
) -> Iterator[Site]:
    """The sites, those of `orders` with matrices of these orders in place of the recipe's."""
    heads, head_dim, hidden = sizes.num_heads, sizes.head_dim, sizes.hidden_size
    network = sizes.feed_forwards[0]
    places = (  # name, what is turned, its features, how often online
        ("R1", "residual stream", hidden, 0),
        ("R2", "values, per head", head_dim, 0),
        ("qkv", "input of q, k and v", hidden, 1),
        ("heads", "o_proj input, across heads", heads, head_dim),
        ("R3", "queries and keys, per head", head_dim, 2 * heads),
        ("gate_up", "input of gate and up", hidden, 1),
        ("R4", f"{network.name} input", network.size, 1),
    )
    usual: dict[str, list[Site]] = {}
    for site in planned:
        usual.setdefault(site.name, []).append(site)
    for name, where, size, times in places:
        if name not in orders:
            yield from usual.get(name, ())
            continue
        how = f"{source} {' x '.join(map(str, orders[name]))}"
        cost = size * sum(orders[name]) * times
        site = Site(name, where, size, how, "online" if times else "offline", cost, None)
        is_skipped = name == "R1" and sizes.post_norms
        yield replace(site, runs="skipped", reason=_NO_FAST_FORM) if is_skipped else site


def _sites(recipe: Recipe, sizes: Dimensions) -> list[Site]:
    rotations = recipe.rotations
    heads, head_dim = sizes.num_heads, sizes.head_dim
    sites = []
    if rotations.r1 != "none":
        sites.append(_residual_site(recipe, sizes))
    if rotations.r2:
        sites.append(_site("R2", "values, per head", plan(head_dim), online=False))
    if rotations.heads:
        across = plan(heads, policy="full")
        sites.append(_site("heads", "o_proj input, across heads", across, times=head_dim))
    if rotations.r3:
        sites.append(_site("R3", "queries and keys, per head", plan(head_dim), times=2 * heads))
    if rotations.r4:
        for network in sizes.feed_forwards:
            where = f"{network.name} input"
            found = plan(network.size, policy=rotations.r4_policy)
            candidates = tuple(_candidates(rotations.r4_policy, network, sizes.hidden_size))
            site = _site("R4", where, found, times=network.visits)
            sites.append(replace(site, candidates=candidates))
    return sites


def _candidates(chosen: Policy, network: FeedForward, out_features: int) -> Iterator[Candidate]:
    """The plan of each policy, the chosen one first; nothing where all make the same."""
    policies: list[Policy] = [chosen, *(p for p in _POLICIES if p != chosen)]
    plans = {policy: plan(network.size, policy=policy) for policy in policies}
    if plans[chosen].kind == "full":
        return
    for policy, found in plans.items():
        padding = (found.padded_size - found.size) * out_features
        yield Candidate(
            policy,
            _how(found),
            found.padded_size,
            network.visits * (found.cost + padding),
            found.suppression,
        )


def _residual_site(recipe: Recipe, sizes: Dimensions) -> Site:
    """R1: offline, but for models with post-norms, behind each of which it runs online."""
    form = recipe.rotations
    assert form.r1 != "none"
    hidden, where = sizes.hidden_size, "residual stream"
    rotation = Rotation(form.r1, hidden, recipe.seed, "R1")
    site = Site("R1", where, hidden, rotation.describe(), "offline", 0, hidden**0.5)
    if not sizes.post_norms:
        return site
    if form.post_norm == "skip_r1":
        reason = "post-norms keep their scale, and rotations.post_norm = skip_r1"
        return replace(site, runs="skipped", suppression=1.0, reason=reason)
    if rotation.plan is None:
        return replace(site, runs="skipped", suppression=1.0, reason=_NO_FAST_FORM)
    return replace(
        site,
        runs="online",
        cost=sizes.post_norms * rotation.plan.cost,
        reason=f"online behind {sizes.post_norms} post-norms a layer, offline elsewhere",
    )


def _site(name: str, where: str, found: Plan, *, times: int = 1, online: bool = True) -> Site:
    runs = "skipped" if found.kind == "none" else "online" if online else "offline"
    return Site(
        name,
        where,
        found.size,
        _how(found),
        runs,
        found.cost * times if runs == "online" else 0,
        found.suppression,
        found.reason,
    )


def _how(found: Plan) -> str:
    """The factors, and what they act on where it is not the whole dimension."""
    text = f"hadamard {' x '.join(map(str, found.factors))}" if found.factors else "-"
    if found.kind == "block":
        return f"{text} in {found.size // found.block_size} blocks"
    return f"{text}, padded to {found.padded_size}" if found.kind == "padded" else text


def as_json(found: Forecast) -> dict[str, Any]:
    """The forecast as plain data."""
    return {**vars(found), "sites": [asdict(site) for site in found.sites]}
