"""Pools of 4,000 endpoints: built, probed, and put to work, from one process."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from time import perf_counter, process_time

import pandas as pd

import swarmkit as sk

from ._instant import Instant
from ._report import TEMPLATE, Budget, abstracts, arguments, report


def main() -> int:
    args = arguments(__doc__)
    count = 20 if args.quick else 4_000
    rows = []

    def took(what: str, began: tuple[float, float]) -> None:
        rows.append({"what": what, "time_s": perf_counter() - began[0], "cpu_s": process_time() - began[1]})

    def now() -> tuple[float, float]:
        return perf_counter(), process_time()

    sk.VLLMPool(["127.0.0.1:1"])  # the modules are loaded before the clock starts
    with Instant(count) as server, tempfile.TemporaryDirectory() as folder:
        hostfile = Path(folder, "agents.hostfile")
        hostfile.write_text("".join(f"{e.host} {e.port} rack={i % 7}\n" for i, e in enumerate(server.endpoints)))
        began = now()
        assert sk.VLLMPool(sk.parse_hostfile(hostfile), model="instant").size == count
        took(f"hostfile of {count:,} to pool, without the probe", began)
        began = now()
        with sk.connect(hostfile) as pool:
            took(f"connect: {pool.size:,} probed and up", began)
            df = abstracts(10 * count)
            for turn in ("first", "second"):
                began = now()
                answers = df.swarm.scatter(TEMPLATE, temperature=0)
                took(f"{len(df):,} rows over {pool.size:,}, {turn} run", began)
                assert answers["response"].notna().all()
            assert pool.last_run
            used = sum(e.rows > 0 for e in pool.last_run.endpoints)
    rows.append({"what": f"endpoints that answered rows: {used:,}"})
    budget = Budget(f"seconds to build a pool of {count:,}", float(rows[0]["time_s"]), 1.0)
    return report(args, {"Pools": pd.DataFrame(rows)}, [budget])


if __name__ == "__main__":
    sys.exit(main())
