"""Run the scheduler through thousands of seeded faults: ``python tests/simulation --seeds 10000``.

A failing seed is printed with the command that replays it: ``python tests/simulation --seed 1234 [--trace]``.
"""

from __future__ import annotations

import argparse
import collections
import multiprocessing
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1])]

from simulation.scenario import Scenario, run_seed  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=10_000, help="how many")
    parser.add_argument("--first", type=int, default=0, help="the first of them")
    parser.add_argument("--seed", type=int, help="replay this one, with a full traceback")
    parser.add_argument("--trace", action="store_true", help="with --seed: print every event and message")
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    if options.seed is not None:
        scenario = Scenario(options.seed)
        print(vars(scenario), flush=True)
        trace = (lambda now, what: print(f"{now:12.4f}  {what}")) if options.trace else None
        outcome = scenario.run(trace=trace).outcome
        print(f"{outcome.requests} requests, {outcome.time_s:.1f} s, {len(outcome.failed)} failed: {outcome.failure}")
        return 0
    began = time.monotonic()
    failed: dict[int, str] = {}
    rows = requests = 0
    seeds = range(options.first, options.first + options.seeds)
    with multiprocessing.get_context("spawn").Pool(options.processes) as pool:
        for seed, problem, n_rows, n_requests in pool.imap_unordered(run_seed, seeds, chunksize=50):
            rows, requests = rows + n_rows, requests + n_requests
            if problem:
                failed[seed] = problem
    groups = collections.defaultdict(list)
    for seed, problem in sorted(failed.items()):
        groups[problem.strip().splitlines()[-1].split(",")[0][:60] + problem.strip().splitlines()[-2]].append(seed)
    for said, group in groups.items():
        print(
            f"--- {len(group)} x {said} {group[:8]}\n{failed[group[0]]}    python tests/simulation --seed {group[0]}\n"
        )
    taken = time.monotonic() - began
    print(f"{len(seeds)} runs, {rows} rows, {requests} requests in {taken:.0f} s: {len(failed)} failed")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
