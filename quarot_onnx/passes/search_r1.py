# SPDX-License-Identifier: Apache-2.0
"""R1 by search: of several rotations, fuse the one that rounds the calibration's activations best.

    before:  x, W
    after:   FuseR1 with argmin_Q  sum over norms of |round(y Q) - y Q|^2 / |y|^2

y is what a norm hands to its linears. A rotation keeps every length, so the errors of candidates
compare as they are; they are measured at 4 bits, symmetric per token, on the tokens of the
calibration. Random rotations differ from one another (SpinQuant, section 2), and this costs one
pass over the float model instead of a training.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from quarot_onnx import ops
from quarot_onnx.calibration import Calibration, walk
from quarot_onnx.decoder import Decoder
from quarot_onnx.passes.base import Report
from quarot_onnx.passes.fuse_r1 import FuseR1Pass, PostNormForm
from quarot_onnx.rotation import Rotation


class SearchR1Pass(FuseR1Pass):
    """Fuse the candidate with the least rounding error."""

    def __init__(
        self,
        decoder: Decoder,
        candidates: Sequence[Rotation],
        post_norm: PostNormForm,
        calibration: Calibration,
    ) -> None:
        super().__init__(decoder, candidates[0], post_norm)
        self.candidates = candidates
        self.calibration = calibration

    @property
    def name(self) -> str:
        """It fuses R1, however it was found."""
        return "FuseR1"

    def requires(self) -> None:
        """As R1, and every layer has one feed-forward."""
        super().requires()
        self.refuse_experts()

    def rewrite(self) -> Report:
        """Measure every candidate, then fuse the best."""
        errors = self._errors()
        best = int(np.argmin(errors))
        self.rotation = self.candidates[best]
        self.restate = self.rotation.rotate_outputs
        report = super().rewrite()
        if report.sites:
            self.found["R1"] = self.rotation.rotate_outputs(np.eye(self.rotation.size))
        records: list[dict[str, Any]] = [
            {"site": f"seed {candidate.seed}", "error": float(error), "is_chosen": i == best}
            for i, (candidate, error) in enumerate(zip(self.candidates, errors, strict=True))
        ]
        detail = f"{report.detail}, seed {self.rotation.seed} of {len(errors)}"
        return self.report(report.sites, detail, report.skipped, records)

    def _errors(self) -> "np.ndarray[tuple[int], np.dtype[np.float64]]":
        """Each candidate's relative squared error, averaged over norms."""
        errors = np.zeros(len(self.candidates))
        for run in walk(self.decoder, self.calibration):
            layer = run.layer
            sites = {"attention": layer.attention.q.x, "mlp": layer.mlp.readers[0].x}
            missed = np.zeros((len(sites), len(self.candidates)))
            energy = np.zeros(len(sites))
            for batch in run.capture(sites):
                for i, name in enumerate(sites):
                    x = batch[name].astype(np.float64)
                    energy[i] += np.square(x).sum()
                    for j, candidate in enumerate(self.candidates):
                        missed[i, j] += _rounding_error(candidate.rotate_outputs(x))
            errors += (missed / energy[:, None]).sum(axis=0)
        return errors / (2 * len(self.decoder.layers))


def _rounding_error(x: "np.ndarray[Any, np.dtype[np.float64]]") -> float:
    """The squared error of 4-bit codes of x [tokens, features]."""
    codes, scale = ops.quantize_int4(x)
    values = (codes.astype(np.float64) - ops.ACTIVATION_ZERO_POINT) * scale
    return float(np.square(values - x).sum())
