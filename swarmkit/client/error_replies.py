"""What servers say when something is wrong: the bodies of errors, and replies that are none."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from ..records import Failure, FailureKind
from .json_bytes import read_json

__all__ = [
    "Malformed",
    "StreamFailed",
    "error_message",
    "error_reply",
    "kind_of",
    "refuses_key",
    "reply_failure",
    "shown",
    "stream_failure",
]

# Words in the messages of servers whose queue is full: vLLM's two, and those of other servers.
_FULL = re.compile(r"busy|queue|backlog|overload|capacity|try again|too many", re.IGNORECASE)
_NEVER_FITS = re.compile(r"request too large", re.IGNORECASE)
# How servers say with other statuses that the key is refused: codes and types of OpenAI, Google and OAuth. Their words
# count only at the beginning, since messages repeat prompts.
_KEY_ERRORS = {"invalid_api_key", "api_key_invalid", "authentication_error", "invalid_token", "token_expired"}
_KEY_WORDS = re.compile(
    r"(the |your |this )?("
    r"(invalid|incorrect|expired|revoked) (api[ _-]?key|(access|api|auth|authentication|bearer) token)"
    r"|api[ _-]?key (is |has been |has )?(not valid|invalid|incorrect|expired|revoked)"
    r"|((access|api|auth|authentication|bearer) )?token (is |has been |has )?(expired|revoked))\b",
    re.IGNORECASE,
)
_MARKUP = re.compile(r"<(?:style|script|!--).*?(?:</style>|</script>|-->)|<[^>]*>", re.DOTALL | re.IGNORECASE)


class Malformed(ValueError):  # noqa: N818 - named after the reply
    """A reply that cannot be matched to the prompts it should answer; the message says how."""


class StreamFailed(Exception):  # noqa: N818 - named after the event
    """The server reported an error inside a stream, or a reply. ``failure`` has it, without the endpoint's name."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure)
        self.failure = failure

    def __str__(self) -> str:
        return self.failure.message


def error_reply(line: bytes) -> Exception | None:
    """The error of a server that answers the request for a stream with a JSON object; None if this is none."""
    if not line.startswith(b"{"):
        return None
    try:
        body = read_json(line)
    except ValueError:
        return None
    return reply_failure(body, line) if body.get("error") else None


def reply_failure(body: Mapping[str, Any], data: bytes, name: str = "choices") -> Exception:
    """What a reply without choices means: an error, if it has a status of its own, as gateways send them."""
    error = body.get("error")
    status = _status(error.get("code") or error.get("status")) if isinstance(error, dict) else None
    if status is not None and 400 <= status < 600:
        return _failed(body, status)
    return Malformed(f'the reply has no list of "{name}": {shown(data)}')


def stream_failure(body: Mapping[str, Any], payload: bytes) -> Exception:
    """What a chunk of a stream without choices means."""
    error = body.get("error")
    if error is None:
        return Malformed(f'a chunk of the stream has no "choices": {shown(payload)}')
    return _failed(body, (_status(error.get("code")) if isinstance(error, dict) else None) or 500)


def _failed(body: Mapping[str, Any], status: int) -> StreamFailed:
    message, of_key = error_message(body), refuses_key(status, body)
    kind = FailureKind.DENIED if of_key else kind_of(status, message)
    return StreamFailed(Failure(kind, message, status=status, of_key=of_key))


def _status(code: Any) -> int | None:
    """The HTTP status that the code of an error is, as a number or as text; None if it is none."""
    return int(code) if re.fullmatch("[1-9][0-9]{2}", str(code)) else None


def kind_of(status: int, message: str, retry_after_s: float | None = None) -> FailureKind:
    """Classify an HTTP status, or the code of an error inside a stream.

    Examples
    --------
    >>> str(kind_of(503, "The engine is currently busy and cannot accept new requests.")), str(kind_of(503, ""))
    ('queue full', 'server error')
    >>> str(kind_of(429, "Request too large on tokens per min (TPM): Limit 10000, Requested 19837."))
    'request too large'
    """
    if status == 429 and _NEVER_FITS.search(message):  # more than a minute's tokens: to wait does not help
        return FailureKind.TOO_LARGE
    if status in (429, 529) or (status == 503 and (retry_after_s is not None or _FULL.search(message))):
        return FailureKind.BUSY
    if status in (413, 504):  # a gateway's limit of bytes or of time: smaller batches pass
        return FailureKind.TOO_LARGE
    if status in (401, 402, 403, 404, 405) or 200 < status < 400:
        return FailureKind.DENIED
    if status >= 500 or status <= 200 or status in (408, 409, 425):
        return FailureKind.SERVER
    return FailureKind.REJECTED


def refuses_key(status: int, body: Any) -> bool:
    """Whether an error is about the key: by its status, or with another one by its code, its type or its first words.

    Examples
    --------
    >>> refuses_key(401, ""), refuses_key(400, {"error": {"message": "Incorrect API key provided: sk-1"}})
    (True, True)
    >>> refuses_key(400, {"error": {"message": "'Invalid API key' is no valid prompt", "code": "invalid_prompt"}})
    False
    """
    if status in (401, 498):
        return True
    if status not in (400, 403):
        return False
    error = body.get("error") if isinstance(body, Mapping) else None
    fields = [each for each in (body, error) if isinstance(each, Mapping)]
    names = {str(each.get(name)).lower() for each in fields for name in ("code", "type", "status", "error")}
    return not names.isdisjoint(_KEY_ERRORS) or _KEY_WORDS.match(error_message(body)) is not None


def error_message(body: Any) -> str:
    """The message in the body of an error, whatever the shape of the body.

    Examples
    --------
    >>> error_message({"error": {"message": "too long"}}), error_message({"detail": "Not Found"})
    ('too long', 'Not Found')
    >>> error_message("<html><h1>502 Bad Gateway</h1></html>")
    '502 Bad Gateway'
    """
    found: Any = body
    for key in ("error", "message", "detail"):
        if isinstance(found, dict) and found.get(key):
            found = found[key]
    text = found if isinstance(found, str) else json.dumps(found, default=str)
    if text.lstrip().startswith("<"):  # the page of a proxy
        text = _MARKUP.sub(" ", text)
    return " ".join(text.split())[:1000]


def shown(data: bytes) -> str:
    """The beginning of a reply, for a message."""
    text = data[:120].decode(errors="replace")
    return repr(text + ("..." if len(data) > 120 else ""))
