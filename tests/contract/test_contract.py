"""How swarmkit and a server understand each other.

Everything here is asked of every target, so that the stand-in cannot drift from the real thing. Where a server's
arithmetic may depend on what runs beside a row, token counts are compared, which cannot.
"""

from __future__ import annotations

import time
import urllib.error
from typing import Any

import pandas as pd
import pytest
from contract.targets import Target

import swarmkit as sk
from swarmkit import bridge
from swarmkit.events import RequestEnded, RowsDone, RunEvent
from swarmkit.records import Ask, Prompts, Route
from swarmkit.results import Columns
from swarmkit.transport import Transport
from swarmkit.wire import decode, encode, path_of

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


def ask(target: Target, texts: list[str], **options: Any) -> pd.DataFrame:
    options = {"temperature": 0, "max_tokens": 6, "details": True, "pool": target.pool, **options}
    answers = sk.scatter(frame(texts), "prompt", **options)
    assert answers["response_error"].isna().all(), answers["response_error"].dropna().to_list()
    return answers


def sent(target: Target, texts: list[str], **options: Any) -> list[str]:
    return sk.preview(frame(texts), "prompt", len(texts), pool=target.pool, **options)["sent"].to_list()


def test_probe_finds_model_context_and_kind(target: Target) -> None:
    listed = target.ask("/v1/models")["data"][0]
    assert target.pool.model == listed["id"]
    assert target.context == listed["max_model_len"]
    assert target.kind == listed["owned_by"]


def test_both_deliveries_give_the_same_rows_in_order(target: Target) -> None:
    rows = ask(target, LONGER_AND_LONGER, delivery="rows")
    assert "rows as they finish" in next(iter(sk.last_run().stats.routes))
    whole = ask(target, LONGER_AND_LONGER, delivery="batch")
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
    wanted = pool.ask(max_tokens=64, delivery="auto")
    with pool:
        assert bridge.call(pool.run(Prompts(texts), wanted, columns, [heard.append])) is None
    assert sum(isinstance(event, RequestEnded) for event in heard) == 1
    portions = [event.rows for event in heard if isinstance(event, RowsDone) and event.rows]
    assert len(portions) > 1
    assert sorted(row for rows in portions for row in rows) == list(range(target.rows))


@pytest.mark.parametrize("system", [None, "You are a botanist. Answer in one word."])
def test_batch_and_single_give_the_same_text(target: Target, system: str | None) -> None:
    texts = VARIED[:4] if system else VARIED
    batch = ask(target, texts, mode="batch", system=system)
    assert next(iter(sk.last_run().stats.routes)).startswith("completions")
    single = ask(target, texts, mode="single", system=system)
    assert next(iter(sk.last_run().stats.routes)).startswith("chat")
    same = ["response_prompt_tokens", "response", "response_finish_reason"]
    pd.testing.assert_frame_equal(batch[same], single[same])


def test_system_prompt_is_part_of_what_is_sent(target: Target) -> None:
    plain, botanist = sent(target, ["Hi"])[0], sent(target, ["Hi"], system="You are a botanist.")[0]
    assert "botanist" in botanist
    assert "botanist" not in plain
    assert ask(target, ["Hi"], system="You are a botanist.")["response_prompt_tokens"][0] == target.tokens(
        botanist, special=False
    )


def test_prompts_without_a_template_go_as_they_are(target: Target) -> None:
    texts = ["One, two, three,", "Es grünt so grün"]
    assert sent(target, texts, chat=None) == texts
    raw = ask(target, texts, chat=None)
    assert raw["response_prompt_tokens"].to_list() == [target.tokens(t, special=True) for t in texts]


def test_a_template_by_hand_is_as_good_as_the_learned_one(target: Target) -> None:
    prefix, suffix = sent(target, ["A-SENTINEL"])[0].split("A-SENTINEL")
    by_hand = ask(target, LONGER_AND_LONGER, chat=(prefix, suffix))
    learned = ask(target, LONGER_AND_LONGER)
    same = ["response", "response_prompt_tokens"]
    pd.testing.assert_frame_equal(by_hand[same], learned[same])


def test_batch_chat_route_answers_as_the_chat_does(target: Target) -> None:
    wanted = Ask(model=target.pool.model or "", params={"temperature": 0})
    texts = VARIED[:4]

    async def both() -> tuple[list[str], list[str]]:
        transport, endpoint = Transport(), target.pool.endpoints[0]
        try:
            body = encode(Route.CHAT_BATCH, wanted, texts, max_tokens=8)
            together = decode(Route.CHAT_BATCH, await transport.post(endpoint, path_of(Route.CHAT_BATCH), body), 4)
            alone = []
            for text in texts:
                body = encode(Route.CHAT, wanted, [text], max_tokens=8)
                alone += decode(Route.CHAT, await transport.post(endpoint, path_of(Route.CHAT), body), 1)
        finally:
            await transport.aclose()
        return [r.text for r in together], [r.text for r in alone]

    together, alone = bridge.call(both())
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
    answers = ask(target, LONGER_AND_LONGER, delivery=delivery, ignore_eos=True, max_tokens=5)
    texts = sent(target, LONGER_AND_LONGER)
    assert answers["response_prompt_tokens"].to_list() == [target.tokens(t, special=False) for t in texts]
    body = {"model": target.pool.model, "prompt": texts, "add_special_tokens": False, "temperature": 0}
    usage = target.ask("/v1/completions", {**body, "max_tokens": 5, "ignore_eos": True})["usage"]
    assert answers["response_prompt_tokens"].sum() == usage["prompt_tokens"]
    assert answers["response_completion_tokens"].sum() == usage["completion_tokens"] == 5 * len(texts)
    shown = sk.preview(frame(LONGER_AND_LONGER), "prompt", 6, pool=target.pool)["tokens"]
    assert shown.to_list() == answers["response_prompt_tokens"].to_list()


def test_more_prompts_than_one_request_may_hold(target: Target) -> None:
    texts = [f"{i}" for i in range(1100)]
    with sk.connect(target.pool.endpoints, batch=sk.BatchPolicy(max_size=1024), chat=None) as pool:
        answers = ask(target, texts, pool=pool, max_tokens=1)
        assert pool.last_run is not None
        assert max(pool.last_run.batch_sizes) <= 1024
        assert pool.last_run.failed_requests == 0
    assert answers["response_finish_reason"].eq("length").all()
    if target.kind in ("vllm", "swarmkit"):
        with pytest.raises(urllib.error.HTTPError, match="400"):
            target.ask("/v1/completions", {"model": target.pool.model, "prompt": ["x"] * 1025, "max_tokens": 1})


@pytest.mark.parametrize("delivery", ["rows", "batch"])
def test_samples_land_on_their_row(target: Target, delivery: str) -> None:
    answers = ask(target, LONGER_AND_LONGER, n=3, temperature=1.0, delivery=delivery)
    assert answers.index.to_list() == [i for i in range(6) for _ in range(3)]
    assert answers["response_sample"].to_list() == [0, 1, 2] * 6
    # The prompts differ in length, so the counts tell whose answer it is.
    counts = [target.tokens(t, special=False) for t in sent(target, LONGER_AND_LONGER)]
    assert answers["response_prompt_tokens"].to_list() == [c for c in counts for _ in range(3)]
    assert answers["response"].nunique() > 6


@pytest.mark.parametrize("delivery", ["rows", "batch"])
def test_stop_sequences_are_not_in_the_text(target: Target, delivery: str) -> None:
    texts = ["Name three animals, please."]
    whole = ask(target, texts, max_tokens=12, delivery=delivery)["response"][0]
    stop = whole[len(whole) // 2 :][:3]
    assert stop.strip(), whole
    cut = ask(target, texts, max_tokens=12, delivery=delivery, stop=[stop])
    assert cut["response"][0] == whole[: whole.index(stop)]
    assert cut["response_finish_reason"][0] == "stop"


@pytest.mark.parametrize("mode", ["batch", "single"])
def test_max_tokens_is_kept(target: Target, mode: str) -> None:
    answers = ask(target, VARIED[:3], mode=mode, max_tokens=3, ignore_eos=True)
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


def test_a_cancelled_run_frees_the_server(target: Target) -> None:
    texts = [f"{i}: write a very long story about the sea" for i in range(16)]
    run = sk.submit(frame(texts), "prompt", pool=target.slow, max_tokens=1900, extra_body={"ignore_eos": True})
    assert until(lambda: target.running() > 0, seconds=60)
    run.cancel()
    assert until(lambda: target.running() == 0, seconds=3)  # 0.1 s on an idle machine; the answers would take longer
    with pytest.raises(sk.CancelledError, match="of 16 rows"):
        run.result()
    assert run.partial()["response"].isna().any()
    assert ask(target, ["Hi"], pool=target.slow)["response"].notna().all()  # connections are in order


def until(condition: Any, seconds: float) -> bool:
    """Ask the server until the condition holds or the time is over."""
    deadline = time.monotonic() + seconds
    while not (held := condition()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return held
