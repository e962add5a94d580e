# SPDX-License-Identifier: Apache-2.0
"""An engine directory, as those who run it see it: the plan, and who vouches for it."""

from pathlib import Path
from typing import Any

from quarot_onnx.errors import InputError
from quarot_onnx.manifest import MANIFEST, changed_files, load_manifest

PLAN = "model.plan"


def load_engine_manifest(directory: Path, *, trust: bool = False) -> dict[str, Any]:
    """The manifest of an engine directory whose plan is the one that was built.

    An engine is native code: one that is not what the manifest says is not loaded, unless `trust`.

    Raises:
        InputError: no engine, or a file that was changed.
    """
    manifest = load_manifest(directory)
    described = manifest.get("tensorrt")
    if not isinstance(described, dict) or not (described.get("engine") or trust):
        raise InputError(
            f"{directory}: holds no engine; build one with `quarot-onnx build` on a GPU machine"
        )
    if not (directory / PLAN).is_file():
        raise InputError(f"{directory / PLAN}: no such file; build again")
    if not trust:
        if PLAN not in manifest.get("files", {}):
            raise InputError(
                f"{directory / PLAN}: is not in {MANIFEST}, so nobody vouches for it; "
                "build again, or add --trust-engine if it is yours"
            )
        changed = changed_files(directory, manifest)
        if changed:
            raise InputError(
                f"{directory / changed[0]}: is missing or differs from {MANIFEST}; "
                "build again, or add --trust-engine if the change is yours"
            )
    return manifest
