"""The real model behind the server. One process for all of these: it takes seconds to load."""

from __future__ import annotations

import http.client
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import psutil
import pytest
from test_server_http import FRANCE, Client, eventually, joined
from test_server_launch import gone

from swarmkit.server import LocalServerError, LocalSwarm, local
from swarmkit.server.model_file import model_file

pytestmark = pytest.mark.slow

QUESTIONS = [FRANCE, "Write a line about rain. 😀", "Say: naïve café, 日本語"]


@pytest.fixture(scope="module")
def swarm() -> Iterator[LocalSwarm]:
    with local(engine="openvino", max_model_len=512) as swarm:
        yield swarm


@pytest.fixture
def client(swarm: LocalSwarm) -> Client:
    return Client(swarm.endpoints[0])


def test_the_model_file_is_found_again() -> None:
    assert model_file().stat().st_mtime == model_file().stat().st_mtime


def test_it_knows_a_capital(client: Client) -> None:
    reply = client.chat(FRANCE, temperature=0, max_tokens=20)
    choice = reply["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("The capital of France is Paris.", "stop")
    assert reply["usage"]["completion_tokens"] == 8


def test_batch_chat_stream_and_single_give_the_same_text(client: Client) -> None:
    prompts = [client.wrap(question) for question in QUESTIONS]
    body = {"temperature": 0, "max_tokens": 20, "add_special_tokens": False}
    batch = client.complete(prompt=prompts, **body)
    expected = {c["index"]: (c["text"], c["finish_reason"]) for c in batch["choices"]}
    chats = [client.chat(question, temperature=0, max_tokens=20) for question in QUESTIONS]
    assert [c["choices"][0]["message"]["content"] for c in chats] == [text for text, _ in expected.values()]
    assert sum(chat["usage"]["prompt_tokens"] for chat in chats) == batch["usage"]["prompt_tokens"]
    assert joined(client.stream(prompt=prompts, stream_interval=7, **body)) == expected
    ids = [client.post("/tokenize", {"prompt": p, "add_special_tokens": False})[1]["tokens"] for p in prompts]
    assert client.texts(prompt=ids, **body) == [text for text, _ in expected.values()]


def test_the_text_is_that_of_the_token_ids(client: Client) -> None:
    prompt = client.wrap("Answer with three emoji, then the word naïve: 🎉😀")
    body = {"prompt": prompt, "temperature": 0, "max_tokens": 40, "return_token_ids": True}
    choice = client.complete(**body)["choices"][0]
    whole = client.post("/detokenize", {"tokens": choice["token_ids"]})[1]["prompt"]
    assert choice["text"] == whole.removesuffix("<|im_end|>")


def test_a_seed_repeats_and_samples_differ(client: Client) -> None:
    body = {"prompt": client.wrap("Tell me a story."), "n": 3, "seed": 5, "max_tokens": 12, "temperature": 1.2}
    first = client.texts(**body)
    assert client.texts(**body) == first
    assert len(set(first)) == 3


def test_stop_strings_and_lengths(client: Client) -> None:
    body = {"prompt": client.wrap(FRANCE), "temperature": 0}
    choice = client.complete(**body, stop=["is P"])["choices"][0]
    assert (choice["text"], choice["stop_reason"]) == ("The capital of France ", "is P")
    assert joined(client.stream(**body, stop=["is P"])) == {0: ("The capital of France ", "stop")}
    assert client.complete(**body, max_tokens=25, ignore_eos=True)["usage"]["completion_tokens"] == 25
    assert client.complete(**body, max_tokens=25, min_tokens=20)["usage"]["completion_tokens"] >= 20


def test_prompts_that_cannot_be_run_are_refused(client: Client) -> None:
    for prompt, says in (
        (["x", "word " * 600], "maximum context length is 512"),
        (["x", ""], "empty"),
        ([[99999]], "vocab"),
    ):
        status, reply = client.post("/v1/completions", {"prompt": prompt})
        assert status == 400
        assert says in reply["error"]["message"]


SMALL = {"$ref": "#/$defs/tone"}
REVIEW = {
    "type": "object",
    "properties": {
        "tone": SMALL,
        "plates": {"type": "integer", "minimum": 0, "maximum": 99},
        "dish": {"anyOf": [{"type": "string", "maxLength": 12}, {"type": "null"}]},
        "when": {"type": "string", "format": "date"},
        "where": {"type": "object", "properties": {'city "x"': {"type": "string", "pattern": "^[A-Z][a-z]{2,9}$"}}},
        "parts": {"type": "array", "items": SMALL, "minItems": 1, "maxItems": 2},
    },
    "required": ["tone", "share"],
    "additionalProperties": {"type": "number"},
    "$defs": {"tone": {"type": "string", "enum": ["good", "bad"]}},
}


def test_the_model_keeps_to_a_schema(client: Client) -> None:
    prompts = [client.wrap(f"As JSON: we had {n} plates, all good. {padding}") for n, padding in ((3, ""), (5, "!"))]
    body = {"temperature": 0, "max_tokens": 200, "structured_outputs": {"json": REVIEW}, "ignore_eos": True}
    rows = client.complete(prompt=prompts, **body)["choices"]
    for row in rows:
        assert row["finish_reason"] == "stop", row
        answer = json.loads(row["text"])
        jsonschema.validate(answer, REVIEW)
        assert list(answer) == [*REVIEW["properties"], "share"]
        assert "\n\n" not in row["text"].partition('"parts"')[0]
    assert joined(client.stream(prompt=prompts, stream_interval=9, **body)) == {
        row["index"]: (row["text"], "stop") for row in rows
    }


@pytest.mark.parametrize(
    ("constraint", "pattern"),
    [
        ({"choice": ["zqx"]}, "zqx"),
        ({"choice": ['a [b]|\\ "c"\n?', "é😀<|im_end|>"]}, r'a \[b\]\|\\ "c"\n\?|é😀<\|im_end\|>'),
        ({"regex": r"^[A-Z]{2}-\d{3}(\.\w\s)?$"}, r"[A-Z]{2}-\d{3}(\.\w\s)?"),
        ({"grammar": 'root ::= verb " *"\nverb ::= "eat" | "drink" [0-9]'}, r"(eat|drink[0-9]) \*"),
        ({"json": {"type": ["null", "boolean"]}}, "null|true|false"),
        ({"json": {"enum": [1, "x", None]}}, '1|"x"|null'),
    ],
)
def test_the_model_keeps_to_what_it_would_not_say(client: Client, constraint: Any, pattern: str) -> None:
    texts = client.texts(prompt=[client.wrap(q) for q in QUESTIONS[:2]], structured_outputs=constraint, max_tokens=40)
    assert all(re.fullmatch(pattern, text) for text in texts), texts
    chat = client.chat(FRANCE, structured_outputs=constraint, min_tokens=30, max_tokens=40)
    assert re.fullmatch(pattern, chat["choices"][0]["message"]["content"])


def test_constraints_that_cannot_be_kept_are_refused_and_harm_nothing(client: Client) -> None:
    for wrong in (
        {"json": {"$ref": "#"}},
        {"json": {"type": "array", "uniqueItems": True}},
        {"json": {"type": "plum"}},
        {"regex": "("},
        {"regex": "(?=a)b"},
        {"grammar": "nonsense"},
        {"choice": ["\ud800"]},
        {"choice": ["zqx", ""]},
    ):
        status, reply = client.post("/v1/completions", {"prompt": "x", "structured_outputs": wrong})
        assert (status, reply["error"]["param"]) == (400, "structured_outputs"), wrong
    assert client.chat(FRANCE, temperature=0)["choices"][0]["message"]["content"].endswith("Paris.")


def test_a_dropped_connection_frees_its_sequences(client: Client) -> None:
    body = {"prompt": [client.wrap(FRANCE)] * 70, "max_tokens": 400, "ignore_eos": True}
    connection = http.client.HTTPConnection(client.endpoint.host, client.endpoint.port)
    connection.request("POST", "/v1/completions", json.dumps(body), {"Authorization": f"Bearer {client.key}"})
    eventually(lambda: client.metric("vllm:num_requests_running") == 64)
    assert client.metric("vllm:num_requests_waiting") == 6
    connection.close()
    eventually(lambda: client.metric("vllm:num_requests_running") == 0)
    assert client.chat(FRANCE, temperature=0)["choices"][0]["message"]["content"].endswith("Paris.")


def test_one_that_fails_takes_the_others_down(tmp_path: Path) -> None:
    model = tmp_path / "model.gguf"
    model.write_bytes(b"not a model")
    before = psutil.Process().children()
    with pytest.raises(LocalServerError, match="ended before it was ready"):
        local(2, engine="openvino", model=model)
    assert all(gone(process.pid) for process in set(psutil.Process().children()) - set(before))
