"""Asking several endpoints side by side for what one of them knows."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from ..client.hostfile import AgentEndpoint
from ..errors import EndpointError
from ..records import Failure, FailureKind

__all__ = ["first_answer"]

T = TypeVar("T")

_SIDE_BY_SIDE = 3
_STAGGER_S = 0.5  # an endpoint that has not answered by then gets company
_TRIES = 3  # of each endpoint, for a fault that may pass
_ENDPOINTS = 64  # tried at most
_LIMIT_S = 60.0
_POLITE_S = 600.0  # ... where servers say when to come again
_BASE_S = 0.1


async def first_answer(endpoints: Sequence[AgentEndpoint], look: Callable[[AgentEndpoint], Awaitable[T]]) -> T:
    """The result of ``look`` for the first of some endpoints that answers.

    They are asked one after another; three side by side where one is slow. What fails is tried again as rows are, at
    other endpoints first: after the pause that a full endpoint asks for, and for a minute at most without such a word.

    Raises
    ------
    EndpointError
        None answers; the last failure.
    """
    loop = asyncio.get_running_loop()
    began = loop.time()
    end = began + _LIMIT_S
    waiting = [(0.0, endpoint) for endpoint in endpoints[:_ENDPOINTS]]  # not before this time
    running: dict[asyncio.Task[T], AgentEndpoint] = {}
    tries: Counter[str] = Counter()
    last = EndpointError(Failure(FailureKind.HANG, f"no answer within {_LIMIT_S:g} s", ""))
    next_start = 0.0

    async def one(endpoint: AgentEndpoint) -> T:
        return await look(endpoint)

    try:
        while (waiting or running) and (now := loop.time()) < end:
            ready = next((item for item in waiting if item[0] <= now), None)
            if ready and len(running) < _SIDE_BY_SIDE and (not running or now >= next_start):
                waiting.remove(ready)
                running[loop.create_task(one(ready[1]))] = ready[1]
                next_start = now + _STAGGER_S
                continue
            soon = [next_start] if ready and len(running) < _SIDE_BY_SIDE else [at for at, _ in waiting]
            pause = max(0.001, min([end, *(at for at in soon if at > now)]) - now)
            if not running:
                await asyncio.sleep(pause)
                continue
            done, _ = await asyncio.wait(running, timeout=pause, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                endpoint = running.pop(task)
                try:
                    return task.result()
                except EndpointError as exc:
                    last = exc
                except TimeoutError:
                    last = EndpointError(Failure(FailureKind.HANG, "no answer in time", endpoint.name))
                next_start = 0.0
                tries[endpoint.url] += 1
                if (at := _again_in(last.failure, tries[endpoint.url])) is not None:
                    waiting.append((loop.time() + at, endpoint))
                    if last.failure.retry_after_s and loop.time() + at < began + _POLITE_S:
                        end = max(end, loop.time() + at + _LIMIT_S)
        raise last
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


def _again_in(failure: Failure, tries: int) -> float | None:
    """Seconds until an endpoint is tried again; None for not at all."""
    if failure.kind is FailureKind.BUSY:
        return failure.retry_after_s or min(5.0, _BASE_S * 2.0**tries) * random.uniform(0.5, 1.0)
    if tries >= _TRIES or failure.kind in (FailureKind.CONNECT, FailureKind.DENIED, FailureKind.REJECTED):
        return None
    return _BASE_S * 2.0**tries * random.uniform(0.5, 1.0)
