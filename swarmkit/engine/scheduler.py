"""Which rows go where, and when: a state machine without I/O, clock or randomness of its own.

Events go in (``Delivered``, ``Ended``, ``Failed``, ``Distrusted``, ``Added``, ``Removed``, ``Joined``, ``Tick``), each
with the time, and messages come out (``Send``, ``Settle``, ``Drop``, ``Wake``, ``Stop``). Times are seconds on any
clock that does not go back.

The rules, in the order an endpoint looking for work applies them:

1. Rows that failed elsewhere go first, never to the endpoint that failed them while another one is ready.
2. Then its own home queue, a batch at a time.
3. When that is empty, it steals from the end of the longest queue, fewer rows each time; whole parts of runs that
   share a prefix, where rows are in such runs (``prefixes.py``).
4. When nothing is unsent, it duplicates rows that end later where they are (``stragglers.py``). The first answer wins,
   and a request is dropped when none of its rows is needed any more.

``endpoints.py`` says how much an endpoint may hold, and whether it is healthy enough to be sent anything;
``evidence.py`` what speaks against a row, ``suspects.py`` where rows are tested that may crash engines,
``refusals.py`` whether it is rows that are refused, ``rations.py`` what the rates of gateways allow, ``sharing.py``
what other runs leave, ``deadline.py`` when nothing more is sent; the rules of failure are in ``policy.py``.
"""

from __future__ import annotations

import heapq
import itertools
import math
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from ..records import Batch, Failure, FailureKind
from . import messages
from .breaker import Breaker
from .deadline import LastSends
from .endpoints import Fleet
from .evidence import MAX_CRASHES, Evidence
from .policy import REACTIONS
from .queues import Queues, RetryBatch, RetryBatches, halves
from .rations import Rations
from .refusals import MOST_IN_DOUBT, Refusals, words_of
from .request import Request
from .stragglers import Stragglers
from .suspects import VERDICT_S, BrokenRequest, Suspects

__all__ = ["NO_ENDPOINT", "Scheduler"]

NO_ENDPOINT = Failure(FailureKind.CONNECT, "there is no endpoint")
_BREAKS = (FailureKind.DISCONNECT, FailureKind.HANG)  # what a crash of the engine looks like
_OUTAGES = (*_BREAKS, FailureKind.CONNECT, FailureKind.STALE, FailureKind.ABORT, FailureKind.BUSY)
_OF_GATEWAYS = (502, 503, 504)
_NO_REFUSAL = (None, None)  # no endpoint has refused the row
_PLAIN: tuple[int, ...] = ()  # rows of the plain prompt, which is none of the run's
_AT_ONCE_S = 1.0
_ACCEPTED_S = 15.0  # a request that lives for so long was accepted
_PROBE_PAUSES = 20  # shortest pauses until an endpoint is probed again that refused a probe
_MAX_PROBES = 4  # endpoints that are probed at one event for the sake of suspect rows
_PATIENT_PAUSES = 60  # shortest pauses that a run waits for what may never come
_LAST_BATCHES = 64  # to retry, where nothing else is unsent: an endpoint takes its share of their rows
_TOGETHER = 4  # rows that join at one endpoint, if there are so many
_LOOKED_AT = 16  # endpoints that wait for a place: the first of these that is well gets it


@dataclass(slots=True)
class Counts:
    """What the scheduler did beyond sending each row once."""

    steals: int = 0
    halvings: int = 0
    retries: int = 0
    suspects: int = 0
    duplicates: int = 0


class Scheduler:
    """The decisions of one run.

    Parameters
    ----------
    fleet : Fleet
        The endpoints, and what they may be sent.
    queues : sequence of iterable of int
        Per endpoint, the positions it starts with (``queues.home_queues``).
    size : int
        Length of the column: positions are below it.
    limited : dict of int to int, optional
        Budgets of tokens of the rows with a limited budget (``Sizing.limited``). Those of rows that join are added.
    hedge : bool
        Whether stragglers' rows are duplicated at the end of a run.
    expected : bool
        Whether endpoints were seen to be up before the run, so that they are waited for from its beginning.
    tokens : callable
        Gives the tokens of a row, prompt and answer, as far as they can be estimated: for rates.
    parts : sequence of int, optional
        By position, which rows of the queues belong together (``prefixes.PrefixOrder``).
    awaited : int
        Rows that may join while the run goes on (``Joined``). It is over when none is left, and none may come.
    batch_tokens : int, optional
        Tokens of a request, at most, by that estimate.

    Attributes
    ----------
    fleet : Fleet
        As given; to be read.
    rations : Rations
        What its requests count for the rates of gateways.
    attempts : bytearray
        By row: the requests that it was part of, 255 at most.
    counts : Counts
        What else it did.

    Examples
    --------
    >>> from swarmkit import RetryPolicy
    >>> fleet = Fleet(2, max_size=10, max_in_flight=2, retry=RetryPolicy(), draw=lambda: 0.0)
    >>> s = Scheduler(fleet, [[0, 2], [1]], 3)
    >>> [(i.batch.endpoint, i.batch.rows) for i in s.start(now=0.0)]
    [(0, (0, 2)), (1, (1,))]
    >>> s.handle(messages.Delivered(0, [0, 2]), now=1.0), s.handle(messages.Ended(0), now=1.0)
    ([], [])
    >>> s.handle(messages.Delivered(1, [1]), now=1.0)
    [Stop(failure=None)]
    """

    def __init__(
        self,
        fleet: Fleet,
        queues: Sequence[Iterable[int]],
        size: int,
        *,
        limited: dict[int, int] | None = None,
        hedge: bool = True,
        expected: bool = True,
        tokens: Callable[[int], int] = lambda row: 1,
        parts: Sequence[int] | None = None,
        awaited: int = 0,
        batch_tokens: int | None = None,
    ) -> None:
        self.fleet = fleet
        self._limited = {} if limited is None else limited
        self._queues = Queues(queues, self._limited, parts)
        self._left = self._queues.unsent
        self._awaited = awaited
        fleet.fed = awaited > 0
        self.rations = Rations(self.fleet, tokens, batch_tokens)
        self._busy_for: set[int] = set()  # rows for which endpoints were full when they were asked alone
        self._retry = retry = fleet.retry
        self._concurrency = fleet.concurrency or math.inf
        self._settled = bytearray(size)
        self.attempts = bytearray(size)
        self.counts = Counts()
        self._met_stale: set[int] = set()  # rows that have met a connection closed by the server
        self._evidence = Evidence(retry.max_attempts, self._left + awaited)
        self._suspects = Suspects(self.fleet, self._evidence)
        self._suspects_check_at = 0.0
        self._retry_batches = RetryBatches()
        self._refusals = Refusals(self.fleet)
        self._in_doubt = 0  # parts of refused batches in flight
        self._good_row: int | None = None  # the last row delivered: what a healthy endpoint can answer
        self._paused_after = 0  # tries of the rows that have failed so far, when they last paused
        self._answered_at = 0.0
        self._first_sent = array("d", [0.0]) * size if retry.row_timeout_s else None
        self._overdue_check_at = math.inf
        self._in_flight: dict[int, Request] = {}
        self._idle: dict[int, None] = {}  # endpoints without work, the longest idle first
        self._waiting: dict[int, None] = {}  # endpoints that wait for a slot under ``concurrency``, likewise
        self._work_available = True  # there is work that the idle endpoints have not been offered
        self._wakes: set[float] = set()  # times of the Wake messages sent
        self._stragglers = Stragglers(self.fleet, self._evidence, self._in_flight, size)
        self._hedge = hedge
        self._expected = expected
        self._tickets = 0
        self._last_failure: Failure | None = None
        self._stopped = False
        self._now = 0.0
        self._late_at = 0.0  # when it is looked next whether rows are longer than they should be, or is offered again
        self._out: list[messages.Message] = []

    # ---- questions ------------------------------

    def wants(self, row: int) -> bool:
        """Whether this row still needs an answer: the first one wins."""
        return not self._settled[row]

    def budget(self, rows: Iterable[int]) -> int | None:
        """The ``max_tokens`` these rows share if their budget is limited, else None."""
        return min((self._limited[r] for r in rows if r in self._limited), default=None) if self._limited else None

    @property
    def has_unsent(self) -> bool:
        """Whether it has rows that no endpoint holds."""
        return bool(self._queues.unsent or self._retry_batches)

    @property
    def sent(self) -> int:
        """Requests so far."""
        return self._tickets

    def validate(self) -> None:
        """Check that all books agree with a recount: for tests and simulations, after any event.

        Raises
        ------
        AssertionError
            A sum, a queue or a row's place is not what the rest of the state says.
        """
        in_flight = self._in_flight.values()
        held, requests, superseded = Counter[int](), Counter[int](), Counter[int]()
        for request in in_flight:
            held[request.batch.endpoint] += len(request.unfinished)
            requests[request.batch.endpoint] += 1
            superseded[request.batch.endpoint] += request.superseded
        self.fleet.validate(held, requests, superseded)
        self._queues.validate()
        waiting = [row for queue in self._queues for row in queue]
        waiting += [row for batch in self._retry_batches for row in batch.rows if self.wants(row)]
        waiting += filter(self.wants, self._suspects.waiting())
        tested = {request.batch.endpoint for request in in_flight if request.suspect}
        for index, group in self._suspects.reserved.items():
            waiting += [] if index in tested else filter(self.wants, group.rows)
        unsettled = {row for request in in_flight for row in request.unfinished}
        assert len(set(waiting)) == len(waiting), "a row waits in two places"
        assert unsettled.isdisjoint(waiting), "a row is in flight and waits"
        assert self._left == len(waiting) + len(unsettled), "a row is neither in flight nor waiting"
        assert not any(self._settled[row] for row in unsettled), "a settled row is in flight as unfinished"

    # ---- events ------------------------------

    def start(self, now: float) -> list[messages.Message]:
        """Begin: the first rows of every endpoint, from its own queue; only then do those that have room steal."""
        self._now, self._out = now, []
        self._answered_at = now
        if self._retry.row_timeout_s:
            self._overdue_check_at = now + self._retry.row_timeout_s
            self._wake(self._overdue_check_at)
        if self.fleet.last_sends is not None:
            self._wake(self.fleet.last_sends.deadline.at)
        part = max(1.0, self._concurrency / max(1, self.fleet.ready))
        for index, e in enumerate(self.fleet):
            if e.ready:
                self._fill(index, steal=False, most=part)
            else:
                self._wake(self.fleet.rest(index, now))
        self._offer_work()
        self._finish()
        return self._out

    def handle(self, event: messages.Event, now: float) -> list[messages.Message]:
        """Take one event at time ``now`` (seconds); return what is to be done about it, in order."""
        self._now, self._out = now, []
        if isinstance(event, (messages.Added, messages.Removed)):  # also after the end: it may turn out to be none
            self._fleet_changed(event)
        if self._stopped and not self._goes_on(event):
            return self._out
        match event:
            case messages.Tick():
                self._ticked()
            case messages.Distrusted(index, rows):
                self._distrusted(index, rows)
            case messages.Joined():
                self._joined(event)
            case messages.Added(index) | messages.Removed(index):
                self._fill(index)  # of one that has left it frees the suspect rows that it was reserved for
            case messages.Delivered(ticket, rows, invalid) if request := self._in_flight.get(ticket):
                self._delivered(request, rows, invalid)
            case messages.Ended(ticket, tokens) if request := self._in_flight.get(ticket):
                self._ended(request, tokens)
            case messages.Failed(ticket, failure, retracted) if request := self._in_flight.get(ticket):
                self._failed(request, failure, retracted)
        self._offer_work()
        self._finish()
        return self._out

    def _goes_on(self, event: messages.Event) -> bool:
        """Whether the run goes on after its end: a stream whose rows had all come turns out malformed later."""
        if self._left or not isinstance(event, messages.Ended | messages.Failed) or event.ticket not in self._in_flight:
            return False
        self._stopped = isinstance(event, messages.Ended) or not event.retracted
        if self._stopped:
            self._complete(self._in_flight[event.ticket])
        return not self._stopped

    def _ticked(self) -> None:
        rested = self.fleet.rested(self._now)
        self._wakes = {at for at in self._wakes if at > self._now}
        for broken, crashed, lives in list(self._suspects.verdicts(self._now)):
            self._judge(broken, crashed, lives)
        for row in list(self._suspects.hopeless()):
            if self.wants(row):
                self._settle(row, self._evidence.breaks[row])
        if self._suspects.groups:
            self._place_suspects()  # before endpoints that are back are filled with other work
        for index in rested:
            self._idle.pop(index, None)
            self._fill(index)
        if self._now >= self._stragglers.check_at:
            self._duplicate_stragglers()
        if self._now >= self._overdue_check_at:
            self._fail_overdue_rows()

    def _fleet_changed(self, event: messages.Added | messages.Removed) -> None:
        index = event.endpoint
        if isinstance(event, messages.Added):
            if not self.fleet.present:
                self._answered_at = self._now  # the time in which one must answer begins anew
            self.fleet.enter(index, self._now)
            if index == len(self._queues):
                self._queues.add()
        else:
            self.fleet.leave(index)
            self._evidence.decide(index, answers=False)
            self._idle.pop(index, None)
            self._waiting.pop(index, None)
            self._give_up_second_opinions()
            self._work_available = True  # the rows of its queue are there to be stolen

    def _joined(self, event: messages.Joined) -> None:
        """Rows join: they go to the endpoints that hold the least, a few to each; what these have no room for waits in
        their queues, to be stolen."""
        self._awaited = event.awaited
        if not event.rows:
            return
        if not self._left:
            self._answered_at = self._now  # nothing was asked: the time in which one must answer begins anew
        self._left += len(event.rows)
        self._limited.update(event.limited)
        usable = [i for i, e in enumerate(self.fleet) if e.ready] or range(len(self.fleet))
        count = math.ceil(len(event.rows) / _TOGETHER)
        dealt_to = heapq.nsmallest(count, usable, key=lambda i: self.fleet[i].held + len(self._queues[i]))
        for place, index in enumerate(dealt_to):
            self._queues.put_back(index, event.rows[place :: len(dealt_to)], last=True)
        for index in dealt_to:
            self._idle.pop(index, None)
            self._fill(index, steal=False)
        self._work_available = True

    def _delivered(self, request: Request, rows: Sequence[int], invalid: Sequence[int]) -> None:
        if not (rows or invalid):
            return
        held = len(request.unfinished)
        invalid = [row for row in invalid if row in request.unfinished]
        request.unfinished.difference_update(rows, invalid)
        settled = self._settled
        if answered := [row for row in rows if not settled[row]]:
            for row in answered:
                settled[row] = 1
            self._left -= len(answered)
            self._good_row = answered[-1]
            self._evidence.answered = True
            if self._stragglers.have_duplicates(answered):  # hardly ever, so it is asked once for all rows
                for row in answered:
                    for other in self._stragglers.superseded(row, request.batch.ticket):
                        self._forget(other, row)
        avoid = request.retry_batch.avoid if request.retry_batch else frozenset[int]()
        for row in filter(self.wants, invalid):  # another server may hold its model to what is asked for
            if not any(self._stragglers.superseded(row, request.batch.ticket)):  # no other request holds it
                self._retry_batches.append(RetryBatch((row,), avoid | {request.batch.endpoint}, part=True))
                self._work_available = True
        came = held - len(request.unfinished)
        self._work_available |= not self.fleet.done  # what is refused may be rows
        waited_s = (self._now - request.sent_at) * came
        request.delivered += came
        request.waited_s += waited_s
        self._stragglers.waited_s += waited_s
        self._answered_at = self._now
        self.fleet.delivered(request.batch.endpoint, came, request.sent_at, self._now)
        self._decide(request.batch.endpoint)
        if came < len(request.batch.rows):  # a whole reply ends with its rows: its end is counted first
            self._fill(request.batch.endpoint)

    def _ended(self, request: Request, tokens: int | None) -> None:
        if request.unfinished:
            missing = f"the reply lacks {len(request.unfinished)} of its {len(request.batch.rows)} rows"
            self._failed(request, Failure(FailureKind.MALFORMED, missing))
            return
        at_limit = len(self._in_flight) >= self._concurrency
        if request.counts:
            self._evidence.count_request(failed=False, probe=request.is_probe)
        if not request.batch.rows:
            self._refusals.answered(request.batch.ticket)
            self._work_available = True
            self._answered_at = self._now
            if self.fleet[request.batch.endpoint].faults:
                self._pause_rows(request.batch.endpoint)
            self.fleet.delivered(request.batch.endpoint, 0, request.sent_at, self._now)
            self._decide(request.batch.endpoint)
        self._complete(request, tokens)
        if self.fleet.last_sends is not None and request.delivered:
            seconds = self._now - request.sent_at
            self.fleet.last_sends.took(request.batch.endpoint, len(request.batch.rows), seconds)
        row_s = request.waited_s / request.delivered if request.delivered else math.inf
        rows, took_s = len(request.batch.rows), self._now - request.sent_at
        self.fleet.ended(request.batch.endpoint, rows, row_s, took_s)
        self.fleet.grow(rows, took_s, self._left + self._awaited)
        if at_limit:  # others have waited longer for this place
            self._waiting[request.batch.endpoint] = None
        else:
            self._fill(request.batch.endpoint)

    def _pause_rows(self, index: int) -> None:
        """An endpoint fails for rows only: it rests before they are sent once more, when all had their turn."""
        tries = [self.attempts[row] for batch in self._retry_batches for row in batch.rows]
        if not tries or min(tries) > self._paused_after:
            self._paused_after = min(tries, default=self._paused_after)
            self._wake(self.fleet.rest(index, self._now))

    def _decide(self, index: int) -> None:
        """An endpoint has answered what was sent after it denied rows: they are asked once more, or fail."""
        if self._evidence.in_question and not self.fleet[index].faults:
            for row in filter(self.wants, self._evidence.decide(index, answers=True)):
                self._settle(row, self._evidence.refusals[row][1])
            self._work_available = True

    def _failed(self, request: Request, failure: Failure, retracted: Sequence[int] = ()) -> None:
        index = request.batch.endpoint
        e = self.fleet[index]
        self._retract(retracted)
        request.unfinished.update(retracted)
        e.held += len(retracted)
        self._complete(request, 0 if failure.kind is FailureKind.BUSY else None)
        stale = failure.kind is FailureKind.STALE
        failure = self._classified(request, failure)
        taken_out = e.breaker is Breaker.REMOVED  # such a server is stopped; that says nothing about its rows
        reaction, breaks = REACTIONS[failure.kind], failure.kind in _BREAKS and not taken_out
        self._last_failure = failure
        if reaction.counts and request.counts and not taken_out:
            self._evidence.count_request(failed=True, probe=request.is_probe)
        # For others: it has answered some, and not just refused them, and its last outcome was no fault.
        answers = e.proven and e.done > 0 and not (stale or taken_out)
        well = answers and not e.faults
        # Or was when this was sent, and others failed with it: each of them may be at fault.
        was_well = well or (answers and e.faults == 1 and request.sent_at < e.fault_at)
        # Denied by an endpoint that has answered: that may be about these rows. Not so where it is the key (keys expire
        # and no row is to blame) or a prompt that is known to be good.
        denies = failure.kind is FailureKind.DENIED and not (failure.of_key or request.is_probe)
        closed = e.breaker is Breaker.CLOSED or request.sent_at < e.fault_at
        denied = denies and closed and e.proven and e.done > 0 and not taken_out
        at = self.fleet.failed(index, failure, len(request.batch.rows), request.sent_at, self._now, of_rows=denied)
        if failure.kind is FailureKind.DENIED:
            e.denies = denies
        if failure.kind is FailureKind.REJECTED:
            self._decide(index)
        elif failure.kind is not FailureKind.DENIED:
            self._evidence.failed(index)
        elif not denied:
            self._evidence.decide(index, answers=False)
        if words := self._refusals.failed(request.batch.ticket, failure):
            self._fail_refused(words, failure)
        elif request.is_probe and at is None:
            pauses = _PROBE_PAUSES if request.batch.rows else 1  # that row is not good there
            at = self.fleet.rest(index, self._now, pauses)
        if at is not None:
            self._wake(at)
        rows = tuple(r for r in request.batch.rows if r in request.unfinished and not self._settled[r])
        alone = len(request.batch.rows) == 1
        if alone and rows and failure.kind is FailureKind.REJECTED and self._stragglers.has_duplicate(rows[0]):
            self._evidence.refusals.setdefault(rows[0], (index, failure))
        for row in filter(self._stragglers.has_duplicate, rows):
            self._stragglers.lost(row)
            if was_well and reaction.counts:
                self._evidence.count_fault((row,), alone)
            if breaks:
                self._evidence.meet((row,), index, failure)
            rows = tuple(r for r in rows if r != row)
        if rows:
            self._work_available = True
            self.counts.retries += 1
            if breaks:
                self._broke(request, rows, failure, well)
            elif denied or reaction.rows == "refused":
                self._refused(rows, index, failure, request.retry_batch or RetryBatch(rows), alone)
            elif reaction.counts:
                self._blame(rows, index, failure, was_well, alone, request.retry_batch)
            else:
                self._resend(request, rows, failure)
                if alone and failure.kind is FailureKind.BUSY:
                    self._busy_for.add(rows[0])
        if not e.well:
            self._give_up_second_opinions()
        self._fill(index)

    def _classified(self, request: Request, failure: Failure) -> Failure:
        """What the failure is, given what is known of its rows and its endpoint."""
        kind, rows = failure.kind, request.unfinished
        if kind is FailureKind.STALE:
            again = self._stragglers.have_duplicates(rows) or not self._met_stale.isdisjoint(rows)
            self._met_stale |= rows
            if again or not self.fleet.can_send(request.batch.endpoint, self._now):
                kind = FailureKind.DISCONNECT  # no idle timeout: not the first, or long in flight, or it is down
        elif request.resent and kind in (FailureKind.CONNECT, FailureKind.HANG):
            # The connection that looked stale may have ended with a crash of the engine: its rows were in flight then.
            kind = FailureKind.DISCONNECT
        elif kind is FailureKind.TOO_LARGE and len(request.batch.rows) <= 1:
            kind = FailureKind.SERVER if failure.status == 504 else FailureKind.REJECTED
        return failure if kind is failure.kind else replace(failure, kind=kind)

    # ---- unfinished rows ------------------------------

    def _resend(self, request: Request, rows: tuple[int, ...], failure: Failure) -> None:
        """Send rows again after a failure that says nothing against them."""
        index, batch = request.batch.endpoint, request.retry_batch or RetryBatch(rows)
        where = REACTIONS[failure.kind].rows
        if batch.suspect:
            self._suspects.groups.appendleft(replace(batch, rows=rows))
        elif where == "same" and self.fleet.can_send(index, self._now):
            self._send(index, rows, request.retry_batch, resent=True)
        elif (
            where in ("same", "any") and request.retry_batch is None and self._evidence.refusals.keys().isdisjoint(rows)
        ):
            # Where it is full for one row only, the others come first.
            self._queues.put_back(index, rows, last=failure.kind is FailureKind.BUSY)
        else:
            # An endpoint that refuses connections at once has not seen the rows and cost them no time.
            refused = failure.kind is FailureKind.CONNECT and self._now - request.sent_at < _AT_ONCE_S
            avoid = batch.avoid if refused or where == "any" else batch.avoid | {index}
            for_rows = failure.kind is FailureKind.DENIED and not failure.of_key
            parts = halves(rows) if for_rows and len(rows) > 1 else [rows]
            self._retry_batches.extend(RetryBatch(part, avoid, part=batch.part or len(parts) > 1) for part in parts)

    def _refused(self, rows: tuple[int, ...], index: int, failure: Failure, batch: RetryBatch, alone: bool) -> None:
        """A refused batch is halved, unless what it is refused for is no row. A row that is refused alone is sent to
        one other endpoint, then it fails."""
        words = words_of(failure) if failure.kind is FailureKind.REJECTED else ""
        if self._refusals.are_hopeless(words):
            self._fail(rows, failure)
            return
        if not alone:
            by = self._refusals.by(words)
            if index in by:
                self._retry_batches.append(RetryBatch(rows, batch.avoid | by, part=True, refused=words))
                return
            doubtful = bool(words) and self._refusals.are_doubtful(words, index, batch.refused == words)
            free = self.fleet.can_send(index, self._now) and index not in self._suspects.reserved
            if doubtful and free and not self.fleet.done:
                self._refusals.ask(self._tickets, words, index)
                self._send(index, _PLAIN, None, as_rows=True)
            self.counts.halvings += 1
            parts = reversed(halves(rows))
            self._retry_batches.extendleft(RetryBatch(part, batch.avoid, part=True, refused=words) for part in parts)
            return
        _, first = self._evidence.refusals.get(rows[0], _NO_REFUSAL)
        if failure.kind is FailureKind.DENIED and (first is None or first.kind is FailureKind.DENIED):
            self._evidence.question(rows[0], index)  # it may deny everything from now on: what it says next shows that
        elif first is not None or not self.fleet.others_well({index}):
            self._settle(rows[0], failure)
            return
        self._evidence.refusals[rows[0]] = (index, failure)
        self._retry_batches.append(RetryBatch(rows, batch.avoid | {index}, part=True))

    def _fail_refused(self, words: str, failure: Failure) -> None:
        """A short prompt was refused, too: the rows that were refused in the same words and wait for an endpoint fail,
        or go to another one."""
        hopeless, by = self._refusals.are_hopeless(words), self._refusals.by(words)
        for _ in range(len(self._retry_batches)):
            batch = self._retry_batches.popleft()
            if batch.refused == words and hopeless:
                self._fail(filter(self.wants, batch.rows), failure)
            else:
                avoid = batch.avoid | by if batch.refused == words else batch.avoid
                self._retry_batches.append(replace(batch, avoid=avoid))
        self._work_available = True

    def _fail(self, rows: Iterable[int], failure: Failure) -> None:
        for row in rows:
            self._settle(row, failure)

    def _give_up_second_opinions(self) -> None:
        """An endpoint is unwell: rows that were refused alone fail if no other endpoint can be asked now."""
        for batch in self._retry_batches:
            row = batch.rows[0]
            if row in self._evidence.refusals and not self._settled[row]:
                by, failure = self._evidence.refusals[row]
                if failure.kind is not FailureKind.DENIED and not self.fleet.others_well({by}):
                    self._settle(row, failure)

    def _blame(
        self, rows: tuple[int, ...], index: int, failure: Failure, well: bool, alone: bool, batch: RetryBatch | None
    ) -> None:
        """Rows of a request that failed by a fault: sent again elsewhere, halved, or failed."""
        if well:
            self._evidence.count_fault(rows, alone)
        if alone and well and self._evidence.is_spent(rows[0]):
            self._settle(rows[0], failure)
            return
        # All that is left failed at once, and nothing is answered yet: only a part of it can tell who is at fault.
        unknown = not self.fleet.done and len(rows) == self._left
        halved = len(rows) > 1 and (unknown or (well and self._evidence.points_at(rows)))
        self.counts.halvings += halved
        suspect, part = (batch.suspect, batch.part) if batch else (False, False)
        for some in halves(rows) if halved else [rows]:
            again = RetryBatch(some, frozenset((index,)), suspect, part=part or halved)
            (self._suspects.groups if suspect else self._retry_batches).append(again)

    def _broke(self, request: Request, rows: tuple[int, ...], failure: Failure, well: bool) -> None:
        """A connection broke: what that says about the rows is decided a little later (``suspects.py``)."""
        index = request.batch.endpoint
        self._evidence.meet(rows, index, failure)
        self._wake(self._now + VERDICT_S)
        alone = len(request.batch.rows) == 1
        held = self._suspects.broke(index, rows, failure, self._now, counts=well, alone=alone, tested=request.suspect)
        if not held:
            part = request.retry_batch is not None and request.retry_batch.part
            self._retry_batches.append(RetryBatch(rows, frozenset((index,)), part=part))

    def _judge(self, broken: BrokenRequest, crashed: bool, lives: bool) -> None:
        """Decide what a broken connection says about its rows, and send on those that waited for that."""
        rows = tuple(filter(self.wants, broken.rows))
        if not rows:
            return
        self._work_available = True
        if not crashed and (lives or self._evidence.excuse(rows)):
            counts = broken.counts and lives
            if broken.held:
                batch = RetryBatch(rows, suspect=broken.tested and not lives, part=True)
                self._blame(rows, broken.endpoint, broken.failure, counts, broken.alone, batch)
            elif counts:
                self._evidence.count_fault(rows, broken.alone)
            return
        self._evidence.count_crash(rows, alone=broken.tested and broken.alone)
        if not broken.held:
            return
        if self._evidence.is_condemned(rows[0]):
            self._settle(rows[0], broken.failure)
            return
        self.counts.suspects += len(rows)
        self.counts.halvings += broken.tested and len(rows) > 1
        for part in halves(rows) if broken.tested else [rows]:
            self._suspects.groups.append(RetryBatch(part, suspect=True))

    def _retract(self, rows: Iterable[int]) -> None:
        """Take answers back: the rows are open again."""
        for row in rows:
            if self._settled[row]:
                self._settled[row] = 0
                self._left += 1
                if self._good_row == row:
                    self._good_row = None

    def _distrusted(self, index: int, rows: Sequence[int]) -> None:
        """An endpoint answers, but its answers are worth nothing: hold it back, ask its rows again elsewhere."""
        self._wake(self.fleet.hold_back(index, self._now))
        size = self.fleet.max_size
        rows = tuple(row for row in rows if self._settled[row])
        self._retract(rows)
        avoid = frozenset((index,))
        self._retry_batches.extend(RetryBatch(rows[i : i + size], avoid) for i in range(0, len(rows), size))
        self._work_available = True

    def _fail_overdue_rows(self) -> None:
        """Fail the rows that have waited for ``row_timeout_s`` since they were first sent."""
        limit = self._retry.row_timeout_s or math.inf
        first: Sequence[float] = self._first_sent or ()
        held = [(row, request) for request in self._in_flight.values() for row in request.unfinished]
        waiting = [row for batch in self._retry_batches for row in batch.rows]
        for row, request in (*held, *((row, None) for row in (*waiting, *self._suspects.waiting()))):
            if self._settled[row] or self._now - first[row] < limit:
                continue
            last = f"; the last failure: {self._last_failure.describe()}" if self._last_failure else ""
            self._settle(row, Failure(FailureKind.HANG, f"not answered within row_timeout_s={limit:g}{last}"))
            if request is not None:
                self._forget(request, row)
        self._overdue_check_at = self._now + max(0.1, limit / 20)
        self._wake(self._overdue_check_at)

    def _forget(self, request: Request, row: int) -> None:
        """A request need not answer this row any more; it is dropped when that was its last one."""
        request.unfinished.discard(row)
        request.superseded += 1
        self.fleet.superseded(request.batch.endpoint)
        if not request.unfinished:
            e = self.fleet[request.batch.endpoint]
            e.delivers = e.delivers and e.delivered_at > request.sent_at
            self._out.append(messages.Drop(request.batch.ticket))
            self._complete(request)
            self._fill(request.batch.endpoint)

    def _settle(self, row: int, failure: Failure) -> None:
        self._settled[row] = 1
        self._left -= 1
        self._out.append(messages.Settle(row, failure))

    # ---- handing out work ------------------------------

    def _fill(self, index: int, *, steal: bool = True, most: float = math.inf) -> None:
        """Send to one endpoint while it has room and there is work; note it as idle otherwise."""
        if index in self._suspects.reserved:
            self._test(index)
            return
        sent = 0
        while room := self.fleet.room(index, self._left + self._awaited, self._now):
            if len(self._in_flight) >= self._concurrency or sent >= most:
                self._waiting[index] = None
                return
            if (work := self._take(index, room, steal)) is None:
                self._idle[index] = None
                return
            rows, batch = work
            if rows and not (rows := self._affordable(index, rows, batch)):
                return
            self._send(index, rows, batch)
            sent += 1
        if (at := self.fleet[index].skip_until) > self._now:  # skipped for a while, as too slow
            self._idle[index] = None
            self._wake(at)
        elif self.fleet[index].ready and (at := self.fleet.allowed_at(index, self._now)) > self._now:
            self._hold(index, at)

    def _hold(self, index: int, until: float, rows: Sequence[int] = ()) -> None:
        self.rations.hold(index, until, rows)
        self._wake(until)

    def _affordable(self, index: int, rows: tuple[int, ...], batch: RetryBatch | None) -> tuple[int, ...]:
        """The first of these rows, as many as there are tokens for; the others wait again."""
        count = self.rations.affordable(index, rows, self._now)
        if left := tuple(filter(self.wants, rows[count:])):
            if batch is not None:
                self._retry_batches.appendleft(replace(batch, rows=left))
            else:
                self._queues.put_back(index, left)
        if not count:
            self._hold(index, self.rations.allowed_at(index, rows[0], self._now), rows)
        return rows[:count]

    def _take(self, index: int, room: int, steal: bool) -> tuple[tuple[int, ...], RetryBatch | None] | None:
        e = self.fleet[index]
        faulty = e.faults
        if e.denies and e.breaker is Breaker.HALF_OPEN:  # it may deny rows only: what is known to be good shows that
            return self._probe, None
        if not faulty and (batch := self._take_retry(index, room)):
            return batch.rows, batch
        if rows := self._queues.take(index, room) or (self._steal(index, room) if steal else ()):
            return rows, None
        incident = faulty > 0 and self._suspects.is_incident(index)  # also again, before anything was answered
        others = self.fleet.others_well({index})
        # The fault may be no more than that. What a gateway says of a server behind it is not about rows: where no
        # other endpoint can answer them, they go again however often they failed. A balancer that sends each second
        # request to a dead server would send them there for ever, if one that succeeds went between.
        passing = incident or (faulty == 1 and (others or self._is_of_gateway))
        if passing and (batch := self._take_retry(index, room, unblamed=others and not incident)):
            return batch.rows, batch
        # After a fault an endpoint is sent rows that have not failed, or else one that others have answered. Where all
        # have failed so far, it is sent the plain prompt: an endpoint that answers that is not to blame.
        tests = self._suspects.groups and not (e.well and e.proven)  # rows wait for endpoints that are well
        if (tests or (faulty and self._retry_batches)) and not e.requests:
            return self._probe, None
        return None

    @property
    def _probe(self) -> tuple[int, ...]:
        return _PLAIN if self._good_row is None else (self._good_row,)

    @property
    def _is_of_gateway(self) -> bool:
        return self._last_failure is not None and self._last_failure.status in _OF_GATEWAYS

    def _take_retry(self, index: int, room: int, unblamed: bool = False) -> RetryBatch | None:
        """A batch to retry; ``unblamed``: only one that has hardly failed, by server errors at most."""
        if not self._retry_batches:
            return None

        def passes(batch: RetryBatch) -> bool:
            if self._evidence.awaits(batch.rows[0]):
                return True
            doubtful = bool(batch.refused) and not self.fleet.done and self._refusals.are_open(batch.refused)
            if doubtful and self._in_doubt >= MOST_IN_DOUBT:
                return True
            blamed = unblamed and (batch.part or self._evidence.most_faults(batch.rows) > 2)
            return blamed or self._prefers_another(index, batch)

        if not self._queues.unsent and len(self._retry_batches) <= _LAST_BATCHES:  # these are shared out
            waiting = sum(len(batch.rows) for batch in self._retry_batches)
            share = max(waiting / self.fleet.working, self.fleet[index].slots / 2)  # half of what it works on at once
            room = min(room, math.ceil(share))
        return self._retry_batches.take(
            room, self.wants, passes=passes, joins=lambda row, other: (row in self._limited) == (other in self._limited)
        )

    def _prefers_another(self, index: int, retry_batch: RetryBatch) -> bool:
        """Whether these rows wait for another endpoint: not one that failed or refused them, and a row that breaks
        connections meets no more than three."""
        row = next((r for r in retry_batch.rows if r in self._evidence.refusals), retry_batch.rows[0])
        refused_by, refusal = self._evidence.refusals.get(row, _NO_REFUSAL)
        barred = retry_batch.avoid if refused_by is None else retry_batch.avoid | {refused_by}
        sites = self._evidence.most_sites(retry_batch.rows)
        if refusal is not None and refusal.kind is not FailureKind.DENIED and refused_by == index:
            return True
        if len(sites) >= MAX_CRASHES:
            return index not in sites and any(self._suspects.may_return(i) for i in sites)
        return index in barred and self.fleet.others_well(barred)

    def _test(self, index: int) -> None:
        """Send a group of suspect rows to the endpoint that is reserved for it, as soon as nothing else is there."""
        e = self.fleet[index]
        if e.requests:
            return
        group = self._suspects.reserved[index]
        rows = tuple(filter(self.wants, group.rows))
        if not rows or not e.well:
            del self._suspects.reserved[index]
            if rows:
                self._suspects.groups.appendleft(replace(group, rows=rows))
            self._fill(index)
        elif len(self._in_flight) >= self._concurrency:
            self._waiting[index] = None
        elif self.fleet.can_send(index, self._now):
            size = min(self.fleet.max_size, e.max_rows, self.rations.fitting(rows))
            if len(rows) > size:
                self._suspects.groups.appendleft(replace(group, rows=rows[size:]))
            self._suspects.reserved[index] = group = replace(group, rows=rows[:size])
            self._send(index, group.rows, group)
        elif (at := self.fleet.allowed_at(index, self._now)) > self._now:
            self._hold(index, at)

    def _place_suspects(self) -> None:
        """Reserve endpoints for groups of suspect rows: a quarter of the fleet, or all while there is no other work."""
        busy = self._queues.unsent or self._retry_batches
        most = max(1, self.fleet.present // 4) if busy else len(self.fleet)
        for index in self._suspects.place(self._now, most, self.wants):
            self._idle.pop(index, None)
            self._waiting.pop(index, None)
            self._test(index)
        if self._suspects.groups:  # a test needs a healthy endpoint: let those that are idle show whether they are
            unsure = (i for i in self._idle if not (self.fleet[i].well and self.fleet[i].proven))
            for index in list(itertools.islice(unsure, _MAX_PROBES)):
                del self._idle[index]
                self._fill(index)
        if self._suspects.groups and self._now >= self._suspects_check_at:  # an endpoint may be free for them by then
            self._suspects_check_at = self._now + VERDICT_S
            self._wake(self._suspects_check_at)

    def _steal(self, index: int, room: int) -> tuple[int, ...]:
        if (owner := self._queues.longest()) is None:
            return ()
        if self.fleet.leaves(index, owner, len(self._queues[owner]), self._now):
            return ()
        late = self._now >= self.fleet.late_at(self._left + self._awaited)
        steal_size = self.fleet.steal_size(index, room, self._queues.unsent, late)
        self.counts.steals += steal_size > 0
        return self._queues.steal(steal_size, index) if steal_size else ()

    # ---- stragglers ------------------------------

    def _duplicate_stragglers(self) -> None:
        """Send the idle endpoints rows, too, that end later where they are."""
        idle = [i for i in self._idle if self.fleet[i].delivers and self.fleet.can_send(i, self._now)]
        idle = [i for i in idle if self.fleet.rate_of(i) is None]  # what is limited is not spent on them
        idle = [i for i in idle if self.fleet[i].well] or idle
        for index, rows in self._stragglers.copies(self._now, self._left + self._awaited, idle, self._limited):
            if len(self._in_flight) >= self._concurrency:
                return
            rows = rows[: self.rations.fitting([row.row for row in rows])]
            for row in rows:
                self._stragglers.duplicated(row, self._tickets)
            self.counts.duplicates += len(rows)
            self._idle.pop(index, None)
            self._send(index, tuple(row.row for row in rows), None)

    def _send(
        self,
        index: int,
        rows: tuple[int, ...],
        retry_batch: RetryBatch | None,
        resent: bool = False,
        as_rows: bool = False,
    ) -> None:
        settled, attempts = self._settled, self.attempts
        open_rows = {
            row for row in rows if not settled[row]
        }  # none, where a prompt that is known to be good is a probe
        self.fleet.sent(index, len(open_rows), self._now)
        for row in open_rows:
            if attempts[row] < 255:
                attempts[row] += 1
        if self._first_sent is not None:
            for row in open_rows:
                self._first_sent[row] = self._first_sent[row] or self._now
        if self._evidence.in_question:
            self._evidence.ask_again(open_rows)
        batch = Batch(self._tickets, index, rows)
        self._tickets += 1
        counts = not self._evidence.speaks_against(rows)
        request = Request(batch, open_rows, self._now, retry_batch, resent, not open_rows, counts)
        self._in_flight[batch.ticket] = request
        self._in_doubt += request.is_part
        self.rations.sent(batch.ticket, index, rows, self._now)
        self._out.append(messages.Send(batch, as_rows))

    def _complete(self, request: Request, tokens: int | None = None) -> None:
        """A request has ended, after so many tokens as far as is known: remove it from the books."""
        index = request.batch.endpoint
        del self._in_flight[request.batch.ticket]
        self.rations.over(request.batch.ticket, tokens)
        self._in_doubt -= request.is_part
        self.fleet.completed(index, len(request.unfinished), request.superseded, self._now)
        if request.suspect:
            self._suspects.reserved.pop(index, None)

    def _offer_work(self) -> None:
        """Offer work (requeued rows, freed capacity) to the endpoints that had none.

        Idle endpoints are offered work only when rows have come back, or when the health of an endpoint decides who
        takes them: to visit a thousand of them at every event would cost more than all the rest.
        """
        for index in self.rations.freed():
            self._idle.pop(index, None)
            self._waiting[index] = None
        while self._waiting and len(self._in_flight) < self._concurrency:
            # One that is unwell may keep its place for long, while others would answer.
            first = itertools.islice(self._waiting, _LOOKED_AT)
            index = next((i for i in first if self.fleet[i].well), next(iter(self._waiting)))
            del self._waiting[index]
            self._fill(index)
        if self._suspects.groups:
            self._place_suspects()
        if self._queues.unsent:
            self._offer_late()
        if not self._idle:
            return
        if not (self._queues.unsent or self._retry_batches):
            if self._hedge and self._in_flight and (at := self._stragglers.schedule(self._now)) is not None:
                self._wake(at)
            return
        if self._work_available or (self._retry_batches and self.fleet.changed):
            self._work_available = self.fleet.changed = False
            for index in list(self._idle):
                if not (self._queues.unsent or self._retry_batches):
                    return
                del self._idle[index]
                self._fill(index)

    def _offer_late(self) -> None:
        """Offer work to all endpoints if what is left is longer than it should be; else look again when it would be."""
        at = self.fleet.late_at(self._left + self._awaited)
        if at > self._now:
            # It is a little later or earlier with each answer: one look that is planned will do.
            if at < math.inf and not self._now < self._late_at <= at + 1.0:
                self._late_at = at
                self._wake(at)
        elif self._now >= self._late_at:
            for index in [i for i, e in enumerate(self.fleet) if e.well and e.proven]:
                self._idle.pop(index, None)
                self._fill(index)
            self._late_at = self._now + 1.0

    def _wake(self, at: float) -> None:
        if at <= self._now or at not in self._wakes:
            self._wakes.add(at)
            self._out.append(messages.Wake(at))

    @property
    def gives_up_at(self) -> float:
        """When the run ends unless an endpoint answers before."""
        patience = self._retry.give_up_s
        if not self.fleet.present:
            return self._answered_at + patience
        last = self._last_failure
        polite = last is not None and last.kind is FailureKind.BUSY and last.retry_after_s is not None
        down = polite or (self._expected and last and last.kind in _OUTAGES)
        if not self.fleet.done and not down:
            patience = min(patience, _PATIENT_PAUSES * self._retry.base_s)
        return max(self._answered_at, self.rations.held_until) + patience

    def _finish(self) -> None:
        if not self._left and self._awaited:  # there is nothing to do but to wait for rows
            if self.fleet.last_sends is not None and self._now >= self.fleet.last_sends.deadline.at:
                self._stop(self.fleet.last_sends.deadline.failure)
        elif not self._left:
            self._stopped = True
            # Requests whose rows are all delivered have trailing data at most; the others hold duplicates or probe.
            for request in list(self._in_flight.values()):
                if request.unfinished or not request.delivered:
                    self._out.append(messages.Drop(request.batch.ticket))
                    self._complete(request)
            self._out.append(messages.Stop())
        elif (not self._in_flight and 0 < self.fleet.present == self.fleet.out) or (
            self._now >= self.gives_up_at and not any(self._is_promising(r) for r in self._in_flight.values())
        ):
            self._give_up()
        elif self.fleet.last_sends is not None and self._is_late(self.fleet.last_sends):
            self._stop(self.fleet.last_sends.deadline.failure)
        elif not self._in_flight:
            self._wake(self.gives_up_at)

    def _is_late(self, last_sends: LastSends) -> bool:
        """Whether the deadline is here, or nothing is in flight and no endpoint will be sent anything before."""
        if self._now >= last_sends.deadline.at or self._in_flight:
            return self._now >= last_sends.deadline.at
        taking_part = (i for i, e in enumerate(self.fleet) if e.breaker not in (Breaker.OUT, Breaker.REMOVED))
        if (until := last_sends.latest(taking_part)) > self._now:
            self._wake(until)
        return until <= self._now

    def _is_promising(self, request: Request) -> bool:
        """Whether a request is at an endpoint that is healthy or has come back, and may take long to answer."""
        e = self.fleet[request.batch.endpoint]
        return e.well or (not e.faults and self._now - request.sent_at > _ACCEPTED_S)

    def _give_up(self) -> None:
        if (last := self._last_failure) is not None and last.kind is FailureKind.BUSY and self.fleet.done:
            rows = [row for row in self._busy_for if self.wants(row)]
            if len(rows) == self._left:  # all others were answered: it is these that it is too busy for
                while self._queues.unsent:
                    self._queues.steal(len(rows))
                why = f"{last.message}; nothing else was answered for give_up_s={self._retry.give_up_s:g}"
                for row in rows:
                    self._settle(row, replace(last, message=why))
                self._finish()
                return
        last = self._last_failure if self.fleet.present else None
        self._stop(last or NO_ENDPOINT)

    def _stop(self, failure: Failure) -> None:
        """End the run with rows that have neither an answer nor an error."""
        self._stopped = True
        self._out.extend(messages.Drop(ticket) for ticket in self._in_flight)
        self._out.append(messages.Stop(failure))
