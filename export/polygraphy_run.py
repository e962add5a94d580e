# SPDX-License-Identifier: Apache-2.0
"""What an artifact brings along for NVIDIA's Polygraphy: inputs, and the command that uses them."""

from pathlib import Path

DATA_LOADER, COMMAND = "polygraphy_data.py", "polygraphy_run.sh"

_COMMAND = """#!/bin/sh
# Run this model in ONNX Runtime through Polygraphy and check every output for NaN and infinity.
# More options go on the command line: --save-outputs golden.json on one machine, and on another
# --load-outputs golden.json --check-error-stat mean --atol 0.05 --rtol 0
cd "$(dirname "$0")" || exit 5
exec polygraphy run model.onnx --onnxrt --data-loader-script polygraphy_data.py --validate "$@"
"""


def save_polygraphy(directory: Path) -> None:
    """Write the data loader and the command beside ``model.onnx`` in `directory`."""
    script = Path(__file__).with_name(DATA_LOADER)
    (directory / DATA_LOADER).write_bytes(script.read_bytes())
    command = directory / COMMAND
    command.write_text(_COMMAND, encoding="utf-8")
    command.chmod(0o755)
