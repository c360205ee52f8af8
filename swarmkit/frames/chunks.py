"""A scatter over many frames in turn, without a gap between them and without all of them in memory.

Each frame is a run of its own. Most of a large swarm is idle while a run waits for its slowest rows; so the next run
starts when the newest has sent its last unsent row.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import queue
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import TypeVar

import pandas as pd

from ..client import io_thread
from ..errors import NoEndpointsError, ScatterError, StoreError, warn
from ..runs.events import RequestSent, RowsReused, RunEnded, RunEvent, RunStarted
from ..runs.failure_summary import FailureSummary
from ..runs.listeners import Listeners
from ..runs.run import RUN_AGAIN, Run, lacking, started
from ..runs.stats import RunStats
from ..text import plural
from .call import PreparedCall
from .scatter import ScatterFrame

__all__ = ["MAX_CHUNKS", "ChunkedScatter"]

T = TypeVar("T")

MAX_CHUNKS = 3
"""Frames that run at once; one more is read ahead."""
_FEW_ROWS = 1024

_COUNTS = (
    *("rows", "answered", "reused", "stored", "kept", "failed", "skipped", "not_asked"),
    *("cut", "truncated", "requests", "failed_requests"),
    *("invalid", "repaired", "given_up"),
    *("prompt_tokens", "completion_tokens", "_counted"),
    *("reused_prompt_tokens", "reused_completion_tokens", "stored_prompt_tokens", "stored_completion_tokens"),
)


class ChunkedScatter:
    """An iterator, to be used once: a frame of answers for every frame, in their order.

    Parameters
    ----------
    frames : iterable of DataFrame
        Read in the thread that iterates, at most ``MAX_CHUNKS + 1`` frames ahead of what was yielded.
    prepare : callable
        Makes a frame's ``ScatterFrame``; of what else ``frames`` holds, too.
    call : PreparedCall
        What is asked of every row.
    rows : int, default 0
        Rows of all frames together, for the bar; 0 if not known: the bar then counts those read so far.
    small : int, optional
        Frames that run at once, in place of ``MAX_CHUNKS``, while those behind the first have few rows together.

    Attributes
    ----------
    stats : RunStats
        Counts of the frames yielded so far, and the seconds since the start.
    causes : FailureSummary
        Why rows failed.
    """

    def __init__(
        self,
        frames: Iterable[T],
        prepare: Callable[[T], ScatterFrame],
        call: PreparedCall,
        rows: int = 0,
        small: int = MAX_CHUNKS,
    ) -> None:
        self._small = small
        self._prepared = map(_as_part, map(prepare, frames))
        self._ready: ScatterFrame | None = None
        self._whole = call
        store = None if call.store is None else call.store.for_frames()
        self._call = replace(call, progress=False, owned=False, monitor=False, on_error="column", store=store)
        self._chunks: deque[_Chunk] = deque()
        self._changes: queue.SimpleQueue[None] = queue.SimpleQueue()  # its put may be called in a signal handler
        self._stopped = False
        self._late = ""  # the error of the rows that the deadline leaves, once it does
        self._rows, self._started, self._known = rows, 0, 0
        self._newest: RunStarted | None = None
        self.stats = RunStats()
        self._listeners = Listeners(call.listeners("scatter", self.stats), self.stats.listener_errors)
        self.causes = FailureSummary()

    def __iter__(self) -> Iterator[pd.DataFrame]:
        began = time.monotonic()
        try:
            self._ready = next(self._prepared, None)
            while (self._ready or self._chunks) and not self._stopped:
                if self._chunks and self._chunks[0].run.done():
                    frame = self._settle(self._chunks[0])
                    self.stats.time_s = time.monotonic() - began
                    yield frame
                elif self._ready and self._is_late():
                    if self._chunks:  # these go first
                        self._changes.get()
                        continue
                    ready, self._ready = self._ready, next(self._prepared, None)
                    yield self._left(ready)
                elif self._ready and self._may_start():
                    started(self._start, self._ready)
                    self._ready = None
                    self._ready = next(self._prepared, None)  # which may be refused
                else:
                    self._changes.get()
            self._close_store()
        finally:
            self._end(began)

    def _close_store(self) -> None:
        if self._call.store is not None:
            self._call.store.close()

    def _is_late(self) -> bool:
        """Whether no more frames are started, since their requests could not end before the deadline."""
        deadline = self._call.deadline
        if deadline is not None and not self._late and time.monotonic() >= deadline.closes_at:
            self._late = deadline.failure.describe()
        return bool(self._late)

    def _left(self, prepared: ScatterFrame) -> pd.DataFrame:
        """A frame for which no time is left."""
        asked = range(prepared.columns.size) if prepared.pending is None else prepared.pending
        left = sum(prepared.prompts.texts[row] is not None for row in asked)
        self.stats.rows += prepared.columns.size
        self.stats.kept += prepared.columns.size - len(asked)
        self.stats.failed += len(asked) - left
        self.stats.not_asked += left
        frame = prepared.frame(self._late)
        self.causes.add(prepared.errors())
        return self._accepted(frame)

    def _accepted(self, frame: pd.DataFrame) -> pd.DataFrame:
        """A frame that is due.

        Raises
        ------
        ScatterError
            Rows have no answer, and the call wants to be told so.
        """
        if self._late and self._call.deadline is not None:
            self.stats.deadline = self._call.deadline.failure.message
        left = [f"{self.stats.left()}. {RUN_AGAIN}"] if self.stats.deadline else []
        failed = [self.causes.text(plural(self.stats.rows, "row"))] if self.causes.count else []
        if (failed or left) and self._whole.on_error == "raise":
            raise ScatterError("\n".join([*failed, *left]), frame)
        return frame

    def _may_start(self) -> bool:
        chunks = self._chunks
        if self._small > MAX_CHUNKS and sum(chunk.prepared.columns.size for chunk in list(chunks)[1:]) < _FEW_ROWS:
            return not chunks or (len(chunks) < self._small and chunks[0].sent)  # what it has learned, others know
        return not chunks or (len(chunks) < MAX_CHUNKS and chunks[-1].sent)

    def _start(self, ready: ScatterFrame) -> None:
        self._chunks.append(_Chunk(ready, self._call, self._notify, self._changed))

    def stop(self) -> None:
        """End the iteration; requests are cancelled. Returns at once, and may be called by a signal handler."""
        self._stopped = True
        self._changed()

    def _changed(self, _: object = None) -> None:
        self._changes.put(None)

    def rest(self, unfinished: str, waiting: bool = True) -> Iterator[pd.DataFrame]:
        """After an early end, the frames that were not yielded, with the answers so far; then those that never ran.

        Parameters
        ----------
        unfinished : str
            The error of rows without an answer.
        waiting : bool, default True
            Whether to read and yield the frames that never ran.
        """
        yield from self._unfinished(unfinished)
        if waiting:
            for prepared in self._prepared:
                yield prepared.frame(unfinished)

    @property
    def holds_frames(self) -> bool:
        """Whether frames are in memory that were not yielded."""
        return bool(self._chunks or self._ready)

    def partial(self, unfinished: str) -> pd.DataFrame:
        """The frames in memory as one, with the answers so far."""
        # The frames may share labels, also where each by itself forbids that.
        return pd.concat([f.set_flags(allows_duplicate_labels=True) for f in self._unfinished(unfinished)])

    def _unfinished(self, unfinished: str) -> Iterator[pd.DataFrame]:
        for prepared in [*(chunk.prepared for chunk in self._chunks), *([self._ready] if self._ready else [])]:
            yield prepared.frame(unfinished)

    def _settle(self, chunk: _Chunk) -> pd.DataFrame:
        try:
            frame = chunk.run.settled()
        except NoEndpointsError as exc:
            exc.frame = self.partial("no endpoint was left")
            raise
        except StoreError as exc:
            exc.frame = self.partial("not finished: the store failed")
            raise
        self._chunks.popleft()
        self._count(chunk)
        self._late = self._late or chunk.run.left_over()
        self.causes.add(chunk.prepared.errors())
        return self._accepted(frame)

    def _count(self, chunk: _Chunk) -> None:
        for name in _COUNTS:
            setattr(self.stats, name, getattr(self.stats, name) + getattr(chunk.run.stats, name))
        self.stats.routes = chunk.run.stats.routes or self.stats.routes
        for name in ("max_tokens", "context"):
            setattr(self.stats, name, max(getattr(self.stats, name), getattr(chunk.run.stats, name)))
        self.stats.samples = max(self.stats.samples, chunk.run.stats.samples)

    def _end(self, began: float) -> None:
        for chunk in self._chunks:
            chunk.run.cancel()
        concurrent.futures.wait([chunk.run._job for chunk in self._chunks], io_thread.GRACE_S)
        for chunk in self._chunks:
            self._count(chunk)
        self.stats.time_s = time.monotonic() - began  # before the bar says it
        self._listeners(RunEnded(None, bool(self._chunks), time.monotonic()))
        self._whole.close()
        with contextlib.suppress(StoreError):  # which has been raised before
            self._close_store()
        for line in [*self.stats.listener_errors, lacking(self.stats)]:
            if line:
                warn(line)

    def _notify(self, chunk: _Chunk, event: RunEvent) -> None:
        """Notify the listeners of the runs' events as if they were of one run."""
        match event:
            case RunStarted():
                # It comes again where fewer rows turn out to be sent.
                rows, pending = chunk.began or (0, 1)
                chunk.began = event.rows, event.pending
                chunk.unsent += event.pending - pending
                self._started += event.rows - rows
                self._known += (event.rows - event.pending) - (rows - pending if rows else 0)
                event = self._newest = self._as_one(event)
            case RowsReused() if chunk.began is None:  # from the store. If all of them are, its run does not start
                chunk.reused += len(event.rows)
                size = chunk.prepared.columns.size
                if chunk.reused + len(chunk.prepared.not_sent()) == size:
                    self._started += size
                    self._known += size
                    if self._newest is not None:
                        event = self._as_one(self._newest)
            case RequestSent():
                chunk.unsent -= len(event.rows)
                if chunk.unsent <= 0:
                    self._changed()
            case RunEnded():
                return
        self._listeners(event)

    def _as_one(self, event: RunStarted) -> RunStarted:
        rows = max(self._rows, self._started)
        return replace(event, rows=rows, pending=rows - self._known)


def _as_part(prepared: ScatterFrame) -> ScatterFrame:
    prepared.is_part = True
    return prepared


class _Chunk:
    """A frame that is running."""

    def __init__(
        self,
        prepared: ScatterFrame,
        call: PreparedCall,
        notify: Callable[[_Chunk, RunEvent], None],
        done: Callable[[object], None],
    ) -> None:
        self.prepared = prepared
        self.unsent = 1
        self.reused = 0
        self.began: tuple[int, int] | None = None
        self.run: Run = prepared.start(call, [lambda event: notify(self, event)])
        self.run._warned_of_constraints = True  # the iterator warns, once for all frames
        self.run._job.add_done_callback(done)

    @property
    def sent(self) -> bool:
        """Whether all rows have been sent once."""
        return self.unsent <= 0 or self.run.done()
