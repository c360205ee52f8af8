"""HTTP: the only importer of ``openai``, and the one place where foreign exceptions become ours.

One ``AsyncOpenAI`` client serves a whole pool: a client an endpoint would cost 20 ms each. Below it is one ``aiohttp``
session, which finds an origin's idle connections without looking at those of the others. The client's own retries are
left out (they would resend whole batches), and nothing of ``OPENAI_*`` in the environment reaches an endpoint: its
default headers are replaced, and each request carries the key of its endpoint or none.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import io
import os
import ssl
import urllib.request
import weakref
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextvars import ContextVar
from dataclasses import replace
from typing import Any, cast

import aiohttp
import httpx2
import jiter
import openai
import yarl

from .errors import EndpointError
from .hostfile import AgentEndpoint
from .records import Failure, FailureKind
from .wire import error_message, kind_of

__all__ = ["Transport", "without_key"]

KEEPALIVE_S = 4.0
"""Idle connections are dropped before the server drops them (uvicorn: after 5 s)."""
CONNECT_S = 10.0
"""Seconds for a connection to be made: far more than any network needs, far less than an answer takes."""

_SLOWEST_BYTES_PER_S = 100_000  # at which a request is written
_AT_ONCE = 1 << 20  # bytes; longer requests are written bit by bit
_HEADERS = {
    "Accept": "application/json",
    "Accept-Encoding": "identity",  # nothing to inflate: nodes are near, CPU is not free
    "Content-Type": "application/json",
    "User-Agent": "swarmkit",
}
_OURS = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EADDRNOTAVAIL}


class Transport:
    """One shared HTTP client for all endpoints of a pool and its sub-pools.

    Parameters
    ----------
    timeout : float
        Seconds without a single byte after which a request is given up.
    trust_env : bool, default False
        Use the proxies of the environment. Off, since on clusters they break node-to-node calls.
    verify : ssl.SSLContext, optional
        Trust settings for https; the system's by default.

    Notes
    -----
    Bound to the event loop it is first used on.
    """

    def __init__(
        self, *, timeout: float = 300.0, trust_env: bool = False, verify: ssl.SSLContext | None = None
    ) -> None:
        self.timeout = timeout
        http = _Http(verify, trust_env)
        self._client = _Client(api_key="unused", base_url="http://swarmkit.invalid", max_retries=0, http_client=http)

    async def post(self, endpoint: AgentEndpoint, path: str, body: bytes, *, timeout: float | None = None) -> bytes:
        """Post JSON, return the body of the answer.

        Raises
        ------
        EndpointError
            Anything but a 200, classified.
        """
        with _mapped(endpoint, timeout or self.timeout):
            response = await self._client.post(
                endpoint.url + path, cast_to=httpx2.Response, content=body, options=self._options(endpoint, timeout)
            )
            return response.content

    async def get(self, endpoint: AgentEndpoint, path: str, *, timeout: float | None = None) -> bytes:
        """Get a path, return the body of the answer; raises like ``post``."""
        with _mapped(endpoint, timeout or self.timeout):
            response = await self._client.get(
                endpoint.url + path, cast_to=httpx2.Response, options=self._options(endpoint, timeout)
            )
            return response.content

    async def json(
        self, endpoint: AgentEndpoint, path: str, body: bytes | None = None, *, timeout: float | None = None
    ) -> dict[str, Any]:
        """Get (or post, with a body) and read a JSON object; raises like ``post``."""
        if body is None:
            data = await self.get(endpoint, path, timeout=timeout)
        else:
            data = await self.post(endpoint, path, body, timeout=timeout)
        try:
            value = jiter.from_json(data)
        except ValueError:
            value = None
        if not isinstance(value, dict):
            raise EndpointError(Failure(FailureKind.MALFORMED, f"{path} gave no JSON object", endpoint.name))
        return value

    async def stream(
        self, endpoint: AgentEndpoint, path: str, body: bytes, *, timeout: float | None = None
    ) -> AsyncGenerator[bytes, None]:
        """Post JSON, yield the answer's bytes as they come.

        Close the iterator (``contextlib.aclosing``) to drop the connection: servers then abort the request.
        Raises like ``post``, before the first byte and between bytes.
        """
        with _mapped(endpoint, timeout or self.timeout):
            opened: object = await self._client.post(
                endpoint.url + path,
                cast_to=httpx2.Response,
                content=body,
                options=self._options(endpoint, timeout),
                stream=True,
                stream_cls=openai.AsyncStream[object],
            )
            response = cast("httpx2.Response", opened)  # cast_to stands above stream_cls
            try:
                async for data in response.aiter_raw():
                    yield data
            finally:
                await response.aclose()

    async def aclose(self) -> None:
        """Close all connections."""
        await self._client.close()

    def _options(self, endpoint: AgentEndpoint, timeout: float | None) -> Any:
        key = endpoint.key()
        return {
            "headers": {"Authorization": f"Bearer {key}"} if key else {},
            "timeout": httpx2.Timeout(timeout or self.timeout, connect=min(CONNECT_S, timeout or self.timeout)),
        }


class _Client(openai.AsyncOpenAI):
    """The openai client without what it would add: its own headers, what it finds in the environment, and retries. Only
    to be ready for these it copies and parses what it is given, which took longer than all that is done here."""

    async def request(self, cast_to: Any, options: Any, *, stream: bool = False, stream_cls: Any = None) -> Any:
        headers = {**_HEADERS, **options.headers}
        response = await self._client.send(
            self._client.build_request(
                options.method, options.url, headers=headers, content=options.content, timeout=options.timeout
            ),
            stream=stream,
        )
        if response.status_code != 200:
            body = await response.aread()
            with contextlib.suppress(ValueError):
                body = jiter.from_json(body)
            raise openai.APIStatusError(f"HTTP {response.status_code}", response=response, body=body)
        return response


class _Http(httpx2.AsyncClient):
    """What openai's client builds its requests with and sends them by: straight on to ``aiohttp``.

    httpx2's own way down (cookies, redirects, authentication, a parser in Python) is of no use here and took longer for
    a request of a hundred prompts than all the rest of this package.
    """

    def __init__(self, verify: ssl.SSLContext | None, trust_env: bool) -> None:
        super().__init__(transport=httpx2.AsyncBaseTransport(), trust_env=False)  # nothing is sent by that
        self._verify = verify
        self._proxies = urllib.request.getproxies() if trust_env else {}
        self._session: aiohttp.ClientSession | None = None
        self._urls: dict[str, tuple[httpx2.URL, yarl.URL]] = {}  # as read before: there are few, and reading is slow

    def build_request(self, method: str, url: httpx2.URL | str, **given: Any) -> httpx2.Request:
        known = self._read(str(url))[0]
        extensions = {"timeout": given["timeout"]}
        return httpx2.Request(
            method, known, headers=given["headers"], content=given.get("content"), extensions=extensions
        )

    def _read(self, url: str) -> tuple[httpx2.URL, yarl.URL]:
        """A URL, as httpx2 and as aiohttp know it."""
        if (known := self._urls.get(url)) is None:
            known = self._urls[url] = (httpx2.URL(url), yarl.URL(url, encoded=True))
        return known

    async def send(self, request: httpx2.Request, *, stream: bool = False, **_: Any) -> httpx2.Response:
        session = self._session = self._session or self._open()
        url, timeout, body = request.url, request.extensions["timeout"], request.content
        _reused.set(False)
        try:
            # aiohttp does not bound the time in which a request is written.
            async with asyncio.timeout(timeout.connect + timeout.read + len(body) / _SLOWEST_BYTES_PER_S):
                answer = await session.request(
                    request.method,
                    self._read(str(url))[1],
                    data=io.BytesIO(body) if len(body) > _AT_ONCE else body or None,
                    headers=request.headers.multi_items(),
                    allow_redirects=False,
                    proxy=self._proxy(url),
                    timeout=aiohttp.ClientTimeout(connect=timeout.connect, sock_read=timeout.read),
                )
        except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError) as exc:
            if _reused.get():
                raise _StaleConnection(str(exc)) from exc
            raise
        content = {"stream": _Body(answer)} if stream else {"content": await answer.read()}
        reason = {"reason_phrase": (answer.reason or "").encode()}
        return httpx2.Response(answer.status, headers=answer.raw_headers, request=request, extensions=reason, **content)

    def _open(self) -> aiohttp.ClientSession:
        # The scheduler bounds what is in flight; a second bound here would only deadlock with it.
        connector = _Connector(limit=0, keepalive_timeout=KEEPALIVE_S, ssl=self._verify or True)
        return aiohttp.ClientSession(connector=connector, cookie_jar=aiohttp.DummyCookieJar(), auto_decompress=False)

    def _proxy(self, url: httpx2.URL) -> str | None:
        if not self._proxies or urllib.request.proxy_bypass(url.netloc.decode()):
            return None
        return self._proxies.get(url.scheme) or self._proxies.get("all")

    async def aclose(self) -> None:
        await super().aclose()
        if self._session is not None:
            await self._session.close()


_reused: ContextVar[bool] = ContextVar("reused")  # whether the request of this task goes over a connection used before


class _Connector(aiohttp.TCPConnector):
    """The connections. In a forked child they count as closed: the sockets are the parent's, and so is the loop whose
    list of sockets would be changed by closing them."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self._process = os.getpid()
        self._used: weakref.WeakSet[object] = weakref.WeakSet()

    async def connect(self, *args: Any, **named: Any) -> aiohttp.connector.Connection:
        connection = await super().connect(*args, **named)
        _reused.set(connection.protocol in self._used)
        self._used.add(connection.protocol)
        return connection

    @property
    def closed(self) -> bool:
        return super().closed or self._process != os.getpid()

    def __del__(self, *_: Any) -> None:
        if not self.closed:
            super().__del__()


class _Body(httpx2.AsyncByteStream):
    """The body of an answer as it comes; closing it drops the connection unless the answer was read to its end."""

    def __init__(self, answer: aiohttp.ClientResponse) -> None:
        self._answer = answer

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for data in self._answer.content.iter_any():
            yield data

    async def aclose(self) -> None:
        self._answer.close()


class _StaleConnection(aiohttp.ServerDisconnectedError):
    """The server had closed the connection that was reused, before it answered a word."""


@contextlib.contextmanager
def _mapped(endpoint: AgentEndpoint, timeout: float) -> Iterator[None]:
    """Turn what openai and aiohttp raise into ``EndpointError``; the original stays as its cause."""
    try:
        yield
    except (openai.OpenAIError, aiohttp.ClientError, httpx2.HTTPError, httpx2.InvalidURL, OSError) as exc:
        failure = _classify(exc, endpoint.name, timeout)
        hidden = replace(failure, message=without_key(endpoint, failure.message))
        shows_key = any(str(e) != without_key(endpoint, str(e)) for e in _causes(exc))
        raise EndpointError(hidden) from (None if shows_key else exc)


def without_key(endpoint: AgentEndpoint, text: str) -> str:
    """A server's words, without our key if it sent that back."""
    key = endpoint.key()
    return text.replace(key, "(the key)") if key else text


def _classify(exc: BaseException, name: str, timeout: float) -> Failure:
    if isinstance(exc, openai.APIStatusError):
        return _from_status(exc, name)
    chain = list(_causes(exc))
    if any(isinstance(e, OSError) and e.errno in _OURS for e in chain):
        return Failure(FailureKind.LOCAL, f"this machine ran out of something: {_words(chain)}", name)
    for kind, types in _KINDS:
        if (found := next((e for e in chain if isinstance(e, types)), None)) is not None:
            return Failure(kind, _plainly(found, timeout) or _words(chain), name)
    return Failure(FailureKind.DISCONNECT, _words(chain), name)


def _plainly(exc: BaseException, timeout: float) -> str | None:
    """What an exception means whose own words are about tasks and headers; None where the system's words are better."""
    if any(isinstance(e, OSError) and e.errno for e in _causes(exc)):
        return None
    if isinstance(exc, aiohttp.ConnectionTimeoutError):
        return f"no connection within {min(CONNECT_S, timeout):g} s"
    if isinstance(exc, aiohttp.ServerDisconnectedError):
        return "it closed the connection before it answered"
    if isinstance(exc, aiohttp.ClientPayloadError):
        return "it closed the connection in the middle of the answer"
    if isinstance(exc, aiohttp.ClientResponseError):
        return f"what came is not HTTP: {' '.join(exc.message.split())}"[:500]
    return f"nothing came for {timeout:g} s" if isinstance(exc, TimeoutError) else None


# In this order: the narrower types first.
_KINDS: tuple[tuple[FailureKind, tuple[type[BaseException], ...]], ...] = (
    (FailureKind.STALE, (_StaleConnection,)),
    (
        FailureKind.CONNECT,
        (
            aiohttp.ClientConnectorError,
            aiohttp.ConnectionTimeoutError,
            aiohttp.ClientHttpProxyError,
            aiohttp.InvalidURL,
            httpx2.InvalidURL,
        ),
    ),
    (FailureKind.HANG, (TimeoutError,)),
    (FailureKind.DISCONNECT, (aiohttp.ClientError, OSError)),
    (FailureKind.MALFORMED, (httpx2.DecodingError,)),
)


def _from_status(exc: openai.APIStatusError, name: str) -> Failure:
    status = exc.status_code
    body = exc.body if not isinstance(exc.body, bytes) else exc.response.text.strip()
    message = error_message(body) if body else f"no explanation ({exc.response.reason_phrase})"
    if location := exc.response.headers.get("location"):
        message = f"it redirects to {location}, which is not followed: {message}"
    retry_after = _retry_after(exc.response.headers.get("retry-after"))
    return Failure(kind_of(status, message, retry_after), message, name, status, retry_after)


def _retry_after(value: str | None) -> float | None:
    """Seconds of a Retry-After header; its date form is not used by model servers and is ignored."""
    try:
        return min(max(float(value), 0.0), 600.0) if value else None
    except ValueError:
        return None


def _causes(exc: BaseException | None) -> Iterator[BaseException]:
    while exc is not None:
        yield exc
        exc = exc.__cause__ or exc.__context__


def _words(chain: list[BaseException]) -> str:
    """The deepest cause that says anything: the system's words, or its type and its own."""
    said = next((e for e in reversed(chain) if str(e)), chain[0])
    if isinstance(said, OSError) and not isinstance(said, ssl.SSLError) and said.errno and said.errno > 0:
        return os.strerror(said.errno).lower()  # asyncio's own names the call and the address
    text = " ".join(str(said).split()) or "no explanation"
    return f"{type(chain[-1]).__name__}: {text}"[:500]
