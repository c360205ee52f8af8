"""What the plots share: figures without pyplot, and texts that are measured, so that none covers another.

Every colour is set, since the user's defaults may be for a dark theme; figures are dark on white in every theme, in the
colours of Okabe and Ito (2008). Axes that a caller made keep their own text colour.
"""

from __future__ import annotations

import io
import re
import textwrap
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure as _Figure
from matplotlib.figure import SubFigure

__all__ = [
    "BLUE", "GREEN", "GREY", "INK", "LINES", "ORANGE", "PALE", "RED", "SKY", "Figure", "blank", "brief", "figure_of",
    "head", "ink", "label_numbers", "natural", "nothing", "plain", "settle", "short", "shortened", "size_pt",
    "width_pt", "wrapped",
]  # fmt: skip

INK, GREY, PALE = "#222222", "#8a8a8a", "#dddddd"
BLUE, ORANGE, GREEN, RED, SKY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9"
LINES = ((BLUE, "-"), (RED, "--"), (GREEN, "-."), (INK, ":"), ("#CC79A7", "-"), (ORANGE, "--"), (SKY, "-."))


class Figure(_Figure):
    """A figure that a notebook displays as an image, without pyplot.

    Examples
    --------
    >>> Figure()._repr_png_()[1:4]
    b'PNG'
    """

    def _repr_png_(self) -> bytes:
        file = io.BytesIO()
        self.savefig(file, format="png", dpi=110, transparent=False)
        return file.getvalue()


def blank(width: float, height: float, rows: int = 1, columns: int = 1, **grid: Any) -> list[Axes]:
    """Axes on a new figure of so many inches, row by row."""
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white", edgecolor="white")
    axes: list[Axes] = list(figure.subplots(rows, columns, squeeze=False, **grid).flat)
    for ax in axes:
        ax.set_facecolor("white")
        ax.tick_params(which="both", colors=INK, labelsize=10)
        for spine in ax.spines.values():
            spine.set_color(INK)
        ax.xaxis.label.set_color(INK)
        ax.yaxis.label.set_color(INK)
    return axes


def figure_of(ax: Axes) -> Figure:
    """The figure of Axes that ``blank`` has made."""
    figure = ax.figure
    assert isinstance(figure, Figure)
    return figure


def ink(ax: Axes) -> Any:
    """The text colour of these Axes, which may be the user's."""
    return ax.yaxis.label.get_color()


def head(ax: Axes, title: str, x: str | None = None, y: str = "", *, grid: Any = "y", legend: bool = True) -> None:
    """Labels, grid, the title, and a legend between the title and the plot, so that it covers nothing."""
    if x is not None:
        ax.set_xlabel(x)
    ax.set_ylabel(y)
    ax.grid(axis=grid, color=PALE, lw=0.7)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    settle(ax)
    pad = 6.0
    if legend and (entries := len(ax.get_legend_handles_labels()[1])):
        anchor: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (0.0, 1.0), "borderaxespad": 0.2}
        look: dict[str, Any] = {"frameon": False, "fontsize": 9, "columnspacing": 1.2, "handletextpad": 0.5}
        for columns in range(min(4, entries), 0, -1):
            made = ax.legend(**anchor, **look, borderpad=0.1, ncols=columns, labelcolor=ink(ax))
            extent = made.get_window_extent()
            if (wide := extent.width / ax.get_window_extent().width) <= 1:
                break
        else:
            for text in made.get_texts():
                text.set_text(
                    brief(text.get_text(), int(0.8 * max(len(t.get_text()) for t in made.get_texts()) / wide))
                )
        pad += extent.height * 72 / ax.figure.dpi
    if title:
        text = ax.set_title(plain(title), loc="left", fontsize=11, weight="bold", color=ink(ax), pad=pad)
        text.set_text(wrapped(plain(title), text, size_pt(ax)[0]))


def nothing(ax: Axes, why: str) -> Axes:
    """A picture with nothing to draw: it says why. A notebook that is run again may have sent no request."""
    head(ax, why, legend=False)
    ax.set_axis_off()
    return ax


def settle(ax: Axes) -> None:
    """Lay the figure out as far as it is drawn, so that sizes are those of the picture."""
    figure: Any = ax.figure
    while isinstance(figure, SubFigure):  # the layout is that of the whole
        figure = figure.figure
    if engine := figure.get_layout_engine():
        engine.execute(figure)


def size_pt(ax: Axes) -> tuple[float, float]:
    """Width and height of these Axes, in points."""
    extent, scale = ax.get_window_extent(), 72 / ax.figure.dpi
    return extent.width * scale, extent.height * scale


def width_pt(ax: Axes, texts: Sequence[str], size: float) -> float:
    """The width of the widest of some texts, in points."""
    text = ax.text(0, 0, max(texts, key=len, default=""), fontsize=size)
    width = text.get_window_extent().width * 72 / ax.figure.dpi
    text.remove()
    return float(width)


def wrapped(words: str, text: Any, width: float) -> str:
    """Words in lines no wider than so many points, in the font of the text that shows them now."""
    wide = text.get_window_extent().width * 72 / text.figure.dpi
    return words if wide <= width else "\n".join(textwrap.wrap(words, max(12, int(0.95 * len(words) * width / wide))))


def label_numbers(ax: Axes, places: Sequence[tuple[float, float]], texts: Sequence[str], beside: bool = False) -> None:
    """Write a number above each place, or to its right."""
    at: dict[str, Any] = {"xytext": (5, 0) if beside else (0, 3), "textcoords": "offset points", "color": ink(ax)}
    at |= {"ha": "left", "va": "center"} if beside else {"ha": "center"}
    for place, text in zip(places, texts, strict=True):
        ax.annotate(text, place, fontsize=9, **at)


def short(value: float) -> str:
    """A number with two or three digits that matter.

    Examples
    --------
    >>> short(1234.5), short(2.0), short(0.0321)
    ('1,234', '2', '0.032')
    """
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.2g}" if value < 10 else f"{value:.3g}"


def plain(text: str) -> str:
    """Escape dollar signs, which would begin a formula."""
    return text.replace("$", r"\$")


def natural(name: str) -> list[tuple[str, int]]:
    """A sort key that puts node2 before node10."""
    return [(text, int(number or -1)) for text, number in re.findall(r"(\D*)(\d*)", name)]


def brief(name: str, most: int = 30) -> str:
    """A name on one line, cut in its middle.

    Examples
    --------
    >>> brief("node0001.cluster.example:8000", 12)
    'node00…:8000'
    """
    line = " ".join(name.split())
    return line if len(line) <= most else f"{line[: most // 2]}…{line[len(line) - (most - 1) // 2 :]}"


def shortened(names: Sequence[str], most: int = 30) -> list[str]:
    """Names cut so that they still differ: of what they all begin and end with as much as there is room for.

    Examples
    --------
    >>> shortened(["http://node1.cluster.example:8000", "http://node2.cluster.example:8000"], 8)
    ['…node1…', '…node2…']
    """
    cut = [brief(name, most) for name in names]
    if len(set(cut)) == len(set(names)):
        return cut
    lead, tail = _alike(names), _alike([name[::-1] for name in names])
    cores = [name[lead : max(lead, len(name) - tail)] for name in names]
    begin = max(0, lead - max(0, most - max(map(len, cores)) - 3))
    before = "…" * (begin > 0) + names[0][begin:lead]
    return [f"{before}{brief(core, most)}{'…' * (tail > 0)}" for core in cores]


def _alike(names: Sequence[str]) -> int:
    """How many characters all of these begin with."""
    first, last = min(names), max(names)
    return next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
