"""The values of typed answers as columns, with the dtypes that their schema promises."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pandas as pd

from ..errors import SettingError
from ..schema import Field, Kind, Schema
from ..text import encodable

__all__ = ["TEXT", "DtypeBackend", "text_column", "typed_columns"]

TEXT: Any = "str" if int(pd.__version__.split(".")[0]) >= 3 else object
"""The dtype of text columns: pandas' string dtype where it is the default, else object."""

DtypeBackend = Literal["numpy_nullable", "pyarrow"]
"""Whose dtypes the columns have."""


def text_column(values: Sequence[str | None], index: pd.Index) -> pd.Series:
    r"""Texts as a column of the fixed dtype, also where all are missing.

    A model may write half of a surrogate pair, which the string dtype of pandas 3 cannot hold: it is written as an
    escape, ``\udc80``.
    """
    try:
        return pd.Series(values, index=index, dtype=TEXT)
    except UnicodeEncodeError:
        return pd.Series([None if v is None else encodable(v) for v in values], index=index, dtype=TEXT)


def typed_columns(
    schema: Schema,
    values: Sequence[tuple[Any, ...] | None],
    index: pd.Index,
    *,
    dtype_backend: DtypeBackend | None = None,
) -> dict[str, pd.Series]:
    """A column for each field of a schema.

    Parameters
    ----------
    schema : Schema
        The schema of all answers.
    values : sequence of tuple or None
        What ``schema.values`` gave for each row; None where there is no valid answer.
    index : Index
        The labels of the rows.
    dtype_backend : {"numpy_nullable", "pyarrow"}, optional
        As in pandas; by default, nullable dtypes, and texts in the frame's string dtype.

    Returns
    -------
    dict of str to Series
        By the field's name, "" for a lone value. The dtype depends on the field alone, with one exception: whole
        numbers that 64 bits cannot hold make it ``object``. Times with an offset become UTC; all are without a zone.

    Examples
    --------
    >>> schema = Schema.of({"tone": ["pos", "neg"], "n": int})
    >>> pd.DataFrame(typed_columns(schema, [("pos", 12), None], pd.Index(["a", "b"])))
      tone     n
    a  pos    12
    b  NaN  <NA>
    """
    if dtype_backend not in (None, "numpy_nullable", "pyarrow"):
        raise SettingError(f"dtype_backend={dtype_backend!r}: must be 'numpy_nullable' or 'pyarrow'")
    make = _arrow_column if dtype_backend == "pyarrow" else _column
    return {
        field.name: make(field, [None if row is None else row[i] for row in values], index)
        for i, field in enumerate(schema.fields)
    }


def _column(field: Field, values: list[Any], index: pd.Index) -> pd.Series:
    match field.kind:
        case "text":
            return text_column(values, index)
        case "label":
            return pd.Series(pd.Categorical.from_codes(_codes(field, values), pd.Index(field.labels)), index=index)
        case "date" | "datetime":
            return pd.Series(_times(values), index=index)
        case "object":
            return pd.Series(values, index, dtype=object)
    try:
        return pd.Series(pd.array(values, dtype=_NULLABLE[field.kind]), index)
    except (OverflowError, TypeError):  # whole numbers that 64 bits cannot hold
        return pd.Series(values, index, dtype=object)


def _arrow_column(field: Field, values: list[Any], index: pd.Index) -> pd.Series:
    try:
        import pyarrow as pa
    except ImportError:
        raise SettingError(
            "dtype_backend='pyarrow': pyarrow is not installed; pip install \"swarmkit-frames[parquet]\""
        ) from None

    match field.kind:
        case "object":
            return pd.Series(values, index, dtype=object)
        case "text":
            array = pa.array([None if v is None else encodable(v) for v in values], pa.string())
        case "label":
            codes = _codes(field, values)
            array = pa.DictionaryArray.from_arrays(
                pa.array(codes, pa.int32(), mask=codes < 0), pa.array(field.labels, pa.string())
            )
        case "date":
            array = pa.array(values, pa.date32())
        case "datetime":
            array = pa.array(_times(values), pa.timestamp("us"))
        case "int":
            try:
                array = pa.array(values, pa.int64())
            except (OverflowError, pa.ArrowInvalid):
                return pd.Series(values, index, dtype=object)
        case "float":
            array = pa.array(values, pa.float64(), from_pandas=True)  # NaN is no number
        case "bool":
            array = pa.array(values, pa.bool_())
    return pd.Series(pd.arrays.ArrowExtensionArray(array), index=index)


_NULLABLE: dict[Kind, Any] = {"int": "Int64", "float": "Float64", "bool": "boolean"}


def _codes(field: Field, values: list[Any]) -> npt.NDArray[np.int32]:
    code = {label: i for i, label in enumerate(field.labels)}
    return np.fromiter((-1 if v is None else code[v] for v in values), np.int32, len(values))


def _times(values: list[Any]) -> np.ndarray:
    return np.array([_in_utc(v) if isinstance(v, datetime.datetime) else v for v in values], "datetime64[us]")


def _in_utc(time: datetime.datetime) -> Any:
    offset = time.utcoffset()
    naive = time.replace(tzinfo=None)
    # Not astimezone(): the first and the last day of Python's calendar would overflow.
    return np.datetime64(naive, "us") - np.timedelta64(offset) if offset else naive
