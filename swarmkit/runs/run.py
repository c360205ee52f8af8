"""The handle of a run: wait for it, look into it, cancel it."""

from __future__ import annotations

import asyncio
import concurrent.futures
import math
import threading
import time
from collections.abc import Callable, Coroutine, Generator, Iterable
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from ..client import io_thread
from ..client.constraints import UNCONSTRAINED
from ..engine.deadline import Deadline
from ..errors import (
    CancelledError,
    LoopThreadError,
    NoEndpointsError,
    ScatterError,
    ScatterInterrupted,
    SettingError,
    StoreError,
    SwarmError,
    SwarmWarning,
    warn,
)
from ..records import Failure, FailureKind
from ..text import few, plural, table_html
from ..traces import shortened
from .failure_summary import FailureSummary
from .stats import BARE, UNTOLD, RunStats

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

__all__ = ["RUN_AGAIN", "Run", "awaited", "finished", "lacking", "last_run", "started"]

OnError = Literal["column", "raise"]

T = TypeVar("T")

RUN_AGAIN = "Run the same command again: with store= nothing is asked twice"
_ASK_AGAIN = ("classify", "filter", "pipeline", "semantic_entropy")  # they may ask a row several times
_NOUNS = {"tree_reduce": "merge", "pipeline": "answer"}  # what a run counts
_SAME_CALL = "with store= the same call asks only the others"
_ONLY_MISSING = "only_missing=True asks only these rows"
_GOES_ON = "the waiting has ended, and the run goes on: run.partial() has its rows so far, and run.cancel() stops it"
_GRACE_S = 0.5
"""Seconds after its deadline in which a run ends by itself, once it sends."""

_newest: Run | None = None
_of_thread = threading.local()  # its ``newest``: the newest run that this thread has started


class Run:
    """A verb that runs in the background.

    ``submit`` returns one, every verb that sends makes one, and ``last_run()`` returns the newest.

    Attributes
    ----------
    verb : str
        "scatter" or "tree_reduce".
    stats : RunStats
        Its counts so far.
    waited_for : bool
        Whether a blocking verb waits for it, so that an interrupt stops it.
    has_store : bool
        Whether its answers are on disk, too.
    watchers : list of threading.Thread
        Threads that show it and end with it; ``result`` waits for them, too.

    Examples
    --------
    A cell that returns at once, and others that look at the answers so far, and wait for all:

    >>> run = df.swarm.submit("What does {gene} do?")
    >>> early = run.partial().dropna(subset="response")
    >>> run.result()["response"].tolist()
    ['echo: What does lacZ do?', 'echo: What does recA do?']
    >>> run, run.state, run.done(), dict(run.newest())[0]
    (<Run scatter: done, 2 of 2 rows>, 'done', True, 'echo: What does lacZ do?')
    >>> run.plot()
    <Figure size ...>

    One that is stopped:

    >>> run = pd.DataFrame({"i": range(20_000)}).swarm.submit("{i}")
    >>> run.cancel()
    >>> len(run.partial())
    20000
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
        index: pd.Index | None = None,
        deadline: Deadline | None = None,
    ) -> None:
        global _newest
        self.verb = verb
        self.stats = RunStats(noun={"tree_reduce": "merge", "pipeline": "prompt"}.get(verb, "row"))
        self._frame = frame
        self._errors = errors
        self._on_error = on_error
        self._hint = hint
        self._answers = answers
        self._index = index
        self.watchers: list[threading.Thread] = []
        self.waited_for = False
        self.has_store = False
        self._cancelled = False
        self._warned = False
        self._warned_of_constraints = False
        self._outage_warned, self._outage_seen = False, 0
        self._notices_warned = 0
        self._listeners_warned = 0
        self._job = io_thread.Job(_counted(work, self.stats, deadline, verb))
        _newest = _of_thread.newest = self
        self._job.begin()

    def done(self) -> bool:
        """Whether it is over: finished, failed or cancelled."""
        return self._job.done()

    def cancel(self) -> None:
        """Stop it: connections are closed, so that servers abort its requests; finished rows are kept.

        Returns at once; does nothing if the run is over.
        """
        if not self._job.done():
            self._cancelled = True
            self._job.stop()

    def partial(self) -> pd.DataFrame:
        """The result so far, at any time: answers of unfinished rows are missing, and their error says so."""
        return self._frame("not finished")

    def newest(self) -> list[tuple[object, str]]:
        """Index label and answer of the few rows that were answered last; empty for a tree_reduce."""
        return self._answers(list(self.stats.newest))

    def story(self, row: object = None, endpoint: str | int | None = None) -> pd.DataFrame:
        """What happened, in order: in the whole run, to a row, or at an endpoint. At any time, also after an interrupt.

        Parameters
        ----------
        row : object, optional
            Index label of the frame: only what happened to this row (to all rows with this label). Not for a
            tree_reduce, whose requests do not belong to rows of the frame.
        endpoint : str or int, optional
            Name of an endpoint as in ``stats.frame()``, or its index: only what happened there.

        Returns
        -------
        DataFrame
            ``time`` (seconds from the start of the run, float64), ``what``, ``where`` (name of the endpoint, missing
            where there is none) and ``why`` (details).

            Failed requests and what follows from them are always in it: requests with a row that was sent before,
            rows that end with an error, endpoints that are paused, lost or back. Requests that succeed at once are in
            it if ``logging.getLogger("swarmkit")`` is enabled for DEBUG when the run starts. Of each of the two kinds
            the newest 10,000 entries are kept; the oldest are dropped first, and a line says how many.

        Raises
        ------
        SettingError
            The frame has no such row, or the run no such endpoint.

        Examples
        --------
        >>> with sk.local(1, engine="echo", faults=["http_500:first=1,marker=recA"]) as swarm:
        ...     run = df.swarm.submit("Describe {gene}.", pool=sk.connect(swarm))
        ...     _ = run.result()
        >>> run.story(row=1)["what"].tolist()
        ['sent', 'request failed', 'to be retried', 'sent', 'answered']
        """
        name = None if endpoint is None else self._endpoint_name(endpoint)
        rows = None if row is None else self._positions(row)
        index = self._index
        return self.stats.story.frame(rows, name, None if index is None else lambda position: repr(index[position]))

    def _positions(self, row: object) -> set[int]:
        import pandas as pd

        if self._index is None:
            raise SettingError(f"row={row!r}: the requests of a {self.verb} do not belong to rows; use endpoint=")
        count = len(self._index)
        try:
            found: Any = pd.RangeIndex(count)[self._index.get_loc(row)]  # a position, a slice, or a mask
        except (KeyError, TypeError, ValueError, pd.errors.InvalidIndexError):
            raise SettingError(
                f"row={row!r}: not in the index of the frame, which has {plural(count, 'row')}"
            ) from None
        return {found} if isinstance(found, int) else set(found)

    def _endpoint_name(self, endpoint: str | int) -> str:
        names = [e.name for e in self.stats.endpoints]
        if endpoint in names:
            return str(endpoint)
        if isinstance(endpoint, int) and 0 <= endpoint < len(names):
            return names[endpoint]
        if not names:
            raise SettingError(f"endpoint={endpoint!r}: the run has not reached its endpoints yet")
        raise SettingError(
            f"endpoint={endpoint!r}: must be a name or an index, 0 to {len(names) - 1}; the names are: "
            f"{few(names, len(names))}"
        )

    def plot(self) -> Figure:
        """Plot the rows per second, and the requests by endpoint; at any time of the run."""
        return self.stats.plot()

    def result(self, timeout: float | None = None) -> pd.DataFrame:
        """Wait for the end and return the frame.

        A ``KeyboardInterrupt`` here ends the waiting, not the run: ``run.cancel()`` does that.

        Parameters
        ----------
        timeout : float, optional
            Most seconds to wait.

        Raises
        ------
        CancelledError
            The run was cancelled.
        NoEndpointsError
            No endpoint is left; ``.frame`` has the rows that had finished.
        StoreError
            The store failed; ``.frame`` has the rows that had finished.
        ScatterError
            Rows failed, and ``on_error="raise"`` was given.
        TimeoutError
            The run is not over yet.
        """
        until = math.inf if timeout is None else time.monotonic() + timeout
        try:
            while not self._job.done() and (left := until - time.monotonic()) > 0:
                concurrent.futures.wait([self._job], min(1.0, left))
                self._warn_of_trouble()
        except KeyboardInterrupt:
            raise shortened(KeyboardInterrupt(_GOES_ON)) from None
        if not self._job.done():
            raise TimeoutError(f"the run is not over after {timeout} s; {self.stats!r}")
        return self._outcome()

    def finish(self) -> pd.DataFrame:
        """Wait for the end as a blocking verb does: an interrupt stops the run and keeps the finished rows.

        Raises
        ------
        ScatterInterrupted
            The run was interrupted; ``.frame`` has the rows that had finished.
        """
        self.waited_for = True
        try:
            io_thread.wait_for(self._job, self._warn_of_trouble)
        except KeyboardInterrupt:
            raise self._interrupted() from None
        except (LoopThreadError, SwarmWarning):
            raise
        except (Exception, concurrent.futures.CancelledError):  # noqa: BLE001 - _outcome re-raises it with context
            pass
        return self._outcome()

    def _interrupted(self) -> ScatterInterrupted:
        """Stop it after an interrupt; return what is to be raised."""
        self.cancel()
        concurrent.futures.wait([self._job], io_thread.GRACE_S)
        self._join_watchers()
        again = "; only_missing=True sends only the others" if "only_missing" in self._hint else f"; {_SAME_CALL}"
        if self.has_store:
            again = " and in the store: the same call again asks only the others"
        return ScatterInterrupted(
            f"interrupted: {self._so_far()} answered. They are in swarmkit.last_run().partial(){again}",
            self._frame("interrupted"),
        )

    def __await__(self) -> Generator[Any, None, pd.DataFrame]:
        return self._wait().__await__()

    async def _wait(self) -> pd.DataFrame:
        waiter = asyncio.wrap_future(self._job)
        waiter.add_done_callback(lambda job: job.cancelled() or job.exception())  # asyncio reports what nobody looks at
        try:
            while not waiter.done():
                await asyncio.wait([waiter], timeout=1.0)
                self._warn_of_trouble()
            await waiter
        except asyncio.CancelledError:
            if not self._job.done():  # the awaiting task is cancelled, and the run with it
                self.cancel()
                await asyncio.wait([waiter])
                raise
        except SwarmWarning:
            raise
        except (Exception, concurrent.futures.CancelledError):  # noqa: BLE001 - _outcome re-raises it with context
            pass
        return self._outcome()

    def _join_watchers(self) -> None:
        for watcher in self.watchers:
            watcher.join(io_thread.GRACE_S)

    def _outcome(self) -> pd.DataFrame:
        try:
            frame = self.settled()
        finally:
            self._warn_of_listeners()
        merges = self.verb == "tree_reduce"
        causes = FailureSummary("groups" if merges else "rows")
        causes.add(self._errors())
        rows = len(frame) if self.verb in _ASK_AGAIN else self.stats.rows
        text = causes.text("the merges" if merges else plural(rows, "row"), self._hint)
        lines = [text] if causes.count else []
        if self.stats.deadline:
            again = f"; on the result {_ONLY_MISSING}" if "only_missing" in self._hint else ""
            noun = _NOUNS.get(self.verb, "row" if rows == self.stats.rows else "prompt")
            lines.append(f"{self.stats.left(noun)}. {RUN_AGAIN}{again}")
        if lines and self._on_error == "raise":
            raise ScatterError("\n".join(lines), frame)
        lines += self.stats.cuts()
        if lines and not self._warned:
            self._warned = True
            warn("\n".join(lines))
        return frame

    def _warn_of_trouble(self) -> None:
        self._warn_of_outage()
        self._warn_of_notices()

    def _warn_of_constraints(self) -> None:
        """Warn once where servers do not do what answers should have."""
        if not self._warned_of_constraints and (text := lacking(self.stats)):
            self._warned_of_constraints = True
            warn(text)

    def _warn_of_outage(self) -> None:
        """Warn once while no endpoint is up and the run goes on trying: there is not always a bar that says so. It is
        seen at two calls in turn: what is over by then, or ends the run, needs no warning."""
        self._outage_seen = self._outage_seen + 1 if self.stats.waits else 0
        if self._outage_seen > 1 and not self._outage_warned:
            self._outage_warned = True
            warn(". ".join([self.stats.waits, *list(self.stats.recent_failures)[-1:]]))

    def _warn_of_notices(self) -> None:
        """Warn of what is to be known at once, as an endpoint that is not believed."""
        lines = self.stats.notices[self._notices_warned :]
        self._notices_warned += len(lines)
        if lines:
            warn(few(lines, len(lines)))

    def _warn_of_listeners(self) -> None:
        errors = self.stats.listener_errors
        for line in errors[self._listeners_warned :]:
            self._listeners_warned += 1
            warn(line)

    def settled(self) -> pd.DataFrame:
        """The frame of a run that is over, also if rows failed.

        Raises
        ------
        CancelledError, NoEndpointsError, StoreError
            As ``result`` does.
        """
        self._join_watchers()
        self._warn_of_notices()
        self._warn_of_constraints()
        try:
            failure = self._job.result()
        except concurrent.futures.CancelledError:
            raise CancelledError(f"the run was cancelled after {self._so_far()}; they are in run.partial()") from None
        except NoEndpointsError as exc:
            exc.frame = self._frame("no endpoint could be used")
            raise
        except StoreError as exc:
            exc.frame = self._frame("not finished: the store failed")
            raise
        if failure is None or failure.kind is FailureKind.DEADLINE:
            return self._frame(self.left_over() or "no endpoint was left")
        then = "; with only_missing=True that frame's other rows are asked again" if self.verb == "scatter" else ""
        raise NoEndpointsError(
            f"no endpoint is left: {self._so_far()} answered, in .frame of "
            f"this error{then}. The last failure: {failure.describe()}",
            self._frame(f"no endpoint was left. The last failure: {failure.describe()}"),
        )

    def left_over(self) -> str:
        """The error of the rows that the deadline has left; empty while the run goes on, or where it left none."""
        return f"{FailureKind.DEADLINE}: {self.stats.deadline}" if self.stats.deadline else ""

    @property
    def state(self) -> Literal["running", "cancelling", "cancelled", "failed", "done"]:
        """State of the run. "failed": no endpoint is left, or the run could not start."""
        if not self._job.done():
            return "cancelling" if self._cancelled else "running"
        error = self._job.exception()
        if isinstance(error, concurrent.futures.CancelledError):
            return "cancelled"
        return "failed" if error is not None or not (self._job.result() is None or self.stats.deadline) else "done"

    def __repr__(self) -> str:
        so_far = f", {self._so_far()}" if self.stats.rows or self.done() else ""
        return f"<Run {self.verb}: {self.state}{so_far}>"

    def _so_far(self) -> str:
        return f"{self.stats.known:,} of {plural(self.stats.rows, self.stats.noun)}"

    def _repr_html_(self) -> str:
        return table_html([("run", f"{self.verb}, {self.state}"), *self.stats.summary()])


def lacking(stats: RunStats) -> str:
    """What servers lack that the call asks for; empty if they do all of it."""
    without = {
        UNTOLD: "gave no log-probabilities: they are missing (RunStats.routes says why)",
        BARE: "had no chats: prompts were sent as they are, without a chat template (chat=None says so)",
    }
    said = [_unconstrained(stats)]
    for mark, what in without.items():
        if count := sum(n for route, n in stats.routes.items() if mark in route):
            said.append(f"{count:,} of {plural(sum(stats.routes.values()), 'endpoint')} {what}")
    return ". ".join(filter(None, said))


def _unconstrained(stats: RunStats) -> str:
    """That servers do not hold the model to the schema; empty if all do."""
    count = sum(n for route, n in stats.routes.items() if UNCONSTRAINED in route)
    if not count:
        return ""
    which = f"{count:,} of {plural(sum(stats.routes.values()), 'endpoint')} {'does' if count == 1 else 'do'}"
    return (
        f"{which} not hold the model to the schema. Every answer is checked, and asked again where it is not valid; "
        f"{stats.invalid:,} of {plural(stats.answered + stats.invalid, 'answer')} were not"
    )


async def _counted(
    work: Callable[[RunStats], Coroutine[Any, Any, Failure | None]],
    stats: RunStats,
    deadline: Deadline | None,
    verb: str,
) -> Failure | None:
    """The work of a run; where it has a deadline, ended soon after that also while servers are looked at."""
    if deadline is None:
        return await work(stats)
    failure: Failure | None = deadline.failure
    at = asyncio.get_running_loop().time() + deadline.at - time.monotonic()
    try:
        async with asyncio.timeout_at(at + _GRACE_S) as timer:
            failure = await work(stats)
    except TimeoutError:
        if not timer.expired():
            raise
        if verb != "tree_reduce" and stats.known + stats.failed == stats.rows > 0:
            return None  # all was done, and a store was slow; a tree may have more levels
    stats.over(failure)
    return failure


def finished(start: Callable[[], Run]) -> pd.DataFrame:
    """Start a run and wait for its end, as a blocking verb does: an interrupt at any moment stops the run, and hands
    back what is finished. Before there is a run, it is a plain ``KeyboardInterrupt``. Raises as ``Run.finish``."""
    earlier = _newest_here()
    try:
        return start().finish()
    except ScatterInterrupted:
        raise
    except KeyboardInterrupt as exc:
        run = _newest_here()
        if run is None or run is earlier:
            shortened(exc)
            raise
    raise run._interrupted()


def started(start: Callable[..., T], *args: Any) -> T:
    """Call what starts a run; an interrupt on its way back stops that run."""
    earlier = _newest_here()
    try:
        return start(*args)
    except BaseException:
        run = _newest_here()
        if run is not None and run is not earlier:
            run.cancel()
        raise


def _newest_here() -> Run | None:
    newest: Run | None = getattr(_of_thread, "newest", None)
    return newest


def last_run() -> Run:
    """The newest run of this process, also if it was interrupted or failed.

    Raises
    ------
    SwarmError
        No run has started yet.

    Examples
    --------
    >>> answers = df.swarm.scatter("What does {gene} do?")
    >>> sk.last_run()
    <Run scatter: done, 2 of 2 rows>
    """
    if _newest is None:
        raise SwarmError("no run has started in this process yet")
    return _newest


async def awaited(start: Callable[..., Run], *args: Any) -> pd.DataFrame:
    """Start a run in a thread, since connecting and making prompts may block the caller's loop, and await it.

    If this is cancelled while the run is starting, the run is cancelled once it has started.
    """
    starting = asyncio.ensure_future(asyncio.to_thread(start, *args))
    try:
        run = await asyncio.shield(starting)
    except asyncio.CancelledError:
        (await starting).cancel()
        raise
    return await run
