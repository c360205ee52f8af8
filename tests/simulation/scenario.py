"""A seed becomes a fleet, a workload, faults and policy values: one run of the scheduler in virtual time."""

from __future__ import annotations

import random
import traceback
from dataclasses import replace

from virtual import KILLS, Server, Trouble, Virtual, ideal_s

from swarmkit.policy import REACTIONS, RetryPolicy
from swarmkit.records import FailureKind

PASSING = [k for k in FailureKind if k not in (FailureKind.DENIED, FailureKind.REJECTED)]


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
        tight = (
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
                max_opens=rng.choice([4, 4, 1, 6]),
                base_s=rng.choice([0.5, 0.01]),
                cap_s=rng.choice([30.0, 2.0]),
                jitter=rng.choice([0.0, 0.5, 1.0]),
                max_busy=rng.choice([12, 12, 1, 3]),
            ),
            "hedge": self.hedge,
            "resting": [i for i in range(n) if rng.random() < 0.3] if rng.random() < 0.2 else [],
            "tight": tight,
            "lengths": self.lengths.__getitem__ if self.lengths else None,
            "killers": dict.fromkeys(self.killers, kill),
            "books": rng.choice([1, 7, 50]) if rows < 200 else 200,
        }

    def run(self, **more):
        """Run it and check what holds for runs of this kind; returns the Virtual."""
        virtual = Virtual(self.servers, self.rows, **{**self.arguments, **more})
        outcome = virtual.run()
        self.check(virtual, outcome)
        return virtual

    def check(self, virtual, run):
        """What follows from how the scenario was made, beyond what holds for every run."""
        for row, failure in run.failed.items():
            if failure.kind is FailureKind.REJECTED:
                assert row in self.bad | self.small, f"good row {row} fails as refused"
        if run.failure is None:
            assert not self.bad & set(run.answered)
            if all(not f.fault or not f.fault.small for f in self.servers):
                assert not self.bad or self.bad <= set(run.failed)
        sizes = self.arguments["max_size"]
        work = sum(self.lengths) if self.lengths else self.rows
        if self.calm and not self.killers:
            assert not run.failed
            assert not virtual.scheduler.counts.retries
            # A row waits for no more than the slowest endpoint's whole share.
            slowest = max(s.row_s for s in self.servers)
            longest = max(self.lengths) if self.lengths else 1.0
            latency = max(s.latency_s for s in self.servers)
            bound = 3 * work * slowest + 10 * slowest * longest * sizes + 2 * self.rows * latency + 100
            assert run.time_s <= bound, f"{run.time_s} > {bound}"
        # A killer's neighbours live, unless engines take all their requests down with them: a bystander that was twice
        # on a dying engine is then asked alone, and another killer, not yet found out, may be on that engine in another
        # request. From outside its death looks like the bystander's; only an engine with nothing else on it would tell
        # them apart, and a pool of one endpoint would stand still for that, for every row that was in flight.
        if self.calm and self.kill.kills_engine is None and virtual.retry.max_attempts > 2 and run.failure is None:
            assert set(run.failed) == self.killers, "a killer's neighbours live"
        # In other runs a good row may meet the faults of its hosts until its budget is spent, which `check_outcome`
        # counts. What no row may be is condemned in company: the third death that fails it is its own.
        for row, failure in run.failed.items():
            saw = run.saw.get(row, {})
            spent = sum(n for kind, n in saw.items() if REACTIONS[kind].attempt) >= virtual.retry.max_attempts
            told = not spent and not saw.get(FailureKind.STALE)  # which may have counted as a fault, too
            if failure.kind is not FailureKind.REJECTED and told and row not in self.killers:
                assert run.last_size[row] == 1, f"row {row} fails for a death in company"
        # No run takes for ever: the work on one slot of the slowest endpoint, and every row's budget of time-outs.
        slowest = max(s.row_s for s in self.servers)
        pauses = 400 * self.arguments["retry"].cap_s + 2000
        patience = self.servers[0].timeout_s * (20 + 6 * self.endpoints + 3 * len(run.failed))
        bound = 100 * work * slowest + pauses + patience
        assert run.time_s <= bound, f"{run.time_s:.0f} s > {bound:.0f} s"
        self.check_even(virtual, run)

    def check_even(self, virtual, run):
        """A healthy fleet of equals."""
        even = self.calm and not self.killers and not self.lengths and not self.arguments["resting"]
        even = even and len({(s.row_s, s.slots, s.latency_s) for s in self.servers}) == 1
        if not even:
            return
        assert not virtual.scheduler.counts.copies, "a healthy run copies nothing"
        if self.arguments["tight"] or self.arguments["concurrency"]:
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
