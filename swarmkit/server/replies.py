"""Answers -> the JSON of a reply, whole or as a stream of server-sent events, in vLLM's shape.

A stream is written by string formatting: a request of 100 prompts has 200 chunks or more, and a dictionary
and an encoder call for each would be most of the server's work.
"""

from __future__ import annotations

import binascii
import json
import struct
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from json.encoder import encode_basestring_ascii as quote
from typing import Any

from .engines.base import THOUGHTS_BEGIN, THOUGHTS_END, Engine, Increment, TokenLogprobs
from .faults import Tamper
from .requests import Embedding, Generation

__all__ = ["PlainReply", "StreamReply", "to_json", "vectors_json"]

DONE = "data: [DONE]\n\n"


def to_json(value: object) -> bytes:
    """Compact JSON; ASCII only, so that lone surrogates survive."""
    return json.dumps(value, separators=(",", ":")).encode("ascii")


def _usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    return {
        "prompt_tokens": prompt_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "completion_tokens": completion_tokens,
    }


def vectors_json(asked: Embedding, vectors: Sequence[bytes], model: str, tamper: Tamper | None = None) -> bytes:
    """The JSON of a reply with vectors, float32 and little-endian."""
    write = _as_base64 if asked.base64 else _as_numbers
    written: list[Any] = [write(vector) for vector in vectors]
    order = list(range(len(vectors)))
    labels = [(i, i) for i in order]
    if tamper:
        written = ["?" if tamper.applies_to(i, "wrong_type") else each for i, each in enumerate(written)]
        labels = [(i, label) for i in tamper.order(order) for label in tamper.labels(i)]
    tokens = sum(prompt.n_tokens for prompt in asked.prompts)
    return to_json(
        {
            "object": "list",
            "data": [{"index": label, "object": "embedding", "embedding": written[i]} for i, label in labels],
            "model": model,
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        }
    )


def _as_base64(vector: bytes) -> str:
    return binascii.b2a_base64(vector, newline=False).decode("ascii")


def _as_numbers(vector: bytes) -> list[float]:
    return [number for (number,) in struct.iter_unpack("<f", vector)]


def _parse_reasoning(text: str) -> tuple[str | None, str | None]:
    """The thoughts and the answer, so far; all is thoughts until they are closed."""
    if not text.startswith(THOUGHTS_BEGIN):
        return None, text
    reasoning, _, content = text.removeprefix(THOUGHTS_BEGIN).partition(THOUGHTS_END)
    return reasoning, content or None


@dataclass(slots=True)
class _Row:
    """One answer so far; ``ends`` are the ends of its tokens in ``text``."""

    text: str = ""
    ends: Sequence[int] = ()
    ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    sent: int = 0
    finish: str | None = None
    stop_reason: str | None = None

    def add(self, new: Increment) -> None:
        if self.ends:
            start = len(self.text)
            self.ends = ends = self.ends if isinstance(self.ends, list) else list(self.ends)
            ends.extend([start + end for end in new.ends])
            self.text += new.text
        else:
            # Often the whole answer, with a range as its ends: no loop over the tokens.
            self.text, self.ends = new.text, new.ends
        if new.ids is not None:
            self.ids += new.ids
        if new.logprobs is not None:
            self.logprobs += new.logprobs
        if new.finish is not None:
            self.finish, self.stop_reason = new.finish, new.stop_reason


class _Reply:
    """The state of both kinds of reply."""

    def __init__(self, generation: Generation, engine: Engine, request_id: str, tamper: Tamper | None = None) -> None:
        self.generation = generation
        self.model = generation.sampling.adapter or engine.model
        self._decode = engine.decode
        self.id = f"{'cmpl' if generation.kind == 'completion' else 'chatcmpl'}-{request_id}"
        self.created = int(time.time())
        self.tamper = tamper
        self.rows = [_Row() for _ in range(len(generation.prompts) * generation.n)]
        self.unfinished = len(self.rows)

    @property
    def n_tokens(self) -> int:
        """Tokens generated so far."""
        return sum(len(row.ends) for row in self.rows)

    def _prompt_ids(self, index: int) -> list[int] | None:
        return self.generation.prompts[index // self.generation.n].ids if self.generation.sampling.want_ids else None

    def _name(self, token: int) -> str:
        return f"token_id:{token}" if self.generation.tokens_as_ids else self._decode([token])

    def _logprobs(self, places: Sequence[TokenLogprobs]) -> dict[str, Any] | None:
        """The log-probabilities of some tokens, in the shape of the route."""
        if self.generation.sampling.logprobs is None:
            return None
        named = [{self._name(t): p for t, p in place.by_id.items()} for place in places]
        chosen = [(self._name(place.id), place.by_id[place.id]) for place in places]
        if self.generation.kind == "completion":
            tokens, values = [token for token, _ in chosen], [value for _, value in chosen]
            return {"text_offset": [], "token_logprobs": values, "tokens": tokens, "top_logprobs": named}

        def entry(token: str, value: float) -> dict[str, Any]:
            return {"token": token, "logprob": value, "bytes": list(token.encode("utf-8", "replace"))}

        both = zip(chosen, named, strict=True)
        return {"content": [{**entry(*one), "top_logprobs": [entry(*o) for o in top.items()]} for one, top in both]}

    def _add(self, new: Increment) -> _Row:
        row = self.rows[new.index]
        row.add(new)
        self.unfinished -= new.finish is not None
        return row


class PlainReply(_Reply):
    """Collects the answers of a request and writes them as one body.

    Parameters
    ----------
    generation : Generation
    engine : Engine
        Names the tokens.
    request_id : str
    tamper : Tamper, optional
        A scripted fault that alters the choices.
    """

    def opening(self) -> str:
        """Nothing: the body is written at the end."""
        return ""

    def feed(self, increments: Iterable[Increment]) -> str:
        """Add the engine's increments; nothing is written yet."""
        for new in increments:
            self._add(new)
        return ""

    def body(self) -> bytes:
        """The JSON of the whole reply."""
        indices = range(len(self.rows))
        if self.tamper:
            order = self.tamper.order(list(indices))
            choices = [self._choice(i, label) for i in order for label in self.tamper.labels(i)]
        else:
            choices = [self._choice(i, i) for i in indices]
        reply: dict[str, Any] = {
            "id": self.id,
            "object": "text_completion" if self.generation.kind == "completion" else "chat.completion",
            "created": self.created,
            "model": self.model,
            "choices": choices,
            "usage": _usage(self.generation.prompt_tokens, self.n_tokens),
        }
        if self.generation.kind == "chat":
            reply["prompt_token_ids"] = self._prompt_ids(0)
            reply["prompt_text"] = self.generation.prompts[0].text if self.generation.prompt_text else None
        return to_json(reply)

    def _choice(self, index: int, label: int) -> dict[str, Any]:
        row = self.rows[index]
        content: str | int | None
        reasoning, content = _parse_reasoning(row.text) if self.generation.parse_reasoning else (None, row.text)
        finish = row.finish
        if self.tamper:
            content = 7 if self.tamper.applies_to(index, "wrong_type") else content
            finish = None if self.tamper.applies_to(index, "no_finish") else finish
        choice: dict[str, Any] = {"index": label}
        if self.generation.kind == "completion":
            choice["text"] = content
        else:
            choice["message"] = {"role": "assistant", "content": content, "reasoning": reasoning}
        choice["logprobs"] = self._logprobs(row.logprobs)
        choice["finish_reason"] = finish
        choice["stop_reason"] = row.stop_reason
        choice["token_ids"] = row.ids if self.generation.sampling.want_ids else None
        if self.generation.kind == "completion":
            choice["prompt_token_ids"] = self._prompt_ids(index)
        return choice


class StreamReply(_Reply):
    """Writes the answers of a request as server-sent events while they are generated.

    A row's first token is a chunk, then every ``stream_interval`` tokens, then the rest, as in vLLM. The
    methods return the text of all chunks that can be sent, so that many chunks cost one write.

    Parameters
    ----------
    generation : Generation
    engine : Engine
        Names the tokens.
    request_id : str
    tamper : Tamper, optional
        A scripted fault that alters the chunks.
    """

    def __init__(self, generation: Generation, engine: Engine, request_id: str, tamper: Tamper | None = None) -> None:
        super().__init__(generation, engine, request_id, tamper)
        kind = "text_completion" if generation.kind == "completion" else "chat.completion.chunk"
        self._head = (
            f'data: {{"id":{quote(self.id)},"object":"{kind}","created":{self.created},'
            f'"model":{quote(self.model)},"choices":['
        )

    def opening(self) -> str:
        """The first chunks of a chat, which hold the role; nothing for completions."""
        if self.generation.kind == "completion":
            return ""
        text = self.generation.prompts[0].text if self.generation.prompt_text else None
        tail = json.dumps({"prompt_token_ids": self._prompt_ids(0), "prompt_text": text})[1:]
        out = []
        for index in range(len(self.rows)):
            usage = self._chunk_usage(index, 0)
            delta = '"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null'
            out.append(f'{self._head}{{"index":{index},{delta}}}]{usage},{tail}\n\n')
        return "".join(out)

    def feed(self, increments: Iterable[Increment]) -> str:
        """Add the engine's increments; return the chunks that are complete."""
        written: dict[int, list[str]] = {}
        for new in increments:
            chunks = self._chunks(new.index, self._add(new))
            if chunks:
                written.setdefault(new.index, []).extend(chunks)
        if self.tamper:
            written = {index: written[index] for index in self.tamper.order(list(written))}
        rounds = zip_longest(*written.values(), fillvalue="")
        return "".join("".join(chunks) for chunks in rounds)

    def closing(self) -> str:
        """Usage, if requested, and the end mark."""
        done = "" if self.tamper and self.tamper.no_done else DONE
        if not self.generation.usage:
            return done
        return f'{self._head}],"usage":{json.dumps(_usage(self.generation.prompt_tokens, self.n_tokens))}}}\n\n{done}'

    def _chunks(self, index: int, row: _Row) -> list[str]:
        """The chunks of a row that can be sent."""
        out: list[str] = []
        interval, total = self.generation.sampling.interval, len(row.ends)
        while True:
            end = row.sent + interval if row.sent else 1
            last = row.finish is not None and end >= total
            if end > total and not last:
                return out
            end = min(end, total)
            out.append(self._chunk(index, row, end, last))
            row.sent = end
            if last:
                return out

    def _chunk(self, index: int, row: _Row, end: int, last: bool) -> str:
        start = row.sent
        first, past = row.ends[start - 1] if start else 0, row.ends[end - 1] if end else 0
        delta, text = "", quote(row.text[first:past])
        if self.generation.parse_reasoning:
            both = zip(_parse_reasoning(row.text[:first]), _parse_reasoning(row.text[:past]), strict=True)
            thought, said = ((now or "")[len(was or "") :] for was, now in both)
            delta, text = f'"reasoning":{quote(thought)},' if thought else "", quote(said)
        finish = f'"{row.finish}"' if last else "null"
        if self.tamper:
            text = "7" if self.tamper.applies_to(index, "wrong_type") else text
            finish = "null" if self.tamper.applies_to(index, "no_finish") else finish
        reason = quote(row.stop_reason) if last and row.stop_reason is not None else "null"
        ids = json.dumps(row.ids[start:end]) if self.generation.sampling.want_ids else "null"
        asked = self.generation.sampling.logprobs is not None
        logprobs = json.dumps(self._logprobs(row.logprobs[start:end])) if asked else "null"
        if self.generation.kind == "completion":
            before = json.dumps(self._prompt_ids(index)) if not start and self.generation.sampling.want_ids else "null"
            body = (
                f'"text":{text},"logprobs":{logprobs},"finish_reason":{finish},"stop_reason":{reason},'
                f'"prompt_token_ids":{before},"token_ids":{ids}}}]'
            )
        else:
            stop = f'"stop_reason":{reason},' if last else ""
            delta += f'"content":{text}'
            body = f'"delta":{{{delta}}},"logprobs":{logprobs},"finish_reason":{finish},{stop}"token_ids":{ids}}}]'
        body += self._chunk_usage(index, end)
        if self.tamper is None:
            return f'{self._head}{{"index":{index},{body}}}\n\n'
        return "".join(f'{self._head}{{"index":{label},{body}}}\n\n' for label in self.tamper.labels(index))

    def _chunk_usage(self, index: int, n_tokens: int) -> str:
        if not self.generation.continuous_usage:
            return ""
        before = self.generation.prompts[index // self.generation.n].n_tokens
        return (
            f',"usage":{{"prompt_tokens":{before},"total_tokens":{before + n_tokens},"completion_tokens":{n_tokens}}}'
        )
