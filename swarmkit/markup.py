"""Words and small tables, for what shows itself."""

from __future__ import annotations

import html
from collections.abc import Iterable

__all__ = ["plural", "table_html"]


def plural(count: int, noun: str) -> str:
    """A count with its noun.

    Examples
    --------
    >>> plural(1, "row"), plural(4000, "row")
    ('1 row', '4,000 rows')
    """
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def table_html(rows: Iterable[tuple[str, str]]) -> str:
    """A small two-column table; every text is escaped, since server messages and names are hostile text.

    Examples
    --------
    >>> "<b>" in table_html([("model", "<b>")])
    False
    """
    cells = "".join(
        f'<tr><th style="text-align:left">{html.escape(a)}</th><td style="text-align:left">{html.escape(b)}</td></tr>'
        for a, b in rows
    )
    return f"<table>{cells}</table>"
