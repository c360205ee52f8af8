"""Rows that share long prefixes, laid out so that each prefix is computed once: pure functions, called once a run.

Servers keep the blocks of the prompts that they have computed, and a prompt that begins alike need not compute these
again. vLLM shares a block as soon as the prompt that computes it is scheduled, so the rows of one request share theirs,
too: no row has to be sent ahead of the others. What costs is only a prefix that several endpoints compute. So rows are
sorted, neighbours that share more than all rows do become a *run*, and a run has one home. A run whose own work is
large is cut in *parts*: what an endpoint steals is whole parts, each worth its prefix.

Lengths and work are counted in characters here.
"""

from __future__ import annotations

import heapq
import itertools
from array import array
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

__all__ = ["Order", "PrefixOrder", "prefix_order"]

Order = Literal["auto", "prefix", "given"]

_LONG = 256  # a shared prefix worth looking for: some four blocks of a server's cache
_BLOCK = 64  # the least that a cache can share: 16 tokens
_FEW = 64  # rows
_SAMPLE = 64  # rows that show what all share
_ODD = 4  # of them, at each end of their order, may be unlike the others
_LOOKED_AT = 64  # the last characters of a prefix, which are alike where it is; the layout looks at all of it
_HASHES = 100_000  # counted at once
_FOUND = 8  # one row of so many must share a prefix with one that may be elsewhere
_WORTH = 0.1  # part of the work that the order must save
_EXACT = 16  # common prefixes are found to within so many characters
_PIECES, _PARTS = 4, 16  # of an endpoint's share of the work: homes are even, and no more is stolen at once


@dataclass(frozen=True, slots=True)
class PrefixOrder:
    """Rows in runs of common prefixes.

    Attributes
    ----------
    queues : list of list of int
        Per endpoint, the positions it starts with, run by run.
    parts : sequence of int
        By position: the part of a run that a row belongs to. Rows of one part are neighbours in a queue.
    """

    queues: list[list[int]]
    parts: Sequence[int]


def prefix_order(
    texts: Sequence[str | None],
    rows: Sequence[int],
    n_endpoints: int,
    limited: Collection[int] | Mapping[int, int] = (),
    *,
    answer: int = 0,
    order: Order = "auto",
) -> PrefixOrder | None:
    """Lay rows out by their prefixes, if that pays.

    Parameters
    ----------
    texts : sequence of str or None
        The prompts, by position.
    rows : sequence of int
        Positions of the rows to send.
    n_endpoints : int
        Number of endpoints.
    limited : collection of int
        Rows that may not share a request with others (``Sizing.limited``): they are last in their queues.
    answer : int
        Work of an answer, as that of so many characters of a prompt.
    order : {"auto", "prefix", "given"}
        "auto" looks whether many rows share long prefixes that not all share, and whether an endpoint would compute
        one that another computes as well; "prefix" takes what there is; "given" does nothing.

    Returns
    -------
    PrefixOrder or None
        None: the order of the input is as good. The look takes less than a microsecond a row.

    Examples
    --------
    >>> texts = [f"{'ab'[i % 2] * 600} question {i}" for i in range(6)]
    >>> prefix_order(texts, range(6), 2, order="prefix").queues
    [[0, 2, 4], [1, 3, 5]]
    """
    if order == "given" or (order == "auto" and not _may_pay(texts, rows, n_endpoints)):
        return None
    kinds = [[r for r in rows if r not in limited], [r for r in rows if r in limited]] if limited else [rows]
    columns = [_Sorted(texts, kind, answer, _LONG if order == "auto" else _BLOCK) for kind in kinds]
    if order == "auto":
        saved = sum(c.saved(n_endpoints) for c in columns)
        if saved < _WORTH * (sum(c.work for c in columns) + saved):
            return None
    elif not any(b - a > 1 for c in columns for a, b in c.runs):
        return None
    return _deal(columns, n_endpoints, len(texts))


def _may_pay(texts: Sequence[str | None], rows: Sequence[int], n_endpoints: int) -> bool:
    """Whether many rows may share a long prefix, by hashes of what follows the prefix that all share."""
    if n_endpoints < 2 or len(rows) < max(_FEW, 2 * n_endpoints):
        return False
    # No fixed step, which could meet the same document each time.
    sample = sorted(texts[rows[int(i * 0.618033988749895 % 1.0 * len(rows))]] or "" for i in range(_SAMPLE))
    if len(max(sample, key=len)) < _LONG:
        return False
    end = common(sample[_ODD], sample[-1 - _ODD]) + _LONG
    begin = end - _LOOKED_AT
    every = 1 + len(rows) // _HASHES  # whole groups are left out, so that the share that is found stays
    hashes = [
        key for row in rows if (text := texts[row]) and len(text) >= end and not (key := hash(text[begin:end])) % every
    ]
    groups = len(set(hashes))
    again = min(len(hashes) - groups, groups * (n_endpoints - 1))  # that may compute what another endpoint does
    return again * every * _FOUND >= len(rows)


def common(a: str, b: str) -> int:
    """Characters that two texts begin with alike, or up to 16 fewer.

    Examples
    --------
    >>> common("x" * 300 + "a", "x" * 300 + "b") // 16, common("same", "same")
    (18, 4)
    """
    low, high = 0, min(len(a), len(b))
    if a[:high] == b[:high]:
        return high
    while high - low > _EXACT:
        middle = (low + high) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle
    return low


class _Sorted:
    """Rows in the order of their prompts, and where the runs are.

    ``shared`` has what each row shares with the row before it beyond what all share, ``runs`` says from where to where
    neighbours share ``least`` at least (a row that shares less is a run), and ``work`` is that of all rows when each
    comes after the row before it.
    """

    def __init__(self, texts: Sequence[str | None], rows: Sequence[int], answer: int, least: int) -> None:
        self.rows = rows = sorted(rows, key=lambda row: texts[row] or "")
        prompts = [texts[row] or "" for row in rows]
        # The first and the last one may be odd: what nearly all share is in every server's cache, too.
        odd = min(_ODD, len(rows) // _SAMPLE)
        base = common(prompts[odd], prompts[-1 - odd]) if prompts else 0
        self.shared = [max(0, common(a, b) - base) for a, b in itertools.pairwise(["", *prompts])]
        own = (len(p) - base - s + answer for p, s in zip(prompts, self.shared, strict=True))
        self._done = [0, *itertools.accumulate(max(1, work) for work in own)]  # before each row
        self.work = self._done[-1]
        cuts = [i for i, shared in enumerate(self.shared) if shared < least]
        self.runs = list(itertools.pairwise([*cuts, len(rows)]))

    def saved(self, n_endpoints: int) -> int:
        """Work that is saved if each prefix is computed once, not by each endpoint that has one of its rows, where rows
        are spread over the endpoints."""
        saved, open_prefixes = 0, [(0, 0)]  # lengths, and the first rows that have them
        for i, shared in enumerate([*self.shared[1:], 0], 1):
            first = i - 1
            while open_prefixes[-1][0] > shared:
                length, first = open_prefixes.pop()
                saved += (min(i - first, n_endpoints) - 1) * (length - max(shared, open_prefixes[-1][0]))
            if open_prefixes[-1][0] < shared:
                open_prefixes.append((shared, first))
        return saved

    def work_of(self, begin: int, end: int) -> int:
        """The work of neighbours, the first of which finds nothing in the cache."""
        return self._done[end] - self._done[begin] + self.shared[begin]

    def cut(self, begin: int, end: int, most: Callable[[int], float]) -> Iterator[tuple[int, int]]:
        """Cut a run, where neighbours share least, until no piece is more work than ``most`` says of a prefix of the
        length that its rows share: each computes that anew."""
        size = end - begin
        if size == 1 or self.work_of(begin, end) <= most(min(self.shared[begin + 1 : end])):
            yield begin, end
            return
        middle, quarter = (begin + end) // 2, size // 4
        near = range(begin + max(1, quarter), max(begin + 2, end - quarter))
        at = min(near, key=lambda i: (self.shared[i] // _LONG, abs(i - middle)))
        yield from self.cut(begin, at, most)
        yield from self.cut(at, end, most)


def _deal(columns: Sequence[_Sorted], n_endpoints: int, size: int) -> PrefixOrder:
    """Deal runs to endpoints, the largest first and each to the one with the least work ("longest processing time
    first", Graham 1969).

    One that is much of an endpoint's share goes to several in pieces of four times its prefix; one that is more than a
    share goes to as many as saves a fifth of its time.
    """
    share = sum(c.work for c in columns) / n_endpoints

    def most_at_home(prefix: int) -> float:
        return min(max(share / _PIECES, 4 * prefix), max(share, 1.25 * prefix))

    def most_stolen(prefix: int) -> float:
        return max(share / _PARTS, 2 * prefix)

    loads = [(0, index) for index in range(n_endpoints)]
    queues: list[list[int]] = [[] for _ in range(n_endpoints)]
    parts = array("q", [-1]) * size
    number = 0
    for column in columns:
        pieces = [piece for run in column.runs for piece in column.cut(*run, most_at_home)]
        pieces.sort(key=lambda piece: -column.work_of(*piece))
        for begin, end in pieces:
            load, index = loads[0]
            heapq.heapreplace(loads, (load + column.work_of(begin, end), index))
            queues[index] += column.rows[begin:end]
            for first, last in column.cut(begin, end, most_stolen):
                for row in column.rows[first:last]:
                    parts[row] = number
                number += 1
    return PrefixOrder(queues, parts)
