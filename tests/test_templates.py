"""Chat templates that keep true: servers that are restarted with other ones, prompts that are read by them, and
llama-server, which tells them as text."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted import Call, Scripted

import swarmkit as sk
from swarmkit.pool.templates import telling_prompts

QUICK = sk.RetryPolicy(base_s=0.02, cap_s=0.2)
FRAME = pd.DataFrame({"q": [f"question {i}" for i in range(40)]})
ANSWERS = ("echo: " + FRAME["q"]).tolist()
SMALL = sk.BatchPolicy(max_size=5, hedge=False)


@dataclass(frozen=True)
class Template:
    """A template, and what it ``reads`` out of the prompt: the prompt without it, and what stands after the suffix."""

    prefix: str
    suffix: str
    reads: Callable[[str], tuple[str, str]] = lambda text: (text, "")

    def render(self, text: str) -> str:
        shown, after = self.reads(text)
        return f"{self.prefix}{shown}{self.suffix}{after}"


def no_think(text: str) -> tuple[str, str]:
    return (text.replace("/no_think", ""), "<quick>") if "/no_think" in text else (text, "")


A, B = Template("<A>user:", "</A>bot:"), Template("<<B>>", "<<answer>>")
TWICE = Template("<C>", "</C>", lambda text: (f"{text}|{text}", ""))
READER = Template("<D>", "</D>", no_think)


@dataclass
class Model:
    """A model that answers nothing but garbage to what is not in its own template. A token is a character."""

    template: Template = A
    batch_chat: bool = True
    before: Callable[[Call], bool] = lambda call: False  # whether a request got something else
    asked: list[tuple[str, dict[str, Any]]] = field(default_factory=list)

    def __call__(self, call: Call) -> None:
        path, body = call.headers.split(" ")[1], call.body
        self.asked.append((path, body))
        if self.before(call):
            return
        if path == "/v1/completions":
            prompts = [body["prompt"]] if isinstance(body["prompt"], str) else body["prompt"]
            call.prompts = [self.said(prompt) for prompt in prompts]
            call.answer()
        elif path == "/v1/chat/completions" or (path.endswith("/batch") and self.batch_chat):
            chats = body["messages"] if path.endswith("/batch") else [body["messages"]]
            self.chat(call, [self.rendered(chat, body) for chat in chats])
        else:
            self.other(call, path, body)

    def other(self, call: Call, path: str, body: dict[str, Any]) -> None:
        if path == "/v1/models":
            say(call, {"data": [{"id": "m", "owned_by": "vllm", "max_model_len": 4096}]})
        elif path == "/tokenize":
            text = self.rendered(body["messages"], body) if "messages" in body else body["prompt"]
            say(call, {"tokens": [*map(ord, text)]})
        elif path == "/detokenize":
            say(call, {"prompt": "".join(map(chr, body["tokens"]))})
        else:
            say(call, {"error": {"message": f"no {path} here"}}, "404 Not Found")

    def rendered(self, chat: list[dict[str, str]], body: dict[str, Any]) -> str:
        given = "".join(f"[{name}={body[name]}]" for name in ("documents", "chat_template") if name in body)
        return given + self.template.render(chat[-1]["content"])

    def chat(self, call: Call, rendered: list[str]) -> None:
        choices = [
            {"index": i, "message": {"content": f"echo: {self.said(text)}"}, "finish_reason": "stop"}
            for i, text in enumerate(rendered)
        ]
        told = {"prompt_token_ids": [*map(ord, rendered[0])]} if call.body.get("return_token_ids") else {}
        say(call, {"choices": choices, **told, "usage": {"prompt_tokens": len("".join(rendered))}})

    def said(self, prompt: str) -> str:
        given, begun, rest = prompt.partition(self.template.prefix)
        shown, ended, after = rest.rpartition(self.template.suffix)
        return given + shown + after if begun and ended else f"GARBAGE for {prompt}"

    def tokenized(self) -> int:
        return Counter(path for path, _ in self.asked)["/tokenize"]


def say(call: Call, value: dict[str, Any] | list[Any], status: str = "200 OK") -> None:
    call.reply(json.dumps(value).encode(), status)


def restart(server: Scripted, template: Template) -> None:
    server.close()
    server.hang_up()
    server.script.template = template  # type: ignore[attr-defined]
    server.open()


@contextlib.contextmanager
def serving(*models: Callable[[Call], None]) -> Iterator[tuple[list[Scripted], sk.VLLMPool]]:
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(Scripted(model)) for model in models]
        urls = [f"http://127.0.0.1:{server.address[1]}" for server in servers]
        yield servers, stack.enter_context(sk.connect(urls, retry=QUICK, batch=SMALL))


def route() -> str:
    return next(iter(sk.last_run().stats.routes))


# ---- servers that come back with another template ------------------------------


def test_a_server_that_was_restarted_between_runs_is_asked_in_its_new_template() -> None:
    with serving(Model()) as (servers, pool):
        assert FRAME.swarm.scatter("q", pool=pool)["response"].tolist() == ANSWERS
        restart(servers[0], B)
        assert FRAME.swarm.scatter("q", pool=pool)["response"].tolist() == ANSWERS
        assert "chat template learned anew" in route()
        assert FRAME.swarm.preview("q", rows=1, pool=pool)["sent"].tolist() == ["<<B>>question 0<<answer>>"]
        assert FRAME.swarm.scatter("q", pool=pool)["response"].tolist() == ANSWERS
        assert "anew" not in route(), "that is news once"


@pytest.mark.parametrize(("other", "how"), [(B, "completions"), (TWICE, "chat-batch")])
def test_one_of_several_that_was_restarted_is_asked_in_its_own_template(other: Template, how: str) -> None:
    with serving(Model(), Model(), Model()) as (servers, pool):
        FRAME.swarm.scatter("q", pool=pool)
        restart(servers[1], other)
        with pytest.warns(sk.SwarmWarning, match="has another chat template than before: its rows are sent by") as said:
            answers = FRAME.swarm.scatter("q", pool=pool)
        stats = sk.last_run().stats
        twice = (answers["response"] == "echo: " + FRAME["q"] + "|" + FRAME["q"]).to_numpy()
        assert ((answers["response"] == ANSWERS) | twice).all()
        assert twice.any() == (other is TWICE)
        assert len(said) == len(stats.notices) == 1
        assert f":{servers[1].address[1]} " in stats.notices[0]
        assert f"sent by {how}" in stats.notices[0]
        FRAME.swarm.scatter("q", pool=pool)
        assert sk.last_run().stats.notices == [], "its plan is right from the start by now"


def test_servers_of_one_kind_with_two_templates_are_told_apart() -> None:
    with serving(Model(), Model(B), Model(), Model(B)) as (servers, pool):
        with pytest.warns(sk.SwarmWarning, match="another chat template"):
            assert FRAME.swarm.scatter("q", pool=pool)["response"].tolist() == ANSWERS
        assert len(sk.last_run().stats.notices) == 2
        learned = [model.tokenized() for model in (server.script for server in servers)]  # type: ignore[attr-defined]
        assert sum(count > 8 for count in learned) <= 2, "one of each kind is asked for all of it"


@pytest.mark.filterwarnings("ignore:.*has another chat template")
def test_a_server_that_comes_into_a_watched_hostfile_is_asked_in_its_own_template(tmp_path: Path) -> None:
    go, path = threading.Event(), tmp_path / "agents.hostfile"

    def held(call: Call) -> bool:
        if call.headers.startswith("POST /v1/completions") and "question" in str(call.body["prompt"]):
            go.wait(60.0)
        return False

    with Scripted(Model(before=held)) as first, Scripted(Model(B)) as second:
        path.write_text(f"127.0.0.1:{first.address[1]}\n")
        with sk.connect(path, watch=True, retry=QUICK, batch=SMALL) as pool:
            run = FRAME.swarm.submit("q", pool=pool, details=True)
            until = time.monotonic() + 60.0
            path.write_text("".join(f"127.0.0.1:{server.address[1]}\n" for server in (first, second)))
            while len(run.stats.endpoints) < 2 or not run.stats.endpoints[1].rows:
                assert time.monotonic() < until
                time.sleep(0.02)
            go.set()
            answers = run.result()
    assert answers["response"].tolist() == ANSWERS
    assert answers["response_endpoint"].nunique() == 2


@pytest.mark.filterwarnings("ignore:.*has another chat template", "ignore:no endpoint answers")
@pytest.mark.parametrize("other", [B, TWICE])
def test_a_server_that_comes_back_in_mid_run_with_another_template(other: Template) -> None:
    """Rows that it answered before stay, and the others are asked in the new one."""
    seen: list[Call] = []
    down = threading.Event()

    def stop_once(call: Call) -> bool:
        if call.headers.startswith("POST /v1/completions") and "question" in str(call.body["prompt"]):
            seen.append(call)
            if len(seen) == 3:
                down.set()
                call.server.close()
                threading.Timer(0.2, come_back, [call.server]).start()
        if down.is_set():  # also on connections that were accepted as it closed
            call.server.hang_up()
        return down.is_set()

    def come_back(server: Scripted) -> None:
        model.template = other  # not before: what it still answers is in the old one
        down.clear()
        server.open()

    model = Model(before=stop_once, batch_chat=False)
    with serving(model) as (_, pool):
        answers = FRAME.swarm.scatter("q", pool=pool)
        stats = sk.last_run().stats
        story = sk.last_run().story()
    twice = answers["response"] == "echo: " + FRAME["q"] + "|" + FRAME["q"]
    assert ((answers["response"] == ANSWERS) | twice).all()
    assert twice.any() == (other is TWICE)
    assert answers["response_error"].isna().all()
    assert len(stats.notices) == 1
    assert "another chat template" in story["what"].tolist()


def test_what_is_learned_and_checked_costs_a_request_an_endpoint_and_run() -> None:
    with serving(Model(), Model()) as (servers, pool):
        FRAME.swarm.scatter("q", pool=pool)
        models = [server.script for server in servers]
        before = sum(model.tokenized() for model in models)  # type: ignore[attr-defined]
        FRAME.swarm.scatter("q", pool=pool)
        after = sum(model.tokenized() for model in models)  # type: ignore[attr-defined]
    assert after - before <= 2 + 1 + 2 * 2, "one at each, one and those of two prompts for the family"


@pytest.mark.parametrize("status", ["500 Internal Server Error", "503 Service Unavailable"])
def test_rows_do_not_wait_for_checks_that_cannot_be_made(status: str) -> None:
    fails = False

    def fail(call: Call) -> bool:
        if fails and call.headers.startswith("POST /tokenize"):
            say(call, {"error": {"message": "the engine is busy"}}, status)
            return True
        return False

    with serving(Model(before=fail)) as (_, pool):
        FRAME.swarm.scatter("q", pool=pool)
        fails = True
        assert FRAME[:4].swarm.scatter("q", pool=pool)["response"].tolist() == ANSWERS[:4]


def test_one_refusal_by_chance_is_no_other_template() -> None:
    left = [0]

    def refuse(call: Call) -> bool:
        if left[0] and call.headers.startswith("POST /tokenize"):
            left[0] -= 1
            say(call, {"error": {"message": "not now"}}, "404 Not Found")
            return True
        return False

    with serving(Model(before=refuse)) as (_, pool):
        for times in (0, 1, 2):
            left[0] = times
            assert FRAME.swarm.scatter("q", pool=pool)["response"].tolist() == ANSWERS
            assert route().startswith("completions")
            assert not sk.last_run().stats.notices


# ---- prompts that a template reads ------------------------------


def test_a_template_that_reads_the_prompt_is_left_to_the_chat_routes() -> None:
    asked = FRAME.assign(q=FRAME["q"].where(FRAME.index != 11, FRAME["q"] + " /no_think"))
    with serving(Model(READER)) as (_, pool):
        assert FRAME.swarm.scatter("q", pool=pool)["response"].tolist() == ANSWERS
        assert route().startswith("completions")
        batch, single = (
            asked.swarm.scatter("q", pool=pool, mode=mode)["response"].tolist() for mode in ("batch", "single")
        )
        assert batch == single
        assert batch[11] == "echo: question 11 <quick>"
        asked.swarm.scatter("q", pool=pool)
        assert route().startswith("chat-batch (")
        assert "does more than stand around prompts with /no_think" in route()


def late(*numbers: int) -> Callable[[Call], bool]:
    """Prompts with these numbers are answered later than the others, each a little later than that before."""

    def wait(call: Call) -> bool:
        texts = " ".join(call.prompts) if call.headers.startswith("POST /v1/completions") else ""
        if "Of " in texts:
            time.sleep(max((0.4 * place for place, n in enumerate(numbers, 1) if f"question {n}<" in texts), default=0))
        return False

    return wait


@pytest.mark.parametrize("odd", ["/no_think", "and think>"])
def test_rows_that_come_to_a_step_later_have_the_route_that_suits_them(odd: str) -> None:
    reader = Template("<D>", "</D>", lambda text: (text.replace(odd, ""), "<quick>") if odd in text else (text, ""))
    frame = FRAME.assign(more=["please", *[odd if i == 30 else "please" for i in range(1, 40)]])
    steps = [sk.Step("one", "Of {q}"), sk.Step("two", "{one}, {more}.")]
    with serving(Model(reader, before=late(30))) as (_, pool):
        found = frame.swarm.pipeline(steps, pool=pool)
        assert {name for name in sk.last_run().stats.routes if name.startswith("two: chat-batch")}
        single = frame.swarm.pipeline(steps, pool=pool, mode="single")
    assert found["two"].tolist() == single["two"].tolist()
    assert found["two"].iloc[30] == "echo: echo: Of question 30, .<quick>"


@pytest.mark.parametrize("options", [{"temperature": 0}, {"temperature": 0.7}], ids=["dedup", "samples"])
def test_a_resumed_pipeline_asks_later_odd_rows_on_their_route(options: dict[str, Any], tmp_path: Path) -> None:
    """Whichever odd rows have their answers in the store already."""
    wait = late(5, 20, 30)
    frame = FRAME.assign(more=["/no_think" if i in (5, 30) else "please" for i in range(40)])
    steps = [sk.Step("one", "Of {q}", max_tokens=60), sk.Step("two", "{one}, {more}.")]
    with serving(Model(READER, before=wait)) as (_, pool):
        how: dict[str, Any] = {"pool": pool, "store": tmp_path / "s", **options}
        frame[:10].swarm.pipeline([sk.Step("one", "Of {q}", max_tokens=50), steps[1]], **how)
        found = frame.swarm.pipeline(steps, **how)
        assert sk.last_run().stats.stored == 10
        whole = frame.swarm.pipeline(steps, **how)
        assert (sk.last_run().stats.stored, sk.last_run().stats.requests) == (80, 0)
    pd.testing.assert_frame_equal(whole, found)
    assert found["two"].iloc[[5, 30]].tolist() == [f"echo: echo: Of question {i}, .<quick>" for i in (5, 30)]
    assert found["two"].iloc[20] == "echo: echo: Of question 20, please."


def test_equal_prompts_are_asked_once_though_an_odd_row_is_asked_apart() -> None:
    frame = FRAME.assign(more=["/no_think" if i in (20, 21) else "please" for i in range(40)], of=["x"] * 40)
    steps = [sk.Step("one", "Of {q}"), sk.Step("two", "{of}, {more}.", when="{one} != ''")]
    model = Model(READER, before=late(20, 30))
    with serving(model) as (_, pool):
        found = frame.swarm.pipeline(steps, pool=pool, temperature=0)
        stats = sk.last_run().stats
    assert found["two"].tolist() == ["echo: x, .<quick>" if i in (20, 21) else "echo: x, please." for i in range(40)]
    assert (stats.answered, stats.reused) == (40 + 2, 38)


def test_repeated_prompts_of_rows_that_are_asked_apart_are_stored_each(tmp_path: Path) -> None:
    frame = FRAME.assign(more=["/no_think" if i in (20, 21) else "please" for i in range(40)], of=["x"] * 40)
    steps = [sk.Step("one", "Of {q}"), sk.Step("two", "{of}, {more}.", when="{one} != ''")]
    how: dict[str, Any] = {"store": tmp_path / "s", "temperature": 0.7}
    with serving(Model(READER, before=late(20, 30))) as (_, pool):
        frame.swarm.pipeline(steps, pool=pool, **how)
        frame.swarm.pipeline(steps, pool=pool, **how)
        assert (sk.last_run().stats.stored, sk.last_run().stats.requests) == (80, 0)


@pytest.mark.parametrize(
    ("odd", "options"),
    [({30}, {}), ({3}, {"store": True}), ({3, 30}, {"too_long": "truncate"}), ({*range(40)} - {*range(10, 15)}, {})],
    ids=["late", "early", "both", "all the early ones"],
)
@pytest.mark.filterwarnings("ignore:.*rows failed")
def test_rows_whose_route_refuses_the_settings_fail_alone(
    odd: set[int], options: dict[str, Any], tmp_path: Path
) -> None:
    wait = late(10, 30)

    def refuses(call: Call) -> bool:
        if "/chat/completions" in call.headers.split(" ")[1] and "top_a" in call.body:
            say(call, {"error": {"message": "top_a: extra inputs are not permitted"}}, "400 Bad Request")
            return True
        return wait(call)

    if "store" in options:
        options = {"store": tmp_path / "s"}
    frame = FRAME.assign(more=["/no_think" if i in odd else "please" for i in range(40)])
    steps = [sk.Step("one", "Of {q}"), sk.Step("two", "{one}, {more}."), sk.Step("three", "{two}")]
    first = [sk.Step("zero", "{q}, {more}.")]
    with serving(Model(READER, before=refuses)) as (_, pool):
        how: dict[str, Any] = {"pool": pool, "extra_body": {"top_a": 1}, "temperature": 0, **options}
        found = frame.swarm.pipeline(steps, **how)
        assert set(found.index[found["two"].isna()]) == set(found.index[found["three"].isna()]) == odd
        assert found["one"].notna().all()
        assert found["two_error"].dropna().str.contains("top_a").all()
        assert found["three_error"].dropna().str.contains("the step 'two' failed").all()
        alone = frame.swarm.pipeline(first, **how)
        assert set(alone.index[alone["zero"].isna()]) == odd
        with pytest.raises(sk.SettingError, match="top_a"):
            frame.iloc[[*odd]].swarm.pipeline(first, **how)


def test_rows_that_come_to_a_step_later_are_measured_once() -> None:
    frame = FRAME.assign(long=["x" * 6000] * 40)
    model = Model(before=late(1, 6, 11, 16, 21, 26, 31, 36))
    with serving(model) as (_, pool):
        found = frame.swarm.pipeline([sk.Step("one", "Of {q}"), sk.Step("two", "{one}: {long}")], pool=pool)
    assert found["two"].str.startswith("echo: echo: Of question").all()
    counted = [body for path, body in model.asked if path == "/tokenize" and "xxx" in body.get("prompt", "")]
    assert len(counted) <= 20, "40 and more where each arrival is measured anew"


@pytest.mark.parametrize("strip", [lambda text: text.lstrip("\n"), str.rstrip, str.strip])
def test_white_space_at_the_ends_of_prompts_is_what_the_chat_makes_of_it(strip: Callable[[str], str]) -> None:
    asked = pd.DataFrame({"q": ["\nx", "x\n", " x ", "\n \n", "\u3000x", "x"]})
    with serving(Model(Template("<E>", "</E>", lambda text: (strip(text), "")))) as (_, pool):
        batch, single = (
            asked.swarm.scatter("q", pool=pool, mode=mode)["response"].tolist() for mode in ("batch", "single")
        )
    assert batch == single


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.lists(st.sampled_from([" ", "\n", "a", "/no_think", "think>"]), max_size=4).map("".join), max_size=20)
)
def test_a_few_prompts_stand_for_all(texts: list[str]) -> None:
    found = telling_prompts(texts, range(len(texts)))
    assert set(found) <= set(texts)
    assert len(found) <= 9
    assert len(set(found)) == len(found)
    for odd in (lambda text: text != text.strip(), lambda text: "/no_think" in text):
        assert any(map(odd, found)) == any(map(odd, texts))


# ---- fields for the template ------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {"add_generation_prompt": False},
        {"add_generation_prompt": False, "continue_final_message": True},
        {"chat_template_kwargs": {"enable_thinking": False}, "add_generation_prompt": True},
    ],
    ids=str,
)
def test_fields_of_the_template_are_learned_into_it(echo: sk.LocalSwarm, fields: dict[str, Any]) -> None:
    with sk.connect(echo, retry=QUICK) as pool:
        options: dict[str, Any] = {"pool": pool, "extra_body": fields, "temperature": 0, "details": True}
        batch, single = (FRAME.swarm.scatter("q", mode=mode, **options) for mode in ("batch", "single"))
        FRAME.swarm.scatter("q", **options)
        assert "chat template learned" in route()
    same = ["response", "response_prompt_tokens"]
    pd.testing.assert_frame_equal(batch[same], single[same])


@pytest.mark.parametrize("deaf", [False, True])
@pytest.mark.parametrize("field", ["documents", "chat_template"])
def test_a_field_that_only_chats_heed_goes_by_chats(field: str, deaf: bool) -> None:
    def forget(call: Call) -> bool:
        if deaf and call.headers.startswith("POST /tokenize"):
            call.body.pop(field, None)
        return False

    with serving(Model(before=forget)) as (_, pool):
        options: dict[str, Any] = {"pool": pool, "extra_body": {field: "X"}}
        batch, single = (
            FRAME.swarm.scatter("q", mode=mode, **options)["response"].tolist() for mode in ("batch", "single")
        )
        FRAME.swarm.scatter("q", **options)
        assert route().startswith("chat-batch (" if deaf else "completions")
    assert batch == single == [f"echo: [{field}=X]{text}" for text in FRAME["q"]]


def test_tools_are_left_to_one_chat_a_prompt(echo: sk.LocalSwarm) -> None:
    """Batches of chats ignore them."""
    with sk.connect(echo, retry=QUICK) as pool:
        FRAME[:4].swarm.scatter("q", pool=pool, extra_body={"tools": [{"type": "function"}]})
        assert route() == "chat (for tools)"


# ---- llama-server ------------------------------

BOS = "<s>"


@dataclass
class Llama(Model):
    """llama-server: no chats in ``/tokenize``, whose fields are others, and texts without the first token, which it
    puts before every prompt. It does not refuse fields that it does not know."""

    def other(self, call: Call, path: str, body: dict[str, Any]) -> None:
        if path == "/v1/models":
            say(call, {"data": [{"id": "m", "owned_by": "llamacpp", "meta": {"n_ctx_train": 4096}}]})
        elif path == "/apply-template":
            say(call, {"prompt": self.rendered(body["messages"], body)})
        elif path == "/tokenize":
            first = BOS if body.get("add_special") and body.get("content") else ""
            say(call, {"tokens": [1] * bool(first) + [*map(ord, body.get("content", ""))]})
        elif path == "/detokenize":
            say(call, {"content": "".join(map(chr, body["tokens"]))})
        else:
            say(call, {"error": {"code": 404, "message": "File Not Found", "type": "not_found_error"}}, "404 Not Found")

    def chat(self, call: Call, rendered: list[str]) -> None:
        message = {"role": "assistant", "content": f"echo: {self.said(rendered[0])}"}
        usage = {"prompt_tokens": 1 + len(rendered[0]), "completion_tokens": 3}
        say(call, {"choices": [{"index": 0, "message": message, "finish_reason": "stop"}], "usage": usage})


@pytest.mark.parametrize("template", [A, Template("<F>", "</F>", lambda text: (text.strip(), ""))])
def test_the_lists_of_llama_server_are_used(template: Template) -> None:
    asked = pd.DataFrame({"q": [*FRAME["q"], "  padded \n", "", "Grüße\n\n世界"]})
    with serving(Llama(template, batch_chat=False)) as (servers, pool):
        options: dict[str, Any] = {"pool": pool, "temperature": 0}
        batch, single = (
            asked.swarm.scatter("q", mode=mode, **options)["response"].tolist() for mode in ("batch", "single")
        )
        model = servers[0].script
        lists = [b for path, b in model.asked if path == "/v1/completions" and "question" in str(b)]  # type: ignore[attr-defined]
        shown = asked.swarm.preview("q", rows=1, pool=pool)
        asked.swarm.scatter("q", **options)
        assert route().startswith("completions")
        assert "chat template learned" in route()
    assert batch == single
    assert max(len(body["prompt"]) for body in lists) == 5
    assert not any("add_special_tokens" in body for body in lists), "the first token is the server's"
    assert shown["sent"].tolist() == [template.render("question 0")]
    assert shown["tokens"].tolist() == [1 + len(template.render("question 0"))]


def test_a_llama_server_that_was_restarted_is_asked_in_its_new_template() -> None:
    with serving(Llama(batch_chat=False)) as (servers, pool):
        FRAME.swarm.scatter("q", pool=pool)
        restart(servers[0], B)
        assert FRAME.swarm.scatter("q", pool=pool)["response"].tolist() == ANSWERS
        assert "learned anew" in route()
