"""Processes that are killed while they scatter into a store, and the same call again, until all is answered."""

import os
import random
import re
import shutil
import signal
import tempfile
import time
import urllib.request
from pathlib import Path

import pandas as pd
from footprint import footprint

import swarmkit as sk

ROWS = 400
ENDPOINTS, IN_FLIGHT, SIZE = 4, 2, 10
# Rows in flight, at most, and a request an endpoint whose rows are on their way to the file while the next one is sent.
HELD = ENDPOINTS * (IN_FLIGHT + 1) * SIZE


def kills(times: int, rng: random.Random) -> None:
    """Kill so many processes."""
    folder = Path(tempfile.mkdtemp())
    killed = campaigns = asked_twice = 0
    began = time.monotonic()
    addresses = [f"127.0.0.{i + 1}" for i in range(ENDPOINTS)]
    with sk.local(1, engine="echo", addresses=addresses, tokens_per_s=100.0, max_num_seqs=8) as swarm:
        scatter(swarm, folder / "first", "rows")  # what is imported here need not be imported by each child
        took = time.monotonic()
        run(swarm, folder / "second", "rows", 60.0)
        took = time.monotonic() - took
        before = footprint()
        while killed < times:
            store, delivery = folder / str(campaigns), rng.choice(["rows", "batch"])
            campaigns += 1
            done = False
            while not done:
                kept, seen = stored(store), prompts_seen(swarm)
                done = run(swarm, store, delivery, rng.random() * took)
                killed += not done
                asked, new = settled_prompts(swarm) - seen, stored(store) - kept
                assert new <= asked <= ROWS - kept, f"{asked} rows were asked; {kept} of {ROWS} had been stored"
                assert asked - new <= (0 if done else HELD), f"{asked} rows were asked, {new} of them are stored"
                asked_twice += asked - new
            right(swarm, store, delivery)
            shutil.rmtree(store)
        after = footprint()
    shutil.rmtree(folder)
    seconds = time.monotonic() - began
    print(f"{killed} kills over {campaigns} stores of {ROWS} rows in {seconds:.0f} s; nothing lost; "
          f"{asked_twice / max(1, killed):.1f} rows a kill were in flight, and are asked again")  # fmt: skip
    print(f"before {before}\nafter  {after}")
    assert after.descriptors <= before.descriptors + 2


def run(swarm: sk.LocalSwarm, store: Path, delivery: str, after_s: float) -> bool:
    """Scatter in a process of its own, and kill that after so many seconds; return whether it finished before."""
    child = os.fork()
    if not child:
        code = 1
        try:
            scatter(swarm, store, delivery)
            code = 0
        finally:
            os._exit(code)
    end = time.monotonic() + after_s
    while time.monotonic() < end:
        if (found := os.waitpid(child, os.WNOHANG))[0]:
            assert not found[1], "a scatter failed"
            return True
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


def scatter(swarm: sk.LocalSwarm, store: Path, delivery: str) -> pd.DataFrame:
    df = pd.DataFrame({"i": range(ROWS)})
    batch = sk.BatchPolicy(max_size=SIZE, max_in_flight=IN_FLIGHT, hedge=False)
    with sk.VLLMPool(swarm.endpoints, model="echo", batch=batch) as pool:
        return df.swarm.scatter("n {i}", pool=pool, store=store, delivery=delivery, progress=False)


def right(swarm: sk.LocalSwarm, store: Path, delivery: str) -> None:
    """All rows are in the store, and right."""
    seen = prompts_seen(swarm)
    answers = scatter(swarm, store, delivery)
    assert (answers["response"] == "echo: n " + answers["i"].astype(str)).all()
    assert prompts_seen(swarm) == seen


def stored(store: Path) -> int:
    """Rows in the store, whose answers are right; half a line at the end of a segment is none."""
    if not store.exists():
        return 0
    frame = sk.open_store(store).to_frame()
    texts = set(frame["text"])
    assert texts <= {f"echo: n {i}" for i in range(ROWS)}
    assert len(texts) == len(frame), "a row is stored twice"
    return len(texts)


def prompts_seen(swarm: sk.LocalSwarm) -> int:
    """Prompts that the servers have been sent."""
    first = swarm.endpoints[0]
    request = urllib.request.Request(f"{first.url}/metrics?all=1", headers={"Authorization": f"Bearer {first.key()}"})
    text = urllib.request.urlopen(request, timeout=20).read().decode()
    return sum(int(count) for count in re.findall(r"^swarmkit:prompts_total\{.*\} (\d+)", text, re.MULTILINE))


def settled_prompts(swarm: sk.LocalSwarm) -> int:
    """The same, once the servers have read what had been sent to them."""
    seen = -1
    while seen != (seen := prompts_seen(swarm)):
        time.sleep(0.02)
    return seen
