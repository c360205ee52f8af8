"""The circuit breaker of an endpoint: a table of states and signals.

::

                 fault x threshold                    pause over
       CLOSED ──────────────────────▶ OPEN ─────────────────────────▶ HALF_OPEN
          ▲                            ▲                                │     │
          │                            └────────── fault ───────────────┘     │
          └──────────────────────────── success ──────────────────────────────┘

An OPEN endpoint is sent nothing; a HALF_OPEN one is sent one request. It is tried again and again, at growing
intervals, as long as the run goes on. OUT is only an endpoint that denied its first requests (DENIED): no retry would
help. REMOVED is one that has left the pool: what it holds may finish, and nothing more is sent until it is ADDED again.
"""

from __future__ import annotations

from enum import StrEnum

__all__ = ["BREAKER", "Breaker", "Signal"]


class Breaker(StrEnum):
    """State of an endpoint's circuit breaker."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half-open"
    OUT = "out"
    REMOVED = "removed"


class Signal(StrEnum):
    """What changes a breaker's state."""

    SUCCESS = "success"
    FAULT = "fault"
    TRIP = "trip"
    """A fault that opens at once: connection refused, or the last of ``breaker_threshold`` in a row."""
    PAUSE_OVER = "pause over"
    DENIED = "denied"
    ADDED = "added"
    REMOVED = "removed"


BREAKER: dict[tuple[Breaker, Signal], Breaker] = {
    (Breaker.CLOSED, Signal.SUCCESS): Breaker.CLOSED,
    (Breaker.CLOSED, Signal.FAULT): Breaker.CLOSED,
    (Breaker.CLOSED, Signal.TRIP): Breaker.OPEN,
    (Breaker.CLOSED, Signal.PAUSE_OVER): Breaker.CLOSED,
    # Requests sent before the breaker opened may still end either way, and are no news: an endpoint may finish what it
    # has and refuse all that is new.
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
    **{(Breaker.REMOVED, signal): Breaker.REMOVED for signal in Signal},
    **{(state, Signal.REMOVED): Breaker.REMOVED for state in Breaker},
    (Breaker.REMOVED, Signal.ADDED): Breaker.CLOSED,
}
