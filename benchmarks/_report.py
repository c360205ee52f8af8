"""What the commands share: arguments, tables, JSON, and the check of budgets."""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import process_time
from typing import Any

import pandas as pd

TEMPLATE = "Summarise what is known of {gene}: {abstract}"
_SENTENCE = "The protein was purified to homogeneity and its activity was measured in vitro. "


@dataclass(frozen=True)
class Budget:
    """A bound, and the measured value."""

    what: str
    measured: float
    at_most: float

    @property
    def met(self) -> bool:
        return self.measured <= self.at_most


def arguments(doc: str | None) -> argparse.Namespace:
    """The arguments of a command."""
    return parser(doc).parse_args()


def parser(doc: str | None) -> argparse.ArgumentParser:
    """The parser of the arguments that every command has."""
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that it runs, measures nothing")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures here")
    return parser


def report(args: argparse.Namespace, tables: Mapping[str, pd.DataFrame], budgets: Sequence[Budget]) -> int:
    """Print the tables and the budgets, write the JSON, return the exit code."""
    for title, table in tables.items():
        print(f"\n{title}\n{table.to_string(index=False, float_format='{:.2f}'.format)}")
    print("\ntoo small to be judged:" if args.quick else "")
    for b in budgets:
        print(f"{'met:   ' if b.met else 'MISSED:'} {b.what}: {b.measured:.2f}, at most {b.at_most:g}")
    if args.json:
        values = {title: table.to_dict("records") for title, table in tables.items()}
        args.json.write_text(json.dumps({"tables": values, "budgets": [asdict(b) for b in budgets]}, indent=1))
    return 0 if args.quick or all(b.met for b in budgets) else 1


def abstracts(rows: int) -> pd.DataFrame:
    """A frame of this many rows; its prompts by ``TEMPLATE`` have about 220 characters."""
    genes = [f"gene{i:07d}" for i in range(rows)]
    return pd.DataFrame({"gene": genes, "abstract": [_SENTENCE * 2 + f"Entry {gene}." for gene in genes]})


def cpu_us(work: Callable[[], pd.DataFrame], rows: int) -> float:
    """CPU time of this process, all threads, for a frame of answers: microseconds per row."""
    began = process_time()
    answers = work()
    spent = process_time() - began
    assert len(answers) == rows
    assert answers["response"].notna().all()
    return spent / rows * 1e6


def alternate(ways: Mapping[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """Measure each way in turn, so that disturbances of the machine affect all; the first round is a warm-up."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(-1, repeats):
        for name, measure in ways.items():
            value = measure()
            if repeat >= 0:
                found[name].append(value)
    return found


def spread(values: Sequence[float], reference: Sequence[float], unit: str, of: str) -> dict[str, Any]:
    """Median and range, and the median of the ratios to the reference measured in the same round."""
    ratios = [a / b for a, b in zip(values, reference, strict=True)]
    return {unit: statistics.median(values), "min": min(values), "max": max(values), of: statistics.median(ratios)}
