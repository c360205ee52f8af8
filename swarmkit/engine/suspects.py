"""Rows that may crash engines: when a broken connection is a crash, and where suspect rows are tested.

A connection that breaks says little: the network, a proxy or a restart may be the cause. Half a second later more is
known. If the endpoint holds a request by then, its engine lives, and only that one request failed. If the endpoint had
failed before, several endpoints broke at that time, or it was taken out of the pool, something else is the cause. What
remains is a crash, and the rows in flight are its possible causes.

Rows that saw two crashes are suspect. They are tested in groups, each alone on a healthy endpoint while all other work
goes on, and a group that crashes its endpoint is halved. A group goes to an endpoint that it crashed before, if one is
back, so that at most three endpoints meet a row that crashes engines; while none is back, its rows are tested one by
one. A row fails when it has crashed engines alone twice, or once if none of three comes back within half a minute.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ..records import Failure
from .breaker import Breaker
from .endpoints import Fleet
from .evidence import MAX_CRASHES, Evidence
from .queues import RetryBatch

__all__ = ["BrokenRequest", "Suspects"]

VERDICT_S = 0.5
"""Seconds after a connection broke until it is decided whether the engine crashed."""
_AT_ONE_TIME_S = 1.0
_RESTART_S = 30.0  # an endpoint that rows crashed is waited for so long
_TRIES = 4  # groups that are offered an endpoint at one event
_MANY = 3  # endpoints that break at one time: an incident that says nothing about rows


@dataclass(frozen=True, slots=True)
class BrokenRequest:
    """A request whose connection broke, until it is decided what that says about its rows.

    Attributes
    ----------
    endpoint : int
        Where it broke.
    rows : tuple of int
        Its unfinished rows.
    failure : Failure
        What was seen.
    at : float
        When, in seconds.
    alone : bool
        It had one row.
    counts : bool
        The endpoint was well for others until then.
    held : bool
        The rows wait for the verdict; else they were sent again at once.
    tested : bool
        They were suspect rows, alone on the endpoint.
    """

    endpoint: int
    rows: tuple[int, ...]
    failure: Failure
    at: float
    alone: bool
    counts: bool
    held: bool
    tested: bool


class Suspects:
    """The broken requests that await a verdict, and the groups of suspect rows.

    Parameters
    ----------
    fleet : Fleet
        The endpoints, to be read.
    evidence : Evidence
        What speaks against rows.

    Attributes
    ----------
    groups : deque of RetryBatch
        Groups that wait for an endpoint.
    reserved : dict of int to RetryBatch
        Endpoints that are kept free for a group, or are testing it.
    """

    def __init__(self, fleet: Fleet, evidence: Evidence) -> None:
        self._fleet = fleet
        self._evidence = evidence
        self._broken: deque[BrokenRequest] = deque()
        self._breaks: deque[tuple[float, int]] = deque()  # when which endpoints broke, of late
        self._awaiting = Counter[int]()  # rows in ``_broken``
        self.groups: deque[RetryBatch] = deque()
        self.reserved: dict[int, RetryBatch] = {}

    def broke(
        self,
        endpoint: int,
        rows: tuple[int, ...],
        failure: Failure,
        now: float,
        *,
        counts: bool,
        alone: bool,
        tested: bool,
    ) -> bool:
        """Note a request whose connection broke; return whether its rows must wait for the verdict."""
        held = tested or self._evidence.speaks_against(rows) or not self._awaiting.keys().isdisjoint(rows)
        self._awaiting.update(rows)
        self._broken.append(BrokenRequest(endpoint, rows, failure, now, alone, counts, held, tested))
        self._breaks.append((now, endpoint))
        return held

    def is_incident(self, index: int) -> bool:
        """Whether many endpoints broke when this one last failed: that says nothing about it or its rows."""
        at = self._fleet[index].fault_at
        return len({i for broke_at, i in self._breaks if abs(broke_at - at) <= _AT_ONE_TIME_S}) >= _MANY

    def verdicts(self, now: float) -> Iterator[tuple[BrokenRequest, bool, bool]]:
        """The requests that broke long enough ago: each with whether the engine crashed, and whether it lives."""
        while self._broken and self._broken[0].at + VERDICT_S <= now:
            broken = self._broken.popleft()
            self._awaiting.subtract(broken.rows)
            self._awaiting = +self._awaiting
            while self._breaks[0][0] < broken.at - _AT_ONE_TIME_S:
                self._breaks.popleft()
            others = {endpoint for at, endpoint in self._breaks if at <= broken.at + _AT_ONE_TIME_S}
            many = len(others) >= _MANY
            e = self._fleet[broken.endpoint]
            lives = e.requests > 0 and not many
            stopped = e.breaker is Breaker.REMOVED
            yield broken, broken.counts and not (lives or many or stopped), lives

    def place(self, now: float, most: int, wanted: Callable[[int], bool]) -> list[int]:
        """Reserve endpoints for groups, ``most`` at once; return those newly reserved."""
        placed = []
        for _ in range(min(len(self.groups), _TRIES)):
            if len(self.reserved) >= most:
                break
            group = self.groups.popleft()
            if not (rows := tuple(filter(wanted, group.rows))):
                continue
            index, fresh = self._site(rows, now)
            if index is None:
                self.groups.append(RetryBatch(rows, group.avoid, suspect=True))
                continue
            if fresh and len(rows) > 1:  # no engine that they crashed is back: only one more is risked
                self.groups.appendleft(RetryBatch(rows[1:], group.avoid, suspect=True))
                rows = rows[:1]
            self.reserved[index] = RetryBatch(rows, group.avoid, suspect=True)
            placed.append(index)
        return placed

    def _site(self, rows: tuple[int, ...], now: float) -> tuple[int | None, bool]:
        """The endpoint where a group is tested, and whether it is one that its rows have not crashed yet."""
        sites = self._evidence.sites.get(rows[0], ())
        refused_by = self._evidence.refusals.get(rows[0], (None,))[0]

        def free(index: int) -> bool:
            # A test needs an endpoint that is well; what is sent to one that has just crashed may be lost with it.
            e = self._fleet[index]
            well = e.well and now >= e.fault_at + VERDICT_S and (e.proven or not self._fleet.done)
            return well and self._fleet.can_send(index, now) and index not in self.reserved and index != refused_by

        def load(index: int) -> tuple[int, float]:
            return self._fleet[index].requests, -self._fleet[index].rate

        if back := [i for i in sites if free(i)]:
            return min(back, key=load), False
        spared = len(sites) >= MAX_CRASHES and self._evidence.crashes_engines(rows[0])
        if spared or any(i in self.reserved or self.may_return(i) for i in sites):
            return None, False
        return min((i for i in range(len(self._fleet)) if i not in sites and free(i)), key=load, default=None), True

    def may_return(self, index: int) -> bool:
        """Whether an endpoint is well, or has not been seen to fail for long."""
        e = self._fleet[index]
        return e.well or (e.breaker is not Breaker.REMOVED and e.failed_at - e.unwell_since < _RESTART_S)

    def hopeless(self) -> Iterator[int]:
        """Rows that crashed an engine alone, and none of the three engines that they crashed comes back."""
        for group in self.groups:
            row = group.rows[0]
            sites = self._evidence.sites.get(row, ())
            guilty = self._evidence.crashed_alone(row) and self._evidence.crashes_engines(row)
            if guilty and len(sites) >= MAX_CRASHES and not any(self.may_return(i) for i in sites):
                yield row

    def waiting(self) -> Iterator[int]:
        """Rows that wait for a verdict or for an endpoint."""
        for broken in self._broken:
            if broken.held:
                yield from broken.rows
        for group in self.groups:
            yield from group.rows
