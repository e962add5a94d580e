# SPDX-License-Identifier: Apache-2.0
"""Figures of a page: inline SVG.

They are drawn in stand-in colours that become the page's CSS variables: one figure fits both
themes.
"""

import base64
import io
import re
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from quarot_onnx.pages import missing

if TYPE_CHECKING:
    from markupsafe import Markup
    from matplotlib.figure import Figure

Float32 = NDArray[np.float32]

_RIDGES, _COLUMNS = 48, 112  # of a drawn surface, at most

INK, FAINT, BEFORE, AFTER = "#010203", "#040506", "#070809", "#0a0b0c"
_VARIABLES = {INK: "--muted", FAINT: "--line", BEFORE: "--before", AFTER: "--after"}
_HEIGHT_COLOURS = ("#2f6f94", "#7fb1c6", "#ddd6bd", "#e6a052", "#c2402b")  # calm to peak
STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "quarot-onnx",
    "font.family": "DejaVu Sans",
    "font.size": 8.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "lines.linewidth": 1.6,
}


def matplotlib() -> Any:
    """The package Matplotlib.

    Raises:
        MissingDependencyError: it is not installed.
    """
    try:
        import matplotlib as mpl  # noqa: PLC0415  # an extra
        import matplotlib.ticker  # noqa: PLC0415
    except ImportError as error:
        raise missing("matplotlib", error) from error
    return mpl


def surface_figure(
    magnitude: Float32, limit: float, shape: tuple[int, int] | None = None
) -> "Figure":
    """|activation| [tokens, channels] as a surface up to `limit`; only its body is a bitmap.

    `shape` is that of the values where `magnitude` is what `pooled` made of them.
    """
    mpl = matplotlib()
    from matplotlib.colors import LightSource, LinearSegmentedColormap  # noqa: PLC0415
    from matplotlib.figure import Figure  # noqa: PLC0415

    tokens, channels = shape or magnitude.shape
    heights, rows, columns = pooled(magnitude)
    rows = rows * (tokens / magnitude.shape[0])
    columns = columns * (channels / magnitude.shape[1])
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(4.6, 3.15))
        axes: Any = figure.add_axes((-0.07, -0.035, 1.14, 1.14), projection="3d")
        colours = LinearSegmentedColormap.from_list("heights", _HEIGHT_COLOURS)
        painted = colours(np.sqrt(heights / limit))
        light = LightSource(azdeg=225, altdeg=50).hillshade(heights / limit, vert_exag=8)
        painted[..., :3] *= 0.8 + 0.2 * light[..., None]
        x, y = np.meshgrid(columns, rows)
        surface = axes.plot_surface(
            x,
            y,
            heights,
            facecolors=painted,
            shade=False,
            rstride=1,
            cstride=1,
            linewidth=0,
            antialiased=False,
        )
        surface.set_rasterized(True)
        top = mpl.ticker.MaxNLocator(4).tick_values(0, limit)[-1]
        axes.set(xlim=(0, channels), ylim=(0, tokens), zlim=(0, top))
        axes.set_box_aspect((1.65, 1.0, 0.82), zoom=1.1)
        axes.view_init(elev=27, azim=-62)
        axes.set_xlabel("channel", labelpad=1)
        axes.set_ylabel("token", labelpad=0)
        for axis, ticks in ((axes.xaxis, 4), (axes.yaxis, 3), (axes.zaxis, 4)):
            axis.set_major_locator(mpl.ticker.MaxNLocator(ticks))
            axis.set_tick_params(pad=-2)
            axis.set_pane_color((0, 0, 0, 0))
            axis.line.set_color(FAINT)
    return figure


def pooled(values: Float32) -> tuple[Float32, Any, Any]:
    """The maxima of blocks of `values`, few enough to draw, and where the blocks begin."""
    edges = [
        np.unique(np.linspace(0, size, min(size, most), endpoint=False).astype(int))
        for size, most in zip(values.shape, (_RIDGES, _COLUMNS), strict=True)
    ]
    by_row = np.maximum.reduceat(values, edges[0], axis=0)
    pooled: Float32 = np.maximum.reduceat(by_row, edges[1], axis=1)
    return pooled, edges[0], edges[1]


def inline(figure: "Figure", name: str, label: str) -> "Markup":
    """The figure as an SVG element for the page, with ids of its own and the page's colours."""
    from markupsafe import Markup, escape  # noqa: PLC0415  # comes with Jinja2

    buffer = io.StringIO()
    empty = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with matplotlib().rc_context(STYLE):
        figure.savefig(buffer, format="svg", dpi=220, transparent=True, metadata=empty)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    box = re.search(r'viewBox="([^"]*)"', svg)
    assert box is not None
    svg = svg[svg.index(">") + 1 :]
    svg = svg.replace("xlink:href", "href")
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r"url\(#", f"url(#{name}-", svg)
    svg = re.sub(r'href="#', f'href="#{name}-', svg)
    svg = re.sub(r"data:image/png;base64,([^\"]*)", _compressed, svg)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    opening = f'<svg viewBox="{box[1]}" role="img" aria-label="{escape(label)}">'
    return Markup(opening + svg)


def _compressed(match: re.Match[str]) -> str:
    """The bitmap in a palette of 255 colours and transparency, a quarter of the bytes."""
    from PIL import Image  # noqa: PLC0415  # comes with Matplotlib

    picture = Image.open(io.BytesIO(base64.b64decode(match[1]))).convert("RGBA")
    buffer = io.BytesIO()
    picture.quantize(256, method=Image.Quantize.FASTOCTREE).save(buffer, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
