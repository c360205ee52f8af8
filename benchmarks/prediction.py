"""How well a small run predicts others: ``python -m benchmarks.prediction [--quick] [--json FILE]``.

    python tests/real_vllm/serve.py run -- python -m benchmarks.prediction     (with a real vLLM, too)

``EndpointModel.from_stats`` measures servers on a small run, and ``simulate`` predicts runs that it has not seen: in
requests of another size, on another number of endpoints, with other lengths of prompts and answers. The lengths of the
predicted run are drawn from what it turned out to have, so what is judged is the time. The echo takes the time of a
server that reads prompts and is slower the more rows run; vLLM is real, with a tiny model on the CPU.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pandas as pd

import swarmkit as sk

from ._report import Budget, arguments, report

SPEED = {"tokens_per_s": 40.0, "max_num_seqs": 32, "prefill_tokens_per_s": 8000.0, "slowdown": 0.03}
WORDS = ["lacZ", "operon", "binding", "site", "of", "the", "repressor", "was", "measured", "in", "vitro", "twice"]


@dataclass(frozen=True)
class Case:
    """A run: rows, words of a prompt (from, to), most tokens of an answer, rows a request, endpoints."""

    name: str
    rows: int
    words: tuple[int, int]
    max_tokens: int
    size: int = 100
    endpoints: int = 1

    def frame(self) -> pd.DataFrame:
        rng = random.Random(self.name)
        texts = [" ".join(rng.choices(WORDS, k=rng.randint(*self.words))) for _ in range(self.rows)]
        return pd.DataFrame({"i": range(self.rows), "text": texts})


ECHO = [
    Case("pilot", 400, (5, 25), 200, endpoints=2),
    Case("the same again", 400, (5, 25), 200, endpoints=2),
    Case("20 rows a request", 600, (5, 25), 200, 20, endpoints=2),
    Case("4 endpoints", 1_200, (5, 25), 200, endpoints=4),
    Case("longer", 300, (25, 50), 200, endpoints=2),
    Case("shorter", 1_000, (3, 6), 200, endpoints=2),
]
VLLM = [
    Case("pilot", 120, (5, 60), 16),
    Case("pilot, longer answers", 120, (5, 60), 48),
    Case("the same again", 240, (5, 60), 32),
    Case("20 rows a request", 240, (5, 60), 32, 20),
    Case("longer answers", 200, (5, 60), 96),
    Case("longer prompts", 200, (60, 160), 24),
    Case("shorter", 400, (3, 10), 8),
]


@contextmanager
def echo(endpoints: int) -> Iterator[sk.VLLMPool]:
    """Endpoints with the echo, in a process of their own."""
    with sk.local(1, engine="echo", addresses=endpoints, **SPEED) as swarm:
        yield sk.connect(swarm)


@contextmanager
def vllm(url: str) -> Iterator[sk.VLLMPool]:
    """A real server."""
    yield sk.connect(url)


def measured(pool: sk.VLLMPool, case: Case, seed: int, **options: object) -> sk.RunStats:
    """A run of a case, with prompts that no cache knows."""
    pool = pool.with_batch(sk.BatchPolicy(max_size=case.size))
    df = case.frame()
    template = f"{seed} {{i}} {{text}}"
    df.head(8).swarm.scatter("warm up " + template, max_tokens=8, pool=pool, progress=False)
    df.swarm.scatter(template, max_tokens=case.max_tokens, pool=pool, progress=False, **options)
    run = sk.last_run()
    assert run is not None
    assert run.stats.answered == case.rows
    return run.stats


def predicted(models: list[sk.EndpointModel], case: Case, real: sk.RunStats) -> sk.Simulation:
    fleet = [models[i % len(models)] for i in range(case.endpoints)]
    work = sk.Workload.from_stats(real, case.rows)
    return sk.simulate(fleet, work, batch=sk.BatchPolicy(max_size=case.size))


def table(cases: list[Case], real: dict[str, sk.RunStats]) -> pd.DataFrame:
    pilots = [stats for name, stats in real.items() if name.startswith("pilot")]
    models = sk.EndpointModel.from_stats(pilots)
    print("\n".join(map(repr, models)), flush=True)
    rows = []
    for case in cases:
        if not case.name.startswith("pilot"):
            plan = predicted(models, case, real[case.name])
            error = plan.time_s / real[case.name].time_s - 1
            rows.append(
                (case.name, real[case.name].time_s, plan.time_s, 100 * error, real[case.name].requests, plan.requests)
            )
    names = ["run", "real s", "predicted s", "error %", "requests", "predicted requests"]
    return pd.DataFrame(rows, columns=names)


def main() -> int:
    args = arguments(__doc__)
    tables = {"echo": _echo(args)}
    for name in ("TINY", "SMOLLM2"):
        if url := "" if args.quick else os.environ.get(f"SWARMKIT_VLLM_{name}", ""):
            with vllm(url) as pool:
                how = {"temperature": 0, "ignore_eos": True} if name == "TINY" else {"temperature": 0}
                real = {case.name: measured(pool, case, i, **how) for i, case in enumerate(VLLM)}
            tables[f"vLLM, {name.lower()}"] = table(VLLM, real)
    budgets = []
    for name, found in tables.items():
        errors = found["error %"].abs().tolist()
        budgets.append(Budget(f"{name}: error of the worst prediction, %", max(errors), 10.0))
        budgets.append(Budget(f"{name}: median error, %", statistics.median(errors), 5.0))
    if len(tables) == 1 and not args.quick:
        print("no vLLM: python tests/real_vllm/serve.py run -- python -m benchmarks prediction")
    return report(args, tables, budgets)


def _echo(args: argparse.Namespace) -> pd.DataFrame:
    cases = ECHO
    if args.quick:
        cases = [Case("pilot", 40, (2, 5), 8), Case("the same again", 40, (2, 5), 8)]
    real = {}
    for i, case in enumerate(cases):
        with echo(case.endpoints) as pool:
            real[case.name] = measured(pool, case, i)
    return table(cases, real)


if __name__ == "__main__":
    sys.exit(main())
