"""Pools: endpoints with one HTTP client, one set of settings, and the verbs on lists of prompts."""

from __future__ import annotations

import concurrent.futures
import contextlib
import random
import weakref
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any, Self

from . import bridge
from .batches import Sizing, home_queues
from .dispatch import Dispatch, Way
from .errors import NoEndpointsError, PoolClosedError, SettingError
from .events import Listener, RunEnded, RunStarted
from .hostfile import AgentEndpoint, as_endpoint
from .markup import plural, table_html
from .policy import BatchPolicy, RetryPolicy
from .probe import ServerInfo
from .records import Ask, Failure, Prompts, Response, Route
from .results import Columns
from .scheduler import Scheduler
from .stats import RunStats
from .transport import Transport

__all__ = ["AgentPool"]

_SPARE_FILES = 256


@dataclass(eq=False)
class Core:
    """What a pool shares with its sub-pools: the HTTP client, and what is known of the servers."""

    timeout: float
    trust_env: bool
    closed: bool = False
    infos: dict[str, ServerInfo] = field(default_factory=dict)
    memo: dict[Any, Any] = field(default_factory=dict)
    _transport: Transport | None = None
    _generation: int = -1

    def transport(self) -> Transport:
        """The client of the loop in use; a forked child's loop gets one of its own."""
        if self.closed:
            raise PoolClosedError("this pool is closed; make a new one with swarmkit.connect(...)")
        if self._transport is None or self._generation != bridge.generation():
            self._transport = Transport(timeout=self.timeout, trust_env=self.trust_env)
            self._generation = bridge.generation()
            # A pool that nobody closes and nobody holds any more leaves no connections behind, nor does one that is
            # there when the interpreter ends.
            weakref.finalize(self, _let_go, self._transport, self._generation).atexit = False
            _living.add(self)
        return self._transport

    async def close(self) -> None:
        """Close all connections; the pool and its sub-pools cannot be used afterwards."""
        self.closed = True
        if self._transport is not None and self._generation == bridge.generation():
            await self._transport.aclose()
        self._transport = None

    def __getstate__(self) -> dict[str, Any]:
        return {"timeout": self.timeout, "trust_env": self.trust_env, "closed": self.closed}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc] # a recipe: connections and findings are made anew


_living: weakref.WeakSet[Core] = weakref.WeakSet()


def _let_go(transport: Transport, generation: int) -> None:
    if bridge.is_running(generation):
        bridge.start(transport.aclose())


@bridge.at_exit
def _let_all_go() -> None:
    closing = [bridge.start(core.close()) for core in _living if bridge.is_running(core._generation)]
    concurrent.futures.wait(closing, timeout=1.0)


class AgentPool:
    """Endpoints that speak ``POST /generate {"prompt"}``, used as one.

    Parameters
    ----------
    endpoints : iterable of AgentEndpoint, str or (host, port)
        At least one.
    concurrency : int, optional
        Requests in flight over the whole pool, at most; by default what its size and the limit on open files
        allow.
    connector_limit : int, optional
        Connections, at most; here another name for the same bound, the smaller one holds.
    timeout : float, default 120
        Seconds without a single byte after which a request is given up.
    batch : BatchPolicy, optional
        Batch sizes and requests in flight an endpoint.
    retry : RetryPolicy, optional
        Retries, pauses and breakers.
    trust_env : bool, default False
        Use the proxies of the environment.

    Raises
    ------
    SettingError
        No endpoint, or a number outside of what is allowed.

    Notes
    -----
    All I/O happens on swarmkit's own loop, so a pool may be used from any loop and any thread.

    Examples
    --------
    >>> pool = AgentPool([("node001", 8000), "node002:8000"])
    >>> pool.size
    2
    """

    def __init__(
        self,
        endpoints: Iterable[AgentEndpoint | str | tuple[str, int]],
        concurrency: int | None = None,
        connector_limit: int | None = None,
        timeout: float = 120.0,
        *,
        batch: BatchPolicy | None = None,
        retry: RetryPolicy | None = None,
        trust_env: bool = False,
    ) -> None:
        self._endpoints = [as_endpoint(e) for e in endpoints]
        if not self._endpoints:
            raise SettingError("a pool needs at least one endpoint, and none was given")
        for name, value in (("concurrency", concurrency), ("connector_limit", connector_limit)):
            if value is not None and value < 1:
                raise SettingError(f"{name}={value!r}: must be 1 or more, or None to follow the open-files limit")
        if not timeout > 0:
            raise SettingError(f"timeout={timeout!r}: must be a number of seconds above 0")
        bounds = [b for b in (concurrency, connector_limit) if b is not None]
        self._concurrency = min(bounds) if bounds else None
        self._batch = batch or BatchPolicy()
        self._retry = retry or RetryPolicy()
        self._core = Core(timeout, trust_env)
        self.last_run: RunStats | None = None

    # ---- what it is made of ------------------------------

    @property
    def size(self) -> int:
        """Number of endpoints."""
        return len(self._endpoints)

    @property
    def endpoints(self) -> list[AgentEndpoint]:
        """The endpoints, by index."""
        return list(self._endpoints)

    @property
    def batch(self) -> BatchPolicy:
        """Batch sizes and requests in flight."""
        return self._batch

    @property
    def retry(self) -> RetryPolicy:
        """Retries, pauses and breakers."""
        return self._retry

    def by_tag(self, key: str, value: str) -> Self:
        """The sub-pool of endpoints whose tag ``key`` is ``value``."""
        chosen = [i for i, e in enumerate(self._endpoints) if e.tags.get(key) == value]
        if not chosen:
            there = sorted({f"{k}={v}" for e in self._endpoints for k, v in e.tags.items()})
            shown = ", ".join(there[:20]) or "none"
            raise SettingError(f"no endpoint has the tag {key}={value}; the tags there are: {shown}")
        return self.select(chosen)

    def sample(self, n: int) -> Self:
        """A sub-pool of ``n`` endpoints drawn at random (all, if there are fewer)."""
        return self.select(sorted(random.sample(range(self.size), min(n, self.size))))

    def slice(self, start: int, stop: int) -> Self:
        """The sub-pool of the endpoints from index ``start`` up to ``stop``."""
        return self.select(range(*slice(start, stop).indices(self.size)))

    def select(self, indices: Sequence[int]) -> Self:
        """The sub-pool of the endpoints at these indices. It shares the connections of its parent."""
        if not len(indices):
            raise SettingError("a sub-pool needs at least one endpoint, and none was selected")
        try:
            chosen = [self._endpoints[i] for i in indices]
        except IndexError:
            raise SettingError(f"endpoints are counted 0 to {self.size - 1}; asked for {list(indices)}") from None
        return self._with(_endpoints=chosen)

    def with_batch(self, batch: BatchPolicy) -> Self:
        """The same pool with other batch sizes; it shares the connections."""
        return self._with(_batch=batch)

    def _with(self, **changes: Any) -> Self:
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__, last_run=None, **changes)
        return twin

    def __repr__(self) -> str:
        shown = ", ".join(e.name for e in self._endpoints[:3]) + (", ..." if self.size > 3 else "")
        state = ", closed" if self._core.closed else ""
        return f"<{type(self).__name__}: {plural(self.size, 'endpoint')} ({shown}){state}>"

    def _repr_html_(self) -> str:
        return table_html(self._facts())

    def _facts(self) -> list[tuple[str, str]]:
        """Label and value, for what is worth showing."""
        known = Counter(self._core.infos[e.url].status for e in self._endpoints if e.url in self._core.infos)
        health = ", ".join(f"{count:,} {status}" for status, count in known.most_common()) or "nobody was asked yet"
        return [("pool", repr(self).strip("<>")), ("health", health)]

    # ---- verbs on lists ------------------------------

    async def post(self, agent_index: int, prompt: str, max_tokens: int | None = None) -> Response:
        """Send one prompt to one endpoint.

        Returns
        -------
        Response
            ``success`` False with ``error``, where it failed; ``agent_index`` is the one given.
        """
        ask = self._ask_single(max_tokens)
        return (await self.select([agent_index])._impatient()._answers([prompt], ask, agent_index))[0]

    async def send_all(self, prompts: Sequence[str]) -> list[Response]:
        """Send prompts one a request, prompt ``i`` to endpoint ``i % size`` while all is well; answers in order."""
        return await self._answers(prompts, self._ask_single(None))

    async def send_all_batched(self, prompts: Sequence[str], max_tokens: int | None = None) -> list[Response]:
        """The same as ``send_all``: plain agents take one prompt a request."""
        return await self._answers(prompts, self._ask_single(max_tokens))

    async def broadcast_prompt(self, prompt: str) -> list[Response]:
        """Send one prompt to every endpoint; one response each, by index."""
        ask = self._ask_single(None)
        return await bridge.hop(self._broadcast(prompt, ask))

    async def _broadcast(self, prompt: str, ask: Ask) -> list[Response]:
        import asyncio

        gate = asyncio.Semaphore(self._limit(1))

        async def one(index: int) -> Response:
            async with gate:
                return (await self.select([index])._impatient()._answers([prompt], ask, index))[0]

        return list(await asyncio.gather(*map(one, range(self.size))))

    def _impatient(self) -> Self:
        """For work bound to one endpoint: nobody else can do it, so do not wait for it to come back."""
        return self._with(_retry=replace(self._retry, max_opens=1))

    async def _answers(self, prompts: Sequence[str], ask: Ask, agent_index: int | None = None) -> list[Response]:
        columns = Columns(len(prompts), ask.n)
        try:
            failure = await self.run(Prompts(list(prompts)), ask, columns)
            why = f"no endpoint is left; the last failure: {failure.describe()}" if failure else ""
        except NoEndpointsError as exc:  # nobody answered when asked what it is
            why = str(exc)
        if why:
            for row in list(columns.missing()):
                columns.fail(row, why)
        responses = columns.responses()
        return responses if agent_index is None else [replace(r, agent_index=agent_index) for r in responses]

    # ---- a run ------------------------------

    async def run(
        self,
        prompts: Prompts,
        ask: Ask,
        columns: Columns,
        listeners: Sequence[Listener] = (),
        pending: Iterable[int] | None = None,
        stats: RunStats | None = None,
    ) -> Failure | None:
        """Send a column of prompts and fill the columns of answers: the engine below all verbs.

        Parameters
        ----------
        prompts : Prompts
            The column.
        ask : Ask
            What the rows have in common.
        columns : Columns
            Filled in place, as answers come.
        listeners : sequence of callable
            Hear the run's events.
        pending : iterable of int, optional
            Positions to ask; all that have a text by default.
        stats : RunStats, optional
            Counts the run, its rows counted already; made when it is not given. ``last_run`` afterwards.

        Returns
        -------
        Failure or None
            None when every pending row is settled; else the last failure, when no endpoint is left.
        """
        if self._core.closed:
            self._core.transport()
        stats = stats or RunStats(rows=len(prompts.texts), failed=len(prompts.errors))
        return await bridge.hop(self._run(prompts, ask, columns, listeners, pending, stats))

    async def _run(
        self,
        prompts: Prompts,
        ask: Ask,
        columns: Columns,
        listeners: Sequence[Listener],
        pending: Iterable[int] | None,
        stats: RunStats,
    ) -> Failure | None:
        import asyncio
        import time

        for row, error in prompts.errors.items():
            columns.fail(row, error)
        rows = range(len(prompts.texts)) if pending is None else pending
        rows = [r for r in rows if prompts.texts[r] is not None]
        self.last_run = stats
        if not rows:
            return None
        transport = self._core.transport()
        ask = await self._complete(ask)
        ways = await self._ways(ask)
        sizing = await self._sizing(ask, ways, prompts, rows)
        single = ask.mode == "single" or not all(way.lists for way in ways)
        scheduler = self._scheduler(prompts, rows, sizing, single)
        listeners = [stats, *listeners]
        dispatch = Dispatch(
            transport,
            self._endpoints,
            ways,
            ask,
            prompts.texts,
            columns,
            scheduler,
            sizing,
            listeners,
            ask.details,
            self._retry.quiet_s,
        )
        names, routes = [e.name for e in self._endpoints], [w.describe() for w in ways]
        started = RunStarted(len(prompts.texts), len(rows), names, routes, time.monotonic())
        for listener in listeners:
            listener(started)
        failure, cancelled = None, False
        try:
            failure = await dispatch.run()
        except asyncio.CancelledError:
            cancelled = True
            raise
        finally:
            stats.count_tokens(columns)
            stats.retries += scheduler.counts.retries
            stats.halvings += scheduler.counts.halvings
            stats.steals += scheduler.counts.steals
            stats.reissues += scheduler.counts.copies
            for listener in listeners:
                listener(RunEnded(failure, cancelled, time.monotonic()))
        return failure

    def _scheduler(self, prompts: Prompts, rows: Sequence[int], sizing: Sizing, single: bool) -> Scheduler:
        chars = array("q", [len(text) if text else 0 for text in prompts.texts])
        tight = sizing.tight(rows, chars)
        queues = home_queues(rows, self.size, chars, tight)
        in_flight = self._batch.single_in_flight if single else self._batch.max_in_flight
        slow = [i for i, e in enumerate(self._endpoints) if self._status(e) == "slow"]
        return Scheduler(
            queues,
            len(prompts.texts),
            max_size=1 if single else self._batch.max_size,
            max_in_flight=in_flight,
            retry=self._retry,
            draw=random.random,
            concurrency=self._limit(in_flight),
            tight=tight,
            resting=slow,
            hedge=self._batch.hedge,
        )

    def _status(self, endpoint: AgentEndpoint) -> str:
        info = self._core.infos.get(endpoint.url)
        return info.status if info else "up"

    def _limit(self, per_endpoint: int) -> int:
        """Requests in flight over the pool: what is asked for, within what this process may open."""
        return max(1, min(self._concurrency or self.size * per_endpoint, _open_files() - _SPARE_FILES))

    # ---- what subclasses decide ------------------------------

    def _ask_single(self, max_tokens: int | None) -> Ask:
        return Ask(mode="single", max_tokens=max_tokens or 512)

    async def _complete(self, ask: Ask) -> Ask:
        """Fill in what only the servers know."""
        return ask

    async def _ways(self, ask: Ask) -> list[Way]:
        return [Way(Route.GENERATE)] * self.size

    async def _sizing(self, ask: Ask, ways: Sequence[Way], prompts: Prompts, rows: Sequence[int]) -> Sizing:
        return Sizing(ask.max_tokens)

    # ---- lifecycle ------------------------------

    async def close(self) -> None:
        """Close the connections of this pool and of its sub-pools."""
        await bridge.hop(self._core.close())

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        bridge.call(self._core.close())


def _open_files() -> int:
    """Files this process may hold open; the soft limit is raised to the hard one first."""
    try:
        import resource
    except ImportError:  # not on Windows, whose sockets are not counted as files
        return 8192
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = min(hard, 1 << 16) if hard != resource.RLIM_INFINITY else 1 << 16
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(ValueError, OSError):  # macOS caps it below what it calls the hard limit
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            soft = wanted
    return wanted if soft == resource.RLIM_INFINITY else soft
