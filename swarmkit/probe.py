"""What a server is and what it can do, asked once and remembered."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from .errors import EndpointError
from .hostfile import AgentEndpoint
from .records import Ask, FailureKind, Route
from .transport import Transport
from .wire import Malformed, RowStream, StreamFailed, encode, path_of

__all__ = ["Capabilities", "ServerInfo", "judged", "probe", "probe_all", "probe_capabilities"]

PROBE_S = 10.0
_AT_ONCE = 256
_PROBE_TOKENS = 8


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """One endpoint as the probe found it.

    Attributes
    ----------
    endpoint : AgentEndpoint
        Which one.
    status : {"up", "slow", "down"}
        "slow" answered nothing in time: a busy vLLM can take 30 s, so it stays in the pool, resting.
    reason : str
        Why it is not up; empty when it is.
    models : tuple of str
        Names it serves.
    context : int or None
        Tokens of prompt and answer together (``max_model_len``), when it says.
    kind, version : str
        The server's family ("vllm", "swarmkit", ...) and version, as far as it says.
    latency_s : float
        Seconds the probe took.
    """

    endpoint: AgentEndpoint
    status: Literal["up", "slow", "down"]
    reason: str = ""
    models: tuple[str, ...] = ()
    context: int | None = None
    kind: str = "unknown"
    version: str = ""
    latency_s: float = 0.0

    @property
    def family(self) -> tuple[str, ...]:
        """Servers of one family behave alike, so one of them is asked for all. A server that does not say
        what it is stands for itself alone."""
        known = self.kind != "unknown" and self.version
        return (self.kind, self.version) if known else (self.kind, self.version, self.endpoint.url)


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a family of servers can do with ``/v1/completions``.

    Attributes
    ----------
    lists : bool
        Many prompts in one request.
    rows : bool
        Streams with an interval: rows come as they finish, without a chunk a token.
    streams : bool
        Streams at all.
    """

    lists: bool
    rows: bool
    streams: bool


async def probe(transport: Transport, endpoint: AgentEndpoint, timeout: float = PROBE_S) -> ServerInfo:
    """Ask one endpoint what it is: ``/v1/models`` and ``/version``. Never raises for the endpoint's faults."""
    began = time.monotonic()
    try:
        listing = await transport.json(endpoint, "/v1/models", timeout=timeout)
    except EndpointError as exc:
        kind = exc.failure.kind
        slow = kind in (FailureKind.HANG, FailureKind.BUSY, FailureKind.LOCAL)
        spent = time.monotonic() - began
        return ServerInfo(endpoint, "slow" if slow else "down", _reason(exc), latency_s=spent)
    latency = time.monotonic() - began
    models = [m for m in listing.get("data") or [] if isinstance(m, dict) and isinstance(m.get("id"), str)]
    if not models:
        return ServerInfo(endpoint, "down", "its /v1/models lists no model", latency_s=latency)
    version = ""
    with contextlib.suppress(EndpointError):  # many servers have no /version; then each stands for itself
        version = str((await transport.json(endpoint, "/version", timeout=timeout)).get("version") or "")
    contexts = [m["max_model_len"] for m in models if isinstance(m.get("max_model_len"), int)]
    return ServerInfo(
        endpoint,
        "up",
        models=tuple(m["id"] for m in models),
        context=min(contexts, default=None),
        kind=str(models[0].get("owned_by") or "unknown"),
        version=version,
        latency_s=latency,
    )


def judged(info: ServerInfo, model: str | None) -> ServerInfo:
    """The same, down if it is up but does not serve the model that is wanted (any, if None)."""
    if info.status != "up" or model is None or model in info.models:
        return info
    return replace(info, status="down", reason=f"it serves {', '.join(info.models)}, not {model}")


def _reason(exc: EndpointError) -> str:
    failure = exc.failure
    if failure.status in (401, 403):
        return f"it rejects the key (HTTP {failure.status}: {failure.message})"
    if failure.status == 404:
        return "it has no /v1/models (HTTP 404): is this an OpenAI-compatible server, and the path right?"
    status = f" (HTTP {failure.status})" if failure.status else ""
    return f"{failure.kind}{status}: {failure.message}"


async def probe_all(
    transport: Transport,
    endpoints: Sequence[AgentEndpoint],
    timeout: float = PROBE_S,
    tell: Callable[[ServerInfo], None] = lambda info: None,
) -> list[ServerInfo]:
    """Probe many endpoints at once, in the order given; ``tell`` hears of each as soon as it is known."""
    gate = asyncio.Semaphore(_AT_ONCE)

    async def one(endpoint: AgentEndpoint) -> ServerInfo:
        async with gate:
            info = await probe(transport, endpoint, timeout)
        tell(info)
        return info

    return list(await asyncio.gather(*map(one, endpoints)))


async def probe_capabilities(transport: Transport, endpoint: AgentEndpoint, model: str) -> Capabilities:
    """Send a list of two short prompts as a stream, and see what comes back.

    Raises
    ------
    EndpointError
        The endpoint failed for reasons that say nothing about what it can do.
    """
    ask = Ask(model=model, params={"temperature": 0, "min_tokens": _PROBE_TOKENS})
    rows = RowStream(2)
    finished = 0
    body = encode(Route.COMPLETIONS, ask, ["One, two,", "A, b,"], max_tokens=_PROBE_TOKENS, stream=True)
    try:
        async with contextlib.aclosing(transport.stream(endpoint, path_of(Route.COMPLETIONS), body)) as stream:
            async for data in stream:
                finished += len(rows.feed(data))
    except EndpointError as exc:
        if exc.failure.kind in (FailureKind.REJECTED, FailureKind.DENIED):
            return Capabilities(lists=False, rows=False, streams=False)
        raise
    except (Malformed, StreamFailed):
        # Not a stream of two rows: such a server is asked for plain replies, whose choices are checked again.
        return Capabilities(lists=True, rows=False, streams=False)
    complete = rows.done and finished == 2
    # With the interval honoured a short row comes in two chunks: its first token, and the rest.
    return Capabilities(lists=True, rows=complete and rows.chunks <= 4, streams=complete)
