"""Rows that need not be sent: those answered in the store, and duplicate prompts within a run."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ..client import io_thread
from ..engine.columns import Columns
from ..engine.deadline import Deadline
from ..errors import SettingError
from ..pool.arrivals import Arrivals
from ..pool.vllm_pool import VLLMPool
from ..pool.watch import present
from ..records import Failure, Prompts, RequestSpec
from ..runs.events import Listener, RowFailed, RowsDone, RowsRetracted, RowsReused, RunEvent
from ..runs.listeners import Listeners
from ..runs.stats import RunStats
from .folder import Folder
from .keys import Keys
from .writer import Writer

__all__ = ["Dedup", "check_dedup", "duplicates_in", "have_one_answer", "run"]

_CHECK_S = 0.5
"""Seconds between two looks whether the store is still there."""

Dedup = Literal["auto"] | bool


def check_dedup(dedup: Dedup) -> Dedup:
    """Validate ``dedup=``."""
    if dedup not in ("auto", True, False):
        raise SettingError(f"dedup={dedup!r}: must be 'auto' (at temperature 0), True or False")
    return dedup


def have_one_answer(spec: RequestSpec, dedup: Dedup) -> bool:
    """Whether equal prompts have one answer: it is asked for once."""
    equal = spec.kind == "embeddings" or (spec.params.get("temperature") == 0 and spec.n == 1)
    return equal if dedup == "auto" else dedup


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
    parts: Sequence[Listener] = (),
    arrivals: Arrivals | None = None,
    priority: int = 0,
) -> Failure | None:
    """``pool.run`` for the rows that must be sent; the others are filled in.

    Parameters
    ----------
    store : Folder, optional
        Where finished rows are looked up, and written as they finish.
    dedup : {"auto", True, False}
        Whether duplicate prompts are sent once; "auto" does so at temperature 0 and for embeddings, where their answers
        are equal. Sampled answers to the same prompt are meant to differ.
    deadline : Deadline, optional
        When the run must be over.
    parts : sequence of callable
        Parts of the run, called before the listeners: what they raise ends it.
    arrivals : Arrivals, optional
        Where more rows come from while it goes on: they are looked up as those of ``pending`` are, with a store that is
        for several frames (``Folder.for_frames``).
    priority : int, default 0
        Which of the runs on a pool goes first: that with the lower number.
    """
    stats.rows += len(prompts.texts)
    stats.failed += len(prompts.errors)
    stats.skipped += len(prompts.errors)
    stats.max_tokens = 0 if spec.params.get("ignore_eos") else spec.max_tokens  # such answers never end by themselves
    still = await io_thread.run_on_loop(present(pool, stats))
    spec = await io_thread.run_on_loop(still.complete(spec))
    wanted = range(len(prompts.texts)) if pending is None else list(pending)
    stats.kept += len(prompts.texts) - len(wanted)
    guarded = Listeners(listeners, stats.listener_errors)
    informed: list[Listener] = [stats, *parts, guarded]
    known = _Known(still, spec, prompts, columns, stats, informed, store, dedup, in_parts=arrivals is not None)
    rows = await known.to_send(wanted)
    later = None if arrivals is None else _Later(arrivals, known)
    if later is not None and not rows:
        rows = await later.next()
    writer = store.writer() if store is not None and rows else None  # fails before a row is sent
    called = known.listeners(writer, later is not None)
    how: dict[str, Any] = {"parts": [*called, *parts], "deadline": deadline, "arrivals": later, "priority": priority}
    work = pool.run(known.prompts, spec, columns, [guarded], rows, stats, **how)
    return await (work if writer is None else _with_writer(work, writer))


class _Known:
    """Finds the rows that must be sent, and fills in the others: those with a stored answer, and those with the prompt
    of another row.

    It is asked once; or, with ``in_parts``, about some rows at a time.
    """

    def __init__(
        self,
        pool: VLLMPool,
        spec: RequestSpec,
        prompts: Prompts,
        columns: Columns,
        stats: RunStats,
        listeners: Sequence[Listener],
        store: Folder | None,
        dedup: Dedup,
        in_parts: bool,
    ) -> None:
        self._pool = pool
        self._spec = spec
        self._fits = set(prompts.fits)
        whole = not in_parts and spec.too_long != "error"  # texts will be cut, and these are the caller's own
        self.prompts = replace(prompts, texts=list(prompts.texts) if whole else prompts.texts, fits=self._fits)
        self._columns = columns
        self._stats = stats
        self._store = store
        self._same = have_one_answer(spec, dedup)
        self._first: dict[str, int] | None = {} if in_parts else None  # by prompt, the row that is asked
        self._keys: list[Keys] = []
        self._reuse = _Reuse(columns, listeners)

    async def to_send(self, rows: Iterable[int]) -> list[int]:
        """Those of some rows that must be sent."""
        found = [row for row in rows if self.prompts.texts[row] is not None]
        if self._spec.too_long != "error":
            await self._cut(found)
        if self._same:
            duplicates = duplicates_in(found, self.prompts, self._first)
            self._reuse.add(duplicates)
            skipped = {row for repeats in duplicates.values() for row in repeats}
            found = [row for row in found if row not in skipped]
        return found if self._store is None else await self._not_stored(self._store, found)

    def listeners(self, writer: Writer | None, later: bool) -> list[Listener]:
        """What must hear of the run's rows: what writes them, and what copies them. ``later``: more rows will come."""
        called: list[Listener] = []
        if writer is not None:
            spec, columns, keys, names = self._spec, self._columns, self._keys[0], self._stats.roster.names
            texts = self.prompts.texts if self._store is not None and self._store.store_prompts else None

            def write(event: RunEvent) -> None:
                if isinstance(event, RowsDone) and event.rows:
                    writer.write(spec, columns, event.rows, keys, names, texts)
                elif isinstance(event, RowsRetracted):
                    writer.retract(spec, event.rows, keys)

            called.append(write)  # first: a row is on its way to the disk before listeners are notified of it
        if self._reuse.duplicates or (later and self._same):
            called.append(self._reuse)
        return called

    async def _cut(self, rows: Sequence[int]) -> None:
        prompts, cut, context = await io_thread.run_on_loop(self._pool.fitted(self._spec, self.prompts, rows))
        for row in cut:
            self.prompts.texts[row] = prompts.texts[row]
        self._fits |= prompts.fits
        self._columns.truncated |= cut
        self._stats.truncated += len(cut)
        self._stats.context = context or 0

    async def _not_stored(self, store: Folder, rows: list[int]) -> list[int]:
        columns = self._columns
        await asyncio.to_thread(self._find_keys, store, rows)
        indexes = {e.name: self._stats.roster.place(e) for e in self._pool.endpoints}
        stored = await asyncio.to_thread(store.fill, columns, self._keys, rows, indexes)
        for row in await _with_room(self._pool, self._spec, self.prompts, columns, stored, rows):
            stored[row] = False
        if schema := self._spec.schema:  # validators of a pydantic model may have changed since
            for row in np.flatnonzero(stored).tolist():
                stored[row] = schema.problem(columns.text[row] or "") is None
        known = [row for row in rows if stored[row]]
        rows = [row for row in rows if not stored[row]]
        for row in [row for row in rows if columns.latency_s[row] >= 0]:
            columns.clear(row)  # stored in part, or cut: it is asked again as a whole
        self._reuse.found_in_store(known)
        return rows

    def _find_keys(self, store: Folder, rows: Sequence[int]) -> None:
        """Find the keys of these rows; of all, where they are not asked about in parts."""
        texts = self.prompts.texts
        if self._first is None:
            self._keys = store.keys(self._spec, texts, self._same)
            return
        found = store.keys(self._spec, [texts[row] for row in rows], self._same)
        self._keys = self._keys or [Keys.without(len(texts)) for _ in found]
        for keys, of_rows in zip(self._keys, found, strict=True):
            keys.put(rows, of_rows)


class _Later:
    """The rows that come into a run later, and must be sent."""

    def __init__(self, arrivals: Arrivals, known: _Known) -> None:
        self._arrivals = arrivals
        self._known = known

    @property
    def awaited(self) -> int:
        return self._arrivals.awaited

    async def next(self) -> list[int]:
        while rows := await self._arrivals.next():
            if rows := await self._known.to_send(rows):
                return rows
        return []


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
    pool: VLLMPool,
    spec: RequestSpec,
    prompts: Prompts,
    columns: Columns,
    stored: npt.NDArray[np.bool_],
    rows: Sequence[int],
) -> set[int]:
    """Rows whose stored answer was cut at a smaller limit than they would have now: they are asked again.

    The room next to a prompt is an estimate, which differs a little from run to run. A gain below a tenth is no
    reason, else such rows would be asked in every run.
    """
    cut: dict[int, int] = {}
    reasons, n = columns.finish_reason, columns.n
    slots = rows if n == 1 else [slot for row in rows for slot in range(row * n, row * n + n)]
    for slot in [slot for slot in slots if reasons[slot] == "length"]:
        row, length = slot // n, columns.completion_tokens[slot]
        if stored[row] and 0 <= length < spec.max_tokens:
            cut[row] = min(length, cut.get(row, length))
    if not cut:
        return set()
    rooms = await io_thread.run_on_loop(pool.rooms(spec, prompts, sorted(cut)))
    return {row for row, length in cut.items() if rooms.get(row, 0) > length * 1.1}


def duplicates_in(rows: Sequence[int], prompts: Prompts, first: dict[str, int] | None = None) -> dict[int, list[int]]:
    """The first row of each repeated prompt -> the rows that repeat it.

    ``first`` has the first row of each prompt of earlier rows, and gets those of these.
    """
    if first is None:
        if len(rows) == len({prompts.texts[row] for row in rows}):
            return {}
        first = {}
    duplicates: dict[int, list[int]] = {}
    for row in rows:
        text = prompts.texts[row] or ""
        if (earlier := first.setdefault(text, row)) != row:
            duplicates.setdefault(earlier, []).append(row)
    return duplicates


class _Reuse:
    """Copies a row's answer, or its error, to the rows with the same prompt."""

    def __init__(self, columns: Columns, listeners: Sequence[Listener]) -> None:
        self._columns = columns
        self.duplicates: dict[int, list[int]] = {}
        self._listeners = listeners
        self._retracted: set[int] = set()  # rows that listeners know to be reused, until their next answer

    def add(self, duplicates: Mapping[int, Sequence[int]]) -> None:
        """More rows have the prompts of others, whose answers may be there already."""
        for row, repeats in duplicates.items():
            self.duplicates.setdefault(row, []).extend(repeats)
            if row in self._columns.errors:
                self._fail(row, repeats)
            elif self._columns.is_settled(row):
                self._notify(self._copied(row, repeats))

    def __call__(self, event: RunEvent) -> None:
        match event:
            case RowsDone():
                self._copy(event.rows)
            case RowsRetracted(_, rows, _, _):
                for repeat in [repeat for row in rows for repeat in self.duplicates.get(row, ())]:
                    self._columns.clear(repeat)
                    self._retracted.add(repeat)
            case RowFailed(row, _, _):
                self._fail(row, self.duplicates.get(row, ()))

    def found_in_store(self, rows: Sequence[int]) -> None:
        """Rows have their answers from the store; copy these to their duplicates."""
        self._notify(rows, stored=True)
        self._copy(rows)

    def _copy(self, rows: Iterable[int]) -> None:
        """Copy the answers of rows to their duplicates."""
        copied: list[int] = []
        for row in rows:
            copied += self._copied(row, self.duplicates.get(row, ()))
        self._notify(copied)

    def _copied(self, row: int, repeats: Sequence[int]) -> list[int]:
        """Copy the answer of a row to some of its duplicates; return those of which listeners do not know."""
        for repeat in repeats:
            self._columns.copy(row, repeat)
        new = [repeat for repeat in repeats if repeat not in self._retracted]
        self._retracted.difference_update(repeats)
        return new

    def _fail(self, row: int, repeats: Sequence[int]) -> None:
        """Give the error of a row to some of its duplicates."""
        for repeat in repeats:
            if self._columns.text[row * self._columns.n] is not None:  # an answer that is not valid
                self._columns.copy(row, repeat)
            self._columns.fail(repeat, self._columns.errors[row], self._columns.endpoint[row])
        self._notify(repeats, len(repeats), row)

    def _notify(self, rows: Sequence[int], failed: int = 0, source: int | None = None, stored: bool = False) -> None:
        if rows:
            cost = self._columns.cost(() if failed else rows)
            event = RowsReused(rows, failed, source, stored, cost.prompt_tokens, cost.completion_tokens)
            for listener in self._listeners:
                listener(event)
