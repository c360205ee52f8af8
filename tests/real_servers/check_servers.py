"""What works at which server: the table of docs/servers.md, each row measured on the real thing.

Run by ``pytest -n0 -s tests/real_servers/check_servers.py`` after ``python tests/real_vllm/serve.py setup`` and
``python tests/real_servers/programs.py setup``, with nginx, haproxy, squid and sshd installed. It starts its own
servers, each once.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import programs
import pytest
import serve
from gateways import Institute, Strict
from test_ways import PASSWORD, Login, login, squid  # noqa: F401 - fixtures

import swarmkit as sk

TABLE = Path(__file__).parents[2] / "docs" / "servers.md"
TEXTS = [f"{'lac' * i}: what does this gene do? Say {i}." for i in range(1, 13)]
SYSTEM = "You are a botanist. Answer in one word."
OPTIONS: dict[str, Any] = {"temperature": 0, "max_tokens": 8}
RUN = pd.DataFrame({"prompt": [f"Row {i}: say something." for i in range(400)]})

pytestmark = [pytest.mark.timeout(600), pytest.mark.filterwarnings("ignore::swarmkit.SwarmWarning")]


@dataclass
class Target:
    """A server as its users have it, and how it is put out of action for a moment."""

    url: str
    outage: Callable[[], None]
    key: str | Callable[[], str] | None = None
    model: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    fields: dict[str, Any] = field(default_factory=dict)
    """``options`` of the verbs, and what stands for them in a plain request."""

    ways: dict[str, Any] = field(default_factory=dict)
    """Settings that lead to it."""
    rows: int = 400
    """Of the run that is in the middle of its work when the server is put out of action."""
    completes: bool = False
    """It has no chats: a plain request is a completion."""

    def connect(self, **settings: Any) -> sk.VLLMPool:
        return sk.connect(self.url, **{"api_key": self.key, **self.ways, **settings})

    def plain(self, text: str, system: str | None = None) -> str:
        """What the server gives, asked as curl would."""
        turns = [{"role": "system", "content": system}] if system else []
        asks = {"prompt": text} if self.completes else {"messages": [*turns, {"role": "user", "content": text}]}
        limit = {"max_completion_tokens": 8, "temperature": 0} if callable(self.key) and not self.completes else OPTIONS
        body = {"model": self.model, **asks, **limit, **self.fields}
        path = "/v1/completions" if self.completes else "/v1/chat/completions"
        for _ in range(20):  # of a balancer with a dead server behind it, or with a key that expires
            key = self.key() if callable(self.key) else self.key
            headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
            request = urllib.request.Request(self.url + path, json.dumps(body).encode(), headers)
            with contextlib.suppress(urllib.error.HTTPError), urllib.request.urlopen(request, timeout=60) as reply:
                choice = json.load(reply)["choices"][0]
                said: str = choice["text"] if self.completes else choice["message"]["content"]
                return said
        raise AssertionError(f"{self.url} does not answer")


# ---- the servers ------------------------------


@pytest.fixture(scope="module")
def vllm() -> Iterator[serve.Server]:
    """A vLLM as it starts by itself."""
    with programs.vllm() as served:
        yield served


def pause(served: serve.Server) -> Callable[[], None]:
    def outage() -> None:
        os.killpg(served.pid, signal.SIGSTOP)
        time.sleep(2.0)
        os.killpg(served.pid, signal.SIGCONT)

    return outage


def restart(program: programs.Program) -> Callable[[], None]:
    def outage() -> None:
        program.stop()
        time.sleep(2.0)
        program.start()

    return outage


@pytest.fixture
def plain_vllm(vllm: serve.Server) -> Target:
    return Target(vllm.url, pause(vllm), model=vllm.model)


@pytest.fixture
def behind_haproxy(vllm: serve.Server, tmp_path: Path) -> Iterator[Target]:
    with programs.haproxy(tmp_path, int(vllm.url.rpartition(":")[2])) as proxy:
        yield Target(proxy.url, restart(proxy), model=vllm.model)


@pytest.fixture
def behind_litellm(vllm: serve.Server, tmp_path: Path) -> Iterator[Target]:
    with programs.litellm(tmp_path, vllm.url, vllm.model) as proxy:
        yield Target(proxy.url, restart(proxy), programs.KEY, vllm.model)


@pytest.fixture
def behind_nginx(tmp_path: Path) -> Iterator[Target]:
    """vLLM with a key, a reasoning parser and a template with a switch, behind nginx."""
    template = tmp_path / "switch.jinja"
    template.write_text(programs.SWITCHED_TEMPLATE)
    flags = ["--reasoning-parser", "qwen3", "--chat-template", str(template), "--api-key", programs.KEY]
    with programs.vllm(*flags) as served, programs.nginx(tmp_path, int(served.url.rpartition(":")[2])) as proxy:
        switch = {"chat_template_kwargs": {"enable_thinking": False}}
        yield Target(f"{proxy.url}/gpu/7b", restart(proxy), programs.KEY, served.model, {"thinking": False}, switch)


@pytest.fixture
def llama_server(tmp_path: Path) -> Iterator[Target]:
    with programs.llama(tmp_path) as served:
        yield Target(served.url, restart(served), model="smollm2", rows=60)


@pytest.fixture
def behind_squid(vllm: serve.Server, squid: str) -> Target:  # noqa: F811 - the fixture
    proxy = {"proxy": f"http://me:{PASSWORD}@{squid}"}
    return Target(vllm.url, pause(vllm), model=vllm.model, ways=proxy)


@pytest.fixture
def behind_sshd(vllm: serve.Server, login: Login) -> Target:  # noqa: F811 - the fixture
    return Target(vllm.url, login.cut, model=vllm.model, ways={"via": "ssh:login"})


@pytest.fixture
def strict() -> Iterator[Target]:
    with Strict(requests=200, minute_s=1.0, key_requests=150, delay_s=0.01) as gateway:
        yield Target(gateway.url, lambda: None, gateway.key, gateway.model)


@pytest.fixture
def institute() -> Iterator[Target]:
    with Institute(requests=30, minute_s=1.0, key_requests=25, delay_s=0.05) as gateway:
        ways = {"model": gateway.model}
        yield Target(gateway.url, lambda: None, gateway.key, gateway.model, ways=ways, completes=True)


# ---- what is found ------------------------------


def measured(target: Target) -> dict[str, str]:
    """A row of the table."""
    found = {}
    df = pd.DataFrame({"prompt": TEXTS})
    options = OPTIONS | target.options
    with target.connect():
        answers = df.swarm.scatter("prompt", **options)
        stats = sk.last_run().stats
        print(f"\n{target.url}: {stats.routes}, sizes {dict(stats.batch_sizes)}")
        route, many = next(iter(stats.routes)), max(stats.batch_sizes) > 1
        kinds = {"completions": "lists of prompts", "chat-batch": "batch chat"}
        found["batched by"] = kinds[re.split(r"[ ,]", route)[0]] if many else "one chat a request"
        found["rows"] = "as they finish" if "rows as they finish" in route else "with their request"
        assert answers["response"].to_list() == [target.plain(text) for text in TEXTS]
        single = df.swarm.scatter("prompt", mode="single", **options)
        assert single["response"].to_list() == answers["response"].to_list()
        try:
            guided = df.swarm.scatter("prompt", system=SYSTEM, **options)
            assert guided["response"].to_list() == [target.plain(text, SYSTEM) for text in TEXTS]
            found["system"] = "yes"
        except sk.SettingError as refusal:
            print(refusal)
            found["system"] = "no"
        try:
            samples = df.swarm.scatter("prompt", n=2, **{**options, "temperature": 1.0})
            assert samples["response"].notna().all()
            assert samples.index.to_list() == [i for i in range(len(TEXTS)) for _ in range(2)]
            found["n"] = "yes"
        except sk.SettingError as refusal:
            print(refusal)
            found["n"] = "no"
        root = df.swarm.tree_reduce("prompt", "Merge:\n{responses}", fanin=4, **options)
        assert root["response"].notna().all()
        found["tree_reduce"] = "yes"
        run = RUN[: target.rows].swarm.submit("prompt", progress=False, **{**options, "max_tokens": 32})
        began = time.monotonic()
        while time.monotonic() - began < 1.0 and run.stats.answered < target.rows // 20 and not run.done():
            time.sleep(0.01)
        assert not run.done(), "the outage is to come in the middle of the run"
        target.outage()
        whole = run.result()
        assert whole["response"].notna().all(), whole["response_error"].dropna().unique()
        found["outage"] = "no row lost"
    found["key"] = "none"
    if target.key:
        with pytest.raises(sk.NoEndpointsError, match="key"):
            target.connect(api_key="sk-not-the-one")
        found["key"] = "checked"
    return found


def documented(name: str) -> dict[str, str]:
    """The row of the documentation's table."""
    lines = [line for line in TABLE.read_text().splitlines() if line.startswith("|")]
    head, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    (row,) = [row for row in rows if row[0] == name]
    return dict(zip(head[1:], row[1:], strict=True))


@pytest.mark.parametrize(
    ("fixture", "name"),
    [
        ("strict", "OpenAI-like gateway: chats alone, no other field (scripted)"),
        ("institute", "FIRST-like gateway: no chats, no listing, no other field (scripted)"),
        ("plain_vllm", "vLLM"),
        ("behind_sshd", "vLLM behind a login node (sshd)"),
        ("behind_squid", "vLLM behind a proxy (squid)"),
        ("behind_haproxy", "HAProxy over two vLLMs, one of them dead"),
        ("behind_litellm", "LiteLLM proxy over vLLM"),
        ("llama_server", "llama-server"),
        ("behind_nginx", "vLLM with a key, a reasoning parser and a template with a switch, behind nginx"),
    ],
)
def test_the_table_says_what_the_server_does(fixture: str, name: str, request: pytest.FixtureRequest) -> None:
    found = measured(request.getfixturevalue(fixture))
    print(f"| {name} | {' | '.join(found.values())} |")
    assert found == documented(name)
