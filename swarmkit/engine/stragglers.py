"""Rows that end late at the end of a run, and their duplicates.

When nothing is unsent, an idle endpoint is sent rows, too, that it would finish clearly sooner than the endpoint that
holds them: above all those that wait there behind others. How soon that is done with them is told by what it holds and
by its pace. A row that has been in flight for several times what the run's rows usually take is held up, and one at an
endpoint that delivers nothing any more is stuck, whatever the paces say.

A row has one duplicate at a time. Those that are held up are a bounded share of all rows; the others hardly began.
"""

from __future__ import annotations

import bisect
import heapq
import itertools
import math
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import NamedTuple

from .endpoints import Fleet
from .evidence import Evidence
from .request import Request

__all__ = ["Late", "Stragglers"]

_FACTOR = 2.5  # a row in flight for so many times what rows usually take is held up
_LEAST_S = 0.5  # no row counts as held up before
_SHARE = 10  # one row in ten may be duplicated since it is held up, at most, while its endpoint still delivers
_FEW = 10  # or so many rows, in short runs; and so many must be done before a usual time is known
_CHECKS = 8  # looks at what ends late, in the time of a usual row
_LOOKED_AT = 64  # endpoints that are done last: at a look, only their rows are looked at
_MOST = 2000  # ... and so many of them, over all
_PART = 8  # rows that are worth a request of their own
_CLEARLY = 1.25  # times as long
_NEVER = 1e300  # later than all times but infinity


class Late(NamedTuple):
    """A row that may be duplicated: the request that holds it, when it ends there as far as can be told (never, if it
    is stuck), and whether it is held up."""

    row: int
    request: Request
    ends_at: float
    held_up: bool = False


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
        self._left = max(_FEW, rows // _SHARE)  # rows that may be duplicated yet since they are held up
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
        """Plan the next check; return its time if it is a new one."""
        if self.check_at < math.inf or (held_up_s := self._silent_s) == math.inf:
            return None
        if not any(any(map(self._may_duplicate, r.unfinished)) for r in self._in_flight.values()):
            return None
        self.check_at = now + min(held_up_s, max(_LEAST_S, self._fleet.usual_row_s)) / _CHECKS
        return self.check_at

    def copies(
        self, now: float, left: int, idle: Iterable[int], limited: Mapping[int, int]
    ) -> Iterator[tuple[int, list[Late]]]:
        """The rows that idle endpoints are sent, too, a request at a time, with ``left`` rows unfinished in the run.

        They end clearly sooner there. What ends last goes first, to the quickest endpoints, in even parts where these
        are alike. Rows that have another budget of tokens share no request with them: it
        would have the smallest, and the first answer counts.
        """
        self.check_at = math.inf
        quickest = sorted(idle, key=lambda i: self._fleet[i].row_s)
        row_s = [self._fleet[i].row_s for i in quickest]
        late: deque[Late] = self._late(now, left, now + _sooner_s(row_s[0])) if quickest else deque()
        outdone_s = self._outdone_s(now, len(late)) if late else math.inf
        for place, index in enumerate(quickest):
            # Where quicker ones do it all, this one gets stuck rows only: nobody else knows when these end.
            soon = min(now + _sooner_s(row_s[place]), _NEVER) if row_s[place] < outdone_s else _NEVER
            peers = bisect.bisect(row_s, _CLEARLY * row_s[place]) - place
            even = max(_PART, math.ceil(len(late) / peers))
            while late and late[0].ends_at > soon and even > 0:
                room = self._fleet.room_for_copies(index, left, now, late[0].ends_at == math.inf)
                if not (part := self._part(late, min(room, even), index, soon, limited)):
                    break
                even -= len(part)
                yield index, part

    def _part(self, late: deque[Late], size: int, index: int, soon: float, limited: Mapping[int, int]) -> list[Late]:
        """Take up to ``size`` rows that may go to an endpoint together: none that it holds, or, if it is unwell, that
        broke a connection."""
        sites: Collection[int] = () if self._fleet[index].well else self._evidence.sites
        part: list[Late] = []
        passed: list[Late] = []
        while late and len(part) < size and late[0].ends_at > soon:
            x = late.popleft()
            fits = x.request.batch.endpoint != index and x.row not in sites
            fits = fits and (not part or limited.get(x.row) == limited.get(part[0].row))
            (part if fits else passed).append(x)
        late.extendleft(reversed(passed))
        return part

    def _outdone_s(self, now: float, rows: int) -> float:
        """Seconds a row from which on an endpoint is no help: the quicker ones finish what they hold, and so many rows
        more, in the time that it takes for one."""
        silent, pace, held = now - self._silent_s, 0.0, 0
        works = (e for e in self._fleet if e.working and 0 < e.row_s < math.inf)
        for e in sorted((e for e in works if e.busy_since > silent or not e.held), key=lambda e: e.row_s):
            if pace and e.row_s * pace >= _CLEARLY * (held + rows):
                return e.row_s
            pace, held = pace + e.pace, held + e.held
        return math.inf

    def _late(self, now: float, left: int, soon: float) -> deque[Late]:
        """The rows that end after the time ``soon``, the last ones first, as far as is known."""
        late = {x.row: x for x in self._behind(soon, now - self._fleet.usual_row_s)}
        late.update((x.row, x) for x in self._held_up(now, left))
        return deque(sorted(late.values(), key=lambda x: -x.ends_at))

    def _held_up(self, now: float, left: int) -> list[Late]:
        """Rows at endpoints that deliver nothing any more, and those that take much longer than usual."""
        late, silent = now - self._held_up_s, now - self._silent_s
        stuck: list[Late] = []
        slow: list[Late] = []
        for request in itertools.takewhile(lambda r: r.sent_at < silent, self._in_flight.values()):
            is_stuck = self._fleet[request.batch.endpoint].delivered_at < silent
            if is_stuck or request.sent_at < late:
                ends_at = math.inf if is_stuck else 2 * now - request.sent_at  # it may well take as long again
                rows = (r for r in request.batch.rows if r in request.unfinished and self._may_duplicate(r))
                (stuck if is_stuck else slow).extend(Late(r, request, ends_at, not is_stuck) for r in rows)
        return stuck + slow[: max(self._left, left if left <= _FEW else 0)]

    def _behind(self, soon: float, since: float) -> Iterator[Late]:
        """Rows of the endpoints that have most to do yet, if each works on its rows in order and goes on as quickly as
        so far. What was sent after ``since`` may yet show that it works on more of them at once. None while rows come:
        then it is no sign of the end that all are sent."""
        if self._fleet.fed:
            return
        ends = ((e.busy_since + e.held / e.pace, i) for i, e in enumerate(self._fleet) if e.held and e.rate)
        last = heapq.nlargest(_LOOKED_AT, (end for end in ends if end[0] > soon))
        requests: dict[int, list[Request]] = {index: [] for _, index in last}
        for request in self._in_flight.values() if last else ():
            if request.batch.endpoint in requests:
                requests[request.batch.endpoint].append(request)
        for ends_at, index in last:
            held = (
                (row, r) for r in reversed(requests[index]) for row in reversed(r.batch.rows) if row in r.unfinished
            )
            for place, (row, request) in enumerate(itertools.islice(held, _MOST // len(last))):
                if (at := ends_at - place / self._fleet[index].pace) <= soon:
                    break
                if request.sent_at <= since and self._may_duplicate(row):
                    yield Late(row, request, at)

    def _may_duplicate(self, row: int) -> bool:
        """A row has one duplicate at a time, and none if it may crash engines, was refused or failed too often."""
        return row not in self._holders and self._evidence.is_clean(row)

    def duplicated(self, late: Late, other: int) -> None:
        """Note that two requests hold a row."""
        self._holders[late.row] = late.request.batch.ticket, other
        self._left -= late.held_up

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


def _sooner_s(row_s: float) -> float:
    """Seconds after which a row must end elsewhere to end clearly sooner where it takes ``row_s``."""
    return _CLEARLY * row_s + _LEAST_S / 2
