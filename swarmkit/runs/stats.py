"""What a run cost, counted from its events."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from ..engine.breaker import Breaker
from ..engine.columns import UNKNOWN, Columns
from ..records import Failure, FailureKind, Usage
from ..text import plural, table_html
from .counts import Counts, took
from .events import (
    EndpointChanged,
    RequestEnded,
    RequestSent,
    RouteChanged,
    RowFailed,
    RowInvalid,
    RowsDone,
    RowsRetracted,
    RowsReused,
    RunEnded,
    RunEvent,
    RunStarted,
    RunWaits,
)
from .notebook import Slot
from .registered import picture
from .roster import Roster
from .story import Story

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

__all__ = ["BARE", "UNTOLD", "EndpointStats", "RequestRecord", "RunStats"]

_HELD_BACK = "It is held back, and its rows are asked again elsewhere"
UNTOLD = "no log-probabilities"
"""What the route of an endpoint says that gives none, where they are asked for."""
BARE = "no chats: prompts are sent as they are"
"""What the route of an endpoint says that has no chats, where chats are asked for."""
LOGGED = 100_000
"""Requests that a run's timeline keeps: enough for any picture, and a bound on memory."""
_SAMPLED = 1_000  # answers whose lengths a run keeps
_COSTED = 2_000  # requests of which it is logged what they have cost: more than calibration looks at
_UNTOLD_BY_EVENTS = ("retries", "halvings", "steals", "reissues", "truncated")
_GOLDEN = 0.6180339887498949  # multiples of it, less their whole part, are spread evenly, and have no period


class RequestRecord(NamedTuple):
    """A request that is over. What it has cost, and when its first answers came, is kept of a run's first 2,000.

    Attributes
    ----------
    endpoint : str
        Name of the endpoint.
    rows : int
        Rows in the request; 0 for a probe.
    start_s, end_s : float
        Seconds from the start of the run.
    failure : str or None
        The kind of its failure; "dropped" where its rows were not needed any more; None where all went well.
    prompt_tokens, completion_tokens : int
        As the server counted them; 0 where it did not.
    shortest, longest : int
        Tokens of its shortest and its longest answer, of at most 128 of its rows; 0 where that is not known.
    posted_s, first_token_s, first_row_s : float or None
        When it was posted, after what is checked before; when the first token came, and the first row was whole;
        seconds from the start of the run. None where the answers came as a whole, or none did.
    """

    endpoint: str
    rows: int
    start_s: float
    end_s: float
    failure: str | None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    shortest: int = 0
    longest: int = 0
    posted_s: float | None = None
    first_token_s: float | None = None
    first_row_s: float | None = None


@dataclass(slots=True)
class EndpointStats:
    """One endpoint's part in a run: requests, rows answered, failed requests, seconds with requests in flight, and the
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
    rows, answered, failed : int
        Rows in the column; rows that a server answered in this run; rows with an error.
    reused, stored, kept : int
        Rows with an answer that was not asked for in this run: that of another row with the same prompt; from a store;
        what the frame had already (``only_missing=True``).
    skipped : int
        Failed rows that had no prompt, as their text is missing.
    not_asked : int
        Rows that a deadline has left without an answer: not asked, or not answered by then.
    deadline : str
        Where a deadline has ended the run: which, in words; else empty.
    cut : int
        Answers that ended for want of tokens (``finish_reason`` "length"), of those that servers gave in this run.
    invalid, repaired, given_up : int
        Answers that were not what the schema asks for; rows that had one, and a valid one when they were asked again;
        rows that had none.
    truncated, shortened : int
        Prompts that were cut to fit the model's context (``too_long=``); texts that were cut so that those of a node of
        a tree fit it together.
    max_tokens, context : int
        Tokens an answer may have, and the context to which prompts were cut; 0 where that is not known.
    samples : int
        Answers a row, the ``n`` of the call.
    requests, failed_requests : int
        Requests sent, and those that failed.
    batch_sizes : dict of int to int
        Rows in a request to number of such requests.
    prompt_tokens, completion_tokens : int
        Spent in this run, as the servers counted them, over rows where they said: the prompt of a row once, whatever
        its ``n``; nothing for rows that are reused, stored or kept. A reply to many prompts that is not streamed is
        counted as a whole; it has counts for each row, in the frame and in stores, only with ``details=True``.
    reused_prompt_tokens, reused_completion_tokens : int
        What the reused rows would have cost, as far as tokens were counted for each row.
    stored_prompt_tokens, stored_completion_tokens : int
        What the stored rows have cost when they were asked, likewise.
    retries, halvings, steals, reissues : int
        Failed batches sent again; refused batches split in two; batches taken from another endpoint's queue; rows sent
        to a second endpoint because the first one took too long.
    shared : int
        Endpoints at which others were seen at work, by what the servers say of their queues every few seconds: other
        processes, or other runs of this one.
    prefix_queries, prefix_hits, prefix_endpoints : int
        Tokens of prompts that vLLM servers looked up in their prefix caches during the run, and those of them that they
        found there, as the servers themselves count them: for all who ask them at the time. Servers that count so, and
        answered when they were asked: a sample of 32 of larger pools. 0 for runs of fewer than 64 rows.
    time_s : float
        Seconds from start to end.
    routes : dict of str to int
        Routes, and how many endpoints each was used for.
    endpoints : list of EndpointStats
        By endpoint index.
    waits : str
        While no endpoint is up: for how long the run goes on trying; else empty.
    recent_failures : deque of str
        What went wrong last (20 at most), requests and rows, the newest at the end.
    newest : deque of int
        Positions of the rows that were answered last (3 at most).
    roster : Roster
        The names of the endpoints by index, also of those that are added while the run goes on.
    notices : list of str
        What is said at once, a line each: endpoints that gave the same answer to every prompt, where others did not, or
        that had another chat template than was known, or refused their key while others went on; a watched hostfile
        that cannot be read; endpoints added to it that the run cannot use.
    listener_errors : list of str
        Listeners that raised and were removed, a line each.
    lengths : list of (int, int)
        Tokens of prompt and answer of a sample of the answers (1,000 at most), spread evenly over the rows; known when
        the run is over. Where the server counted an answer only together with others, its part is estimated by the
        length of its text, and its prompt is a mean one. A prompt that was not counted at all has -1.
    story : Story
        What happened, in order; ``Run.story`` shows it.
    is_monitored : bool
        Whether a ``RunMonitor`` shows the run, so that no bar does.
    bar : Slot or None
        Where the run's bar is shown in a notebook, as long as that is the bar's place.
    noun : str
        What its rows are: those of a tree_reduce are merges, those of a pipeline are prompts.

    Examples
    --------
    >>> RunStats(rows=2, answered=2, requests=1, time_s=0.5)
    <RunStats: 2 of 2 rows answered in 0.5 s (4.0 rows/s), 1 request>

    Of a run:

    >>> answers = df.swarm.scatter("What does {gene} do?")
    >>> stats = sk.last_run().stats
    >>> stats.known, stats.tokens_an_answer, stats.rows_per_s == 2 / stats.time_s
    (2, 7.0, True)
    >>> print(stats.counts().line("scatter"))
    scatter: 2 rows, 2 answered, ...
    >>> stats.summary()[0]
    ('rows', '2 answered, 0 failed, of 2')
    >>> len(stats.frame()), len(stats.timeline()) == stats.requests
    (4, True)
    >>> idle = stats.waiting_s / (stats.waiting_s + stats.working_s)
    >>> stats.plot()
    <Figure size ...>
    """

    rows: int = 0
    answered: int = 0
    reused: int = 0
    stored: int = 0
    kept: int = 0
    failed: int = 0
    skipped: int = 0
    not_asked: int = 0
    deadline: str = ""
    cut: int = 0
    invalid: int = 0
    repaired: int = 0
    given_up: int = 0
    truncated: int = 0
    shortened: int = 0
    max_tokens: int = 0
    context: int = 0
    samples: int = 1
    requests: int = 0
    failed_requests: int = 0
    batch_sizes: dict[int, int] = field(default_factory=dict)
    prompt_tokens: int = 0
    completion_tokens: int = 0
    reused_prompt_tokens: int = 0
    reused_completion_tokens: int = 0
    stored_prompt_tokens: int = 0
    stored_completion_tokens: int = 0
    retries: int = 0
    halvings: int = 0
    steals: int = 0
    reissues: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    prefix_endpoints: int = 0
    shared: int = 0
    time_s: float = 0.0
    routes: dict[str, int] = field(default_factory=dict)
    endpoints: list[EndpointStats] = field(default_factory=list)
    waits: str = ""
    recent_failures: deque[str] = field(default_factory=lambda: deque(maxlen=20))
    newest: deque[int] = field(default_factory=lambda: deque(maxlen=3))
    roster: Roster = field(default_factory=Roster, compare=False)
    notices: list[str] = field(default_factory=list)
    listener_errors: list[str] = field(default_factory=list)
    lengths: list[tuple[int, int]] = field(default_factory=list)
    story: Story = field(default_factory=Story, compare=False)
    is_monitored: bool = field(default=False, compare=False)
    bar: Slot | None = field(default=None, compare=False)
    noun: str = field(default="row", compare=False)
    _log: list[RequestRecord] = field(default_factory=list)
    _open: dict[int, RequestSent] = field(default_factory=dict)
    _usage: dict[int, Usage] = field(default_factory=dict, compare=False)  # by ticket
    _began: float = 0.0
    _counted: int = 0
    _not_yet_valid: set[int] = field(default_factory=set, compare=False)
    _given_up: set[int] = field(default_factory=set, compare=False)
    _columns: Columns | None = field(default=None, compare=False)

    def __call__(self, event: RunEvent) -> None:
        """Count one event."""
        match event:
            case RowsDone(ticket, endpoint, rows, _, at_s, usage):
                self.answered += len(rows)
                self.endpoints[endpoint].rows += len(rows)
                self.newest.extend(rows)
                self._spent(rows, usage, ticket)
                if self._not_yet_valid:
                    self.repaired += len(self._not_yet_valid.intersection(rows))
                    self._not_yet_valid.difference_update(rows)
                self.time_s = at_s - self._began
                self.waits = ""
                if rows and (self.story.everything or self.story.followed):
                    sent_s = self._open[ticket].at_s - self._began
                    self.story.answered(event, sent_s, self.time_s, self.endpoints[endpoint].name)
            case RowsRetracted(endpoint, rows, _, at_s):  # what they cost is spent
                failed = self._given_up.intersection(rows)
                self._given_up -= failed
                self.given_up -= len(failed)
                self.failed -= len(failed)
                self.answered -= len(rows) - len(failed)
                self.endpoints[endpoint].rows -= len(rows) - len(failed)
                self.story.retracted(event, at_s - self._began, self.endpoints[endpoint].name)
            case RequestSent():
                self._sent(event)
            case RequestEnded():
                self._ended(event)
            case RunWaits():
                if event.until_s - event.at_s >= 2.0:  # else it is over before anybody has read it
                    self.waits = event.describe()
            case RowInvalid():
                self._is_invalid(event)
            case RowFailed():
                self.failed += 1
                if event.row in self._not_yet_valid:
                    self._not_yet_valid.discard(event.row)
                    self._given_up.add(event.row)
                    self.given_up += 1
                self.recent_failures.append(event.failure.describe())
                self.story.row_failed(event, event.at_s - self._began)
            case RowsReused():
                self._reused(event)
                self.story.reused(event, self.time_s)
            case EndpointChanged():
                self._changed(event)
            case RouteChanged(index, route, at_s):
                name = self.endpoints[index].name
                self.routes[route] = self.routes.get(route, 0) + 1
                self._notice(f"{name} has another chat template than before: its rows are sent by {route}")
                self.story.rerouted(event, at_s - self._began, name)
            case RunStarted():
                self._started(event)
            case RunEnded():
                self._over(event)

    def follow(self, columns: Columns) -> None:
        """Count the answers in these columns from now on, until the run ends."""
        self._columns, self.samples = columns, columns.n

    def take_over(self, part: RunStats) -> None:
        """Take over what the events of a part of the run do not tell, when it is over."""
        for name in _UNTOLD_BY_EVENTS:
            setattr(self, name, getattr(self, name) + getattr(part, name))
        self.context = max(self.context, part.context)
        for line in part.notices:
            self._notice(line)

    def _notice(self, line: str) -> None:
        if line not in self.notices:  # each level of a tree may say the same
            self.notices.append(line)

    def _spent(self, rows: Sequence[int], usage: Usage | None, ticket: int) -> None:
        if self._columns is None:
            return
        self.cut += self._columns.cut(rows)
        if usage is not None:  # of all that was asked, also of rows that had their answers by then
            self.prompt_tokens += usage.prompt_tokens
            self.completion_tokens += usage.completion_tokens
            self._counted += len(self._open[ticket].rows) * self.samples
        else:
            cost = self._columns.cost(rows)
            self.prompt_tokens += cost.prompt_tokens
            self.completion_tokens += cost.completion_tokens
            self._counted += cost.counted
            if len(self._log) < _COSTED:
                prompts, answers = self._usage.get(ticket, (0, 0))
                usage = Usage(prompts + cost.prompt_tokens, answers + cost.completion_tokens)
        if usage is not None and len(self._log) < _COSTED:
            self._usage[ticket] = usage

    def _is_invalid(self, event: RowInvalid) -> None:
        self.invalid += 1
        self._not_yet_valid.add(event.row)
        self.prompt_tokens += event.prompt_tokens
        self.completion_tokens += event.completion_tokens
        self._counted += event.completion_tokens > 0
        self.story.invalid(event, event.at_s - self._began, self.endpoints[event.endpoint].name)

    def _reused(self, event: RowsReused) -> None:
        answered = len(event.rows) - event.failed
        self.failed += event.failed
        if event.stored:
            self.stored += answered
            self.stored_prompt_tokens += event.prompt_tokens
            self.stored_completion_tokens += event.completion_tokens
        else:
            self.reused += answered
            self.reused_prompt_tokens += event.prompt_tokens
            self.reused_completion_tokens += event.completion_tokens

    def _started(self, event: RunStarted) -> None:
        # The levels of a tree-reduce are runs of their own, counted as one: its clock goes on.
        self._began = event.at_s - self.time_s
        self.story.started(event, self.time_s)
        known = bool(self.endpoints)
        self.enrol(event.endpoints)
        if known:
            return
        for route in event.routes:
            self.routes[route] = self.routes.get(route, 0) + 1

    def _changed(self, event: EndpointChanged) -> None:
        self.enrol(self.roster.names)
        endpoint = self.endpoints[event.endpoint]
        match event.state:
            case "distrusted" if event.failure:
                self._notice(f"{endpoint.name} is not believed: {event.failure.message}. {_HELD_BACK}")
            case "paused" if event.failure and event.failure.of_key:
                if any(e.breaker is Breaker.CLOSED for e in self.endpoints):
                    again = "It is tried again; its rows are asked elsewhere"
                    self._notice(f"{event.failure.describe()}. {again}")
            case "added":
                endpoint.breaker, self.waits = Breaker.CLOSED, ""
            case "removed":
                endpoint.breaker = Breaker.REMOVED
        self.story.changed(event, event.at_s - self._began, endpoint.name)

    def enrol(self, names: Sequence[str]) -> None:
        """Count for these endpoints, too, where they are new."""
        self.endpoints += map(EndpointStats, names[len(self.endpoints) :])

    def _sent(self, event: RequestSent) -> None:
        rows, endpoint = len(event.rows), self.endpoints[event.endpoint]
        self.requests += 1
        if rows:
            self.batch_sizes[rows] = self.batch_sizes.get(rows, 0) + 1
        self._open[event.ticket] = event
        endpoint.requests += 1
        endpoint.breaker = event.breaker
        if not endpoint.in_flight:
            endpoint.busy_since = event.at_s
        endpoint.in_flight += 1
        if self.story.everything or event.resent:
            self.story.sent(event, event.at_s - self._began, endpoint.name)

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
        sent = self._open.pop(event.ticket)
        if not (sent.rows or event.failure or event.dropped):  # a probe was answered
            self.waits = ""
        moments = event.posted_at_s, event.first_token_at_s, event.first_row_at_s
        self._note(sent, event.at_s, "dropped" if event.dropped else kind, moments)
        if event.failure is not None or event.dropped:
            began = self._began
            self.story.ended(event, sent, sent.at_s - began, event.at_s - began, endpoint.name)

    def _over(self, event: RunEnded) -> None:
        self.time_s = event.at_s - self._began
        in_flight = [(sent, self.endpoints[sent.endpoint].name) for sent in self._open.values()]
        self.story.over(event, in_flight, self.time_s)
        for sent in self._open.values():
            self._freed(self.endpoints[sent.endpoint], event.at_s)
            self._note(sent, event.at_s, "dropped")
        self._open.clear()
        self._usage.clear()
        if self._columns is not None:
            self.lengths += self._sample(self._columns, _SAMPLED - len(self.lengths))
        self._columns = None

    def _sample(self, columns: Columns, most: int) -> list[tuple[int, int]]:
        """Tokens of prompt and answer of so many answers at most."""
        slots = columns.size * columns.n
        chosen = range(slots) if slots <= most else [int(i * _GOLDEN % 1 * slots) for i in range(most)]
        known = [(s, text) for s in chosen if (text := columns.text[s]) is not None]
        share = (self.tokens_an_answer or 0.0) * len(known) / max(1, sum(len(text) for _, text in known))

        def tokens(slot: int, text: str) -> int:
            if (counted := columns.completion_tokens[slot]) >= 0:
                return counted
            cut = columns.finish_reason[slot] == "length" and self.max_tokens
            return self.max_tokens if cut else round(len(text) * share)

        prompt = round(self.prompt_tokens * self.samples / self._counted) if self._counted else UNKNOWN
        prompts = columns.prompt_tokens
        asked = (prompts[s // columns.n * columns.n] for s, _ in known)
        found = [(p if p > 0 else prompt, tokens(*each)) for p, each in zip(asked, known, strict=True)]
        return [pair for pair in found if pair[1] > 0]

    def _freed(self, endpoint: EndpointStats, at_s: float) -> None:
        endpoint.in_flight -= 1
        if not endpoint.in_flight:
            endpoint.busy_s += at_s - endpoint.busy_since

    def _note(self, sent: RequestSent, at_s: float, failure: str | None, moments: Sequence[float | None] = ()) -> None:
        usage = self._usage.pop(sent.ticket, None)
        if len(self._log) < LOGGED:
            name, began = self.endpoints[sent.endpoint].name, self._began
            record = RequestRecord(name, len(sent.rows), sent.at_s - began, at_s - began, failure)
            if len(self._log) < _COSTED:
                cost = (0, 0, 0, 0)
                if self._columns is not None and usage is not None and sent.rows and failure is None:
                    mean = usage.completion_tokens / (len(sent.rows) * self.samples)
                    cost = (*usage, *self._columns.extremes(sent.rows, mean))
                since = (None if at is None else at - began for at in moments)
                record = RequestRecord(*record[:5], *cost, *since)
            self._log.append(record)

    @property
    def requests_log(self) -> Sequence[RequestRecord]:
        """The requests that are over, the first 100,000, with what they have cost."""
        return self._log

    @property
    def known(self) -> int:
        """Rows that have an answer, wherever it came from."""
        return self.answered + self.reused + self.stored + self.kept

    @property
    def tokens_an_answer(self) -> float | None:
        """Mean tokens of the answers that servers gave in this run and whose tokens they counted; None without any."""
        return self.completion_tokens / self._counted if self._counted else None

    @property
    def rows_per_s(self) -> float:
        """Rows answered a second."""
        return self.answered / self.time_s if self.time_s > 0 else 0.0

    def counts(self) -> Counts:
        """What has become of the rows so far."""
        cut = self.cut if self.max_tokens > 1 else 0
        return Counts(
            self.rows, self.answered, self.reused, self.stored, self.kept, self.failed, self.skipped, cut, self.time_s
        )

    def apart(self) -> dict[str, int]:
        """Rows that were not asked, by why; answers that are cut off, and prompts that were cut: those there are."""
        counts = {"reused": self.reused, "stored": self.stored, "kept": self.kept, "not asked": self.not_asked}
        counts |= {"cut off": self.cut}
        counts |= {"prompts cut": self.truncated, "texts shortened": self.shortened}
        return {name: count for name, count in counts.items() if count}

    def over(self, failure: Failure | None) -> None:
        """The run is over: a deadline, if it is that, has left its rows."""
        if failure is not None and failure.kind is FailureKind.DEADLINE:
            self.deadline, self.not_asked = failure.message, self.rows - self.known - self.failed

    def left(self, noun: str = "row") -> str:
        """What a deadline has left, in words; empty where none has."""
        if not self.deadline:
            return ""
        if not self.rows:
            return f"{self.deadline} before a {noun} was asked"
        verb = "is" if self.not_asked == 1 else "are"
        return f"{self.deadline}: {self.not_asked:,} of {plural(self.rows, noun)} {verb} left"

    def cuts(self) -> list[str]:
        """What was cut, a line each. One token an answer is asked for by who wants no more."""
        lines = []
        if self.counts().cut:
            answers = _were(self.cut, self.answered * self.samples, "answer")
            lines.append(f"{answers} cut off at max_tokens={self.max_tokens}: raise max_tokens=")
        if self.truncated:
            lines.append(
                f"{_were(self.truncated, self.rows, 'prompt')} cut to fit the context of {self.context:,} tokens"
            )
        if self.shortened:
            verb = "was" if self.shortened == 1 else "were"
            lines.append(f"{plural(self.shortened, 'text')} {verb} shortened to fit the context (column n_shortened)")
        return lines

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

        columns = ["endpoint", "rows", "start_s", "end_s", "failure"]
        frame = pd.DataFrame([record[:5] for record in self._log], columns=columns)
        return frame.astype({"start_s": "float64", "end_s": "float64"})

    def plot(self) -> Figure:
        """Plot the rows per second, and the requests by endpoint; at any time of the run."""
        return picture(self)

    @property
    def working_s(self) -> float:
        """Seconds with requests in flight, added up over the endpoints."""
        return sum(e.busy_s for e in self.endpoints)

    @property
    def waiting_s(self) -> float:
        """Seconds without requests in flight during the run, added up over the endpoints."""
        return max(0.0, len(self.endpoints) * self.time_s - self.working_s)

    def summary(self) -> list[tuple[str, str]]:
        """Label and value, for what is worth showing."""
        sizes = sorted(self.batch_sizes)
        shown = ""
        if sizes:
            one = len(sizes) == 1
            shown = f" of {plural(sizes[0], 'row')}" if one else f" of {sizes[0]:,} to {plural(sizes[-1], 'row')}"
        skipped = f" ({self.skipped:,} without a prompt)" if self.skipped else ""
        extras = {
            "failed requests": self.failed_requests,
            "retries": self.retries,
            "halved batches": self.halvings,
            "steals": self.steals,
            "duplicated rows": self.reissues,
        }
        return [
            (f"{self.noun}s", f"{self.answered:,} answered, {self.failed:,} failed{skipped}, of {self.rows:,}"),
            *self._not_asked(),
            ("time", f"{took(self.time_s)} ({self.rows_per_s:.1f} {self.noun}s/s)"),
            ("requests", f"{self.requests:,}{shown}"),
            ("tokens", _tokens(self.prompt_tokens, self.completion_tokens) + self._uncounted()),
            *self._prefix_caches(),
            *([("shared", f"others used {plural(self.shared, 'endpoint')} at the same time")] if self.shared else []),
            *self._not_valid(),
            *([("cut off", f"{plural(self.cut, 'answer')} ended for want of tokens")] if self.cut else []),
            *([("prompts cut", f"{self.truncated:,}, to fit the context")] if self.truncated else []),
            *([("texts shortened", f"{self.shortened:,}, to fit the context")] if self.shortened else []),
            ("endpoints", f"{len(self.endpoints):,}: {self.working_s:.1f} s busy, {self.waiting_s:.1f} s idle"),
            *((name, f"{count:,}") for name, count in extras.items() if count),
            *(("route", f"{route}: {plural(count, 'endpoint')}") for route, count in self.routes.items()),
        ]

    def _uncounted(self) -> str:
        """How many answers have no part in the tokens, since the server did not say."""
        missing = (self.answered + self.invalid) * self.samples - self._counted
        return (
            f"; {plural(missing, 'answer')} not counted by the server (details=True asks for it)" if missing > 0 else ""
        )

    def _prefix_caches(self) -> list[tuple[str, str]]:
        if not self.prefix_queries:
            return []
        share = f"{self.prefix_hits / self.prefix_queries:.0%} of {self.prefix_queries:,} prompt tokens found"
        asked = f"{self.prefix_endpoints:,} of {plural(len(self.endpoints), 'endpoint')}"
        return [("prefix caches", f"{share}, as {asked} {'says' if self.prefix_endpoints == 1 else 'say'}")]

    def _not_valid(self) -> list[tuple[str, str]]:
        if not self.invalid:
            return []
        rows = f"{plural(self.repaired, 'row')} repaired, {self.given_up:,} given up"
        return [("not valid", f"{plural(self.invalid, 'answer')}; {rows}")]

    def _not_asked(self) -> list[tuple[str, str]]:
        """Rows that this run did not ask for: what those with an answer would have cost, and why others have none."""
        reused = _tokens_if_known(self.reused_prompt_tokens, self.reused_completion_tokens, "not spent")
        stored = _tokens_if_known(self.stored_prompt_tokens, self.stored_completion_tokens, "spent then")
        lines = [
            ("reused", self.reused, f"with the prompt of another row{reused}"),
            ("stored", self.stored, f"answered before, in the store{stored}"),
            ("kept", self.kept, "with an answer of their own"),
            ("not asked", self.not_asked, f"left: {self.deadline}"),
        ]
        return [(name, f"{plural(count, 'row')} {what}") for name, count, what in lines if count]

    def __repr__(self) -> str:
        failed = f", {self.failed:,} failed" if self.failed else ""
        failed += "".join(f", {count:,} {name}" for name, count in self.apart().items())
        return (
            f"<RunStats: {self.answered:,} of {plural(self.rows, self.noun)} answered{failed} in {took(self.time_s)} "
            f"({self.rows_per_s:.1f} {self.noun}s/s), {plural(self.requests, 'request')}>"
        )

    def _repr_html_(self) -> str:
        return table_html(self.summary())


def _were(count: int, of: int, noun: str) -> str:
    return f"{count:,} of {plural(of, noun)} {'was' if count == 1 else 'were'}"


def _tokens(prompt: int, completion: int) -> str:
    return f"{prompt:,} in, {completion:,} out"


def _tokens_if_known(prompt: int, completion: int, what: str) -> str:
    return f"; {_tokens(prompt, completion)} {what}" if prompt or completion else ""
