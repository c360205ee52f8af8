"""A campaign of ten million rows: a resume against a store that has all of them, and what a row of a run costs.

The store is made by this command, in segments as runs write them, and deleted afterwards; it takes 2.5 GB in the folder
for temporary files. Linux only: the peak of resident memory is reset before what is measured.
"""

from __future__ import annotations

import gc
import multiprocessing
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pandas as pd

import swarmkit as sk
from swarmkit.engine.columns import Columns
from swarmkit.records import RequestSpec
from swarmkit.store.index import FILE
from swarmkit.store.keys import ask_of, keys_of, settings_of
from swarmkit.store.segments import encode, header

from ._instant import Instant
from ._report import Budget, arguments, report
from .memory import status

SPEC = RequestSpec(model="m", max_tokens=2, params={"temperature": 0})
SEGMENTS = 20
CHUNK = 20_000
MOST_S, MOST_GIB = 60, 2


def prompts(rows: range) -> list[str | None]:
    return [f"Is the abstract about phages? Entry {i}" for i in rows]


def make(folder: Path, rows: int) -> int:
    """Write a store with an answer to each prompt, in lines as ``Writer.write`` makes them; return its bytes."""
    ask = ask_of(settings_of(SPEC))
    for number in range(SEGMENTS):
        part = range(number * rows // SEGMENTS, (number + 1) * rows // SEGMENTS)
        with (folder / f"{number:020d}-host-1-abcdef.jsonl").open("wb") as file:
            file.write(encode(header()) + encode({"ask": ask, **settings_of(SPEC)}))
            file.writelines(
                b'{"key":"%s","ask":"%s","sample":0,"text":"yes","finish_reason":"stop","prompt_tokens":25,'
                b'"completion_tokens":2,"endpoint":"gpu-17:8000","latency_s":0.8231,"written_at":1790000000.123}\n'
                % (key.encode(), ask.encode())
                for key in keys_of(ask, prompts(part))
            )
    return sum(path.stat().st_size for path in folder.iterdir())


def measured(work: Callable[[], Any], before: int) -> dict[str, float]:
    """Time, and peak of memory above what there was before, in MiB."""
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    began = time.perf_counter()
    work()
    return {"s": time.perf_counter() - began, "MiB above the prompts": (status("VmHWM") - before) / 2**20}


def resume(folder: Path, rows: int) -> list[dict[str, Any]]:
    """Plan a resume of all rows at once: which of them are stored, and where. Then read their answers."""
    texts = prompts(range(rows))
    gc.collect()
    before = status("VmRSS")
    store = sk.open_store(folder)
    found: list[Any] = []

    def plan() -> None:
        found[:] = store.keys(SPEC, texts, True)
        assert sum(len(offsets) for _, offsets, _ in store.find(found[0])) == rows

    def fill() -> None:
        assert store.fill(Columns(rows), found, range(rows), {}).all()

    steps = {"opened and planned": plan, "planned again, now it is open": plan, "answers read": fill}
    figures = [{"step": step, **measured(work, before)} for step, work in steps.items()]
    return [{**row, "GiB in all": row["MiB above the prompts"] / 1024 + before / 2**30} for row in figures]


def chunks(folder: Path, rows: int) -> float:
    """Seconds to plan the same rows as the frames of a stream."""
    began = time.perf_counter()
    store = sk.open_store(folder).for_frames()
    for start in range(0, rows, CHUNK):
        part = prompts(range(start, min(rows, start + CHUNK)))
        (keys,) = store.keys(SPEC, part, True)
        assert sum(len(offsets) for _, offsets, _ in store.find(keys)) == len(part)
    return time.perf_counter() - began


def writes() -> int:
    """Calls of ``write`` by this process so far; what goes to sockets is none of them."""
    found = re.search(r"syscw: (\d+)", Path("/proc/self/io").read_text())
    assert found
    return int(found[1])


def run_memory(rows: int, store: Path | None) -> dict[str, Any]:
    """Memory, time and writes of a run with short prompts and answers, DataFrame to DataFrame."""
    with Instant() as server, sk.connect(server) as pool:
        df = pd.DataFrame({"i": range(rows)})
        sk.scatter(df.head(200), "Row {i}", pool=pool, temperature=0, delivery="batch", max_tokens=2)
        gc.collect()
        before = status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
        began, written = time.process_time(), writes()
        sk.scatter(df, "Row {i}", pool=pool, temperature=0, delivery="batch", max_tokens=2, store=store)
        spent, written = time.process_time() - began, writes() - written
        requests = sk.last_run().stats.requests
    size = sum(path.stat().st_size for path in store.iterdir()) / rows if store else 0.0
    return {
        "store": "yes" if store else "no", "rows": rows, "bytes a row": (status("VmHWM") - before) / rows,
        "CPU us a row": spent / rows * 1e6, "bytes a row on disk": size, "writes a request": written / requests,
    }  # fmt: skip


def apart(work: Callable[..., Any], *args: Any) -> Any:
    """The result of a function in a process of its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(work, *args).result()


def main() -> int:
    args = arguments(__doc__)
    rows, run_rows = (20_000, 1_000) if args.quick else (10_000_000, 1_000_000)
    folder = Path(tempfile.mkdtemp(prefix="campaign-"))
    try:
        (folder / "full").mkdir()
        size = apart(make, folder / "full", rows)
        print(
            f"{rows:,} answers in {SEGMENTS} segments: {size / 1e9:.2f} GB, {size / rows:.0f} bytes a row", flush=True
        )
        found = [{"index": "none", **row} for row in apart(resume, folder / "full", rows)]
        found += [{"index": "there", **row} for row in apart(resume, folder / "full", rows)]
        index = folder / "full" / FILE
        of_chunks = apart(chunks, folder / "full", rows)
        runs = [apart(run_memory, run_rows, store) for store in (None, folder / "run")]
        print(
            f"the index: {index.stat().st_size / rows if index.exists() else 0:.0f} bytes a row; "
            f"planned in frames of {CHUNK:,} rows: {of_chunks:.1f} s"
        )
    finally:
        shutil.rmtree(folder)
    worst = found[0]
    budgets = [
        Budget("opening and planning without an index, s", worst["s"], MOST_S),
        Budget("the same, GiB with the prompts", worst["GiB in all"], MOST_GIB),
        Budget(f"planning in frames of {CHUNK:,} rows, s", of_chunks, MOST_S),
        Budget("8 GiB for 10,000,000 rows of a run: bytes a row", runs[1]["bytes a row"], 2**33 / 1e7),
    ]
    tables = {f"Resume of {rows:,} rows": pd.DataFrame(found), "A run of short rows": pd.DataFrame(runs)}
    return report(args, tables, budgets)


if __name__ == "__main__":
    sys.exit(main())
