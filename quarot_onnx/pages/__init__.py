# SPDX-License-Identifier: Apache-2.0
"""What every page shares: its template engine, how numbers are written; `figures` draws.

Nothing is loaded from anywhere: the style is inline, figures are inline SVG in the page's colours,
and a content security policy forbids the rest. Strings are escaped: a model's name is not ours.
"""

import math
from pathlib import Path
from typing import Any

from quarot_onnx.errors import MissingDependencyError, ResourceError

_THIN = "\N{NARROW NO-BREAK SPACE}"


def render(template: Path, **content: Any) -> str:
    """The page of a template, which may include what stands beside this file.

    Raises:
        MissingDependencyError: Jinja2 is not installed.
    """
    try:
        import jinja2  # noqa: PLC0415  # an extra
    except ImportError as error:
        raise missing("jinja2", error) from error
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([template.parent, Path(__file__).parent]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "size": byte_size, "seconds": _seconds}
    return environment.get_template(template.name).render(**content)


def write_page(path: Path, page: str) -> None:
    """Write a page.

    Raises:
        ResourceError: `path` cannot be written.
    """
    try:
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise ResourceError(
            f"{path}: cannot be written ({error.strerror}); choose another place"
        ) from error


def missing(package: str, error: ImportError) -> MissingDependencyError:
    """What to raise where one of the packages that pages need is not there."""
    return MissingDependencyError(
        f'{package}: cannot be imported ({error}); pip install "quarot-onnx[report]"'
    )


def number(value: float | None, digits: int = 4) -> str:
    """`value` with `digits` significant digits and a thin space between thousands."""
    if value is None or math.isnan(value):
        return "–" if value is None else "not a number"
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    if value != 0 and not 1e-3 <= abs(value) < 1e7:
        return f"{value:.{digits - 1}e}"
    places = max(0, digits - 1 - math.floor(math.log10(abs(value)))) if value else 0
    return f"{value:,.{places}f}".replace(",", _THIN)


def byte_size(count: float) -> str:
    """`count` bytes in decimal units."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= max(scale, 1e4):
            return f"{number(count / scale, 3)}\N{NO-BREAK SPACE}{unit}"
    return f"{count:,.0f}".replace(",", _THIN) + "\N{NO-BREAK SPACE}bytes"


def _seconds(seconds: float) -> str:
    if seconds < 60:
        return f"{number(seconds, 3)}\N{NO-BREAK SPACE}s"
    return f"{int(seconds // 60)}\N{NO-BREAK SPACE}min {seconds % 60:02.0f}\N{NO-BREAK SPACE}s"
