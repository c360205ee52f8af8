"""How many tokens a row may generate.

``max_tokens`` is one number a request, so rows of one batch share it. A row whose prompt leaves room for the whole cap
has a *full* budget; all such rows may share a request. The others have a *limited* budget: they are sent in batches of
their own, in order of the room they leave, so that a short budget is forced on as few neighbours as possible.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

__all__ = ["Sizing"]

MIN_BUDGET = 128
"""Tokens a row with a limited budget is given at least, while the context allows: the estimate may be too high."""


@dataclass(frozen=True, slots=True)
class Sizing:
    """How ``max_tokens`` follows from a prompt's length.

    Attributes
    ----------
    cap : int
        Tokens a row may generate at most: what the caller asked for.
    context : int or None
        Tokens of prompt and answer together that the server takes; None when unknown: then every row has the
        full budget.
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

    def limited(self, rows: Iterable[int], chars: Sequence[int] | Mapping[int, int]) -> dict[int, int]:
        """Position to budget, for the rows with a limited budget; they are few, and the others cost nothing.

        ``chars`` are the lengths of the prompts, by position.
        """
        room = self.room_chars
        if room is None:
            return {}
        budgets = ((row, self.budget(chars[row])) for row in rows if chars[row] > room)
        return {row: budget for row, budget in budgets if budget < self.cap}

    @property
    def room_chars(self) -> int | None:
        """Characters up to which a prompt leaves room for the whole cap; None: every length does."""
        if self.context is None:
            return None
        room = self.context - self.cap - self.buffer - self.overhead - 1
        return max(0, int(room * self.chars_per_token))
