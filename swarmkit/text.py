"""Text helpers for messages, reprs and HTML: counts with their nouns, and small tables."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

__all__ = ["duration", "encodable", "few", "none_of", "plural", "printable", "table_html", "visible"]


def plural(count: int, noun: str, nouns: str | None = None) -> str:
    """A count with its noun; ``nouns`` is the plural where it is not the noun with an "s".

    Examples
    --------
    >>> plural(1, "row"), plural(4000, "row"), plural(2, "process", "processes")
    ('1 row', '4,000 rows', '2 processes')
    """
    return f"{count:,} {noun if count == 1 else nouns or noun + 's'}"


def none_of(count: int, noun: str) -> str:
    """That none of several did something, as the subject of a sentence.

    Examples
    --------
    >>> none_of(4000, "endpoint"), none_of(1, "endpoint")
    ('none of the 4,000 endpoints', 'no endpoint')
    """
    return f"none of the {count:,} {noun}s" if count != 1 else f"no {noun}"


def duration(seconds: float) -> str:
    """A time span in the two units that matter.

    Examples
    --------
    >>> duration(580), duration(7.4), duration(7300)
    ('9 min 40 s', '7.4 s', '2 h 1 min')
    """
    whole = max(0, round(seconds))
    if 0 < seconds < 10:
        return f"{seconds:.2g} s"
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def few(texts: Sequence[str], of: int, shown: int = 5) -> str:
    """The first of many texts, and how many more there are.

    Examples
    --------
    >>> few(["a", "b", "c"], 10, shown=2)
    'a, b and 8 more'
    """
    return ", ".join(texts[:shown]) + (f" and {of - shown:,} more" if of > shown else "")


def encodable(text: str) -> str:
    r"""Text that can be written as UTF-8: a half of a surrogate pair becomes an escape.

    Examples
    --------
    >>> encodable("half \ud83d")
    'half \\ud83d'
    """
    return text.encode("utf-8", "backslashreplace").decode()


def printable(text: str, limit: int = 300) -> str:
    r"""Text of a server or a model, made safe for a terminal, a log or a warning.

    Parameters
    ----------
    text : str
        Anything.
    limit : int, default 300
        Characters of ``text`` that are kept.

    Returns
    -------
    str
        One line. Control characters, line breaks, and what changes the direction of text are written as escapes.

    Examples
    --------
    >>> printable("no such model\x1b[2J")
    'no such model\\x1b[2J'
    >>> printable("a long story", limit=6)
    'a long ...'
    """
    cut = _escaped(text[:limit])
    return cut if len(text) <= limit else f"{cut.rstrip()} ..."


def visible(text: str) -> str:
    r"""A message of several lines, made safe for a terminal: only its line breaks and tabs act as such.

    Examples
    --------
    >>> print(visible("2 failed:\n  no such model\x1b[2J"))
    2 failed:
      no such model\x1b[2J
    """
    return _escaped(text, kept="\n\t")


def _escaped(text: str, kept: str = "") -> str:
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in kept else c.encode("unicode_escape").decode() for c in text)


def table_html(rows: Iterable[tuple[str, str]]) -> str:
    r"""A two-column table; every text is escaped, since server messages and names are untrusted.

    Examples
    --------
    >>> table = table_html([("model", "<b>\x1b[2J")])
    >>> "<b>" in table, r"\x1b[2J" in table
    (False, True)
    """
    rows = [(visible(a), visible(b)) for a, b in rows]
    cells = "".join(
        f'<tr><th style="text-align:left">{html.escape(a)}</th><td style="text-align:left">{html.escape(b)}</td></tr>'
        for a, b in rows
    )
    return f"<table>{cells}</table>"
