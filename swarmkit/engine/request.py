"""A request in flight, as the scheduler sees it."""

from __future__ import annotations

from dataclasses import dataclass

from ..records import Batch
from .queues import RetryBatch

__all__ = ["Request"]


@dataclass(slots=True)
class Request:
    """A request that has been sent and has not ended.

    Attributes
    ----------
    batch : Batch
        Its ticket, endpoint and rows.
    unfinished : set of int
        Rows that still need its answer.
    sent_at : float
        When it was sent, in seconds.
    retry_batch : RetryBatch or None
        What it retries; None for rows from the queues.
    resent : bool
        It repeats one that met a stale connection.
    is_probe : bool
        It has no row that needs an answer, but one that has it already, or the plain prompt: it shows whether the
        endpoint is healthy.
    counts : bool
        Nothing spoke against its rows when it was sent: it shows how often good ones fail.
    delivered : int
        Rows delivered so far.
    waited_s : float
        Sum of the seconds that these took.
    superseded : int
        Rows that need its answer no more, since another request had it first; its server still works on them.
    """

    batch: Batch
    unfinished: set[int]
    sent_at: float
    retry_batch: RetryBatch | None
    resent: bool
    is_probe: bool
    counts: bool
    delivered: int = 0
    waited_s: float = 0.0
    superseded: int = 0

    @property
    def suspect(self) -> bool:
        """Whether it tests suspect rows."""
        return self.retry_batch is not None and self.retry_batch.suspect

    @property
    def is_part(self) -> bool:
        """Whether it is a part of a refused batch."""
        return self.retry_batch is not None and bool(self.retry_batch.refused)
