# SPDX-License-Identifier: Apache-2.0
"""The Python side of the CUDA kernels and TensorRT plugins."""
