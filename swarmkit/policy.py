"""What is tunable, and the rules of failure: values and pure functions, no state.

The fate of a row, by what was seen (``REACTIONS``):

==============  ===============================================================  ======  ========
kind            what happens to the request's unfinished rows                    blamed  attempt
==============  ===============================================================  ======  ========
STALE           same endpoint, at once                                           no      no
CONNECT         another endpoint (no server has seen the rows)                   yes     no
DISCONNECT      another endpoint, as the same batch                              yes     yes
SERVER          another endpoint, as the same batch                              yes     yes
HANG            another endpoint                                                 yes     yes
ABORT           another endpoint                                                 yes     yes
BUSY            any endpoint, after the pause; smaller batches to this one       no      no
REJECTED        halved until the bad row stands alone; it is asked of one        no      no
                other endpoint, then fails with the server's own message
DENIED          another endpoint; this one is disabled for the run               gone    no
MALFORMED       another endpoint                                                 yes     yes
LOCAL           any endpoint, after a pause                                      no      yes
==============  ===============================================================  ======  ========

"blamed" means that the endpoint's breaker counts it; "attempt" that the row's budget
(``RetryPolicy.max_attempts``) does. An endpoint that is busy too often in a row is blamed after all, so that no
retry is unbounded.

The breaker of an endpoint (``BREAKER``)::

                 fault x threshold                    pause over
       CLOSED ──────────────────────▶ OPEN ─────────────────────────▶ HALF_OPEN
          ▲                            ▲                                │     │
          │                            └────────── fault ───────────────┘     │
          └──────────────────────────── success ──────────────────────────────┘

An OPEN endpoint gets nothing; a HALF_OPEN one gets one small request. One that was opened ``max_opens``
times without a success between is lost: out for the run, as is one that denied us, unless it refused connections.
That costs no row anything, so it is knocked at with a single row, ever more seldom, as long as others are left.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

from .errors import SettingError
from .records import FailureKind

__all__ = [
    "BREAKER",
    "REACTIONS",
    "BatchPolicy",
    "Breaker",
    "Reaction",
    "RetryPolicy",
    "Signal",
    "backoff_s",
    "silence_s",
]


@dataclass(frozen=True, slots=True)
class BatchPolicy:
    """How many rows travel together, and how many requests an endpoint holds.

    Parameters
    ----------
    max_size : int, default 100
        Prompts a request, at most. vLLM refuses more than 1,024.
    max_in_flight : int, default 16
        Requests an endpoint holds at once, at most. It gets one until it has answered, then as many as keep it full;
        where rows differ in length, most of the requests that are open have few rows left.
    single_in_flight : int, default 64
        The same for runs that send one prompt a request.
    hedge : bool, default True
        Whether idle endpoints re-issue the rows a straggler holds at the end of a run.

    Raises
    ------
    SettingError
        A number is below 1, or ``max_size`` above 1,024.

    Examples
    --------
    >>> BatchPolicy(max_size=32).max_size
    32
    """

    max_size: int = 100
    max_in_flight: int = 16
    single_in_flight: int = 64
    hedge: bool = True

    def __post_init__(self) -> None:
        for name in ("max_size", "max_in_flight", "single_in_flight"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise SettingError(f"BatchPolicy({name}={value!r}): must be a whole number, 1 or more")
        if self.max_size > 1024:
            raise SettingError(f"BatchPolicy(max_size={self.max_size}): vLLM takes at most 1,024 prompts a request")


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How often and how patiently failed work is tried again.

    Parameters
    ----------
    max_attempts : int, default 5
        Requests in which a row may meet an endpoint's fault before it fails with the last one.
    breaker_threshold : int, default 3
        Faults in a row that open an endpoint's breaker. A refused connection opens it at once.
    max_opens : int, default 4
        Openings in a row after which the run does not wait for an endpoint any longer.
    base_s, cap_s : float, default 0.5 and 30
        Pause after the first fault, doubled with each further one up to the cap, in seconds.
    jitter : float, default 0.5
        Part of each pause that is random, 0 to 1, so that a fleet does not come back in step.
    max_busy : int, default 12
        "Queue full" answers in a row after which an endpoint is treated as faulty.
    quiet_s : float, default 10
        Seconds without a byte after which an endpoint is asked whether it is still there. A vLLM told to stop
        leaves its clients' connections open and silent while it refuses new ones.

    Raises
    ------
    SettingError
        A value is outside of what is allowed.
    """

    max_attempts: int = 5
    breaker_threshold: int = 3
    max_opens: int = 4
    base_s: float = 0.5
    cap_s: float = 30.0
    jitter: float = 0.5
    max_busy: int = 12
    quiet_s: float = 10.0

    def __post_init__(self) -> None:
        for name in ("max_attempts", "breaker_threshold", "max_opens", "max_busy"):
            if getattr(self, name) < 1:
                raise SettingError(f"RetryPolicy({name}={getattr(self, name)!r}): must be 1 or more")
        if not 0 <= self.jitter <= 1 or self.base_s <= 0 or self.cap_s < self.base_s or self.quiet_s <= 0:
            raise SettingError("RetryPolicy: needs 0 <= jitter <= 1, 0 < base_s <= cap_s and quiet_s > 0")


def backoff_s(attempt: int, retry: RetryPolicy, draw: float) -> float:
    """Seconds to wait after fault number ``attempt`` (from 1).

    ``min(cap, base * 2**(attempt - 1)) * (1 - jitter * draw)``: capped exponential growth with the upper part
    random ("equal jitter" for ``jitter=0.5``). ``draw`` is a random number from 0 to 1, passed in.

    Examples
    --------
    >>> backoff_s(3, RetryPolicy(), draw=0.0)
    2.0
    """
    grown = retry.base_s * 2.0 ** min(attempt - 1, 60)
    return min(retry.cap_s, grown) * (1.0 - retry.jitter * draw)


def silence_s(timeout: float, tokens: int) -> float:
    """Seconds a server may say nothing when its answer comes as a whole and may hold so many tokens.

    ``timeout`` for each 8,192 tokens, at least once. Rows that are streamed get ``timeout``, whatever they are: their
    server has something to say all the time. One that has gone is noticed long before, by ``RetryPolicy.quiet_s``.

    Examples
    --------
    >>> silence_s(300.0, tokens=512), silence_s(300.0, tokens=100 * 512)
    (300.0, 1875.0)
    """
    return timeout * max(1.0, tokens / 8192)


class Breaker(StrEnum):
    """State of an endpoint's circuit breaker."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half-open"
    OUT = "out"


class Signal(StrEnum):
    """What a breaker hears."""

    SUCCESS = "success"
    FAULT = "fault"
    TRIP = "trip"
    """A fault that opens at once: connection refused, or the last of ``breaker_threshold`` in a row."""
    PAUSE_OVER = "pause over"
    DENIED = "denied"


BREAKER: dict[tuple[Breaker, Signal], Breaker] = {
    (Breaker.CLOSED, Signal.SUCCESS): Breaker.CLOSED,
    (Breaker.CLOSED, Signal.FAULT): Breaker.CLOSED,
    (Breaker.CLOSED, Signal.TRIP): Breaker.OPEN,
    (Breaker.CLOSED, Signal.PAUSE_OVER): Breaker.CLOSED,
    # Requests sent before the breaker opened may still end either way, and tell nothing new: an endpoint may go on with
    # what it has and refuse all that comes.
    (Breaker.OPEN, Signal.SUCCESS): Breaker.OPEN,
    (Breaker.OPEN, Signal.FAULT): Breaker.OPEN,
    (Breaker.OPEN, Signal.TRIP): Breaker.OPEN,
    (Breaker.OPEN, Signal.PAUSE_OVER): Breaker.HALF_OPEN,
    (Breaker.HALF_OPEN, Signal.SUCCESS): Breaker.CLOSED,
    (Breaker.HALF_OPEN, Signal.FAULT): Breaker.OPEN,
    (Breaker.HALF_OPEN, Signal.TRIP): Breaker.OPEN,
    (Breaker.HALF_OPEN, Signal.PAUSE_OVER): Breaker.HALF_OPEN,
    **{(state, Signal.DENIED): Breaker.OUT for state in Breaker},
    **{(Breaker.OUT, signal): Breaker.OUT for signal in Signal},
}


@dataclass(frozen=True, slots=True)
class Reaction:
    """What follows from one kind of failure (the table at the top of this module).

    Attributes
    ----------
    rows : {"same", "elsewhere", "any", "halve"}
        Where the unfinished rows go.
    blamed : bool
        Whether the endpoint's breaker counts it.
    attempt : bool
        Whether it counts against the rows' budget of attempts.
    pause : bool
        Whether the endpoint rests before its next request.
    trips : bool
        Whether one is enough to open the breaker.
    """

    rows: Literal["same", "elsewhere", "any", "halve"]
    blamed: bool = False
    attempt: bool = False
    pause: bool = False
    trips: bool = False


REACTIONS: dict[FailureKind, Reaction] = {
    FailureKind.STALE: Reaction("same"),
    FailureKind.CONNECT: Reaction("elsewhere", blamed=True, trips=True),
    FailureKind.DISCONNECT: Reaction("elsewhere", blamed=True, attempt=True),
    FailureKind.SERVER: Reaction("elsewhere", blamed=True, attempt=True),
    FailureKind.HANG: Reaction("elsewhere", blamed=True, attempt=True, trips=True),
    FailureKind.ABORT: Reaction("elsewhere", blamed=True, attempt=True, trips=True),
    FailureKind.BUSY: Reaction("any", pause=True),
    FailureKind.REJECTED: Reaction("halve"),
    FailureKind.DENIED: Reaction("elsewhere"),
    FailureKind.MALFORMED: Reaction("elsewhere", blamed=True, attempt=True),
    FailureKind.LOCAL: Reaction("any", attempt=True, pause=True),
}
