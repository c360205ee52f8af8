"""The endpoints of a run as the scheduler sees them: speed, load and health.

How much an endpoint may hold: one request until it has answered (unless it is alone), then more with every row it
delivers, up to ``max_in_flight`` requests, and never more rows than it finishes by the time the whole run can be over,
by the speeds measured so far. Near the end an endpoint slower than usual that needs longer for one row than the others
for all that is left gets nothing. So a slow endpoint does not delay the end of a run, and requests become small as the
work runs out ("guided self-scheduling", Polychronopoulos and Kuck 1987, weighted by speed).
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

from ..records import Failure, FailureKind
from .breaker import BREAKER, Breaker, Signal
from .deadline import Deadline, LastSends
from .policy import REACTIONS, RetryPolicy, pause_s
from .rates import Rate

__all__ = ["Endpoint", "Fleet"]

_FIRST_ROWS = 32  # an endpoint may hold so many rows, or one request, before it has answered
_ALONE = 4  # or so many requests, if it is the only one
_WAIT_S = 30.0  # no row waits for longer at an endpoint, where that can be had
_DENIALS = 3  # an endpoint that denied so many requests, and most of late, rests; if it never answered one, it is out
_CONNECTS_PER_S = 200  # tries of endpoints that refuse connections, over the whole fleet
_MOST_FITS = 1024  # requests that fit until larger ones are tried, at most
_GROWS_S = 0.5  # requests that take no longer are made larger, where that is allowed
_LEFT = 8  # ... if there are so many of the larger ones for each endpoint
_CLEARLY = 1.25  # times as quick
_LATE_S = 1.0  # without an answer, at least, until the rates are not believed any more
_OTHERS, _FEW_OTHERS = 1.2, 2  # times the rows of a run, and so many: what is more at a server is not its own
_GIVES_WAY_S = 0.25  # until it is looked again whether runs that go first have left a place
_ROUNDS = 8  # rates are those of the last so many rows a slot, or a little more


@dataclass(slots=True)
class Endpoint:
    """The state of one endpoint in one run.

    Attributes
    ----------
    max_rows : int
        Rows a request, at most; below the policy's after "queue full" or "too large".
    fitted : int
        Rows of the largest request that was answered since one was too large.
    fits_left, fits_needed : int
        Requests of ``max_rows`` to be answered until larger ones are tried. Their number doubles each time that these
        are too large again, and is halved when they fit.
    requests, held : int
        Requests in flight, and the unfinished rows in them.
    superseded : int
        Other rows in them that its server may be working on still: their answers came from elsewhere first.
    done : int
        Answers: rows delivered, and known prompts that it was probed with.
    proven : bool
        It has answered in this run, and since it last refused connections.
    recent, recent_s : float
        Rows delivered and seconds with requests in flight, with less weight on what is longer ago.
    busy_since : float
        From when on its time with requests in flight is not yet in ``recent_s``.
    rate : float
        Rows a second while busy; 0 while unknown.
    slots : float
        Rows it works on at once, the most seen so far: by Little's law the rate times ``row_s``.
    works_on : int
        While others are seen there: rows that its server works on at once, as it said with rows waiting; else 0.
    row_s : float
        Seconds a row takes there without waiting: the least that the rows of a request took on average.
    took_s : float or None
        Seconds that the latest request took that was answered in full; infinite after a failure, None before both.
    skip_until : float
        Until when it is skipped because rows are finished sooner elsewhere; 0 if it is not.
    breaker : Breaker
        State of its circuit breaker.
    faults : int
        Faults since its last success; refused connections are none.
    denials, tries : int
        Requests it denied since its last answer, but for those in flight when it denied the first, and requests that it
        was sent since.
    window : float
        Rows it may hold: halved at each congestion, growing with every request that ends.
    unwell_since : float
        When its first trouble since its last success began; infinite while it is well.
    failed_at : float
        When its last failure of any kind was seen.
    fault_at, congested_at : float
        When its last fault and its last congestion were seen: failures of requests sent before belong to them.
    refuses : bool
        Its last failure was a refused connection.
    denies : bool
        It denied rows, and has been asked for nothing since that is known to be good.
    delivered_at : float
        When it delivered last.
    delivers : bool
        It has answered, and delivered something since its requests in flight were sent, as far as is known.
    rest_until : float
        It is sent nothing before this time.
    held_until : float
        Until when the rate of its gateway last held it back.
    well : bool
        Ready, and without trouble since its last success. Kept by the fleet.
    working : bool
        Well, or with one fault that has not opened its breaker, as an incident of many endpoints leaves it: its speed
        counts. Kept by the fleet.
    """

    max_rows: int
    fitted: int = 0
    fits_left: int = 1
    fits_needed: int = 1
    requests: int = 0
    held: int = 0
    superseded: int = 0
    done: int = 0
    proven: bool = False
    recent: float = 0.0
    recent_s: float = 0.0
    busy_since: float = 0.0
    rate: float = 0.0
    slots: float = 0.0
    works_on: int = 0
    row_s: float = math.inf
    took_s: float | None = None
    skip_until: float = 0.0
    breaker: Breaker = Breaker.CLOSED
    faults: int = 0
    denials: int = 0
    tries: int = 0
    window: float = math.inf
    unwell_since: float = math.inf
    failed_at: float = -math.inf
    fault_at: float = -math.inf
    congested_at: float = -math.inf
    refuses: bool = False
    denies: bool = False
    delivered_at: float = -math.inf
    delivers: bool = False
    rest_until: float = 0.0
    held_until: float = 0.0
    well: bool = True
    working: bool = True

    @property
    def ready(self) -> bool:
        """Whether its breaker lets anything through."""
        return self.breaker in (Breaker.CLOSED, Breaker.HALF_OPEN)

    @property
    def pace(self) -> float:
        """Rows a second when it holds as many as it works on at once, as far as was seen."""
        return max(self.rate, self.slots / self.row_s) if self.row_s else self.rate


class Fleet(list[Endpoint]):
    """The endpoints of a run, by index, and the sums over them.

    Parameters
    ----------
    size : int
        Number of endpoints.
    max_size, max_in_flight : int
        Rows a request and requests an endpoint, at most.
    largest : int, optional
        What ``max_size`` may become in the course of the run; by default, it stays.
    retry : RetryPolicy
        Budgets and pauses.
    draw : callable
        Gives a random number from 0 to 1, for the jitter of pauses.
    resting, removed : iterable of int
        Endpoints that begin with an open breaker; those that take no part until they are added.
    concurrency : int, optional
        Requests in flight over all endpoints, at most.
    rate_of : callable
        Gives the rate of an endpoint's gateway, or None where nothing limits it.
    deadline : Deadline, optional
        When the run must be over.
    taken : callable
        Gives the rows that runs which go first hold at an endpoint; None where none of them has more to send.

    Attributes
    ----------
    max_size, retry, concurrency, rate_of
        As given; ``max_size`` as it is by now.
    last_sends : LastSends or None
        When each endpoint is sent its last request before the deadline.
    ready, done, out, removed : int
        Endpoints whose breaker lets something through; answers of all; endpoints that are out; that were removed.
    changed : bool
        Whether the health of an endpoint has changed since the reader of this reset it.
    fed : bool
        Whether rows come while the run goes on, so that the rates of endpoints may be those at which rows come.
    """

    def __init__(
        self,
        size: int,
        *,
        max_size: int,
        max_in_flight: int,
        largest: int = 0,
        retry: RetryPolicy,
        draw: Callable[[], float],
        resting: Iterable[int] = (),
        removed: Iterable[int] = (),
        concurrency: int | None = None,
        rate_of: Callable[[int], Rate | None] = lambda index: None,
        deadline: Deadline | None = None,
        taken: Callable[[int], int | None] = lambda index: None,
    ) -> None:
        super().__init__(Endpoint(max_size) for _ in range(size))
        for indexes, breaker in ((resting, Breaker.OPEN), (removed, Breaker.REMOVED)):
            for index in indexes:
                self[index].breaker, self[index].well, self[index].working = breaker, False, False
        self.max_size = max_size
        self._largest = largest
        self._max_in_flight = max_in_flight
        self.concurrency = concurrency
        self.retry = retry
        self._draw = draw
        self.rate_of = rate_of
        self._taken = taken
        self.last_sends = None if deadline is None else LastSends(deadline)
        self.ready = sum(e.ready for e in self)
        self.done = 0
        self.changed = False
        self.fed = False
        self.out = 0
        self.removed = sum(e.breaker is Breaker.REMOVED for e in self)
        self._first_rows = self._rows_at_first()
        self._well = size - sum(not e.well for e in self)
        self._n_working = self._well
        self._rate_sum = 0.0  # of the endpoints that work, as is the next
        self._rated = 0
        self._delivered_at = -math.inf  # when any was last answered
        self._timed = 0.0  # the sum of the rates of those whose row_s is known
        self._slots = 0.0  # the sum of rate times row_s: rows they work on at once
        self._alarms: list[tuple[float, int]] = []  # when rests are over

    # ---- who takes part ------------------------------

    @property
    def present(self) -> int:
        """Endpoints that take part."""
        return len(self) - self.removed

    def enter(self, index: int, now: float) -> None:
        """An endpoint takes part from now on: a new one, or one that was removed. What comes back may be another
        server, of which nothing is known, unless it has been working on all the time."""
        if index == len(self):
            self.append(Endpoint(self.max_size))
            self.removed += 1
        before = self[index]
        if before.faults or not before.requests:
            self[index] = Endpoint(
                self.max_size,
                requests=before.requests,
                held=before.held,
                superseded=before.superseded,
                busy_since=before.busy_since,
                breaker=Breaker.REMOVED,
                fault_at=now,  # failures of requests sent before are none of the new server's
                congested_at=now,
                well=False,
                working=False,
            )
        self._signal(self[index], Signal.ADDED)
        self._first_rows = self._rows_at_first()

    def leave(self, index: int) -> None:
        """An endpoint is sent nothing more; what it has in flight may finish."""
        self[index].skip_until = 0.0
        self._signal(self[index], Signal.REMOVED)
        self._first_rows = self._rows_at_first()

    def _rows_at_first(self) -> int:
        """Rows that an endpoint may hold before it has answered: no more than its part of the requests, which a slow
        one would keep."""
        rows = max(self.max_size, _FIRST_ROWS)
        if self.concurrency is None:
            return rows
        return min(rows, self.max_size * max(1, self.concurrency // max(1, self.present)))

    # ---- books ------------------------------

    def sent(self, index: int, rows: int, now: float) -> None:
        """A request with so many rows goes out."""
        e = self[index]
        if not e.requests:
            e.busy_since = now
        e.skip_until = 0.0
        e.tries += e.unwell_since < math.inf
        e.requests += 1
        e.held += rows

    def delivered(self, index: int, rows: int, sent_at: float, now: float) -> None:
        """Rows are delivered, or the plain prompt is answered, which is no row: update health and speed."""
        e = self[index]
        e.held -= rows
        e.done += rows or 1
        self.done += rows or 1
        e.delivered_at, e.delivers = now, True
        self._delivered_at = now
        trouble = not e.proven or e.unwell_since < math.inf or e.breaker is not Breaker.CLOSED
        if trouble and sent_at >= e.fault_at:  # what was sent before its last fault shows nothing new
            e.proven = True
            self.succeeded(index)
        e.recent += rows
        e.recent_s += now - e.busy_since
        e.busy_since = now
        if e.recent_s > 0 and e.recent:
            self._count(e, -1)
            e.rate = e.recent / e.recent_s
            self._count(e, +1)

    def ended(self, index: int, rows: int, row_s: float, took_s: float) -> None:
        """A request with so many rows was answered in full, after ``took_s`` seconds, in ``row_s`` a row on average.

        That is what a row takes there if no request was quicker. A request a little larger may be sent next.
        """
        e = self[index]
        if rows:
            e.took_s = took_s
        if row_s < math.inf:
            self._count(e, -1)
            if rows >= _FIRST_ROWS and row_s < e.row_s:
                e.slots *= row_s / e.row_s  # rows that waited took longer than they take; a few may just be short
            e.row_s = min(e.row_s, row_s)
            self._count(e, +1)
            e.slots = max(e.slots, e.rate * e.row_s)
        if e.recent > _ROUNDS * max(e.slots, _FIRST_ROWS):  # rows may get longer or shorter as the run goes on
            e.recent /= 2
            e.recent_s /= 2
        if rows > e.fitted:
            e.fitted, e.fits_needed = rows, max(1, e.fits_needed // 2)
        if e.max_rows <= rows < self.max_size:
            e.fits_left -= 1
            if not e.fits_left:
                e.max_rows = min(self.max_size, e.max_rows + max(1, e.max_rows // 8))
                e.fits_left = e.fits_needed
        if e.window < math.inf:
            e.window += max(1.0, rows / 2)
            if e.window >= self.max_size * self._max_in_flight:
                e.window = math.inf

    def grow(self, rows: int, took_s: float, left: int) -> None:
        """Make requests larger if one of the largest was answered so soon, and ``left`` rows are enough for many."""
        larger = min(self._largest, 2 * self.max_size)
        if rows < self.max_size or larger <= rows or took_s > _GROWS_S or left < _LEFT * larger * self.present:
            return
        for e in self:
            if e.max_rows == self.max_size:
                e.max_rows = larger
        self.max_size = larger
        self._first_rows = self._rows_at_first()

    def told(self, index: int, running: int, waiting: int, held: int) -> bool:
        """A server says how many rows it works on, and how many wait; returns whether they are not only this run's, of
        which it may have ``held``."""
        e = self[index]
        others = running + waiting > _OTHERS * held + _FEW_OTHERS
        if not others:
            e.works_on = 0
        elif waiting:  # else it may do more
            e.works_on = max(e.works_on, running)
        return others

    def superseded(self, index: int) -> None:
        """Another endpoint has answered a row that this one holds."""
        self[index].held -= 1
        self[index].superseded += 1

    def completed(self, index: int, unfinished: int, superseded: int, now: float) -> None:
        """A request has ended, with so many rows unfinished, and so many that others have answered."""
        e = self[index]
        e.held -= unfinished
        e.superseded -= superseded
        e.requests -= 1
        if not e.requests:
            e.recent_s += now - e.busy_since

    def _count(self, e: Endpoint, sign: int) -> None:
        """Add an endpoint to the sums over those that work, or take it off."""
        if e.working and e.rate > 0:
            self._rated += sign
            self._rate_sum += sign * e.rate
            if e.row_s < math.inf:
                self._timed += sign * e.rate
                self._slots += sign * e.rate * e.row_s

    def validate(self, held: Mapping[int, int], requests: Mapping[int, int], superseded: Mapping[int, int]) -> None:
        """Check the sums against a recount: of rows and requests in flight, by endpoint."""
        for index, e in enumerate(self):
            recount = tuple(counts.get(index, 0) for counts in (held, requests, superseded))
            assert (e.held, e.requests, e.superseded) == recount, f"endpoint {index}: {e}"
            assert e.well == (e.ready and e.unwell_since == math.inf), f"endpoint {index}: {e}"
            assert (e.unwell_since == math.inf) <= (not e.faults), f"endpoint {index}: {e}"
        rated = [e for e in self if e.working and e.rate > 0]
        timed = [e for e in rated if e.row_s < math.inf]
        out, removed = (sum(e.breaker is state for e in self) for state in (Breaker.OUT, Breaker.REMOVED))
        well, working = sum(e.well for e in self), sum(e.working for e in self)
        # An endpoint that came back counts its own answers anew.
        assert self.done >= sum(e.done for e in self), "answers are miscounted"
        counts = (self.ready, self.out, self.removed, self._well, self._n_working, self._rated)
        recount = (sum(e.ready for e in self), out, removed, well, working, len(rated))
        assert counts == recount, f"{counts}, recounted {recount}"
        for kept, values in (
            (self._rate_sum, (e.rate for e in rated)),
            (self._timed, (e.rate for e in timed)),
            (self._slots, (e.rate * e.row_s for e in timed)),
        ):
            assert math.isclose(kept, sum(values), rel_tol=1e-6, abs_tol=1e-6), "a running sum has drifted"

    # ---- health ------------------------------

    def succeeded(self, index: int) -> None:
        """An endpoint has answered: it is well."""
        e = self[index]
        e.faults, e.unwell_since, e.refuses = 0, math.inf, False
        e.denials, e.tries, e.denies = 0 if e.done else e.denials, 0, False
        self._signal(e, Signal.SUCCESS)

    def failed(
        self, index: int, failure: Failure, rows: int, sent_at: float, now: float, of_rows: bool = False
    ) -> float | None:
        """A request with so many rows failed; return the end of the endpoint's rest, if it rests.

        ``of_rows``: the endpoint denied the request for the sake of its rows, as it seems. It is sent others next, and
        rests if it denies most of these, too.
        """
        e, reaction = self[index], REACTIONS[failure.kind].endpoint
        e.failed_at, e.took_s = now, math.inf
        match reaction:
            case "fault" | "opens":
                return self._fault(index, failure, reaction == "opens", rows, sent_at, now)
            case "congested":
                told_s = failure.retry_after_s
                # One that says when to come again limits requests, not their size.
                self._congested(e, rows, sent_at, now, may_shrink=told_s is None or failure.status != 429)
                least = pause_s(0.0, self.retry, self._draw())
                return self._rest(index, self._pause_s(e, now) if told_s is None else max(told_s, least), now)
            case "smaller":
                self._shrink(e, rows)
            case "denied" if sent_at >= e.fault_at:  # else it was in flight when another was denied
                return self._denied(index, now, of_rows)
            case "none" if failure.kind is FailureKind.REJECTED:
                e.proven = True
                self.succeeded(index)  # it answers, whatever it says
            case "pause":
                e.unwell_since = min(e.unwell_since, now)
                self._count_well(e)
                return self._rest(index, self._pause_s(e, now), now)
        return None

    def _fault(self, index: int, failure: Failure, opens: bool, rows: int, sent_at: float, now: float) -> float | None:
        e = self[index]
        refuses = failure.kind is FailureKind.CONNECT
        if sent_at < e.fault_at and not (refuses and not e.refuses):
            return None  # an incident takes all requests in flight, and counts once
        e.unwell_since = min(e.unwell_since, now)
        e.fault_at, e.refuses = now, refuses
        # It may happen again soon: hold the rows that it works on at once, and fewer that wait there.
        e.window = max(1.25 * e.slots, _FIRST_ROWS, min(e.window, (e.held + rows) / 2))
        e.faults = 0 if refuses else e.faults + 1
        if refuses:
            e.proven = False  # what comes back may be another server
        trips = opens or e.faults >= self.retry.breaker_threshold
        self._signal(e, Signal.TRIP if trips else Signal.FAULT)
        return self._rest(index, self._pause_s(e, now), now) if e.breaker is Breaker.OPEN else None

    def _congested(self, e: Endpoint, rows: int, sent_at: float, now: float, may_shrink: bool) -> None:
        """Additive increase (``ended``), multiplicative decrease; several refusals at one time are one congestion."""
        if sent_at < e.congested_at:
            return
        e.unwell_since = min(e.unwell_since, now)
        e.congested_at = now
        if may_shrink and not e.held:  # it has nothing else to do and refuses: only a smaller request helps
            self._shrink(e, rows)
        e.window = max(1.0, (e.held + rows) / 2)
        self._count_well(e)

    def _shrink(self, e: Endpoint, rows: int) -> None:
        """A request of so many rows was too large."""
        if rows > e.max_rows or rows < 2:
            return  # it was sent before another one was too large, or cannot be smaller
        if 0 < e.fitted < rows:
            e.max_rows, e.fits_needed = e.fitted, min(_MOST_FITS, 2 * e.fits_needed)
        else:
            e.max_rows, e.fitted = max(1, rows // 2), 0
        e.fits_left = e.fits_needed

    def _denied(self, index: int, now: float, of_rows: bool) -> float | None:
        e = self[index]
        e.denials += 1
        e.unwell_since = min(e.unwell_since, now)
        if of_rows and (e.denials < _DENIALS or 2 * e.denials <= e.tries):
            if not e.faults:
                e.faults, e.fault_at = 1, now
            self._signal(e, Signal.FAULT)
            return None
        e.faults, e.fault_at = e.faults + 1, now
        if e.denials >= _DENIALS and not e.done:
            self._signal(e, Signal.DENIED)
            return None
        self._signal(e, Signal.TRIP)
        return self._rest(index, self._pause_s(e, now), now)

    def hold_back(self, index: int, now: float) -> float:
        """Send an endpoint nothing for the longest pause, since its answers cannot be trusted; return its end."""
        e = self[index]
        e.faults, e.unwell_since = e.faults + 1, min(e.unwell_since, now)
        self._signal(e, Signal.TRIP)
        return self._rest(index, self.retry.cap_s, now)

    def _pause_s(self, e: Endpoint, now: float) -> float:
        """The pause after a failure: a part of the time that the endpoint has been unwell."""
        unwell_s = max(0.0, now - e.unwell_since)
        pause = pause_s(unwell_s, self.retry, self._draw(), refused=e.refuses)
        if not e.refuses:
            return pause
        return max(pause, min(self.retry.cap_s, (self.present - self.ready) / _CONNECTS_PER_S))

    def rest(self, index: int, now: float, pauses: int = 1) -> float:
        """Give an endpoint a rest of so many of the shortest pauses; return its end."""
        return self._rest(index, pauses * pause_s(0.0, self.retry, self._draw()), now)

    def _rest(self, index: int, pause: float, now: float) -> float:
        e = self[index]
        e.rest_until = max(e.rest_until, now + pause)
        heapq.heappush(self._alarms, (e.rest_until, index))
        return e.rest_until

    def hold(self, index: int, until: float) -> None:
        """The rate of its gateway allows an endpoint nothing before that time."""
        e = self[index]
        if e.held_until != until:
            e.held_until = until
            heapq.heappush(self._alarms, (until, index))

    def rested(self, now: float) -> list[int]:
        """The endpoints whose rest has ended since the last call."""
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
        before, was_ready = e.breaker, e.ready
        e.breaker = BREAKER[before, signal]
        self.ready += e.ready - was_ready
        if e.breaker is not before:
            self.out += (e.breaker is Breaker.OUT) - (before is Breaker.OUT)
            self.removed += (e.breaker is Breaker.REMOVED) - (before is Breaker.REMOVED)
        self.changed = True
        self._count_well(e)

    def _count_well(self, e: Endpoint) -> None:
        well = e.ready and e.unwell_since == math.inf
        self._well += well - e.well
        e.well = well
        working = well or (e.breaker is Breaker.CLOSED and e.faults == 1)  # one fault may be an incident of many
        if working != e.working:
            self._count(e, -1)
            self._n_working += working - e.working
            e.working = working
            self._count(e, +1)

    # ---- which others ------------------------------

    def others_well(self, avoid: Collection[int]) -> bool:
        """Whether an endpoint besides these is ready and without trouble since its last success."""
        return self._well > sum(self[i].well for i in avoid)

    def can_send(self, index: int, now: float) -> bool:
        """Whether an endpoint may be sent anything now."""
        e = self[index]
        if not e.ready or e.rest_until > now or (e.breaker is Breaker.HALF_OPEN and e.requests):
            return False
        if self.last_sends is not None and now >= self.last_sends.closes_at(index):
            return False
        return self.allowed_at(index, now) <= now

    def allowed_at(self, index: int, now: float, tokens: int = 1) -> float:
        """When the rate of its gateway, and runs that go first, allow an endpoint a request with so many tokens."""
        behind = self.gives_way(index)
        if (rate := self.rate_of(index)) is not None:
            return rate.next_at(now, tokens, self[index].requests, behind)
        return (now // _GIVES_WAY_S + 1.5) * _GIVES_WAY_S if behind else now  # several wait for one moment

    def gives_way(self, index: int) -> bool:
        """Whether runs that go first leave no place at an endpoint, or a small share of what its gateway allows."""
        ahead = self._taken(index) is not None
        return ahead and (self.rate_of(index) is not None or self._places(index) <= 0)

    def _places(self, index: int) -> float:
        """Rows that may be sent to an endpoint beside those of runs that go first: while these have more to send, what
        it works on at once is filled where they are, and nothing waits there."""
        if not (taken := self._taken(index)) or self.rate_of(index) is not None:
            return math.inf
        e = self[index]
        return (e.works_on or e.slots or self._first_rows) - taken - e.held

    # ---- room ------------------------------

    def room(self, index: int, left: int, now: float) -> int:
        """Rows an endpoint may be sent in one request now, with ``left`` rows unfinished in the run; 0: none."""
        e = self[index]
        if not self.can_send(index, now):
            return 0
        size = min(self.max_size, e.max_rows)
        if e.faults and (e.breaker is Breaker.HALF_OPEN or not e.proven):
            # It may fail again, and what has never answered is likely to; a refused connection harms no row.
            size = max(1, size // 10) if e.done else max(min(size, 2), size // (5 << min(e.faults, 6)))
        if e.breaker is Breaker.HALF_OPEN:
            return size
        first = self._first_rows
        if self.present == 1:  # no other endpoint could take the rows, and a server between batches is idle
            first = _ALONE * self.max_size
            if not e.requests and not e.done and left > size >= _FIRST_ROWS:
                size //= 4  # its engine begins while it still reads the rest
        most = self._max_in_flight if e.proven or self.fed else min(self._max_in_flight, first // self.max_size)
        if e.requests >= most:
            return 0
        # As in TCP's slow start every row delivered opens the window, so that an endpoint of unknown speed holds
        # little. Then Little's law says how many rows it works on at once (rate times the time of a row that need not
        # wait): half as many again keep it full, and one batch is in reserve.
        hold = min(self.max_size * self._max_in_flight, first + 2 * e.done)
        if slots := e.works_on or e.slots:
            # Beside others the rate is a part of the server's: whose is larger would hold more, and so on.
            some = 0 if e.works_on else min(2 * self.max_size, math.ceil(e.rate * _WAIT_S))
            hold = min(hold, max(first, some, self.max_size + math.ceil(1.5 * slots)))
        if e.rate > 0 and 2 * self._rated >= self.working:
            over_s = self._over_s(left)
            if self._too_slow(index, over_s, now):
                return 0
            if now < self._delivered_at + max(over_s, _LATE_S):
                hold = min(hold, max(1, math.ceil(self._share(e, over_s))))
        if self.fed:  # rates may be those at which rows come: it may hold what it might at first
            hold = max(hold, first)
        if self.last_sends is not None and e.rate > 0:  # what it holds must be finished, too
            hold = min(hold, max(1, self.last_sends.rows(e.rate, now)))
        if e.window < hold:
            hold = max(1, int(e.window))
        if (places := self._places(index)) < hold - e.held:
            hold = e.held + math.ceil(places)
        free = hold - e.held
        # Rows finish one by one. Refilling by as few as have just finished would make the requests tiny, so an
        # endpoint that holds work waits until a whole batch, or half its share, fits.
        if e.held and free < min(size, (hold + 1) // 2):
            return 0
        return min(size, max(free, 0 if e.held else 1))

    def room_for_copies(self, index: int, left: int, now: float, stuck: bool) -> int:
        """Rows held by others that an endpoint may be sent in a request: those that it begins at once, or more if they
        are ``stuck`` where they are."""
        e = self[index]
        if e.faults or e.breaker is Breaker.HALF_OPEN or e.window < math.inf:
            return self.room(index, left, now)
        if e.requests >= self._max_in_flight or not self.can_send(index, now):
            return 0
        size = min(self.max_size, e.max_rows)
        if stuck:
            alone = not e.held and e.row_s <= 1.5 * self.usual_row_s
            return size if alone else self.room(index, left, now)
        return max(0, min(size, math.ceil(e.slots / 1.1) - e.held))

    def _over_s(self, left: int) -> float:
        """Seconds in which all endpoints together finish so many rows, the last of them included."""
        return left / self._total_rate + (self.usual_row_s if self._timed else 0.0)

    @property
    def usual_row_s(self) -> float:
        """Seconds that a row takes without waiting, on average; infinite while unknown."""
        return self._slots / self._timed if self._timed else math.inf

    def _share(self, e: Endpoint, over_s: float) -> float:
        """Rows an endpoint finishes in this time: near the end only those count that it can do from begin to end."""
        if not over_s < 4 * e.row_s < math.inf:
            return e.rate * over_s
        return e.slots * math.floor(over_s * 1.05 / e.row_s)

    def _too_slow(self, index: int, over_s: float, now: float) -> bool:
        """Whether this endpoint is slower than usual, and the others finish all that is left before it finishes a row.

        A quarter of a row is the margin, as some rows are longer than usual. The others are given the time that it
        would have taken: if work is left then, they are held up.
        """
        e = self[index]
        usual = e.row_s == math.inf or e.row_s <= 1.05 * self.usual_row_s
        if usual or 1.25 * e.row_s <= over_s * 1.05:
            e.skip_until = 0.0
            return False
        if not e.skip_until:
            e.skip_until = now + e.row_s
            heapq.heappush(self._alarms, (e.skip_until, index))
        return now < e.skip_until

    @property
    def _total_rate(self) -> float:
        """Rows a second of all that work; those not rated yet count as average."""
        return self._rate_sum * max(1.0, self.working / self._rated)

    @property
    def working(self) -> int:
        """Endpoints that work; at least 1. The others deliver nothing for now, as far as is known."""
        return max(1, self._n_working)

    def late_at(self, left: int) -> float:
        """When so many rows should all have been answered, by the rates. What is left then is unusually long, and the
        rates tell nothing of it: rows that are not sent are no more kept for those who would be the first to be free.
        """
        return self._delivered_at + max(self._over_s(left), _LATE_S) if self._rated else math.inf

    def steal_size(self, index: int, room: int, unsent: int, late: bool = False) -> int:
        """Rows an endpoint steals at once.

        Half of its share, by speed, of what is unsent (an equal share while speeds are not known): the sizes shrink
        as the work does, so that all finish together. But no less than half of what it works on at once, and none at
        all if it holds work and the size would be tiny, unless the run is ``late``.
        """
        e = self[index]
        if e.rate and 2 * self._rated >= self.working:
            part = math.ceil(unsent * e.rate / self._total_rate)
        else:
            part = math.ceil(unsent / self.working)
        size = min(room, unsent, max(1, part // 2, int(e.slots / 2)))
        return 0 if e.requests and size < min(room, self.max_size // 8) and not late else size

    def leaves(self, index: int, owner: int, rows: int, now: float) -> bool:
        """Whether an endpoint with enough to do steals none of these rows, all that another one has left: if that is no
        slower, as far as is known, it takes them with its next request."""
        e, other = self[index], self[owner]
        if not 0 < e.slots <= e.held or not other.held or rows > self.max_size:
            return False
        return _CLEARLY * other.pace >= e.pace if other.rate else now - other.busy_since <= _CLEARLY * e.row_s
