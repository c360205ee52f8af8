"""A run: started, waited for, looked into, cancelled."""

from __future__ import annotations

import concurrent.futures
import re
import threading
from collections.abc import Callable, Coroutine, Generator, Iterable, Sequence
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
from .markup import table_html
from .records import Failure, FailureKind
from .stats import RunStats

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Causes", "Run", "last_run"]

OnError = Literal["column", "raise"]

_newest: Run | None = None
_SHOWN = 5
_SHOWN_CHARS = 200
_DESCRIBED = re.compile(rf"({'|'.join(FailureKind)}) at (\S+?)(?=:? )")  # what Failure.describe begins with


class Run:
    """A verb at work in the background.

    Made by ``submit`` and, behind the scenes, by every verb that sends.

    Attributes
    ----------
    verb : str
        "scatter" or "tree_reduce".
    stats : RunStats
        What it has cost so far.
    waited_for : bool
        A blocking verb waits for it, so that an interrupt stops it.
    watchers : list of threading.Thread
        They show it and end with it; whoever waits for its result waits for them, too.

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
        answers: Callable[[Iterable[int]], list[tuple[object, str]]] = lambda rows: [],
    ) -> None:
        global _newest
        self.verb = verb
        self.stats = RunStats()
        self._frame = frame
        self._errors = errors
        self._on_error = on_error
        self._hint = hint
        self._answers = answers
        self.watchers: list[threading.Thread] = []
        self.waited_for = False
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

    def newest(self) -> list[tuple[object, str]]:
        """Index label and answer of the few rows that were answered last; none of a tree-reduce."""
        return self._answers(list(self.stats.newest))

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
        self.waited_for = True
        try:
            bridge.wait_for(self._job)
        except KeyboardInterrupt:
            self._cancelled = True
            self._let_watchers_end()
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

    def _let_watchers_end(self) -> None:
        for watcher in self.watchers:
            watcher.join(bridge.GRACE_S)

    def _outcome(self) -> pd.DataFrame:
        frame = self.settled()
        merges = self.verb == "tree_reduce"
        causes = Causes("groups" if merges else "rows")
        causes.add(self._errors())
        text = causes.text("the merges" if merges else f"{self.stats.rows:,} rows", self._hint)
        if causes.count and self._on_error == "raise":
            raise ScatterError(text, frame)
        if causes.count and not self._warned:
            self._warned = True
            warn(text)
        return frame

    def settled(self) -> pd.DataFrame:
        """The frame of a run that is over, whichever of its rows failed.

        Raises
        ------
        CancelledError, NoEndpointsError
            As ``result`` does.
        """
        self._let_watchers_end()
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
        return frame

    @property
    def state(self) -> Literal["running", "cancelling", "cancelled", "failed", "done"]:
        """Where it is. "failed": no endpoint was left, or nothing could be asked."""
        if not self._job.done():
            return "cancelling" if self._cancelled else "running"
        error = self._job.exception()
        if isinstance(error, concurrent.futures.CancelledError):
            return "cancelled"
        return "failed" if error is not None or self._job.result() is not None else "done"

    def __repr__(self) -> str:
        return f"<Run {self.verb}: {self.state}, {self.stats.known:,} of {self.stats.rows:,} rows>"

    def _repr_html_(self) -> str:
        return table_html([("run", f"{self.verb}, {self.state}"), *self.stats.summary()])


class Causes:
    """Why rows (or ``whose``) failed: for each cause how many, the first of them, and the endpoints that named it."""

    def __init__(self, whose: str = "rows") -> None:
        self.count = 0
        self._whose = whose
        self._found: dict[str, tuple[str, list[int], list[str], dict[str, None]]] = {}

    def add(self, errors: Iterable[tuple[object, str]]) -> None:
        """Count rows, given as label and error."""
        for label, error in errors:
            endpoint, words = _parted(error)
            new: tuple[str, list[int], list[str], dict[str, None]] = (" ".join(words.split()), [0], [], {})
            _, count, rows, endpoints = self._found.setdefault(re.sub(r"\d+", "#", words), new)
            self.count += 1
            count[0] += 1
            endpoints[endpoint] = None
            if len(rows) < _SHOWN:
                rows.append(repr(label))

    def text(self, of: str, hint: str = "") -> str:
        """How many ``of`` what failed, the causes, and what to do next."""
        return "\n".join([f"{self.count:,} of {of} failed:", *self.lines(), hint]).rstrip()

    def lines(self) -> list[str]:
        """The most common causes."""
        lines = []
        for words, (count,), rows, endpoints in sorted(self._found.values(), key=lambda c: -c[1][0])[:_SHOWN]:
            named = [*filter(None, endpoints)]
            where = f"; at {_few(named, len(named))}" if named else ""
            lines += [f"  {count:,} x {words}", f"      {self._whose} {_few(rows, count)}{where}"]
        if len(self._found) > _SHOWN:
            lines.append(f"  and {len(self._found) - _SHOWN} other causes")
        return lines


def _parted(error: str) -> tuple[str, str]:
    """Endpoint, if any, and the rest of what ``Failure.describe`` made.

    Examples
    --------
    >>> _parted("request refused at node7:8000 (HTTP 400): too long")
    ('node7:8000', 'request refused (HTTP 400): too long')
    """
    found = _DESCRIBED.match(error)
    endpoint, words = (found[2], f"{found[1]}{error[found.end() :]}") if found else ("", error)
    return endpoint, words if len(words) <= _SHOWN_CHARS else f"{words[:_SHOWN_CHARS].rstrip()} ..."


def _few(texts: Sequence[str], of: int) -> str:
    return ", ".join(texts[:_SHOWN]) + (f" and {of - _SHOWN:,} more" if of > _SHOWN else "")


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
