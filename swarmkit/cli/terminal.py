"""Messages, texts and tables in a terminal."""

from __future__ import annotations

import re
import sys
from collections.abc import Container, Sequence

from ..text import visible

__all__ = ["as_options", "clean", "say", "seconds", "text_table"]

_NARROWEST = 6
_KEYWORD = re.compile(r"(?<!\w)'[^']*'|(?<![^\s(])(?<!--param )(\w+)=('[^']*'|\.\.\.|[^\s,;:.)]*)")
_PYTHON_ONLY = re.compile(", or say overwrite=True|: dropna=False makes a group of missing keys")


def say(text: str) -> None:
    """Write a message to the standard error."""
    print(visible(text), file=sys.stderr, flush=True)  # words of servers may be part of it


def as_options(text: str, options: Container[str]) -> str:
    """A message of a verb, whose keywords are these options of a command. What it advises to Python only is left out:
    ``--overwrite`` is about the file.

    Examples
    --------
    >>> as_options("max_tokens=0: must be 1 or more, as for n=1, and not 'max_tokens=1'", {"max_tokens"})
    "--max-tokens 0: must be 1 or more, as for n=1, and not 'max_tokens=1'"
    >>> as_options("system= needs chat='auto', or say overwrite=True", {"chat", "overwrite", "system"})
    '--system needs --chat auto'
    """

    def option(found: re.Match[str]) -> str:
        name, value = found[1], (found[2] or "").strip("'")
        if name not in options:
            return found[0]
        value = {"True": "", "None": "none"}.get(value, value)
        return f"--{name.replace('_', '-')} {value}".rstrip()

    return _KEYWORD.sub(option, _PYTHON_ONLY.sub("", text))


def seconds(time_s: float) -> str:
    """A time span of a run.

    Examples
    --------
    >>> seconds(12.34), seconds(0.02)
    ('12.3 s', 'less than 0.1 s')
    """
    return f"{time_s:.1f} s" if time_s >= 0.1 else "less than 0.1 s"


def clean(text: object) -> str:
    """A text as one printable line: models and servers must not move the cursor of a terminal.

    Examples
    --------
    >>> clean("a\\n b\\x1b[31m")
    'a b [31m'
    """
    shown = "".join(c if c.isprintable() else " " for c in str(text))
    return " ".join(shown.split())


def text_table(rows: Sequence[Sequence[object]], header: Sequence[str], width: int) -> str:
    """A table of text for a terminal; the widest columns are narrowed until the lines fit.

    Parameters
    ----------
    rows : sequence of sequence
        The last value of a row with fewer values than the header extends to the end of the line.
    header : sequence of str
        Names of the columns.
    width : int
        Characters of a line.

    Examples
    --------
    >>> print(text_table([("thrA", "an enzyme of four steps")], ("gene", "product"), 20))
    gene  product
    thrA  an enzyme of…
    """
    cells = [list(header), *([clean(value) for value in row] for row in rows)]
    count = len(header)
    widths = [max((len(c[i]) for c in cells if len(c) > i and (len(c) == count or i < len(c) - 1)), default=0)
              for i in range(count)]  # fmt: skip
    while sum(widths) + 2 * (count - 1) > width and max(widths) > _NARROWEST:
        widths[widths.index(max(widths))] -= 1
    lines = []
    for cell in cells:
        last = len(cell) - 1
        room = width - sum(widths[:last]) - 2 * last
        parts = [_cut(text, room if i == last else widths[i]).ljust(widths[i]) for i, text in enumerate(cell)]
        lines.append("  ".join(parts).rstrip())
    return "\n".join(lines)


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: max(0, width - 1)].rstrip() + "…"
