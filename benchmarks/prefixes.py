"""Documents and questions, by the order of the rows: ``python -m benchmarks.prefixes [--quick] [--json FILE]``.

Servers keep what they have computed of a prompt, so a document need be computed once for all its questions. Rows come
document by document, and shuffled; ``order="given"`` spreads them, ``"auto"`` keeps those of a document together.

First the real scheduler with 64 simulated endpoints that have prefix caches. Then, in ``python tests/real_vllm/serve.py
run -- python -m benchmarks.prefixes``, two real vLLM servers with the tiny model on this machine's CPU, which say
themselves what they found; the documents are new in each repeat, so that nothing of them is in a cache.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import statistics
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pandas as pd

import swarmkit as sk
from swarmkit.analysis.simulate import PrefixCache, blocks_of

from ._report import Budget, arguments, report

README = Path(__file__).parent.parent / "README.md"
SERVE = Path(__file__).parent.parent / "tests/real_vllm/serve.py"
WAYS = {
    "given": ("given", False),
    "auto": ("auto", False),
    "given, shuffled": ("given", True),
    "auto, shuffled": ("auto", True),
}
QUESTIONS = 6
TOKENS = 4


def table(documents: int, seed: int, *, shuffled: bool) -> pd.DataFrame:
    """Documents of 450 words, each with six questions."""
    rng = random.Random(seed)
    words = re.findall("[A-Za-z]{3,}", README.read_text())  # as many tokens as such words have
    texts = [" ".join(rng.choices(words, k=450)) for _ in range(documents)]
    rows = [(text, f"What is said of {words[q]} there?") for text in texts for q in range(QUESTIONS)]
    if shuffled:
        rng.shuffle(rows)
    return pd.DataFrame(rows, columns=["document", "question"])


def simulated(documents: int, endpoints: int) -> pd.DataFrame:
    """By way: the time, and the tokens computed for each that must be computed once."""
    model = sk.EndpointModel(slots=64, tokens_per_s=40.0, prefill_tokens_per_s=10_000.0, cache_tokens=200_000)
    found = []
    for way, (order, shuffled) in WAYS.items():
        df = table(documents, 1, shuffled=shuffled)
        prompts = (df["document"] + "\n" + df["question"]).tolist()
        cache = PrefixCache(10**9)
        once = sum(cache.computed(blocks_of(prompt)) for prompt in prompts)
        batch = sk.BatchPolicy(order=order)
        run = sk.simulate([model] * endpoints, sk.Workload(len(prompts), TOKENS, prompts), batch=batch)
        found.append((way, run.time_s, (run.prompt_tokens - run.cached_tokens) / once, run.requests))
    frame = pd.DataFrame(found, columns=["way", "time_s", "computed_to_once", "requests"])
    given = frame["time_s"].where(frame["way"].str.startswith("given")).ffill()
    return frame.assign(to_given=frame["time_s"] / given)


@contextlib.contextmanager
def servers(count: int) -> Iterator[list[str]]:
    """The addresses of so many vLLM servers with the tiny model."""
    with contextlib.ExitStack() as stack:
        urls = []
        for _ in range(count):
            start = [sys.executable, str(SERVE), "start", "--model", "tiny", "--disable-uvicorn-access-log"]
            served = json.loads(subprocess.run(start, stdout=subprocess.PIPE, check=True).stdout)
            stack.callback(subprocess.run, [sys.executable, str(SERVE), "stop", str(served["pid"])], check=True)
            urls.append(served["url"])
        yield urls


def real(documents: int, repeats: int) -> pd.DataFrame:
    """By way, on two vLLM servers: the time, and the share of prompt tokens that the servers found in their caches."""
    warnings.simplefilter("ignore", sk.SwarmWarning)  # all answers are cut off at four tokens
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    shares: dict[str, list[float]] = {way: [] for way in WAYS}
    with servers(2) as urls, sk.connect(urls) as pool:
        for repeat in range(-1, repeats):  # the first is not counted
            for number, (way, (order, shuffled)) in enumerate(WAYS.items()):
                df = table(documents if repeat >= 0 else 12, 10 * repeat + number, shuffled=shuffled)
                asked = pool.with_batch(sk.BatchPolicy(order=order))
                options = {"pool": asked, "max_tokens": TOKENS, "temperature": 0, "progress": False}
                answers = df.swarm.scatter("{document}\n{question}", **options)
                assert answers["response_error"].isna().all()
                stats = sk.last_run().stats
                if repeat >= 0:
                    times[way].append(stats.time_s)
                    shares[way].append(stats.prefix_hits / max(1, stats.prefix_queries))
    rows = [
        {
            "way": way,
            "time_s": statistics.median(times[way]),
            "min_s": min(times[way]),
            "max_s": max(times[way]),
            "to_given": statistics.median(
                a / b for a, b in zip(times[way], times["given, shuffled" if shuffled else "given"], strict=True)
            ),
            "found": statistics.median(shares[way]),
        }
        for way, (_, shuffled) in WAYS.items()
    ]
    return pd.DataFrame(rows)


def main() -> int:
    args = arguments(__doc__)
    plan = simulated(64, 8) if args.quick else simulated(640, 64)
    auto = plan[plan["way"].str.startswith("auto")]
    tables = {"Simulated endpoints with prefix caches": plan}
    budgets = [
        Budget("tokens computed, to each document once, worst", auto["computed_to_once"].max(), 1.1),
        Budget('time to that of order="given", worst', auto["to_given"].max(), 0.4),
    ]
    if args.quick or "SWARMKIT_VLLM_TINY" not in os.environ:
        print("without a real vLLM: python tests/real_vllm/serve.py run -- python -m benchmarks.prefixes")
    else:
        found = real(60, 5)
        tables["Two vLLM servers, 60 documents of 450 words x 6 questions, 4 tokens an answer"] = found
        auto = found[found["way"].str.startswith("auto")]
        budgets += [
            Budget("part of the prompt tokens that no cache had, worst", 1 - auto["found"].min(), 1 - 0.76),
            Budget('time on vLLM to that of order="given", worst', auto["to_given"].max(), 0.8),
        ]
    return report(args, tables, budgets)


if __name__ == "__main__":
    sys.exit(main())
