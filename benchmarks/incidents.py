"""Ordinary incidents, beside other clients: eight endpoints, 2,000 rows of a second, 32 at once on each.

swarmkit, flexllm, lm-eval's ``local-completions`` and two loops over ``AsyncOpenAI`` answer the same rows while the
same things happen (``_incidents.py``); ``_rivals.py`` says how each is set up. The clock of a tool runs from the URLs
to the last right row that it hands back, or to a limit of four times the ideal. Tools that are not installed
(``pip install -e ".[rivals]"``) are left out.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from ._incident_server import IncidentServer
from ._incidents import Incident, incidents
from ._report import Budget, parser, report
from ._rivals import TOOLS, versions

ENDPOINTS, ROWS = 8, 2_000
LIMIT = 4.0  # times the ideal
BUDGET = 1.1  # times the first that has all rows right
QUICK = ("all_flaky",)


@dataclass(frozen=True)
class Result:
    """What a tool made of an incident: seconds to the last right row, rows right and wrong, prompts sent."""

    seconds: float
    right: int
    wrong: int
    prompts: int

    def describe(self, rows: int) -> str:
        if self.right == rows:
            return f"{self.seconds:.1f} s ({self.prompts / rows:.2f})"
        missing = f"{self.right:,} right" + (f", {self.wrong:,} wrong" if self.wrong else "")
        return f"{missing} ({self.prompts / rows:.2f})"


def play(incident: Incident, tool: str, rows: int) -> Result:
    """Let a tool go through an incident."""
    command = [sys.executable, "-m", "benchmarks._rivals", tool]
    root = Path(__file__).parent.parent
    limit_s = LIMIT * incident.ideal(rows).seconds
    with IncidentServer(incident) as server:
        child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=root
        )
        assert child.stdin
        assert child.stdout
        assert child.stdout.readline() == "ready\n", f"{tool} does not start"
        asked = {"urls": [endpoint.url for endpoint in server.endpoints], "rows": rows, "limit_s": limit_s}
        child.stdin.write(json.dumps(asked) + "\n")
        child.stdin.flush()
        figures: dict[str, Any] = json.loads(child.stdout.readlines()[-1])
        child.wait()
        child.stdin.close()
        child.stdout.close()
    assert server.sent
    return Result(**figures, prompts=server.sent.prompts)


def best(results: dict[str, Result], rows: int) -> str:
    """The tool that had all rows first; "" if none had."""
    complete = {tool: result.seconds for tool, result in results.items() if result.right == rows}
    return min(complete, key=complete.__getitem__, default="")


def main() -> int:
    arguments = parser(__doc__)
    arguments.add_argument("names", nargs="*", metavar="INCIDENT", help="which (default: all)")
    arguments.add_argument("--tools", help="which, with commas between them (default: all that are installed)")
    args = arguments.parse_args()
    rows = ROWS // 10 if args.quick else ROWS
    known, installed = incidents(ENDPOINTS), versions()
    tools = args.tools.split(",") if args.tools else list(installed)
    names = args.names or (QUICK if args.quick else list(known))
    if unknown := (set(names) - set(known)) | (set(tools) - set(TOOLS)):
        arguments.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(known)}; {', '.join(TOOLS)}")
    print(", ".join(f"{tool} {installed[tool]}" for tool in tools), flush=True)
    for tool in TOOLS.keys() - installed.keys():
        print(f'{tool} is not installed: pip install -e ".[rivals]"')
    found, table, budgets = [], [], []
    for name in names:
        ideal_s = known[name].ideal(rows).seconds
        results = {}
        for tool in tools:
            results[tool] = result = play(known[name], tool, rows)
            print(f"{name}: {tool} {result.describe(rows)}, load {os.getloadavg()[0]:.1f}", flush=True)
            found.append({"incident": name, "tool": tool, "ideal_s": ideal_s, **vars(result)})
        first = best(results, rows)
        told = {tool: result.describe(rows) for tool, result in results.items()}
        table.append({"incident": known[name].what, "ideal": f"{ideal_s:.1f} s", **told, "first": first})
        if (ours := results.get("swarmkit")) and "swarmkit" in tools:
            complete = ours.right == rows
            ratio = ours.seconds / results[first].seconds if first and complete else 99.0
            budgets.append(Budget(f"{name}: swarmkit, times the first ({first or 'none has all rows'})", ratio, BUDGET))
    print(f"\nseconds until all {rows:,} rows are right, or how many are; in brackets prompts sent a row\n")
    print(markdown(table))
    return report(args, {"Every run": pd.DataFrame(found)}, budgets)


def markdown(table: list[dict[str, str]]) -> str:
    lines = [list(table[0]), ["---"] * len(table[0]), *(list(row.values()) for row in table)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    sys.exit(main())
