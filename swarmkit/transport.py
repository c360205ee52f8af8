"""HTTP: the only importer of ``openai``, and the one place where foreign exceptions become ours.

One ``AsyncOpenAI`` client serves a whole pool: a client an endpoint would cost 20 ms each. Below it a router
keeps one connection pool an origin, since a single pool for all scans all its connections at every request.
The client's own retries are off (they would resend whole batches), and nothing of ``OPENAI_*`` in the
environment reaches an endpoint: its default headers are replaced, and each request carries the key of its
endpoint or none.
"""

from __future__ import annotations

import contextlib
import errno
import os
import ssl
from collections.abc import AsyncGenerator, Iterator, Mapping
from dataclasses import replace
from typing import Any, cast

import httpcore2
import httpx2
import jiter
import openai

from .errors import EndpointError
from .framing import Merger
from .hostfile import AgentEndpoint
from .records import Failure, FailureKind
from .wire import error_message, kind_of

__all__ = ["Transport", "without_key"]

KEEPALIVE_S = 4.0
"""Idle connections are dropped before the server drops them (uvicorn: after 5 s)."""
CONNECT_S = 10.0
"""Seconds for a connection to be made: far more than any network needs, far less than an answer takes."""

# The scheduler bounds what is in flight; a second bound here would only deadlock with it.
_LIMITS = httpx2.Limits(max_connections=None, keepalive_expiry=KEEPALIVE_S)
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
        http = httpx2.AsyncClient(
            transport=None if trust_env else _Router(verify),  # None: httpx2's own, which reads the proxies
            trust_env=trust_env,
            verify=verify or True,
            limits=_LIMITS,
            headers={"accept-encoding": "identity"},  # nothing to inflate: nodes are near, CPU is not free
        )
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
            "headers": {"Authorization": f"Bearer {key}" if key else openai.Omit()},
            "timeout": httpx2.Timeout(timeout or self.timeout, connect=min(CONNECT_S, timeout or self.timeout)),
        }


class _Client(openai.AsyncOpenAI):
    """The openai client without what it would add from the environment."""

    @property
    def default_headers(self) -> dict[str, str | openai.Omit]:
        return {"Accept": "application/json", "Content-Type": "application/json", "User-Agent": "swarmkit"}


class _Router(httpx2.AsyncBaseTransport):
    """One connection pool an origin, all with one TLS context."""

    def __init__(self, verify: ssl.SSLContext | None) -> None:
        self._verify = verify
        self._plain = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # trusts nobody, and need not read whom to: 20 ms
        self._pools: dict[tuple[str, str, int | None], _Pool] = {}

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        url = request.url
        origin = (url.scheme, url.host, url.port)
        pool = self._pools.get(origin)
        if pool is None:
            verify = self._plain
            if url.scheme == "https":
                verify = self._verify = self._verify or ssl.create_default_context()
            pool = self._pools[origin] = _Pool(verify)
        trace = _Trace()
        request.extensions = {**request.extensions, "trace": trace}
        try:
            return await pool.handle_async_request(request)
        except (httpx2.NetworkError, httpx2.RemoteProtocolError) as exc:
            if not trace.connected:
                raise _StaleConnection(str(exc), request=request) from exc
            raise

    async def aclose(self) -> None:
        for pool in self._pools.values():
            await pool.aclose()


class _Pool(httpx2.AsyncHTTPTransport):
    """The connections to one origin."""

    def __init__(self, verify: ssl.SSLContext) -> None:
        super().__init__(verify=verify, trust_env=False, limits=_LIMITS)
        # httpx2's parameters do not reach down to what reads the sockets, so its pool is replaced by one like it.
        self._pool = httpcore2.AsyncConnectionPool(
            ssl_context=verify, max_connections=None, keepalive_expiry=KEEPALIVE_S, network_backend=_Network()
        )


class _Network(httpcore2.AnyIOBackend):
    async def connect_tcp(self, *args: Any, **kwargs: Any) -> httpcore2.AsyncNetworkStream:
        return _Stream(await super().connect_tcp(*args, **kwargs))


class _Stream(httpcore2.AsyncNetworkStream):
    """A connection whose responses come in fewer and larger chunks (``framing.Merger``)."""

    def __init__(self, stream: httpcore2.AsyncNetworkStream) -> None:
        self._stream = stream
        self._merger = Merger()

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        while data := await self._stream.read(max_bytes, timeout):
            if merged := self._merger.feed(data):
                return merged
        return self._merger.feed(b"")

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._merger.start()
        await self._stream.write(buffer, timeout)

    async def aclose(self) -> None:
        await self._stream.aclose()

    async def start_tls(self, *args: Any, **kwargs: Any) -> httpcore2.AsyncNetworkStream:
        return _Stream(await self._stream.start_tls(*args, **kwargs))

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)


class _Trace:
    """Notes whether a request opened a connection of its own."""

    __slots__ = ("connected",)

    def __init__(self) -> None:
        self.connected = False

    async def __call__(self, name: str, info: Mapping[str, Any]) -> None:
        if name.startswith("connection.connect_"):
            self.connected = True


class _StaleConnection(httpx2.ReadError):
    """The server had closed the connection that was reused, before it answered a word."""


@contextlib.contextmanager
def _mapped(endpoint: AgentEndpoint, timeout: float) -> Iterator[None]:
    """Turn what openai and httpx2 raise into ``EndpointError``; the original stays as its cause."""
    try:
        yield
    except (openai.OpenAIError, httpx2.HTTPError, httpx2.StreamError, httpx2.InvalidURL, OSError) as exc:
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
            return Failure(kind, _late(found, timeout) or _words(chain), name)
    return Failure(FailureKind.DISCONNECT, _words(chain), name)


def _late(exc: BaseException, timeout: float) -> str | None:
    """What a timeout says; its own words are about tasks and scopes."""
    if isinstance(exc, httpx2.ConnectTimeout):
        return f"no connection within {min(CONNECT_S, timeout):g} s"
    if isinstance(exc, httpx2.WriteTimeout):
        return f"it took nothing of the request for {timeout:g} s"
    return f"nothing came for {timeout:g} s" if isinstance(exc, httpx2.ReadTimeout) else None


# In this order: the narrower types first.
_KINDS: tuple[tuple[FailureKind, tuple[type[BaseException], ...]], ...] = (
    (FailureKind.LOCAL, (httpx2.PoolTimeout,)),
    (FailureKind.STALE, (_StaleConnection,)),
    (
        FailureKind.CONNECT,
        (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.UnsupportedProtocol, httpx2.InvalidURL, httpx2.ProxyError),
    ),
    (FailureKind.HANG, (httpx2.ReadTimeout, httpx2.WriteTimeout)),
    (FailureKind.DISCONNECT, (httpx2.NetworkError, httpx2.ProtocolError, httpx2.StreamError, OSError)),
    (FailureKind.MALFORMED, (httpx2.DecodingError, openai.APIResponseValidationError)),
)


def _from_status(exc: openai.APIStatusError, name: str) -> Failure:
    status = exc.status_code
    message = error_message(exc.body) if exc.body else f"no explanation ({exc.response.reason_phrase})"
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
