"""What the prefix caches of vLLM servers found in a run, as the servers themselves count it in ``/metrics``."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from typing import NamedTuple

from ..client.hostfile import AgentEndpoint
from ..client.metrics import ask_metrics
from ..client.transport import Transport
from ..errors import EndpointError
from ..runs.log import LOGGER
from ..runs.stats import RunStats

__all__ = ["prefix_caches"]

_MOST = 32  # endpoints that are asked; of more, so many that are spread evenly over the list
_LIMIT_S = 1.0  # for each of the two looks, all endpoints side by side


class _Counts(NamedTuple):
    """What a server says of its cache: tokens that it found there and looked up, and when it began to count."""

    hits: int
    queries: int
    since: dict[str, Sequence[float]]


@contextlib.asynccontextmanager
async def prefix_caches(
    transport: Transport, endpoints: Sequence[AgentEndpoint], stats: RunStats
) -> AsyncIterator[None]:
    """Ask some of these vLLM servers for their counts before a run and after it, and add the difference to ``stats``.

    The run does not wait for the first look, whose requests leave before its own. What does not answer in time, is gone
    afterwards or is another server then (behind a balancer, or since it was restarted) is left out. Nothing that goes
    wrong here matters to the run.
    """
    asked = endpoints[:: -(-len(endpoints) // _MOST) or 1]
    answered = stats.answered

    async def before(endpoint: AgentEndpoint) -> _Counts | None:
        counts = await _counts(transport, endpoint)
        return counts if stats.answered == answered else None  # else these may be in the counts already

    looks = [asyncio.create_task(before(endpoint)) for endpoint in asked]
    try:
        yield
    except BaseException:
        for look in looks:
            look.cancel()
        raise
    for look in looks:
        if not look.done():
            look.cancel()
    known = [(e, look.result()) for e, look in zip(asked, looks, strict=True) if look.done() and not look.cancelled()]
    first = {endpoint: counts for endpoint, counts in known if counts is not None}
    told = 0
    last = await asyncio.gather(*(_counts(transport, endpoint) for endpoint in first))
    for a, b in zip(first.values(), last, strict=True):
        if b is not None and a.since == b.since and a.hits <= b.hits and a.queries <= b.queries:
            stats.prefix_hits += b.hits - a.hits
            stats.prefix_queries += b.queries - a.queries
            told += 1
    stats.prefix_endpoints = max(stats.prefix_endpoints, told)


async def _counts(transport: Transport, endpoint: AgentEndpoint) -> _Counts | None:
    """The counts of a server; None if it does not say."""
    try:
        found = await ask_metrics(transport, endpoint, _LIMIT_S)
    except EndpointError:
        return None
    except Exception:  # noqa: BLE001 - a run is worth more than these figures
        LOGGER.debug("the prefix cache of %s", endpoint.name, exc_info=True)
        return None
    hits, queries = (int(sum(found.get(f"prefix_cache_{name}", ()))) for name in ("hits", "queries"))
    since = {name: values for name, values in found.items() if name.endswith("_created")}
    return _Counts(hits, queries, since) if any(name.startswith("prefix_cache_") for name in found) else None
