"""The endpoints of a run as the scheduler sees them: how fast, how full, how well.

How much an endpoint may hold: one request until it has answered (unless it is alone), then more with every row it
delivers, up to ``max_in_flight`` requests, and never more rows than it finishes by the time the whole run can be over,
by the speeds measured so far. Near the end an endpoint that needs longer for one row than the others for all that is
left gets nothing. That keeps a slow endpoint from sitting on the end of a run, and makes requests small as the work
runs out ("guided self-scheduling", Polychronopoulos and Kuck 1987, weighed by speed).
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

from .policy import BREAKER, REACTIONS, Breaker, RetryPolicy, Signal, backoff_s
from .records import Failure, FailureKind

__all__ = ["Endpoint", "Fleet"]

_FIRST_ROWS = 32  # an endpoint may hold so many rows, or one request, before it has answered
_ALONE = 4  # or so many requests, if it is the only one
_WAIT_S = 30.0  # no row need wait for longer at an endpoint, if that is to be had
_ROUNDS = 8  # rates are those of the last so many rows a slot, or a little more


@dataclass(slots=True)
class Endpoint:
    """What is known of one endpoint in one run.

    Attributes
    ----------
    max_bite : int
        Rows a request, at most; smaller than the policy's after "queue full".
    requests, held : int
        Requests in flight, and the unfinished rows in them.
    done : int
        Rows delivered.
    proven : bool
        It has answered in this run.
    recent, recent_s : float
        Rows delivered and seconds with requests in flight, those longer ago counting less.
    busy_since : float
        From when on its time with requests in flight is not yet in ``recent_s``.
    rate : float
        Rows a second while busy; 0 while unknown.
    slots : float
        Rows it works on at once, the most seen so far: by Little's law the rate times ``row_s``.
    row_s : float
        Seconds a row takes there when it need not wait: the least that the rows of a request took on average.
    ask_again_at : float
        Until when it is left out because rows are finished sooner elsewhere; 0 if it is not.
    breaker : Breaker
        State of its circuit breaker.
    faults, opens, busy : int
        Faults, openings of the breaker and "queue full" answers since its last success.
    rest_until : float
        Not to be sent anything before this time.
    opened_at : float
        When the breaker opened last: what was sent before belongs to the same incident.
    blames : int
        Faults in the whole run.
    lost : bool
        Out, or opened as often as it may be without a success between: the run does not wait for it. One that
        refuses connections is still knocked at: that costs no row anything, and it may come back.
    clean : bool
        Ready, proven, never blamed and not busy: where rows go that may have killed an engine. Kept by the fleet.
    """

    max_bite: int
    requests: int = 0
    held: int = 0
    done: int = 0
    proven: bool = False
    recent: float = 0.0
    recent_s: float = 0.0
    busy_since: float = 0.0
    rate: float = 0.0
    slots: float = 0.0
    row_s: float = math.inf
    ask_again_at: float = 0.0
    breaker: Breaker = Breaker.CLOSED
    faults: int = 0
    opens: int = 0
    busy: int = 0
    rest_until: float = 0.0
    opened_at: float = -math.inf
    blames: int = 0
    lost: bool = False
    clean: bool = False

    @property
    def ready(self) -> bool:
        """Whether its breaker lets anything through."""
        return self.breaker in (Breaker.CLOSED, Breaker.HALF_OPEN)


class Fleet(list[Endpoint]):
    """The endpoints of a run, by index, and what they are together.

    Parameters
    ----------
    size : int
        Number of endpoints.
    max_size, max_in_flight : int
        Rows a request and requests an endpoint, at most.
    retry : RetryPolicy
        Budgets and pauses.
    draw : callable
        Gives a random number from 0 to 1, for the jitter of pauses.
    resting : iterable of int
        Endpoints that begin with an open breaker.

    Attributes
    ----------
    ready, done : int
        Endpoints whose breaker lets something through; rows delivered by all of them.
    changed : bool
        Whether an endpoint has become well or unwell since the reader of this took it back.
    """

    def __init__(
        self,
        size: int,
        *,
        max_size: int,
        max_in_flight: int,
        retry: RetryPolicy,
        draw: Callable[[], float],
        resting: Iterable[int] = (),
    ) -> None:
        super().__init__(Endpoint(max_size) for _ in range(size))
        for index in resting:
            self[index].breaker = Breaker.OPEN
        self.max_size = max_size
        self._max_in_flight = max_in_flight
        self._retry = retry
        self._draw = draw
        self.ready = sum(e.ready for e in self)
        self.done = 0
        self.changed = False
        self._lost = 0
        self._clean = 0
        self._rate_sum = 0.0  # of the endpoints that are ready, as is the next
        self._rated = 0
        self._timed = 0.0  # the sum of the rates of those whose row_s is known
        self._slots = 0.0  # the sum of rate times row_s: rows they work on at once
        self._ward: int | None = None
        self._ward_blames = 0
        self._alarms: list[tuple[float, int]] = []  # when rests are over

    # ---- books ------------------------------

    def sent(self, index: int, rows: int, now: float) -> None:
        """A request with so many rows goes out."""
        e = self[index]
        if not e.requests:
            e.busy_since = now
        e.ask_again_at = 0.0
        e.requests += 1
        e.held += rows

    def delivered(self, index: int, rows: int, now: float) -> None:
        """Rows have come: the endpoint works, and is so fast."""
        e = self[index]
        e.held -= rows
        e.done += rows
        self.done += rows
        e.faults = e.opens = 0
        if not e.proven or e.busy or e.breaker is not Breaker.CLOSED:
            e.proven, e.busy = True, 0
            self._signal(e, Signal.SUCCESS)
        e.recent += rows
        e.recent_s += now - e.busy_since
        e.busy_since = now
        if e.recent_s > 0 and e.recent:
            self._count(e, -1)
            e.rate = e.recent / e.recent_s
            self._count(e, +1)

    def ended(self, index: int, rows: int, row_s: float) -> None:
        """A request with so many rows was answered in full, in ``row_s`` a row on average: that is what a row takes
        if none was quicker, and one a little larger may be taken, too."""
        e = self[index]
        self._count(e, -1)
        e.row_s = min(e.row_s, row_s)
        self._count(e, +1)
        e.slots = max(e.slots, e.rate * e.row_s)
        if e.recent > _ROUNDS * max(e.slots, _FIRST_ROWS):  # rows may get longer or shorter as the run goes on
            e.recent /= 2
            e.recent_s /= 2
        if e.max_bite <= rows < self.max_size:
            e.max_bite = min(self.max_size, e.max_bite + max(1, e.max_bite // 8))

    def excused(self, index: int) -> None:
        """A row that an endpoint holds has been answered by another."""
        self[index].held -= 1

    def landed(self, index: int, unfinished: int, now: float) -> None:
        """A request is over, with so many rows unfinished."""
        e = self[index]
        e.held -= unfinished
        e.requests -= 1
        if not e.requests:
            e.recent_s += now - e.busy_since

    def _count(self, e: Endpoint, sign: int) -> None:
        """Add an endpoint to the sums over those that are ready, or take it off."""
        if e.ready:
            self.ready += sign
            if e.rate > 0:
                self._rated += sign
                self._rate_sum += sign * e.rate
                if e.row_s < math.inf:
                    self._timed += sign * e.rate
                    self._slots += sign * e.rate * e.row_s

    # ---- health ------------------------------

    def failed(
        self, index: int, failure: Failure, rows: int, sent_at: float, now: float, suspect: bool = False
    ) -> float | None:
        """A request with so many rows failed; return when the endpoint is to be looked at again, if it rests.

        A row under suspicion (``suspect``) is blamed itself; the breaker counts the fault all the same.
        """
        e, reaction = self[index], REACTIONS[failure.kind]
        blamed, trips, at = reaction.blamed, reaction.trips, None
        if failure.kind is FailureKind.DENIED:
            self._signal(e, Signal.DENIED)
        if failure.kind is FailureKind.BUSY:
            e.busy += 1
            e.max_bite = max(1, rows // 2)
            blamed = trips = e.busy >= self._retry.max_busy
            self._count_state(e)
            self.changed = True
        # What was sent before the breaker opened tells nothing new: one incident opens it once.
        if blamed and (e.breaker is Breaker.CLOSED or sent_at > e.opened_at):
            e.blames += not suspect
            at = self._fault(index, trips, now, for_good=failure.kind is not FailureKind.CONNECT)
        if reaction.pause and e.breaker is not Breaker.OUT:
            pause = backoff_s(max(e.busy, 1), self._retry, self._draw())
            at = self._rest(index, failure.retry_after_s or pause, now)
        return at

    def _fault(self, index: int, trips: bool, now: float, for_good: bool) -> float | None:
        e = self[index]
        e.faults += 1
        was = e.breaker
        self._signal(e, Signal.TRIP if trips or e.faults >= self._retry.breaker_threshold else Signal.FAULT)
        if e.breaker is not Breaker.OPEN or was is Breaker.OPEN:
            return None
        e.opens += 1
        e.opened_at = now
        if e.opens >= self._retry.max_opens and for_good:
            self._signal(e, Signal.DENIED)
            return None
        self._count_state(e)
        return self._rest(index, backoff_s(e.opens, self._retry, self._draw()), now)

    def rest(self, index: int, now: float) -> float:
        """Give an endpoint its first pause; return when it is over."""
        return self._rest(index, backoff_s(1, self._retry, self._draw()), now)

    def _rest(self, index: int, pause: float, now: float) -> float:
        e = self[index]
        e.rest_until = max(e.rest_until, now + pause)
        heapq.heappush(self._alarms, (e.rest_until, index))
        return e.rest_until

    def rested(self, now: float) -> list[int]:
        """The endpoints that are to be looked at, as their time has come since the last call."""
        rested = []
        while self._alarms and self._alarms[0][0] <= now:
            e = self[index := heapq.heappop(self._alarms)[1]]
            if e.rest_until > now:
                continue
            if e.breaker is Breaker.OPEN:
                self._signal(e, Signal.PAUSE_OVER)
            if e.ready:
                rested.append(index)
        return rested

    def _signal(self, e: Endpoint, signal: Signal) -> None:
        was = e.breaker
        self._count(e, -1)
        e.breaker = BREAKER[was, signal]
        self._count(e, +1)
        self.changed = True
        self._count_state(e)

    def _count_state(self, e: Endpoint) -> None:
        lost = e.breaker is Breaker.OUT or e.opens >= self._retry.max_opens
        clean = e.ready and e.proven and not e.blames and not e.busy
        self._lost += lost - e.lost
        self._clean += clean - e.clean
        e.lost, e.clean = lost, clean

    # ---- who else ------------------------------

    @property
    def gone(self) -> bool:
        """Whether every endpoint is lost."""
        return self._lost == len(self)

    def others_ready(self, avoid: Collection[int]) -> bool:
        """Whether an endpoint besides these is ready."""
        return self.ready > sum(self[i].ready for i in avoid)

    def others_clean(self, avoid: Collection[int]) -> bool:
        """Whether an endpoint besides these has never been at fault."""
        return self._clean > sum(self[i].clean for i in avoid)

    def others_left(self, index: int) -> bool:
        """Whether an endpoint besides this one is not lost: it may come back."""
        return len(self) - self._lost > (not self[index].lost)

    def fit(self, index: int, now: float) -> bool:
        """Whether an endpoint may be sent anything now."""
        e = self[index]
        return e.ready and e.rest_until <= now and not (e.breaker is Breaker.HALF_OPEN and e.requests)

    def ward(self, but: int | None, now: float) -> int | None:
        """The one endpoint that meets rows under suspicion: the fastest of those with the fewest faults of their
        own, and the same one as long as it is well. Never ``but``."""
        ward = self._ward
        if ward is not None and ward != but and self.fit(ward, now) and self[ward].blames <= self._ward_blames:
            return ward
        fit = (i for i, e in enumerate(self) if e.ready and e.rest_until <= now and i != but)
        self._ward = min(fit, key=lambda i: (self[i].blames, -self[i].rate), default=None)
        self._ward_blames = self[self._ward].blames if self._ward is not None else 0
        return self._ward

    # ---- room ------------------------------

    def room(self, index: int, left: int, now: float) -> int:
        """Rows an endpoint may be sent in one request now, with ``left`` rows unfinished in the run; 0: none."""
        e = self[index]
        if not self.fit(index, now):
            return 0
        size = min(self.max_size, e.max_bite)
        if e.breaker is Breaker.HALF_OPEN:
            return 1 if e.lost else max(1, size // 10)
        first = max(self.max_size, _FIRST_ROWS)
        if len(self) == 1:  # nobody else could have the rows, and a server that waits for the next batch is idle
            first = _ALONE * self.max_size
            if not e.requests and not e.done and left > size >= _FIRST_ROWS:
                size //= 4  # its engine begins while it still reads the rest
        if e.requests >= (self._max_in_flight if e.proven else min(self._max_in_flight, first // self.max_size)):
            return 0
        # As in TCP's slow start every row delivered opens the window, so that an endpoint whose speed is not known
        # yet is trusted with little. Then Little's law says how many rows it works on at once (rate times the time
        # of a row that need not wait): half as many again keep it full, and one batch is in reserve.
        hold = min(self.max_size * self._max_in_flight, first + 2 * e.done)
        if e.slots:
            some = min(2 * self.max_size, math.ceil(e.rate * _WAIT_S))
            hold = min(hold, max(first, some, self.max_size + math.ceil(1.5 * e.slots)))
        if e.rate > 0 and 2 * self._rated >= self.ready:
            over_s = self._over_s(left)
            if self._too_slow(index, over_s, now):
                return 0
            hold = min(hold, max(1, math.ceil(self._share(e, over_s))))
        free = hold - e.held
        # Rows finish one by one. Topping up by as few as have just finished would shred the work into tiny
        # requests, so an endpoint that holds work waits until a whole batch, or half its share, fits.
        if e.held and free < min(size, (hold + 1) // 2):
            return 0
        return min(size, max(free, 0 if e.held else 1))

    def _over_s(self, left: int) -> float:
        """Seconds in which all endpoints together finish so many rows, the last of them included."""
        return left / self._total_rate + (self._slots / self._timed if self._timed else 0.0)

    def _share(self, e: Endpoint, over_s: float) -> float:
        """Rows an endpoint finishes in this time: near the end only those count that it can do from begin to end."""
        if not over_s < 4 * e.row_s < math.inf:
            return e.rate * over_s
        return e.slots * math.floor(over_s * 1.05 / e.row_s)

    def _too_slow(self, index: int, over_s: float, now: float) -> bool:
        """Whether the others have finished all that is left before this endpoint has finished a row, and a quarter of
        one to spare: some rows are longer than usual.

        They are given as long as it would have taken: if work is still there then, they are held up.
        """
        e = self[index]
        if e.row_s == math.inf or 1.25 * e.row_s <= over_s * 1.05:
            e.ask_again_at = 0.0
            return False
        if not e.ask_again_at:
            e.ask_again_at = now + e.row_s
            heapq.heappush(self._alarms, (e.ask_again_at, index))
        return now < e.ask_again_at

    @property
    def _total_rate(self) -> float:
        """Rows a second of all that are ready; those not rated yet count as average."""
        return self._rate_sum * max(1.0, self.ready / self._rated)

    def bite(self, index: int, room: int, unsent: int) -> int:
        """Rows an endpoint steals at once.

        Half of its part, by speed, of what is unsent (an equal part while speeds are not known): the bites shrink
        as the work does, so that all finish together. But no less than half of what it works on at once, and
        none at all if it holds work and the bite would be tiny.
        """
        e = self[index]
        if e.rate and 2 * self._rated >= self.ready:
            part = math.ceil(unsent * e.rate / self._total_rate)
            least = int(e.slots / 2)
        else:
            part, least = math.ceil(unsent / max(1, self.ready)), 0
        bite = min(room, unsent, max(1, part // 2, least))
        return 0 if e.requests and bite < min(room, self.max_size // 8) else bite
