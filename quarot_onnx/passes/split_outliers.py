# SPDX-License-Identifier: Apache-2.0
"""Split off the input features with outliers: their part of every product stays float.

    before:  y = x @ W
    after:   y = (x * keep) @ W' + Gather(x, O) @ W[O]        W' = W with the rows O set to 0

The function does not change: ``keep`` is 0 on the features O and 1 elsewhere. What is quantized
later is the first product alone, whose scales no longer see the outliers (LLM.int8, arXiv
2208.07339, by a threshold; QUIK, arXiv 2310.09259, by a number of features). The features are fixed
by the calibration text, where LLM.int8 finds them anew in every batch.
"""

from collections.abc import Callable, Mapping
from functools import partial

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from quarot_onnx.calibration import Calibration, walk
from quarot_onnx.decoder import Decoder
from quarot_onnx.handles import Linear
from quarot_onnx.passes.base import Effect, Pass, Report
from quarot_onnx.weights import Float64, Index, Weight

Features = NDArray[np.int64]
"""Indices of input features, ascending."""

Chosen = Mapping[str, Features]
"""By the name of the value that linears read."""


def largest_features(
    decoder: Decoder, calibration: Calibration, *, share: float, threshold: float
) -> Chosen:
    """The outlier features of every input of a linear, on the float model.

    Args:
        decoder: before anything is quantized.
        calibration: the tokens.
        share: of the features of an input, those with the largest max|x|; rounded up.
        threshold: of max|x|; where `share` is 0, every feature that reaches it.
    """
    chosen: dict[str, Features] = {}
    for run in walk(decoder, calibration):
        values = {linear.x.name or "": linear.x for linear in run.layer.linears}
        peaks: dict[str, NDArray[np.float32]] = {}
        for batch in run.capture(values):
            for name, x in batch.items():
                found = np.abs(x).max(axis=0, initial=0)
                peaks[name] = np.maximum(peaks.get(name, found), found)
        for name, peak in peaks.items():
            if share > 0:
                count = int(np.ceil(share * len(peak)))
                chosen[name] = np.sort(np.argsort(-peak, kind="stable")[:count])
            else:
                chosen[name] = np.flatnonzero(peak >= threshold)
    return chosen


class SplitOutliersPass(Pass):
    """Give each linear a float product for the outlier features of its input."""

    effect = Effect.EQUIVALENT

    def __init__(self, decoder: Decoder, choose: Callable[[], Chosen]) -> None:
        """`choose` gives the features when the pass runs."""
        super().__init__(decoder)
        self.choose = choose

    def requires(self) -> None:
        """Weights must still be float."""
        self.refuse_after("QuantizeWeights")
        self.refuse_after("CalibrateWeights")

    def rewrite(self) -> Report:
        """Split every linear whose input has outlier features."""
        chosen = self.choose()
        by_input: dict[ir.Value, list[Linear]] = {}
        for linear in self.decoder.linears:
            by_input.setdefault(linear.x, []).append(linear)
        records, sites = [], 0
        for x, linears in by_input.items():
            features = chosen.get(x.name or "", np.empty(0, np.int64))
            records.append({"site": linears[0].module, "features": [int(i) for i in features]})
            if len(features):
                self._split(x, linears, features)
                sites += len(linears)
        count = sum(len(record["features"]) for record in records)
        detail = f"{count} features of {len(records)} inputs stay float"
        return self.report(sites, detail, records=records)

    def _split(self, x: ir.Value, linears: list[Linear], features: Features) -> None:
        graph, first = self.decoder.model.graph, linears[0]
        size = first.in_features
        dtype = x.dtype or ir.DataType.FLOAT
        keep = np.ones(size)
        keep[features] = 0
        at = f"{first.module}/outliers"
        mask = self._constant(f"{at}.keep", keep.astype(dtype.numpy()))
        indices = self._constant(f"{at}.features", features.astype(np.int64))
        usual = ir.node("Mul", [x, mask], name=f"{at}/Mul")
        outlying = ir.node("Gather", [x, indices], {"axis": -1}, name=f"{at}/Gather")
        assert x.shape is not None
        for node, width in ((usual, size), (outlying, len(features))):
            result = node.outputs[0]
            result.name = f"{node.name}_output_0"
            result.type = ir.TensorType(dtype)
            result.shape = ir.Shape([*x.shape[:-1], width])
            graph.insert_before(first.node, node)
        for linear in linears:
            self._add_product(linear, outlying.outputs[0], features)
            linear.node.replace_input_with(0, usual.outputs[0])
            linear.weight.compose(0, partial(_without, features=features))

    def _add_product(self, linear: Linear, x: ir.Value, features: Features) -> None:
        """Add ``x @ W[features]`` to what the linear's node computes."""
        graph, weight = self.decoder.model.graph, linear.weight
        name = f"{weight.name}_outliers"
        held = Weight(name, _Rows(weight.derive(weight.name), features), weight.dtype)
        value = ir.Value(name=name, type=ir.TensorType(held.dtype), shape=ir.Shape(held.sizes))
        value.const_value = held
        graph.initializers[name] = value
        at, old = f"{linear.module}/outliers", linear.node.outputs[0]
        product = ir.node("MatMul", [x, value], name=f"{at}/MatMul")
        total = ir.node("Add", [old, product.outputs[0]], name=f"{at}/Add")
        for node in (product, total):
            result = node.outputs[0]
            result.name, result.type, result.shape = f"{node.name}_output_0", old.type, old.shape
        old.replace_all_uses_with(total.outputs[0])
        total.replace_input_with(0, old)
        graph.insert_after(linear.node, [product, total])

    def _constant(self, name: str, array: NDArray[np.generic]) -> ir.Value:
        tensor = ir.tensor(array, name=name)
        value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape))
        value.const_value = tensor
        self.decoder.model.graph.initializers[name] = value
        return value


def _without(weight: Float64, features: Features) -> Float64:
    """`weight` [in_features, n] with the rows of `features` set to 0."""
    kept = weight.copy()
    kept[features] = 0
    return kept


class _Rows:
    """A source that is some rows of a weight, as it is now."""

    def __init__(self, weight: Weight, rows: Features) -> None:
        self._weight = weight
        self._rows = rows

    @property
    def shape(self) -> tuple[int, ...]:
        """[rows, out_features]."""
        return len(self._rows), *self._weight.sizes[1:]

    def read(self, index: Index) -> Float64:
        """The numbers at `index`."""
        rows: Float64 = self._weight.float64()[self._rows][index]
        return rows
