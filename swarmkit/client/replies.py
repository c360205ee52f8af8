"""The formats of whole replies, which become ``Reply`` tuples. No I/O.

Two rules keep an answer from reaching the wrong row: choices are matched by their ``index``, never by their position,
and a reply whose indexes are not exactly those requested is rejected as a whole.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from operator import itemgetter
from typing import Any

from ..records import Reply, Route, Usage
from .error_replies import Malformed, error_message, reply_failure, shown
from .json_bytes import read_json
from .vectors import length_of, pack

__all__ = [
    "EVENTS",
    "UNFINISHED",
    "counts_of",
    "decode_counted",
    "index_of",
    "logprobs_of",
    "longest_reply",
    "problem_of",
    "reason_of",
    "text_of",
]

_TOKEN_CHARS = 8  # characters of a token on average, at most
_LONGEST_VECTOR = 1 << 20  # bytes: 16,384 numbers of 20 digits and their signs are fewer
_TEXT_PARTS, _THOUGHTS = ("text", "output_text"), ("thinking", "reasoning")
# Finish reasons of answers that a filter of the server held back.
_FILTERED = {"content_filter", "safety", "recitation", "prohibited_content", "refusal"}
EVENTS = (b"data:", b"event:", b"id:", b"retry:", b":")  # how a stream begins
UNFINISHED = ("abort", "error")
"""Finish reasons of rows that the server gave up: they are sent again."""


def longest_reply(tokens: int, logprobs: bool = False, vectors: int = 0) -> int:
    """Bytes of a reply with so many tokens and vectors, at most: streams send a chunk of some hundred bytes a token."""
    return (64 << 20) + tokens * (4096 if logprobs else 512) + vectors * _LONGEST_VECTOR


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
        body = _as_whole(data) if data[:64].lstrip().startswith(EVENTS) else read_json(data)
    except (ValueError, AttributeError, TypeError) as exc:
        raise Malformed(f"the reply is not JSON ({exc}): {shown(data)}") from exc
    if isinstance(body, list):
        body = _joined(body)
    if not isinstance(body, dict):
        raise Malformed(f"the reply is not a JSON object: {shown(data)}")
    if route is Route.GENERATE:
        text = body.get("response", body.get("text"))
        if not isinstance(text, str):
            raise Malformed(f'the reply has neither "response" nor "text": {shown(data)}')
        return [Reply(0, 0, text, "stop", None, None, None)], None
    name = "data" if route is Route.EMBEDDINGS else "choices"
    choices = body.get(name)
    if not isinstance(choices, list) or (body.get("error") and not choices):
        raise reply_failure(body, data, name)
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
        index = index_of(choice, len(slots))
        if slots[index] is not None:
            raise Malformed(f"the choice with index {index} is there twice")
        reply = read(choice, index, n, usage)
        slots[index] = Reply(*reply[:8], logprobs_of(choice.get("logprobs"))) if logprobs else reply
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


def index_of(choice: Any, slots: int) -> int:
    """The place of a choice; raises ``Malformed`` for one that was not requested."""
    index = choice.get("index") if isinstance(choice, dict) else None
    if index is None and slots == 1 and isinstance(choice, dict):
        return 0  # the only one
    if type(index) is not int or not 0 <= index < slots:
        raise Malformed(f"a choice has the index {index!r}; 0 to {slots - 1} were requested")
    return index


def text_of(value: Any) -> str:
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
            raise Malformed(f"a choice's text has a part that is no text: {shown(json.dumps(part).encode())}")
    return "".join(texts)


def reason_of(choice: Mapping[str, Any]) -> str:
    """Why an answer ended; "" for one that goes on."""
    reason = choice.get("finish_reason")
    if isinstance(reason, str) or not reason:
        return reason or ""
    raise Malformed(f"a choice's finish_reason is of type {type(reason).__name__}")


def problem_of(choice: Mapping[str, Any], text: Any, reason: str, message: Mapping[str, Any]) -> str | None:
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


def counts_of(choice: Mapping[str, Any], usage: Any) -> tuple[int | None, int | None]:
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
    if not plain or indexes != tuple(range(n_slots)) or counts_of(choices[0], None) != (None, None):
        return None
    none = itertools.repeat(None)
    fields = indexes, itertools.repeat(0), texts, reasons, none, none, none, none, none
    return list(map(Reply._make, zip(*fields, strict=False)))


def _read_completion(choice: Mapping[str, Any], index: int, n: int, usage: Any) -> Reply:
    prompt, sample = divmod(index, n) if n > 1 else (index, 0)
    text, reason = choice.get("text"), choice.get("finish_reason")
    if type(text) is str and reason in ("stop", "length"):  # saves calls a row
        return Reply(prompt, sample, text, reason, *counts_of(choice, usage), None)
    reason = reason_of(choice)
    problem = problem_of(choice, text, reason, {})
    return Reply(prompt, sample, text_of(text), reason, *counts_of(choice, usage), None, problem)


def _read_chat(choice: Mapping[str, Any], index: int, n: int, usage: Any) -> Reply:
    prompt, sample = divmod(index, n)
    message = choice.get("message")
    if not isinstance(message, dict):
        raise Malformed(f"the choice with index {index} has no message")
    reasoning = message.get("reasoning") or message.get("reasoning_content")
    thought = reasoning if isinstance(reasoning, str) else None
    content, reason = message.get("content"), reason_of(choice)
    problem = problem_of(choice, content, reason, message)
    return Reply(prompt, sample, text_of(content), reason, *counts_of(choice, usage), thought, problem)


def _read_vector(item: Mapping[str, Any], index: int, n: int, usage: Any) -> Reply:
    try:
        text, finite = pack(item.get("embedding"))
    except ValueError as exc:
        raise Malformed(f"the vector with index {index} {exc}") from exc
    problem = None if finite else "the vector has numbers that are not finite"
    return Reply(index, 0, text, "", None, None, None, problem)


_READ = {Route.COMPLETIONS: _read_completion, Route.EMBEDDINGS: _read_vector}


def logprobs_of(found: Any) -> list[dict[str, Any]] | None:
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
