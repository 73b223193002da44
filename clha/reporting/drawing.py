"""How figures look and how they are written: one palette, SVG that follows the page's light or dark, PNG."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO, StringIO
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

# Colours of the light page. In SVG each becomes the CSS variable --<name>, which the style sheet sets for light and
# dark. Blue, orange and grey are told apart with any colour vision.
PALETTE = {
    "ink": "#1d2533",
    "muted": "#626d7d",
    "line": "#dfe3e9",
    "base": "#8a94a3",
    "trained": "#2a5fc1",
    "loss": "#c8591a",
    "dropped": "#c3cad4",
    "mark": "#b3261e",
    "surface": "#fdfdfe",
}

# Points of a scatter: more make the page heavy and the picture no clearer.
MAX_POINTS = 800

# Inches. Small on purpose: an SVG grows with its column, and on a phone its letters stay readable.
WIDTH, HEIGHT = 4.5, 2.7

_RC: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 8,
    "axes.labelsize": 8,
    "axes.titlesize": 8,
    "axes.titleweight": "normal",
    "axes.titlelocation": "left",
    "axes.labelcolor": PALETTE["muted"],
    "axes.edgecolor": PALETTE["line"],
    "axes.titlecolor": PALETTE["ink"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": PALETTE["line"],
    "grid.linewidth": 0.6,
    "xtick.color": PALETTE["line"],
    "ytick.color": PALETTE["line"],
    "xtick.labelcolor": PALETTE["muted"],
    "ytick.labelcolor": PALETTE["muted"],
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "ytick.major.size": 0,
    "text.color": PALETTE["ink"],
    "text.parse_math": False,  # a `$` in a subset's name is a dollar
    "legend.frameon": False,
    "legend.fontsize": 7.5,
    "legend.labelcolor": PALETTE["ink"],
    "legend.handlelength": 1.2,
    "figure.facecolor": PALETTE["surface"],
    "axes.facecolor": "none",
    "savefig.facecolor": PALETTE["surface"],
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
    "svg.fonttype": "none",  # letters stay letters: small files, the page's font
}


@dataclass(frozen=True)
class Drawn:
    """A figure of the report: `svg` for the page, `png` for everything else, `alt` for who cannot see it."""

    name: str
    title: str
    caption: str
    alt: str
    svg: str
    png: bytes


@contextmanager
def canvas(
    rows: int = 1, columns: int = 1, height: float = HEIGHT, width: float = WIDTH
) -> Iterator[tuple[Figure, list[Axes]]]:
    """A figure and its axes under the report's style; no global state of pyplot."""
    with matplotlib.rc_context(_RC):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(rows, columns, squeeze=False)
        yield figure, list(axes.flat)


def count_axis(axis: Axes, what: str) -> None:
    axis.set_ylabel(what)
    axis.yaxis.set_major_locator(MaxNLocator(5, integer=True))


def legend_above(axis: Axes) -> None:
    """Above the axes, where it hides nothing."""
    handles: Any = axis.get_legend_handles_labels()
    axis.legend(*handles, loc="lower left", bbox_to_anchor=(0, 1), ncols=4, borderaxespad=0.1, columnspacing=1.2)


def some_rows(count: int) -> NDArray[np.int64]:
    """At most `MAX_POINTS` row numbers, the same ones each time."""
    if count <= MAX_POINTS:
        return np.arange(count)
    return np.sort(np.random.default_rng(0).choice(count, MAX_POINTS, replace=False))


def finish(figure: Figure, name: str, title: str, caption: str, alt: str) -> Drawn:
    """Write the figure in both forms; the PNG carries its title, the page shows it in HTML."""
    rc: Any = {**_RC, "svg.hashsalt": name}
    with matplotlib.rc_context(rc):
        text = StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        figure.suptitle(title, x=0.012, ha="left", fontsize=9.5, fontweight="bold")
        pixels = BytesIO()
        figure.savefig(pixels, format="png", dpi=200, metadata={"Software": None})
    return Drawn(name, title, caption, alt, _for_page(text.getvalue(), name), pixels.getvalue())


def _for_page(svg: str, name: str) -> str:
    """An SVG to stand inside HTML: without prologue and metadata, ids of its own, colours and fonts of the page."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<style[^>]*>.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.DOTALL)
    head, body = svg.split(">", 1)
    view = re.search(r'viewBox="[^"]+"', head)
    assert view is not None
    ids = re.findall(r'\bid="([^"]+)"', body)
    for old in sorted(set(ids), key=len, reverse=True):
        body = re.sub(rf'(id="|href="#|url\(#){re.escape(old)}(?="|\))', rf"\g<1>{name}-{old}", body)
    for role, color in PALETTE.items():
        body = body.replace(color, f"var(--{role})")
    body = re.sub(r"'DejaVu Sans'[^;\"]*", "var(--sans)", body)
    return f'<svg {view.group(0)} aria-hidden="true" focusable="false">{body}'
