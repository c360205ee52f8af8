"""Memory of a scatter above its input: peak of resident memory during the run, a row.

The text counts prompts and answers, at a byte per character. Linux only: the peak is reset before the run.
"""

from __future__ import annotations

import gc
import re
import sys
from pathlib import Path

import pandas as pd

import swarmkit as sk

from ._instant import ANSWER, Instant
from ._report import TEMPLATE, Budget, abstracts, arguments, report

MOST = 1024


def status(name: str) -> int:
    """A figure of this process, in bytes."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


def main() -> int:
    args = arguments(__doc__)
    n = 1_000 if args.quick else 1_000_000
    rows = []
    with Instant() as server, sk.connect(server) as pool:
        for delivery in ("batch", "rows"):
            df = abstracts(n)
            sk.scatter(df.head(200), TEMPLATE, pool=pool, temperature=0, delivery=delivery)
            text = len(TEMPLATE.format(**df.iloc[0])) + len(ANSWER)
            gc.collect()
            Path("/proc/self/clear_refs").write_text("5")  # resets the peak
            before = status("VmRSS")
            sk.scatter(df, TEMPLATE, pool=pool, temperature=0, delivery=delivery)
            above = (status("VmHWM") - before) / n
            rows.append(
                {"delivery": delivery, "rows": n, "input MiB": before / 2**20, "bytes a row": above, "text": text,
                 "beyond the text": above - text}
            )  # fmt: skip
    table = pd.DataFrame(rows)
    budgets = [Budget(f"bytes a row beyond the text, {r['delivery']}", r["beyond the text"], MOST) for r in rows]
    return report(args, {"Memory above the input": table}, budgets)


if __name__ == "__main__":
    sys.exit(main())
