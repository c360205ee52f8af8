"""gpt-oss as vLLM serves it: chats are rendered as Harmony, ``/tokenize`` otherwise, completions not at all."""

from __future__ import annotations

import json
from typing import Any

import pandas as pd
import pytest
from scripted import Call, Scripted

import swarmkit as sk

FRAME = pd.DataFrame({"q": [f"question {i}" for i in range(30)]})
CARD = {"id": "gpt-oss", "owned_by": "vllm", "max_model_len": 4096}


def jinja(chat: list[dict[str, str]], effort: str) -> str:
    turns = "".join(f"<|start|>{turn['role']}<|message|>{turn['content']}<|end|>" for turn in chat)
    return f"<|start|>system<|message|>Reasoning: {effort}<|end|>{turns}<|start|>assistant"


def harmony(chat: list[dict[str, str]], effort: str) -> str:
    return jinja(chat, f"{effort}\n\n# Valid channels: analysis, commentary, final.")


def ids(text: str) -> list[int]:
    return [*map(ord, text)]


def written(question: str, effort: str) -> tuple[str, str]:
    return f"We answer {question} with {effort} effort.", f"answer to {question}"


class Harmony:
    """A token is a character. ``told``: chats tell the ids of their prompts; ``batch``: there is a batch chat route."""

    def __init__(self, told: bool, batch: bool) -> None:
        self.told = told
        self.batch = batch
        self.efforts: set[str] = set()

    def __call__(self, call: Call) -> None:
        path, body = call.headers.split(" ")[1], call.body
        if path == "/v1/models":
            self.say(call, {"data": [CARD]})
        elif path == "/tokenize":
            effort = body.get("chat_template_kwargs", {}).get("reasoning_effort", "medium")
            self.say(call, {"tokens": ids(jinja(body["messages"], effort) if "messages" in body else body["prompt"])})
        elif path == "/detokenize":
            self.say(call, {"prompt": "".join(map(chr, body["tokens"]))})
        elif path == "/v1/completions":
            call.prompts = ["analysis" + "assistantfinal".join(written(p, "medium")) for p in call.prompts]
            call.answer()
        elif path == "/v1/chat/completions" or (path.endswith("/batch") and self.batch):
            self.chat(call, body["messages"] if path.endswith("/batch") else [body["messages"]])
        else:
            call.reply(b"{}", status="404 Not Found")

    def chat(self, call: Call, chats: list[list[dict[str, str]]]) -> None:
        effort, room = call.body.get("reasoning_effort", "medium"), call.body["max_tokens"]
        if room > 100:
            self.efforts.add(effort)
        choices = []
        for index, chat in enumerate(chats):
            analysis, final = written(chat[-1]["content"], effort)
            cut = len(analysis + final) > room
            message = {"reasoning": analysis[:room], "content": final[: max(0, room - len(analysis))] or None}
            choices.append({"index": index, "message": message, "finish_reason": "length" if cut else "stop"})
        told = {"prompt_token_ids": ids(harmony(chats[0], effort))} if self.told and len(chats) == 1 else {}
        self.say(call, {"choices": choices, **told, "usage": {"prompt_tokens": 90, "completion_tokens": 9}})

    def say(self, call: Call, value: dict[str, Any]) -> None:
        call.reply(json.dumps(value).encode())


@pytest.mark.parametrize("batch", [True, False])
@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("mode", ["batch", "single"])
def test_thoughts_come_apart_on_the_chat_routes(told: bool, batch: bool, mode: str) -> None:
    with Scripted(Harmony(told, batch)) as server, sk.connect(server.address) as pool:
        answers = FRAME.swarm.scatter("q", pool=pool, details=True, mode=mode)
        route = next(iter(sk.last_run().stats.routes))
    assert answers["response"].tolist() == ("answer to " + FRAME["q"]).tolist()
    thoughts = ("We answer " + FRAME["q"] + " with medium effort.").tolist()
    assert answers["response_reasoning"].tolist() == thoughts
    assert route.startswith("chat-batch" if batch and mode == "batch" else "chat (")


def test_effort_goes_where_harmony_reads_it_and_an_answer_cut_in_its_analysis_says_so() -> None:
    server = Harmony(told=True, batch=True)
    with Scripted(server) as there, sk.connect(there.address) as pool:
        answers = FRAME.swarm.scatter("q", pool=pool, details=True, thinking="low")
        assert server.efforts == {"low"}
        assert answers["response_reasoning"].str.endswith("with low effort.").all()
        assert next(iter(sk.last_run().stats.routes)).startswith("chat-batch")
        with pytest.raises(sk.SettingError, match="has no switch for that"):
            FRAME.swarm.scatter("q", pool=pool, thinking=False)
        with pytest.warns(sk.SwarmWarning, match="30 of 30 rows failed"):
            cut = FRAME.swarm.scatter("q", pool=pool, max_tokens=8)
    assert cut["response"].isna().all()
    assert cut["response_error"].str.contains("ended while still thinking").all()


def test_capabilities_show_why_its_completions_are_not_used() -> None:
    with Scripted(Harmony(told=True, batch=True)) as server, sk.connect(server.address) as pool:
        found = pool.capabilities().set_index("route")
    assert found["used"].to_dict() == {"completions": False, "chat-batch": True, "chat": False}
    assert found["template"]["completions"] == (
        "not learned: /tokenize and the chat route render the same message differently"
    )
    assert found["reasoning"].drop("completions").tolist() == ["apart", "apart"]
    assert found["thinking"]["chat"] == "reasoning_effort"
