"""A seed becomes a fleet, a workload, faults and policy values: one run of the scheduler in virtual time."""

from __future__ import annotations

import math
import random
import traceback
from dataclasses import replace

from virtual import KILLS, REFUSALS, Server, Trouble, Virtual, ideal_s

from swarmkit.engine.policy import REACTIONS, RetryPolicy
from swarmkit.engine.rates import Rate
from swarmkit.engine.sharing import Places
from swarmkit.records import FailureKind

PASSING = [k for k in REACTIONS if k not in REFUSALS]


def trouble(kind, rng, timeout_s):
    """One failure of this kind, at a random point of its request."""
    match kind:
        case FailureKind.CONNECT | FailureKind.STALE | FailureKind.LOCAL | FailureKind.DENIED:
            return Trouble(kind, rng.choice([0.0, 0.01, 1.0]))
        case FailureKind.BUSY:
            return Trouble(kind, rng.choice([0.0, 0.01]), retry_after_s=rng.choice([None, None, 0.0, 1.0, 20.0]))
        case FailureKind.HANG:
            return Trouble(kind, timeout_s, rng.choice([0, 0, 0.3]))
        case _:
            return Trouble(kind, rng.uniform(0, 3), rng.choice([0, 0, 0.5, 0.99]))


class Faults:
    """What one endpoint does to requests: now and then, in bursts, for good, or by what is in them."""

    def __init__(self, rng, bad, small, timeout_s):
        self.bad, self.small, self.timeout_s = bad, small, timeout_s
        self.flagged = frozenset()  # rows that a filter denies
        self.pattern = rng.choice(["none", "none", "none", "random", "random", "bursts", "always", "after"])
        self.kinds = rng.sample(PASSING, rng.randint(1, 3))
        if self.pattern in ("always", "after") and rng.random() < 0.3:
            self.kinds = [FailureKind.DENIED]
        self.chance = rng.choice([0.02, 0.1, 0.3, 0.6])
        self.after = rng.randint(1, 10)
        self.queue = rng.choice([None] * 5 + [1, 7, 20])  # requests above this size find the queue full
        self.asked = 0
        self.burst = 0

    @property
    def lasting(self):
        """Whether it never again works as it should."""
        return self.pattern in ("always", "after")

    def __call__(self, batch, rng):
        found = self.find(batch, rng)
        refused = any(not rows.isdisjoint(batch.rows) for rows in (self.bad, self.small))
        if refused and (found is None or found.share):  # refused before any row is worked on
            return Trouble(FailureKind.REJECTED, 0.01)
        if (found is None or found.share) and not self.flagged.isdisjoint(batch.rows):
            return Trouble(FailureKind.DENIED, 0.01)
        return found

    def find(self, batch, rng):
        self.asked += 1
        if self.burst > 0:
            self.burst -= 1
            return trouble(rng.choice(self.kinds), rng, self.timeout_s)
        match self.pattern:
            case "random" if rng.random() < self.chance:
                return trouble(rng.choice(self.kinds), rng, self.timeout_s)
            case "bursts" if rng.random() < self.chance / 3:
                self.burst = rng.randint(1, 8)
                return trouble(rng.choice(self.kinds), rng, self.timeout_s)
            case "always":
                return trouble(rng.choice(self.kinds), rng, self.timeout_s)
            case "after" if self.asked > self.after:
                return trouble(rng.choice(self.kinds), rng, self.timeout_s)
        if self.queue is not None and len(batch.rows) > self.queue:
            return trouble(FailureKind.BUSY, rng, self.timeout_s)
        return None


def spells(rng, horizon):
    """When an endpoint is down."""
    return [(a, a + rng.uniform(0.1, horizon)) for a in (rng.uniform(0, horizon) for _ in range(rng.randint(1, 3)))]


class Scenario:
    """Everything about a run follows from its seed."""

    def __init__(self, seed):
        rng = self.rng = random.Random(seed)
        self.seed = seed
        self.calm = rng.random() < 0.15  # nothing goes wrong but for killers
        rows = self.rows = round(2 ** rng.uniform(0, 11))
        n = self.endpoints = rng.choice([1, 2, 3, rng.randint(1, 12), rng.randint(1, 40)])
        pick = lambda most: set(rng.sample(range(rows), min(rows, rng.randint(0, most))))  # noqa: E731
        few = rng.random() < 0.5
        self.killers = pick(3) if few and rng.random() < 0.5 else set()
        self.bad = set() if self.calm else (pick(3) if few else set()) - self.killers
        self.small = set() if self.calm or rng.random() < 0.7 else pick(20) - self.killers
        timeout_s = rng.choice([5.0, 30.0, 300.0])
        mixed, skewed = rng.random() < 0.7, rng.random() < 0.4
        speed, slots, latency = rng.uniform(0.05, 3), rng.choice([1, 8, 64, 256]), rng.choice([0.0, 0.0, 0.05, 1.0])
        self.servers = []
        for _ in range(n):
            if mixed:
                speed, slots = 0.3 * 10 ** rng.random(), rng.choice([1, 4, 8, 16, 64, 128, 256])
                latency = rng.choice([0.0, 0.0, 0.05, 1.0])
            server = Server(speed, slots, latency, timeout_s=timeout_s)
            if not self.calm:
                server.fault = Faults(rng, self.bad, self.small if rng.random() < 0.5 else set(), timeout_s)
                if rng.random() < 0.15:
                    server.down = spells(rng, 20.0)
                elif rng.random() < 0.1:
                    server.dies_at = rng.uniform(0, 20)
                server.silent = rng.random() < 0.3
            self.servers.append(server)
        rare = rng.random() < 0.5  # rows' lengths: all the same, or a few much longer ones
        shape = random.Random(seed)
        self.lengths = [shape.expovariate(1.0) + 0.05 if not rare else 1.0 + 9.0 * (shape.random() < 0.03)
                        for _ in range(rows)] if skewed else None  # fmt: skip
        kill = Trouble(rng.choice(KILLS), rng.choice([0.0, 0.5, 5.0]), rng.choice([0, 0, 0.5]))
        if kill.kind is FailureKind.DISCONNECT and rng.random() < 0.5:
            kill = replace(kill, kills_engine=rng.choice([0.0, 1.0, 60.0]))
        elif kill.kind is FailureKind.HANG:
            kill = replace(kill, after_s=timeout_s)
        self.kill = kill = replace(kill, reused=kill.kind is not FailureKind.HANG and rng.random() < 0.3)
        limited = (
            {r: rng.choice([128, 200, 300]) for r in range(rows) if rng.random() < 0.1} if rng.random() < 0.2 else {}
        )
        max_size = rng.choice([1, 2, 10, 32, 100, rng.randint(1, 100)])
        self.hedge = rng.random() < 0.7
        self.arguments = {
            "by_rows": rng.random() < 0.6,
            "max_size": max_size,
            "max_in_flight": rng.choice([1, 2, 4, 8, 64]),
            "concurrency": rng.choice([None, None, None, 1, 3, rng.randint(1, 100)]),
            "seed": seed,
            "retry": RetryPolicy(
                max_attempts=rng.choice([5, 5, 5, 1, 2, 8]),
                breaker_threshold=rng.choice([3, 3, 1, 5]),
                base_s=rng.choice([0.5, 0.01]),
                cap_s=rng.choice([30.0, 2.0]),
                jitter=rng.choice([0.0, 0.5, 1.0]),
                give_up_s=rng.choice([600.0, 600.0, 60.0]),
            ),
            "hedge": self.hedge,
            "resting": [i for i in range(n) if rng.random() < 0.3] if rng.random() < 0.2 else [],
            "limited": limited,
            "lengths": self.lengths.__getitem__ if self.lengths else None,
            "killers": dict.fromkeys(self.killers, kill),
            "books": 1 if rows < 300 else 50,  # every event, where the recount is cheap
        }
        own = random.Random(f"rates of {seed}")  # the other draws of a seed stay what they were
        self.rates = []
        if own.random() < 0.1:
            limits = [
                (own.choice([None, 60, 600]), own.choice([None, 900, 9000]), own.choice([None, 1, 5])) for _ in "ab"
            ]
            self.rates = [Rate(*limit) for limit in limits]
            self.arguments |= {"rate_of": lambda i: self.rates[i % 2], "tokens": lambda row: 10 + row % 7}
        self.flagged = set()
        if own.random() < 0.1 and not self.calm:
            self.flagged = {row for row in range(rows) if own.random() < 0.1} - self.killers - self.bad - self.small
            for server in self.servers:
                server.fault.flagged = self.flagged
        own = random.Random(f"deadline of {seed}")
        if own.random() < 0.15:
            self.arguments["deadline"] = own.choice([1.0, 5.0, 20.0, 60.0]) * (0.1 + own.random())
        self.rolling: set[int] = set()  # endpoints that come and go; some stay
        if n > 1 and rng.random() < 0.3:
            self.rolling = set(rng.sample(range(n), rng.randint(1, n - 1)))
            self.arguments["removed"] = removed = [i for i in self.rolling if rng.random() < 0.4]
            self.arguments["changes"] = changes = []
            for i in self.rolling:
                times = sorted(rng.uniform(0, 20.0) for _ in range(rng.randint(1, 6)))
                changes += [(time, i, (k % 2 == 0) == (i in removed)) for k, time in enumerate(times)]
        self.beside: dict | None = None  # how an equal run on the same fleet differs; their pool's places, where shared
        own = random.Random(f"sharing of {seed}")
        crash = self.killers and kill.kills_engine is not None  # of engines that rows of either run bring down
        if own.random() < 0.2 and not crash:
            at_once = {"changes", "deadline"} & self.arguments.keys()
            begins = 0.0 if at_once else own.choice([0.0, 0.5, 5.0])
            first, second = own.choice([(0, 0), (0, 1), (1, 0)])
            places = Places() if own.random() < 0.7 else None
            self.arguments |= {"places": places, "priority": first, "looks": own.random() < 0.5}
            self.beside = {"priority": second, "begins": begins, "seed": seed + 1}
        self.prefill_s = 0.0
        own = random.Random(f"prefixes of {seed}")
        if own.random() < 0.2:
            self.share_prefixes(own)

    def share_prefixes(self, rng):
        """Prompts take time, rows share long prefixes, and servers have caches for them, large or small."""
        sizes = [rng.choice([1, 2, 6, 40]) for _ in range(self.rows)] if rng.random() < 0.5 else [6] * self.rows
        places = [d for d, size in enumerate(sizes) for _ in range(size)][: self.rows]
        rng.shuffle(places)
        long = rng.choice([10, 60])
        texts = [f"document {d:08d} " * long + f"question {rng.random()}" for d in places]
        self.arguments |= {"texts": texts, "order": rng.choice(["auto", "prefix", "prefix", "given"])}
        token_s, blocks = rng.choice([0.0, 1e-6, 1e-5]), rng.choice([0, 100, 100_000])
        for server in self.servers:
            server.token_s, server.cache = token_s, blocks
        self.prefill_s = token_s * sum(map(len, texts)) / 4

    def run(self, **more):
        """Run it and check what holds for runs of this kind; returns the Virtual."""
        virtual = Virtual(self.servers, self.rows, **{**self.arguments, **more})
        if self.beside is not None:
            Virtual(self.servers, self.rows, **{**self.arguments, **self.beside, **more}, beside=virtual)
        virtual.run()
        for each in virtual.runs:
            self.check(each, each.outcome)
        return virtual

    def check(self, virtual, run):
        """What follows from how the scenario was made, beyond what holds for every run."""
        retry = self.arguments["retry"]
        guilty = self.bad | self.small | self.killers | self.flagged
        busy = {row for row, failure in run.failed.items() if failure.kind is FailureKind.BUSY}  # for ever, at the end
        if retry.max_attempts >= 5:
            assert set(run.failed) <= guilty | busy, (
                f"good rows fail: { ({r: run.failed[r].kind for r in set(run.failed) - guilty}) }"
            )
        if run.failure is None:
            assert not (self.bad | self.killers | self.flagged) & set(run.answered)
        if self.calm and not self.killers:
            assert not run.failed
            assert not virtual.scheduler.counts.retries
        if self.kill.kills_engine and self.calm and not self.rolling and len(guilty) < self.rows:
            for row, killed in run.kills.items():
                assert len(killed) <= 3, f"row {row} crashed {len(killed)} engines"
        if len(guilty) == self.rows:
            return  # no row can show that an endpoint is healthy
        if self.rates or (self.flagged and self.arguments["max_size"] > 1):
            return  # how long that takes is said by the rates, and by the search for many rows in lists
        bound, time_s = self.bound() + retry.give_up_s * (run.failure is not None or bool(busy)), run.time_s
        if not self.rate():
            time_s -= (
                virtual.answered_at - virtual.begins
            )  # what a broken endpoint answers before it fails goes on while it lasts
        assert time_s <= bound, f"{time_s:.0f} s > {bound:.0f} s"
        if "deadline" not in self.arguments and self.beside is None:
            self.check_even(virtual, run)

    def bound(self):
        """Seconds: twice the ideal, the outages, and a grace for what each fault costs.

        Three times the ideal where a limit on requests is shared with endpoints that fail, and twenty times where none
        of the endpoints is sound: what their faults cost is an average there.
        """
        runs = 1 if self.beside is None else 2
        work = runs * (sum(self.lengths) if self.lengths else self.rows)
        longest = max(self.lengths) if self.lengths else 1.0
        retry, timeout_s = self.arguments["retry"], self.servers[0].timeout_s
        size = self.arguments["max_size"]
        # What one request needs at most at the slowest endpoint, and how long a straggler goes unnoticed.
        slowest = max(s.latency_s + s.row_s * longest * max(1, size / s.slots) for s in self.servers)
        rate, sound = self.rate(), any(map(self.is_sound, self.staying))
        silent = sum(
            bool((s.silent and (s.down or s.dies_at < math.inf)) or (s.fault and FailureKind.HANG in s.fault.kinds))
            for s in self.servers
        )
        if (self.arguments["concurrency"] or self.endpoints) >= self.endpoints:
            silent = min(1, silent)  # else each keeps a place that others need
        hangs = (4 if sound else 40) * timeout_s * (silent or bool(self.kill.kind is FailureKind.HANG and self.killers))
        outages = 45.0 if any(s.down for s in self.servers) else 0.0
        tries = 4 * retry.max_attempts  # of a killer, at most, where faults are frequent
        crash_s = 0.0  # until the engine is seen to be back
        if self.kill.kills_engine is not None:
            crash_s = self.kill.kills_engine + timeout_s * any(s.silent for s in self.servers)
        killed = len(self.killers) * (60.0 + 6 * crash_s + max(20, tries) * self.kill.after_s)
        if not all(map(self.is_sound, self.servers)):
            killed *= 8  # to test a row takes an endpoint that is well
        polite = any(s.fault and (s.fault.queue or FailureKind.BUSY in s.fault.kinds) for s in self.servers)
        grace = 60.0 + 10 * slowest + 2 * retry.cap_s + 250.0 * polite
        times = 2 + bool(self.arguments["concurrency"]) + 18 * (not sound)
        return times * (work / rate + runs * self.prefill_s if rate else 0.0) + outages + hangs + killed + grace

    def rate(self):
        """Rows a second that the endpoints answer, at their speeds and with what their faults cost."""
        size, most = self.arguments["max_size"], self.arguments["max_in_flight"]
        if self.arguments["concurrency"]:
            most = min(most, self.arguments["concurrency"] / self.endpoints)
        total = 0.0
        for s in self.staying:
            chance, cost_s = self.faulty(s)
            if chance < 1:
                rows = min(size, s.fault.queue or size) if s.fault else size
                request_s = (s.latency_s + s.row_s * max(1, rows / s.slots) + chance * cost_s) / (1 - chance)
                at_once = min(most, 1 / chance if chance else most)  # after a fault one request shows what is up
                total += min(s.rows_per_s, rows * at_once / request_s)
        return total

    @property
    def staying(self):
        return [s for i, s in enumerate(self.servers) if i not in self.rolling]

    def faulty(self, server):
        """The chance that a request fails at an endpoint, and seconds that this costs; 1 if it ends for good."""
        fault = server.fault
        if server.dies_at < math.inf or (fault and fault.lasting):
            return 1.0, 0.0
        if fault is None or fault.pattern == "none":
            return 0.0, 0.0
        chance = fault.chance if fault.pattern == "random" else fault.chance * 1.5 / (1 + fault.chance * 1.5)
        costs = {FailureKind.HANG: server.timeout_s, FailureKind.BUSY: 5.0}
        return chance, max(costs.get(kind, 3.0) for kind in fault.kinds)

    def is_sound(self, server):
        """Whether an endpoint answers nearly all requests nearly all the time."""
        if server.down or server.dies_at < math.inf:
            return False
        if server.fault is None:
            return True
        mild = server.fault.pattern == "none" or (
            server.fault.pattern == "random" and server.fault.chance <= 0.1
            and not {FailureKind.HANG, FailureKind.BUSY, FailureKind.LOCAL} & set(server.fault.kinds)
        )  # fmt: skip
        return mild and server.fault.queue is None

    def check_even(self, virtual, run):
        """A healthy fleet of equals."""
        even = self.calm and not self.killers and not self.lengths and not self.arguments["resting"]
        even = even and not self.rolling and len({(s.row_s, s.slots, s.latency_s) for s in self.servers}) == 1
        if not even:
            return
        assert not virtual.scheduler.counts.duplicates, "a healthy run copies nothing"
        if virtual.parts is not None and not virtual.scheduler.counts.steals:
            homes = {(virtual.parts[row], tuple(met)) for row, met in run.met.items()}
            assert len(homes) == len({part for part, _ in homes}), "rows of one prefix went to several endpoints"
        if self.arguments["limited"] or self.arguments["concurrency"] or virtual.parts is not None:
            return
        size, n = self.arguments["max_size"], self.endpoints
        # Shares in whole batches: nearly all runs take just these. Where all answers come at one moment, the endpoint
        # that is heard first takes some of what another is about to ask for; nobody can know that it will.
        least = sum(-(-len(range(i, self.rows, n)) // size) for i in range(n))
        if self.rows <= n * size:
            assert run.requests == min(n, self.rows), "one request an endpoint, when its share fits one"
        else:
            assert run.requests <= least + 3 * n, f"{run.requests} requests, {least} would do"

    def ideal(self):
        return ideal_s(self.servers, sum(self.lengths) if self.lengths else self.rows)


def run_seed(seed: int) -> tuple[int, str, int, int]:
    """The seed, what went wrong, and how much was simulated."""
    scenario = Scenario(seed)
    try:
        virtual = scenario.run()
    except Exception:  # noqa: BLE001 - whatever it is, it is reported with its seed
        return seed, traceback.format_exc(limit=-2), scenario.rows, 0
    return seed, "", scenario.rows, virtual.outcome.requests
