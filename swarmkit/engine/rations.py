"""What a run sends under the rates of its gateways, and which endpoints these hold back."""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Callable, Iterable, Sequence

from .endpoints import Fleet
from .rates import Rate, Ration

__all__ = ["Rations"]


class Rations:
    """The requests in flight that rates count, and the endpoints that wait for a rate to allow them more.

    Parameters
    ----------
    fleet : Fleet
        The endpoints: it knows their rates, and is told which of them are held back.
    tokens : callable
        Gives the tokens of a row, prompt and answer, as far as they can be estimated.
    most : int, optional
        Tokens of one request, by that estimate; a row that has more by itself is sent alone.

    Attributes
    ----------
    held_until : float
        When the last of the endpoints that are well may be sent something again.
    """

    def __init__(self, fleet: Fleet, tokens: Callable[[int], int], most: int | None = None) -> None:
        self._fleet = fleet
        self._tokens = tokens
        self._most = most
        self._counted: dict[int, Ration] = {}  # by ticket
        self._held: dict[Rate, dict[int, None]] = {}  # endpoints, in the order in which they were held back
        self._freed: dict[int, None] = {}  # those of them for which a request has ended since
        self.held_until = 0.0

    def __contains__(self, ticket: int) -> bool:
        """Whether the tokens of a request are counted."""
        return ticket in self._counted

    def sent(self, ticket: int, index: int, rows: Sequence[int], now: float) -> None:
        """A request goes out."""
        if (rate := self._fleet.rate_of(index)) is not None:
            tokens, behind = sum(map(self._tokens, rows)), self._fleet.gives_way(index)
            self._counted[ticket] = rate.sent(now, tokens, behind)

    def over(self, ticket: int, tokens: int | None) -> None:
        """A request has ended, after so many tokens as far as is known: what its rate holds back may go on."""
        if (ration := self._counted.pop(ticket, None)) is not None:
            ration.over(tokens)
            self._freed.update(self._held.pop(ration.rate, {}))

    def release(self) -> None:
        """The run is over: its requests count for no rate any more."""
        for ration in self._counted.values():
            ration.over()
        self._counted.clear()

    def fitting(self, rows: Sequence[int]) -> int:
        """How many of these rows, from the first, one request may have; one at least."""
        if self._most is None:
            return len(rows)
        sums = itertools.accumulate(map(self._tokens, rows))
        return max(1, sum(1 for _ in itertools.takewhile(self._most.__ge__, sums)))

    def affordable(self, index: int, rows: Sequence[int], now: float) -> int:
        """How many of these rows, from the first, one request may have, and the rate of an endpoint has tokens for."""
        rows = rows[: self.fitting(rows)]
        if (rate := self._fleet.rate_of(index)) is None:
            return len(rows)

        def allowed(tokens: int) -> bool:
            return self._fleet.allowed_at(index, now, tokens) <= now

        sums = [*itertools.accumulate(map(self._tokens, rows))]
        most = rate.tpm or math.inf  # only a single row may have more
        count = bisect.bisect_left(sums, True, key=lambda tokens: tokens > most or not allowed(tokens))
        return count or int(allowed(sums[0]))

    def allowed_at(self, index: int, row: int, now: float) -> float:
        """When the rate of an endpoint has the tokens for a row."""
        return self._fleet.allowed_at(index, now, self._tokens(row))

    def hold(self, index: int, until: float, rows: Sequence[int] = ()) -> None:
        """An endpoint is allowed nothing, or not the first of these rows, before that time, or before another request
        has ended."""
        behind = self._fleet.gives_way(index)
        if (rate := self._fleet.rate_of(index)) is not None:
            self._held.setdefault(rate, {})[index] = None
            if behind:
                rate.keep(sum(map(self._tokens, rows[:1])), until)
        if self._fleet[index].well or behind:  # nobody knows how it is meanwhile
            self.held_until = max(self.held_until, until)
        self._fleet.hold(index, until)

    def freed(self) -> Iterable[int]:
        """The endpoints that were held back, and may be sent something since a request ended, in order."""
        freed, self._freed = self._freed, {}
        return freed
