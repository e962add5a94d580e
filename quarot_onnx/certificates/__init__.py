# SPDX-License-Identifier: Apache-2.0
"""How far each layer is from the float model after each equivalent pass."""

from quarot_onnx.certificates.certificate import Certificate, Certifier, Restate

__all__ = ["Certificate", "Certifier", "Restate"]
