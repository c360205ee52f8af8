"""An ``httpx2`` transport that sends requests with ``aiohttp``.

``aiohttp`` parses HTTP in C and finds the idle connections of a host without searching those of other hosts.
``httpx2.AsyncClient(transport=...)`` takes the transport, and ``openai.AsyncOpenAI(http_client=...)`` that client.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import io
import os
import select
import socket
import ssl
import weakref
from collections.abc import AsyncIterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import aiohttp
import httpx2
from aiohttp.abc import ResolveResult

from .inflate import Inflater, Undecodable, inflater
from .proxy import Proxy

__all__ = [
    "ANSWERED",
    "LARGEST_REPLY",
    "AiohttpTransport",
    "BadProxy",
    "Bounds",
    "StaleConnection",
    "TooLong",
    "Way",
    "WrongReply",
    "bounds",
    "way",
]

KEEPALIVE_S = 4.0
"""Idle connections are closed before the server closes them (uvicorn: after 5 s)."""

_HEADERS = {  # of requests that have none of these names
    "Accept": "application/json",
    "Accept-Encoding": "identity",  # no decompression: nodes are near, CPU is not free
    "User-Agent": "swarmkit",
}
ANSWERED = (200, 201, 203)
"""Statuses of answers: some frameworks give a 201 to every POST, and proxies that change an answer a 203."""

LARGEST_REPLY = 64 << 20
"""Bytes of a reply that is read whole, where a request sets no bound of its own."""

_SLOWEST_BYTES_PER_S = 100_000  # a request is written, and a reply comes, at this rate or faster
_SMALL_BODY = 1 << 15  # bytes; a smaller body fits into the buffers, so writing it never waits
_LARGE_BODY = 1 << 20  # bytes; a larger body is written in parts

# The exception of aiohttp, and that of httpx2 with the same meaning; the narrower types come first.
_MEANINGS: tuple[tuple[type[Exception], type[httpx2.RequestError]], ...] = (
    (aiohttp.ConnectionTimeoutError, httpx2.ConnectTimeout),
    (aiohttp.ServerTimeoutError, httpx2.ReadTimeout),
    (TimeoutError, httpx2.WriteTimeout),  # of asyncio.timeout() around the writing
    (aiohttp.ClientProxyConnectionError, httpx2.ProxyError),
    (aiohttp.ClientHttpProxyError, httpx2.ProxyError),
    (aiohttp.ClientConnectorError, httpx2.ConnectError),
    (aiohttp.InvalidURL, httpx2.UnsupportedProtocol),
    (aiohttp.ServerDisconnectedError, httpx2.RemoteProtocolError),
    (aiohttp.ClientResponseError, httpx2.RemoteProtocolError),
    (Exception, httpx2.ReadError),
)


_NO_BOUND = contextlib.nullcontext()


class StaleConnection(httpx2.RemoteProtocolError):
    """The server had closed a connection that was used before, and answered nothing on it."""


class BadProxy(httpx2.ProxyError):
    """The proxy cannot be reached, or does not let a request pass.

    Attributes
    ----------
    status : int or None
        What it answered.
    """

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class TooLong(httpx2.DecodingError):
    """A reply is longer than it can be if it answers the request; the rest of it is not read."""


class WrongReply(httpx2.DecodingError):
    """A reply says that it answers another request."""


class _UnreadBytes(aiohttp.ClientError):
    """An idle connection holds bytes that no request asked for, so nothing is sent on it."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """Bounds of a reply that is read whole.

    Attributes
    ----------
    size : int
        Bytes, at most.
    total_s : float or None
        Seconds from the request to the last byte; None for as long as ``size`` bytes may take.
    """

    size: int = LARGEST_REPLY
    total_s: float | None = None


bounds: ContextVar[Bounds | None] = ContextVar("bounds", default=None)
"""The bounds of the reply that this task reads whole; None for a stream, which its reader bounds. ``httpx2`` and
``openai`` have no parameter for them."""


@dataclass(frozen=True, slots=True)
class Way:
    """How a server is reached, where its address does not say it.

    Attributes
    ----------
    socket : str
        Path of a Unix socket that leads to it.
    proxy : Proxy or None
        The proxy that leads to it.
    """

    socket: str = ""
    proxy: Proxy | None = None


way: ContextVar[Way | None] = ContextVar("way", default=None)
"""The way of this task's request, for which ``httpx2`` and ``openai`` have no parameter."""


@dataclass(slots=True)
class _Connection:
    """The connection of a request: the Unix socket that it is to be made to, whether it was made for the request, and
    what closes it."""

    path: str = ""
    new: bool = False
    transport: asyncio.BaseTransport | None = None

    def drop(self) -> None:
        """Close the connection, so that no other request is sent on it."""
        if self.transport is not None:
            self.transport.close()


class _Request(aiohttp.ClientRequest):
    """A request that is not sent on a connection with unread bytes.

    A server or a proxy that sends a response twice leaves the second one on the connection; it would be taken for
    the answer to the next request.
    """

    async def send(self, conn: aiohttp.connector.Connection) -> aiohttp.ClientResponse:
        """Send the request, or raise ``_UnreadBytes``; the connection is closed then."""
        connection, transport = _connection.get(), conn.transport
        unread = conn.protocol is not None and conn.protocol.should_close
        if not connection.new and (unread or _readable(transport)):
            raise _UnreadBytes("the connection holds bytes that no request asked for")
        connection.transport = transport
        return await super().send(conn)


def _readable(transport: asyncio.BaseTransport | None) -> bool:
    """Whether the socket holds bytes, or its end, which the loop has not read yet."""
    sock = transport.get_extra_info("socket") if transport is not None else None
    if sock is None or sock.fileno() < 0:
        return False
    if not hasattr(select, "poll"):  # Windows
        return bool(select.select([sock], [], [], 0)[0])
    poll = select.poll()
    poll.register(sock.fileno(), select.POLLIN)
    return bool(poll.poll(0))


class AiohttpTransport(httpx2.AsyncBaseTransport):
    """Sends the requests of an ``httpx2.AsyncClient`` with one ``aiohttp.ClientSession``.

    Parameters
    ----------
    verify : ssl.SSLContext, optional
        Trust settings for https; the system's by default.

    Notes
    -----
    Bound to the event loop it is first used on. An answer that is an event stream is passed on as it comes, any
    other answer is read to its end first.
    """

    def __init__(self, verify: ssl.SSLContext | None = None) -> None:
        self._verify = verify
        self._session: aiohttp.ClientSession | None = None

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        """Send a request; what fails below is raised as an ``httpx2.RequestError``, with its cause."""
        session = self._session = self._session or self._open()
        reached = way.get()
        connection = _Connection(reached.socket if reached else "")
        _connection.set(connection)
        proxy = reached.proxy if reached else None
        limits = bounds.get()
        try:
            answer = await self._send(session, request, proxy)
            if answer.status == 407:
                answer.close()
                raise _refused(proxy, answer.status, answer.reason)
            unpack = _unpacking(answer)
            streams = answer.headers.get("content-type", "").startswith("text/event-stream")
            if limits is None and answer.status in ANSWERED and streams:
                content: dict[str, Any] = {"stream": _Body(answer, unpack)}
            else:
                content = {
                    "content": await _read(answer, unpack, limits or Bounds(), request.extensions["timeout"]["read"])
                }
        except aiohttp.ClientConnectorError as exc:
            if proxy and proxy.address.endswith((f"//{exc.host}:{exc.port}", f"//[{exc.host}]:{exc.port}")):
                raise BadProxy(f"the proxy {proxy.address} cannot be reached") from exc
            raise _meaning(exc)(str(exc)) from exc
        except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError) as exc:
            raise (_meaning(exc) if connection.new else StaleConnection)(str(exc)) from exc
        except (aiohttp.ClientError, OSError) as exc:
            if proxy and isinstance(exc, aiohttp.ConnectionTimeoutError):
                raise BadProxy(f"no connection through the proxy {proxy.address}") from exc
            raise _meaning(exc)(str(exc)) from exc
        reason = (answer.reason or "").encode(errors="replace")
        extensions = {"reason_phrase": reason, "drop": connection.drop, "new": connection.new}
        headers = answer.raw_headers
        if "content-encoding" in answer.headers:
            headers = tuple(h for h in headers if h[0].lower() not in (b"content-encoding", b"content-length"))
        response = httpx2.Response(answer.status, headers=headers, extensions=extensions, **content)
        if answer.status not in ANSWERED:
            response.encoding = "utf-8"  # whatever charset it names: some of Python's make no text, or raise
        return response

    async def _send(
        self, session: aiohttp.ClientSession, request: httpx2.Request, proxy: Proxy | None
    ) -> aiohttp.ClientResponse:
        timeout = request.extensions["timeout"]
        body = await request.aread()
        headers = [(name.decode(), value.decode()) for name, value in request.headers.raw]
        to_proxy = proxy.headers() if proxy else None
        if to_proxy and request.url.scheme == "http":  # the request itself goes to the proxy; else a CONNECT before it
            headers += to_proxy.items()
            to_proxy = None
        while True:  # ends with a new connection at the latest
            # aiohttp bounds the time to connect and the time between bytes of the answer, not that of the writing.
            async with asyncio.timeout(_bound(timeout, len(body))) if len(body) > _SMALL_BODY else _NO_BOUND:
                try:
                    return await session.request(
                        request.method,
                        str(request.url),
                        data=io.BytesIO(body) if len(body) > _LARGE_BODY else body or None,
                        headers=headers,
                        allow_redirects=False,
                        proxy=proxy.address if proxy else None,
                        proxy_headers=to_proxy,
                        timeout=_timeout(timeout["connect"], timeout["read"]),
                    )
                except _UnreadBytes:
                    continue  # nothing was sent
                except aiohttp.ClientHttpProxyError as exc:
                    refused = _refused(proxy, exc.status, exc.message)
            raise refused  # not from the exception, which holds the headers, and with them the password

    async def aclose(self) -> None:
        """Close all connections."""
        if self._session is not None:
            await self._session.close()

    def _open(self) -> aiohttp.ClientSession:
        # The scheduler bounds the requests in flight; a second bound here could only block it.
        connector = aiohttp.TCPConnector(
            limit=0,
            keepalive_timeout=KEEPALIVE_S,
            ssl=self._verify or True,
            socket_factory=_make_socket,
            resolver=_Resolver(),
        )
        session = aiohttp.ClientSession(
            headers=_HEADERS,
            connector=connector,
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            request_class=_Request,
        )
        _sessions.add(session)
        return session


def _refused(proxy: Proxy | None, status: int, reason: str | None) -> BadProxy:
    what = "refused the request" if status == 407 or status == 403 else "could not connect to the server"
    hint = ". It wants a user and a password: proxy='http://user:password@host:port'" if status == 407 else ""
    name = f"the proxy {proxy.address}" if proxy else "a proxy"
    return BadProxy(f"{name} {what} (HTTP {status} {reason or ''}".rstrip() + f"){hint}", status)


# The connection of this task's request: a new one, if a socket was made for it. aiohttp's TraceConfig tells the same,
# but takes a twelfth of the time of a request.
_connection: ContextVar[_Connection] = ContextVar("connection")


def _make_socket(address: aiohttp.AddrInfoType) -> socket.socket:
    connection = _connection.get()
    connection.new = True
    if connection.path:
        return _UnixSocket(connection.path)
    family, kind, protocol, _, _ = address
    return socket.socket(family, kind, protocol)


class _UnixSocket(socket.socket):
    """A socket that connects to its path, whatever address it is given."""

    def __init__(self, path: str) -> None:
        super().__init__(socket.AF_UNIX, socket.SOCK_STREAM)
        self._path = path

    def connect(self, address: Any) -> None:
        """Connect, or raise at once: a full queue of a Unix socket cannot be waited for."""
        try:
            super().connect(self._path)
        except BlockingIOError:
            raise ConnectionRefusedError(errno.ECONNREFUSED, "its queue of connections is full") from None


class _Resolver(aiohttp.ThreadedResolver):
    """Looks up host names, but not those of servers that are reached by a Unix socket."""

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        """Addresses of a host."""
        if _connection.get().path:
            there, inet = "127.0.0.1", socket.AF_INET  # the socket goes elsewhere
            return [ResolveResult(hostname=host, host=there, port=port, family=inet, proto=0, flags=0)]
        return await super().resolve(host, port, family)


def _unpacking(answer: aiohttp.ClientResponse) -> Inflater | None:
    try:
        return inflater(answer.headers.get("content-encoding", ""))
    except Undecodable:
        if answer.status in ANSWERED:
            answer.close()
            raise
        return None  # its status says enough


async def _read(
    answer: aiohttp.ClientResponse, unpack: Inflater | None, limits: Bounds, silence_s: float | None
) -> bytes:
    """Read a body to its end, within its bounds. White space is what gateways send to keep a connection open: it is
    not part of an answer, so it does not end a silence."""
    if answer.content.is_eof() and not unpack:
        data = answer.content.read_nowait()
        if len(data) > limits.size:
            raise TooLong(_too_long(answer, limits))
        return data
    loop = asyncio.get_running_loop()
    last = limits.size / _SLOWEST_BYTES_PER_S + (silence_s or 0.0)
    end = loop.time() + (last if limits.total_s is None else limits.total_s)
    parts: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout_at(min(end, loop.time() + (silence_s or last))) as timer:
            async for data in answer.content.iter_any():
                for piece in unpack(data) if unpack else (data,):
                    parts.append(piece)
                    size += len(piece)
                    if size > limits.size:
                        raise TooLong(_too_long(answer, limits))
                    if not piece.isspace():
                        timer.reschedule(min(end, loop.time() + (silence_s or last)))
        if unpack:
            unpack.end()
    except TimeoutError as exc:
        raise aiohttp.SocketTimeoutError(str(exc)) from exc
    finally:
        if not answer.content.is_eof():
            answer.close()
    return b"".join(parts)


def _too_long(answer: aiohttp.ClientResponse, limits: Bounds) -> str:
    answer.close()
    return f"the reply is longer than {limits.size:,} bytes, the most that an answer to this request can take"


class _Body(httpx2.AsyncByteStream):
    """The body of an answer as it comes; closing it drops the connection unless the answer was read to its end."""

    def __init__(self, answer: aiohttp.ClientResponse, unpack: Inflater | None) -> None:
        self._answer = answer
        self._unpack = unpack

    async def __aiter__(self) -> AsyncIterator[bytes]:
        try:
            async for data in self._answer.content.iter_any():
                for piece in self._unpack(data) if self._unpack else (data,):
                    yield piece
        except (aiohttp.ClientError, OSError) as exc:
            raise _meaning(exc)(str(exc)) from exc

    async def aclose(self) -> None:
        self._answer.close()


@functools.lru_cache(maxsize=128)
def _timeout(connect: float | None, read: float | None) -> aiohttp.ClientTimeout:
    return aiohttp.ClientTimeout(connect=connect, sock_read=read)


def _bound(timeout: dict[str, float | None], size: int) -> float | None:
    """Seconds from the start of a request to the first byte of its answer."""
    connect, read = timeout["connect"], timeout["read"]
    return None if connect is None or read is None else connect + read + size / _SLOWEST_BYTES_PER_S


def _meaning(exc: Exception) -> type[httpx2.RequestError]:
    return next(meaning for kind, meaning in _MEANINGS if isinstance(exc, kind))


_sessions: weakref.WeakSet[aiohttp.ClientSession] = weakref.WeakSet()


def _leave_to_the_parent() -> None:
    """In a forked child: mark the sessions of the parent closed, so that the child never closes their connections.

    The loop of these sessions says here that it is closed (``io_thread``), so aiohttp leaves the sockets and the
    loop's selector alone and has nothing to wait for.
    """
    for session in list(_sessions):
        with contextlib.suppress(StopIteration):
            session.close().send(None)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_to_the_parent)
