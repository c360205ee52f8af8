"""Prompts to batches: how many tokens a row may generate, which rows may ride together, how a bad batch is halved.

``max_tokens`` is one number a request, so rows of one batch share it. A row whose prompt leaves room for the
whole cap is *roomy*; all roomy rows may ride together. The others are *tight*: they ride in batches of their own,
in order of the room they leave, so that a short budget is forced on as few neighbours as possible.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

__all__ = ["Parcel", "Parcels", "Queues", "Sizing", "halves", "home_queues"]

MIN_BUDGET = 128
"""Tokens a tight row is given at least, while the context allows: the estimate may be too high."""


@dataclass(frozen=True, slots=True)
class Sizing:
    """How ``max_tokens`` follows from a prompt's length.

    Attributes
    ----------
    cap : int
        Tokens a row may generate at most: what the caller asked for.
    context : int or None
        Tokens of prompt and answer together that the server takes; None when unknown: then every row is roomy.
    chars_per_token, overhead : float, int
        Calibration: a text of ``c`` characters is estimated at ``c / chars_per_token + overhead`` tokens.
    buffer : int
        Tokens kept free, since the length is an estimate.

    Examples
    --------
    >>> sizing = Sizing(cap=512, context=2048, chars_per_token=4.0)
    >>> sizing.budget(400), sizing.budget(4800)
    (512, 335)
    """

    cap: int
    context: int | None = None
    chars_per_token: float = 4.0
    overhead: int = 0
    buffer: int = 512

    def estimate(self, chars: int) -> int:
        """Prompt tokens estimated for a text of ``chars`` characters."""
        return int(chars / self.chars_per_token) + 1 + self.overhead

    def budget(self, chars: int) -> int:
        """Tokens that a row with a prompt of ``chars`` characters may generate.

        ``min(cap, max(128, context - estimate - buffer))``. The floor may reach past the context of a prompt
        that nearly fills it: current vLLM then stops at its end, and a prompt that does not fit by itself is
        refused in the server's own words. A lower floor would cut answers short on a bad estimate.
        """
        if self.context is None:
            return self.cap
        room = self.context - self.estimate(chars) - self.buffer
        return max(1, min(self.cap, max(MIN_BUDGET, room), self.context - 1))

    def tight(self, rows: Iterable[int], chars: Sequence[int]) -> dict[int, int]:
        """Position to budget for those of the rows that are tight; they are few, and roomy ones cost nothing.

        ``chars`` are the lengths of the prompts, by position.
        """
        roomy = self.room_chars
        if roomy is None:
            return {}
        budgets = ((row, self.budget(chars[row])) for row in rows if chars[row] > roomy)
        return {row: budget for row, budget in budgets if budget < self.cap}

    @property
    def room_chars(self) -> int | None:
        """Characters up to which a prompt leaves room for the whole cap; None: every length does."""
        if self.context is None:
            return None
        room = self.context - self.cap - self.buffer - self.overhead - 1
        return max(0, int(room * self.chars_per_token))


def home_queues(
    rows: Sequence[int], n_endpoints: int, chars: Sequence[int], tight: Mapping[int, int] | None = None
) -> list[list[int]]:
    """Deal rows to their home endpoints: the i-th row to endpoint ``i % n_endpoints``.

    Parameters
    ----------
    rows : sequence of int
        Positions of the rows to send, in order.
    n_endpoints : int
        Number of endpoints.
    chars : sequence of int
        By position: the length of the row's prompt, in characters.
    tight : mapping of int to int, optional
        Position to budget of tokens, for the tight rows (``Sizing.tight``).

    Returns
    -------
    list of list of int
        Per endpoint: its roomy rows, the longest prompts first, then its tight rows, the roomiest first. Long
        prompts are slow to read and often get long answers, and what is long must not begin when the run is nearly
        over ("longest processing time first", Graham 1969). Lengths count by octave, and within one input order
        stays: prompts that begin alike and stand together profit from the servers' prefix caches.
    """
    tight = tight or {}

    def place(row: int) -> tuple[bool, int]:
        return row in tight, -tight[row] if row in tight else -chars[row].bit_length()

    queues = [list(rows[i::n_endpoints]) for i in range(n_endpoints)]
    for queue in queues:
        queue.sort(key=place if tight else lambda row: -chars[row].bit_length())
    return queues


class Queues:
    """The rows that were not sent yet, in a queue an endpoint.

    Parameters
    ----------
    queues : iterable of iterable of int
        Per endpoint, the positions it starts with (``home_queues``).
    tight : collection of int
        Rows that may not share a request with others.

    Attributes
    ----------
    unsent : int
        Rows in all queues together.

    Examples
    --------
    >>> queues = Queues([[0, 2, 4], [1]], tight={4})
    >>> queues.take(0, 10), queues.steal(10), queues.steal(10), queues.unsent
    ((0, 2), (4,), (1,), 0)
    """

    def __init__(self, queues: Iterable[Iterable[int]], tight: Collection[int]) -> None:
        self._queues = [deque(q) for q in queues]
        self._tight = tight
        self.unsent = sum(map(len, self._queues))
        # Lengths, the longest first, as they were when last looked at: queues shrink, so an entry that is still
        # right when it comes to the top belongs to the longest one. Looking at all queues at every theft would
        # cost a large fleet more than the rest of the scheduler.
        self._longest = [(-len(q), i) for i, q in enumerate(self._queues)]
        heapq.heapify(self._longest)

    def __getitem__(self, index: int) -> deque[int]:
        return self._queues[index]

    def take(self, index: int, size: int) -> tuple[int, ...]:
        """Up to ``size`` rows off the front of an endpoint's own queue."""
        return self._cut(self._queues[index], size, from_end=False)

    def steal(self, size: int) -> tuple[int, ...]:
        """Up to ``size`` rows off the end of the longest queue."""
        while self.unsent:
            noted, index = self._longest[0]
            length = len(self._queues[index])
            if length == -noted:
                return self._cut(self._queues[index], size, from_end=True)
            if length:
                heapq.heapreplace(self._longest, (-length, index))
            else:
                heapq.heappop(self._longest)
        return ()

    def put_back(self, index: int, rows: Sequence[int]) -> None:
        """Rows that were not worked on return to the front of a queue."""
        self._queues[index].extendleft(reversed(rows))
        self.unsent += len(rows)
        heapq.heappush(self._longest, (-len(self._queues[index]), index))

    def _cut(self, queue: deque[int], size: int, *, from_end: bool) -> tuple[int, ...]:
        """Rows off one end, tight ones never mixed with roomy ones."""
        if not queue:
            return ()
        pop, end = (queue.pop, -1) if from_end else (queue.popleft, 0)
        rows = [pop()]
        if not self._tight:
            rows += [pop() for _ in range(min(size - 1, len(queue)))]
        else:
            tight = rows[0] in self._tight
            while queue and len(rows) < size and (queue[end] in self._tight) == tight:
                rows.append(pop())
        if from_end:
            rows.reverse()
        self.unsent -= len(rows)
        return tuple(rows)


@dataclass(frozen=True, slots=True)
class Parcel:
    """Rows that failed somewhere and travel on together.

    Attributes
    ----------
    rows : tuple of int
        Their positions.
    avoid : frozenset of int
        Endpoints that failed them: others come first.
    alone : bool
        Whether it is a row under suspicion, from quarantine.
    """

    rows: tuple[int, ...]
    avoid: frozenset[int] = frozenset()
    alone: bool = False


class Parcels(deque[Parcel]):
    """Parcels that wait for an endpoint."""

    def take(self, room: int, wanted: Callable[[int], bool], passes: Callable[[Parcel], bool]) -> Parcel | None:
        """Up to ``room`` rows that are still ``wanted`` off the first parcel that the taker does not pass over."""
        for _ in range(len(self)):
            parcel = self.popleft()
            rows = tuple(r for r in parcel.rows if wanted(r))
            if rows and not passes(parcel):
                if len(rows) > room:
                    self.appendleft(replace(parcel, rows=rows[room:]))
                return replace(parcel, rows=rows[:room])
            if rows:
                self.append(parcel)
        return None


def halves(rows: Sequence[int]) -> list[tuple[int, ...]]:
    """Split a refused batch in two; the search for the bad row goes on in each.

    Examples
    --------
    >>> halves((4, 7, 9))
    [(4,), (7, 9)]
    """
    middle = len(rows) // 2
    return [tuple(part) for part in (rows[:middle], rows[middle:]) if part]
