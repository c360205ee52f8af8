"""HTML fragments: every text is escaped here, once.

Styles are inline and inherit the text colour, so they fit light and dark themes, do not change the page's own styles,
and are saved with a notebook.
"""

from __future__ import annotations

import html

__all__ = ["BLUE", "GREEN", "GREY", "ORANGE", "RED", "SKY", "block", "cell", "cut", "dot", "esc", "faint"]

# Okabe and Ito (2008), as in the plots; a shape or a word always has the same meaning as the colour.
BLUE, SKY, GREEN, ORANGE, RED, GREY = "#0072B2", "#56B4E9", "#009E73", "#E69F00", "#D55E00", "#8a8a8a"
_SHAPES = {GREEN: "●", BLUE: "●", ORANGE: "◐", RED: "✖", GREY: "○"}


def esc(value: object) -> str:
    """A value as text, escaped for HTML."""
    return html.escape(str(value))


def cut(text: str, chars: int) -> str:
    """A text on one line, of at most ``chars`` characters."""
    line = " ".join(text[: 4 * chars].split())
    return line if len(line) <= chars else line[: chars - 1] + "…"


def dot(colour: str, meaning: str) -> str:
    """A mark of health; its colour, its shape and its title have the same meaning."""
    return f'<span style="color:{colour}" title="{esc(meaning)}">{_SHAPES[colour]}</span>'


def faint(text: object) -> str:
    """De-emphasised text."""
    return f'<span style="opacity:.65">{esc(text)}</span>'


def cell(text: object, style: str = "") -> str:
    """Text that is cut off where its cell ends; the tooltip has all of it."""
    shown = esc(text)
    fit = "overflow:hidden;text-overflow:ellipsis;white-space:nowrap"
    return f'<span title="{shown}" style="{fit};{style}">{shown}</span>'


def block(inner: str, style: str = "") -> str:
    """A paragraph of a widget."""
    return f'<div style="line-height:1.5;font-size:13px;{style}">{inner}</div>'
