"""Nothing is paid for twice: the store, identical rows, and processes that are killed."""

import json
import os
import random
import signal
import subprocess
import sys
import textwrap

import pandas as pd
import pytest

import swarmkit as sk


@pytest.fixture
def store(tmp_path):
    return tmp_path / "runs"


def asked():
    """Rows that servers answered in the newest run."""
    return sk.last_run().stats.answered


def test_the_same_call_again_sends_nothing(pool, store):
    df = pd.DataFrame({"i": range(250)})
    first = df.swarm.scatter("n {i}", store=store, details=True)
    assert asked() == 250
    again = df.swarm.scatter("n {i}", store=store, details=True)
    assert asked() == 0
    assert sk.last_run().stats.reused == 250
    assert sk.last_run().stats.requests == 0
    same = [c for c in first.columns if c not in ("response_attempts", "response_latency_s")]
    pd.testing.assert_frame_equal(first[same], again[same])


@pytest.mark.parametrize(
    "change",
    [
        {"max_tokens": 7},
        {"temperature": 0.5},
        {"system": "Be brief."},
        {"chat": None},
        {"seed": 3},
        {"extra_body": {"x": 1}},
    ],
)
def test_another_question_is_asked_anew(pool, store, change):
    df = pd.DataFrame({"i": range(3)})
    df.swarm.scatter("n {i}", store=store)
    df.swarm.scatter("n {i}", store=store, **change)
    assert asked() == 3


def test_new_rows_of_a_grown_frame_are_asked_and_order_does_not_matter(pool, store):
    df = pd.DataFrame({"i": range(10)})
    df.swarm.scatter("n {i}", store=store)
    grown = pd.DataFrame({"i": range(15)}).sample(frac=1, random_state=1)
    answers = grown.swarm.scatter("n {i}", store=store)
    assert asked() == 5
    assert (answers["response"] == "echo: n " + answers["i"].astype(str)).all()


def test_repeated_prompts_keep_their_own_samples(pool, store):
    df = pd.DataFrame({"t": ["same"] * 4})
    first = df.swarm.scatter("{t}", store=store, n=2, temperature=1.0, seed=1)
    assert asked() == 4
    again = df.swarm.scatter("{t}", store=store, n=2, temperature=1.0, seed=1)
    assert asked() == 0
    pd.testing.assert_frame_equal(first, again)


def test_errors_are_not_stored(store):
    df = pd.DataFrame({"t": ["good", "POISON", "fine"]})
    with sk.local(1, engine="echo", faults=["bad_row:marker=POISON"]) as swarm, sk.connect(swarm):
        with pytest.warns(sk.SwarmWarning):
            df.swarm.scatter("{t}", store=store)
        with pytest.warns(sk.SwarmWarning):
            df.swarm.scatter("{t}", store=store)
        assert asked() == 0
        assert sk.last_run().stats.requests > 0


def test_a_torn_last_line_is_one_row_asked_again(pool, store):
    df = pd.DataFrame({"i": range(20)})
    df.swarm.scatter("n {i}", store=store)
    (segment,) = store.glob("*.jsonl")
    segment.write_bytes(segment.read_bytes()[:-20])
    answers = df.swarm.scatter("n {i}", store=store)
    assert asked() == 1
    assert answers["response"].notna().all()


def test_a_newer_store_and_a_file_are_refused_with_what_to_do(pool, store, tmp_path):
    store.mkdir()
    (store / "1.jsonl").write_text(json.dumps({"swarmkit_store": 99, "written_by": "9.9"}) + "\n")
    df = pd.DataFrame({"i": [1]})
    with pytest.raises(sk.StoreError, match=r"newer swarmkit \(9\.9, schema 99\).*schema 1.*Upgrade"):
        df.swarm.scatter("n {i}", store=store)
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(sk.StoreError, match="is a file"):
        df.swarm.scatter("n {i}", store=file)


def test_a_look_inside_and_one_segment_of_many(pool, store, echo):
    for size in (5, 10, 15):
        pd.DataFrame({"i": range(size)}).swarm.scatter("n {i}", store=store)
    opened = sk.open_store(store)
    assert len(opened.segments()) == 3
    frame = opened.to_frame()
    assert len(frame) == len(opened) == 15
    assert set(frame["text"]) == {f"echo: n {i}" for i in range(15)}
    assert set(frame["model"]) == {pool.model}
    opened.compact()
    assert len(opened.segments()) == 1
    pd.testing.assert_frame_equal(opened.to_frame(), frame)
    pd.DataFrame({"i": range(15)}).swarm.scatter("n {i}", store=store)
    assert asked() == 0
    assert echo.endpoints[0].key() not in store.glob("*.jsonl").__next__().read_text()


def test_a_full_disk_ends_the_run_with_its_reason(pool):
    if not os.path.exists("/dev/full"):
        pytest.fail("this check needs /dev/full")
    from swarmkit.store import Store

    class Full(Store):
        def _segment(self):
            self._file = self._file or os.open("/dev/full", os.O_WRONLY)
            return self._file

        def close(self):
            pass

    with pytest.raises(sk.StoreError, match="No space left"):
        pd.DataFrame({"i": [1]}).swarm.scatter("n {i}", store=Full("unused"))


def test_identical_rows_go_out_once_at_temperature_zero(pool):
    df = pd.DataFrame({"t": ["a", "b", "a", None, "a", "b"]}, index=[3, 3, 1, 0, 9, 9])
    with pytest.warns(sk.SwarmWarning, match="missing value"):
        answers = df.swarm.scatter("{t}", temperature=0, details=True)
    assert asked() == 2
    assert answers["response"].tolist()[:3] == ["echo: a", "echo: b", "echo: a"]
    assert answers["response"].notna().tolist() == [True, True, True, False, True, True]
    assert answers["response_prompt_tokens"].notna().sum() == 5
    for options, expected in (({"temperature": 0, "dedup": False}, 5), ({}, 5), ({"dedup": True}, 2)):
        with pytest.warns(sk.SwarmWarning):
            df.swarm.scatter("{t}", **options)
        assert asked() == expected
    frames = list(df.dropna().swarm.iter_scatter("{t}", temperature=0))
    assert sorted(pd.concat(frames)["response"]) == ["echo: a"] * 3 + ["echo: b"] * 2


def test_identical_rows_share_an_error(store):
    df = pd.DataFrame({"t": ["POISON", "good", "POISON"]})
    with (
        sk.local(1, engine="echo", faults=["bad_row:marker=POISON"]) as swarm,
        sk.connect(swarm),
        pytest.warns(sk.SwarmWarning, match="2 of 3 rows failed"),
    ):
        answers = df.swarm.scatter("{t}", temperature=0)
    assert answers["response_error"].notna().tolist() == [True, False, True]


def test_a_tree_resumes_from_its_store(pool, store):
    df = pd.DataFrame({"t": [f"note {i}" for i in range(9)]})
    first = df.swarm.tree_reduce("t", "Merge:\n{responses}", fanin=3, store=store)
    assert asked() == 4
    again = df.swarm.tree_reduce("t", "Merge:\n{responses}", fanin=3, store=store)
    assert asked() == 0
    pd.testing.assert_frame_equal(first, again)


WORK = """
    import sys, pandas as pd, swarmkit as sk
    from swarmkit.hostfile import AgentEndpoint
    if __name__ == "__main__":
        host, port, key, store, out, rows = sys.argv[1:]
        sk.connect(AgentEndpoint(host, int(port), api_key=key))
        df = pd.DataFrame({"i": range(int(rows))})
        print("started", flush=True)
        frame = df.swarm.scatter("number {i}", store=store, details=True, max_tokens=8)
        frame[["i", "response", "response_error", "response_finish_reason"]].to_parquet(out)
"""


def work(endpoint, store, out, rows=600):
    args = [endpoint.host, str(endpoint.port), endpoint.api_key, str(store), str(out), str(rows)]
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(WORK), *args],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )


@pytest.fixture
def steady():
    """An endpoint that takes a second for 240 rows."""
    with sk.local(1, engine="echo", tokens_per_s=60.0, max_num_seqs=16) as swarm:
        yield swarm.endpoints[0]


def generated(endpoint):
    import re
    import urllib.request

    request = urllib.request.Request(f"{endpoint.url}/metrics", headers={"Authorization": f"Bearer {endpoint.key()}"})
    text = urllib.request.urlopen(request, timeout=10).read().decode()
    return int(re.search(r"^swarmkit:prompts_total\{.*\} (\d+)", text, re.MULTILINE)[1])


@pytest.mark.long
@pytest.mark.timeout(300)
def test_killed_at_random_moments_it_ends_like_an_undisturbed_run(steady, store, tmp_path):
    rng = random.Random(7)
    out = tmp_path / "out.parquet"
    rows, kills, in_flight, stored = 4000, 20, 400, []
    for attempt in range(kills + 1):
        child = work(steady, store, out, rows)
        assert child.stdout.readline() == "started\n"
        try:
            child.wait(rng.uniform(0.3, 1.5) if attempt < kills else 120)
        except subprocess.TimeoutExpired:
            child.send_signal(signal.SIGKILL)
            child.wait()
        child.stdout.close()
        stored.append(len(sk.open_store(store)))
        assert out.exists() == (attempt == kills)
    assert stored == sorted(stored), "what was stored stays stored"
    assert 0 < stored[5] < rows, "the kills fell into the work"
    frame = pd.read_parquet(out)
    assert len(frame) == rows
    assert (frame["response"] == "echo: number " + frame["i"].astype(str)).all()
    assert frame["response_error"].isna().all()
    lines = [line for segment in store.glob("*.jsonl") for line in segment.read_text().splitlines()]
    keys = [json.loads(line)["key"] for line in lines if '"key"' in line and line.endswith("}")]
    assert len(keys) == len(set(keys)) == rows, "no row was answered twice"
    # Sent twice are at most the rows in flight at a kill; probes and the template take a few prompts a start.
    assert generated(steady) <= rows + kills * in_flight + (kills + 1) * 10


@pytest.mark.long
@pytest.mark.timeout(120)
def test_two_processes_on_one_store_and_a_third_that_sends_nothing(steady, store, tmp_path):
    outs = [tmp_path / "a.parquet", tmp_path / "b.parquet", tmp_path / "c.parquet"]
    children = [work(steady, store, out) for out in outs[:2]]
    for child in children:
        assert child.wait(100) == 0
        child.stdout.close()
    frames = [pd.read_parquet(out) for out in outs[:2]]
    pd.testing.assert_frame_equal(*frames)
    before = generated(steady)
    third = work(steady, store, outs[2])
    assert third.wait(60) == 0
    third.stdout.close()
    pd.testing.assert_frame_equal(pd.read_parquet(outs[2]), frames[0])
    assert generated(steady) - before < 10, "probes and the learning of the template only"
