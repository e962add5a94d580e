# SPDX-License-Identifier: Apache-2.0
"""ONNX Runtime: sessions of a graph, and an artifact's model in one."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from quarot_onnx.errors import (
    InputError,
    MissingDependencyError,
    ResourceError,
    UnsupportedModelError,
    UsageError,
    first_line,
)
from quarot_onnx.manifest import DATA, MODEL, load_manifest
from quarot_onnx.runtime.model import RUNTIMES, Cache, Ids, Logits, checked_mask, position_ids

if TYPE_CHECKING:
    import onnxruntime

_PAST, _PRESENT = "past_key_values.", "present."
_QUIET = 4  # onnxruntime: fatal only; what goes wrong reaches us as an exception
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
                f"{self.artifact / MODEL}: fails in ONNX Runtime ({first_line(error)}); "
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
        reason = first_line(error)
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
