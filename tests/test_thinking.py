"""Thinking models: the switch of their template, in both modes alike, and thoughts that stay out of answers."""

from __future__ import annotations

from typing import Any

import pandas as pd
import pytest

import swarmkit as sk
from swarmkit.client.thinking import without_thoughts
from swarmkit.records import Reply

QUICK = sk.RetryPolicy(base_s=0.02, cap_s=0.2)
FRAME = pd.DataFrame({"q": [f"question {i}" for i in range(40)]})
ANSWERS = ("echo: " + FRAME["q"]).tolist()


def thinker(**options: Any) -> sk.LocalSwarm:
    return sk.local(1, engine="echo", addresses=2, thinking=True, **options)


@pytest.mark.parametrize("parser", [False, True])
@pytest.mark.parametrize("thinking", [None, True, False])
def test_batch_and_single_mode_answer_alike_and_keep_thoughts_apart(thinking: bool | None, parser: bool) -> None:
    with thinker(reasoning_parser=parser) as swarm, sk.connect(swarm, retry=QUICK) as pool:
        batch, single = (
            FRAME.swarm.scatter("q", pool=pool, thinking=thinking, mode=mode, details=True, temperature=0)
            for mode in ("batch", "single")
        )
    for answers in (batch, single):
        assert answers["response"].tolist() == ANSWERS
        if thinking is False:
            assert "response_reasoning" not in answers
        else:
            assert answers["response_reasoning"].tolist() == ("about: " + FRAME["q"]).tolist()
    if not parser or thinking is False:  # a reply to a batch of chats has no counts of its rows
        assert batch["response_prompt_tokens"].tolist() == single["response_prompt_tokens"].tolist()


def test_the_switch_changes_the_prompt_and_keeps_the_list_batches() -> None:
    with thinker() as swarm, sk.connect(swarm, retry=QUICK) as pool:
        on, off = (FRAME.swarm.preview("q", rows=1, pool=pool, thinking=thinking) for thinking in (True, False))
        assert on["sent"][0] != off["sent"][0]
        assert off["sent"][0].endswith("<think>\n\n</think>\n\n")
        by_hand = {"chat_template_kwargs": {"enable_thinking": False}}
        FRAME.swarm.scatter("q", pool=pool, extra_body=by_hand)
        route = next(iter(sk.last_run().stats.routes))
        assert route.startswith("completions")
        assert "chat template learned" in route


@pytest.mark.filterwarnings("ignore:40 of 40 rows failed")
@pytest.mark.parametrize("parser", [False, True])
@pytest.mark.parametrize("mode", ["batch", "single"])
def test_an_answer_that_ends_within_its_thoughts_says_so(mode: str, parser: bool) -> None:
    with thinker(reasoning_parser=parser) as swarm, sk.connect(swarm, retry=QUICK) as pool:
        answers = FRAME.swarm.scatter("q", pool=pool, max_tokens=4, mode=mode)
        assert answers["response"].isna().all()
        said = "not valid: ended while still thinking: raise max_tokens or lower thinking"
        assert set(answers["response_error"]) == {said}


def test_thoughts_have_a_budget() -> None:
    with thinker(reasoning_parser=True) as swarm, sk.connect(swarm, retry=QUICK) as pool:
        answers = FRAME.swarm.scatter("q", pool=pool, thinking_tokens=1, details=True)
    assert answers["response"].tolist() == ANSWERS
    assert (answers["response_reasoning"].str.len() < len("about: question")).all()


def test_a_schema_is_held_to_after_the_thoughts() -> None:
    with thinker(reasoning_parser=True) as swarm, sk.connect(swarm, retry=QUICK) as pool:
        answers = FRAME.swarm.scatter("q", pool=pool, schema={"n": int})
        assert answers["response_n"].tolist() == list(range(40))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"thinking": True}, "the chat template of echo has no switch for that"),
        ({"thinking": "low"}, "the chat template of echo has no switch for that"),
        ({"thinking": "much"}, "thinking='much': must be True, False, 'low', 'medium' or 'high'"),
        ({"thinking": True, "chat": None}, "thinking= needs chat='auto'"),
        ({"thinking_tokens": -1}, "thinking_tokens=-1: must be a whole number of tokens"),
    ],
)
def test_a_model_that_does_not_think_says_so(echo: sk.LocalSwarm, options: dict[str, Any], message: str) -> None:
    with sk.connect(echo, retry=QUICK) as pool, pytest.raises(sk.SettingError, match=message):
        FRAME.swarm.scatter("q", pool=pool, **options)


def test_the_switch_is_kept_where_a_schema_leads_from_completions_to_chats() -> None:
    with thinker(constraints="chat") as swarm, sk.connect(swarm, retry=QUICK) as pool:
        answers = FRAME.swarm.scatter("q", schema={"n": int}, thinking=False, pool=pool, details=True)
        assert next(iter(sk.last_run().stats.routes)).startswith("chat")
    assert answers["response_error"].isna().all()
    assert "response_reasoning" not in answers, "it thought all the same"


def test_thoughts_that_a_template_opens_are_taken_out_where_the_template_is_not_known() -> None:
    reply = Reply(0, 0, "A capital?\n</think>\n\nParis", "stop", 3, 9, None)
    read = without_thoughts(reply, marked=True, opened=None)
    assert (read.text, read.reasoning) == ("Paris", "A capital?")
    assert without_thoughts(reply, marked=True, opened=False).text == reply.text


def test_an_answer_that_has_begun_leaves_no_room_for_thoughts() -> None:
    with thinker() as swarm, sk.connect(swarm) as pool, pytest.raises(sk.SettingError, match="begins the answer"):
        FRAME.swarm.scatter("q", thinking=True, assistant_prefix="It is", pool=pool)
