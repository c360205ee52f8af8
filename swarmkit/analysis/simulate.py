"""The real scheduler with simulated endpoints, in virtual time: predicts how long a campaign takes.

``Server`` is an endpoint with continuous batching, ``VirtualRun`` carries out the scheduler's messages as
``pool.executor`` does. The tests add faults to both (``tests/virtual.py``); ``simulate`` makes them a planning tool.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import TYPE_CHECKING, Any, Literal, cast

from ..engine.endpoints import Fleet
from ..engine.messages import Delivered, Drop, Ended, Event, Failed, Message, Send, Settle, Stop, Tick, Wake
from ..engine.policy import BatchPolicy, RetryPolicy
from ..engine.queues import home_queues
from ..engine.scheduler import Scheduler
from ..errors import SettingError
from ..records import Batch, Failure, FailureKind
from ..text import plural

if TYPE_CHECKING:
    import pandas as pd

    from ..runs.stats import RunStats
    from .pace import PacedServer
    from .plots import Figure

__all__ = ["EndpointModel", "Server", "Simulation", "VirtualRun", "Workload", "simulate"]

_MOMENTS = 20  # rows of a request that end within 1/20 of a usual row's time are delivered together


@dataclass
class Server:
    """An endpoint with continuous batching: ``slots`` rows at once, each takes ``row_s`` seconds times its length."""

    row_s: float = 1.0
    slots: int = 64
    latency_s: float = 0.0
    dies_at: float = math.inf
    # State of a run.
    waiting: deque[tuple[int, int]] = field(default_factory=deque)
    running: Counter[int] = field(default_factory=Counter)  # ticket -> rows in slots
    busy: int = 0

    @property
    def rows_per_s(self) -> float:
        """Rows of length 1 that it finishes per second when all slots are busy."""
        return self.slots / self.row_s

    def is_down(self, now: float) -> bool:
        """Whether it refuses connections."""
        return now >= self.dies_at


class VirtualRun:
    """One run of a scheduler over servers, in virtual time.

    Parameters
    ----------
    servers : sequence of Server
        By endpoint index.
    scheduler : Scheduler
        The scheduler of the run.
    lengths : callable or None
        Row position to the length of its answer; 1 is the usual length, None means 1 for all rows.
    by_rows : bool
        Whether rows are delivered as they finish, or all rows of a request together.
    moment_s : float
        Rows of a request that end within this many seconds are delivered together; 0 delivers each at its end.
    """

    def __init__(
        self,
        servers: Sequence[Server],
        scheduler: Scheduler,
        lengths: Callable[[int], float] | None = None,
        by_rows: bool = True,
        moment_s: float = 0.0,
    ) -> None:
        self.servers = servers
        self.scheduler = scheduler
        self.lengths = lengths
        self.by_rows = by_rows
        self.moment_s = moment_s
        self.heap: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self.order = itertools.count()
        self.now = 0.0
        self.open: dict[int, Batch] = {}
        self.made: dict[int, int] = {}  # ticket -> rows the server has finished
        self.failure: Failure | None = None
        self.over = False
        for index, server in enumerate(servers):
            server.waiting, server.running, server.busy = deque(), Counter(), 0
            if server.dies_at < math.inf:
                self.at(server.dies_at, self.die, index)

    # ---- the clock ------------------------------

    def at(self, time: float, call: Callable[..., None], *arguments: Any) -> None:
        """Schedule a call."""
        heapq.heappush(self.heap, (time, next(self.order), call, arguments))

    def run(self) -> None:
        """Run to the end; ``now`` is its duration then."""
        self.carry_out(self.scheduler.start(0.0))
        while self.heap and not self.over:
            self.now, _, call, arguments = heapq.heappop(self.heap)
            call(*arguments)
            self.stepped()
        assert self.over, "the run stalled: no request is in flight and no call is scheduled"

    def stepped(self) -> None:
        """Called after every event."""

    def tell(self, event: Event) -> None:
        """Pass an event to the scheduler; only for open requests."""
        if isinstance(event, Ended | Failed):
            self.close(event.ticket)
        self.carry_out(self.scheduler.handle(event, self.now))

    def carry_out(self, messages: Sequence[Message]) -> None:
        """Carry out the scheduler's messages."""
        for message in messages:
            match message:
                case Send(batch):
                    self.send(batch)
                case Settle(row, failure):
                    self.settle(row, failure)
                case Drop(ticket):
                    self.close(ticket)
                case Wake(at):
                    self.at(max(at, self.now), self.tell, Tick())
                case Stop(failure):
                    self.failure = failure
                    self.over = True

    def settle(self, row: int, failure: Failure) -> None:
        """A row ends with an error."""

    # ---- requests ------------------------------

    def send(self, batch: Batch) -> None:
        """A request is sent."""
        self.open[batch.ticket] = batch
        self.accept(self.servers[batch.endpoint], batch)

    def accept(self, server: Server, batch: Batch) -> None:
        """A request arrives."""
        if server.is_down(self.now):
            self.at(self.now, self.fail, batch.ticket, FailureKind.CONNECT)
        else:
            self.at(self.now + server.latency_s, self.begin, server, batch.ticket)

    def begin(self, server: Server, ticket: int) -> None:
        """A server queues the rows of a request."""
        if ticket in self.open and not self.open[ticket].rows:
            self.at(self.now, self.end, ticket)
        elif ticket in self.open:
            server.waiting.extend((ticket, row) for row in self.open[ticket].rows)
            self.serve(server)

    def serve(self, server: Server) -> None:
        """Put waiting rows into free slots. Rows of a request that end together are one event."""
        ends: dict[tuple[int, float], list[int]] = {}
        while server.busy < server.slots and server.waiting:
            ticket, row = server.waiting.popleft()
            if ticket in self.open:
                end = self.now + server.row_s * (self.lengths(row) if self.lengths else 1.0)
                if self.moment_s:
                    end = math.ceil(end / self.moment_s) * self.moment_s
                ends.setdefault((ticket, end), []).append(row)
                server.running[ticket] += 1
                server.busy += 1
        for (ticket, time), rows in ends.items():
            self.at(time, self.done, server, ticket, rows)

    def done(self, server: Server, ticket: int, rows: Sequence[int]) -> None:
        """Rows have left their slots."""
        if ticket not in self.open:
            return  # the request was closed, which freed its slots
        server.running[ticket] -= len(rows)
        server.busy -= len(rows)
        self.made[ticket] = self.made.get(ticket, 0) + len(rows)
        whole = self.made[ticket] == len(self.open[ticket].rows)
        if self.by_rows or whole:
            self.deliver(ticket, rows if self.by_rows else self.open[ticket].rows)
        if whole:
            self.end(ticket)
        self.serve(server)

    def end(self, ticket: int) -> None:
        """A request is answered in full."""
        if ticket in self.open and not self.over:
            self.tell(Ended(ticket))

    def deliver(self, ticket: int, rows: Sequence[int]) -> None:
        """Rows reach the client."""
        if ticket in self.open and not self.over:
            self.tell(Delivered(ticket, tuple(rows)))

    def fail(self, ticket: int, kind: FailureKind) -> None:
        """A request fails."""
        if ticket in self.open and not self.over:
            self.tell(Failed(ticket, Failure(kind, "simulated", f"endpoint {self.open[ticket].endpoint}")))

    def die(self, index: int) -> None:
        """A server crashes: all its requests fail."""
        for ticket in [ticket for ticket, batch in self.open.items() if batch.endpoint == index]:
            self.fail(ticket, FailureKind.DISCONNECT)

    def close(self, ticket: int) -> Batch:
        """A request is over; its slots are freed."""
        batch = self.open.pop(ticket)
        self.made.pop(ticket, None)
        server = self.servers[batch.endpoint]
        if freed := server.running.pop(ticket, 0):
            server.busy -= freed
            self.at(self.now, self.serve, server)
        return batch


# ---- planning ------------------------------


@dataclass(frozen=True, slots=True)
class EndpointModel:
    """An endpoint, as a plan sees it.

    Parameters
    ----------
    slots : int
        Rows it works on at once (vLLM's ``--max-num-seqs``).
    tokens_per_s : float
        Tokens per second of *one* row while all slots are busy; not the throughput of the whole server.
    latency_s : float
        Seconds until the server begins with a request: network, and its front end.
    alone_tokens_per_s : float, optional
        Tokens per second of a row that runs alone; ``tokens_per_s`` by default. The time of a token grows evenly with
        the rows that run beside it.
    prefill_tokens_per_s : float, optional
        Prompt tokens that it reads per second, while no row gets a token; by default prompts take no time.

    Raises
    ------
    SettingError
        A number that must be positive is not, or a row is slower alone.

    Examples
    --------
    >>> round(EndpointModel(slots=256, tokens_per_s=40.0, alone_tokens_per_s=120.0).speed(128), 1)
    60.1
    """

    slots: int = 256
    tokens_per_s: float = 40.0
    latency_s: float = 0.0
    alone_tokens_per_s: float | None = None
    prefill_tokens_per_s: float | None = None

    def __post_init__(self) -> None:
        good = self.slots >= 1 and self.tokens_per_s > 0 and self.latency_s >= 0
        if not good or (self.prefill_tokens_per_s is not None and self.prefill_tokens_per_s <= 0):
            raise SettingError(
                f"{self!r}: needs slots of 1 or more, tokens_per_s and prefill_tokens_per_s above 0, latency_s of 0 or "
                "more"
            )
        if self.alone_tokens_per_s is not None and self.alone_tokens_per_s < self.tokens_per_s:
            raise SettingError(f"{self!r}: a row is not slower alone; alone_tokens_per_s must be tokens_per_s or more")

    def speed(self, rows: int) -> float:
        """Tokens per second of one row while so many run."""
        from .pace import pace_of

        return 1 / pace_of(self).step(rows)

    @classmethod
    def from_stats(cls, stats: RunStats | Sequence[RunStats], slots: int | None = None) -> list[EndpointModel]:
        """One model for each endpoint of a small real run.

        The requests of the run are played again on models with other numbers, until their first tokens, their first
        rows and their ends come when they did: how long prompts take, a token, and a token beside other rows. What the
        run does not show is left out: requests that are all alike do not tell prompts from answers. So let prompts or
        answers differ in length, and have the endpoints busy, with several requests each, or they are taken to have as
        many slots as they had rows at once; otherwise give ``slots``. Only what servers answered in the run counts: not
        rows that were reused, stored or kept.

        Parameters
        ----------
        stats : RunStats, or sequence of RunStats
            Statistics of the run, or of several on the same endpoints: ``sk.last_run().stats``.
        slots : int, optional
            Rows an endpoint works on at once, if known.

        Raises
        ------
        SettingError
            No endpoint answered anything, or the servers counted no tokens.
        """
        from .calibrate import calibrate

        return calibrate([stats] if not isinstance(stats, Sequence) else stats, slots).models


@dataclass(frozen=True, slots=True)
class Workload:
    """The rows of a plan.

    Parameters
    ----------
    rows : int
        Number of rows.
    tokens : float or sequence of float
        Tokens per answer; or a sample of such lengths, from which the rows' lengths are drawn (the
        ``response_completion_tokens`` of a small run with ``details=True``). Missing ones are left out.
    prompt_tokens : float or sequence of float
        Tokens per prompt, chat template included; or a sample. One that is as long as that of the answers is drawn
        together with it.

    Raises
    ------
    SettingError
        No rows, or no tokens.

    Examples
    --------
    >>> Workload(1000, tokens=128.0).rows
    1000
    """

    rows: int
    tokens: float | Sequence[float] = 128.0
    prompt_tokens: float | Sequence[float] = 0.0

    def __post_init__(self) -> None:
        lengths = self.sample()
        if self.rows < 1 or not lengths or not min(answer for _, answer in lengths) > 0:
            raise SettingError(f"Workload(rows={self.rows!r}, tokens=...): needs rows, and lengths above 0 tokens")

    @classmethod
    def from_stats(cls, stats: RunStats, rows: int) -> Workload:
        """So many rows, with prompts and answers as long as in a small real run.

        Parameters
        ----------
        stats : RunStats
            Statistics of the run: ``sk.last_run().stats``.
        rows : int
            Number of rows.

        Raises
        ------
        SettingError
            The run has no answers whose tokens are known.
        """
        if not stats.lengths:
            raise SettingError(
                f"no workload from {stats!r}: it needs a run that is over, with answered rows whose tokens were counted"
            )
        # The samples of a row share its prompt, and each is a row here.
        prompts = [max(0, prompt) / stats.samples for prompt, _ in stats.lengths]
        return cls(rows * stats.samples, [answer for _, answer in stats.lengths], prompts)

    def sample(self) -> list[tuple[float, float]]:
        """Lengths of prompt and answer, to draw from."""
        prompts, answers = _numbers(self.prompt_tokens), _numbers(self.tokens)
        if len(prompts) != len(answers):
            prompts = [sum(p for p in prompts if p == p) / max(1, sum(p == p for p in prompts))] * len(answers)
        return [(p if p == p else 0.0, a) for p, a in zip(prompts, answers, strict=True) if a == a]


def _numbers(given: float | Sequence[float]) -> list[float]:
    values: Sequence[Any] = given if isinstance(given, Iterable) else [given]
    return [float(v) if isinstance(v, Real) else math.nan for v in values]  # pandas' NA is none


@dataclass(frozen=True, slots=True, repr=False)
class Simulation:
    """The result of a simulation.

    Attributes
    ----------
    rows, answered, requests, endpoints : int
        Rows sent and answered; requests sent; endpoints at the start.
    time_s : float
        Seconds from the first request to the last answer.
    ideal_s : float
        Total work over total speed, with lost endpoints counted until they crash: no schedule is faster.
    duplicates, retries : int
        Rows sent again because of stragglers; requests whose rows were retried.
    frame : DataFrame
        A row per request: ``endpoint, rows, start_s, end_s, failure``, as ``RunStats.timeline`` has it.
    """

    rows: int
    answered: int
    requests: int
    endpoints: int
    time_s: float
    ideal_s: float
    duplicates: int
    retries: int
    frame: pd.DataFrame = field(compare=False)
    _delivered: list[tuple[float, int]] = field(compare=False)  # (time, number of rows) of each delivery

    def plot(self) -> Figure:
        """Plot the rows per second over the time of the run."""
        import pandas as pd

        from .plots import Figure, rate

        failed = self.frame.loc[self.frame["failure"].notna(), ["end_s", "failure"]].itertuples(index=False)
        moments = [("", rows, at, at, None) for at, rows in self._delivered]
        moments += [("", 0, at, at, failure) for at, failure in failed]
        figure = Figure(figsize=(8, 3), layout="constrained")
        rate(pd.DataFrame(moments, columns=self.frame.columns), figure.add_subplot())
        return figure

    def __repr__(self) -> str:
        return (
            f"<Simulation: {self.answered:,} of {plural(self.rows, 'row')} on {plural(self.endpoints, 'endpoint')} in "
            f"{self.time_s:,.0f} s ({self.time_s / self.ideal_s:.2f} x the ideal), {plural(self.requests, 'request')}>"
        )


class _Logged(VirtualRun):
    """A run on paced servers that logs its requests and deliveries. ``prompts`` has the tokens of prompts, by row."""

    servers: Sequence[PacedServer]

    def __init__(self, prompts: Sequence[float], *arguments: Any) -> None:
        super().__init__(*arguments)
        self.prompts = prompts
        self.sent: dict[int, float] = {}
        self.log: list[tuple[str, int, float, float, str | None]] = []
        self.delivered: list[tuple[float, int]] = []

    def send(self, batch: Batch) -> None:
        self.sent[batch.ticket] = self.now
        super().send(batch)

    def serve(self, server: Server) -> None:
        server = cast("PacedServer", server)
        server.advance(self.now)
        begun: dict[tuple[int, float], list[int]] = {}
        free = server.slots - server.busy
        while free and server.waiting:
            ticket, row = server.waiting.popleft()
            if ticket in self.open:
                end = server.clock + (self.lengths(row) if self.lengths else 1.0)
                if self.moment_s:  # in tokens here; rounded, and neither up nor down
                    end = max(round(end / self.moment_s) * self.moment_s, server.clock)
                begun.setdefault((ticket, end), []).append(row)
                free -= 1
        for (ticket, end), rows in begun.items():
            server.begin(ticket, rows, end, sum(map(self.prompts.__getitem__, rows)))
        self.plan(server)

    def plan(self, server: PacedServer) -> None:
        """Plan when the next rows of a server end."""
        server.turn += 1
        if (at := server.next_at()) < math.inf:
            self.at(max(at, self.now), self.due, server, server.turn)

    def due(self, server: PacedServer, turn: int) -> None:
        """The next rows of a server end."""
        if turn == server.turn:
            server.advance(self.now)
            self.done(server, *server.pop())

    def close(self, ticket: int) -> Batch:
        self.servers[self.open[ticket].endpoint].advance(self.now)
        return super().close(ticket)

    def tell(self, event: Event) -> None:
        if isinstance(event, Ended | Failed):
            self.note(event.ticket, event.failure.kind if isinstance(event, Failed) else None)
        elif isinstance(event, Delivered):
            self.delivered.append((self.now, sum(map(self.scheduler.wants, event.rows))))
        super().tell(event)

    def note(self, ticket: int, failure: str | None) -> None:
        batch = self.open[ticket]
        self.log.append((f"endpoint {batch.endpoint}", len(batch.rows), self.sent.pop(ticket), self.now, failure))


def simulate(
    fleet: EndpointModel | Sequence[EndpointModel],
    workload: Workload,
    *,
    batch: BatchPolicy | None = None,
    losing: float = 0.0,
    delivery: Literal["rows", "batch"] = "rows",
    seed: int = 0,
) -> Simulation:
    """Run the real scheduler on a simulated fleet, to predict time, requests and the cost of losing endpoints.

    A server works on ``slots`` rows at once and begins the next as one ends, as vLLM does. Each of its steps gives
    every running row a token, and takes the longer the more rows run; in between it reads prompts. Answers take no time
    in the client.

    Parameters
    ----------
    fleet : EndpointModel or sequence of EndpointModel
        The endpoints: ``[EndpointModel()] * 1000``, or ``EndpointModel.from_stats(stats) * 50``.
    workload : Workload
        Number of rows, and the lengths of their prompts and answers.
    batch : BatchPolicy, optional
        How rows are packed into requests.
    losing : float, default 0
        Share of the endpoints that crash for good, spread evenly over the fleet, half-way through the ideal time.
    delivery : {"rows", "batch"}, default "rows"
        Whether the answers of a request arrive as they finish, or together.
    seed : int, default 0
        Seed of the draw of the rows' lengths: the same seed gives the same plan.

    Returns
    -------
    Simulation

    Raises
    ------
    SettingError
        There is no endpoint, ``losing`` is not from 0 up to below 1, or ``delivery`` is neither of these.

    Examples
    --------
    >>> simulate([EndpointModel(slots=64, tokens_per_s=32.0)] * 10, Workload(6400, tokens=64.0))
    <Simulation: 6,400 of 6,400 rows on 10 endpoints in 20 s (1.00 x the ideal), 70 requests>
    """
    models = [fleet] if isinstance(fleet, EndpointModel) else list(fleet)
    if not models or not 0 <= losing < 1:
        raise SettingError(
            f"simulate({len(models)} endpoints, losing={losing!r}): needs endpoints, and 0 <= losing < 1"
        )
    if delivery not in ("rows", "batch"):
        raise SettingError(f"delivery={delivery!r}: must be 'rows' or 'batch'")
    sample, rng = workload.sample(), random.Random(seed)
    lengths = rng.choices(sample, k=workload.rows) if len(sample) > 1 else sample * workload.rows
    return play(models, lengths, batch or BatchPolicy(), losing=losing, by_rows=delivery == "rows", draw=rng.random)


def play(
    models: Sequence[EndpointModel],
    lengths: Sequence[tuple[float, float]],
    policy: BatchPolicy,
    *,
    losing: float = 0.0,
    by_rows: bool = True,
    draw: Callable[[], float],
) -> Simulation:
    """Simulate rows with these tokens of prompt and answer; see ``simulate``."""
    from .pace import PacedServer, pace_of

    rows, prompts, answers = len(lengths), [p for p, _ in lengths], [a for _, a in lengths]
    usual, usual_prompt = sum(answers) / rows, sum(prompts) / rows
    servers = [PacedServer(pace=pace_of(m)) for m in models]
    rates = [1 / s.row_work_s(usual, usual_prompt) for s in servers]
    ideal = rows / sum(rates)
    every = math.ceil(1 / losing) if losing else len(servers) + 1
    lasting = sum(rate for i, rate in enumerate(rates) if not losing or i % every)
    for server in servers[::every] if losing else ():
        server.dies_at = ideal / 2
    # Long prompts go first, in a real run by their characters.
    queues = home_queues(range(rows), len(servers), [int(4 * p) for p in prompts])
    endpoints = Fleet(
        len(servers), max_size=policy.max_size, max_in_flight=policy.max_in_flight, retry=RetryPolicy(), draw=draw
    )
    scheduler = Scheduler(endpoints, queues, rows, hedge=policy.hedge)
    moment = usual / _MOMENTS if min(answers) < max(answers) else 0.0
    run = _Logged(prompts, servers, scheduler, answers.__getitem__, by_rows, moment)
    run.run()
    for ticket in list(run.open):
        run.note(ticket, "dropped" if run.made.get(ticket, 0) < len(run.open[ticket].rows) else None)
    import pandas as pd

    frame = pd.DataFrame(run.log, columns=["endpoint", "rows", "start_s", "end_s", "failure"])
    return Simulation(
        rows=rows,
        answered=sum(rows for _, rows in run.delivered),
        requests=len(run.log),
        endpoints=len(models),
        time_s=run.now,
        ideal_s=ideal if not losing else ideal / 2 + rows / 2 / lasting,
        duplicates=scheduler.counts.duplicates,
        retries=scheduler.counts.retries,
        frame=frame,
        _delivered=run.delivered,
    )
