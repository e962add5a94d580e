# SPDX-License-Identifier: Apache-2.0
"""Every error a user can cause, one class per exit code.

A message is one line: ``where: what is true, with values; what to do``. The command line prints it
and exits with the class's ``exit_code``; any other exception is a bug of ours (exit code 1).
"""

import re
from typing import ClassVar

_ORT_CODE = re.compile(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ")


def first_line(error: Exception) -> str:
    """What a library says, for a message of ours, without ONNX Runtime's codes in front."""
    lines = str(error).strip().splitlines()
    return _ORT_CODE.sub("", lines[0])[:200] if lines else type(error).__name__


class QuarotError(Exception):
    """A mistake or a limit that the user can act on; never raised as itself."""

    exit_code: ClassVar[int] = 1


class UsageError(QuarotError):
    """An option, a recipe or a path that was given wrongly."""

    exit_code = 2


class InputError(QuarotError):
    """A model or data file that is missing, damaged or not finite."""

    exit_code = 3


class UnsupportedModelError(QuarotError):
    """A model, graph or dimension that this version does not handle."""

    exit_code = 4


class MissingDependencyError(QuarotError):
    """Something this machine lacks: a package, a compiler, a GPU."""

    exit_code = 5


class ResourceError(QuarotError):
    """Not enough disk or memory, or a lock held by another run."""

    exit_code = 6


class GateError(QuarotError):
    """Validation found the model worse or altered."""

    exit_code = 10
