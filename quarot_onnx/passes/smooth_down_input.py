# SPDX-License-Identifier: Apache-2.0
"""Smooth down_proj's input: move per-channel size from the activation into the weight, offline.

    before:  y = (act(x @ W_gate) * (x @ W_up)) @ W_down
    after:   W_up -> W_up diag(1/s)        W_down -> diag(s) W_down

The function does not change, since the product is linear in up_proj's output. Before R4: a
rotation spreads what is left of an outlier channel over all of them (SmoothRot, arXiv 2506.05413).
A feed-forward without such a product (OPT, GPT-NeoX) is skipped.
"""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import onnx_ir as ir

from quarot_onnx.calibration import Calibration, walk
from quarot_onnx.decoder import Decoder, Linear, Mlp
from quarot_onnx.passes.base import Effect, Pass, Report
from quarot_onnx.weights import Float64


class SmoothDownInputPass(Pass):
    """Divide up_proj's outputs and multiply down_proj's inputs by each layer's s."""

    effect = Effect.EQUIVALENT

    def __init__(
        self, decoder: Decoder, scales: Callable[[], Sequence[Float64]], detail: str
    ) -> None:
        """`scales` gives [intermediate_size] of every layer, when the pass runs."""
        super().__init__(decoder)
        self.scales = scales
        self.detail = detail

    def requires(self) -> None:
        """The input of down_proj must not be transformed yet, and there is one per layer."""
        self.refuse_experts()
        for later in ("InsertR4", "InsertDownTransform"):
            self.refuse_after(later)

    def rewrite(self) -> Report:
        """Scale both sides of every product."""
        skipped: list[str] = []
        for layer, scale in zip(self.decoder.layers, self.scales(), strict=True):
            up, down = multiplied_reader(layer.mlp), layer.mlp.down
            if up is None:
                skipped.append(down.name)
                continue
            self.found[f"model.layers.{layer.index}.mlp.up"] = scale
            up.weight.compose(1, partial(np.multiply, 1 / scale))
            if up.bias is not None:
                up.bias.compose(0, partial(np.multiply, 1 / scale))
            down.weight.compose(0, partial(np.multiply, scale[:, None]))
        reason = "no reader of the norm is a plain factor of its input"
        sites = len(self.decoder.layers) - len(skipped)
        return self.report(sites, self.detail, {reason: skipped} if skipped else None)


def multiplied_reader(mlp: Mlp) -> Linear | None:
    """The reader whose output is a plain factor of down_proj's input: up_proj, or None."""
    product = mlp.down.x.producer()
    if product is None or product.op_type != "Mul":
        return None
    factors: list[ir.Value | None] = list(product.inputs)
    return next((linear for linear in mlp.readers if linear.output in factors), None)


def scales_from_calibration(
    decoder: Decoder, calibration: Calibration, alpha: float
) -> list[Float64]:
    """SmoothRot's scales of every layer, [intermediate_size].

    ``s = max|x|**alpha / max|w|**(1 - alpha)`` of each input channel of down_proj, at least 1e-5,
    over all tokens of `calibration` in the float model (section 3.2; its code takes the largest
    signed weight where the paper's formula has the absolute one, which is used here).
    """
    scales: list[Float64] = []
    for run in walk(decoder, calibration):
        down = run.layer.mlp.down
        largest = np.zeros(down.in_features)
        for batch in run.capture({"x": down.x}):
            np.maximum(largest, np.abs(batch["x"]).max(axis=0), out=largest)
        weight = np.abs(down.weight.float64()).max(axis=1)
        scale = largest**alpha / np.maximum(weight, 1e-12) ** (1 - alpha)
        scales.append(np.maximum(scale, 1e-5))
    return scales
