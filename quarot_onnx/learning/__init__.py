# SPDX-License-Identifier: Apache-2.0
"""Rotations and transforms that are trained: Hugging Face's model rounded, its matrices free.

`learn` is the whole interface: a checkpoint, a recipe and a calibration in, `Transforms` out.
"""

from quarot_onnx.learning.train import Learned, learn

__all__ = ["Learned", "learn"]
