"""Rates of gateways: what users allow, what servers say, and what becomes of polite refusals."""

import json
import pickle
import re
import threading
import time
import warnings
from email.utils import formatdate
from typing import Any

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted import Call, Scripted
from virtual import Server, Trouble, Virtual

import swarmkit as sk
from swarmkit.client.rate_headers import quota_of, retry_after_s, seconds_of
from swarmkit.engine.messages import Send
from swarmkit.engine.policy import RetryPolicy
from swarmkit.engine.rates import MINUTE_S, Rate
from swarmkit.pool.rates import Rates
from swarmkit.records import FailureKind, Quota

ROWS = pd.DataFrame({"x": [f"row {i}" for i in range(200)]})
QUICK = sk.RetryPolicy(base_s=0.02, cap_s=0.2)


# ---- what may be sent ------------------------------


@settings(max_examples=100, deadline=None)
@given(
    st.integers(1, 5) | st.none(),
    st.integers(10, 100) | st.none(),
    st.lists(st.tuples(st.floats(0, 40), st.integers(1, 120), st.none() | st.integers(0, 200)), max_size=40),
)
def test_no_minute_has_more_than_is_allowed_and_nothing_waits_that_is(rpm, tpm, requests) -> None:
    rate, now = Rate(rpm, tpm), 0.0
    sent: list[list[float]] = []  # time, tokens as they are known

    def allows(at: float, tokens: float) -> bool:
        last = [one for one in sent if at < one[0] + MINUTE_S]
        enough = tpm is None or sum(one[1] for one in last) + min(tokens, tpm) <= tpm or not any(one[1] for one in last)
        return enough and (rpm is None or len(last) < rpm)

    for pause, tokens, cost in requests:
        now += pause
        at = rate.next_at(now, tokens)
        assert at >= now
        for moment in {now, *(one[0] + MINUTE_S for one in sent)}:
            assert moment < now or moment >= at or not allows(moment, tokens), "it waits, and might be sent"
        assert allows(at, tokens)
        now = at
        ration = rate.sent(now, tokens)
        sent.append([now, tokens])
        if cost is not None:
            ration.over(cost)
            sent[-1][1] = cost


def test_a_gateway_that_has_nothing_left_is_asked_when_it_has() -> None:
    rate = Rate()
    rate.told(Quota((2, 30.0), (100, 20.0)), 0.0, 0.0)
    assert rate.next_at(1.0, tokens=101) == 20.0
    first, _ = rate.sent(1.0, 50), rate.sent(1.5, 50)
    assert rate.next_at(2.0) == 30.0, "those in flight may not be counted yet"
    rate.told(Quota((9, 25.0)), -1.0, 3.0)
    assert rate.next_at(3.0) == 30.0, "an answer that was asked for earlier says less"
    rate.told(Quota((5, 300.0)), 1.0, 3.0)
    first.over()
    assert rate.next_at(3.0, tokens=60) == 20.0, "its tokens are still used up"
    assert rate.next_at(3.0, tokens=50) == 3.0
    rate.told(Quota((0, 300.0)), 20.0, 21.0)
    assert rate.next_at(21.0) == 81.0, "after a minute the next request shows what is true"


# ---- what headers say ------------------------------


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("1", 1), ("1.5", 1.5), ("6m0s", 360), ("1s", 1), ("250ms", 0.25), ("1h2m3.5s", 3723.5), ("1d", 86400), ("-3", 0)]
    + [(text, None) for text in ("", "nan", "inf", "soon", "1x", "s", "1s later", "9" * 5000)],
)
def test_seconds_of_headers(text: str, seconds: float | None) -> None:
    assert seconds_of(text) == seconds


@pytest.mark.parametrize(
    "text",
    [
        *("1800000012", "1800000012000", "2027-01-15T08:00:12Z", "2027-01-15T08:00:12.000000+00:00"),
        *("2027-01-15t09:00:12+01:00", "2027-01-15 08:00:12", "Fri, 15 Jan 2027 08:00:12 GMT"),
    ],
)
def test_seconds_until_a_time(text: str) -> None:
    assert seconds_of(text, now=1_800_000_000.0) == 12.0


def test_retry_after_is_a_number_or_a_date_of_the_servers_own_clock() -> None:
    now = 1_800_000_000.0
    assert retry_after_s({"retry-after": "2"}, now) == 2.0
    assert retry_after_s({"retry-after-ms": "300", "retry-after": "1"}, now) == 0.3
    assert retry_after_s({"retry-after": formatdate(now + 9, usegmt=True)}, now) == 9.0
    skewed = {"retry-after": formatdate(now + 3609, usegmt=True), "date": formatdate(now + 3600, usegmt=True)}
    assert retry_after_s(skewed, now) == 9.0
    for text in ("", "tomorrow", "Fri, 99 Xyz 2030", "\xff"):
        assert retry_after_s({"retry-after": text}, now) is None


def test_quotas_are_read_where_they_are_whole() -> None:
    told = {"remaining-requests": "3", "reset-requests": "250ms", "remaining-tokens": "-1", "reset-tokens": "1s"}
    raw = [(f"x-ratelimit-{name}".encode(), value.encode()) for name, value in told.items()]
    assert quota_of(raw) == Quota(requests=(3, 0.25))
    assert quota_of(raw[:1]) is None
    plain = [(b"RateLimit-Remaining", b"0"), (b"ratelimit-reset", b"7")]
    assert quota_of(plain) == Quota(requests=(0, 7.0))
    assert quota_of([*raw, *plain]) == Quota(requests=(3, 0.25)), "who names requests knows better"
    skewed = [(b"x-ratelimit-remaining", b"0"), (b"X-RateLimit-Reset", b"1800000012000"),
              (b"Date", b"Fri, 15 Jan 2027 08:00:00 GMT")]  # fmt: skip
    assert quota_of(skewed, now=1_700_000_000.0) == Quota(requests=(0, 12.0)), "by the server's own clock"
    assert quota_of([(b"content-type", b"text/plain")]) is None


# ---- the scheduler, in virtual time ------------------------------


def send_times(rows: int, servers: int = 1, **options: Any) -> tuple[Virtual, list[tuple[float, int]]]:
    """A run, and when it sent how many rows."""
    sends: list[tuple[float, int]] = []

    def trace(now: float, what: object) -> None:
        if isinstance(what, Send):
            sends.append((now, len(what.batch.rows)))

    run = Virtual([Server(row_s=0.5) for _ in range(servers)], rows, trace=trace, **options)
    run.run()
    return run, sends


def most_a_minute(sends: list[tuple[float, int]], tokens: int = 1) -> int:
    return max(
        sum(rows * tokens if tokens > 1 else 1 for at, rows in sends if since <= at < since + MINUTE_S)
        for since, _ in sends
    )


def test_rows_go_out_as_fast_as_requests_a_minute_allow() -> None:
    rate = Rate(rpm=60)
    run, sends = send_times(200, max_size=1, max_in_flight=64, rate_of=lambda index: rate)
    assert len(run.outcome.answered) == 200
    assert len(sends) == 200
    assert most_a_minute(sends) == 60
    assert run.outcome.time_s < 3 * MINUTE_S + 10, "and no slower"


def test_lists_are_cut_to_the_tokens_that_are_left() -> None:
    rate = Rate(tpm=10_000)
    options = {"max_size": 100, "rate_of": lambda index: rate, "tokens": lambda row: 150}
    run, sends = send_times(200, **options)
    assert len(run.outcome.answered) == 200
    assert 9_000 < most_a_minute(sends, tokens=150) <= 10_000
    assert len(sends) < 10
    assert run.outcome.time_s < 3 * MINUTE_S + 10


def test_the_endpoints_of_a_gateway_share_its_rate_and_its_connections() -> None:
    rate = Rate(rpm=30, connections=3)
    run, sends = send_times(60, servers=4, max_size=1, max_in_flight=8, rate_of=lambda index: rate)
    assert len(run.outcome.answered) == 60
    assert most_a_minute(sends) == 30
    assert run.outcome.most_in_flight == 3
    run.scheduler.rations.release()
    assert rate.open == 0


@pytest.mark.parametrize("share", ["one rate", "a rate each"])
def test_endpoints_that_hang_do_not_take_every_turn_of_a_gateway(share: str) -> None:
    hangs = Trouble(FailureKind.HANG, 30.0)
    fleet = [Server(row_s=0.5, timeout_s=30.0, fault=(lambda *_: hangs) if i in (0, 7) else None) for i in range(8)]
    rates = [Rate(connections=1), Rate(connections=1)]
    rate_of = {"one rate": lambda index: rates[0], "a rate each": lambda index: rates[index % 2]}[share]
    run = Virtual(fleet, 80, concurrency=1, max_size=10, rate_of=rate_of, retry=RetryPolicy(cap_s=2.0)).run()
    assert len(run.answered) == 80
    assert run.time_s < 8 * 0.5 * 10 + 4 * 30.0, "each of the two hangs twice at most"


def test_a_run_that_keeps_a_low_rate_is_not_given_up() -> None:
    rate = Rate(rpm=1)
    run, _ = send_times(4, max_size=1, rate_of=lambda index: rate, retry=RetryPolicy(give_up_s=5.0))
    assert run.outcome.failure is None
    assert len(run.outcome.answered) == 4


def busy(retry_after_s: float | None, rows: set[int]) -> Any:
    def fault(batch: Any, rng: Any) -> Trouble | None:
        return Trouble(FailureKind.BUSY, 0.01, retry_after_s=retry_after_s) if rows & set(batch.rows) else None

    return fault


@pytest.mark.parametrize("retry_after_s", [None, 1.0, 40.0])
@pytest.mark.parametrize("servers", [1, 3])
@pytest.mark.parametrize("bad", [{0}, {7, 150, 299}])
def test_a_row_that_is_always_refused_politely_ends_alone_and_last(servers, retry_after_s, bad) -> None:
    fleet = [Server(fault=busy(retry_after_s, bad)) for _ in range(servers)]
    run = Virtual(fleet, 300, retry=RetryPolicy(give_up_s=300.0)).run()
    assert run.failure is None
    assert set(run.failed) == bad
    assert "nothing else was answered for give_up_s=300" in run.failed[min(bad)].message
    assert run.time_s < 1200


def test_endpoints_that_become_full_for_ever_end_the_run_and_no_row() -> None:
    def fault(batch: Any, rng: Any) -> Trouble | None:
        return Trouble(FailureKind.BUSY, 0.01) if batch.ticket > 2 else None

    run = Virtual([Server(fault=fault)], 5000, retry=RetryPolicy(give_up_s=60.0)).run()
    assert run.failure is not None
    assert not run.failed


# ---- gateways ------------------------------


class Gateway:
    """A strict gateway: so many requests in each ``window_s``, else 429, with what ``said`` makes of the wait."""

    def __init__(self, limit: int, window_s: float, said: Any, tell: bool = False) -> None:
        self.limit, self.window_s, self.said, self.tell = limit, window_s, said, tell
        self.began, self.taken = 0.0, 0
        self.asked: list[float] = []
        self.refused = 0
        self.lock = threading.Lock()

    def __call__(self, call: Call) -> None:
        if "GET /v1/models" in call.headers:
            return call.reply(json.dumps({"data": [{"id": "m"}]}).encode())
        now = time.monotonic()
        self.asked += [now] if call.headers.startswith("POST") else []
        if "/completions" not in call.headers.partition("\r\n")[0]:
            return call.reply(b"{}", "404 Not Found")
        with self.lock:
            if now - self.began >= self.window_s:
                self.began, self.taken = now, 0
            wait = self.window_s - (now - self.began)
            refused = self.taken >= self.limit
            self.refused += refused
            self.taken += not refused
            left = self.limit - self.taken
        extra = f"x-ratelimit-remaining-requests: {left}\r\nx-ratelimit-reset-requests: {wait:.3f}s\r\n"
        if refused:
            body = b'{"error": {"message": "Rate limit reached"}}'
            return call.reply(body, "429 Too Many Requests", extra=self.said(wait) + extra * self.tell)
        text = f"echo: {call.prompts[0]}"
        choice = {"message": {"content": text}, "text": text, "index": 0, "finish_reason": "stop"}
        return call.reply(json.dumps({"choices": [choice]}).encode(), extra=extra * self.tell)


SAID = {
    "seconds": lambda wait: f"retry-after: {wait:.3f}\r\n",
    "a date": lambda wait: f"retry-after: {formatdate(time.time() + wait + 1, usegmt=True)}\r\n",
    "reset": lambda wait: f"x-ratelimit-remaining-requests: 0\r\nx-ratelimit-reset-requests: {wait * 1000:.0f}ms\r\n",
    "reset at": lambda wait: f"x-ratelimit-remaining: 0\r\nx-ratelimit-reset: {(time.time() + wait) * 1000:.0f}\r\n",
    "nothing": lambda wait: "",
}


@pytest.mark.parametrize("said", SAID)
def test_polite_refusals_cost_no_row_and_few_requests(said: str) -> None:
    gateway = Gateway(100, 0.5, SAID[said])
    with Scripted(gateway) as server, sk.connect(server.address, retry=QUICK) as pool:
        frame = ROWS.swarm.scatter("{x}", pool=pool, mode="single", progress=False)
        stats = pool.last_run
    assert (frame["response"] == "echo: " + ROWS["x"]).all()
    assert stats is not None
    if said != "nothing":
        assert gateway.refused <= 2 * 64, "those that were in flight"
        assert stats.endpoints[0].breaker == "closed"


def test_a_gateway_that_says_what_is_left_is_hardly_ever_overrun() -> None:
    gateway = Gateway(60, 0.7, SAID["seconds"], tell=True)
    with Scripted(gateway) as server, sk.connect(server.address, retry=QUICK) as pool:
        frame = ROWS.swarm.scatter("{x}", pool=pool, mode="single", progress=False)
    assert frame["response"].notna().all()
    assert gateway.refused <= 20


@pytest.mark.parametrize("by", ["connect", "hostfile"])
def test_rates_that_the_user_gives_are_kept_over_runs_and_questions(tmp_path: Any, by: str) -> None:
    gateway = Gateway(10_000, 1.0, SAID["seconds"])
    file = tmp_path / "h.hostfile"
    with Scripted(gateway) as server:
        host, port = server.address
        file.write_text(f"{host} {port} {'rpm=20' if by == 'hostfile' else ''}")
        with sk.connect(file, chat=None, **({"rpm": 20} if by == "connect" else {})) as pool:
            ROWS[:5].swarm.scatter("{x}", pool=pool, mode="single", progress=False)
            run = ROWS.swarm.submit("{x}", pool=pool, mode="single", progress=False)
            until = time.monotonic() + 20
            while len(gateway.asked) < 20 and time.monotonic() < until:
                time.sleep(0.05)
            time.sleep(0.3)
            run.cancel()
            assert run.partial()["response"].notna().any()
    assert len(gateway.asked) == 20


def test_connections_are_bounded_by_gateway_whatever_its_paths() -> None:
    open_now, most, lock = 0, 0, threading.Lock()

    def script(call: Call) -> None:
        nonlocal open_now, most
        if "GET" in call.headers:
            return call.reply(json.dumps({"data": [{"id": "m"}]}).encode())
        with lock:
            open_now += 1
            most = max(most, open_now)
        time.sleep(0.02)
        with lock:
            open_now -= 1
        return call.answer()

    with Scripted(script) as server:
        url = "http://{}:{}".format(*server.address)
        with sk.connect([f"{url}/a", f"{url}/b"], chat=None, max_connections=3) as pool:
            assert ROWS[:60].swarm.scatter("{x}", pool=pool, mode="single", progress=False)["response"].notna().all()
    assert most == 3


def test_a_long_wait_that_a_gateway_asks_for_is_said() -> None:
    gateway = Gateway(20, 100.0, SAID["seconds"])
    with Scripted(gateway) as server, sk.connect(server.address, chat=None, retry=QUICK) as pool:
        run = ROWS.swarm.submit("{x}", pool=pool, mode="single", progress=False)
        with pytest.raises(sk.SwarmWarning, match=r"retrying for another .*HTTP 429.*Rate limit reached"):
            run.result(timeout=20)
        run.cancel()
    assert gateway.refused < 70


def test_processes_that_work_together_share_the_rates_of_a_pool() -> None:
    rates = pickle.loads(pickle.dumps(Rates(rpm=100)))
    rates.share = 0.25
    rate = rates.of(sk.AgentEndpoint("gw", path="/a"))
    assert rate is rates.of(sk.AgentEndpoint("gw", path="/b")) is not rates.of(sk.AgentEndpoint("gw", 9000))
    for _ in range(25):
        assert rate.next_at(1.0) == 1.0
        rate.sent(1.0)
    assert rate.next_at(1.0) == 1.0 + MINUTE_S
    assert Rates().of(sk.AgentEndpoint("gw", tags={"rack": "a"})) is None


@pytest.mark.parametrize("name", ["rpm", "tpm", "max_connections", "key_ttl"])
def test_limits_that_are_none_are_refused(name: str) -> None:
    for value in (-1, "many", *([0, 1.5] if name != "key_ttl" else [])):
        with pytest.raises(sk.SettingError, match=re.escape(f"{name}={value!r}: must be a")):
            sk.connect("127.0.0.1:9", **{name: value})
    if name != "key_ttl":
        with pytest.raises(sk.HostfileError, match=f"'0' of {name}= is no whole number above 0"):
            sk.connect(f"127.0.0.1:9 {name}=0")


def test_polite_refusals_before_the_first_row_are_waited_for() -> None:
    asked = 0

    def script(call: Call) -> None:
        nonlocal asked
        asked += 1
        if asked % 5:
            return call.reply(b"{}", "429 Too Many Requests", extra="retry-after: 0.01\r\n")
        return call.reply(b'{"data": [{"id": "m"}]}') if "GET" in call.headers else call.answer()

    with warnings.catch_warnings(), Scripted(script) as server:
        warnings.simplefilter("error")
        with sk.connect(server.address, retry=QUICK) as pool:
            frame = ROWS[:3].swarm.scatter("{x}", pool=pool, progress=False)
    assert frame["response"].notna().all()
