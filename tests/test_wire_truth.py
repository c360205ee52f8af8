"""No answer reaches a wrong row, and nothing is read without bound: what servers and proxies really send.

Each case runs over real sockets; the servers are scripted (``scripted.py``).
"""

from __future__ import annotations

import asyncio
import gzip
import itertools
import json
import re
import time
import tracemalloc
import zlib
from dataclasses import replace
from typing import Any

import openai
import pandas as pd
import pytest
from scripted import Call, Scripted

import swarmkit as sk
from swarmkit.client.hostfile import AgentEndpoint

RETRY = sk.RetryPolicy(base_s=0.02, cap_s=0.2, quiet_s=5.0)


def ask(server: Scripted, rows: int = 120, *, timeout: float = 10.0, retry: sk.RetryPolicy = RETRY,
        batch: sk.BatchPolicy | None = None, max_attempts: int = 5, http_client: Any = None,
        **options: object) -> pd.DataFrame:  # fmt: skip
    """Send prompts that can be told apart, and return them with their answers."""
    retry = replace(retry, max_attempts=max_attempts)
    batch = batch or sk.BatchPolicy(max_size=1, max_in_flight=4, hedge=False)
    frame = pd.DataFrame({"prompt": [f"row {i}" for i in range(rows)]})
    endpoint = AgentEndpoint(*server.address)
    pool = sk.VLLMPool([endpoint], model="m", timeout=timeout, retry=retry, batch=batch, http_client=http_client)
    try:
        return sk.scatter(frame, "{prompt}", pool=pool, progress=False, max_tokens=8, **options)
    finally:
        asyncio.run(pool.close(http_client=True))


def assert_no_wrong_answer(frame: pd.DataFrame) -> None:
    there = frame["response"].notna()
    assert (frame["response"][there] == "echo: " + frame["prompt"][there]).all()


def assert_all_right(frame: pd.DataFrame) -> None:
    assert frame["response_error"].dropna().unique().tolist() == []
    assert (frame["response"] == "echo: " + frame["prompt"]).all()


# ---- heads and errors that no standard allows ------------------------------

OUTLANDISH = {
    "retry-after-nan": ("429 Too Many Requests", "application/json", "retry-after: nan\r\n", b"{}"),
    "retry-after-inf": ("503 Service Unavailable", "application/json", "retry-after: inf\r\n", b"{}"),
    "code-of-5000-digits": ("200 OK", "application/json", "", b'{"error": {"code": "%s"}}' % (b"9" * 5000)),
    "code-of-5000-digits-in-a-stream": ("200 OK", "text/event-stream", "",
                                        b'data: {"error": {"code": "%s"}}\n\n' % (b"9" * 5000)),
    "charset-that-is-none": ("502 Bad Gateway", "text/html; charset=base64", "", b"<h1>502</h1>"),
    "charset-that-only-raises": ("502 Bad Gateway", "text/html; charset=undefined", "", b"<h1>502</h1>"),
    "reason-that-is-no-text": ("502 \xff\xff", "text/html", "", b""),
}  # fmt: skip


@pytest.mark.parametrize("delivery", ["rows", "batch"])
@pytest.mark.parametrize("name", OUTLANDISH)
def test_a_head_or_an_error_that_no_standard_allows_is_a_failure_like_others(name, delivery):
    status, media, extra, data = OUTLANDISH[name]
    left = itertools.repeat(True, 2)

    def script(call: Call) -> None:
        if len(call.prompts) == 2 and next(left, False):
            head = f"HTTP/1.1 {status}\r\ncontent-type: {media}\r\ncontent-length: {len(data)}\r\n{extra}\r\n"
            call.write(head.encode("latin-1") + data)
        else:
            call.answer()

    with Scripted(script) as server:
        frame = ask(server, 8, batch=sk.BatchPolicy(max_size=2, hedge=False), delivery=delivery)
    assert_all_right(frame)
    assert not list(left)


# ---- responses that are sent twice ------------------------------


NUMBERS = itertools.count()


def body_of(call: Call, ids: str) -> tuple[bytes, str]:
    choices = [{"index": i, "text": f"echo: {p}", "finish_reason": "stop"} for i, p in enumerate(call.prompts)]
    sent = re.search(r"(?i)^x-request-id: (\S+)", call.headers, re.MULTILINE)
    about = {"the request's": {"id": f"cmpl-{sent[1] if sent else ''}"}, "its own": {"id": f"cmpl-{next(NUMBERS)}"},
             "one for all": {"id": "cmpl"}, "none": {}}[ids]  # fmt: skip
    if not call.stream:
        return json.dumps({**about, "choices": choices}).encode(), "application/json"
    events = "".join(f"data: {json.dumps({**about, 'choices': [choice]})}\n\n" for choice in choices)
    return f"{events}data: [DONE]\n\n".encode(), "text/event-stream"


def twice(after_s: float, ids: str):
    """A script: each response is sent twice, the second time after a while."""

    def script(call: Call) -> None:
        data, media = body_of(call, ids)
        call.reply(data, media=media)
        if after_s:
            time.sleep(after_s)
        call.reply(data, media=media)

    return script


def once(ids: str):
    def script(call: Call) -> None:
        data, media = body_of(call, ids)
        call.reply(data, media=media)

    return script


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::swarmkit.SwarmWarning")
@pytest.mark.parametrize("delivery", ["rows", "batch"])
@pytest.mark.parametrize("ids", ["the request's", "its own"])
@pytest.mark.parametrize("after_s", [0.0, 0.002, 0.02])
def test_a_response_that_is_sent_twice_does_not_answer_the_next_request(delivery, ids, after_s):
    # The next request goes out when the second response has come, or it is answered by it: then its id tells.
    with Scripted(twice(after_s, ids)) as server:
        frame = ask(server, delivery=delivery, max_attempts=50)
    assert_no_wrong_answer(frame)
    assert frame["response"].notna().sum() > 100  # a connection that is dropped may take a row with it


@pytest.mark.parametrize("ids", ["the request's", "its own", "one for all", "none"])
@pytest.mark.parametrize("delivery", ["rows", "batch"])
def test_connections_are_used_again_where_responses_come_once(delivery, ids):
    with Scripted(once(ids)) as server:
        one = sk.BatchPolicy(max_size=1, max_in_flight=1, hedge=False)
        assert_all_right(ask(server, batch=one, delivery=delivery))
        assert len(server._threads) < 10


def test_equal_answers_with_equal_ids_are_answers():
    def script(call: Call) -> None:
        call.reply(b'{"id": "x", "choices": [{"index": 0, "text": "yes", "finish_reason": "stop"}]}')

    with Scripted(script) as server:
        assert (ask(server, delivery="batch")["response"] == "yes").all()


# ---- what is no answer, and what is only unusual ------------------------------

ODD = "row 1"


def odd(choice: dict, *, chat: bool = False, usage: dict | None = None, times: int = 99):
    """A script: the odd row gets this choice, the others are answered."""
    left = [times]

    def script(call: Call) -> None:
        choices = []
        for i, prompt in enumerate(call.prompts):
            text = {"message": {"content": f"echo: {prompt}"}} if chat else {"text": f"echo: {prompt}"}
            fine = {"index": i, **text, "finish_reason": "stop"}
            if prompt == ODD and left[0] > 0:
                left[0] -= 1
                fine = {"index": i, **choice}
            choices.append(fine)
        if not call.stream:
            call.reply(json.dumps({"choices": choices}).encode())
            return
        events = "".join(f"data: {json.dumps({'choices': [c]})}\n\n" for c in choices)
        call.reply(f"{events}data: [DONE]\n\n".encode(), media="text/event-stream")

    return script


def ask_odd(script, delivery, **options):
    with Scripted(script) as server:
        batch = sk.BatchPolicy(max_size=options.pop("size", 3), hedge=False)
        mode = {"mode": "single", "chat": "auto"} if options.pop("chat", False) else {"delivery": delivery}
        frame = ask(server, 3, batch=batch, **mode, **options)
    return frame, server


@pytest.mark.filterwarnings("ignore::swarmkit.SwarmWarning")
@pytest.mark.parametrize("delivery", ["rows", "batch"])
@pytest.mark.parametrize(
    ("choice", "says"),
    [
        ({"text": None, "finish_reason": "stop"}, "has no text"),
        ({"finish_reason": "stop"}, "has no text"),
        ({"text": "", "finish_reason": "content_filter"}, "withholds the answer.*content_filter"),
        ({"text": "half a sent", "finish_reason": "content_filter"}, "withholds the answer.*content_filter"),
    ],
)
def test_what_is_withheld_is_an_error_of_its_row_alone(choice, says, delivery):
    frame, server = ask_odd(odd(choice), delivery)
    assert re.search(says, frame["response_error"][1])
    assert str(server.address[1]) in frame["response_error"][1]
    assert frame["response"].isna().tolist() == [False, True, False]
    assert server.prompts == 3  # sending it again would change nothing


@pytest.mark.filterwarnings("ignore::swarmkit.SwarmWarning")
@pytest.mark.parametrize(
    ("choice", "says"),
    [
        ({"message": {"content": None, "refusal": "I cannot help with that."}, "finish_reason": "stop"},
         "refuses to answer: I cannot help"),
        ({"message": {"content": None}, "finish_reason": "stop"}, "has no text"),
        ({"message": {"content": None, "reasoning": "Hmm"}, "finish_reason": "length"}, "raise max_tokens"),
        ({"message": {"content": "", "refusal": None}, "finish_reason": "content_filter"}, "withholds"),
    ],
)  # fmt: skip
def test_a_chat_that_is_refused_is_an_error_with_the_words_of_the_server(choice, says):
    frame, server = ask_odd(odd(choice, chat=True), "batch", chat=True)
    assert re.search(says, frame["response_error"][1])
    assert frame["response"].isna().tolist() == [False, True, False]
    assert server.prompts == 3


@pytest.mark.parametrize("delivery", ["rows", "batch"])
def test_a_row_that_ends_with_an_error_is_sent_again(delivery):
    choice = {"text": "ec", "finish_reason": "error", "error": {"code": 502, "message": "provider is gone"}}
    frame, server = ask_odd(odd(choice, times=1), delivery)
    assert_all_right(frame)
    assert server.prompts <= 5  # not the others again


@pytest.mark.filterwarnings("ignore::swarmkit.SwarmWarning")
@pytest.mark.parametrize("delivery", ["rows", "batch"])
def test_a_row_that_always_ends_with_an_error_says_why(delivery):
    choice = {"text": "ec", "finish_reason": "error", "error": {"code": 502, "message": "provider is gone"}}
    frame, _ = ask_odd(odd(choice), delivery, max_attempts=2)
    assert "provider is gone" in frame["response_error"][1]
    assert frame["response"].isna().tolist() == [False, True, False]


@pytest.mark.parametrize(
    ("choice", "chat"),
    [
        ({"index": None, "text": "echo: row 1", "finish_reason": "stop"}, False),
        ({"text": "echo: row 1", "finish_reason": None}, False),
        ({"message": {"content": [{"type": "text", "text": "echo: "}, {"type": "text", "text": "row 1"}]}}, True),
        ({"message": {"content": [{"type": "thinking", "thinking": []}, {"type": "text", "text": "echo: row 1"}]}},
         True),
        ({"index": None, "message": {"content": "echo: row 1"}, "finish_reason": None}, True),
    ],
)  # fmt: skip
def test_what_is_only_unusual_is_accepted(choice, chat):
    frame, server = ask_odd(odd(choice, chat=chat), "batch", chat=chat, size=1)
    assert_all_right(frame)
    assert server.prompts == 3


def events(call: Call, *chunks: Any, done: bool = True) -> None:
    text = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n" * done
    call.reply(f": hello\n\n{text}".encode(), media="text/event-stream")


def parts(call: Call, end: str | None = "stop", after: bool = False) -> list[dict[str, Any]]:
    """An answer to the first prompt in small pieces, as a chat or a completion."""
    chat = "messages" in call.body
    pieces = ["ec", "ho: ", call.prompts[0], *(["!"] if after else [])]
    said = [{"delta": {"role": "assistant", "content": p}} if chat else {"text": p} for p in pieces]
    ends = [None, None, end, *([end] if after else [])]
    return [{"choices": [{"index": 0, **words, "finish_reason": e}]} for words, e in zip(said, ends, strict=True)]


@pytest.mark.parametrize("chat", ["auto", None])
def test_a_stream_that_was_not_asked_for_is_read_as_a_whole_reply(chat):
    usage = {"prompt_tokens": 3, "completion_tokens": 4}

    def script(call: Call) -> None:
        events(call, None, *parts(call), {"choices": [], "usage": usage})

    with Scripted(script) as server:
        frame = ask(server, 3, chat=chat, mode="single", details=True)
    assert_all_right(frame)
    assert frame["response_completion_tokens"].tolist() == [4, 4, 4]


@pytest.mark.filterwarnings("ignore::swarmkit.SwarmWarning")
@pytest.mark.parametrize(
    ("script", "says"),
    [
        (lambda call: events(call, *parts(call, None), done=False), "a stream was cut"),
        (lambda call: events(call, *parts(call, after=True)), "goes on after its end"),
        (lambda call: events(call, *parts(call)[:2], {"error": {"message": "no luck", "code": 502}}), "502.*no luck"),
        (lambda call: events(call, [1]), "not JSON"),
        (lambda call: events(call, {"choices": [{"index": [], "delta": 3}]}), "not JSON"),
        (lambda call: call.reply(b'{"choices": [], "error": {"message": "no luck", "code": 502}}'), "502.*no luck"),
        (lambda call: call.reply(b'{"choices": [], "error": "no luck"}'), "no luck"),
    ],
)
def test_a_reply_that_is_no_answer_says_why(script, says):
    with Scripted(script) as server, pytest.raises(sk.NoEndpointsError, match=says):
        ask(server, 2, mode="single", chat="auto")


@pytest.mark.parametrize("delivery", ["rows", "batch"])
@pytest.mark.parametrize("status", ["201 Created", "203 Non-Authoritative Information"])
def test_other_statuses_of_success_are_answers(status, delivery):
    class Other(Call):
        def reply(self, data: bytes, status: str = status, media: str = "application/json", extra: str = "") -> None:
            super().reply(data, status, media, extra)

    def script(call: Call) -> None:
        Other(**vars(call)).answer()

    with Scripted(script) as server:
        assert_all_right(ask(server, 8, delivery=delivery))


# ---- bounds ------------------------------


def forever(first: bytes, piece: bytes, every_s: float = 0.0, media: str = "application/json"):
    """A script: a body without an end."""

    def script(call: Call) -> None:
        head = f"HTTP/1.1 200 OK\r\ncontent-type: {media}\r\ntransfer-encoding: chunked\r\n\r\n"
        call.write(head.encode())
        data = first
        while True:
            call.write(b"%x\r\n%s\r\n" % (len(data), data))
            data = piece
            if every_s:
                time.sleep(every_s)

    return script


ENDLESS = {
    "a body of white space": forever(b"{", b" ", 0.02),
    "a stream of comments": forever(b": hello\n\n", b": wait\n\n", 0.02, "text/event-stream"),
    "a stream of blank lines": forever(b"\n", b"\n", 0.02, "text/event-stream"),
    "a stream of empty chunks": forever(
        b"\n", b'data: {"choices":[{"index":0,"text":"","finish_reason":null}]}\n\n', 0.02, "text/event-stream"
    ),
}


@pytest.mark.filterwarnings("ignore::swarmkit.SwarmWarning")
@pytest.mark.parametrize("name", ENDLESS)
def test_what_carries_no_tokens_does_not_end_a_silence(name):
    with Scripted(ENDLESS[name]) as server:
        began = time.monotonic()
        delivery = "rows" if "stream" in name else "batch"
        try:
            frame = ask(server, 1, timeout=0.4, delivery=delivery, max_attempts=1)
        except sk.NoEndpointsError as end:
            frame = end.frame
        assert time.monotonic() - began < 20
    assert frame["response"].isna().all()


@pytest.mark.filterwarnings("ignore::swarmkit.SwarmWarning")
@pytest.mark.parametrize("delivery", ["rows", "batch"])
def test_a_reply_without_an_end_is_left_where_it_is_too_long(delivery):
    piece = b"x" * (1 << 20)
    line = b'data: {"choices":[{"index":0,"text":"%s","finish_reason":null}]}\n\n' % piece
    script = forever(line, line, media="text/event-stream") if delivery == "rows" else forever(b'{"a": "', piece)
    with Scripted(script) as server:
        try:
            frame = ask(server, 1, delivery=delivery, max_attempts=1)
        except sk.NoEndpointsError as end:
            frame = end.frame
    assert "longer than" in frame["response_error"][0]


def compressed(how: str, pad: bytes = b""):
    """A script: answers are compressed, though that was not asked for."""

    def script(call: Call) -> None:
        data, media = body_of(call, "none")
        data = pad + data if call.stream else data[:-1] + b', "pad": "' + pad + b'"}'
        pack = {"gzip": gzip.compress, "deflate": zlib.compress, "br": bytes}[how]
        call.reply(pack(data), media=media, extra=f"content-encoding: {how}\r\n")

    return script


OWN_CLIENT = [None, openai.DefaultAioHttpClient, openai.DefaultAsyncHttpxClient]


@pytest.mark.parametrize("client", OWN_CLIENT, ids=["ours", "aiohttp", "httpx"])
@pytest.mark.parametrize("how", ["gzip", "deflate"])
@pytest.mark.parametrize("delivery", ["rows", "batch"])
def test_a_reply_that_is_compressed_all_the_same_is_read(how, delivery, client):
    with Scripted(compressed(how)) as server:
        assert_all_right(ask(server, 12, delivery=delivery, http_client=client and client()))


@pytest.mark.filterwarnings("ignore::swarmkit.SwarmWarning")
@pytest.mark.parametrize("client", OWN_CLIENT, ids=["ours", "aiohttp", "httpx"])
@pytest.mark.parametrize("delivery", ["rows", "batch"])
def test_a_small_reply_that_unpacks_to_a_large_one_is_left_where_it_is_too_long(delivery, client):
    # A gibibyte and more, in a megabyte.
    pack = zlib.compressobj(wbits=31)
    first, piece = (
        pack.compress((b":" + b"wait" * 4095 + b"\n\n\n") * 64) + pack.flush(zlib.Z_FULL_FLUSH) for _ in range(2)
    )
    bomb = first + piece * 1200

    def script(call: Call) -> None:
        call.reply(bomb, media="text/event-stream" if call.stream else "application/json",
                   extra="content-encoding: gzip\r\n")  # fmt: skip

    tracemalloc.start()
    try:
        with Scripted(script) as server, pytest.raises(sk.NoEndpointsError, match="longer than"):
            ask(server, 1, delivery=delivery, retry=replace(RETRY, give_up_s=0.1), http_client=client and client())
        assert tracemalloc.get_traced_memory()[1] < 100 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.filterwarnings("ignore::swarmkit.SwarmWarning")
def test_a_compression_that_is_not_read_is_named():
    named = pytest.raises(sk.NoEndpointsError, match=r"compressed \(br\), though a plain one was asked for")
    with Scripted(compressed("br")) as server, named:
        ask(server, 1, delivery="batch", retry=replace(RETRY, give_up_s=0.3))


@pytest.mark.parametrize(
    "script", [forever(b"{", b" ", 0.05), forever(b'{"data": [', b'{"id": "m"},', 0.05), forever(b"[", b" " * 99_999)]
)
def test_connect_does_not_wait_for_a_listing_that_drips_or_never_ends(script):
    with Scripted(script) as server:
        began = time.monotonic()
        with pytest.raises(sk.NoEndpointsError):
            sk.connect(f"127.0.0.1:{server.address[1]}", probe_timeout=0.5)
        assert time.monotonic() - began < 10


# ---- streams that turn out malformed ------------------------------


def event(index: int, text: str) -> bytes:
    return b"data: %s\n\n" % json.dumps({"choices": [{"index": index, "text": text, "finish_reason": "stop"}]}).encode()


def lying(call: Call, nth: int) -> None:
    """The nth stream has its answers on wrong rows, which shows only afterwards."""
    if call.server.requests != nth or len(call.prompts) < 2:
        call.answer()
        return
    call.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n")
    call.write(event(0, f"echo: {call.prompts[1]}"))
    time.sleep(0.2)
    call.write(event(0, f"echo: {call.prompts[0]}") + b"data: [DONE]\n\n")
    call.connection.close()


def lie(nth: int):
    return lambda call: lying(call, nth)


@pytest.mark.parametrize("nth", [1, 3])
@pytest.mark.parametrize("store", [False, True])
def test_rows_of_a_stream_that_turns_out_malformed_are_taken_back(nth, store, tmp_path):
    options = {"store": str(tmp_path / "s")} if store else {}
    one = sk.BatchPolicy(max_size=3, max_in_flight=1, hedge=False)
    with Scripted(lie(nth)) as server:
        frame = ask(server, 12, delivery="rows", batch=one, **options)
        stats = sk.last_run().stats
        assert_all_right(frame)
        assert (stats.answered, stats.failed) == (12, 0)
        what = stats.story.frame(None, None, None)["what"].tolist()
        assert ("answers taken back" in what) == (nth == 3)  # the first stream of a server is held until it has ended
        if store:
            before = server.prompts
            again = ask(server, 12, delivery="rows", batch=one, **options)
            assert_all_right(again)
            assert server.prompts == before
            stored = sk.Store(tmp_path / "s").to_frame()["text"]
            assert sorted(stored) == sorted(frame["response"])


def lie_at_the_end(*nth: int):
    """A script: the nth stream has all its answers on wrong rows, which shows after the last of them."""

    def script(call: Call) -> None:
        if call.server.requests not in nth:
            call.answer()
            return
        call.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n")
        for i in range(len(call.prompts)):
            call.write(event(i, f"echo: {call.prompts[i - 1]}"))
        time.sleep(0.2)
        call.write(event(0, f"echo: {call.prompts[0]}") + b"data: [DONE]\n\n")
        call.connection.close()

    return script


@pytest.mark.parametrize("store", [False, True], ids=["", "store"])
@pytest.mark.parametrize("nth", [2, 4])
@pytest.mark.parametrize("size", [1, 3])
def test_rows_are_taken_back_also_if_they_were_the_last_ones_of_the_run(size, nth, store, tmp_path):
    options = {"store": str(tmp_path / "s")} if store else {}
    one = sk.BatchPolicy(max_size=size, max_in_flight=1, hedge=False)
    with Scripted(lie_at_the_end(nth)) as server:
        assert_all_right(ask(server, 4 * size, delivery="rows", batch=one, **options))
        # Where the last rows were taken back, a plain prompt shows first that the endpoint is sound.
        assert server.prompts == 5 * size + (nth == 4)
    stats = sk.last_run().stats
    assert (stats.answered, stats.failed, stats.failed_requests) == (4 * size, 0, 1)
    if store:
        with Scripted(Call.answer) as server:
            assert_all_right(ask(server, 4 * size, delivery="rows", batch=one, **options))
            assert server.prompts == 0


def test_an_iteration_over_rows_ends_with_the_right_ones_and_says_what_came_twice():
    frame = pd.DataFrame({"prompt": [f"row {i}" for i in range(12)]})
    one = sk.BatchPolicy(max_size=3, max_in_flight=1, hedge=False)
    with Scripted(lie_at_the_end(3, 5, 6)) as server, sk.VLLMPool(
        [AgentEndpoint(*server.address)], model="m", retry=RETRY, batch=one
    ) as pool:  # fmt: skip
        answers = sk.iter_scatter(frame, "{prompt}", pool=pool, delivery="rows", max_tokens=8, progress=False)
        with pytest.warns(sk.SwarmWarning, match="3 rows came twice: .* keep the last row of each"):
            parts = pd.concat(answers)
    assert len(parts) == 15
    assert_all_right(parts[~parts.index.duplicated(keep="last")].sort_index())


@pytest.mark.parametrize("nth", [1, 2])
def test_rows_are_yielded_once_where_the_first_stream_of_a_server_turns_out_malformed(nth):
    # The second one may be under way before the first has ended.
    frame = pd.DataFrame({"prompt": [f"row {i}" for i in range(12)]})
    batch = sk.BatchPolicy(max_size=3, max_in_flight=2, hedge=False)
    first = lie_at_the_end(nth)

    def script(call: Call) -> None:
        if call.server.requests != nth:
            time.sleep(0.3)
        first(call)

    with Scripted(script) as server, sk.VLLMPool(
        [AgentEndpoint(*server.address)], model="m", retry=RETRY, batch=batch
    ) as pool:  # fmt: skip
        parts = pd.concat(sk.iter_scatter(frame, "{prompt}", pool=pool, delivery="rows", max_tokens=8, progress=False))
    assert parts.index.is_unique
    assert_all_right(parts.sort_index())


def test_a_taken_back_answer_is_not_reused_by_the_next_run(tmp_path):
    def script(call: Call) -> None:
        if call.server.requests >= 3:  # the run ends before the rows are sent again
            if call.server.requests == 3:
                lying(call, 3)
            else:
                call.reply(b'{"error": "gone"}', status="401 Unauthorized")
        else:
            call.answer()

    one = sk.BatchPolicy(max_size=3, max_in_flight=1, hedge=False)
    store = str(tmp_path / "s")
    with Scripted(script) as server:
        try:
            first = ask(server, 12, delivery="rows", batch=one, store=store, retry=replace(RETRY, give_up_s=0.5))
        except sk.NoEndpointsError as end:
            first = end.frame
        assert_no_wrong_answer(first)
        assert first["response"].isna().sum() >= 3
    with Scripted(Call.answer) as server:
        assert_all_right(ask(server, 12, delivery="rows", batch=one, store=store))


def test_duplicates_of_a_row_that_is_taken_back_follow_it():
    one = sk.BatchPolicy(max_size=3, max_in_flight=1, hedge=False)
    frame = pd.DataFrame({"prompt": [f"row {i}" for i in range(12)] * 2})
    with Scripted(lie(3)) as server, sk.VLLMPool(
        [AgentEndpoint(*server.address)], model="m", retry=RETRY, batch=one
    ) as pool:  # fmt: skip
        out = sk.scatter(frame, "{prompt}", pool=pool, progress=False, delivery="rows", dedup=True)
        stats = sk.last_run().stats
    assert_all_right(out)
    assert (stats.answered, stats.reused) == (12, 12)


def test_iter_scatter_gives_no_row_of_a_stream_that_is_not_proven():
    one = sk.BatchPolicy(max_size=3, max_in_flight=1, hedge=False)
    frame = pd.DataFrame({"prompt": [f"row {i}" for i in range(12)]})
    with Scripted(lie(1)) as server, sk.VLLMPool(
        [AgentEndpoint(*server.address)], model="m", retry=RETRY, batch=one
    ) as pool:  # fmt: skip
        parts = list(sk.iter_scatter(frame, "{prompt}", pool=pool, delivery="rows"))
    out = pd.concat(parts)
    assert sorted(out.index) == list(range(12))
    assert_all_right(out.sort_index())
