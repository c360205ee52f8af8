"""The rows of which a model says yes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Unpack

import numpy as np
import pandas as pd

from ..errors import SettingError
from .call import arguments
from .classify import LabelFrame, labelled
from .options import NOT_OF_LABELS, FilterOptions
from .prompts import PromptLike, check_frame
from .signatures import takes

__all__ = ["filter"]

_YES, _NO = "yes", "no"


@takes(FilterOptions, without=NOT_OF_LABELS)
def filter(  # noqa: A001 - as pandas calls it; it is a method only, and no name of `from swarmkit import *`
    df: pd.DataFrame,
    prompt: PromptLike,
    threshold: float = 0.5,
    *,
    out: str = "keep",
    return_all: bool = False,
    **options: Unpack[FilterOptions],
) -> pd.DataFrame:
    """Keep the rows of which the model says yes.

    Each row is asked as by ``classify`` with the labels yes and no, and kept if the probability of yes, among the two,
    is high enough. Where no server gives log-probabilities, it is kept if the answer is yes, and a warning says so.

    Parameters
    ----------
    df : pandas.DataFrame
        The rows. Never changed.
    prompt : str, callable or Series
        A question that yes or no answers, as for ``scatter``.
    threshold : float, default 0.5
        The probability of yes from which on a row is kept, 0 to 1.
    out : str, default "keep"
        With ``return_all``, the name of the column that says whether a row is kept.
    return_all : bool, default False
        Whether all rows are returned, with the probability beside.

    Returns
    -------
    pandas.DataFrame
        The rows that are kept, as they are: same index, same order. Rows that failed are left out, and a warning says
        how many. With ``return_all`` all rows, with ``out`` (boolean, missing where the row failed), ``<out>_error``,
        and ``<out>_p``, the probability of yes.

    Raises
    ------
    SettingError, TypeError
        ``threshold`` is not from 0 to 1; with ``return_all``, ``out`` is a column of ``df`` that no such call
        has made; a keyword that ``filter`` does not take.
    UnknownColumnError, PromptError, NoEndpointsError, ScatterInterrupted, ScatterError
        As for ``scatter``; ``.frame`` has all rows.

    Examples
    --------
    >>> rows = df.swarm.filter("Is {gene} a gene of E. coli?", return_all=True)
    >>> kept = df.swarm.filter("Is {gene} a gene of E. coli?")
    >>> list(rows.columns), kept.index.tolist() == rows.index[rows["keep_p"] >= 0.5].tolist()
    (['gene', 'keep', 'keep_error', 'keep_p'], True)
    """
    given = {**arguments(filter, options), "out": out, "details": False, "only_missing": False}
    check_frame(df)
    if isinstance(out, str) and not return_all:  # it is not returned, so the frame's own columns are in nobody's way
        while any(name in df.columns for name in (out, f"{out}_error", f"{out}_p")):
            given["out"] = out = f"{out}_"
    if isinstance(threshold, bool) or not isinstance(threshold, int | float | np.number) or not 0 <= threshold <= 1:
        raise SettingError(f"threshold={threshold!r}: must be a probability, 0 to 1")
    frame = FilterFrame(df, prompt, float(threshold), return_all, given)
    result = labelled(frame, given)
    return result if return_all else df[frame.kept(result)]


class FilterFrame(LabelFrame):
    """A frame whose rows are kept or not.

    Parameters
    ----------
    df, prompt, given
        As for ``LabelFrame``.
    threshold, return_all
        As ``filter`` takes them.
    """

    def __init__(
        self, df: pd.DataFrame, prompt: PromptLike, threshold: float, return_all: bool, given: Mapping[str, Any]
    ) -> None:
        self._threshold = threshold
        self._returns_all = return_all
        super().__init__(df, prompt, [_YES, _NO], given)
        self.label = "filter"

    def hint(self) -> str:
        """What to do about failed rows."""
        return "" if self._returns_all else "They are left out; return_all=True keeps all rows, with their errors"

    def frame(self, unfinished: str, rows: Sequence[int] | None = None) -> pd.DataFrame:
        """The frame with what is known so far; rows that have neither answer nor error get ``unfinished``."""
        found = super().frame(unfinished, rows)
        label, chosen = found[self._label(self.out)], found[self._label(f"{self.out}_p")]
        yes = (label == _YES).astype("boolean")
        share = chosen.where(yes, 1 - chosen)
        found[self._label(self.out)] = (share >= self._threshold).fillna(yes).mask(label.isna())
        found[self._label(f"{self.out}_p")] = share
        return found

    def kept(self, result: pd.DataFrame) -> np.ndarray:
        """By row, whether it is kept."""
        found: np.ndarray = result[self._label(self.out)].to_numpy(bool, na_value=False)
        return found
