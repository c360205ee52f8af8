"""What a server says of its queue in ``/metrics``: how many prompts it works on, and how many wait there."""

from __future__ import annotations

import re

from .aiohttp_transport import Bounds
from .hostfile import AgentEndpoint
from .transport import SMALL_REPLY, Transport

__all__ = ["Load", "ask_load", "load_of"]

_LOAD = re.compile(rb"^[\w:]*num_requests_(running|waiting)(?:\{[^\n]*\})?[ \t]+([\d.eE+]+)", re.MULTILINE)

Load = tuple[int, int]
"""Prompts that run and that wait; vLLM calls them requests, and counts those of a list, and samples, one by one."""


async def ask_load(transport: Transport, endpoint: AgentEndpoint, timeout: float) -> Load | None:
    """The load of a server; None if it does not report it.

    Raises
    ------
    EndpointError
        It does not answer, or has no ``/metrics``.
    """
    limits = Bounds(SMALL_REPLY, timeout)
    return load_of(await transport.get(endpoint, "/metrics", timeout=timeout, limits=limits))


def load_of(metrics: bytes) -> Load | None:
    """The load in a server's ``/metrics``; None if it is not there.

    Examples
    --------
    >>> load_of(b'vllm:num_requests_running{engine="0"} 3.0\\nvllm:num_requests_waiting{engine="0"} 1.0\\n')
    (3, 1)
    """
    sums: dict[bytes, float] = {}
    for name, value in _LOAD.findall(metrics):
        sums[name] = sums.get(name, 0.0) + float(value)
    return (int(sums.get(b"running", 0)), int(sums.get(b"waiting", 0))) if sums else None
