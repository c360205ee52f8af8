"""The local server over real sockets: what it answers, and that it errs as vLLM errs."""

from __future__ import annotations

import http.client
import json
import re
import socket
import struct
import time
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from swarmkit.client.hostfile import AgentEndpoint
from swarmkit.server import LocalSwarm, local

FRANCE = "What is the capital of France?"


class Client:
    """A plain HTTP client for one endpoint; a connection for each request."""

    def __init__(self, endpoint: AgentEndpoint, key: str | None = None) -> None:
        self.endpoint = endpoint
        self.key = key if key is not None else endpoint.key()

    def send(
        self, method: str, path: str, body: Any = None, timeout: float = 20
    ) -> tuple[int, Mapping[str, str], bytes]:
        connection = http.client.HTTPConnection(self.endpoint.host, self.endpoint.port, timeout=timeout)
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        try:
            connection.request(method, path, data, {"Authorization": f"Bearer {self.key}"})
            response = connection.getresponse()
            return response.status, response.headers, response.read()
        finally:
            connection.close()

    def get(self, path: str) -> tuple[int, Any]:
        status, _, data = self.send("GET", path)
        return status, json.loads(data)

    def post(self, path: str, body: Any) -> tuple[int, Any]:
        status, _, data = self.send("POST", path, body)
        return status, json.loads(data)

    def complete(self, **body: Any) -> dict[str, Any]:
        """A reply of /v1/completions that must be fine."""
        status, reply = self.post("/v1/completions", body)
        assert status == 200, reply
        return reply

    def texts(self, **body: Any) -> list[str]:
        return [choice["text"] for choice in self.complete(**body)["choices"]]

    def chat(self, content: str, **body: Any) -> dict[str, Any]:
        status, reply = self.post("/v1/chat/completions", {"messages": [{"role": "user", "content": content}], **body})
        assert status == 200, reply
        return reply

    def stream(self, path: str = "/v1/completions", **body: Any) -> list[dict[str, Any]]:
        """The chunks of a stream that must end with [DONE]."""
        status, headers, data = self.send("POST", path, {**body, "stream": True})
        assert status == 200, data
        assert headers["content-type"].startswith("text/event-stream")
        events = data.decode().split("\n\n")
        assert events[-2:] == ["data: [DONE]", ""]
        return [json.loads(event.removeprefix("data: ")) for event in events[:-2]]

    def wrap(self, content: str) -> str:
        """A prompt in the model's template, learned as a client has to: tokenize, detokenize, split."""
        message = {"role": "user", "content": "SENTINEL"}
        _, tokens = self.post("/tokenize", {"messages": [message]})
        _, text = self.post("/detokenize", {"tokens": tokens["tokens"]})
        return text["prompt"].replace("SENTINEL", content)

    def metric(self, name: str, **labels: str) -> float:
        """Sum of a metric over the samples with these labels."""
        _, _, data = self.send("GET", "/metrics")
        found = re.findall(rf"^{re.escape(name)}\{{(.*)\}} (\S+)$", data.decode(), re.MULTILINE)
        return sum(float(v) for where, v in found if all(f'{k}="{w}"' in where for k, w in labels.items()))


def joined(chunks: list[dict[str, Any]]) -> dict[int, tuple[str, str]]:
    """Text and finish reason of each index of a stream."""
    texts: dict[int, str] = {}
    finishes: dict[int, str] = {}
    for chunk in chunks:
        for choice in chunk["choices"]:
            piece = choice["text"] if "text" in choice else choice["delta"]["content"]
            texts[choice["index"]] = texts.get(choice["index"], "") + piece
            if choice["finish_reason"]:
                assert choice["index"] not in finishes
                finishes[choice["index"]] = choice["finish_reason"]
    return {i: (texts[i], finishes[i]) for i in sorted(texts)}


def eventually(condition: Any, seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def swarm() -> Iterator[LocalSwarm]:
    with local(engine="echo", addresses=2, max_model_len=300) as swarm:
        yield swarm


@pytest.fixture
def client(swarm: LocalSwarm) -> Client:
    return Client(swarm.endpoints[0])


def test_a_list_of_prompts_is_answered_in_order(client: Client) -> None:
    reply = client.complete(prompt=["one", "two", "three"], model="echo")
    assert [(c["index"], c["text"], c["finish_reason"]) for c in reply["choices"]] == [
        (0, "echo: one", "stop"),
        (1, "echo: two", "stop"),
        (2, "echo: three", "stop"),
    ]
    assert reply["object"] == "text_completion"
    usage = reply["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


def test_a_single_text_and_token_ids_are_prompts_too(client: Client) -> None:
    one, two = (client.post("/tokenize", {"prompt": p})[1]["tokens"] for p in ("one", "two, please"))
    assert client.texts(prompt="one") == ["echo: one"]
    assert client.texts(prompt=two) == ["echo: two, please"]
    assert client.texts(prompt=[one, two]) == ["echo: one", "echo: two, please"]


def test_max_tokens_defaults_to_16_and_cuts(client: Client) -> None:
    reply = client.complete(prompt="x" * 200)
    assert reply["choices"][0]["finish_reason"] == "length"
    assert reply["usage"]["completion_tokens"] == 16
    assert client.complete(prompt="x" * 200, max_tokens=3)["usage"]["completion_tokens"] == 3


def test_prompt_and_answer_share_the_context(client: Client) -> None:
    reply = client.complete(prompt="x" * 1000, max_tokens=300)
    assert reply["usage"]["prompt_tokens"] == 250
    assert reply["usage"]["total_tokens"] == 300


def test_samples_are_told_apart_and_numbered(client: Client) -> None:
    reply = client.complete(prompt=["a", "b"], n=2)
    assert [(c["index"], c["text"]) for c in reply["choices"]] == [
        (0, "echo: a"),
        (1, "echo #1: a"),
        (2, "echo: b"),
        (3, "echo #1: b"),
    ]


def test_a_seed_shows_unless_sampling_is_greedy(client: Client) -> None:
    assert client.texts(prompt=["a", "a"], seed=7) == ["echo 7: a", "echo 7: a"]
    assert client.texts(prompt="a", seed=7, temperature=0) == ["echo: a"]


def test_stop_strings_end_an_answer_and_are_not_in_it(client: Client) -> None:
    choice = client.complete(prompt="one END two", stop=["END", "two"], max_tokens=50)["choices"][0]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("echo: one ", "stop", "END")
    chunks = client.stream(prompt="one END two", stop="END", max_tokens=50)
    assert joined(chunks) == {0: ("echo: one ", "stop")}


def test_ignore_eos_and_min_tokens_lengthen_an_answer(client: Client) -> None:
    reply = client.complete(prompt=["a", "b"], max_tokens=40, ignore_eos=True)
    assert reply["usage"]["completion_tokens"] == 80
    assert {c["finish_reason"] for c in reply["choices"]} == {"length"}
    assert client.complete(prompt="a", max_tokens=40, min_tokens=20)["usage"]["completion_tokens"] == 21


@pytest.mark.parametrize("interval", [None, 1, 3, 100_000])
@pytest.mark.parametrize("extra", [{}, {"n": 2}, {"stop": ["o"]}, {"max_tokens": 2}, {"seed": 3}])
def test_a_stream_says_the_same_as_a_plain_reply(client: Client, interval: int | None, extra: dict[str, Any]) -> None:
    body = {"prompt": ["hello world, how do you do", "Grüße aus Köln", "ok"], **extra}
    plain = {c["index"]: (c["text"], c["finish_reason"]) for c in client.complete(**body)["choices"]}
    streamed = client.stream(**body, **({"stream_interval": interval} if interval else {}))
    assert joined(streamed) == plain


def test_stream_interval_sets_the_number_of_chunks(client: Client) -> None:
    body = {"prompt": ["x" * 150, "y" * 150], "max_tokens": 30}
    chunks = client.stream(**body, stream_interval=10, return_token_ids=True)
    assert [len(c["choices"][0]["token_ids"]) for c in chunks if c["choices"][0]["index"] == 0] == [1, 10, 10, 9]
    assert [c["choices"][0]["index"] for c in chunks] == [0, 1] * 4
    assert len(client.stream(**body)) == 60


def test_usage_comes_at_the_end_of_a_stream_and_in_each_chunk_if_asked(client: Client) -> None:
    body = {"prompt": ["hello", "you there"], "stream_interval": 100}
    whole = client.complete(prompt=body["prompt"])["usage"]
    assert all("usage" not in chunk for chunk in client.stream(**body))
    *chunks, last = client.stream(**body, stream_options={"include_usage": True, "continuous_usage_stats": True})
    assert (last["choices"], last["usage"]) == ([], whole)
    ends = {c["choices"][0]["index"]: c["usage"] for c in chunks}
    assert sum(usage["completion_tokens"] for usage in ends.values()) == whole["completion_tokens"]
    assert sum(usage["prompt_tokens"] for usage in ends.values()) == whole["prompt_tokens"]


def test_token_ids_are_those_of_the_text(client: Client) -> None:
    choice = client.complete(prompt="hello", return_token_ids=True)["choices"][0]
    text = client.post("/detokenize", {"tokens": choice["token_ids"]})[1]["prompt"]
    assert text == choice["text"] + "<|im_end|>"
    assert client.post("/detokenize", {"tokens": choice["prompt_token_ids"]})[1]["prompt"] == "hello"


@pytest.mark.parametrize(
    "content", [FRANCE, "", "  padded \n", "日本語 😀 naïve", "<|im_start|>user\nnested<|im_end|>", "\ud800"]
)
def test_a_chat_is_a_wrapped_completion(client: Client, content: str) -> None:
    chat = client.chat(content, max_tokens=40, return_prompt_text=True)
    assert chat["prompt_text"] == client.wrap(content)
    completion = client.complete(prompt=client.wrap(content), max_tokens=40, add_special_tokens=False)
    assert completion["choices"][0]["text"] == chat["choices"][0]["message"]["content"]
    assert completion["usage"] == chat["usage"]


def test_the_answer_is_the_users_text_whatever_the_system_prompt(client: Client) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "hi"}]},
    ]
    status, reply = client.post("/v1/chat/completions", {"messages": messages})
    assert (status, reply["choices"][0]["message"]["content"]) == (200, "echo: hi")


def test_a_chat_streams_its_role_first(client: Client) -> None:
    messages = [{"role": "user", "content": "hello there"}]
    chunks = client.stream("/v1/chat/completions", messages=messages, n=2)
    assert [c["choices"][0]["delta"] for c in chunks[:2]] == [{"role": "assistant", "content": ""}] * 2
    assert joined(chunks) == {0: ("echo: hello there", "stop"), 1: ("echo #1: hello there", "stop")}


def test_batch_chat_answers_each_conversation(client: Client) -> None:
    chats = [[{"role": "user", "content": word}] for word in ("one", "two")]
    status, reply = client.post("/v1/chat/completions/batch", {"messages": chats, "stream": True})
    assert status == 200
    assert [(c["index"], c["message"]["content"]) for c in reply["choices"]] == [(0, "echo: one"), (1, "echo: two")]
    assert client.post("/v1/chat/completions/batch", {"messages": chats, "n": 2})[0] == 400


def test_models_health_and_version(client: Client) -> None:
    status, models = client.get("/v1/models")
    assert status == 200
    assert (models["data"][0]["id"], models["data"][0]["max_model_len"]) == ("echo", 300)
    assert models["data"][0]["owned_by"] == "swarmkit"
    assert client.send("GET", "/health")[::2] == (200, b"")
    assert client.get("/version")[0] == 200


def test_tokenize_counts_and_knows_the_context(client: Client) -> None:
    status, reply = client.post("/tokenize", {"prompt": "abcdefgh", "return_token_strs": True})
    assert status == 200
    assert (reply["count"], reply["max_model_len"], reply["token_strs"]) == (2, 300, ["abcd", "efgh"])
    closed = client.post("/tokenize", {"messages": [{"role": "user", "content": "x"}], "add_generation_prompt": False})
    assert closed[1]["count"] < client.post("/tokenize", {"messages": [{"role": "user", "content": "x"}]})[1]["count"]


def error_of(reply: dict[str, Any]) -> tuple[str, str, str | None, int]:
    error = reply["error"]
    assert list(error) == ["message", "type", "param", "code"]
    return error["message"], error["type"], error["param"], error["code"]


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        ({"prompt": ["fine", "x" * 1200]}, 400, "maximum context length is 300 tokens"),
        ({"prompt": ["fine", ""]}, 400, "cannot be empty"),
        ({"prompt": ""}, 400, "must be provided and non-empty"),
        ({}, 400, "must be provided and non-empty"),
        ({"prompt": ["x"] * 1025}, 400, "exceeds the maximum allowed count of 1024"),
        ({"prompt": ["text", [1, 2]]}, 400, "prompt"),
        ({"prompt": [[5]]}, 400, "out of vocabulary"),
        ({"prompt": "x", "max_tokens": 301}, 400, "cannot be greater than max_model_len=300"),
        ({"prompt": "x", "max_tokens": 0}, 400, "max_tokens must be at least 1"),
        ({"prompt": "x", "max_tokens": "5"}, 400, "valid integer"),
        ({"prompt": "x", "temperature": -1}, 400, "temperature must be non-negative"),
        ({"prompt": "x", "n": 2, "temperature": 0}, 400, "greedy"),
        ({"prompt": "x", "top_p": 0}, 400, "top_p"),
        ({"prompt": "x", "stop": [""]}, 400, "empty string"),
        ({"prompt": "x", "seed": 1.5}, 400, "seed"),
        ({"prompt": "x", "stream_interval": 0}, 400, "stream_interval must be at least 1"),
        ({"prompt": "x", "stream_options": {"include_usage": True}}, 400, "stream=True"),
        ({"prompt": "x", "model": "other"}, 404, "The model `other` does not exist"),
        ([], 400, "JSON object"),
        (b"{", 400, "JSON decode error"),
    ],
)
def test_errors_have_vllms_shape(client: Client, body: Any, status: int, says: str) -> None:
    got, reply = client.post("/v1/completions", body)
    message, _, _, code = error_of(reply)
    assert (got, code) == (status, status)
    assert says in message


def test_1024_prompts_are_allowed_and_unknown_fields_are_ignored(client: Client) -> None:
    assert len(client.texts(prompt=["x"] * 1024, cache_salt="a", guided_json=None)) == 1024


@pytest.mark.parametrize("messages", [None, [], [{"content": "x"}], [{"role": "user", "content": 5}], ["x"]])
def test_messages_that_are_none_are_refused(client: Client, messages: Any) -> None:
    assert client.post("/v1/chat/completions", {"messages": messages})[0] == 400
    assert client.post("/tokenize", {"messages": messages})[0] == 400


def test_an_unknown_path_is_a_404_with_detail(client: Client) -> None:
    assert client.get("/nowhere") == (404, {"detail": "Not Found"})


@pytest.mark.parametrize("key", ["", "wrong", "wrøng".encode().decode("latin-1")])
def test_every_route_asks_for_the_key(swarm: LocalSwarm, key: str) -> None:
    thief = Client(swarm.endpoints[0], key)
    gets = ["/v1/models", "/health", "/version", "/metrics", "/nowhere"]
    posts = ["/v1/completions", "/v1/chat/completions", "/v1/chat/completions/batch", "/tokenize", "/detokenize"]
    for method, path in [*(("GET", p) for p in gets), *(("POST", p) for p in posts)]:
        assert thief.send(method, path, {"prompt": "x"})[::2] == (401, b'{"error":"Unauthorized"}'), path


def test_the_request_id_is_kept(client: Client) -> None:
    connection = http.client.HTTPConnection(client.endpoint.host, client.endpoint.port)
    headers = {"Authorization": f"Bearer {client.key}", "X-Request-Id": "mine"}
    connection.request("POST", "/v1/completions", '{"prompt": "x"}', headers)
    assert json.loads(connection.getresponse().read())["id"] == "cmpl-mine"
    connection.close()


def test_metrics_count_by_address(swarm: LocalSwarm) -> None:
    first, second = (Client(endpoint) for endpoint in swarm.endpoints)
    path, before = "/v1/completions", second.metric("swarmkit:requests_total", path="/v1/completions")
    first.complete(prompt=["a"] * 5)
    second.complete(prompt=["a"] * 3)
    assert second.metric("swarmkit:requests_total", path=path, address="127.0.0.2") == before + 1
    assert second.metric("swarmkit:requests_total", address="127.0.0.1") == 0
    assert second.metric("swarmkit:prompts_total") >= 3
    assert second.metric("vllm:generation_tokens_total") >= 6
    assert b'address="127.0.0.1"' in second.send("GET", "/metrics?all")[2]


PLATE = {"type": "object", "properties": {"n": {"type": "integer"}, "what": {"enum": ["eggs", "plums"]}}}
WORDS = ["I ate 12 plums", "no 7 eggs"]
VALUES = ['{"n": 12, "what": "plums"}', '{"n": 7, "what": "eggs"}']


def on_all_routes(client: Client, **fields: Any) -> dict[str, list[str]]:
    """The answers to `WORDS`, by route."""
    chats = [[{"role": "user", "content": word}] for word in WORDS]
    status, batch = client.post("/v1/chat/completions/batch", {"messages": chats, **fields})
    assert status == 200, batch
    return {
        "list": client.texts(prompt=WORDS, **fields),
        "stream": [text for text, _ in joined(client.stream(prompt=WORDS, **fields)).values()],
        "single": [client.texts(prompt=word, **fields)[0] for word in WORDS],
        "chat": [client.chat(word, **fields)["choices"][0]["message"]["content"] for word in WORDS],
        "batch": [choice["message"]["content"] for choice in batch["choices"]],
    }


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"structured_outputs": {"json": PLATE}}, VALUES),
        ({"structured_outputs": {"json": json.dumps(PLATE), "regex": None}}, VALUES),
        ({"structured_outputs": {"choice": ["zqx"]}}, ["zqx", "zqx"]),
        ({"structured_outputs": {"regex": "x[0-9]"}}, ["x0", "x0"]),
        ({"structured_outputs": {"grammar": 'root ::= "a" | "b"'}}, ["a", "a"]),
        ({"structured_outputs": {"json_object": True}}, ["{}", "{}"]),
        ({"response_format": {"type": "json_object"}, "structured_outputs": {"choice": ["zqx"]}}, ["{}", "{}"]),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "p", "schema": PLATE}}}, VALUES),
        ({"response_format": {"type": "text"}}, [f"echo: {word}" for word in WORDS]),
        ({"guided_json": PLATE, "guided_choice": ["zqx"]}, [f"echo: {word}" for word in WORDS]),
    ],
)
def test_constraints_act_on_every_route(client: Client, fields: dict[str, Any], expected: list[str]) -> None:
    assert on_all_routes(client, **fields) == dict.fromkeys(("list", "stream", "single", "chat", "batch"), expected)


def test_max_tokens_cuts_a_constrained_answer(client: Client) -> None:
    body = {"structured_outputs": {"json": PLATE}, "max_tokens": 2}
    assert client.complete(prompt=WORDS[0], **body)["choices"][0]["finish_reason"] == "length"
    assert joined(client.stream(prompt=WORDS, **body)) == {0: (VALUES[0][:8], "length"), 1: (VALUES[1][:8], "length")}


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"structured_outputs": {"json": PLATE, "choice": ["a"]}}, "only use one kind of structured outputs"),
        ({"structured_outputs": {}}, "must use one kind of structured outputs"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice: Input should be a non-empty list"),
        ({"structured_outputs": {"json": "{"}}, "Invalid JSON grammar specification"),
        ({"structured_outputs": "json"}, "structured_outputs: Input should be a valid dictionary"),
        ({"structured_outputs": {"json": {"type": "array", "uniqueItems": True}}}, "not supported .*: uniqueItems"),
        ({"response_format": {"type": "json_schema"}}, "'json_schema' field must be provided"),
        ({"response_format": {"type": "yaml"}}, "response_format.type: Input should be 'text'"),
    ],
)
def test_a_constraint_that_cannot_be_kept_is_refused(client: Client, fields: dict[str, Any], says: str) -> None:
    for path, prompt in (
        ("/v1/completions", {"prompt": WORDS}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
    ):
        status, reply = client.post(path, {**prompt, **fields})
        assert status == 400
        assert re.search(says, reply["error"]["message"])
        assert reply["error"]["param"] == next(iter(fields))


def test_a_server_can_be_worse_at_constraints() -> None:
    ask: dict[str, Any] = {"structured_outputs": {"choice": ["zqx"]}}
    echoes, kept = [f"echo: {word}" for word in WORDS], ["zqx", "zqx"]
    with local(engine="echo", constraints="ignore") as swarm:
        client = Client(swarm.endpoints[0])
        assert set(map(tuple, on_all_routes(client, **ask, guided_choice=["zqx"]).values())) == {tuple(echoes)}
        assert client.texts(prompt=WORDS, structured_outputs={"no": "such"}) == echoes
    with local(engine="echo", constraints="refuse") as swarm:
        client = Client(swarm.endpoints[0])
        for fields in (ask, {"guided_choice": ["zqx"]}, {"response_format": {"type": "json_object"}}):
            status, reply = client.post("/v1/completions", {"prompt": WORDS, **fields})
            assert (status, reply["error"]["param"]) == (400, next(iter(fields)))
            assert f"{next(iter(fields))}: Extra inputs are not permitted" in reply["error"]["message"]
        assert client.texts(prompt=WORDS, response_format={"type": "text"}) == echoes
    with local(engine="echo", constraints="chat") as swarm:
        client = Client(swarm.endpoints[0])
        routes = {"list": echoes, "stream": echoes, "single": echoes, "chat": kept, "batch": kept}
        assert on_all_routes(client, **ask) == routes
    with local(engine="echo", constraints="old") as swarm:
        client = Client(swarm.endpoints[0])
        assert client.texts(prompt=WORDS, **ask) == echoes
        assert on_all_routes(client, guided_choice=["zqx"]) == dict.fromkeys(routes, kept)
        assert client.texts(prompt=WORDS, guided_json=PLATE) == VALUES
        assert client.post("/v1/completions", {"prompt": WORDS, "guided_regex": "a", "guided_json": {}})[0] == 400


def test_a_server_can_play_older_and_other_kinds() -> None:
    options = {"lists": False, "tokenize": False, "stream_interval": False, "batch_chat": False}
    with local(engine="echo", model="llama", **options) as swarm:
        client = Client(swarm.endpoints[0])
        assert client.get("/v1/models")[1]["data"][0]["id"] == "llama"
        assert client.post("/v1/completions", {"prompt": ["a", "b"]})[0] == 400
        assert client.texts(prompt="a") == ["echo: a"]
        assert client.post("/tokenize", {"prompt": "a"})[0] == 404
        chats = {"messages": [[{"role": "user", "content": "x"}]]}
        assert client.post("/v1/chat/completions/batch", chats)[0] == 404
        assert len(client.stream(prompt="x" * 40, stream_interval=100)) == 13


def test_a_template_can_hold_a_first_token_and_trim() -> None:
    with local(engine="echo", bos=True, trim=True) as swarm:
        client = Client(swarm.endpoints[0])
        single = client.chat("  x ", return_prompt_text=True)
        assert single["choices"][0]["message"]["content"] == "echo: x"
        doubled = client.complete(prompt=single["prompt_text"])
        right = client.complete(prompt=single["prompt_text"], add_special_tokens=False)
        assert right["usage"] == single["usage"]
        assert doubled["usage"]["prompt_tokens"] == right["usage"]["prompt_tokens"] + 1


ABOUT, SAID = f"\nabout: {WORDS[0]}\n", f"\n\necho: {WORDS[0]}"
ON: dict[str, Any] = {"chat_template_kwargs": {"enable_thinking": True}}
OFF: dict[str, Any] = {"chat_template_kwargs": {"enable_thinking": False, "unknown": 1}}


@pytest.fixture(scope="module")
def thinker() -> Iterator[Client]:
    with local(engine="echo", thinking=True, reasoning_parser=True) as swarm:
        yield Client(swarm.endpoints[0])


def test_a_thinking_model_has_a_switch_in_its_template(thinker: Client, client: Client) -> None:
    ask: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}]}
    plain, on, off, half = (
        thinker.post("/tokenize", {**ask, **extra})[1]["tokens"]
        for extra in ({}, ON, OFF, {**OFF, "add_generation_prompt": False})
    )
    assert plain == on
    assert off[: len(plain)] == plain
    strings = thinker.post("/tokenize", {**ask, **OFF, "return_token_strs": True})[1]["token_strs"]
    assert strings[len(plain) :] == ["<think>", "\n\n", "</think>", "\n\n"]
    assert half == plain[: len(half)]
    chat = thinker.chat("hi", return_token_ids=True, return_prompt_text=True, **OFF)
    assert (chat["prompt_token_ids"], chat["usage"]["prompt_tokens"]) == (off, len(off))
    assert chat["prompt_text"] == thinker.post("/detokenize", {"tokens": off})[1]["prompt"]
    # Elsewhere the switch changes nothing, and what is no switch is refused.
    others = [client.post("/tokenize", {**ask, **extra})[1]["tokens"] for extra in ({}, OFF)]
    assert others == [plain, plain]
    for path in ("/tokenize", "/v1/chat/completions"):
        assert client.post(path, {**ask, "chat_template_kwargs": "off"})[0] == 400


@pytest.mark.parametrize(
    ("extra", "raw", "reasoning", "content", "finish"),
    [
        ({}, f"<think>{ABOUT}</think>{SAID}", ABOUT, SAID, "stop"),
        ({"max_tokens": 4}, "<think>\nabout: I at", "\nabout: I at", None, "length"),
        ({"max_tokens": 8}, f"<think>{ABOUT}</think>", ABOUT, None, "length"),
        ({"thinking_token_budget": 2}, f"<think>\nabout: </think>{SAID}", "\nabout: ", SAID, "stop"),
        ({"thinking_token_budget": 0}, f"<think></think>{SAID}", "", SAID, "stop"),
        ({"thinking_token_budget": 2, "max_tokens": 2}, "<think>\nabo", "\nabo", None, "length"),
        (OFF, SAID.strip(), None, SAID.strip(), "stop"),
    ],
)
def test_a_reasoning_parser_gives_chats_the_thoughts_apart(
    thinker: Client, extra: dict[str, Any], raw: str, reasoning: str | None, content: str | None, finish: str
) -> None:
    ask = {"max_tokens": 60, **extra}
    chat = thinker.chat(WORDS[0], return_prompt_text=True, **ask)
    whole = thinker.complete(prompt=chat["prompt_text"], add_special_tokens=False, **ask)
    assert (whole["choices"][0]["text"], whole["choices"][0]["finish_reason"]) == (raw, finish)
    assert chat["usage"] == whole["usage"]
    message = {"role": "assistant", "content": content, "reasoning": reasoning}
    assert (chat["choices"][0]["message"], chat["choices"][0]["finish_reason"]) == (message, finish)
    messages = [{"role": "user", "content": WORDS[0]}]
    batch = thinker.post("/v1/chat/completions/batch", {"messages": [messages] * 2, **ask})[1]["choices"]
    assert [(c["message"], c["finish_reason"]) for c in batch] == [(message, finish)] * 2
    chunks = thinker.stream("/v1/chat/completions", messages=messages, stream_interval=3, **ask)
    assert joined(chunks) == {0: (content or "", finish)}
    assert "".join(c["choices"][0]["delta"].get("reasoning", "") for c in chunks) == (reasoning or "")


def test_with_a_reasoning_parser_constraints_act_after_the_thoughts_of_chats(thinker: Client) -> None:
    ask: dict[str, Any] = {"structured_outputs": {"choice": ["zqx"]}, "max_tokens": 60}
    message = thinker.chat(WORDS[0], **ask)["choices"][0]["message"]
    assert (message["reasoning"], message["content"]) == (ABOUT, "zqx")
    assert thinker.chat(WORDS[0], **ask, **OFF)["choices"][0]["message"]["content"] == "zqx"
    assert thinker.texts(prompt=WORDS[0], **ask, **OFF) == [f"<think>{ABOUT}</think>{SAID}"]


def test_without_a_reasoning_parser_thoughts_stay_in_the_answer() -> None:
    with local(engine="echo", thinking=True) as swarm:
        client = Client(swarm.endpoints[0])
        message = client.chat(WORDS[0])["choices"][0]["message"]
        assert (message["content"], message["reasoning"]) == (f"<think>{ABOUT}</think>{SAID}", None)
        assert client.chat(WORDS[0], **OFF)["choices"][0]["message"]["content"] == SAID.strip()
        assert set(map(tuple, on_all_routes(client, structured_outputs={"choice": ["zqx"]}).values())) == {("zqx",) * 2}
        status, reply = client.post("/v1/completions", {"prompt": "x", "thinking_token_budget": 5})
        assert (status, "reasoning_config is not configured" in error_of(reply)[0]) == (400, True)


def test_speed_slots_and_slow_addresses() -> None:
    speeds = {"127.0.0.2": {"tokens_per_s": 20}}
    with local(engine="echo", addresses=2, latency_s=0.1, tokens_per_s=200, max_num_seqs=2, speeds=speeds) as swarm:
        body = {"prompt": ["x"] * 4, "max_tokens": 10, "ignore_eos": True}

        def seconds(endpoint: AgentEndpoint, **extra: Any) -> float:
            start = time.monotonic()
            Client(endpoint).complete(**{**body, **extra})
            return time.monotonic() - start

        # Ten tokens take 0.1 s and then nine times 5 ms; four rows in two slots take that twice.
        assert seconds(swarm.endpoints[0], prompt="x") >= 0.14
        assert seconds(swarm.endpoints[0]) >= 0.28
        assert seconds(swarm.endpoints[1], prompt="x") >= 0.54
        stream = {**body, "max_tokens": 5, "stream_interval": 2}
        chunks = Client(swarm.endpoints[0]).stream(**stream)
        assert [c["choices"][0]["index"] for c in chunks][:2] == [0, 1]
        plain = Client(swarm.endpoints[0]).complete(**{**body, "max_tokens": 5})["choices"]
        assert joined(chunks) == {c["index"]: (c["text"], c["finish_reason"]) for c in plain}


@pytest.mark.parametrize("stream", [False, True])
def test_a_dropped_connection_frees_its_sequences(stream: bool) -> None:
    with local(engine="echo", tokens_per_s=1, max_num_seqs=4) as swarm:
        client = Client(swarm.endpoints[0])
        connection = http.client.HTTPConnection(client.endpoint.host, client.endpoint.port)
        body = {"prompt": ["x" * 100] * 6, "max_tokens": 30, "stream": stream}
        connection.request("POST", "/v1/completions", json.dumps(body), {"Authorization": f"Bearer {client.key}"})
        eventually(lambda: client.metric("vllm:num_requests_running") == 4)
        assert client.metric("vllm:num_requests_waiting") == 2
        connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.close()
        eventually(lambda: client.metric("vllm:num_requests_running") == 0)
        assert client.metric("vllm:num_requests_waiting") == 0
        assert client.metric("swarmkit:aborted_total") == 6
