"""Clients of the ``openai`` package: one for a pool's own requests, and ready ones for users.

Nothing of ``OPENAI_*`` in the environment reaches an endpoint, and nothing is sent twice: key, headers and base
address are given explicitly, and the client's own retries are off.
"""

from __future__ import annotations

import functools
import os
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import Any, cast
from urllib.parse import parse_qsl

import httpx2
import openai

from . import io_thread
from .failures import CONNECT_S
from .hostfile import AgentEndpoint
from .http_settings import HttpSettings

__all__ = ["ADDED_TO_EACH_REQUEST", "DirectClient", "endpoint_client", "new_client", "timeout_of"]

Send = Callable[[httpx2.Request], Coroutine[Any, Any, httpx2.Response]]

# Headers that openai's client adds. X-Stainless-* describes the machine and its Python, which endpoints need not know.
_FROM_OPENAI = (
    "OpenAI-Organization",
    "OpenAI-Project",
    "X-Stainless-Arch",
    "X-Stainless-Async",
    "X-Stainless-Lang",
    "X-Stainless-OS",
    "X-Stainless-Package-Version",
    "X-Stainless-Runtime",
    "X-Stainless-Runtime-Version",
)
ADDED_TO_EACH_REQUEST = ("X-Stainless-Read-Timeout", "X-Stainless-Retry-Count")
"""Headers that openai's client adds whatever its default headers say."""
_NO_KEY = "EMPTY"  # for openai's client, which requires a key


def new_client(
    http_client: httpx2.AsyncClient,
    base_url: str = "http://swarmkit.invalid/v1",
    api_key: str = _NO_KEY,
    headers: Mapping[str, str | openai.Omit] | None = None,
    timeout: float = 300.0,
    query: Mapping[str, str] | None = None,
) -> openai.AsyncOpenAI:
    """An openai client that takes nothing from the environment and sends a request once."""
    return openai.AsyncOpenAI(
        api_key=api_key,
        admin_api_key="",
        organization="",
        project="",
        webhook_secret="",
        base_url=base_url,
        max_retries=0,
        timeout=timeout_of(timeout),
        default_query=query,
        default_headers=cast("Mapping[str, str]", {**dict.fromkeys(_unwanted(), openai.omit), **(headers or {})}),
        http_client=http_client,
    )


class DirectClient(httpx2.AsyncClient):
    """Passes requests to its transport as they are.

    A pool has no use for the cookies, redirects, authentication, hooks and defaults of ``httpx2.AsyncClient``, and they
    take a fifth of the time of a request.
    """

    def __init__(self, transport: httpx2.AsyncBaseTransport) -> None:
        super().__init__(transport=transport, trust_env=False)
        self._to = transport

    def build_request(self, method: str, url: httpx2.URL | str, **given: Any) -> httpx2.Request:
        """Build a request with the headers that are given; the transport adds those that HTTP needs."""
        body, timeout = given.get("content") or b"", {"timeout": httpx2.Timeout(given["timeout"]).as_dict()}
        stream = httpx2.ByteStream(body)
        return httpx2.Request(method, _parsed(url), headers=given["headers"], stream=stream, extensions=timeout)

    async def send(self, request: httpx2.Request, *, stream: bool = False, **_: Any) -> httpx2.Response:
        """Send a request; unless ``stream``, the body of the response is read."""
        response = await self._to.handle_async_request(request)
        response.request = request
        if not stream:
            await response.aread()
        return response


class _PoolConnections(httpx2.AsyncBaseTransport):
    """Sends requests over a pool's connections, on swarmkit's own loop. It can be used on any loop.

    Closing it leaves the connections open.
    """

    def __init__(self, send: Send) -> None:
        self._send = send

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        """Send a request on swarmkit's loop."""
        await request.aread()
        if request.headers.get("Authorization") == f"Bearer {_NO_KEY}":
            del request.headers["Authorization"]
        for name in ADDED_TO_EACH_REQUEST:
            request.headers.pop(name, None)
        response = await io_thread.run_on_loop(self._send(request))
        return httpx2.Response(
            response.status_code,
            headers=response.headers.raw,
            stream=_BodyFromLoop(response),
            extensions={"reason_phrase": response.reason_phrase.encode()},
        )


class _BodyFromLoop(httpx2.AsyncByteStream):
    """The body of a response that arrives on swarmkit's loop."""

    def __init__(self, response: httpx2.Response) -> None:
        self._response = response

    async def __aiter__(self) -> AsyncGenerator[bytes, None]:
        chunks = aiter(cast("httpx2.AsyncByteStream", self._response.stream))

        async def following() -> bytes | None:
            return await anext(chunks, None)

        while (chunk := await io_thread.run_on_loop(following())) is not None:
            yield chunk

    async def aclose(self) -> None:
        await io_thread.run_on_loop(self._response.aclose())


def endpoint_client(endpoint: AgentEndpoint, settings: HttpSettings, send: Send) -> openai.AsyncOpenAI:
    """An openai client for one endpoint, whose requests are sent by ``send`` on swarmkit's loop."""
    key = endpoint.key() or _NO_KEY
    base, _, query = endpoint.address("/v1").partition("?")
    http = httpx2.AsyncClient(transport=_PoolConnections(send), trust_env=False, cookies=_no_cookies())
    headers = {"Authorization": f"Bearer {_NO_KEY}"}  # given here, since the environment's would win
    headers.update([endpoint.key_header(key)])
    return new_client(http, base, key, {**headers, **settings.headers}, settings.timeout, dict(parse_qsl(query)))


def _unwanted() -> list[str]:
    """Names of the headers to omit: those of openai's client, and those of ``$OPENAI_CUSTOM_HEADERS``."""
    lines = os.environ.get("OPENAI_CUSTOM_HEADERS", "").split("\n")
    return [*_FROM_OPENAI, *(line.partition(":")[0].strip() for line in lines if ":" in line)]


def _no_cookies() -> CookieJar:
    """A jar that stays empty: a gateway's cookies would bind a whole pool to one of its servers."""
    return CookieJar(DefaultCookiePolicy(allowed_domains=[]))


# A request's URL is one of few, and to parse it takes a tenth of the time of a request.
_parsed = functools.lru_cache(maxsize=4096)(httpx2.URL)


@functools.lru_cache(maxsize=128)
def timeout_of(seconds: float) -> httpx2.Timeout:
    """The timeout of a request with ``seconds`` between bytes; to connect it has ``CONNECT_S`` at most."""
    return httpx2.Timeout(seconds, connect=min(CONNECT_S, seconds))
