"""One short request, read to its end: how servers are asked what they can do."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from ..errors import EndpointError
from ..records import Reply, RequestSpec, Route
from .aiohttp_transport import Bounds
from .error_replies import StreamFailed
from .hostfile import AgentEndpoint
from .persist import persistently
from .replies import decode_counted
from .row_stream import RowStream
from .transport import SMALL_REPLY, Transport
from .wire import encode, path_of

__all__ = ["ask"]


async def ask(
    transport: Transport,
    endpoint: AgentEndpoint,
    route: Route,
    spec: RequestSpec,
    texts: Sequence[str],
    *,
    timeout: float | None = None,
    rows: RowStream | None = None,
    **how: Any,
) -> list[Reply]:
    """Post one request and read its answers.

    Parameters
    ----------
    route, spec, texts, **how
        As for ``encode``.
    timeout : float, optional
        Seconds for all of it.
    rows : RowStream, optional
        Reads the answers as a stream.

    Raises
    ------
    Malformed
        The reply does not answer these texts.
    EndpointError
        The endpoint failed, also where its reply says so.
    """
    body, path = encode(route, spec, texts, stream=rows is not None, **how), path_of(route)
    try:
        if rows is None:
            limits = Bounds(SMALL_REPLY, timeout)
            data = await persistently(partial(transport.post, endpoint, path, body, timeout=timeout, limits=limits))
            return decode_counted(route, data, len(texts), spec.n, logprobs=spec.logprobs is not None)[0]
        return await persistently(partial(_streamed, transport, endpoint, path, body, timeout, rows))
    except StreamFailed as exc:
        message = transport.without_secrets(endpoint, exc.failure.message)
        raise EndpointError(replace(exc.failure, message=message, endpoint=endpoint.name)) from exc


async def _streamed(
    transport: Transport, endpoint: AgentEndpoint, path: str, body: bytes, timeout: float | None, rows: RowStream
) -> list[Reply]:
    rows.restart()
    replies: list[Reply] = []
    answer = transport.stream(endpoint, path, body, timeout=timeout, limit=SMALL_REPLY)
    async with asyncio.timeout(timeout), contextlib.aclosing(answer) as stream:
        async for data in stream:
            replies += rows.feed(data)
    return replies + rows.end()
