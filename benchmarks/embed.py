"""Client CPU of vectors beside that of text: 100,000 short texts over four endpoints, in turns.

The echo embeds (vectors of 64 numbers, in base64) and answers, on the same machine; what is measured is the client,
DataFrame to DataFrame. Text comes as rows that are streamed as they finish, and as ``delivery="auto"`` has it.
"""

from __future__ import annotations

import sys
from functools import partial

import pandas as pd

import swarmkit as sk

from ._report import Budget, alternate, arguments, cpu_us, report, spread

ENDPOINTS = 4
MOST = 2.0  # times text rows
TEXT = "text, rows as they finish"


def main() -> int:
    args = arguments(__doc__)
    rows, repeats = (200, 1) if args.quick else (100_000, 3)
    df = pd.DataFrame({"text": [f"short text number {i} about gene {i % 977}" for i in range(rows)]})
    with sk.local(ENDPOINTS, engine="echo") as swarm, sk.connect(swarm) as pool:
        text = partial(sk.scatter, df, "{text}", out="response", pool=pool, max_tokens=16, progress=False)
        ways = {
            "vectors": partial(sk.embed, df, "text", out="response", pool=pool, progress=False),
            TEXT: partial(text, delivery="rows"),
            "text": text,
        }
        found = alternate({name: partial(cpu_us, way, rows) for name, way in ways.items()}, repeats)
    table = pd.DataFrame(
        {"what": name, **spread(values, found[TEXT], "us a row", "times text rows")} for name, values in found.items()
    )
    ratio = float(table.set_index("what")["times text rows"]["vectors"])
    return report(args, {"Client CPU a row": table}, [Budget("CPU of vectors, times text rows", ratio, MOST)])


if __name__ == "__main__":
    sys.exit(main())
