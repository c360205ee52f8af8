"""How long mixed fleets take against the ideal: ``python -m benchmarks.makespan [--quick] [--json FILE]``.

The real scheduler in virtual time, then, scaled down, the whole client over real sockets. ``ideal`` is total work over
total speed, each endpoint counted while it is there. ``bound`` is what no schedule can beat: the ideal, or the longest
row on the quickest endpoint. A scheduler that does not know how long answers will be cannot always come near it: on
``m`` equal machines none is better than 2 - 1/m times the best schedule (Shmoys, Wein and Williamson 1995), and
working always, as here, ends within the ideal and one longest row (Graham 1969). So there are 40 rows a slot, and
answers are cut at four times their mean, as ``max_tokens`` would do.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Sequence

import pandas as pd

import swarmkit as sk
from swarmkit.analysis.simulate import Server, VirtualRun
from swarmkit.engine.endpoints import Fleet
from swarmkit.engine.policy import BatchPolicy, RetryPolicy
from swarmkit.engine.queues import home_queues
from swarmkit.engine.scheduler import Scheduler

from ._report import Budget, arguments, report

BUDGET = 1.15


class Late(Server):
    """A server that refuses connections until it is up."""

    up_at: float = 0.0

    def is_down(self, now: float) -> bool:
        return now < self.up_at or super().is_down(now)


def fleets(rows_a_slot: float) -> dict[str, list[Server]]:
    rng = random.Random(1)
    half = rows_a_slot / 2
    late = [Late(1.0, 64) for _ in range(5)]
    for server in late:
        server.up_at = half / 2
    return {
        "equal": [Server(1.0, 64) for _ in range(20)],
        "speeds 1:10": [Server(0.3 * 10 ** rng.random(), rng.choice([4, 16, 64, 256])) for _ in range(20)],
        "a straggler": [*(Server(1.0, 64) for _ in range(19)), Server(10.0, 64)],
        "5 of 20 late": [*(Server(1.0, 64) for _ in range(15)), *late],
        "5 of 20 dying": [*(Server(1.0, 64) for _ in range(15)), *(Server(1.0, 64, dies_at=half) for _ in range(5))],
    }


def workloads(rows: int) -> dict[str, list[float]]:
    rng = random.Random(2)
    return {
        "equal": [1.0] * rows,
        "skewed": [min(4.0, rng.expovariate(1.0)) + 0.05 for _ in range(rows)],
        "sorted, longest last": [0.2 + 1.6 * i / rows for i in range(rows)],
        "sorted, longest first": [1.8 - 1.6 * i / rows for i in range(rows)],
    }


def ideal_s(servers: Sequence[Server], work: float) -> float:
    """When the servers, always full, have done so much work."""

    def done(until: float) -> float:
        spans = ((s, min(until, s.dies_at) - getattr(s, "up_at", 0.0)) for s in servers)
        return sum(max(0.0, span) * s.rows_per_s for s, span in spans)

    low, high = 0.0, 1e9
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (low, middle) if done(middle) >= work else (middle, high)
    return high


def virtual(rows_a_slot: float) -> pd.DataFrame:
    found = []
    for fleet, servers in fleets(rows_a_slot).items():
        rows = int(rows_a_slot * sum(s.slots for s in servers))
        for workload, lengths in workloads(rows).items():
            chars = [int(1000 * x) for x in lengths] if "sorted" in workload else [1] * rows
            queues = home_queues(range(rows), len(servers), chars)
            policy = BatchPolicy()
            endpoints = Fleet(
                len(servers), max_size=policy.first_size, max_in_flight=policy.max_in_flight,
                retry=RetryPolicy(), draw=random.Random(0).random,
            )  # fmt: skip
            scheduler = Scheduler(endpoints, queues, rows)
            run = VirtualRun(servers, scheduler, lengths.__getitem__)
            run.run()
            ideal = ideal_s(servers, sum(lengths))
            bound = max(ideal, max(lengths) * min(s.row_s for s in servers))
            requests = scheduler.sent
            found.append((fleet, workload, rows, run.now / ideal, run.now / bound, requests, requests * 100 / rows))
    names = ["fleet", "workload", "rows", "to ideal", "to bound", "requests", "to fewest"]
    return pd.DataFrame(found, columns=names)


def sockets(rows: int) -> dict[str, float]:
    """Five servers of this machine, one at a tenth of the others' speed; tokens take real time."""
    speeds = {"127.0.0.5": {"tokens_per_s": 2.0, "max_num_seqs": 64}}
    df = pd.DataFrame({"i": range(rows)})
    server = {"tokens_per_s": 20.0, "max_num_seqs": 64, "speeds": speeds}
    with sk.local(1, engine="echo", addresses=5, **server) as swarm, sk.connect(swarm):
        df.iloc[:1].swarm.scatter("warm up {i}", max_tokens=4, progress=False)
        began = time.monotonic()
        out = df.swarm.scatter("n {i}", max_tokens=4, progress=False)
        taken = time.monotonic() - began
        stats = sk.last_run().stats
    waits = stats.completion_tokens - rows  # the echo's first token comes at once
    ideal = waits / (64 * (4 * 20.0 + 2.0))
    return {"rows": len(out), "seconds": taken, "ideal_s": ideal, "ratio": taken / ideal, "requests": stats.requests}


def main() -> int:
    args = arguments(__doc__)
    table = virtual(4 if args.quick else 40)  # few rows: the ends of the runs are all there is
    real = sockets(1_000 if args.quick else 16_000)
    budgets = [
        Budget("makespan to the ideal, median of the fleets", table["to ideal"].median(), BUDGET),
        Budget("makespan to the ideal, worst of the fleets", table["to ideal"].max(), BUDGET),
        Budget("makespan to the ideal over real sockets", real["ratio"], BUDGET),
    ]
    tables = {
        "Virtual time, 20 endpoints, rows as they finish": table,
        "Real sockets, 4 endpoints and one at a tenth of their speed": pd.DataFrame([real]),
    }
    return report(args, tables, budgets)


if __name__ == "__main__":
    sys.exit(main())
