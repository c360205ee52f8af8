"""Whole runs amid faults, over real sockets: every row ends with its own answer or its own error."""

import itertools
import os
import signal
import threading
import time

import pandas as pd
import pytest
from scripted import Scripted
from test_swarm import requests_served

import swarmkit as sk
from swarmkit.client.hostfile import AgentEndpoint

STEADY = {"tokens_per_s": 20.0, "max_num_seqs": 64}


def right(answers):
    return (answers["response"] == "echo: n " + answers["i"].astype(str)).all()


@pytest.mark.long
@pytest.mark.timeout(240)
def test_a_mixed_swarm_finishes_nearly_as_fast_as_its_healthy_part():
    df = pd.DataFrame({"i": range(20_000)})
    faults = ["hang:address=127.0.0.4", "reset:address=127.0.0.5", "http_500:probability=0.2,address=127.0.0.6"]
    slow = {"127.0.0.7": {"tokens_per_s": 2.0, "max_num_seqs": 64}}
    taken = {}
    with sk.local(1, engine="echo", addresses=7, speeds=slow, faults=faults, **STEADY) as swarm:
        refusing = AgentEndpoint("127.0.0.1", 9)
        for name, endpoints in {"healthy": swarm.endpoints[:3], "motley": [*swarm.endpoints, refusing]}.items():
            pool = sk.VLLMPool(endpoints, model=swarm.model, chat="auto")
            with pool:
                df.iloc[:1].swarm.scatter("n {i}", pool=pool)
                began = time.monotonic()
                answers = df.swarm.scatter("n {i}", pool=pool, max_tokens=8)
                taken[name] = time.monotonic() - began
            assert right(answers)
            assert answers["response_error"].isna().all()
    print(f"\nhealthy {taken['healthy']:.1f} s, motley {taken['motley']:.1f} s, {sk.last_run().stats!r}")
    assert taken["motley"] <= 1.6 * taken["healthy"]


def test_a_prompt_that_crashes_engines_fails_alone():
    df = pd.DataFrame({"i": range(5000)})
    df["t"] = "n " + df["i"].astype(str)
    df.loc[1234, "t"] = "POISON"
    with (
        sk.local(1, engine="echo", addresses=6, faults=["kill_row:marker=POISON"]) as swarm,
        sk.connect(swarm, retry=sk.RetryPolicy(base_s=0.05)) as pool,
    ):
        with pytest.warns(sk.SwarmWarning, match="1 of 5,000 rows failed"):
            answers = df.swarm.scatter("{t}", details=True)
        bad = answers[answers["response_error"].notna()]
        assert bad.index.tolist() == [1234]
        assert "connection" in bad["response_error"].iloc[0]
        assert right(answers.drop(index=1234))
        met = [e.name for e in pool.last_run.endpoints if e.failures]
        assert len(met) <= 3, "three endpoints meet it"
        assert bad["response_attempts"].iloc[0] <= 20, "in batches that are halved, then alone"
        assert df.swarm.scatter("{i}")["response"].notna().all(), "none is lost for good"


@pytest.mark.filterwarnings("ignore::swarmkit.SwarmWarning")
@pytest.mark.parametrize("delivery", ["rows", "batch"])
@pytest.mark.parametrize("kind", ["http_403", "http_500", "late_500", "garbage", "error_body"])
def test_a_bad_row_costs_one_row_also_where_all_rows_fit_into_the_first_request(kind, delivery):
    df = pd.DataFrame({"i": range(8)})
    faults = [f"{kind}:marker=n 5"]
    with (
        sk.local(1, engine="echo", faults=faults) as swarm,
        sk.connect(swarm, retry=sk.RetryPolicy(base_s=0.02, cap_s=0.2)),
    ):
        answers = df.swarm.scatter("n {i}", delivery=delivery)
    assert answers.index[answers["response_error"].notna()].tolist() == [5]
    assert right(answers.drop(index=5))


def test_when_all_endpoints_die_the_rest_is_finished_after_they_are_back(tmp_path):
    df = pd.DataFrame({"i": range(400)})
    retry = sk.RetryPolicy(base_s=0.05, cap_s=0.2, give_up_s=0.5)
    swarm = sk.local(2, engine="echo", tokens_per_s=50.0, max_num_seqs=8)
    sk.connect(swarm, retry=retry)
    run = df.swarm.submit("n {i}", store=tmp_path, max_tokens=8)
    while run.stats.answered < 40:
        time.sleep(0.01)
    swarm.stop()
    with pytest.raises(sk.NoEndpointsError, match=r"no endpoint is left: \d+ of 400 rows.*127\.0\.0\.1") as gone:
        run.result(timeout=60)
    finished = gone.value.frame["response"].notna().sum()
    assert 40 <= finished < 400
    assert right(gone.value.frame.dropna(subset="response"))
    with sk.local(2, engine="echo") as swarm, sk.connect(swarm):
        answers = df.swarm.scatter("n {i}", store=tmp_path, max_tokens=8)
    assert right(answers)
    assert sk.last_run().stats.answered == 400 - finished


def stop_in_the_middle(how):
    """A script: the first six merges are answered, then the run is brought to its end."""
    merges = itertools.count(1)

    def script(call):
        if call.headers.startswith("GET"):
            call.reply(b'{"data": [{"id": "m", "max_model_len": 4096}]}')
        elif call.body.get("max_tokens") != 9:  # a look at the server
            call.reply(b"", status="404 Not Found")
        elif (nth := next(merges)) <= 6:
            call.answer()
        elif how == "interrupt":
            if nth == 7:
                os.kill(os.getpid(), signal.SIGINT)
            call.wait_for_the_end()
        else:
            call.reply(b'{"error": "gone"}', status="401 Unauthorized")

    return script


@pytest.mark.parametrize("delivery", ["rows", "batch"])
@pytest.mark.parametrize("trace", [False, True])
@pytest.mark.parametrize(("how", "error"), [("interrupt", sk.ScatterInterrupted), ("denied", sk.NoEndpointsError)])
def test_the_answers_of_a_level_of_a_tree_are_handed_back_when_its_run_ends_early(how, error, trace, delivery):
    # A group of four texts and ten of two: the first two of the twelve merges of level 1 are of the group of four.
    groups = [0] * 4 + [g for g in range(1, 11) for _ in range(2)]
    df = pd.DataFrame({"g": groups, "t": [f"text {i}" for i in range(24)]})
    retry = sk.RetryPolicy(base_s=0.02, cap_s=0.1, give_up_s=0.3)
    one = sk.BatchPolicy(max_size=1, max_in_flight=1, single_in_flight=1, hedge=False)
    with (
        Scripted(stop_in_the_middle(how)) as server,
        sk.VLLMPool([AgentEndpoint(*server.address)], model="m", retry=retry, batch=one) as pool,
    ):
        options = {"by": "g", "fanin": 2, "pool": pool, "delivery": delivery, "progress": False, "trace": trace}
        with pytest.raises(error) as caught:
            df.swarm.tree_reduce("t", "{responses}", max_tokens=9, **options)
    frame, partial = caught.value.frame, sk.last_run().partial()
    expected = {g: f"echo: text {2 * g + 2}\n---\ntext {2 * g + 3}" for g in range(1, 11)}
    if trace:
        nodes = frame[frame["level"] == 1]
        answered = nodes[nodes["response"].notna()]
        assert len(nodes) == 12
        assert len(answered) == 6
        assert (nodes["response"].notna() != nodes["error"].notna()).all()
        assert all(row.response == expected[row.g] for row in answered.itertuples() if row.g)
        assert frame[frame["level"] == 0]["parent"].notna().sum() == 12
    else:
        answered = frame[frame["response"].notna()]
        assert len(answered) == 4
        assert all(row.response == expected[row.g] for row in answered.itertuples())
        assert frame["n_leaves"].tolist() == [2 if g in set(answered["g"]) else 0 for g in range(11)]
        assert partial["response"].notna().sum() == len(answered)


def test_a_cancelled_run_leaves_no_request_on_the_servers():
    df = pd.DataFrame({"i": range(2000)})
    with sk.local(1, engine="echo", tokens_per_s=5.0, max_num_seqs=16) as swarm, sk.connect(swarm, chat=None):
        before = threading.active_count()
        run = df.swarm.submit("n {i}", max_tokens=8)
        while run.stats.answered < 16:
            time.sleep(0.01)
        run.cancel()
        with pytest.raises(sk.CancelledError, match=r"cancelled after \d+ of 2,000 rows"):
            run.result(timeout=5)
        deadline = time.monotonic() + 2
        while running(swarm) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert running(swarm) == 0
        assert threading.active_count() <= before + 1
        assert right(run.partial().dropna(subset="response"))
        assert requests_served(swarm)


def running(swarm):
    import re
    import urllib.request

    endpoint = swarm.endpoints[0]
    request = urllib.request.Request(f"{endpoint.url}/metrics", headers={"Authorization": f"Bearer {endpoint.key()}"})
    text = urllib.request.urlopen(request, timeout=10).read().decode()
    return sum(int(n) for n in re.findall(r"^vllm:num_requests_(?:running|waiting)\{.*\} (\d+)", text, re.MULTILINE))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::swarmkit.SwarmWarning")
@pytest.mark.parametrize("endpoints", [1, 4])
@pytest.mark.parametrize("kind", ["http_403", "http_500", "garbage", "reset"])
def test_bad_rows_that_are_all_that_is_left_fail_as_rows(kind, endpoints):
    df = pd.DataFrame({"i": range(3), "response": ["kept", None, None]})
    with (
        sk.local(1, engine="echo", addresses=endpoints, faults=[f"{kind}:marker=bad"]) as swarm,
        sk.connect(swarm, retry=sk.RetryPolicy(base_s=0.02, cap_s=0.2)),
    ):
        answers = df.swarm.scatter("bad {i}", only_missing=True)
    assert answers["response"].iloc[0] == "kept"
    assert answers.index[answers["response_error"].notna()].tolist() == [1, 2]
