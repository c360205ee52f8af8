"""Rows whose vectors are close: the nearest of each, and duplicates."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from ..errors import SettingError
from ..frames.call import is_whole
from ..frames.prompts import plain_scalar
from .nearest import Vectors
from .vectors import VectorsLike, check_cosine, vectors_of

__all__ = ["dedupe", "similar"]


def similar(df: pd.DataFrame, column: VectorsLike, k: int = 5) -> pd.DataFrame:
    """Find the most similar other rows of each row, by the cosines of their vectors.

    The result is exact. It takes memory for the vectors, for the result and for blocks of some megabytes, and time by
    the square of the rows.

    Parameters
    ----------
    df : pandas.DataFrame
        The rows. Never changed.
    column : str or array of shape (rows, n)
        The column of vectors: lists, arrays or Arrow's lists of numbers, all of one length; or the vectors themselves.
        They are compared as float32.
    k : int, default 5
        How many others of each row.

    Returns
    -------
    pandas.DataFrame
        A row per pair, under the index label of ``df``, in the order of ``df``: ``rank`` (from 1, most similar first),
        ``other`` (the other row's index label), ``position`` (its position, from 0) and ``similarity`` (-1 to 1). Of
        others that are equally similar, the first come first. Rows without a vector, or with zeros only, are not in it.

    Raises
    ------
    UnknownColumnError, PromptError
        The column does not exist, or several have its name.
    SettingError
        ``k`` is no whole number from 1, or the values are no vectors of one length.

    Examples
    --------
    >>> import swarmkit, pandas as pd
    >>> df = pd.DataFrame({"v": [[1.0, 0.0], [0.0, 1.0], [3.0, 4.0]]}, index=["a", "b", "c"])
    >>> swarmkit.similar(df, "v", k=1)
       rank other  position  similarity
    a     1     c         2         0.6
    b     1     c         2         0.8
    c     1     b         1         0.8
    """
    k = plain_scalar(k) if isinstance(k, np.generic) else k
    if not is_whole(k, 1):
        raise SettingError(f"k={k!r}: must be a whole number of other rows, 1 or more")
    vectors, rows = vectors_of(df, column)
    places, others, cosines = Vectors(vectors).nearest(k)
    firsts = np.searchsorted(places, places)
    other = rows[others]
    columns: dict[str, Any] = {
        "rank": pd.array(np.arange(len(places)) - firsts + 1, dtype="Int64"),
        "other": df.index.to_flat_index().take(other),
        "position": pd.array(other, dtype="Int64"),
        "similarity": cosines,
    }
    return pd.DataFrame(columns, index=df.index.take(rows[places]))


def dedupe(
    df: pd.DataFrame, column: VectorsLike, threshold: float = 0.95, *, out: str = "cluster", return_all: bool = False
) -> pd.DataFrame:
    """Leave out rows that are similar to an earlier row, by the cosines of their vectors.

    Rows are kept in order, unless they are similar to one that is kept already: of those that are left no two are
    similar, and each that is left out is similar to one that is kept. The result is exact; memory as for ``similar``.

    Parameters
    ----------
    df : pandas.DataFrame
        The rows. Never changed.
    column : str or array of shape (rows, n)
        The vectors, as for ``similar``.
    threshold : float, default 0.95
        Cosine from which on two rows are similar, -1 to 1.
    out : str, default "cluster"
        With ``return_all``, the name of the column of clusters.
    return_all : bool, default False
        Whether all rows are returned, with their clusters.

    Returns
    -------
    pandas.DataFrame
        The rows that are kept, as they are: same index, same order. Rows without a vector are kept. With
        ``return_all`` all rows, with ``out`` (number of the cluster, from 0 in order of appearance), ``<out>_first``
        (the index label of the row that is kept of it) and ``<out>_similarity`` (the cosine with that row, 1 for the
        row itself); the three are missing for rows without a vector.

    Raises
    ------
    UnknownColumnError, PromptError
        The column does not exist, or several have its name.
    SettingError
        ``threshold`` is not from -1 to 1, a column of the result would overwrite one of ``df`` (only all three are
        replaced), or the values are no vectors of one length.

    Examples
    --------
    >>> import swarmkit, pandas as pd
    >>> df = pd.DataFrame({"v": [[1.0, 0.0], [0.0, 1.0], [1.0, 0.1]]}, index=["a", "b", "c"])
    >>> df.swarm.dedupe("v", threshold=0.9).index.tolist()
    ['a', 'b']
    >>> df.swarm.dedupe("v", threshold=0.9, return_all=True)["cluster_first"].tolist()
    ['a', 'b', 'a']
    """
    least = check_cosine("threshold", threshold)
    vectors, rows = vectors_of(df, column)
    found = Vectors(vectors)
    leaders = found.leaders(least)
    if not return_all:
        dropped = rows[leaders != np.arange(len(rows))]
        kept = np.ones(len(df), bool)
        kept[dropped] = False
        return df[kept]
    names = [out, f"{out}_first", f"{out}_similarity"]
    clash = [name for name in names if name in df.columns]
    if 0 < len(clash) < len(names):  # all are those of an earlier call
        raise SettingError(f"return_all=True would overwrite the column {clash[0]!r}: choose another out=")
    first, cluster = np.unique(leaders, return_inverse=True)
    missing = np.ones(len(df), bool)
    missing[rows] = False
    numbers, labels, cosines = np.zeros(len(df), np.int64), np.full(len(df), -1), np.full(len(df), np.nan)
    numbers[rows], labels[rows] = cluster.ravel(), rows[first][cluster.ravel()]
    cosines[rows] = found.cosines(np.arange(len(rows)), leaders)
    result = df.copy()
    result[names[0]] = pd.Series(pd.arrays.IntegerArray(numbers, missing), df.index)
    known = pd.Series(df.index.to_flat_index())
    known = known.astype("Int64") if known.dtype.kind == "i" else known  # floats if some are missing, otherwise
    result[names[1]] = known.reindex(labels).set_axis(df.index)
    result[names[2]] = cosines
    return result
