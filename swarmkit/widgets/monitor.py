"""A widget that shows a run while it runs."""

from __future__ import annotations

import contextvars
import threading
import time
from typing import Any

import ipywidgets
from IPython.display import display

from ..runs.run import Run
from .html import block, faint
from .refresh import follow
from .run_view import Pace, run_html

__all__ = ["RunMonitor", "show"]


class RunMonitor(ipywidgets.VBox):
    """Shows a run while it runs: totals, rows per second, a row per endpoint, the newest answers, the last failures.

    It reads the run's ``stats`` three times a second, on a thread of its own: the run does not wait for it, and it
    can be opened at any time during a run. A *Stop* button cancels the run; while a cell waits for the run
    (``scatter(..., monitor=True)``), a note says to interrupt the kernel instead. When the run has ended, the widget
    is replaced by a static snapshot, which a saved notebook keeps.

    Parameters
    ----------
    run : Run
        The result of ``submit``, or ``last_run()``; running or finished.

    Examples
    --------
    >>> import swarmkit as sk, pandas as pd
    >>> df = pd.DataFrame({"i": range(100)})
    >>> with sk.local(1, engine="echo") as swarm:
    ...     run = df.swarm.submit("number {i}", pool=sk.connect(swarm), progress=False)
    ...     monitor = RunMonitor(run)
    ...     _ = run.result()
    >>> monitor
    <RunMonitor: scatter>
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._pace = Pace()
        self._cells: list[contextvars.Context] = []  # of the cells that show the widget
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
            self._pace.add(elapsed_s, stats.answered + stats.reused)
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
        """Display the static snapshot in every cell that shows the widget, and hide the widget."""
        with self._lock:
            self._ended = True
            for cell in self._cells:
                cell.run(display, self._snapshot(), raw=True)
            if self._cells:
                self.layout.display = "none"

    def _snapshot(self) -> dict[str, str]:
        return {"text/plain": repr(self._run), "text/html": self._view.value}

    def _repr_mimebundle_(self, **kwargs: Any) -> dict[str, Any]:
        with self._lock:
            if self._ended:
                return self._snapshot()
            self._cells.append(contextvars.copy_context())
        shown: dict[str, Any] = super()._repr_mimebundle_(**kwargs)
        return shown

    def __repr__(self) -> str:
        return f"<RunMonitor: {self._run.verb}>"


def show(run: Run) -> None:
    """Show a run in the current cell."""
    display(RunMonitor(run))  # type: ignore[no-untyped-call] # IPython's
