"""Rows to batches: the home queue of each endpoint, stealing between queues, batches to retry, halving a batch.

Rows with a limited budget of tokens (``token_budgets``) never share a request with others.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

__all__ = ["Queues", "RetryBatch", "RetryBatches", "halves", "home_queues"]

_FILLED = 0.9  # of a request: smaller ones would keep an endpoint less busy


def home_queues(
    rows: Sequence[int],
    n_endpoints: int,
    chars: Sequence[int] | Mapping[int, int],
    limited: Mapping[int, int] | None = None,
) -> list[list[int]]:
    """Deal rows to their home endpoints: the i-th row to endpoint ``i % n_endpoints``.

    Parameters
    ----------
    rows : sequence of int
        Positions of the rows to send, in order.
    n_endpoints : int
        Number of endpoints.
    chars : sequence or mapping of int
        By position: the length of the row's prompt, in characters.
    limited : mapping of int to int, optional
        Position to budget of tokens, for the rows with a limited budget (``Sizing.limited``).

    Returns
    -------
    list of list of int
        Per endpoint: its rows with the full budget, the longest prompts first, then those with a limited budget, the
        largest first. Long prompts take long to prefill and often get long answers, and long work must not start when
        the run is nearly over ("longest processing time first", Graham 1969). Lengths count by octave, and within an
        octave the input order stays: neighbours with a common prefix profit from the servers' prefix caches.
    """
    limited = limited or {}

    def place(row: int) -> tuple[bool, int]:
        return row in limited, -limited[row] if row in limited else -chars[row].bit_length()

    queues = [list(rows[i::n_endpoints]) for i in range(n_endpoints)]
    for queue in queues:
        queue.sort(key=place if limited else lambda row: -chars[row].bit_length())
    return queues


class Queues:
    """The rows that were not sent yet, in a queue an endpoint.

    Parameters
    ----------
    queues : iterable of iterable of int
        Per endpoint, the positions it starts with (``home_queues``).
    limited : collection of int
        Rows that may not share a request with others.
    parts : sequence of int, optional
        By position: the part of a run of one prefix that a row belongs to (``prefixes.PrefixOrder``). Whole parts are
        taken where they fit, and only whole ones are stolen.

    Attributes
    ----------
    unsent : int
        Rows in all queues together.

    Examples
    --------
    >>> queues = Queues([[0, 2, 4], [1]], limited={4})
    >>> queues.take(0, 10), queues.steal(10), queues.steal(10), queues.unsent
    ((0, 2), (4,), (1,), 0)
    """

    def __init__(
        self, queues: Iterable[Iterable[int]], limited: Collection[int], parts: Sequence[int] | None = None
    ) -> None:
        self._queues = [deque(q) for q in queues]
        self._limited = limited
        self._parts = parts
        self.unsent = sum(map(len, self._queues))
        # Lengths, the longest first, as they were when last seen: queues shrink, so an entry that is still right
        # when it comes to the top belongs to the longest one. Scanning all queues at each steal would cost a large
        # fleet more than the rest of the scheduler.
        self._longest = [(-len(q), i) for i, q in enumerate(self._queues)]
        heapq.heapify(self._longest)

    def __getitem__(self, index: int) -> deque[int]:
        return self._queues[index]

    def __iter__(self) -> Iterator[deque[int]]:
        return iter(self._queues)

    def __len__(self) -> int:
        return len(self._queues)

    def add(self) -> None:
        """An empty queue, for one more endpoint."""
        self._queues.append(deque())

    def validate(self) -> None:
        """Check the sums against a recount."""
        assert self.unsent == sum(map(len, self._queues)), "unsent rows are miscounted"
        noted = {index for _, index in self._longest}
        assert all(index in noted for index, queue in enumerate(self._queues) if queue), "a queue cannot be stolen from"

    def take(self, index: int, size: int) -> tuple[int, ...]:
        """Up to ``size`` rows off the front of an endpoint's own queue: whole parts, if these nearly fill a request.

        What is left of a part may be stolen; until then it finds its prefix in the cache of the endpoint.
        """
        queue = self._queues[index]
        if self._parts is not None:
            whole = self._in_whole_parts(itertools.islice(queue, size + 1), size)
            size = whole if _FILLED * size <= whole <= size else size
        return self._cut(queue, size, from_end=False)

    def steal(self, size: int, index: int | None = None) -> tuple[int, ...]:
        """Up to ``size`` rows off the end of the longest queue.

        In parts these are whole parts, one at least; what is more than ``size`` goes to the queue of the endpoint
        ``index`` that steals.
        """
        if (longest := self.longest()) is None:
            return ()
        queue = self._queues[longest]
        if self._parts is None or index is None:
            return self._cut(queue, size, from_end=True)
        rows = self._cut(queue, self._in_whole_parts(reversed(queue), size), from_end=True)
        if len(rows) > size:
            self.put_back(index, rows[size:])
        return rows[:size]

    def longest(self) -> int | None:
        """The endpoint with the longest queue; None if nothing is unsent."""
        while self.unsent:
            noted, index = self._longest[0]
            length = len(self._queues[index])
            if length == -noted:
                return index
            if length:
                heapq.heapreplace(self._longest, (-length, index))
            else:
                heapq.heappop(self._longest)
        return None

    def _in_whole_parts(self, rows: Iterable[int], size: int) -> int:
        """How many of these rows are parts that fit into ``size`` together; those of the first part at least."""
        count = 0
        for _, part in itertools.groupby(rows, cast("Sequence[int]", self._parts).__getitem__):
            more = sum(1 for _ in part)
            if count and count + more > size:
                break
            count += more
        return count

    def put_back(self, index: int, rows: Sequence[int], last: bool = False) -> None:
        """Rows that were not worked on return to the front of a queue, or to its end."""
        queue = self._queues[index]
        if last:
            queue.extend(rows)
        else:
            queue.extendleft(reversed(rows))
        self.unsent += len(rows)
        heapq.heappush(self._longest, (-len(queue), index))

    def _cut(self, queue: deque[int], size: int, *, from_end: bool) -> tuple[int, ...]:
        """Rows off one end; rows with a limited budget are never mixed with the others."""
        if not queue:
            return ()
        pop, end = (queue.pop, -1) if from_end else (queue.popleft, 0)
        rows = [pop()]
        if not self._limited:
            rows += [pop() for _ in range(min(size - 1, len(queue)))]
        else:
            limited = rows[0] in self._limited
            while queue and len(rows) < size and (queue[end] in self._limited) == limited:
                rows.append(pop())
        if from_end:
            rows.reverse()
        self.unsent -= len(rows)
        return tuple(rows)


@dataclass(frozen=True, slots=True)
class RetryBatch:
    """Rows of a failed request that are sent again together.

    Attributes
    ----------
    rows : tuple of int
        Their positions.
    avoid : frozenset of int
        Endpoints that failed them: others are preferred.
    suspect : bool
        Whether these rows saw two crashes: they are tested alone on an endpoint.
    part : bool
        Whether they were parted from others since one of them may be at fault: they are not put together again.
    refused : str
        The words in which the batch was refused that they are a part of.
    """

    rows: tuple[int, ...]
    avoid: frozenset[int] = frozenset()
    suspect: bool = False
    part: bool = False
    refused: str = ""


class RetryBatches(deque[RetryBatch]):
    """Batches to retry that wait for an endpoint."""

    def take(
        self,
        room: int,
        wanted: Callable[[int], bool],
        passes: Callable[[RetryBatch], bool],
        joins: Callable[[int, int], bool],
    ) -> RetryBatch | None:
        """Up to ``room`` rows that are still ``wanted`` off the first batch that the caller does not pass over.

        Where they leave room for all rows of another batch, these join them, if nothing keeps the two rows given to
        ``joins``, one of each batch, apart.
        """
        taken: RetryBatch | None = None
        for _ in range(len(self)):
            batch = self.popleft()
            rows = tuple(filter(wanted, batch.rows))
            if not rows:
                continue
            if taken is None:
                fits = not passes(batch)
            else:
                fits = len(rows) <= room and not (batch.part or passes(batch)) and joins(taken.rows[0], rows[0])
            if not fits:
                self.append(batch)
                continue
            size = math.ceil(len(rows) / math.ceil(len(rows) / room))  # even parts: none of a few rows is left
            if size < len(rows):
                self.appendleft(replace(batch, rows=rows[size:]))
            avoid = batch.avoid if taken is None else taken.avoid | batch.avoid
            taken = replace(batch, rows=(taken.rows if taken else ()) + rows[:size], avoid=avoid)
            room -= size
            if taken.part or size < len(rows) or not room:
                break
        return taken


def halves(rows: Sequence[int]) -> list[tuple[int, ...]]:
    """Split a refused batch in two; the search for the bad row goes on in each.

    Examples
    --------
    >>> halves((4, 7, 9))
    [(4,), (7, 9)]
    """
    middle = len(rows) // 2
    return [tuple(part) for part in (rows[:middle], rows[middle:]) if part]
