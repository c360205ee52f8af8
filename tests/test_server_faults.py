"""Scripted faults: each is seen by a client as what it claims to be, and hits the requests it says."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Iterator

import pytest
from test_server_http import Client, joined

from swarmkit.errors import SettingError
from swarmkit.server import Fault, LocalSwarm, local
from swarmkit.server.faults import KINDS, FaultPlan


@pytest.fixture(scope="module")
def swarm() -> Iterator[LocalSwarm]:
    """A server that meets a prompt holding ``<kind>`` with that fault; its second address takes its time."""
    rows = {"cut": 2}
    seconds = {"drip": 0.005, "http_429": 2.0}
    faults = [
        Fault(kind, marker=f"<{kind}>", rows=rows.get(kind, 1), seconds=seconds.get(kind, 1.0), seed=1)
        for kind in KINDS
    ]
    speeds = {"127.0.0.2": {"tokens_per_s": 1000}}
    with local(engine="echo", addresses=2, faults=faults, speeds=speeds) as swarm:
        yield swarm


@pytest.fixture(params=[0, 1], ids=["instant", "in time"])
def client(swarm: LocalSwarm, request: pytest.FixtureRequest) -> Client:
    return Client(swarm.endpoints[request.param])


def rows(kind: str, n: int = 4) -> list[str]:
    return [f"{word} row <{kind}>" for word in ("first", "second", "third", "fourth")[:n]]


def echoes(kind: str) -> list[str]:
    return [f"echo: {row}" for row in rows(kind)]


@pytest.mark.parametrize(
    ("status", "retry_after"), [(400, None), (422, None), (500, None), (503, None), (429, "2"), (401, None)]
)
def test_http_errors_have_a_body_like_vllms(client: Client, status: int, retry_after: str | None) -> None:
    got, headers, data = client.send("POST", "/v1/completions", {"prompt": rows(f"http_{status}")})
    assert (got, json.loads(data)["error"]["code"]) == (status, status)
    assert headers["retry-after"] == retry_after


@pytest.mark.parametrize(("kind", "status"), [("http_413", 413), ("http_502", 502), ("garbage", 200)])
def test_a_proxys_error_and_garbage_are_not_json(client: Client, kind: str, status: int) -> None:
    got, _, data = client.send("POST", "/v1/completions", {"prompt": rows(kind)})
    assert got == status
    with pytest.raises(ValueError, match="Expecting value"):
        json.loads(data)


def test_a_full_queue_lets_small_requests_in(client: Client) -> None:
    status, reply = client.post("/v1/completions", {"prompt": rows("queue_full")})
    assert (status, reply["error"]["code"]) == (503, 503)
    assert client.texts(prompt=rows("queue_full", 1)) == echoes("queue_full")[:1]
    status, headers, _ = client.send("POST", "/v1/completions", {"prompt": rows("wait")})
    assert (status, headers["retry-after"]) == (503, "1")


@pytest.mark.parametrize(("kind", "code"), [("late_400", 400), ("late_500", 500)])
def test_an_error_can_come_after_the_headers(client: Client, kind: str, code: int) -> None:
    assert client.post("/v1/completions", {"prompt": rows(kind)})[0] == code
    (event,) = client.stream(prompt=rows(kind))
    assert event["error"]["code"] == code


def test_a_body_can_be_empty_an_error_or_half_of_one(client: Client) -> None:
    assert client.send("POST", "/v1/completions", {"prompt": rows("empty_body")})[::2] == (200, b"")
    status, reply = client.post("/v1/completions", {"prompt": rows("error_body")})
    assert (status, reply["error"]["code"]) == (200, 500)
    status, _, data = client.send("POST", "/v1/completions", {"prompt": rows("half_json")})
    assert status == 200
    with pytest.raises(ValueError, match=r"Expecting|Unterminated"):
        json.loads(data)


@pytest.mark.parametrize("stream", [False, True])
def test_half_close_and_silence_leave_the_connection_open(client: Client, stream: bool) -> None:
    with pytest.raises(http.client.IncompleteRead):
        client.send("POST", "/v1/completions", {"prompt": rows("half_close"), "stream": stream})
    with pytest.raises(TimeoutError):
        client.send("POST", "/v1/completions", {"prompt": rows("silence"), "stream": stream}, timeout=0.2)


def test_a_choice_can_be_spoilt(client: Client) -> None:
    assert [c["text"] for c in client.complete(prompt=rows("wrong_type"))["choices"]][1] == 7
    assert [c["finish_reason"] for c in client.complete(prompt=rows("no_finish"))["choices"]][1] is None
    finishes = {c["index"]: c["finish_reason"] for e in client.stream(prompt=rows("no_finish")) for c in e["choices"]}
    assert finishes[1] is None


def test_null_is_a_body(client: Client) -> None:
    assert client.post("/v1/completions", {"prompt": rows("null_body")}) == (200, None)


@pytest.mark.parametrize("kind", ["reset", "kill_row"])
def test_reset_is_a_reset(client: Client, kind: str) -> None:
    with pytest.raises(ConnectionResetError):
        client.complete(prompt=["harmless", *rows(kind)])


@pytest.mark.parametrize("stream", [False, True])
def test_cut_ends_the_body_early(client: Client, stream: bool) -> None:
    with pytest.raises(http.client.IncompleteRead) as caught:
        client.send("POST", "/v1/completions", {"prompt": rows("cut"), "stream": stream, "stream_interval": 2})
    if stream:
        events = caught.value.partial.decode().split("\n\n")[:-1]
        choices = [json.loads(event.removeprefix("data: "))["choices"][0] for event in events]
        assert {c["index"] for c in choices if c["finish_reason"]} == {0, 1}
        assert {c["index"] for c in choices} == {0, 1, 2, 3}


def test_hang_never_answers(client: Client) -> None:
    with pytest.raises(TimeoutError):
        client.send("POST", "/v1/completions", {"prompt": rows("hang")}, timeout=0.2)
    assert client.get("/v1/models")[0] == 200


def test_drip_is_slow_and_whole(client: Client) -> None:
    begin = time.monotonic()
    assert client.texts(prompt=rows("drip")) == echoes("drip")
    assert time.monotonic() - begin > 0.05
    assert [text for text, _ in joined(client.stream(prompt=rows("drip"), stream_interval=9)).values()] == echoes(
        "drip"
    )


def test_choices_can_be_shuffled(client: Client) -> None:
    choices = client.complete(prompt=rows("shuffle"))["choices"]
    assert [c["index"] for c in choices] != [0, 1, 2, 3]
    assert [c["text"] for c in sorted(choices, key=lambda c: c["index"])] == echoes("shuffle")
    chunks = client.stream(prompt=rows("shuffle"))
    assert [c["choices"][0]["index"] for c in chunks][:4] != [0, 1, 2, 3]
    assert joined(chunks) == {i: (text, "stop") for i, text in enumerate(echoes("shuffle"))}


@pytest.mark.parametrize(
    ("kind", "n", "indices"),
    [
        ("missing_index", 4, [0, 2, 3]),
        ("repeated_index", 4, [0, 2, 2, 3]),
        ("unknown_index", 4, [0, 2, 3, 11]),
        ("missing_index", 1, []),
        ("repeated_index", 1, [0, 0]),
    ],
)
def test_indices_can_be_wrong(client: Client, kind: str, n: int, indices: list[int]) -> None:
    assert sorted(c["index"] for c in client.complete(prompt=rows(kind, n))["choices"]) == indices
    choices = [c["choices"][0] for c in client.stream(prompt=rows(kind, n), stream_interval=100)]
    assert sorted(c["index"] for c in choices if c["finish_reason"]) == indices


def test_a_stream_can_end_without_done(client: Client) -> None:
    status, _, data = client.send("POST", "/v1/completions", {"prompt": rows("no_done"), "stream": True})
    assert status == 200
    assert b"[DONE]" not in data
    assert data.count(b'"finish_reason":"stop"') == 4


def test_abort_is_a_200_with_partial_text(client: Client) -> None:
    choices = client.complete(prompt=rows("abort"))["choices"]
    assert [c["finish_reason"] for c in choices] == ["stop", "abort", "abort", "abort"]
    assert all(whole.startswith(c["text"]) for whole, c in zip(echoes("abort"), choices, strict=True))
    assert [c["text"] == whole for whole, c in zip(echoes("abort"), choices, strict=True)] == [
        True,
        False,
        False,
        False,
    ]
    assert [f for _, f in joined(client.stream(prompt=rows("abort"))).values()] == ["stop", "abort", "abort", "abort"]


def test_a_marked_row_fails_its_request(client: Client) -> None:
    before = client.metric("swarmkit:faults_total", kind="bad_row")
    status, reply = client.post("/v1/completions", {"prompt": ["fine", "a <bad_row>"]})
    assert status == 400
    assert "maximum context length" in reply["error"]["message"]
    assert client.post("/v1/chat/completions", {"messages": [{"role": "user", "content": "<bad_row>"}]})[0] == 400
    assert client.texts(prompt=["fine", "fine too"]) == ["echo: fine", "echo: fine too"]
    assert client.metric("swarmkit:faults_total", kind="bad_row") == before + 2


def test_constrained_answers_can_be_invalid(client: Client) -> None:
    ask = {"structured_outputs": {"json": {"properties": {"n": {"type": "integer"}}}}}
    prompts = ["a 1", "<invalid> 2", "a 3"]
    expected = ['{"n": 1}', "????? ??", '{"n": 3}']
    assert client.texts(prompt=prompts, **ask) == expected
    assert [text for text, _ in joined(client.stream(prompt=prompts, **ask)).values()] == expected
    assert client.texts(prompt=prompts) == [f"echo: {prompt}" for prompt in prompts]
    assert client.metric("swarmkit:faults_total", kind="invalid") > 0


def test_rows_are_invalid_by_their_prompt_however_they_are_batched() -> None:
    texts = [f"row {i}" for i in range(200)]

    def hit(size: int) -> list[int]:
        plan = FaultPlan([Fault("invalid", probability=0.2, seed=3)])
        starts = range(0, 200, size)
        return [s + row for s in starts for row in sorted(plan.invalid_rows("", "/v1/", texts[s : s + size]))]

    first = hit(200)
    assert 20 < len(first) < 60
    assert first == hit(7)
    plan = FaultPlan([Fault("invalid", probability=0.2, seed=3)])
    assert sorted(plan.invalid_rows("", "/v1/", texts)) == first
    again = plan.invalid_rows("", "/v1/", [texts[i] for i in first])
    assert len(again) < len(first) / 2  # asked again, most are valid


def test_the_first_rows_can_be_invalid() -> None:
    plan = FaultPlan([Fault.parse("invalid:first=2,after=1")])
    assert plan.invalid_rows("", "/v1/", ["a", "a"]) == {1}
    assert plan.invalid_rows("", "/v1/", ["a", "a", "a"]) == {0}
    assert plan.pick("", "/v1/", ["a"]) is None


def test_a_fault_keeps_to_its_address_and_path() -> None:
    faults: list[Fault | str] = ["http_500:address=127.0.0.2", Fault("http_503", path="/health")]
    with local(engine="echo", addresses=2, faults=faults) as swarm:
        good, bad = (Client(endpoint) for endpoint in swarm.endpoints)
        assert good.texts(prompt="x") == ["echo: x"]
        assert bad.post("/v1/completions", {"prompt": "x"})[0] == 500
        assert bad.get("/v1/models")[0] == 200
        assert good.send("GET", "/health")[0] == 503


@pytest.mark.parametrize(
    ("spec", "hit"),
    [
        ("http_500", "xxxxxx"),
        ("http_500:first=2", "xx...."),
        ("http_500:every=3", "..x..x"),
        ("http_500:after=4", "....xx"),
        ("http_500:after=1,first=2", ".xx..."),
        ("http_500:address=10.0.0.1", "......"),
        ("http_500:probability=0.5,seed=1", ".xxxx."),
    ],
)
def test_which_requests_are_hit(spec: str, hit: str) -> None:
    plan = FaultPlan([Fault.parse(spec)])
    picked = [plan.pick("127.0.0.1", "/v1/completions", ["x"]) for _ in range(6)]
    assert "".join("x" if fault else "." for fault in picked) == hit


def test_the_first_fault_that_hits_counts_and_the_rest_count_on() -> None:
    plan = FaultPlan([Fault("reset", first=1), Fault("hang", first=2)])
    kinds = [fault and fault.kind for fault in (plan.pick("127.0.0.1", "/v1/completions", []) for _ in range(3))]
    assert kinds == ["reset", "hang", None]


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("explode", "the faults are: http_"),
        ("cut:lines=3", "'lines=3' is not one of probability"),
        ("cut:rows", "'rows' is not one of"),
        ("cut:rows=many", "rows must be a number"),
        ("bad_row", "needs marker=TEXT"),
        ("cut:every=0", "every must be 1 or more"),
        ("cut:probability=2", "between 0 and 1"),
    ],
)
def test_a_spec_that_cannot_be_read_says_why(spec: str, says: str) -> None:
    with pytest.raises(SettingError, match=says):
        Fault.parse(spec)
