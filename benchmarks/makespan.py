"""How long mixed fleets take against the bound: ``python -m benchmarks.makespan [--quick] [--json FILE]``.

The real scheduler in virtual time, with 4, 10 and 40 rows a slot, then, scaled down, the whole client over real
sockets. ``bound`` is the most of: total work over total speed (``ideal``), each endpoint counted while it is there; the
longest row alone on the quickest endpoint; and what a clairvoyant gets who knows all lengths and speeds, and gives the
longest row, always, to the slot where it ends first (Graham 1969; within a third of the best on equal machines).

``blind`` is that in the order given, by one who knows the speeds but not the lengths: about what can be had where
nothing tells how long an answer will be, as in the workload "skewed". On ``m`` equal machines no schedule that learns
lengths as rows end is better than 2 - 1/m times the best one (Shmoys, Wein and Williamson 1995). In the sorted
workloads the prompts tell the lengths. Answers are cut at four times their mean, as ``max_tokens`` would do.
``copied`` is the share of the rows that were sent twice, ``begun`` the rows that servers worked on, by row: copies,
and what died with a server, included.
"""

from __future__ import annotations

import heapq
import random
import sys
import time
from collections.abc import Iterable, Sequence

import pandas as pd

import swarmkit as sk
from swarmkit.analysis.simulate import Server, VirtualRun
from swarmkit.engine.endpoints import Fleet
from swarmkit.engine.policy import BatchPolicy, RetryPolicy
from swarmkit.engine.queues import home_queues
from swarmkit.engine.scheduler import Scheduler

from ._report import Budget, arguments, report

MEDIAN = 1.1
WORST = {4: 1.3, 10: 1.2, 40: 1.12}  # by rows a slot
SOCKETS = 1.15


class Late(Server):
    """A server that refuses connections until it is up."""

    up_at: float = 0.0

    def is_down(self, now: float) -> bool:
        return now < self.up_at or super().is_down(now)


class Counted(VirtualRun):
    """A run that counts the rows that servers have begun."""

    begun = 0

    def serve(self, server: Server) -> None:
        busy = server.busy
        super().serve(server)
        self.begun += server.busy - busy


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


def schedule_s(servers: Sequence[Server], lengths: Iterable[float], known: bool = True) -> float:
    """When the last row ends if each row in turn gets the slot where it ends first.

    Slots count while their server is there. Where lengths are not ``known``, a row gets the slot where a usual one
    would end first.
    """
    free = [[getattr(s, "up_at", 0.0)] * s.slots for s in servers]  # heaps: when the slots of each server are free
    over = 0.0
    for length in lengths:
        shown = length if known else 1.0
        ends = ((slots[0] + s.row_s * shown, i) for i, (s, slots) in enumerate(zip(servers, free, strict=True)))
        _, i = min((end, i) for end, i in ends if free[i][0] + servers[i].row_s * length <= servers[i].dies_at)
        end = free[i][0] + servers[i].row_s * length
        heapq.heapreplace(free[i], end)
        over = max(over, end)
    return over


def bound_s(servers: Sequence[Server], lengths: Sequence[float]) -> float:
    """What a schedule is compared with: see the top."""
    longest = max(lengths) * min(s.row_s for s in servers)
    return max(ideal_s(servers, sum(lengths)), longest, schedule_s(servers, sorted(lengths, reverse=True)))


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
            run = Counted(servers, scheduler, lengths.__getitem__)
            run.run()
            bound = bound_s(servers, lengths)
            figures = {
                "rows": rows, "seconds": run.now, "bound": bound, "to bound": run.now / bound,
                "blind to bound": schedule_s(servers, lengths, known=False) / bound,
                "to ideal": run.now / ideal_s(servers, sum(lengths)),
                "requests": scheduler.sent, "to fewest": scheduler.sent * 100 / rows,
                "copied": scheduler.counts.duplicates / rows, "begun": run.begun / rows,
            }  # fmt: skip
            found.append({"fleet": fleet, "workload": workload, **figures})
    return pd.DataFrame(found)


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
    waits = (stats.completion_tokens - rows) / rows  # the echo's first token comes at once
    bound = bound_s([*(Server(waits / 20.0, 64) for _ in range(4)), Server(waits / 2.0, 64)], [1.0] * rows)
    return {"rows": len(out), "seconds": taken, "bound": bound, "to bound": taken / bound, "requests": stats.requests}


def main() -> int:
    args = arguments(__doc__)
    tables, budgets = {}, []
    for rows, worst in WORST.items():
        if args.quick and tables:
            break
        table = virtual(rows)
        tables[f"Virtual time, 20 endpoints, rows as they finish, {rows} rows a slot"] = table
        told = table["to bound"][table["workload"] != "skewed"]
        what = f"makespan to the bound, {rows} rows a slot"
        budgets += [
            Budget(f"{what}: median of the fleets", table["to bound"].median(), MEDIAN),
            Budget(f"{what}: worst of the fleets", table["to bound"].max(), worst),
            Budget(f"{what}: worst where prompts tell the lengths, or all are equal", told.max(), worst),
        ]
    real = sockets(1_000 if args.quick else 16_000)
    budgets.append(Budget("makespan to the bound over real sockets", real["to bound"], SOCKETS))
    tables["Real sockets, 4 endpoints and one at a tenth of their speed"] = pd.DataFrame([real])
    return report(args, tables, budgets)


if __name__ == "__main__":
    sys.exit(main())
