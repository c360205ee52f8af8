"""Carries out the faults that replace or delay an answer, down to the socket."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Awaitable, Callable, MutableMapping
from typing import TYPE_CHECKING, Any

from .faults import Fault
from .replies import to_json

if TYPE_CHECKING:
    _Protocol = asyncio.Protocol
else:
    from uvicorn.protocols.http.auto import AutoHTTPProtocol as _Protocol

__all__ = ["TrackedProtocol", "answer_with_fault", "delayed", "end_early"]

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

_PIECE_BYTES = 64
_ERRORS = {
    307: ("Redirect", "The resource has moved."),
    400: ("BadRequestError", "This server refuses every request."),
    401: ("UnauthorizedError", "Invalid API key."),
    402: ("BillingError", "The credits of this key are used up."),
    403: ("PermissionDeniedError", "This key may not use the model."),
    404: ("NotFoundError", "The model does not exist."),
    405: ("MethodNotAllowed", "Method Not Allowed"),
    422: ("Validation", "Input validation error"),
    429: ("RateLimitError", "Too many requests."),
    500: ("InternalServerError", "EngineCore encountered an issue. See stack trace (above) for the root cause."),
    503: (
        "Service Unavailable",
        "The engine is currently busy and cannot accept new requests. "
        "Please try again later or on a different instance.",
    ),
}
_PAGES = {413: "Request Entity Too Large", 502: "Bad Gateway", 504: "Gateway Time-out"}
_BAD_ROW = (
    "This model's maximum context length is 4096 tokens. However, your prompt contains at least 4097 input "
    "tokens, which exceeds this limit even without any output tokens. Please reduce the length of the input "
    "prompt."
)
_transports: dict[tuple[Any, ...], asyncio.Transport] = {}


class TrackedProtocol(_Protocol):
    """uvicorn's protocol; it registers its transport for the faults that cut connections."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Register the transport under the two addresses that a request's scope has."""
        assert isinstance(transport, asyncio.Transport)
        # A connection that was reset before it was accepted has no peer name.
        ends = (transport.get_extra_info(name) or () for name in ("peername", "sockname"))
        self._key = tuple(tuple(end[:2]) for end in ends)
        _transports[self._key] = transport
        super().connection_made(transport)

    def connection_lost(self, exc: Exception | None) -> None:
        """Unregister the transport."""
        _transports.pop(self._key, None)
        super().connection_lost(exc)


def _transport(scope: Scope) -> asyncio.Transport | None:
    return _transports.get((tuple(scope["client"] or ()), tuple(scope["server"])))


async def end_early(kind: str, scope: Scope, receive: Receive) -> None:
    """End an answer as the fault does, after its written part is sent."""
    transport = _transport(scope)
    if transport and kind == "cut":
        transport.close()
    elif transport:
        if kind == "half_close":
            transport.write_eof()
        await _until_disconnect(receive)


async def _until_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _reset(scope: Scope) -> None:
    """End the connection with a TCP reset."""
    transport = _transport(scope)
    if transport:
        # A linger time of zero makes close() send RST, as the system does for a killed process.
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        transport.abort()


async def answer_with_fault(fault: Fault, scope: Scope, receive: Receive, send: Send, *, stream: bool = False) -> bool:
    """Carry out a fault that replaces the answer; ``stream``: whether a stream was requested.

    Returns
    -------
    bool
        False if this kind of fault does not replace the answer.
    """
    kind = fault.kind
    if kind in ("reset", "kill_row"):
        _reset(scope)
    elif kind == "hang":
        await _until_disconnect(receive)
    elif kind == "garbage":
        await _respond(send, 200, b"<!doctype html><title>Welcome</title>", b"application/json")
    elif kind == "null_body":
        await _respond(send, 200, b"null", b"application/json")
    elif kind == "empty_body":
        await _respond(send, 200, b"", b"application/json")
    elif kind == "error_body":
        await _respond(send, 200, _error_body(500), b"application/json")
    elif kind in ("late_400", "late_500"):
        status = int(kind[5:])
        if stream:
            events = b"data: %s\n\ndata: [DONE]\n\n" % _error_body(status)
            await _respond(send, 200, events, b"text/event-stream; charset=utf-8")
        else:
            await _error(send, status, *_ERRORS[status], None)
    elif kind in ("queue_full", "wait"):
        later = [(b"retry-after", b"%g" % fault.seconds)] if kind == "wait" else []
        await _error(send, 503, *_ERRORS[503], None, *later)
    elif kind == "bad_row":
        await _error(send, 400, "BadRequestError", _BAD_ROW, "input_tokens")
    elif kind.startswith("http_") and (status := int(kind[5:])) in _PAGES:
        page = f"<html><head><title>{status} {_PAGES[status]}</title></head></html>"
        await _respond(send, status, page.encode(), b"text/html")
    elif kind.startswith("http_"):
        status = int(kind[5:])
        extra = {307: [(b"location", b"http://127.0.0.1:9/")], 429: [(b"retry-after", b"%g" % fault.seconds)]}
        await _error(send, status, *_ERRORS[status], None, *extra.get(status, []))
    else:
        return False
    return True


def delayed(fault: Fault | None, send: Send) -> Send:
    """``send``, in small delayed pieces if the fault is ``drip``."""
    if fault is None or fault.kind != "drip":
        return send
    seconds = fault.seconds

    async def drip(message: MutableMapping[str, Any]) -> None:
        body = message.get("body", b"")
        for start in range(0, len(body) - _PIECE_BYTES, _PIECE_BYTES):
            await send({**message, "body": body[start : start + _PIECE_BYTES], "more_body": True})
            await asyncio.sleep(seconds)
        if body:
            message = {**message, "body": body[(len(body) - 1) // _PIECE_BYTES * _PIECE_BYTES :]}
        await send(message)

    return drip


async def _respond(send: Send, status: int, body: bytes, media: bytes, *headers: tuple[bytes, bytes]) -> None:
    fixed = [(b"content-type", media), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": status, "headers": [*fixed, *headers]})
    await send({"type": "http.response.body", "body": body})


async def _error(
    send: Send, status: int, type_: str, message: str, param: str | None, *headers: tuple[bytes, bytes]
) -> None:
    body = {"error": {"message": message, "type": type_, "param": param, "code": status}}
    await _respond(send, status, to_json(body), b"application/json", *headers)


def _error_body(status: int) -> bytes:
    type_, message = _ERRORS[status]
    return to_json({"error": {"message": message, "type": type_, "param": None, "code": status}})
