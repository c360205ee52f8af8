"""What the scheduler is told (events), and what it orders in turn (instructions)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .records import Batch, Failure

__all__ = ["Delivered", "Drop", "Ended", "Event", "Failed", "Instruction", "Send", "Settle", "Stop", "Tick", "Wake"]


@dataclass(frozen=True, slots=True)
class Delivered:
    """Rows of a request are complete; the request goes on."""

    ticket: int
    rows: Sequence[int]


@dataclass(frozen=True, slots=True)
class Ended:
    """A request is over and all its rows were delivered."""

    ticket: int


@dataclass(frozen=True, slots=True)
class Failed:
    """A request is over; the rows not delivered so far are unfinished."""

    ticket: int
    failure: Failure


@dataclass(frozen=True, slots=True)
class Tick:
    """Nothing but time has passed."""


Event = Delivered | Ended | Failed | Tick


@dataclass(frozen=True, slots=True)
class Send:
    """Put this batch on the wire."""

    batch: Batch


@dataclass(frozen=True, slots=True)
class Settle:
    """This row ends with an error."""

    row: int
    failure: Failure


@dataclass(frozen=True, slots=True)
class Drop:
    """Cancel this request: nobody needs its rows any more."""

    ticket: int


@dataclass(frozen=True, slots=True)
class Wake:
    """Send a ``Tick`` at this time."""

    at: float


@dataclass(frozen=True, slots=True)
class Stop:
    """The run is over: with ``failure`` None all rows are settled, else no endpoint is left."""

    failure: Failure | None = None


Instruction = Send | Settle | Drop | Wake | Stop
