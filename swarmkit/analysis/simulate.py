"""The real scheduler with simulated endpoints, in virtual time: predicts how long a campaign takes.

``Server`` is an endpoint with continuous batching, ``VirtualRun`` carries out the scheduler's messages as
``pool.executor`` does. The tests add faults to both (``tests/virtual.py``); ``simulate`` makes them a planning tool.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

from ..engine.endpoints import Fleet
from ..engine.messages import Delivered, Drop, Ended, Event, Failed, Message, Send, Settle, Stop, Tick, Wake
from ..engine.policy import BatchPolicy, RetryPolicy
from ..engine.prefixes import prefix_order
from ..engine.queues import home_queues
from ..engine.scheduler import Scheduler
from ..errors import SettingError
from ..records import Batch, Failure, FailureKind
from ..text import duration, plural, table_html
from .models import EndpointModel, Workload

if TYPE_CHECKING:
    import pandas as pd

    from .pace import PacedServer
    from .plots import Figure

__all__ = ["Server", "Simulation", "VirtualRun", "simulate"]

BLOCK = 16
"""Tokens that a prefix cache keeps together, as vLLM does."""
_CHARS = 4  # a token
_MOMENTS = 20  # rows of a request that end within 1/20 of a usual row's time are delivered together


class PrefixCache:
    """What a server keeps of the prompts it has computed: blocks of 16 tokens, the least recently used go first.

    As in vLLM a block is found from the moment at which the prompt that computes it is scheduled.

    Parameters
    ----------
    blocks : int
        Blocks that it holds.

    Attributes
    ----------
    queries, hits : int
        Tokens of the prompts so far, and those of them that were found.

    Examples
    --------
    >>> cache, prompt = PrefixCache(100), blocks_of("a long text " * 40)
    >>> cache.computed(prompt), cache.computed(prompt), cache.hits
    (120, 8, 112)
    """

    def __init__(self, blocks: int) -> None:
        self._most = blocks
        self._blocks: OrderedDict[Hashable, None] = OrderedDict()  # the least recently used first
        self.queries = self.hits = 0

    def computed(self, prompt: PromptBlocks) -> int:
        """Tokens of a prompt that are not found, and are computed now."""
        found = sum(1 for _ in itertools.takewhile(self._blocks.__contains__, prompt.blocks))
        found = min(found, (prompt.tokens - 1) // BLOCK)  # the last token is always computed
        for block in reversed(prompt.blocks):  # the end of a prompt goes first
            self._blocks[block] = None
            self._blocks.move_to_end(block)
        while len(self._blocks) > self._most:
            self._blocks.popitem(last=False)
        self.queries += prompt.tokens
        self.hits += found * BLOCK
        return prompt.tokens - found * BLOCK


class PromptBlocks(NamedTuple):
    """A prompt for a ``PrefixCache``: its tokens, and what stands for each full block and all before it."""

    tokens: int
    blocks: tuple[Hashable, ...]


def blocks_of(text: str, chars_per_token: int = _CHARS) -> PromptBlocks:
    """The blocks of a text.

    Examples
    --------
    >>> blocks_of("x" * 64).blocks == blocks_of("x" * 100).blocks
    True
    """
    size = BLOCK * chars_per_token
    pieces = (text[i : i + size] for i in range(0, len(text) - size + 1, size))
    blocks = itertools.accumulate(pieces, lambda before, piece: hash((before, piece)), initial=0)
    return PromptBlocks(_tokens_of(text, chars_per_token), tuple(itertools.islice(blocks, 1, None)))


def _tokens_of(text: str, chars_per_token: int = _CHARS) -> int:
    return max(1, len(text) // chars_per_token)


@dataclass
class Server:
    """An endpoint with continuous batching: ``slots`` rows at once, each takes ``row_s`` seconds times its length.

    Where prompts are known, each of their tokens takes ``token_s`` seconds more, one prompt after another, but for
    those that are found in a cache of ``cache`` blocks.
    """

    row_s: float = 1.0
    slots: int = 64
    latency_s: float = 0.0
    dies_at: float = math.inf
    token_s: float = 0.0
    cache: int = 0
    # State of a run.
    waiting: deque[tuple[VirtualRun, int, int]] = field(default_factory=deque)  # run, ticket, row
    running: Counter[Any] = field(default_factory=Counter)  # by request: rows in slots
    busy: int = 0
    computes_until: float = 0.0
    prefixes: PrefixCache = field(default_factory=lambda: PrefixCache(0))

    def reset(self) -> None:
        """Begin a run."""
        self.waiting, self.running, self.busy = deque(), Counter(), 0
        self.computes_until, self.prefixes = 0.0, PrefixCache(self.cache)

    def compute(self, prompt: PromptBlocks, now: float) -> float:
        """Compute a prompt after those that came before; return when that is done."""
        self.computes_until = max(now, self.computes_until) + self.token_s * self.prefixes.computed(prompt)
        return self.computes_until

    @property
    def rows_per_s(self) -> float:
        """Rows of length 1 that it finishes per second when all slots are busy."""
        return self.slots / self.row_s

    def is_down(self, now: float) -> bool:
        """Whether it refuses connections."""
        return now >= self.dies_at


@dataclass
class Clock:
    """Virtual time, and what is to be done then: runs on the same servers share it."""

    now: float = 0.0
    heap: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = field(default_factory=list)
    order: Iterator[int] = field(default_factory=itertools.count)


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
    prompts : callable, optional
        Row position to its prompt, where prompts take time.
    beside : VirtualRun, optional
        Another run on the same servers, which it shares the clock with.
    """

    def __init__(
        self,
        servers: Sequence[Server],
        scheduler: Scheduler,
        lengths: Callable[[int], float] | None = None,
        by_rows: bool = True,
        moment_s: float = 0.0,
        prompts: Callable[[int], PromptBlocks] | None = None,
        beside: VirtualRun | None = None,
    ) -> None:
        self.servers = servers
        self.scheduler = scheduler
        self.lengths = lengths
        self.by_rows = by_rows
        self.moment_s = moment_s
        self.prompts = prompts
        self.clock: Clock = beside.clock if beside else Clock()
        self.runs: list[VirtualRun] = beside.runs if beside else []  # all that share the clock
        self.runs.append(self)
        self.open: dict[int, Batch] = {}
        self.made: dict[int, int] = {}  # ticket -> rows the server has finished
        self.failure: Failure | None = None
        self.over = False
        for index, server in enumerate(servers):
            if beside is None:
                server.reset()
            if server.dies_at < math.inf:
                self.at(server.dies_at, self.die, index)

    # ---- the clock ------------------------------

    @property
    def now(self) -> float:
        """Seconds since the clock began."""
        return self.clock.now

    def at(self, time: float, call: Callable[..., None], *arguments: Any) -> None:
        """Schedule a call."""
        heapq.heappush(self.clock.heap, (time, next(self.clock.order), call, arguments))

    def start(self) -> None:
        """Begin."""
        self.carry_out(self.scheduler.start(self.now))

    def run(self) -> None:
        """Run to the end, with all that share the clock; ``now`` is the duration then."""
        self.start()
        heap, runs = self.clock.heap, self.runs
        while heap and any(not run.over for run in runs):
            self.clock.now, _, call, arguments = heapq.heappop(heap)
            call(*arguments)
            for run in runs:
                if not run.over:
                    run.stepped()
        assert all(run.over for run in runs), "the run stalled: no request is in flight and no call is scheduled"

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
            server.waiting.extend((self, ticket, row) for row in self.open[ticket].rows)
            self.serve(server)

    def serve(self, server: Server) -> None:
        """Put waiting rows into free slots. Rows of a request that end together are one event."""
        ends: dict[tuple[VirtualRun, int, float], list[int]] = {}
        while server.busy < server.slots and server.waiting:
            run, ticket, row = server.waiting.popleft()
            if ticket in run.open:
                begin = server.compute(run.prompts(row), self.now) if run.prompts else self.now
                end = begin + server.row_s * (run.lengths(row) if run.lengths else 1.0)
                if run.moment_s:
                    end = math.ceil(end / run.moment_s) * run.moment_s
                ends.setdefault((run, ticket, end), []).append(row)
                server.running[run, ticket] += 1
                server.busy += 1
        for (run, ticket, time), rows in ends.items():
            self.at(time, run.done, server, ticket, rows)

    def done(self, server: Server, ticket: int, rows: Sequence[int]) -> None:
        """Rows have left their slots."""
        if ticket not in self.open:
            return  # the request was closed, which freed its slots
        server.running[self, ticket] -= len(rows)
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
        if freed := server.running.pop((self, ticket), 0):
            server.busy -= freed
            self.at(self.now, self.serve, server)
        return batch


# ---- planning ------------------------------


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
        No schedule is faster: total work over total speed, with lost endpoints counted until they crash, or the longest
        row alone on the quickest endpoint. Where servers have caches, each block of a prefix is read once.
    duplicates, retries : int
        Rows sent again because of stragglers; requests whose rows were retried.
    prompt_tokens, cached_tokens : int
        Tokens of the prompts that servers began with, and those of them that they found in their caches.
    frame : DataFrame
        A row per request: ``endpoint, rows, start_s, end_s, failure``, as ``RunStats.timeline`` has it.

    Examples
    --------
    >>> plan = sk.simulate(sk.EndpointModel(slots=64, tokens_per_s=32.0), sk.Workload(640, tokens=64.0))
    >>> plan.answered, round(plan.time_s), len(plan.frame) == plan.requests
    (640, 20, True)
    >>> plan.plot()
    <Figure size ...>
    """

    rows: int
    answered: int
    requests: int
    endpoints: int
    time_s: float
    ideal_s: float
    duplicates: int
    retries: int
    prompt_tokens: int
    cached_tokens: int
    frame: pd.DataFrame = field(compare=False)
    _delivered: list[tuple[float, int]] = field(compare=False)  # (time, number of rows) of each delivery

    def plot(self) -> Figure:
        """Plot the rows per second over the time of the run."""
        from .drawing import blank, figure_of
        from .plots import rate

        return figure_of(rate(self, blank(8, 3)[0]))

    def __repr__(self) -> str:
        return (
            f"<Simulation: {self.answered:,} of {plural(self.rows, 'row')} on {plural(self.endpoints, 'endpoint')} in "
            f"{duration(self.time_s)}, where no schedule takes less than {duration(self.ideal_s)}; "
            f"{plural(self.requests, 'request')}>"
        )

    def _repr_html_(self) -> str:
        more = {
            "failed requests": int(self.frame["failure"].notna().sum() - (self.frame["failure"] == "dropped").sum()),
            "requests retried": self.retries,
            "duplicated rows": self.duplicates,
            "prompt tokens from caches": self.cached_tokens,
        }
        lines = [
            ("rows", f"{self.answered:,} of {self.rows:,} answered"),
            ("time", f"{duration(self.time_s)} ({self.answered / self.time_s:,.1f} rows/s)"),
            ("at the least", f"{duration(self.ideal_s)}, whatever the schedule"),
            ("requests", f"{self.requests:,} to {plural(self.endpoints, 'endpoint')}"),
            *((name, f"{count:,}") for name, count in more.items() if count),
        ]
        return table_html(lines)


class _Logged(VirtualRun):
    """A run on paced servers that logs its requests and deliveries. ``tokens`` has those of prompts by row; where there
    are ``prompts``, servers look these up in their caches."""

    servers: Sequence[PacedServer]

    def __init__(self, tokens: Sequence[float], *arguments: Any) -> None:
        super().__init__(*arguments)
        self.tokens = tokens
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
        read: dict[tuple[int, float], float] = {}  # tokens of their prompts
        free = server.slots - server.busy
        while free and server.waiting:
            _, ticket, row = server.waiting.popleft()
            if ticket in self.open:
                end = server.clock + (self.lengths(row) if self.lengths else 1.0)
                if self.moment_s:  # in tokens here; rounded, and neither up nor down
                    end = max(round(end / self.moment_s) * self.moment_s, server.clock)
                key = ticket, end
                begun.setdefault(key, []).append(row)
                tokens = server.prefixes.computed(self.prompts(row)) if self.prompts else self.tokens[row]
                read[key] = read.get(key, 0.0) + tokens
                free -= 1
        for key, rows in begun.items():
            server.begin((self, key[0]), rows, key[1], read[key])
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
            (_, ticket), rows = server.pop()
            self.done(server, ticket, rows)

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


def _once(prompts: Sequence[str]) -> int:
    """Tokens that are read if each block of these prompts is read once."""
    blocks = [blocks_of(prompt) for prompt in prompts]
    once = len({block for prompt in blocks for block in prompt.blocks}) * BLOCK
    return once + sum(b.tokens % BLOCK for b in blocks)


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
    every running row a token, and takes the longer the more rows run; in between it reads what it does not find of
    prompts in its cache. Answers take no time in the client.

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
    <Simulation: 6,400 of 6,400 rows on 10 endpoints in 20 s, where no schedule takes less than 20 s; 70 requests>
    """
    models = [fleet] if isinstance(fleet, EndpointModel) else list(fleet)
    if not models or not 0 <= losing < 1:
        raise SettingError(
            f"simulate({plural(len(models), 'endpoint')}, losing={losing!r}): needs endpoints, and 0 <= losing < 1"
        )
    if delivery not in ("rows", "batch"):
        raise SettingError(f"delivery={delivery!r}: must be 'rows' or 'batch'")
    sample, rng = workload.sample(), random.Random(seed)
    lengths = rng.choices(sample, k=workload.rows) if len(sample) > 1 else sample * workload.rows
    texts, by_rows = workload.prompts, delivery == "rows"
    if texts is not None:
        lengths = [(_tokens_of(text), answer) for text, (_, answer) in zip(texts, lengths, strict=True)]
    policy = batch or BatchPolicy()
    return play(models, lengths, policy, texts=texts, losing=losing, by_rows=by_rows, draw=rng.random)


def play(
    models: Sequence[EndpointModel],
    lengths: Sequence[tuple[float, float]],
    policy: BatchPolicy,
    *,
    texts: Sequence[str] | None = None,
    losing: float = 0.0,
    by_rows: bool = True,
    draw: Callable[[], float],
) -> Simulation:
    """Simulate rows with these tokens of prompt and answer, and perhaps these prompts; see ``simulate``."""
    from .pace import server_of

    rows, prompts, answers = len(lengths), [p for p, _ in lengths], [a for _, a in lengths]
    usual, usual_prompt = sum(answers) / rows, sum(prompts) / rows
    servers = [server_of(m) for m in models]
    least = _once(texts) / rows if texts is not None and any(s.cache for s in servers) else usual_prompt
    rates = [1 / s.row_work_s(usual, least if s.cache else usual_prompt) for s in servers]
    ideal = rows / sum(rates)
    every = math.ceil(1 / losing) if losing else len(servers) + 1
    lasting = sum(rate for i, rate in enumerate(rates) if not losing or i % every)
    for server in servers[::every] if losing else ():
        server.dies_at = ideal / 2
    runs = None
    if texts is not None:
        runs = prefix_order(texts, range(rows), len(servers), answer=int(_CHARS * usual), order=policy.order)
    # Long prompts go first, in a real run by their characters.
    queues = runs.queues if runs else home_queues(range(rows), len(servers), [int(_CHARS * p) for p in prompts])
    endpoints = Fleet(
        len(servers),
        max_size=policy.first_size,
        largest=policy.largest,
        max_in_flight=policy.max_in_flight,
        retry=RetryPolicy(),
        draw=draw,
    )
    scheduler = Scheduler(endpoints, queues, rows, hedge=policy.hedge, parts=runs.parts if runs else None)
    moment = usual / _MOMENTS if min(answers) < max(answers) else 0.0
    blocks = None if texts is None else lambda row: blocks_of(texts[row])
    run = _Logged(prompts, servers, scheduler, answers.__getitem__, by_rows, moment, blocks)
    run.run()
    kinds = {(s.pace, s.cache > 0): s for s in servers}.values()
    longest = max(min(s.alone_s(answer, prompt) for s in kinds) for prompt, answer in set(lengths))
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
        ideal_s=max(longest, ideal if not losing else ideal / 2 + rows / 2 / lasting),
        duplicates=scheduler.counts.duplicates,
        retries=scheduler.counts.retries,
        prompt_tokens=round(sum(s.read + s.prefixes.hits for s in servers)),
        cached_tokens=sum(s.prefixes.hits for s in servers),
        frame=frame,
        _delivered=run.delivered,
    )
