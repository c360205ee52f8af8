"""Rows that are held up at the end of a run, and their duplicates.

A row is held up when it has been in flight for several times what the run's rows usually take. It may be sent to an
idle endpoint too: one duplicate at a time. That is done for a bounded share of all rows, and for all rows of endpoints
that deliver nothing any more.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterator, Mapping

from .endpoints import Fleet
from .evidence import Evidence
from .request import Request

__all__ = ["Stragglers"]

_FACTOR = 2.5  # a row in flight for so many times what rows usually take is held up
_LEAST_S = 0.5  # no row counts as held up before
_SHARE = 10  # one row in ten may be duplicated, at most, while its endpoint still delivers
_FEW = 10  # or so many rows, in short runs; and so many must be done before a usual time is known


class Stragglers:
    """Which rows are held up, and which requests hold the same row.

    Parameters
    ----------
    fleet : Fleet
        The endpoints, to be read.
    evidence : Evidence
        What speaks against rows.
    in_flight : mapping of int to Request
        The requests in flight by ticket, in the order they were sent; to be read.
    rows : int
        Rows in the run.

    Attributes
    ----------
    check_at : float
        When stragglers are looked for next; infinite if that is not planned.
    waited_s : float
        Sum of the seconds that the run's delivered rows took.
    """

    def __init__(self, fleet: Fleet, evidence: Evidence, in_flight: Mapping[int, Request], rows: int) -> None:
        self._fleet = fleet
        self._evidence = evidence
        self._in_flight = in_flight
        self._left = max(_FEW, rows // _SHARE)  # rows that may be duplicated yet
        self._holders: dict[int, tuple[int, int]] = {}  # duplicated rows: the tickets of the two requests
        self.check_at = math.inf
        self.waited_s = 0.0

    @property
    def _held_up_s(self) -> float:
        """Seconds after which a row counts as held up; infinite while the usual time of a row is unknown."""
        done = self._fleet.done
        return max(_LEAST_S, _FACTOR * self.waited_s / done) if done >= _FEW else math.inf

    @property
    def _silent_s(self) -> float:
        """Seconds without a row after which an endpoint counts as stuck: its rows need not have waited there."""
        if (held_up_s := self._held_up_s) == math.inf:
            return math.inf
        return min(held_up_s, max(_LEAST_S, _FACTOR * self._fleet.usual_row_s))

    def schedule(self, now: float) -> float | None:
        """Plan the next check, when the oldest request may be held up; return its time if it is a new one."""
        if self.check_at < math.inf or (held_up_s := self._silent_s) == math.inf:
            return None
        requests = self._in_flight.values()
        oldest = next((r.sent_at for r in requests if any(map(self._may_duplicate, r.unfinished))), math.inf)
        if oldest == math.inf:
            return None
        self.check_at = max(now + held_up_s / 16, oldest + held_up_s)
        return self.check_at

    def held_up(self, now: float, left: int) -> list[tuple[int, Request]]:
        """The rows to duplicate, each with the request that holds it, with ``left`` rows unfinished in the run."""
        self.check_at = math.inf
        late, silent = now - self._held_up_s, now - self._silent_s
        stuck: list[tuple[int, Request]] = []
        slow: list[tuple[int, Request]] = []
        for request in itertools.takewhile(lambda r: r.sent_at < silent, self._in_flight.values()):
            is_stuck = self._fleet[request.batch.endpoint].delivered_at < silent
            if is_stuck or request.sent_at < late:
                rows = stuck if is_stuck else slow
                rows += [(r, request) for r in request.batch.rows if r in request.unfinished and self._may_duplicate(r)]
        return stuck + slow[: max(self._left, left if left <= _FEW else 0)]

    def _may_duplicate(self, row: int) -> bool:
        """A row has one duplicate at a time, and none if it may crash engines, was refused or failed too often."""
        return row not in self._holders and self._evidence.is_clean(row)

    def duplicated(self, row: int, ticket: int, other: int) -> None:
        """Note that two requests hold a row."""
        self._holders[row] = ticket, other
        self._left -= 1

    def has_duplicate(self, row: int) -> bool:
        """Whether another request in flight holds this row of a request that has ended."""
        return any(ticket in self._in_flight for ticket in self._holders.get(row, ()))

    def have_duplicates(self, rows: Collection[int]) -> bool:
        """Whether one of the rows was duplicated."""
        return not self._holders.keys().isdisjoint(rows)

    def lost(self, row: int) -> None:
        """One of the two requests has failed: the other holds the row alone, and it may be duplicated again."""
        del self._holders[row]

    def superseded(self, row: int, winner: int) -> Iterator[Request]:
        """The row has its answer: the other request in flight that holds it."""
        for ticket in self._holders.pop(row, ()):
            other = self._in_flight.get(ticket)
            if ticket != winner and other is not None and row in other.unfinished:
                yield other
