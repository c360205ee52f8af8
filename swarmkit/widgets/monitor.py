"""Watch a run while it runs."""

from __future__ import annotations

import contextvars
import threading
import time
from typing import Any

import ipywidgets
from IPython.display import display

from ..run import Run
from .follow import follow
from .pieces import block, faint
from .scene import Pace, scene_html

__all__ = ["RunMonitor", "show"]


class RunMonitor(ipywidgets.VBox):
    """Shows a run while it runs: totals, pace, a line an endpoint, the newest answers, the last failures.

    It reads the run's ``stats`` three times a second, on a thread of its own: the run does not wait for it, and it can
    be put to a run that has been under way for a while. A *Stop* button cancels the run; where a cell waits for the
    run (``scatter(..., monitor=True)``) it says instead that the kernel's interrupt does. When the run is over, a still
    picture takes its place, which a saved notebook keeps.

    Parameters
    ----------
    run : Run
        What ``submit`` gives, or ``last_run()``; under way, or over.

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
        self._cells: list[contextvars.Context] = []  # of the cells that show it
        self._over = False
        self._lock = threading.Lock()
        self._scene = ipywidgets.HTML()
        self._stop = ipywidgets.Button(
            description="Stop",
            icon="stop",
            tooltip="Stop the run, keep its finished rows. Clicks wait while a cell is at work: interrupt the kernel",
            layout={"display": "none", "width": "auto"},
        )
        self._stop.on_click(lambda _: run.cancel())
        self._note = ipywidgets.HTML()
        super().__init__([self._scene, ipywidgets.HBox([self._stop, self._note])])
        self._draw()
        if not self._over:
            run.watchers.append(follow(run._job, self._follow))

    def _draw(self) -> None:
        state, stats = self._run.state, self._run.stats
        going = state in ("running", "cancelling")
        elapsed_s = time.monotonic() - stats._began if going and stats.endpoints else stats.time_s
        if stats.endpoints:
            self._pace.add(elapsed_s, stats.known)
        newest = self._run.newest() if going else []
        self._scene.value = scene_html(self._run.verb, state, stats, self._pace, elapsed_s, newest)
        if not going:
            self._end()

    def _follow(self) -> None:
        self._draw()
        going, waited_for = not self._over, self._run.waited_for
        self._stop.layout.display = "inline-block" if going and not waited_for else "none"
        self._stop.disabled = self._run.state == "cancelling"
        told = "To stop it, interrupt the kernel (■): finished rows are kept." if going and waited_for else ""
        self._note.value = block(faint(told)) if told else ""

    def _end(self) -> None:
        """Put the still picture into every cell that shows the moving one, and take that away."""
        with self._lock:
            self._over = True
            for cell in self._cells:
                cell.run(display, self._still(), raw=True)
            if self._cells:
                self.layout.display = "none"

    def _still(self) -> dict[str, str]:
        return {"text/plain": repr(self._run), "text/html": self._scene.value}

    def _repr_mimebundle_(self, **kwargs: Any) -> dict[str, Any]:
        with self._lock:
            if self._over:
                return self._still()
            self._cells.append(contextvars.copy_context())
        shown: dict[str, Any] = super()._repr_mimebundle_(**kwargs)
        return shown

    def __repr__(self) -> str:
        return f"<RunMonitor: {self._run.verb}>"


def show(run: Run) -> None:
    """Show a run in the cell at work."""
    display(RunMonitor(run))  # type: ignore[no-untyped-call] # IPython's
