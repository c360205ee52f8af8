"""More than one core of client: two Dask workers against one process, on two cores.

The servers answer at once, in processes of their own, one for each worker, and take CPU of the same two cores: what the
workers could do on cores that they have for themselves is said by their CPU time.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import dask.dataframe as dd
import pandas as pd
from distributed import Client, LocalCluster

import swarmkit as sk
import swarmkit.dask

from ._instant import Instant
from ._report import TEMPLATE, Budget, abstracts, arguments, report

FASTER = 1.5  # asked of two workers
OPTIONS: dict[str, Any] = {"max_tokens": 1, "temperature": 0, "dedup": False}


def seconds(work: Any) -> float:
    """Wall time of some work."""
    began = time.perf_counter()
    answers = work()
    assert answers["response"].notna().all()
    return time.perf_counter() - began


@contextmanager
def workers(count: int) -> Iterator[Client]:
    """Dask workers with one thread each, on loopback."""
    cluster = LocalCluster(
        n_workers=count, threads_per_worker=1, processes=True, dashboard_address=None, host="127.0.0.1"
    )
    with cluster, Client(cluster) as client:
        yield client


def main() -> int:
    args = arguments(__doc__)
    rows, repeats = (4_000, 1) if args.quick else (200_000, 3)
    df = abstracts(rows)
    times: dict[str, list[float]] = {"one process": [], "two workers": []}
    with Instant() as first, Instant() as second, workers(2) as client:
        batch = sk.BatchPolicy(max_size="auto")
        with sk.connect([*first.endpoints, *second.endpoints], batch=batch) as pool:
            parts = client.persist(dd.from_pandas(df, npartitions=2))
            for repeat in range(repeats + 1):  # the first is a warm-up
                one = seconds(lambda: df.swarm.scatter(TEMPLATE, pool=pool, progress=False, **OPTIONS))
                two = seconds(lambda: parts.swarm.scatter(TEMPLATE, pool=pool, **OPTIONS).compute())
                if repeat or args.quick:
                    times["one process"].append(one)
                    times["two workers"].append(two)
    table = pd.DataFrame([
        {"client": name, "rows a second": rows / pd.Series(taken).median(), "fastest": rows / min(taken),
         "slowest": rows / max(taken)}
        for name, taken in times.items()
    ])  # fmt: skip
    ratio = pd.Series(times["two workers"]).median() / pd.Series(times["one process"]).median()
    return report(args, {f"{rows:,} one-token labels, two servers that answer at once": table},
                  [Budget("two workers, times one process", ratio, 1 / FASTER)])  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
