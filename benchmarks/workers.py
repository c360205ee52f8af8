"""More than one core of client: two Dask workers against one process, on two cores.

Answers of one token, from two servers that answer at once. These are processes of their own, and take CPU of the same
two cores: what the clients could do on cores that they have for themselves is said by their CPU time. The last table
computes from it what a campaign of such labels over 4,000 endpoints needs. Linux only: it reads the CPU time of other
processes.
"""

from __future__ import annotations

import math
import os
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import dask.dataframe as dd
import pandas as pd
from distributed import Client, LocalCluster, wait

import swarmkit as sk
import swarmkit.dask  # registers ddf.swarm

from ._instant import Instant
from ._report import TEMPLATE, Budget, abstracts, arguments, report

FASTER = 1.5
OPTIONS: dict[str, Any] = {"max_tokens": 1, "temperature": 0}
ROWS, ENDPOINTS = 100_000_000, 4_000  # of the campaign
LABELS_PER_S = (10, 65, 200)  # of an endpoint; 65 are those of docs/scale.md


@dataclass(frozen=True)
class Turn:
    """What one turn took, in seconds: by the clock; CPU of each client process; CPU of the servers together."""

    clock: float
    clients: list[float]
    servers: float


def cpu_s(pid: int) -> float:
    """CPU time of a process so far, all threads."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def turn(work: Callable[[], object], clients: Sequence[int], servers: Sequence[Instant]) -> Turn:
    """Measure some work, which these processes do."""
    pids = [*clients, *(server.process.pid for server in servers)]
    before, began = list(map(cpu_s, pids)), perf_counter()
    work()
    clock = perf_counter() - began
    spent = [cpu_s(pid) - earlier for pid, earlier in zip(pids, before, strict=True)]
    return Turn(clock, spent[: len(clients)], sum(spent[len(clients) :]))


def figures(name: str, rows: int, turns: Sequence[Turn]) -> dict[str, Any]:
    """Medians of some turns. ``a core each``: rows a second by the CPU time of the busiest process."""
    clocks = [t.clock for t in turns]
    return {
        "client": name, "rows/s": rows / statistics.median(clocks), "slowest": rows / max(clocks),
        "fastest": rows / min(clocks), "client us a row": statistics.median(sum(t.clients) for t in turns) / rows * 1e6,
        "servers us a row": statistics.median(t.servers for t in turns) / rows * 1e6,
        "rows/s, a core each": rows / statistics.median(max(t.clients) for t in turns),
    }  # fmt: skip


def needed(per_worker: float) -> pd.DataFrame:
    """Workers, and minutes, of a campaign of labels, by what an endpoint answers a second. Computed, not run."""
    fleet = [labels * ENDPOINTS for labels in LABELS_PER_S]
    return pd.DataFrame({
        "labels/s of an endpoint": LABELS_PER_S, "of all": fleet,
        "workers": [math.ceil(rate / per_worker) for rate in fleet], "minutes": [ROWS / rate / 60 for rate in fleet],
        "minutes with one": ROWS / per_worker / 60,
    })  # fmt: skip


def main() -> int:
    args = arguments(__doc__)
    rows, repeats = (4_000, 1) if args.quick else (200_000, 5)
    df = abstracts(rows)
    cluster = LocalCluster(
        n_workers=2, threads_per_worker=1, dashboard_address=None, worker_dashboard_address="127.0.0.1:0"
    )
    with Instant() as first, Instant() as second, cluster, Client(cluster) as client:
        servers, own = (first, second), os.getpid()
        workers = [*client.run(os.getpid).values(), own]  # dask's scheduler is a thread of this process
        parts = client.persist(dd.from_pandas(df, npartitions=2))
        wait(parts)
        batch = sk.BatchPolicy(max_size="auto")
        with sk.connect([e for server in servers for e in server.endpoints], batch=batch) as pool:

            def alone() -> None:
                answers = df.swarm.scatter(TEMPLATE, pool=pool, progress=False, **OPTIONS)
                assert answers["response"].notna().all()

            def together() -> None:  # the answers stay with the workers, as where each writes its own files
                answers = parts.swarm.scatter(TEMPLATE, pool=pool, **OPTIONS).persist()
                wait(answers)
                assert answers["response"].count().compute() == rows

            turns: dict[str, list[Turn]] = {"one process": [], "two Dask workers": []}
            for repeat in range(-1, repeats):  # in alternation; the first is a warm-up
                for name, work, pids in (("one process", alone, [own]), ("two Dask workers", together, workers)):
                    took = turn(work, pids, servers)
                    if repeat >= 0:
                        turns[name].append(took)
    one, two = turns.values()
    table = pd.DataFrame([figures(name, rows, taken) for name, taken in turns.items()])
    ratio = statistics.median(b.clock / a.clock for a, b in zip(one, two, strict=True))
    alone_s, each_s = (float(rate) for rate in 1 / table["rows/s, a core each"])
    title = f"{ROWS:,} labels over {ENDPOINTS:,} endpoints, with workers that have a core each"
    tables = {f"{rows:,} labels, servers on the same two cores": table,
              title: needed(1 / each_s / 2)}  # fmt: skip
    budgets = [
        Budget("time of two workers, times that of one process", ratio, 1 / FASTER),
        Budget("the same by CPU time, where each process has a core", each_s / alone_s, 1 / FASTER),
    ]
    return report(args, tables, budgets)


if __name__ == "__main__":
    sys.exit(main())
