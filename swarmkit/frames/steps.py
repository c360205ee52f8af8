"""The steps of a pipeline, and the columns of their answers."""

from __future__ import annotations

import inspect
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Unpack

import numpy as np
import pandas as pd

from ..errors import PromptError, SettingError
from ..records import Prompts
from .conditions import Condition
from .options import NOT_OF_STEP, StepOptions
from .prompts import PromptLike, make_prompts, placeholders
from .scatter import ScatterFrame
from .signatures import VERBS, takes

__all__ = ["Asked", "Step", "StepFrame"]


class Step:
    """One question of a ``pipeline``, whose answers the later steps may use.

    ``help(sk.Step.__init__)`` describes all keywords.

    Examples
    --------
    >>> Step("check", "Is that right? {extract}", when="{extract_n} > 3", temperature=0)
    Step('check', 'Is that right? {extract}', when='{extract_n} > 3', temperature=0)
    """

    @takes(StepOptions, without=NOT_OF_STEP)
    def __init__(
        self, name: str, prompt: PromptLike, *, when: str | None = None, **options: Unpack[StepOptions]
    ) -> None:
        """Describe a step; it is checked when the pipeline begins.

        Parameters
        ----------
        name : str
            Name of the step, and of its column of answers; ``<name>_error`` stands beside it, and ``<name>_<field>``
            for each field of its ``schema``. Those of an earlier call are replaced.
        prompt : str or callable
            A column's name, a template with ``{column}`` placeholders, or a function of the row. Columns of earlier
            steps may be used.
        when : str, optional
            Which rows are asked: a pandas expression over columns, as ``"{extract_n} > 3"``. The others, and those
            where a value is missing, have no answer and no error here, and go on to the next step.
        """
        self.name = name
        self.prompt = prompt
        self.when = when
        self.options: Mapping[str, Any] = options

    def __repr__(self) -> str:
        given = {**({} if self.when is None else {"when": self.when}), **self.options}
        return f"Step({', '.join([repr(self.name), repr(self.prompt), *(f'{n}={v!r}' for n, v in given.items())])})"


VERBS[Step.__name__] = inspect.signature(Step)  # calls of verbs with its keywords are told whose they are


@dataclass(slots=True)
class Asked:
    """What becomes of rows that come to a step: the prompts of those that are asked, and why others are not."""

    texts: dict[int, str] = field(default_factory=dict)
    skipped: set[int] = field(default_factory=set)
    errors: dict[int, str] = field(default_factory=dict)


class StepFrame(ScatterFrame):
    """A frame whose rows come to a step one after another, and its columns of answers.

    Parameters
    ----------
    df : DataFrame
        The caller's.
    step : Step
        What is asked.
    given : mapping
        The step's keywords (``call.arguments``).
    before : sequence of StepFrame
        The earlier steps.

    Attributes
    ----------
    added : list
        Labels of its columns.
    made : list of str or None
        The prompts, as they were made.
    skipped : set of int
        Rows that this step does not ask.
    unreached : dict of int to str
        Rows that failed at an earlier step, and why.
    """

    def __init__(self, df: pd.DataFrame, step: Step, given: Mapping[str, Any], before: Sequence[StepFrame]) -> None:
        self.skipped: set[int] = set()
        self.unreached: dict[int, str] = {}
        prompt = step.prompt if isinstance(step.prompt, str) else None  # of a function the columns are not there yet
        super().__init__(df, prompt, {**given, "out": step.name, "n": 1, "only_missing": False, "messages": None})
        self.label = "pipeline"
        self.name, self._prompt, self._before = step.name, step.prompt, before
        self.made: list[str | None] = [None] * len(df)
        self.added = list(self.onto(df[[]].iloc[:0], "", []).columns)
        earlier = {label: other.name for other in before for label in other.added}
        if clash := [label for label in self.added if label in earlier]:
            raise SettingError(
                f"the steps {earlier[clash[0]]!r} and {self.name!r} would both have the column {clash[0]!r}: give "
                "one of them another name"
            )
        empty = self._rows([])
        if not isinstance(step.prompt, str) and not callable(step.prompt):
            raise PromptError(
                f"the prompt of step {self.name!r} is a {type(step.prompt).__name__}: it must be a template, a "
                "column's name or a callable. A Series can be made a column first"
            )
        make_prompts(empty, step.prompt)
        self._condition = None if step.when is None else Condition(step.when, empty.columns)
        self._uses = self._used(empty)

    def _make_prompts(self, prompt: PromptLike | None, messages: Any) -> Prompts:
        return Prompts([None] * len(self.df))  # they are made when their rows come

    def _rows(self, rows: Sequence[int]) -> pd.DataFrame:
        """Some rows, with what the earlier steps have added."""
        frame = self.df.iloc[np.asarray(rows, dtype=np.intp)]
        for step in self._before:
            frame = step.onto(frame, "", rows)
        return frame

    def _used(self, empty: pd.DataFrame) -> list[StepFrame]:
        """The earlier steps whose columns the prompt or the condition names."""
        labels: set[Hashable] = set(self._condition.labels if self._condition else ())
        if isinstance(self._prompt, str):
            named = {self._prompt} if self._prompt in empty.columns else set()
            named = named or {name for _, name, _ in placeholders(self._prompt, empty.columns) if name is not None}
            labels |= {label for label in empty.columns if str(label) in named}
        return [step for step in self._before if not labels.isdisjoint(step.added)]

    def asked(self, rows: Sequence[int]) -> Asked:
        """Whether rows are asked here, and what; for those that the steps before are done with."""
        found = Asked(skipped={row for row in rows if any(row in step.skipped for step in self._uses)})
        rows = [row for row in rows if row not in found.skipped]
        if rows:
            frame = self._rows(rows)
            try:
                self._ask(frame, rows, found)
            except (PromptError, SettingError):  # of one of them; which, and what of the others?
                for place, row in enumerate(rows):
                    try:
                        self._ask(frame.iloc[place : place + 1], [row], found)
                    except (PromptError, SettingError) as exc:
                        found.errors[row] = str(exc)
        return found

    def _ask(self, frame: pd.DataFrame, rows: Sequence[int], found: Asked) -> None:
        if self._condition is not None:
            holds = self._condition.holds(frame)
            skipped = {row for row, true in zip(rows, holds.tolist(), strict=True) if not true}
            rows = [row for row in rows if row not in skipped]
            frame = frame[holds]
        prompts = make_prompts(frame, self._prompt)
        for place, (row, text) in enumerate(zip(rows, prompts.texts, strict=True)):
            if text is None:
                found.errors[row] = prompts.errors[place]
            else:
                found.texts[row] = text
        if self._condition is not None:
            found.skipped |= skipped

    def _error(self, row: int, unfinished: str) -> str | None:
        return None if row in self.skipped else self.unreached.get(row) or super()._error(row, unfinished)
