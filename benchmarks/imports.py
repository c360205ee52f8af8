"""What ``import swarmkit`` takes beyond ``import pandas``, in fresh processes."""

from __future__ import annotations

import subprocess
import sys

import pandas as pd

from ._report import Budget, alternate, arguments, report, spread

CODE = "import pandas, time; t = time.perf_counter(); import {0}; print(time.perf_counter() - t)"


def main() -> int:
    args = arguments(__doc__)

    def milliseconds(module: str) -> float:
        ran = subprocess.run([sys.executable, "-c", CODE.format(module)], check=True, capture_output=True, text=True)
        return float(ran.stdout) * 1000

    # openai for comparison: the cost if it were not imported late
    ways = {name: lambda name=name: milliseconds(name) for name in ("swarmkit", "openai")}
    found = alternate(ways, 1 if args.quick else 9)
    rows = [{"module": n, **spread(v, found["swarmkit"], "ms", "times swarmkit")} for n, v in found.items()]
    budget = Budget("milliseconds of import swarmkit beyond import pandas", float(rows[0]["ms"]), 50.0)
    return report(args, {"Import, after pandas": pd.DataFrame(rows)}, [budget])


if __name__ == "__main__":
    sys.exit(main())
