"""Batch mode against single requests and against vLLM's own offline ``LLM.generate``, on a real vLLM.

    python tests/real_vllm/serve.py run -- python -m benchmarks.vllm

512 prompts of 16 tokens each on the tiny model, five repeats of each way in alternation, medians with their spread.
``LLM.generate`` runs in a process of its own in vLLM's environment, on the same model folder with the same
settings and prompts, wrapped in the same chat template, and the server is one of the benchmark's own that, like
``LLM``, keeps no statistics. ``LLM.generate`` returns its answers all at once, so it is compared with whole replies
(``delivery="batch"``); rows streamed as they finish, the default, are measured as well.

A vLLM worker that has just finished busy-waits for its next step for seconds, and on a small machine that takes a core
from the next measurement. So the process group that is not measured is stopped (``SIGSTOP``), and each way is warmed up
with a few prompts before it is timed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pandas as pd

import swarmkit as sk

OFFLINE = """
import json, os, sys, time
out = os.dup(1); os.dup2(2, 1)
from vllm import LLM, SamplingParams
setup = json.loads(sys.stdin.readline())
llm = LLM(model=setup["model"], enforce_eager=True, max_model_len=2048, max_num_seqs=64, dtype="float32")
params = SamplingParams(temperature=0, max_tokens=setup["max_tokens"], ignore_eos=True)
for line in sys.stdin:
    prompts = json.loads(line)
    began = time.perf_counter()
    done = llm.generate(prompts, params, use_tqdm=False)
    taken = time.perf_counter() - began
    assert len(done) == len(prompts)
    os.write(out, f"{taken}\\n".encode())
"""


class Offline:
    """vLLM's ``LLM`` in a child process."""

    def __init__(self, model: Path, max_tokens: int) -> None:
        environment = {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "VLLM_CPU_KVCACHE_SPACE": "2",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_LOGGING_LEVEL": "WARNING",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // 4)),
        }
        environment.pop("PYTHONPATH", None)
        self.process = subprocess.Popen(
            [os.environ["SWARMKIT_VLLM_PYTHON"], "-c", OFFLINE],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
            start_new_session=True,  # a process group of its own, to be stopped and continued whole
        )  # fmt: skip
        self.send({"model": str(model), "max_tokens": max_tokens})

    def send(self, value: object) -> None:
        assert self.process.stdin
        self.process.stdin.write(json.dumps(value) + "\n")
        self.process.stdin.flush()

    def generate(self, prompts: list[str]) -> float:
        self.send(prompts)
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError("the offline vLLM ended; its messages are above")
        return float(line)

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait(30)


@contextlib.contextmanager
def stopped(group: int) -> Iterator[None]:
    """A process group is stopped meanwhile."""
    os.killpg(group, signal.SIGSTOP)
    try:
        yield
    finally:
        os.killpg(group, signal.SIGCONT)


@contextlib.contextmanager
def server() -> Iterator[tuple[str, int]]:
    """The address and the process group of a vLLM that does what ``LLM`` does: no statistics, no log of requests."""
    serve = [sys.executable, str(Path(__file__).parent.parent / "tests/real_vllm/serve.py")]
    start = [*serve, "start", "--model", "tiny", "--disable-log-stats", "--disable-uvicorn-access-log"]
    served = json.loads(subprocess.run(start, stdout=subprocess.PIPE, check=True).stdout)
    try:
        yield served["url"], served["pid"]
    finally:
        subprocess.run([*serve, "stop", str(served["pid"])], check=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=512)
    parser.add_argument("--max-tokens", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()
    df = pd.DataFrame({"i": range(args.prompts)})
    template = "Note number {i} of a list of observations."
    options = {"max_tokens": args.max_tokens, "temperature": 0, "ignore_eos": True, "progress": False}
    few = df.head(8)
    offline = Offline(Path(os.environ["SWARMKIT_VLLM_HOME"]) / "tiny", args.max_tokens)
    ways = {
        "batch": {"mode": "batch", "delivery": "batch"},
        "batch, rows as they finish": {"mode": "batch", "delivery": "rows"},
        "single": {"mode": "single"},
        "offline": {},
    }
    times: dict[str, list[float]] = {way: [] for way in ways}
    with server() as (url, served), sk.connect(url) as pool:
        sent = df.swarm.preview(template, rows=args.prompts)["sent"].tolist()
        offline.generate(sent[:8])  # loading the model ends here
        for repeat in range(-1, args.repeats):  # the first is not counted
            for way in ways if repeat % 2 else reversed(ways):
                if way == "offline":
                    with stopped(served):
                        offline.generate(sent[:8])
                        taken = offline.generate(sent)
                else:
                    with stopped(offline.process.pid):
                        few.swarm.scatter(template, **ways[way], **options)
                        began = time.perf_counter()
                        answers = df.swarm.scatter(template, **ways[way], **options)
                        taken = time.perf_counter() - began
                    assert answers["response_error"].isna().all()
                if repeat >= 0:
                    times[way].append(taken)
        routes = ", ".join(pool.last_run.routes) if pool.last_run else ""
    offline.close()
    rows = []
    for way, seconds in times.items():
        middle = statistics.median(seconds)
        rows.append(
            {
                "way": way,
                "time_s": middle,
                "min_s": min(seconds),
                "max_s": max(seconds),
                "prompts_per_s": args.prompts / middle,
                "times_single": statistics.median(times["single"]) / middle,
                "times_offline": statistics.median(times["offline"]) / middle,
            }
        )
    frame = pd.DataFrame(rows)
    print(f"vLLM {os.environ.get('SWARMKIT_VLLM_VERSION', '?')}, {args.prompts} prompts x {args.max_tokens} tokens, "
          f"medians of {args.repeats}; last route: {routes}")  # fmt: skip
    print(frame.round(3).to_string(index=False))
    if args.json:
        args.json.write_text(json.dumps({"tables": {"ways": frame.to_dict("records")}}, indent=1))
    batch = frame.iloc[0]
    good = batch["times_single"] >= 2.5 and batch["times_offline"] >= 0.95
    print("budget met:" if good else "BUDGET MISSED:", "batch >= 2.5 x single and >= 0.95 x offline")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
