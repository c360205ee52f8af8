"""Pools: endpoints with one HTTP client, one set of settings, and the verbs on lists of prompts."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from ..client import io_thread
from ..client.hostfile import AgentEndpoint, as_endpoint
from ..client.http_settings import CertLike, HttpSettings
from ..client.keys import Headers
from ..client.open_files import sockets
from ..client.openai_client import endpoint_client
from ..client.proxy import Proxy
from ..engine.columns import Columns
from ..engine.deadline import Deadline
from ..engine.policy import BatchPolicy, RetryPolicy
from ..engine.token_budgets import Sizing
from ..errors import NoEndpointsError, SettingError, warn
from ..records import Failure, Prompts, RequestSpec, Response, Route
from ..runs.events import Listener
from ..runs.stats import RunStats
from ..text import plural, table_html
from .arrivals import Arrivals
from .executor import Renewal
from .pool_run import Given, PoolRun
from .rates import Rates
from .route_plan import RoutePlan
from .shared_state import SharedState
from .watch import Watch

if TYPE_CHECKING:
    import os
    import ssl

    import httpx2
    import openai

__all__ = ["AgentPool"]

_ONE_ENDPOINT_PAUSES = 6  # shortest pauses for which a request to one endpoint only is tried again


class AgentPool:
    """Endpoints that speak ``POST /generate {"prompt"}``, used as one.

    Parameters
    ----------
    endpoints : iterable of AgentEndpoint, str or (host, port)
        At least one.
    concurrency : int, optional
        Most requests in flight over the whole pool; by default as many as its size and the limit on open files
        allow.
    connector_limit : int, optional
        Another name for the same bound; the smaller of the two holds.
    timeout : float, default 120
        Seconds without a single byte after which a request fails.
    batch : BatchPolicy, optional
        Batch sizes, and requests in flight per endpoint.
    retry : RetryPolicy, optional
        Retries, pauses and breakers.
    trust_env : bool, default False
        Use the proxies of the environment.
    verify : ssl.SSLContext, str or path, optional
        Which certificates https endpoints are trusted by: a context, or a file or folder of CA certificates (PEM).
        By default those that the system trusts.
    headers : mapping of str to str, optional
        Sent with every request to the pool's endpoints; an ``Authorization`` here stands in for the endpoints'
        keys. Never shown in a repr or a message, and not pickled.
    http_client : httpx2.AsyncClient, optional
        Sends the requests in place of swarmkit's own client, e.g. ``openai.DefaultAioHttpClient(...)``. Its
        connections belong to swarmkit's event loop, so only pools can use it. Closing a pool leaves it open, unless
        it is ``close(http_client=True)``.
    rpm, tpm, max_connections : int, optional
        Requests a minute, tokens a minute (of prompts and answers; estimated before a request, corrected after it) and
        requests in flight, at most, at each gateway: the endpoints of one scheme, host and port share them. All runs of
        the pool and its sub-pools count together. The tags of an endpoint with these names say it for its gateway.
    key_ttl : float, default 300
        Seconds after which a key that a function or a command gave is asked for again; one that is refused is, at once.
    cert : str, path, or pair of these, optional
        The client's certificate, for https endpoints that ask for one: a PEM file with the certificate and its key,
        or a pair of files (certificate, key). The key must not be encrypted.
    proxy : str, optional
        The HTTP proxy of the endpoints that name none: ``http://host:port``, or ``http://user:password@host:port``.
        The password is never shown, and not pickled.
    via : str, optional
        ``"ssh:HOST"``: all endpoints are reached from that host, by forwards of the command ``ssh``. HOST is what you
        would type after ``ssh``, and must not ask for a password.

    Raises
    ------
    SettingError
        No endpoint, or a value outside of what is allowed.

    Notes
    -----
    All I/O happens on swarmkit's own loop, so a pool may be used from any loop and any thread.

    Examples
    --------
    >>> AgentPool([("node001", 8000), "node002:8000"]).size
    2

    Sub-pools share the connections of the whole one:

    >>> parts = [pool.by_tag("engine", "echo"), pool.slice(0, 3), pool.select([0, 2]), pool.sample(1)]
    >>> [part.size for part in parts], pool.select([0]).endpoints == pool.endpoints[:1]
    ([4, 3, 2, 1], True)
    >>> pool.with_batch(sk.BatchPolicy(max_size=32)).batch.max_size, pool.batch.max_size, pool.retry.max_attempts
    (32, 100, 5)

    One prompt, a list of prompts, and one prompt to all endpoints:

    >>> async def ask(pool):
    ...     answers = [await pool.post(0, "Hi"), *await pool.send_all(["lacZ?", "recA?"])]
    ...     answers += await pool.send_all_batched(["Ho"]) + await pool.broadcast_prompt("Who?")
    ...     await pool.close()
    ...     return [answer.text for answer in answers]
    >>> import asyncio
    >>> asyncio.run(ask(sk.VLLMPool(swarm.endpoints[:2])))
    ['echo: Hi', 'echo: lacZ?', 'echo: recA?', 'echo: Ho', 'echo: Who?', 'echo: Who?']
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
        verify: ssl.SSLContext | str | os.PathLike[str] | None = None,
        headers: Mapping[str, str] | None = None,
        http_client: httpx2.AsyncClient | None = None,
        rpm: int | None = None,
        tpm: int | None = None,
        max_connections: int | None = None,
        key_ttl: float = 300.0,
        cert: CertLike | None = None,
        proxy: Proxy | str | None = None,
        via: str | None = None,
    ) -> None:
        headers = Headers(headers) if isinstance(headers, Mapping) else headers  # tracebacks may show variables
        proxy = Proxy.of(proxy)
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
        http = HttpSettings(
            timeout, trust_env, verify, {} if headers is None else headers, http_client, key_ttl, cert, proxy, via
        )
        http.check(self._endpoints)
        self._core = SharedState(http, Rates(rpm, tpm, max_connections))
        self.last_run: RunStats | None = None

    # ---- its parts ------------------------------

    @property
    def size(self) -> int:
        """Number of endpoints."""
        return len(self._endpoints)

    @property
    def endpoints(self) -> list[AgentEndpoint]:
        """The endpoints, by index; those of a watched hostfile change."""
        return list(self._endpoints)

    @property
    def _endpoints(self) -> list[AgentEndpoint]:
        return self._given if self._followed is None else self._followed()

    @_endpoints.setter
    def _endpoints(self, given: list[AgentEndpoint]) -> None:
        self._given = given
        self._followed: Callable[[], list[AgentEndpoint]] | None = None

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
        pool = self._where(lambda e: e.tags.get(key) == value)
        if not pool.size:
            there = sorted({f"{k}={v}" for e in self._endpoints for k, v in e.tags.items()})
            shown = ", ".join(there[:20]) or "none"
            raise SettingError(f"no endpoint has the tag {key}={value}; the tags of this pool are: {shown}")
        return pool

    def _where(self, admits: Callable[[AgentEndpoint], bool]) -> Self:
        """The sub-pool of some endpoints. That of a watched pool goes on following the hostfile."""
        if (followed := self._followed) is None:
            return self._with(_endpoints=list(filter(admits, self._endpoints)))
        return self._with(_followed=lambda: list(filter(admits, followed())))

    def sample(self, n: int) -> Self:
        """A sub-pool of ``n`` endpoints drawn at random (all, if there are fewer)."""
        pool = self._still()
        return pool.select(sorted(random.sample(range(pool.size), min(n, pool.size))))

    def slice(self, start: int, stop: int) -> Self:
        """The sub-pool of the endpoints from index ``start`` up to ``stop``."""
        return self.select(range(*slice(start, stop).indices(self.size)))

    def select(self, indices: Sequence[int]) -> Self:
        """The sub-pool of the endpoints at these indices. It shares the connections of its parent."""
        if not len(indices):
            raise SettingError("a sub-pool needs at least one endpoint, and none was selected")
        endpoints = self._endpoints
        try:
            chosen = [endpoints[i] for i in indices]
        except IndexError:
            raise SettingError(f"endpoints are counted 0 to {len(endpoints) - 1}; asked for {list(indices)}") from None
        return self._with(_endpoints=chosen)

    def client(self, index: int) -> openai.AsyncOpenAI:
        """A ready ``openai`` client for one endpoint, for what swarmkit has no verb for.

        Parameters
        ----------
        index : int
            The endpoint's, from 0.

        Returns
        -------
        openai.AsyncOpenAI
            With the endpoint's base URL and key (as it is now) and the pool's headers and timeout, without retries.
            Requests go over the pool's connections, on swarmkit's own loop, so it may be used on any loop, as long as
            the pool is open. Closing it leaves the pool's connections open.

        Raises
        ------
        SettingError
            There is no such endpoint.

        Examples
        --------
        >>> import asyncio
        >>> async def listed(pool):
        ...     return [model.id async for model in pool.client(0).models.list()]
        >>> asyncio.run(listed(pool))
        ['echo']
        """
        endpoint, core = self.select([index])._endpoints[0], self._core

        async def send(request: httpx2.Request) -> httpx2.Response:
            return await core.transport().send(endpoint, request)

        return endpoint_client(endpoint, core.http, send)

    def with_batch(self, batch: BatchPolicy) -> Self:
        """The same pool with other batch sizes; it shares the connections."""
        return self._with(_batch=batch)

    def _with(self, **changes: Any) -> Self:
        copy = object.__new__(type(self))
        copy.__dict__.update(self.__dict__, last_run=None)
        for name, value in changes.items():
            setattr(copy, name, value)
        return copy

    def follow(self, watch: Watch) -> None:
        """Have the endpoints of a watched hostfile, from now on."""
        self._core.watch, self._followed = watch, lambda: watch.endpoints
        watch.begin()

    def _still(self) -> Self:
        """The same pool, whose endpoints stay as they are now."""
        return self if self._followed is None else self._with(_endpoints=self._endpoints)

    def __getstate__(self) -> dict[str, Any]:
        return self._still().__dict__

    def __repr__(self) -> str:
        if "_core" not in self.__dict__:  # its settings were refused, and a traceback shows the variables
            return f"<{type(self).__name__}, not made>"
        shown = ", ".join(e.name for e in self._endpoints[:3]) + (", ..." if self.size > 3 else "")
        state = ", closed" if self._core.closed else ""
        return f"<{type(self).__name__}: {plural(self.size, 'endpoint')} ({shown}){state}>"

    def _repr_html_(self) -> str:
        return table_html(self._facts())

    def _facts(self) -> list[tuple[str, str]]:
        """Label and value, for what is worth showing."""
        known = Counter(self._core.infos[e.url].status for e in self._endpoints if e.url in self._core.infos)
        health = ", ".join(f"{count:,} {status}" for status, count in known.most_common()) or "not checked yet"
        watched = [("hostfile", str(self._core.watch))] if self._followed is not None else []
        return [("pool", repr(self).strip("<>")), ("health", health), *watched]

    # ---- verbs on lists ------------------------------

    async def post(self, agent_index: int, prompt: str, max_tokens: int | None = None) -> Response:
        """Send one prompt to one endpoint.

        Returns
        -------
        Response
            ``success`` False with ``error``, where it failed; ``agent_index`` is the one given.
        """
        spec = self._single_spec(max_tokens)
        return (await self.select([agent_index])._without_waiting()._answers([prompt], spec, agent_index))[0]

    async def send_all(self, prompts: Sequence[str]) -> list[Response]:
        """Send one prompt per request, prompt ``i`` to endpoint ``i % size`` unless one fails; answers in order."""
        return await self._answers(prompts, self._single_spec(None))

    async def send_all_batched(self, prompts: Sequence[str], max_tokens: int | None = None) -> list[Response]:
        """The same as ``send_all``: plain agents take one prompt per request."""
        return await self._answers(prompts, self._single_spec(max_tokens))

    async def broadcast_prompt(self, prompt: str) -> list[Response]:
        """Send one prompt to every endpoint; one response each, by index."""
        spec = self._single_spec(None)
        return await io_thread.run_on_loop(self._broadcast(prompt, spec))

    async def _broadcast(self, prompt: str, spec: RequestSpec) -> list[Response]:
        pool, gate = self._still(), asyncio.Semaphore(self._limit(1))

        async def one(index: int) -> Response:
            async with gate:
                return (await pool.select([index])._without_waiting()._answers([prompt], spec, index))[0]

        return list(await asyncio.gather(*map(one, range(pool.size))))

    def _without_waiting(self) -> Self:
        """For requests to one endpoint only: they fail when it is down for more than a few seconds."""
        give_up_s = min(self._retry.give_up_s, _ONE_ENDPOINT_PAUSES * self._retry.base_s)
        return self._with(_retry=replace(self._retry, give_up_s=give_up_s))

    async def _answers(
        self, prompts: Sequence[str], spec: RequestSpec, agent_index: int | None = None
    ) -> list[Response]:
        columns = Columns(len(prompts), spec.n)
        try:
            failure = await self.run(Prompts(list(prompts)), spec, columns)
            why = f"no endpoint is left; the last failure: {failure.describe()}" if failure else ""
        except NoEndpointsError as exc:  # no endpoint answered the probe
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
        spec: RequestSpec,
        columns: Columns,
        listeners: Sequence[Listener] = (),
        pending: Iterable[int] | None = None,
        stats: RunStats | None = None,
        *,
        parts: Sequence[Listener] = (),
        deadline: Deadline | None = None,
        arrivals: Arrivals | None = None,
        priority: int = 0,
    ) -> Failure | None:
        """Send a column of prompts and fill the columns of answers. All verbs are built on it.

        Parameters
        ----------
        prompts : Prompts
            The column.
        spec : RequestSpec
            What the rows have in common.
        columns : Columns
            Filled in place, as answers come.
        listeners : sequence of callable
            Called with the run's events, on the I/O thread. One that raises is removed, with a warning.
        pending : iterable of int, optional
            Positions to send; by default all that have a text.
        stats : RunStats, optional
            Counts the run; its ``rows`` are set by the caller. Made where it is not given. ``last_run`` afterwards.
        parts : sequence of callable
            Parts of the run itself, as its store: called before the listeners, and what they raise ends the run.
        deadline : Deadline, optional
            When it must be over, on the clock of ``time.monotonic``.
        arrivals : Arrivals, optional
            Where more rows come from while it goes on. The texts of those are written to ``prompts`` before they come.
        priority : int, default 0
            Which of the runs of the pool and its sub-pools goes first at their endpoints: that with the lower number.

        Returns
        -------
        Failure or None
            None when every pending row is settled; the last failure when no endpoint is left; one of the kind
            ``DEADLINE`` when the deadline came first.
        """
        self._core.check_open()
        counted = RunStats(rows=len(prompts.texts), failed=len(prompts.errors)) if stats is None else stats
        rows = range(len(prompts.texts)) if pending is None else pending
        to_send = [row for row in rows if prompts.texts[row] is not None]
        given = Given(prompts, spec, columns, to_send, counted, listeners, parts, deadline, arrivals, priority)
        try:
            return await io_thread.run_on_loop(self._run(given))
        finally:
            if stats is None:  # a caller that counts by itself warns of what it has counted
                for line in [*counted.notices, *counted.listener_errors]:
                    warn(line)

    async def _run(self, given: Given) -> Failure | None:
        for row, error in given.prompts.errors.items():
            given.columns.fail(row, error)
        self.last_run = given.stats
        if not given.rows:
            return None
        if given.deadline is not None and time.monotonic() >= given.deadline.closes_at:  # nothing would be sent
            return given.deadline.failure
        given.stats.follow(given.columns)
        pool, doubted = self, set[str]()
        while True:
            run = await PoolRun.of(pool, given)
            failure = await run.carry_out(pool)
            if failure is not None or not run.left:
                return failure
            given = replace(given, rows=run.left)
            doubted.update(run.distrusted)
            believed = self._where(lambda e: e.url not in doubted)  # few rows would not show it
            pool = believed if believed.size else self

    def _status(self, endpoint: AgentEndpoint) -> str:
        info = self._core.infos.get(endpoint.url)
        return info.status if info else "up"

    def _kind(self, endpoint: AgentEndpoint) -> str:
        info = self._core.infos.get(endpoint.url)
        return info.kind if info else "unknown"

    def _is_vllm(self, endpoint: AgentEndpoint) -> bool:
        return self._kind(endpoint) in ("vllm", "swarmkit")  # the latter plays the former

    def _limit(self, per_endpoint: int) -> int:
        """Most requests in flight over the pool: the setting, within the limit on open files."""
        return max(1, min(self._concurrency or self.size * per_endpoint, sockets()))

    # ---- for subclasses ------------------------------

    def _single_spec(self, max_tokens: int | None) -> RequestSpec:
        return RequestSpec(mode="single", max_tokens=max_tokens or 512)

    async def _complete(self, spec: RequestSpec) -> RequestSpec:
        """Fill in what only the servers know."""
        return spec

    async def _plans(self, spec: RequestSpec, texts: Sequence[str] = ()) -> list[RoutePlan]:
        """The route plan of each endpoint; ``texts`` are some of the prompts."""
        return [RoutePlan(Route.GENERATE)] * self.size

    def _renewal(self, spec: RequestSpec, texts: Sequence[str]) -> Renewal | None:
        """What makes the plan of an endpoint anew if it is another server by now."""
        return None

    async def _sizing(
        self, spec: RequestSpec, plans: Sequence[RoutePlan], prompts: Prompts, rows: Sequence[int]
    ) -> Sizing:
        return Sizing(spec.max_tokens)

    # ---- lifecycle ------------------------------

    async def close(self, *, http_client: bool = False) -> None:
        """Close the connections of this pool and of its sub-pools.

        Parameters
        ----------
        http_client : bool, default False
            Close the client that was given as ``http_client=`` as well. Its connections belong to swarmkit's event
            loop, so it is closed there.
        """
        await io_thread.run_on_loop(self._core.close(http_client))

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
        io_thread.call(self._core.close())
