"""Runs the scheduler's messages over the transport, and returns the outcomes to the scheduler as events.

There is one task per request, none per row. The scheduler is only called on the loop's thread, so nothing here needs a
lock.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

from ..client.aiohttp_transport import Bounds
from ..client.error_replies import Malformed, StreamFailed
from ..client.failures import CONNECT_S
from ..client.hostfile import AgentEndpoint
from ..client.replies import UNFINISHED, decode_counted, longest_reply
from ..client.row_stream import RowStream
from ..client.thinking import STILL_THINKING
from ..client.transport import Transport
from ..client.wire import PRIORITY, encode, path_of
from ..engine import messages
from ..engine.breaker import Breaker
from ..engine.columns import UNKNOWN, Columns
from ..engine.policy import REACTIONS, RetryPolicy, silence_s
from ..engine.scheduler import NO_ENDPOINT, Scheduler
from ..engine.token_budgets import Sizing
from ..errors import EndpointError
from ..records import Batch, Failure, FailureKind, Reply, RequestSpec, Route, Usage
from ..runs import events
from ..schema import Schema
from ..text import printable
from .answer_watch import AnswerWatch, Verdict
from .garbage import few_collections
from .health import HealthChecks
from .invalid_answers import InvalidAnswers
from .rates import gateway_of
from .route_plan import RoutePlan

__all__ = ["Executor", "Renewal"]

Renewal = Callable[[AgentEndpoint, RoutePlan], Awaitable[RoutePlan]]
"""Checks the plan of an endpoint, and returns it, or another one. Raises ``EndpointError`` if the endpoint is down."""

_STREAM_END_S = 1.0
_CHANGES: dict[Breaker, Literal["lost", "paused", "back"]] = {
    Breaker.OUT: "lost",
    Breaker.OPEN: "paused",
    Breaker.CLOSED: "back",
}
# Answers come as whole replies, for half the CPU, where no more than this is lost with one.
_QUICK_S = 2.0
_LONG_WAIT_S = 10.0  # a server that asks for so much time is said to be waited for


@dataclass(slots=True)
class _InFlight:
    """A request in flight: ``last_byte_at`` is when its last byte came, or when it was sent; ``lost`` the failure with
    which a health check gave it up; ``over`` whether nothing more is to come; ``tokens`` what it has cost so far, not a
    number where the server does not say; ``posted_at`` when it was posted; ``first_token_at`` and ``first_row_at`` when
    these came by a stream."""

    batch: Batch
    sent_at: float
    last_byte_at: float
    lost: Failure | None = None
    over: bool = False
    delivered: list[int] = field(default_factory=list)
    tokens: float = 0.0
    posted_at: float | None = None
    first_token_at: float | None = None
    first_row_at: float | None = None

    @property
    def cost(self) -> int | None:
        """Tokens of prompts and answers, where the server counts them."""
        return None if math.isnan(self.tokens) else int(self.tokens)


class Executor:
    """One run's I/O.

    Parameters
    ----------
    transport : Transport
        The pool's HTTP client.
    endpoints : list of AgentEndpoint
        By the scheduler's endpoint index. It grows with those that are added.
    plans : sequence of RoutePlan
        Their routes, by index.
    spec : RequestSpec
        What the rows have in common.
    texts : sequence of str or None
        Prompts by position.
    columns : Columns
        Where answers are written, as they come.
    scheduler : Scheduler
        Decides which rows go where, and when.
    sizing : Sizing
        ``max_tokens`` by prompt length.
    emit : callable
        Called with the run's events. What it raises ends the run.
    retry : RetryPolicy
        Its ``quiet_s``; the answers of an endpoint that gives the same one to every prompt are held for ``cap_s`` at
        most.
    renew : callable or None
        Checks the plan of an endpoint with a learned chat template before its first rows, and after it has failed.
    priority_of : callable
        Gives the priority that the server of an endpoint is told; 0 is not sent.
    """

    def __init__(
        self,
        transport: Transport,
        endpoints: list[AgentEndpoint],
        plans: Sequence[RoutePlan],
        spec: RequestSpec,
        texts: Sequence[str | None],
        columns: Columns,
        scheduler: Scheduler,
        sizing: Sizing,
        emit: events.Listener,
        retry: RetryPolicy,
        renew: Renewal | None,
        priority_of: Callable[[AgentEndpoint], int] = lambda endpoint: 0,
    ) -> None:
        self._transport = transport
        self._endpoints = endpoints
        self._plans = list(plans)
        self._renew = renew
        self._priority_of = priority_of
        self._unchecked = {i for i, plan in enumerate(plans) if plan.learned}  # what is there may be another server
        self._checking: defaultdict[int, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._spec = spec
        self._columns = columns
        self._scheduler = scheduler
        self._sizing = sizing
        self._emit = emit
        self._quiet_s = retry.quiet_s
        self._in_flight: dict[int, _InFlight] = {}  # by ticket
        self._health = HealthChecks(transport, retry.quiet_s)
        self._waits = False  # whether it was said that no endpoint can be sent anything
        # Endpoints that are not well, and what was last said of them.
        self._unwell: dict[int, Literal["paused", "lost"]] = {
            i: "paused" for i, e in enumerate(scheduler.fleet) if e.breaker is Breaker.OPEN
        }
        self._indexes: dict[str, int] = {}  # by name
        self._of_place: dict[str, int] = {}  # by URL, and by that of the gateway: one of its endpoints
        for i, e in enumerate(scheduler.fleet):
            if e.breaker is not Breaker.REMOVED:  # else another endpoint stands there
                self._place(i, endpoints[i])
        self._proven: set[RoutePlan] = set()  # those by which a stream was seen to hold each row once
        self._only_rows: set[RoutePlan] = set()  # those whose whole replies cannot be read
        self.distrusted: set[str] = set()  # URLs of endpoints that gave the same answer to every prompt
        self._took_back: set[int] = set()  # endpoints that had a stream that did not, after its rows were delivered
        # Not a method of this object: a cycle would keep the answers until Python's collector runs.
        self._answers = AnswerWatch(texts, partial(_share, columns, scheduler.wants), retry.cap_s)
        self._invalid = InvalidAnswers(spec, texts)
        self._undecided: dict[int, asyncio.Event] = {}  # by endpoint: set when its answers need not be held any more
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._timers: set[asyncio.TimerHandle] = set()
        self._wakes: set[float] = set()
        self._over: asyncio.Future[Failure | None] = asyncio.get_running_loop().create_future()
        columns.attempts = scheduler.attempts

    async def run(self) -> Failure | None:
        """Run to the end: None when all rows are settled, else the failure that left no endpoint.

        Cancelling it drops all connections, so servers abort what they were doing; what had finished stays in
        the columns.
        """
        watch = asyncio.get_running_loop().create_task(self._watch())
        try:
            with few_collections():
                self._do(self._scheduler.start(time.monotonic()))
                over = None
                while over is not self._over:  # a stream may take back what it delivered
                    over = self._over
                    failure = await over
                    await self._let_streams_end()
            return failure
        finally:
            for timer in self._timers:
                timer.cancel()
            tasks = [watch, *self._tasks.values()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _let_streams_end(self) -> None:
        """Give streams whose rows have all come a moment for their trailing data: the connections stay usable."""
        if self._tasks:
            await asyncio.wait(list(self._tasks.values()), timeout=_STREAM_END_S)

    # ---- endpoints that come and go ------------------------------

    def add(self, index: int, endpoint: AgentEndpoint, plan: RoutePlan) -> None:
        """An endpoint takes part from now on: the next index, or that of one that was removed."""
        if index == len(self._endpoints):
            self._endpoints.append(endpoint)
            self._plans.append(plan)
        self._endpoints[index], self._plans[index] = endpoint, plan
        self._place(index, endpoint)
        self._unchecked.discard(index)  # it was learned just now
        self._unwell.pop(index, None)
        self._waits = False
        self._emit(events.EndpointChanged(index, "added", None, time.monotonic()))
        self._handle(messages.Added(index))

    def remove(self, index: int) -> None:
        """An endpoint is sent nothing more; its requests in flight may finish."""
        now = time.monotonic()
        self._emit(events.EndpointChanged(index, "removed", None, now))
        self._do(self._scheduler.handle(messages.Removed(index), now))
        self._check_present(now)

    def join(self, rows: Sequence[int], limited: Mapping[int, int], awaited: int) -> None:
        """Rows that have their prompts now are sent, too; see ``messages.Joined``."""
        self._handle(messages.Joined(rows, limited, awaited))

    def _check_present(self, now: float) -> None:
        """Say so if all endpoints have left, and none has anything left to finish."""
        if not (self._scheduler.fleet.present or self._in_flight):
            self._emit_waits(NO_ENDPOINT, now)

    def _place(self, index: int, endpoint: AgentEndpoint) -> None:
        self._of_place.setdefault(gateway_of(endpoint), index)
        self._indexes[endpoint.name] = self._of_place[endpoint.url] = index

    def index_of(self, url: str) -> int | None:
        """The index of an endpoint in this run; of any of those behind a gateway, by the URL without its path."""
        return self._of_place.get(url)

    # ---- messages ------------------------------

    def _handle(self, event: messages.Event) -> None:
        self._do(self._scheduler.handle(event, time.monotonic()))

    def _do(self, todo: Sequence[messages.Message]) -> None:
        for message in todo:
            match message:
                case messages.Send(batch, as_rows):
                    task = asyncio.get_running_loop().create_task(self._request(batch, as_rows))
                    self._tasks[batch.ticket] = task
                    task.add_done_callback(partial(self._completed, batch.ticket))
                case messages.Settle(row, failure):
                    self._settle(row, failure)
                case messages.Drop(ticket):
                    self._tasks[ticket].cancel()
                    if ticket in self._in_flight:
                        request = self._in_flight[ticket]
                        left = [*filter(self._scheduler.wants, request.batch.rows)]  # some, where the run ends before
                        self._emit_end(request, None, time.monotonic(), left, dropped=True)
                case messages.Wake(at):
                    self._wake(at)
                case messages.Stop(failure):
                    if not self._over.done():
                        self._over.set_result(failure)

    def _wake(self, at: float) -> None:
        if at in self._wakes:
            return
        self._wakes.add(at)
        loop = asyncio.get_running_loop()

        def tick() -> None:
            self._timers.discard(timer)
            self._wakes.discard(at)
            self._handle(messages.Tick())

        timer = loop.call_later(max(0.0, at - time.monotonic()) + 0.001, tick)
        self._timers.add(timer)

    def _completed(self, ticket: int, task: asyncio.Task[None]) -> None:
        self._tasks.pop(ticket, None)
        self.over_by_bug(task)

    def over_by_bug(self, task: asyncio.Task[None]) -> None:
        """End the run with the exception of one of its tasks, if it has one."""
        if not task.cancelled() and (bug := task.exception()) is not None and not self._over.done():
            self._over.set_exception(bug)  # not a fault of an endpoint: let it be seen

    # ---- health checks ------------------------------

    async def _watch(self) -> None:
        """Check the health of endpoints that have requests in flight and send nothing."""
        checks: dict[int, asyncio.Task[None]] = {}
        try:
            while True:
                await asyncio.sleep(self._quiet_s / 2)
                since = time.monotonic() - self._quiet_s
                for index in {r.batch.endpoint for r in self._in_flight.values() if r.last_byte_at < since}:
                    if index not in checks or checks[index].done():
                        checks[index] = asyncio.get_running_loop().create_task(self._check(index))
        finally:
            for check in checks.values():
                check.cancel()

    async def _check(self, index: int) -> None:
        """Give up the silent requests of an endpoint whose health check shows that they are lost."""
        endpoint = self._endpoints[index]
        if not (problem := await self._health.problem(index, endpoint, self._plans[index])):
            return
        why = f"silent for {self._quiet_s:g} s, and its health check failed: {problem}"
        since = time.monotonic() - self._quiet_s
        for ticket, request in list(self._in_flight.items()):
            if request.batch.endpoint == index and request.last_byte_at < since:
                request.lost = Failure(FailureKind.DISCONNECT, why, endpoint.name)
                self._tasks[ticket].cancel()

    # ---- one request ------------------------------

    async def _request(self, batch: Batch, as_rows: bool) -> None:
        endpoint, scheduler, sent = self._endpoints[batch.endpoint], self._scheduler, time.monotonic()
        breaker = scheduler.fleet[batch.endpoint].breaker
        counts = scheduler.counts
        if counts.retries or counts.duplicates:
            attempts = bytes(map(scheduler.attempts.__getitem__, batch.rows))
        else:
            attempts = b"\1" * len(batch.rows)
        self._emit(events.RequestSent(batch.ticket, batch.endpoint, batch.rows, breaker, sent, attempts))
        failure: Failure | None = None
        retracted: list[int] = []
        request = self._in_flight[batch.ticket] = _InFlight(batch, sent, sent)
        self._answers.sent(batch.endpoint)
        try:
            failure = await (self._exchange(request) if batch.rows else self._probe(batch.endpoint, as_rows))
        except asyncio.CancelledError:
            if request.lost is None:
                raise
            failure = request.lost
        except EndpointError as exc:
            failure = exc.failure
            retracted = request.delivered if _is_malformed(exc) else []
        except StreamFailed as exc:
            message = self._transport.without_secrets(endpoint, exc.failure.message)
            failure = replace(exc.failure, message=message, endpoint=endpoint.name)
        except Malformed as exc:
            failure = Failure(FailureKind.MALFORMED, self._transport.without_secrets(endpoint, str(exc)), endpoint.name)
            retracted = request.delivered
        finally:
            self._has_ended(request)
            del self._in_flight[batch.ticket]
        now = time.monotonic()
        if retracted:
            self._took_back.add(batch.endpoint)
            self._take_back(batch.endpoint, retracted, "what came after them shows that they may be of other rows", now)
            if self._over.done() and not self._over.exception() and self._over.result() is None:
                self._over = asyncio.get_running_loop().create_future()  # all rows had their answers: the run goes on
        unfinished = [row for row in batch.rows if row in retracted or scheduler.wants(row)] if failure else []
        ended = messages.Ended(batch.ticket, request.cost)
        todo = scheduler.handle(messages.Failed(batch.ticket, failure, retracted) if failure else ended, now)
        if not (batch.rows or failure):  # the plain prompt was answered
            self._waits = False
            self._emit_change(batch.endpoint, None, now)
        self._emit_end(request, failure, now, unfinished)
        self._do(todo)
        if failure:
            self._compare_answers()
            # What comes back may be another server. But a status is an answer, and a question between rows would take
            # each second request of a balancer.
            broke = failure.kind is FailureKind.STALE or REACTIONS[failure.kind].endpoint in ("fault", "opens")
            if broke and failure.status is None and self._plans[batch.endpoint].learned:
                self._unchecked.add(batch.endpoint)
        else:
            self._check_present(now)

    async def _checked_plan(self, index: int) -> RoutePlan:
        """The plan of an endpoint. It is checked first if what is there may be another server by now."""
        if index in self._unchecked and self._renew is not None:
            async with self._checking[index]:
                if index in self._unchecked:
                    plan = await self._renew(self._endpoints[index], self._plans[index])
                    self._unchecked.discard(index)
                    if plan != self._plans[index]:
                        self._plans[index] = plan
                        self._emit(events.RouteChanged(index, plan.describe(), time.monotonic()))
        return self._plans[index]

    async def _probe(self, index: int, as_rows: bool) -> None:
        """Ask for one token, on the route and with the key of the rows; or ask as they are asked."""
        plan, spec, max_tokens = self._plans[index], RequestSpec(model=self._spec.model), 1
        how: dict[str, Any] = {}
        if as_rows:
            spec, max_tokens = replace(self._spec, conversations=False), self._sizing.cap
            rows = RowStream(1, spec.n, spec.logprobs is not None) if plan.rows else None
            how = {"rows": rows, "extra": plan.constraint(spec.schema)}
        await plan.ask(self._transport, self._endpoints[index], spec, max_tokens=max_tokens, **how)

    async def _exchange(self, request: _InFlight) -> Failure | None:
        """Send rows and deliver their answers; again, where only optional fields were refused."""
        batch = request.batch
        plan = await self._checked_plan(batch.endpoint)
        if not plan.lists and len(batch.rows) > 1:  # batches were made for the plan that it had
            name = self._endpoints[batch.endpoint].name
            return Failure(FailureKind.TOO_LARGE, "it takes one prompt a request by now", name)
        request.posted_at = time.monotonic()
        while True:
            omitted = plan.left_out(self._spec)
            try:
                return await self._ask(request, plan, omitted)
            except (EndpointError, StreamFailed) as exc:
                if request.delivered or not plan.gives_way(exc.failure, omitted, self._spec):
                    raise

    async def _ask(self, request: _InFlight, plan: RoutePlan, omitted: frozenset[str]) -> Failure | None:
        batch, endpoint = request.batch, self._endpoints[request.batch.endpoint]
        texts = plan.wrap(self._invalid.prompts(batch.rows))
        max_tokens, rows = self._max_tokens(batch), plan.rows and not self._comes_whole(batch.endpoint, plan)
        extra = plan.constraint(self._spec.schema)
        if (priority := self._priority_of(endpoint)) and PRIORITY not in self._spec.params:
            extra = {**(extra or {}), PRIORITY: priority}
        body = encode(
            plan.route,
            self._spec,
            texts,
            max_tokens=max_tokens,
            stream=rows,
            wrapped=plan.wrapped,
            token_ids=self._spec.details,
            extra=extra,
            lists=plan.lists,
            omit=omitted,
        )
        n, logprobs = self._spec.n, self._spec.logprobs is not None
        vectors = len(texts) if plan.route is Route.EMBEDDINGS else 0
        longest = longest_reply(len(texts) * n * max_tokens, logprobs or "logprobs" in self._spec.params, vectors)
        if rows:
            return await self._stream(request, plan, body, longest)
        timeout = silence_s(self._transport.timeout, len(texts) * n * max_tokens)
        data = await self._transport.post(
            endpoint, path_of(plan.route), body, timeout=timeout, limits=Bounds(longest), counted=True
        )
        try:
            replies, usage = decode_counted(plan.route, data, len(texts), n, sum(map(len, texts)), logprobs)
        except Malformed:
            if not plan.rows:
                raise
            self._only_rows.add(plan)  # whole replies were not tried before the run
            return await self._ask(request, plan, omitted)
        replies = plan.read(replies)
        unfinished = {r.prompt: r for r in replies if r.finish_reason in UNFINISHED}
        if unfinished:
            replies = [r for r in replies if r.prompt not in unfinished]
        self._look_at(batch, replies)
        await self._deliver_all(request, replies, usage)
        return next((_unfinished(endpoint, r.finish_reason, r.problem) for r in unfinished.values()), None)

    def _comes_whole(self, index: int, plan: RoutePlan) -> bool:
        """Whether the next answers of an endpoint come as a whole reply rather than as rows, by what its latest ones
        took."""
        took_s = self._scheduler.fleet[index].took_s
        quick = took_s is not None and took_s <= _QUICK_S
        return plan.either and quick and plan not in self._only_rows

    async def _stream(self, request: _InFlight, plan: RoutePlan, body: bytes, longest: int) -> Failure | None:
        """Read a stream, and hand on its rows as they finish.

        Some proxies give every choice of a stream the same index. So until a stream of the same plan has ended well,
        rows are held until the end of theirs; and at an endpoint where they had to be taken back.
        """
        batch, endpoint, n = request.batch, self._endpoints[request.batch.endpoint], self._spec.n
        size, silence = len(batch.rows), self._transport.timeout
        rows, missing, progress = RowStream(size, n, self._spec.logprobs is not None), size, 0
        proven = (plan.proven or size == 1 or plan in self._proven) and batch.endpoint not in self._took_back
        held: list[Reply] = []
        loop = asyncio.get_running_loop()
        problem: EndpointError | None = None
        chunks = self._transport.stream(endpoint, path_of(plan.route), body, limit=longest, counted=True)
        try:
            async with (
                asyncio.timeout(silence + min(silence, CONNECT_S)) as timer,
                contextlib.aclosing(chunks) as stream,
            ):
                async for data in stream:
                    replies = plan.read(rows.feed(data))
                    if rows.progress != progress:  # comments and empty chunks only keep a connection open
                        progress = rows.progress
                        request.last_byte_at = time.monotonic()
                        if request.first_token_at is None:
                            request.first_token_at = request.last_byte_at
                        timer.reschedule(loop.time() + 1.1 * silence)  # the transport's own words come first
                    if replies:
                        if request.first_row_at is None:
                            request.first_row_at = request.last_byte_at
                        missing -= len(replies) // n
                        held += replies
                        if self._look_at(batch, replies) and proven:
                            self._deliver(request, held)
                            held = []
            if replies := plan.read(rows.end()):
                missing -= len(replies) // n
                held += replies
                self._look_at(batch, replies)
        except TimeoutError:
            problem = EndpointError(Failure(FailureKind.HANG, f"no token came for {silence:g} s", endpoint.name))
        except EndpointError as exc:
            if _is_malformed(exc):
                raise
            problem = exc
        if held and (proven or size == 1 or rows.indexes > 1):
            await self._deliver_all(request, held)
        if problem:
            raise problem
        if rows.unfinished:
            return _unfinished(endpoint, rows.unfinished, rows.why)
        if not rows.done:
            return Failure(FailureKind.DISCONNECT, "the stream ended before its [DONE]", endpoint.name)
        if missing:
            message = f"the stream ended without {missing} of its {size} rows"
            return Failure(FailureKind.MALFORMED, message, endpoint.name)
        self._proven.add(plan)
        return None

    async def _deliver_all(self, request: _InFlight, replies: Sequence[Reply], usage: Usage | None = None) -> None:
        """Deliver the last answers of a request, as soon as they need not be held any more."""
        self._has_ended(request)
        await self._until_decided(request.batch)
        self._deliver(request, replies, usage)

    def _has_ended(self, request: _InFlight) -> None:
        """Nothing more is to come."""
        if not request.over:
            request.over = True
            request.last_byte_at = math.inf  # its endpoint's health matters no more
            self._answers.ended(request.batch.endpoint)

    # ---- endpoints that answer all prompts alike ------------------------------

    def _look_at(self, batch: Batch, replies: Sequence[Reply]) -> bool:
        """Whether these answers can be believed so far, given those of the other endpoints.

        Raises
        ------
        Malformed
            They cannot.
        """
        index = batch.endpoint
        answers = [r for r in replies if not r.problem]
        self._answers.see(
            index, [batch.rows[r.prompt] for r in answers], [r.text or r.reasoning or "" for r in answers]
        )
        self._compare_answers()
        return self._verdict(batch) is Verdict.GOOD

    def _verdict(self, batch: Batch) -> Verdict:
        verdict = self._answers.verdict(batch.endpoint, time.monotonic())
        if verdict is Verdict.DOUBTED:
            raise Malformed(_alike(self._answers.ask_again(batch.endpoint, batch.rows)))
        return verdict

    def _compare_answers(self) -> None:
        """Act on what is known now of endpoints that answer all prompts alike."""
        if self._over.done():
            return
        now = time.monotonic()
        for index in self._answers.newly_doubted(now):
            self._distrust(index, now)
        while self._answers.found_wrong:
            index, text = self._answers.found_wrong.pop()
            self.distrusted.add(self._endpoints[index].url)
            failure = Failure(FailureKind.MALFORMED, _alike(text), self._endpoints[index].name)
            self._emit(events.EndpointChanged(index, "distrusted", failure, now))
        for index in [i for i in self._undecided if self._answers.verdict(i, now) is not Verdict.UNSURE]:
            self._undecided.pop(index).set()

    async def _until_decided(self, batch: Batch) -> None:
        """Wait until it is known whether the answers of an endpoint can be believed; raises as ``_look_at``."""
        index = batch.endpoint
        if self._verdict(batch) is Verdict.UNSURE:
            decided = self._undecided.setdefault(index, asyncio.Event())
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._answers.patience(index, time.monotonic())):
                    await decided.wait()
            self._verdict(batch)

    def _distrust(self, index: int, now: float) -> None:
        """Take back what an endpoint has answered alike, and have it asked again elsewhere."""
        text, columns, n = self._answers.doubt(index), self._columns, self._spec.n
        rows = [
            row
            for row, endpoint in enumerate(columns.endpoint)
            if endpoint == index
            and not self._scheduler.wants(row)
            and row not in columns.errors
            and (columns.text[row * n] or "").strip() == text
        ]
        for request in self._in_flight.values():
            if request.batch.endpoint == index:
                request.delivered = [row for row in request.delivered if row not in rows]
        if rows:
            self._take_back(index, rows, _alike(text), now)
        self._answers.ask_again(index, rows)
        todo = self._scheduler.handle(messages.Distrusted(index, rows), now)
        self._emit_change(index, Failure(FailureKind.MALFORMED, _alike(text), self._endpoints[index].name), now)
        self._do(todo)

    def _take_back(self, endpoint: int, rows: Sequence[int], why: str, now: float) -> None:
        for row in rows:
            self._columns.clear(row)
            self._invalid.pop(row, None)
        self._emit(events.RowsRetracted(endpoint, rows, why, now))

    # ---- answers ------------------------------

    def _deliver(self, request: _InFlight, replies: Sequence[Reply], usage: Usage | None = None) -> None:
        now, batch = time.monotonic(), request.batch
        rows, wants, last = batch.rows, self._scheduler.wants, self._spec.n - 1
        won = [(row, reply) for reply in replies if wants(row := rows[reply.prompt])]
        refused = {row: reply.problem for row, reply in won if reply.problem}
        if refused:
            won = [(row, reply) for row, reply in won if row not in refused]
        complete = [rows[reply.prompt] for reply in replies if reply.sample == last]
        again: dict[int, str] = {}
        given_up: dict[int, str] = {}
        if (schema := self._spec.schema) is not None:
            again, given_up = self._validate(schema, batch, won, usage is None, now)
            if again:
                won = [(row, reply) for row, reply in won if row not in again]
                complete = [row for row in complete if row not in again]
        self._columns.answer(won, batch.endpoint, now - request.sent_at)
        if batch.ticket in self._scheduler.rations:
            request.tokens += _cost(replies, usage)
        todo = self._scheduler.handle(messages.Delivered(batch.ticket, complete, [*again]), now)
        self._waits = False
        rows_won = [row for row, reply in won if reply.sample == last]
        request.delivered += rows_won
        valid = [row for row in rows_won if row not in given_up] if given_up else rows_won
        self._emit(events.RowsDone(batch.ticket, batch.endpoint, valid, self._scheduler.fleet.ready, now, usage))
        if self._unwell:
            self._emit_change(batch.endpoint, None, now)
        for row, problem in refused.items():
            if problem == STILL_THINKING:
                self._settle(row, Failure(FailureKind.INVALID, problem))
                continue
            message = self._transport.without_secrets(self._endpoints[batch.endpoint], problem or "")
            self._settle(row, Failure(FailureKind.REJECTED, message, self._endpoints[batch.endpoint].name))
        for row, problem in given_up.items():
            self._settle(row, Failure(FailureKind.INVALID, problem))
        self._do(todo)

    def _validate(
        self, schema: Schema, batch: Batch, answers: Sequence[tuple[int, Reply]], costs: bool, now: float
    ) -> tuple[dict[int, str], dict[int, str]]:
        """The rows whose answers are not what the schema asks for: those to be asked again, and those that were so
        often enough, with what is wrong. ``costs``: their tokens are not counted elsewhere."""
        again: dict[int, str] = {}
        given_up: dict[int, str] = {}
        max_tokens = self._max_tokens(batch)
        for row, reply in answers:
            problem = self._invalid.look_at(row, reply, batch.endpoint, schema, max_tokens)
            if problem is None:
                continue
            goes_on = self._invalid.is_asked_again(row)
            (again if goes_on else given_up)[row] = problem
            spent = (reply.prompt_tokens or 0, reply.completion_tokens or 0) if costs else (0, 0)
            self._emit(events.RowInvalid(row, batch.endpoint, problem, goes_on, *spent, now))
        return again, given_up

    def _max_tokens(self, batch: Batch) -> int:
        return self._scheduler.budget(batch.rows) or self._sizing.cap

    def _settle(self, row: int, failure: Failure) -> None:
        """End a row with an error. An answer that it had stays, since it was paid for."""
        if (invalid := self._invalid.pop(row, None)) is not None and self._columns.text[row] is None:
            self._columns.answer([(row, invalid.reply)], invalid.endpoint, math.nan)
        self._columns.fail(row, failure.describe(), self._indexes.get(failure.endpoint, UNKNOWN))
        self._emit(events.RowFailed(row, failure, time.monotonic()))

    # ---- the run's events ------------------------------

    def _emit_end(
        self,
        request: _InFlight,
        failure: Failure | None,
        at_s: float,
        unfinished: Sequence[int] = (),
        dropped: bool = False,
    ) -> None:
        fleet, index, ticket = self._scheduler.fleet, request.batch.endpoint, request.batch.ticket
        again = [row for row in unfinished if self._scheduler.wants(row)]
        breaker, ready = fleet[index].breaker, fleet.ready
        outcome = failure, breaker, ready, at_s, dropped, unfinished, again
        moments = request.posted_at, request.first_token_at, request.first_row_at
        self._emit(events.RequestEnded(ticket, index, *outcome, *moments))
        if failure is not None:
            self._emit_change(index, failure, at_s)
            self._emit_waits(failure, at_s)

    def _emit_waits(self, failure: Failure, at_s: float) -> None:
        """Say so if no endpoint can be sent anything."""
        fleet = self._scheduler.fleet
        long = failure.kind is FailureKind.BUSY and (failure.retry_after_s or 0.0) >= _LONG_WAIT_S
        ready = any(e.ready and e.rest_until <= at_s for e in fleet) if long else fleet.ready
        if not (ready or self._waits or self._over.done()):
            self._waits = True
            self._emit(events.RunWaits(self._scheduler.gives_up_at, failure, at_s))

    def _emit_change(self, index: int, failure: Failure | None, at_s: float) -> None:
        """Say so if an endpoint has become unwell, or well again."""
        change = _CHANGES.get(self._scheduler.fleet[index].breaker)
        if change is None or change == self._unwell.get(index, "back"):
            return
        if change == "back":
            del self._unwell[index]
        else:
            self._unwell[index] = change
        self._emit(events.EndpointChanged(index, change, failure if change != "back" else None, at_s))


def _cost(replies: Sequence[Reply], usage: Usage | None) -> float:
    """Tokens of prompts and answers; not a number where one of them is not counted."""
    if usage is not None:
        return usage.prompt_tokens + usage.completion_tokens
    prompts = [r.prompt_tokens for r in replies if r.sample == 0]
    return sum(math.nan if count is None else count for count in (*prompts, *(r.completion_tokens for r in replies)))


def _unfinished(endpoint: AgentEndpoint, reason: str, problem: str | None) -> Failure:
    if reason == "abort":
        return Failure(FailureKind.ABORT, "rows came back unfinished: is the server shutting down?", endpoint.name)
    return Failure(FailureKind.SERVER, problem or "", endpoint.name)


def _share(columns: Columns, wants: Callable[[int], bool], text: str, by: Collection[int]) -> tuple[int, int]:
    """How many rows the endpoints other than ``by`` have answered, and how many of them with this text."""
    others = [
        answer.strip()
        for row, endpoint in enumerate(columns.endpoint)
        if endpoint not in by and (answer := columns.text[row * columns.n]) is not None and not wants(row)
    ]
    return len(others), others.count(text)


def _alike(text: str) -> str:
    shown = repr(printable(text, 40)) if text else "an empty text"
    return f"it gives {shown} for every prompt, where other endpoints give other answers"


def _is_malformed(exc: Exception) -> bool:
    return isinstance(exc, EndpointError) and exc.failure.kind is FailureKind.MALFORMED
