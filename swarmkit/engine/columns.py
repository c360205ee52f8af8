"""Columns of answers, filled by position while a run goes on.

Columns are the first-class result: a run of a million rows keeps no object a row beyond its text.
``list[Response]`` is a view of them.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from sys import intern
from typing import Any, NamedTuple

from ..records import Reply, Response

__all__ = ["UNKNOWN", "Columns", "Cost"]

UNKNOWN = -1
_LOOKED_AT = 128  # rows of a request whose answers are compared in length


class Cost(NamedTuple):
    """What answers have cost: tokens, and answers whose tokens are ``counted``."""

    prompt_tokens: int
    completion_tokens: int
    counted: int


class Columns:
    """The answers of one run.

    Parameters
    ----------
    size : int
        Rows.
    n : int, default 1
        Samples a row; slots ``row * n`` to ``row * n + n - 1`` are its answers.
    tokens : bool, default False
        Whether ``token_logprobs`` are kept.
    one_token : bool, default False
        An answer is one token, and so none is cut.

    Attributes
    ----------
    text : list of str or None
        By slot; None while there is no answer.
    errors : dict of int to str
        Row position to the reason, for rows that failed; one whose answer is not valid has its text, too.
    finish_reason : list of str or None
        By slot.
    reasoning : dict of int to str
        By slot, where a server parses it out of its answers.
    truncated : set of int
        Rows whose prompt was cut to fit the model's context.
    logprob : dict of int to float
        By slot, where asked for: the sum of the log-probabilities of the answer's tokens.
    token_logprobs : dict of int to list of dict
        By slot: the ``Reply.logprobs``.
    endpoint : array of int
        By row: index of the endpoint that answered or failed last, from 0; -1 before.
    prompt_tokens, completion_tokens : array of int
        By slot, as the server counted; -1 where it did not say.
    latency_s : array of float
        By row: seconds from sending the request that answered until the row was complete; NaN before.
    attempts : bytearray
        By row: requests the row was part of, 255 at most.
    late : str
        Where a deadline has ended the run: the error of the rows that were asked, and had no answer by then.
    """

    def __init__(self, size: int, n: int = 1, tokens: bool = False, one_token: bool = False) -> None:
        self.size = size
        self.n = n
        self.keeps_tokens = tokens
        self.one_token = one_token
        slots = size * n
        self.text: list[str | None] = [None] * slots
        self.errors: dict[int, str] = {}
        self.finish_reason: list[str | None] = [None] * slots
        self.reasoning: dict[int, str] = {}
        self.truncated: set[int] = set()
        self.logprob: dict[int, float] = {}
        self.token_logprobs: dict[int, list[dict[str, Any]]] = {}
        self.endpoint = array("i", [UNKNOWN]) * size
        self.prompt_tokens = array("i", [UNKNOWN]) * slots
        self.completion_tokens = array("i", [UNKNOWN]) * slots
        self.latency_s = array("d", [float("nan")]) * size
        self.attempts = bytearray(size)
        self.late = ""

    def answer(self, answers: Iterable[tuple[int, Reply]], endpoint: int, latency_s: float) -> None:
        """Write replies to their slots: each with the row that it answers."""
        n, texts, reasons, endpoints, latencies = self.n, self.text, self.finish_reason, self.endpoint, self.latency_s
        for row, (_, sample, text, reason, prompt_tokens, completion_tokens, reasoning, _, logprobs) in answers:
            slot = row * n + sample
            texts[slot] = text
            reasons[slot] = intern(reason) if reason else None  # there are few, and each reply has its own
            endpoints[row] = endpoint
            latencies[row] = latency_s
            if prompt_tokens is not None:
                self.prompt_tokens[slot] = prompt_tokens
            if completion_tokens is not None:
                self.completion_tokens[slot] = completion_tokens
            if reasoning:
                self.reasoning[slot] = reasoning
            if logprobs is not None:
                self.logprob[slot] = sum([token["logprob"] for token in logprobs])
                if self.keeps_tokens:
                    self.token_logprobs[slot] = logprobs

    @property
    def _by_slot(self) -> tuple[dict[int, Any], ...]:
        """What only some answers have."""
        return self.reasoning, self.logprob, self.token_logprobs

    def copy(self, row: int, to: int) -> None:
        """Give one row's answers to another, which has the same prompt."""
        for sample in range(self.n):
            a, b = row * self.n + sample, to * self.n + sample
            self.text[b], self.finish_reason[b] = self.text[a], self.finish_reason[a]
            self.prompt_tokens[b], self.completion_tokens[b] = self.prompt_tokens[a], self.completion_tokens[a]
            for known in self._by_slot:
                if a in known:
                    known[b] = known[a]
        self.endpoint[to], self.latency_s[to] = self.endpoint[row], self.latency_s[row]

    def fail(self, row: int, error: str, endpoint: int = UNKNOWN) -> None:
        """Write a row's error."""
        self.errors[row] = error
        if endpoint != UNKNOWN:
            self.endpoint[row] = endpoint

    def clear(self, row: int) -> None:
        """Take back what is known of a row's answers: it is to be asked."""
        for slot in range(row * self.n, (row + 1) * self.n):
            self.text[slot] = self.finish_reason[slot] = None
            self.prompt_tokens[slot] = self.completion_tokens[slot] = UNKNOWN
            for known in self._by_slot:
                known.pop(slot, None)
        self.errors.pop(row, None)
        self.endpoint[row], self.latency_s[row] = UNKNOWN, float("nan")

    def cost(self, rows: Sequence[int]) -> Cost:
        """What the answers of rows have cost, where the servers said: a row's samples share its prompt."""
        n, prompts, completions = self.n, self.prompt_tokens, self.completion_tokens
        asked = [tokens for row in rows if (tokens := prompts[row * n]) > 0]
        known = [tokens for slot in self._slots(rows) if (tokens := completions[slot]) >= 0]
        return Cost(sum(asked), sum(known), len(known))

    def cut(self, rows: Sequence[int]) -> int:
        """How many answers of rows ended at their limit of tokens."""
        if self.one_token:
            return 0
        reasons = self.finish_reason
        return [reasons[slot] for slot in self._slots(rows)].count("length")

    def _slots(self, rows: Sequence[int]) -> Sequence[int]:
        n = self.n
        return rows if n == 1 else [slot for row in rows for slot in range(row * n, (row + 1) * n)]

    def extremes(self, rows: Sequence[int], mean: float) -> tuple[int, int]:
        """Tokens of the shortest and the longest answer of some rows, whose answers have so many on average: by the
        lengths of their texts, where they were only counted together. Looks at 128 of the rows at most."""
        some = rows[:: -(-len(rows) // _LOOKED_AT)]
        slots = self._slots(some)
        known = [tokens for slot in slots if (tokens := self.completion_tokens[slot]) >= 0]
        if known:
            return min(known), max(known)
        chars = [len(text) if (text := self.text[slot]) else 0 for slot in slots]
        each = mean * len(chars) / (sum(chars) or 1)
        return round(min(chars) * each), round(max(chars) * each)

    def is_settled(self, row: int) -> bool:
        """Whether a row has an answer or an error."""
        return self.text[row * self.n] is not None or row in self.errors

    def error(self, row: int, unfinished: str) -> str:
        """The error of a row without an answer; ``unfinished`` where it has none of its own."""
        return self.errors.get(row) or (self.late if self.late and self.attempts[row] else unfinished)

    def missing(self) -> Iterator[int]:
        """Rows with neither answer nor error."""
        return (row for row in range(self.size) if not self.is_settled(row))

    def responses(self) -> list[Response]:
        """The rows as records, in order; with several samples a row, only its first."""
        return [self.response(row) for row in range(self.size)]

    def response(self, row: int) -> Response:
        """One row as a record."""
        slot = row * self.n
        text, latency = self.text[slot], self.latency_s[row]
        error = self.errors.get(row, "not finished" if text is None else None)
        return Response(
            success=error is None,
            text=text or "",
            error=error,
            agent_index=self.endpoint[row],
            finish_reason=self.finish_reason[slot],
            prompt_tokens=_known(self.prompt_tokens[slot]),
            completion_tokens=_known(self.completion_tokens[slot]),
            latency_s=None if latency != latency else latency,
            attempts=self.attempts[row],
        )


def _known(count: int) -> int | None:
    return None if count == UNKNOWN else count
