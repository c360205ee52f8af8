"""When a run with a deadline stops sending: early enough that what is out is finished by then.

How long a request will take is what the recent ones took at the same endpoint, but for the slowest tenth of them, and a
margin. The clock is passed in.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from ..records import Failure, FailureKind

__all__ = ["Deadline", "LastSends", "request_s"]

_RECENT = 32  # requests: by that many the estimate follows a server that becomes slower
_HIGH = 0.9  # the quantile
_MARGIN, _LEAST_S = 1.1, 0.05

Took = tuple[int, float]
"""Rows of a request, and seconds until all of them were answered."""


def request_s(recent: Sequence[Took]) -> float:
    """Seconds to allow for one more request like these; 0 where there are none.

    The time of nine in ten, and a margin. Requests with fewer than half the rows of the largest do not count: a row
    that was asked again alone says nothing about a hundred.

    Examples
    --------
    >>> round(request_s([(100, 10.0), (100, 20.0), (1, 0.1)]), 2)
    22.05
    """
    most = max((rows for rows, _ in recent), default=0)
    seconds = sorted(s for rows, s in recent if 2 * rows >= most)
    return _MARGIN * seconds[math.ceil(_HIGH * len(seconds)) - 1] + _LEAST_S if seconds else 0.0


@dataclass(slots=True)
class Deadline:
    """When a call must be over. Its runs (frames in turn, levels of a tree, models) share one of these.

    Attributes
    ----------
    at : float
        Seconds on the clock of its runs.
    shown : str
        The same for people, as "18:00:00".
    recent : deque of (int, float)
        What the last requests of all its runs took: for endpoints that have none of their own yet.
    """

    at: float
    shown: str
    recent: deque[Took] = field(default_factory=lambda: deque(maxlen=_RECENT))

    @property
    def failure(self) -> Failure:
        """What a run ends with that the deadline has ended, and the error of the rows that were not asked."""
        return Failure(FailureKind.DEADLINE, f"the deadline {self.shown} was reached")

    @property
    def closes_at(self) -> float:
        """When an endpoint of which nothing is known is sent nothing more."""
        return self.at - request_s(self.recent)


class LastSends:
    """When each endpoint of a run is sent its last request.

    Examples
    --------
    >>> last = LastSends(Deadline(60.0, "18:00:00"))
    >>> last.closes_at(0)
    60.0
    >>> last.took(0, rows=100, seconds=9.5)
    >>> last.closes_at(0), last.closes_at(1)
    (49.5, 49.5)
    """

    def __init__(self, deadline: Deadline) -> None:
        self.deadline = deadline
        self._recent: dict[int, deque[Took]] = {}  # by endpoint
        self._closes_at: dict[int, float] = {}

    def closes_at(self, index: int) -> float:
        """When an endpoint is sent nothing more, as far as is known by now."""
        own = self._closes_at.get(index)
        return self.deadline.closes_at if own is None else own

    def latest(self, indexes: Iterable[int]) -> float:
        """When all of these endpoints are sent nothing more."""
        return max(map(self.closes_at, indexes), default=self.deadline.at)

    def rows(self, rate: float, now: float) -> int:
        """Rows that an endpoint finishes before the deadline, at so many a second."""
        return int(rate * max(0.0, self.deadline.at - now) / _MARGIN)

    def took(self, index: int, rows: int, seconds: float) -> None:
        """A request with so many rows was answered in full."""
        recent = self._recent.setdefault(index, deque(maxlen=_RECENT))
        recent.append((rows, seconds))
        self.deadline.recent.append((rows, seconds))
        self._closes_at[index] = self.deadline.at - request_s(recent)
