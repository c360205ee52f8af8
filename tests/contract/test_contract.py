"""How swarmkit and a server understand each other.

Everything here is asked of every target, so that the stand-in cannot drift from the real thing. Where a server's
arithmetic may depend on what runs beside a row, token counts are compared, which cannot.
"""

from __future__ import annotations

import json
import math
import time
import urllib.error
import warnings
from typing import Any

import jsonschema
import pandas as pd
import pytest
from contract.targets import Target

import swarmkit as sk
from swarmkit.client import io_thread
from swarmkit.client.replies import decode_counted
from swarmkit.client.transport import Transport
from swarmkit.client.wire import encode, path_of
from swarmkit.engine.columns import Columns
from swarmkit.records import Prompts, RequestSpec, Route
from swarmkit.runs.events import RequestEnded, RowsDone, RunEvent

pytestmark = pytest.mark.filterwarnings("ignore:.* cut off at max_tokens")  # short answers tell as much
VARIED = [
    "What is the capital of France?",
    "Grüße, 世界! Was heißt „Zelle“ auf Englisch?",
    "line one\nline two\n\n\tindented line four",
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    "<|endoftext|> </s> [INST] <s> <|begin|><|role|>",
    "  spaces around \n",
    '{braces}, {{more}}, "quotes", \\ and a %s',
    ".",
    " ",
    "Summarise: " + "The lac operon is controlled by a repressor. " * 20,
    "🧬🧬 ∂x/∂t",
]
LONGER_AND_LONGER = [f"{'lac' * i}: what does this gene do?" for i in range(1, 7)]


def frame(texts: list[str]) -> pd.DataFrame:
    return pd.DataFrame({"prompt": texts})


def spec(target: Target, texts: list[str], **options: Any) -> pd.DataFrame:
    options = {"temperature": 0, "max_tokens": 6, "details": True, "pool": target.pool, **options}
    answers = sk.scatter(frame(texts), "prompt", **options)
    assert answers["response_error"].isna().all(), answers["response_error"].dropna().to_list()
    return answers


def sent(target: Target, texts: list[str], **options: Any) -> list[str]:
    return sk.preview(frame(texts), "prompt", len(texts), pool=target.pool, **options)["sent"].to_list()


def test_probe_finds_model_context_and_kind(target: Target) -> None:
    listed = target.spec("/v1/models")["data"][0]
    assert target.pool.model == listed["id"]
    assert target.context == listed["max_model_len"]
    assert target.kind == listed["owned_by"]


def test_both_deliveries_give_the_same_rows_in_order(target: Target) -> None:
    rows = spec(target, LONGER_AND_LONGER, delivery="rows")
    assert "rows as they finish" in next(iter(sk.last_run().stats.routes))
    whole = spec(target, LONGER_AND_LONGER, delivery="batch")
    assert "rows as they finish" not in next(iter(sk.last_run().stats.routes))
    assert rows["response_prompt_tokens"].is_monotonic_increasing
    same = ["response", "response_finish_reason", "response_prompt_tokens", "response_completion_tokens"]
    pd.testing.assert_frame_equal(rows[same], whole[same])


def test_rows_come_before_their_request_is_over(target: Target) -> None:
    """Seen in the run's events: rows of one request are handed out at several times, the first before the last."""
    pool = sk.VLLMPool(target.slow.endpoints, model=target.slow.model, batch=sk.BatchPolicy(max_size=1024))
    heard: list[RunEvent] = []
    columns = Columns(target.rows)
    texts = [f"Row {i}: say something." for i in range(target.rows)]
    wanted = pool.spec(max_tokens=64, delivery="auto")
    with pool:
        assert io_thread.call(pool.run(Prompts(texts), wanted, columns, [heard.append])) is None
    assert sum(isinstance(event, RequestEnded) for event in heard) == 1
    portions = [event.rows for event in heard if isinstance(event, RowsDone) and event.rows]
    assert len(portions) > 1
    assert sorted(row for rows in portions for row in rows) == list(range(target.rows))


@pytest.mark.parametrize("system", [None, "You are a botanist. Answer in one word."])
def test_batch_and_single_give_the_same_text(target: Target, system: str | None) -> None:
    texts = VARIED[:4] if system else VARIED
    batch = spec(target, texts, mode="batch", system=system)
    assert next(iter(sk.last_run().stats.routes)).startswith("completions")
    single = spec(target, texts, mode="single", system=system)
    assert next(iter(sk.last_run().stats.routes)).startswith("chat")
    same = ["response_prompt_tokens", "response", "response_finish_reason"]
    pd.testing.assert_frame_equal(batch[same], single[same])


CHATS = [[{"role": "user", "content": text}] for text in VARIED[:3]]
CHATS[1] = [*CHATS[0], {"role": "assistant", "content": "It is Paris."}, *CHATS[1]]
CHATS[2] = [{"role": "system", "content": "You are a botanist."}, *CHATS[2]]


@pytest.mark.parametrize(
    "turns",
    [
        {"messages": "chat", "system": "Answer in one word."},
        {"prompt": "prompt", "examples": [("2 + 2", "Four."), ("1 + 2", "Three.")]},
        {"prompt": "prompt", "assistant_prefix": "Let me see:"},
        {"messages": "chat", "examples": [("2 + 2", "Four.")], "assistant_prefix": "Well, "},
    ],
    ids=["messages", "examples", "assistant_prefix", "all"],
)
def test_turns_of_a_chat_give_the_same_text_in_both_modes(target: Target, turns: dict[str, Any]) -> None:
    rows = frame(VARIED[:3]).assign(chat=CHATS)
    options = {"pool": target.pool, "temperature": 0, "max_tokens": 6, "details": True, **turns}
    batch = sk.scatter(rows, mode="batch", **options)
    assert next(iter(sk.last_run().stats.routes)).startswith("chat-batch" if "messages" in turns else "completions")
    single = sk.scatter(rows, mode="single", **options)
    assert batch["response_error"].isna().all()
    assert batch["response"].to_list() == single["response"].to_list()
    assert batch["response"].str.startswith(turns.get("assistant_prefix", "")).all()
    shown = sk.preview(rows, pool=target.pool, **turns)
    assert shown["tokens"].to_list() == single["response_prompt_tokens"].to_list()


def test_an_answer_that_has_begun_is_left_open(target: Target) -> None:
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "It is"}]
    body = {"model": target.pool.model, "messages": chat, "add_generation_prompt": False}
    ids = target.spec("/tokenize", {**body, "continue_final_message": True})["tokens"]
    assert target.spec("/detokenize", {"model": target.pool.model, "tokens": ids})["prompt"].endswith("It is")
    assert len(ids) < target.spec("/tokenize", body)["count"]
    with pytest.raises(urllib.error.HTTPError, match="400"):
        target.spec("/tokenize", {**body, "continue_final_message": True, "add_generation_prompt": True})


def test_system_prompt_is_part_of_what_is_sent(target: Target) -> None:
    plain, botanist = sent(target, ["Hi"])[0], sent(target, ["Hi"], system="You are a botanist.")[0]
    assert "botanist" in botanist
    assert "botanist" not in plain
    assert spec(target, ["Hi"], system="You are a botanist.")["response_prompt_tokens"][0] == target.tokens(
        botanist, special=False
    )


def test_prompts_without_a_template_go_as_they_are(target: Target) -> None:
    texts = ["One, two, three,", "Es grünt so grün"]
    assert sent(target, texts, chat=None) == texts
    raw = spec(target, texts, chat=None)
    assert raw["response_prompt_tokens"].to_list() == [target.tokens(t, special=True) for t in texts]


def test_a_template_by_hand_is_as_good_as_the_learned_one(target: Target) -> None:
    prefix, suffix = sent(target, ["A-SENTINEL"])[0].split("A-SENTINEL")
    by_hand = spec(target, LONGER_AND_LONGER, chat=(prefix, suffix))
    learned = spec(target, LONGER_AND_LONGER)
    same = ["response", "response_prompt_tokens"]
    pd.testing.assert_frame_equal(by_hand[same], learned[same])


def test_batch_chat_route_answers_as_the_chat_does(target: Target) -> None:
    wanted = RequestSpec(model=target.pool.model or "", params={"temperature": 0})
    texts = VARIED[:4]

    async def both() -> tuple[list[str], list[str]]:
        transport, endpoint = Transport(), target.pool.endpoints[0]
        try:
            body = encode(Route.CHAT_BATCH, wanted, texts, max_tokens=8)
            reply = await transport.post(endpoint, path_of(Route.CHAT_BATCH), body)
            together, _ = decode_counted(Route.CHAT_BATCH, reply, 4)
            alone = []
            for text in texts:
                body = encode(Route.CHAT, wanted, [text], max_tokens=8)
                alone += decode_counted(Route.CHAT, await transport.post(endpoint, path_of(Route.CHAT), body), 1)[0]
        finally:
            await transport.aclose()
        return [r.text for r in together], [r.text for r in alone]

    together, alone = io_thread.call(both())
    assert together == alone


@pytest.mark.parametrize("delivery", ["rows", "batch"])
def test_a_bad_row_stands_alone_with_the_servers_words(target: Target, delivery: str) -> None:
    texts = [f"Say the number {i}." for i in range(9)]
    texts[5] = "word " * (target.context + 200)
    # With the context withheld swarmkit cannot know that the row is too long, and sends all nine together.
    with sk.connect(target.pool.endpoints, model_max_context=1_000_000, delivery=delivery) as pool:
        with pytest.warns(sk.SwarmWarning, match="1 of 9 rows failed"):
            answers = sk.scatter(frame(texts), "prompt", pool=pool, max_tokens=4, temperature=0)
        assert pool.last_run is not None
        assert pool.last_run.batch_sizes[9] == 1
        assert pool.last_run.halvings >= 3
    assert answers["response_error"].notna().to_list() == [i == 5 for i in range(9)]
    assert f"maximum context length is {target.context}" in answers["response_error"][5]
    assert answers["response"].notna().sum() == 8


@pytest.mark.parametrize("delivery", ["rows", "batch"])
def test_token_counts_are_the_servers_own(target: Target, delivery: str) -> None:
    answers = spec(target, LONGER_AND_LONGER, delivery=delivery, ignore_eos=True, max_tokens=5)
    texts = sent(target, LONGER_AND_LONGER)
    assert answers["response_prompt_tokens"].to_list() == [target.tokens(t, special=False) for t in texts]
    body = {"model": target.pool.model, "prompt": texts, "add_special_tokens": False, "temperature": 0}
    usage = target.spec("/v1/completions", {**body, "max_tokens": 5, "ignore_eos": True})["usage"]
    assert answers["response_prompt_tokens"].sum() == usage["prompt_tokens"]
    assert answers["response_completion_tokens"].sum() == usage["completion_tokens"] == 5 * len(texts)
    shown = sk.preview(frame(LONGER_AND_LONGER), "prompt", 6, pool=target.pool)["tokens"]
    assert shown.to_list() == answers["response_prompt_tokens"].to_list()


def test_more_prompts_than_one_request_may_hold(target: Target) -> None:
    texts = [f"{i}" for i in range(1100)]
    with sk.connect(target.pool.endpoints, batch=sk.BatchPolicy(max_size=1024), chat=None) as pool:
        answers = spec(target, texts, pool=pool, max_tokens=1)
        assert pool.last_run is not None
        assert max(pool.last_run.batch_sizes) <= 1024
        assert pool.last_run.failed_requests == 0
    assert answers["response_finish_reason"].eq("length").all()
    if target.kind in ("vllm", "swarmkit"):
        with pytest.raises(urllib.error.HTTPError, match="400"):
            target.spec("/v1/completions", {"model": target.pool.model, "prompt": ["x"] * 1025, "max_tokens": 1})


@pytest.mark.parametrize("delivery", ["rows", "batch"])
def test_samples_land_on_their_row(target: Target, delivery: str) -> None:
    answers = spec(target, LONGER_AND_LONGER, n=3, temperature=1.0, delivery=delivery)
    assert answers.index.to_list() == [i for i in range(6) for _ in range(3)]
    assert answers["response_sample"].to_list() == [0, 1, 2] * 6
    # The prompts differ in length, so the counts tell whose answer it is.
    counts = [target.tokens(t, special=False) for t in sent(target, LONGER_AND_LONGER)]
    assert answers["response_prompt_tokens"].to_list() == [c for c in counts for _ in range(3)]
    assert answers["response"].nunique() > 6


@pytest.mark.parametrize("delivery", ["rows", "batch"])
def test_stop_sequences_are_not_in_the_text(target: Target, delivery: str) -> None:
    texts = ["Name three animals, please."]
    whole = spec(target, texts, max_tokens=12, delivery=delivery)["response"][0]
    stop = whole[len(whole) // 2 :][:3]
    assert stop.strip(), whole
    cut = spec(target, texts, max_tokens=12, delivery=delivery, stop=[stop])
    assert cut["response"][0] == whole[: whole.index(stop)]
    assert cut["response_finish_reason"][0] == "stop"


@pytest.mark.parametrize("mode", ["batch", "single"])
def test_max_tokens_is_kept(target: Target, mode: str) -> None:
    answers = spec(target, VARIED[:3], mode=mode, max_tokens=3, ignore_eos=True)
    assert answers["response_completion_tokens"].to_list() == [3, 3, 3]
    assert answers["response_finish_reason"].to_list() == ["length"] * 3


def test_an_unknown_model_is_a_clear_error(target: Target) -> None:
    with pytest.raises(sk.NoEndpointsError, match=f"it serves {target.pool.model}, not gpt-9"):
        sk.connect(target.pool.endpoints, model="gpt-9")
    with (
        sk.VLLMPool(target.pool.endpoints, model="gpt-9", chat="auto") as pool,
        pytest.raises(sk.NoEndpointsError, match=r"(?s)gpt-9.*does not exist"),
    ):
        sk.scatter(frame(VARIED), "prompt", pool=pool)


@pytest.mark.parametrize(("name", "value"), [("temperature", -1.0), ("top_p", 7.0), ("n", 3)])
@pytest.mark.parametrize("mode", ["batch", "single"])
def test_refused_parameters_are_told_before_rows_are_sent(target: Target, name: str, value: Any, mode: str) -> None:
    options: dict[str, Any] = {name: value, **({"temperature": 0} if name == "n" else {})}
    with pytest.raises(sk.SettingError, match=rf"refuses these parameters.*{name}.*\b{name}\b must be"):
        sk.scatter(frame(VARIED), "prompt", pool=target.pool, mode=mode, **options)
    assert sk.last_run().stats.requests == 0


CARD = {
    "type": "object",
    "properties": {
        "tone": {"type": "string", "enum": ["good", "bad"]},
        "plates": {"type": "integer", "minimum": 0, "maximum": 99},
        "again": {"type": "boolean"},
    },
    "required": ["tone", "plates", "again"],
    "additionalProperties": False,
}
REVIEWS = [f"Describe this as JSON with tone, plates, again: We had {n} plates, all of them good." for n in (2, 5, 12)]
ROUTES = ["list", "list, streamed", "batch chat"]


def constrained(target: Target, route: str, **fields: Any) -> list[dict[str, Any]]:
    """The choices of a greedy request, each with its whole text."""
    body = {"model": target.pool.model, "temperature": 0, "max_tokens": 120, **fields}
    if route == "batch chat":
        chats = [[{"role": "user", "content": review}] for review in REVIEWS]
        choices = target.spec("/v1/chat/completions/batch", {**body, "messages": chats})["choices"]
        return [{**choice, "text": choice["message"]["content"]} for choice in choices]
    body = {**body, "prompt": sent(target, REVIEWS), "add_special_tokens": False}
    if route == "list":
        return target.spec("/v1/completions", body)["choices"]
    rows: list[dict[str, Any]] = [{"text": "", "finish_reason": None} for _ in REVIEWS]
    events = target.spec("/v1/completions", {**body, "stream": True}).split("\n\n")
    for event in events[: events.index("data: [DONE]")]:
        for choice in json.loads(event.removeprefix("data: "))["choices"]:
            rows[choice["index"]]["text"] += choice["text"]
            rows[choice["index"]]["finish_reason"] = choice["finish_reason"]
    return rows


@pytest.mark.parametrize("route", ROUTES)
def test_a_choice_is_kept_though_no_model_would_make_it(target: Target, route: str) -> None:
    for choices in (["zqx"], ["zqx?", 'y"q|x']):
        rows = constrained(target, route, structured_outputs={"choice": choices})
        assert {row["finish_reason"] for row in rows} == {"stop"}
        assert {row["text"] for row in rows} <= set(choices)


@pytest.mark.parametrize("route", ROUTES)
def test_answers_are_of_their_schema(target: Target, route: str) -> None:
    for fields in (
        {"structured_outputs": {"json": CARD}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "card", "schema": CARD}}},
    ):
        rows = constrained(target, route, **fields)
        whole = [row for row in rows if row["finish_reason"] == "stop"]
        for row in whole:
            jsonschema.validate(json.loads(row["text"]), CARD)
        # The grammar allows any white space, of which a model without sense may write as much as it is given.
        cut = ["".join(row["text"].split()) for row in rows if row["finish_reason"] == "length"]
        assert all('{"tone":"good","plates":'.startswith(text[:8]) for text in cut)
        assert len(whole) + len(cut) == len(REVIEWS)
        least = {"swarmkit": len(REVIEWS), "vllm": int(target.name != "vllm-tiny")}
        assert len(whole) >= least.get(target.kind, 0)


@pytest.mark.parametrize("route", ROUTES)
def test_what_was_removed_from_vllm_is_ignored(target: Target, route: str) -> None:
    rows = constrained(target, route, guided_choice=["zqx"], max_tokens=4)
    assert "zqx" not in {row["text"] for row in rows}


def test_two_constraints_are_refused(target: Target) -> None:
    for wrong in ({"json": CARD, "choice": ["a"]}, {"json": "{"}, {"regex": "("}):
        with pytest.raises(urllib.error.HTTPError, match="400"):
            constrained(target, "list", structured_outputs=wrong)


@pytest.mark.parametrize("delivery", ["rows", "batch"])
def test_the_log_probability_of_an_answer_is_the_servers_own(target: Target, delivery: str) -> None:
    answers = spec(target, REVIEWS, logprobs=1, delivery=delivery)
    prompts = {"prompt": sent(target, REVIEWS), "add_special_tokens": False}
    asked = {"model": target.pool.model, "temperature": 0, "max_tokens": 6, "logprobs": 1, **prompts}
    for row, choice in enumerate(target.spec("/v1/completions", asked)["choices"]):
        told, tokens = choice["logprobs"], answers["response_token_logprobs"][row]
        assert [token["token"] for token in tokens] == told["tokens"]
        assert len(tokens) == answers["response_completion_tokens"][row]
        assert [token["logprob"] for token in tokens] == pytest.approx(told["token_logprobs"], abs=1e-3)
        assert answers["response_logprob"][row] == pytest.approx(sum(told["token_logprobs"]), abs=6e-3)


def test_labels_have_the_probabilities_of_a_direct_request(target: Target) -> None:
    def classified() -> pd.DataFrame:
        return sk.classify(frame(REVIEWS), "prompt", ["yes", "no"], instruction=None, details=True, pool=target.pool)

    # The one tells the log-probability of the chosen token only; in the vocabulary of the other these are no tokens.
    if target.name in ("openvino", "vllm-tiny"):
        with pytest.warns(sk.SwarmWarning, match="label_p is missing, and the answers are held to the labels"):
            answers = classified()
        assert answers["label"].notna().all()
        assert answers["label_p"].isna().all()
        return

    def ids(text: str) -> list[int]:
        return target.spec("/tokenize", {"model": model, "prompt": text, "add_special_tokens": False})["tokens"]

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the labels have")  # what a model says unasked
        answers = classified()
    model, labels = target.pool.model, ("yes", "no")
    for row, text in enumerate(sent(target, REVIEWS)):
        start, forms = ids(text), [form for label in labels for form in (label, f" {label}")]
        there = [new[-1] if (new := ids(text + form))[:-1] == start else ids(form)[0] for form in forms]
        body = {"model": model, "prompt": text, "add_special_tokens": False, "max_tokens": 1, "temperature": 0}
        asked = {**body, "logprobs": 1, "logprob_token_ids": there, "return_tokens_as_token_ids": True}
        (top,) = target.spec("/v1/completions", asked)["choices"][0]["logprobs"]["top_logprobs"]
        said = [math.exp(top[f"token_id:{i}"]) for i in there]
        shares = [answers[f"p_{label}"][row] * answers["label_mass"][row] for label in labels]
        assert shares == pytest.approx([said[0] + said[1], said[2] + said[3]], abs=1e-3)


def test_a_cancelled_run_frees_the_server(target: Target) -> None:
    texts = [f"{i}: write a very long story about the sea" for i in range(16)]
    run = sk.submit(frame(texts), "prompt", pool=target.slow, max_tokens=1900, extra_body={"ignore_eos": True})
    assert until(lambda: target.running() > 0, seconds=60)
    run.cancel()
    assert until(lambda: target.running() == 0, seconds=3)  # 0.1 s on an idle machine; the answers would take longer
    with pytest.raises(sk.CancelledError, match="of 16 rows"):
        run.result()
    assert run.partial()["response"].isna().any()
    assert spec(target, ["Hi"], pool=target.slow)["response"].notna().all()  # connections are in order


def until(condition: Any, seconds: float) -> bool:
    """Ask the server until the condition holds or the time is over."""
    deadline = time.monotonic() + seconds
    while not (held := condition()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return held
