"""Answers that are not what the call's schema asks for, and how their rows are asked again."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from ..records import Reply, RequestSpec
from ..schema import Schema

__all__ = ["InvalidAnswer", "InvalidAnswers"]

_TOLD_FROM = 2  # from this time on that a row is asked again, the model is told what was wrong
_GREEDY_TOLD_FROM = 1  # ... at temperature 0 or with a seed, where the same question has the same answer


class InvalidAnswer(NamedTuple):
    """The last answer of a row: how many times it was not valid by now, why, and the endpoint that gave it."""

    times: int
    problem: str
    endpoint: int
    reply: Reply


class InvalidAnswers(dict[int, InvalidAnswer]):
    """The rows of a run whose last answers are not valid, by position.

    Parameters
    ----------
    spec : RequestSpec
        What the rows have in common.
    texts : sequence of str or None
        Prompts by position.
    """

    def __init__(self, spec: RequestSpec, texts: Sequence[str | None]) -> None:
        super().__init__()
        self._spec = spec
        self._texts = texts
        greedy = spec.params.get("temperature") == 0 or spec.params.get("seed") is not None
        self._told_from = _GREEDY_TOLD_FROM if greedy else _TOLD_FROM

    def look_at(self, row: int, reply: Reply, endpoint: int, schema: Schema, max_tokens: int) -> str | None:
        """Note whether an answer is valid; return what is wrong with it."""
        problem = schema.problem(reply.text)
        if reply.finish_reason == "length" and (problem or schema.may_go_on(reply.text)):
            problem = f"cut off at max_tokens={max_tokens}"
        if problem is None:
            self.pop(row, None)
        else:
            self[row] = InvalidAnswer(self[row].times + 1 if row in self else 1, problem, endpoint, reply)
        return problem

    def is_asked_again(self, row: int) -> bool:
        """Whether a row is to have another answer, after one that was not valid."""
        return self[row].times <= self._spec.schema_retries

    def prompts(self, rows: Iterable[int]) -> Iterable[str]:
        """The prompts of some rows; with what was wrong with their answers, if that was so again."""
        if self:
            return map(self._prompt, rows)
        texts = self._texts
        return [texts[row] or "" for row in rows]

    def _prompt(self, row: int) -> str:
        text, last = self._texts[row] or "", self.get(row)
        if last is None or last.times < self._told_from:
            return text
        told = f"Your last answer was not valid: {last.problem}. Give a valid one."
        if not self._spec.conversations:
            return f"{text}\n\n{told}"
        said = (self._spec.assistant_prefix or "") + last.reply.text
        turns = [{"role": "assistant", "content": said}, {"role": "user", "content": told}]
        return json.dumps([*json.loads(text), *turns])
