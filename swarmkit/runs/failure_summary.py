"""Why rows failed, in a few lines."""

from __future__ import annotations

import re
from collections.abc import Iterable

from ..records import FailureKind
from ..text import few, plural, printable

__all__ = ["FailureSummary"]

_SHOWN = 5
_SHOWN_CHARS = 200
_DESCRIBED = re.compile(rf"({'|'.join(FailureKind)}) at (\S+?)(?=:? )")  # what Failure.describe begins with


class FailureSummary:
    """Why rows (or ``whose``) failed: for each cause the count, the first rows, and the endpoints that reported it."""

    def __init__(self, whose: str = "rows") -> None:
        self.count = 0
        self._whose = whose
        self._found: dict[str, tuple[str, list[int], list[str], dict[str, None]]] = {}

    def add(self, errors: Iterable[tuple[object, str]]) -> None:
        """Count rows, given as label and error."""
        for label, error in errors:
            endpoint, words = _parted(error)
            new: tuple[str, list[int], list[str], dict[str, None]] = (words, [0], [], {})
            _, count, rows, endpoints = self._found.setdefault(re.sub(r"\d+", "#", words), new)
            self.count += 1
            count[0] += 1
            endpoints[endpoint] = None
            if len(rows) < _SHOWN:
                rows.append(repr(label))

    def text(self, of: str, hint: str = "") -> str:
        """How many of ``of`` failed, the causes, and what to do next."""
        return "\n".join([f"{self.count:,} of {of} failed:", *self.lines(), hint]).rstrip()

    def lines(self) -> list[str]:
        """The most common causes."""
        lines = []
        for words, (count,), rows, endpoints in sorted(self._found.values(), key=lambda c: -c[1][0])[:_SHOWN]:
            named = [*filter(None, endpoints)]
            where = f"; at {few(named, len(named))}" if named else ""
            one = self._whose.removesuffix("s")
            which = one if count == 1 else self._whose
            lines += [f"  {plural(count, one)}: {words}", f"      {which} {few(rows, count)}{where}"]
        if len(self._found) > _SHOWN:
            lines.append(f"  and {plural(len(self._found) - _SHOWN, 'other cause')}")
        return lines


def _parted(error: str) -> tuple[str, str]:
    """Endpoint, if any, and the rest of a text that ``Failure.describe`` made.

    Examples
    --------
    >>> _parted("request refused at node7:8000 (HTTP 400): too long")
    ('node7:8000', 'request refused (HTTP 400): too long')
    """
    found = _DESCRIBED.match(error)
    endpoint, words = (found[2], f"{found[1]}{error[found.end() :]}") if found else ("", error)
    return endpoint, printable(" ".join(words.split()), _SHOWN_CHARS)
