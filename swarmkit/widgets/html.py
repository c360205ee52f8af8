"""HTML fragments: every text is escaped here, once.

Styles are inline and inherit the text colour, so they fit light and dark themes, do not change the page's own styles,
and are saved with a notebook.
"""

from __future__ import annotations

import html

from ..runs.notebook import BLUE, ORANGE, RED

__all__ = ["BLUE", "GREEN", "GREY", "ORANGE", "RED", "block", "cell", "cut", "dot", "esc", "faint", "name_cell"]

# A shape or a word always has the same meaning as the colour.
GREEN, GREY = "#009E73", "#8a8a8a"
_FIT = "overflow:hidden;text-overflow:ellipsis;white-space:nowrap"
_TAIL = 12
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
    return f'<span title="{shown}" style="{_FIT};{style}">{shown}</span>'


def name_cell(name: str) -> str:
    """A name of an endpoint that is cut in its middle where its cell is narrow: names of nodes often differ in their
    last characters. The tooltip has all of it."""
    if len(name) <= 2 * _TAIL:
        return cell(name)
    head, tail = esc(name[:-_TAIL]), esc(name[-_TAIL:])
    parts = f'<span style="{_FIT}">{head}</span><span style="flex:none;white-space:nowrap">{tail}</span>'
    return f'<span title="{esc(name)}" style="display:flex;min-width:0">{parts}</span>'


def block(inner: str, style: str = "") -> str:
    """A paragraph of a widget."""
    return f'<div style="line-height:1.5;font-size:13px;{style}">{inner}</div>'
