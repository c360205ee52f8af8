"""Sending a small request again after a fault that may pass, as a person would."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from ..errors import EndpointError
from ..records import FailureKind

__all__ = ["persistently"]

T = TypeVar("T")

_TRIES = 4  # half of the requests may fail behind a balancer with a dead server, and a question may take several
_BASE_S, _MOST_S = 0.04, 0.2
_POLITE_S = 60.0  # rates are counted by the minute
_MAY_PASS = {FailureKind.STALE, FailureKind.DISCONNECT, FailureKind.SERVER}


async def persistently(send: Callable[[], Awaitable[T]]) -> T:
    """The result of ``send``, called again after a reset or a 5xx, and for a minute as often as the server asks for
    that; the last ``EndpointError`` is raised."""
    attempt, end = 0, time.monotonic() + _POLITE_S
    while True:
        try:
            return await send()
        except EndpointError as exc:
            failure = exc.failure
            if failure.kind is FailureKind.BUSY and failure.retry_after_s is not None:
                pause = failure.retry_after_s
                if time.monotonic() + pause > end:
                    raise
            else:
                attempt += 1
                pause = min(_MOST_S, _BASE_S * 2.0**attempt) * random.uniform(0.5, 1.0)
                if failure.kind not in _MAY_PASS or attempt == _TRIES:
                    raise
        await asyncio.sleep(pause)
