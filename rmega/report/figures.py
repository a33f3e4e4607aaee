"""matplotlib figures as inline SVG, in colors that color-blind readers can tell apart."""

from __future__ import annotations

import dataclasses
import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

BLUE, ORANGE, GREEN, PURPLE, GREY = "#0072b2", "#d55e00", "#009e73", "#aa4499", "#6b7280"
SMALL, WIDE = (5.2, 3.3), (10.6, 3.3)

_STYLE = {
    # text stays text: small, selectable, and the browser has the glyphs of any script
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e5e8ec",
    "axes.axisbelow": True,
    "axes.edgecolor": "#8a94a0",
    "legend.frameon": False,
    "text.parse_math": False,  # names of sources may hold a dollar sign
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
}


def require_matplotlib(flag: str) -> None:
    """ValueError naming the extra where matplotlib is missing."""
    if find_spec("matplotlib") is None:
        raise ValueError(
            f"{flag} needs matplotlib, which is not installed (pip install 'rmega[plots]')"
        )


@dataclasses.dataclass
class Drawing:
    """A figure while it is drawn; ``svg`` holds the markup once the ``with`` block of ``drawing``
    is left."""

    figure: Any
    svg: str = ""

    def legend_below(self) -> None:
        """The legend under the plot, where it hides no data; its marks in full color."""
        shown = self.figure.legend(loc="outside lower center", ncols=4, fontsize=9)
        for handle in shown.legend_handles:
            handle.set_alpha(1)


@contextmanager
def drawing(
    title: str, size: tuple[float, float] = SMALL, *, prefix: str = "", **subplots: Any
) -> Iterator[tuple[Drawing, Any]]:
    """``with drawing("Loss") as (fig, ax): ax.plot(...)``; afterwards ``fig.svg``. Size in inches.
    ``prefix`` and title together are no other figure's of the page."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib.figure import Figure

    salt = re.sub(r"\W+", "-", prefix + title)
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": salt}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots(**subplots)
        figure.axes[0].set_title(title)
        fig = Drawing(figure)
        yield fig, axes
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    fig.svg = _inline(buffer.getvalue(), salt)


def _inline(svg: str, salt: str) -> str:
    """Markup for the middle of a page: no XML head, and ids that do not meet those of the next
    figure."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{salt}-\1"', svg)
    svg = re.sub(r'(xlink:href|href)="#([^"]+)"', rf'\1="#{salt}-\2"', svg)
    svg = re.sub(r"url\(#([^)]+)\)", rf"url(#{salt}-\1)", svg)
    # width and height come from the page; the view box keeps the shape
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    return re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
