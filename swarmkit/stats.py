"""What a run cost, counted from its events."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .events import RequestEnded, RequestSent, RowFailed, RowsDone, RowsReused, RunEnded, RunEvent, RunStarted
from .markup import plural, table_html
from .policy import Breaker
from .results import Columns

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["EndpointStats", "RunStats"]

LOGGED = 100_000
"""Requests that a run's timeline keeps: enough for any picture, and a bound on memory."""


@dataclass(slots=True)
class EndpointStats:
    """One endpoint's part in a run: requests, rows answered, failed requests, seconds with work in hand, and the
    state of its breaker."""

    name: str
    requests: int = 0
    rows: int = 0
    failures: int = 0
    busy_s: float = 0.0
    in_flight: int = 0
    busy_since: float = 0.0
    last_failure: str = ""
    breaker: Breaker = Breaker.CLOSED


@dataclass(slots=True)
class RunStats:
    """What a run cost. A listener: call it with a run's events.

    Attributes
    ----------
    rows, answered, reused, failed : int
        Rows in the column; rows that a server answered; rows whose answer came from a store or from a row with the
        same prompt; rows with an error.
    requests, failed_requests : int
        Requests sent, and those that failed.
    batch_sizes : dict of int to int
        Rows in a request to number of such requests.
    prompt_tokens, completion_tokens : int
        As the servers counted them, over rows where they said.
    retries, halvings, steals, reissues : int
        Failed batches sent again; refused batches split; bites taken off another endpoint's queue; copies of
        rows that a straggler held.
    time_s : float
        Seconds from start to end.
    routes : dict of str to int
        How endpoints were asked, and how many of them.
    endpoints : list of EndpointStats
        By endpoint index.
    recent_failures : deque of str
        What went wrong last (20 at most), requests and rows, the newest at the end.
    newest : deque of int
        Positions of the rows that were answered last (3 at most).

    Examples
    --------
    >>> RunStats(rows=2, answered=2, requests=1, time_s=0.5)
    <RunStats: 2 of 2 rows answered in 0.5 s (4.0 rows/s), 1 request>
    """

    rows: int = 0
    answered: int = 0
    reused: int = 0
    failed: int = 0
    requests: int = 0
    failed_requests: int = 0
    batch_sizes: dict[int, int] = field(default_factory=dict)
    prompt_tokens: int = 0
    completion_tokens: int = 0
    retries: int = 0
    halvings: int = 0
    steals: int = 0
    reissues: int = 0
    time_s: float = 0.0
    routes: dict[str, int] = field(default_factory=dict)
    endpoints: list[EndpointStats] = field(default_factory=list)
    recent_failures: deque[str] = field(default_factory=lambda: deque(maxlen=20))
    newest: deque[int] = field(default_factory=lambda: deque(maxlen=3))
    _log: list[tuple[str, int, float, float, str | None]] = field(default_factory=list)
    _open: dict[int, tuple[int, int, float]] = field(default_factory=dict)
    _began: float = 0.0

    def __call__(self, event: RunEvent) -> None:
        """Count one event."""
        match event:
            case RowsDone(_, endpoint, rows, _, at_s):
                self.answered += len(rows)
                self.endpoints[endpoint].rows += len(rows)
                self.newest.extend(rows)
                self.time_s = at_s - self._began
            case RequestSent():
                self._sent(event)
            case RequestEnded():
                self._ended(event)
            case RowFailed():
                self.failed += 1
                self.recent_failures.append(event.failure.describe())
            case RowsReused(rows, failed):
                self.reused += len(rows) - failed
                self.failed += failed
            case RunStarted():
                self._started(event)
            case RunEnded():
                self.time_s = event.at_s - self._began
                for ticket, (index, _, _) in list(self._open.items()):
                    self._freed(self.endpoints[index], event.at_s)
                    self._note(ticket, event.at_s, "dropped")

    def _started(self, event: RunStarted) -> None:
        # The levels of a tree-reduce are runs of their own, counted as one: its clock goes on.
        self._began = event.at_s - self.time_s
        if self.endpoints:
            return
        self.endpoints = [EndpointStats(name) for name in event.endpoints]
        for route in event.routes:
            self.routes[route] = self.routes.get(route, 0) + 1

    def _sent(self, event: RequestSent) -> None:
        rows, endpoint = len(event.rows), self.endpoints[event.endpoint]
        self.requests += 1
        self.batch_sizes[rows] = self.batch_sizes.get(rows, 0) + 1
        self._open[event.ticket] = (event.endpoint, rows, event.at_s)
        endpoint.requests += 1
        endpoint.breaker = event.breaker
        if not endpoint.in_flight:
            endpoint.busy_since = event.at_s
        endpoint.in_flight += 1

    def _ended(self, event: RequestEnded) -> None:
        endpoint = self.endpoints[event.endpoint]
        endpoint.breaker = event.breaker
        self._freed(endpoint, event.at_s)
        if event.failure is not None:
            self.failed_requests += 1
            endpoint.failures += 1
            endpoint.last_failure = event.failure.describe()
            self.recent_failures.append(endpoint.last_failure)
        kind = event.failure.kind if event.failure else None
        self._note(event.ticket, event.at_s, "dropped" if event.dropped else kind)

    def _freed(self, endpoint: EndpointStats, at_s: float) -> None:
        endpoint.in_flight -= 1
        if not endpoint.in_flight:
            endpoint.busy_s += at_s - endpoint.busy_since

    def _note(self, ticket: int, at_s: float, failure: str | None) -> None:
        index, rows, sent = self._open.pop(ticket)
        if len(self._log) < LOGGED:
            began = self._began
            self._log.append((self.endpoints[index].name, rows, sent - began, at_s - began, failure))

    def count_tokens(self, columns: Columns) -> None:
        """Add the tokens of a run's columns."""
        self.prompt_tokens += sum(t for t in columns.prompt_tokens if t > 0)
        self.completion_tokens += sum(t for t in columns.completion_tokens if t > 0)

    @property
    def known(self) -> int:
        """Rows that have an answer, wherever it came from."""
        return self.answered + self.reused

    @property
    def rows_per_s(self) -> float:
        """Rows answered a second."""
        return self.answered / self.time_s if self.time_s > 0 else 0.0

    def frame(self) -> pd.DataFrame:
        """One row per endpoint: ``endpoint, rows, requests, failures, busy_s, last_failure``."""
        import pandas as pd

        columns = ("endpoint", "rows", "requests", "failures", "busy_s", "last_failure")
        values = [(e.name, e.rows, e.requests, e.failures, e.busy_s, e.last_failure) for e in self.endpoints]
        return pd.DataFrame(values, columns=list(columns))

    def timeline(self) -> pd.DataFrame:
        """One row per request, the first 100,000: ``endpoint, rows, start_s, end_s, failure``.

        Times are seconds from the start of the run. ``failure`` is the kind of failure, "dropped" where the run
        ended first, missing where all went well. ``plots.timeline`` draws it.
        """
        import pandas as pd

        frame = pd.DataFrame(self._log, columns=["endpoint", "rows", "start_s", "end_s", "failure"])
        return frame.astype({"start_s": "float64", "end_s": "float64"})

    @property
    def working_s(self) -> float:
        """Seconds that endpoints had work in hand, added up over all of them."""
        return sum(e.busy_s for e in self.endpoints)

    @property
    def waiting_s(self) -> float:
        """Seconds that endpoints had none while the run went on, added up over all of them."""
        return max(0.0, len(self.endpoints) * self.time_s - self.working_s)

    def summary(self) -> list[tuple[str, str]]:
        """Label and value, for what is worth showing."""
        sizes = sorted(self.batch_sizes)
        shown = "" if not sizes else f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
        extras = {
            "failed requests": self.failed_requests,
            "retries": self.retries,
            "halvings": self.halvings,
            "steals": self.steals,
            "re-issues": self.reissues,
        }
        return [
            ("rows", f"{self.answered:,} answered, {self.failed:,} failed, of {self.rows:,}"),
            *([("not asked", f"{self.reused:,} rows: stored, or the same as another")] if self.reused else []),
            ("time", f"{self.time_s:.1f} s ({self.rows_per_s:.1f} rows/s)"),
            ("requests", f"{self.requests:,}" + (f", {shown} rows each" if shown else "")),
            ("tokens", f"{self.prompt_tokens:,} in, {self.completion_tokens:,} out"),
            ("endpoints", f"{len(self.endpoints):,}: {self.working_s:.1f} s working, {self.waiting_s:.1f} s waiting"),
            *((name, f"{count:,}") for name, count in extras.items() if count),
            *(("asked by", f"{route}: {plural(count, 'endpoint')}") for route, count in self.routes.items()),
        ]

    def __repr__(self) -> str:
        failed = f", {self.failed:,} failed" if self.failed else ""
        failed += f", {self.reused:,} not asked" if self.reused else ""
        return (
            f"<RunStats: {self.answered:,} of {self.rows:,} rows answered{failed} in {self.time_s:.1f} s "
            f"({self.rows_per_s:.1f} rows/s), {plural(self.requests, 'request')}>"
        )

    def _repr_html_(self) -> str:
        return table_html(self.summary())
