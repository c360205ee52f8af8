"""Which rows go where, and when: a state machine without I/O, clock or randomness of its own.

Events go in (``Delivered``, ``Ended``, ``Failed``, ``Tick``), each with the time, and instructions come out
(``Send``, ``Settle``, ``Drop``, ``Wake``, ``Stop``). Times are seconds on any clock that does not go back.

The rules, in the order an endpoint looking for work applies them:

1. Rows that failed elsewhere go first, never to the endpoint that failed them while another one is ready.
2. Then its own home queue, a batch at a time.
3. When that is dry, it steals from the end of the longest queue, in ever smaller bites.
4. When nothing is unsent, it copies rows that a straggler has held for several times what the run's rows usually
   take: one copy a row, a bounded share of all rows and the last ten; the first answer wins, and a request is dropped
   when nobody needs any of its rows.

``fleet.py`` says how much an endpoint may hold, and whether it is well enough to be sent anything.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from .batches import Parcel, Parcels, Queues, halves
from .fleet import Fleet
from .orders import Delivered, Drop, Ended, Event, Failed, Instruction, Send, Settle, Stop, Tick, Wake
from .policy import REACTIONS, RetryPolicy
from .records import Batch, Failure, FailureKind

__all__ = [
    "Delivered",
    "Drop",
    "Ended",
    "Event",
    "Failed",
    "Instruction",
    "Scheduler",
    "Send",
    "Settle",
    "Stop",
    "Tick",
    "Wake",
]


_PATIENCE = 2.5  # a row out for so many times what rows usually take is held up
_LEAST_PATIENCE_S = 0.5  # quicker than this nobody waits
_COPIED_SHARE = 10  # one row in ten may be copied, at most
_DEADLY = (FailureKind.DISCONNECT, FailureKind.SERVER, FailureKind.HANG)  # what an engine's death looks like
_NOBODY = (None, None)  # has refused a row
_MAX_DEATHS = 3  # a row that was there so often fails
_FEW = 10  # or so many, in short runs; and so many must have come before anything is called usual


@dataclass(slots=True)
class _Flight:
    batch: Batch
    unfinished: set[int]
    sent_at: float
    parcel: Parcel | None
    same_again: bool
    delivered: int = 0
    waited_s: float = 0.0  # what its delivered rows took, added up


@dataclass(slots=True)
class Counts:
    """What the scheduler did beyond sending each row once."""

    steals: int = 0
    halvings: int = 0
    retries: int = 0
    quarantined: int = 0
    copies: int = 0


class Scheduler:
    """The decisions of one run.

    Parameters
    ----------
    queues : sequence of sequence of int
        Per endpoint, the positions it starts with (``batches.home_queues``).
    size : int
        Length of the column: positions are below it.
    max_size, max_in_flight : int
        Rows a request and requests an endpoint, at most.
    retry : RetryPolicy
        Budgets and pauses.
    draw : callable
        Gives a random number from 0 to 1, for the jitter of pauses.
    concurrency : int, optional
        Requests in flight over all endpoints, at most.
    tight : mapping of int to int, optional
        Budgets of the rows that may not share a request with others (``batches.home_queues``).
    resting : iterable of int
        Endpoints that begin with an open breaker: they did not answer in time when they were last asked.
    hedge : bool
        Whether stragglers' rows are copied at the end of a run.

    Examples
    --------
    >>> s = Scheduler([[0, 2], [1]], 3, max_size=10, max_in_flight=2, retry=RetryPolicy(), draw=lambda: 0.0)
    >>> [(i.batch.endpoint, i.batch.rows) for i in s.start(now=0.0)]
    [(0, (0, 2)), (1, (1,))]
    >>> s.handle(Delivered(0, [0, 2]), now=1.0), s.handle(Ended(0), now=1.0)
    ([], [])
    >>> s.handle(Delivered(1, [1]), now=1.0)
    [Stop(failure=None)]
    """

    def __init__(
        self,
        queues: Sequence[Iterable[int]],
        size: int,
        *,
        max_size: int,
        max_in_flight: int,
        retry: RetryPolicy,
        draw: Callable[[], float],
        concurrency: int | None = None,
        tight: Mapping[int, int] | None = None,
        resting: Iterable[int] = (),
        hedge: bool = True,
    ) -> None:
        self._tight = tight or {}
        self._queues = Queues(queues, self._tight)
        self._left = self._queues.unsent
        self._fleet = Fleet(
            len(queues), max_size=max_size, max_in_flight=max_in_flight, retry=retry, draw=draw, resting=resting
        )
        self._max_attempts = retry.max_attempts
        self._concurrency = concurrency or math.inf
        self._settled = bytearray(size)
        self.attempts = bytearray(size)
        self.counts = Counts()
        self._faulted: dict[int, int] = {}  # faults that rows have met, against their budget
        self._staled: set[int] = set()  # rows that have met a connection closed by the server
        self._deaths: dict[int, int] = {}  # those of them that look like the death of the engine
        self._refusals: dict[int, tuple[int, Failure]] = {}  # lone rows: who refused them, in which words
        self._parcels = Parcels()
        self._quarantine: deque[Parcel] = deque()
        self._suspect: int | None = None  # the ticket of the suspect in flight
        self._flights: dict[int, _Flight] = {}
        self._hungry: dict[int, None] = {}  # endpoints that found nothing to do, the longest waiting first
        self._queued: dict[int, None] = {}  # endpoints that wait for a place under ``concurrency``, likewise
        self._offer = True  # work has come up that the hungry have not been asked about
        self._wakes: set[float] = set()  # those asked for
        self._carriers: dict[int, list[int]] = {}  # copied rows: the tickets that carry them
        self._hedge = hedge
        self._copies_left = max(_FEW, size // _COPIED_SHARE)
        self._look_at = math.inf  # when stragglers are looked for next
        self._row_s = 0.0  # seconds that delivered rows took, added up
        self._tickets = 0
        self._last_failure: Failure | None = None
        self._stopped = False
        self._now = 0.0
        self._out: list[Instruction] = []

    # ---- questions ------------------------------

    def wants(self, row: int) -> bool:
        """Whether an answer for this row is still looked for: the first answer wins."""
        return not self._settled[row]

    def budget(self, rows: Iterable[int]) -> int | None:
        """The ``max_tokens`` these rows share if they are tight, else None."""
        return min((self._tight[r] for r in rows if r in self._tight), default=None) if self._tight else None

    @property
    def fleet(self) -> Fleet:
        """How the endpoints are; only to be looked at."""
        return self._fleet

    @property
    def sent(self) -> int:
        """Requests so far."""
        return self._tickets

    # ---- events ------------------------------

    def start(self, now: float) -> list[Instruction]:
        """Begin: the first rows of every endpoint, from its own queue; only then do those that have room steal."""
        self._now, self._out = now, []
        part = max(1.0, self._concurrency / max(1, self._fleet.ready))
        for index, e in enumerate(self._fleet):
            if e.ready:
                self._fill(index, steal=False, most=part)
            else:
                self._wake(self._fleet.rest(index, now))
        self._feed()
        self._finish()
        return self._out

    def handle(self, event: Event, now: float) -> list[Instruction]:
        """Take one event at time ``now`` (seconds); return what is to be done about it, in order."""
        self._now, self._out = now, []
        if self._stopped:
            return self._out
        if isinstance(event, Tick):
            for index in self._fleet.rested(now):
                self._hungry.pop(index, None)
                self._fill(index)
            if now >= self._look_at:
                self._copy_stragglers()
        elif (flight := self._flights.get(event.ticket)) is not None:
            match event:
                case Delivered(_, rows):
                    self._delivered(flight, rows)
                case Ended():
                    self._ended(flight)
                case Failed(_, failure):
                    self._failed(flight, failure)
        self._feed()
        self._finish()
        return self._out

    def _delivered(self, flight: _Flight, rows: Sequence[int]) -> None:
        held = len(flight.unfinished)
        flight.unfinished.difference_update(rows)
        for row in rows:
            if not self._settled[row]:
                self._settled[row] = 1
                self._left -= 1
                if row in self._carriers:
                    self._release(row, flight.batch.ticket)
        came = held - len(flight.unfinished)
        waited_s = (self._now - flight.sent_at) * came
        flight.delivered += came
        flight.waited_s += waited_s
        self._row_s += waited_s
        self._fleet.delivered(flight.batch.endpoint, came, self._now)
        if came < len(flight.batch.rows):  # a whole reply is over with its rows: what that shows comes first
            self._fill(flight.batch.endpoint)

    def _ended(self, flight: _Flight) -> None:
        if flight.unfinished:
            missing = f"the reply lacks {len(flight.unfinished)} of its {len(flight.batch.rows)} rows"
            self._failed(flight, Failure(FailureKind.MALFORMED, missing))
            return
        at_limit = len(self._flights) >= self._concurrency
        self._land(flight)
        row_s = flight.waited_s / flight.delivered if flight.delivered else math.inf
        self._fleet.ended(flight.batch.endpoint, len(flight.batch.rows), row_s)
        if at_limit:  # others have waited longer for this place
            self._queued[flight.batch.endpoint] = None
        else:
            self._fill(flight.batch.endpoint)

    def _failed(self, flight: _Flight, failure: Failure) -> None:
        index = flight.batch.endpoint
        suspect = self._suspect == flight.batch.ticket
        self._land(flight)
        if failure.kind is FailureKind.STALE:
            copied, again = self._carriers.keys() & flight.unfinished, self._staled & flight.unfinished
            if copied or again or not self._fleet.fit(index, self._now):
                # Out long enough to be copied, a second time, or it went down: no accident.
                failure = replace(failure, kind=FailureKind.DISCONNECT)
            self._staled |= flight.unfinished
        self._last_failure = failure
        at = self._fleet.failed(index, failure, len(flight.batch.rows), flight.sent_at, self._now, suspect)
        if at is not None:
            self._wake(at)
        if flight.same_again and failure.kind is not FailureKind.REJECTED:
            # The connection that looked stale may have been the death of the engine. Whatever its rows meet there
            # next, nobody can tell any more: they were with it when it went.
            failure = replace(failure, kind=FailureKind.DISCONNECT)
        rows = tuple(r for r in flight.batch.rows if r in flight.unfinished and not self._settled[r])
        if REACTIONS[failure.kind].attempt:
            rows = self._spend_attempts(rows, failure)
        if failure.kind is FailureKind.REJECTED and len(flight.batch.rows) == 1 and rows:
            rows = self._refuse(rows[0], index, failure)
        rows = tuple(r for r in rows if not self._carried_by_another(r))
        if len(rows) > 1 and not self._refusals.keys().isdisjoint(rows):  # refused as copies: from now on alone
            self._offer = True
            self._parcels.extend(Parcel((r,), frozenset((index,))) for r in rows if r in self._refusals)
            rows = tuple(r for r in rows if r not in self._refusals)
        if rows:
            self._resend(flight, rows, failure)
        if not self._fleet[index].ready:
            self._give_up_second_opinions()
        self._fill(index)

    # ---- the fate of unfinished rows ------------------------------

    def _spend_attempts(self, rows: tuple[int, ...], failure: Failure) -> tuple[int, ...]:
        """Count a fault against each row; settle those whose budget is spent, return the others."""
        deadly = failure.kind in _DEADLY
        for row in rows:
            self._faulted[row] = self._faulted.get(row, 0) + 1
            if deadly:
                self._deaths[row] = self._deaths.get(row, 0) + 1
            spent = self._faulted[row] >= self._max_attempts or (deadly and self._deaths[row] >= _MAX_DEATHS)
            if spent and not self._carried_by_another(row):
                self._settle(row, failure)
        return tuple(r for r in rows if not self._settled[r])

    def _resend(self, flight: _Flight, rows: tuple[int, ...], failure: Failure) -> None:
        index, parcel, where = flight.batch.endpoint, flight.parcel or Parcel(rows), REACTIONS[failure.kind].rows
        self.counts.retries += 1
        self._offer = True
        if where == "same" and self._fleet.fit(index, self._now):
            self._send(index, rows, flight.parcel, same_again=True)
        elif where == "halve":
            self._halve(index, rows, parcel)
        elif where in ("same", "any") and flight.parcel is None:
            self._queues.put_back(index, rows)
        elif failure.kind in _DEADLY:
            self._suspected(index, rows, parcel)
        elif parcel.alone:
            self._quarantine.appendleft(parcel)
        else:
            avoid = parcel.avoid | {index} if where == "elsewhere" else parcel.avoid
            self._parcels.append(replace(parcel, rows=rows, avoid=avoid))

    def _halve(self, index: int, rows: tuple[int, ...], parcel: Parcel) -> None:
        """A refused batch is split; a refused lone row gets a second opinion."""
        if len(rows) == 1:
            self._parcels.append(Parcel(rows, parcel.avoid | {index}))
        else:
            self.counts.halvings += 1
            self._parcels.extendleft(Parcel(part, parcel.avoid) for part in reversed(halves(rows)))

    def _refuse(self, row: int, index: int, failure: Failure) -> tuple[int, ...]:
        """A lone row was refused. It fails if that is the second time, or if there is nobody else to ask."""
        if row not in self._refusals and self._fleet.others_left(index):
            self._refusals[row] = (index, failure)
        elif not self._carried_by_another(row):
            self._settle(row, failure)
            return ()
        return (row,)

    def _give_up_second_opinions(self) -> None:
        """An endpoint is lost: refused rows fail if only the one that refused them is left."""
        for parcel in (*self._parcels, *self._quarantine):
            row = parcel.rows[0]
            if row in self._refusals and not self._settled[row]:
                by, failure = self._refusals[row]
                if not self._fleet.others_left(by):
                    self._settle(row, failure)

    def _suspected(self, index: int, rows: tuple[int, ...], parcel: Parcel) -> None:
        """A batch died with its endpoint. Once: bad luck. Twice: one of its rows may be the cause."""
        if once := tuple(r for r in rows if self._deaths[r] < 2):
            self._parcels.append(replace(parcel, rows=once, avoid=parcel.avoid | {index}))
        twice = [r for r in rows if self._deaths[r] >= 2]
        self.counts.quarantined += len(twice)
        self._quarantine.extend(replace(parcel, rows=(r,), alone=True) for r in twice)

    def _settle(self, row: int, failure: Failure) -> None:
        self._settled[row] = 1
        self._left -= 1
        self._out.append(Settle(row, failure))

    # ---- handing out work ------------------------------

    def _fill(self, index: int, *, steal: bool = True, most: float = math.inf) -> None:
        """Send to one endpoint while it has room and there is work; remember it as hungry otherwise."""
        sent = 0
        while room := self._fleet.room(index, self._left, self._now):
            if len(self._flights) >= self._concurrency or sent >= most:
                self._queued[index] = None
                return
            rows, parcel = self._take(index, room, steal)
            if not rows:
                self._hungry[index] = None
                return
            self._send(index, rows, parcel)
            sent += 1
        if (at := self._fleet[index].ask_again_at) > self._now:  # left out for a while, as too slow
            self._hungry[index] = None
            self._wake(at)

    def _take(self, index: int, room: int, steal: bool) -> tuple[tuple[int, ...], Parcel | None]:
        parcel = self._take_suspect(index) or self._parcels.take(
            room, self.wants, lambda parcel: self._better_elsewhere(index, parcel)
        )
        if parcel is not None:
            return parcel.rows, parcel
        if rows := self._queues.take(index, room):
            return rows, None
        return self._steal(index, room) if steal else (), None

    def _take_suspect(self, index: int) -> Parcel | None:
        if not self._quarantine or index != self._ward():
            return None
        self._suspect = self._tickets  # the ticket that the next _send will take
        return self._quarantine.popleft()

    def _ward(self) -> int | None:
        """The endpoint that meets the next suspect, if one is due: the same one as long as it is well."""
        while self._quarantine and self._settled[self._quarantine[0].rows[0]]:
            self._quarantine.popleft()
        if not self._quarantine or self._suspect is not None:
            return None
        return self._fleet.ward(self._refusals.get(self._quarantine[0].rows[0], _NOBODY)[0], self._now)

    def _better_elsewhere(self, index: int, parcel: Parcel) -> bool:
        """Whether these rows had rather wait for another endpoint. Rows that were in a death go where there was
        none so far, so that they are not suspected for the faults of their hosts."""
        refused_by = self._refusals.get(parcel.rows[0], _NOBODY)[0]
        barred = parcel.avoid if refused_by is None else parcel.avoid | {refused_by}
        if refused_by == index or (index in barred and self._fleet.others_ready(barred)):
            return True
        died = parcel.rows[0] in self._deaths
        return died and not self._fleet[index].clean and self._fleet.others_clean(barred)

    def _steal(self, index: int, room: int) -> tuple[int, ...]:
        bite = self._fleet.bite(index, room, self._queues.unsent)
        self.counts.steals += bite > 0
        return self._queues.steal(bite) if bite else ()

    # ---- stragglers ------------------------------

    @property
    def _patience_s(self) -> float:
        """Seconds after which a row counts as held up; endless until rows have shown what is usual."""
        done = self._fleet.done
        return max(_LEAST_PATIENCE_S, _PATIENCE * self._row_s / done) if done >= _FEW else math.inf

    @property
    def _may_copy(self) -> int:
        """How many rows may be copied: their share, or the last few of the run, whatever was copied before."""
        last = self._left if self._left <= _FEW else 0
        return max(self._copies_left, last) if self._hedge else 0

    def _plan_a_look(self) -> None:
        """Idle endpoints, nothing unsent, requests under way: see later whether one of these is held up."""
        if self._look_at == math.inf and (patience := self._patience_s) < math.inf:
            oldest = next(iter(self._flights.values())).sent_at  # they stand in the order they were sent
            self._look_at = max(self._now + patience / 16, oldest + patience)
            self._wake(self._look_at)

    def _copy_stragglers(self) -> None:
        """Hand the rows that have been out for too long to the idle endpoints, in even parts."""
        self._look_at = math.inf
        late = self._now - self._patience_s
        flights = itertools.takewhile(lambda f: f.sent_at < late, self._flights.values())
        idle = [i for i in self._hungry if self._fleet.room(i, self._left, self._now)]
        idle.sort(key=lambda i: self._fleet[i].row_s)  # the quickest first
        rows = [
            (r, f)
            for f in flights
            for r in f.batch.rows
            # One that may kill engines meets no further one for the sake of speed.
            if r in f.unfinished and r not in self._carriers and r not in self._deaths and r not in self._refusals
        ][: self._may_copy]
        for place, index in enumerate(idle):
            if len(self._flights) >= self._concurrency:
                return
            part = [(r, f) for r, f in rows[place :: len(idle)] if f.batch.endpoint != index]
            part = part[: self._fleet.room(index, self._left, self._now)]
            roomy = [(r, f) for r, f in part if r not in self._tight]
            if not (part := roomy or part):
                continue
            for row, flight in part:
                self._carriers[row] = [flight.batch.ticket, self._tickets]
            self._copies_left -= len(part)
            self.counts.copies += len(part)
            del self._hungry[index]
            self._send(index, tuple(r for r, _ in part), None)

    def _carried_by_another(self, row: int) -> bool:
        """Whether a copied row is still under way after one of its carriers has landed."""
        return any(ticket in self._flights for ticket in self._carriers.get(row, ()))

    def _release(self, row: int, winner: int) -> None:
        """A copied row is won: its other carrier need not finish it, and is dropped when that was its last row."""
        for ticket in self._carriers.pop(row):
            other = self._flights.get(ticket)
            if ticket == winner or other is None or row not in other.unfinished:
                continue
            other.unfinished.discard(row)
            self._fleet.excused(other.batch.endpoint)
            if not other.unfinished:
                self._out.append(Drop(ticket))
                self._land(other)
                self._fill(other.batch.endpoint)

    def _send(self, index: int, rows: tuple[int, ...], parcel: Parcel | None, same_again: bool = False) -> None:
        self._fleet.sent(index, len(rows), self._now)
        for row in rows:
            if self.attempts[row] < 255:
                self.attempts[row] += 1
        batch = Batch(self._tickets, index, rows)
        self._tickets += 1
        self._flights[batch.ticket] = _Flight(batch, set(rows), self._now, parcel, same_again)
        self._out.append(Send(batch))

    def _land(self, flight: _Flight) -> None:
        """A request is over: take it off the books."""
        del self._flights[flight.batch.ticket]
        if self._suspect == flight.batch.ticket:
            self._suspect = None
        self._fleet.landed(flight.batch.endpoint, len(flight.unfinished), self._now)

    def _feed(self) -> None:
        """Offer work that has come up (requeued rows, freed capacity) to the endpoints that had none.

        Those that found nothing are asked again only when rows have come back, or when somebody's health decides who
        takes them: to ask a thousand of them at every event would cost more than all the rest.
        """
        while self._queued and len(self._flights) < self._concurrency:
            index = next(iter(self._queued))
            del self._queued[index]
            self._fill(index)
        if not self._hungry:
            return
        if self._quarantine and (ward := self._ward()) in self._hungry and ward is not None:
            del self._hungry[ward]
            self._fill(ward)
        if not (self._queues.unsent or self._parcels):
            if self._may_copy and self._flights:
                self._plan_a_look()
        elif self._offer or (self._parcels and self._fleet.changed):
            self._offer = self._fleet.changed = False
            for index in list(self._hungry):
                if not (self._queues.unsent or self._parcels):
                    return
                del self._hungry[index]
                self._fill(index)

    def _wake(self, at: float) -> None:
        if at <= self._now or at not in self._wakes:
            self._wakes.add(at)
            self._out.append(Wake(at))

    def _finish(self) -> None:
        if not self._left:
            self._stopped = True
            # Requests whose rows have all come only have their closing words left; the others are copies.
            self._out.extend(Drop(ticket) for ticket, flight in self._flights.items() if flight.unfinished)
            self._out.append(Stop())
        elif not self._flights and self._fleet.gone:
            self._stopped = True
            self._out.append(Stop(self._last_failure or Failure(FailureKind.CONNECT, "there is no endpoint")))
