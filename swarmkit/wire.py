"""What goes over the wire: requests as bytes, replies as ``Reply`` tuples. No I/O here.

Protocol: OpenAI's completions and chat completions as vLLM serves them, and vLLM's batch chat route. Two rules
keep an answer off the wrong row: choices are matched by their ``index``, never by their place, and a reply
whose indexes are not exactly the ones asked for is refused whole.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jiter
import pydantic_core

from .records import Ask, Failure, FailureKind, Reply, Route

__all__ = ["Malformed", "RowStream", "StreamFailed", "decode", "encode", "error_message", "kind_of", "path_of"]

_PATHS = {
    Route.COMPLETIONS: "/v1/completions",
    Route.CHAT_BATCH: "/v1/chat/completions/batch",
    Route.CHAT: "/v1/chat/completions",
    Route.GENERATE: "/generate",
}
STREAM_INTERVAL = 64
"""Tokens between two chunks of a streamed row. A row's last chunk comes when it is done, whatever the interval;
an interval without end would make a long answer look like a hung server."""


_LONGEST_LINE = 64 << 20
# vLLM's two refusals by a bounded queue, and what other servers say.
_FULL = re.compile(r"busy|queue|backlog|overload|capacity|try again|too many", re.IGNORECASE)
_MARKUP = re.compile(r"<(?:style|script|!--).*?(?:</style>|</script>|-->)|<[^>]*>", re.DOTALL | re.IGNORECASE)


class Malformed(ValueError):  # noqa: N818 - names what the reply is
    """A reply that cannot be matched to the prompts it should answer; the message says how."""


class StreamFailed(Exception):  # noqa: N818 - names what happened
    """The server reported an error inside a stream. Carries ``failure`` (without the endpoint)."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.message)
        self.failure = failure


def path_of(route: Route) -> str:
    """The path a route is posted to, below the endpoint's base address."""
    return _PATHS[route]


def encode(
    route: Route,
    ask: Ask,
    texts: Sequence[str],
    *,
    max_tokens: int,
    stream: bool = False,
    wrapped: bool = False,
    token_ids: bool = False,
    extra: Mapping[str, Any] | None = None,
) -> bytes:
    """Build a request body: one JSON encode a batch.

    Parameters
    ----------
    route : Route
        How the server is asked; a route that takes no lists takes exactly one text.
    ask : Ask
        What the rows have in common.
    texts : sequence of str
        The prompts: already wrapped in the chat template for ``COMPLETIONS``, bare for the chat routes.
    max_tokens : int
        Tokens each row may generate.
    stream : bool
        Ask for rows as they finish (``COMPLETIONS`` only).
    wrapped : bool
        The texts hold the template's own special tokens, so the server must not add any.
    token_ids : bool
        Ask for token ids, from which tokens a row are counted in a reply that is not streamed.
    extra : mapping, optional
        Further fields, e.g. a ``cache_salt``.

    Returns
    -------
    bytes
        JSON, UTF-8.

    Examples
    --------
    >>> encode(Route.GENERATE, Ask(), ["Hi"], max_tokens=8)
    b'{"prompt":"Hi"}'
    """
    if route is Route.GENERATE:
        return _dump({"prompt": texts[0]})
    body: dict[str, Any] = {"model": ask.model, **ask.params, **(extra or {}), "max_tokens": max_tokens}
    if ask.n > 1:
        body["n"] = ask.n
    if route is Route.COMPLETIONS:
        body["prompt"] = list(texts)
        if wrapped:
            body["add_special_tokens"] = False
        if stream:
            body["stream"] = True
            body["stream_interval"] = STREAM_INTERVAL
            body["stream_options"] = {"include_usage": True, "continuous_usage_stats": True}
    else:
        chats = [_messages(ask.system, text) for text in texts]
        body["messages"] = chats if route is Route.CHAT_BATCH else chats[0]
    if token_ids and not stream:
        body["return_token_ids"] = True
    return _dump(body)


def _messages(system: str | None, text: str) -> list[dict[str, str]]:
    user = {"role": "user", "content": text}
    return [{"role": "system", "content": system}, user] if system is not None else [user]


def _dump(body: Mapping[str, Any]) -> bytes:
    # Not ASCII-escaped: scientific text is full of Greek, and escapes triple its bytes. What pydantic's writer, three
    # times as quick as Python's, cannot write is Python's: a lone surrogate needs the escape, for one.
    try:
        return pydantic_core.to_json(body)
    except ValueError:
        return json.dumps(body, separators=(",", ":")).encode()


def decode(route: Route, data: bytes, n_prompts: int, n: int = 1) -> list[Reply]:
    """Read a whole reply.

    Returns
    -------
    list of Reply
        ``n_prompts * n`` of them, samples of a prompt side by side, prompts in request order.

    Raises
    ------
    Malformed
        Not JSON, not a completion, or the choices' indexes are not those asked for.

    Examples
    --------
    >>> a, b = '{"index":0,"text":"a","finish_reason":"stop"}', '{"index":1,"text":"b","finish_reason":"stop"}'
    >>> body = f'{{"choices":[{b},{a}]}}'.encode()
    >>> [r.text for r in decode(Route.COMPLETIONS, body, 2)]
    ['a', 'b']
    """
    try:
        body = jiter.from_json(data, cache_mode="keys")
    except ValueError as exc:
        raise Malformed(f"the reply is not JSON ({exc}): {_shown(data)}") from exc
    if not isinstance(body, dict):
        raise Malformed(f"the reply is not a JSON object: {_shown(data)}")
    if route is Route.GENERATE:
        text = body.get("response", body.get("text"))
        if not isinstance(text, str):
            raise Malformed(f'the reply has neither "response" nor "text": {_shown(data)}')
        return [Reply(0, 0, text, "stop", None, None, None)]
    choices = body.get("choices")
    if not isinstance(choices, list):
        raise Malformed(f'the reply has no list of "choices": {_shown(data)}')
    usage = body.get("usage") if n_prompts == 1 and n == 1 else None
    slots: list[Reply | None] = [None] * (n_prompts * n)
    read = _read_completion if route is Route.COMPLETIONS else _read_chat
    for choice in choices:
        index = _index(choice, len(slots))
        if slots[index] is not None:
            raise Malformed(f"the choice with index {index} came twice")
        slots[index] = read(choice, index, n, usage)
    replies = [reply for reply in slots if reply is not None]
    if len(replies) != len(slots):
        missing = next(i for i, reply in enumerate(slots) if reply is None)
        raise Malformed(f"{len(slots) - len(replies)} of {len(slots)} choices are missing, the first is {missing}")
    return replies


def _index(choice: Any, slots: int) -> int:
    index = choice.get("index") if isinstance(choice, dict) else None
    if type(index) is not int or not 0 <= index < slots:
        raise Malformed(f"a choice has the index {index!r}; 0 to {slots - 1} were asked for")
    return index


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    if value is None:
        return ""
    raise Malformed(f"a choice's text is of type {type(value).__name__}")


def _reason(choice: Mapping[str, Any]) -> str:
    reason = choice.get("finish_reason")
    if isinstance(reason, str) or not reason:
        return reason or ""
    raise Malformed(f"a choice's finish_reason is of type {type(reason).__name__}")


def _counts(choice: Mapping[str, Any], usage: Any) -> tuple[int | None, int | None]:
    """Prompt and completion tokens of one choice, from its ids or from the usage of a one-choice reply."""
    if isinstance(usage, dict):
        return _count(usage.get("prompt_tokens")), _count(usage.get("completion_tokens"))
    prompt_ids, ids = choice.get("prompt_token_ids"), choice.get("token_ids")
    if prompt_ids is None and ids is None:
        return None, None
    return len(prompt_ids) if isinstance(prompt_ids, list) else None, len(ids) if isinstance(ids, list) else None


def _count(value: Any) -> int | None:
    """A number of tokens; what cannot be one is as good as none."""
    return value if type(value) is int and 0 <= value < 1 << 31 else None


def _read_completion(choice: Mapping[str, Any], index: int, n: int, usage: Any) -> Reply:
    prompt, sample = divmod(index, n) if n > 1 else (index, 0)
    text, reason = choice.get("text"), choice.get("finish_reason")
    if type(text) is not str or type(reason) is not str:  # a million rows are worth two calls less each
        text, reason = _text(text), _reason(choice)
    return Reply(prompt, sample, text, reason, *_counts(choice, usage), None)


def _read_chat(choice: Mapping[str, Any], index: int, n: int, usage: Any) -> Reply:
    prompt, sample = divmod(index, n)
    message = choice.get("message")
    if not isinstance(message, dict):
        raise Malformed(f"the choice with index {index} has no message")
    reasoning = message.get("reasoning") or message.get("reasoning_content")
    thought = reasoning if isinstance(reasoning, str) else None
    return Reply(prompt, sample, _text(message.get("content")), _reason(choice), *_counts(choice, usage), thought)


class RowStream:
    """Reads a streamed completion and hands out rows as they finish.

    Parameters
    ----------
    n_prompts, n : int
        Prompts in the request and samples a prompt.

    Attributes
    ----------
    done : bool
        ``[DONE]`` has come. A stream that ends without it was cut.
    aborted : bool
        A row ended with ``finish_reason="abort"``: it is not handed out, and must be asked again.
    chunks : int
        Chunks that carried text: tells a server that honours ``stream_interval`` from one that does not.

    Examples
    --------
    >>> rows = RowStream(1)
    >>> rows.feed(b'data: {"choices":[{"index":0,"text":"Par","finish_reason":null}]}\\n\\n')
    []
    >>> [r.text for r in rows.feed(b'data: {"choices":[{"index":0,"text":"is","finish_reason":"stop"}]}\\n\\n')]
    ['Paris']
    """

    def __init__(self, n_prompts: int, n: int = 1) -> None:
        self.done = False
        self.aborted = False
        self.chunks = 0
        self._n = n
        self._slots = n_prompts * n
        self._parts: list[list[str] | None] = [[] for _ in range(self._slots)]  # None once finished
        self._samples: dict[int, list[Reply]] = {}
        self._tail = b""
        self._empty = True

    def feed(self, data: bytes) -> list[Reply]:
        """Take bytes as they come; return the rows that they complete, all samples of a row together.

        Raises
        ------
        Malformed
            What came is not a completion stream, or names a choice that was not asked for or is over.
        StreamFailed
            The server reported an error.
        """
        self._empty = self._empty and not data
        lines = (self._tail + data).split(b"\n")
        self._tail = lines.pop()
        if len(self._tail) > _LONGEST_LINE:
            raise Malformed(f"a line of the stream is longer than {_LONGEST_LINE:,} bytes: {_shown(self._tail)}")
        finished: list[Reply] = []
        for line in filter(None, lines):
            if not line.startswith(b"data:"):
                if line != b"\r" and not line.startswith((b":", b"event:", b"id:", b"retry:")):
                    raise Malformed(f"not a line of an event stream: {_shown(line)}")
                continue
            payload = line[5:].strip()
            if payload == b"[DONE]":
                self.done = True
            else:
                self._chunk(payload, finished)
        return finished

    def end(self) -> list[Reply]:
        """No more bytes will come: read a last line that lacks its end, if it is whole; raises like ``feed``."""
        if self._empty:
            raise Malformed("the reply is empty")
        if b"data:".startswith(tail := self._tail[:5]):
            try:
                if (payload := self._tail[5:].strip()) != b"[DONE]":
                    jiter.from_json(payload)
            except ValueError:
                return []  # cut in the middle of an event
        return self.feed(b"\n") if tail else []

    def _chunk(self, payload: bytes, finished: list[Reply]) -> None:
        try:
            body = jiter.from_json(payload, cache_mode="keys")
            choices = body.get("choices")
        except (ValueError, AttributeError) as exc:
            raise Malformed(f"a chunk of the stream is not a JSON object: {_shown(payload)}") from exc
        if choices is None:
            raise _stream_failure(body, payload)
        if not isinstance(choices, list):
            raise Malformed(f'a chunk of the stream has no list of "choices": {_shown(payload)}')
        for choice in choices:
            index = _index(choice, self._slots)
            parts = self._parts[index]
            if parts is None:
                raise Malformed(f"the choice with index {index} goes on after its end")
            if text := _text(choice.get("text")):
                self.chunks += 1
                parts.append(text)
            if reason := _reason(choice):
                self._parts[index] = None
                self._finish(index, "".join(parts), reason, body.get("usage"), finished)

    def _finish(self, index: int, text: str, reason: str, usage: Any, finished: list[Reply]) -> None:
        if reason == "abort":
            self.aborted = True
            return
        prompt, sample = divmod(index, self._n)
        reply = Reply(prompt, sample, text, reason, *_counts({}, usage), None)
        if self._n == 1:
            finished.append(reply)
            return
        samples = self._samples.setdefault(prompt, [])
        samples.append(reply)
        if len(samples) == self._n:
            finished.extend(sorted(samples, key=lambda r: r.sample))


def _stream_failure(body: Mapping[str, Any], payload: bytes) -> Exception:
    error = body.get("error")
    if error is None:
        return Malformed(f'a chunk of the stream has no "choices": {_shown(payload)}')
    code = error.get("code") if isinstance(error, dict) else None
    status = int(str(code)) if str(code).isdecimal() else 500
    message = error_message(body)
    return StreamFailed(Failure(kind_of(status, message), message, status=status))


def kind_of(status: int, message: str, retry_after_s: float | None = None) -> FailureKind:
    """What an HTTP status means, or the code of an error inside a stream.

    Examples
    --------
    >>> str(kind_of(503, "The engine is currently busy and cannot accept new requests.")), str(kind_of(503, ""))
    ('queue full', 'server error')
    """
    if status == 429 or (status == 503 and (retry_after_s is not None or _FULL.search(message))):
        return FailureKind.BUSY
    if status in (401, 403, 404, 405) or 200 < status < 400:
        return FailureKind.DENIED
    if status >= 500 or status <= 200 or status in (408, 409, 425):
        return FailureKind.SERVER
    return FailureKind.REJECTED


def error_message(body: Any) -> str:
    """The server's own words in an error body, whatever shape it has.

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
    if text.lstrip().startswith("<"):  # a proxy's page
        text = _MARKUP.sub(" ", text)
    return " ".join(text.split())[:1000]


def _shown(data: bytes) -> str:
    text = data[:120].decode(errors="replace")
    return repr(text + ("..." if len(data) > 120 else ""))
