"""Batch files: each line is asked as it says, or not at all; the answers are those of the Batch API."""

from __future__ import annotations

import gzip
import json
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types import Completion
from openai.types.chat import ChatCompletion
from scripted import Call, Scripted
from test_cli import KEY, environment, hostfile, run, to

import swarmkit as sk
from swarmkit.cli.batch_file import CHAT, COMPLETION, _read

pytestmark = pytest.mark.slow

JSON = dict[str, Any]
SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.fixture(scope="module")
def swarm() -> Iterator[sk.LocalSwarm]:
    with sk.local(1, engine="echo", addresses=2, token=KEY, models=["sql"]) as swarm:
        yield swarm


@pytest.fixture
def host(swarm: sk.LocalSwarm, tmp_path: Path) -> Path:
    return hostfile(tmp_path / "hosts", swarm)


def user(text: str) -> JSON:
    return {"role": "user", "content": text}


def said(*turns: JSON, **fields: Any) -> JSON:
    """A line that asks for a chat."""
    return {"method": "POST", "url": CHAT, "body": {"model": "echo", "messages": list(turns), **fields}}


def written(prompt: Any, **fields: Any) -> JSON:
    """A line that asks for a completion."""
    return {"method": "POST", "url": COMPLETION, "body": {"model": "echo", "prompt": prompt, **fields}}


def file_of(path: Path, lines: list[Any]) -> list[Any]:
    """Write lines, which get ids unless they are no objects; return them."""
    lines = [{"custom_id": f"task-{i}", **line} if isinstance(line, dict) else line for i, line in enumerate(lines)]
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return lines


def read(path: Path) -> list[JSON]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def text_of(answer: JSON) -> str:
    choice = answer["response"]["body"]["choices"][0]
    found: str = choice["text"] if "text" in choice else choice["message"]["content"]
    return found


# ---- the answers ------------------------------

MIXED = [
    *(said(user(f"question {i}"), temperature=0) for i in range(12)),
    *(said(SYSTEM, user(f"shared {i}"), temperature=0, max_tokens=20) for i in range(10)),
    said(SYSTEM, user("alone"), temperature=0, top_p=0.5),
    said(user("Hi"), {"role": "assistant", "content": "Yes?"}, user("What is it?"), temperature=0),
    said(user("cut off after three words"), max_completion_tokens=3, temperature=0),
    said(user("three times"), n=3, temperature=0.5, stop=None, stream=False),
    said(user("told"), logprobs=True, top_logprobs=2, temperature=0, max_tokens=4),
    said(user("as JSON"), response_format={"type": "json_object"}, temperature=0),
    said(user("odd"), some_field={"of": "mine"}, temperature=0),
    said(user("of another model"), model="sql", temperature=0),
    *(written(f"once upon {i}", temperature=0) for i in range(3)),
    written(["a list of one"], max_tokens=2, temperature=0, logprobs=1),
]


def test_each_line_has_the_answer_that_its_request_has(swarm: sk.LocalSwarm, host: Path, tmp_path: Path) -> None:
    lines = file_of(tmp_path / "in.jsonl", MIXED)
    done = run("scatter", tmp_path / "in.jsonl", "-o", tmp_path / "out.jsonl", *to(host))
    assert done.returncode == 0, done.stderr
    answers = read(tmp_path / "out.jsonl")
    assert [list(answer) for answer in answers] == [["id", "custom_id", "response", "error"]] * len(lines)
    assert [answer["custom_id"] for answer in answers] == [line["custom_id"] for line in lines]
    assert (
        len({answer["id"] for answer in answers}) == len({a["response"]["request_id"] for a in answers}) == len(lines)
    )
    for line, answer in zip(lines, answers, strict=True):
        assert (answer["error"], answer["response"]["status_code"]) == (None, 200)
        body = answer["response"]["body"]
        request = urllib.request.Request(
            swarm.urls[0] + line["url"], json.dumps(line["body"]).encode(),
            {"Authorization": f"Bearer {KEY}", "content-type": "application/json"},
        )  # fmt: skip
        with urllib.request.urlopen(request) as reply:
            plain = json.load(reply)
        of: Any = ChatCompletion if line["url"] == CHAT else Completion
        got, wanted = of.model_validate(body), of.model_validate(plain)
        assert (got.object, got.model) == (wanted.object, wanted.model)
        assert len(got.choices) == len(wanted.choices)
        for a, b in zip(got.choices, wanted.choices, strict=True):
            assert (a.index, a.finish_reason) == (b.index, b.finish_reason)
            assert a.text == b.text if of is Completion else a.message.content == b.message.content
            assert (a.logprobs is None) == (b.logprobs is None)
            if a.logprobs is not None and of is ChatCompletion:
                assert [(t.token, t.logprob) for t in a.logprobs.content] == [
                    (t.token, t.logprob) for t in b.logprobs.content
                ]
            elif a.logprobs is not None:
                assert (a.logprobs.tokens, a.logprobs.token_logprobs) == (b.logprobs.tokens, b.logprobs.token_logprobs)
        if got.usage is not None:  # a reply to several chats does not tell their prompts' tokens apart
            assert got.usage.completion_tokens == wanted.usage.completion_tokens
            assert got.usage.prompt_tokens == wanted.usage.prompt_tokens
    assert sum(answer["response"]["body"]["usage"] is not None for answer in answers) > 20


def test_lines_alike_go_out_together_and_a_store_resumes_them(host: Path, tmp_path: Path) -> None:
    source, out = tmp_path / "in.jsonl.gz", tmp_path / "out.jsonl"
    lines = [said(SYSTEM, user(f"row {i}"), max_tokens=8, temperature=i % 2) for i in range(300)]
    file_of(tmp_path / "in.jsonl", lines)
    source.write_bytes(gzip.compress((tmp_path / "in.jsonl").read_bytes()))
    words = ["scatter", source, "-o", out, "--store", tmp_path / "store", "--chunk-rows", 250, *to(host)]
    done = run(*words)
    assert done.returncode == 0, done.stderr
    found = re.search(r"300 rows, 0 failed, .* ([\d,]+) requests?", done.stderr)
    assert found
    assert int(found[1]) <= 16, done.stderr
    answers = read(out)
    assert [text_of(answer) for answer in answers] == [f"echo: row {i}" for i in range(300)]
    assert run(*words).returncode == 2, "an output that is there is not replaced unasked"
    again = run(*words, "--overwrite")
    assert "300 stored" in again.stderr
    assert " 0 requests" in again.stderr
    assert [text_of(answer) for answer in read(out)] == [text_of(answer) for answer in answers]


def test_lines_that_differ_in_every_parameter_are_not_asked_one_by_one(tmp_path: Path) -> None:
    with sk.local(1, engine="echo", token=KEY, latency_s=0.2) as slow:
        file_of(tmp_path / "in.jsonl", [said(user(f"row {i}"), user=f"u{i}", max_tokens=8) for i in range(60)])
        done = run("scatter", tmp_path / "in.jsonl", "-o", tmp_path / "out.jsonl", *to(hostfile(tmp_path / "h", slow)))
    assert done.returncode == 0, done.stderr
    assert [text_of(answer) for answer in read(tmp_path / "out.jsonl")] == [f"echo: row {i}" for i in range(60)]
    taken = re.search(r"([\d.]+) s, [\d.]+ rows/s", done.stderr)
    assert taken
    assert float(taken[1]) < 60 * 0.2, "one after another they take 24 s, with what tries their parameters"


# ---- lines that cannot be asked ------------------------------

BAD: list[tuple[Any, str]] = [
    ("{not json", "it is not JSON (Expecting property name"),
    ('["a list"]', "it is not a JSON object, but"),
    ({**said(user("a")), "custom_id": None}, "its custom_id is missing; it must be a text"),
    ({**said(user("a")), "method": "GET"}, 'its method is "GET"; only POST can be asked'),
    ({**said(user("a")), "url": "/v1/embeddings"}, f'its url is "/v1/embeddings"; {CHAT} and {COMPLETION} can'),
    ({"method": "POST", "url": CHAT}, "its body is missing; it must be an object"),
    (said(), "its messages are []; they must be a list of messages"),
    (said(user("a"), stream=True), "a file holds no streams"),
    (said(user("a"), tools=[{"type": "function"}]), "its body has tools, whose answers are more than texts"),
    (written([[1, 2]], max_tokens=3), "its prompt is [[1, 2]]; it must be one text"),
    (said({"role": "user", "content": [{"type": "image_url"}]}), "message 1 has a list as content; it must be a text"),
    (said(user("a"), max_tokens=0), "max_tokens=0: must be a whole number, 1 or more"),
    (said(user("a"), model="ecko"), "model='ecko': no server lists it; listed: echo, sql"),
    (said(user("a"), temperature=-1), "refuses these parameters ({'temperature': -1})"),
    (said(user("a"), guided_regex="a+"), "guided_regex in extra_body is ignored by vLLM"),
]


def test_a_line_that_cannot_be_asked_costs_itself_alone(host: Path, tmp_path: Path) -> None:
    good = [said(user("first"), max_tokens=9), said(user("last"), max_tokens=9)]
    lines = file_of(tmp_path / "in.jsonl", [good[0], *(line for line, _ in BAD), good[1]])
    done = run("scatter", tmp_path / "in.jsonl", "-o", tmp_path / "out.jsonl", *to(host))
    assert done.returncode == 1, done.stderr
    assert f"{len(lines)} rows, {len(BAD)} failed" in done.stderr
    first, *failed, last = read(tmp_path / "out.jsonl")
    assert [text_of(first), text_of(last)] == ["echo: first", "echo: last"]
    for number, (line, answer, (_, message)) in enumerate(zip(lines[1:-1], failed, BAD, strict=True), 2):
        assert answer["response"] is None
        assert message in answer["error"]["message"]
        assert answer["error"]["code"] in ("invalid_request", "request_failed")
        assert answer["custom_id"] == (line.get("custom_id") if isinstance(line, dict) else None)
        if "refuses" not in message and "message 1" not in message:
            assert answer["error"]["message"].startswith(f"line {number}: ")


def test_what_is_no_batch_file_or_has_more_options_is_refused(host: Path, tmp_path: Path) -> None:
    table, lines = tmp_path / "in.csv", tmp_path / "in.jsonl"
    table.write_text("a\n1\n")
    file_of(lines, MIXED[:2])
    for words, message in [
        ((table, "-o", tmp_path / "out.csv"), f"the arguments --prompt --messages is required, unless all inputs "
         f"are batch files, JSON lines with custom_id, method, url and body, which {table} is not"),
        ((lines, "-o", tmp_path / "out.csv"), "the answers to a batch file are JSON lines: name it .jsonl"),
        ((lines, "-o", tmp_path / "out.jsonl", "--system", "Hi", "--n", "2"), "leave out --system, --n"),
    ]:  # fmt: skip
        done = run("scatter", *words, *to(host))
        assert done.returncode == 2
        assert message in done.stderr
    done = run(
        "scatter", lines, "--prompt", "{custom_id}", "--model", "echo", "-o", "-", "--format", "jsonl", *to(host)
    )
    assert done.returncode == 0, done.stderr
    assert [json.loads(line)["response"] for line in done.stdout.splitlines()] == ["echo: task-0", "echo: task-1"]


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 2) | st.text(max_size=4) | st.floats(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)
FIELDS = st.sampled_from(["model", "messages", "prompt", "n", "logprobs", "max_tokens", "stream", "tools", "x"])


@settings(max_examples=50, deadline=None)
@given(ANYTHING | st.fixed_dictionaries({"custom_id": ANYTHING, "url": st.sampled_from([CHAT, COMPLETION]) | ANYTHING,
       "body": ANYTHING | st.dictionaries(FIELDS, ANYTHING)}))  # fmt: skip
def test_whatever_a_line_holds_it_is_a_request_or_has_a_problem(record: Any) -> None:
    line = _read(0, "line 1", json.dumps(record))
    assert line.problem or (isinstance(line.custom_id, str) and (line.prompt is not None or line.turns))
    assert line.problem.isprintable()


# ---- as the line says ------------------------------


def test_fields_stay_on_the_route_that_they_were_written_for(tmp_path: Path) -> None:
    """What a completion may ignore in silence is never sent as one."""
    asked: list[tuple[str, JSON]] = []

    def script(call: Call) -> None:
        path = call.headers.split(" ")[1]
        asked.append((path, call.body))
        if path == "/v1/models":
            call.reply(json.dumps({"data": [{"id": "m"}]}).encode())
        elif path in (CHAT, COMPLETION):
            call.answer()
        else:
            call.reply(b"{}", "404 Not Found")

    lines = [
        said(user("json"), response_format={"type": "json_object"}),
        said(user("new"), field_of_2027=True),
        said(user("effort"), reasoning_effort="low"),
        written("best", best_of=2),
        written("default"),
    ]
    file_of(tmp_path / "in.jsonl", lines)
    with Scripted(script) as server:
        url = "http://{}:{}".format(*server.address)
        options = ["--model", "m", "--max-tokens", "70", "--url", url]
        done = run("scatter", tmp_path / "in.jsonl", "-o", tmp_path / "out.jsonl", *options)
    assert done.returncode == 0, done.stderr
    answers = read(tmp_path / "out.jsonl")
    assert [text_of(a) for a in answers] == [f"echo: {p}" for p in ("json", "new", "effort", "best", "default")]
    assert {answer["response"]["body"]["model"] for answer in answers} == {"m"}, "--model goes before that of the lines"
    for field, of in [("response_format", CHAT), ("field_of_2027", CHAT), ("reasoning_effort", CHAT)]:
        assert {path for path, body in asked if field in body} == {of}
    best = [body for path, body in asked if "best_of" in body and path == COMPLETION]
    assert best
    assert not any(body.get("stream") for body in best)
    rows = [body for _, body in asked if "json" in str(body.get("messages")) or "default" in str(body.get("prompt"))]
    assert {body["max_tokens"] for body in rows} == {70}


def test_an_interrupt_leaves_a_line_for_each_and_the_store_goes_on(host: Path, tmp_path: Path) -> None:
    source, out, store = tmp_path / "in.jsonl", tmp_path / "out.jsonl", tmp_path / "store"
    file_of(source, [said(user(f"row {i}"), max_tokens=8, temperature=0) for i in range(400)])
    words = ["scatter", source, "-o", out, "--store", store, "--chunk-rows", 100]
    with sk.local(1, engine="echo", token=KEY, latency_s=0.05, max_num_seqs=4) as slow:
        child = subprocess.Popen(
            [sys.executable, "-m", "swarmkit", *map(str, [*words, *to(hostfile(tmp_path / "h", slow))])],
            stderr=subprocess.PIPE, text=True, env=environment(),
        )  # fmt: skip
        deadline = time.monotonic() + 30
        while sum(p.read_text().count("\n") for p in store.glob("*.jsonl")) < 50 and time.monotonic() < deadline:
            time.sleep(0.05)
        child.send_signal(signal.SIGINT)
        _, told = child.communicate(timeout=30)
    assert child.returncode == 130, told
    assert "run the same command with --overwrite" in told
    answers = read(out)
    assert [answer["custom_id"] for answer in answers] == [f"task-{i}" for i in range(400)]
    left = [answer["error"] for answer in answers if answer["error"]]
    assert 0 < len(left) < 400
    assert {(error["code"], error["message"]) for error in left} == {("batch_cancelled", "interrupted")}
    done = run(*words, "--overwrite", *to(host))
    assert done.returncode == 0, done.stderr
    assert [text_of(answer) for answer in read(out)] == [f"echo: row {i}" for i in range(400)]
    kept = re.search(r"([\d,]+) stored", done.stderr)
    assert kept
    assert int(kept[1]) >= 400 - len(left)
