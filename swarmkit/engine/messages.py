"""What goes into the scheduler (events), and what comes out of it (messages)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..records import Batch, Failure

__all__ = [
    "Added",
    "Delivered",
    "Distrusted",
    "Drop",
    "Ended",
    "Event",
    "Failed",
    "Joined",
    "Message",
    "Removed",
    "Send",
    "Settle",
    "Stop",
    "Tick",
    "Wake",
]


@dataclass(frozen=True, slots=True)
class Delivered:
    """Rows of a request are complete, and those in ``invalid`` came, but are not what was asked for: they are asked
    again, each alone. The request goes on."""

    ticket: int
    rows: Sequence[int]
    invalid: Sequence[int] = ()


@dataclass(frozen=True, slots=True)
class Ended:
    """A request is over and all its rows were delivered; it has cost so many tokens, where that is known."""

    ticket: int
    tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Failed:
    """A request is over; the rows not delivered so far are unfinished, and so are delivered ones that are retracted:
    their answers cannot be trusted after what came later."""

    ticket: int
    failure: Failure
    retracted: Sequence[int] = ()


@dataclass(frozen=True, slots=True)
class Distrusted:
    """An endpoint's answers to these rows cannot be trusted: they are asked again elsewhere."""

    endpoint: int
    rows: Sequence[int]


@dataclass(frozen=True, slots=True)
class Added:
    """An endpoint takes part from now on: the next index, or that of one that was removed."""

    endpoint: int


@dataclass(frozen=True, slots=True)
class Removed:
    """An endpoint takes no more part: its requests in flight may finish, the rows of its queue go to others."""

    endpoint: int


@dataclass(frozen=True, slots=True)
class Joined:
    """Rows are to be sent that were not known when the run began; so many more may come. ``limited`` has the budgets of
    those with a limited one."""

    rows: Sequence[int]
    limited: Mapping[int, int]
    awaited: int


@dataclass(frozen=True, slots=True)
class Tick:
    """Nothing but time has passed."""


Event = Delivered | Ended | Failed | Distrusted | Added | Removed | Joined | Tick


@dataclass(frozen=True, slots=True)
class Send:
    """Put this batch on the wire; one without rows stands for a plain prompt, whose answer nobody needs, ``as_rows``
    with all that rows are asked with."""

    batch: Batch
    as_rows: bool = False


@dataclass(frozen=True, slots=True)
class Settle:
    """This row ends with an error."""

    row: int
    failure: Failure


@dataclass(frozen=True, slots=True)
class Drop:
    """Cancel this request: none of its rows is needed any more."""

    ticket: int


@dataclass(frozen=True, slots=True)
class Wake:
    """Send a ``Tick`` at this time."""

    at: float


@dataclass(frozen=True, slots=True)
class Stop:
    """The run is over: with ``failure`` None all rows are settled, else no endpoint or no time is left."""

    failure: Failure | None = None


Message = Send | Settle | Drop | Wake | Stop
