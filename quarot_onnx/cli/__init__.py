# SPDX-License-Identifier: Apache-2.0
"""The command line, ``quarot-onnx``.

Data goes to standard output, progress and errors to standard error.
"""

from quarot_onnx.cli.commands import app, main

__all__ = ["app", "main"]
