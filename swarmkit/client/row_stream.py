"""The format of streamed replies, whose rows become ``Reply`` tuples as they finish. No I/O."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..records import Reply, Route
from .error_replies import Malformed, error_reply, shown, stream_failure
from .json_bytes import read_json
from .replies import (
    EVENTS,
    UNFINISHED,
    counts_of,
    decode_counted,
    index_of,
    logprobs_of,
    problem_of,
    reason_of,
    text_of,
)

__all__ = ["RowStream"]

_LONGEST_LINE = 64 << 20


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
            raise Malformed(f"a line of the stream is longer than {_LONGEST_LINE:,} bytes: {shown(self._tail)}")
        finished: list[Reply] = []
        for line in filter(None, lines):
            if not line.startswith(b"data:"):
                if line != b"\r" and not line.startswith(EVENTS):
                    if (failure := error_reply(line)) is not None:
                        raise failure
                    raise Malformed(f"this is not a line of an event stream: {shown(line)}")
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
            raise Malformed(f"a chunk of the stream is not a JSON object: {shown(payload)}") from exc
        if choices is None or (choices == [] and body.get("error")):
            raise stream_failure(body, payload)
        if not isinstance(choices, list):
            raise Malformed(f'a chunk of the stream has no list of "choices": {shown(payload)}')
        for choice in choices:
            index = index_of(choice, self._slots)
            parts = self._parts[index]
            if parts is None:
                raise Malformed(f"the choice with index {index} goes on after its end")
            text = choice.get("text")
            if text := text if type(text) is str else text_of(text):  # calls are most of what a chunk costs
                self.chunks += 1
                self.progress += 1
                parts.append(text)
            if self._logprobs is not None and (tokens := logprobs_of(choice.get("logprobs"))):
                self._logprobs.setdefault(index, []).extend(tokens)
            if choice.get("finish_reason") and (reason := reason_of(choice)):
                self.progress += 1
                self._parts[index] = None
                self._finish(index, "".join(parts), reason, choice, body.get("usage"), finished)

    def _finish(
        self, index: int, text: str, reason: str, choice: Mapping[str, Any], usage: Any, finished: list[Reply]
    ) -> None:
        if reason in UNFINISHED:
            self.unfinished = reason
            self.why = self.why or problem_of(choice, text, reason, {}) or ""
            return
        prompt, sample = divmod(index, self._n)
        problem = None
        if not text or reason not in ("stop", "length"):
            problem = problem_of(choice, text or choice.get("text"), reason, {})
        tokens = self._logprobs.pop(index, None) if self._logprobs else None
        reply = Reply(prompt, sample, text, reason, *counts_of({}, usage), None, problem, tokens)
        if self._n == 1:
            finished.append(reply)
            return
        samples = self._samples.setdefault(prompt, [])
        samples.append(reply)
        if len(samples) == self._n:
            finished.extend(sorted(samples, key=lambda r: r.sample))
