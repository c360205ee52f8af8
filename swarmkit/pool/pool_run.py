"""One run on a pool: finds out how its endpoints are asked, and connects scheduler, executor and listeners."""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
import time
from array import array
from collections import Counter
from collections.abc import AsyncIterator, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from ..client.hostfile import AgentEndpoint
from ..client.open_files import sockets
from ..engine.columns import Columns
from ..engine.deadline import Deadline
from ..engine.endpoints import Fleet
from ..engine.prefixes import prefix_order
from ..engine.queues import home_queues
from ..engine.scheduler import Scheduler
from ..engine.token_budgets import Sizing
from ..errors import NoEndpointsError, SettingError
from ..records import Failure, FailureKind, Prompts, RequestSpec
from ..runs.events import Listener, RowFailed, RowsDone, RunEnded, RunEvent, RunStarted
from ..runs.listeners import Listeners
from ..runs.log import RunLog
from ..runs.stats import UNTOLD, RunStats
from .arrivals import Arrivals, joining
from .executor import Executor
from .prefix_caches import prefix_caches
from .rates import gateway_of
from .route_plan import RoutePlan
from .server_queues import server_queues
from .templates import odd_prompts, telling_prompts
from .watch import by_place, following, present

if TYPE_CHECKING:
    from .agent_pool import AgentPool

__all__ = ["Given", "PoolRun"]

_FEW = 64  # rows of a run that is all out at once: servers are not asked what they count
_MANY = 20_000  # rows
_USUAL_ANSWER = 256  # tokens: few answers are as long as they may be


@dataclass(frozen=True, slots=True)
class Given:
    """What a run is given; ``AgentPool.run`` describes it. ``rows`` are those that have a text and are to be sent."""

    prompts: Prompts
    spec: RequestSpec
    columns: Columns
    rows: Sequence[int]
    stats: RunStats
    listeners: Sequence[Listener]
    parts: Sequence[Listener]
    deadline: Deadline | None
    arrivals: Arrivals | None
    priority: int


class PoolRun:
    """A run, and how the endpoints of its pool are asked in it: the plan of each, and ``max_tokens`` by prompt length.

    ``texts`` are some of the prompts, which tell how servers must be asked.

    Attributes
    ----------
    left : list of int
        Rows that came later, and must be asked on another route: in a run of their own.
    distrusted : set of str
        URLs of endpoints that gave the same answer to every prompt.
    """

    def __init__(self, given: Given, pool: AgentPool, texts: list[str], plans: list[RoutePlan], sizing: Sizing) -> None:
        self.left: list[int] = []
        self.distrusted: set[str] = set()
        self._given = given
        self._pool = pool
        self._counted: list[float] = []  # tokens a character, as servers count, once one has said it
        self._emit = self._emitter()
        self._odd = odd_prompts(given.prompts.texts, given.rows)
        self._texts = texts
        self._plans = plans
        self._sizing = sizing
        self._single = given.spec.mode == "single" or not all(plan.lists for plan in plans)
        self._places = list(map(given.stats.roster.place, pool._endpoints))
        self._size = len(given.stats.roster.names)
        self._endpoints = by_place(pool._endpoints, self._places, self._size)

    @classmethod
    async def of(cls, pool: AgentPool, given: Given) -> PoolRun:
        """Ask the servers what must be known of them. If the hostfile of the pool changes from here on, the run is
        told."""
        pool._core.transport()  # first: in a fork it makes the rates and places anew
        pool = await present(pool, given.stats)
        given = replace(given, spec=await pool._complete(given.spec))
        try:
            return await cls._planned(given, pool)
        except SettingError as exc:
            usual = [row for row in given.rows if not odd_prompts(given.prompts.texts, [row])]
            if len(usual) == len(given.rows) or not (given.arrivals and (usual or given.arrivals.awaited)):
                raise
            run = await cls._planned(replace(given, rows=usual), pool)
            run._fail(set(given.rows) - set(usual), exc)
            return run

    @classmethod
    async def _planned(cls, given: Given, pool: AgentPool) -> PoolRun:
        texts = telling_prompts(given.prompts.texts, given.rows)
        plans = await pool._plans(given.spec, texts)
        sizing = await pool._sizing(given.spec, plans, given.prompts, given.rows)
        return cls(given, pool, texts, plans, sizing)

    def _fail(self, rows: Iterable[int], why: SettingError) -> None:
        """Rows fail that no route takes."""
        for row in sorted(rows):
            self._given.columns.fail(row, str(why))
            self._emit(RowFailed(row, Failure(FailureKind.REJECTED, str(why)), time.monotonic()))

    async def carry_out(self, watched: AgentPool) -> Failure | None:
        """Send the rows; see ``AgentPool.run``. ``watched``: the pool whose endpoints may change meanwhile."""
        given, pool, stats = self._given, self._pool, self._given.stats
        # To sort many rows by their prefixes takes a while, and other runs are on this loop.
        scheduler = self._scheduler() if len(given.rows) < _MANY else await asyncio.to_thread(self._scheduler)
        emit, routes = self._emit, [plan.describe() for plan in self._plans]
        executor = self._executor(scheduler)
        emit(RunStarted(len(given.prompts.texts), len(given.rows), stats.roster.names, routes, time.monotonic()))
        failure, cancelled, error = None, False, ""
        leave = pool._core.places.enter(given.priority, scheduler, executor.index_of)
        async with self._looking(scheduler.fleet):
            try:
                async with (
                    following(watched, pool._endpoints, executor, self._plan_of, stats),
                    joining(given.arrivals, executor, self._laid_out),
                ):
                    failure = await executor.run()
            except asyncio.CancelledError:
                cancelled = True
                raise
            except Exception as exc:
                error = f"{type(exc).__name__}: {exc}"
                raise
            finally:
                leave()
                self.distrusted = executor.distrusted
                scheduler.rations.release()
                self._count(scheduler, routes)
                emit(RunEnded(failure, cancelled, time.monotonic(), error))
        if failure is not None and failure.kind is FailureKind.DEADLINE:
            given.columns.late = f"not answered: {failure.message}"
        return failure

    def _emitter(self) -> Listener:
        given = self._given
        guarded = Listeners([RunLog(), *given.listeners], given.stats.listener_errors)
        called: list[Listener] = [given.stats, *given.parts, guarded]
        if self._pool.batch.max_batch_tokens is not None:
            called.append(partial(_count_once, given, self._counted))

        def emit(event: RunEvent) -> None:
            for listener in called:
                listener(event)

        return emit

    def _executor(self, scheduler: Scheduler) -> Executor:
        given, pool, priority = self._given, self._pool, self._given.priority
        return Executor(
            pool._core.transport(),
            self._endpoints,
            by_place(self._plans, self._places, self._size),
            given.spec,
            given.prompts.texts,
            given.columns,
            scheduler,
            self._sizing,
            self._emit,
            pool.retry,
            pool._renewal(given.spec, self._texts),
            lambda endpoint: priority if pool._is_vllm(endpoint) else 0,  # others order numbers the other way
        )

    @contextlib.asynccontextmanager
    async def _looking(self, fleet: Fleet) -> AsyncIterator[None]:
        """Look, while the run lasts, at what servers count."""
        given, pool = self._given, self._pool
        if len(given.rows) < _FEW:
            yield
            return
        transport, vllms = pool._core.transport(), {e.url: e for e in pool._endpoints if pool._kind(e) == "vllm"}
        async with (
            prefix_caches(transport, list(vllms.values()), given.stats),
            server_queues(transport, self._endpoints, pool._is_vllm, fleet, given.spec.n, given.stats),
        ):
            yield

    def _count(self, scheduler: Scheduler, routes: Sequence[str]) -> None:
        """Add what the scheduler has counted, and the routes that the endpoints had at last."""
        stats, counts = self._given.stats, scheduler.counts
        stats.retries += counts.retries
        stats.halvings += counts.halvings
        stats.steals += counts.steals
        stats.reissues += counts.duplicates
        stats.routes = dict(Counter(stats.routes) + Counter(p.describe() for p in self._plans) - Counter(routes))

    def _scheduler(self) -> Scheduler:
        given, pool, sizing, places = self._given, self._pool, self._sizing, self._places
        texts, n, infos, counted = given.prompts.texts, given.spec.n, pool._core.infos, self._counted
        awaited = given.arrivals.awaited if given.arrivals else 0
        chars = array("q", [len(text) if text else 0 for text in texts])
        limited = sizing.limited(self._unfitted(given.rows), chars)
        answer = int(sizing.chars_per_token * min(sizing.cap, _USUAL_ANSWER) * n)
        order = "given" if awaited else pool.batch.order  # most rows are not known yet
        runs = prefix_order(texts, given.rows, len(places), limited, answer=answer, order=order)
        homes = runs.queues if runs else home_queues(given.rows, len(places), chars, limited)
        queues = dict(zip(places, homes, strict=True))

        def tokens(row: int) -> int:
            size = len(texts[row] or "")
            prompt = math.ceil(counted[0] * size) if counted else sizing.estimate(size)
            return prompt + n * limited.get(row, sizing.cap)

        return Scheduler(
            self._fleet(queues.keys()),
            [queues.get(i, []) for i in range(self._size)],
            len(texts),
            limited=limited,
            hedge=pool.batch.hedge,
            expected=any(e.url in infos and pool._status(e) == "up" for e in pool._endpoints),
            tokens=tokens,
            parts=runs.parts if runs else None,
            awaited=awaited,
            batch_tokens=pool.batch.max_batch_tokens,
        )

    def _fleet(self, used: Collection[int]) -> Fleet:
        # What the fleet holds on to must not lead to the answers: such a cycle would keep them after the run.
        pool, priority, endpoints, places = self._pool, self._given.priority, self._endpoints, self._places
        batch, rates, shared = pool.batch, pool._core.rates, pool._core.places
        in_flight = batch.single_in_flight if self._single else batch.max_in_flight

        def place(index: int) -> str:  # what a gateway allows, all its endpoints share
            endpoint = endpoints[index]
            return endpoint.url if rates.of(endpoint) is None else gateway_of(endpoint)

        return Fleet(
            self._size,
            max_size=1 if self._single else batch.first_size,
            largest=1 if self._single else batch.largest,
            max_in_flight=in_flight,
            retry=pool.retry,
            draw=random.random,
            resting=[i for i, e in zip(places, pool._endpoints, strict=True) if pool._status(e) == "slow"],
            removed=[i for i in range(self._size) if i not in used],
            concurrency=pool._limit(in_flight if pool._core.watch is None else sockets()),  # more may come
            rate_of=lambda index: rates.of(endpoints[index]),
            deadline=self._given.deadline,
            taken=lambda index: shared.taken(priority, lambda: place(index)),
        )

    def _unfitted(self, rows: Sequence[int]) -> Sequence[int]:
        fits = self._given.prompts.fits
        return [row for row in rows if row not in fits] if fits else rows

    # ---- rows and endpoints that come later ------------------------------

    async def _laid_out(self, rows: Sequence[int]) -> tuple[list[int], dict[int, int]] | None:
        """Rows that join, in the order in which they are sent, and the limited budgets; None where their route is
        another one."""
        prompts = self._given.prompts
        try:
            if not await self._suits(rows):
                self.left = list(rows)
                return None
        except SettingError as exc:  # such as a parameter that the other route refuses
            odd = {row for row in rows if odd_prompts(prompts.texts, [row]).keys() - self._odd.keys()}
            self._fail(odd, exc)
            rows = [row for row in rows if row not in odd]
        sizing = await self._pool._sizing(self._given.spec, self._plans, prompts, rows)
        chars = {row: len(prompts.texts[row] or "") for row in rows}
        limited = sizing.limited(self._unfitted(rows), chars)
        return home_queues(rows, 1, chars, limited)[0], limited

    async def _suits(self, rows: Sequence[int]) -> bool:
        """Whether these rows have the routes of the run: only prompts of a kind that is new are looked at."""
        new = {k: text for k, text in odd_prompts(self._given.prompts.texts, rows).items() if k not in self._odd}
        if not new:
            return True
        spec, known = replace(self._given.spec, schema=None, logprobs=None), list(self._odd.values())
        try:
            before = await self._pool._plans(spec, known)
            now = await self._pool._plans(spec, [*known, *new.values()])
        except NoEndpointsError:  # for a while: the run waits for them
            before = now = []
        self._odd |= new
        return [plan.route for plan in before] == [plan.route for plan in now]

    async def _plan_of(self, endpoint: AgentEndpoint) -> RoutePlan:
        """How an endpoint is asked that comes; raises where it cannot do what the others do."""
        pool, spec, most = self._pool._with(_endpoints=[endpoint]), self._given.spec, self._sizing.context
        plan = (await pool._plans(spec, self._texts))[0]
        context = (await pool._sizing(spec, [plan], Prompts([]), [])).context
        if not (self._single or plan.lists):
            raise SettingError("it takes no lists of prompts")
        if context is not None and most is not None and context < most:
            raise SettingError(f"its context is {context:,} tokens; the run counts on {most:,}")
        if UNTOLD in plan.note and not any(UNTOLD in other.note for other in self._plans):
            raise SettingError(UNTOLD)
        return plan


def _count_once(given: Given, counted: list[float], event: RunEvent) -> None:
    """Take the tokens of a character from the first answers whose prompts the server has counted."""
    if isinstance(event, RowsDone) and event.rows and not counted:
        chars = sum(len(given.prompts.texts[row] or "") for row in event.rows)
        tokens = (event.usage or given.columns.cost(event.rows)).prompt_tokens
        if chars and tokens:
            counted.append(tokens / chars)
