# SPDX-License-Identifier: Apache-2.0
"""One self-contained HTML page: the numbers, the rotation plan, the outliers before and after.

`artifact` gathers the `content` from an artifact, and `page` writes it.
"""

from quarot_onnx.report.artifact import report_artifact
from quarot_onnx.report.page import write_report

__all__ = ["report_artifact", "write_report"]
