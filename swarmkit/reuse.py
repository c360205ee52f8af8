"""Rows that need no asking: answered in the store, or the same as another row of this run."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from typing import Literal

from . import bridge
from .errors import SettingError
from .events import Listener, RowFailed, RowsDone, RowsReused, RunEvent
from .records import Ask, Failure, Prompts
from .results import Columns
from .stats import RunStats
from .store import Store
from .vllm_pool import VLLMPool

__all__ = ["Dedup", "check_dedup", "run"]

Dedup = Literal["auto"] | bool


def check_dedup(dedup: Dedup) -> Dedup:
    """Let through what ``dedup=`` takes."""
    if dedup not in ("auto", True, False):
        raise SettingError(f"dedup={dedup!r}: must be 'auto' (at temperature 0), True or False")
    return dedup


async def run(
    pool: VLLMPool,
    prompts: Prompts,
    ask: Ask,
    columns: Columns,
    listeners: Sequence[Listener],
    pending: Iterable[int] | None,
    stats: RunStats,
    *,
    store: Store | None = None,
    dedup: Dedup = "auto",
) -> Failure | None:
    """``pool.run`` for the rows that must be asked, with the others filled in.

    Parameters
    ----------
    store : Store, optional
        Where finished rows are looked up, and written as they finish.
    dedup : {"auto", True, False}
        Whether identical prompts go out once: "auto" where their answers are the same by themselves, at temperature
        0. Sampled answers to the same prompt are meant to differ.
    """
    stats.rows += len(prompts.texts)
    stats.failed += len(prompts.errors)
    ask = await bridge.hop(pool.complete(ask))
    rows = range(len(prompts.texts)) if pending is None else pending
    rows = [r for r in rows if prompts.texts[r] is not None]
    same = ask.params.get("temperature") == 0 and ask.n == 1 if dedup == "auto" else dedup
    twins = _twins(rows, prompts) if same else {}
    hidden = {t for twin in twins.values() for t in twin}
    rows = [r for r in rows if r not in hidden]
    reuse = _Reuse(columns, twins, [stats, *listeners])
    watching: list[Listener] = [*listeners]
    names = [e.name for e in pool.endpoints]
    if store is not None:
        keys = store.keys(ask, prompts.texts, same)
        wanted = {keys[r]: r for r in rows}
        indexes = {name: i for i, name in enumerate(names)}
        known = await asyncio.to_thread(store.fill, columns, wanted, indexes)
        reuse.found(sorted(known))
        rows = [r for r in rows if r not in known]

        def write(event: RunEvent) -> None:
            if isinstance(event, RowsDone) and event.rows:
                store.write(ask, columns, event.rows, keys, names)

        watching.insert(0, write)  # before anybody sees a row it is safe
    if twins:
        watching.insert(0 if store is None else 1, reuse)
    try:
        return await pool.run(prompts, ask, columns, watching, rows, stats)
    finally:
        if store is not None:
            store.close()


def _twins(rows: Sequence[int], prompts: Prompts) -> dict[int, list[int]]:
    """The first row of each repeated prompt, with the rows that repeat it."""
    if len(rows) == len({prompts.texts[row] for row in rows}):
        return {}
    first: dict[str, int] = {}
    twins: dict[int, list[int]] = {}
    for row in rows:
        text = prompts.texts[row] or ""
        if (earlier := first.setdefault(text, row)) != row:
            twins.setdefault(earlier, []).append(row)
    return twins


class _Reuse:
    """Copies a row's answer, or its error, to the rows with the same prompt."""

    def __init__(self, columns: Columns, twins: dict[int, list[int]], listeners: Sequence[Listener]) -> None:
        self._columns = columns
        self._twins = twins
        self._listeners = listeners

    def __call__(self, event: RunEvent) -> None:
        match event:
            case RowsDone(_, _, rows, _, _):
                self.found(rows, themselves=False)
            case RowFailed(row, _, _):
                twins = self._twins.get(row, [])
                for twin in twins:
                    self._columns.fail(twin, self._columns.errors[row], self._columns.endpoint[row])
                self._tell(twins, len(twins))

    def found(self, rows: Iterable[int], themselves: bool = True) -> None:
        """Rows have answers (``themselves``: without having been asked); so have their twins."""
        reused: list[int] = []
        for row in rows:
            twins = self._twins.get(row, ())
            for twin in twins:
                self._columns.copy(row, twin)
            reused += [row, *twins] if themselves else twins
        self._tell(reused, 0)

    def _tell(self, rows: Sequence[int], failed: int) -> None:
        if rows:
            for listener in self._listeners:
                listener(RowsReused(rows, failed))
