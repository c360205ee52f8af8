"""A column of vectors as one array."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from ..errors import SettingError
from ..frames.prompts import check_column, check_frame, missing_in, unique_column

__all__ = ["VectorsLike", "check_cosine", "vectors_of"]

VectorsLike = str | npt.NDArray[Any]


def check_cosine(name: str, value: object) -> float:
    """A cosine similarity that a call gives.

    Raises
    ------
    SettingError
        It is no number from -1 to 1.
    """
    if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating) or not -1 <= value <= 1:
        raise SettingError(f"{name}={value!r}: must be a cosine, -1 to 1")
    return float(value)


def vectors_of(df: pd.DataFrame, column: VectorsLike) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.intp]]:
    """The vectors of a frame's rows, and at which positions they are.

    Parameters
    ----------
    df : pandas.DataFrame
        The rows.
    column : str or array of shape (rows, n)
        A column of lists, arrays or Arrow's lists; or the vectors of all rows.

    Returns
    -------
    (array of float32, shape (known, n); array of int)
        Rows without a vector, and those whose vector is all zeros and so has no direction, are not among them.

    Raises
    ------
    UnknownColumnError, PromptError
        The column does not exist, or several have its name.
    SettingError
        Values that are no vectors, differ in length, or are not finite.

    Examples
    --------
    >>> vectors, rows = vectors_of(pd.DataFrame({"v": [[1, 2], None, [3, 4]]}), "v")
    >>> vectors.tolist(), rows.tolist()
    ([[1.0, 2.0], [3.0, 4.0]], [0, 2])
    """
    check_frame(df)
    if isinstance(column, str):
        check_column(df, column)
        values = unique_column(df, column)
        found, rows = _of_column(values, f"column {column!r}")
    else:
        found, rows = _of_array(column, len(df))
    if (bad := np.flatnonzero(~np.isfinite(found).all(axis=1))).size:
        raise SettingError(f"the vector of row {_label(df.index, int(rows[bad[0]]))!r} holds NaN or infinity")
    some = found.any(axis=1)
    return (found, rows) if some.all() else (found[some], rows[some])


def _of_array(values: npt.NDArray[Any], rows: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.intp]]:
    array = np.asarray(values)
    if array.ndim != 2 or len(array) != rows or array.dtype.kind not in "fiu":
        raise SettingError(
            f"vectors of shape {array.shape} and dtype {array.dtype}: must be numbers of shape ({rows}, n), a row of "
            "them for each row of the frame; or a column's name"
        )
    with np.errstate(over="ignore"):
        found = np.ascontiguousarray(array, np.float32)
    known = ~np.isnan(found).all(axis=1)  # as_array=True has missing rows so
    return (found, np.arange(rows)) if known.all() else (found[known], np.flatnonzero(known))


def _of_column(column: pd.Series, what: str) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.intp]]:
    rows = np.flatnonzero(~missing_in(column))
    if isinstance(column.dtype, pd.ArrowDtype):
        return _of_arrow(column, rows, what), rows
    values = column.array
    size = None
    found = np.zeros((0, 0), np.float32)
    for place, row in enumerate(rows.tolist()):
        value = values[row]
        try:
            if isinstance(value, str | bytes):
                raise TypeError
            with np.errstate(over="ignore"):
                vector = np.asarray(value, np.float32)
        except (TypeError, ValueError):
            vector = np.zeros((), np.float32)
        if vector.ndim != 1 or not vector.size:
            raise SettingError(
                f"{what} holds a {type(value).__name__} (row {_label(column.index, row)!r}): must be vectors, as lists "
                "or arrays of numbers. Make them of texts first, with a model for embeddings"
            )
        if size is None:
            size = len(vector)
            found = np.empty((len(rows), size), np.float32)
        if len(vector) != size:
            _differ(what, column, row, len(vector), size)
        found[place] = vector
    return found, rows


def _of_arrow(column: pd.Series, rows: npt.NDArray[np.intp], what: str) -> npt.NDArray[np.float32]:
    whole: Any = column.array.__arrow_array__()  # Arrow's protocol
    if not hasattr(whole.type, "value_type"):
        raise SettingError(f"{what} is {column.dtype}: must be lists of numbers")
    parts, sizes = [], []
    for chunk in getattr(whole, "chunks", [whole]):  # as one they may be more numbers than an array of lists can have
        some = chunk.drop_null()
        numbers = some.flatten().to_numpy(zero_copy_only=False)
        if numbers.dtype.kind not in "fiu":
            raise SettingError(f"{what} is {column.dtype}: must be lists of numbers")
        parts.append(numbers)
        fixed = getattr(some.type, "list_size", None)
        sizes.append(np.full(len(some), fixed) if fixed else some.value_lengths().to_numpy(zero_copy_only=False))
    lengths = np.concatenate(sizes) if sizes else np.zeros(0, np.intp)
    if (other := np.flatnonzero(lengths != lengths[:1].sum())).size:
        _differ(what, column, int(rows[other[0]]), int(lengths[other[0]]), int(lengths[0]))
    if not lengths[:1].sum():
        return np.zeros((len(rows), 0), np.float32)
    with np.errstate(over="ignore"):
        return np.concatenate(parts).astype(np.float32, copy=False).reshape(len(rows), -1)


def _label(index: pd.Index, row: int) -> object:
    """A row's label as Python has it."""
    return index[row : row + 1].tolist()[0]


def _differ(what: str, column: pd.Series, row: int, size: int, first: int) -> None:
    raise SettingError(
        f"{what} has a vector of {size} numbers (row {_label(column.index, row)!r}) beside one of {first}: all must "
        "be of one length"
    )
