# SPDX-License-Identifier: Apache-2.0
"""Run an artifact: one interface for every runtime, and the artifact's own tokenizer.

`CausalModel` is what evaluation, validation and generation need: a cache and a step. `OnnxModel`
implements it on ONNX Runtime, `quarot_onnx.tensorrt_runtime.EngineModel` on TensorRT, and
`load_model` chooses; the PyTorch models of `quarot_onnx.reference` implement it too.
torch is not imported here.
"""

import ctypes
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from quarot_onnx.errors import (
    InputError,
    MissingDependencyError,
    ResourceError,
    UnsupportedModelError,
    UsageError,
)
from quarot_onnx.manifest import DATA, MODEL, load_manifest

if TYPE_CHECKING:
    import onnxruntime

    from quarot_onnx.tensorrt_runtime import EngineModel

Ids = NDArray[np.int64]
Logits = NDArray[np.float32]
Cache = dict[str, Any]
"""``past_key_values.N.key`` and so on -> an array whose axis 2 counts tokens; opaque to callers."""

Runtime = Literal["ort-cpu", "ort-cuda", "tensorrt"]
RUNTIMES: tuple[Runtime, ...] = ("ort-cpu", "ort-cuda", "tensorrt")
"""Where a model may run."""

_PAST, _PRESENT = "past_key_values.", "present."
_QUIET = 4  # onnxruntime: fatal only; what goes wrong reaches us as an exception
_ORT_CODE = re.compile(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ")
_PROVIDERS = {"ort-cpu": "CPUExecutionProvider", "ort-cuda": "CUDAExecutionProvider"}
_CACHE_DEVICES = {"ort-cuda": "cuda"}
_BFLOAT16 = 16  # onnx.TensorProto.BFLOAT16
_DTYPES: dict[str, Any] = {
    "tensor(uint8)": np.uint8,
    "tensor(int64)": np.int64,
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(bfloat16)": ml_dtypes.bfloat16,
}


class CausalModel(Protocol):
    """A decoder with a cache. `step` leaves the cache that it is given as it is."""

    @property
    def vocabulary_size(self) -> int:
        """How many logits there are for a token."""
        ...

    def new_cache(self, batch: int) -> Cache:
        """An empty cache for `batch` rows."""
        ...

    def step(
        self, input_ids: Ids, cache: Cache, attention_mask: Ids | None = None
    ) -> tuple[Logits, Cache]:
        """Logits of `input_ids`, and the cache with them appended.

        Args:
            input_ids: [B, S], the tokens that follow those in `cache`.
            cache: of this model, holding P tokens per row.
            attention_mask: [B, P + S], 0 for padding on the left; all ones where None.

        Returns:
            Logits [B, S, vocabulary] in float32 and a cache of P + S tokens.
        """
        ...


def position_ids(attention_mask: Ids, length: int) -> Ids:
    """Positions [B, length] of the last `length` tokens: how many real ones precede each."""
    positions = np.maximum(np.cumsum(attention_mask, axis=1) - 1, 0)
    return np.ascontiguousarray(positions[:, -length:], dtype=np.int64)


def checked_mask(input_ids: Ids, past: int, attention_mask: Ids | None, vocabulary: int) -> Ids:
    """The mask [B, past + S] to use; all ones where None.

    Raises:
        InputError: a token id is not in the vocabulary.
        ValueError: the mask has another shape.
    """
    batch, length = input_ids.shape
    if input_ids.size and (input_ids.min() < 0 or input_ids.max() >= vocabulary):
        wrong = input_ids.min() if input_ids.min() < 0 else input_ids.max()
        raise InputError(
            f"input_ids: token {wrong} is not in the vocabulary of {vocabulary}; "
            "the tokenizer belongs to another model"
        )
    if attention_mask is None:
        return np.ones((batch, past + length), np.int64)
    if attention_mask.shape != (batch, past + length):
        raise ValueError(f"attention_mask: {attention_mask.shape}, not {(batch, past + length)}")
    return np.ascontiguousarray(attention_mask, dtype=np.int64)


def load_model(
    directory: Path,
    *,
    runtime: str = "ort-cpu",
    threads: int | None = None,
    trust_engine: bool = False,
) -> "OnnxModel | EngineModel":
    """What runs `directory` in `runtime`: an artifact, or for ``tensorrt`` an engine directory.

    Raises:
        QuarotError: what `OnnxModel` and `EngineModel` raise.
    """
    if runtime == "tensorrt":
        from quarot_onnx.tensorrt_runtime import EngineModel  # noqa: PLC0415

        return EngineModel(directory, trust=trust_engine)
    return OnnxModel(directory, runtime=runtime, threads=threads)


class OnnxModel:
    """An artifact's ``model.onnx`` in ONNX Runtime, as a `CausalModel`.

    Attributes:
        artifact: the directory.
        session: the onnxruntime.InferenceSession.
    """

    def __init__(
        self,
        artifact: Path,
        *,
        runtime: str = "ort-cpu",
        threads: int | None = None,
        cache_device: str | None = None,
    ) -> None:
        """Load the graph.

        Args:
            artifact: a directory that ``quarot-onnx export`` wrote.
            runtime: one of `RUNTIMES`.
            threads: of one operator; ONNX Runtime's choice where None.
            cache_device: where the cache stays between steps, as ONNX Runtime calls it; arrays of
                NumPy where None. That of the runtime where not given: ``cuda`` for ``ort-cuda``.

        Raises:
            UsageError: no such runtime.
            InputError: not an artifact, or its graph or weights are damaged.
            MissingDependencyError: the runtime is not on this machine.
            UnsupportedModelError: the runtime has no kernel for a node.
        """
        load_manifest(artifact)
        self.artifact = artifact
        self.session = load_session(artifact / MODEL, runtime=runtime, threads=threads)
        self._cache_inputs = [i for i in self.session.get_inputs() if i.name.startswith(_PAST)]
        ports = [*self.session.get_inputs(), *self.session.get_outputs()]
        self._cache_device = cache_device or _CACHE_DEVICES.get(runtime)
        self._has_bfloat16 = any(port.type == "tensor(bfloat16)" for port in ports)
        self._inputs = {i.name for i in self.session.get_inputs()}
        self._outputs = [o.name for o in self.session.get_outputs()]
        by_name = {o.name: o for o in self.session.get_outputs()}
        missing = [
            name
            for name in ["logits", *(_present(i.name) for i in self._cache_inputs)]
            if name not in by_name
        ]
        if missing or "input_ids" not in self._inputs:
            what = f"no output {missing[0]}" if missing else "no input input_ids"
            raise InputError(f"{artifact / MODEL}: {what}; this is not a decoder, export again")
        self._vocabulary_size = int(by_name["logits"].shape[-1])

    @property
    def vocabulary_size(self) -> int:
        """How many logits there are for a token."""
        return self._vocabulary_size

    @property
    def cache_bytes_per_token(self) -> int:
        """What one token of one row takes in the cache, in bytes, over all layers."""
        empty = self.empty_past(1)
        return sum(
            array.itemsize * int(np.prod([*array.shape[:2], *array.shape[3:]]))
            for array in empty.values()
        )

    def new_cache(self, batch: int) -> Cache:
        """An empty cache for `batch` rows, on the device where it stays."""
        if self._cache_device is None:
            return self.empty_past(batch)
        import onnxruntime  # noqa: PLC0415

        return {
            name: onnxruntime.OrtValue.ortvalue_from_shape_and_type(
                array.shape,
                _BFLOAT16 if array.dtype == ml_dtypes.bfloat16 else array.dtype,
                self._cache_device,
                0,
            )
            for name, array in self.empty_past(batch).items()
        }

    def empty_past(self, batch: int) -> Cache:
        """The cache inputs of `batch` rows without tokens, as arrays for `run`."""
        return {
            i.name: np.empty((batch, int(i.shape[1]), 0, int(i.shape[3])), _DTYPES[i.type])
            for i in self._cache_inputs
        }

    def step(
        self, input_ids: Ids, cache: Cache, attention_mask: Ids | None = None
    ) -> tuple[Logits, Cache]:
        """Logits [B, S, vocabulary] of `input_ids` [B, S], and the cache with them appended.

        Raises:
            InputError: a token id is not in the vocabulary.
            ResourceError: not enough memory for this batch and length.
        """
        past = _slots(next(iter(cache.values()))) if cache else 0
        mask = checked_mask(input_ids, past, attention_mask, self._vocabulary_size)
        feed = {
            "input_ids": np.ascontiguousarray(input_ids, dtype=np.int64),
            "attention_mask": mask,
            "position_ids": position_ids(mask, input_ids.shape[1]),
            **cache,
        }
        feed = {name: value for name, value in feed.items() if name in self._inputs}
        results = self.run(feed) if self._cache_device is None else self._run_bound(feed)
        logits = np.asarray(results["logits"], dtype=np.float32)
        return logits, {i.name: results[_present(i.name)] for i in self._cache_inputs}

    def run(self, feed: dict[str, Any]) -> dict[str, Any]:
        """Every output by name, for `feed`, which gives every input by name.

        Raises:
            ResourceError: not enough memory.
            InputError: the graph does not compute.
        """
        with self._explained(feed):
            if self._has_bfloat16:
                return self._run_bfloat16(feed)
            return dict(zip(self._outputs, self.session.run(self._outputs, feed), strict=True))

    def _run_bound(self, feed: dict[str, Any]) -> dict[str, Any]:
        """As `run`, with the cache left where it is: only ids and logits are copied."""
        device = self._cache_device
        binding = self.session.io_binding()
        for name, value in feed.items():
            if isinstance(value, np.ndarray):
                binding.bind_cpu_input(name, value)
            else:
                binding.bind_ortvalue_input(name, value)
        for name in self._outputs:
            binding.bind_output(name, "cpu" if name == "logits" else device)
        with self._explained(feed):
            self.session.run_with_iobinding(binding)
        results = dict(zip(self._outputs, binding.get_outputs(), strict=True))
        logits = results["logits"]
        is_bfloat16 = logits.data_type() == "tensor(bfloat16)"
        return {**results, "logits": _bfloat16_array(logits) if is_bfloat16 else logits.numpy()}

    @contextmanager
    def _explained(self, feed: dict[str, Any]) -> Iterator[None]:
        """ONNX Runtime's errors as ours; those of a bound run are plain RuntimeErrors."""
        errors: tuple[type[Exception], ...] = (*_ort_errors(), RuntimeError)
        try:
            yield
        except errors as error:
            if "allocate memory" in str(error) or "bad allocation" in str(error):
                shape = feed["input_ids"].shape
                raise ResourceError(
                    f"{self.artifact / MODEL}: not enough memory for input_ids of {list(shape)}; "
                    "use fewer or shorter windows"
                ) from error
            raise InputError(
                f"{self.artifact / MODEL}: fails in ONNX Runtime ({_first_line(error)}); "
                "export again"
            ) from error

    def _run_bfloat16(self, feed: dict[str, Any]) -> dict[str, Any]:
        """NumPy has no bfloat16 of its own, so these arrays cross as their bits."""
        import onnxruntime  # noqa: PLC0415

        values = {
            name: onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(
                array.view(np.uint16), _BFLOAT16
            )
            if array.dtype == ml_dtypes.bfloat16
            else onnxruntime.OrtValue.ortvalue_from_numpy(array)
            for name, array in feed.items()
        }
        results = self.session.run_with_ort_values(self._outputs, values)
        return {
            name: _bfloat16_array(result)
            if result.data_type() == "tensor(bfloat16)"
            else result.numpy()
            for name, result in zip(self._outputs, results, strict=True)
        }


def _bfloat16_array(value: "onnxruntime.OrtValue") -> NDArray[Any]:
    """A copy of a tensor that ONNX Runtime does not turn into an array by itself."""
    shape = value.shape()
    if 0 in shape:
        return np.empty(shape, ml_dtypes.bfloat16)
    held = (ctypes.c_uint16 * int(np.prod(shape))).from_address(value.data_ptr())
    copied: NDArray[Any] = np.array(held, np.uint16).view(ml_dtypes.bfloat16).reshape(shape)
    return copied


def _slots(value: Any) -> int:
    """Tokens in a part of a cache, an array or a value of ONNX Runtime."""
    shape = value.shape if isinstance(value, np.ndarray) else value.shape()
    return int(shape[2])


def _present(name: str) -> str:
    return name.replace(_PAST, _PRESENT, 1)


def _ort_errors() -> tuple[type[Exception], ...]:
    """ONNX Runtime's exceptions, which share no base but Exception."""
    from onnxruntime.capi import (  # noqa: PLC0415
        onnxruntime_pybind11_state as state,
    )

    return tuple(
        kind
        for kind in vars(state).values()
        if isinstance(kind, type) and issubclass(kind, Exception)
    )


def _provider(runtime: str) -> str:
    """The execution provider of `runtime`, which this machine has.

    Raises:
        UsageError: no such runtime.
        MissingDependencyError: it is not on this machine.
    """
    if runtime not in RUNTIMES:
        raise UsageError(f"--runtime {runtime}: no such runtime; choose {', '.join(RUNTIMES)}")
    if runtime == "tensorrt":
        raise MissingDependencyError(
            "tensorrt: runs engines, which `quarot-onnx build` writes, and no ONNX graph; use "
            "--runtime ort-cpu or ort-cuda"
        )
    try:
        import onnxruntime  # noqa: PLC0415
    except ImportError as error:
        raise MissingDependencyError(
            f"onnxruntime: cannot be imported ({error}); pip install 'quarot-onnx[cpu]'"
        ) from error
    provider = _PROVIDERS[runtime]
    if provider not in onnxruntime.get_available_providers():
        raise MissingDependencyError(
            f"{runtime}: this onnxruntime has no {provider}; install onnxruntime-gpu in place of "
            "onnxruntime, or use --runtime ort-cpu"
        )
    return provider


def load_session(
    model: Path | bytes,
    *,
    runtime: str = "ort-cpu",
    threads: int | None = None,
    data_directory: Path | None = None,
) -> "onnxruntime.InferenceSession":
    """ONNX Runtime's session of a model file, or of bytes whose data file is in `data_directory`.

    Raises:
        UsageError: no such runtime, or less than one thread.
        InputError: the model or its data cannot be read.
        MissingDependencyError: the runtime is not on this machine.
        UnsupportedModelError: the runtime has no kernel for a node.
    """
    provider = _provider(runtime)
    import onnxruntime  # noqa: PLC0415

    if threads is not None and threads < 1:
        raise UsageError(f"--threads {threads}: must be 1 or more")
    where = model if isinstance(model, Path) else (data_directory or Path()) / MODEL
    if isinstance(model, Path) and not model.is_file():
        raise InputError(f"{model}: no such file; export again")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _QUIET
    if threads is not None:
        options.intra_op_num_threads = threads
    if data_directory is not None:
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(data_directory)
        )
    errors = _ort_errors()
    try:
        session = onnxruntime.InferenceSession(
            model if isinstance(model, bytes) else str(model), options, providers=[provider]
        )
    except errors as error:
        reason = _first_line(error)
        if type(error).__name__ == "NotImplemented":
            raise UnsupportedModelError(
                f"{where}: {runtime} cannot run it ({reason}); "
                "export with --dtype float32, or choose another --runtime"
            ) from error
        raise InputError(
            f"{where}: ONNX Runtime refuses it ({reason}); the file or {DATA} is damaged, "
            "export again"
        ) from error
    if provider not in session.get_providers():  # ONNX Runtime falls back to the CPU by itself
        raise MissingDependencyError(
            f"{runtime}: onnxruntime could not start {provider}; check the driver and CUDA "
            "libraries, or use --runtime ort-cpu"
        )
    return session


def _first_line(error: Exception) -> str:
    """What a library says, without ONNX Runtime's codes in front."""
    lines = str(error).strip().splitlines()
    return _ORT_CODE.sub("", lines[0])[:200] if lines else type(error).__name__


# --- Text -----------------------------------------------------------------------------------------


class Tokenizer:
    """Text to ids and back, by the files that travelled with the artifact."""

    def __init__(
        self,
        encode: Callable[[str, bool], list[int]],
        decode: Callable[[list[int]], str],
        vocabulary_size: int,
    ) -> None:
        self._encode = encode
        self._decode = decode
        self.vocabulary_size = vocabulary_size

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The ids of `text`, by default with the tokens that the model wants around a prompt."""
        return self._encode(text, add_special_tokens)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, without special tokens."""
        return self._decode(list(ids))

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        """The text of `ids` piece by piece, each as soon as no later id can change it."""
        pieces = Pieces(self)
        for token in ids:
            if piece := pieces.add(token):
                yield piece
        if rest := pieces.rest():
            yield rest


class Pieces:
    """The text of ids that come one by one.

    A character of several bytes may be spread over tokens: what ends in U+FFFD waits.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._written = ""

    def add(self, token: int) -> str:
        """What the text gained and no later id can change; may be empty."""
        self._ids.append(token)
        text = self._tokenizer.decode(self._ids)
        if text.endswith("\N{REPLACEMENT CHARACTER}") or not text.startswith(self._written):
            return ""
        gained = text[len(self._written) :]
        self._written = text
        return gained

    def rest(self) -> str:
        """What waited, now that no id follows."""
        return self._tokenizer.decode(self._ids)[len(self._written) :]


def load_tokenizer(artifact: Path) -> Tokenizer:
    """The tokenizer in `artifact`.

    Raises:
        InputError: there is none, or its file is damaged.
    """
    path = artifact / "tokenizer.json"
    if path.is_file():
        return _fast_tokenizer(path)
    slow = [artifact / name for name in ("tokenizer.model", "vocab.json")]
    if not any(file.is_file() for file in slow):
        raise InputError(
            f"{path}: no such file; put the model's tokenizer beside its weights and export again"
        )
    return _slow_tokenizer(artifact)


def _fast_tokenizer(path: Path) -> Tokenizer:
    import tokenizers  # noqa: PLC0415

    try:
        loaded = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing more specific
        raise InputError(
            f"{path}: not a tokenizer ({_first_line(error)}); download it again"
        ) from error
    loaded.no_truncation()
    loaded.no_padding()
    return Tokenizer(
        lambda text, special: list(loaded.encode(text, add_special_tokens=special).ids),
        lambda ids: str(loaded.decode(ids)),
        loaded.get_vocab_size(),
    )


def _slow_tokenizer(artifact: Path) -> Tokenizer:
    import transformers  # noqa: PLC0415

    try:
        loaded = transformers.AutoTokenizer.from_pretrained(
            artifact, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, ImportError, KeyError, TypeError) as error:
        raise InputError(
            f"{artifact}: its tokenizer cannot be read ({_first_line(error)}); "
            "add tokenizer.json to the model and export again"
        ) from error
    return Tokenizer(
        lambda text, special: list(loaded.encode(text, add_special_tokens=special)),
        lambda ids: str(loaded.decode(ids, skip_special_tokens=True)),
        len(loaded),
    )


def eos_token_ids(artifact: Path) -> frozenset[int]:
    """The ids that end a text, from generation_config.json or config.json; may be empty."""
    for name in ("generation_config.json", "config.json"):
        try:
            found = json.loads((artifact / name).read_text(encoding="utf-8")).get("eos_token_id")
        except FileNotFoundError:
            continue
        except (OSError, ValueError, AttributeError) as error:
            raise InputError(
                f"{artifact / name}: not a JSON object ({error}); export again"
            ) from error
        if isinstance(found, int):
            return frozenset({found})
        if isinstance(found, list):
            return frozenset(i for i in found if isinstance(i, int))
    return frozenset()
