"""A soak: scatters, iterations, tree-reduces and cancelled runs, for minutes, with one percent of every fault."""

import contextlib
import random
import shutil
import tempfile
import time
from collections import Counter
from pathlib import Path

import pandas as pd
from footprint import Footprint, footprint, settled

import swarmkit as sk

ROWS = 600
WARM_UP = 0.2  # of the time: caches fill, and the allocator's arenas
REPORT_S = 30.0
KINDS = [
    *(
        "http_307",
        "http_401",
        "http_402",
        "http_403",
        "http_404",
        "http_405",
        "http_413",
        "http_429:seconds=0.05",
        "http_500",
    ),
    *("http_502", "http_503", "http_504", "wait:seconds=0.05", "reset", "cut", "half_close", "hang", "silence"),
    *("drip:seconds=0.002", "garbage", "null_body", "empty_body", "error_body", "half_json", "late_400", "late_500"),
    *("shuffle", "missing_index", "repeated_index", "unknown_index", "wrong_type", "no_finish", "no_done", "abort"),
]
RETRY = sk.RetryPolicy(base_s=0.02, cap_s=0.3, quiet_s=0.5, give_up_s=60.0)


def soak(seconds: float, rng: random.Random) -> None:
    """Use the library for so long; whatever the faults, every row is answered, and right."""
    folder = Path(tempfile.mkdtemp())
    faults = [f"{kind}{',' if ':' in kind else ':'}probability=0.01,seed={i}" for i, kind in enumerate(KINDS)]
    done: Counter[str] = Counter()
    failed = rows = requests = 0
    base: Footprint | None = None
    began = reported = time.monotonic()
    with sk.local(1, engine="echo", addresses=8, tokens_per_s=2000.0, max_num_seqs=64, faults=faults) as swarm:
        pool = new_pool(swarm)
        while (now := time.monotonic()) - began < seconds:
            name = rng.choice([*USES])
            store = folder / "store" if rng.random() < 0.5 else None
            USES[name](pool, rng, store)
            stats = sk.last_run().stats
            done[name] += 1
            rows, requests, failed = rows + stats.answered, requests + stats.requests, failed + stats.failed_requests
            shutil.rmtree(folder / "store", ignore_errors=True)
            if rng.random() < 0.05:
                pool.__exit__(None, None, None)
                pool = new_pool(swarm)
            if base is None and now - began > WARM_UP * seconds:
                base = settled(lambda now: now.descriptors < 30)
                print(f"after the warm-up {base}", flush=True)
            if now - reported > REPORT_S:
                reported = now
                print(f"{now - began:4.0f} s: {rows:,} rows, {failed:,} of {requests:,} requests failed; {footprint()}",
                      flush=True)  # fmt: skip
        pool.__exit__(None, None, None)
    assert base is not None
    shutil.rmtree(folder)
    after = settled(lambda now: now[:3] <= base[:3])
    print(f"{dict(done)}: {rows:,} rows, {failed:,} of {requests:,} requests failed")
    print(f"{len(refused)} rows were refused by two endpoints; no other is lost")
    print(f"before {base}\nafter  {after}")
    assert len(refused) <= rows / 2000, "more rows are refused than by chance"
    assert after.descriptors <= base.descriptors, "descriptors are left open"
    assert after.threads <= base.threads, "threads are left"
    assert after.tasks <= base.tasks, "tasks are left"
    assert after.rss_mb <= base.rss_mb * 1.1 + 10, "memory is left"


def new_pool(swarm: sk.LocalSwarm) -> sk.VLLMPool:
    batch = sk.BatchPolicy(max_size=20)
    return sk.VLLMPool(swarm.endpoints, model="echo", timeout=1.0, retry=RETRY, batch=batch)


def prompts(rng: random.Random) -> pd.DataFrame:
    first = rng.randrange(10**9)
    return pd.DataFrame({"i": range(first, first + ROWS), "g": [k // 5 for k in range(ROWS)]})


def right(expected: pd.Series, answers: pd.DataFrame) -> int:
    """Every row has its answer. Some servers refuse what others take, so a row may by chance be refused by two: that
    is its error then."""
    errors = answers["response_error"].dropna()
    refused.extend(errors)
    assert errors.str.contains("^(?:access denied|request refused) at ").all(), errors.tolist()
    answered = answers["response"].notna()
    assert (answered != answers["response_error"].notna()).all()
    assert (answers["response"][answered] == expected[answered]).all()
    return int(answered.sum())


refused: list[str] = []  # errors of rows


def expected(df: pd.DataFrame) -> pd.Series:
    return "echo: n " + df["i"].astype(str)


def options(rng: random.Random, store: Path | None) -> dict[str, object]:
    return {"store": store, "delivery": rng.choice(["rows", "batch"]), "details": rng.random() < 0.5, "progress": False}


def scatter(pool: sk.VLLMPool, rng: random.Random, store: Path | None) -> None:
    df = prompts(rng)
    answered = right(expected(df), df.swarm.scatter("n {i}", pool=pool, **options(rng, store)))
    if store is not None:
        assert len(sk.open_store(store)) == answered


def iterate(pool: sk.VLLMPool, rng: random.Random, store: Path | None) -> None:
    df = prompts(rng)
    parts = pd.concat(df.swarm.iter_scatter("n {i}", pool=pool, **options(rng, store)))
    right(expected(df), parts[~parts.index.duplicated(keep="last")].sort_index())


def chunks(pool: sk.VLLMPool, rng: random.Random, store: Path | None) -> None:
    df = prompts(rng)
    parts = sk.iter_scatter((df.iloc[k : k + 100] for k in range(0, ROWS, 100)), "n {i}", pool=pool,
                            **options(rng, store))  # fmt: skip
    right(expected(df), pd.concat(parts))


def tree(pool: sk.VLLMPool, rng: random.Random, store: Path | None) -> None:
    df = prompts(rng)
    kwargs = {name: value for name, value in options(rng, store).items() if name != "details"}
    tops = df.assign(t="n " + df["i"].astype(str)).swarm.tree_reduce("t", "{responses}", by="g", fanin=5, pool=pool,
                                                                     **kwargs)  # fmt: skip
    joined = df.groupby("g")["i"].agg(lambda group: "echo: " + "\n---\n".join(f"n {i}" for i in group))
    right(joined.reset_index(drop=True), tops)


def cancel(pool: sk.VLLMPool, rng: random.Random, store: Path | None) -> None:
    df = prompts(rng)
    run = df.swarm.submit("n {i}", pool=pool, **options(rng, store))
    time.sleep(rng.random() * 0.3)
    run.cancel()
    with contextlib.suppress(sk.CancelledError):
        run.result()
    partial = run.partial()
    answered = partial["response"].notna()
    assert (partial["response"][answered] == expected(df)[answered]).all()
    if store is not None and store.exists():
        assert len(sk.open_store(store)) == answered.sum()


USES = {"scatter": scatter, "iterate": iterate, "chunks": chunks, "tree": tree, "cancel": cancel}
