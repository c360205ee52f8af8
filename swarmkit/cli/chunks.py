"""The chunks of a table on their way through ``swarmkit scatter``: what is asked, and what stays as it was read."""

from __future__ import annotations

import argparse
import math
from collections import deque
from dataclasses import dataclass

import numpy as np
import pandas as pd

from ..frames.scatter import ScatterFrame

__all__ = ["Chunks"]


@dataclass(frozen=True, slots=True)
class _Chunk:
    read: pd.DataFrame
    texts: list[str]
    """Columns of texts that the prompt formats as numbers."""
    skipped: np.ndarray
    """By row: whether it is not asked, since the limit is reached."""


class Chunks:
    """Applies ``--limit`` to the chunks of a table, and puts back what is not to change.

    Attributes
    ----------
    not_asked : int
        Rows that were not asked, because of the limit.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.not_asked = 0
        self._args = args
        self._left = args.limit or math.inf
        self._chunks: deque[_Chunk] = deque()

    def prepared(self, read: pd.DataFrame, typed: pd.DataFrame, frame: ScatterFrame) -> None:
        """Note a chunk before it is sent, as it was read and with numbers for the prompt; limit what is asked of it."""
        texts = [c for c in read.columns if typed[c].dtype != read[c].dtype and c != self._args.out]
        skipped = np.zeros(len(read), dtype=bool)
        pending = range(len(read)) if frame.pending is None else frame.pending
        asked = [row for row in pending if frame.prompts.texts[row] is not None]
        if len(asked) >= self._left:
            left = int(self._left)
            last = asked[left - 1] if left else -1
            skipped[[row for row in pending if row > last]] = True
            frame.pending = [row for row in pending if row <= last]
            for row in np.flatnonzero(skipped).tolist():
                frame.prompts.errors.pop(row, None)
                frame.columns.errors.pop(row, None)
            asked = asked[:left]
        self._left -= len(asked)
        self.not_asked += int(skipped.sum())
        self._chunks.append(_Chunk(read, texts, skipped))

    def drop(self) -> None:
        """The next chunk is not sent."""
        self._chunks.popleft()

    def finished(self, frame: pd.DataFrame) -> tuple[pd.DataFrame, pd.Series]:
        """The next chunk as it is to be written, and the errors of the rows that were asked."""
        chunk, out = self._chunks.popleft(), self._args.out
        for name in chunk.texts:
            frame[name] = chunk.read[name].loc[frame.index].to_numpy()
        if self._args.details:  # a chunk has this column only if its answers have reasoning; the output always does
            reasoning = f"{out}_reasoning"
            frame[reasoning] = frame.get(reasoning)
        skipped = np.repeat(chunk.skipped, self._args.n)
        errors = frame[f"{out}_error"][~skipped].dropna()
        if skipped.any():
            for name in [c for c in frame.columns if c == out or str(c).startswith(f"{out}_")]:
                if name == f"{out}_sample":
                    continue
                if name in chunk.read.columns:
                    frame[name] = _put_back(frame[name], chunk.read[name].loc[frame.index], skipped)
                elif name in (out, f"{out}_error"):
                    frame[name] = frame[name].mask(skipped)
        return frame, errors


def _put_back(new: pd.Series, old: pd.Series, where: np.ndarray) -> pd.Series:
    """The new values, and the old ones of the rows that were not asked."""
    if pd.api.types.is_bool_dtype(new.dtype):
        old = old.map(str, na_action="ignore").map({"True": True, "False": False})
    elif pd.api.types.is_numeric_dtype(new.dtype):
        old = pd.to_numeric(old, errors="coerce")
    else:
        old = old.map(str, na_action="ignore")
    mixed = new.astype(object).where(~where, pd.Series(old.to_numpy(), new.index, dtype=object))
    return mixed.where(mixed.notna(), None).astype(new.dtype)
