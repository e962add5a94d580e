# SPDX-License-Identifier: Apache-2.0
"""What every command does with its result: JSON, files, and a bar while it is made."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from quarot_onnx.errors import InputError, ResourceError

if TYPE_CHECKING:
    from quarot_onnx.artifacts import Progress


def emit(
    content: Any, as_json: bool, show: Callable[[], object], save_to: Path | None = None
) -> None:
    """Print what a command found, as JSON or by `show`; also write the JSON where asked."""
    if save_to is not None:
        write(save_to, json.dumps(content, indent=2) + "\n")
    if as_json:
        print_json(content)
    else:
        show()


def write(path: Path, text: str, *, mode: Literal["w", "a"] = "w") -> None:
    """Write a file that an option named.

    Raises:
        ResourceError: it cannot be written.
    """
    try:
        with path.open(mode, encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise ResourceError(f"{path}: cannot be written ({error.strerror})") from error


def print_json(content: Any) -> None:
    """Print JSON to standard output."""
    print(json.dumps(content, indent=2, ensure_ascii=False))


def load_json(path: Path | None) -> dict[str, Any] | None:
    """What an earlier command saved; None where no path is given.

    Raises:
        InputError: it cannot be read.
    """
    if path is None:
        return None
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path}: cannot be read as JSON ({error}); give what --save-json wrote"
        ) from error


@contextmanager
def progress_bar(label: str, unit: str = "MB") -> "Iterator[Progress]":
    """A progress bar on a terminal's standard error; silent in a pipe."""
    with progress_phases() as phase:
        yield phase(label, unit)


@contextmanager
def progress_phases() -> "Iterator[Callable[[str, str], Progress]]":
    """One bar for work in phases: (label, unit) -> what updates it while that phase runs."""
    from rich.console import Console  # noqa: PLC0415
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn  # noqa: PLC0415

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[done]}"),
        TimeRemainingColumn(),
    )
    with Progress(
        *columns, console=console, disable=not console.is_terminal, transient=True
    ) as bar:
        task = bar.add_task("preparing", total=None, done="")

        def phase(label: str, unit: str) -> "Callable[[int, int], None]":
            size = 1e6 if unit == "MB" else 1

            def update(done: int, total: int) -> None:
                text = f"{done / size:,.0f} / {total / size:,.0f} {unit}"
                bar.update(task, description=label, completed=done, total=total, done=text)

            return update

        yield phase
