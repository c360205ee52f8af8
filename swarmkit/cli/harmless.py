r"""Answers in CSV files and on terminals: servers must neither run formulas in a spreadsheet nor control a terminal.

A value that a spreadsheet would take for a formula gets a ``'`` in front, which the next command with the same
``--out`` takes away when it reads it; numbers stay. Control characters become escapes such as ``\x1b``. Only the
columns of a command's own answers are changed, in both directions: whatever else is in a table is the user's, with the
answers of earlier commands under other names, which nothing but their names tells from columns of the user's own.
"""

from __future__ import annotations

import io
import re

import pandas as pd

__all__ = ["OF_TREES", "TerminalFile", "answers_of", "cell", "restored", "secured"]

_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
_ON_TERMINALS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")  # also what turns text around
_FORMULA = r"'*(?:[\t\r]|\s*[=+\-@\uff1d\uff0b\uff0d\uff20])"
_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?%?\Z"
_ACTS = re.compile(rf"(?!{_NUMBER}){_FORMULA}")
_ANY = re.compile(rf"\A{_ACTS.pattern}|{_CONTROL.pattern}")
_SECURED = re.compile(rf"'(?={_FORMULA})")
OF_TREES = re.compile("response|error")
"""The columns of answers in the table of a tree's nodes."""


def answers_of(out: str) -> re.Pattern[str]:
    """The columns of answers that a call with this ``out`` makes: it, and those whose names begin with it and ``_``."""
    return re.compile(rf"{re.escape(out)}(?:_.*)?", re.DOTALL)


def cell(text: str) -> str:
    r"""A text of a server as a cell of a table that a spreadsheet may open.

    Examples
    --------
    >>> cell("=1+1"), cell("- a list"), cell("-1.5"), cell("red \x1b[31m"), cell("it's")
    ("'=1+1", "'- a list", '-1.5', 'red \\x1b[31m', "it's")
    """
    text = _escaped(_CONTROL, text)
    return f"'{text}" if _ACTS.match(text) else text


def _escaped(what: re.Pattern[str], text: str) -> str:
    return what.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def secured(frame: pd.DataFrame, answers: re.Pattern[str] | None) -> tuple[pd.DataFrame, int]:
    """The frame with the columns of ``answers`` as ``cell`` writes them, and how many values that has changed."""
    changed, count = {}, 0
    for name in _texts(frame, answers):
        acts = frame[name].map(lambda value: isinstance(value, str) and bool(_ANY.search(value))).astype(bool)
        if acts.any():
            changed[name] = frame[name].astype(object).where(~acts, frame[name].map(_cell))
            count += int(acts.sum())
    return frame.assign(**changed), count


def _cell(value: object) -> object:
    return cell(value) if isinstance(value, str) else value


def _uncell(text: str) -> str:
    return text[1:] if _SECURED.match(text) else text


def restored(frame: pd.DataFrame, answers: re.Pattern[str] | None) -> pd.DataFrame:
    """The frame as it was before ``secured``, but for control characters."""
    names = [name for name in _texts(frame, answers) if frame[name].str.startswith("'", na=False).any()]
    return frame.assign(**{name: frame[name].map(_uncell, na_action="ignore") for name in names})


def _texts(frame: pd.DataFrame, answers: re.Pattern[str] | None) -> list[str]:
    """The columns of answers that have texts."""
    found = [n for n in frame.columns if answers and isinstance(n, str) and answers.fullmatch(n)]
    return [n for n in found if frame[n].dtype == object or pd.api.types.is_string_dtype(frame[n].dtype)]


class TerminalFile(io.TextIOWrapper):
    """The standard output where that is a terminal: control characters are written as escapes."""

    def write(self, text: str) -> int:
        """Write a text."""
        return super().write(_escaped(_ON_TERMINALS, text))
