# SPDX-License-Identifier: Apache-2.0
"""Recipes: which rotations, which bits; frozen, and an unknown key is an error.

A recipe is a TOML file. Presets ship in ``quarot_onnx/recipes/``; ``--set KEY=VALUE`` changes one
value. The resolved recipe is saved with every artifact.
"""

import difflib
import tomllib
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from quarot_onnx.errors import UsageError
from quarot_onnx.quantizers.form import Form
from quarot_onnx.targets import Target, targets_of

_PRESETS = Path(__file__).parent / "recipes"
_SIZE_LIMIT = 1_000_000

CodeBits = Literal[3, 4, 5, 6, 7, 8, 16]
"""Bits of a code; 16 leaves the tensor in the float dtype of the export."""

WeightBits = Literal[2, 3, 4, 5, 6, 7, 8, 16]
"""Bits of a weight's code; 2 and 3 are stored in 4, 5 to 7 in 8."""


class _Spec(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Rotations(_Spec):
    """Which rotations are applied; names as in the field (docs/design.md).

    `r4_policy` is for sizes of down_proj without a Hadamard matrix: leave the site alone, rotate
    blocks, or pad with zeros to the next size that has one (`quarot_onnx.hadamard.plan`).
    """

    fold_norm_scale: bool = True
    r1: Literal[
        "none",
        "hadamard",
        "randomized_hadamard",
        "random_orthogonal",
        "walsh",
        "grouped_walsh",
        "dct",
        "identity",
    ] = "randomized_hadamard"
    group_size: int = Field(default=128, ge=1)
    candidates: int = Field(default=1, ge=1)
    post_norm: Literal["online", "skip_r1"] = "online"
    r2: bool = True
    heads: bool = True
    r3: bool = True
    r4: bool = True
    r4_policy: Literal["full", "block", "pad"] = "block"


class Smoothing(_Spec):
    """Channel scales before the rotations, from what calibration text activates (SmoothRot)."""

    down_proj: bool = False
    alpha: float = Field(default=0.5, ge=0, le=1)


Place = Literal["r1", "r2", "value", "key", "heads", "down", "up", "norms", "inputs"]
"""A place whose matrix can be learned; `quarot_onnx.transforms` says what stands there."""


class Learning(_Spec):
    """Which matrices are trained on calibration text, and how.

    ``r1`` and ``r2`` stay orthogonal, as in SpinQuant; ``value``, ``key``, ``heads``, ``down`` and
    ``inputs`` (of q, k, v and of gate, up) are free invertible matrices, as in FlatQuant; ``up``
    and ``norms`` are scales of channels.
    """

    places: list[Place] = []
    steps: int = Field(default=300, ge=1)
    batch: int = Field(default=4, ge=1)
    rotation_rate: float = Field(default=0.01, gt=0)
    matrix_rate: float = Field(default=0.01, gt=0)
    scale_rate: float = Field(default=0.005, gt=0)
    weight_bits: Literal[3, 4, 5, 6, 8, 16] = 16

    @property
    def online(self) -> list[str]:
        """The places whose matrices run as nodes of the graph."""
        return [place for place in self.places if place in ("key", "heads", "down", "inputs")]


class Weights(_Spec):
    """Weight quantization.

    Attributes:
        bits: of a code.
        method: ``rtn`` rounds to nearest; ``gptq`` makes up for each error in what is still to be
            rounded, on calibration text (arXiv 2210.17323). The others prune: ``obr`` makes up for
            pruning and rounding together (arXiv 2509.11177); ``wanda`` and ``magnitude`` prune, by
            ``|w| * sqrt(E[x^2])`` and by ``|w|``, and leave the rest to GPTQ.
        sparsity: half of the inputs of an output channel are 0, or two of each four.
        symmetric: without zero points.
        group_size: input features that share a scale, at most: the largest divisor of
            in_features up to it; 0 for one scale per output channel.
        clip_search: shrink each range to the least squared error.
        damping: GPTQ adds so much of the mean diagonal to the Hessian.
        block_size: rows that GPTQ updates at once; changes the speed only.
        act_order: GPTQ rounds the inputs of largest power first.
        static_groups: GPTQ takes the scales of groups from the weight as it was.
        down_proj_bits: of down_proj's codes, where they differ.
    """

    bits: WeightBits = 4
    method: Literal["rtn", "gptq", "obr", "wanda", "magnitude"] = "rtn"
    sparsity: Literal["none", "50%", "2:4"] = "none"
    symmetric: bool = True
    group_size: int = Field(default=0, ge=0)
    clip_search: bool = True
    damping: float = Field(default=0.01, gt=0, le=1)
    block_size: int = Field(default=128, ge=1)
    act_order: bool = False
    static_groups: bool = False
    down_proj_bits: Literal[2, 3, 4, 5, 6, 7, 8] | None = None

    @model_validator(mode="after")
    def _check(self) -> "Weights":
        if self.act_order and self.group_size and not self.static_groups:
            raise ValueError(
                "act_order visits the groups in turn; set weights.static_groups = true"
            )
        prunes = self.method not in ("rtn", "gptq")
        if prunes != (self.sparsity != "none"):
            raise ValueError(
                f"method = {self.method} with sparsity = {self.sparsity}; obr, wanda and magnitude "
                "prune, to 50% or 2:4, and the others do not"
            )
        if prunes and not self.symmetric:
            raise ValueError(
                f"method = {self.method} with zero points; set weights.symmetric = true"
            )
        return self

    @property
    def is_calibrated(self) -> bool:
        """Whether the method needs calibration text."""
        return self.method != "rtn"

    def uncalibrated(self) -> "Weights":
        """Round to nearest in the same form."""
        return Weights(
            bits=self.bits,
            symmetric=self.symmetric,
            group_size=self.group_size,
            clip_search=self.clip_search,
            down_proj_bits=self.down_proj_bits,
        )

    @property
    def form(self) -> Form:
        """How a weight is stored."""
        return Form(self.bits, self.symmetric, self.group_size, self.clip_search)

    @property
    def down_proj_form(self) -> Form:
        """How down_proj's weight is stored."""
        return replace(self.form, bits=self.down_proj_bits or self.bits)

    @property
    def most_bits(self) -> int:
        """Of any code."""
        return max(self.bits, self.down_proj_bits or 0)


class _Rounded(_Spec):
    """How a row of features is rounded, dynamically: every token has scales of its own.

    Attributes:
        bits: of a code.
        clip_ratio: the part of the range that codes cover; with a search, where it starts.
        mode: with a zero point or without; ``skew`` and ``error`` choose per site on calibration
            text, by the thresholds below (QuaRot Extended) or by the measured error.
        clip: ``fixed``, or per site by the measured ``error``, or that and then by the
            ``perplexity`` of the whole model (GBS, arXiv 2504.13989).
        group_size: features that share a scale; 0 for all of a row.
        skewness: above this mean |skewness| of the rows, ``skew`` is asymmetric.
        off_centre: above this mean |mean| / standard deviation of the rows, too.
    """

    mode: Literal["symmetric", "asymmetric", "skew", "error"] = "symmetric"
    clip: Literal["fixed", "error", "perplexity"] = "fixed"
    group_size: int = Field(default=0, ge=0)
    skewness: float = Field(default=0.5, ge=0)
    off_centre: float = Field(default=0.25, ge=0)

    @property
    def is_calibrated(self) -> bool:
        """Whether a choice needs calibration text."""
        return self.mode in ("skew", "error") or self.clip != "fixed"

    def uncalibrated(self) -> Self:
        """The same bits and groups, and nothing that is chosen on text."""
        usual = type(self).model_fields["mode"].default
        mode = usual if self.mode in ("skew", "error") else self.mode
        return self.model_copy(update={"mode": mode, "clip": "fixed"})


class Activations(_Rounded):
    """Activation quantization: a row is a token; down_proj may have bits of its own."""

    bits: CodeBits = 4
    clip_ratio: float = Field(default=0.9, gt=0, le=1)
    down_proj_bits: Literal[3, 4, 5, 6, 7, 8] | None = None
    down_proj_clip_ratio: float = Field(default=1.0, gt=0, le=1)


class KvCache(_Rounded):
    """Cache quantization: a row is a head of a token."""

    bits: CodeBits = 4
    clip_ratio: float = Field(default=0.95, gt=0, le=1)
    mode: Literal["symmetric", "asymmetric", "skew", "error"] = "asymmetric"
    io: Literal["packed", "float"] = "packed"


class Outliers(_Spec):
    """Input features of linears that stay float, with their weights: the way before rotations.

    Attributes:
        share: of the features of every input, those with the largest activations (QUIK,
            arXiv 2310.09259: 256 of 4096).
        threshold: every feature whose activation reaches it (LLM.int8, arXiv 2208.07339: 6).
    """

    share: float = Field(default=0.0, ge=0, lt=1)
    threshold: float = Field(default=0.0, ge=0)

    @property
    def are_split(self) -> bool:
        """Whether any feature stays float."""
        return self.share > 0 or self.threshold > 0


class CalibrationText(_Spec):
    """How much of a text the calibrated methods look at: evenly spaced windows, without overlap.

    A text with fewer tokens gives fewer windows. The text itself is given with the export.
    """

    windows: int = Field(default=128, ge=1)
    window_length: int = Field(default=256, ge=2)
    search_windows: int = Field(default=16, ge=1)


class Recipe(_Spec):
    """Everything that decides what an export computes, apart from the model and the float dtype."""

    name: str = "custom"
    description: str = ""
    seed: int = Field(default=0, ge=0, lt=2**32)
    rotations: Rotations = Rotations()
    smoothing: Smoothing = Smoothing()
    learning: Learning = Learning()
    weights: Weights = Weights()
    activations: Activations = Activations()
    kv_cache: KvCache = KvCache()
    outliers: Outliers = Outliers()
    calibration: CalibrationText = CalibrationText()

    @model_validator(mode="after")
    def _check(self) -> "Recipe":
        if self.activations.bits < 16 and self.weights.bits == 16:
            raise ValueError(
                f"activations.bits = {self.activations.bits} with float weights; "
                "integer products need weights.bits below 16"
            )
        if self.activations.bits == 16 and self.activations.down_proj_bits is not None:
            raise ValueError(
                f"activations.down_proj_bits = {self.activations.down_proj_bits} with float "
                "activations; set activations.bits below 16"
            )
        is_sparse = self.weights.sparsity != "none"
        if self.activations.bits < 16 and is_sparse and self.weights.group_size:
            raise ValueError(
                f"weights.sparsity = {self.weights.sparsity} with weights.group_size = "
                f"{self.weights.group_size}; sparse integer products have a scale per output "
                "channel, set weights.group_size = 0"
            )
        if self.outliers.share > 0 and self.outliers.threshold > 0:
            raise ValueError(
                f"outliers.share = {self.outliers.share:g} and outliers.threshold = "
                f"{self.outliers.threshold:g}; give one of them"
            )
        if self.weights.bits == 16 and self.weights.down_proj_bits is not None:
            raise ValueError(
                f"weights.down_proj_bits = {self.weights.down_proj_bits} with float weights; "
                "set weights.bits below 16"
            )
        if self.rotations.r1 != "none" and not self.rotations.fold_norm_scale:
            raise ValueError("rotations.r1 needs rotations.fold_norm_scale = true")
        self._check_learning()
        return self

    def _check_learning(self) -> None:
        places, rotations = self.learning.places, self.rotations
        if len(set(places)) < len(places):
            raise ValueError(f"learning.places = {places} names a place twice")
        if "r1" in places and rotations.r1 == "none":
            raise ValueError("learning.places has r1 and rotations.r1 = none; name a start")
        if places and not rotations.fold_norm_scale:  # which the training does
            raise ValueError("learning.places needs rotations.fold_norm_scale = true")
        if places and "down" not in places and rotations.r4_policy == "pad":
            raise ValueError(
                "learning.places without down needs rotations.r4_policy = block or full"
            )
        if {"r2", "value"} <= set(places):
            raise ValueError("learning.places has r2 and value, which are one place; keep one")
        if "up" in places and self.smoothing.down_proj:
            raise ValueError("smoothing.down_proj and up in learning.places are one place")

    @property
    def is_lossy(self) -> bool:
        """Whether anything is quantized."""
        return min(self.weights.bits, self.activations.bits, self.kv_cache.bits) < 16

    @property
    def is_calibrated(self) -> bool:
        """Whether a method looks at text before it decides."""
        looks = [
            bool(self.learning.places),
            self.smoothing.down_proj,
            self.rotations.candidates > 1,
            self.outliers.are_split,
        ]
        sections = (self.weights, self.activations, self.kv_cache)
        rounded = (section.bits < 16 and section.is_calibrated for section in sections)
        return any((*looks, *rounded))

    def as_json(self) -> dict[str, Any]:
        """The resolved recipe as plain data, with ``targets``."""
        return {**self.model_dump(), "targets": [asdict(target) for target in self.targets()]}

    def targets(self) -> tuple[Target, ...]:
        """Who can run an artifact of this recipe, and why not."""
        return targets_of(self)


def preset_names() -> list[str]:
    """The recipes that ship with the package."""
    return sorted(path.stem for path in _PRESETS.glob("*.toml"))


def preset_text(name: str) -> str:
    """The TOML of a preset, or of the file `name`."""
    path = _PRESETS / f"{name}.toml"
    return (path if path.exists() else Path(name)).read_text(encoding="utf-8")


def load_recipe(name: str, overrides: Iterable[str] = ()) -> Recipe:
    """The recipe `name` (a preset or the path of a TOML file) with ``KEY=VALUE`` overrides.

    Raises:
        UsageError: no such recipe, not TOML, an unknown key, or a value out of range; names the
        key.
    """
    path = _PRESETS / f"{name}.toml"
    if not path.exists():
        path = Path(name)
        if path.suffix != ".toml":
            close = difflib.get_close_matches(name, preset_names(), n=1)
            hint = (
                f"did you mean {close[0]!r}"
                if close
                else f"presets are {', '.join(preset_names())}"
            )
            raise UsageError(f"recipe {name!r}: no such preset and not a .toml file; {hint}")
    content = _read(path)
    for override in overrides:
        _override(content, override)
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        raise UsageError(f"recipe {name}: {_explain(error)}") from error


def _read(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _SIZE_LIMIT:
            raise UsageError(f"{path}: larger than {_SIZE_LIMIT} bytes; this is not a recipe")
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(
            f"{path}: cannot be read ({error.strerror}); give a preset or a file"
        ) from error
    except (ValueError, RecursionError) as error:  # not UTF-8, not TOML, a number of 5000 digits
        raise UsageError(f"{path}: not TOML ({error}); see `quarot-onnx recipes`") from error


def _override(content: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key.strip():
        raise UsageError(f"--set {override}: not KEY=VALUE; for example kv_cache.io=float")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        value = text.strip()
    *tables, last = key.strip().split(".")
    table = content
    for name in tables:
        table = table.setdefault(name, {})
        if not isinstance(table, dict):
            raise UsageError(f"--set {override}: {name} is a value and has no keys")
    table[last] = value


def _explain(error: ValidationError) -> str:
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"]) or "recipe"
    if first["type"] == "extra_forbidden":
        known = _known_keys()
        close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]}" if close else f"known keys are {', '.join(known)}"
        return f"unknown key {key}; {hint}"
    message = first["msg"].removeprefix("Value error, ")
    given = "" if first["type"] == "value_error" else f" = {first['input']!r}"
    return f"{key}{given}: {message[:1].lower()}{message[1:]}"


def _known_keys() -> list[str]:
    keys: list[str] = []
    for name, info in Recipe.model_fields.items():
        nested = info.annotation
        if isinstance(nested, type) and issubclass(nested, _Spec):
            keys += [f"{name}.{inner}" for inner in nested.model_fields]
        else:
            keys.append(name)
    return keys
