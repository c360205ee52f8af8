"""Nothing is paid for twice: the store, identical rows, and processes that are killed."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import textwrap
from collections import Counter

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
    assert sk.last_run().stats.stored == 250
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


ONE, OTHER = (
    {"temperature": 0.0, "stop": "x", "logit_bias": {"7": 1.0}},
    {"temperature": 0, "stop": ["x"], "logit_bias": {"7": 1}},
)


def test_a_question_is_what_is_asked_and_not_how_it_is_spelled(pool, store):
    df = pd.DataFrame({"i": range(3)})
    df.swarm.scatter("n {i}", store=store, seed=1, **ONE)
    df.swarm.scatter("n {i}", store=store, **OTHER, seed=1)
    assert asked() == 0
    words = {"extra_body": {"chat_template_kwargs": {"style": 1.0}}}
    df.swarm.scatter("n {i}", store=store, **words)
    df.swarm.scatter("n {i}", store=store, extra_body={"chat_template_kwargs": {"style": 1}})
    assert asked() == 3, "a chat template writes 1.0 and 1 apart"


def test_a_store_with_keys_of_the_spelling_is_found(pool, store):
    """As they were made before values counted."""
    df = pd.DataFrame({"i": [*range(20), 3, 3]})
    df.swarm.scatter("n {i}", store=store, dedup=False, **ONE)
    (segment,) = store.glob("*.jsonl")
    header, ask, *lines = map(json.loads, segment.read_text().splitlines())
    lines = [line for line in lines if "key" in line]  # nor were there prompts
    settings = json.dumps({name: value for name, value in ask.items() if name != "ask"}, sort_keys=True)
    spelled = hashlib.blake2b(settings.encode(), digest_size=8).hexdigest()
    assert spelled != ask["ask"]
    times = Counter()
    for line in lines:
        text = line["text"].removeprefix("echo: ")
        key = hashlib.blake2b(f"{spelled} {times[text]} {text}".encode(), digest_size=16).hexdigest()
        line |= {"key": key, "ask": spelled, "text": "found " + line["text"]}
        times[text] += 1
    segment.write_text("".join(json.dumps(line) + "\n" for line in (header, {**ask, "ask": spelled}, *lines)))
    answers = pd.DataFrame({"i": [*range(25), 3, 3, 3]}).swarm.scatter("n {i}", store=store, dedup=False, **OTHER)
    assert asked() == 6
    assert answers["response"].str.startswith("found ").sum() == 22


def test_an_index_that_is_wrong_is_not_believed(pool, store):
    from swarmkit.store.index import FILE, Index

    df = pd.DataFrame({"i": range(100, 200)})
    first = df.swarm.scatter("n {i}", store=store)
    Index(store, save_after=0).refresh()
    index = (store / FILE).read_bytes()
    (segment,) = store.glob("*.jsonl")
    lines = segment.read_bytes().splitlines(keepends=True)
    segment.write_bytes(b"".join([*lines[:2], *lines[30:60], *lines[2:30], *lines[60:]]))
    again = df.swarm.scatter("n {i}", store=store)
    assert asked() == 0
    pd.testing.assert_frame_equal(first, again)
    assert (store / FILE).read_bytes() != index, "it is mended"


def test_runs_at_once_and_the_frames_of_a_stream_share_a_segment(steady, store):
    with sk.connect(steady):
        runs = [pd.DataFrame({"i": range(k, k + 100)}).swarm.submit("n {i}", store=store) for k in (0, 100, 200)]
        for run in runs:
            run.result()
        assert len([*store.iterdir()]) == 1
        for _ in sk.iter_scatter(
            (pd.DataFrame({"i": range(k, k + 5)}) for k in range(300, 400, 5)), "n {i}", store=store
        ):
            pass
        assert len([*store.iterdir()]) == 2
        assert len(sk.open_store(store)) == 400


@pytest.mark.parametrize("durability", ["second", "row", "close"])
def test_rows_are_kept_however_often_they_are_flushed(pool, store, durability):
    opened = sk.open_store(store, durability=durability)
    df = pd.DataFrame({"i": range(250)})
    df.swarm.scatter("n {i}", store=opened)
    df.swarm.scatter("n {i}", store=store)
    assert asked() == 0
    with pytest.raises(sk.SettingError, match=r"durability='never'.*'second', 'row' or 'close'"):
        sk.open_store(store, durability="never")


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


def test_rows_count_once_in_a_store_however_often_they_are_in_it(pool, store):
    pd.DataFrame({"i": range(3)}).swarm.scatter("n {i}", store=store, n=2, temperature=0.7)
    (segment,) = store.glob("*.jsonl")
    segment.with_name(f"{segment.stem}-2.jsonl").write_bytes(segment.read_bytes())  # as two runs at once leave it
    assert ": 3 rows of " in repr(sk.open_store(store))
    assert len(sk.open_store(store)) == 6, "answers"


def test_errors_are_not_stored(store):
    df = pd.DataFrame({"t": ["good", "POISON", "fine"]})
    with sk.local(1, engine="echo", faults=["bad_row:marker=POISON"]) as swarm, sk.connect(swarm):
        with pytest.warns(sk.SwarmWarning):
            df.swarm.scatter("{t}", store=store)
        with pytest.warns(sk.SwarmWarning):
            df.swarm.scatter("{t}", store=store)
        assert asked() == 0
        assert sk.last_run().stats.requests > 0


def test_an_incomplete_last_line_is_one_row_asked_again(pool, store):
    df = pd.DataFrame({"i": range(20)})
    df.swarm.scatter("n {i}", store=sk.open_store(store, store_prompts=False))
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


def test_duplicate_prompts_are_sent_once_at_temperature_zero(pool):
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


def test_duplicate_prompts_share_an_error(store):
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
    from swarmkit.client.hostfile import AgentEndpoint
    if __name__ == "__main__":
        host, port, key, store, out, rows = sys.argv[1:]
        sk.connect(AgentEndpoint(host, int(port), api_key=key))
        df = pd.DataFrame({"i": range(int(rows))})
        print("started", flush=True)
        frame = df.swarm.scatter("number {i}", store=store, details=True, max_tokens=8)
        frame[["i", "response", "response_error", "response_finish_reason"]].to_parquet(out)
"""


def work(endpoint, store, out, rows=600):
    args = [endpoint.host, str(endpoint.port), endpoint.key(), str(store), str(out), str(rows)]
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


# ---- prompts, and answers without a pool ------------------------------


def test_a_person_can_read_what_is_stored(pool, store, tmp_path):
    df = pd.DataFrame({"i": range(120)})
    df.swarm.scatter("Is {i} even?", store=store, n=2, temperature=1.0)
    pd.DataFrame({"t": ["wörd " * 200, "short"]}).swarm.scatter("t", store=store)
    opened = sk.open_store(store)
    frame = opened.to_frame()
    even = frame[frame["prompt"].str.startswith("Is ")]
    assert len(even) == 240
    assert all(prompt in text for prompt, text in zip(even["prompt"], even["text"], strict=True))
    assert frame["prompt"].notna().all()
    opened.compact()
    pd.testing.assert_frame_equal(opened.to_frame(), frame)
    opened.to_parquet(tmp_path / "a.parquet")
    written = pd.read_parquet(tmp_path / "a.parquet")
    assert written["prompt"].tolist() == frame["prompt"].tolist()
    few = opened.to_frame(columns=["text", "latency_s", "ask"])
    assert list(few) == ["text", "latency_s", "ask"]
    assert few["text"].tolist() == frame["text"].tolist()
    with pytest.raises(sk.SettingError, match=r"columns=.*'txt'.*must be.*text"):
        opened.to_frame(columns=["txt"])
    bare = sk.open_store(tmp_path / "bare", store_prompts=False)
    df.swarm.scatter("Is {i} even?", store=bare)
    assert bare.to_frame()["prompt"].isna().all()
    assert bare.join(df, "Is {i} even?")["response"].notna().all()


def test_a_join_is_what_the_run_returned(pool, store):
    df = pd.DataFrame({"t": ["a", "b", "a", None, "c"]}, index=[3, 3, 1, 0, 9])
    with pytest.warns(sk.SwarmWarning, match="missing value"):
        first = df.swarm.scatter("Say {t}", store=store, temperature=0)
    opened = sk.open_store(store)
    pd.testing.assert_frame_equal(opened.join(df, "Say {t}"), first)
    more = pd.DataFrame({"t": ["b", "new", "a"]})
    found = opened.join(more, "Say {t}", out="said")
    assert found["said"].notna().tolist() == [True, False, True]
    assert found["said_error"].tolist()[1] == "not in the store"
    rest = found.swarm.scatter("Say {t}", out="said", only_missing=True, temperature=0)
    assert asked() == 1
    assert rest["said"].notna().all()


def test_a_join_asks_which_of_several_calls_is_meant(pool, store):
    df = pd.DataFrame({"t": ["a", "b"]})
    options = [{"temperature": 0.0}, {"temperature": 0, "system": "Be brief."}]
    answers = [df.swarm.scatter("t", store=store, **each) for each in options]
    df.swarm.scatter("t {t}", store=store)
    opened = sk.open_store(store)
    with pytest.raises(sk.SettingError, match=r"2 calls have asked these prompts.*ask='.*system=None; ask=.*Be brief"):
        opened.join(df, "t")
    asks = opened.to_frame(columns=["ask", "text"])["ask"].unique()
    for ask, expected in zip(asks, answers, strict=False):
        pd.testing.assert_frame_equal(opened.join(df, "t", ask=ask), expected)
    assert opened.join(df, "t", ask=asks[2])["response"].isna().all()
    with pytest.raises(sk.SettingError, match="ask='x': the store has answers of"):
        opened.join(df, "t", ask="x")
    assert opened.join(df, "other {t}")["response"].isna().all()
