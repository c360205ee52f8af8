"""What happens in a run, as records.

Events go to plain callables, so the code that runs never imports the code that watches. They are called on the I/O
thread and must be quick. What is slower, as the monitor, reads ``RunStats`` from a thread of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from ..engine.breaker import Breaker
from ..records import Failure, FailureKind, Usage
from ..text import duration

__all__ = [
    "EndpointChanged",
    "Listener",
    "RequestEnded",
    "RequestSent",
    "RouteChanged",
    "RowFailed",
    "RowInvalid",
    "RowsDone",
    "RowsRetracted",
    "RowsReused",
    "RunEnded",
    "RunEvent",
    "RunStarted",
    "RunWaits",
    "renumbered",
]


@dataclass(frozen=True, slots=True)
class RunStarted:
    """A run begins.

    Attributes
    ----------
    rows : int
        Rows in the column.
    pending : int
        Rows that will be sent; the others failed before or have their answers already.
    endpoints : sequence of str
        Names of the endpoints, by index.
    routes : sequence of str
        The route to each endpoint, by index.
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
    """A request is sent.

    Attributes
    ----------
    ticket : int
        The request's number within the run, from 0.
    endpoint : int
        Index of the endpoint.
    rows : sequence of int
        Row positions.
    breaker : Breaker
        State of the endpoint's breaker.
    at_s : float
        Seconds on the run's clock.
    attempts : bytes
        By row of ``rows``: which request this is for it, from 1, 255 at most.
    """

    ticket: int
    endpoint: int
    rows: Sequence[int]
    breaker: Breaker
    at_s: float
    attempts: bytes

    @property
    def resent(self) -> bool:
        """Whether one of its rows was sent before."""
        return self.attempts.count(1) != len(self.attempts)


@dataclass(frozen=True, slots=True)
class RowsDone:
    """Rows have their answers; their columns are filled. ``alive``: endpoints that are sent requests; ``usage``: what
    a whole reply has cost whose server does not tell that for each row."""

    ticket: int
    endpoint: int
    rows: Sequence[int]
    alive: int
    at_s: float
    usage: Usage | None = None


@dataclass(frozen=True, slots=True)
class RowsRetracted:
    """Answers of an endpoint are taken back, for the reason ``why``. The rows are sent again, and end as any others."""

    endpoint: int
    rows: Sequence[int]
    why: str
    at_s: float


@dataclass(frozen=True, slots=True)
class RowsReused:
    """Rows are settled without a request: from a store, or because another row has the same prompt.

    Attributes
    ----------
    rows : sequence of int
        Row positions.
    failed : int
        How many of them share the error of the other row.
    source : int or None
        That other row, where all of ``rows`` have its prompt.
    stored : bool
        They are from a store.
    prompt_tokens, completion_tokens : int
        What the answers have cost, or would have cost, where that is known.
    """

    rows: Sequence[int]
    failed: int
    source: int | None = None
    stored: bool = False
    prompt_tokens: int = 0
    completion_tokens: int = 0


@dataclass(frozen=True, slots=True)
class RequestEnded:
    """A request is over.

    Attributes
    ----------
    ticket, endpoint : int
        The request's number, and the index of its endpoint.
    failure : Failure or None
        None where it was answered in full, or dropped.
    breaker : Breaker
        The endpoint's, after that.
    alive : int
        Endpoints that are sent requests.
    at_s : float
        Seconds on the run's clock.
    dropped : bool
        It was cancelled, since all of its rows have their answers from elsewhere, or the run ends.
    unfinished : sequence of int
        The rows that it leaves without an answer.
    again : sequence of int
        Those of ``unfinished`` that are still wanted; the others end with an error.
    posted_at_s, first_token_at_s, first_row_at_s : float or None
        When it was posted, after what is checked before; when the first token came, and the first row was whole. On the
        run's clock; None where the answers came as a whole, or none did.
    """

    ticket: int
    endpoint: int
    failure: Failure | None
    breaker: Breaker
    alive: int
    at_s: float
    dropped: bool = False
    unfinished: Sequence[int] = ()
    again: Sequence[int] = ()
    posted_at_s: float | None = None
    first_token_at_s: float | None = None
    first_row_at_s: float | None = None


@dataclass(frozen=True, slots=True)
class EndpointChanged:
    """An endpoint gets no requests for a while, is lost, is not believed, or is back; or the pool changes.

    Attributes
    ----------
    endpoint : int
        Its index.
    state : {"paused", "lost", "distrusted", "back", "added", "removed"}
        "paused": its breaker is open. "lost": it denied all requests, and is sent no more. "distrusted": it gives the
        same answer to every prompt, and other endpoints have answered these otherwise. "back": it has answered.
        "added": it takes part from now on; its index may be a new one. "removed": it has left the pool.
    failure : Failure or None
        The one that made it so; None when it is back.
    at_s : float
        Seconds on the run's clock.
    """

    endpoint: int
    state: Literal["paused", "lost", "distrusted", "back", "added", "removed"]
    failure: Failure | None
    at_s: float


@dataclass(frozen=True, slots=True)
class RouteChanged:
    """An endpoint came with another chat template than its rows were wrapped in: they take this route from now on."""

    endpoint: int
    route: str
    at_s: float


@dataclass(frozen=True, slots=True)
class RunWaits:
    """No endpoint is up: the run tries them again until one answers, or until it gives up.

    Attributes
    ----------
    until_s : float
        When it gives up, in seconds on the run's clock.
    failure : Failure
        What was seen last.
    at_s : float
        Seconds on the run's clock.
    """

    until_s: float
    failure: Failure
    at_s: float

    def describe(self) -> str:
        """One line for a person."""
        return f"no endpoint answers; retrying for another {duration(self.until_s - self.at_s)}"


@dataclass(frozen=True, slots=True)
class RowInvalid:
    """A row's answer is not what the schema asks for.

    Attributes
    ----------
    row, endpoint : int
        Its position, and the index of the endpoint that answered.
    problem : str
        What is wrong with it.
    again : bool
        It is asked again; otherwise the row fails.
    prompt_tokens, completion_tokens : int
        What the answer has cost, where the server said and the request's ``RowsDone`` does not count it.
    at_s : float
        Seconds on the run's clock.
    """

    row: int
    endpoint: int
    problem: str
    again: bool
    prompt_tokens: int
    completion_tokens: int
    at_s: float


@dataclass(frozen=True, slots=True)
class RowFailed:
    """A row ends with an error."""

    row: int
    failure: Failure
    at_s: float


@dataclass(frozen=True, slots=True)
class RunEnded:
    """The run is over.

    Attributes
    ----------
    failure : Failure or None
        The last failure, if no endpoint is left; or the deadline, if that has ended it.
    cancelled : bool
        The run was cancelled.
    at_s : float
        Seconds on the run's clock.
    error : str
        The exception that ended it, as a store's; else empty.
    """

    failure: Failure | None
    cancelled: bool
    at_s: float
    error: str = ""

    @property
    def why(self) -> str:
        """What ended it before all rows were done; empty where they were, or where it was cancelled."""
        if self.error or self.failure is None:
            return self.error
        of_endpoints = self.failure.kind is not FailureKind.DEADLINE
        return f"no endpoint is left: {self.failure.describe()}" if of_endpoints else self.failure.message


RunEvent = (
    RunStarted
    | RequestSent
    | RowsDone
    | RowsRetracted
    | RowsReused
    | RequestEnded
    | EndpointChanged
    | RouteChanged
    | RunWaits
    | RowInvalid
    | RowFailed
    | RunEnded
)
Listener = Callable[[RunEvent], None]


def renumbered(
    event: RunEvent, endpoint: Callable[[int], int], ticket: Callable[[int], int], first: int = 0
) -> RunEvent:
    """An event of a part of a run with the numbers of the whole, whose rows of this part are counted from ``first``."""
    changes: dict[str, Any] = {}
    for name, number in (("endpoint", endpoint), ("ticket", ticket)):
        if hasattr(event, name):
            changes[name] = number(getattr(event, name))
    if first:
        for name in ("row", "source"):
            if (row := getattr(event, name, None)) is not None:
                changes[name] = first + row
        for name in ("rows", "unfinished", *(["again"] if isinstance(event, RequestEnded) else [])):
            if rows := getattr(event, name, ()):
                changes[name] = [first + row for row in rows]
    return replace(event, **changes) if changes else event
