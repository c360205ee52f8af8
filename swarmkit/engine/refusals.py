"""Refusals that are not about rows: whether what a server refuses is a row of the batch, or what all rows share.

A refused batch is halved until the bad row stands alone. For a parameter or a system prompt that every row is refused
for, that takes two requests a row. So the words are looked at. Where parts of refused batches were refused in the words
of the whole, and no endpoint has answered anything yet, one is asked a short prompt as the rows are. If it refuses that
in the same words, too, and so does another endpoint that is well, or there is none, the rows that were refused so
get that error at once. If it answers, the words are about rows: the search goes on, and is not doubted again. Until
then only a few such parts are in flight.
"""

from __future__ import annotations

import re
from collections import Counter

from ..records import Failure, FailureKind
from .endpoints import Fleet

__all__ = ["MOST_IN_DOUBT", "Refusals", "words_of"]

MOST_IN_DOUBT = 2
"""Parts of refused batches that are in flight while it is open whether it is rows that are refused."""
_OPINIONS = 2  # endpoints that refuse a short prompt until it is believed
_PARTS = 2  # of refused batches, refused in the words of the whole: a half, and a half of that or the other half
_VARIES = re.compile(r"""'[^']*'|"[^"]*"|`[^`]*`|\d+""")


def words_of(failure: Failure) -> str:
    """What a refusal says, without what differs from row to row: numbers, and what is quoted.

    Examples
    --------
    >>> words_of(Failure(FailureKind.REJECTED, "prompt 'Hi' has 612 tokens, at most 512"))
    'prompt ? has ? tokens, at most ?'
    """
    return _VARIES.sub("?", failure.message)


class Refusals:
    """The words of refusals, and the short prompts asked to understand them.

    Parameters
    ----------
    fleet : Fleet
        The endpoints, to be read.
    """

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._seen = Counter[str]()  # batches
        self._parts = Counter[str]()
        self._asked: dict[int, tuple[str, int]] = {}  # by ticket: the words in question, and the endpoint
        self._by: dict[str, frozenset[int]] = {}
        self._of_rows: set[str] = set()

    def by(self, words: str) -> frozenset[int]:
        """The endpoints that refuse a short prompt in these words."""
        return self._by.get(words, frozenset())

    def are_hopeless(self, words: str) -> bool:
        """Whether nobody is left to be asked who might not refuse a short prompt in these words, as some do."""
        by = self.by(words)
        return len(by) >= _OPINIONS or (len(by) > 0 and not self._fleet.others_well(by))

    def are_open(self, words: str) -> bool:
        """Whether it is not known what these words are about, and they have come again."""
        return self._seen[words] > 1 and words not in self._of_rows

    def are_doubtful(self, words: str, index: int, part: bool) -> bool:
        """Whether an endpoint is to be asked a short prompt, after it has refused a batch: ``part`` of one that was
        refused in the same words."""
        self._seen[words] += 1
        self._parts[words] += part
        if self._parts[words] < _PARTS or words in self._of_rows:
            return False
        opinions = self.by(words) | {endpoint for asked, endpoint in self._asked.values() if asked == words}
        return index not in opinions and len(opinions) < _OPINIONS

    def ask(self, ticket: int, words: str, index: int) -> None:
        """The short prompt goes out."""
        self._asked[ticket] = words, index

    def answered(self, ticket: int) -> None:
        """A request was answered. If it was such a prompt, what was refused were rows."""
        if ticket in self._asked:
            self._of_rows.add(self._asked.pop(ticket)[0])

    def failed(self, ticket: int, failure: Failure) -> str:
        """A request failed. If it was such a prompt, and was refused as the rows were: the words; else ""."""
        words, index = self._asked.pop(ticket, ("", -1))
        if not words or failure.kind is not FailureKind.REJECTED:
            return ""
        if words_of(failure) != words:  # who knows what that means
            self._of_rows.add(words)
            return ""
        self._by[words] = self.by(words) | {index}
        return words
