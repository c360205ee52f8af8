"""Columns of answers, filled by position while a run goes on.

Columns are the first-class result: a run of a million rows keeps no object a row beyond its text.
``list[Response]`` is a view of them.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator

from .records import Reply, Response

__all__ = ["UNKNOWN", "Columns"]

UNKNOWN = -1


class Columns:
    """The answers of one run.

    Parameters
    ----------
    size : int
        Rows.
    n : int, default 1
        Samples a row; slots ``row * n`` to ``row * n + n - 1`` are its answers.

    Attributes
    ----------
    text : list of str or None
        By slot; None while there is no answer.
    errors : dict of int to str
        Row position to the reason, for rows that failed.
    finish_reason : list of str or None
        By slot.
    reasoning : dict of int to str
        By slot, where a server parses it out of its answers.
    endpoint : array of int
        By row: index of the endpoint that answered or failed last, from 0; -1 before.
    prompt_tokens, completion_tokens : array of int
        By slot, as the server counted; -1 where it did not say.
    latency_s : array of float
        By row: seconds from sending the request that answered until the row was complete; NaN before.
    attempts : bytearray
        By row: requests the row was part of, 255 at most.
    """

    def __init__(self, size: int, n: int = 1) -> None:
        self.size = size
        self.n = n
        slots = size * n
        self.text: list[str | None] = [None] * slots
        self.errors: dict[int, str] = {}
        self.finish_reason: list[str | None] = [None] * slots
        self.reasoning: dict[int, str] = {}
        self.endpoint = array("i", [UNKNOWN]) * size
        self.prompt_tokens = array("i", [UNKNOWN]) * slots
        self.completion_tokens = array("i", [UNKNOWN]) * slots
        self.latency_s = array("d", [float("nan")]) * size
        self.attempts = bytearray(size)

    def answer(self, answers: Iterable[tuple[int, Reply]], endpoint: int, latency_s: float) -> None:
        """Write replies to their slots: each with the row that it answers."""
        for row, (_, sample, text, reason, prompt_tokens, completion_tokens, reasoning) in answers:
            slot = row * self.n + sample
            self.text[slot] = text
            self.finish_reason[slot] = reason
            if prompt_tokens is not None:
                self.prompt_tokens[slot] = prompt_tokens
            if completion_tokens is not None:
                self.completion_tokens[slot] = completion_tokens
            if reasoning:
                self.reasoning[slot] = reasoning
            self.endpoint[row] = endpoint
            self.latency_s[row] = latency_s

    def copy(self, row: int, to: int) -> None:
        """Give one row's answers to another, which has the same prompt."""
        for sample in range(self.n):
            a, b = row * self.n + sample, to * self.n + sample
            self.text[b], self.finish_reason[b] = self.text[a], self.finish_reason[a]
            self.prompt_tokens[b], self.completion_tokens[b] = self.prompt_tokens[a], self.completion_tokens[a]
            if a in self.reasoning:
                self.reasoning[b] = self.reasoning[a]
        self.endpoint[to], self.latency_s[to] = self.endpoint[row], self.latency_s[row]

    def fail(self, row: int, error: str, endpoint: int = UNKNOWN) -> None:
        """Write a row's error."""
        self.errors[row] = error
        if endpoint != UNKNOWN:
            self.endpoint[row] = endpoint

    def missing(self) -> Iterator[int]:
        """Rows with neither answer nor error."""
        return (r for r in range(self.size) if self.text[r * self.n] is None and r not in self.errors)

    def responses(self) -> list[Response]:
        """The rows as records, in order; with several samples a row, only its first."""
        return [self.response(row) for row in range(self.size)]

    def response(self, row: int) -> Response:
        """One row as a record."""
        slot = row * self.n
        text, latency = self.text[slot], self.latency_s[row]
        return Response(
            success=text is not None,
            text=text or "",
            error=None if text is not None else self.errors.get(row, "not finished"),
            agent_index=self.endpoint[row],
            finish_reason=self.finish_reason[slot],
            prompt_tokens=_known(self.prompt_tokens[slot]),
            completion_tokens=_known(self.completion_tokens[slot]),
            latency_s=None if latency != latency else latency,
            attempts=self.attempts[row],
        )


def _known(count: int) -> int | None:
    return None if count == UNKNOWN else count
