"""How fast an endpoint works: what simulations assume, and calibration finds.

An engine with continuous batching works in steps. Each gives every running row one token, and takes longer the more
rows run. Prompts are read in between, during which no row gets a token. So a row's tokens are counted on a clock of
the endpoint that stands still while prompts are read, and is slower the more rows run.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .simulate import BLOCK, Server

if TYPE_CHECKING:
    from .models import EndpointModel

__all__ = ["Pace", "PacedServer", "pace_of", "server_of"]


@dataclass(frozen=True, slots=True)
class Pace:
    """The speed of an endpoint.

    Attributes
    ----------
    slots : int
        Rows it works on at once.
    step_s, row_s : float
        Seconds of a step, whatever runs; and what each running row adds.
    prefill_s : float
        Seconds a prompt token takes to be read.
    latency_s : float
        Seconds until a request is with the engine.
    """

    slots: int
    step_s: float
    row_s: float = 0.0
    prefill_s: float = 0.0
    latency_s: float = 0.0

    def step(self, rows: int) -> float:
        """Seconds of a step in which so many rows run."""
        return self.step_s + self.row_s * rows


@dataclass
class PacedServer(Server):
    """An endpoint of a simulation that works at a pace; lengths of rows are tokens.

    Attributes
    ----------
    pace : Pace
        Its speed.
    clock, at : float
        Tokens that a row has which has run from the beginning; and the time at which that was so.
    reading_s : float
        Seconds that it still reads prompts, from ``at`` on.
    read : float
        Tokens of prompts that it has read: those that it did not find in its cache.
    turn : int
        How often it was planned when its next rows end; only the last plan holds.
    """

    pace: Pace = Pace(64, 1.0)
    clock: float = 0.0
    at: float = 0.0
    reading_s: float = 0.0
    read: float = 0.0
    turn: int = 0
    ends: list[tuple[float, int, Any, Any]] = field(default_factory=list)  # (clock, tie-break, request, rows)
    ties: Iterator[int] = field(default_factory=itertools.count)

    def __post_init__(self) -> None:
        self.slots, self.latency_s, self.token_s = self.pace.slots, self.pace.latency_s, self.pace.prefill_s

    def reset(self) -> None:
        """Begin a run."""
        super().reset()
        self.clock = self.at = self.reading_s = self.read = 0.0
        self.turn, self.ends = 0, []

    def row_work_s(self, tokens: float, prompt_tokens: float = 0.0) -> float:
        """Seconds of the endpoint that a row takes, while all slots are busy."""
        return tokens * self.pace.step(self.slots) / self.slots + prompt_tokens * self.token_s

    def alone_s(self, tokens: float, prompt_tokens: float) -> float:
        """Seconds that a row takes at least; its prompt may be in the cache, if there is one."""
        reading_s = 0.0 if self.cache else prompt_tokens * self.token_s
        return self.latency_s + reading_s + tokens * self.pace.step(1)

    def advance(self, now: float) -> None:
        """Set the clock: always before rows begin, and before they are dropped."""
        passed, self.at = now - self.at, now
        read = min(passed, self.reading_s)
        self.reading_s -= read
        if self.busy:
            self.clock += (passed - read) / self.pace.step(self.busy)

    def begin(self, request: Any, rows: Sequence[int], end: float, prompt_tokens: float) -> None:
        """Put rows into slots, which end together when the clock shows ``end``; so many tokens of their prompts are
        read before."""
        self.reading_s += self.token_s * prompt_tokens
        self.read += prompt_tokens
        heapq.heappush(self.ends, (end, next(self.ties), request, rows))
        self.running[request] += len(rows)
        self.busy += len(rows)

    def next_at(self) -> float:
        """When the next rows end, if nothing else begins."""
        while self.ends and self.ends[0][2] not in self.running:  # its request was closed
            heapq.heappop(self.ends)
        if not self.ends:
            return math.inf
        return self.at + self.reading_s + max(0.0, self.ends[0][0] - self.clock) * self.pace.step(self.busy)

    def pop(self) -> tuple[Any, Sequence[int]]:
        """The request and the rows that end next. They still hold their slots."""
        end, _, request, rows = heapq.heappop(self.ends)
        self.clock = max(self.clock, end)
        return request, rows


def pace_of(model: EndpointModel) -> Pace:
    """The pace of a model of an endpoint."""
    full = 1 / model.tokens_per_s
    alone = min(full, 1 / (model.alone_tokens_per_s or model.tokens_per_s))
    row_s = (full - alone) / (model.slots - 1) if model.slots > 1 else 0.0
    return Pace(model.slots, alone - row_s, row_s, 1 / model.prefill_tokens_per_s, model.latency_s)


def server_of(model: EndpointModel) -> PacedServer:
    """A server for a simulation."""
    return PacedServer(pace=pace_of(model), cache=model.cache_tokens // BLOCK)
