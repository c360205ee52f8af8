"""Drives the scheduler with the transport: carries out its instructions, and tells it what came of them.

One task a request, none a row. Events reach the scheduler on the loop's thread, one after another, so nothing
here needs a lock.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from . import scheduler as sched
from .batches import Sizing
from .chat import Template
from .errors import EndpointError
from .events import Listener, RequestEnded, RequestSent, RowFailed, RowsDone, RunEvent
from .hostfile import AgentEndpoint
from .policy import silence_s
from .records import Ask, Batch, Failure, FailureKind, Reply, Route
from .results import UNKNOWN, Columns
from .transport import Transport, without_key
from .wire import Malformed, RowStream, StreamFailed, decode, encode, path_of

__all__ = ["Dispatch", "Way"]

_CLOSING_S = 1.0
_MISSES = 4  # a busy vLLM may take 30 s to answer /health


@dataclass(frozen=True, slots=True)
class Way:
    """How one family of servers is asked in a run.

    Attributes
    ----------
    route : Route
        The route that is posted to.
    template : Template or callable or None
        What is wrapped around prompts; None sends them bare.
    lists : bool
        Whether one request may carry many prompts.
    rows : bool
        Whether rows are streamed as they finish.
    note : str
        Why this way, for a person.
    """

    route: Route
    template: Template | Callable[[str], str] | None = None
    lists: bool = False
    rows: bool = False
    note: str = ""

    def wrap(self, texts: Iterable[str]) -> list[str]:
        """The texts that go on the wire for prompts."""
        if self.template is None:
            return list(texts)
        return list(map(self.template.wrap if isinstance(self.template, Template) else self.template, texts))

    def describe(self) -> str:
        """One line for statistics: route, and how rows come back."""
        return f"{self.route}{', rows as they finish' if self.rows else ''}{f' ({self.note})' if self.note else ''}"


_running: list[tuple[int, int, int]] = []  # the collector's thresholds as each run found them


@contextlib.contextmanager
def _few_collections() -> Iterator[None]:
    """Let Python look for cycles among older objects a hundred times more seldom than usual.

    4,000 requests in flight are 700,000 objects, and looking at all of them again and again took 40 % of a run. What a
    request leaves behind goes with its last reference; the youngest generation is collected as ever.
    """
    _running.append(gc.get_threshold())
    if len(_running) == 1:
        young, middle, old = _running[0]
        gc.set_threshold(young, middle * 100, old)
    try:
        yield
    finally:
        before = _running.pop()
        if not _running:
            gc.set_threshold(*before)


class Dispatch:
    """One run's I/O.

    Parameters
    ----------
    transport : Transport
        The pool's HTTP client.
    endpoints : sequence of AgentEndpoint
        Whom the scheduler's endpoint indexes mean.
    ways : sequence of Way
        How each of them is asked.
    ask : Ask
        What the rows have in common.
    texts : sequence of str or None
        Prompts by position.
    columns : Columns
        Where answers are written, as they come.
    scheduler : Scheduler
        Decides.
    sizing : Sizing
        ``max_tokens`` by prompt length.
    listeners : sequence of callable
        Hear the run's events.
    token_ids : bool
        Whether tokens are to be counted a row where the reply is not streamed.
    quiet_s : float
        Seconds without a byte after which an endpoint is asked whether it is still there.
    """

    def __init__(
        self,
        transport: Transport,
        endpoints: Sequence[AgentEndpoint],
        ways: Sequence[Way],
        ask: Ask,
        texts: Sequence[str | None],
        columns: Columns,
        scheduler: sched.Scheduler,
        sizing: Sizing,
        listeners: Sequence[Listener] = (),
        token_ids: bool = False,
        quiet_s: float = 10.0,
    ) -> None:
        self._transport = transport
        self._endpoints = endpoints
        self._ways = ways
        self._ask = ask
        self._texts = texts
        self._columns = columns
        self._scheduler = scheduler
        self._sizing = sizing
        self._listeners = listeners
        self._token_ids = token_ids
        self._quiet_s = quiet_s
        self._heard: dict[int, tuple[int, float]] = {}  # ticket: endpoint, and when its last byte came
        self._lost: dict[int, Failure] = {}  # tickets given up by the watch
        self._misses: dict[int, int] = {}  # endpoint: checks in a row without an answer
        self._indexes = {e.name: i for i, e in enumerate(endpoints)}
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
            with _few_collections():
                self._do(self._scheduler.start(time.monotonic()))
                failure = await self._over
                await self._let_close()
            return failure
        finally:
            for timer in self._timers:
                timer.cancel()
            tasks = [watch, *self._tasks.values()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _let_close(self) -> None:
        """Streams whose rows have all come get a moment for their closing words: the connections stay usable."""
        if self._tasks:
            await asyncio.wait(list(self._tasks.values()), timeout=_CLOSING_S)

    # ---- instructions ------------------------------

    def _handle(self, event: sched.Event) -> None:
        self._do(self._scheduler.handle(event, time.monotonic()))

    def _do(self, instructions: Sequence[sched.Instruction]) -> None:
        for instruction in instructions:
            match instruction:
                case sched.Send(batch):
                    task = asyncio.get_running_loop().create_task(self._request(batch))
                    self._tasks[batch.ticket] = task
                    task.add_done_callback(partial(self._landed, batch.ticket))
                case sched.Settle(row, failure):
                    self._columns.fail(row, failure.describe(), self._indexes.get(failure.endpoint, UNKNOWN))
                    self._emit(RowFailed(row, failure, time.monotonic()))
                case sched.Drop(ticket):
                    self._tasks[ticket].cancel()
                    if ticket in self._heard:
                        self._emit_end(ticket, self._heard[ticket][0], None, time.monotonic(), dropped=True)
                case sched.Wake(at):
                    self._wake(at)
                case sched.Stop(failure):
                    if not self._over.done():
                        self._over.set_result(failure)

    def _wake(self, at: float) -> None:
        if at in self._wakes:
            return
        self._wakes.add(at)
        loop = asyncio.get_running_loop()

        def ring() -> None:
            self._timers.discard(timer)
            self._wakes.discard(at)
            self._handle(sched.Tick())

        timer = loop.call_later(max(0.0, at - time.monotonic()) + 0.001, ring)
        self._timers.add(timer)

    def _landed(self, ticket: int, task: asyncio.Task[None]) -> None:
        self._tasks.pop(ticket, None)
        if not task.cancelled() and (bug := task.exception()) is not None and not self._over.done():
            self._over.set_exception(bug)  # not a fault of an endpoint: let it be seen

    # ---- silence ------------------------------

    async def _watch(self) -> None:
        """Look after endpoints that owe an answer and say nothing."""
        checks: dict[int, asyncio.Task[None]] = {}
        try:
            while True:
                await asyncio.sleep(self._quiet_s / 2)
                since = time.monotonic() - self._quiet_s
                for index in {index for index, heard in self._heard.values() if heard < since}:
                    if index not in checks or checks[index].done():
                        checks[index] = asyncio.get_running_loop().create_task(self._check(index))
        finally:
            for check in checks.values():
                check.cancel()

    async def _check(self, index: int) -> None:
        """Knock on a silent endpoint's door. Nobody home, or nobody opens time after time: its requests are lost,
        whatever their timeout is. Any answer means that it is busy, and so may a few missing ones."""
        endpoint = self._endpoints[index]
        try:
            await self._transport.get(endpoint, "/health", timeout=self._quiet_s)
        except EndpointError as exc:
            kind = exc.failure.kind
            self._misses[index] = self._misses.get(index, 0) + 1 if kind is FailureKind.HANG else 0
            if kind in (FailureKind.CONNECT, FailureKind.SERVER) or self._misses[index] >= _MISSES:
                self._give_up(index, f"silent for {self._quiet_s:g} s, and its /health says: {exc.failure.describe()}")
        else:
            self._misses[index] = 0

    def _give_up(self, index: int, why: str) -> None:
        for ticket, (asked, heard) in list(self._heard.items()):
            if asked == index and heard < time.monotonic() - self._quiet_s:
                self._lost[ticket] = Failure(FailureKind.DISCONNECT, why, self._endpoints[index].name)
                self._tasks[ticket].cancel()

    # ---- one request ------------------------------

    async def _request(self, batch: Batch) -> None:
        endpoint = self._endpoints[batch.endpoint]
        sent = time.monotonic()
        breaker = self._scheduler.fleet[batch.endpoint].breaker
        self._emit(RequestSent(batch.ticket, batch.endpoint, batch.rows, breaker, sent))
        failure: Failure | None = None
        self._heard[batch.ticket] = (batch.endpoint, sent)
        try:
            failure = await self._ask_endpoint(batch, endpoint, sent)
        except asyncio.CancelledError:
            if batch.ticket not in self._lost:
                raise
            failure = self._lost.pop(batch.ticket)
        except EndpointError as exc:
            failure = exc.failure
        except StreamFailed as exc:
            message = without_key(endpoint, exc.failure.message)
            failure = Failure(exc.failure.kind, message, endpoint.name, exc.failure.status)
        except Malformed as exc:
            failure = Failure(FailureKind.MALFORMED, without_key(endpoint, str(exc)), endpoint.name)
        finally:
            del self._heard[batch.ticket]
        now = time.monotonic()
        event = sched.Failed(batch.ticket, failure) if failure else sched.Ended(batch.ticket)
        instructions = self._scheduler.handle(event, now)
        self._emit_end(batch.ticket, batch.endpoint, failure, now)
        self._do(instructions)

    async def _ask_endpoint(self, batch: Batch, endpoint: AgentEndpoint, sent: float) -> Failure | None:
        way = self._ways[batch.endpoint]
        texts = way.wrap(self._texts[row] or "" for row in batch.rows)
        max_tokens = self._scheduler.budget(batch.rows) or self._sizing.cap
        body = encode(
            way.route,
            self._ask,
            texts,
            max_tokens=max_tokens,
            stream=way.rows,
            wrapped=way.template is not None,
            token_ids=self._token_ids,
        )
        path, n = path_of(way.route), self._ask.n
        if not way.rows:
            patience = silence_s(self._transport.timeout, len(texts) * n * max_tokens)
            data = await self._transport.post(endpoint, path, body, timeout=patience)
            replies = decode(way.route, data, len(texts), n)
            unfinished = {r.prompt for r in replies if r.finish_reason in ("abort", "")}
            if unfinished:
                replies = [r for r in replies if r.prompt not in unfinished]
            self._deliver(batch, replies, sent)
            return self._aborted(endpoint) if unfinished else None
        rows = RowStream(len(texts), n)
        missing = len(texts)
        async with contextlib.aclosing(self._transport.stream(endpoint, path, body)) as stream:
            async for data in stream:
                self._heard[batch.ticket] = (batch.endpoint, time.monotonic())
                if replies := rows.feed(data):
                    missing -= len(replies) // n
                    self._deliver(batch, replies, sent)
        if replies := rows.end():
            missing -= len(replies) // n
            self._deliver(batch, replies, sent)
        if rows.aborted:
            return self._aborted(endpoint)
        if not rows.done:
            return Failure(FailureKind.DISCONNECT, "the stream ended before its [DONE]", endpoint.name)
        if missing:
            message = f"the stream ended without {missing} of its {len(texts)} rows"
            return Failure(FailureKind.MALFORMED, message, endpoint.name)
        return None

    def _aborted(self, endpoint: AgentEndpoint) -> Failure:
        return Failure(FailureKind.ABORT, "rows came back unfinished: is the server shutting down?", endpoint.name)

    def _deliver(self, batch: Batch, replies: Sequence[Reply], sent: float) -> None:
        now = time.monotonic()
        rows, wants, last = batch.rows, self._scheduler.wants, self._ask.n - 1
        won = [(row, reply) for reply in replies if wants(row := rows[reply.prompt])]
        self._columns.answer(won, batch.endpoint, now - sent)
        complete = [rows[reply.prompt] for reply in replies if reply.sample == last]
        instructions = self._scheduler.handle(sched.Delivered(batch.ticket, complete), now)
        rows_won = [row for row, reply in won if reply.sample == last]
        self._emit(RowsDone(batch.ticket, batch.endpoint, rows_won, self._scheduler.fleet.ready, now))
        self._do(instructions)

    def _emit_end(self, ticket: int, index: int, failure: Failure | None, at_s: float, dropped: bool = False) -> None:
        fleet = self._scheduler.fleet
        self._emit(RequestEnded(ticket, index, failure, fleet[index].breaker, fleet.ready, at_s, dropped))

    def _emit(self, event: RunEvent) -> None:
        for listener in self._listeners:
            listener(event)
