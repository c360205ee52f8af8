"""The answers to each question: the rows of a frame that share an index label."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from ..errors import SettingError, warn
from ..frames.prompts import check_column, check_frame, missing_in, unique_column, values_of

__all__ = ["Samples", "beside"]


@dataclass(frozen=True, slots=True)
class Samples:
    """Answers, and which question each of them answers.

    Attributes
    ----------
    index : pandas.Index
        The index labels, each once, in order of appearance: the questions.
    question : array of int
        By row: the number of its question, from 0.
    answers : list
        By row: what answers are compared by; None where there is no valid answer.
    column : pandas.Series
        The column of answers, as it is.
    """

    index: pd.Index
    question: npt.NDArray[np.intp]
    answers: list[Any]
    column: pd.Series

    @classmethod
    def of(cls, df: pd.DataFrame, column: str, normalize: Callable[[Any], Any] | None = None) -> Samples:
        """The answers of a column. Those that are missing, that stand beside an error, or that ``normalize`` makes None
        or NaN are not valid."""
        check_frame(df)
        check_column(df, column)
        answers = unique_column(df, column)
        question, _ = df.index.factorize(use_na_sentinel=False)
        _, first = np.unique(question, return_index=True)
        absent = missing_in(answers)
        errors = beside(df, column, "error")
        if errors is not None:
            absent = absent | np.array([isinstance(error, str) for error in errors], bool)
        values = zip(values_of(answers), absent.tolist(), strict=True)
        read = normalize or _plain
        found = [None if no else _read(read, value, df.index, row) for row, (value, no) in enumerate(values)]
        _check_labels(df, column, question)
        return cls(df.index.take(first), question, found, answers)


def beside(df: pd.DataFrame, column: str, name: str) -> pd.Series | None:
    """What a verb wrote beside a column of answers, or beside the answers that the column is a field of; None where
    there is no such column."""
    column, labels = _name(column), {_name(label): label for label in df.columns}
    owners = [label.removesuffix(f"_{name}") for label in labels if label.endswith(f"_{name}")]
    near = [owner for owner in owners if column == owner or column.startswith(f"{owner}_")]
    found = df[labels[f"{max(near, key=len)}_{name}"]] if near else None
    return found if isinstance(found, pd.Series) else None


def _name(label: Hashable) -> str:
    """The name of a column; with several levels of columns that on the first, where verbs write theirs."""
    return str(label[0] if isinstance(label, tuple) and not any(label[1:]) else label)


def _read(read: Callable[[Any], Any], value: Any, index: pd.Index, row: int) -> Any:
    try:
        found = read(value)
    except Exception as exc:
        label = index[row : row + 1].tolist()[0]
        raise SettingError(f"normalize= failed on row {label!r}, {value!r}: {exc!r}") from exc
    return None if found is pd.NA or found is pd.NaT or (isinstance(found, float) and found != found) else found


def _plain(value: Any) -> Any:
    """An answer without the white space around it."""
    return value.strip() if isinstance(value, str) else value


def _check_labels(df: pd.DataFrame, column: str, question: npt.NDArray[np.intp]) -> None:
    """Warn where a label stands for several rows that were asked ``n`` samples each."""
    samples = beside(df, column, "sample")
    if samples is not None and (again := pd.DataFrame({"q": question, "s": samples.to_numpy()}).duplicated()).any():
        label = df.index[again.to_numpy()].tolist()[0]
        warn(
            f"the index label {label!r} stands for several rows with samples, whose answers are counted together: "
            "df.reset_index() before scatter tells them apart"
        )
