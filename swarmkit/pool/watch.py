"""A hostfile that is watched: its endpoints come into the pool and leave it, also while runs go on.

``Watch`` reads the file and asks new endpoints whether they are up; ``following`` tells a run what has changed.
"""

from __future__ import annotations

import asyncio
import contextlib
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from ..client import io_thread
from ..client.capabilities import probe, require_model
from ..client.hostfile import AgentEndpoint
from ..client.open_files import sockets
from ..errors import NoEndpointsError, SwarmError
from ..runs.log import LOGGER
from ..runs.stats import RunStats
from ..text import plural

if TYPE_CHECKING:
    from .agent_pool import AgentPool
    from .executor import Executor
    from .route_plan import RoutePlan
    from .shared_state import SharedState
    from .vllm_pool import VLLMPool

__all__ = ["Watch", "by_place", "following", "present"]

T = TypeVar("T")
P = TypeVar("P", bound="AgentPool")

_EVERY_S = 0.5  # between two looks at the file
_AGAIN_S = 1.0  # until an endpoint is asked again that is not up
_UNFIT_S = 30.0  # until a run looks again at one that it cannot use
_ASKED_PER_S = 200  # of all endpoints that are not up


class Watch:
    """Which endpoints of a hostfile are in use.

    A change of the file is believed when it was read alike twice, since few editors and scripts replace a file at once.
    An endpoint that is new in it is asked until it answers, and is in use from then on: a server may load its model for
    minutes. What comes back may be another server, so it is asked again and what was learned of it is forgotten. If the
    file cannot be used, all stays as it was.

    Parameters
    ----------
    path : Path
        The hostfile.
    read : callable
        Reads its endpoints, with what the pool's settings add to them; raises a ``SwarmError`` where they cannot be
        used.
    pool : VLLMPool
        With the endpoints in use at first, and the model that new ones must serve. The watch ends when it is closed.
    timeout : float
        Seconds that an endpoint has to answer.

    Attributes
    ----------
    endpoints : list of AgentEndpoint
        Those in use now; never changed in place.
    problem : str
        Why the file cannot be used, for the next run to say so; empty if that was said.
    """

    def __init__(self, path: Path, read: Callable[[], Sequence[AgentEndpoint]], pool: VLLMPool, timeout: float) -> None:
        self.endpoints = pool.endpoints
        self.problem = ""
        self._followers: set[asyncio.Event] = set()
        self._path = path
        self._read = read
        self._core = weakref.ref(pool._core)
        self._model = pool.model
        self._timeout = timeout
        self._listed: dict[str, AgentEndpoint] = {e.url: e for e in self.endpoints}
        self._asked: dict[str, asyncio.Task[None]] = {}
        self._is_bad = False
        self._job: io_thread.Job[None] | None = None
        self._generation = -1

    def begin(self) -> None:
        """Watch the file from now on; does nothing if that is being done on the loop in use."""
        if self._generation != io_thread.generation():
            self._generation = io_thread.generation()
            self._followers = set()  # those of a parent process are not here
            self._job = io_thread.start(self._watch())

    def end(self) -> None:
        """Watch it no more."""
        if self._job is not None and io_thread.is_running(self._generation):
            self._job.stop()

    def __str__(self) -> str:
        waiting = len(self._listed) - len(self.endpoints)
        more = f"; {plural(waiting, 'endpoint')} not up yet" if waiting > 0 else ""
        return f"{self._path}, watched{more}{'; it cannot be used now' if self._is_bad else ''}"

    async def _watch(self) -> None:
        self._asked, gate = {}, asyncio.Semaphore(max(1, min(_ASKED_PER_S, sockets() // 2)))
        content = b""
        used: bytes | None = None  # what the endpoints are from
        try:
            while (core := self._core()) is not None and not core.closed:
                before, content = content, await asyncio.to_thread(self._content)
                if before == content != used:
                    used = content
                    await self._take_up(core, gate)
                del core
                await asyncio.sleep(_EVERY_S)
        finally:
            for task in self._asked.values():
                task.cancel()

    def _content(self) -> bytes:
        # Its time stamps may be stale on a network file system; opening it asks the server.
        try:
            return self._path.read_bytes()
        except OSError as exc:
            return str(exc).encode()  # reading the endpoints raises it again

    async def _take_up(self, core: SharedState, gate: asyncio.Semaphore) -> None:
        """Read the endpoints of the file, which has changed."""
        try:
            listed = {e.url: e for e in await asyncio.to_thread(self._read)}
        except SwarmError as exc:
            if not self._is_bad:
                self._is_bad = True
                self.problem = f"{exc}. The endpoints stay as they were until the file can be used again"
                LOGGER.warning("%s", self.problem)
                self._notify()
            return
        self._is_bad, self.problem, self._listed = False, "", listed
        for url in [url for url in self._asked if url not in listed]:
            self._asked.pop(url).cancel()
        used = {e.url: e for e in self.endpoints}
        gone = used.keys() - listed.keys()
        for url in gone:
            LOGGER.info("%s is no longer in %s", used[url].name, self._path)
        for key in [key for key in core.memo if isinstance(key, tuple) and not gone.isdisjoint(key)]:
            del core.memo[key]
        for url in [url for url in listed if url not in used and url not in self._asked]:
            self._asked[url] = asyncio.create_task(self._ask(listed[url], gate))
        self._use([listed[url] for url in used if url in listed])

    async def _ask(self, endpoint: AgentEndpoint, gate: asyncio.Semaphore) -> None:
        """Ask an endpoint until it is up, and use it."""
        last = ""
        while (core := self._core()) is not None and not core.closed:
            async with gate:
                try:
                    info = await probe(core.transport(), endpoint, self._timeout, self._model)
                except SwarmError as exc:  # its key cannot be read
                    reason = str(exc)
                else:
                    info = core.infos[endpoint.url] = require_model(info, self._model)
                    reason = info.reason
                    if info.status == "up":
                        break
            if reason != last:
                LOGGER.info("%s of %s is not used yet: %s", endpoint.name, self._path, reason)
            last = reason
            del core
            await asyncio.sleep(max(_AGAIN_S, len(self._asked) / _ASKED_PER_S))
        else:
            return
        del self._asked[endpoint.url]
        LOGGER.info("%s of %s is used", endpoint.name, self._path)
        self._use([*self.endpoints, endpoint])

    @contextlib.contextmanager
    def changes(self) -> Iterator[asyncio.Event]:
        """An event that is set when ``endpoints`` or ``problem`` have changed."""
        event = asyncio.Event()
        self._followers.add(event)
        try:
            yield event
        finally:
            self._followers.discard(event)

    def _use(self, endpoints: list[AgentEndpoint]) -> None:
        self.endpoints = endpoints
        self._notify()

    def _notify(self) -> None:
        for event in self._followers:
            event.set()


def by_place(values: Sequence[T], places: Sequence[int], size: int) -> list[T]:
    """Values by index; an index that is not among the places gets the first, which nobody looks at."""
    found = [values[0]] * size
    for place, value in zip(places, values, strict=True):
        found[place] = value
    return found


async def present(pool: P, stats: RunStats) -> P:
    """A pool with the endpoints that there are now. If all have left a watched hostfile, it waits for one, as a run
    does that has begun, and ``stats`` says so.

    Raises
    ------
    NoEndpointsError
        None comes in time.
    """
    watch = pool._core.watch
    if pool._followed is not None and watch is not None:
        watch.begin()  # this may be a forked child
        with watch.changes() as changed, contextlib.suppress(TimeoutError):
            async with asyncio.timeout(pool.retry.give_up_s):
                while not pool._endpoints:
                    stats.waits = f"there is no endpoint to send to: {watch}"
                    await changed.wait()
                    changed.clear()
        stats.waits = ""
        if not pool._endpoints:
            raise NoEndpointsError(f"there is no endpoint, and none came in {pool.retry.give_up_s:g} s: {watch}")
    return pool._still()


@contextlib.asynccontextmanager
async def following(
    pool: AgentPool,
    known: Sequence[AgentEndpoint],
    executor: Executor,
    plan_of: Callable[[AgentEndpoint], Awaitable[RoutePlan]],
    stats: RunStats,
) -> AsyncIterator[None]:
    """Tell a run, while it lasts, which endpoints come into its pool and leave it.

    Parameters
    ----------
    known : sequence of AgentEndpoint
        Those that it has begun with.
    plan_of : callable
        How a new one is asked in this run; raises a ``SwarmError`` where it cannot be used.
    """
    watch = pool._core.watch
    if pool._followed is None or watch is None:
        yield
        return
    used = {e.url: stats.roster.place(e) for e in known}
    coming: dict[str, asyncio.Task[None]] = {}

    async def add(endpoint: AgentEndpoint) -> None:
        told = False
        while True:
            try:
                plan = await plan_of(endpoint)
                break
            except SwarmError as exc:  # it may still be starting
                if not told:
                    stats.notices.append(f"{endpoint.name} is new in the hostfile, and this run cannot use it: {exc}")
                told = True
                await asyncio.sleep(_UNFIT_S)
        used[endpoint.url] = place = stats.roster.place(endpoint)
        stats.routes[plan.describe()] = stats.routes.get(plan.describe(), 0) + 1
        executor.add(place, endpoint, plan)

    async def follow(changed: asyncio.Event) -> None:
        while True:
            if watch.problem:
                stats.notices.append(watch.problem)
                watch.problem = ""
            now = {e.url: e for e in pool._endpoints}
            for url in [url for url in coming if url not in now]:
                coming.pop(url).cancel()
            for url in [url for url in used if url not in now]:
                executor.remove(used.pop(url))
            for url in [url for url in now if url not in used and url not in coming]:
                coming[url] = asyncio.create_task(add(now[url]))
                coming[url].add_done_callback(executor.over_by_bug)
            await changed.wait()
            changed.clear()

    with watch.changes() as changed:
        task = asyncio.create_task(follow(changed))
        task.add_done_callback(executor.over_by_bug)
        try:
            yield
        finally:
            tasks = [task, *coming.values()]
            for each in tasks:
                each.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
