# SPDX-License-Identifier: Apache-2.0
"""Stages ``equivalence``, ``layers``, ``logits`` and ``quality``: the graph against PyTorch.

Logits are compared by Polygraphy: the graph runs through its ONNX Runtime runner, PyTorch through
a runner of our own, and both through its comparator. What Polygraphy does not see is seen by our
comparison function: a missing output (it would compare those that are left), NaN, and scale (its
cosine similarity is blind to it).
"""

import time
from collections import OrderedDict
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from polygraphy.backend.base import BaseRunner
from polygraphy.backend.onnxrt import OnnxrtRunner
from polygraphy.common import TensorMetadata
from polygraphy.comparator import Comparator
from polygraphy.logger import G_LOGGER

from quarot_onnx.errors import GateError
from quarot_onnx.runtime import CausalModel, Logits, OnnxModel, load_session
from quarot_onnx.validate.closeness import Closeness, relative_error
from quarot_onnx.validate.subject import Subject
from quarot_onnx.validate.verdict import Finding, Skip


def check_equivalence(subject: Subject) -> Finding:
    """Fails on any fault of a graph that should compute exactly Hugging Face's function."""
    if subject.recipe.is_lossy:
        raise Skip(f"recipe {subject.recipe.name} quantizes, so the function is another one")
    subject.need_reference()
    found, passed = _compare(subject, subject.judge, lambda c: c.max_ratio <= subject.tolerance)
    return Finding(
        "max|difference| / max|logit| to Hugging Face",
        found.max_ratio,
        subject.tolerance,
        str(found),
        passed,
    )


def check_layers(subject: Subject) -> Finding:
    """Fails on a layer, an embedding or a head that computes something else than PyTorch.

    A wrong clip, a lost rotation, swapped layers: faults that may be small beside the rounding of
    the layers behind them. The value is the worst layer's, by its median token; no token may be
    further off than ties explain.
    """
    _need_outputs(subject)
    if not subject.has_llama_modules:
        from quarot_onnx.validate.twin import check_sites  # noqa: PLC0415  # imports torch

        subject.need_reference()
        return check_sites(subject)
    model = subject.fake_quant
    states, logits = _residual_states(subject)
    rounded, head = model.forced(subject.ids, states)
    model.settings.is_quantizing = False
    plain, _ = model.forced(subject.ids, states)
    model.settings.is_quantizing = True
    tolerance = subject.tolerance
    embedding = relative_error(states[0], model.embed(subject.ids))
    last = float(np.abs(logits - head).max() / np.abs(head).max())
    for where, error in (("the embedding", embedding), ("the head", last)):
        if not error <= tolerance:
            detail = f"{where} is off by {error:.2g}"
            return Finding("relative error", error, tolerance, detail, False)
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
    return Finding("relative error of a layer", worst, limit, detail, has_passed)


def check_logits(subject: Subject) -> Finding:
    """Fails on what adds up along the depth: a bias or a scale too small to show in one layer."""
    _need_outputs(subject)
    # Rounding moves the logits by `noise`. Two correct implementations differ by ties only, but in
    # a deep model ties cascade until the two are as far apart as two such roundings: sqrt(2) noise.
    noise = Closeness.of(*subject.expected)
    bound = max(subject.tolerance, 1.5 * noise.relative_l2)
    margin = max(subject.tolerance, min(0.02, noise.relative_l2))

    def accepts(c: Closeness) -> bool:
        return c.relative_l2 <= bound and abs(c.norm_ratio - 1) <= margin

    found, passed = _compare(subject, subject.fake_quant, accepts)
    detail = f"{found}; rounding itself: L2 {noise.relative_l2:.2g}, norm within {margin:.2g}"
    return Finding(
        "relative L2 to PyTorch with the same codes", found.relative_l2, bound, detail, passed
    )


def check_quality(subject: Subject) -> Finding:
    """Fails on missing logits only: reports how far quantization has moved the logits."""
    subject.need_reference()
    found, _ = _compare(subject, subject.judge, lambda _: True)
    return Finding("relative L2 to Hugging Face", found.relative_l2, None, str(found))


# --- Logits, through Polygraphy -------------------------------------------------------------------


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


def _need_outputs(subject: Subject) -> OnnxModel:
    """The graph, whose outputs are arrays."""
    model = subject.need_model()
    if subject.dtype == "bfloat16":
        raise Skip("ONNX Runtime gives no bfloat16 arrays to Polygraphy")
    return model


def _compare(
    subject: Subject, judge: CausalModel, accepts: Callable[[Closeness], bool]
) -> tuple[Closeness, bool]:
    """How far the graph's logits are from those of `judge`, and whether that is accepted."""
    model = _need_outputs(subject)
    measured: list[Closeness] = []

    def compare(found: Any, expected: Any) -> "OrderedDict[str, bool]":
        if "logits" not in found or found["logits"].shape != expected["logits"].shape:
            return OrderedDict(logits=False)
        logits = np.asarray(found["logits"], np.float32)
        measured.append(Closeness.of(logits, expected["logits"]))
        return OrderedDict(logits=bool(np.isfinite(logits).all()) and accepts(measured[-1]))

    runners = [OnnxrtRunner(model.session, name="artifact"), TorchRunner(judge, "PyTorch")]
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL):
        results = Comparator.run(runners, data_loader=[subject.feed])
        passed = bool(Comparator.compare_accuracy(results, compare_func=compare))
    if not measured:
        raise GateError("logits are missing or have another shape than PyTorch's")
    return measured[0], passed


# --- Layers ---------------------------------------------------------------------------------------


def _residual_states(subject: Subject) -> tuple[list[NDArray[np.float32]], Logits]:
    """The graph's residual stream [B, S, n] before each layer and the last norm, and its logits."""
    by_scale = {
        node.input[1]: node.input[0]
        for node in subject.graph.graph.node
        if node.op_type == "RMSNormalization"
    }
    depth = subject.config["num_hidden_layers"]
    scales = [f"model.layers.{i}.input_layernorm.weight" for i in range(depth)]
    scales.append("model.norm.weight")
    for scale in scales:
        if scale not in by_scale:
            raise GateError(f"no RMSNormalization reads {scale}")
    names = [*(by_scale[scale] for scale in scales), "logits"]
    exposed = onnx.ModelProto()
    exposed.CopyFrom(subject.graph)
    del exposed.graph.output[:]
    exposed.graph.output.extend(
        onnx.helper.make_tensor_value_info(name, subject.element_type, None) for name in names
    )
    session = load_session(
        exposed.SerializeToString(),
        runtime=subject.runtime,
        threads=subject.threads,
        data_directory=subject.artifact.absolute(),
    )
    *states, logits = session.run(names, subject.feed)
    return [np.asarray(s, np.float32) for s in states], np.asarray(logits, np.float32)
