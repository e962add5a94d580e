# SPDX-License-Identifier: Apache-2.0
"""Sparse weights beside the dense ones: what 2:4 hardware reads.

``model.onnx`` keeps pruned weights as dense codes with zeros, which every runtime runs. An artifact
of a recipe with `weights.sparsity` also holds ``sparse.safetensors``; per linear weight NAME, rows
are output channels and inputs run along them, as tensor cores read them:

* ``2:4``: ``NAME.values`` uint8 [out, in / 4], the two kept codes of each four inputs as
  two's-complement nibbles, low first (above 4 bits a byte per code: int8 [out, in / 2]); and
  ``NAME.indices`` uint8 [out, in / 8], the places of the two in their four, 2 bits each, lowest
  first: NVIDIA's order of sparse metadata before its reshuffling for one instruction.
* ``50%``: ``NAME.mask`` uint8 [out, in / 8], a bit per input, lowest first, 1 where kept.

Scales are those of ``model.onnx``.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from quarot_onnx import ops
from quarot_onnx.calibration import Journal
from quarot_onnx.quantizers.pruning import Mask

FILE = "sparse.safetensors"

Bytes = NDArray[np.uint8]


def compressed(codes: NDArray[np.int8], keep: Mask) -> tuple[NDArray[np.int8], Bytes]:
    """The kept codes [out, in / 2] and their places [out, in / 8] of 2:4 codes [in, out]."""
    by_output = keep.T.reshape(keep.shape[1], -1, 4)
    places = np.argsort(~by_output, axis=-1, kind="stable")[..., :2]  # ascending
    fours = codes.T.reshape(by_output.shape)
    values = np.take_along_axis(fours, places, axis=-1).reshape(keep.shape[1], -1)
    pairs = (places[..., 0] | places[..., 1] << 2).astype(np.uint8)  # 4 bits for each four inputs
    padded = np.pad(pairs, ((0, 0), (0, pairs.shape[1] % 2)))
    indices: Bytes = (padded[:, 0::2] | padded[:, 1::2] << 4).astype(np.uint8)
    return values, indices


def expanded(values: NDArray[np.int8], indices: Bytes, in_features: int) -> NDArray[np.int8]:
    """The dense codes [in, out] of what `compressed` gave; for who reads ``sparse.safetensors``."""
    nibbles = np.stack([indices & 15, indices >> 4], axis=-1).reshape(len(indices), -1)
    nibbles = nibbles[:, : in_features // 4]
    places = np.stack([nibbles & 3, nibbles >> 2], axis=-1).astype(np.intp)
    fours = np.zeros((len(values), in_features // 4, 4), np.int8)
    np.put_along_axis(fours, places, values.reshape(places.shape), axis=-1)
    return fours.reshape(len(values), in_features).T


def save_sparse(
    directory: Path,
    journal: Journal,
    sizes: Iterable[tuple[str, tuple[int, ...]]],
    pattern: str,
    bits: int,
) -> None:
    """Write ``sparse.safetensors`` from what a calibrated pass kept of weights (name, sizes)."""
    tensors: dict[str, NDArray[Any]] = {}
    for name, (in_features, _) in sizes:
        keep = np.unpackbits(journal.array(f"{name}_keep"), axis=0, count=in_features).astype(bool)
        if pattern == "2:4":
            values, indices = compressed(np.asarray(journal.array(name)), keep)
            tensors[f"{name}.values"] = ops.pack_int4(values) if bits <= 4 else values
            tensors[f"{name}.indices"] = indices
        else:
            tensors[f"{name}.mask"] = np.packbits(keep.T, axis=1, bitorder="little")
    save_file(
        {name: np.ascontiguousarray(array) for name, array in tensors.items()}, directory / FILE
    )
