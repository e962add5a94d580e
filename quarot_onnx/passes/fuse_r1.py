# SPDX-License-Identifier: Apache-2.0
"""R1: rotate the residual stream, offline, everywhere it is written and read.

    before:  x = E[ids];  x = x + f(x / rms(x) @ W_in) @ W_out;  logits = x / rms(x) @ W_head
    after:   E -> E @ Q   W_in -> Q.T @ W_in   W_out -> W_out @ Q   W_head -> Q.T @ W_head

Every residual state is x Q instead of x, and rms(x Q) = rms(x), so that every linear sees
``(x Q) (Q.T W) = x W``. It holds only when the norms have no scale (`FuseNormScalePass`) and when
no reader or writer is left out, which `Decoder.locate` has proven. (QuaRot, section 3, stage 1a.)
"""

from quarot_onnx.decoder import Decoder
from quarot_onnx.errors import UnsupportedModelError
from quarot_onnx.passes.base import APPLIED, Effect, Pass, Report
from quarot_onnx.rotation import Rotation


class FuseR1Pass(Pass):
    """Fuse one rotation into every reader and writer of the residual stream."""

    effect = Effect.EQUIVALENT

    def __init__(self, decoder: Decoder, rotation: Rotation) -> None:
        super().__init__(decoder)
        self.rotation = rotation

    def requires(self) -> None:
        """Norm scales must be folded, and the order must be the stream's."""
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
        """Rotate the embedding, every writer with its bias, every reader."""
        rotation = self.rotation
        self.decoder.embedding_weight.compose(1, rotation.rotate_outputs)
        for writer in self.decoder.writers:
            writer.weight.compose(1, rotation.rotate_outputs)
            if writer.bias is not None:
                writer.bias.compose(0, rotation.rotate_outputs)
        readers = [reader for norm in self.decoder.norms for reader in norm.readers]
        for reader in readers:
            reader.weight.compose(0, rotation.rotate_inputs)
        return self.report(1 + len(self.decoder.writers) + len(readers), rotation.describe())
