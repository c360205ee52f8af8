"""The log of runs: ``logging.getLogger("swarmkit")``, silent until its level or a handler is set.

DEBUG has two lines a request, INFO two lines a run and the endpoints that are paused or back, WARNING the endpoints
that are lost or distrusted, and that no endpoint is up. Words of servers are escaped and cut; keys are never part of a
failure's words or an endpoint's name.
"""

from __future__ import annotations

import itertools
import logging
from collections import Counter
from collections.abc import Sequence

from ..records import Failure
from ..text import plural, printable
from .events import (
    EndpointChanged,
    RequestEnded,
    RequestSent,
    RouteChanged,
    RowFailed,
    RowsDone,
    RowsRetracted,
    RunEnded,
    RunEvent,
    RunStarted,
    RunWaits,
)

__all__ = ["LOGGER", "RunLog"]

LOGGER = logging.getLogger("swarmkit")
LOGGER.addHandler(logging.NullHandler())  # without it warnings would go to stderr

_numbers = itertools.count(1)


class RunLog:
    """A listener that writes one run to the log.

    Runs are numbered through a process, so that the lines of concurrent runs can be told apart.
    """

    def __init__(self) -> None:
        self._number = 0
        self._names: Sequence[str] = ()
        self._requests = False
        self._open: dict[int, RequestSent] = {}
        self._sent = self._answered = self._failed = 0
        self._began = 0.0

    def __call__(self, event: RunEvent) -> None:
        """Log one event."""
        match event:
            case RowsDone():  # first: there may be one a row
                self._answered += len(event.rows)
            case RowsRetracted():
                self._answered -= len(event.rows)
            case RequestSent():
                self._sent += 1
                if self._requests:
                    self._open[event.ticket] = event
                    LOGGER.debug("%s: sent, %s", self._request(event), plural(len(event.rows), "row"))
            case RequestEnded():
                if (sent := self._open.pop(event.ticket, None)) is not None:
                    self._ended(sent, event)
            case RowFailed():
                self._failed += 1
            case EndpointChanged():
                self._changed(event)
            case RouteChanged():
                name, route = self._names[event.endpoint], printable(event.route)
                LOGGER.warning("run %d: endpoint %s has another chat template: %s", self._number, name, route)
            case RunWaits():
                LOGGER.warning("run %d: %s; %s", self._number, event.describe(), _words(event.failure))
            case RunStarted():
                self._started(event)
            case RunEnded():
                self._over(event)

    def _started(self, event: RunStarted) -> None:
        self._number = next(_numbers)
        self._names, self._began = event.endpoints, event.at_s
        self._requests = LOGGER.isEnabledFor(logging.DEBUG)
        if LOGGER.isEnabledFor(logging.INFO):
            routes = ", ".join(f"{printable(r)}: {plural(c, 'endpoint')}" for r, c in Counter(event.routes).items())
            LOGGER.info("run %d: started, %s to send; %s", self._number, plural(event.pending, "row"), routes)

    def _ended(self, sent: RequestSent, event: RequestEnded) -> None:
        request, seconds = self._request(sent), event.at_s - sent.at_s
        if event.failure is not None:
            LOGGER.debug("%s: failed after %.3f s: %s", request, seconds, _words(event.failure))
        else:
            LOGGER.debug("%s: %s after %.3f s", request, "dropped" if event.dropped else "answered", seconds)

    def _changed(self, event: EndpointChanged) -> None:
        name, why = self._names[event.endpoint], f": {_words(event.failure)}" if event.failure else ""
        level = logging.WARNING if event.state in ("lost", "distrusted") else logging.INFO
        LOGGER.log(level, "run %d: endpoint %s is %s%s", self._number, name, event.state, why)

    def _over(self, event: RunEnded) -> None:
        end = "cancelled" if event.cancelled else "ended"
        why = f"; {printable(event.why)}" if event.why else ""
        LOGGER.info(
            "run %d: %s after %.3f s, %s answered, %s failed, %s%s",
            self._number,
            end,
            event.at_s - self._began,
            plural(self._answered, "row"),
            plural(self._failed, "row"),
            plural(self._sent, "request"),
            why,
        )

    def _request(self, sent: RequestSent) -> str:
        return f"run {self._number}, request {sent.ticket} to {self._names[sent.endpoint]}"


def _words(failure: Failure) -> str:
    return printable(failure.describe())
