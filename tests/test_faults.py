"""The table of faults: each over real sockets, alone and amid three healthy endpoints, for both deliveries.

Whatever the fault, no row is lost, none is answered twice, none gets another row's answer, no request goes out that
the rows' attempts do not show, and what failed says where and why. Faults above the socket come from scripted echo
endpoints, one with an address of its own for each case; those below it are played by ``scripted.py``.
"""

from __future__ import annotations

import contextlib
import json
import logging
import pickle
import re
import socket
import subprocess
import sys
import threading
import traceback
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
import pytest
from scripted import Call, Scripted

import swarmkit as sk
from swarmkit.client.error_replies import Malformed, StreamFailed
from swarmkit.client.hostfile import AgentEndpoint
from swarmkit.client.replies import decode_counted
from swarmkit.client.row_stream import RowStream
from swarmkit.engine.columns import Columns
from swarmkit.frames.call import arguments, read_options
from swarmkit.frames.scatter import ScatterFrame
from swarmkit.records import FailureKind as K
from swarmkit.records import Route
from swarmkit.runs.events import RequestEnded, RequestSent, RowFailed, RowsDone, RunEvent
from swarmkit.server import LocalSwarm

ROWS = 12
ODD = 5  # the row that carries the marker, where the fault is about a row
HEALTHY = ["127.0.0.1", "127.0.0.2", "127.0.0.3"]
BARE = ["127.0.0.4", "127.0.0.5", "127.0.0.6"]
HIDDEN = ["/version", "/health", "/tokenize"]  # and /detokenize is of no use without the latter
RETRY = sk.RetryPolicy(base_s=0.02, cap_s=0.2, quiet_s=5.0, give_up_s=1.5)
BRIEF = RETRY
KEY = "sk-swarm-d41d8cd98f00b204"

ALL = "every row is answered"
ODD_FAILS = "the odd row fails, all others are answered"
EACH = "rows fail one by one"
GONE = "no endpoint is left"


@dataclass(frozen=True)
class Row:
    """One fault, and how a run ends when the endpoint that has it is alone. Amid healthy ones, all rows are answered.

    faults : of a scripted echo endpoint, as for ``sk.local``, without the address.
    script : or what each request gets from a ``Scripted`` endpoint.
    alone, answered : the end, and the rows answered by then (all or none, if it is not said).
    kinds : what the requests that fail may fail of; empty: none may fail.
    says : to be found in the error of each failed request and row, beside the endpoint's name.
    attempts : requests a row is part of, at most.
    reaches : whether every request comes to an endpoint that counts its prompts.
    endpoint, hear : changes the endpoint's address; hears the run's events.
    """

    name: str
    faults: str = ""
    alone: str = ALL
    kinds: frozenset[K] | K | None = None
    says: str = ""
    attempts: int = 5
    answered: int | None = None
    deliveries: tuple[str, ...] = ("rows", "batch")
    marker: str = ""
    timeout: float = 20.0
    retry: sk.RetryPolicy = RETRY
    reaches: bool = True
    script: Callable[[Call], None] | None = None
    endpoint: Callable[[AgentEndpoint], AgentEndpoint] = lambda endpoint: endpoint
    hear: Callable[[Scripted, RunEvent], None] | None = None


# ---- scripts ------------------------------


def reset_mid_body(call: Call) -> None:
    call.write(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 1000\r\n\r\n{")
    call.reset()


def not_http(call: Call) -> None:
    call.write(b"220 mail.example ESMTP\r\n\r\n")
    call.connection.close()


def stale(call: Call) -> None:
    call.answer() if not call.nth else call.connection.close()


def go_silent(call: Call) -> None:
    """As a vLLM does that is told to stop: refuse new connections, say nothing on those there are."""
    call.server.close()
    call.wait_for_the_end()


def die_once(call: Call) -> None:
    if call.server.requests > 1:
        call.answer()
        return
    call.server.close()
    call.server.hang_up()


def come_back(server: Scripted, event: RunEvent) -> None:
    if isinstance(event, RequestEnded) and event.failure and event.failure.kind is K.CONNECT and not server.listening:
        server.open()


def chatty_about_keys(call: Call) -> None:
    sent = re.search(r"(?i)^authorization: (.*)$", call.headers, re.MULTILINE)
    words = f'{{"error": {{"message": "no access with {sent and sent[1].strip()}", "code": 401}}}}'
    call.reply(words.encode(), status="401 Unauthorized")


def five_choices(call: Call) -> None:
    data = b'{"choices": 5}'
    call.reply(b"data: %s\n\n" % data if call.stream else data)


TABLE = [
    # No connection.
    Row("refused", alone=GONE, kinds=K.CONNECT, says="refused", reaches=False, script=Call.answer,
        endpoint=lambda e: replace(e, port=closed_port())),
    Row("unknown host", alone=GONE, kinds=K.CONNECT, says="(?i)name|address", reaches=False, script=Call.answer,
        endpoint=lambda e: replace(e, host="no-such-host.invalid")),
    Row("TLS to a plain port", alone=GONE, kinds=K.CONNECT, says="SSL", reaches=False,
        endpoint=lambda e: replace(e, scheme="https")),
    Row("restarted", alone=ALL, kinds=frozenset({K.DISCONNECT, K.CONNECT, K.STALE}), script=die_once, hear=come_back,
        attempts=8, reaches=False),
    # The connection ends.
    Row("reset", "reset", GONE, K.DISCONNECT, "reset"),
    Row("reset once", "reset:first=1", ALL, frozenset({K.DISCONNECT, K.STALE}), "reset", attempts=2),
    Row("reset mid-body", alone=GONE, kinds=K.DISCONNECT, says="reset|closed", script=reset_mid_body),
    Row("cut, rows kept", "cut:rows=2", ALL, K.DISCONNECT, "closed the connection", deliveries=("rows",)),
    Row("cut, whole reply", "cut:rows=2", GONE, K.DISCONNECT, "closed the connection", deliveries=("batch",)),
    Row("cut once", "cut:rows=1,first=1", ALL, K.DISCONNECT, "closed the connection", attempts=2),
    Row("half-close, rows kept", "half_close:rows=2", ALL, K.DISCONNECT, "closed the connection", deliveries=("rows",)),
    Row("half-close, whole reply", "half_close", GONE, K.DISCONNECT, "closed the connection", deliveries=("batch",)),
    Row("not HTTP", alone=GONE, kinds=K.DISCONNECT, says="220 mail|status line", script=not_http),
    Row("stale connection", alone=ALL, kinds=K.STALE, script=stale, attempts=8),
    Row("a row that kills", marker="<killer>", alone=ODD_FAILS, kinds=frozenset({K.DISCONNECT, K.STALE}), says="reset",
        attempts=20, retry=replace(RETRY, give_up_s=10.0)),
    # Nothing comes, or slowly.
    Row("silence before headers", "hang", GONE, K.HANG, "nothing came for 0.4 s", timeout=0.4, retry=BRIEF),
    Row("silence after headers", "silence", GONE, K.HANG, "nothing came for 0.4 s", timeout=0.4, retry=BRIEF,
        deliveries=("batch",)),
    Row("silence after a row", "silence:rows=1", ALL, K.HANG, "(nothing|no token) came for 0.4 s", timeout=0.4,
        deliveries=("rows",)),
    Row("silence once", "silence:first=1", ALL, K.HANG, "nothing came for 0.6 s", timeout=0.6, attempts=3),
    Row("slow drip, rows", "drip:seconds=0.03", timeout=1.0, deliveries=("rows",), attempts=1),
    Row("slow drip, whole reply", "drip:seconds=0.1", timeout=1.0, deliveries=("batch",), attempts=1),
    Row("silent and refusing", alone=GONE, kinds=frozenset({K.DISCONNECT, K.CONNECT}),
        says="silent for 0.2 s|refused|[Rr]eset",
        script=go_silent, retry=replace(BRIEF, quiet_s=0.2), reaches=False),
    # Not an answer.
    Row("half a JSON body", "half_json", GONE, frozenset({K.MALFORMED, K.DISCONNECT}), "JSON|DONE"),
    Row("garbage 200", "garbage", GONE, K.MALFORMED, "doctype html"),
    Row("null body", "null_body", GONE, K.MALFORMED, "null"),
    Row("empty 200", "empty_body", GONE, K.MALFORMED, "empty|not JSON"),
    Row("error object in a 200", "error_body", GONE, K.SERVER, "HTTP 500.*EngineCore"),
    Row("redirect", "http_307", GONE, K.DENIED, r"redirects to http://127.0.0.1:9/", attempts=2),
    Row("huge reply", script=lambda call: call.answer(pad="x" * 3_000_000), attempts=1),
    # Refusals.
    Row("401", "http_401", GONE, K.DENIED, "HTTP 401.*Invalid API key", attempts=2),
    Row("401 that repeats the key", alone=GONE, kinds=K.DENIED, says=r"HTTP 401.*Bearer \(the key\)", attempts=2,
        script=chatty_about_keys),
    Row("402", "http_402", GONE, K.DENIED, "HTTP 402.*credits", attempts=2),
    Row("403", "http_403", GONE, K.DENIED, "HTTP 403", attempts=2),
    Row("404 model", "http_404", GONE, K.DENIED, "HTTP 404.*model does not exist", attempts=2),
    Row("404 path", alone=GONE, kinds=K.DENIED, says="HTTP 404.*Not Found", attempts=2, reaches=False,
        endpoint=lambda e: replace(e, path="/nowhere")),
    Row("405", "http_405", GONE, K.DENIED, "HTTP 405", attempts=2),
    Row("400 for every row", "http_400", EACH, K.REJECTED, "HTTP 400.*refuses every request"),
    Row("400 for one row", marker="<refused>", alone=ODD_FAILS, kinds=K.REJECTED, says="HTTP 400.*context length"),
    Row("413", "http_413", EACH, K.TOO_LARGE, "HTTP 413.*Too Large"),
    Row("422", "http_422", EACH, K.REJECTED, "HTTP 422.*validation"),
    Row("400 inside a 200", "late_400", EACH, K.REJECTED, "HTTP 400.*refuses every request"),
    # Server errors.
    Row("500", "http_500", GONE, K.SERVER, "HTTP 500.*EngineCore"),
    Row("500 once", "http_500:first=1", ALL, K.SERVER, "HTTP 500", attempts=2),
    Row("500 now and then", "http_500:every=3", ALL, K.SERVER, "HTTP 500"),
    Row("500 inside a 200", "late_500", GONE, K.SERVER, "EngineCore"),
    Row("500 inside a 200 once", "late_500:first=1", ALL, K.SERVER, "EngineCore", attempts=2),
    Row("502 of a proxy", "http_502", GONE, K.SERVER, "HTTP 502.*: 502 Bad Gateway$"),
    Row("504 of a proxy", "http_504", GONE, K.TOO_LARGE, "HTTP 504.*: 504 Gateway Time-out$"),
    # Full.
    Row("503, small batches pass", "queue_full:rows=2", ALL, K.BUSY, "HTTP 503.*busy", attempts=8),
    Row("503 for ever", "http_503", GONE, K.BUSY, "HTTP 503.*busy"),
    Row("503 with Retry-After", "wait:first=2,seconds=0.1", ALL, K.BUSY, "HTTP 503"),
    Row("429 with Retry-After", "http_429:first=2,seconds=0.1", ALL, K.BUSY, "HTTP 429"),
    # Answers that are not whole, or not of these rows.
    Row("no [DONE]", "no_done", ALL, K.DISCONNECT, "DONE", attempts=1, deliveries=("rows",)),
    Row("no finish_reason, rows", "no_finish", GONE, K.MALFORMED, "without 1 of", answered=9, deliveries=("rows",)),
    Row("no finish_reason, whole reply", "no_finish", ALL, attempts=1, deliveries=("batch",)),
    Row("no finish_reason once", "no_finish:first=1", ALL, K.MALFORMED, attempts=2),
    Row("abort", "abort", ALL, K.ABORT, "shutting down", attempts=8),  # each request answers some of its rows
    Row("abort once", "abort:first=1", ALL, K.ABORT, "shutting down", attempts=2),
    Row("missing index, rows", "missing_index", GONE, K.MALFORMED, "without 1 of", answered=9, deliveries=("rows",)),
    Row("missing index, whole reply", "missing_index", GONE, K.MALFORMED, "choices are missing", deliveries=("batch",)),
    Row("repeated index", "repeated_index", GONE, K.MALFORMED, "twice|after its end"),
    Row("repeated index once", "repeated_index:first=1", ALL, K.MALFORMED, "twice|after its end", attempts=2),
    Row("unknown index", "unknown_index", GONE, K.MALFORMED, "has the index"),
    Row("choices in any order", "shuffle", attempts=1),
    Row("text that is a number", "wrong_type", GONE, K.MALFORMED, "type int"),
    Row("choices that are a number", alone=GONE, kinds=K.MALFORMED, says="choices", script=five_choices),
]  # fmt: skip
# One of each kind of failure, at servers of which everything is learned, and at those that have no /version, /health
# and /tokenize, so that little is.
OF_EACH_KIND = ["refused", "stale connection", "reset once", "a row that kills", "silence once", "500 now and then",
                "error object in a 200", "abort once", "503 with Retry-After", "504 of a proxy", "413",
                "400 for one row", "403", "half a JSON body", "repeated index once"]  # fmt: skip
CASES = [(row, delivery, amid, "") for row in TABLE for delivery in row.deliveries for amid in (False, True)]
CASES += [
    (row, delivery, True, looks)
    for row in TABLE
    if row.name in OF_EACH_KIND
    for delivery in row.deliveries
    for looks in ("learned", "bare")
]
ADDRESSES = [f"127.1.{i // 200}.{1 + i % 200}" for i in range(len(CASES))]


@pytest.fixture(scope="module")
def swarm() -> Iterator[LocalSwarm]:
    """Three healthy endpoints and one for each case, which are so only towards rows without a marker."""
    faults = ["bad_row:marker=<refused>", "kill_row:marker=<killer>"]
    faults += [f"http_404:path={path},address={address}" for address in BARE for path in HIDDEN]
    for (row, _, _, looks), address in zip(CASES, ADDRESSES, strict=True):
        if looks == "bare":
            faults += [f"http_404:path={path},address={address}" for path in HIDDEN]
        if row.faults:
            kind, _, rest = row.faults.partition(":")
            faults.append(f"{kind}:{','.join([rest, f'address={address}'] if rest else [f'address={address}'])}")
    with sk.local(1, engine="echo", addresses=[*HEALTHY, *BARE, *ADDRESSES], faults=faults) as swarm:
        yield swarm


def closed_port() -> int:
    """One that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def prompts_seen(swarm: LocalSwarm, addresses: list[str]) -> int:
    """Prompts that came in on these addresses, as the server counts them."""
    first = swarm.endpoints[0]
    request = urllib.request.Request(f"{first.url}/metrics?all=1", headers={"Authorization": f"Bearer {first.key()}"})
    text = urllib.request.urlopen(request, timeout=20).read().decode()
    found = re.findall(r'^swarmkit:prompts_total\{address="([^"]+)".*\} (\d+)', text, re.MULTILINE)
    return sum(int(count) for address, count in found if address in addresses)


@dataclass
class Seen:
    """What came of a run."""

    frame: Any
    events: list[RunEvent]
    end: sk.NoEndpointsError | None

    @property
    def failures(self) -> list[Any]:
        return [e.failure for e in self.events if isinstance(e, RequestEnded) and e.failure]


def drive(pool: sk.VLLMPool, prompts: list[str], hear: Callable[[RunEvent], None] = lambda event: None,
          **options: Any) -> Seen:  # fmt: skip
    """``scatter``, with an ear for its events."""
    events: list[RunEvent] = []

    def listen(event: RunEvent) -> None:
        events.append(event)
        hear(event)

    df = pd.DataFrame({"prompt": prompts}, index=range(100, 100 + len(prompts)))
    frame = ScatterFrame(df, "prompt", arguments(sk.scatter, {"details": True}))
    call = read_options(
        arguments(sk.scatter, {"pool": pool, "max_tokens": 64, "progress": False, "details": True, **options})
    )
    run = frame.start(call, [listen])
    try:
        return Seen(run.result(), events, None)
    except sk.NoEndpointsError as end:
        return Seen(end.frame, events, end)


@pytest.mark.filterwarnings("ignore::swarmkit.SwarmWarning")
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(i, id="-".join(filter(None, (row.name, delivery, "amid" if amid else "alone", looks))),
                     marks=[pytest.mark.long] if looks else [])
        for i, (row, delivery, amid, looks) in enumerate(CASES)
    ],
)  # fmt: skip
def test_a_fault(swarm: LocalSwarm, case: int) -> None:
    row, delivery, amid, looks = CASES[case]
    known = len(HEALTHY)
    healthy = swarm.endpoints[known : 2 * known] if looks == "bare" else swarm.endpoints[:known] if amid else []
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(Scripted(row.script)) if row.script else None
        faulty = AgentEndpoint(*server.address, api_key=KEY) if server else swarm.endpoints[2 * known + case]
        faulty = row.endpoint(faulty)
        pool = stack.enter_context(
            sk.VLLMPool(
                [*healthy[:1], faulty, *healthy[1:]],
                model="echo",
                chat="auto" if looks else None,
                timeout=row.timeout,
                retry=row.retry,
                batch=sk.BatchPolicy(max_size=4, hedge=False),
            )
        )
        counted = [*HEALTHY, *BARE, ADDRESSES[case]]
        if looks:  # what is learned of servers costs prompts, too
            drive(pool.select([0, 2, 3]), ["learn"], delivery=delivery)
        before = prompts_seen(swarm, counted)
        prompts = [f"row {i}{row.marker if i == ODD else ''}" for i in range(ROWS)]
        hear = row.hear
        seen = drive(pool, prompts, (lambda event: hear(server, event)) if hear else lambda event: None,
                     delivery=delivery)  # fmt: skip
        asked = prompts_seen(swarm, counted) - before + (server.prompts if server else 0)
    frame, names = seen.frame, {e.name for e in pool.endpoints}

    # Every row ends once, with its own answer or an error.
    assert list(frame.index) == list(range(100, 100 + ROWS))
    answered = frame["response"].notna()
    assert (answered != frame["response_error"].notna()).all()
    assert (frame["response"][answered] == ("echo: " + frame["prompt"])[answered]).all()
    won = Counter(i for e in seen.events if isinstance(e, RowsDone) for i in e.rows)
    lost = Counter(e.row for e in seen.events if isinstance(e, RowFailed))
    assert won == Counter(i for i in range(ROWS) if answered.iloc[i])
    assert set(lost.values()) <= {1}
    assert not set(lost) & set(won)

    # Retries are bounded, and the rows' attempts show them all; a probe is a row that has its answer already.
    settled: set[int] = set()
    probes = 0
    for event in seen.events:
        if isinstance(event, RowsDone):
            settled.update(event.rows)
        elif isinstance(event, RequestSent):
            probes += settled.issuperset(event.rows)
    if seen.end is None:
        assert frame["response_attempts"].max() <= row.attempts
    # A server that does not tokenize as the others do is learned anew, by some short prompts.
    questions = 20 if server and looks == "learned" else 0
    if row.reaches and seen.end is None:
        assert 0 <= asked - frame["response_attempts"].sum() <= probes + questions

    # What failed is what it should be, and says where and why.
    kinds = {row.kinds} if isinstance(row.kinds, K) else set(row.kinds or ())
    assert {f.kind for f in seen.failures} <= kinds
    for failure in seen.failures:
        words = failure.describe()
        assert any(f" at {name}" in words for name in names), words
        assert re.search(row.says, words), words
        assert KEY not in words
    for error in frame["response_error"].dropna():
        assert any(f" at {name}" in error for name in names), error
        assert re.search(row.says, error), error

    # And the end is the right one.
    wanted = row.alone if not amid or row.alone == ODD_FAILS else ALL
    if wanted == ALL:
        assert answered.all()
    elif wanted == ODD_FAILS:
        assert list(frame.index[~answered]) == [100 + ODD]
    else:
        assert answered.sum() == (row.answered or 0)
    assert (seen.end is not None) == (wanted == GONE)
    if seen.end is not None:
        assert any(name in str(seen.end) for name in names)
        assert re.search(row.says, str(seen.end))


# ---- beside the table ------------------------------


@pytest.mark.filterwarnings("ignore:no endpoint answers")
def test_no_row_falls_to_a_balancer_that_sends_each_second_request_to_a_dead_server() -> None:
    """A row that is asked in turn with one that is known to be good would meet the dead server each time."""
    requests = iter(range(1_000_000))

    def script(call: Call) -> None:
        if call.prompts and next(requests) % 2 == 0:
            call.reply(b"<html>No server is available</html>", "503 Service Unavailable", "text/html")
        elif call.prompts:
            call.answer()
        else:
            call.reply(b"{}", "404 Not Found")

    df = pd.DataFrame({"q": [f"row {i}" for i in range(60)]})
    options = {"batch": sk.BatchPolicy(max_size=5), "retry": RETRY}
    with Scripted(script) as server, sk.VLLMPool([server.address], model="m", **options) as pool:
        answers = df.swarm.scatter("q", pool=pool)
    assert answers["response"].to_list() == [f"echo: row {i}" for i in range(60)]
    assert sk.last_run().stats.requests <= 6 * 60 / 5  # ideal are two for each five rows


@pytest.mark.parametrize("delivery", ["rows", "batch"])
def test_a_connection_that_was_used_before_and_is_closed_by_now_is_stale(delivery: str) -> None:
    with Scripted(stale) as server, sk.VLLMPool([server.address], model="echo", retry=RETRY) as pool:
        seen = [drive(pool, [text], delivery=delivery) for text in "abc"]
    assert [s.frame["response"].to_list() for s in seen] == [["echo: a"], ["echo: b"], ["echo: c"]]
    assert {f.kind for s in seen for f in s.failures} == {K.STALE}


@pytest.mark.filterwarnings("ignore::swarmkit.SwarmWarning")
def test_an_endpoint_that_accepts_nothing_is_given_up_after_the_pools_own_timeout() -> None:
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(4):  # its queue is full
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(listener.getsockname())
        pool = stack.enter_context(sk.VLLMPool([listener.getsockname()], model="echo", timeout=0.3, retry=BRIEF))
        seen = drive(pool, ["a", "b"], delivery="rows")
    assert {f.kind for f in seen.failures} == {K.CONNECT}
    assert "no connection within 0.3 s" in str(seen.end)


@pytest.mark.filterwarnings("ignore::swarmkit.SwarmWarning")
def test_a_whole_reply_is_waited_for_by_what_it_asks_and_a_stream_is_not() -> None:
    over = threading.Event()

    def take_your_time(call: Call) -> None:
        over.wait(1.0)  # what it takes to generate
        call.answer()

    with Scripted(take_your_time) as slow, sk.VLLMPool([slow.address], model="echo", timeout=0.4, retry=RETRY) as pool:
        whole = drive(pool, ["a", "b", "c", "d", "e"], delivery="batch", max_tokens=8192)
        streamed = drive(pool, ["a", "b", "c", "d", "e"], delivery="rows", max_tokens=8192)
        over.set()
    assert whole.frame["response"].notna().all()
    assert not whole.failures
    assert {f.kind for f in streamed.failures} == {K.HANG}


SHORT_OF_FILES = """
import json, os, resource, sys
sys.path[:0] = json.loads(sys.argv[1])
from swarmkit.client.hostfile import AgentEndpoint
from swarmkit.runs.events import RequestEnded
import test_faults as faults, swarmkit as sk

resource.setrlimit(resource.RLIMIT_NOFILE, (400, 400))
host, port, key, for_good = json.loads(sys.stdin.readline())
def pool():
    return sk.VLLMPool([AgentEndpoint(host, port, api_key=key)], model="echo", retry=faults.RETRY,
                       batch=sk.BatchPolicy(max_size=4))
with pool() as warm:  # the loop and its thread have their files
    faults.drive(warm, ["a"], delivery="rows")
held = []
try:
    while True:
        held.append(os.dup(0))
except OSError:
    pass
def hear(event):
    if isinstance(event, RequestEnded) and event.failure and not for_good:
        while held:
            os.close(held.pop())
with pool() as short:
    seen = faults.drive(short, [f"row {i}" for i in range(12)], hear, delivery="rows")
while held:
    os.close(held.pop())
print(json.dumps({
    "answered": int(seen.frame["response"].notna().sum()),
    "errors": sorted(set(seen.frame["response_error"].dropna())),
    "kinds": sorted({f.kind for f in seen.failures}),
    "alive": sorted({e.alive for e in seen.events if isinstance(e, RequestEnded)}),
    "attempts": int(seen.frame["response_attempts"].max()),
    "end": str(seen.end),
}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("for_good", [False, True])
def test_our_own_lack_of_files_is_not_blamed_on_endpoints(swarm: LocalSwarm, for_good: bool) -> None:
    endpoint = swarm.endpoints[0]
    child = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SHORT_OF_FILES, json.dumps(sys.path)],
        input=json.dumps([endpoint.host, endpoint.port, endpoint.key(), for_good]) + "\n",
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert child.returncode == 0, child.stderr
    seen = json.loads(child.stdout)
    assert seen["kinds"] == ["limit of this machine"]
    assert seen["alive"] == [1]
    assert ("too many open files" in seen["end"]) == for_good
    assert seen["answered"] == (0 if for_good else 12)
    assert all("this machine ran out of something: too many open files" in error for error in seen["errors"])


def echo_the_key(call: Call) -> None:
    sent = re.search(r"(?i)^authorization: (.*)$", call.headers, re.MULTILINE)
    words = sent[1].strip() if sent else "no key"
    bodies = {
        "status": lambda: call.reply(f'{{"detail": "{words}"}}'.encode(), status="403 Forbidden"),
        "html": lambda: call.reply(f"<h1>{words}</h1>".encode(), status="502 Bad Gateway", media="text/html"),
        "body": lambda: call.reply(f"hello {words}".encode()),
        "event": lambda: call.reply(f'data: {{"error": {{"message": "{words}", "code": 500}}}}\n\n'.encode()),
        "header": lambda: call.reply(b"", status="307 Temporary Redirect", extra=f"location: /?{words}\r\n"),
    }
    bodies.get(call.prompts[0] if call.prompts else "", bodies["status"])()  # an endpoint is probed, too


@pytest.mark.filterwarnings("ignore::swarmkit.SwarmWarning")
@pytest.mark.parametrize("delivery", ["rows", "batch"])
def test_a_key_is_never_shown_whatever_servers_send_back(delivery: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    shown: list[object] = []
    with Scripted(echo_the_key) as server:
        endpoint = AgentEndpoint(*server.address, api_key=KEY)
        for how in ("status", "html", "body", "event", "header"):
            with sk.VLLMPool([endpoint], model="echo", retry=BRIEF) as pool:
                seen = drive(pool, [how], delivery=delivery)
                shown += [seen, repr(pool), pool.last_run, pool.last_run and pool.last_run._repr_html_()]
                shown += [seen.frame.to_csv(), *map(traceback.format_exception, filter(None, [seen.end]))]
                shown += [pickle.dumps(pool), f.describe() if (f := seen.failures[0]) else ""]
        with pytest.raises(sk.NoEndpointsError) as caught:
            sk.connect(endpoint)
        shown += traceback.format_exception(caught.value)
    assert server.requests >= 6
    assert not [r for r in caplog.records if KEY in r.getMessage()]
    assert not [thing for thing in shown if KEY in str(thing) or KEY in repr(thing)]


NASTY: list[Any] = [
    5, "text", [], {"choices": None}, {"choices": 5}, {"choices": {}}, {"choices": {"0": 1}}, {"choices": [None]},
    {"choices": [5]}, {"choices": [[]]}, {"choices": [{}]}, {"choices": [{"index": "0"}]}, {"error": 5},
    {"choices": [{"index": True, "text": "x", "finish_reason": "stop"}]},
    {"choices": [{"index": 0.0, "text": "x", "finish_reason": "stop"}]},
    {"choices": [{"index": -1, "text": "x", "finish_reason": "stop"}]},
    {"choices": [{"index": 10**30, "text": "x", "finish_reason": "stop"}]},
    {"choices": [{"index": 0, "text": ["x"], "finish_reason": "stop"}]},
    {"choices": [{"index": 0, "text": None, "finish_reason": "stop"}]},
    {"choices": [{"index": 0, "text": "x", "finish_reason": 7}]},
    {"choices": [{"index": 0, "text": "x", "finish_reason": {"a": 1}}]},
    {"choices": [{"index": 0, "text": "x", "finish_reason": "stop", "token_ids": 5, "prompt_token_ids": "ab"}]},
    {"choices": [{"index": 0, "message": 5, "finish_reason": "stop"}]},
    {"choices": [{"index": 0, "message": {"content": 5}, "finish_reason": "stop"}]},
    {"choices": [{"index": 0, "message": {"content": "x", "reasoning": 5}, "finish_reason": "stop"}]},
    *({"choices": [{"index": 0, "text": "x", "message": {"content": "x"}, "finish_reason": "stop"}], "usage": usage}
      for usage in (5, [], {"prompt_tokens": "5"}, {"prompt_tokens": 1.5, "completion_tokens": -3},
                    {"completion_tokens": 10**30})),
]  # fmt: skip


@pytest.mark.parametrize("reply", NASTY, ids=lambda reply: json.dumps(reply)[:60])
def test_whatever_types_a_reply_has_it_is_refused_or_made_of_plain_answers(reply: Any) -> None:
    data = json.dumps(reply).encode()
    for read in (
        lambda: decode_counted(Route.COMPLETIONS, data, 1)[0],
        lambda: decode_counted(Route.CHAT, data, 1)[0],
        lambda: RowStream(1).feed(b"data: %s\n\n" % data),
    ):
        try:
            replies = read()
        except (Malformed, StreamFailed):
            continue
        columns = Columns(1)
        for answer in replies:
            columns.answer([(0, answer)], 0, 1.0)
            assert isinstance(answer.text, str)
            assert isinstance(answer.finish_reason, str)


@pytest.mark.parametrize(
    ("tail", "finished", "done"),
    [("", 1, False), ("data: [DONE]", 1, True), ("data: [DO", 1, False), ('data: {"choices":[{"ind', 1, False)],
)
def test_a_last_line_without_its_end_is_read_if_it_is_whole(tail: str, finished: int, done: bool) -> None:
    rows = RowStream(1)
    event = 'data: {"choices":[{"index":0,"text":"x","finish_reason":"stop"}]}'
    if tail:
        assert len(rows.feed(f"{event}\n\n{tail}".encode())) == finished
        assert rows.end() == []
    else:
        assert rows.feed(event.encode()) == []
        assert len(rows.end()) == finished
    assert rows.done is done


def test_proxies_of_the_environment_are_used_only_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    df = pd.DataFrame({"x": ["a", "b"]})
    with sk.local(1, engine="echo", token=KEY) as proxy:  # it answers whatever host is asked for
        monkeypatch.setenv("http_proxy", proxy.urls[0])
        for name in ("no_proxy", "NO_PROXY"):
            monkeypatch.delenv(name, raising=False)
        node = AgentEndpoint("node.invalid", 80, api_key=KEY)
        with sk.VLLMPool([node], model="echo", trust_env=True, retry=BRIEF) as pool:
            assert df.swarm.scatter("{x}", pool=pool)["response"].notna().all()
        with sk.VLLMPool([node], model="echo", retry=BRIEF) as pool, pytest.raises(sk.NoEndpointsError):
            df.swarm.scatter("{x}", pool=pool)


@pytest.mark.filterwarnings("ignore::swarmkit.SwarmWarning")
def test_a_body_that_is_not_what_its_encoding_says_is_malformed() -> None:
    def reply(call: Call) -> None:
        call.reply(b"not gzip", extra="content-encoding: gzip\r\n")

    with (
        Scripted(reply) as server,
        sk.VLLMPool([AgentEndpoint(*server.address)], model="echo", retry=replace(RETRY, give_up_s=0.5)) as pool,
    ):
        seen = drive(pool, ["a"], delivery="batch")
    assert seen.failures[0].kind is K.MALFORMED


@pytest.mark.parametrize("key", ["secret\n", "sécret"])
def test_a_key_that_no_header_can_carry_is_refused_in_words_and_not_shown(key: str) -> None:
    with pytest.raises(sk.errors.SettingError, match=r"api_key of 127\.0\.0\.1:9 holds a line break") as caught:
        sk.connect(AgentEndpoint("127.0.0.1", 9, api_key=key))
    assert key not in str(caught.value)
