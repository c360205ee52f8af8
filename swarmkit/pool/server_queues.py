"""The queues of servers, looked at every few seconds of a run, since others may use them, too."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence

from ..client.hostfile import AgentEndpoint
from ..client.metrics import ask_load
from ..client.transport import Transport
from ..engine.endpoints import Fleet
from ..engine.sharing import LOOK_S, Looks
from ..errors import EndpointError
from ..runs.log import LOGGER
from ..runs.stats import RunStats

__all__ = ["server_queues"]

_LIMIT_S = 1.0


@contextlib.asynccontextmanager
async def server_queues(
    transport: Transport,
    endpoints: Sequence[AgentEndpoint],
    tells: Callable[[AgentEndpoint], bool],
    fleet: Fleet,
    samples: int,
    stats: RunStats,
) -> AsyncIterator[None]:
    """Tell a fleet, while its run lasts, what its servers say of their queues.

    Nothing that goes wrong here matters to the run.

    Parameters
    ----------
    endpoints : sequence of AgentEndpoint
        By the fleet's index; it may grow.
    tells : callable
        Whether a server may report its load. One that does not when it is asked is not asked again.
    samples : int
        Answers a row: servers count them one by one.
    stats : RunStats
        Its ``shared`` is set.
    """
    refused: dict[int, int] = {}  # by endpoint: which key it did not take for this
    looks = Looks(fleet, lambda i: tells(endpoints[i]) and refused.get(i) != _version(endpoints[i]))
    seen: set[int] = set()

    async def ask(index: int) -> None:
        try:
            found = await ask_load(transport, endpoints[index], _LIMIT_S)
        except EndpointError as exc:
            if exc.failure.of_key or exc.failure.status == 403:
                refused[index] = _version(endpoints[index])
            elif exc.failure.status is not None:
                looks.silent(index)  # it has no such path; else it may have been too busy
            return
        except Exception:  # noqa: BLE001 - a run is worth more than these figures
            LOGGER.debug("the queue of %s", endpoints[index].name, exc_info=True)
            return
        if found is None:
            looks.silent(index)
        elif looks.told(index, *(-(-count // samples) for count in found)):
            seen.add(index)

    async def look() -> None:
        while True:
            await asyncio.sleep(LOOK_S)
            await asyncio.gather(*map(ask, looks.due()))
            stats.shared = max(stats.shared, len(seen))

    task = asyncio.create_task(look())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def _version(endpoint: AgentEndpoint) -> int:
    key = endpoint.key_source()
    return key.version if key is not None else 0
