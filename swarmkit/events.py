"""What happens in a run, as records.

A run's events go to plain callables, so the code that runs never imports the code that watches. Listeners are called
on the I/O thread, must be quick, and must not raise. What is slower, as the monitor, reads ``RunStats`` now and then.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .policy import Breaker
from .records import Failure

__all__ = [
    "Listener",
    "RequestEnded",
    "RequestSent",
    "RowFailed",
    "RowsDone",
    "RowsReused",
    "RunEnded",
    "RunEvent",
    "RunStarted",
]


@dataclass(frozen=True, slots=True)
class RunStarted:
    """A run begins.

    Attributes
    ----------
    rows : int
        Rows in the column.
    pending : int
        Rows that will be asked; the others failed before or were known already.
    endpoints : sequence of str
        Names of the endpoints, by index.
    routes : sequence of str
        How each endpoint is asked, by index.
    at_s : float
        Seconds on the run's clock.
    """

    rows: int
    pending: int
    endpoints: Sequence[str]
    routes: Sequence[str]
    at_s: float


@dataclass(frozen=True, slots=True)
class RequestSent:
    """A request goes out with these rows, to an endpoint with its breaker in this state; ``at_s`` in seconds on the
    run's clock."""

    ticket: int
    endpoint: int
    rows: Sequence[int]
    breaker: Breaker
    at_s: float


@dataclass(frozen=True, slots=True)
class RowsDone:
    """Rows have their answers; their columns are filled. ``alive``: endpoints that are given work."""

    ticket: int
    endpoint: int
    rows: Sequence[int]
    alive: int
    at_s: float


@dataclass(frozen=True, slots=True)
class RowsReused:
    """Rows are settled without having been asked: from a store, or like a row with the same prompt.

    ``failed`` of them share that row's error.
    """

    rows: Sequence[int]
    failed: int


@dataclass(frozen=True, slots=True)
class RequestEnded:
    """A request is over, with a failure or None; ``breaker``: the endpoint's, after that; ``dropped`` when nobody
    needed its rows any more."""

    ticket: int
    endpoint: int
    failure: Failure | None
    breaker: Breaker
    alive: int
    at_s: float
    dropped: bool = False


@dataclass(frozen=True, slots=True)
class RowFailed:
    """A row ends with an error."""

    row: int
    failure: Failure
    at_s: float


@dataclass(frozen=True, slots=True)
class RunEnded:
    """The run is over: ``failure`` is None when every row is settled. ``cancelled``: before its end."""

    failure: Failure | None
    cancelled: bool
    at_s: float


RunEvent = RunStarted | RequestSent | RowsDone | RowsReused | RequestEnded | RowFailed | RunEnded
Listener = Callable[[RunEvent], None]
