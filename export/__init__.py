# SPDX-License-Identifier: Apache-2.0
"""Every border crossing of ONNX: from Hugging Face, to TensorRT, to Triton.

The directory ``export/`` at the top of the repository is the package ``quarot_onnx.export``.
"""
