"""Who else is at the endpoints of a run: the other runs on its pool, by priority, and other clients of the servers.

Runs on one pool know each other (``Places``): while a run that goes first has rows to send, the others hold no more at
an endpoint than what it leaves free there, or have a small share of what its gateway allows (``rates.py``). Other
clients are seen in what a server says of its queue (``Looks``): rows that work and wait there, and are not this run's.
Then the rows it works on at once are what it says, not what this run has measured, which is a part of them. So each
client holds equally much, and servers take rows in the order in which they come: each is served equally.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

from .endpoints import Fleet

__all__ = ["LOOK_S", "Looks", "Places", "Sharer"]

LOOK_S = 3.0
"""Seconds between two looks at the queues of servers."""
_FEW, _MOST = 4, 32  # endpoints at a time: in turn, and while others were seen at any of them


class Sharer(Protocol):
    """A run, as the others see it: the scheduler's part of ``Scheduler``."""

    fleet: Fleet

    @property
    def has_unsent(self) -> bool:
        """Whether it has rows to send."""


@dataclass(frozen=True, slots=True, eq=False)
class _Run:
    priority: int
    sharer: Sharer
    index_of: Callable[[str], int | None]


class Places:
    """The runs on one pool, and which of them go first: as in vLLM those with the lower number.

    Examples
    --------
    >>> places = Places()
    >>> places.taken(0, lambda: "http://node001:8000") is None  # no run goes before one of priority 0
    True
    """

    def __init__(self) -> None:
        self._runs: list[_Run] = []
        self._first = 0  # the lowest number of all

    def enter(self, priority: int, sharer: Sharer, index_of: Callable[[str], int | None]) -> Callable[[], None]:
        """A run begins; returns what is called when it is over. ``index_of`` gives its index of an endpoint's URL."""
        run = _Run(priority, sharer, index_of)
        self._runs.append(run)
        self._first = min(self._first, priority)

        def leave() -> None:
            self._runs.remove(run)
            self._first = min((run.priority for run in self._runs), default=0)

        return leave

    def taken(self, priority: int, url: Callable[[], str]) -> int | None:
        """The rows that runs which go before this priority hold at an endpoint; None if none of them has more to
        send there."""
        taken = None
        if priority <= self._first:  # as nearly always
            return taken
        for run in self._runs:
            if run.priority < priority and run.sharer.has_unsent and (index := run.index_of(url())) is not None:
                taken = (taken or 0) + run.sharer.fleet[index].held
        return taken


class Looks:
    """Which servers are asked for their queues: a few in turn, and more while others are seen to use them.

    Parameters
    ----------
    fleet : Fleet
        The endpoints. It is told what servers say.
    tells : callable
        Whether the server of an endpoint may say anything.

    Examples
    --------
    >>> from swarmkit import RetryPolicy
    >>> fleet = Fleet(2, max_size=100, max_in_flight=4, retry=RetryPolicy(), draw=lambda: 0.0)
    >>> looks = Looks(fleet)
    >>> looks.due()  # no server has anything of this run
    []
    >>> fleet.sent(1, 100, now=0.0)
    >>> looks.due(), looks.told(1, running=64, waiting=86)
    ([1], True)
    """

    def __init__(self, fleet: Fleet, tells: Callable[[int], bool] = lambda index: True) -> None:
        self._fleet = fleet
        self._tells = tells
        self._silent: set[int] = set()
        self._shared: dict[int, None] = {}  # endpoints at which others were seen at the last look
        self._held: dict[int, int] = {}  # rows there as the servers were asked
        self._turn = 0

    def due(self) -> list[int]:
        """The endpoints whose servers are asked now."""
        most = _MOST if self._shared else _FEW
        asked = [*itertools.islice(filter(self._in_use, self._shared), most // 2)]
        asked += itertools.islice((i for i in self._in_turn() if i not in self._shared), most - len(asked))
        if asked:
            self._turn = asked[-1] + 1
        self._held = {index: self._own(index) for index in asked}
        return asked

    def _in_turn(self) -> Iterator[int]:
        size = len(self._fleet)
        return filter(self._in_use, ((self._turn + i) % size for i in range(size)))

    def _in_use(self, index: int) -> bool:
        e = self._fleet[index]
        gateway = self._fleet.rate_of(index) is not None
        return e.held > 0 and e.ready and not gateway and index not in self._silent and self._tells(index)

    def _own(self, index: int) -> int:
        """Rows of this run that a server may be working on, also for nothing."""
        return self._fleet[index].held + self._fleet[index].superseded

    def silent(self, index: int) -> None:
        """A server has said nothing: it is not asked again."""
        self._silent.add(index)
        self._shared.pop(index, None)

    def told(self, index: int, running: int, waiting: int) -> bool:
        """A server says how many rows it works on, and how many wait; returns whether they are not only this run's."""
        held = max(self._held.get(index, 0), self._own(index))  # some came or went since it was asked
        others = self._fleet.told(index, running, waiting, held)
        self._shared.pop(index, None)
        if others:
            self._shared[index] = None  # the latest to be asked again
        return others
