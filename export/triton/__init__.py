# SPDX-License-Identifier: Apache-2.0
"""An artifact as a model repository of NVIDIA Triton Inference Server."""

from quarot_onnx.export.triton.repository import triton_from_artifact

__all__ = ["triton_from_artifact"]
