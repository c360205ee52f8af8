"""One step of a pipeline while it runs: the rows that come to it, and what becomes of them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from ..engine.columns import UNKNOWN
from ..records import Failure, FailureKind, Prompts
from ..runs.events import (
    EndpointChanged,
    RowFailed,
    RowsDone,
    RowsRetracted,
    RowsReused,
    RunEnded,
    RunEvent,
    RunStarted,
)
from ..runs.stats import RunStats
from ..store.reuse import run as run_with_reuse
from .call import PreparedCall
from .steps import StepFrame

if TYPE_CHECKING:
    from .pipeline import _Pipeline

__all__ = ["StepRun", "gather_s"]

_LEAST_S, _MOST_S, _SHARE = 0.05, 5.0, 0.02
"""Seconds in which rows are gathered that go on together: this share of the time that the step has run, so that long
runs need few requests, and lose little."""


def gather_s(ran_s: float) -> float:
    """Seconds in which rows are gathered, when a pipeline has run for so many."""
    return min(max(_LEAST_S, _SHARE * ran_s), _MOST_S)


class StepRun:
    """A step that is running. It says which rows come to its run, and hears what becomes of them.

    Parameters
    ----------
    whole : _Pipeline
        The pipeline, which hears of all that happens.
    place : int
        Number of the step, from 0.
    frame, call
        The step's columns, and how it is asked.

    Attributes
    ----------
    awaited : int
        Rows that may still come; those that wait to be taken are among them.
    prompts : Prompts
        Those of the rows that have come.
    stats : RunStats
        The counts of its own runs.
    """

    def __init__(self, whole: _Pipeline, place: int, frame: StepFrame, call: PreparedCall) -> None:
        self._whole, self._place, self.frame, self.call = whole, place, frame, call
        self.stats = RunStats()
        frame.names = self.stats.roster.names
        self.prompts = Prompts([None] * len(frame.df))
        self.restart()

    def restart(self) -> None:
        """Begin a pass over all rows."""
        size = len(self.frame.df)
        self.awaited = size
        self._waiting: list[int] = []
        self._passed = bytearray(size)  # rows that this step is done with
        self._changed = asyncio.Event()
        self._began = time.monotonic()

    # ---- rows that come ------------------------------

    def put(self, rows: Iterable[int]) -> None:
        """Rows come that the steps before are done with."""
        self._waiting += rows
        self._changed.set()

    def drop(self, row: int, why: str) -> None:
        """A row does not come, since it failed before."""
        if self.frame.columns.is_settled(row):
            self._take_back(row)
        self.frame.unreached[row] = why
        self.awaited -= 1
        self._changed.set()

    def close(self) -> None:
        """No more rows come."""
        self.awaited = len(self._waiting)
        self._changed.set()

    async def next(self) -> list[int]:
        """The next rows of its run; none when no more will come."""
        while True:
            while self.awaited > 0 and not self._waiting:
                self._changed.clear()
                await self._changed.wait()
            if not self._waiting:
                return []
            if self.awaited > len(self._waiting):
                await asyncio.sleep(gather_s(time.monotonic() - self._began))
            rows, self._waiting = self._waiting, []
            self.awaited -= len(rows)
            if asked := await self._asked(rows):
                return asked

    async def _asked(self, rows: list[int]) -> list[int]:
        """Those of some rows that must be asked; the others go on, or fail."""
        frame, columns = self.frame, self.frame.columns
        found = await asyncio.to_thread(frame.asked, rows)
        frame.skipped.difference_update(rows)
        frame.skipped |= found.skipped
        for row in rows:
            frame.unreached.pop(row, None)
            text = found.texts.get(row)
            if columns.is_settled(row) and frame.made[row] != text:  # of an earlier pass; its prompt was another one
                self._take_back(row)
            frame.made[row] = self.prompts.texts[row] = text
        self._fail({row: error for row, error in found.errors.items() if not columns.is_settled(row)})
        self._whole.count_rows()
        self._pass_on([row for row in rows if row in found.skipped or columns.is_settled(row)])
        return [row for row in found.texts if not columns.is_settled(row)]

    def _fail(self, errors: Mapping[int, str]) -> None:
        """Rows fail before they are sent."""
        now = time.monotonic()
        for row, error in errors.items():
            self.frame.columns.fail(row, error)
            self._whole.emit(self._place, RowFailed(row, Failure(FailureKind.REJECTED, error), now))

    def _take_back(self, row: int) -> None:
        columns, why = self.frame.columns, "the answer that its prompt was made of was taken back"
        endpoint = columns.endpoint[row]
        if row in columns.errors:
            self._whole.stats.failed -= 1
        elif endpoint == UNKNOWN:
            self._whole.stats.stored -= 1
        else:
            self._whole.emit(self._place, RowsRetracted(endpoint, [row], why, time.monotonic()))
        columns.clear(row)

    # ---- what becomes of them ------------------------------

    def __call__(self, event: RunEvent) -> None:
        """Hear of an event of its run."""
        match event:
            case RunStarted():
                self._whole.began(self._place, event)
            case RunEnded():
                pass
            case _:
                self._whole.emit(self._place, event)
        match event:
            case RowsDone() | RowsReused() if event.rows:
                self._pass_on(event.rows)
            case RowFailed():
                self._pass_on([event.row])
            case RowsRetracted() if self._later and any(self._passed[row] for row in event.rows):
                self._whole.again = self._whole.unsure = True
            case EndpointChanged(index, "distrusted"):
                self._whole.distrusted.add(self.stats.roster.names[index])

    @property
    def _later(self) -> list[StepRun]:
        return self._whole.parts[self._place + 1 :]

    def _pass_on(self, rows: Iterable[int]) -> None:
        """Rows are done here: they go to the next step, or, where they failed, to none."""
        new = [row for row in rows if not self._passed[row]]
        later = self._later
        for row in new:
            self._passed[row] = 1
        errors = self.frame.columns.errors
        if later:
            later[0].put([row for row in new if row not in errors])
        for row in new:
            if row in errors:
                for part in later:
                    part.drop(row, f"not asked: the step {self.frame.name!r} failed: {errors[row]}")
        if any(row in errors for row in new):
            self._whole.count_rows()

    async def run(self) -> Failure | None:
        """Ask all rows that come."""
        call, distrusted = self.call, self._whole.distrusted
        how: dict[str, Any] = {"store": call.store, "dedup": call.dedup, "deadline": call.deadline}
        how |= {"parts": [self], "arrivals": self}
        if not (rows := await self.next()):
            return None
        believed = [place for place, e in enumerate(call.pool.endpoints) if e.name not in distrusted]
        pool = call.pool.select(believed) if distrusted and believed else call.pool  # few rows would not show it
        return await run_with_reuse(pool, self.prompts, call.spec, self.frame.columns, (), rows, self.stats, **how)

    def check(self) -> None:
        """Take back what does not follow from the earlier steps any more."""
        frame, settled = self.frame, self.frame.columns.is_settled
        rows = [row for row in range(len(frame.df)) if settled(row) or row in frame.skipped]
        now = frame.asked(rows)
        for row in rows:
            if not frame.holds(row, now):
                frame.skipped.discard(row)
                if settled(row):
                    self._take_back(row)
        frame.forget_unreached()
