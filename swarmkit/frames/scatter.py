"""How replies become columns that are aligned with a frame."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import aclosing
from typing import Any

import numpy as np
import pandas as pd

from ..engine.columns import Columns
from ..errors import SettingError, warn
from ..records import Failure, Prompts
from ..runs.events import Listener
from ..runs.progress import show_unsent
from ..runs.run import Run
from ..runs.stats import RunStats
from ..text import plural
from .answers import DETAILS, TypedAnswers
from .call import PreparedCall, Send, is_whole
from .conversations import row_prompts
from .prompts import PromptLike, check_frame, missing_in, read_by, refuse_containers, values_of
from .provenance import circumstances, is_made, kept_from, label_of, noted, question, records
from .row_models import sender
from .typed import TEXT, text_column

__all__ = ["ScatterFrame"]

_AGAIN = "Ask only these rows again, on the result: df.swarm.{}(..., out={!r}, only_missing=True)"


class ScatterFrame:
    """A frame, its prompts, and its columns of answers, which are filled during the run.

    Parameters
    ----------
    df : DataFrame
        The caller's.
    prompt : str, callable or Series, optional
        As ``scatter`` takes it.
    given : mapping
        The call's keywords (``call.arguments``).
    """

    _anyway = "say overwrite=True"

    def __init__(self, df: pd.DataFrame, prompt: PromptLike | None, given: Mapping[str, Any]) -> None:
        out, n, details, only_missing = (given[name] for name in ("out", "n", "details", "only_missing"))
        if not isinstance(out, str) or not out:
            raise SettingError(f"out={out!r}: must be a column's name")
        if not is_whole(n, 1):
            raise SettingError(f"n={n!r}: must be a whole number of samples, 1 or more")
        check_frame(df)
        self.df = df.copy(deep=False)  # the caller may change its frame during the run
        self.index = df.index
        self.out = out
        self.n = n
        self.details = details
        self.typed = TypedAnswers.of(given)
        self._cuts = given["too_long"] != "error" or self._label(f"{out}_truncated") in df.columns
        self.names: list[str] = []
        self.prompts = self._make_prompts(prompt, given["messages"])
        self._prefix = given["assistant_prefix"] or ""
        self._other_words: set[int] = set()  # rows that keep an answer which does not begin with the prefix
        # Details of an earlier run would be those of other answers if they were not replaced with the answers.
        self._details = details or all(self._label(f"{out}_{name}") in df.columns for name in DETAILS)
        self._logprobs = given["logprobs"] is not None or self._label(f"{out}_logprob") in df.columns
        self.columns = Columns(len(df), n, self._logprobs and self._details)
        self.pending: list[int] | None = None
        self.label = "scatter"
        self.is_part = False  # of the rows of a call, which have one record, so that pandas.concat keeps it
        self._kept = np.zeros(len(df), bool)
        self._adds: list[str] = []  # names of its columns
        self._record = {"prompt": None, **question(prompt, given["messages"])}
        self.source: PreparedCall | None = None
        self._by_row = ""  # whose models answer, where that is a column's
        self.typed.check()
        self._check_result()
        if not given["overwrite"]:
            self._check_columns(prompt, given)
        if only_missing:
            self._keep_answers()
        for row, error in self.prompts.errors.items():  # part of the result from the start
            self.columns.fail(row, error)

    def _label(self, name: str) -> Any:
        return label_of(self.df, name)

    def _make_prompts(self, prompt: PromptLike | None, messages: Any) -> Prompts:
        return row_prompts(self.df, prompt, messages)

    def _check_result(self) -> None:
        """Make the result without its rows: what keeps answers from becoming a frame is found out before they cost
        anything."""
        if self.n > 1 and not self.df.flags.allows_duplicate_labels:
            raise SettingError(
                f"n={self.n} repeats each row's label, and this frame forbids duplicate labels: use n=1, or "
                "df.set_flags(allows_duplicate_labels=True)"
            )
        try:
            self.frame("", [])
        except Exception as exc:
            raise SettingError(
                f"this frame ({type(self.df).__name__}) cannot take the columns of answers, {self.out!r} and others: "
                f"{type(exc).__name__}: {exc}. Make a plain one of it: pandas.DataFrame(df)"
            ) from exc

    def _check_columns(self, prompt: Any, given: Mapping[str, Any]) -> None:
        """Refuse to overwrite what the prompt reads, and columns that no earlier call has made."""
        there = [name for name in self._adds if self._label(name) in self.df.columns]
        if not there:
            return
        read = read_by(self.df, prompt) | {given["messages"]}
        # A field without the prefix has nothing in its name that shows whose it is: the call that completes it does.
        lost = given["only_missing"] and self.out not in records(self.df)
        fields = self.typed.names if lost and is_made(self.df, self.out, f"{self.out}_error") else []
        for name in there:
            kept = given["only_missing"] and name == self.out  # but for what is missing
            if (label := self._label(name)) in read:
                whose, drop = ", which the prompt reads", ""
            elif kept or name in fields or is_made(self.df, self.out, name):
                continue
            else:
                whose, drop = " of the frame, which swarmkit did not make", ", rename or drop that column"
            what = f"{self._cause(name)} would overwrite {label!r}{whose}"
            raise SettingError(f"{what}: {self._remedy(name, drop)}, or {self._anyway}")

    def _cause(self, name: str) -> str:
        """Which keyword gives a column its name."""
        return f"out={self.out!r}" if name.startswith(self.out) else "prefix=False"

    def _remedy(self, name: str, drop: str) -> str:
        if name.startswith(self.out):
            return f"give the answers another name, out=...{drop}"
        return f"rename the schema's field or that column, leave prefix=True for {self.out}_{name}"

    def _keep_answers(self) -> None:
        if self._label(self.out) not in self.df.columns:
            return  # a first run: no row has an answer
        if self.n > 1:
            raise SettingError("only_missing=True works with one sample a row (n=1)")
        answers = self.df[self._label(self.out)]
        if isinstance(answers, pd.DataFrame):
            raise SettingError(f"several columns are named {self.out!r}; only_missing=True needs one")
        problem = self.typed.problem
        known, values = ~missing_in(answers), values_of(answers)
        refuse_containers(answers, values, f"the column of answers {self.out!r}")
        other = 0
        for row in np.flatnonzero(known).tolist():
            value = values[row]
            if not isinstance(value, str):
                other += 1
                # pandas.read_csv makes floats of whole numbers beside a gap.
                value = int(value) if isinstance(value, float) and value.is_integer() else value
            text = str(value).removeprefix(self._prefix)
            if problem(text) is not None:  # not valid, so it is asked again
                known[row] = False
                continue
            if self._prefix and text == str(value):
                self._other_words.add(row)
            self.columns.text[row] = text
            self.prompts.errors.pop(row, None)
        self._kept = known
        self.pending = np.flatnonzero(~known).tolist()
        if other and not self.typed.is_lone:
            warn(
                f"the column {self.out!r} is not text ({answers.dtype}): {plural(other, 'answer')} kept as text again, "
                "which may differ from what the model wrote, as 7 does from 007. Read such files with "
                f"pandas.read_csv(..., dtype={{{self.out!r}: str}})"
            )

    def not_sent(self) -> list[int]:
        """Rows that are not sent: those that keep their answer, and those without a prompt."""
        pending = range(self.columns.size) if self.pending is None else self.pending
        sent = {r for r in pending if self.prompts.texts[r] is not None}
        return [r for r in range(self.columns.size) if r not in sent]

    def start(self, call: PreparedCall, listeners: Sequence[Listener] = ()) -> Run:
        """Start a run that sends the prompts."""
        call, send = sender(call, self.df)
        self.source = call
        self._by_row = "" if send == call.send else f"that the column {call.model!r} names"

        async def work(stats: RunStats) -> Failure | None:
            async with aclosing(call):
                bars = call.listeners(self.label, stats)
                failure = await self._send(send, [*bars, *listeners], stats)
                if failure is None:
                    show_unsent(bars, stats.rows, stats)
                return failure

        hint = self.hint()
        handle = Run(
            self.label, work, self.frame, self.errors, call.on_error, hint, self._answers, self.index, call.deadline
        )
        self.names = handle.stats.roster.names
        return call.shown(handle)

    def hint(self) -> str:
        """What to do about failed rows."""
        return _AGAIN.format(self.label, self.out) if self.n == 1 else ""  # only_missing works with one sample a row

    async def _send(self, send: Send, listeners: Sequence[Listener], stats: RunStats) -> Failure | None:
        return await send(self.prompts, self.columns, listeners, stats, self.pending)

    def _answers(self, rows: Iterable[int]) -> list[tuple[object, str]]:
        return [(self.index[row], self._whole(row, self.columns.text[row * self.n]) or "") for row in rows]

    def _whole(self, row: int, text: str | None) -> str | None:
        """An answer with its first words."""
        return text if text is None or row in self._other_words else self._prefix + text

    def errors(self) -> list[tuple[object, str]]:
        """The failed rows' labels and errors."""
        rows = sorted(self.columns.errors)
        labels = self.index[rows].tolist()
        return [(label, self.columns.errors[row]) for label, row in zip(labels, rows, strict=True)]

    def _error(self, row: int, unfinished: str) -> str | None:
        """The error of a row without an answer."""
        return self.columns.error(row, unfinished)

    def frame(self, unfinished: str, rows: Sequence[int] | None = None) -> pd.DataFrame:
        """The frame with the answers so far; rows that have neither answer nor error get ``unfinished``."""
        base = self.df if rows is None else self.df.iloc[np.asarray(rows, dtype=np.intp)]
        return self.onto(base, unfinished, rows)

    def onto(self, base: pd.DataFrame, unfinished: str, rows: Sequence[int] | None = None) -> pd.DataFrame:
        """These rows of the frame, as ``base`` has them, with the answers so far."""
        columns, n, out = self.columns, self.n, self.out
        positions = np.arange(columns.size) if rows is None else np.asarray(rows, dtype=np.intp)
        if n > 1:
            base = base.iloc[np.repeat(np.arange(len(base)), n)]
        slots = (positions[:, None] * n + np.arange(n)).ravel()
        by_row = np.repeat(positions, n)
        texts = list(columns.text) if rows is None else [columns.text[s] for s in slots]
        # An answer that is not valid stands beside its error. Rows one by one: as a list they are 40 bytes each.
        errors = [
            self._error(row, unfinished) if text is None else columns.errors.get(row) if n == 1 else None
            for row, text in zip(by_row.data, texts, strict=True)  # its numbers one by one: a list is 40 bytes each
        ]
        whole = list(map(self._whole, by_row.tolist(), texts)) if self._prefix else texts
        new: dict[str, Any] = {out: text_column(whole, base.index), f"{out}_error": text_column(errors, base.index)}
        if self.typed.schema is not None:
            valid = [text if error is None else None for text, error in zip(texts, errors, strict=True)]
            new.update(self.typed.columns(valid, base.index))
        if n > 1:
            new[f"{out}_sample"] = pd.Series(np.tile(np.arange(n), len(positions)), base.index, dtype="Int64")
        if self._logprobs:
            sums = pd.Series([columns.logprob.get(s) for s in slots.tolist()], base.index, dtype="Float64")
            new.update(self._or_kept({f"{out}_logprob": sums}, by_row))
        if self._details:
            new.update(self._detail_columns(base.index, slots, by_row))
        return self._with(base, new)

    def _with(self, base: pd.DataFrame, new: Mapping[str, Any]) -> pd.DataFrame:
        """The frame with columns of answers."""
        result = base.copy()
        self._adds = list(new)
        for name, values in new.items():
            label = self._label(name)
            if list(base.columns).count(label) > 1:
                result = result.loc[:, [column != label for column in result.columns]]
            result[label] = values
        noted(result, base, self.out, self._provenance())
        return result

    def _provenance(self) -> dict[str, Any]:
        """The record of these answers."""
        part = self.is_part and self.pending is not None
        kept = kept_from(self.df, self.out, None if part else int(self._kept.sum()))
        if (call := self.source) is not None and "model" not in self._record:
            found = circumstances(call, self._by_row)
            if not found["model"]:  # no server has been asked yet
                return {"verb": self.label, "columns": self._adds, **self._record, **found, **kept}
            self._record |= found
        return {"verb": self.label, "columns": self._adds, **self._record, **kept}

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
        if columns.reasoning or self._label(f"{out}_reasoning") in self.df.columns:
            found["reasoning"] = text_column([columns.reasoning.get(s) for s in slots.tolist()], index)
        if self._cuts:
            found["truncated"] = pd.Series([r in columns.truncated for r in rows.tolist()], index, dtype="boolean")
        if self._logprobs and columns.keeps_tokens:
            found["token_logprobs"] = pd.Series(
                [columns.token_logprobs.get(s) for s in slots.tolist()], index, dtype=object
            )
        return self._or_kept({f"{out}_{name}": values for name, values in found.items()}, rows)

    def _or_kept(self, found: dict[str, pd.Series], rows: np.ndarray) -> dict[str, pd.Series]:
        """Columns by name; rows that keep their answer have the values that the frame has there."""
        kept = self._kept[rows]
        if kept.any():
            for name, values in found.items():
                label = self._label(name)
                if list(self.df.columns).count(label) == 1:
                    earlier = self.df[label].iloc[rows]
                    like = earlier if name.endswith("token_logprobs") else _like(earlier, values)
                    found[name] = values.where(~kept, like)
        return found


def _like(earlier: pd.Series, values: pd.Series) -> pd.Series:
    """Details of an earlier run, perhaps read from a file, with the dtype of this run's."""
    if values.dtype == TEXT:
        texts = zip(values_of(earlier), missing_in(earlier), strict=True)
        return text_column([None if absent else str(v) for v, absent in texts], values.index)
    if values.dtype == "boolean":
        flags = [None if a else str(v) == "True" for v, a in zip(values_of(earlier), missing_in(earlier), strict=True)]
        return pd.Series(flags, values.index, dtype="boolean")
    numbers = pd.to_numeric(pd.Series(values_of(earlier), values.index, dtype=object), errors="coerce")
    found = numbers.to_numpy(np.float64, na_value=np.nan)
    if values.dtype in (np.float64, pd.Float64Dtype()):
        return pd.Series(found, values.index, dtype=values.dtype)
    return _counts(np.where(found == np.floor(found), found, -1.0), values.index)


def _counts(values: np.ndarray, index: pd.Index) -> pd.Series:
    return pd.Series(pd.arrays.IntegerArray(values.astype("int64"), values < 0), index=index)
