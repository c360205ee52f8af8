"""Rows that need not be sent: those answered in the store, and duplicate prompts within a run."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ..client import io_thread
from ..engine.columns import Columns
from ..engine.deadline import Deadline
from ..errors import SettingError
from ..pool.vllm_pool import VLLMPool
from ..pool.watch import present
from ..records import Failure, Prompts, RequestSpec
from ..runs.events import Listener, RowFailed, RowsDone, RowsRetracted, RowsReused, RunEvent
from ..runs.listeners import Listeners
from ..runs.stats import RunStats
from .folder import Folder
from .writer import Writer

__all__ = ["Dedup", "check_dedup", "duplicates_in", "run"]

_CHECK_S = 0.5
"""Seconds between two looks whether the store is still there."""

Dedup = Literal["auto"] | bool


def check_dedup(dedup: Dedup) -> Dedup:
    """Validate ``dedup=``."""
    if dedup not in ("auto", True, False):
        raise SettingError(f"dedup={dedup!r}: must be 'auto' (at temperature 0), True or False")
    return dedup


async def run(
    pool: VLLMPool,
    prompts: Prompts,
    spec: RequestSpec,
    columns: Columns,
    listeners: Sequence[Listener],
    pending: Iterable[int] | None,
    stats: RunStats,
    *,
    store: Folder | None = None,
    dedup: Dedup = "auto",
    deadline: Deadline | None = None,
    priority: int = 0,
) -> Failure | None:
    """``pool.run`` for the rows that must be sent; the others are filled in.

    Parameters
    ----------
    store : Folder, optional
        Where finished rows are looked up, and written as they finish.
    dedup : {"auto", True, False}
        Whether duplicate prompts are sent once; "auto" does so at temperature 0, where their answers are equal.
        Sampled answers to the same prompt are meant to differ.
    deadline : Deadline, optional
        When the run must be over.
    priority : int, default 0
        Which of the runs on a pool goes first: that with the lower number.
    """
    stats.rows += len(prompts.texts)
    stats.failed += len(prompts.errors)
    stats.max_tokens = 0 if spec.params.get("ignore_eos") else spec.max_tokens  # such answers never end by themselves
    still = await io_thread.run_on_loop(present(pool, stats))
    spec = await io_thread.run_on_loop(still.complete(spec))
    if pending is None:
        rows: Sequence[int] = range(len(prompts.texts))
    else:
        rows = list(pending)
        stats.kept += len(prompts.texts) - len(rows)
    rows = [r for r in rows if prompts.texts[r] is not None]
    if spec.too_long != "error":
        prompts, cut, context = await io_thread.run_on_loop(still.fitted(spec, prompts, rows))
        columns.truncated |= cut
        stats.truncated += len(cut)
        stats.context = context or 0
    same = spec.params.get("temperature") == 0 and spec.n == 1 if dedup == "auto" else dedup
    duplicates = duplicates_in(rows, prompts) if same else {}
    skipped = {row for repeats in duplicates.values() for row in repeats}
    rows = [r for r in rows if r not in skipped]
    guarded = Listeners(listeners, stats.listener_errors)
    reuse = _Reuse(columns, duplicates, [stats, guarded])
    parts: list[Listener] = []
    writer = None
    if store is not None:
        keys = await asyncio.to_thread(store.keys, spec, prompts.texts, same)
        indexes = {e.name: stats.roster.place(e) for e in still.endpoints}
        stored = await asyncio.to_thread(store.fill, columns, keys, rows, indexes)
        for row in await _with_room(still, spec, prompts, columns, stored):
            stored[row] = False
        if schema := spec.schema:  # validators of a pydantic model may have changed since
            for row in np.flatnonzero(stored).tolist():
                stored[row] = schema.problem(columns.text[row] or "") is None
        known = [row for row in rows if stored[row]]
        rows = [row for row in rows if not stored[row]]
        for row in [row for row in rows if columns.latency_s[row] >= 0]:
            columns.clear(row)  # stored in part, or cut: it is asked again as a whole
        reuse.found_in_store(known)
        if rows:  # a store that cannot be written is noticed before a row is sent
            writer = store.writer()
            texts = prompts.texts if store.store_prompts else None

            def write(event: RunEvent) -> None:
                if isinstance(event, RowsDone) and event.rows:
                    writer.write(spec, columns, event.rows, keys[0], stats.roster.names, texts)
                elif isinstance(event, RowsRetracted):
                    writer.retract(spec, event.rows, keys[0])

            parts.append(write)  # first: a row is on its way to the disk before listeners are notified of it
    if duplicates:
        parts.append(reuse)
    how: dict[str, Any] = {"parts": parts, "deadline": deadline, "priority": priority}
    work = pool.run(prompts, spec, columns, [guarded], rows, stats, **how)
    return await (work if writer is None else _with_writer(work, writer))


async def _with_writer(work: Coroutine[Any, Any, Failure | None], writer: Writer) -> Failure | None:
    """A run that ends when its store cannot be written any more, or is gone."""
    task = asyncio.ensure_future(work)
    try:
        while not task.done():
            await asyncio.wait([task], timeout=_CHECK_S)
            writer.check()
        return task.result()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)  # also if it is done: asyncio reports what nobody has seen
        await asyncio.wrap_future(writer.release())


async def _with_room(
    pool: VLLMPool, spec: RequestSpec, prompts: Prompts, columns: Columns, stored: npt.NDArray[np.bool_]
) -> set[int]:
    """Rows whose stored answer was cut at a smaller limit than they would have now: they are asked again.

    The room next to a prompt is an estimate, which differs a little from run to run. A gain below a tenth is no
    reason, else such rows would be asked in every run.
    """
    cut: dict[int, int] = {}
    for slot in [slot for slot, reason in enumerate(columns.finish_reason) if reason == "length"]:
        row, length = slot // columns.n, columns.completion_tokens[slot]
        if stored[row] and 0 <= length < spec.max_tokens:
            cut[row] = min(length, cut.get(row, length))
    if not cut:
        return set()
    rooms = await io_thread.run_on_loop(pool.rooms(spec, prompts, sorted(cut)))
    return {row for row, length in cut.items() if rooms.get(row, 0) > length * 1.1}


def duplicates_in(rows: Sequence[int], prompts: Prompts) -> dict[int, list[int]]:
    """The first row of each repeated prompt -> the rows that repeat it."""
    if len(rows) == len({prompts.texts[row] for row in rows}):
        return {}
    first: dict[str, int] = {}
    duplicates: dict[int, list[int]] = {}
    for row in rows:
        text = prompts.texts[row] or ""
        if (earlier := first.setdefault(text, row)) != row:
            duplicates.setdefault(earlier, []).append(row)
    return duplicates


class _Reuse:
    """Copies a row's answer, or its error, to the rows with the same prompt."""

    def __init__(self, columns: Columns, duplicates: dict[int, list[int]], listeners: Sequence[Listener]) -> None:
        self._columns = columns
        self._duplicates = duplicates
        self._listeners = listeners
        self._retracted: set[int] = set()  # rows that listeners know to be reused, until their next answer

    def __call__(self, event: RunEvent) -> None:
        match event:
            case RowsDone():
                self._copy(event.rows)
            case RowsRetracted(_, rows, _, _):
                for repeat in [repeat for row in rows for repeat in self._duplicates.get(row, ())]:
                    self._columns.clear(repeat)
                    self._retracted.add(repeat)
            case RowFailed(row, _, _):
                repeats = self._duplicates.get(row, [])
                for repeat in repeats:
                    if self._columns.text[row * self._columns.n] is not None:  # an answer that is not valid
                        self._columns.copy(row, repeat)
                    self._columns.fail(repeat, self._columns.errors[row], self._columns.endpoint[row])
                self._notify(repeats, len(repeats), row)

    def found_in_store(self, rows: Sequence[int]) -> None:
        """Rows have their answers from the store; copy these to their duplicates."""
        self._notify(rows, stored=True)
        self._copy(rows)

    def _copy(self, rows: Iterable[int]) -> None:
        """Copy the answers of rows to their duplicates."""
        copied: list[int] = []
        for row in rows:
            repeats = self._duplicates.get(row, ())
            for repeat in repeats:
                self._columns.copy(row, repeat)
            copied += [repeat for repeat in repeats if repeat not in self._retracted]
            self._retracted.difference_update(repeats)
        self._notify(copied)

    def _notify(self, rows: Sequence[int], failed: int = 0, source: int | None = None, stored: bool = False) -> None:
        if rows:
            cost = self._columns.cost(() if failed else rows)
            event = RowsReused(rows, failed, source, stored, cost.prompt_tokens, cost.completion_tokens)
            for listener in self._listeners:
                listener(event)
