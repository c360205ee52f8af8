"""A frame, its prompts, and the columns of answers beside it: how replies become aligned columns."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd

from .errors import SettingError
from .events import Listener
from .options import Call
from .prompts import PromptLike, make_prompts
from .records import Failure
from .results import Columns
from .run import Run
from .stats import RunStats

__all__ = ["Sheet", "text_column"]

TEXT: Any = "str" if int(pd.__version__.split(".")[0]) >= 3 else object
"""The dtype of text columns: pandas' string dtype where it is the default, else object."""
_AGAIN = "Ask only these rows again, on the result: df.swarm.scatter(..., out={!r}, only_missing=True)"


class Sheet:
    """A frame, its prompts, and the columns of answers that fill up beside it."""

    def __init__(
        self, df: pd.DataFrame, prompt: PromptLike, out: str, n: int, details: bool, only_missing: bool
    ) -> None:
        if not isinstance(out, str) or not out:
            raise SettingError(f"out={out!r}: must be a column's name")
        if not isinstance(n, int) or isinstance(n, bool) or n < 1:
            raise SettingError(f"n={n!r}: must be a whole number of samples, 1 or more")
        self.df = df.copy(deep=False)  # what the caller adds, drops or sorts during the run stays out of the result
        self.out = out
        self.n = n
        self.details = details
        self.names: list[str] = []
        self.prompts = make_prompts(df, prompt)
        self.columns = Columns(len(df), n)
        self.pending: list[int] | None = None
        self.label = "scatter"
        if only_missing:
            self._keep_answers()
        for row, error in self.prompts.errors.items():  # known before the run starts, and shown from then on
            self.columns.fail(row, error)

    def _keep_answers(self) -> None:
        if self.out not in self.df.columns:
            return  # nothing was answered yet: a first run
        if self.n > 1:
            raise SettingError("only_missing=True works with one sample a row (n=1)")
        there = self.df[self.out]
        if isinstance(there, pd.DataFrame):
            raise SettingError(f"several columns are named {self.out!r}; only_missing=True needs one")
        known = there.notna().to_numpy()
        answers = there.tolist()
        for row in np.flatnonzero(known).tolist():
            self.columns.text[row] = str(answers[row])
            self.prompts.errors.pop(row, None)
        self.pending = np.flatnonzero(~known).tolist()

    def settled_before(self) -> list[int]:
        """Rows that need no asking: kept answers, and rows without a prompt."""
        asked = range(self.columns.size) if self.pending is None else self.pending
        to_ask = {r for r in asked if self.prompts.texts[r] is not None}
        return [r for r in range(self.columns.size) if r not in to_ask]

    def start(self, call: Call, listeners: Sequence[Listener] = ()) -> Run:
        """Begin to ask."""
        heard = [*call.listeners(self.label), *listeners]

        async def work(stats: RunStats) -> Failure | None:
            try:
                return await call.run(self.prompts, self.columns, heard, stats, self.pending)
            finally:
                if call.owned:
                    await call.pool.close()

        self.names = [e.name for e in call.pool.endpoints]
        hint = _AGAIN.format(self.out) if self.n == 1 else ""  # only_missing works with one sample a row
        return call.shown(Run(self.label, work, self.frame, self.errors, call.on_error, hint, self._answers))

    def _answers(self, rows: Iterable[int]) -> list[tuple[object, str]]:
        return [(self.df.index[row], self.columns.text[row * self.n] or "") for row in rows]

    def errors(self) -> list[tuple[object, str]]:
        """The failed rows' labels and errors."""
        rows = sorted(self.columns.errors)
        labels = self.df.index[rows].tolist()
        return [(label, self.columns.errors[row]) for label, row in zip(labels, rows, strict=True)]

    def frame(self, unfinished: str, rows: Sequence[int] | None = None) -> pd.DataFrame:
        """The frame with the answers so far; rows that have neither answer nor error get ``unfinished``."""
        columns, n, out = self.columns, self.n, self.out
        positions = np.arange(columns.size) if rows is None else np.asarray(rows, dtype=np.intp)
        base = self.df if rows is None else self.df.iloc[positions]
        if n > 1:
            base = base.iloc[np.repeat(np.arange(len(base)), n)]
        slots = (positions[:, None] * n + np.arange(n)).ravel()
        by_row = np.repeat(positions, n)
        texts = [columns.text[s] for s in slots]
        errors = [
            None if text is not None else columns.errors.get(row, unfinished)
            for row, text in zip(by_row.tolist(), texts, strict=True)
        ]
        new: dict[str, Any] = {out: text_column(texts, base.index), f"{out}_error": text_column(errors, base.index)}
        if n > 1:
            new[f"{out}_sample"] = pd.Series(np.tile(np.arange(n), len(positions)), base.index, dtype="Int64")
        if self.details:
            new.update(self._detail_columns(base.index, slots, by_row))
        result = base.copy()
        for name, values in new.items():
            if list(base.columns).count(name) > 1:
                result = result.loc[:, result.columns != name]
            result[name] = values
        return result

    def _detail_columns(self, index: pd.Index, slots: np.ndarray, rows: np.ndarray) -> dict[str, pd.Series]:
        columns, out = self.columns, self.out
        names = self.names
        answered = [columns.endpoint[r] for r in rows.tolist()]
        found: dict[str, pd.Series] = {
            "finish_reason": text_column([columns.finish_reason[s] for s in slots], index),
            "endpoint": text_column([names[e] if e >= 0 else None for e in answered], index),
            "prompt_tokens": _counts(np.asarray(columns.prompt_tokens)[slots], index),
            "completion_tokens": _counts(np.asarray(columns.completion_tokens)[slots], index),
            "latency_s": pd.Series(np.asarray(columns.latency_s)[rows], index, dtype="float64"),
            "attempts": pd.Series(np.frombuffer(columns.attempts, np.uint8)[rows], index).astype("Int64"),
        }
        if columns.reasoning:
            found["reasoning"] = text_column([columns.reasoning.get(s) for s in slots.tolist()], index)
        return {f"{out}_{name}": values for name, values in found.items()}


def text_column(values: Sequence[str | None], index: pd.Index) -> pd.Series:
    """Texts as a column of the fixed dtype, also where all are missing."""
    return pd.Series(values, index=index, dtype=TEXT)


def _counts(values: np.ndarray, index: pd.Index) -> pd.Series:
    return pd.Series(pd.arrays.IntegerArray(values.astype("int64"), values < 0), index=index)
