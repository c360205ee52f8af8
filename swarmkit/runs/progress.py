"""The bar of a run, a line of tqdm in terminals and HTML in cells: rows done and failed, rate, endpoints in use."""

from __future__ import annotations

import asyncio
import contextlib
import html
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol

from ..text import plural
from .counts import Counts, took
from .events import RequestEnded, RowFailed, RowsDone, RowsRetracted, RunEnded, RunEvent, RunStarted, RunWaits
from .listeners import Listeners, listener_failed
from .notebook import BLUE, RED, SKY, Slot, bar_html, in_notebook
from .registered import monitor

__all__ = ["Bar", "in_notebook", "show_monitor", "show_unsent", "wanted"]

if TYPE_CHECKING:
    from .run import Run
    from .stats import RunStats

_CELL_S = 0.3
"""Seconds between two states of a bar in a cell, and from a run's start to the first: many runs are over by then."""
_LINE_S = 0.1  # and in a terminal


class Bar:
    """A listener that shows a run as one bar. In a notebook it ends as a line that says what became of the rows.

    Parameters
    ----------
    verb : str
        What the bar is labelled with.
    stats : RunStats
        The run's, of which the last line is made. What it has counted before the bar is not the bar's.
    """

    def __init__(self, verb: str, stats: RunStats) -> None:
        self._face: _Face = _Cell(verb, stats) if in_notebook() else _Line(verb)
        self._total = 0
        self._failed = 0
        self._finished = 0  # answered or failed while it is shown: these make the time that is left
        self._alive = 0
        self._waits = ""
        self._began_with: int | None = None
        self._known = 0
        self._next = 0.0

    def __call__(self, event: RunEvent) -> None:
        """Show one event of the run."""
        try:
            self._show_event(event)
        except Exception:
            self._face.abandon()
            raise

    def _show_event(self, event: RunEvent) -> None:
        match event:
            case RowsDone(_, _, rows, alive):
                self._alive, self._waits = alive, ""
                self._finished += len(rows)
                self._advance(len(rows))
            case RowsRetracted():
                self._finished -= len(event.rows)
                self._advance(-len(event.rows))
            case RowFailed():
                self._failed += 1
                self._finished += 1
                self._advance(1)
            case RequestEnded():
                self._alive = event.alive
            case RunWaits():
                self._waits = event.describe()
                self._show()
            case RunStarted():
                self._open(event)
            case RunEnded() if self._began_with is not None:
                early = event.cancelled or bool(event.why)
                self._face.close(self._known, self._finished, self._note(), early)
                self._began_with = None

    def _open(self, event: RunStarted) -> None:
        known, self._total, self._alive = event.rows - event.pending, event.rows, len(event.endpoints)
        if self._began_with is None:
            self._known = self._began_with = known
            self._face.open(self._total, known, self._show)
        else:  # the next of several frames: the total has grown
            more, self._began_with = known - self._began_with, known
            self._advance(more)

    def _advance(self, rows: int) -> None:
        self._known += rows
        if time.monotonic() >= self._next:
            self._show()

    def _show(self) -> None:
        if self._began_with is not None:
            self._face.show(self._total, self._known, self._finished, self._failed, self._note())
            self._next = time.monotonic() + self._face.every_s

    def _note(self) -> str:
        failed = f"{self._failed:,} failed, " if self._failed else ""
        return failed + (self._waits or plural(self._alive, "endpoint"))


class _Face(Protocol):
    """Where a bar is drawn."""

    every_s: float

    def open(self, total: int, known: int, draw: Callable[[], None]) -> None: ...
    def show(self, total: int, known: int, finished: int, failed: int, note: str) -> None: ...
    def close(self, known: int, finished: int, note: str, early: bool) -> None: ...
    def abandon(self) -> None: ...


class _Line:
    """A line of tqdm on stderr."""

    every_s = _LINE_S

    def __init__(self, verb: str) -> None:
        self._verb = verb
        self._bar: Any = None

    def open(self, total: int, known: int, draw: Callable[[], None]) -> None:
        from tqdm import tqdm  # slow to import, and not needed until a bar is shown

        self._bar = tqdm(total=total, initial=known, desc=self._verb, unit="row", leave=True, mininterval=0)
        draw()

    def show(self, total: int, known: int, finished: int, failed: int, note: str) -> None:
        if self._bar is not None:
            self._bar.total = total
            self._bar.set_postfix_str(note, refresh=False)
            more = known - finished - self._bar.initial
            self._bar.initial += more  # which tqdm leaves out of the rate
            self._bar.n += more
            self._bar.last_print_n += more
            self._bar.update(known - self._bar.n)
            self._bar.refresh()

    def close(self, known: int, finished: int, note: str, early: bool) -> None:
        if self._bar is not None:
            self.show(self._bar.total, known, finished, 0, note)
            self._bar.close()
            self._bar = None

    def abandon(self) -> None:
        """After a failed write tqdm still holds its lock, which other threads would wait for, and it would write again
        when the bar is collected."""
        from tqdm import tqdm

        with contextlib.suppress(RuntimeError, AssertionError):  # this thread does not hold it: it was not tqdm
            tqdm.get_lock().release()  # type: ignore[no-untyped-call] # tqdm's
        if self._bar is not None:
            self._bar.disable = True
            self._bar = None


class _Cell:
    """A bar in the output of a cell. It needs no widgets, and what it shows last is what the saved notebook has."""

    every_s = _CELL_S

    def __init__(self, verb: str, stats: RunStats) -> None:
        self._verb = verb
        self._stats = stats
        self._before = stats.counts()
        self._began_s = 0.0
        self._slot = stats.bar = Slot()

    def open(self, total: int, known: int, draw: Callable[[], None]) -> None:
        self._began_s = time.monotonic()
        with contextlib.suppress(RuntimeError):  # no loop here: the first rows draw it
            asyncio.get_running_loop().call_later(_CELL_S, draw)

    def show(self, total: int, known: int, finished: int, failed: int, note: str) -> None:
        elapsed_s = time.monotonic() - self._began_s
        if elapsed_s < _CELL_S or self._gives_way():
            return
        noun = self._stats.noun
        said = [f"{known:,} of {plural(total, noun)}"]
        if finished > 0:
            said.append(f"{(finished - failed) / elapsed_s:,.1f} {noun}s/s")
            if (left_s := (total - known) / finished * elapsed_s) >= 1.0:
                said.append(f"about {took(left_s)} left")
        line = "its monitor shows it" if self._stats.is_monitored else " · ".join([*said, note])
        self._put(f"{self._verb}: {line}", total, [(BLUE, known - failed, "done"), (RED, failed, "failed")])

    def close(self, known: int, finished: int, note: str, early: bool) -> None:
        counts = self._stats.counts().since(self._before)
        if not counts.time_s:
            counts = counts._replace(time_s=time.monotonic() - self._began_s)
        if not self._gives_way():
            what = f"{self._verb}, ended early" if early else self._verb
            self._put(counts.line(what, self._stats.noun), counts.rows, shares(counts))

    def abandon(self) -> None:
        """Nothing is held."""

    def _gives_way(self) -> bool:
        """Whether a monitor has the place of the bar, or came before it was shown."""
        has_place = self._slot.is_shown and self._stats.bar is self._slot
        return self._stats.is_monitored and not has_place

    def _put(self, text: str, rows: int, parts: list[tuple[str, int, str]]) -> None:
        bar = f'<div style="flex:0 99 200px;min-width:60px">{bar_html(rows, parts)}</div>' if rows else ""
        style = "display:flex;align-items:center;gap:2px 12px;line-height:1.5;font-size:13px;max-width:900px"
        line = f'<div style="{style}">{bar}<div style="flex:1 1 auto">{html.escape(text)}</div></div>'
        data = {"text/plain": text, "text/html": line}
        if self._slot.is_shown:
            self._slot.replace(data)
        else:
            self._slot.show(data)


def shares(counts: Counts) -> list[tuple[str, int, str]]:
    """The parts of a bar: rows that were answered, that need not be asked, and that failed."""
    not_asked = counts.known - counts.answered
    return [(BLUE, counts.answered, "answered"), (SKY, not_asked, "not asked"), (RED, counts.failed, "failed")]


def show_unsent(bars: Sequence[Bar], rows: int, stats: RunStats) -> None:
    """Show as many rows as done, if a run is over that had nothing to send: it has neither started nor ended."""
    if rows and not stats.endpoints:
        told, at_s = Listeners(bars, stats.listener_errors), time.monotonic()
        told(RunStarted(rows, 0, (), (), at_s))
        told(RunEnded(None, False, at_s))


def wanted(progress: bool | Literal["auto"]) -> bool:
    """Whether a bar is shown: "auto" shows it in terminals and notebooks, unless ``$SWARMKIT_PROGRESS`` is 0."""
    if progress != "auto":
        return bool(progress)
    return os.environ.get("SWARMKIT_PROGRESS") != "0" and (in_notebook() or bool(sys.stderr and sys.stderr.isatty()))


def show_monitor(run: Run) -> None:
    """Display a run as ``monitor=True`` asks for, if a monitor is registered. One that raises is reported like a
    listener, and the run goes on."""
    if (show := monitor()) is not None:
        try:
            show(run)
        except Exception as exc:  # noqa: BLE001 - whatever it is, it is not the run's; it is reported
            run.stats.listener_errors.append(listener_failed(show, exc))
