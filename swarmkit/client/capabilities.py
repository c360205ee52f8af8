"""Probes: what a server is, and what it can do."""

from __future__ import annotations

import asyncio
import contextlib
import random
import re
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

from ..errors import EndpointError
from ..records import Failure, FailureKind, Reply, RequestSpec, Route
from .aiohttp_transport import Bounds
from .ask import ask
from .error_replies import Malformed, error_message
from .hostfile import AgentEndpoint
from .json_bytes import read_json
from .model_list import listed_models, nearest, serves
from .open_files import sockets
from .row_stream import RowStream
from .text_routes import NO_ROUTE, gives_vectors, refusals_of_text, unknown_model
from .transport import SMALL_REPLY, Transport
from .wire import OPTIONAL, TOKEN_LIMIT

__all__ = [
    "Capabilities",
    "ServerInfo",
    "left_out",
    "probe",
    "probe_all",
    "probe_capabilities",
    "refused_in",
    "require_model",
    "without_refused",
]

T = TypeVar("T")

PROBE_S = 10.0
_CONCURRENT_PROBES = 256
_PROBE_TOKENS = 8
_PROBE_FIELDS = ("stream_interval", "continuous_usage_stats", "stream_options", "min_tokens")
# How a refusal says that a field is not known, and not that its value is too large.
_NOT_KNOWN = re.compile(
    r"un(supported|known|recogni[sz]ed|expected)|not (supported|allowed|permitted|known)|forbid|\bextra\b|"
    r"use\W+max_completion_tokens",
    re.IGNORECASE,
)
_TRIES = 3  # of a probe that fails for a reason that may pass
_PAUSE_S = 0.2
_POLITE_S = 60.0  # rates are counted by the minute
_PASSING = {FailureKind.STALE, FailureKind.DISCONNECT, FailureKind.SERVER, FailureKind.BUSY, FailureKind.LOCAL}
LITELLM = "litellm"
"""The ``kind`` of LiteLLM's proxy: its ``/health`` makes a paid call to each of its models."""


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """The result of probing one endpoint.

    Attributes
    ----------
    endpoint : AgentEndpoint
        The endpoint.
    status : {"up", "slow", "down"}
        "slow" means that no answer came in time: a busy vLLM can take 30 s, so a slow endpoint stays in the pool
        and is tried again after a pause.
    reason : str
        Why it is not up; for one that is up, what is taken on trust; else empty.
    models : tuple of str
        Names of the models it serves.
    context : int or None
        Tokens of prompt and answer together (``max_model_len``), the fewest of its models; None when the server does
        not report it.
    kind, version : str
        The server software ("vllm", "swarmkit", ...) and its version; "unknown" and "" when not reported.
    latency_s : float
        Seconds from the probe's request to its answer.
    shape : tuple of str
        Names of the fields that it lists of a model.
    contexts : tuple of int or None
        The context of each of ``models``, where the server reports it.
    variant : str
        What tells it from others of its kind: another chat template.
    """

    endpoint: AgentEndpoint
    status: Literal["up", "slow", "down"]
    reason: str = ""
    models: tuple[str, ...] = ()
    context: int | None = None
    kind: str = "unknown"
    version: str = ""
    latency_s: float = 0.0
    shape: tuple[str, ...] = ()
    contexts: tuple[int | None, ...] = ()
    variant: str = ""

    def context_of(self, model: str) -> int | None:
        """The context of a model; for one that reports none, as an adapter, the fewest of the server's models."""
        return dict(zip(self.models, self.contexts, strict=False)).get(model) or self.context

    @property
    def family(self) -> tuple[str, ...]:
        """Key of servers that behave alike, so that one of them is probed for all: those of one software and version,
        else those that list their models in the same shape and with the same context."""
        variant = (self.variant,) if self.variant else ()
        if self.kind != "unknown" and self.version:
            return (self.kind, self.version, *variant)
        if self.shape:
            return (self.kind, "", str(self.context), *self.shape, *variant)
        return (self.kind, self.version, self.endpoint.url, *variant)


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a family of servers is like: found by ``probe_capabilities``, or said by ``dialect=``.

    Attributes
    ----------
    lists : bool
        A list of prompts in one request to ``/v1/completions``.
    rows : bool
        Streams that honour ``stream_interval``: rows come as they finish, without a chunk for every token.
    streams : bool
        Streams of any kind that hold each row of a list under its own index.
    whole : bool
        Whole replies to a list of prompts.
    omit : frozenset of str
        Optional fields that they refuse; with "max_tokens", which chats then send as ``max_completion_tokens``.
    chats : bool or None
        Whether there is a ``/v1/chat/completions``. None: it is looked for when it is needed.
    template : bool
        Whether their chat template may be learned.
    health : bool
        Whether ``/health`` may be asked.
    note : str
        What is missing, in words.
    """

    lists: bool
    rows: bool = False
    streams: bool = False
    whole: bool = True
    omit: frozenset[str] = frozenset()
    chats: bool | None = None
    template: bool = True
    health: bool = True
    note: str = ""


_NAME_IT = "name the one to use: model=..."


async def probe(
    transport: Transport,
    endpoint: AgentEndpoint,
    timeout: float = PROBE_S,
    model: str | None = None,
    *,
    last: bool = False,
) -> ServerInfo:
    """Probe one endpoint by ``/v1/models`` and ``/version``. Its faults become its status, not exceptions.

    Parameters
    ----------
    timeout : float
        Seconds for all of it, but for waits that the server asks for (``Retry-After``), a minute at most. A fault that
        may pass is tried again within them.
    model : str, optional
        The model to use. A server without ``/v1/models`` is taken to serve it, if it has a chat route.
    last : bool
        Close the connection afterwards.
    """
    began = time.monotonic()
    tries = 0
    waited = 0.0  # as the server has asked to
    while True:
        left = max(0.01, timeout - (time.monotonic() - began - waited))
        try:
            return await _listed(transport, endpoint, left, model, began, last)
        except EndpointError as exc:
            failure = exc.failure
        if failure.kind is FailureKind.BUSY and failure.retry_after_s is not None:
            pause = max(failure.retry_after_s, _PAUSE_S)
            if waited + pause <= _POLITE_S:
                waited += pause
                await asyncio.sleep(pause)
                continue
        tries += 1
        spent = time.monotonic() - began - waited
        pause = failure.retry_after_s or _PAUSE_S * tries * random.uniform(1.0, 2.0)
        may_pass = failure.kind in _PASSING and (tries < _TRIES or failure.kind is FailureKind.LOCAL)
        if not may_pass or spent + pause >= timeout:
            slow = failure.kind in (FailureKind.HANG, FailureKind.BUSY, FailureKind.LOCAL)
            return ServerInfo(endpoint, "slow" if slow else "down", _reason(failure), latency_s=spent)
        await asyncio.sleep(pause)


async def _listed(
    transport: Transport, endpoint: AgentEndpoint, timeout: float, model: str | None, began: float, last: bool
) -> ServerInfo:
    """What an endpoint says of itself. Raises ``EndpointError`` where it does not answer."""
    limits = Bounds(SMALL_REPLY, timeout)
    try:
        reply = await transport.ask(endpoint, "/v1/models", timeout=timeout, limits=limits, but_one=last)
    except EndpointError as exc:
        if model is not None and _lists_nothing(exc.failure):
            return await _on_trust(transport, endpoint, timeout, model, began, exc)
        raise
    latency = time.monotonic() - began
    try:
        listing: Any = read_json(reply.data)
    except ValueError:
        listing = None
    models = listed_models(listing)
    if last and not models:
        reply.drop()
    if not models:
        if not isinstance(listing, (dict, list)):
            said = transport.without_secrets(endpoint, error_message(reply.data.decode(errors="replace")))
            kind, message = FailureKind.MALFORMED, f"/v1/models gave neither a JSON object nor a list: {said[:200]!r}"
        else:
            error = isinstance(listing, dict) and listing.get("error")
            said = f" ({transport.without_secrets(endpoint, error_message(listing))})" if error else ""
            kind, message = FailureKind.DENIED, f"its /v1/models lists no model{said}; {_NAME_IT}"
        none = EndpointError(Failure(kind, message, endpoint.name, 200))
        if model is not None:
            return await _on_trust(transport, endpoint, timeout, model, began, none)
        if kind is FailureKind.MALFORMED:
            raise none
        return ServerInfo(endpoint, "down", message, latency_s=latency)
    version = ""
    with contextlib.suppress(EndpointError, ValueError, AttributeError):  # many servers have no /version
        answer = await transport.ask(endpoint, "/version", timeout=timeout, limits=limits, last=last)
        version = str(read_json(answer.data).get("version") or "")
    contexts = [c if isinstance(c := m.get("max_model_len"), int) else None for m in models]
    is_litellm = any(name.lower().startswith("x-litellm") for name in reply.headers)
    return ServerInfo(
        endpoint,
        "up",
        models=tuple(m["id"] for m in models),
        context=min(filter(None, contexts), default=None),
        kind=LITELLM if is_litellm else str(models[0].get("owned_by") or "unknown"),
        version=version,
        latency_s=latency,
        shape=tuple(sorted(models[0])),
        contexts=tuple(contexts),
    )


def _lists_nothing(failure: Failure) -> bool:
    """Whether a server has answered that it has no listing, or none for this key."""
    answered = failure.kind in (FailureKind.DENIED, FailureKind.REJECTED) and failure.status is not None
    return answered or failure.status in NO_ROUTE


async def _on_trust(
    transport: Transport, endpoint: AgentEndpoint, timeout: float, model: str, began: float, exc: EndpointError
) -> ServerInfo:
    """A server that lists no models, but has a route for text or vectors: ``model`` is taken on trust."""
    listing_is_missing = exc.failure.status in (*NO_ROUTE, 200)  # which says nothing of the key
    try:
        refused = await refusals_of_text(transport, endpoint, model, timeout)
    except EndpointError as other:  # the key is refused here, or the address leads elsewhere
        raise (exc if other.failure.kind is FailureKind.DENIED and not listing_is_missing else other) from None
    if words := unknown_model(model, refused):
        message = f"it lists no models, and does not know model={model!r}: {words}"
        raise EndpointError(Failure(FailureKind.DENIED, message, endpoint.name)) from None
    if refused and not listing_is_missing:  # so the listing was refused for the same reason
        raise exc from None
    no_text = refused and all(f.status in NO_ROUTE or f.kind is FailureKind.MALFORMED for f in refused)
    if no_text and not await gives_vectors(transport, endpoint, model, timeout):  # nor such a route
        raise exc from None
    reason = f"it lists no models (HTTP {exc.failure.status}), so model={model!r} is taken on trust"
    return ServerInfo(endpoint, "up", reason, models=(model,), latency_s=time.monotonic() - began)


def require_model(info: ServerInfo, model: str | None) -> ServerInfo:
    """Return ``info``, with status "down" if the endpoint is up but does not serve ``model`` (None allows any)."""
    if info.status != "up" or model is None or serves(info.models, model):
        return info
    reason = f"it lists no {model}; {nearest(model, info.models)}"
    if len(info.models) <= 3:
        reason = f"it serves {', '.join(info.models)}, not {model}"
    return replace(info, status="down", reason=reason)


def _reason(failure: Failure) -> str:
    if failure.of_key or failure.status == 403:
        return f"it rejects the key (HTTP {failure.status}: {failure.message})"
    if failure.status == 404:
        return (
            "it has no /v1/models (HTTP 404): is this an OpenAI-compatible server, and is the path right? For a server "
            f"that lists no models, {_NAME_IT}"
        )
    status = f" (HTTP {failure.status})" if failure.status else ""
    # Nothing in the request may be wrong but the key; LiteLLM's proxy without a database says so of a wrong one.
    hint = ". Is the key right?" if failure.kind is FailureKind.REJECTED else ""
    return f"{failure.kind}{status}: {failure.message}{hint}"


async def probe_all(
    transport: Transport,
    endpoints: Sequence[AgentEndpoint],
    timeout: float = PROBE_S,
    notify: Callable[[ServerInfo], None] = lambda info: None,
    model: str | None = None,
) -> list[ServerInfo]:
    """Probe endpoints concurrently; results in the order given. ``notify`` is called with each result as it comes.

    As many at a time as the limit on open files allows, with room for the run of another pool.
    """
    at_once = min(_CONCURRENT_PROBES, max(1, sockets() // 2))
    gate, turn = asyncio.Semaphore(at_once), asyncio.Lock()

    async def one(endpoint: AgentEndpoint) -> ServerInfo:
        async with gate:
            async with turn:
                await asyncio.sleep(0)  # one probe begins in a pass of the loop, which has runs to see to
            info = await probe(transport, endpoint, timeout, model, last=len(endpoints) > at_once)
        notify(info)
        return info

    return list(await asyncio.gather(*map(one, endpoints)))


def refused_in(message: str, fields: Iterable[str]) -> frozenset[str]:
    """Those of some optional fields that the words of a refusal name; the token limit only where they do not mean its
    value.

    Examples
    --------
    >>> sorted(refused_in("Extra inputs are not permitted: min_tokens", ["min_tokens", "max_tokens"]))
    ['min_tokens']
    >>> refused_in("max_tokens is too large: 5000. This model supports at most 4096", ["max_tokens"])
    frozenset()
    """
    named = {name for name in fields if re.search(rf"\b{name}\b", message)}
    if "continuous_usage_stats" in named:  # it stands within stream_options, which may be named with it
        named.discard("stream_options")
    if not _NOT_KNOWN.search(message):
        named.discard(TOKEN_LIMIT)
    return frozenset(named)


def left_out(omit: Iterable[str]) -> str:
    """What the fields that servers refuse mean for requests, in words.

    Examples
    --------
    >>> left_out({"max_tokens", "stream_interval"})
    'without stream_interval, which the server refuses; max_completion_tokens in place of max_tokens'
    """
    names = sorted(set(omit).intersection(OPTIONAL))
    without = f"without {', '.join(names)}, which the server refuses" if names else ""
    other = f"max_completion_tokens in place of {TOKEN_LIMIT}" if TOKEN_LIMIT in omit else ""
    return "; ".join(filter(None, [without, other]))


async def without_refused(
    ask: Callable[[frozenset[str]], Awaitable[T]], optional: Iterable[str], omit: frozenset[str] = frozenset()
) -> tuple[T, frozenset[str]]:
    """Make a request, without those of its optional fields that the server refuses.

    Parameters
    ----------
    ask : callable
        Makes the request without the fields that it is given.
    optional : iterable of str
        Fields that may be taken away. The ones that a refusal names go first, else all go, and those that were not
        refused come back.
    omit : frozenset of str
        Fields that are known to be refused.

    Returns
    -------
    tuple
        The result of ``ask``, and the fields to omit.

    Raises
    ------
    EndpointError
        The request failed otherwise, or is refused without the fields, too.
    """
    left = [name for name in optional if name not in omit]
    while True:
        try:
            result = await ask(omit)
        except EndpointError as exc:
            if exc.failure.kind is not FailureKind.REJECTED or not left:
                raise
            if not (named := refused_in(exc.failure.message, left)):
                break
            omit |= named
            left = [name for name in left if name not in named]
        else:
            return result, omit
    omit |= set(left)
    result = await ask(omit)
    for name in left:
        with contextlib.suppress(EndpointError, Malformed):
            await ask(omit - {name})
            omit -= {name}
    return result, omit


async def probe_capabilities(
    transport: Transport, endpoint: AgentEndpoint, model: str, timeout: float | None = None
) -> Capabilities:
    """Probe what ``/v1/completions`` supports, by a list of two short prompts: as a stream, and as a whole reply where
    that does not show all.

    Raises
    ------
    EndpointError
        The endpoint failed for a reason that says nothing about its capabilities.
    """
    spec = RequestSpec(model=model, params={"temperature": 0, "min_tokens": _PROBE_TOKENS})

    async def whole(omit: frozenset[str], rows: RowStream | None = None) -> list[Reply]:
        texts, how = ["One, two,", "A, b,"], {"max_tokens": _PROBE_TOKENS, "omit": omit}
        return await ask(transport, endpoint, Route.COMPLETIONS, spec, texts, timeout=timeout, rows=rows, **how)

    async def streamed(omit: frozenset[str]) -> tuple[RowStream, int]:
        rows = RowStream(2)
        return rows, len(await whole(omit, rows))

    omit: frozenset[str] = frozenset()
    streams, why = False, "a stream does not hold its rows"
    try:
        (rows, finished), omit = await without_refused(streamed, _PROBE_FIELDS)
    except EndpointError as exc:
        if exc.failure.status in NO_ROUTE:
            return Capabilities(lists=False, whole=False, note="the server has no /v1/completions")
        if exc.failure.kind is not FailureKind.REJECTED:
            raise
        why = exc.failure.message
    except Malformed as exc:
        why = str(exc)
    else:
        if rows.whole and finished == 2:  # it knows no streams
            return Capabilities(lists=True, omit=omit - {"min_tokens"})
        streams = rows.done and finished == 2
        # A server that honours the interval sends a short row in two chunks: its first token, and the rest.
        if streams and rows.chunks <= 4 and not omit & {"stream_interval", "min_tokens"}:
            return Capabilities(lists=True, rows=True, streams=True, omit=omit)
    try:
        _, omit = await without_refused(whole, ("min_tokens",), omit)
    except EndpointError as exc:
        if exc.failure.kind is not FailureKind.REJECTED:
            raise
        why = exc.failure.message
    except Malformed as exc:
        why = str(exc)
    else:
        return Capabilities(lists=True, streams=streams, omit=omit - {"min_tokens"})
    omit -= {"min_tokens"}
    if streams:
        note = f"only streams hold the rows of a list: {why}"
        return Capabilities(lists=True, streams=True, whole=False, omit=omit, note=note)
    return Capabilities(lists=False, whole=False, omit=omit, note=f"the server takes no lists of prompts ({why})")
