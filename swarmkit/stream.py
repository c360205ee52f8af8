"""Frames through the swarm one after another, without a gap between them and without all of them in memory.

Each frame is a run of its own. A run's last rows take as long as the slowest of them, and would leave most of a
large swarm idle; so the next run begins when the newest has sent its last unsent row.
"""

from __future__ import annotations

import concurrent.futures
import queue
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

import pandas as pd

from . import bridge
from .errors import NoEndpointsError, ScatterError
from .events import RequestSent, RunEnded, RunEvent, RunStarted
from .options import Call
from .run import Causes, Run
from .sheet import Sheet
from .stats import RunStats

__all__ = ["MOST", "Stream"]

MOST = 3
"""Frames under way at once; one more is read ahead."""

_COUNTS = ("rows", "answered", "reused", "failed", "requests", "failed_requests", "prompt_tokens", "completion_tokens")


class Stream:
    """Iterate over it once: a frame of answers for every frame, in their order.

    Parameters
    ----------
    frames : iterable of DataFrame
        Read in the thread that iterates, at most ``MOST + 1`` frames ahead of what was yielded.
    prepare : callable
        Makes a frame's ``Sheet``.
    call : Call
        What is asked of every row.
    rows : int, default 0
        Rows there will be in all, for the bar; where it is not known the bar counts those read so far.

    Attributes
    ----------
    stats : RunStats
        Counts of the frames yielded so far, and the seconds since the start.
    causes : Causes
        Why rows failed.
    """

    def __init__(
        self, frames: Iterable[pd.DataFrame], prepare: Callable[[pd.DataFrame], Sheet], call: Call, rows: int = 0
    ) -> None:
        self._sheets = map(prepare, frames)
        self._ready: Sheet | None = None
        self._pool, self._on_error = call.pool if call.owned else None, call.on_error
        store = None if call.store is None else call.store.for_frames()
        self._call = replace(call, progress=False, owned=False, monitor=False, on_error="column", store=store)
        self._listeners = call.listeners("scatter")
        self._parts: deque[_Part] = deque()
        self._news: queue.SimpleQueue[None] = queue.SimpleQueue()  # its put may be called in a signal handler
        self._stopped = False
        self._rows, self._begun, self._known = rows, 0, 0
        self.stats = RunStats()
        self.causes = Causes()

    def __iter__(self) -> Iterator[pd.DataFrame]:
        began = time.monotonic()
        try:
            self._ready = next(self._sheets, None)
            while (self._ready or self._parts) and not self._stopped:
                if self._parts and self._parts[0].run.done():
                    frame = self._settle(self._parts[0])
                    self.stats.time_s = time.monotonic() - began
                    yield frame
                elif self._ready and len(self._parts) < MOST and (not self._parts or self._parts[-1].sent):
                    self._parts.append(_Part(self._ready, self._call, self._hear, self._wake))
                    self._ready = next(self._sheets, None)
                else:
                    self._news.get()
        finally:
            self._end()
            self.stats.time_s = time.monotonic() - began

    def stop(self) -> None:
        """End the iteration; requests are dropped. Returns at once, and may be called by a signal handler."""
        self._stopped = True
        self._wake()

    def _wake(self, _: object = None) -> None:
        self._news.put(None)

    def rest(self, unfinished: str) -> Iterator[pd.DataFrame]:
        """After an early end, the frames that were not yielded, as far as they got; then those never asked.

        Parameters
        ----------
        unfinished : str
            The error of rows without an answer.
        """
        yield from self._under_way(unfinished)
        for sheet in self._sheets:
            yield sheet.frame(unfinished)

    def partial(self, unfinished: str) -> pd.DataFrame:
        """The frames in memory in one, as far as they got."""
        return pd.concat([*self._under_way(unfinished)])

    def _under_way(self, unfinished: str) -> Iterator[pd.DataFrame]:
        for sheet in [*(part.sheet for part in self._parts), *([self._ready] if self._ready else [])]:
            yield sheet.frame(unfinished)

    def _settle(self, part: _Part) -> pd.DataFrame:
        try:
            frame = part.run.settled()
        except NoEndpointsError as exc:
            exc.frame = self.partial("no endpoint was left")
            raise
        self._parts.popleft()
        self._count(part)
        self.causes.add(part.sheet.errors())
        if self.causes.count and self._on_error == "raise":
            raise ScatterError(self.causes.text(f"{self.stats.rows:,} rows"), frame)
        return frame

    def _count(self, part: _Part) -> None:
        for name in _COUNTS:
            setattr(self.stats, name, getattr(self.stats, name) + getattr(part.run.stats, name))

    def _end(self) -> None:
        for part in self._parts:
            part.run.cancel()
        concurrent.futures.wait([part.run._job for part in self._parts], bridge.GRACE_S)
        for part in self._parts:
            self._count(part)
        for listener in self._listeners:
            listener(RunEnded(None, bool(self._parts), time.monotonic()))
        if self._pool is not None:
            bridge.call(self._pool.close())

    def _hear(self, part: _Part, event: RunEvent) -> None:
        """Pass on what the runs say as if they were one."""
        match event:
            case RunStarted():
                part.unsent = event.pending
                self._begun += event.rows
                self._known += event.rows - event.pending
                rows = max(self._rows, self._begun)
                event = replace(event, rows=rows, pending=rows - self._known)
            case RequestSent():
                part.unsent -= len(event.rows)
                if part.unsent <= 0:
                    self._wake()
            case RunEnded():
                return
        for listener in self._listeners:
            listener(event)


class _Part:
    """A frame under way."""

    def __init__(
        self, sheet: Sheet, call: Call, hear: Callable[[_Part, RunEvent], None], over: Callable[[object], None]
    ) -> None:
        self.sheet = sheet
        self.unsent = 1
        self.run: Run = sheet.start(call, [lambda event: hear(self, event)])
        self.run._job.add_done_callback(over)

    @property
    def sent(self) -> bool:
        """Whether all rows have been sent once."""
        return self.unsent <= 0 or self.run.done()
