"""The tqdm bar: rows done and failed, rows per second, endpoints in use."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

from ..text import plural
from .events import RequestEnded, RowFailed, RowsDone, RowsRetracted, RunEnded, RunEvent, RunStarted, RunWaits
from .listeners import listener_failed

__all__ = ["Bar", "in_notebook", "register_monitor", "show_monitor", "wanted"]

if TYPE_CHECKING:
    from .run import Run

_REFRESH_S = 0.1
_monitors: list[Callable[[Run], object]] = []


class Bar:
    """A listener that shows a run as one tqdm bar (a widget in notebooks).

    Parameters
    ----------
    verb : str
        What the bar is labelled with. Never text of a model or a server: tqdm's notebook bar shows its label as
        HTML.
    """

    def __init__(self, verb: str) -> None:
        self._verb = verb
        self._bar: Any = None
        self._failed = 0
        self._alive = 0
        self._waits = ""
        self._known = 0
        self._unshown = 0
        self._next = 0.0

    def __call__(self, event: RunEvent) -> None:
        """Show one event of the run."""
        try:
            self._show_event(event)
        except Exception:
            self._abandon()
            raise

    def _show_event(self, event: RunEvent) -> None:
        match event:
            case RowsDone(_, _, rows, alive):
                self._alive, self._waits = alive, ""
                self._advance(len(rows))
            case RowsRetracted():
                self._advance(-len(event.rows))
            case RowFailed():
                self._failed += 1
                self._advance(1)
            case RequestEnded():
                self._alive = event.alive
            case RunWaits():
                self._waits = event.describe()
                self._show()
            case RunStarted():
                self._open(event)
            case RunEnded():
                self._close()

    def _open(self, event: RunStarted) -> None:
        from tqdm.auto import tqdm  # slow to import, and not needed until a bar is shown

        known = event.rows - event.pending
        self._alive = len(event.endpoints)
        if self._bar is not None:  # the next of several frames: the total has grown
            self._bar.total = event.rows
            self._advance(known - self._known)
        else:
            self._bar = tqdm(total=event.rows, initial=known, desc=self._verb, unit="row", leave=True, mininterval=0)
            self._show()
        self._known = known

    def _advance(self, rows: int) -> None:
        self._unshown += rows
        if time.monotonic() >= self._next:
            self._show()

    def _show(self) -> None:
        if self._bar is None:
            return
        failed = f"{self._failed} failed, " if self._failed else ""
        self._bar.set_postfix_str(failed + (self._waits or plural(self._alive, "endpoint")), refresh=False)
        self._bar.update(self._unshown)
        self._bar.refresh()
        self._unshown = 0
        self._next = time.monotonic() + _REFRESH_S

    def _abandon(self) -> None:
        """After a failed write tqdm still holds its lock, which other threads would wait for, and it would write again
        when the bar is collected."""
        from tqdm.auto import tqdm

        with contextlib.suppress(RuntimeError, AssertionError):  # this thread does not hold it: it was not tqdm
            tqdm.get_lock().release()  # type: ignore[no-untyped-call] # tqdm's
        if self._bar is not None:
            self._bar.disable = True
            self._bar = None

    def _close(self) -> None:
        if self._bar is not None:
            self._show()
            self._bar.close()
            self._bar = None


def wanted(progress: bool | Literal["auto"]) -> bool:
    """Whether a bar is shown: "auto" shows it in terminals and notebooks, unless ``$SWARMKIT_PROGRESS`` is 0."""
    if progress != "auto":
        return bool(progress)
    return os.environ.get("SWARMKIT_PROGRESS") != "0" and (in_notebook() or bool(sys.stderr and sys.stderr.isatty()))


def in_notebook() -> bool:
    """Whether this code runs in a Jupyter kernel, where widgets can be shown."""
    ipython = sys.modules.get("IPython")
    return ipython is not None and hasattr(ipython.get_ipython(), "kernel")


def register_monitor(show: Callable[[Run], object]) -> Callable[[Run], object]:
    """Register ``show`` for the runs that are called with ``monitor=True``; the newest registration is used."""
    _monitors.append(show)
    return show


def show_monitor(run: Run) -> None:
    """Display a run as ``monitor=True`` asks for, if a monitor is registered. One that raises is reported like a
    listener, and the run goes on."""
    if _monitors:
        try:
            _monitors[-1](run)
        except Exception as exc:  # noqa: BLE001 - whatever it is, it is not the run's; it is reported
            run.stats.listener_errors.append(listener_failed(_monitors[-1], exc))
