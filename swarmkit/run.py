"""A run: started, waited for, looked into, cancelled."""

from __future__ import annotations

import concurrent.futures
import re
from collections import Counter
from collections.abc import Callable, Coroutine, Generator
from typing import TYPE_CHECKING, Any, Literal

from . import bridge
from .errors import (
    CancelledError,
    LoopThreadError,
    NoEndpointsError,
    ScatterError,
    ScatterInterrupted,
    SwarmError,
    warn,
)
from .records import Failure
from .stats import RunStats, table_html

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Run", "last_run"]

OnError = Literal["column", "raise"]

_newest: Run | None = None
_SHOWN_CAUSES = 5
_SHOWN_ROWS = 5


class Run:
    """A verb at work in the background.

    Made by ``submit`` and, behind the scenes, by every verb that sends.

    Attributes
    ----------
    verb : str
        "scatter" or "tree_reduce".
    stats : RunStats
        What it has cost so far.

    Examples
    --------
    A cell that returns at once, and one that looks at what there is::

        run = df.swarm.submit("Summarise: {abstract}")
        run.partial().dropna(subset="response")
        run.result()
    """

    def __init__(
        self,
        verb: str,
        work: Callable[[RunStats], Coroutine[Any, Any, Failure | None]],
        frame: Callable[[str], pd.DataFrame],
        errors: Callable[[], list[tuple[object, str]]],
        on_error: OnError = "column",
        hint: str = "",
    ) -> None:
        global _newest
        self.verb = verb
        self.stats = RunStats()
        self._frame = frame
        self._errors = errors
        self._on_error = on_error
        self._hint = hint
        self._cancelled = False
        self._warned = False
        _newest = self
        self._job = bridge.start(work(self.stats))

    def done(self) -> bool:
        """Whether it is over, one way or another."""
        return self._job.done()

    def cancel(self) -> None:
        """Stop it: connections are dropped, so servers abort what they were doing; finished rows are kept.

        Returns at once; does nothing to a run that is over.
        """
        if not self._job.done():
            self._cancelled = True
            self._job.stop()

    def partial(self) -> pd.DataFrame:
        """The result as far as it goes, at any time: rows that are not finished are missing, and their error
        says so."""
        return self._frame("not finished")

    def result(self, timeout: float | None = None) -> pd.DataFrame:
        """Wait for the end and return the frame.

        A ``KeyboardInterrupt`` here ends the waiting, not the run: ``run.cancel()`` does that.

        Parameters
        ----------
        timeout : float, optional
            Seconds to wait at most.

        Raises
        ------
        CancelledError
            It was cancelled.
        NoEndpointsError
            No endpoint was left; ``.frame`` has what had finished.
        ScatterError
            Rows failed, and ``on_error="raise"`` was asked for.
        TimeoutError
            It is not over yet.
        """
        concurrent.futures.wait([self._job], timeout)
        if not self._job.done():
            raise TimeoutError(f"the run is not over after {timeout} s; {self.stats!r}")
        return self._outcome()

    def finish(self) -> pd.DataFrame:
        """Wait for the end as a blocking verb does: an interrupt stops the run and keeps its rows.

        Raises
        ------
        ScatterInterrupted
            Interrupted; ``.frame`` has what had finished.
        """
        try:
            bridge.wait_for(self._job)
        except KeyboardInterrupt:
            self._cancelled = True
            raise ScatterInterrupted(
                f"interrupted: {self.stats.known:,} of {self.stats.rows:,} rows had their answers. They are in "
                "swarmkit.last_run().partial(); ask only the others with only_missing=True",
                self._frame("interrupted"),
            ) from None
        except LoopThreadError:
            raise
        except (Exception, concurrent.futures.CancelledError):  # noqa: BLE001 - _outcome raises it, dressed
            pass
        return self._outcome()

    def __await__(self) -> Generator[Any, None, pd.DataFrame]:
        return self._wait().__await__()

    async def _wait(self) -> pd.DataFrame:
        import asyncio

        waiter = asyncio.wrap_future(self._job)
        try:
            await asyncio.shield(waiter)
        except asyncio.CancelledError:
            if not self._job.done():  # the awaiting task is cancelled, not the run: that takes the run along
                self.cancel()
                await asyncio.wait([waiter])
                raise
        except (Exception, concurrent.futures.CancelledError):  # noqa: BLE001 - _outcome raises it, dressed
            pass
        return self._outcome()

    def _outcome(self) -> pd.DataFrame:
        try:
            failure = self._job.result()
        except concurrent.futures.CancelledError:
            raise CancelledError(
                f"the run was cancelled after {self.stats.known:,} of {self.stats.rows:,} rows; they are in "
                "run.partial()"
            ) from None
        except NoEndpointsError as exc:
            exc.frame = self._frame("no endpoint could be used")
            raise
        why = f". The last failure: {failure.describe()}" if failure else ""
        frame = self._frame(f"no endpoint was left{why}")
        if failure is not None:
            raise NoEndpointsError(
                f"no endpoint is left: {self.stats.known:,} of {self.stats.rows:,} rows have their answers (in "
                f".frame of this error). The last failure: {failure.describe()}",
                frame,
            )
        errors = self._errors()
        if errors and self._on_error == "raise":
            raise ScatterError(self._summary(errors), frame)
        if errors and not self._warned:
            self._warned = True
            warn(self._summary(errors))
        return frame

    def _summary(self, errors: list[tuple[object, str]]) -> str:
        """How many rows failed, the causes, and what to do next."""
        rows_of: dict[str, list[object]] = {}
        example: dict[str, str] = {}
        for label, error in errors:
            cause = _cause(error)
            rows_of.setdefault(cause, []).append(label)
            example.setdefault(cause, error[:200])
        counts = Counter({cause: len(rows) for cause, rows in rows_of.items()})
        lines = [f"{len(errors):,} of {self.stats.rows:,} rows failed:"]
        for cause, count in counts.most_common(_SHOWN_CAUSES):
            shown = ", ".join(repr(r) for r in rows_of[cause][:_SHOWN_ROWS])
            more = ", ..." if count > _SHOWN_ROWS else ""
            lines.append(f"  {count:,} x {example[cause]} (rows {shown}{more})")
        if len(counts) > _SHOWN_CAUSES:
            lines.append(f"  and {len(counts) - _SHOWN_CAUSES} other causes")
        return "\n".join([*lines, *([self._hint] if self._hint else [])])

    def _state(self) -> str:
        if not self._job.done():
            return "cancelling" if self._cancelled else "running"
        if self._cancelled:
            return "cancelled"
        return "failed" if self._job.exception() is not None or self._job.result() is not None else "done"

    def __repr__(self) -> str:
        return f"<Run {self.verb}: {self._state()}, {self.stats.known:,} of {self.stats.rows:,} rows>"

    def _repr_html_(self) -> str:
        return table_html([("run", f"{self.verb}, {self._state()}"), *self.stats.summary()])


def _cause(error: str) -> str:
    """What errors have in common that differ only in the endpoint (``Failure.describe``) or in numbers.

    Examples
    --------
    >>> _cause("request refused at node7:8000 (HTTP 400): 5000 tokens are too many")
    'request refused (HTTP #): # tokens are too many'
    """
    return re.sub(r"\d+", "#", re.sub(r" at \S+", "", error, count=1))[:200]


def last_run() -> Run:
    """The newest run of this process, also one that was interrupted or failed.

    Raises
    ------
    SwarmError
        There has been none.
    """
    if _newest is None:
        raise SwarmError("nothing has been run in this process yet")
    return _newest
