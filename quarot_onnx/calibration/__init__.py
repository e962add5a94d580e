# SPDX-License-Identifier: Apache-2.0
"""What a method may look at before it decides: tokens of a text, and what a layer does with them.

A `Calibration` is all that a calibrated pass is given, so nothing else can leak into its choices.
`walk` shows it to the decoder one layer at a time, on the graph as the passes have left it.
"""

from quarot_onnx.calibration.journal import Journal
from quarot_onnx.calibration.layers import LayerRun, Progress, walk
from quarot_onnx.calibration.tokens import Calibration, require_unseen

__all__ = ["Calibration", "Journal", "LayerRun", "Progress", "require_unseen", "walk"]
