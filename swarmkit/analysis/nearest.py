"""Which of many vectors are close to each other: exact, block by block, in numpy.

The cosines of all pairs are computed as products of blocks in float32; those that may count are computed again in
float64. For a start the products are of sketches, which have a few directions of the vectors and the length of what is
left: with that as one more coordinate, the product is never below the cosine (by the inequality of Cauchy and Schwarz),
so pairs with a lower product are out. Vectors that are equal, byte by byte, are computed once.
"""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import blake2b

import numpy as np
import numpy.typing as npt

__all__ = ["Vectors"]

Rows = npt.NDArray[np.intp]

_EXACT = 4096  # pairs whose cosines are computed at once
_FEWEST = 96  # coordinates for which a sketch is worth it
_MOST = 160  # directions of a sketch
_SAMPLE = 512  # vectors that say which directions
_SMALL = 1e-18  # a norm below, or above its inverse, is far from 1
_PRUNED = 64  # a sketch has done its work if it leaves one of so many pairs
_REST = 32  # blocks, after one for which it has not


class Vectors:
    """Vectors, to be compared by their cosines.

    Parameters
    ----------
    rows : array of float32, shape (n, d)
        The vectors; finite, none of them zero.
    block : int, default 1024
        How many are compared with how many others at once: products of two such blocks are 4 MB.
    """

    def __init__(self, rows: npt.NDArray[np.float32], block: int = 1024) -> None:
        self._block = block
        self._first, self._group = _distinct(rows)
        self._rows = rows if len(self._first) == len(rows) else rows[self._first]
        self._squares = self._summed_squares()
        norms = np.sqrt(self._squares)
        if len(norms) and not _SMALL < norms.min() <= norms.max() < 1 / _SMALL:  # float32 would overflow
            self._rows = np.ldexp(self._rows, -np.frexp(norms)[1][:, None])
            self._squares = self._summed_squares()
            norms = np.sqrt(self._squares)
        self._inverse = (1 / norms).astype(np.float32)[:, None]
        self._margin = 4 * (rows.shape[1] + 8) * float(np.finfo(np.float32).eps)  # of a product of float32
        self._memory = np.empty(min(block, len(self._rows)) ** 2, np.float32)
        self._resting = 0  # blocks for which no sketch is tried
        self._sketch = self._sketched() if rows.shape[1] >= _FEWEST else None

    def leaders(self, threshold: float) -> Rows:
        """By row: itself if it is kept, else the first kept row to which it is similar.

        Rows are kept in order, unless their cosine with a row that is kept already is ``threshold`` or more.
        """
        leader = np.full(len(self._rows), -1)
        kept = np.zeros(0, np.intp)
        for block in self._blocks():
            for start in range(0, len(kept), self._block):
                others, open_rows = kept[start : start + self._block], block[leader[block] < 0]
                rows, places = self._pairs(open_rows, others, threshold - self._margin)
                reached = self._cosines(open_rows[rows], others[places]) >= threshold
                rows, places = rows[reached], places[reached]
                rows, first = np.unique(rows, return_index=True)
                leader[open_rows[rows]] = others[places[first]]
            kept = np.concatenate([kept, self._lead(block[leader[block] < 0], threshold, leader)])
        found: Rows = self._first[leader][self._group]
        return found

    def _lead(self, rows: Rows, threshold: float, leader: Rows) -> Rows:
        """Of rows that no earlier one leads, those that are kept; the leaders of the others are noted."""
        may = np.triu(self._may_reach(rows, rows, threshold - self._margin), 1)
        leader[rows] = rows
        for place in np.flatnonzero(may.any(axis=1)):
            row = rows[place]
            if leader[row] == row:
                others = rows[np.flatnonzero(may[place])]
                others = others[leader[others] == others]
                leader[others[self._cosines(np.full(len(others), row), others) >= threshold]] = row
        found: Rows = rows[leader[rows] == rows]
        return found

    def nearest(self, k: int) -> tuple[Rows, Rows, npt.NDArray[np.float64]]:
        """The ``k`` most similar others of each row: row, other and cosine, nearest first; equal ones in order.

        Rows are in order, and have fewer where there are not so many others.
        """
        best = _Best(len(self._rows), min(k, max(len(self._rows) - 1, 1)))
        for block in self._blocks():  # where to begin, so that few pairs are computed again
            units = self._units(block)
            products = self._products(units, units)
            np.fill_diagonal(products, -2)
            if len(block) > best.k:
                best.least[block] = np.partition(products, -best.k, axis=1)[:, -best.k] - 2 * self._margin
        for number, block in enumerate(self._blocks()):
            for other in list(self._blocks())[number:]:
                least = np.minimum(best.least[block][:, None], best.least[other])
                rows, places = self._pairs(block, other, least)
                found = block[rows], other[places]
                if other[0] == block[0]:
                    upper = rows < places
                    found = found[0][upper], found[1][upper]
                cosines = self._cosines(*found)
                best.add(*found, cosines, self._margin)
                best.add(*found[::-1], cosines, self._margin)
        return self._expanded(best, k)

    def _expanded(self, best: _Best, k: int) -> tuple[Rows, Rows, npt.NDArray[np.float64]]:
        """The nearest of all rows, by those of the distinct ones."""
        if len(self._first) == len(self._group):
            known = best.cosine > -2
            rows = np.nonzero(known)[0]
            return rows, best.other[known], best.cosine[known]
        order = np.argsort(self._group, kind="stable")
        members = np.split(order, np.searchsorted(self._group[order], np.arange(1, len(self._first))))
        found: list[tuple[Rows, npt.NDArray[np.float64]]] = []
        for group, (others, cosines) in enumerate(zip(best.other, best.cosine, strict=True)):
            near = [(group, 1.0), *((o, c) for o, c in zip(others.tolist(), cosines.tolist(), strict=True) if c > -2)]
            places = np.concatenate([members[one][: k + 1] for one, _ in near])
            values = np.concatenate([np.full(len(members[one][: k + 1]), cosine) for one, cosine in near])
            first = np.lexsort((places, -values))[: k + 1]
            found.append((places[first], values[first]))
        nearest: list[tuple[Rows, Rows, npt.NDArray[np.float64]]] = []
        for row, group in enumerate(self._group.tolist()):
            places, values = found[group]
            chosen = np.flatnonzero(places != row)[:k]
            nearest.append((np.full(len(chosen), row), places[chosen], values[chosen]))
        rows, theirs, similar = (np.concatenate(parts) for parts in zip(*nearest, strict=True))
        return rows, theirs, similar

    def cosines(self, rows: Rows, others: Rows) -> npt.NDArray[np.float64]:
        """The cosines of pairs of rows, in float64; 1 where they are equal."""
        one, other = self._group[rows], self._group[others]
        return np.where(one == other, 1.0, self._cosines(one, other))

    # ---- products ------------------------------

    def _blocks(self) -> Iterator[Rows]:
        count, size = len(self._rows), self._block
        return (np.arange(start, min(start + size, count)) for start in range(0, count, size))

    def _summed_squares(self) -> npt.NDArray[np.float64]:
        parts = [(self._rows[block].astype(np.float64) ** 2).sum(axis=1) for block in self._blocks()]
        return np.concatenate([np.zeros(0), *parts])

    def _units(self, rows: Rows) -> npt.NDArray[np.float32]:
        found: npt.NDArray[np.float32] = self._rows[rows] * self._inverse[rows]
        return found

    def _sketched(self) -> npt.NDArray[np.float32]:
        count, size = self._rows.shape
        sample = self._units(np.unique(np.linspace(0, count - 1, min(count, _SAMPLE)).astype(np.intp)))
        axes = np.linalg.svd(sample.astype(np.float64), full_matrices=False)[2][: min(size // 5, _MOST)]
        axes = axes.astype(np.float32)
        sketch = np.empty((count, len(axes) + 1), np.float32)
        for block in self._blocks():
            units = self._units(block)
            along = units @ axes.T
            sketch[block, :-1] = along
            sketch[block, -1] = np.linalg.norm(units - along @ axes, axis=1)
        return sketch

    def _pairs(self, rows: Rows, others: Rows, least: float | npt.NDArray[np.float32]) -> tuple[Rows, Rows]:
        """Pairs that may have a cosine of ``least`` or more: all that have it, and a few others; in order."""
        found = np.flatnonzero(self._may_reach(rows, others, least))
        return np.divmod(found, max(len(others), 1))

    def _may_reach(self, rows: Rows, others: Rows, least: float | npt.NDArray[np.float32]) -> npt.NDArray[np.bool_]:
        """Which pairs these are."""
        if self._sketch is not None and not self._resting:
            may: npt.NDArray[np.bool_] = self._products(self._sketch[rows], self._sketch[others]) >= least
            if np.count_nonzero(may) * _PRUNED <= may.size:
                return may
            self._resting = _REST
        self._resting = max(self._resting - 1, 0)
        return np.asarray(self._products(self._units(rows), self._units(others)) >= least)

    def _products(self, rows: npt.NDArray[np.float32], others: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Of each two, until the next call: new memory for each block would take as long as the products."""
        place = self._memory[: len(rows) * len(others)].reshape(len(rows), len(others))
        return np.matmul(rows, others.T, out=place)

    def _cosines(self, rows: Rows, others: Rows) -> npt.NDArray[np.float64]:
        """The cosines of pairs, in float64; the same whatever pairs are computed with them."""
        found = np.empty(len(rows))
        for start in range(0, len(rows), _EXACT):
            part = slice(start, start + _EXACT)
            products = self._rows[rows[part]].astype(np.float64) * self._rows[others[part]]
            found[part] = products.sum(axis=1) / np.sqrt(self._squares[rows[part]] * self._squares[others[part]])
        return np.clip(found, -1.0, 1.0)


class _Best:
    """The nearest of each row, so far."""

    def __init__(self, rows: int, k: int) -> None:
        self.k = k
        self.cosine = np.full((rows, k), -3.0)
        self.other = np.full((rows, k), -1, np.intp)
        self.least = np.full(rows, -2.0, np.float32)  # a cosine below is none of the k best

    def add(self, rows: Rows, others: Rows, cosines: npt.NDArray[np.float64], margin: float) -> None:
        """Take pairs into account."""
        if not len(rows):
            return
        touched = np.unique(rows)
        rows = np.concatenate([np.repeat(touched, self.k), rows])
        others = np.concatenate([self.other[touched].ravel(), others])
        cosines = np.concatenate([self.cosine[touched].ravel(), cosines])
        order = np.lexsort((others, -cosines, rows))
        rows, others, cosines = rows[order], others[order], cosines[order]
        rank = np.arange(len(rows)) - np.searchsorted(rows, rows)
        first = rank < self.k
        self.other[rows[first], rank[first]] = others[first]
        self.cosine[rows[first], rank[first]] = cosines[first]
        worst = (self.cosine[touched, -1] - 2 * margin).astype(np.float32)
        self.least[touched] = np.maximum(self.least[touched], worst)


def _distinct(rows: npt.NDArray[np.float32]) -> tuple[Rows, Rows]:
    """The first row of each group of equal ones, and the group of each row, numbered in order of appearance."""
    groups: dict[bytes, int] = {}
    first: list[int] = []
    group = np.empty(len(rows), np.intp)
    for place in range(len(rows)):
        key = blake2b((rows[place] + np.float32(0)).tobytes(), digest_size=16).digest()  # + 0: of -0, too
        number = groups.setdefault(key, len(first))
        if number == len(first):
            first.append(place)
        group[place] = number
    return np.array(first, np.intp), group
