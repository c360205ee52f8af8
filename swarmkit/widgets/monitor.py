"""A widget that shows a run while it runs."""

from __future__ import annotations

import threading
import time
from typing import Any

import ipywidgets
from IPython.display import display

from ..runs.notebook import Slot
from ..runs.run import Run
from .html import block, faint
from .refresh import follow
from .run_view import Pace, run_html

__all__ = ["RunMonitor", "show"]


class RunMonitor(ipywidgets.VBox):
    """Shows a run while it runs: totals, rows per second, a row per endpoint, the newest answers, the last failures.

    It reads the run's ``stats`` three times a second, on a thread of its own: the run does not wait for it, and it
    can be opened at any time during a run. A *Stop* button cancels the run; while a cell waits for the run
    (``scatter(..., monitor=True)``), a note says to interrupt the kernel instead. When the run has ended, a static
    snapshot takes the widget's place, which a saved notebook keeps. A run that is shown has no bar.

    Parameters
    ----------
    run : Run
        The result of ``submit``, or ``last_run()``; running or finished.

    Examples
    --------
    >>> run = df.swarm.submit("What does {gene} do?")
    >>> RunMonitor(run)
    <RunMonitor: scatter>
    >>> answers = run.result()
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._pace = Pace()
        self._slot = Slot()
        self._ended = False
        self._lock = threading.Lock()
        self._view = ipywidgets.HTML()
        self._stop = ipywidgets.Button(
            description="Stop",
            icon="stop",
            tooltip="Stop the run, keep its finished rows. While a cell is running, interrupt the kernel instead",
            layout={"display": "none", "width": "auto"},
        )
        self._stop.on_click(lambda _: run.cancel())
        self._note = ipywidgets.HTML()
        super().__init__([self._view, ipywidgets.HBox([self._stop, self._note])])
        self._draw()
        if not self._ended:
            run.watchers.append(follow(run._job, self._follow))

    def _draw(self) -> None:
        state, stats = self._run.state, self._run.stats
        running = state in ("running", "cancelling")
        elapsed_s = time.monotonic() - stats._began if running and stats.endpoints else stats.time_s
        if stats.endpoints:
            self._pace.add(elapsed_s, stats.answered)
        newest = self._run.newest() if running else []
        self._view.value = run_html(self._run.verb, state, stats, self._pace, elapsed_s, newest)
        if not running:
            self._end()

    def _follow(self) -> None:
        self._draw()
        running, waited_for = not self._ended, self._run.waited_for
        self._stop.layout.display = "inline-block" if running and not waited_for else "none"
        self._stop.disabled = self._run.state == "cancelling"
        note = "To stop the run, interrupt the kernel (■): finished rows are kept." if running and waited_for else ""
        self._note.value = block(faint(note)) if note else ""

    def _end(self) -> None:
        with self._lock:
            self._ended = True
            self._slot.replace(self._snapshot())

    def _snapshot(self) -> dict[str, Any]:
        """What stays. It is beside the widget from the start, for front ends that have none."""
        run = self._run
        what = run.verb if run.state == "done" else f"{run.verb}, {run.state}"
        return {"text/plain": run.stats.counts().line(what, run.stats.noun), "text/html": self._view.value}

    def _repr_mimebundle_(self, **kwargs: Any) -> dict[str, Any]:
        shown: dict[str, Any] = {} if self._ended else super()._repr_mimebundle_(**kwargs)
        return {**shown, **self._snapshot()}

    def _ipython_display_(self) -> None:
        """Show it in this cell: in the place of the run's bar, if that is here."""
        stats = self._run.stats
        with self._lock:
            stats.is_monitored, bar = True, stats.bar
            if bar is not None and bar.is_here:
                stats.bar, self._slot = None, bar
                self._slot.replace(self._repr_mimebundle_())
            else:
                self._slot.show(self._repr_mimebundle_())

    def __repr__(self) -> str:
        return f"<RunMonitor: {self._run.verb}>"


def show(run: Run) -> None:
    """Show a run in the current cell."""
    display(RunMonitor(run))  # type: ignore[no-untyped-call] # IPython's
