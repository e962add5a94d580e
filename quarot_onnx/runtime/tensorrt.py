# SPDX-License-Identifier: Apache-2.0
"""Run an engine that ``quarot-onnx build`` made, as a `CausalModel`.

The cache stays in device memory, of fixed capacity, and the plugins write it in place. What a
caller holds as a cache is the memory and the number of tokens in each row, so a step copies nothing
but token ids in and logits out. Stepping twice from one cache would overwrite what the first step
wrote: the memory counts its steps, and an older cache is copied before it is continued.

A batch of more rows than the engine was built for runs in groups. Rows have lengths of their own.
Padding on the left, which the ONNX graph masks, is taken out here: real tokens move to the front
and their logits back to where they were.
"""

import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from quarot_onnx.errors import InputError, MissingDependencyError, ResourceError
from quarot_onnx.export.tensorrt import adapter
from quarot_onnx.export.tensorrt.directory import PLAN, load_engine_manifest
from quarot_onnx.manifest import MODEL
from quarot_onnx.plugins import library
from quarot_onnx.runtime import Cache, Ids, Logits, checked_mask

_PAST, _PRESENT = "past_key_values.", "present."
_GROUPS = "groups"  # the one entry of a cache
_DTYPES = {
    "FLOAT": np.float32,
    "HALF": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "INT8": np.int8,
    "INT32": np.int32,
    "INT64": np.int64,
}


class _Device:
    """The CUDA runtime: memory and one stream."""

    def __init__(self) -> None:
        from polygraphy import cuda  # noqa: PLC0415
        from polygraphy.exception import PolygraphyException  # noqa: PLC0415

        try:
            self._cuda: Any = cuda.wrapper()
            self.stream: int = self._cuda.create_stream()
        except (PolygraphyException, OSError, AttributeError) as error:
            raise MissingDependencyError(
                f"tensorrt: no CUDA device ({str(error).strip().splitlines()[-1]}); use "
                "--runtime ort-cpu"
            ) from error
        self._kinds = cuda.MemcpyKind
        self._failed = PolygraphyException

    def allocate(self, size: int) -> "_Memory":
        """Bytes on the device, freed with the handle.

        Raises:
            ResourceError: there are not so many left.
        """
        try:
            return _Memory(self._cuda, self._cuda.malloc(size), size)
        except self._failed as error:
            raise ResourceError(
                f"tensorrt: {size / 1e9:.2f} GB of device memory are not free; build with a "
                "smaller --max-seq-len or --max-batch"
            ) from error

    def upload(self, memory: "_Memory", array: NDArray[Any]) -> None:
        """Host to device, at the start of `memory`."""
        data = np.ascontiguousarray(array)
        if data.nbytes:
            self._copy(memory.address, data.ctypes.data, data.nbytes, "HostToDevice")

    def download(self, memory: "_Memory", array: NDArray[Any]) -> None:
        """Device to host, filling `array`."""
        self._copy(array.ctypes.data, memory.address, array.nbytes, "DeviceToHost")

    def duplicate(self, memory: "_Memory") -> "_Memory":
        """A copy on the device."""
        other = self.allocate(memory.size)
        self._copy(other.address, memory.address, memory.size, "DeviceToDevice")
        return other

    def _copy(self, target: int, source: int, size: int, kind: str) -> None:
        self._cuda.memcpy(
            dst=target,
            src=source,
            nbytes=size,
            kind=getattr(self._kinds, kind),
            stream_ptr=self.stream,
        )
        self.synchronize()  # host arrays may go away

    def synchronize(self) -> None:
        """Wait for what was queued."""
        self._cuda.stream_synchronize(self.stream)


class _Memory:
    """Bytes on the device."""

    def __init__(self, cuda: Any, address: int, size: int) -> None:
        self.address, self.size = address, size
        weakref.finalize(self, cuda.free, address)


@dataclass(eq=False)
class _Store:
    """The cache of a batch in device memory.

    Attributes:
        memory: ``past_key_values.N.key`` and so on -> [B, H, capacity, .].
        steps: how often it was written.
    """

    memory: Mapping[str, _Memory]
    steps: int = 0


@dataclass(frozen=True)
class _Rows:
    """One state of a store.

    Attributes:
        store: where the tokens are.
        steps: of the store when this state was the newest.
        lengths: real tokens of each row, INT32 [B].
        columns: tokens of each row with padding, as callers count them.
    """

    store: _Store
    steps: int
    lengths: NDArray[np.int32]
    columns: int


class EngineModel:
    """A TensorRT engine as a `CausalModel`.

    Attributes:
        directory: what ``quarot-onnx build`` wrote.
    """

    def __init__(self, directory: Path, *, trust: bool = False) -> None:
        """Load the engine.

        Args:
            directory: what ``quarot-onnx build`` wrote.
            trust: load an engine or a plugin library that the manifest does not vouch for.

        Raises:
            InputError: no engine, or one that was changed.
            MissingDependencyError: no TensorRT, no GPU, other plugins, or an engine of another
                TensorRT or GPU.
        """
        manifest = load_engine_manifest(directory, trust=trust)
        described = manifest["tensorrt"]
        self.directory = directory
        self._trt = adapter.load_tensorrt()
        plugins = library.load()
        built_with = (described["plugins"] or {}).get("sha256")
        if plugins.sha256 != built_with and not trust:
            raise MissingDependencyError(
                f"{plugins.path}: is another plugin library than the engine was built with "
                f"({plugins.sha256[:12]}, not {str(built_with)[:12]}); build the engine again, or "
                "add --trust-engine"
            )
        self._device = _Device()
        self._engine = adapter.deserialized(
            self._trt,
            (directory / PLAN).read_bytes(),
            directory / PLAN,
            allow_host_code=bool((described["engine"] or {}).get("version_compatible")),
        )
        limits = described["limits"]
        self._max_batch, self._max_input = int(limits["max_batch"]), int(limits["max_input_len"])
        self._max_length, self._capacity = int(limits["max_seq_len"]), int(limits["capacity"])
        self._inputs: dict[str, tuple[Any, tuple[int, ...]]] = {}
        self._outputs: dict[str, tuple[Any, tuple[int, ...]]] = {}
        for name, is_input, dtype, shape in adapter.tensors(self._trt, self._engine):
            side = self._inputs if is_input else self._outputs
            side[name] = (np.dtype(_DTYPES[str(dtype).rpartition(".")[2]]), shape)
        self._check(directory)
        self._contexts = [self._context(index) for index in range(2)]
        self._scratch: dict[str, _Memory] = {}

    def _check(self, directory: Path) -> None:
        wanted = {"input_ids", "position_ids", "lengths"}
        caches = [name for name in self._inputs if name.startswith(_PAST)]
        missing = [name for name in wanted if name not in self._inputs]
        missing += [_present(name) for name in caches if _present(name) not in self._outputs]
        if missing or not caches or "logits" not in self._outputs:
            what = missing[0] if missing else "logits"
            raise InputError(f"{directory / PLAN}: has no {what}; build the engine again")
        for name in caches:
            if self._engine.get_aliased_input_tensor(_present(name)) != name:
                raise InputError(
                    f"{directory / PLAN}: {_present(name)} is not the memory of {name}, so every "
                    f"step would copy the cache; build the engine from {MODEL} again"
                )

    def _context(self, profile: int) -> Any:
        """For one token (0), or for more (1)."""
        context = self._engine.create_execution_context()
        if context is None:
            raise ResourceError(
                f"{self.directory / PLAN}: not enough device memory for its activations; build "
                "with a smaller --max-input-len or --max-batch"
            )
        adapter.require(
            context.set_optimization_profile_async(profile, self._device.stream),
            str(self.directory / PLAN),
            f"profile {profile}",
        )
        self._device.synchronize()
        return context

    @property
    def vocabulary_size(self) -> int:
        """How many logits there are for a token."""
        return self._outputs["logits"][1][-1]

    @property
    def cache_bytes_per_token(self) -> int:
        """What one token of one row takes in the cache, in bytes, over all layers."""
        return sum(
            dtype.itemsize * shape[1] * shape[3]
            for name, (dtype, shape) in self._inputs.items()
            if name.startswith(_PAST)
        )

    def new_cache(self, batch: int) -> Cache:
        """An empty cache for `batch` rows, in groups of what the engine was built for.

        Raises:
            ResourceError: no device memory.
        """
        firsts = range(0, batch, self._max_batch)
        return {_GROUPS: tuple(self._new_rows(min(self._max_batch, batch - i)) for i in firsts)}

    def _new_rows(self, batch: int) -> _Rows:
        memory = {}
        for name, (dtype, shape) in self._inputs.items():
            if name.startswith(_PAST):
                zeros = np.zeros((batch, shape[1], self._capacity, shape[3]), dtype)
                memory[name] = self._device.allocate(zeros.nbytes)
                self._device.upload(memory[name], zeros)
        return _Rows(_Store(memory), 0, np.zeros(batch, np.int32), 0)

    def step(
        self, input_ids: Ids, cache: Cache, attention_mask: Ids | None = None
    ) -> tuple[Logits, Cache]:
        """Logits [B, S, vocabulary] of `input_ids` [B, S], and the cache with them appended.

        Logits of padding are 0.

        Raises:
            InputError: a token id is not in the vocabulary.
            ResourceError: more tokens than the engine was built for.
            ValueError: padding that is not on the left.
        """
        groups: tuple[_Rows, ...] = cache[_GROUPS]
        columns = groups[0].columns
        mask = checked_mask(input_ids, columns, attention_mask, self.vocabulary_size)
        logits, states, first = [], [], 0
        for rows in groups:
            chosen = slice(first, first + len(rows.lengths))
            found, state = self._step(input_ids[chosen], rows, mask[chosen, columns:] != 0)
            logits.append(found)
            states.append(state)
            first = chosen.stop
        return np.concatenate(logits), {_GROUPS: tuple(states)}

    def _step(
        self, input_ids: Ids, rows: _Rows, is_real: NDArray[np.bool_]
    ) -> tuple[Logits, _Rows]:
        """As `step`, of one group; `is_real` [B, S] tells tokens from padding."""
        batch, length = input_ids.shape
        if (np.diff(is_real.astype(np.int8), axis=1) < 0).any():
            raise ValueError("attention_mask: has padding behind a token; put it on the left")
        real = is_real.sum(axis=1).astype(np.int32)
        longest = int((rows.lengths + real).max(initial=0))
        if longest > self._max_length:
            raise ResourceError(
                f"{self.directory / PLAN}: {longest} tokens, it was built for {self._max_length}; "
                f"build with --max-seq-len {longest}"
            )
        store = self._continued(rows)
        packed = np.zeros_like(input_ids)
        for row, count in enumerate(real):
            packed[row, :count] = input_ids[row, length - count :]
        found = np.zeros((batch, length, self.vocabulary_size), np.float32)
        for start in range(0, int(real.max(initial=0)), self._max_input):
            ids = packed[:, start : start + self._max_input]
            logits = self._run(ids, rows.lengths + np.minimum(real, np.int32(start)), store)
            for row, count in enumerate(real):
                kept = max(0, min(ids.shape[1], count - start))
                begin = length - count + start
                found[row, begin : begin + kept] = logits[row, :kept]
        store.steps += 1
        state = _Rows(store, store.steps, rows.lengths + real, rows.columns + length)
        return found, state

    def _continued(self, rows: _Rows) -> _Store:
        """The store that `rows` may write to: its own, unless somebody has continued it already."""
        if rows.store.steps == rows.steps:
            return rows.store
        copies = {name: self._device.duplicate(m) for name, m in rows.store.memory.items()}
        return _Store(copies, rows.steps)

    def _run(self, ids: Ids, lengths: NDArray[np.int32], store: _Store) -> NDArray[Any]:
        """Logits of one call of the engine; `store` is written in place."""
        batch, count = ids.shape
        context = self._contexts[0 if count == 1 else 1]
        positions = lengths[:, None].astype(np.int64) + np.arange(count)
        feed = {"input_ids": ids, "position_ids": positions, "lengths": lengths}
        where = str(self.directory / PLAN)
        for name, array in feed.items():
            data = np.ascontiguousarray(array, self._inputs[name][0])
            memory = self._scratch_of(name, data.nbytes)
            self._device.upload(memory, data)
            adapter.require(context.set_input_shape(name, data.shape), where, f"shape of {name}")
            adapter.require(context.set_tensor_address(name, memory.address), where, name)
        for name, memory in store.memory.items():
            _, (_, heads, _, last) = self._inputs[name]
            shape = (batch, heads, self._capacity, last)
            adapter.require(context.set_input_shape(name, shape), where, f"shape of {name}")
            for tensor in (name, _present(name)):
                adapter.require(context.set_tensor_address(tensor, memory.address), where, tensor)
        logits = np.empty((batch, count, self.vocabulary_size), self._outputs["logits"][0])
        output = self._scratch_of("logits", logits.nbytes)
        adapter.require(context.set_tensor_address("logits", output.address), where, "logits")
        adapter.require(context.execute_async_v3(self._device.stream), where, "this step")
        self._device.synchronize()
        self._device.download(output, logits)
        return logits

    def _scratch_of(self, name: str, size: int) -> _Memory:
        held = self._scratch.get(name)
        if held is None or held.size < size:
            held = self._scratch[name] = self._device.allocate(max(size, 256))
        return held


def _present(name: str) -> str:
    return name.replace(_PAST, _PRESENT, 1)
