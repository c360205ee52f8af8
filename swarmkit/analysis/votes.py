"""One answer of several: the most frequent, and how much the others agree."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Set
from typing import Any

import numpy as np
import pandas as pd

from ..frames.typed import text_column
from .samples import Samples

__all__ = ["vote"]


def vote(df: pd.DataFrame, column: str = "response", *, normalize: Callable[[Any], Any] | None = None) -> pd.DataFrame:
    """Count the answers to each question, and take the most frequent.

    The answers to a question are the rows that share its index label, as ``scatter(..., n=10)`` returns them.

    Parameters
    ----------
    df : pandas.DataFrame
        The rows. Never changed.
    column : str, default "response"
        The column of answers: texts, which are compared without the white space around them, or typed values of any
        kind.
    normalize : callable, optional
        A function of an answer that returns what is compared, and becomes the ``answer``: ``str.lower``, or one that
        finds the number in a text. Answers of which it makes None do not count.

    Returns
    -------
    pandas.DataFrame
        A row per index label, in order of appearance: ``answer``, in the dtype of ``column`` (the first of those that
        are equally frequent); ``agreement``, its share of the valid answers, 0 to 1; ``entropy`` of their shares, in
        nats: 0 where all are the same; and ``n_valid``. Missing answers, and those beside an error in
        ``<column>_error``, are not valid; where there is no valid one, the first three are missing.

    Raises
    ------
    UnknownColumnError, PromptError
        The column does not exist, or several have its name.
    SettingError
        ``normalize`` failed on an answer; the message says which.

    Examples
    --------
    >>> import swarmkit, pandas as pd
    >>> df = pd.DataFrame({"response": ["7", "7", "8", "no idea"]}, index=["q1", "q1", "q1", "q2"])
    >>> swarmkit.vote(df, normalize=lambda text: int(text) if text.isdigit() else None)
        answer  agreement   entropy  n_valid
    q1       7   0.666667  0.636514        3
    q2    <NA>       <NA>      <NA>        0
    """
    samples = Samples.of(df, column, normalize)
    questions, numbers = len(samples.index), dict[Hashable, int]()
    rows = np.array([row for row, answer in enumerate(samples.answers) if answer is not None], np.intp)
    answer = np.array([numbers.setdefault(_key(samples.answers[row]), len(numbers)) for row in rows], np.int64)
    question = samples.question[rows]
    pairs, first, counts = np.unique(question * max(len(numbers), 1) + answer, return_index=True, return_counts=True)
    of = pairs // max(len(numbers), 1)
    valid = np.bincount(question, minlength=questions)
    shares = counts / valid[of]
    entropy = np.bincount(of, -shares * np.log(shares), questions)
    order = np.lexsort((first, -counts, of))
    answered, best = np.unique(of[order], return_index=True)
    chosen, agreement = np.full(questions, -1), np.zeros(questions)
    chosen[answered], agreement[answered] = rows[first[order[best]]], shares[order[best]]
    none = valid == 0
    if normalize is None:
        answers = samples.column.reset_index(drop=True).reindex(chosen).set_axis(samples.index)
    else:
        answers = _column([None if row < 0 else samples.answers[row] for row in chosen.tolist()], samples.index)
    result = pd.DataFrame({"answer": answers}, samples.index)
    result["agreement"] = pd.arrays.FloatingArray(agreement, none)
    result["entropy"] = pd.arrays.FloatingArray(np.maximum(entropy, 0.0), none)
    result["n_valid"] = pd.array(valid, dtype="Int64")
    return result


def _key(value: Any) -> Hashable:
    """What is the same for equal answers, also for those that are lists or dicts."""
    if isinstance(value, Mapping):
        return "dict", frozenset((key, _key(inner)) for key, inner in value.items())
    if isinstance(value, Set):
        return "set", frozenset(map(_key, value))
    if isinstance(value, list | tuple | np.ndarray):
        return "list", *map(_key, value)
    return isinstance(value, bool), value  # True is 1, too


def _column(values: list[Any], index: pd.Index) -> pd.Series:
    """Values of one kind as a column of its dtype, which depends on the kind alone."""
    kinds = {type(value) for value in values if value is not None}
    if kinds <= {str}:
        return text_column(values, index)
    numbers: list[tuple[set[type], Any]] = [({bool}, "boolean"), ({int}, "Int64"), ({int, float}, "Float64")]
    dtype = next((dtype for names, dtype in numbers if kinds <= names), object)
    return pd.Series(values, index, dtype=dtype)
