"""Conversations in place of prompts, examples before them, and answers that have begun: turns of real chats."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted import Call, Scripted

import swarmkit as sk
from swarmkit.frames.conversations import row_prompts

QUICK = sk.RetryPolicy(base_s=0.02, cap_s=0.2)
SHOWN = pd.DataFrame({"gene": ["lacZ", "lacY"], "start": [1000, 2000], "response": ["It cuts.", "It carries."]})
ASK = "What does {gene} at {start:,} do?"
GENES = pd.DataFrame({"gene": [f"gene{i}" for i in range(40)], "start": range(40)}, index=[7, 7, *range(38)])


def turn(role: str, content: Any, **others: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **others}


def chat(*contents: str) -> list[dict[str, Any]]:
    """Turns of user and assistant, one after another."""
    return [turn("assistant" if i % 2 else "user", content) for i, content in enumerate(contents)]


CHATS = GENES.assign(chat=[chat(f"I work on {g}", "Go on.", f"What does {g} do?") for g in GENES["gene"]])
CHATS["chat"] = CHATS["chat"].where(CHATS.reset_index().index % 3 > 0, CHATS["chat"].map(lambda c: c[:1])).to_numpy()
LAST = CHATS["chat"].map(lambda turns: f"echo: {turns[-1]['content']}").tolist()


@pytest.fixture(scope="module")
def smol() -> Iterator[sk.VLLMPool]:
    with sk.local(engine="openvino", max_model_len=1024) as swarm, sk.connect(swarm) as pool:
        yield pool


def stats() -> sk.RunStats:
    return sk.last_run().stats


def route() -> str:
    return next(iter(stats().routes))


# ---- the same text in both modes ------------------------------

WAYS: dict[str, dict[str, Any]] = {
    "messages": {"messages": "chat", "system": "You are a biologist."},
    "examples": {"prompt": ASK, "examples": SHOWN},
    "prefix": {"prompt": ASK, "assistant_prefix": "In short, the gene "},
    "all": {"messages": "chat", "examples": [("Hi", "Hello.")], "assistant_prefix": "I know:", "system": "Be brief."},
}


@pytest.mark.parametrize(("way", "trim"), [*((way, False) for way in WAYS), ("prefix", True)])
def test_batch_and_single_mode_send_the_same_chats(way: str, trim: bool) -> None:
    options = {**WAYS[way], "temperature": 0, "details": True}
    with sk.local(1, engine="echo", addresses=2, trim=trim, bos=True) as swarm, sk.connect(swarm, retry=QUICK):
        single = CHATS.swarm.scatter(**options, mode="single")
        batch = CHATS.swarm.scatter(**options, mode="batch")
        assert route().startswith("chat-batch" if "messages" in options else "completions, rows as they finish")
        shown = CHATS.swarm.preview(**WAYS[way], rows=40)
    same = ["response", "response_error", "response_finish_reason", "response_completion_tokens"]
    if "messages" not in options:  # a reply to a batch of chats does not tell the prompts' tokens apart
        same.append("response_prompt_tokens")
    pd.testing.assert_frame_equal(batch[same], single[same])
    pd.testing.assert_frame_equal(batch[CHATS.columns], CHATS)
    assert shown["tokens"].tolist() == single["response_prompt_tokens"].tolist()
    begun = options.get("assistant_prefix", "")
    if "messages" in options:
        assert batch["response"].tolist() == [begun + text for text in LAST]
    else:
        assert (batch["response"] == begun + "echo: What does " + CHATS["gene"] + " at " + CHATS["start"].astype(str)
                + " do?").all()  # fmt: skip


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*cut off at max_tokens=8")
@pytest.mark.parametrize("way", WAYS)
def test_a_real_model_gives_the_same_text_in_both_modes(smol: sk.VLLMPool, way: str) -> None:
    few, options = CHATS[:4], {**WAYS[way], "temperature": 0, "max_tokens": 8, "pool": smol}
    batch, single = (few.swarm.scatter(**options, mode=mode) for mode in ("batch", "single"))
    assert batch["response_error"].isna().all()
    assert batch["response"].tolist() == single["response"].tolist()
    assert batch["response"].str.startswith(options.get("assistant_prefix", "")).all()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*cut off at max_tokens=8")
def test_a_real_model_follows_examples(smol: sk.VLLMPool) -> None:
    df = pd.DataFrame({"q": ["Italy"]})
    plain, shown = (
        df.swarm.scatter("q", pool=smol, temperature=0, max_tokens=8, examples=examples)
        for examples in (None, [("France", "Paris"), ("Japan", "Tokyo"), ("Poland", "Warsaw")])
    )
    assert plain["response"].tolist() != ["Rome"]
    assert shown["response"].tolist() == ["Rome"]


# ---- what is sent ------------------------------


def test_turns_stand_in_the_order_of_a_chat_and_cost_no_row_anything(echo: sk.LocalSwarm) -> None:
    with sk.connect(echo) as pool:
        options = {"examples": SHOWN, "assistant_prefix": "It ", "system": "Be brief.", "pool": pool}
        sent = GENES.swarm.preview(ASK, rows=1, **options)["sent"].iloc[0]
        GENES.swarm.scatter(ASK, **options)
        assert stats().requests == pool.size
    roles = ["system", "user", "assistant", "user", "assistant", "user", "assistant"]
    assert [part.partition("\n")[0] for part in sent.split("<|im_start|>")[1:]] == roles
    assert "What does lacY at 2,000 do?<|im_end|>\n<|im_start|>assistant\nIt carries.<|im_end|>" in sent
    assert sent.endswith("assistant\nIt ")


def test_a_system_prompt_of_the_conversation_takes_precedence(echo: sk.LocalSwarm) -> None:
    df = pd.DataFrame({"c": [[turn("system", "own"), *chat("Hi")], chat("Hi")]})
    with sk.connect(echo) as pool:
        sent = df.swarm.preview(messages="c", system="call's", examples=[("a", "b")], pool=pool)["sent"].map(json.loads)
    assert [[t["content"] for t in turns] for turns in sent] == [["own", "a", "b", "Hi"], ["call's", "a", "b", "Hi"]]


def test_equal_conversations_are_sent_once_and_others_are_not_mixed_up(pool: sk.VLLMPool) -> None:
    one, other = chat("a", "b", "c"), chat("a", "B", "c")
    df = pd.DataFrame({"c": [one, other, json.dumps(one), [dict(reversed(t.items())) for t in one], chat("c")]})
    answers = df.swarm.scatter(messages="c", temperature=0)
    assert answers["response"].tolist() == ["echo: c"] * 5
    assert (stats().answered, stats().reused) == (3, 2)


def test_only_unfinished_conversations_are_asked_again_from_a_store(pool: sk.VLLMPool, tmp_path: Any) -> None:
    asked: dict[str, Any] = {"messages": "chat", "store": tmp_path, "temperature": 0}
    CHATS[:30].swarm.scatter(**asked)
    answers = CHATS.swarm.scatter(**asked)
    assert (stats().stored, stats().answered) == (30, 10)
    assert answers["response"].tolist() == LAST
    for other in ({"examples": [("a", "b")]}, {"assistant_prefix": "It"}):
        CHATS.swarm.scatter(**asked, **other)
        assert stats().stored == 0, "an answer in another conversation is another answer"
        again = CHATS.swarm.scatter(**asked, **other)
        assert (stats().stored, stats().requests) == (40, 0)
        assert again["response"].tolist() == [other.get("assistant_prefix", "") + text for text in LAST]
    texts = pd.DataFrame({"q": CHATS["chat"].map(lambda c: json.dumps(c, separators=(",", ":")))})
    texts.swarm.scatter("q", store=tmp_path, temperature=0)
    assert stats().stored == 0, "a text is not the conversation that it spells"


def test_a_key_of_a_store_is_what_it_was_before_there_were_conversations(tmp_path: Any) -> None:
    from swarmkit.records import RequestSpec
    from swarmkit.store.keys import ask_of, keys_of, settings_of

    spec = RequestSpec(model="m", max_tokens=8, system="S", params={"temperature": 0}, chat="auto")
    assert [*keys_of(ask_of(settings_of(spec)), ["Hi"])] == ["bb7214919ae300d676e0310fdcc8f9ba"]


def test_only_missing_keeps_answers_that_began_otherwise(pool: sk.VLLMPool) -> None:
    df = GENES[:3].assign(response=["It is old", "old", None])
    answers = df.swarm.scatter("gene", only_missing=True, assistant_prefix="It is ")
    assert answers["response"].tolist() == ["It is old", "old", "It is echo: gene2"]


def test_samples_of_a_conversation_stand_side_by_side(pool: sk.VLLMPool) -> None:
    answers = CHATS[:3].swarm.scatter(messages="chat", n=2, temperature=0.5, assistant_prefix="So ")
    expected = [f"So {text}" for one in LAST[:3] for text in (one, one.replace("echo", "echo #1"))]
    assert answers["response"].tolist() == expected


# ---- with a schema, and with thoughts ------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_a_schema_holds_for_what_the_model_writes(pool: sk.VLLMPool, way: str) -> None:
    answers = CHATS.swarm.scatter(**WAYS[way], schema={"note": str})
    assert answers["response_error"].isna().all()
    assert answers["response_note"].notna().all()
    assert answers["response"].str.startswith(WAYS[way].get("assistant_prefix", "")).all()
    lone = CHATS.swarm.scatter(**WAYS[way], schema=["yes", "no"])
    assert lone["response"].dtype == pd.CategoricalDtype(["yes", "no"])
    assert lone["response"].notna().all()


@pytest.mark.filterwarnings("ignore:.*hold the model to the schema")
def test_what_was_wrong_is_told_as_a_further_turn() -> None:
    told: list[list[dict[str, str]]] = []

    def answer(call: Call) -> None:
        turns = call.body.get("messages")
        if not isinstance(turns, list) or not isinstance(turns[0], dict):
            call.reply(b'{"detail": "Not Found"}', status="404 Not Found")
            return
        told.append(turns)
        said = '{"n": 7}' if "not valid" in turns[-1]["content"] else '{"n": "seven"}'
        call.reply(
            json.dumps({"choices": [{"index": 0, "message": {"content": said}, "finish_reason": "stop"}]}).encode()
        )

    with Scripted(answer) as server, sk.VLLMPool([server.address], model="m", retry=QUICK, chat="auto") as pool:
        df = pd.DataFrame({"c": [chat("one", "two", "three")]})
        answers = df.swarm.scatter(messages="c", schema={"n": int}, pool=pool, mode="single")
    assert answers["response_n"].tolist() == [7]
    assert [t["content"] for t in told[-1][:4]] == ["one", "two", "three", '{"n": "seven"}']
    assert [t["role"] for t in told[-1]] == ["user", "assistant", "user", "assistant", "user"]
    assert told[-1][-1]["content"].startswith("Your last answer was not valid: n must be a whole number")


@pytest.mark.parametrize("way", ["messages", "examples"])
def test_thoughts_stay_out_of_answers(way: str) -> None:
    with sk.local(1, engine="echo", thinking=True) as swarm, sk.connect(swarm, retry=QUICK):
        on, off = (CHATS.swarm.scatter(**WAYS[way], thinking=t, details=True) for t in (True, False))
    assert on["response"].tolist() == off["response"].tolist()
    assert on["response_reasoning"].str.startswith("about: ").all()
    assert "response_reasoning" not in off


# ---- bad input ------------------------------

WRONG = [
    (7, "7 is no conversation; a conversation is a list of"),
    ("Hi", "'Hi' is no JSON; a conversation is a list of"),
    ('{"role": "user"}', "{'role': 'user'} is no conversation; a conversation is a list of"),
    ([], "an empty list; a conversation is a list of"),
    (["Hi"], "message 1 is 'Hi'; a conversation is a list of"),
    ([{"from": "human", "value": "Hi"}], "message 1 has no role; roles are system, user and assistant"),
    ([turn("bot", "Hi")], "message 1 has the role 'bot'; roles are system, user and assistant"),
    ([turn("user", None)], "message 1 has no content; it must be a text"),
    ([turn("user", [{"type": "text"}])], "message 1 has a list as content; it must be a text"),
    ([turn("user", "Hi", tool_calls=[1])], "message 1 has 'tool_calls' beside role and content; leave it out"),
    ([*chat("Hi"), turn("system", "S")], "message 2 has the role 'system', which only the first may have"),
    (chat("Hi", "Ho"), "the last message has the role 'assistant', so there is nothing to answer; it must be 'user'"),
    ([turn("system", "S")], "the last message has the role 'system', so there is nothing to answer; it must be 'user'"),
    (None, "missing value in column 'c'"),
]


def test_cells_that_are_no_conversations_are_errors_of_their_rows(pool: sk.VLLMPool) -> None:
    good = [chat("a"), np.array(chat("b"), dtype=object), tuple(chat("c")), json.dumps(chat("d"))]
    good.append([turn("user", "e", tool_calls=None, name=None)])
    df = pd.DataFrame({"c": pd.Series([cell for cell, _ in WRONG] + good, dtype=object)})
    with pytest.warns(sk.SwarmWarning, match="14 of 19 rows failed"):
        answers = df.swarm.scatter(messages="c")
    for error, (_, expected) in zip(answers["response_error"], WRONG, strict=False):
        assert error.removeprefix("column 'c': ").startswith(expected)
    assert answers["response"][len(WRONG) :].tolist() == [f"echo: {c}" for c in "abcde"]
    assert answers["response"][: len(WRONG)].isna().all()


def test_conversations_come_from_arrow_columns_too(pool: sk.VLLMPool) -> None:
    import pyarrow as pa

    table = pa.table({"chat": CHATS["chat"].tolist()})
    for frame in (table.to_pandas(), table.to_pandas(types_mapper=pd.ArrowDtype)):
        assert frame.swarm.scatter(messages="chat")["response"].tolist() == LAST


def test_a_series_of_conversations(pool: sk.VLLMPool) -> None:
    assert CHATS["chat"].swarm.scatter(messages="value")["response"].tolist() == LAST


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "content", "x"]), inner),
)
TURN = st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant", "bot"]), "content": st.text()})


@settings(deadline=None)
@given(st.lists(JSON | st.lists(TURN, max_size=4), max_size=6))
def test_any_cell_is_a_conversation_or_an_error(cells: list[Any]) -> None:
    found = row_prompts(pd.DataFrame({"c": pd.Series(cells, dtype=object)}), None, "c")
    assert [text is None for text in found.texts] == [row in found.errors for row in range(len(cells))]
    for cell, text in zip(cells, found.texts, strict=True):
        assert text is None or json.loads(text) == (json.loads(cell) if isinstance(cell, str) else cell)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, sk.PromptError, "there is nothing to ask: give a prompt"),
        ({"prompt": ASK, "messages": "chat"}, sk.PromptError, "a prompt and messages= were given"),
        ({"messages": "chats"}, sk.UnknownColumnError, "Did you mean 'chat'?"),
        ({"messages": [["a"]]}, sk.SettingError, "messages= got a list: it is the name of a column"),
        ({"messages": "chat", "chat": None}, sk.SettingError, "messages= needs chat='auto'"),
        ({"messages": "chat", "too_long": "truncate"}, sk.SettingError, "shorten their turns before"),
        ({"prompt": ASK, "examples": [("a", "b")], "chat": ("", "")}, sk.SettingError, "examples= needs chat='auto'"),
        ({"prompt": ASK, "examples": {"a": "b"}}, sk.SettingError, r"takes a list of \(prompt, answer\) pairs"),
        ({"prompt": ASK, "examples": [("a", 1)]}, sk.SettingError, r"got a list with \('a', 1\)"),
        ({"prompt": ASK, "examples": SHOWN[["gene", "start"]]}, sk.UnknownColumnError, "examples=: .*{response}"),
        ({"prompt": ASK, "examples": SHOWN[["response"]]}, sk.UnknownColumnError, "examples=: .*{gene}"),
        ({"prompt": ASK, "examples": SHOWN.assign(gene=None)}, sk.SettingError, "examples=, row 0: missing value"),
        ({"messages": "chat", "examples": SHOWN}, sk.SettingError, "which messages= has not: give pairs"),
        ({"prompt": ASK, "assistant_prefix": "<think>\n"}, sk.SettingError, "use thinking=True"),
        ({"prompt": ASK, "assistant_prefix": " "}, sk.SettingError, "assistant_prefix=' ': must be a text"),
    ],
)
def test_refusals_say_what_to_do(pool: sk.VLLMPool, options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        CHATS.swarm.scatter(**options)


def test_tree_reduce_has_no_turns(pool: sk.VLLMPool) -> None:
    with pytest.raises(TypeError, match=r"tree_reduce takes no examples=, which .*scatter"):
        GENES.swarm.tree_reduce("gene", "{responses}", examples=SHOWN)


@pytest.mark.parametrize("mode", ["batch", "single"])
def test_a_server_that_begins_another_answer_is_found_out(mode: Any) -> None:
    """Many servers take a chat that ends with words of the assistant, close that turn, and begin another one."""

    def answer(call: Call) -> None:
        if "messages" in call.body and isinstance(call.body["messages"][0], dict):
            said = {"index": 0, "message": {"content": "Sure!"}, "finish_reason": "stop"}
            call.reply(json.dumps({"choices": [said], "usage": {"prompt_tokens": 9, "completion_tokens": 1}}).encode())
        else:
            call.reply(b'{"detail": "Not Found"}', status="404 Not Found")

    with (
        Scripted(answer) as server,
        sk.VLLMPool([server.address], model="m", retry=QUICK, chat="auto") as pool,
        pytest.raises(sk.SettingError, match="do not go on with an answer that has begun"),
    ):
        GENES.swarm.scatter("gene", pool=pool, mode=mode, assistant_prefix="It is")


# ---- other verbs ------------------------------


def test_compare_and_iter_scatter_take_turns(pool: sk.VLLMPool) -> None:
    found = CHATS.swarm.compare(messages="chat", examples=[("a", "b")], assistant_prefix="So", repeats=1, temperature=0)
    assert found.differing.empty
    assert (found.frame["completion_rate"] == 1).all()
    parts = list(sk.iter_scatter([CHATS[:20], CHATS[20:]], messages="chat"))
    assert pd.concat(parts)["response"].tolist() == LAST
