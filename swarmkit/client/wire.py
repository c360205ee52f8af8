"""Request and reply formats: requests as bytes, replies as ``Reply`` tuples. No I/O.

Protocol: OpenAI's completions and chat completions as vLLM serves them, and vLLM's batch chat route. Two rules
keep an answer from reaching the wrong row: choices are matched by their ``index``, never by their position, and a
reply whose indexes are not exactly those requested is rejected as a whole.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Collection, Mapping, Sequence
from operator import itemgetter
from typing import Any

import jiter
import pydantic_core

from ..records import MOST_LOGPROBS, Failure, FailureKind, Reply, RequestSpec, Route, Usage
from .vectors import length_of, pack

__all__ = [
    "LOGPROB_FIELDS",
    "OPTIONAL",
    "PRIORITY",
    "TOKEN_LIMIT",
    "UNFINISHED",
    "Malformed",
    "RowStream",
    "StreamFailed",
    "conversation",
    "decode_counted",
    "encode",
    "error_message",
    "kind_of",
    "longest_reply",
    "path_of",
    "read_json",
    "refuses_key",
]

_PATHS = {
    Route.COMPLETIONS: "/v1/completions",
    Route.CHAT_BATCH: "/v1/chat/completions/batch",
    Route.CHAT: "/v1/chat/completions",
    Route.GENERATE: "/generate",
    Route.EMBEDDINGS: "/v1/embeddings",
}
STREAM_INTERVAL = 64
"""Tokens between two chunks of a streamed row. A row's last chunk comes when the row is done, whatever the interval;
with a very long interval a long answer would look like a server that hangs."""

OPTIONAL = (
    *("stream_interval", "continuous_usage_stats", "stream_options", "return_token_ids", "cache_salt"),
    "encoding_format",
)
"""Fields that make requests cheaper or tell more, and that requests do without where a server refuses them.
``add_special_tokens`` is none, since prompts would have two first tokens."""

PRIORITY = "priority"
"""The field by which vLLM orders requests, if it was started with that policy; where it was not, some versions refuse
it."""

TOKEN_LIMIT = "max_tokens"
"""The field that bounds an answer. Where chats refuse it, it goes by its newer name, ``max_completion_tokens``."""

LOGPROB_FIELDS = ("logprobs", "top_logprobs", "logprob_token_ids", "return_tokens_as_token_ids")

_LONGEST_LINE = 64 << 20
_TOKEN_CHARS = 8  # characters of a token on average, at most
_LONGEST_VECTOR = 1 << 20  # bytes: 16,384 numbers of 20 digits and their signs are fewer
# Finish reasons of answers that a filter of the server held back.
_TEXT_PARTS, _THOUGHTS = ("text", "output_text"), ("thinking", "reasoning")
_FILTERED = {"content_filter", "safety", "recitation", "prohibited_content", "refusal"}
# Words in the messages of servers whose queue is full: vLLM's two, and those of other servers.
_FULL = re.compile(r"busy|queue|backlog|overload|capacity|try again|too many", re.IGNORECASE)
_BOM = "\ufeff".encode()
_EVENTS = (b"data:", b"event:", b"id:", b"retry:", b":")  # how a stream begins
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


UNFINISHED = ("abort", "error")
"""Finish reasons of rows that the server gave up: they are sent again."""


class StreamFailed(Exception):  # noqa: N818 - named after the event
    """The server reported an error inside a stream, or a reply. ``failure`` has it, without the endpoint's name."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure)
        self.failure = failure

    def __str__(self) -> str:
        return self.failure.message


def longest_reply(tokens: int, logprobs: bool = False, vectors: int = 0) -> int:
    """Bytes of a reply with so many tokens and vectors, at most: streams send a chunk of some hundred bytes a token."""
    return (64 << 20) + tokens * (4096 if logprobs else 512) + vectors * _LONGEST_VECTOR


def path_of(route: Route) -> str:
    """The path of a route, relative to the endpoint's base address."""
    return _PATHS[route]


def encode(
    route: Route,
    spec: RequestSpec,
    texts: Sequence[str],
    *,
    max_tokens: int,
    stream: bool = False,
    wrapped: bool = False,
    token_ids: bool = False,
    extra: Mapping[str, Any] | None = None,
    lists: bool = True,
    omit: Collection[str] = (),
) -> bytes:
    """Build the body of one request.

    Parameters
    ----------
    route : Route
        The API route; a route that does not take lists gets exactly one text.
    spec : RequestSpec
        What the rows of the run have in common.
    texts : sequence of str
        The prompts: with the chat template applied for ``COMPLETIONS``, without it for the chat routes.
    max_tokens : int
        Tokens each row may generate.
    stream : bool
        Request rows as they finish (``COMPLETIONS`` only).
    wrapped : bool
        The texts hold the template's special tokens, so the server must not add any.
    token_ids : bool
        Request token ids, by which the tokens of each row are counted in a reply that is not streamed. A reply of one
        choice has the counts in its ``usage``, so they are not requested there.
    extra : mapping, optional
        Further fields, e.g. a ``cache_salt``.
    lists : bool
        Send one text as a list of one; False sends it as a string, for servers that take nothing else.
    omit : collection of str
        Fields that the server refuses, and ``TOKEN_LIMIT``, if its chats refuse that name.

    Returns
    -------
    bytes
        JSON, UTF-8.

    Examples
    --------
    >>> encode(Route.GENERATE, RequestSpec(), ["Hi"], max_tokens=8)
    b'{"prompt":"Hi"}'
    """
    if route is Route.GENERATE:
        return _dump({"prompt": texts[0]})
    if route is Route.EMBEDDINGS:
        asked = {"model": spec.model, "encoding_format": "base64", **spec.params}
        asked["input"] = list(texts) if lists or len(texts) > 1 else texts[0]
        return _dump({name: value for name, value in asked.items() if name not in omit})
    limit = TOKEN_LIMIT
    if TOKEN_LIMIT in omit and route is not Route.COMPLETIONS:
        limit = "max_completion_tokens"
    body: dict[str, Any] = {"model": spec.model, **spec.params, **(extra or {}), limit: max_tokens}
    if spec.n > 1:
        body["n"] = spec.n
    if spec.logprobs is not None:
        most = spec.logprobs if isinstance(spec.logprobs, int) else MOST_LOGPROBS
        body |= {"logprobs": most} if route is Route.COMPLETIONS else {"logprobs": True, "top_logprobs": most}
        if isinstance(spec.logprobs, tuple):  # texts of tokens may collide
            body |= {"logprob_token_ids": list(spec.logprobs), "return_tokens_as_token_ids": True}
    if route is Route.COMPLETIONS:
        body["prompt"] = list(texts) if lists or len(texts) > 1 else texts[0]
        if wrapped:
            body.setdefault("add_special_tokens", False)
        if stream:
            body["stream"] = True
            body["stream_interval"] = STREAM_INTERVAL
            body["stream_options"] = {"include_usage": True, "continuous_usage_stats": True}
            if "continuous_usage_stats" in omit:
                body["stream_options"] = {"include_usage": True}
    else:
        chats = [conversation(spec, text) for text in texts]
        body["messages"] = chats if route is Route.CHAT_BATCH else chats[0]
        if spec.assistant_prefix is not None:  # both: servers refuse the one without the other
            body = {"add_generation_prompt": False, "continue_final_message": True, **body}
    if token_ids and not stream and len(texts) * spec.n > 1:
        body["return_token_ids"] = True
    for name in omit:
        if name != TOKEN_LIMIT:
            body.pop(name, None)
    return _dump(body)


def conversation(spec: RequestSpec, text: str) -> list[dict[str, str]]:
    """The messages of a row: the system prompt, the examples, its own, and the first words of the answer.

    A conversation that begins with a system prompt of its own keeps that one.

    Examples
    --------
    >>> spec = RequestSpec(system="Be brief.", assistant_prefix="It is")
    >>> [message["role"] for message in conversation(spec, "Hi")]
    ['system', 'user', 'assistant']
    """
    own: list[dict[str, str]] = json.loads(text) if spec.conversations else [_message("user", text)]
    system = [_message("system", spec.system)] if spec.system is not None else []
    if own[0]["role"] == "system":
        system, own = own[:1], own[1:]
    shown = [_message(*turn) for pair in spec.examples for turn in zip(("user", "assistant"), pair, strict=True)]
    begun = [_message("assistant", spec.assistant_prefix)] if spec.assistant_prefix is not None else []
    return [*system, *shown, *own, *begun]


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _dump(body: Mapping[str, Any]) -> bytes:
    # Not ASCII-escaped: scientific text is full of Greek, whose escapes take three times the bytes. pydantic's writer
    # is three times as fast as Python's; Python's writes what pydantic's refuses, such as a lone surrogate.
    try:
        return pydantic_core.to_json(body)
    except ValueError:
        return json.dumps(body, separators=(",", ":")).encode()


def decode_counted(
    route: Route, data: bytes, n_prompts: int, n: int = 1, prompt_chars: int = 0, logprobs: bool = False
) -> tuple[list[Reply], Usage | None]:
    """Read a reply that is not streamed.

    Parameters
    ----------
    route, data, n_prompts, n
        The reply, and what was asked for.
    prompt_chars : int
        Characters of all prompts: some servers count the tokens of the first prompt and answer only, and such counts
        are left out.
    logprobs : bool
        Whether the log-probabilities of the answers' tokens are read, too.

    Returns
    -------
    list of Reply
        ``n_prompts * n`` of them: prompts in request order, the samples of a prompt next to each other.
    Usage or None
        The tokens of a reply that does not tell them for each answer.

    Raises
    ------
    Malformed
        The reply is not JSON or not a completion, or the indexes of its choices are not those requested.
    StreamFailed
        The reply is an error with a status of its own.

    Examples
    --------
    >>> a, b = '{"index":0,"text":"a","finish_reason":"stop"}', '{"index":1,"text":"b","finish_reason":"stop"}'
    >>> replies, _ = decode_counted(Route.COMPLETIONS, f'{{"choices":[{b},{a}]}}'.encode(), 2)
    >>> [reply.text for reply in replies]
    ['a', 'b']
    """
    try:
        body = _as_whole(data) if data[:64].lstrip().startswith(_EVENTS) else read_json(data)
    except (ValueError, AttributeError, TypeError) as exc:
        raise Malformed(f"the reply is not JSON ({exc}): {_shown(data)}") from exc
    if isinstance(body, list):
        body = _joined(body)
    if not isinstance(body, dict):
        raise Malformed(f"the reply is not a JSON object: {_shown(data)}")
    if route is Route.GENERATE:
        text = body.get("response", body.get("text"))
        if not isinstance(text, str):
            raise Malformed(f'the reply has neither "response" nor "text": {_shown(data)}')
        return [Reply(0, 0, text, "stop", None, None, None)], None
    name = "data" if route is Route.EMBEDDINGS else "choices"
    choices = body.get(name)
    if not isinstance(choices, list) or (body.get("error") and not choices):
        raise _reply_failure(body, data, name)
    if route is Route.EMBEDDINGS:
        return _vectors(choices, n_prompts, body.get("usage"), prompt_chars)
    usage = body.get("usage") if n_prompts == 1 and n == 1 else None
    replies = None
    if route is Route.COMPLETIONS and n == 1 and usage is None and not logprobs:
        replies = _plain_replies(choices, n_prompts)
    if replies is None:
        replies = _replies(route, choices, n_prompts * n, n, usage, logprobs)
    return replies, None if usage else _usage(body.get("usage"), replies, prompt_chars)


def _replies(route: Route, choices: list[Any], n_slots: int, n: int, usage: Any, logprobs: bool) -> list[Reply]:
    """The choices in the order of their indexes; raises ``Malformed`` unless each index is there once."""
    slots: list[Reply | None] = [None] * n_slots
    read = _READ.get(route, _read_chat)
    for choice in choices:
        index = _index(choice, len(slots))
        if slots[index] is not None:
            raise Malformed(f"the choice with index {index} is there twice")
        reply = read(choice, index, n, usage)
        slots[index] = Reply(*reply[:8], _logprobs(choice.get("logprobs"))) if logprobs else reply
    replies = [reply for reply in slots if reply is not None]
    if len(replies) != len(slots):
        missing = next(i for i, reply in enumerate(slots) if reply is None)
        raise Malformed(f"{len(slots) - len(replies)} of {len(slots)} choices are missing, the first is {missing}")
    return replies


def _vectors(items: list[Any], n_prompts: int, usage: Any, prompt_chars: int) -> tuple[list[Reply], Usage | None]:
    """The vectors of a reply in the order of their indexes, and the tokens of its texts; raises as ``_replies``."""
    replies = _replies(Route.EMBEDDINGS, items, n_prompts, 1, None, False)
    good = [reply.text for reply in replies if reply.problem is None]
    if good and not length_of(good):
        raise Malformed("the vectors of the reply differ in length")
    tokens = _count(usage.get("prompt_tokens")) if isinstance(usage, dict) else None
    if tokens is None or prompt_chars > _TOKEN_CHARS * tokens:
        return replies, None
    if n_prompts == 1:
        return [replies[0]._replace(prompt_tokens=tokens, completion_tokens=0)], None
    return replies, Usage(tokens, 0)


def _as_whole(data: bytes) -> Any:
    """The reply that a stream stands for, of a server that streams whether it is asked to or not; its first error, if
    it has one. Raises ``ValueError`` where it is cut or goes on after its end, and others where its types are odd."""
    whole: dict[str, Any] = {}
    choices: dict[Any, dict[str, Any]] = {}
    payloads = [line[5:].strip() for line in data.splitlines() if line.startswith(b"data:")]
    for chunk in [read_json(payload) for payload in payloads if payload != b"[DONE]"]:
        if chunk is None:
            continue  # some servers begin so
        if chunk.get("error") and not chunk.get("choices"):
            return chunk
        whole |= {"usage": chunk["usage"]} if chunk.get("usage") else {}
        for part in chunk.get("choices") or ():
            choice = choices.setdefault(part.get("index"), {"index": part.get("index"), "message": {}})
            if choice.get("finish_reason"):
                raise ValueError("a choice of a stream goes on after its end")
            _append(choice, {name: part[name] for name in part.keys() & {"text", "finish_reason", "error"}})
            _append(choice["message"], part.get("delta") or part.get("message") or {})
    if not (payloads and payloads[-1] == b"[DONE]") and not all(each.get("finish_reason") for each in choices.values()):
        raise ValueError("a stream was cut")
    return {**whole, "choices": list(choices.values())}


def _append(whole: dict[str, Any], part: Mapping[str, Any]) -> None:
    for name, value in part.items():
        if value is not None:
            whole[name] = whole[name] + value if isinstance(whole.get(name), str) and isinstance(value, str) else value


def _joined(replies: list[Any]) -> dict[str, Any] | None:
    """The answer to a list of prompts that comes as a list of completions (llama-server), as one; None if it is none.
    Its choices must have the indexes of one, too."""
    parts = [reply.get("choices") if isinstance(reply, dict) else None for reply in replies]
    lists = [part for part in parts if isinstance(part, list)]
    return {"choices": [choice for part in lists for choice in part]} if len(lists) == len(parts) > 0 else None


def _usage(usage: Any, replies: Sequence[Reply], prompt_chars: int) -> Usage | None:
    """The tokens of a whole reply; None where it has no such counts, or too few for its texts."""
    if not isinstance(usage, dict) or replies[0].completion_tokens is not None:
        return None
    prompts, completions = _count(usage.get("prompt_tokens")), _count(usage.get("completion_tokens"))
    if prompts is None or completions is None:
        return None
    chars = sum([len(reply.text) for reply in replies])
    enough = prompt_chars <= _TOKEN_CHARS * prompts and chars <= _TOKEN_CHARS * completions
    return Usage(prompts, completions) if enough else None


def read_json(data: bytes) -> Any:
    r"""Read JSON, also with half a surrogate pair in it (a model may stop within a character, and Python's own writer
    writes the half as an escape), and with a byte order mark.

    Raises
    ------
    ValueError
        It is not JSON.

    Examples
    --------
    >>> read_json(b'"\\ud83d"')
    '\ud83d'
    """
    try:
        return jiter.from_json(data, cache_mode="keys")
    except ValueError as exc:
        if data.startswith(_BOM) and not data.startswith(2 * _BOM):
            return read_json(data.removeprefix(_BOM))
        if "surrogate" not in str(exc) and "hex escape" not in str(exc):
            raise
    try:
        return json.loads(data)
    except RecursionError as exc:
        raise ValueError("it is nested too deeply") from exc


def _index(choice: Any, slots: int) -> int:
    index = choice.get("index") if isinstance(choice, dict) else None
    if index is None and slots == 1 and isinstance(choice, dict):
        return 0  # the only one
    if type(index) is not int or not 0 <= index < slots:
        raise Malformed(f"a choice has the index {index!r}; 0 to {slots - 1} were requested")
    return index


def _text(value: Any) -> str:
    """The text of a choice: a string, or parts of which some are text; "" for None."""
    if isinstance(value, str):
        return value
    if value is None:
        return ""
    if not isinstance(value, list):
        raise Malformed(f"a choice's text is of type {type(value).__name__}")
    texts: list[str] = []
    for part in value:
        kind, text = (part.get("type"), part.get("text")) if isinstance(part, dict) else (None, None)
        if kind in _TEXT_PARTS and isinstance(text, str):
            texts.append(text)
        elif kind not in _THOUGHTS:
            raise Malformed(f"a choice's text has a part that is no text: {_shown(json.dumps(part).encode())}")
    return "".join(texts)


def _reason(choice: Mapping[str, Any]) -> str:
    reason = choice.get("finish_reason")
    if isinstance(reason, str) or not reason:
        return reason or ""
    raise Malformed(f"a choice's finish_reason is of type {type(reason).__name__}")


def _problem(choice: Mapping[str, Any], text: Any, reason: str, message: Mapping[str, Any]) -> str | None:
    """Why a choice is no answer to its row, whatever text it has; None if it is one."""
    said = message.get("refusal") or choice.get("error") or message.get("error")
    words = f": {error_message(said)}" if said else ""
    if reason == "error":
        return f"the server ended a row with an error{words}"
    if reason.lower() in _FILTERED:
        return f"the server withholds the answer (finish_reason {reason!r}){words}"
    if message.get("refusal"):
        return f"the model refuses to answer{words}"
    if text is not None:
        return None
    if message.get("reasoning") or message.get("reasoning_content"):
        return f"the reasoning has no answer after it (finish_reason {reason!r}): a larger max_tokens= may leave room"
    return f"the answer has no text (finish_reason {reason or None!r}){words}"


def _counts(choice: Mapping[str, Any], usage: Any) -> tuple[int | None, int | None]:
    """Prompt and completion tokens of one choice: from its token ids, or from ``usage`` in a reply of one choice."""
    if isinstance(usage, dict):
        return _count(usage.get("prompt_tokens")), _count(usage.get("completion_tokens"))
    prompt_ids, ids = choice.get("prompt_token_ids"), choice.get("token_ids")
    if prompt_ids is None and ids is None:
        return None, None
    return len(prompt_ids) if isinstance(prompt_ids, list) else None, len(ids) if isinstance(ids, list) else None


def _count(value: Any) -> int | None:
    """A number of tokens; None for a value that cannot be one."""
    return value if type(value) is int and 0 <= value < 1 << 31 else None


_PLAIN = itemgetter("index", "text", "finish_reason")


def _plain_replies(choices: list[Any], n_slots: int) -> list[Reply] | None:
    """The choices of a reply that has all of them in order, each with a text and no token ids; None of any other.

    Nearly all replies are so, and to look at their choices together halves the time for them.
    """
    try:
        indexes, texts, reasons = zip(*map(_PLAIN, choices), strict=True)
        plain = {*map(type, indexes)} == {int} and {*map(type, texts)} == {str} and {*reasons} <= {"stop", "length"}
    except (KeyError, TypeError, ValueError):
        return None
    if not plain or indexes != tuple(range(n_slots)) or _counts(choices[0], None) != (None, None):
        return None
    none = itertools.repeat(None)
    fields = indexes, itertools.repeat(0), texts, reasons, none, none, none, none, none
    return list(map(Reply._make, zip(*fields, strict=False)))


def _read_completion(choice: Mapping[str, Any], index: int, n: int, usage: Any) -> Reply:
    prompt, sample = divmod(index, n) if n > 1 else (index, 0)
    text, reason = choice.get("text"), choice.get("finish_reason")
    if type(text) is str and reason in ("stop", "length"):  # saves calls a row
        return Reply(prompt, sample, text, reason, *_counts(choice, usage), None)
    reason = _reason(choice)
    problem = _problem(choice, text, reason, {})
    return Reply(prompt, sample, _text(text), reason, *_counts(choice, usage), None, problem)


def _read_chat(choice: Mapping[str, Any], index: int, n: int, usage: Any) -> Reply:
    prompt, sample = divmod(index, n)
    message = choice.get("message")
    if not isinstance(message, dict):
        raise Malformed(f"the choice with index {index} has no message")
    reasoning = message.get("reasoning") or message.get("reasoning_content")
    thought = reasoning if isinstance(reasoning, str) else None
    content, reason = message.get("content"), _reason(choice)
    problem = _problem(choice, content, reason, message)
    return Reply(prompt, sample, _text(content), reason, *_counts(choice, usage), thought, problem)


def _read_vector(item: Mapping[str, Any], index: int, n: int, usage: Any) -> Reply:
    try:
        text, finite = pack(item.get("embedding"))
    except ValueError as exc:
        raise Malformed(f"the vector with index {index} {exc}") from exc
    problem = None if finite else "the vector has numbers that are not finite"
    return Reply(index, 0, text, "", None, None, None, problem)


_READ = {Route.COMPLETIONS: _read_completion, Route.EMBEDDINGS: _read_vector}


def _logprobs(found: Any) -> list[dict[str, Any]] | None:
    """The tokens of a choice, in either shape of them, as those of a ``Reply``; None for what has neither."""
    try:
        if (tokens := found.get("tokens")) is not None:
            tops = found.get("top_logprobs") or [None] * len(tokens)
            return [
                {"token": token, "logprob": float(value), "top": {**(top or {})}}
                for token, value, top in zip(tokens, found["token_logprobs"], tops, strict=True)
            ]
        return [  # chats, and llama-server
            {
                "token": t["token"],
                "logprob": float(t["logprob"]),
                "top": {other["token"]: other["logprob"] for other in t.get("top_logprobs") or ()},
            }
            for t in found["content"]
        ]
    except (AttributeError, KeyError, TypeError, ValueError):
        return None


class RowStream:
    """Reads a streamed completion and returns rows as they finish. A whole reply that comes in place of the stream is
    read at its end.

    Parameters
    ----------
    n_prompts, n : int
        Prompts in the request, and samples for each prompt.
    logprobs : bool
        Whether the log-probabilities of the answers' tokens are read, too.

    Attributes
    ----------
    done : bool
        ``[DONE]`` was received. A stream that ends without it was cut.
    unfinished : str
        The ``finish_reason`` of a row that ended with "abort" or "error": it is not returned, and must be sent again;
        else "". ``why`` says more of an error.
    chunks : int
        Chunks with text received so far: few, if the server honours ``stream_interval``.
    progress : int
        Chunks so far that carry text or end a row. Comments, blank lines and empty chunks do not count.
    whole : bool
        It is no stream, but a whole reply.

    Examples
    --------
    >>> rows = RowStream(1)
    >>> rows.feed(b'data: {"choices":[{"index":0,"text":"Par","finish_reason":null}]}\\n\\n')
    []
    >>> [r.text for r in rows.feed(b'data: {"choices":[{"index":0,"text":"is","finish_reason":"stop"}]}\\n\\n')]
    ['Paris']
    """

    def __init__(self, n_prompts: int, n: int = 1, logprobs: bool = False) -> None:
        self.done = False
        self.unfinished = ""
        self.why = ""
        self.chunks = 0
        self.progress = 0
        self.whole = False
        self._n = n
        self._slots = n_prompts * n
        self._parts: list[list[str] | None] = [[] for _ in range(self._slots)]  # None once finished
        self._samples: dict[int, list[Reply]] = {}
        self._logprobs: dict[int, list[dict[str, Any]]] | None = {} if logprobs else None
        self._tail = b""
        self._empty = self._blank = True
        self._pieces: list[bytes] = []  # of a whole reply

    def restart(self) -> None:
        """Forget what has come: the request is sent again."""
        self.__init__(self._slots // self._n, self._n, self._logprobs is not None)  # type: ignore[misc] # a fresh one

    @property
    def indexes(self) -> int:
        """How many different choices have sent something so far."""
        return sum(parts is None or bool(parts) for parts in self._parts)

    def feed(self, data: bytes) -> list[Reply]:
        """Read the next bytes; return the rows that they complete, all samples of a row together.

        Raises
        ------
        Malformed
            The bytes are not a completion stream, or hold a choice that was not requested or has already ended.
        StreamFailed
            The server reported an error.
        """
        self._empty = self._empty and not data
        if self._blank and (begun := data.lstrip()):
            self._blank, self.whole = False, begun.startswith((b"{", b"["))
        if self.whole:
            self.progress += 1
            self._pieces.append(data)
            return []
        lines = (self._tail + data).split(b"\n")
        self._tail = lines.pop()
        if len(self._tail) > _LONGEST_LINE:
            raise Malformed(f"a line of the stream is longer than {_LONGEST_LINE:,} bytes: {_shown(self._tail)}")
        finished: list[Reply] = []
        for line in filter(None, lines):
            if not line.startswith(b"data:"):
                if line != b"\r" and not line.startswith(_EVENTS):
                    if (failure := _error_reply(line)) is not None:
                        raise failure
                    raise Malformed(f"this is not a line of an event stream: {_shown(line)}")
                continue
            payload = line[5:].strip()
            if payload == b"[DONE]":
                self.done = True
            else:
                self._chunk(payload, finished)
        return finished

    def end(self) -> list[Reply]:
        """Read a last line without a line break, if it is whole, after the last byte; raises like ``feed``."""
        if self._empty:
            raise Malformed("the reply is empty")
        if self.whole:
            return self._whole_reply()
        if b"data:".startswith(tail := self._tail[:5]):
            try:
                if (payload := self._tail[5:].strip()) != b"[DONE]":
                    read_json(payload)
            except ValueError:
                return []  # cut in the middle of an event
        return self.feed(b"\n") if tail else []

    def _whole_reply(self) -> list[Reply]:
        data, logprobs = b"".join(self._pieces), self._logprobs is not None
        replies, _ = decode_counted(Route.COMPLETIONS, data, self._slots // self._n, self._n, logprobs=logprobs)
        self.done, self._parts = True, [None] * self._slots
        unfinished = {reply.prompt: reply for reply in replies if reply.finish_reason in UNFINISHED}
        for reply in unfinished.values():
            self.unfinished, self.why = reply.finish_reason, self.why or reply.problem or ""
        return [reply for reply in replies if reply.prompt not in unfinished]

    def _chunk(self, payload: bytes, finished: list[Reply]) -> None:
        try:
            if (body := read_json(payload)) is None:
                return  # some servers begin so
            choices = body.get("choices")
        except (ValueError, AttributeError) as exc:
            raise Malformed(f"a chunk of the stream is not a JSON object: {_shown(payload)}") from exc
        if choices is None or (choices == [] and body.get("error")):
            raise _stream_failure(body, payload)
        if not isinstance(choices, list):
            raise Malformed(f'a chunk of the stream has no list of "choices": {_shown(payload)}')
        for choice in choices:
            index = _index(choice, self._slots)
            parts = self._parts[index]
            if parts is None:
                raise Malformed(f"the choice with index {index} goes on after its end")
            text = choice.get("text")
            if text := text if type(text) is str else _text(text):  # calls are most of what a chunk costs
                self.chunks += 1
                self.progress += 1
                parts.append(text)
            if self._logprobs is not None and (tokens := _logprobs(choice.get("logprobs"))):
                self._logprobs.setdefault(index, []).extend(tokens)
            if choice.get("finish_reason") and (reason := _reason(choice)):
                self.progress += 1
                self._parts[index] = None
                self._finish(index, "".join(parts), reason, choice, body.get("usage"), finished)

    def _finish(
        self, index: int, text: str, reason: str, choice: Mapping[str, Any], usage: Any, finished: list[Reply]
    ) -> None:
        if reason in UNFINISHED:
            self.unfinished = reason
            self.why = self.why or _problem(choice, text, reason, {}) or ""
            return
        prompt, sample = divmod(index, self._n)
        problem = None
        if not text or reason not in ("stop", "length"):
            problem = _problem(choice, text or choice.get("text"), reason, {})
        tokens = self._logprobs.pop(index, None) if self._logprobs else None
        reply = Reply(prompt, sample, text, reason, *_counts({}, usage), None, problem, tokens)
        if self._n == 1:
            finished.append(reply)
            return
        samples = self._samples.setdefault(prompt, [])
        samples.append(reply)
        if len(samples) == self._n:
            finished.extend(sorted(samples, key=lambda r: r.sample))


def _error_reply(line: bytes) -> Exception | None:
    """The error of a server that answers the request for a stream with a JSON object; None if this is none."""
    if not line.startswith(b"{"):
        return None
    try:
        body = read_json(line)
    except ValueError:
        return None
    return _reply_failure(body, line) if body.get("error") else None


def _reply_failure(body: Mapping[str, Any], data: bytes, name: str = "choices") -> Exception:
    """What a reply without choices means: an error, if it has a status of its own, as gateways send them."""
    error = body.get("error")
    status = _status(error.get("code") or error.get("status")) if isinstance(error, dict) else None
    if status is not None and 400 <= status < 600:
        return _failed(body, status)
    return Malformed(f'the reply has no list of "{name}": {_shown(data)}')


def _stream_failure(body: Mapping[str, Any], payload: bytes) -> Exception:
    error = body.get("error")
    if error is None:
        return Malformed(f'a chunk of the stream has no "choices": {_shown(payload)}')
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


def _shown(data: bytes) -> str:
    text = data[:120].decode(errors="replace")
    return repr(text + ("..." if len(data) > 120 else ""))
