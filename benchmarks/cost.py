"""Client CPU per prompt, DataFrame to DataFrame, at an endpoint that answers at once.

Compared are swarmkit, in both deliveries; the least a client can do (``aiohttp`` and ``orjson``, four requests in
flight, no retries, no checks); ``AsyncOpenAI`` with lists of prompts, and with a prompt per request. Prompts
of 220 characters, answers of 97.

Answers of one token are compared by themselves: ``delivery="auto"`` beside rows, also with ``max_size="auto"``.

And the HTTP of it alone, a request of a hundred prompts as bytes and its answer as bytes: swarmkit's client beside
``AsyncOpenAI`` over ``openai.DefaultAioHttpClient`` and over its default client.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import Awaitable, Callable
from functools import partial
from time import process_time

import aiohttp
import httpx2
import openai
import orjson
import pandas as pd

import swarmkit as sk
from swarmkit.client.transport import Transport

from ._instant import MODEL, Instant
from ._report import TEMPLATE, Budget, abstracts, alternate, arguments, cpu_us, report, spread

SIZES = {1: 2_000, 10: 10_000, 100: 20_000, 1000: 20_000}  # rows a batch: rows in the frame
IN_FLIGHT = 4
BUDGETS = {"swarmkit, batch": 4.5, "swarmkit, rows": 10.0}
HTTP_BUDGET = 0.85
SHORT_BUDGET = 0.5
_SIZED = ", max_size=auto"
REQUESTS = 60  # a turn: many short ones, since the machine is never calm for long


class Bare:
    """A loop without swarmkit: the frame's rows, in batches, through a function that sends one request."""

    def __init__(self, runner: asyncio.Runner, size: int, spec: Callable[[list[str]], Awaitable[list[str]]]) -> None:
        self.runner = runner
        self.size = size
        self.spec = spec

    def __call__(self, df: pd.DataFrame) -> pd.DataFrame:
        prompts = [
            f"Summarise what is known of {gene}: {abstract}"
            for gene, abstract in zip(df["gene"].tolist(), df["abstract"].tolist(), strict=True)
        ]
        return df.assign(response=self.runner.run(self.answers(prompts)))

    async def answers(self, prompts: list[str]) -> list[str | None]:
        found: list[str | None] = [None] * len(prompts)
        starts = iter(range(0, len(prompts), self.size))

        async def work() -> None:
            for start in starts:
                found[start : start + self.size] = await self.spec(prompts[start : start + self.size])

        await asyncio.gather(*(work() for _ in range(IN_FLIGHT)))
        return found


async def by_aiohttp(session: aiohttp.ClientSession, url: str, prompts: list[str]) -> list[str]:
    body = orjson.dumps({"model": MODEL, "prompt": prompts, "max_tokens": 512, "temperature": 0})
    async with session.post(f"{url}/v1/completions", data=body) as response:
        reply = orjson.loads(await response.read())
    texts = [""] * len(prompts)
    for choice in reply["choices"]:
        texts[choice["index"]] = choice["text"]
    return texts


async def by_openai(client: openai.AsyncOpenAI, prompts: list[str]) -> list[str]:
    asked = prompts if len(prompts) > 1 else prompts[0]
    reply = await client.completions.create(model=MODEL, prompt=asked, max_tokens=512, temperature=0)
    return [choice.text for choice in sorted(reply.choices, key=lambda choice: choice.index)]


async def session() -> aiohttp.ClientSession:
    return aiohttp.ClientSession()


def measure(server: Instant, runner: asyncio.Runner, size: int, rows: int, repeats: int) -> list[dict[str, object]]:
    http = runner.run(session())
    client = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none")
    df = abstracts(rows)
    with sk.connect(server, batch=sk.BatchPolicy(max_size=size, max_in_flight=IN_FLIGHT)) as pool:
        scatter = partial(sk.scatter, df, TEMPLATE, pool=pool, temperature=0)
        found = alternate(
            {
                "aiohttp + orjson": lambda: cpu_us(
                    partial(Bare(runner, size, partial(by_aiohttp, http, server.url)), df), rows
                ),
                "swarmkit, batch": lambda: cpu_us(partial(scatter, delivery="batch"), rows),
                "swarmkit, rows": lambda: cpu_us(partial(scatter, delivery="rows"), rows),
                "AsyncOpenAI": lambda: cpu_us(partial(Bare(runner, size, partial(by_openai, client)), df), rows),
            },
            repeats,
        )
    runner.run(http.close())
    runner.run(client.close())
    bare = found["aiohttp + orjson"]
    return [
        {"batch": size, "way": way, **spread(values, bare, "us a prompt", "times bare")}
        for way, values in found.items()
    ]


def one_token(server: Instant, rows: int, repeats: int) -> list[dict[str, object]]:
    """CPU a prompt for answers of one token: in both deliveries, and as swarmkit chooses delivery and size."""
    df = abstracts(rows)
    sizes = {"": sk.BatchPolicy(max_in_flight=IN_FLIGHT), _SIZED: sk.BatchPolicy("auto", max_in_flight=IN_FLIGHT)}
    with contextlib.ExitStack() as stack:
        pools = {name: stack.enter_context(sk.connect(server, batch=batch)) for name, batch in sizes.items()}

        def cpu(delivery: str, size: str) -> float:
            options = {"temperature": 0, "max_tokens": 1, "delivery": delivery}
            return cpu_us(partial(sk.scatter, df, TEMPLATE, pool=pools[size], **options), rows)

        ways = [("rows", ""), ("batch", ""), ("auto", ""), ("auto", _SIZED)]
        found = alternate({delivery + size: partial(cpu, delivery, size) for delivery, size in ways}, repeats)
    return [
        {"delivery": way, **spread(values, found["rows"], "us a prompt", "times rows")} for way, values in found.items()
    ]


def http_alone(server: Instant, runner: asyncio.Runner, requests: int, repeats: int) -> list[dict[str, object]]:
    """CPU a request of 100 prompts, from bytes to bytes; the clients of openai as they come, without retries."""
    df = abstracts(100)
    prompts = [f"Summarise what is known of {g}: {a}" for g, a in zip(df["gene"], df["abstract"], strict=True)]
    body = orjson.dumps({"model": MODEL, "prompt": prompts, "max_tokens": 512, "temperature": 0})
    path, endpoint, ours = "/v1/completions", server.endpoints[0], Transport()
    clients = {
        "AsyncOpenAI, DefaultAioHttpClient": openai.DefaultAioHttpClient(),
        "AsyncOpenAI": openai.DefaultAsyncHttpxClient(),
    }
    theirs = {
        way: openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, http_client=http)
        for way, http in clients.items()
    }

    async def by(client: openai.AsyncOpenAI) -> bytes:
        return (await client.post(server.url + path, cast_to=httpx2.Response, content=body)).content

    async def turn(ask: Callable[[], Awaitable[bytes]]) -> float:
        began = process_time()
        for _ in range(requests):
            assert await ask()
        return (process_time() - began) / requests * 1e6

    ways = {"swarmkit": partial(ours.post, endpoint, path, body), **{w: partial(by, c) for w, c in theirs.items()}}
    found = alternate({way: lambda ask=ask: runner.run(turn(ask)) for way, ask in ways.items()}, repeats)
    for client in (ours.aclose, *(c.close for c in theirs.values())):
        runner.run(client())
    base = found["AsyncOpenAI, DefaultAioHttpClient"]
    return [
        {"way": way, **spread(values, base, "us a request", "times DefaultAioHttpClient")}
        for way, values in found.items()
    ]


def main() -> int:
    args = arguments(__doc__)
    sizes = {10: 100} if args.quick else SIZES
    repeats = 1 if args.quick else 5
    judged = min(100, max(sizes))  # its turns are short, and the machine is never calm for long
    with Instant() as server, asyncio.Runner() as runner:
        turns = {size: 3 * repeats if size == judged and not args.quick else repeats for size in sizes}
        rows = [row for size, n in sizes.items() for row in measure(server, runner, size, n, turns[size])]
        short = pd.DataFrame(one_token(server, 100 if args.quick else 20_000, repeats))
        http = pd.DataFrame(http_alone(server, runner, 3 if args.quick else REQUESTS, 1 if args.quick else 41))
    table = pd.DataFrame(rows)
    of_bare = table[table["batch"] == judged].set_index("way")["times bare"]
    budgets = [
        Budget(f"CPU of {way}, times the bare loop", float(of_bare[way]), bound) for way, bound in BUDGETS.items()
    ]
    of_aiohttp = float(http.set_index("way")["times DefaultAioHttpClient"]["swarmkit"])
    budgets.append(Budget("CPU of HTTP, times that of DefaultAioHttpClient", of_aiohttp, HTTP_BUDGET))
    of_rows = float(short.set_index("delivery")["times rows"]["auto" + _SIZED])
    budgets.append(Budget("CPU of one-token answers, delivery and max_size auto, times rows", of_rows, SHORT_BUDGET))
    tables = {"Client CPU per prompt": table, "The same for answers of one token": short}
    return report(args, {**tables, "CPU of the HTTP of 100 prompts": http}, budgets)


if __name__ == "__main__":
    sys.exit(main())
