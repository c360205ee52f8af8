"""What the exceptions of openai, httpx2 and aiohttp mean: each is classified once, here."""

from __future__ import annotations

import contextlib
import errno
import os
import ssl
import time
from collections.abc import Iterator

import aiohttp
import httpx2
import openai

from ..records import Failure, FailureKind
from .aiohttp_transport import BadProxy, StaleConnection, TooLong, WrongReply
from .error_replies import error_message, kind_of, refuses_key
from .inflate import Undecodable
from .json_bytes import read_json
from .rate_headers import quota_of, retry_after_s

__all__ = ["CONNECT_S", "causes", "classify"]

CONNECT_S = 10.0
"""Seconds for a connection to be made: far more than any network needs, far less than an answer takes."""

_OUR_LIMITS = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EADDRNOTAVAIL}

# The first line with a match decides. aiohttp's own types come before those that other transports map them to.
_KINDS: tuple[tuple[FailureKind, tuple[type[BaseException], ...]], ...] = (
    (FailureKind.STALE, (StaleConnection,)),
    (FailureKind.MALFORMED, (TooLong, WrongReply)),
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
    (FailureKind.HANG, (aiohttp.ServerTimeoutError,)),
    (FailureKind.DISCONNECT, (aiohttp.ClientError,)),
    (FailureKind.CONNECT, (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.ProxyError, httpx2.UnsupportedProtocol)),
    (FailureKind.HANG, (httpx2.TimeoutException, TimeoutError)),
    (FailureKind.MALFORMED, (httpx2.DecodingError,)),
)


def classify(exc: BaseException, name: str, timeout: float) -> Failure:
    """Say what an exception means.

    Parameters
    ----------
    exc : BaseException
        What a request ended with.
    name : str
        The endpoint's, for the message.
    timeout : float
        Seconds without a byte that the request was given.
    """
    if isinstance(exc, openai.APIStatusError):
        return _from_status(exc.response, name)
    chain = list(causes(exc))
    if any(isinstance(e, OSError) and e.errno in _OUR_LIMITS for e in chain):
        return Failure(FailureKind.LOCAL, f"this machine ran out of something: {_words(chain)}", name)
    if (bad := next((e for e in chain if isinstance(e, BadProxy)), None)) is not None:
        kind = FailureKind.DENIED if bad.status in (403, 407) else FailureKind.CONNECT
        return Failure(kind, str(bad) if bad.status else f"{bad}: {_words(chain)}", name)
    for kind, types in _KINDS:
        if (found := next((e for e in chain if isinstance(e, types)), None)) is not None:
            return Failure(kind, _plainly(found, timeout) or _words(chain), name)
    return Failure(FailureKind.DISCONNECT, _words(chain), name)


def causes(exc: BaseException | None) -> Iterator[BaseException]:
    """An exception, what caused it, and so on down."""
    while exc is not None:
        yield exc
        exc = exc.__cause__ or exc.__context__


def _plainly(exc: BaseException, timeout: float) -> str | None:
    """A sentence for exceptions whose own text is about tasks and headers; None where the system's text is better."""
    if any(isinstance(e, OSError) and e.errno for e in causes(exc)):
        return None
    match exc:
        case TooLong() | WrongReply() | Undecodable():
            return str(exc)
        case aiohttp.ConnectionTimeoutError() | httpx2.ConnectTimeout():
            return f"no connection within {min(CONNECT_S, timeout):g} s"
        case StaleConnection() if "came again" in str(exc):
            return str(exc)
        case StaleConnection() | aiohttp.ServerDisconnectedError():
            return "it closed the connection before it answered"
        case aiohttp.ClientPayloadError():
            return "it closed the connection in the middle of the answer"
        case aiohttp.ClientResponseError():
            return f"what came is not HTTP: {' '.join(exc.message.split())}"[:500]
        case TimeoutError() | httpx2.TimeoutException():
            return f"nothing came for {timeout:g} s"
    return None


def _from_status(response: httpx2.Response, name: str) -> Failure:
    status = response.status_code
    body: object = response.content
    with contextlib.suppress(ValueError):
        body = read_json(response.content)
    if isinstance(body, bytes):
        body = response.text.strip()
    message = error_message(body) if body else f"no explanation ({response.reason_phrase})"
    if location := response.headers.get("location"):
        message = f"it redirects to {location}, which is not followed: {message}"
    retry_after = retry_after_s(response.headers, now := time.time())
    if status == 429 and retry_after is None and (quota := quota_of(response.headers.raw, now)) is not None:
        retry_after = max((reset_s for left, reset_s in filter(None, quota) if not left), default=None)
    of_key = refuses_key(status, body)
    kind = FailureKind.DENIED if of_key else kind_of(status, message, retry_after)
    return Failure(kind, message, name, status, retry_after, of_key)


def _words(chain: list[BaseException]) -> str:
    """The text of the deepest cause that has one: the system's own, or the exception's type and text."""
    deepest = next((e for e in reversed(chain) if str(e)), chain[0])
    if isinstance(deepest, OSError) and not isinstance(deepest, ssl.SSLError) and deepest.errno and deepest.errno > 0:
        return os.strerror(deepest.errno).lower()  # asyncio's own text names the call and the address
    text = " ".join(str(deepest).split()) or "no explanation"
    return f"{type(chain[-1]).__name__}: {text}"[:500]
