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

_LOOKED_AT = 100  # rows of a frame, with values of other types each, by which a condition is tried


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
            for each field of its ``schema``. Those of an earlier call are replaced. ``examples=`` in a frame have their
            answers in a column of this name, too.
        prompt : str or callable
            A column's name, a template with ``{column}`` placeholders, or a function of the row. Columns of earlier
            steps may be used.
        when : str, optional
            Which rows are asked: a pandas expression over columns, as ``"{extract_n} > 3"``. The others, and those
            where a value is missing, have no answer and no error here, and go on to the next step. One that fits no
            row, as a comparison of text with numbers, is refused before anything is asked.
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

    _anyway = "Step(..., overwrite=True)"

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
        self._check_condition()

    def _make_prompts(self, prompt: PromptLike | None, messages: Any) -> Prompts:
        return Prompts([None] * len(self.df))  # they are made when their rows come

    def _cause(self, name: str) -> str:
        return f"the step {self.out!r}"

    def _remedy(self, name: str, drop: str) -> str:
        return "give the step another name" if name.startswith(self.out) else super()._remedy(name, drop)

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
            if self._prompt in empty.columns:
                labels |= {self._prompt, self._label(self._prompt)}
            else:
                named = {name for _, name, _ in placeholders(self._prompt, empty.columns) if name is not None}
                labels |= {label for label in empty.columns if str(label) in named}
        return [step for step in self._before if not labels.isdisjoint(step.added)]

    def _check_condition(self) -> None:
        """Refuse a condition that fits no row by the kinds of its values: those in the frame, and such as each earlier
        step gives."""
        if self._condition is None:
            return
        labels = self._condition.labels
        given = {label: step._example(label) for step in self._before for label in step.added if label in labels}
        own = self.df[[label for label in labels if label not in given]].dropna()
        mixed = own.iloc[:, [place for place, kind in enumerate(own.dtypes) if pd.api.types.is_object_dtype(kind)]]
        own = own[~mixed.map(type).duplicated()][:_LOOKED_AT] if len(mixed.columns) else own[:1]
        if any(value is None for value in given.values()) or (len(own.columns) and own.empty):
            return  # nothing is known of one of them
        rows = own.copy() if len(own.columns) else pd.DataFrame(index=range(1))
        kinds = self._rows([]).dtypes.to_dict()
        for label, value in given.items():
            rows[label] = pd.Series([value] * len(rows), rows.index, dtype=kinds[label])
        problem: SettingError | None = None
        for place in range(len(rows)):
            try:
                self._condition.holds(rows[place : place + 1])
            except SettingError as exc:
                problem = problem or exc
            else:
                return
        if problem is not None:
            raise problem

    def _example(self, label: Hashable) -> Any:
        """A value such as a column of this step has; None where that is not known."""
        kind: Any = self.onto(self.df[[]].iloc[:0], "", []).dtypes.to_dict()[label]
        fields = self.typed.schema.fields if self.typed.schema is not None else ()
        texts = {name for name, field in zip(self.typed.names, fields, strict=True) if field.kind == "text"}
        texts |= {f"{self.out}_error", *([] if self.typed.is_lone else [self.out])}
        if pd.api.types.is_bool_dtype(kind):
            return True
        if pd.api.types.is_numeric_dtype(kind):
            return 1
        if isinstance(kind, pd.CategoricalDtype):
            return kind.categories[0]
        return "a text" if label in map(self._label, texts) else None

    def asked(self, rows: Sequence[int]) -> Asked:
        """Whether rows are asked here, and what; for those that the steps before are done with."""
        found = Asked(skipped={row for row in rows if any(row in step.skipped for step in self._uses)})
        rows = [row for row in rows if row not in found.skipped]
        if rows:
            self._ask_each(self._rows(rows), rows, found)
        return found

    def _ask_each(self, frame: pd.DataFrame, rows: Sequence[int], found: Asked) -> None:
        try:
            self._ask(frame, rows, found)
        except (PromptError, SettingError) as exc:  # of one of them: it is in one half
            if len(rows) == 1:
                found.errors[rows[0]] = str(exc)
                return
            for half in (slice(len(rows) // 2), slice(len(rows) // 2, None)):
                self._ask_each(frame.iloc[half], rows[half], found)

    def holds(self, row: int, now: Asked) -> bool:
        """Whether what is known of a row still follows from the earlier steps, by which ``now`` is what is asked."""
        if (text := now.texts.get(row)) != self.made[row] or (row in now.skipped) != (row in self.skipped):
            return False
        return text is not None or all(step.columns.is_settled(row) or row in step.skipped for step in self._before)

    def forget_unreached(self) -> None:
        """Rows for whose earlier error there is no reason any more are rows that have not come yet."""
        failed = [step.columns.errors for step in self._before]
        self.unreached = {row: why for row, why in self.unreached.items() if any(row in errors for errors in failed)}

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
