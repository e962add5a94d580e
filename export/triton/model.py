# SPDX-License-Identifier: Apache-2.0
"""What Triton's Python backend runs: tensors in, `quarot_onnx.runtime.serving`, tensors out.

It stands in a model repository as ``NAME/1/model.py``, beside ``artifact/`` and the few modules of
``quarot_onnx`` that serving needs, so that the server's Python needs no more than NumPy, ONNX
Runtime and tokenizers, and an artifact is always served by the code it was packed with.

The tensor names are those that Triton's OpenAI frontend sends to models that are not vLLM's.
"""

import json
import logging
import os
import queue
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

sys.path.insert(0, str(Path(__file__).parent))  # the modules beside this file, not installed ones

from quarot_onnx.errors import InputError, QuarotError, ResourceError, UsageError
from quarot_onnx.runtime import eos_token_ids, load_model, load_tokenizer
from quarot_onnx.runtime.generation import Sampling
from quarot_onnx.runtime.serving import Piece, Request, Scheduler, Statistics

ARTIFACT = Path(__file__).parent / "artifact"
PLUGINS = Path(__file__).parent / "plugins" / "libquarot_plugins.so"
_METRICS_PERIOD = 0.1  # seconds; telling the server's process takes as long as a small step
_FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL


class TritonPythonModel:
    """What the Python backend calls."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the artifact; Triton shows the model as not ready if this raises."""
        parameters = {
            name: parameter["string_value"]
            for name, parameter in json.loads(args["model_config"])["parameters"].items()
        }
        threads = parameters.get("threads")
        if PLUGINS.is_file():
            os.environ["QUAROT_PLUGINS_LIBRARY"] = str(PLUGINS)
        self._metrics = _Metrics(args["model_name"])
        self._outbox = _Outbox()
        self._scheduler = Scheduler(
            load_model(
                ARTIFACT,
                runtime=parameters["runtime"],
                threads=int(threads) if threads else None,
            ),
            load_tokenizer(ARTIFACT),
            eos_token_ids=eos_token_ids(ARTIFACT),
            context_length=int(parameters["context_length"]),
            max_streams=int(parameters["max_streams"]),
            max_waiting=int(parameters["max_waiting"]),
            observe=self._metrics.update,
        )

    def execute(self, requests: list[Any]) -> None:
        """Queue the requests; their answers are sent by the scheduler's thread."""
        for request in requests:
            sender = request.get_response_sender()
            try:
                asked, reply = _parsed(request, sender, self._outbox)
                self._scheduler.submit(asked, reply)
            except QuarotError as error:
                self._metrics.refused()
                _send_error(sender, str(error), _code(error))

    def finalize(self) -> None:
        """End what is running."""
        self._scheduler.close()
        self._outbox.close()


class _Outbox:
    """A thread that sends responses, so that the next step need not wait for them.

    Pieces that a reply gathers until its turn comes are sent as one.
    """

    def __init__(self) -> None:
        self._due: queue.SimpleQueue[_Reply | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="quarot-outbox", daemon=True)
        self._thread.start()

    def put(self, reply: "_Reply") -> None:
        """Send what `reply` has gathered, soon."""
        self._due.put(reply)

    def close(self) -> None:
        """Send what is due and end."""
        self._due.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (reply := self._due.get()) is not None:
            try:
                reply.flush()
            except pb_utils.TritonModelException:  # its client is gone
                logging.getLogger(__name__).exception("an answer could not be sent")


class _Reply:
    """Sends pieces as responses, or one response at the end where `stream` is false."""

    def __init__(
        self,
        sender: Any,
        outbox: _Outbox,
        *,
        stream: bool,
        echoed: str,
        count_prompt: bool,
        count_tokens: bool,
    ) -> None:
        self._sender, self._outbox = sender, outbox
        self._lock = threading.Lock()
        self._gathered: list[Piece] = []
        self._failure: tuple[str, Any] | None = None
        self._stream = stream
        self._count_prompt, self._count_tokens = count_prompt, count_tokens
        self._echoed = echoed

    def send(self, piece: Piece) -> None:
        with self._lock:
            self._gathered.append(piece)
            is_due = len(self._gathered) == 1 if self._stream else piece.finish_reason is not None
        if is_due:
            self._outbox.put(self)

    def fail(self, message: str) -> None:
        self._end(message, pb_utils.TritonError.INTERNAL)

    def cancel(self) -> None:
        self._end("request: was cancelled by its client", pb_utils.TritonError.CANCELLED)

    def _end(self, message: str, code: Any) -> None:
        self._failure = message, code
        self._outbox.put(self)

    def flush(self) -> None:
        """Send what was gathered; called by the outbox."""
        with self._lock:
            pieces, self._gathered = self._gathered, []
        failure, self._failure = self._failure, None
        if failure is not None:
            _send_error(self._sender, *failure)
        elif pieces:
            self._sender.send(
                pb_utils.InferenceResponse(output_tensors=self._tensors(pieces)),
                flags=0 if pieces[-1].finish_reason is None else _FINAL,
            )

    def _tensors(self, pieces: list[Piece]) -> list[Any]:
        last = pieces[-1]
        text = self._echoed + "".join(piece.text for piece in pieces)
        self._echoed = ""
        tensors = [_strings("text_output", text)]
        if last.finish_reason is not None:
            tensors.append(_strings("finish_reason", last.finish_reason))
        if self._count_prompt:
            tensors.append(_count("num_input_tokens", last.prompt_tokens))
        if self._count_tokens:
            tensors.append(_count("num_output_tokens", sum(piece.tokens for piece in pieces)))
        return tensors

    def is_cancelled(self) -> bool:
        return bool(self._sender.is_cancelled())


class _Metrics:
    """The scheduler's statistics under Triton's ``/metrics``, at most a tenth of a second old."""

    def __init__(self, model_name: str) -> None:
        labels = {"model": model_name}
        gauge, counter = pb_utils.MetricFamily.GAUGE, pb_utils.MetricFamily.COUNTER
        self._families = {
            name: pb_utils.MetricFamily(name=f"quarot_{name}", description=text, kind=kind)
            for name, text, kind in (
                ("active_streams", "Texts in the batch", gauge),
                ("waiting_requests", "Requests without a place in the batch", gauge),
                ("prompt_tokens", "Tokens of the prompts taken", counter),
                ("generated_tokens", "Tokens generated", counter),
                ("steps", "Steps of the batch", counter),
                ("finished_requests", "Requests finished, by reason", counter),
                ("refused_requests", "Requests refused before they waited", counter),
            )
        }
        self._metrics = {
            name: family.Metric(labels=labels)
            for name, family in self._families.items()
            if name != "finished_requests"
        }
        self._metrics |= {
            reason: self._families["finished_requests"].Metric(labels=labels | {"reason": reason})
            for reason in ("stop", "length", "cancelled", "failed")
        }
        self._shown = dict.fromkeys(self._metrics, 0)
        self._updated = 0.0

    def refused(self) -> None:
        self._metrics["refused_requests"].increment(1)

    def update(self, statistics: Statistics) -> None:
        if statistics.active and time.monotonic() < self._updated + _METRICS_PERIOD:
            return
        self._updated = time.monotonic()
        now = {
            "active_streams": statistics.active,
            "waiting_requests": statistics.waiting,
            "prompt_tokens": statistics.prompt_tokens,
            "generated_tokens": statistics.generated_tokens,
            "steps": statistics.steps,
            **statistics.finished,
        }
        for name, value in now.items():
            if value != self._shown[name]:
                self._metrics[name].increment(value - self._shown[name])
                self._shown[name] = value


# --- Tensors --------------------------------------------------------------------------------------


def _parsed(request: Any, sender: Any, outbox: _Outbox) -> tuple[Request, _Reply]:
    """The request and where its answer goes.

    Raises:
        UsageError: a tensor has more than one row or element, or a value out of range.
        InputError: a text is not UTF-8.
    """
    texts = _texts(request, "text_input")
    if not texts:
        raise UsageError("text_input: is missing; send one prompt in a request")
    if len(texts) != 1:
        raise UsageError(f"text_input: has {len(texts)} elements; send one prompt in a request")
    max_tokens = _number(request, "max_tokens")
    defaults = Sampling(seed=None)
    asked = Request(
        texts[0],
        max_tokens=None if max_tokens is None else int(max_tokens),
        stop_words=tuple(_texts(request, "stop_words")),
        sampling=Sampling(
            temperature=_number(request, "temperature", defaults.temperature),
            top_p=_number(request, "top_p", defaults.top_p),
            seed=_number(request, "seed"),
            frequency_penalty=_number(request, "frequency_penalty", defaults.frequency_penalty),
            presence_penalty=_number(request, "presence_penalty", defaults.presence_penalty),
        ),
    )
    stream = bool(_number(request, "stream", False))
    echo = not _number(request, "exclude_input_in_output", True)
    reply = _Reply(
        sender,
        outbox,
        stream=stream,
        echoed=texts[0] if echo else "",
        count_prompt=bool(_number(request, "return_num_input_tokens", False)),
        count_tokens=bool(_number(request, "return_num_output_tokens", False)),
    )
    return asked, reply


def _number(request: Any, name: str, default: Any = None) -> Any:
    """The one element of a tensor as a Python number; `default` where it was not sent."""
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    if tensor is None:
        return default
    array = tensor.as_numpy()
    if array.size != 1:
        raise UsageError(f"{name}: has {array.size} elements; send one")
    return array.item()


def _texts(request: Any, name: str) -> list[str]:
    """The elements of a tensor of strings; none where it was not sent."""
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    if tensor is None:
        return []
    try:
        return [bytes(element).decode("utf-8") for element in tensor.as_numpy().ravel()]
    except UnicodeDecodeError as error:
        raise InputError(f"{name}: is not UTF-8 ({error.reason}); encode it so") from error


def _strings(name: str, text: str) -> Any:
    return pb_utils.Tensor(name, np.array([[text.encode("utf-8")]], dtype=np.object_))


def _count(name: str, value: int) -> Any:
    return pb_utils.Tensor(name, np.array([[value]], dtype=np.uint32))


def _code(error: QuarotError) -> Any:
    if isinstance(error, (UsageError, InputError)):
        return pb_utils.TritonError.INVALID_ARG
    if isinstance(error, ResourceError):
        return pb_utils.TritonError.UNAVAILABLE
    return pb_utils.TritonError.INTERNAL


def _send_error(sender: Any, message: str, code: Any) -> None:
    error = pb_utils.TritonError(message, code)
    sender.send(pb_utils.InferenceResponse(output_tensors=[], error=error), flags=_FINAL)
