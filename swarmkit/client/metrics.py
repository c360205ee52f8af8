"""What a server says of itself in ``/metrics``: its queue, and what its prefix cache found."""

from __future__ import annotations

import asyncio
import math
import re
from collections.abc import Mapping, Sequence

from ..errors import EndpointError
from ..records import Failure, FailureKind
from .aiohttp_transport import Bounds
from .hostfile import AgentEndpoint
from .transport import SMALL_REPLY, Transport

__all__ = ["Load", "Metrics", "ask_load", "ask_metrics", "metrics_in"]

_SAMPLE = re.compile(
    rb"^(?:vllm:(prefix_cache_(?:hits|queries)(?:_created)?)(?:_total)?|[\w:]*(num_requests_(?:running|waiting)))"
    rb"(?:\{[^\n]*\})?[ \t]+(\d+(?:\.\d*)?(?:[eE][+-]?\d+)?)(?!\S)",
    re.MULTILINE,
)

Metrics = Mapping[str, Sequence[float]]
"""The values of what is read here, by name: several where a server has several engines."""

Load = tuple[int, int]
"""Prompts that run and that wait; vLLM calls them requests, and counts those of a list, and samples, one by one."""


async def ask_metrics(transport: Transport, endpoint: AgentEndpoint, timeout: float) -> Metrics:
    """What a server says of itself, all of which must come within ``timeout`` seconds. Where the key is refused,
    no other one is asked for: it may be good for all else.

    Raises
    ------
    EndpointError
        It does not answer, or has no ``/metrics``.
    """
    try:
        async with asyncio.timeout(timeout):
            limits = Bounds(SMALL_REPLY, timeout)
            text = await transport.get(endpoint, "/metrics", timeout=timeout, limits=limits, renews=False)
            return metrics_in(text)
    except TimeoutError:
        why = f"/metrics did not come within {timeout:g} s"
        raise EndpointError(Failure(FailureKind.HANG, why, endpoint.name)) from None


async def ask_load(transport: Transport, endpoint: AgentEndpoint, timeout: float) -> Load | None:
    """The load of a server; None if it does not report it. Raises as ``ask_metrics``."""
    metrics = await ask_metrics(transport, endpoint, timeout)
    counts = [metrics.get(f"num_requests_{state}") for state in ("running", "waiting")]
    running, waiting = (int(sum(values or ())) for values in counts)
    return (running, waiting) if any(counts) else None


def metrics_in(text: bytes) -> Metrics:
    """What is read here of a server's ``/metrics``; what is no finite number is passed over.

    Examples
    --------
    >>> metrics_in(b'vllm:num_requests_running{engine="0"} 3.0\\nvllm:num_requests_running{engine="1"} 1.0\\n')
    {'num_requests_running': [3.0, 1.0]}
    """
    found: dict[str, list[float]] = {}
    for cache, queue, number in _SAMPLE.findall(text):
        if math.isfinite(value := float(number)):
            found.setdefault((cache or queue).decode(), []).append(value)
    return found
