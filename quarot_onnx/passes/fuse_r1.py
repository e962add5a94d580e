# SPDX-License-Identifier: Apache-2.0
"""R1: rotate the residual stream, offline, everywhere it is written and read.

    before:  x = E[ids];  x = x + f(x / rms(x) @ W_in) @ W_out;  logits = x / rms(x) @ W_head
    after:   E -> E @ Q   W_in -> Q.T @ W_in   W_out -> W_out @ Q   W_head -> Q.T @ W_head

Every residual state is x Q instead of x, and rms(x Q) = rms(x), so that every linear sees
``(x Q) (Q.T W) = x W``. It holds only when the norms have no scale (`FuseNormScalePass`) and when
no reader or writer is left out, which `Decoder.locate` has proven. (QuaRot, section 3, stage 1a.)

A post-norm (Gemma 2 and 3) stands between a writer and the stream, and its scale g can be folded
neither forwards nor backwards through Q. With ``Q = diag(s) H`` its rotation runs online:

    before:  x = x + (y / rms(y) * g)
    after:   x = x + (y / rms(y) * (g * s)) H         H: a Hadamard node, s: folded into g

R1 is all or nothing: where that node is not wanted, or no Hadamard of the order is known, the model
is left without R1, and the report says why.
"""

from functools import partial
from typing import Literal

import numpy as np

from quarot_onnx.decoder import Decoder, PostNorm
from quarot_onnx.errors import UnsupportedModelError
from quarot_onnx.passes.base import APPLIED, Effect, Pass, Report
from quarot_onnx.passes.online import insert_hadamard
from quarot_onnx.rotation import Rotation

PostNormForm = Literal["online", "skip_r1"]


class FuseR1Pass(Pass):
    """Fuse one rotation into every reader and writer of the residual stream."""

    effect = Effect.EQUIVALENT

    def __init__(
        self, decoder: Decoder, rotation: Rotation, post_norm: PostNormForm = "online"
    ) -> None:
        super().__init__(decoder)
        self.rotation = rotation
        self.post_norm: PostNormForm = post_norm

    def requires(self) -> None:
        """Norm scales must be folded, and the order must be the stream's."""
        self.refuse_after("InsertInputTransform")
        if "FuseNormScale" not in self.decoder.model.metadata_props.get(APPLIED, "").split():
            raise UnsupportedModelError(
                "R1: the norms still have scales, with which no rotation commutes; "
                "apply FuseNormScalePass first"
            )
        if self.rotation.size != self.decoder.hidden_size:
            raise UnsupportedModelError(
                f"R1: order {self.rotation.size} for hidden_size = {self.decoder.hidden_size}; "
                "they must be equal"
            )

    def rewrite(self) -> Report:
        """Rotate the embeddings, every writer with its bias, every reader."""
        decoder, rotation = self.decoder, self.rotation
        if reason := self._skipping():
            return self.report(0, skipped={reason: [norm.name for norm in decoder.post_norms]})
        self.restate = rotation.rotate_outputs
        for table in decoder.embedding_weights:
            table.compose(1, rotation.rotate_outputs)
        for writer in decoder.writers:
            if writer.post_norm is not None:
                self._rotate_online(writer.post_norm)
                continue
            writer.linear.weight.compose(1, rotation.rotate_outputs)
            if writer.linear.bias is not None:
                writer.linear.bias.compose(0, rotation.rotate_outputs)
        readers = [reader for norm in decoder.norms for reader in norm.readers]
        for reader in readers:
            reader.weight.compose(0, rotation.rotate_inputs)
        sites = len(decoder.embeddings) + len(decoder.writers) + len(readers)
        return self.report(sites, rotation.describe() + self._cost())

    def _skipping(self) -> str:
        """Why R1 is left out; empty where it is not."""
        if not self.decoder.post_norms:
            return ""
        if self.post_norm == "skip_r1":
            return "post-norms keep their scale, and rotations.post_norm = skip_r1"
        if self.rotation.plan is None:
            return (
                f"post-norms keep their scale, and a {self.rotation.describe()} has no fast form "
                "to run behind them"
            )
        return ""

    def _rotate_online(self, norm: PostNorm) -> None:
        assert self.rotation.plan is not None
        norm.scale.compose(0, partial(np.multiply, self.rotation.signs))
        position = norm.addition.inputs.index(norm.node.outputs[0])
        name = f"{norm.module}/R1"
        insert_hadamard(self.decoder.model, norm.addition, position, self.rotation.plan, name)

    def _cost(self) -> str:
        count = len(self.decoder.post_norms)
        if not count:
            return ""
        assert self.rotation.plan is not None
        cost = self.rotation.plan.cost
        return f"; online after {count} post-norms, {cost} multiply-adds a token each"
