"""Whether client CPU per prompt grows with the rows, and per request with the endpoints.

From 1,000 to 1,000,000 rows on one endpoint; from 1 to 4,000 endpoints, every endpoint sent the same few requests; and
1,000,000 rows over 1,000 endpoints from this one process. Batches of 100.
"""

from __future__ import annotations

import resource
import statistics
import sys
from functools import partial

import pandas as pd

import swarmkit as sk
from swarmkit.runs.stats import RunStats

from ._instant import Instant
from ._report import TEMPLATE, Budget, abstracts, alternate, arguments, cpu_us, report, spread

FLAT = 1.25


def by_rows(server: Instant, sizes: list[int]) -> pd.DataFrame:
    """CPU per prompt, by the rows of the frame, for both deliveries; small frames several times."""
    rows = []
    with sk.connect(server) as pool:
        for delivery in ("batch", "rows"):
            found: dict[int, list[float]] = {}
            for n in sizes:
                scatter = partial(sk.scatter, abstracts(n), TEMPLATE, pool=pool, temperature=0, delivery=delivery)
                found[n] = [cpu_us(scatter, n) for _ in range(max(1, min(9, 200_000 // n)))]
            usual = [statistics.median(found[sizes[1]])]
            rows += [
                {"delivery": delivery, "rows": n, "runs": len(values),
                 **spread(values, usual * len(values), "us a prompt", f"times {sizes[1]:,}")}
                for n, values in found.items()
            ]  # fmt: skip
    return pd.DataFrame(rows)


def by_endpoints(server: Instant, counts: list[int], rows: int, repeats: int) -> pd.DataFrame:
    """CPU per request, by the endpoints of the pool: the same frame each time, connections open already."""
    df = abstracts(rows)
    pools = {str(count): sk.connect(server.endpoints[:count]) for count in counts}
    sent: dict[str, int] = {}

    def measure(count: str) -> float:
        pool = pools[count]
        us = cpu_us(partial(sk.scatter, df, TEMPLATE, pool=pool, temperature=0, delivery="batch"), rows)
        assert pool.last_run
        sent[count] = pool.last_run.requests
        return us * rows / sent[count]

    found = alternate({count: partial(measure, count) for count in pools}, repeats)
    return pd.DataFrame(
        {
            "endpoints": int(count),
            "rows": rows,
            "requests": sent[count],
            **spread(us, found["1"], "us a request", "times 1"),
        }
        for count, us in found.items()
    )


def million(server: Instant, rows: int, few: int, repeats: int) -> pd.DataFrame:
    """All rows over all endpoints of the server, beside a few rows on one of them."""
    df, head = abstracts(rows), abstracts(few)
    stats: RunStats | None = None

    def usual() -> float:
        spec = partial(sk.scatter, head, TEMPLATE, pool=one, temperature=0, delivery="batch")
        return statistics.median(cpu_us(spec, few) for _ in range(9))

    def all_of_it() -> float:
        nonlocal stats
        with sk.connect(server) as pool:
            us = cpu_us(partial(sk.scatter, df, TEMPLATE, pool=pool, temperature=0, delivery="batch"), rows)
            stats = pool.last_run
        return us

    with sk.connect(server.endpoints[:1]) as one:
        found = alternate({"few": usual, "all": all_of_it}, repeats)
    assert stats
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    figures = spread(found["all"], found["few"], "us a prompt", f"times {few:,} on one")
    known = {"rows": rows, "endpoints": len(server.endpoints), "requests": stats.requests, "time_s": stats.time_s}
    return pd.DataFrame([{**known, **figures, "peak MiB": peak}])


def main() -> int:
    args = arguments(__doc__)
    quick = args.quick
    sizes = [100, 200] if quick else [1_000, 10_000, 100_000, 1_000_000]
    counts = [1, 10] if quick else [1, 10, 100, 1_000]
    with Instant() as server:
        rows = by_rows(server, sizes)
    with Instant(counts[-1]) as server:
        endpoints = by_endpoints(server, counts, 2_000 if quick else 200_000, 1 if quick else 3)
        whole = million(server, 2_000 if quick else 1_000_000, sizes[1], 1 if quick else 5)
    bounds = [
        Budget(f"CPU per prompt at {sizes[-1]:,} rows, {d}, times {sizes[1]:,}", float(found.iloc[-1, -1]), FLAT)
        for d, found in rows.groupby("delivery")
    ]
    bounds += [
        Budget(f"CPU per request at {counts[-1]:,} endpoints, times 1", float(endpoints.iloc[-1]["times 1"]), FLAT),
        Budget("CPU per prompt, all rows over all endpoints, times few rows on one",
               float(whole.filter(like="times").iloc[0, 0]), FLAT),
    ]  # fmt: skip
    tables = {"By rows": rows, "By endpoints": endpoints, "All rows over all endpoints": whole}
    return report(args, tables, bounds)


if __name__ == "__main__":
    sys.exit(main())
