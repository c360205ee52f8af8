"""Rows that come into a run while it goes on, as those of a pipeline's later steps do."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Protocol

from .executor import Executor

__all__ = ["Arrivals", "joining"]


class Arrivals(Protocol):
    """Where a run gets rows from that were not known when it began.

    Attributes
    ----------
    awaited : int
        Rows that may still come.
    """

    @property
    def awaited(self) -> int:
        """As above."""
        ...

    async def next(self) -> list[int]:
        """The next rows, whose texts are known now; none when no more will come."""
        ...


@contextlib.asynccontextmanager
async def joining(
    arrivals: Arrivals | None,
    executor: Executor,
    laid_out: Callable[[Sequence[int]], Awaitable[tuple[Sequence[int], Mapping[int, int]] | None]],
) -> AsyncIterator[None]:
    """Hand rows to a run, while it lasts, as they come.

    Parameters
    ----------
    arrivals : Arrivals, optional
        Where they come from.
    executor : Executor
        Of the run.
    laid_out : callable
        Gives them in the order in which they are sent, and the budgets of those with a limited one; or None: this run
        asks neither them nor any that come later.
    """
    if arrivals is None:
        yield
        return

    async def join() -> None:
        while (rows := await arrivals.next()) and (laid := await laid_out(rows)):
            executor.join(*laid, arrivals.awaited)
        executor.join((), {}, 0)

    task = asyncio.create_task(join())
    task.add_done_callback(executor.over_by_bug)
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
