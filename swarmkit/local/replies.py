"""Answers -> the JSON of a reply, whole or as a stream of server-sent events, in vLLM's shape.

A stream is written by string formatting: a request of 100 prompts is 200 chunks or more, and a dictionary
and an encoder call for each would be most of what the server does.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from json.encoder import encode_basestring_ascii as quote
from typing import Any

from .engines import Increment
from .faults import Tamper
from .requests import Ask

__all__ = ["PlainReply", "StreamReply", "to_json"]

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


@dataclass(slots=True)
class _Row:
    """One answer as far as it has come; ``ends`` are the ends of its tokens in ``text``."""

    text: str = ""
    ends: Sequence[int] = ()
    ids: list[int] = field(default_factory=list)
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
            # Mostly all there is, and then a range: no step through the tokens.
            self.text, self.ends = new.text, new.ends
        if new.ids is not None:
            self.ids += new.ids
        if new.finish is not None:
            self.finish, self.stop_reason = new.finish, new.stop_reason


class _Reply:
    """What both kinds of reply keep."""

    def __init__(self, ask: Ask, model: str, request_id: str, tamper: Tamper | None = None) -> None:
        self.ask = ask
        self.model = model
        self.id = f"{'cmpl' if ask.kind == 'completion' else 'chatcmpl'}-{request_id}"
        self.created = int(time.time())
        self.tamper = tamper
        self.rows = [_Row() for _ in range(len(ask.prompts) * ask.n)]
        self.unfinished = len(self.rows)

    @property
    def n_tokens(self) -> int:
        """Tokens generated up to now."""
        return sum(len(row.ends) for row in self.rows)

    def _prompt_ids(self, index: int) -> list[int] | None:
        return self.ask.prompts[index // self.ask.n].ids if self.ask.sampling.want_ids else None

    def _add(self, new: Increment) -> _Row:
        row = self.rows[new.index]
        row.add(new)
        self.unfinished -= new.finish is not None
        return row


class PlainReply(_Reply):
    """Gathers the answers of a request and writes them as one body.

    Parameters
    ----------
    ask : Ask
    model : str
    request_id : str
    tamper : Tamper, optional
        A scripted fault that alters the choices.
    """

    def opening(self) -> str:
        """Nothing: all is said at the end."""
        return ""

    def feed(self, increments: Iterable[Increment]) -> str:
        """Take what the engine has made; nothing is said yet."""
        for new in increments:
            self._add(new)
        return ""

    def body(self) -> bytes:
        """JSON of the whole reply."""
        indices = range(len(self.rows))
        if self.tamper:
            order = self.tamper.order(list(indices))
            choices = [self._choice(i, label) for i in order for label in self.tamper.labels(i)]
        else:
            choices = [self._choice(i, i) for i in indices]
        reply: dict[str, Any] = {
            "id": self.id,
            "object": "text_completion" if self.ask.kind == "completion" else "chat.completion",
            "created": self.created,
            "model": self.model,
            "choices": choices,
            "usage": _usage(self.ask.prompt_tokens, self.n_tokens),
        }
        if self.ask.kind == "chat":
            reply["prompt_token_ids"] = self._prompt_ids(0)
            reply["prompt_text"] = self.ask.prompts[0].text if self.ask.prompt_text else None
        return to_json(reply)

    def _choice(self, index: int, label: int) -> dict[str, Any]:
        row = self.rows[index]
        text: str | int = row.text
        finish = row.finish
        if self.tamper:
            text = 7 if self.tamper.spoils(index, "wrong_type") else text
            finish = None if self.tamper.spoils(index, "no_finish") else finish
        choice: dict[str, Any] = {"index": label}
        if self.ask.kind == "completion":
            choice["text"] = text
        else:
            choice["message"] = {"role": "assistant", "content": text, "reasoning": None}
        choice["logprobs"] = None
        choice["finish_reason"] = finish
        choice["stop_reason"] = row.stop_reason
        choice["token_ids"] = row.ids if self.ask.sampling.want_ids else None
        if self.ask.kind == "completion":
            choice["prompt_token_ids"] = self._prompt_ids(index)
        return choice


class StreamReply(_Reply):
    """Writes the answers of a request as server-sent events while they come.

    A row's first token is a chunk, then each ``stream_interval`` tokens, then the rest, as in vLLM. The
    methods return text to be sent at once; many chunks in one piece cost the network one write.

    Parameters
    ----------
    ask : Ask
    model : str
    request_id : str
    tamper : Tamper, optional
        A scripted fault that alters the chunks.
    """

    def __init__(self, ask: Ask, model: str, request_id: str, tamper: Tamper | None = None) -> None:
        super().__init__(ask, model, request_id, tamper)
        kind = "text_completion" if ask.kind == "completion" else "chat.completion.chunk"
        self._head = (
            f'data: {{"id":{quote(self.id)},"object":"{kind}","created":{self.created},'
            f'"model":{quote(model)},"choices":['
        )

    def opening(self) -> str:
        """Chat's first chunks, which hold the role; nothing for completions."""
        if self.ask.kind == "completion":
            return ""
        text = self.ask.prompts[0].text if self.ask.prompt_text else None
        tail = json.dumps({"prompt_token_ids": self._prompt_ids(0), "prompt_text": text})[1:]
        out = []
        for index in range(len(self.rows)):
            usage = self._chunk_usage(index, 0)
            delta = '"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null'
            out.append(f'{self._head}{{"index":{index},{delta}}}]{usage},{tail}\n\n')
        return "".join(out)

    def feed(self, increments: Iterable[Increment]) -> str:
        """Take what the engine has made; return the chunks that are complete."""
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
        """Usage, if it was asked for, and the end mark."""
        done = "" if self.tamper and self.tamper.no_done else DONE
        if not self.ask.usage:
            return done
        return f'{self._head}],"usage":{json.dumps(_usage(self.ask.prompt_tokens, self.n_tokens))}}}\n\n{done}'

    def _chunks(self, index: int, row: _Row) -> list[str]:
        """What of a row is ready to be sent."""
        out: list[str] = []
        interval, total = self.ask.sampling.interval, len(row.ends)
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
        text = quote(row.text[row.ends[start - 1] if start else 0 : row.ends[end - 1] if end else 0])
        finish = f'"{row.finish}"' if last else "null"
        if self.tamper:
            text = "7" if self.tamper.spoils(index, "wrong_type") else text
            finish = "null" if self.tamper.spoils(index, "no_finish") else finish
        reason = quote(row.stop_reason) if last and row.stop_reason is not None else "null"
        ids = json.dumps(row.ids[start:end]) if self.ask.sampling.want_ids else "null"
        if self.ask.kind == "completion":
            before = json.dumps(self._prompt_ids(index)) if not start and self.ask.sampling.want_ids else "null"
            body = (
                f'"text":{text},"logprobs":null,"finish_reason":{finish},"stop_reason":{reason},'
                f'"prompt_token_ids":{before},"token_ids":{ids}}}]'
            )
        else:
            stop = f'"stop_reason":{reason},' if last else ""
            body = f'"delta":{{"content":{text}}},"logprobs":null,"finish_reason":{finish},{stop}"token_ids":{ids}}}]'
        body += self._chunk_usage(index, end)
        if self.tamper is None:
            return f'{self._head}{{"index":{index},{body}}}\n\n'
        return "".join(f'{self._head}{{"index":{label},{body}}}\n\n' for label in self.tamper.labels(index))

    def _chunk_usage(self, index: int, n_tokens: int) -> str:
        if not self.ask.continuous_usage:
            return ""
        before = self.ask.prompts[index // self.ask.n].n_tokens
        return (
            f',"usage":{{"prompt_tokens":{before},"total_tokens":{before + n_tokens},"completion_tokens":{n_tokens}}}'
        )
