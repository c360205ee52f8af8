"""What is shown in the cells of a notebook: outputs that can be replaced, bars, and the box of a warning.

An output that is replaced is one for the notebook that is saved, too: it has what was shown last, as HTML and as text,
and needs neither a kernel nor widgets.
"""

from __future__ import annotations

import contextvars
import html
import sys
import uuid
import warnings
from collections.abc import Sequence
from typing import Any, TextIO

from ..errors import SwarmWarning

__all__ = ["BLUE", "ORANGE", "RED", "SKY", "Slot", "bar_html", "box_html", "in_notebook", "show_warnings_in_boxes"]

# Okabe and Ito (2008), as in the plots.
BLUE, SKY, ORANGE, RED = "#0072B2", "#56B4E9", "#E69F00", "#D55E00"
_UNSET = ("warnings", "_py_warnings", "ipykernel")
"""Packages whose ``warnings.showwarning`` nobody has set: Python's, that of 3.14 or newer, and the kernel's."""


def in_notebook() -> bool:
    """Whether this code runs in a Jupyter kernel."""
    ipython = sys.modules.get("IPython")
    return ipython is not None and hasattr(ipython.get_ipython(), "kernel")


class Slot:
    """A place in the output of a cell, or of several, whose content can be replaced from any thread."""

    def __init__(self) -> None:
        self._id = uuid.uuid4().hex
        self._cell: object = None
        self.is_shown = False

    def show(self, data: dict[str, Any]) -> None:
        """Show data, by MIME type, in the current cell."""
        self.is_shown, self._cell = True, _current_cell()
        _display(data, self._id)

    @property
    def is_here(self) -> bool:
        """Whether it is shown in the current cell."""
        return self.is_shown and self._cell == _current_cell()

    def replace(self, data: dict[str, Any]) -> None:
        """Show other data wherever it is shown; else do nothing.

        Front ends find the place by its name, not by the cell that the message belongs to. It is sent as one of the
        cell that runs now (which an empty context stands for), since nbclient reads the messages of that cell only.
        """
        if self.is_shown:
            contextvars.Context().run(_display, data, self._id, update=True)


def _current_cell() -> object:
    """What the cell is known by that the calling code belongs to; None outside of notebooks."""
    if not in_notebook():
        return None
    publisher = sys.modules["IPython"].get_ipython().display_pub
    return getattr(publisher, "parent_header", {}).get("msg_id")


def _display(data: dict[str, Any], name: str | None = None, **how: Any) -> None:
    from IPython.display import display  # slow to import, and not there without a notebook

    display(data, raw=True, display_id=name, **how)  # type: ignore[no-untyped-call] # IPython's


def bar_html(rows: int, shares: Sequence[tuple[str, int, str]]) -> str:
    """A bar of as many parts as there are shares of rows: colour, count, and what it is."""
    filled = "".join(
        f'<div style="width:{100 * count / rows:.2f}%;background:{colour}" title="{count:,} {what}"></div>'
        for colour, count, what in shares
        if count > 0
    )
    style = "display:flex;height:10px;border-radius:5px;overflow:hidden;background:rgba(128,128,128,.25);margin:3px 0"
    return f'<div style="{style}">{filled}</div>'


def box_html(message: str) -> str:
    """A warning: its first line stands out where others follow."""
    first, _, rest = html.escape(message).partition("\n")
    style = (
        f"border-left:4px solid {ORANGE};padding:2px 10px;margin:4px 0;max-width:900px;font-size:13px;line-height:1.5;"
        "white-space:pre-wrap;overflow-wrap:anywhere"
    )
    text = f"<b>{first}</b>\n{rest}" if rest else first
    return f'<div style="{style}" title="swarmkit.SwarmWarning">{text}</div>'


def show_warnings_in_boxes() -> None:
    """In a notebook, show swarmkit's warnings as boxes of their own; all others, and in other places, as before.

    What ``warnings`` filters or records does not come here, so its filters and ``catch_warnings`` stay in force; and
    whoever has set ``warnings.showwarning``, as ``logging.captureWarnings`` does, or sets it later, has all of them.
    """
    others = warnings.showwarning
    if not in_notebook() or str(getattr(others, "__module__", "")).partition(".")[0] not in _UNSET:
        return

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if file is None and issubclass(category, SwarmWarning):
            text = str(message)
            _display({"text/plain": f"{category.__name__}: {text}", "text/html": box_html(text)})
        else:
            others(message, category, filename, lineno, file, line)

    warnings.showwarning = show
