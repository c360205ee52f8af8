"""Rows of several models in one call: a run for each model, seen from outside as one.

Models that are on different endpoints are asked side by side, those that share an endpoint one after another, so that
no endpoint is sent more than one run sends it.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import time
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import pandas as pd

from ..engine.columns import UNKNOWN, Columns
from ..errors import NoEndpointsError, SettingError
from ..pool.vllm_pool import VLLMPool
from ..records import Failure, FailureKind, Prompts
from ..runs.events import (
    Listener,
    RowFailed,
    RowsDone,
    RowsRetracted,
    RowsReused,
    RunEnded,
    RunEvent,
    RunStarted,
    renumbered,
)
from ..runs.listeners import Listeners
from ..runs.stats import RunStats
from .call import PreparedCall, Send
from .prompts import missing_in, unique_column, values_of

__all__ = ["sender"]


def sender(call: PreparedCall, df: pd.DataFrame) -> tuple[PreparedCall, Send]:
    """What a call's ``model=`` means for a frame, and what sends its rows: it is a model of that name; else a column of
    the frame; else a model that a server takes by a pattern.

    Raises
    ------
    SettingError
        It is none of these.
    """
    name = call.model
    if name is None:
        return call, call.send
    if isinstance(name, str) and name in df.columns and name not in call.pool.known_models():
        call = replace(call, pool=call.pool._still())
        return call, _RowModels(call, unique_column(df, name)).send
    try:
        pool = call.pool.by_model(name)
    except SettingError as exc:
        raise SettingError(f"{exc}; and no column of the frame is called so") from None
    call = replace(call, pool=pool, spec=replace(call.spec, model=pool.model or name))
    return call, call.send


@dataclass(slots=True)
class _Group:
    """The rows of one model, and the endpoints that have it."""

    model: str
    pool: VLLMPool
    rows: list[int] = field(default_factory=list)
    failure: Failure | None = None
    """Why no endpoint is left."""
    refused: SettingError | None = None
    """Which setting of the call they refuse."""


class _RowModels:
    """Who answers which row.

    Parameters
    ----------
    call : PreparedCall
        With the pool of all models.
    names : Series
        The model of each row.
    """

    def __init__(self, call: PreparedCall, names: pd.Series) -> None:
        self._call = call
        self._names = names

    def _groups(self, rows: Iterable[int]) -> tuple[list[_Group], dict[int, str]]:
        """The rows by model, and why others cannot be asked."""
        values, missing = values_of(self._names), missing_in(self._names)
        groups: dict[str, _Group] = {}
        errors: dict[int, str] = {}
        unknown: dict[str, str] = {}
        for row in rows:
            name = values[row] if isinstance(values[row], str) else repr(values[row])
            if missing[row]:
                errors[row] = f"missing value in column {self._names.name!r}, which names the model"
                continue
            if name not in groups and name not in unknown:
                try:
                    groups[name] = _Group(name, self._call.pool.by_model(name))
                except SettingError as exc:
                    unknown[name] = str(exc)
            if name in unknown:
                errors[row] = unknown[name]
            else:
                groups[name].rows.append(row)
        return list(groups.values()), errors

    async def send(
        self,
        prompts: Prompts,
        columns: Columns,
        listeners: Sequence[Listener],
        stats: RunStats,
        pending: Sequence[int] | None = None,
    ) -> Failure | None:
        """Send a column of prompts; see ``Send``. Where a model has no endpoint left, its rows fail."""
        rows = range(len(prompts.texts)) if pending is None else pending
        stats.rows += len(prompts.texts)
        stats.failed += len(prompts.errors)
        stats.skipped += len(prompts.errors)
        stats.kept += len(prompts.texts) - len(rows)
        asked = [row for row in rows if prompts.texts[row] is not None]
        groups, errors = self._groups(asked)
        whole = _Whole(self._call.pool, columns, stats, Listeners(listeners, stats.listener_errors), len(asked))
        locks = {e.url: asyncio.Lock() for e in self._call.pool.endpoints}
        whole.began()
        parts = [_Part(whole, group, number, len(groups)) for number, group in enumerate(groups)]
        tasks = [asyncio.ensure_future(self._send_part(part, prompts, locks)) for part in parts]
        error, cancelled = "", True
        try:
            for row, why in errors.items():
                whole.fail(row, why)
            await asyncio.gather(*tasks)
            cancelled = False
        except Exception as exc:
            error, cancelled = f"{type(exc).__name__}: {exc}", False
            raise
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            late = next((g.failure for g in groups if g.failure and g.failure.kind is FailureKind.DEADLINE), None)
            whole.emit(RunEnded(late, cancelled, time.monotonic(), error))
        if groups and not late and all(group.failure for group in groups):
            for group in groups:
                if group.refused:
                    raise group.refused
            return groups[0].failure
        for group in groups:
            if (failure := group.failure) is None or failure.kind is FailureKind.DEADLINE:
                continue
            why = f"no endpoint is left that has the model {group.model}: {failure.describe()}"
            if group.refused:
                why = f"model {group.model}: {failure.message}"
            for row in (r for r in group.rows if not columns.is_settled(r)):
                whole.fail(row, why)
        return late

    async def _send_part(self, part: _Part, prompts: Prompts, locks: Mapping[str, asyncio.Lock]) -> None:
        group = part.group
        texts: list[str | None] = [None] * len(prompts.texts)
        for row in group.rows:
            texts[row] = prompts.texts[row]
        spec = replace(self._call.spec, model=group.pool.model or group.model)
        call = replace(self._call, pool=group.pool, spec=spec)
        async with contextlib.AsyncExitStack() as stack:
            for endpoint in group.pool.endpoints:  # in the order of the whole pool: no two wait for each other
                await stack.enter_async_context(locks[endpoint.url])
            try:
                group.failure = await call.send(Prompts(texts), part.columns, [part], part.stats, group.rows)
            except NoEndpointsError as exc:
                group.failure = Failure(FailureKind.CONNECT, str(exc))
            except SettingError as exc:  # the rows of the other models go on
                group.failure, group.refused = Failure(FailureKind.REJECTED, str(exc)), exc
            finally:
                part.ended()


class _Whole:
    """The call as its listeners see it."""

    def __init__(self, pool: VLLMPool, columns: Columns, stats: RunStats, listeners: Listener, rows: int) -> None:
        self.columns = columns
        self.stats = stats
        self.indexes = {e.url: stats.roster.place(e) for e in pool.endpoints}
        self.pending = rows  # to be sent, as far as is known
        self._listeners = listeners

    def emit(self, event: RunEvent) -> None:
        self.stats(event)
        self._listeners(event)

    def began(self) -> None:
        self.stats.follow(self.columns)
        self.emit(self._started())

    def not_sent(self, rows: int) -> None:
        """So many rows need not be sent after all."""
        if rows:
            self.pending -= rows
            self._listeners(self._started())

    def _started(self) -> RunStarted:
        return RunStarted(self.columns.size, self.pending, self.stats.roster.names, (), time.monotonic())

    def fail(self, row: int, why: str) -> None:
        self.columns.fail(row, why)
        self.emit(RowFailed(row, Failure(FailureKind.REJECTED, why), time.monotonic()))


class _Part:
    """A listener of one model's run, which passes on its events with the numbers of the whole."""

    def __init__(self, whole: _Whole, group: _Group, number: int, parts: int) -> None:
        self.group = group
        self._whole, self._number, self._parts = whole, number, parts
        self._indexes = [whole.indexes[e.url] for e in group.pool.endpoints]
        self._started = False
        self.stats = RunStats()
        self.columns = copy.copy(whole.columns)  # the same columns, but for those that count endpoints and requests
        self.columns.endpoint = array("i", [UNKNOWN]) * whole.columns.size

    def __call__(self, event: RunEvent) -> None:
        match event:
            case RunStarted():
                for route in event.routes:
                    route = f"{self.group.model}: {route}"
                    self._whole.stats.routes[route] = self._whole.stats.routes.get(route, 0) + 1
                self._started = True
                self._whole.not_sent(len(self.group.rows) - event.pending)
                return
            case RunEnded():
                return
            case RowsDone() | RowsReused() | RowsRetracted():
                self._take_over(event.rows)
            case RowFailed():
                self._take_over((event.row,))
        self._whole.emit(
            renumbered(event, self._indexes.__getitem__, lambda ticket: ticket * self._parts + self._number)
        )

    def _take_over(self, rows: Iterable[int]) -> None:
        whole, part = self._whole.columns, self.columns
        for row in rows:
            index = part.endpoint[row]
            whole.endpoint[row] = index if index == UNKNOWN else self._indexes[index]
            whole.attempts[row] = part.attempts[row]

    def ended(self) -> None:
        """Its run is over."""
        if not self._started:
            self._whole.not_sent(len(self.group.rows))
        self._whole.stats.take_over(self.stats)
        if self.columns.late:  # of rows that were asked and have no answer there was no event
            self._whole.columns.late = self.columns.late
            self._take_over(row for row in self.group.rows if not self._whole.columns.is_settled(row))
        self._whole.stats.max_tokens = self.stats.max_tokens
