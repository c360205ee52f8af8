"""The story of a run: a bounded record of what happened, in order, and the frame that shows it."""

from __future__ import annotations

import logging
from array import array
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from ..engine.policy import REACTIONS
from ..records import Failure
from ..text import few, plural, printable
from .events import (
    EndpointChanged,
    RequestEnded,
    RequestSent,
    RouteChanged,
    RowFailed,
    RowInvalid,
    RowsDone,
    RowsRetracted,
    RowsReused,
    RunEnded,
    RunStarted,
)
from .log import LOGGER

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["KEPT", "Story"]

KEPT = 10_000
"""Entries that are kept of failures and what follows from them, and again as many of requests that simply succeed."""

Label = Callable[[int], str]
_AGAIN = {
    "same": "at once",
    "elsewhere": "at another endpoint, if one is ready",
    "any": "after a pause",
    "refused": "alone, at another endpoint",
}


class Entry(NamedTuple):
    """One thing that happened.

    Attributes
    ----------
    time_s : float
        Seconds from the start of the run.
    number : int
        Counts entries, from 1.
    what, where, why : str
        What happened, at which endpoint ("" for none), and the details.
    rows : sequence of int
        Positions of the rows that it is about.
    attempts : bytes
        By row: which request this is for it, from 1; empty where nothing was sent.
    source : int or None
        The row with the same prompt whose error these rows share.
    """

    time_s: float
    number: int
    what: str
    where: str
    why: str
    rows: Sequence[int] = ()
    attempts: bytes = b""
    source: int | None = None


class Story:
    """Records what happens in a run. ``RunStats`` passes events on to it, with the seconds since the run began.

    Kept are always: failed requests and what follows from them, requests with a row that was sent before, the answers
    to such rows, rows that end with an error, endpoints that are paused, lost, distrusted or back, and the run's start
    and end; and everything else if the logger ``swarmkit`` is enabled for DEBUG when the run starts. Of each of the two
    kinds the newest ``KEPT`` entries stay; older ones are dropped first.

    Attributes
    ----------
    everything : bool
        Whether requests that simply succeed are recorded, too.
    followed : dict of int to int
        Rows without an answer that were part of a failed request or are part of two: the number of requests that they
        are part of now.
    """

    def __init__(self) -> None:
        self.everything = False
        self.followed: dict[int, int] = {}
        self._kept: deque[Entry] = deque(maxlen=KEPT)
        self._routine: deque[Entry] = deque(maxlen=KEPT)
        self._number = 0
        self._dropped = 0

    def _add(self, what: str, time_s: float, where: str = "", why: str = "", rows: Sequence[int] = (),
             attempts: bytes = b"", source: int | None = None, *, routine: bool = False) -> None:  # fmt: skip
        record = self._routine if routine else self._kept
        self._dropped += len(record) == KEPT
        self._number += 1
        packed = array("I", rows) if len(rows) > 1 else rows  # a tenth of the memory of a tuple of ints
        record.append(Entry(time_s, self._number, what, where, why, packed, attempts, source))

    # ---- events ------------------------------

    def started(self, event: RunStarted, time_s: float) -> None:
        """A run starts, or a level of a tree_reduce."""
        self.everything = LOGGER.isEnabledFor(logging.DEBUG)
        endpoints = plural(len(event.endpoints), "endpoint")
        self._add("run started", time_s, why=f"{plural(event.pending, 'row')} to send to {endpoints}")

    def sent(self, event: RequestSent, time_s: float, where: str) -> None:
        """A request is sent. Called if one of its rows was sent before, or if everything is recorded."""
        if event.resent:
            copies = [r for r, nth in zip(event.rows, event.attempts, strict=True) if nth > 1 and self._send_again(r)]
            what = "duplicated" if copies else "sent"
            self._add(what, time_s, where, rows=event.rows, attempts=event.attempts)
        else:
            self._add("sent", time_s, where, rows=event.rows, attempts=event.attempts, routine=True)

    def _send_again(self, row: int) -> bool:
        """Count one more request for a row that was sent before; return whether the earlier one goes on."""
        others = self.followed.get(row, 1)
        self.followed[row] = others + 1
        return others > 0

    def answered(self, event: RowsDone, sent_s: float, time_s: float, where: str) -> None:
        """Rows have their answers. Called if everything is recorded, or if rows are followed."""
        rows = event.rows
        followed = [row for row in rows if self.followed.pop(row, None) is not None] if self.followed else []
        why = f"{time_s - sent_s:.3f} s after it was sent"
        if followed:
            self._add("answered", time_s, where, why, followed)
        if self.everything and len(rows) > len(followed):
            others = set(rows).difference(followed)
            self._add("answered", time_s, where, why, [row for row in rows if row in others], routine=True)

    def retracted(self, event: RowsRetracted, time_s: float, where: str) -> None:
        """Answers are taken back."""
        self._add("answers taken back", time_s, where, printable(event.why), event.rows)
        for row in event.rows:
            self.followed[row] = 0

    def ended(self, event: RequestEnded, sent: RequestSent, sent_s: float, time_s: float, where: str) -> None:
        """A request has failed, or was dropped."""
        if event.failure is not None:
            self._failed(event, event.failure, sent, sent_s, time_s, where)
        else:
            why = "the run ended" if event.unfinished else "its rows were answered from elsewhere"
            self._add("request dropped", time_s, where, why, sent.rows)

    def _failed(
        self, event: RequestEnded, failure: Failure, sent: RequestSent, sent_s: float, time_s: float, where: str
    ) -> None:
        if not self._recorded(sent):
            self._add("sent", sent_s, where, rows=sent.rows, attempts=sent.attempts)
        self._add("request failed", time_s, where, _words(failure), event.unfinished)
        for row in event.unfinished:
            self.followed[row] = max(0, self.followed.get(row, 1) - 1)
        waiting = [row for row in event.again if not self.followed[row]]
        copied = [row for row in event.again if self.followed[row]]
        reaction = REACTIONS[failure.kind].rows
        if reaction == "refused" and len(waiting) > 1:
            self._add("halved", time_s, where, "to be sent again as two requests", waiting)
        elif waiting:
            self._add("to be retried", time_s, where, _AGAIN[reaction], waiting)
        if copied:
            self._add("not retried", time_s, where, "another request with it is in flight", copied)

    def _recorded(self, sent: RequestSent) -> bool:
        return self.everything or sent.resent

    def invalid(self, event: RowInvalid, time_s: float, where: str) -> None:
        """An answer is not what the schema asks for."""
        self._add("not valid", time_s, where, printable(event.problem), (event.row,), routine=event.again)
        if event.again:
            self.followed[event.row] = max(0, self.followed.get(event.row, 1) - 1)

    def row_failed(self, event: RowFailed, time_s: float) -> None:
        """A row ends with an error."""
        self.followed.pop(event.row, None)
        self._add("row failed", time_s, event.failure.endpoint, _words(event.failure), (event.row,))

    def reused(self, event: RowsReused, time_s: float) -> None:
        """Rows are settled without a request."""
        if event.failed and event.source is not None:
            self._add("row failed", time_s, rows=event.rows, source=event.source)
        elif self.everything:
            why = "it was in the store" if event.stored else "another row has the same prompt"
            self._add("reused", time_s, why=why, rows=event.rows, routine=True)

    def changed(self, event: EndpointChanged, time_s: float, where: str) -> None:
        """An endpoint is paused, lost or back."""
        why = _words(event.failure) if event.failure else ""
        self._add(f"endpoint {event.state}", time_s, where, why)

    def rerouted(self, event: RouteChanged, time_s: float, where: str) -> None:
        """The rows of an endpoint take another route, or template."""
        self._add("another chat template", time_s, where, printable(event.route))

    def over(self, event: RunEnded, open_: Collection[tuple[RequestSent, str]], time_s: float) -> None:
        """The run is over, with these requests in flight."""
        for sent, where in open_:
            if self._recorded(sent):
                self._add("request dropped", time_s, where, "the run ended", sent.rows)
        why = printable(event.why)
        self._add("run cancelled" if event.cancelled else "run ended", time_s, why=why)

    # ---- the frame ------------------------------

    def frame(self, rows: Collection[int] | None, endpoint: str | None, label: Label | None) -> pd.DataFrame:
        """What happened to rows (positions), at an endpoint (a name), to both, or all of it.

        Parameters
        ----------
        rows : collection of int or None
            Only entries about one of these rows.
        endpoint : str or None
            Only entries about this endpoint.
        label : callable or None
            Shows a row's position as the user knows it; None where rows have no labels.
        """
        import pandas as pd

        found: list[tuple[float, str, str | None, str]] = []
        if self._dropped:
            found.append((0.0, "entries dropped", None, f"{self._dropped:,} older ones: the newest {KEPT:,} are kept"))
        for entry in sorted([*self._kept, *self._routine]):
            if endpoint is not None and entry.where != endpoint:
                continue
            if rows is None:
                why = _about_all(entry, label)
            elif (row := next((row for row in entry.rows if row in rows), None)) is not None:
                why = _about_row(entry, row, label)
            else:
                continue
            found.append((entry.time_s, entry.what, entry.where or None, why))
        text = "str" if int(pd.__version__.split(".")[0]) >= 3 else "object"
        frame = pd.DataFrame(found, columns=["time", "what", "where", "why"])
        return frame.astype({"time": "float64", "what": text, "where": text, "why": text})


def _about_row(entry: Entry, row: int, label: Label | None) -> str:
    others = len(entry.rows) - 1
    if entry.attempts:
        company = f"with {plural(others, 'other row')}" if others else "alone"
        return f"attempt {entry.attempts[list(entry.rows).index(row)]}, {company}"
    return _why(entry, label)


def _about_all(entry: Entry, label: Label | None) -> str:
    parts = []
    if count := len(entry.rows):
        named = f": {few([label(row) for row in entry.rows[:5]], count)}" if label else ""
        parts.append(f"{plural(count, 'row')}{named}")
    if entry.attempts:
        first, last = min(entry.attempts), max(entry.attempts)
        parts.append(f"attempt {last}" if first == last else f"attempts {first} to {last}")
    return "; ".join(filter(None, [*parts, _why(entry, label)]))


def _why(entry: Entry, label: Label | None) -> str:
    if entry.source is None:
        return entry.why
    return f"{f'row {label(entry.source)}' if label else 'another row'} has the same prompt, and failed"


def _words(failure: Failure) -> str:
    return printable(replace(failure, endpoint="").describe())  # the endpoint has a column of its own
