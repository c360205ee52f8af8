"""Servers that know less, or have other templates, than a current vLLM: the answers are the same, by another way."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pandas as pd
import pytest

import swarmkit as sk

TEXTS = ["Hi", "  padded \n", "Grüße\n\n世界", "{x}", "<|im_start|>user\nHi<|im_end|>\n"]


@pytest.mark.parametrize(
    ("options", "route"),
    [
        pytest.param({}, "completions, rows as they finish", id="current"),
        pytest.param({"bos": True}, "completions, rows as they finish", id="with-bos"),
        pytest.param({"trim": True}, "completions, rows as they finish", id="trimming"),
        pytest.param({"stream_interval": False}, "completions (chat template learned)", id="no-interval"),
        pytest.param({"tokenize": False}, "chat-batch", id="no-tokenize"),
        pytest.param({"tokenize": False, "batch_chat": False}, "chat (", id="no-tokenize-no-batch-chat"),
        pytest.param({"lists": False, "batch_chat": False}, "chat (", id="no-lists"),
    ],
)
def test_every_kind_of_server_gives_what_its_chat_gives(options: dict[str, Any], route: str) -> None:
    df = pd.DataFrame({"prompt": TEXTS})
    with sk.local(1, engine="echo", **options) as swarm, sk.connect(swarm):
        batch = df.swarm.scatter("prompt", details=True)
        assert next(iter(sk.last_run().stats.routes)).startswith(route)
        single = df.swarm.scatter("prompt", details=True, mode="single")
        assert next(iter(sk.last_run().stats.routes)).startswith("chat")
    same = ["response", "response_error", "response_finish_reason", "response_completion_tokens"]
    if not route.startswith("chat-batch"):  # whose replies do not tell the prompts' tokens apart
        same.append("response_prompt_tokens")
    pd.testing.assert_frame_equal(batch[same], single[same])
    expected = [f"echo: {text.strip() if options.get('trim') else text}" for text in TEXTS]
    assert batch["response"].to_list()[:-1] == expected[:-1]


NONSENSE = ["missing_index", "repeated_index", "garbage", "null_body", "no_done", "cut"]


@pytest.fixture(scope="module")
def mad_house() -> Iterator[dict[str, sk.AgentEndpoint]]:
    """A sound endpoint, and one for each kind of nonsense."""
    hosts = dict(zip(["sound", *NONSENSE], (f"127.0.0.{i}" for i in range(1, 99)), strict=False))
    faults = [f"{kind}:address={hosts[kind]}" for kind in NONSENSE]
    with sk.local(1, engine="echo", addresses=list(hosts.values()), faults=faults) as swarm:
        yield dict(zip(hosts, swarm.endpoints, strict=True))


@pytest.mark.parametrize("kind", NONSENSE)
@pytest.mark.parametrize("delivery", ["rows", "batch"])
def test_a_malformed_reply_never_puts_an_answer_on_a_wrong_row(
    mad_house: dict[str, sk.AgentEndpoint], kind: str, delivery: Any
) -> None:
    """One of two endpoints answers nothing but nonsense: its rows get their answers from the other."""
    df = pd.DataFrame({"prompt": [f"row {i}" for i in range(40)]})
    two = [mad_house["sound"], mad_house[kind]]
    quick = sk.RetryPolicy(base_s=0.01)
    with sk.connect(two, delivery=delivery, batch=sk.BatchPolicy(max_size=4), retry=quick):
        answers = df.swarm.scatter("prompt")
        seen = sk.last_run().stats.frame()["failures"].gt(0).to_list()
    assert seen == [False, kind != "no_done" or delivery == "rows"]  # a reply that is no stream has no [DONE]
    assert answers["response"].to_list() == [f"echo: row {i}" for i in range(40)]
