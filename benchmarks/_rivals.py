"""One tool answers the rows of an incident, in a process of its own: ``python -m benchmarks._rivals TOOL``.

Each is set up as its documentation says for work that must be done in spite of faults. All of them are told what
swarmkit is not: that an endpoint works on 32 rows at once, and that a row never takes ten seconds.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import itertools
import json
import logging
import os
import random
import socket
import sys
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from ._incidents import SLOTS, answer_of, prompt_of

TIMEOUT_S = 10
MODEL = "incident"
_NAME = "swarm.test"  # resolves to all addresses


class Answers:
    """What a tool has handed back, and when."""

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.began = time.monotonic()
        self.last_s = 0.0
        self.right: set[int] = set()
        self.wrong: set[int] = set()

    def put(self, row: int, text: object) -> None:
        if text == answer_of(row):
            self.right.add(row)
            self.last_s = time.monotonic() - self.began
        else:
            self.wrong.add(row)

    def put_all(self, texts: Sequence[object]) -> None:
        for row, text in enumerate(texts):
            if isinstance(text, str):
                self.put(row, text)

    def report(self) -> None:
        figures = {"seconds": self.last_s, "right": len(self.right), "wrong": len(self.wrong)}
        print(json.dumps(figures), flush=True)


def swarmkit(urls: list[str], answers: Answers) -> None:
    import pandas as pd

    import swarmkit as sk

    df = pd.DataFrame({"prompt": [prompt_of(row) for row in range(answers.rows)]})
    with sk.connect(urls) as pool:
        frame = df.swarm.scatter("{prompt}", pool=pool, max_tokens=64, temperature=0, progress=False)
    answers.put_all(frame["response"].tolist())


def openai_retries(urls: list[str], answers: Answers) -> None:
    """A client for each endpoint, which retries a thousand times; rows go round."""
    import openai

    async def main() -> None:
        clients = [
            openai.AsyncOpenAI(base_url=f"{u}/v1", api_key="none", max_retries=1000, timeout=TIMEOUT_S) for u in urls
        ]
        gate = asyncio.Semaphore(SLOTS * len(urls))

        async def one(row: int) -> None:
            async with gate:
                with contextlib.suppress(Exception):
                    client = clients[row % len(urls)]
                    reply = await client.completions.create(
                        model=MODEL, prompt=prompt_of(row), max_tokens=64, temperature=0
                    )
                    answers.put(row, reply.choices[0].text)

        await asyncio.gather(*map(one, range(answers.rows)))

    asyncio.run(main())


def openai_loop(urls: list[str], answers: Answers) -> None:
    """Whatever fails is sent to the next endpoint, after pauses like those of the client's own retries."""
    import openai

    async def main() -> None:
        clients = [
            openai.AsyncOpenAI(base_url=f"{u}/v1", api_key="none", max_retries=0, timeout=TIMEOUT_S) for u in urls
        ]
        turn, gate = itertools.cycle(clients), asyncio.Semaphore(SLOTS * len(urls))

        async def one(row: int) -> None:
            async with gate:
                for tries in itertools.count():
                    with contextlib.suppress(Exception):  # replies without choices, too
                        reply = await next(turn).completions.create(
                            model=MODEL, prompt=prompt_of(row), max_tokens=64, temperature=0
                        )
                        answers.put(row, reply.choices[0].text)
                        return
                    await asyncio.sleep(min(8.0, 0.5 * 2.0 ** min(tries, 4)) * random.uniform(0.75, 1.0))

        await asyncio.gather(*map(one, range(answers.rows)))

    asyncio.run(main())


def flexllm(urls: list[str], answers: Answers) -> None:
    """Its pool moves rows that fail to the next endpoint, once round; those that end with an error are asked again."""
    from flexllm import LLMClient

    async def main() -> None:
        client = LLMClient(
            endpoints=[{"base_url": f"{url}/v1", "model": MODEL, "concurrency_limit": SLOTS} for url in urls],
            fallback=True,
            retry_times=len(urls),  # over all endpoints
            timeout=TIMEOUT_S,
        )
        left = list(range(answers.rows))
        while left:
            asked = [[{"role": "user", "content": prompt_of(row)}] for row in left]
            failed = []
            results = client.chat_batch_iter(asked, show_progress=False, max_tokens=64, temperature=0)
            async for index, result in results:
                if result.error:
                    failed.append(left[index])
                else:
                    answers.put(left[index], result.content)
            left = failed
            await asyncio.sleep(1.0 if left else 0.0)

    asyncio.run(main())


def lm_eval(urls: list[str], answers: Answers) -> None:
    """It has one ``base_url``: here a name that resolves to all endpoints, as an administrator might set up."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    hosts = [url.split("/")[2].rsplit(":", 1)[0] for url in urls]
    port = int(urls[0].split("/")[2].rsplit(":", 1)[1])
    resolve = socket.getaddrinfo

    def getaddrinfo(host: Any, *args: Any, **kwargs: Any) -> Any:
        names = hosts if host == _NAME else [host]
        return [found for name in names for found in resolve(name, *args, **kwargs)]

    socket.getaddrinfo = getaddrinfo
    model = LocalCompletionsAPI(
        model=MODEL,
        base_url=f"http://{_NAME}:{port}/v1/completions",
        tokenizer_backend=None,
        tokenized_requests=False,
        num_concurrent=SLOTS * len(urls),
        max_retries=1000,
        max_gen_toks=64,
        timeout=TIMEOUT_S,
    )
    asked = [
        Instance("generate_until", {}, (prompt_of(row), {"until": ["\n\n"], "max_gen_toks": 64}), row)
        for row in range(answers.rows)
    ]
    answers.put_all(model.generate_until(asked, disable_tqdm=True))


TOOLS: dict[str, tuple[str, tuple[str, ...], Callable[[list[str], Answers], None]]] = {
    "swarmkit": ("swarmkit-frames", ("swarmkit.accessor", "swarmkit.pool.connect"), swarmkit),
    "flexllm": ("flexllm", ("flexllm",), flexllm),
    "lm-eval": ("lm-eval", ("lm_eval.models.openai_completions",), lm_eval),
    "AsyncOpenAI": ("openai", ("openai.resources",), openai_retries),
    "AsyncOpenAI, loop": ("openai", ("openai.resources",), openai_loop),
}
"""By name: its distribution, what is imported before the clock starts, and what it does."""


def versions() -> dict[str, str]:
    """The versions of the tools that are installed."""
    found = {}
    for name, (distribution, _, _) in TOOLS.items():
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(distribution)
    return found


def main() -> None:
    _, modules, work = TOOLS[sys.argv[1]]
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    for module in modules:
        importlib.import_module(module)
    print("ready", flush=True)
    asked = json.loads(sys.stdin.readline())
    answers = Answers(asked["rows"])

    def stop() -> None:
        answers.report()
        os._exit(0)

    timer = threading.Timer(asked["limit_s"], stop)
    timer.daemon = True
    timer.start()
    try:
        work(asked["urls"], answers)
    finally:
        timer.cancel()
        answers.report()


if __name__ == "__main__":
    main()
