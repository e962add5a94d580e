# SPDX-License-Identifier: Apache-2.0
"""Validate an artifact: stages, each a number against a threshold, that together leave no gap.

The chain from Hugging Face's model to the graph's logits has two links. ``weights``: every
initializer is the checkpoint's tensor, folded, rotated and rounded as the recipe says. ``layers``:
with those initializers, every layer of the graph computes what plain PyTorch computes, each layer
being given the graph's own input, so that an activation code that rounds the other way (a tie,
resolved by the last bit of a float sum) does not spread into the layers behind it. ``equivalence``
closes the chain end to end where nothing is quantized.

Graphs run through Polygraphy's ONNX Runtime runner, PyTorch through a runner of our own, and both
through its comparator. What Polygraphy does not see is checked beside it: the set of outputs (it
passes when ``logits`` is missing), NaN, scale (its cosine similarity is blind to it), causality.
"""

import json
import math
import re
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import onnx
from numpy.typing import NDArray
from polygraphy.backend.base import BaseRunner
from polygraphy.backend.onnxrt import OnnxrtRunner
from polygraphy.common import TensorMetadata
from polygraphy.comparator import Comparator
from polygraphy.logger import G_LOGGER

from quarot_onnx.artifacts import DATA, MODEL, changed_files, load_manifest
from quarot_onnx.errors import GateError, InputError, UnsupportedModelError, UsageError
from quarot_onnx.evaluate import decode_perplexity, log_probabilities
from quarot_onnx.hadamard import plan
from quarot_onnx.recipe import Recipe
from quarot_onnx.rotation import Rotation
from quarot_onnx.runtime import CausalModel, Ids, Logits, OnnxModel, load_session, load_tokenizer

if TYPE_CHECKING:
    from quarot_onnx.export.architectures import Dimensions
    from quarot_onnx.export.checkpoint import Checkpoint
    from quarot_onnx.reference import FakeQuantModel, HuggingFaceModel

Status = Literal["passed", "failed", "skipped"]
Float64 = NDArray[np.float64]

IDS = (
    "integrity",
    "structure",
    "load",
    "finite",
    "sensitivity",
    "causality",
    "weights",
    "equivalence",
    "layers",
    "logits",
    "quality",
    "cache",
    "padding",
)
"""The stages, in order."""

_SIZES = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "vocab_size",
)
_OPSET, _IR_VERSION = 23, 10
_ELEMENT_TYPES = {
    "float32": onnx.TensorProto.FLOAT,
    "float16": onnx.TensorProto.FLOAT16,
    "bfloat16": onnx.TensorProto.BFLOAT16,
}
_EPSILON = {"float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}
_TOLERANCE = {"float32": 1e-4, "float16": 16 * 2.0**-10, "bfloat16": 16 * 2.0**-7}
"""max|difference| / max|logit| of two computations of one function, by the dtype they run in."""

_TOP1, _LOG_PERPLEXITY = 0.96, 0.01  # of decode against prefill, and of padded against plain
_LOCAL_PATH = re.compile(rb"/(?:home|root|Users|tmp|usr|opt|mnt)/[\w.-]+/|site-packages|\.py\b")
_BATCH, _LENGTH, _CHANGED = 2, 48, 16

_PROMPT = (
    "The ship left the harbour at dawn, and by noon the coast was a grey line behind it. Nobody "
    "on deck spoke of the storm. The captain had said that it would pass to the south, and the "
    "captain had been right before. In the evening the wind turned. First the small sails went, "
    "then the lamp at the bow, and then, one after the other, the men began to look at the sky. "
    "What they saw there none of them would forget: a wall of cloud, as high as a mountain, "
    "coming on without a sound. The youngest asked what they should do now, and the oldest of "
    "them laughed and said that there was nothing to be done but to hold on to whatever was "
    "nearest and wait for the morning."
)
"""Text for models with a tokenizer; without one, tokens are drawn at random."""


@dataclass(frozen=True)
class Stage:
    """What one stage found.

    Attributes:
        id: one of `IDS`.
        status: skipped stages say why in `detail`.
        metric: what `value` is; passed is ``value <= threshold`` unless the metric says otherwise.
        value: None where nothing was measured.
        threshold: None where the value is only reported.
        seconds: wall time.
        detail: one line for a person.
    """

    id: str
    status: Status
    metric: str = ""
    value: float | None = None
    threshold: float | None = None
    seconds: float = 0.0
    detail: str = ""


@dataclass(frozen=True)
class Verdict:
    """The stages of one validation.

    Attributes:
        artifact: what was validated.
        stages: in order.
        required: stages that may not be skipped.
    """

    artifact: Path
    stages: tuple[Stage, ...]
    required: tuple[str, ...] = ()

    @property
    def failures(self) -> tuple[Stage, ...]:
        """The stages that failed, or were skipped although they were required."""
        return tuple(
            stage
            for stage in self.stages
            if stage.status == "failed" or (stage.status == "skipped" and stage.id in self.required)
        )

    @property
    def passed(self) -> bool:
        """Whether nothing failed."""
        return not self.failures

    def as_json(self) -> dict[str, Any]:
        """For ``--json``; numbers that are not finite become null."""
        stages = [asdict(stage) for stage in self.stages]
        for stage in stages:
            for key in ("value", "threshold"):
                if stage[key] is not None and not math.isfinite(stage[key]):
                    stage[key] = None
        return {
            "artifact": str(self.artifact),
            "passed": self.passed,
            "stages": stages,
            "failed": [stage.id for stage in self.failures],
            "skipped": [stage.id for stage in self.stages if stage.status == "skipped"],
        }

    def require_passed(self) -> None:
        """Nothing, for a verdict that passed.

        Raises:
            GateError: names the stages that failed, with the first one's finding.
        """
        if self.failures:
            first, *others = self.failures
            more = f" (and {', '.join(stage.id for stage in others)})" if others else ""
            raise GateError(
                f"{self.artifact}: {first.id} {first.status}{more}: {first.detail}; "
                "the artifact must not be used, export again"
            )


class _Skip(Exception):  # noqa: N818  # not an error: it says why a stage has nothing to do
    """Why a stage was skipped."""


@dataclass(frozen=True)
class _Finding:
    metric: str
    value: float
    threshold: float | None
    detail: str
    has_passed: bool | None = None

    @property
    def passed(self) -> bool:
        if self.has_passed is not None:
            return self.has_passed
        return self.threshold is None or self.value <= self.threshold  # false for NaN


def validate(
    artifact: Path,
    reference: Path | None = None,
    *,
    require: Sequence[str] = (),
    tolerance: float | None = None,
    runtime: str = "ort-cpu",
    threads: int | None = None,
    progress: Callable[[Stage], None] | None = None,
) -> Verdict:
    """Run every stage on `artifact`.

    Args:
        artifact: a directory that ``quarot-onnx export`` wrote.
        reference: the Hugging Face directory; stages that need it are skipped where None.
        require: stages that may not be skipped.
        tolerance: of the stage ``equivalence``; by the artifact's dtype where None.
        runtime: where the graph runs.
        threads: of one operator.
        progress: called after each stage.

    Returns:
        The verdict; a failed stage does not raise.

    Raises:
        UsageError: `require` names no stage.
        InputError: not an artifact at all, or the reference is damaged.
        MissingDependencyError: the runtime is not on this machine.
    """
    for name in require:
        if name not in IDS:
            raise UsageError(f"--require {name}: no such stage; stages are {', '.join(IDS)}")
    subject = _Subject(artifact, reference, runtime, threads, tolerance)
    if reference is not None:
        _ = subject.checkpoint, subject.judge  # a damaged reference is no finding on the artifact
    stages: list[Stage] = []
    for name in IDS:
        stage = _run(name, subject)
        if name == "load":
            subject.is_loaded = stage.status == "passed"
        elif name == "finite":
            subject.is_finite = stage.status == "passed"
        stages.append(stage)
        if progress is not None:
            progress(stage)
    return Verdict(artifact, tuple(stages), tuple(require))


def _run(name: str, subject: "_Subject") -> Stage:
    start = time.perf_counter()
    try:
        finding = _STAGES[name](subject)
    except _Skip as reason:
        return Stage(name, "skipped", detail=str(reason))
    except (InputError, GateError) as error:
        seconds = time.perf_counter() - start
        return Stage(name, "failed", seconds=seconds, detail=str(error))
    return Stage(
        name,
        "passed" if finding.passed else "failed",
        finding.metric,
        finding.value,
        finding.threshold,
        time.perf_counter() - start,
        finding.detail,
    )


class _Subject:
    """An artifact under validation; what is costly is made once, when a stage first needs it."""

    def __init__(
        self,
        artifact: Path,
        reference: Path | None,
        runtime: str,
        threads: int | None,
        tolerance: float | None,
    ) -> None:
        self.artifact, self.reference = artifact, reference
        self.runtime, self.threads = runtime, threads
        self.manifest = load_manifest(artifact)
        try:
            self.recipe = Recipe.model_validate(self.manifest["recipe"])
            self.dtype = str(self.manifest["dtype"])
            self.tolerance = _TOLERANCE[self.dtype] if tolerance is None else tolerance
        except (KeyError, ValueError) as error:
            raise InputError(
                f"{artifact}/manifest.json: recipe or dtype is damaged; export again"
            ) from error
        self.is_loaded = False
        self.is_finite = False

    @cached_property
    def config(self) -> dict[str, Any]:
        path = self.artifact / "config.json"
        try:
            config = dict(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise InputError(f"{path}: cannot be read ({error}); export again") from error
        for key in _SIZES:
            if type(config.get(key)) is not int:
                raise InputError(f"{path}: {key} = {config.get(key)!r}; export again")
        return config

    @cached_property
    def sizes(self) -> "Dimensions":
        from quarot_onnx.export.architectures import dimensions  # noqa: PLC0415

        try:
            return dimensions(self.config)
        except (KeyError, TypeError, ZeroDivisionError) as error:
            path = self.artifact / "config.json"
            raise InputError(f"{path}: has no usable sizes ({error!r}); export again") from error

    @cached_property
    def graph(self) -> onnx.ModelProto:
        from google.protobuf.message import DecodeError  # type: ignore[import-untyped]  # noqa: PLC0415

        path = self.artifact / MODEL
        try:
            return onnx.load(str(path), load_external_data=False)
        except (OSError, DecodeError) as error:
            raise InputError(f"{path}: cannot be parsed ({error}); export again") from error

    @cached_property
    def model(self) -> OnnxModel:
        return OnnxModel(self.artifact, runtime=self.runtime, threads=self.threads)

    @cached_property
    def checkpoint(self) -> "Checkpoint":
        from quarot_onnx.export.checkpoint import Checkpoint  # noqa: PLC0415

        return Checkpoint(self.need_reference())

    @cached_property
    def judge(self) -> "HuggingFaceModel":
        from quarot_onnx.reference import HuggingFaceModel  # noqa: PLC0415  # imports torch

        return HuggingFaceModel(self.need_reference(), threads=self.threads)

    @cached_property
    def fake_quant(self) -> "FakeQuantModel":
        from quarot_onnx.reference import FakeQuantModel  # noqa: PLC0415  # imports torch

        return FakeQuantModel(self.artifact, threads=self.threads)

    @cached_property
    def ids(self) -> Ids:
        """Tokens [_BATCH, _LENGTH] to run: English where the model has a tokenizer."""
        count = _BATCH * _LENGTH
        try:
            found = load_tokenizer(self.artifact).encode(_PROMPT, add_special_tokens=False)
        except InputError:
            generator = np.random.default_rng(0)
            found = generator.integers(0, self.model.vocabulary_size, count).tolist()
        repeated = (found * (count // max(len(found), 1) + 1))[:count]
        return np.array(repeated, np.int64).reshape(_BATCH, _LENGTH)

    @cached_property
    def logits(self) -> Logits:
        """Of `ids`, by one prefill."""
        return self.model.step(self.ids, self.model.new_cache(_BATCH))[0]

    @cached_property
    def expected(self) -> tuple[Logits, Logits]:
        """Of `ids` by `fake_quant`, with and without rounding of activations and cache."""
        model = self.fake_quant
        rounded, _ = model.step(self.ids, model.new_cache(_BATCH))
        model.settings.is_quantizing = False
        plain, _ = model.step(self.ids, model.new_cache(_BATCH))
        model.settings.is_quantizing = True
        return rounded, plain

    def need_reference(self) -> Path:
        if self.reference is None:
            raise _Skip("no reference was given")
        return self.reference

    def need_llama_modules(self) -> None:
        from quarot_onnx.export.architectures import LLAMA_MODULES  # noqa: PLC0415

        model_type = self.config.get("model_type")
        if model_type not in LLAMA_MODULES:
            raise _Skip(
                f"written for {', '.join(LLAMA_MODULES)}, not for {model_type}; a rotate-only "
                "export is compared with Hugging Face in full"
            )

    def need_model(self) -> OnnxModel:
        if not self.is_loaded:
            raise _Skip("the graph was not loaded")
        if not self.is_finite:
            raise _Skip("weights or logits are not finite")
        return self.model

    def need_numpy_dtype(self) -> None:
        if self.dtype == "bfloat16":
            raise _Skip("ONNX Runtime gives no bfloat16 arrays to Polygraphy")


# --- The file -------------------------------------------------------------------------------------


def _integrity(subject: _Subject) -> _Finding:
    changed = changed_files(subject.artifact, subject.manifest)
    detail = f"{changed[0]} is missing or differs from manifest.json" if changed else "as exported"
    return _Finding("files that differ from the manifest", len(changed), 0, detail)


def _structure(subject: _Subject) -> _Finding:
    graph = subject.graph
    problems = [
        *_version_problems(graph),
        *_interface_problems(subject, graph),
        *_operator_problems(graph),
        *_data_problems(subject.artifact, graph),
    ]
    found = _LOCAL_PATH.search(graph.SerializeToString())
    if found is not None:
        problems.append(f"names a local path ({found[0].decode(errors='replace')})")
    if not problems:
        try:
            onnx.checker.check_model(str(subject.artifact / MODEL))
        except onnx.checker.ValidationError as error:
            problems.append(f"onnx.checker: {str(error).strip().splitlines()[0]}")
    detail = f"{MODEL}: {problems[0]}" if problems else f"{len(graph.graph.node)} nodes"
    return _Finding("structural problems", len(problems), 0, detail)


def _version_problems(graph: onnx.ModelProto) -> Iterator[str]:
    opsets = {o.domain: o.version for o in graph.opset_import}
    if opsets.get("") != _OPSET:
        yield f"opset {opsets.get('')}, expected {_OPSET}"
    if graph.ir_version != _IR_VERSION:
        yield f"IR version {graph.ir_version}, expected {_IR_VERSION}"


_Interface = dict[str, tuple[int, list[int | None]]]


def _interface(subject: _Subject) -> tuple[_Interface, _Interface]:
    """Inputs and outputs by name: element type, and shape with None for a symbolic size."""
    cache = subject.recipe.kv_cache
    sizes = subject.sizes
    size = sizes.head_dim
    int64, float32 = onnx.TensorProto.INT64, onnx.TensorProto.FLOAT
    dtype = _ELEMENT_TYPES[subject.dtype]
    if cache.bits < 16 and cache.io == "packed":
        codes = size // 2 if cache.bits == 4 else size
        parts = {"": (onnx.TensorProto.UINT8, codes), "_scale": (float32, 1), "_zero": (float32, 1)}
    else:
        parts = {"": (dtype, size)}
    inputs: _Interface = {
        name: (int64, [None, None]) for name in ("input_ids", "attention_mask", "position_ids")
    }
    outputs: _Interface = {"logits": (dtype, [None, None, sizes.vocabulary_size])}
    for index in range(sizes.num_layers):
        for kind in ("key", "value"):
            for part, (element, last) in parts.items():
                entry = (element, [None, sizes.num_kv_heads, None, last])
                inputs[f"past_key_values.{index}.{kind}{part}"] = entry
                outputs[f"present.{index}.{kind}{part}"] = entry
    return inputs, outputs


def _interface_problems(subject: _Subject, graph: onnx.ModelProto) -> Iterator[str]:
    expected = _interface(subject)
    for side, values, wanted in (
        ("input", graph.graph.input, expected[0]),
        ("output", graph.graph.output, expected[1]),
    ):
        found = {value.name: value.type.tensor_type for value in values}
        for name in sorted(wanted.keys() - found.keys()):
            yield f"{side} {name} is missing"
        for name in sorted(found.keys() - wanted.keys()):
            yield f"{side} {name} is not expected"
        for name in sorted(wanted.keys() & found.keys()):
            element, shape = wanted[name]
            dims = found[name].shape.dim
            held = [d.dim_value if d.HasField("dim_value") else None for d in dims]
            if found[name].elem_type != element:
                kinds = (
                    onnx.TensorProto.DataType.Name(t) for t in (found[name].elem_type, element)
                )
                yield "{} {} is {}, expected {}".format(side, name, *kinds)
            if held != shape:
                yield f"{side} {name} has shape {held}, expected {shape}"


def _operator_problems(graph: onnx.ModelProto) -> Iterator[str]:
    functions = {(function.domain, function.name) for function in graph.functions}
    for node in [*graph.graph.node, *(n for f in graph.functions for n in f.node)]:
        if node.domain not in ("", "ai.onnx") and (node.domain, node.op_type) not in functions:
            yield f"{node.name or node.op_type}: {node.domain}.{node.op_type} has no function body"


_BITS = {onnx.TensorProto.INT4: 4, onnx.TensorProto.UINT4: 4}


def _data_problems(artifact: Path, graph: onnx.ModelProto) -> Iterator[str]:
    extents: list[tuple[int, int, str]] = []
    for tensor in graph.graph.initializer:
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        entries = {entry.key: entry.value for entry in tensor.external_data}
        location = entries.get("location", "")
        if location != DATA:
            yield f"{tensor.name}: its data is in {location!r}, expected {DATA}"
            continue
        offset, length = int(entries.get("offset", 0)), int(entries.get("length", -1))
        kind = tensor.data_type
        bits = _BITS.get(kind) or onnx.helper.tensor_dtype_to_np_dtype(kind).itemsize * 8
        expected = (math.prod(tensor.dims) * bits + 7) // 8
        if length != expected:
            shape = list(tensor.dims)
            yield f"{tensor.name}: {length} bytes for shape {shape}, expected {expected}"
        extents.append((offset, offset + length, tensor.name))
    data = artifact / DATA
    available = data.stat().st_size if data.is_file() else 0
    end, before = 0, ""
    for start, stop, name in sorted(extents):
        if start < end:
            yield f"{name}: overlaps {before} in {DATA}"
        if stop > available:
            yield f"{name}: ends at byte {stop} of {DATA}, which has {available}"
        end, before = stop, name


def _load(subject: _Subject) -> _Finding:
    try:
        model = subject.model
    except UnsupportedModelError as error:
        raise _Skip(str(error)) from error
    return _Finding(
        "cache bytes per token", model.cache_bytes_per_token, None, f"runs on {subject.runtime}"
    )


def _finite(subject: _Subject) -> _Finding:
    from quarot_onnx.reference import read_initializers  # noqa: PLC0415  # imports torch

    broken: list[str] = []
    for name, tensor in read_initializers(subject.artifact).items():
        try:
            values = tensor.numpy()
        except (OSError, ValueError) as error:
            broken.append(f"initializer {name} cannot be read ({error})")
            continue
        if values.dtype.kind in "iub" or values.dtype.itemsize == 0 or "int" in str(values.dtype):
            continue
        bad = int((~np.isfinite(values.astype(np.float32))).sum())
        if bad:
            broken.append(f"initializer {name} has {bad} values that are not finite")
        elif name.endswith("_scale") and not (values > 0).all():
            broken.append(f"initializer {name} has scales that are not positive")
    if not broken and subject.is_loaded and not np.isfinite(subject.logits).all():
        broken.append("logits are not finite")
    detail = broken[0] if broken else "weights and logits"
    return _Finding("tensors that are not finite", len(broken), 0, detail)


# --- What the graph depends on --------------------------------------------------------------------


def _change_each_token(subject: _Subject) -> tuple[Logits, float]:
    """Row i is `ids` with token i changed, minus the logits of `ids` [T, T, V]; and max|logit|."""
    model = subject.need_model()
    base = subject.ids[0, :_CHANGED]
    rows = np.repeat(base[None], _CHANGED + 1, axis=0)
    for index in range(_CHANGED):
        rows[index + 1, index] = (base[index] + model.vocabulary_size // 2) % model.vocabulary_size
    logits, _ = model.step(rows, model.new_cache(len(rows)))
    return logits[1:] - logits[:1], float(np.abs(logits[0]).max())


def _sensitivity(subject: _Subject) -> _Finding:
    change, largest = _change_each_token(subject)
    steps = np.arange(_CHANGED)
    own = np.abs(change[steps, steps]).max(axis=-1) / largest
    later = [np.abs(change[index, index + 1 :]).max() for index in steps[:-1]]
    dead = [int(i) for i in steps if own[i] < 1e-3 or (i < len(later) and later[i] == 0)]
    detail = (
        f"changing token {dead[0]} does not change the logits"
        if dead
        else f"each of {_CHANGED} tokens changes its own logits by at least {own.min():.2g} of the "
        "largest, and later ones"
    )
    return _Finding("tokens without effect", len(dead), 0, detail)


def _causality(subject: _Subject) -> _Finding:
    change, largest = _change_each_token(subject)
    leaks = np.array(
        [np.abs(change[index, :index]).max(initial=0) / largest for index in range(_CHANGED)]
    )
    leaking = float((leaks > subject.tolerance).mean())
    # A rounding tie may fall differently in one row of a batch; a leak shows in nearly all rows.
    allowed = 0.1 if subject.recipe.is_lossy else 0.0
    detail = f"a later token changes earlier logits by at most {leaks.max():.2g} of the largest"
    return _Finding("tokens that change earlier logits, fraction", leaking, allowed, detail)


# --- Weights against the checkpoint ---------------------------------------------------------------


class _ExpectedWeights:
    """What the recipe says an artifact stores, before rounding, from the checkpoint; float64.

    Linear weights are [in, out].
    """

    def __init__(self, subject: _Subject) -> None:
        from quarot_onnx.export.checkpoint import CheckpointSource  # noqa: PLC0415

        self._source = CheckpointSource
        self.checkpoint = subject.checkpoint
        rotations, config = subject.recipe.rotations, subject.config
        self.rotations = rotations
        self.heads = config["num_attention_heads"]
        self.head_dim = config.get("head_dim") or config["hidden_size"] // self.heads
        self.r1 = (
            Rotation(rotations.r1, config["hidden_size"], subject.recipe.seed, "R1")
            if rotations.r1 != "none"
            else None
        )
        self.r2, self.across = plan(self.head_dim), plan(self.heads, policy="full")
        self.r4 = plan(config["intermediate_size"])

    def tensor(self, name: str, *, transposed: bool, index: tuple[slice, ...] = ()) -> Float64:
        stored = name
        if name == "lm_head.weight" and name not in self.checkpoint.tensors:
            stored = "model.embed_tokens.weight"
        entry = self.checkpoint.tensor(stored)
        source = self._source(entry, transposed)
        return source.read(index or tuple(slice(None) for _ in entry.shape))

    def gamma(self, name: str) -> Float64:
        """The scale of norm `name` where it is folded, else ones."""
        scale = self.tensor(f"{name}.weight", transposed=False)
        return scale if self.rotations.fold_norm_scale else np.ones_like(scale)

    def norm(self, name: str) -> Float64:
        """What is left of the scale of norm `name`."""
        scale = self.tensor(name, transposed=False)
        is_folded = self.rotations.fold_norm_scale and not name.endswith(
            ("q_norm.weight", "k_norm.weight")
        )
        return np.ones_like(scale) if is_folded else scale

    def reader(self, weight: Float64, norm: str) -> Float64:
        weight = self.gamma(norm)[:, None] * weight
        return weight if self.r1 is None else self.r1.rotate_inputs(weight)

    def written(self, weight: Float64) -> Float64:
        return weight if self.r1 is None else self.r1.rotate_outputs(weight)

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
        if role in ("q_proj", "k_proj", "v_proj"):
            weight = self.reader(weight, f"{layer}.input_layernorm")
            return self.by_head(weight) if role == "v_proj" else weight
        if role in ("gate_proj", "up_proj"):
            return self.reader(weight, f"{layer}.post_attention_layernorm")
        if role == "o_proj":
            weight = self.by_head(weight.T).T
            if self.rotations.heads and self.across.kind == "full":
                split = weight.reshape(self.heads, self.head_dim, -1)
                turned = np.einsum("hdo,hg->gdo", split, self.across.matrix())
                weight = turned.reshape(weight.shape)
        elif self.rotations.r4 and self.r4.kind != "none":
            weight = self.r4.apply(weight, axis=0)
        return self.written(weight)

    def bias(self, module: str) -> Float64:
        values = self.tensor(f"{module}.bias", transposed=False)
        role = module.rpartition(".")[2]
        if role == "v_proj":
            return self.by_head(values)
        return self.written(values) if role in ("o_proj", "down_proj") else values


def _naive_error(weight: Float64, bits: int) -> float:
    """Relative error of rounding `weight` [in, out] per column without any clip."""
    top = 2 ** (bits - 1) - 1
    step = np.abs(weight).max(axis=0) / top
    step[step == 0] = 1
    return _relative(np.rint(weight / step) * step, weight)


def _relative(found: NDArray[Any], expected: NDArray[Any]) -> float:
    norm = float(np.linalg.norm(expected))
    difference = float(np.linalg.norm(found - expected))
    return difference / norm if norm else difference


_BLOCK = 1 << 24  # numbers of an embedding that are compared at once


def _weight_errors(subject: _Subject) -> Iterator[tuple[str, float]]:
    """Each initializer's name and its error, as a fraction of what rounding it once explains."""
    from quarot_onnx.reference import read_initializers  # noqa: PLC0415  # imports torch

    held = read_initializers(subject.artifact)
    expected = _ExpectedWeights(subject)
    float_bound = 2 * _EPSILON[subject.dtype]
    for name, tensor in held.items():
        if not name.startswith(("model.", "lm_head.")) or name.endswith("_scale"):
            continue
        module, _, kind = name.rpartition(".")
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            yield name, _table_error(expected, name, tensor.numpy()) / float_bound
        elif len(tensor.shape) == 1:
            wanted = expected.bias(module) if kind == "bias" else expected.norm(name)
            yield name, _relative(tensor.numpy().astype(np.float64), wanted) / float_bound
        else:
            found = tensor.numpy().astype(np.float64)
            wanted = expected.linear(module)
            if found.shape != wanted.shape:
                raise GateError(f"initializer {name} has shape {found.shape}, not {wanted.shape}")
            if f"{name}_scale" not in held:
                yield name, _relative(found, wanted) / float_bound
                continue
            found *= held[f"{name}_scale"].numpy().astype(np.float64)
            naive = _naive_error(wanted, subject.recipe.weights.bits)
            # Error feedback (GPTQ) moves weights further than rounding to nearest does, hence the
            # factor 2. What is rounded keeps its length but for the error squared (the best code
            # book for a weight is shorter by that) and the error's chance overlap with the weight.
            length = float((found * wanted).sum() / (wanted * wanted).sum())
            overlap = 4 * naive / math.sqrt(wanted.size)
            excess = abs(length - 1) / (2 * naive**2 + overlap)
            yield name, max(_relative(found, wanted) / (2 * naive), excess)


def _table_error(expected: _ExpectedWeights, name: str, found: NDArray[Any]) -> float:
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
            wanted, held = expected.written(source), found[part]
        worst = max(worst, _relative(held.astype(np.float64), wanted))
    return worst


def _weights(subject: _Subject) -> _Finding:
    subject.need_reference()
    subject.need_llama_modules()
    if not subject.is_finite:
        raise _Skip("weights or logits are not finite")
    errors = list(_weight_errors(subject))
    name, worst = max(errors, key=lambda item: math.inf if math.isnan(item[1]) else item[1])
    detail = f"{len(errors)} tensors; furthest from the checkpoint is {name}"
    return _Finding("error over what rounding explains", worst, 1.0, detail)


# --- Logits against PyTorch, through Polygraphy ---------------------------------------------------


class TorchRunner(BaseRunner):  # type: ignore[misc]  # Polygraphy is untyped
    """A PyTorch `CausalModel` as a Polygraphy runner: one prefill, ``logits`` out."""

    def __init__(self, model: CausalModel, name: str) -> None:
        super().__init__(name=name)
        self._model = model

    def get_input_metadata_impl(self) -> TensorMetadata:
        """Token ids and mask; a prefill has no past."""
        metadata = TensorMetadata()
        for name in ("input_ids", "attention_mask"):
            metadata.add(name, dtype=np.int64, shape=(None, None))
        return metadata

    def infer_impl(self, feed_dict: dict[str, Any]) -> "OrderedDict[str, Logits]":
        """Logits [B, S, V] in float32."""
        start = time.perf_counter()
        ids = feed_dict["input_ids"]
        logits, _ = self._model.step(
            ids, self._model.new_cache(len(ids)), feed_dict["attention_mask"]
        )
        self.inference_time = time.perf_counter() - start
        return OrderedDict(logits=logits)


@dataclass(frozen=True)
class Closeness:
    """How far logits are from a judge's; every number but `top1` and `kl` sees their scale.

    Attributes:
        max_ratio: max|difference| / max|judge|.
        relative_l2: norm of the difference over the judge's norm.
        norm_ratio: norm over the judge's norm.
        kl: mean KL(judge || found) of the next token, in nats.
        top1: fraction of tokens with the same most likely next token.
    """

    max_ratio: float
    relative_l2: float
    norm_ratio: float
    kl: float
    top1: float

    @classmethod
    def of(cls, found: Logits, judge: Logits) -> "Closeness":
        """Of logits [..., V]; NaN wherever one of them is not finite."""
        difference = found.astype(np.float64) - judge
        norm = float(np.linalg.norm(judge))
        p, q = log_probabilities(judge), log_probabilities(found)
        return cls(
            max_ratio=float(np.abs(difference).max() / np.abs(judge).max()),
            relative_l2=float(np.linalg.norm(difference)) / norm,
            norm_ratio=float(np.linalg.norm(found)) / norm,
            kl=float((np.exp(p) * (p - q)).sum(axis=-1).mean()),
            top1=float((found.argmax(axis=-1) == judge.argmax(axis=-1)).mean()),
        )

    def __str__(self) -> str:
        return (
            f"max {self.max_ratio:.2g}, L2 {self.relative_l2:.2g}, norm x{self.norm_ratio:.4f}, "
            f"KL {self.kl:.2g}, top-1 {self.top1:.1%}"
        )


def _compare(
    subject: _Subject, judge: CausalModel, accepts: Callable[[Closeness], bool]
) -> tuple[Closeness, bool]:
    """Run the artifact and `judge` on `ids` through Polygraphy's comparator."""
    model = subject.need_model()
    subject.need_numpy_dtype()
    feed = {
        "input_ids": subject.ids,
        "attention_mask": np.ones_like(subject.ids),
        "position_ids": np.tile(np.arange(_LENGTH), (_BATCH, 1)),
        **model.new_cache(_BATCH),
    }
    measured: list[Closeness] = []

    def compare(found: Any, expected: Any) -> "OrderedDict[str, bool]":
        if "logits" not in found or found["logits"].shape != expected["logits"].shape:
            return OrderedDict(logits=False)
        logits = np.asarray(found["logits"], np.float32)
        measured.append(Closeness.of(logits, expected["logits"]))
        return OrderedDict(logits=bool(np.isfinite(logits).all()) and accepts(measured[-1]))

    runners = [OnnxrtRunner(model.session, name="artifact"), TorchRunner(judge, "PyTorch")]
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL):
        results = Comparator.run(runners, data_loader=[feed])
        passed = bool(Comparator.compare_accuracy(results, compare_func=compare))
    if not measured:
        raise GateError("logits are missing or have another shape than PyTorch's")
    return measured[0], passed


def _equivalence(subject: _Subject) -> _Finding:
    if subject.recipe.is_lossy:
        raise _Skip(f"recipe {subject.recipe.name} quantizes, so the function is another one")
    subject.need_reference()
    found, passed = _compare(subject, subject.judge, lambda c: c.max_ratio <= subject.tolerance)
    return _Finding(
        "max|difference| / max|logit| to Hugging Face",
        found.max_ratio,
        subject.tolerance,
        str(found),
        passed,
    )


def _logits(subject: _Subject) -> _Finding:
    subject.need_model()
    subject.need_llama_modules()
    # Rounding moves the logits by `noise`. Two correct implementations differ by ties only, but in
    # a deep model ties cascade until the two are as far apart as two such roundings: sqrt(2) noise.
    noise = Closeness.of(*subject.expected)
    bound = max(subject.tolerance, 1.5 * noise.relative_l2)
    margin = max(subject.tolerance, min(0.02, noise.relative_l2))

    def accepts(c: Closeness) -> bool:
        return c.relative_l2 <= bound and abs(c.norm_ratio - 1) <= margin

    found, passed = _compare(subject, subject.fake_quant, accepts)
    detail = f"{found}; rounding itself: L2 {noise.relative_l2:.2g}, norm within {margin:.2g}"
    return _Finding(
        "relative L2 to PyTorch with the same codes", found.relative_l2, bound, detail, passed
    )


def _quality(subject: _Subject) -> _Finding:
    subject.need_reference()
    found, _ = _compare(subject, subject.judge, lambda _: True)
    return _Finding("relative L2 to Hugging Face", found.relative_l2, None, str(found), True)


def _layers(subject: _Subject) -> _Finding:
    """The worst layer by the median token's error, and no token further off than ties explain."""
    subject.need_model()
    subject.need_llama_modules()
    subject.need_numpy_dtype()
    states, logits = _residual_states(subject)
    model = subject.fake_quant
    rounded, head = model.forced(subject.ids, states)
    model.settings.is_quantizing = False
    plain, _ = model.forced(subject.ids, states)
    model.settings.is_quantizing = True
    tolerance = subject.tolerance
    embedding = _relative(states[0], model.embed(subject.ids))
    last = float(np.abs(logits - head).max() / np.abs(head).max())
    for where, error in (("the embedding", embedding), ("the head", last)):
        if not error <= tolerance:
            detail = f"{where} is off by {error:.2g}"
            return _Finding("relative error", error, tolerance, detail, False)
    worst, limit, furthest, has_passed = 0.0, tolerance, 0, True
    for index, (before, after) in enumerate(pairwise(states)):
        size = np.linalg.norm(rounded[index] - before, axis=-1) + np.finfo(np.float32).tiny
        error = np.linalg.norm(after - rounded[index], axis=-1) / size
        noise = np.linalg.norm(rounded[index] - plain[index], axis=-1) / size
        typical = float(np.median(error))
        allowed = tolerance if subject.dtype == "float32" else tolerance + float(np.median(noise))
        is_off = not typical <= allowed or not bool((error <= tolerance + 2 * noise).all())
        if (is_off, typical) > (not has_passed, worst):
            worst, limit, furthest, has_passed = typical, allowed, index, not is_off
    detail = (
        f"median token of layer {furthest}, the furthest of {len(rounded)}; "
        f"embedding {embedding:.2g}, head {last:.2g}"
    )
    return _Finding("relative error of a layer", worst, limit, detail, has_passed)


def _residual_states(subject: _Subject) -> tuple[list[NDArray[np.float32]], Logits]:
    """The graph's residual stream [B, S, n] before each layer and the last norm, and its logits."""
    exposed = onnx.ModelProto()
    exposed.CopyFrom(subject.graph)
    by_scale = {
        node.input[1]: node.input[0]
        for node in exposed.graph.node
        if node.op_type == "RMSNormalization"
    }
    depth = subject.config["num_hidden_layers"]
    norms = [f"model.layers.{i}.input_layernorm.weight" for i in range(depth)]
    wanted = [by_scale.get(name) for name in [*norms, "model.norm.weight"]]
    names = [name for name in wanted if name is not None]
    if len(names) != depth + 1:
        missing = [*norms, "model.norm.weight"][wanted.index(None)]
        raise GateError(f"no RMSNormalization reads {missing}")
    del exposed.graph.output[:]
    dtype = _ELEMENT_TYPES[subject.dtype]
    exposed.graph.output.extend(
        onnx.helper.make_tensor_value_info(name, dtype, None) for name in [*names, "logits"]
    )
    session = load_session(
        exposed.SerializeToString(),
        runtime=subject.runtime,
        threads=subject.threads,
        data_directory=subject.artifact.absolute(),
    )
    feed = {
        "input_ids": subject.ids,
        "attention_mask": np.ones_like(subject.ids),
        "position_ids": np.tile(np.arange(_LENGTH), (_BATCH, 1)),
        **subject.model.new_cache(_BATCH),
    }
    *states, logits = session.run([*names, "logits"], feed)
    return [np.asarray(s, np.float32) for s in states], np.asarray(logits, np.float32)


# --- Cache and batch ------------------------------------------------------------------------------


def _cache(subject: _Subject) -> _Finding:
    model = subject.need_model()
    found = decode_perplexity(model, subject.ids)
    drift = abs(math.log(found.perplexity / found.prefill_perplexity))
    detail = (
        f"decode token by token against prefill: top-1 {found.top1_agreement:.1%}, "
        f"log-perplexity differs by {drift:.2g}"
    )
    return _Finding(
        "1 - top-1 agreement of decode with prefill",
        1 - found.top1_agreement,
        1 - _TOP1,
        detail,
        found.top1_agreement >= _TOP1 and drift <= _LOG_PERPLEXITY,
    )


def _padding(subject: _Subject) -> _Finding:
    model = subject.need_model()
    padding = _LENGTH // 4
    ids, mask = subject.ids.copy(), np.ones((_BATCH, _LENGTH), np.int64)
    ids[1, :padding], mask[1, :padding] = 0, 0
    logits, cache = model.step(ids, model.new_cache(_BATCH), mask)
    alone, alone_cache = model.step(ids[1:, padding:], model.new_cache(1))
    follower = ids[:, :1]
    mask = np.concatenate([mask, np.ones_like(mask[:, :1])], axis=1)
    logits_after, _ = model.step(follower, cache, mask)
    alone_after, _ = model.step(follower[1:], alone_cache)
    found = np.concatenate([logits[1, padding:], logits_after[1]])
    expected = np.concatenate([alone[0], alone_after[0]])
    close = Closeness.of(found, expected)
    error = np.linalg.norm(found - expected, axis=-1) / np.linalg.norm(expected, axis=-1)
    typical = float(np.median(error))
    allowed = subject.tolerance
    if subject.recipe.is_lossy and subject.dtype != "float32":
        subject.need_llama_modules()
        allowed = max(allowed, Closeness.of(*subject.expected).relative_l2)
    return _Finding(
        "median relative error of a padded row",
        typical,
        allowed,
        f"{padding} tokens of padding on the left: {close}",
        typical <= allowed and close.top1 >= _TOP1,
    )


_STAGES: dict[str, Callable[[_Subject], _Finding]] = {
    "integrity": _integrity,
    "structure": _structure,
    "load": _load,
    "finite": _finite,
    "sensitivity": _sensitivity,
    "causality": _causality,
    "weights": _weights,
    "equivalence": _equivalence,
    "layers": _layers,
    "logits": _logits,
    "quality": _quality,
    "cache": _cache,
    "padding": _padding,
}
