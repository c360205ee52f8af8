"""Who gets how much of a fleet that several use: ``python -m benchmarks.sharing [--quick] [--json FILE]``.

Two processes with equal runs on one fleet, which know of each other only by what the servers say of their queues. They
begin together, or one when the other has done a fifth. Then two runs of one process on one pool, a small one beside a
large one, with and without ``priority=``. The servers are echoes that answer many rows at once, each in half a second.
"""

from __future__ import annotations

import multiprocessing
import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import pandas as pd

import swarmkit as sk

from ._report import Budget, arguments, report

ROW_S = 0.5
KEY = "shared"
PROMPT = "row {i}"
OPTIONS: dict[str, Any] = {"max_tokens": 8, "progress": False}


def fleet(endpoints: int, slots: int) -> AbstractContextManager[sk.LocalSwarm]:
    """Echoes on one process of this machine."""
    return sk.local(1, engine="echo", addresses=endpoints, token=KEY, latency_s=ROW_S, max_num_seqs=slots)


def client(urls: Sequence[str], rows: int, begin: Any, later_s: float, times: Any) -> None:
    """One process: its run, once all are ready."""
    with sk.connect(urls, api_key=KEY) as pool:
        numbers(10).swarm.scatter(PROMPT, pool=pool, **OPTIONS)
        begin.wait()
        time.sleep(later_s)
        began = time.monotonic()
        out = numbers(rows).swarm.scatter(PROMPT, pool=pool, **OPTIONS)
        assert out["response"].notna().all()
        times.put((later_s, time.monotonic() - began, sk.last_run().stats.shared))


def numbers(rows: int) -> pd.DataFrame:
    return pd.DataFrame({"i": range(rows)})


def processes(endpoints: int, slots: int, rounds: int, later: float) -> dict[str, float]:
    """Two processes with so many rows a slot; the second begins when the first has done this part."""
    rows, context = endpoints * slots * rounds, multiprocessing.get_context("spawn")
    with fleet(endpoints, slots) as swarm:
        urls, begin, times = [e.url for e in swarm.endpoints], context.Barrier(2), context.Queue()
        later_s = later * rounds * ROW_S
        both = [context.Process(target=client, args=(urls, rows, begin, s, times)) for s in (0.0, later_s)]
        for process in both:
            process.start()
        first, second = sorted(times.get(timeout=600) for _ in both)
        for process in both:
            process.join()
    ratio = max(first[1], second[1]) / min(first[1], second[1])
    all_s = max(first[1], later_s + second[1])
    return {
        "endpoints": endpoints, "slots": slots, "rows each": rows, "later_s": later_s,
        "first_s": first[1], "second_s": second[1], "ratio": ratio,
        "all to ideal": all_s / (2 * rounds * ROW_S), "seen at": min(first[2], second[2]),
    }  # fmt: skip


def priorities(endpoints: int, slots: int, rounds: int) -> pd.DataFrame:
    """A small run alone, beside one of five times its rows, and going before that."""
    found = []
    with fleet(endpoints, slots) as swarm, sk.connect(swarm) as pool:
        small, large = (numbers(endpoints * slots * n) for n in (rounds, 5 * rounds))
        numbers(10).swarm.scatter(PROMPT, pool=pool, **OPTIONS)
        for way, priority in (("alone", None), ("beside a large one", 0), ("before a large one", 1)):
            if priority is not None:
                beside = large.swarm.submit(PROMPT, pool=pool, priority=priority, **OPTIONS)
                time.sleep(rounds * ROW_S)
            began = time.monotonic()
            assert small.swarm.scatter(PROMPT, pool=pool, **OPTIONS)["response"].notna().all()
            taken, large_s = time.monotonic() - began, float("nan")
            if priority is not None:
                assert beside.result()["response"].notna().all()
                large_s = beside.stats.time_s
            found.append({"small run": way, "small_s": taken, "large_s": large_s})
    frame = pd.DataFrame(found)
    return frame.assign(to_alone=frame["small_s"] / frame["small_s"].iloc[0])


def main() -> int:
    args = arguments(__doc__)
    cases = [(2, 16, 4, 0.2)] if args.quick else [(4, 64, 40, 0.0), (4, 64, 40, 0.2), (2, 256, 40, 0.2)]
    shared = pd.DataFrame([processes(*case) for case in cases])
    small = priorities(2, 16, 2) if args.quick else priorities(4, 64, 10)
    tables = {"Two processes, equal runs, one fleet": shared, "Two runs on one pool": small}
    budgets = [
        Budget("two processes: the longer time over the shorter, worst", shared["ratio"].max(), 1.15),
        Budget("two processes: time of both to the ideal, worst", shared["all to ideal"].max(), 1.15),
        Budget("a small run that goes first: to its time alone", small["to_alone"].iloc[2], 1.5),
    ]
    return report(args, tables, budgets)


if __name__ == "__main__":
    sys.exit(main())
