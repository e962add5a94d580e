# SPDX-License-Identifier: Apache-2.0
"""Quantize weights by what reaches them, layer by layer: GPTQ, and OBR where half are pruned.

    before:  y = x @ W
    after:   y = (x @ codes) * scale          codes close to W where E|x @ dW|^2 says it matters

Lossy. The linears of a layer are rounded level by level (of Llama: q, k and v; o; gate and up;
down), each on inputs that come through the codes of those before it, with online Hadamards and
without quantized activations, as QuaRot's code does (arXiv 2404.00456, section 5). A linear that
hardly any token reaches, such as an expert's, is rounded to nearest, and the report says so.
"""

import math
import time
from typing import Any

import numpy as np

from quarot_onnx import ops
from quarot_onnx.calibration import Calibration, Journal, LayerRun, Progress, walk
from quarot_onnx.decoder import Decoder, Linear
from quarot_onnx.passes.base import Effect, Pass, Report
from quarot_onnx.passes.quantize_weights import (
    down_proj_detail,
    down_projections,
    float_routers,
    hold_codes,
    stored,
)
from quarot_onnx.quantizers.form import Form
from quarot_onnx.quantizers.gptq import gptq, output_power
from quarot_onnx.quantizers.grid import Codes, nearest
from quarot_onnx.quantizers.pruning import Mask, mask_of, obr
from quarot_onnx.recipe import Weights
from quarot_onnx.weights import Float64

_FEW_TOKENS = 64
_FEW = f"fewer than {_FEW_TOKENS} tokens of the calibration text reach it: rounded to nearest"


class CalibrateWeightsPass(Pass):
    """Replace each MatMul of a layer by a product with codes that the calibration has chosen."""

    effect = Effect.LOSSY

    def __init__(
        self,
        decoder: Decoder,
        weights: Weights,
        calibration: Calibration,
        *,
        journal: Journal | None = None,
        progress: Progress | None = None,
    ) -> None:
        super().__init__(decoder)
        self.weights = weights
        self._downs = down_projections(decoder)
        self.calibration = calibration
        self.journal = journal or Journal()
        self.progress = progress

    def rewrite(self) -> Report:
        """Quantize every linear of every layer; finished layers are taken from the journal."""
        records: list[dict[str, Any]] = []
        skipped = float_routers(self.decoder)
        for run in walk(self.decoder, self.calibration, progress=self.progress):
            part = f"layers.{run.layer.index}"
            finished = self.journal.record(part)
            if finished is None:
                finished = {"linears": self._quantize(run)}
                self.journal.finish(part, finished)
            else:
                for linear in run.layer.linears:
                    self._hold(linear)
                ops.declare(self.decoder.model)
            for record in finished["linears"]:
                records.append(record)
                if record["tokens"] < _FEW_TOKENS:
                    skipped.setdefault(_FEW, []).append(record["site"])
        sparsity = "" if self.weights.sparsity == "none" else f", {self.weights.sparsity} sparse"
        form, down = self.weights.form, self.weights.down_proj_form
        bits = f"{form.describe()}{down_proj_detail(down, form)}"
        detail = f"{bits}, {self.weights.method}{sparsity}"
        return self.report(len(self.decoder.linears), detail, skipped, records)

    def _quantize(self, run: LayerRun) -> list[dict[str, Any]]:
        records = []
        for level in run.levels():
            hessians = _hessians(run, level)
            for linear in level:
                started = time.perf_counter()
                hessian, tokens = hessians[linear.x.name or ""]
                record = self._round(linear, hessian, tokens)
                record["seconds"] = round(time.perf_counter() - started, 3)
                records.append(record)
            ops.declare(self.decoder.model)  # the next level runs through what this one is now
        return records

    def _round(self, linear: Linear, hessian: Float64, tokens: int) -> dict[str, Any]:
        weight, form = linear.weight.float64(), self._form(linear)
        few = tokens < _FEW_TOKENS
        keep = None
        if self.weights.sparsity != "none":
            seen = None if few or self.weights.method == "magnitude" else hessian
            keep = mask_of(weight, seen, self.weights.sparsity)
        plain = nearest(weight if keep is None else np.where(keep, weight, 0), form)
        found = plain if few else self._made_up(weight, hessian, form, keep)
        self.journal.keep(linear.weight.name, found.codes)
        self.journal.keep(f"{linear.weight.name}_scale", found.scale)
        self.journal.keep(f"{linear.weight.name}_zero", found.zero)
        self._hold(linear)
        if keep is not None:
            self.journal.keep(f"{linear.weight.name}_keep", np.packbits(keep, axis=0))
        power = output_power(weight, hessian)
        return {
            "site": linear.module,
            "tokens": tokens,
            "snr_db": _snr_db(weight, found, hessian, power),
            "rtn_snr_db": _snr_db(weight, plain, hessian, power),
        }

    def _made_up(self, weight: Float64, hessian: Float64, form: Form, keep: Mask | None) -> Codes:
        """Codes of which each makes up for the errors before it."""
        if keep is not None and self.weights.method == "obr":
            return obr(weight, hessian, keep, form, damping=self.weights.damping)
        return gptq(
            weight if keep is None else np.where(keep, weight, 0),
            hessian,
            form,
            damping=self.weights.damping,
            block_size=self.weights.block_size,
            act_order=self.weights.act_order,
            static_groups=self.weights.static_groups,
            keep=keep,
        )

    def _form(self, linear: Linear) -> Form:
        is_down = linear in self._downs
        return self.weights.down_proj_form if is_down else self.weights.form

    def _hold(self, linear: Linear) -> None:
        """Put the journal's codes in the place of the linear's weight."""
        name, form = linear.weight.name, self._form(linear)
        groups = linear.in_features // form.rows(linear.in_features)
        tensors = stored(name, linear.weight.sizes, form, groups, self.journal.array)
        hold_codes(self.decoder, linear, tensors)


def _hessians(run: LayerRun, level: tuple[Linear, ...]) -> dict[str, tuple[Float64, int]]:
    """E[x.T x] and the number of tokens of each distinct input of `level`, by the value's name."""
    values = {linear.x.name or "": linear.x for linear in level}
    sums = {
        linear.x.name or "": np.zeros((linear.in_features, linear.in_features)) for linear in level
    }
    tokens = dict.fromkeys(values, 0)
    for batch in run.capture(values):
        for name, x in batch.items():
            sums[name] += x.T @ x
            tokens[name] += len(x)
    for name, total in sums.items():
        np.divide(total, max(tokens[name], 1), out=total)
    return {name: (sums[name], tokens[name]) for name in values}


def _snr_db(weight: Float64, found: Codes, hessian: Float64, power: float) -> float | None:
    """``E|x @ W|^2 / E|x @ dW|^2`` in decibels; None where nothing was lost or nothing came."""
    error = output_power(found.values() - weight, hessian)
    if error <= 0 or power <= 0:
        return None
    return round(10 * math.log10(power / error), 3)
