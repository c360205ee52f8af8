"""Runs beside others: by ``priority=`` on one pool, and in equal parts where other clients use the same servers."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pandas as pd
import pytest
from scripted import Call, Scripted
from test_first_row import MODELS, QUICK, Server, lists
from virtual import Server as Endpoint
from virtual import Trouble, Virtual

import swarmkit as sk
from swarmkit.cli.main import main
from swarmkit.engine.endpoints import Fleet
from swarmkit.engine.rates import Rate
from swarmkit.engine.sharing import Looks, Places
from swarmkit.records import FailureKind

FRAME = pd.DataFrame({"q": [f"row {i}" for i in range(20)]})


def fleet(endpoints: int = 2, slots: int = 64) -> list[Endpoint]:
    """Endpoints on which a row takes a second."""
    return [Endpoint(1.0, slots) for _ in range(endpoints)]


def two(servers: list[Endpoint], first: dict[str, Any], second: dict[str, Any], **both: Any) -> tuple[Virtual, Virtual]:
    """Two runs on one fleet, after their end; each with its rows."""
    one = Virtual(servers, **{**both, **first})
    other = Virtual(servers, **{**both, **second}, beside=one)
    one.run()
    for run in (one, other):
        assert run.outcome.failure is None
        assert len(run.outcome.answered) == run.rows
    return one, other


# ---- other clients, in virtual time ------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("slots", "max_size", "begins"),
    [(64, 100, 0.0), (64, 100, 3.0), (256, 100, 0.0), (256, 100, 10.0), (64, 10, 3.0), (64, 10, 10.0), (32, 1, 3.0)],
)
def test_two_clients_of_a_fleet_get_about_half_each(slots, max_size, begins):
    settings = {"rows": 2 * slots * 40, "max_size": max_size, "max_in_flight": 64, "looks": True}
    one, other = two(fleet(slots=slots), {}, {"begins": begins, "seed": 1}, **settings)
    times = one.outcome.time_s, other.outcome.time_s
    assert max(times) <= 1.15 * min(times)
    assert one.now <= 1.05 * 80  # and together they take no longer than they must


def test_without_looks_who_comes_later_gets_less():
    one, other = two(fleet(slots=256), {}, {"begins": 10.0, "seed": 1}, rows=2 * 256 * 40)
    assert other.outcome.time_s > 1.2 * one.outcome.time_s


@pytest.mark.parametrize("slots", [8, 64, 256])
def test_a_run_that_is_alone_is_the_same_with_and_without_looks(slots):
    with_looks, without = (Virtual(fleet(slots=slots), 2 * slots * 20, looks=looks).run() for looks in (True, False))
    assert (with_looks.time_s, with_looks.sizes) == (without.time_s, without.sizes)


def looks_at(endpoints: int, **settings: Any) -> tuple[Fleet, Looks]:
    fleet = Fleet(endpoints, max_size=100, max_in_flight=4, retry=sk.RetryPolicy(), draw=lambda: 0.0, **settings)
    for index in range(endpoints):
        fleet.sent(index, 100, now=0.0)
    return fleet, Looks(fleet)


def test_a_few_servers_are_asked_in_turn_and_more_where_others_are_seen():
    _, looks = looks_at(100)
    assert [looks.due() for _ in range(3)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert not looks.told(8, running=64, waiting=36)  # no more than what is this run's
    assert looks.told(10, running=64, waiting=136)
    asked = looks.due()
    assert asked[0] == 10
    assert len(asked) == 32
    assert not looks.told(10, running=64, waiting=36)  # the others have left
    assert len(looks.due()) == 4


def test_servers_that_say_nothing_and_gateways_are_not_asked_again():
    _, looks = looks_at(4, rate_of=lambda index: Rate(60) if index == 0 else None)
    assert looks.due() == [1, 2, 3]
    looks.silent(2)
    assert sorted(looks.due()) == [1, 3]


def test_rows_that_others_have_answered_first_are_still_this_runs():
    fleet, looks = looks_at(2)
    for _ in range(80):
        fleet.superseded(0)  # its server does not know
    looks.due()
    assert not looks.told(0, running=64, waiting=36)
    fleet.completed(0, 20, 80, now=1.0)
    fleet.sent(0, 10, now=1.0)
    looks.due()
    assert looks.told(0, running=64, waiting=36)


# ---- priorities, in virtual time ------------------------------


def times(small: dict[str, Any], large: dict[str, Any], **both: Any) -> tuple[float, float]:
    """Seconds of a small run that begins beside a large one, and of the large one."""
    places = Places()
    big = {"rows": 2 * 64 * 60, "places": places, **large}
    one, other = two(fleet(), big, {"rows": 2 * 64 * 10, "places": places, "begins": 10.0, **small}, **both)
    return other.outcome.time_s, one.outcome.time_s


def test_of_two_runs_on_a_pool_that_with_the_lower_number_goes_first():
    alone = Virtual(fleet(), 2 * 64 * 10).run().time_s
    beside, whole = times({}, {})
    first, whole_with = times({}, {"priority": 1})
    same, _ = times({"priority": -5}, {"priority": -4})
    assert beside > 1.8 * alone
    assert first == same <= 1.3 * alone
    assert whole_with <= 1.02 * whole  # the other run loses no more than the places that were taken


def test_what_a_run_that_goes_first_cannot_use_is_used():
    limited, whole = times({"concurrency": 1, "max_size": 10}, {"priority": 1})
    without, whole_without = times({"concurrency": 1, "max_size": 10}, {})
    assert limited <= without
    assert whole <= 1.05 * whole_without


def test_a_run_that_gives_way_does_not_give_up():
    retry = sk.RetryPolicy(give_up_s=3.0)
    places = Places()
    big, small = two(
        fleet(),
        {"rows": 2 * 64 * 30, "priority": 0},
        {"rows": 100, "priority": 1, "begins": 1.0},
        places=places,
        retry=retry,
    )
    assert small.outcome.time_s > 10.0  # nothing of it is answered for far longer than give_up_s
    assert big.outcome.time_s <= 1.05 * 30


def test_a_run_that_gives_way_where_it_had_trouble_does_not_give_up():
    troubles = iter([Trouble(FailureKind.BUSY, 0.2, retry_after_s=2.0)])
    servers = [Endpoint(1.0, 64, fault=lambda batch, rng: next(troubles, None))]
    small, big = two(
        servers,
        {"rows": 10, "priority": 1},
        {"rows": 64 * 30, "priority": 0, "begins": 1.0},
        places=Places(),
        retry=sk.RetryPolicy(give_up_s=8.0),
    )
    assert small.outcome.time_s > 10.0
    assert big.outcome.time_s <= 1.05 * 31


@pytest.mark.parametrize("limit", [{"rpm": 60}, {"rpm": 60, "connections": 2}, {"tpm": 6000}, {"rpm": 4}], ids=str)
def test_on_a_gateway_a_run_that_gives_way_has_a_tenth_of_what_is_allowed(limit):
    rate, many = Rate(**limit), 10 * limit.get("rpm", 60)  # ten minutes of requests
    few = many // 50
    both = {"places": Places(), "rate_of": lambda index: rate, "tokens": lambda row: 100, "max_size": 1}
    servers = [Endpoint(0.5, 64), Endpoint(0.5, 64)]
    first, behind = two(servers, {"rows": many}, {"rows": few, "priority": 1, "begins": 5.0}, **both)
    assert behind.outcome.time_s <= 0.6 * 600
    assert first.outcome.time_s <= 660 + 60  # no more than a tenth later


# ---- over sockets ------------------------------


def numbers(rows: int) -> pd.DataFrame:
    return pd.DataFrame({"i": range(rows)})


def slow(**settings: Any) -> Any:
    """An endpoint that answers eight rows at a time, each in a fifth of a second."""
    return sk.local(1, engine="echo", tokens_per_s=40, max_num_seqs=8, **settings)


ASK = "a b c d e f {i}"
BATCH = sk.BatchPolicy(max_size=8)


def test_a_small_run_beside_a_large_one_by_priority():
    with slow() as swarm, sk.connect(swarm, batch=BATCH) as pool:
        large = numbers(150).swarm.submit(ASK, pool=pool, priority=1, progress=False)
        while large.stats.answered < 20:
            time.sleep(0.02)
        before = large.stats.answered
        answers = numbers(60).swarm.scatter(ASK, pool=pool.select([0]), progress=False)  # sub-pools are the same pool
        meanwhile = large.stats.answered - before
        assert answers["response"].tolist() == [f"echo: a b c d e f {i}" for i in range(60)]
        assert meanwhile < 45  # what was out already, not half of all
        assert large.result()["response"].notna().all()
        assert large.stats.failed_requests == 0


@pytest.mark.slow
def test_two_clients_see_each_other_in_what_the_server_says():
    with slow() as swarm, sk.connect(swarm, batch=BATCH) as one, sk.connect(swarm, batch=BATCH) as other:
        runs = [numbers(110).swarm.submit(ASK, pool=pool, progress=False) for pool in (one, other)]
        assert all(run.result()["response"].notna().all() for run in runs)
        for run in runs:
            assert run.stats.shared == 1
            assert dict(run.stats.summary())["shared"] == "others used 1 endpoint at the same time"
        alone = numbers(130).swarm.submit(ASK, pool=one, progress=False)
        alone.result()
        assert alone.stats.shared == 0


def refusing(status: str, asked: list[str]) -> Scripted:
    """A vLLM that does not show its ``/metrics`` to us, or does; it notes who asks for them."""

    def script(call: Call) -> None:
        if call.headers.startswith("GET /metrics"):
            asked.append(next(line for line in call.headers.splitlines() if line.lower().startswith("authorization")))
            load = b"vllm:num_requests_running 90\nvllm:num_requests_waiting 9\n"
            return call.reply(b"{}" if status else load, status or "200 OK")
        if call.headers.startswith("GET"):
            return call.reply(json.dumps({"data": [{"id": "m", "owned_by": "vllm"}]}).encode())
        time.sleep(0.3)
        return call.answer()

    return Scripted(script)


@pytest.mark.slow
@pytest.mark.parametrize("status", ["401 Unauthorized", "403 Forbidden"])
def test_a_server_that_does_not_show_us_its_load_costs_no_key_and_the_others_are_asked_on(status):
    keys, of_refusing, of_other = [], [], []

    def key() -> str:
        keys.append(f"key {len(keys)}")
        return keys[-1]

    batch = sk.BatchPolicy(max_size=2, max_in_flight=1)
    with ExitStack() as stack:
        servers = [stack.enter_context(refusing(*how)) for how in ((status, of_refusing), ("", of_other))]
        urls = [server.address for server in servers]
        pool = stack.enter_context(sk.connect(urls, api_key=key, chat=None, batch=batch))
        run = numbers(120).swarm.submit(ASK, pool=pool, progress=False)
        assert run.result()["response"].notna().all()
    assert run.stats.shared == 1
    assert keys == ["key 0"]
    assert len(of_refusing) <= 2  # for the cache, and for the queue
    assert len(of_other) >= 3


def test_what_a_gateway_allows_is_shared_by_priority_over_its_paths():
    paths: list[str] = []

    def script(call: Call) -> None:
        if call.headers.startswith("GET"):
            return call.reply(json.dumps({"data": [{"id": "m"}]}).encode())
        paths.append(call.headers.split()[1][:2])
        time.sleep(0.1)
        return call.answer()

    with Scripted(script) as server:
        url = "http://{}:{}".format(*server.address)
        with sk.connect([f"{url}/a", f"{url}/b"], chat=None, max_connections=2) as pool:
            how = {"mode": "single", "progress": False}
            first = numbers(100).swarm.submit("{i}", pool=pool.select([0]), **how)
            behind = numbers(100).swarm.submit("{i}", pool=pool.select([1]), priority=1, **how)
            assert first.result()["response"].notna().all()
            meanwhile = paths.count("/b")
            assert behind.result()["response"].notna().all()
    assert 3 <= meanwhile <= 20, "a tenth, and not half"


def vllm(script: Callable[[Any], Any] = lists, owner: str = "vllm") -> Server:
    return Server(
        {
            "POST /v1/completions": script,
            "GET /v1/models": lambda body: {"data": [{**MODELS["data"][0], "owned_by": owner}]},
        }
    )


def told(server: Server, **options: Any) -> list[int | None]:
    """The priorities in the requests of a run, in which every row must be answered."""
    batch = sk.BatchPolicy(max_size=5, max_in_flight=1)
    with server.running() as url, sk.connect(url, retry=QUICK, chat=None, batch=batch) as pool:
        answers = sk.scatter(FRAME, "q", pool=pool, progress=False, **options)
    assert answers["response"].tolist() == [f"re: row {i}" for i in range(20)]
    bodies = [body for body in server.of("/v1/completions") if str(body["prompt"][0]).startswith("row ")]
    return [body.get("priority") for body in bodies]


def test_vllm_is_told_and_others_are_not():
    assert told(vllm(), priority=-3) == [-3] * 4
    assert told(vllm()) == [None] * 4
    assert told(vllm(), priority=-3, extra_body={"priority": 7}) == [7] * 4
    assert told(vllm(owner="sglang"), priority=-3) == [None] * 4  # there, larger numbers may go first


def test_a_vllm_without_that_policy_is_asked_without_priority():
    def refuses(body: Any) -> Any:
        if "priority" in body:
            said = f"Got priority {body['priority']} but Priority scheduling is not enabled."
            return 400, {"error": {"message": said, "type": "BadRequestError", "code": 400}}
        return lists(body)

    assert told(vllm(refuses), priority=5) == [5, *[None] * 4]


def test_the_command_line_has_it_too(tmp_path):
    server, table = vllm(), tmp_path / "rows.csv"
    FRAME.to_csv(table, index=False)
    with server.running() as url:
        command = ["scatter", str(table), "--prompt", "{q}", "-o", str(tmp_path / "out.csv"), "--chat", "none"]
        assert main([*command, "--url", url, "--priority", "-3", "--quiet"]) == 0
    assert {body.get("priority") for body in server.of("/v1/completions") if "row 1" in body["prompt"]} == {-3}


@pytest.mark.parametrize("priority", [1.5, "high", True, None, 2**63, -(2**63) - 1], ids=repr)
def test_what_is_no_priority_is_refused(pool, priority):
    with pytest.raises(sk.SettingError, match=r"priority=.*: must be a whole number.*a lower one go first"):
        sk.scatter(FRAME, "q", priority=priority)
