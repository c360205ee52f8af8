"""HTTP: one ``openai`` client for a whole pool, and the one place where foreign exceptions become ``EndpointError``.

The client is called by its public ``post`` and ``get`` with the full URL of an endpoint, so one serves them all; each
request carries its headers, and the key of its endpoint or none.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import re
import secrets
import time
import traceback
import urllib.request
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, cast

import aiohttp
import httpx2
import openai

from ..errors import EndpointError, SettingError
from ..records import Failure, FailureKind
from .aiohttp_transport import (
    ANSWERED,
    LARGEST_REPLY,
    AiohttpTransport,
    Bounds,
    StaleConnection,
    TooLong,
    Way,
    WrongReply,
    bounds,
    way,
)
from .failures import classify
from .hostfile import AgentEndpoint
from .http_settings import HttpSettings
from .inflate import inflater
from .json_bytes import read_json
from .keys import Key
from .openai_client import ADDED_TO_EACH_REQUEST, DirectClient, new_client, timeout_of
from .persist import persistently
from .proxy import Proxy, of_environment
from .rate_headers import RateWatch, quota_of
from .ssh import Forwards, host_of

__all__ = ["SMALL_REPLY", "HttpReply", "Transport"]

# The HTTP client adds its own values for these: each header less saves two hundredths of a request here.
_LEFT_TO_HTTP = {"Accept": openai.omit, "User-Agent": openai.omit}
_PER_REQUEST = dict.fromkeys(ADDED_TO_EACH_REQUEST, openai.omit)

SMALL_REPLY = 4 << 20
"""Bytes of a reply to a probe: the longest listings of models have a seventh of it."""

_MAY_REFUSE_KEY = (403, 302)  # some gateways forbid what has an old key, or send it to a page where one logs in
_OF_PROXIES = (403, 502, 503, 504)  # statuses that a proxy answers with itself
_REQUEST_ID = "X-Request-Id"
_REPLY_ID = re.compile(rb'"id"\s*:\s*"([^"\\]*)"')
_REMEMBERED = 64  # replies of an endpoint
_ID_WITHIN = 512  # bytes from the start of a reply
_COMPARED = 2048  # bytes of a reply, at its start and at its end


class HttpReply(NamedTuple):
    """The body and the headers of an answer with status 200, and what closes its connection."""

    data: bytes
    headers: httpx2.Headers
    drop: Callable[[], None]


class Transport:
    """One HTTP client for all endpoints of a pool and its sub-pools.

    Parameters
    ----------
    settings : HttpSettings, optional
        Timeout, trust, headers, or a client of the user's own.
    rates : RateWatch, optional
        Is told what is sent, and what servers say of their rate limits.

    Attributes
    ----------
    timeout : float
        Seconds without a single byte after which a request is given up.

    Notes
    -----
    Bound to the event loop it is first used on.
    """

    def __init__(self, settings: HttpSettings | None = None, rates: RateWatch | None = None) -> None:
        settings = settings or HttpSettings()
        self.timeout = settings.timeout
        self._key_ttl = settings.key_ttl
        self._rates = rates
        self._ours = settings.http_client is None
        if settings.http_client is None:
            self._http: httpx2.AsyncClient = DirectClient(AiohttpTransport(settings.ssl_context()))
        else:
            self._http = settings.http_client
        self._client = new_client(self._http, headers={**_LEFT_TO_HTTP, **settings.headers})
        self._proxy = Proxy.of(settings.proxy)
        self._proxies = of_environment() if settings.trust_env else {}
        self._forwards = Forwards(host_of(settings.via)) if settings.via else None
        self._own_keys = not any(name.lower() == "authorization" for name in settings.headers)
        self._secrets = settings.secrets()
        # vLLM and others put the id of a request into their reply; this process's ids are known by their first part.
        self._own_ids = not any(name.lower() == _REQUEST_ID.lower() for name in settings.headers)
        self._id_prefix = f"sk-{secrets.token_hex(6)}-"
        self._id = re.compile(re.escape(self._id_prefix) + r"(\d+)")
        self._numbers = itertools.count(1)
        self._seen: dict[str, dict[bytes, int]] = {}  # by endpoint: ids and hashes of its latest replies
        self._same_ids: set[str] = set()  # endpoints whose ids are not those of single replies

    async def post(
        self,
        endpoint: AgentEndpoint,
        path: str,
        body: bytes,
        *,
        timeout: float | None = None,
        limits: Bounds | None = None,
        counted: bool = False,
    ) -> bytes:
        """Post JSON, return the body of the answer. ``counted``: the request is part of a run, which keeps the rates.

        Raises
        ------
        EndpointError
            Anything but a 200, classified; a reply beyond its bounds, or to another request.
        """
        return (await self.ask(endpoint, path, body, timeout=timeout, limits=limits, counted=counted)).data

    async def get(
        self,
        endpoint: AgentEndpoint,
        path: str,
        *,
        timeout: float | None = None,
        limits: Bounds | None = None,
        renews: bool = True,
    ) -> bytes:
        """Get a path, return the body of the answer; raises like ``post``."""
        return (await self.ask(endpoint, path, timeout=timeout, limits=limits, renews=renews)).data

    async def ask(
        self,
        endpoint: AgentEndpoint,
        path: str,
        body: bytes | None = None,
        *,
        timeout: float | None = None,
        limits: Bounds | None = None,
        last: bool = False,
        but_one: bool = False,
        counted: bool = False,
        renews: bool = True,
    ) -> HttpReply:
        """Get (or post, with a body) and return the body of the answer with its headers; raises like ``post``.

        ``last`` closes the connection afterwards: for many endpoints that are asked once. ``but_one`` does so after
        any other answer than a 200. ``renews``: where the key is refused, another one is asked for and sent.
        """
        for again in (True, False) if renews else (False,):
            sent = self._begin(endpoint, body, counted)
            try:
                if sent.key is not None:
                    await sent.key.renew(sent.at - self._key_ttl)
                response, data = await self._exchange(endpoint, path, body, timeout, limits or Bounds(), sent, last)
                if last or (but_one and response.status_code not in ANSWERED):
                    _drop(response)
                _ok(response)
                # The ids in a list are those of models, not of replies.
                self._check_id(endpoint, response, b"" if body is None else data, sent.number)
                self._heard(endpoint, response, sent)
                return HttpReply(data, response.headers, partial(_drop, response))
            except (Exception, asyncio.CancelledError) as exc:  # noqa: BLE001 - all are raised again
                problem = self._safe(exc, endpoint, timeout, sent)
            if not (again and await self._has_other_key(endpoint, problem, sent)):
                break
        try:
            raise problem
        finally:
            del problem  # its traceback holds this frame

    async def _exchange(
        self,
        endpoint: AgentEndpoint,
        path: str,
        body: bytes | None,
        timeout: float | None,
        limits: Bounds,
        sent: _Sent,
        last: bool,
    ) -> tuple[httpx2.Response, bytes]:
        """A response and its body, read within bounds."""
        asked: dict[str, Any] = {"cast_to": httpx2.Response, "options": self._options(endpoint, timeout, sent, last)}
        if not self._ours:  # a client of the user's knows no bounds, so its replies are read as streams
            asked |= {"stream": True, "stream_cls": openai.AsyncStream[object]}
        url, client = endpoint.address(path), self._client
        reached = way.set(await self._way(endpoint))
        before = bounds.set(limits)
        try:
            async with contextlib.nullcontext() if self._ours else asyncio.timeout(limits.total_s):
                if body is None:
                    response: httpx2.Response = await client.get(url, **asked)
                else:
                    response = await client.post(url, content=body, **asked)
                return response, response.content if self._ours else await _read(response, limits.size)
        finally:
            bounds.reset(before)
            way.reset(reached)

    async def json(
        self, endpoint: AgentEndpoint, path: str, body: bytes | None = None, *, timeout: float | None = None
    ) -> dict[str, Any]:
        """Get (or post, with a body) and read a JSON object of ``SMALL_REPLY`` bytes at most, all of which must come
        within ``timeout``; raises like ``post``, but sends again what failed for a reason that may pass."""
        limits = Bounds(SMALL_REPLY, timeout or self.timeout)
        reply = await persistently(partial(self.ask, endpoint, path, body, timeout=timeout, limits=limits))
        try:
            value = read_json(reply.data)
        except ValueError:
            value = None
        if not isinstance(value, dict):
            raise EndpointError(Failure(FailureKind.MALFORMED, f"{path} gave no JSON object", endpoint.name))
        return value

    async def stream(
        self,
        endpoint: AgentEndpoint,
        path: str,
        body: bytes,
        *,
        timeout: float | None = None,
        limit: int = LARGEST_REPLY,
        counted: bool = False,
    ) -> AsyncGenerator[bytes, None]:
        """Post JSON, yield the answer's bytes as they come: ``limit`` bytes at most; ``counted`` as for ``post``.

        Close the iterator (``contextlib.aclosing``) to drop the connection: servers then abort the request.
        Raises like ``post``, before the first byte and between bytes.
        """
        for again in (True, False):
            sent = self._begin(endpoint, body, counted)
            try:
                if sent.key is not None:
                    await sent.key.renew(sent.at - self._key_ttl)
                reached = way.set(await self._way(endpoint))
                try:
                    opened: object = await self._client.post(
                        endpoint.address(path),
                        cast_to=httpx2.Response,
                        content=body,
                        options=self._options(endpoint, timeout, sent),
                        stream=True,
                        stream_cls=openai.AsyncStream[object],
                    )
                finally:
                    way.reset(reached)
                response = cast("httpx2.Response", opened)  # cast_to decides the type; stream_cls is for type checkers
                try:
                    if response.status_code not in ANSWERED:
                        await response.aread()
                    size = 0
                    self._heard(endpoint, response, sent)
                    async with contextlib.aclosing(_pieces(_ok(response))) as chunks:
                        async for data in chunks:
                            if not size:
                                self._check_id(endpoint, response, data.partition(b"\n\n")[0], sent.number)
                            size += len(data)
                            if size > limit:
                                raise TooLong(f"the stream is longer than {limit:,} bytes")
                            yield data
                finally:
                    await response.aclose()
                return
            except (Exception, asyncio.CancelledError) as exc:  # noqa: BLE001 - all are raised again
                problem = self._safe(exc, endpoint, timeout, sent)
            if not (again and await self._has_other_key(endpoint, problem, sent)):
                break
        try:
            raise problem
        finally:
            del problem

    async def send(self, endpoint: AgentEndpoint, request: httpx2.Request) -> httpx2.Response:
        """Send a request to an endpoint as it is; the body of the response is not read yet."""
        reached = way.set(await self._way(endpoint))
        try:
            return await self._http.send(request, stream=True, follow_redirects=False)
        finally:
            way.reset(reached)

    async def _way(self, endpoint: AgentEndpoint) -> Way | None:
        if self._forwards is not None:
            return Way(await self._forwards.socket_to(endpoint))
        if endpoint.scheme == "unix":
            return Way(endpoint.host)
        proxy = self._proxy_to(endpoint)
        return Way(proxy=proxy) if proxy else None

    def _proxy_to(self, endpoint: AgentEndpoint) -> Proxy | None:
        if (proxy := Proxy.of(endpoint.proxy) or self._proxy) is not None:
            return proxy
        if not self._proxies or urllib.request.proxy_bypass(endpoint.place):
            return None
        return self._proxies.get(endpoint.scheme)

    async def aclose(self) -> None:
        """Close all connections. A client of the user's stays open."""
        if self._ours:
            await self._client.close()
        if self._forwards is not None:
            await self._forwards.aclose()

    def without_secrets(self, endpoint: AgentEndpoint, text: str) -> str:
        """Remove the endpoint's key, its proxy's password and the values of ``headers=`` from what a server says."""
        text = endpoint.hide_key(text)
        if (proxy := self._proxy_to(endpoint)) is not None:
            text = proxy.hide(text)
        for secret in self._secrets:
            text = text.replace(secret, "(a header)")
        return text

    # ---- keys and rates ------------------------------

    def _begin(self, endpoint: AgentEndpoint, body: bytes | None, counted: bool) -> _Sent:
        if self._rates is not None and body is not None and not counted:
            self._rates.asked(endpoint)
        return _Sent(next(self._numbers), time.monotonic(), endpoint.key_source() if self._own_keys else None)

    async def _has_other_key(self, endpoint: AgentEndpoint, problem: BaseException, sent: _Sent) -> bool:
        """Whether a request failed as those with an old key do, and there is another one now."""
        failure = problem.failure if isinstance(problem, EndpointError) else None
        if sent.key is None or failure is None or not (failure.of_key or failure.status in _MAY_REFUSE_KEY):
            return False
        sent.key.last(endpoint.name)  # reads a file again
        if sent.key.version == sent.version and (failure.status != 403 or sent.key.is_doubtful(sent.at)):
            await sent.key.renew(sent.at)
        return sent.key.version != sent.version

    def _heard(self, endpoint: AgentEndpoint, response: httpx2.Response, sent: _Sent) -> None:
        """Tell what an answer says of the key and of rate limits."""
        if sent.key is not None and response.status_code in ANSWERED:
            sent.key.accepted()
        if self._rates is not None and (quota := quota_of(response.headers.raw, time.time())) is not None:
            self._rates.told(endpoint, quota, sent.at)

    def _options(self, endpoint: AgentEndpoint, timeout: float | None, sent: _Sent, last: bool = False) -> Any:
        headers: dict[str, Any] = dict(_PER_REQUEST)
        if self._own_keys:
            key = sent.key and sent.key.last(endpoint.name)
            headers["Authorization"] = openai.omit
            headers.update([endpoint.key_header(key)] if key else ())
            sent.version = sent.key.version if sent.key else 0
        if self._own_ids:
            headers[_REQUEST_ID] = f"{self._id_prefix}{sent.number}"
        if last:
            headers["Connection"] = "close"
        return {
            "headers": headers,
            "timeout": timeout_of(timeout or self.timeout),
            "follow_redirects": False,
            "security": {},  # no key of the client's own
            # Options that are not given are copied from their defaults for every request.
            "params": {},
            "max_retries": 0,
        }

    def _check_id(self, endpoint: AgentEndpoint, response: httpx2.Response, data: bytes, number: int) -> None:
        """Raise if an answer is one to another request: by the id of that request, where the server repeats it, else
        by its own id, if the same answer has come before."""
        told = response.headers.get(_REQUEST_ID, "")
        if (found := _REPLY_ID.search(data, 0, _ID_WITHIN)) is not None:
            told = f"{told} {found[1].decode(errors='replace')}"
        if self._id_prefix in told:
            for match in self._id.finditer(told):
                if int(match[1]) != number:
                    _drop(response)
                    raise WrongReply(f"the answer is that to another request: its id is {match[0]}, not this one's")
        elif found is not None and endpoint.url not in self._same_ids:
            content = hash((len(data), data[:_COMPARED], data[-_COMPARED:]))
            self._check_repeated(endpoint.url, response, found[1], content)

    def _check_repeated(self, url: str, response: httpx2.Response, reply_id: bytes, content: int) -> None:
        seen = self._seen.setdefault(url, {})
        before = seen.get(reply_id)
        if before is None:
            seen[reply_id] = content
            if len(seen) > _REMEMBERED:
                del seen[next(iter(seen))]  # the oldest
        # On a new connection no earlier answer can come again, and different answers have different ids.
        elif response.extensions.get("new", True) or content != before:
            self._same_ids.add(url)
            self._seen.pop(url)
        else:
            _drop(response)
            raise StaleConnection("an answer that was read before came again on this connection")

    def _safe(self, exc: BaseException, endpoint: AgentEndpoint, timeout: float | None, sent: _Sent) -> BaseException:
        """What to raise in place of an exception of a request: what the libraries raise becomes an ``EndpointError``.

        The frames of the libraries hold the headers, and tracebacks may show the variables of frames. So they are no
        part of what is raised: it is raised outside of the ``except`` clause, and its causes have no tracebacks.
        """
        trace = exc.__traceback__
        for each in _chain(exc):
            each.__traceback__ = None
        if not isinstance(exc, _FOREIGN):
            if isinstance(exc, Exception) and not isinstance(exc, (EndpointError, SettingError)):  # a bug: show where
                exc.add_note("".join(traceback.format_tb(trace)))
            return exc
        failure = classify(exc, endpoint.name, timeout or self.timeout)
        if isinstance(exc, openai.APIStatusError):
            self._heard(endpoint, exc.response, sent)
            if failure.of_key and self._own_keys:
                key = endpoint.key_source()
                advice = key.advice() if key else "no key was sent: give api_key=..., or key_env= in a hostfile"
                failure = replace(failure, message=f"{failure.message.rstrip('.')}: {advice}")
        message = self.without_secrets(endpoint, failure.message)
        if failure.status in _OF_PROXIES and endpoint.scheme == "http" and (proxy := self._proxy_to(endpoint)):
            message += f" (it may be the proxy {proxy.address} that says so)"
        if self._forwards is not None and failure.kind is FailureKind.DISCONNECT:
            message += f", or {self._forwards.host} cannot connect to it"
        hidden = replace(failure, message=message)
        error = EndpointError(hidden)
        texts = [text for each in _chain(exc) for text in (str(each), repr(each))]
        if all(text == self.without_secrets(endpoint, text) for text in texts):
            error.__cause__ = exc
        return error


@dataclass(slots=True)
class _Sent:
    """A request: its number, when it was sent, where its key comes from, and which version of the key it had."""

    number: int
    at: float
    key: Key | None
    version: int = 0


_FOREIGN = (openai.OpenAIError, aiohttp.ClientError, httpx2.HTTPError, httpx2.InvalidURL, OSError)


def _chain(exc: BaseException) -> list[BaseException]:
    """An exception and all that is chained to it or grouped in it."""
    found = [exc]
    for each in found:
        group = each.exceptions if isinstance(each, BaseExceptionGroup) else ()
        found += [e for e in (each.__cause__, each.__context__, *group) if e is not None and e not in found]
    return found


async def _pieces(response: httpx2.Response) -> AsyncGenerator[bytes, None]:
    """The body of a response as it comes, unpacked in pieces of bounded size."""
    if response.is_stream_consumed:  # it was read whole, since it is no event stream
        yield response.content
        return
    unpack = inflater(response.headers.get("content-encoding", ""))
    async with contextlib.aclosing(response.aiter_raw()) as chunks:
        async for data in chunks:
            for piece in unpack(data) if unpack else (data,):
                yield piece
    if unpack:
        unpack.end()


async def _read(response: httpx2.Response, limit: int) -> bytes:
    """The body of a response that is not read yet."""
    parts: list[bytes] = []
    size = 0
    try:
        async with contextlib.aclosing(_pieces(response)) as chunks:
            async for data in chunks:
                parts.append(data)
                size += len(data)
                if size > limit:
                    raise TooLong(f"the reply is longer than {limit:,} bytes, the most that an answer here can take")
    finally:
        await response.aclose()
    return b"".join(parts)


def _drop(response: httpx2.Response) -> None:
    """Close the connection of a response, so that no other request is sent on it."""
    drop = response.extensions.get("drop")
    if callable(drop):
        drop()


def _ok(response: httpx2.Response) -> httpx2.Response:
    """Raise for a status without an answer: openai's client accepts every 2xx."""
    if response.status_code not in ANSWERED:
        raise openai.APIStatusError(f"HTTP {response.status_code}", response=response, body=None)
    return response
