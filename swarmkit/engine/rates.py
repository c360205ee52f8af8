"""How much may be sent to a gateway, and when: what its user allows a minute, and what it says itself.

In any 60 seconds there are at most ``rpm`` requests, with ``tpm`` tokens at most, and nothing waits that may be sent
(a sliding window, not a count that begins anew each minute). The tokens of a request are estimated when it is sent, and
corrected when its answer says what it has cost.

What a gateway says (``x-ratelimit-remaining-*``) holds until the time that it names, and for a minute at most: then the
next request shows what is true, and a refusal with a ``Retry-After`` is obeyed in any case.

Runs that give way to others on the same pool are not shut out: of ten requests one is theirs. It is kept free for them
where they wait for it, since those that go first would take all of a minute at its beginning.
"""

from __future__ import annotations

import math
from collections import deque

from ..records import Quota

__all__ = ["MINUTE_S", "Rate", "Ration"]

MINUTE_S = 60.0
_SOON_S = 1.0  # until it is looked again whether a connection is free, which another run may hold
_TURN_S = 0.25  # until it is looked again whether a run that gives way has its turn
_FIRST = 9  # requests of runs that go first for each one of those that give way


class Ration:
    """A request that was sent, as the rate of its gateway counts it."""

    __slots__ = ("at", "counted", "estimate", "rate", "tokens")

    def __init__(self, rate: Rate, at: float, tokens: int) -> None:
        self.rate = rate
        self.at = at
        self.tokens = self.estimate = tokens
        self.counted = True

    def __repr__(self) -> str:
        return "<Ration>"

    def over(self, tokens: int | None = None) -> None:
        """The request has ended; ``tokens`` is what it has cost, where that is known."""
        self.rate.open -= 1
        self.rate.open_tokens -= self.estimate
        if tokens is not None and self.counted:
            self.rate.tokens += tokens - self.tokens
            self.tokens = tokens


class Rate:
    """What may be sent to one gateway.

    Parameters
    ----------
    rpm, tpm : int, optional
        Requests, and tokens of prompts and answers together, in any minute.
    connections : int, optional
        Requests in flight.

    Attributes
    ----------
    tpm : int or None
        As given.
    open, open_tokens : int
        Requests in flight, and their tokens as they were estimated.
    tokens : int
        Tokens of the last minute.

    Examples
    --------
    >>> rate = Rate(rpm=2)
    >>> rate.next_at(0.0), rate.sent(0.0), rate.sent(10.0), rate.next_at(15.0)
    (0.0, <Ration>, <Ration>, 60.0)
    """

    __slots__ = ("_connections", "_first", "_kept", "_log", "_rpm", "_told", "open", "open_tokens", "tokens", "tpm")

    def __init__(self, rpm: int | None = None, tpm: int | None = None, connections: int | None = None) -> None:
        self._rpm = rpm
        self.tpm = tpm
        self._connections = connections or math.inf
        self._log: deque[Ration] = deque()  # of the last minute, the oldest first
        # What the gateway says is left of requests and of tokens, until when that holds, and when it was asked.
        self._told = [(math.inf, 0.0, -math.inf)] * 2
        self._first = 0  # requests of runs that go first, as far as those that give way have not had their share yet
        self._kept = (0, 0, 0.0)  # requests that are kept free for these, the tokens of each, and until when
        self.open = 0
        self.open_tokens = 0
        self.tokens = 0

    def next_at(self, now: float, tokens: int = 1, in_flight: int = 0, behind: bool = False) -> float:
        """The first time, from now on, at which a request with so many tokens may be sent.

        One with more than ``tpm`` tokens waits until it is the only one of its minute: the gateway decides about it.
        ``in_flight``: requests at the endpoint, some of which may have been sent before anything was said of a rate.
        ``behind``: it is of a run that gives way to others, which have more to send.
        """
        turn = (now // _TURN_S + 1.5) * _TURN_S  # several wait for one moment
        if behind and self._first < _FIRST:
            return turn
        self._forget(now)
        kept, tokens_of_each, until_kept = (0, 0, 0.0) if behind or now >= self._kept[2] else self._kept
        others = kept * tokens_of_each
        at = now
        if self.open + kept >= self._connections:  # those that are kept free are soon taken
            at = turn if behind else (now // _SOON_S + 2) * _SOON_S
        # Those in flight may not be counted in what was told: their own answers will say.
        needs = (max(self.open, in_flight) + 1 + kept, self.open_tokens + tokens + others)
        for (left, until, _), needed in zip(self._told, needs, strict=True):
            if left < needed:
                at = max(at, until)
        if self._rpm is not None and (excess := len(self._log) + kept - self._rpm) >= 0:
            at = max(at, self._log[excess].at + MINUTE_S if excess < len(self._log) else until_kept)
        if self.tpm is not None and (excess := self.tokens + others + min(tokens, self.tpm) - self.tpm) > 0:
            for ration in self._log:
                excess -= ration.tokens
                if excess <= 0:
                    return max(at, ration.at + MINUTE_S)
            return max(at, until_kept)
        return at

    def keep(self, tokens: int, until: float) -> None:
        """A run that gives way waits until then for a request with so many tokens: its share is kept free for it."""
        if share := self._first // _FIRST:
            self._kept = share, tokens, until + _SOON_S

    def sent(self, now: float, tokens: int = 1, behind: bool = False) -> Ration:
        """A request goes out, with so many tokens as far as can be said; ``behind`` as for ``next_at``."""
        self._forget(now)
        if behind:
            self._first = max(0, self._first - _FIRST)
            self._kept = max(0, self._kept[0] - 1), *self._kept[1:]
        elif self._first < _FIRST * max(1, len(self._log) // (_FIRST + 1)):  # no more than is their share of a minute
            self._first += 1
        ration = Ration(self, now, tokens)
        self.open += 1
        self.open_tokens += tokens
        if self._rpm is not None or self.tpm is not None:
            self._log.append(ration)
            self.tokens += tokens
        return ration

    def told(self, quota: Quota, asked_at: float, now: float) -> None:
        """The gateway says what is left, in the answer to a request that was sent at ``asked_at``: what it has said to
        an earlier one is older, whenever that arrives."""
        for place, told in enumerate(quota):
            if told is not None and asked_at >= self._told[place][2]:
                left, reset_s = told
                self._told[place] = left, now + min(reset_s, MINUTE_S), asked_at

    def _forget(self, now: float) -> None:
        while self._log and self._log[0].at + MINUTE_S <= now:
            ration = self._log.popleft()
            ration.counted = False
            self.tokens -= ration.tokens
