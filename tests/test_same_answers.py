"""Endpoints that answer every prompt alike, and at once: their rows are asked again elsewhere, with one warning.

Over real sockets, beside endpoints that take their time. Short answers that are often the same, and right, are not
touched.
"""

from __future__ import annotations

import contextlib
import json
import time
import warnings
from collections.abc import Callable
from typing import Any

import pandas as pd
import pytest
from scripted import Call, Scripted

import swarmkit as sk
from swarmkit.client.hostfile import AgentEndpoint

RETRY = sk.RetryPolicy(base_s=0.05, cap_s=0.3, quiet_s=5.0, give_up_s=20.0)
SLOW_S = 0.15


def say(call: Call, texts: list[str]) -> None:
    choices = [{"index": i, "text": text, "finish_reason": "stop"} for i, text in enumerate(texts)]
    if not call.stream:
        call.reply(json.dumps({"choices": choices}).encode())
        return
    events = "".join(f"data: {json.dumps({'choices': [choice]})}\n\n" for choice in choices)
    call.reply(f"{events}data: [DONE]\n\n".encode(), media="text/event-stream")


def slowly(call: Call) -> None:
    time.sleep(SLOW_S)
    call.answer()


def always(text: str) -> Callable[[Call], None]:
    return lambda call: say(call, [text] * len(call.prompts))


class Asked:
    """Servers with these scripts, a pool of them, and what came of a scatter."""

    def __init__(self, *scripts: Callable[[Call], None]) -> None:
        self.scripts = scripts

    def scatter(self, rows: int = 240, size: int = 10, prompts: list[str] | None = None, in_flight: int = 4,
                **options: Any) -> pd.DataFrame:  # fmt: skip
        frame = pd.DataFrame({"prompt": prompts or [f"row {i}" for i in range(rows)]})
        with contextlib.ExitStack() as stack, warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            servers = [stack.enter_context(Scripted(script)) for script in self.scripts]
            batch = sk.BatchPolicy(max_size=size, max_in_flight=in_flight)
            endpoints = [AgentEndpoint(*server.address) for server in servers]
            pool = stack.enter_context(sk.VLLMPool(endpoints, model="m", retry=RETRY, batch=batch))
            self.names = [e.name for e in pool.endpoints]
            options = {"max_tokens": 8, "progress": False, "details": True, "dedup": False, **options}
            answers = sk.scatter(frame, "{prompt}", pool=pool, **options)
        self.prompts = [server.prompts for server in servers]
        self.warned = [str(w.message) for w in caught]
        self.by = answers["response_endpoint"].value_counts().reindex(self.names, fill_value=0).tolist()
        return answers


def assert_all_right(frame: pd.DataFrame) -> None:
    assert frame["response_error"].dropna().tolist() == []
    assert (frame["response"] == "echo: " + frame["prompt"]).all()


# ---- what is not believed ------------------------------


@pytest.mark.parametrize("store", [False, True], ids=["", "store"])
@pytest.mark.parametrize("delivery", ["rows", "batch"])
@pytest.mark.parametrize("text", ["", " \n", "The model is loading."])
def test_an_endpoint_that_answers_all_prompts_alike_at_once_gets_none_of_the_rows(text, delivery, store, tmp_path):
    asked = Asked(slowly, always(text), slowly, slowly)
    options = {"store": str(tmp_path / "s")} if store else {}
    frame = asked.scatter(delivery=delivery, **options)
    assert_all_right(frame)
    assert asked.by[1] == 0
    assert all(asked.by[i] >= 10 for i in (0, 2, 3))
    assert sum(asked.prompts) <= 1.5 * len(frame)
    assert len(asked.warned) == 1
    shown = repr(text.strip()) if text.strip() else "an empty text"
    assert asked.warned[0] == (
        f"{asked.names[1]} is not believed: it gives {shown} for every prompt, where other endpoints give other "
        "answers. It is held back, and its rows are asked again elsewhere"
    )
    stats = sk.last_run().stats
    assert (stats.answered, stats.failed) == (240, 0)
    if store:
        again = Asked(slowly)
        assert_all_right(again.scatter(delivery=delivery, **options))
        assert again.prompts == [0]


@pytest.mark.parametrize("delivery", ["rows", "batch"])
@pytest.mark.parametrize("size", [1, 4])
def test_what_was_answered_before_there_was_anything_to_compare_is_taken_back(delivery, size):
    asked = Asked(slowly, always(""), slowly, slowly)
    frame = asked.scatter(120, size=size, in_flight=8, delivery=delivery)
    assert_all_right(frame)
    assert asked.by[1] == 0
    assert len(asked.warned) == 1
    assert sum(asked.prompts) <= 1.5 * len(frame)
    story = sk.last_run().story(endpoint=asked.names[1])
    assert "endpoint distrusted" in story["what"].tolist()
    taken_back = story[story["what"] == "answers taken back"]
    assert taken_back["why"].str.endswith("it gives an empty text for every prompt, where other endpoints give other "
                                          "answers").tolist() == [True]  # fmt: skip


@pytest.mark.parametrize("delivery", ["rows", "batch"])
def test_an_endpoint_that_comes_to_its_senses_is_used_again(delivery):
    def at_first(call: Call) -> None:
        if call.server.requests <= 3:
            say(call, [""] * len(call.prompts))
        else:
            slowly(call)

    asked = Asked(slowly, at_first, slowly)
    frame = asked.scatter(600, delivery=delivery, in_flight=4)
    assert_all_right(frame)
    assert asked.by[1] >= 10
    assert len(asked.warned) == 1


@pytest.mark.parametrize("delivery", ["rows", "batch"])
def test_an_endpoint_that_breaks_in_the_middle_of_a_run_is_noticed(delivery):
    def later(call: Call) -> None:
        slowly(call) if call.server.requests <= 4 else say(call, [""] * len(call.prompts))

    asked = Asked(slowly, later, slowly, slowly)
    frame = asked.scatter(400, delivery=delivery)
    assert_all_right(frame)
    assert 10 <= asked.by[1] <= 50
    assert len(asked.warned) == 1


@pytest.mark.parametrize("delivery", ["rows", "batch"])
def test_one_of_two_that_answers_nothing_is_not_believed(delivery):
    asked = Asked(slowly, always(""))
    frame = asked.scatter(80, delivery=delivery)
    assert_all_right(frame)
    assert asked.by == [80, 0]
    assert len(asked.warned) == 1


def test_each_row_is_yielded_right_and_with_its_last_answer_at_the_end():
    frame = pd.DataFrame({"prompt": [f"row {i}" for i in range(120)]})
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(Scripted(script)) for script in (slowly, always(""), slowly, slowly)]
        endpoints = [AgentEndpoint(*server.address) for server in servers]
        batch = sk.BatchPolicy(max_size=10, max_in_flight=4)
        pool = stack.enter_context(sk.VLLMPool(endpoints, model="m", retry=RETRY, batch=batch))
        options = {"max_tokens": 8, "progress": False, "delivery": "rows"}
        with pytest.warns(sk.SwarmWarning, match="is not believed") as caught:
            parts = list(sk.iter_scatter(frame, "{prompt}", pool=pool, **options))
    assert_all_right(pd.concat(parts).sort_index())
    assert sorted(label for part in parts for label in part.index) == list(range(120))
    assert len(caught) == 1


# ---- what is believed ------------------------------


def judge(call: Call) -> None:
    time.sleep(0.05)
    say(call, ["no" if prompt.endswith("7 no") else "yes" for prompt in call.prompts])


def quickly(call: Call) -> None:
    say(call, ["no" if prompt.endswith("7 no") else "yes" for prompt in call.prompts])


@pytest.mark.parametrize("delivery", ["rows", "batch"])
@pytest.mark.parametrize(("nos", "max_tokens"), [(0, 1), (1, 8), (20, 8)])
@pytest.mark.parametrize("scripts", [(quickly, judge, judge), (judge, judge), (quickly,) * 4, (judge,)],
                         ids=["one quick", "two", "all quick", "alone"])  # fmt: skip
def test_a_column_of_answers_that_are_nearly_all_the_same_is_as_it_is(scripts, nos, max_tokens, delivery):
    prompts = [f"row {i}" + (" no" if i % 10 == 7 and i // 10 < nos else "") for i in range(200)]
    asked = Asked(*scripts)
    frame = asked.scatter(prompts=prompts, max_tokens=max_tokens, delivery=delivery)
    right = ["no" if p.endswith("7 no") else "yes" for p in prompts]
    assert frame["response"].tolist() == right
    assert asked.warned == []
    if nos < 20:
        assert sum(asked.prompts) <= 220  # some rows are duplicated at the end
        assert not sk.last_run().stats.failed_requests
    else:  # prompts of one length share batches: here ten with the answer "no", which are asked once more
        assert sum(asked.prompts) <= 240


@pytest.mark.parametrize("delivery", ["rows", "batch"])
def test_answers_that_are_the_same_elsewhere_are_right_after_all(delivery):
    # Every third prompt has the same answer, and all of them begin at one endpoint.
    prompts = [f"row {i}" + (" yes" if i % 3 == 1 else "") for i in range(240)]

    def script(call: Call) -> None:
        time.sleep(0.1)
        say(call, ["yes" if p.endswith("yes") else f"echo: {p}" for p in call.prompts])

    asked = Asked(script, script, script)
    frame = asked.scatter(prompts=prompts, delivery=delivery)
    assert frame["response"].tolist() == ["yes" if p.endswith("yes") else f"echo: {p}" for p in prompts]
    assert asked.warned == []
    assert sum(asked.prompts) <= 1.5 * len(frame)


@pytest.mark.parametrize("delivery", ["rows", "batch"])
def test_the_same_prompt_again_and_again_may_have_the_same_answer(delivery):
    prompts = [f"row {i}" if i % 3 else "the same" for i in range(120)]
    asked = Asked(slowly, slowly, slowly)
    frame = asked.scatter(prompts=prompts, delivery=delivery)
    assert_all_right(frame)
    assert asked.warned == []
    assert not sk.last_run().stats.failed_requests


@pytest.mark.parametrize("delivery", ["rows", "batch"])
def test_without_others_that_answer_an_endpoint_is_believed(delivery):
    def silent(call: Call) -> None:
        call.wait_for_the_end()

    asked = Asked(always("yes"), silent)
    frame = asked.scatter(60, delivery=delivery)
    assert (frame["response"] == "yes").all()
    assert asked.warned == []
