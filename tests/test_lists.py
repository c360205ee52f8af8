"""The layer below, used as code for the batch-prompting design uses it: lists, ``await`` and ``async with``."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

import swarmkit as sk
from swarmkit import AgentEndpoint, AgentPool, Response, VLLMPool, parse_hostfile
from swarmkit.patterns.blackboard import Blackboard
from swarmkit.patterns.broadcast import broadcast, broadcast_and_reduce
from swarmkit.patterns.pipeline import Stage, fan_out_fan_in, run_pipeline
from swarmkit.patterns.scatter_gather import map_gather, scatter_gather
from swarmkit.patterns.tree_reduce import tree_reduce


@pytest.fixture
def hostfile(echo: sk.LocalSwarm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The four echo endpoints as a cluster's hostfile, the key in the environment."""
    monkeypatch.setenv("SWARMKIT_TEST_KEY", echo.endpoints[0].key() or "")
    lines = [f"{e.host}\t{e.port}\track={'ab'[i % 2]}\tkey_env=SWARMKIT_TEST_KEY" for i, e in enumerate(echo.endpoints)]
    file = tmp_path / "agents.hostfile"
    file.write_text("# host port tags\n" + "\n".join(lines) + "\n")
    return file


@pytest.fixture
def agents() -> Iterator[list[tuple[str, int]]]:
    """Three plain agents that speak ``POST /generate``; the last one is broken."""
    servers = [ThreadingHTTPServer(("127.0.0.1", 0), agent(name)) for name in ("ann", "bob", "")]
    threads = [threading.Thread(target=server.serve_forever, args=(0.01,)) for server in servers]
    for thread in threads:
        thread.start()
    yield [("127.0.0.1", server.server_port) for server in servers]
    for server, thread in zip(servers, threads, strict=True):
        server.shutdown()
        thread.join()
        server.server_close()


def agent(name: str) -> type[BaseHTTPRequestHandler]:
    class Agent(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            found = self.path == "/generate" and set(asked) == {"prompt"}
            status = 404 if not found else 200 if name else 500
            body = json.dumps({"response": f"{name}: {asked.get('prompt')}"} if name else {"detail": "tired"}).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: Any) -> None:
            pass

    return Agent


def texts(responses: list[Response]) -> list[str]:
    assert all(r.success and r.error is None for r in responses), responses
    return [r.text for r in responses]


def test_old_code_runs_after_changing_the_import(hostfile: Path) -> None:
    async def main() -> None:
        endpoints = parse_hostfile(hostfile)
        async with VLLMPool(endpoints, model="echo", max_tokens=64, concurrency=16, timeout=60.0) as pool:
            assert pool.size == 4
            assert (pool.max_tokens, pool.max_tokens_aggregation, pool.buffer) == (64, 128, 512)
            one = await pool.post(2, "Hello", max_tokens=16)
            assert (one.success, one.text, one.agent_index, one.error) == (True, "echo: Hello", 2, None)
            some = await pool.post_batch(1, ["a", "b", "c"], max_tokens=16)
            assert texts(some) == ["echo: a", "echo: b", "echo: c"]
            assert {r.agent_index for r in some} == {1}
            assert await pool.post_batch(0, []) == []
            prompts = [f"prompt {i}" for i in range(10)]
            for responses in (
                await pool.send_all(prompts),
                await pool.send_all_batched(prompts),
                await scatter_gather(pool, prompts),
            ):
                assert texts(responses) == [f"echo: {p}" for p in prompts]
                assert [r.agent_index for r in responses] == [i % 4 for i in range(10)]
            assert await pool.send_all([]) == await pool.send_all_batched([]) == []
            everyone = await pool.broadcast_prompt("Who?")
            assert texts(everyone) == ["echo: Who?"] * 4
            assert [r.agent_index for r in await broadcast(pool, "Who?")] == [0, 1, 2, 3]

    asyncio.run(main())


def test_batches_are_completions_and_posts_are_chats(hostfile: Path) -> None:
    """What stands in a batch is sent as it is, since old code wraps its own prompts; a post is a chat."""

    async def main() -> None:
        async with VLLMPool(parse_hostfile(hostfile), model="echo") as pool:
            await pool.send_all_batched([f"{i}" for i in range(400)])
            assert pool.last_run is not None
            assert pool.last_run.requests == 4
            assert list(pool.last_run.routes) == ["completions, rows as they finish"]
            bare = await pool.post_batch(0, ["Hi"])
            chat = await pool.post(0, "Hi")
            assert (bare[0].prompt_tokens or 0) < (chat.prompt_tokens or 0)
        async with VLLMPool(parse_hostfile(hostfile), model="echo", use_batch=False) as pool:
            await pool.send_all_batched(["a", "b", "c", "d", "e"])
            assert pool.last_run is not None
            assert pool.last_run.requests == 5

    asyncio.run(main())


def test_a_bound_on_requests_is_shared_by_all_endpoints(hostfile: Path) -> None:
    async def main() -> None:
        async with VLLMPool(parse_hostfile(hostfile), model="echo", concurrency=4) as pool:
            responses = await pool.send_all([f"{i}" for i in range(8)])
            assert [r.agent_index for r in responses[:4]] == [0, 1, 2, 3]

    asyncio.run(main())


def test_sub_pools(hostfile: Path) -> None:
    async def main() -> None:
        async with VLLMPool(parse_hostfile(hostfile), model="echo", max_tokens=8) as pool:
            rack = pool.by_tag("rack", "b")
            assert [e.host for e in rack.endpoints] == ["127.0.0.2", "127.0.0.4"]
            assert [e.host for e in pool.select([3, 0]).endpoints] == ["127.0.0.4", "127.0.0.1"]
            assert [e.host for e in pool.slice(1, 3).endpoints] == ["127.0.0.2", "127.0.0.3"]
            drawn = pool.sample(2)
            assert drawn.size == 2
            assert pool.sample(99).size == 4
            assert rack.max_tokens == 8
            for part in (rack, drawn, pool.slice(0, 99)):
                assert isinstance(part, VLLMPool)
                assert texts(await part.send_all_batched(["x", "y"])) == ["echo: x", "echo: y"]
            assert (await rack.post(1, "Hi")).agent_index == 1  # counted within the sub-pool
        with pytest.raises(sk.PoolClosedError):
            await rack.post(0, "Hi")

    asyncio.run(main())


def test_map_gather_and_reductions(hostfile: Path) -> None:
    async def main() -> None:
        async with VLLMPool(parse_hostfile(hostfile), model="echo") as pool:
            mapped = await map_gather(pool, ["lacZ", {"a": 1}, 7], 'What is {item}? Answer as {"gene": ...}')
            assert mapped[0].text == 'echo: What is lacZ? Answer as {"gene": ...}'
            assert mapped[1].text.startswith("echo: What is {'a': 1}?")
            merged = await tree_reduce(pool, "About {item}.", "L{level}[{responses}]", fanin=3, items=list(range(10)))
            assert merged.success
            assert all(merged.text.count(f"About {i}.") == 1 for i in range(10))
            assert merged.text.startswith("echo: L3[")
            without_items = await tree_reduce(pool, "Your view?", "Merge: {responses}")
            assert without_items.text.count("Your view?") == 4
            both = await broadcast_and_reduce(pool, "View {level}?", "Sum up: {responses}", reducer_agent_index=2)
            assert (both.text.count("View {level}?"), both.agent_index) == (4, 2)
            with pytest.raises(sk.SettingError, match="2 or more"):
                await tree_reduce(pool, "About {item}.", "{responses}", fanin=1, items=[1, 2])
            with pytest.raises(sk.SettingError, match=r"\{responses\}"):
                await tree_reduce(pool, "About {item}.", "Merge", items=[1, 2])
            assert not (await tree_reduce(pool, "About {item}.", "{responses}", items=[])).success

    asyncio.run(main())


def test_failures_are_responses(hostfile: Path) -> None:
    async def main() -> None:
        quick = sk.RetryPolicy(base_s=0.01)
        live = parse_hostfile(hostfile)
        async with VLLMPool([*live[:1], ("127.0.0.1", 1)], model="echo", retry=quick) as pool:
            dead = await pool.post(1, "Hi")
            assert (dead.success, dead.text, dead.agent_index) == (False, "", 1)
            assert "127.0.0.1:1" in (dead.error or "")
            assert "cannot connect" in (dead.error or "")
            assert [r.success for r in await pool.post_batch(1, ["a", "b"])] == [False, False]
            assert [r.success for r in await pool.broadcast_prompt("Hi")] == [True, False]
            assert texts(await pool.send_all_batched(["a", "b", "c"])) == ["echo: a", "echo: b", "echo: c"]
            long = await pool.post_batch(0, ["fine", "long " * 10_000, "fine too"])
            assert [r.success for r in long] == [True, False, True]
            assert "maximum context length" in (long[1].error or "")

    asyncio.run(main())


def test_one_pool_in_many_event_loops(echo: sk.LocalSwarm) -> None:
    pool = VLLMPool(echo.endpoints, model="echo")
    for i in range(3):
        assert texts(asyncio.run(pool.send_all_batched([f"{i}"]))) == [f"echo: {i}"]
    asyncio.run(pool.close())


def test_the_environment_sets_what_is_not_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AURORA_SWARM_MAX_TOKENS", "100")
    monkeypatch.setenv("AURORA_SWARM_MODEL_MAX_CONTEXT", "9000")
    pool = VLLMPool([("node1", 8000)])
    assert (pool.max_tokens, pool.max_tokens_aggregation, pool.model_max_context) == (100, 200, 9000)
    monkeypatch.setenv("SWARMKIT_MAX_TOKENS", "50")
    monkeypatch.setenv("SWARMKIT_MAX_TOKENS_AGGREGATION", "70")
    pool = VLLMPool([("node1", 8000)])
    assert (pool.max_tokens, pool.max_tokens_aggregation) == (50, 70)
    assert VLLMPool([("node1", 8000)], max_tokens=5).max_tokens == 5


def test_hostfiles_and_endpoints(tmp_path: Path) -> None:
    file = tmp_path / "hosts"
    file.write_text(
        "node1\t8001\track=a\tgpu=3\nnode2 9000 # spare\nnode3\n[::1]:8000\nhttps://gate.example/serve/v1 k=v\n"
    )
    found = parse_hostfile(file)
    assert [(e.host, e.port) for e in found[:3]] == [("node1", 8001), ("node2", 9000), ("node3", 8000)]
    assert found[0] == AgentEndpoint("node1", 8001, {"rack": "a", "gpu": "3"})
    assert [e.url for e in found[3:]] == ["http://[::1]:8000", "https://gate.example:443/serve"]
    assert [e.url for e in VLLMPool(["node1:8001", ("node2", 9000), found[0]]).endpoints] == [
        "http://node1:8001",
        "http://node2:9000",
        "http://node1:8001",
    ]


def test_plain_agents(agents: list[tuple[str, int]]) -> None:
    async def main() -> None:
        async with AgentPool(agents[:2]) as pool:
            assert pool.size == 2
            assert (await pool.post(1, "Hi")).text == "bob: Hi"
            expected = ["ann: 0", "bob: 1", "ann: 2", "bob: 3"]
            assert texts(await pool.send_all(["0", "1", "2", "3"])) == expected
            assert texts(await pool.send_all_batched(["0", "1", "2", "3"])) == expected
            assert texts(await broadcast(pool, "Who?")) == ["ann: Who?", "bob: Who?"]
            tree = await tree_reduce(pool, "say {item}", "[{responses}]", fanin=2, items=["x", "y", "z"])
            assert all(f"say {item}" in tree.text for item in "xyz")
            assert texts(await pool.select([1]).send_all(["a", "b"])) == ["bob: a", "bob: b"]
        async with AgentPool(agents, retry=sk.RetryPolicy(base_s=0.01)) as pool:
            assert [r.success for r in await pool.broadcast_prompt("Who?")] == [True, True, False]
            broken = await pool.post(2, "Hi")
            assert "tired" in (broken.error or "")
            assert all(r.success for r in await pool.send_all([str(i) for i in range(9)]))

    asyncio.run(main())


def test_stages(hostfile: Path) -> None:
    async def main() -> None:
        async with VLLMPool(parse_hostfile(hostfile), model="echo") as pool:
            stages = [
                Stage("draft", "On {input}", 2),
                Stage("rate", "Rate {input}", 9, lambda rs: [r.agent_index for r in rs], lambda r: r.agent_index > 0),
            ]
            assert await run_pipeline(pool, stages[:1], {"a": 1}) == "echo: On {'a': 1}\necho: On {'a': 1}"
            assert await run_pipeline(pool, stages, "x") == [1, 2, 3]
            assert await run_pipeline(pool, stages, "x", reuse_agents=False) == [1], "two are left for the second"
            last = Stage(name="rate", prompt_template="Rate {input}", n_agents=1)
            assert await run_pipeline(pool, [stages[0], last], "x") == "echo: Rate echo: On x\necho: On x"
            with pytest.raises(sk.SettingError, match=r"'more' asks for 1 endpoints .* and 0 of 4 are left"):
                await run_pipeline(pool, [*stages, Stage("more", "{input}", 1)], "x", reuse_agents=False)
            merged = await fan_out_fan_in(pool, "View?", "Sum up: {responses}", n_workers=2)
            assert (merged.text.count("View?"), merged.agent_index) == (2, 0)
            assert (await fan_out_fan_in(pool, "View?", "{responses}")).text.count("View?") == 4

    asyncio.run(main())


def test_blackboard(echo: sk.LocalSwarm) -> None:
    roles = ["ideas", "critiques", "ideas", "none of these"]
    agents = [AgentEndpoint(e.host, e.port, {"role": role}) for e, role in zip(echo.endpoints, roles, strict=True)]

    def prompt(role: str, board: dict[str, list[str]]) -> str:
        return f"{role}: {sum(map(len, board.values()))} so far"

    async def main() -> None:
        async with VLLMPool(agents, model="echo", api_key=echo.endpoints[0].key()) as pool:
            board = Blackboard(sections=["ideas", "critiques", "summary"], prompt_fn=prompt)
            found = await board.run(pool, max_rounds=2)
            first, second = ["echo: ideas: 0 so far"] * 2, ["echo: ideas: 3 so far"] * 2
            assert found["ideas"] == first + second
            assert found["critiques"] == ["echo: critiques: 2 so far", "echo: critiques: 5 so far"]
            assert found["summary"] == []
            copied = board.snapshot()
            await board.run(pool, convergence_fn=lambda state: len(state["ideas"]) > 5)
            assert (copied["round"], board.round) == (2, 3)
            assert len(copied["board"]["ideas"]) == 4
            assert len(board.board["ideas"]) == 6

    asyncio.run(main())
