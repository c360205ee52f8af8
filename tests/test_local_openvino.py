"""The real model behind the server. One process for all of these: it takes seconds to load."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from test_local_launch import gone
from test_local_server import FRANCE, Client, eventually, joined

from swarmkit.local import LocalServerError, LocalSwarm, local
from swarmkit.local.model import model_file

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
    with pytest.raises(LocalServerError, match="ended before it served"):
        local(2, engine="openvino", model=model)
    assert all(gone(process.pid) for process in set(psutil.Process().children()) - set(before))
