"""Blocking verbs that are interrupted at random moments, again and again in one process."""

import os
import random
import shutil
import signal
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pandas as pd
from footprint import footprint, settled

import swarmkit as sk
from swarmkit.runs.run import Run

T = TypeVar("T")
ROWS = 400
LAST_S = 0.2  # a little longer than a run takes; a third of the interrupts come in the first moments of theirs


def interrupts(times: int, rng: random.Random) -> None:
    """Interrupt so many runs."""
    folder = Path(tempfile.mkdtemp())
    df = pd.DataFrame({"i": range(ROWS)})
    ends: Counter[str] = Counter()
    slowest = 0.0
    with sk.local(1, engine="echo", addresses=4, tokens_per_s=150.0, max_num_seqs=16) as swarm:
        batch = sk.BatchPolicy(max_size=20, max_in_flight=4)
        pool = sk.VLLMPool(swarm.endpoints, model="echo", batch=batch)
        assert df.swarm.scatter("n {i}", pool=pool, progress=False)["response"].notna().all()
        before = footprint()
        began = time.monotonic()
        for number in range(times):
            store = folder / str(number) if rng.random() < 0.5 else None
            delivery = rng.choice(["rows", "batch"])
            after_s = rng.random() * rng.choice([LAST_S, LAST_S, 0.02])
            if rng.random() < 0.8:
                end, took_s = interrupt(df, pool, store, delivery, after_s)
            else:
                name = rng.choice(["iter_scatter", "chunks", "tree_reduce", "connect"])
                end, took_s = interrupt_another_verb(df, pool, name, after_s)
            ends[end] += 1
            slowest = max(slowest, took_s)
            if store is not None:
                shutil.rmtree(store, ignore_errors=True)
        seconds = time.monotonic() - began
        after = settled(lambda now: now[:3] <= before[:3])
        pool_works(df, pool)
    shutil.rmtree(folder)
    print(f"{times} interrupts in {seconds:.0f} s: {dict(ends)}; the slowest took {slowest:.2f} s to end")
    print(f"before {before}\nafter  {after}")
    assert after.descriptors <= before.descriptors + 2, "descriptors are left open"
    assert after.threads <= before.threads, "threads are left"
    assert after.tasks <= before.tasks, "tasks are left"
    assert after.rss_mb <= before.rss_mb + 20 + times / 50, "memory is left"


def interrupt(df: pd.DataFrame, pool: sk.VLLMPool, store: Path | None, delivery: str,
              after_s: float) -> tuple[str, float]:  # fmt: skip
    """Start a scatter, interrupt it after so many seconds, and check what it hands back."""
    earlier = sk.last_run()
    frame, exc, took_s = interrupted(
        lambda: df.swarm.scatter("n {i}", pool=pool, store=store, delivery=delivery, temperature=0, progress=False),
        after_s,
    )
    run = sk.last_run()
    if run is earlier:
        return "interrupted before the run", 0.0
    if frame is None and not isinstance(exc, sk.ScatterInterrupted):  # on the way out of the verb
        end, frame = "interrupted at the end", run.partial()
    elif isinstance(exc, sk.ScatterInterrupted):
        end, frame = "interrupted", exc.frame
    else:
        end = "finished before"
    check(df, run, frame, pool, store, delivery)
    return end, took_s


def interrupt_another_verb(df: pd.DataFrame, pool: sk.VLLMPool, name: str, after_s: float) -> tuple[str, float]:
    """The same for verbs that hand back what they have in other ways: their runs end."""
    options = {"pool": pool, "progress": False}
    verbs: dict[str, Callable[[], object]] = {
        "iter_scatter": lambda: list(df.swarm.iter_scatter("n {i}", **options)),
        "chunks": lambda: list(
            sk.iter_scatter((df.iloc[k : k + 100] for k in range(0, ROWS, 100)), "n {i}", **options)
        ),
        "tree_reduce": lambda: df.assign(g=df["i"] // 4).swarm.tree_reduce("i", "{responses}", by="g", **options),
        "connect": lambda: sk.connect(pool.endpoints),
    }
    _, exc, took_s = interrupted(verbs[name], after_s)
    end = time.monotonic() + 2.0
    while not sk.last_run().done() and time.monotonic() < end:
        time.sleep(0.01)
    assert sk.last_run().done(), f"a run of {name} goes on after its interrupt"
    pool_works(df, pool)
    return f"{name} {'interrupted' if exc else 'finished before'}", took_s


def interrupted(call: Callable[[], T], after_s: float) -> tuple[T | None, KeyboardInterrupt | None, float]:
    """Call something and interrupt it after so many seconds: its result, or the interrupt; and the seconds that it
    went on for afterwards."""
    sent_at: list[float] = []

    def send() -> None:
        sent_at.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGINT)

    timer = threading.Timer(after_s, send)
    result, caught, ended_at = None, None, 0.0
    try:
        timer.start()
        try:
            result = call()
        finally:
            ended_at = time.monotonic()
            timer.cancel()
            timer.join()
            time.sleep(0)  # the signal may be on its way
    except KeyboardInterrupt as exc:
        caught = exc if result is None else None  # else it came when the call had returned
    took_s = max(0.0, ended_at - sent_at[0]) if sent_at else 0.0
    assert took_s < 2.0, f"an interrupt took {took_s:.1f} s"
    return result, caught, took_s


def check(df: pd.DataFrame, run: Run, frame: pd.DataFrame, pool: sk.VLLMPool, store: Path | None,
          delivery: str) -> None:  # fmt: skip
    """Only right values, the store has every answered row, and the next run asks the others only."""
    assert run.done(), "the run goes on after its interrupt"
    partial = run.partial()
    for part in (partial, frame):
        answered = part["response"].notna()
        assert len(part) == len(df)
        assert (part["response"][answered] == "echo: n " + df["i"].astype(str)[answered]).all()
        assert (answered != part["response_error"].notna()).all()
    known = int(partial["response"].notna().sum())
    assert frame["response"].notna().sum() == known
    if store is None:
        pool_works(df, pool)
        return
    stored = sk.open_store(store)
    kept = len(stored) if store.exists() else 0
    assert kept == known, f"{kept} rows are stored, {known} are in the frame"
    again = df.swarm.scatter("n {i}", pool=pool, store=store, delivery=delivery, temperature=0, progress=False)
    assert (again["response"] == "echo: n " + df["i"].astype(str)).all()
    stats = sk.last_run().stats
    assert (stats.stored, stats.answered) == (known, len(df) - known)


def pool_works(df: pd.DataFrame, pool: sk.VLLMPool) -> None:
    """A short run of the same pool."""
    few = df.iloc[:3].swarm.scatter("n {i}", pool=pool, progress=False)
    assert few["response"].tolist() == ["echo: n 0", "echo: n 1", "echo: n 2"]
