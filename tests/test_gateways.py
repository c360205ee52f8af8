"""Gateways that take less than vLLM does: what they are asked is learned from them, and said in the run's routes."""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from gateways import Gateway, Institute, Strict
from scripted import Call, Scripted

import swarmkit as sk

QUICK = sk.RetryPolicy(base_s=0.02, cap_s=0.2)


def rows(count: int) -> pd.DataFrame:
    return pd.DataFrame({"q": [f"q{i}" for i in range(count)]})


def scatter(pool: Any, count: int, **options: Any) -> pd.DataFrame:
    return rows(count).swarm.scatter("{q}", pool=pool, progress=False, **options)


def lossy(pool: Any, count: int, **options: Any) -> pd.DataFrame:
    """The same, where rows may fail, which a warning sums up."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", sk.SwarmWarning)
        return scatter(pool, count, **options)


def on_trust(gateway: Gateway, **options: Any) -> sk.VLLMPool:
    """A pool of a gateway that lists no models."""
    with pytest.warns(sk.SwarmWarning, match="taken on trust"):
        return sk.connect(gateway.url, model="m", retry=QUICK, **options)


def assert_answered(frame: pd.DataFrame) -> None:
    """Every row has its own answer."""
    assert frame["response_error"].dropna().unique().tolist() == []
    assert (frame["response"] == "re: " + frame["q"]).all()


def routes() -> str:
    """The only route of the last run."""
    (route,) = sk.last_run().stats.routes
    return route


@pytest.fixture(params=["function", "file"])
def key_of(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[type[Gateway], Any], tuple[Gateway, Any]]:
    """Make a gateway, and its key as users have it: a function or a file."""

    def make(kind: type[Gateway], **options: Any) -> tuple[Gateway, Any]:
        path = tmp_path / "key"
        gateway = kind(key_file=path, **options)
        return gateway, path if request.param == "file" else gateway.key

    return make


# ---- whole runs ------------------------------


def test_chats_within_the_limits_of_a_strict_gateway_and_through_a_change_of_its_key(key_of):
    gateway, key = key_of(Strict, requests=100, minute_s=0.5, key_requests=150)
    with gateway, sk.connect(gateway.url, api_key=key, retry=QUICK) as pool:
        frame = scatter(pool, 250)
    assert_answered(frame)
    chats = gateway.of("/v1/chat/completions")
    assert len(chats) <= 260, "no row is paid for twice"
    assert {each.body["max_completion_tokens"] for each in chats} <= {1, 512}
    assert gateway.statuses[401] >= 1
    assert "max_completion_tokens in place of max_tokens" in routes()


def test_lists_to_a_gateway_without_a_listing_and_through_a_change_of_its_key(key_of):
    gateway, key = key_of(Institute, requests=12, minute_s=0.5, key_requests=15)
    with gateway, on_trust(gateway, api_key=key) as pool:
        with pytest.warns(sk.SwarmWarning, match="had no chats: prompts were sent as they are"):
            frame = scatter(pool, 1000)
        assert_answered(frame)
    sizes = Counter(each.prompts for each in gateway.of("/v1/completions"))
    lists = {size: count for size, count in sizes.items() if size > 2}
    assert sum(size * count for size, count in lists.items()) == 1000, "each row is in one list"
    assert sum(lists.values()) <= 20
    assert gateway.statuses[401] >= 1


def test_a_dialect_is_not_asked_for():
    with Strict() as gateway, sk.connect(gateway.url, api_key=gateway.key(), dialect="openai") as pool:
        assert_answered(scatter(pool, 5))
    assert len(gateway.of("/v1/chat/completions")) == 5
    assert gateway.statuses[400] == 0
    with Institute() as gateway, on_trust(gateway, api_key=gateway.key(), dialect="first", chat=None) as pool:
        assert_answered(scatter(pool, 5))
    assert gateway.statuses[400] == 0
    assert gateway.of("/v1/completions")[-1].prompts == 5


@pytest.mark.parametrize("mode", ["batch", "single"])
def test_fields_are_refused_in_every_mode_and_no_row_fails(mode):
    with Strict() as gateway, sk.connect(gateway.url, api_key=gateway.key(), retry=QUICK) as pool:
        assert_answered(scatter(pool, 4, mode=mode, temperature=0, details=True))
        refused = gateway.statuses[400]
        frame = scatter(pool, 4, mode=mode, n=2, details=True)
        assert frame["response"].tolist() == [f"re: q{i}" for i in range(4) for _ in range(2)]
        assert_answered(scatter(pool, 4, mode=mode, extra_body={"max_completion_tokens": 7}))
        assert gateway.of("/v1/chat/completions")[-1].body["max_completion_tokens"] == 7
    assert gateway.statuses[400] == refused + 1, "return_token_ids; max_tokens was refused before"


def test_the_token_limit_keeps_its_name_where_its_value_is_refused():
    def script(call: Call) -> None:
        if call.body["max_tokens"] > 100:
            words = "max_tokens is too large: 512. This model supports at most 100 (see max_completion_tokens)."
            call.reply(json.dumps({"error": {"message": words}}).encode(), "400 Bad Request")
        else:
            call.answer()

    with Scripted(script) as server, sk.VLLMPool([server.address], model="m", retry=QUICK) as pool:
        frame = lossy(pool, 2, mode="single", chat="auto")
    assert frame["response_error"].str.contains("too large").all()


def test_a_field_that_is_refused_in_mid_run_fails_no_row():
    # Behind one address another family takes over that does not know one field, and then one that does not know two.
    def script(call: Call) -> None:
        odd = "stream_interval" if server.requests > 9 else "stream_options" if server.requests > 5 else ""
        if odd in call.body:
            call.reply(json.dumps({"detail": f"Unknown field: {odd}"}).encode(), "422 Unprocessable Entity")
        else:
            call.answer()

    with Scripted(script) as server:
        batch = sk.BatchPolicy(max_size=10, max_in_flight=2)
        with sk.VLLMPool([server.address], model="m", retry=QUICK, batch=batch, delivery="rows") as pool:
            frame = scatter(pool, 200, chat=None)
            assert (frame["response"] == "echo: " + frame["q"]).all()
            assert "without stream_interval, stream_options, which the server refuses" in routes()
            assert sk.last_run().stats.failed_requests == 0
            before = server.requests
            scatter(pool, 10, chat=None)
            assert server.requests == before + 1, "it is remembered"


# ---- replies that are not as asked ------------------------------


def choice(index: int, text: str, reason: str | None = "stop") -> dict[str, Any]:
    return {"index": index, "text": text, "finish_reason": reason}


def answers(call: Call) -> list[dict[str, Any]]:
    n = call.body.get("n", 1)
    texts = [f"re: {prompt} {k}" if n > 1 else f"re: {prompt}" for prompt in call.prompts for k in range(n)]
    return [choice(index, text) for index, text in enumerate(texts)]


def stream(call: Call, chunks: list[Any]) -> None:
    events = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks)
    call.reply(f"{events}data: [DONE]\n\n".encode(), media="text/event-stream")


def whole(call: Call) -> None:
    call.reply(json.dumps({"choices": answers(call)}, indent=2).encode())


def whole_in_parts(call: Call) -> None:
    call.reply(json.dumps([{"choices": [each]} for each in answers(call)]).encode())


def beginning_with_null(call: Call) -> None:
    if not call.stream:
        return whole_in_parts(call)
    return stream(call, [None, *({"choices": [each]} for each in answers(call))])


def every_index_0(call: Call) -> None:
    if not call.stream:
        return whole(call)
    words = [each["text"].split(" ") for each in answers(call)]
    tokens = [choice(0, f"{word[k]} " if k + 1 < len(word) else word[k], "stop" if k + 1 == len(word) else None)
              for k in range(max(map(len, words))) for word in words if k < len(word)]  # fmt: skip
    return stream(call, [{"choices": [token]} for token in tokens])


@pytest.mark.parametrize("by_hand", [False, True], ids=["connect", "by hand"])
@pytest.mark.parametrize("delivery", ["rows", "batch", "auto"])
@pytest.mark.parametrize("reply", [whole, whole_in_parts, beginning_with_null, every_index_0])
def test_no_answer_reaches_another_row_however_lists_are_answered(reply, delivery, by_hand):
    def script(call: Call) -> None:
        if call.headers.startswith("GET /v1/models"):
            call.reply(json.dumps({"data": [{"id": "m", "owned_by": "someone"}]}).encode())
        elif call.headers.startswith("POST /v1/completions"):
            reply(call)
        else:
            call.reply(b"{}", "404 Not Found")

    batch, retry = sk.BatchPolicy(max_size=4, hedge=False), sk.RetryPolicy(base_s=0.01, cap_s=0.02, max_attempts=2)
    with Scripted(script) as server:
        where = "{}:{}".format(*server.address)
        make = sk.VLLMPool([where], model="m", retry=retry, batch=batch) if by_hand else None
        with make or sk.connect(where, retry=retry, batch=batch, chat=None) as pool:
            one = lossy(pool, 4, delivery=delivery, chat=None)
            two = lossy(pool, 4, delivery=delivery, chat=None, n=2)
    samples = [f"re: q{i} {k}" for i in range(4) for k in range(2)]
    if by_hand and delivery == "rows" and reply is every_index_0:  # no stream is right, and nothing else is asked for
        assert (one["response"].isna() | (one["response"] == "re: " + one["q"])).all()
        assert (two["response"].isna() | (two["response"] == samples)).all()
    else:
        assert_answered(one)
        assert two["response"].tolist() == samples


# ---- what every row is refused for ------------------------------


def refusing(words: Callable[[dict[str, Any]], str]) -> Callable[[Call], None]:
    """A server that refuses all requests of which something is to be said."""

    def script(call: Call) -> None:
        if said := words(call.body):
            call.reply(json.dumps({"error": {"message": said}}).encode(), "400 Bad Request")
        else:
            call.answer()

    return script


def test_what_every_row_is_refused_for_takes_a_few_requests():
    def words(body: dict[str, Any]) -> str:
        return f"'{body['prompt'][0]}' and {len(body['prompt']) - 1} more: the adapter is not loaded"

    with Scripted(refusing(words)) as server, sk.VLLMPool([server.address], model="m", retry=QUICK) as pool:
        frame = lossy(pool, 300, chat=None, delivery="batch")
        assert server.requests <= 30
    assert frame["response_error"].str.contains("the adapter is not loaded").all()


def test_rows_that_are_refused_for_their_own_sake_cost_themselves():
    def words(body: dict[str, Any]) -> str:
        texts = body["prompt"]
        return "This prompt has 5000 tokens, at most 4096 fit" if any(t not in ("q7", "Hi") for t in texts) else ""

    with Scripted(refusing(words)) as server, sk.VLLMPool([server.address], model="m", retry=QUICK) as pool:
        frame = lossy(pool, 60, chat=None, delivery="batch")
    assert frame["response"].dropna().to_dict() == {7: "echo: q7"}
    assert frame["response_error"].dropna().str.contains("5000 tokens").sum() == 59


def test_a_floor_of_tokens_above_their_limit_ends_the_call_before_its_first_row():
    def words(body: dict[str, Any]) -> str:
        least, most = body.get("min_tokens", 0), body["max_tokens"]
        return f"min_tokens must be less than or equal to max_tokens={most}, got {least}." if least > most else ""

    with Scripted(refusing(words)) as server, sk.VLLMPool([server.address], model="m", retry=QUICK) as pool:
        with pytest.raises(sk.SettingError, match="min_tokens must be less"):
            scatter(pool, 300, chat=None, delivery="batch", max_tokens=16, extra_body={"min_tokens": 20})
        assert server.requests <= 4


def test_a_system_prompt_that_every_chat_is_refused_for_ends_the_call_before_its_first_row():
    def words(body: dict[str, Any]) -> str:
        return "System role not supported" if body["messages"][0]["role"] == "system" else ""

    with Scripted(refusing(words)) as server, sk.VLLMPool([server.address], model="m", retry=QUICK) as pool:
        with pytest.raises(sk.SettingError, match="System role not supported"):
            scatter(pool, 300, chat="auto", mode="single", system="Be brief.")
        assert server.requests <= 6


def test_what_needs_chats_is_refused_in_words_where_there_are_none():
    says = pytest.raises(sk.SettingError, match="system= needs chats, and the servers of m have none")
    with Institute() as gateway, on_trust(gateway, api_key=gateway.key()) as pool, says:
        scatter(pool, 3, system="Be brief.")


# ---- dialects in words ------------------------------


@pytest.mark.parametrize(
    ("dialect", "words"),
    [
        ("openapi", "must be one of 'vllm', 'openai', 'first'"),
        (3, "must be the name of a dialect"),
        ({"list": True}, "Did you mean 'lists'"),
        ({"lists": "yes"}, "must be True or False"),
        ({"omit": ["temperature"]}, "must be a list of some of stream_interval"),
    ],
)
def test_what_is_no_dialect_is_refused_in_words(dialect, words):
    with pytest.raises(sk.SettingError, match=words):
        sk.VLLMPool(["node1:8000"], dialect=dialect)
