"""The tqdm bar: rows done and failed, rows a second, endpoints alive."""

from __future__ import annotations

import os
import sys
import time
from typing import Any, Literal

from .events import RequestEnded, RowFailed, RowsDone, RunEnded, RunEvent, RunStarted

__all__ = ["Bar", "in_notebook", "wanted"]

_REFRESH_S = 0.1


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
        self._known = 0
        self._unshown = 0
        self._next = 0.0

    def __call__(self, event: RunEvent) -> None:
        """Take one event of the run."""
        match event:
            case RowsDone(_, _, rows, alive, _):
                self._alive = alive
                self._advance(len(rows))
            case RowFailed():
                self._failed += 1
                self._advance(1)
            case RequestEnded():
                self._alive = event.alive
            case RunStarted():
                self._open(event)
            case RunEnded():
                self._close()

    def _open(self, event: RunStarted) -> None:
        from tqdm.auto import tqdm  # slow to import, and not needed until a bar is shown

        known = event.rows - event.pending
        self._alive = len(event.endpoints)
        if self._bar is not None:  # the next of several frames: there is more by now
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
        self._bar.set_postfix_str(f"{failed}{self._alive} endpoint{'s' * (self._alive != 1)}", refresh=False)
        self._bar.update(self._unshown)
        self._bar.refresh()
        self._unshown = 0
        self._next = time.monotonic() + _REFRESH_S

    def _close(self) -> None:
        if self._bar is not None:
            self._show()
            self._bar.close()
            self._bar = None


def wanted(progress: bool | Literal["auto"]) -> bool:
    """Whether a bar is shown: "auto" shows it where a person looks on, in a terminal or a notebook, unless
    ``$SWARMKIT_PROGRESS`` is 0."""
    if progress != "auto":
        return bool(progress)
    return os.environ.get("SWARMKIT_PROGRESS") != "0" and (in_notebook() or bool(sys.stderr and sys.stderr.isatty()))


def in_notebook() -> bool:
    """Whether a kernel runs this code, so that widgets can be shown."""
    ipython = sys.modules.get("IPython")
    return ipython is not None and hasattr(ipython.get_ipython(), "kernel")
