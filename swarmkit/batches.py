"""Prompts to batches: how many tokens a row may generate, which rows may ride together, how a bad batch is halved.

``max_tokens`` is one number a request, so rows of one batch share it. A row whose prompt leaves room for the
whole cap is *roomy*; all roomy rows may ride together. The others are *tight*: they ride in batches of their own,
in order of the room they leave, so that a short budget is forced on as few neighbours as possible.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

__all__ = ["Sizing", "halves", "home_queues"]

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

    @property
    def room_chars(self) -> int | None:
        """Characters up to which a prompt leaves room for the whole cap; None: every length does."""
        if self.context is None:
            return None
        room = self.context - self.cap - self.buffer - self.overhead - 1
        return max(0, int(room * self.chars_per_token))


def home_queues(
    rows: Iterable[int], n_endpoints: int, tight_budget: Callable[[int], int | None]
) -> tuple[list[list[int]], dict[int, int]]:
    """Deal rows to their home endpoints: the i-th row to endpoint ``i % n_endpoints``.

    Parameters
    ----------
    rows : iterable of int
        Positions of the rows to send, in order.
    n_endpoints : int
        Number of endpoints.
    tight_budget : callable
        Position to the row's budget of tokens if it is tight, None if it is roomy.

    Returns
    -------
    queues : list of list of int
        Per endpoint: its roomy rows in input order, then its tight rows, the roomiest first.
    tight : dict of int to int
        Position to budget, for the tight rows only: they are few, and a million roomy rows cost nothing.
    """
    roomy: list[list[int]] = [[] for _ in range(n_endpoints)]
    tight: list[list[int]] = [[] for _ in range(n_endpoints)]
    budgets: dict[int, int] = {}
    for i, row in enumerate(rows):
        budget = tight_budget(row)
        if budget is None:
            roomy[i % n_endpoints].append(row)
        else:
            budgets[row] = budget
            tight[i % n_endpoints].append(row)
    for queue, late in zip(roomy, tight, strict=True):
        queue += sorted(late, key=lambda r: -budgets[r])
    return roomy, budgets


def halves(rows: Sequence[int]) -> list[tuple[int, ...]]:
    """Split a refused batch in two; the search for the bad row goes on in each.

    Examples
    --------
    >>> halves((4, 7, 9))
    [(4,), (7, 9)]
    """
    middle = len(rows) // 2
    return [tuple(part) for part in (rows[:middle], rows[middle:]) if part]
