"""The verbs on dask DataFrames: what pandas gives, later, from many processes, and nothing twice."""

import json
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import cloudpickle
import dask
import dask.dataframe as dd
import pandas as pd
import pytest
from distributed import Client, LocalCluster
from test_faults import prompts_seen
from test_swarm import requests_served

import swarmkit as sk
import swarmkit.dask  # registers ddf.swarm

KEY = "SWARMKIT_TEST_KEY"
LOOPBACK = "127.0.0.1:0"
LEVELS = ["k", "n_leaves", "n_missing"]


def keyless(swarm):
    """The endpoints, their key named and not held, as a hostfile with key_env= has them."""
    return [replace(e, api_key=None, key_env=KEY) for e in swarm.endpoints]


@pytest.fixture
def far(echo, monkeypatch):
    """A pool whose key is in the environment, the default one."""
    monkeypatch.setenv(KEY, echo.endpoints[0].key())
    with sk.connect(keyless(echo)) as pool:
        yield pool


def bytes_read():
    """By this process from files, so far."""
    return int(Path("/proc/self/io").read_text().split()[1])


def genes():
    df = pd.DataFrame({"k": ["b", "a", "b", "c", "a", "b", "d"], "t": ["x", "y", None, "z", "v", "w", None]})
    return df.set_index(pd.Index([1, 2, 3, 5, 8, 13, 21], name="at"))


@pytest.mark.parametrize("options", [{}, {"n": 2}, {"details": True}], ids=str)
def test_scatter_is_the_pandas_verb_later(far, options):
    ddf = dd.from_pandas(genes(), npartitions=3)
    with pytest.warns(sk.SwarmWarning, match="2 of 7 rows failed"):
        expected = ddf.compute().swarm.scatter("{k} {t}", **options)
    before = requests_served(far)
    lazy = ddf.swarm.scatter("{k} {t}", **options)
    assert lazy.divisions == ddf.divisions
    assert requests_served(far) == before, "nothing is sent before it is computed"
    with pytest.warns(sk.SwarmWarning, match="rows failed"):
        got = lazy.compute(scheduler="sync")
    assert lazy._meta.dtypes.to_dict() == got.dtypes.to_dict() == expected.dtypes.to_dict()
    varying = [c for c in got.columns if c.endswith(("_endpoint", "_latency_s", "_attempts"))]
    pd.testing.assert_frame_equal(got.drop(columns=varying), expected.drop(columns=varying))


def test_scatter_takes_conversations_examples_and_first_words(far):
    df = genes().fillna("-").assign(c=lambda df: [[{"role": "user", "content": t}] for t in df["t"]])
    df["j"] = df["c"].map(json.dumps)
    shown = pd.DataFrame({"k": ["z"], "response": ["yes"]})
    turns = {"prompt": "{k}", "examples": shown, "assistant_prefix": "It is "}
    with dask.config.set({"dataframe.convert-string": False}):
        ddf = dd.from_pandas(df, npartitions=3)
        for options in ({"messages": "c"}, {"messages": "j"}, turns):
            got = ddf.swarm.scatter(**options).compute(scheduler="sync")
            pd.testing.assert_frame_equal(got, df.swarm.scatter(**options))
    assert got["response"].tolist() == [f"It is echo: {k}" for k in df["k"]]


def test_embed_is_the_pandas_verb_later(far, tmp_path):
    ddf = dd.from_pandas(genes(), npartitions=3)
    lazy = ddf.swarm.embed("t", dimensions=8, store=tmp_path)
    assert lazy.divisions == ddf.divisions
    with pytest.warns(sk.SwarmWarning, match="rows failed"):
        expected = ddf.compute().swarm.embed("t", dimensions=8)
    with pytest.warns(sk.SwarmWarning, match="rows failed"):
        got = lazy.compute(scheduler="sync")
    assert lazy._meta.dtypes.to_dict() == got.dtypes.to_dict() == expected.dtypes.to_dict()
    pd.testing.assert_frame_equal(got, expected)
    none = dd.from_pandas(genes().assign(t=None), npartitions=2).swarm.embed("t")
    with pytest.warns(sk.SwarmWarning):
        assert none.compute(scheduler="sync").dtypes.to_dict() == none._meta.dtypes.to_dict()
    with pytest.raises(sk.SettingError, match="as_array= is not possible on dask frames"):
        ddf.swarm.embed("t", as_array=True)


def test_one_partition_reduces_as_pandas_does(far):
    df = genes().iloc[:-1]
    expected = df.swarm.tree_reduce("t", "{responses}", by="k", fanin=2)
    lazy = dd.from_pandas(df, npartitions=1).swarm.tree_reduce("t", "{responses}", by="k", fanin=2)
    got = lazy.compute(scheduler="sync")
    assert lazy._meta.dtypes.to_dict() == got.dtypes.to_dict()
    pd.testing.assert_frame_equal(got, expected.astype({"k": got["k"].dtype}))  # dask has a string dtype of its own


def test_groups_span_partitions_and_single_texts_go_unsent(far):
    ddf = dd.from_pandas(genes(), npartitions=3)
    before = sum(requests_served(far).values())
    lazy = ddf.swarm.tree_reduce("t", "{responses}", by="k", fanin=2)
    assert lazy.npartitions == 1
    assert sum(requests_served(far).values()) == before
    with pytest.warns(sk.SwarmWarning, match="no text to merge"):
        got = lazy.compute(scheduler="sync")
    with pytest.warns(sk.SwarmWarning, match="no text to merge"):
        expected = genes().swarm.tree_reduce("t", "{responses}", by="k", fanin=2).astype({"k": ddf["k"].dtype})
    assert lazy._meta.dtypes.to_dict() == got.dtypes.to_dict() == expected.dtypes.to_dict()
    pd.testing.assert_frame_equal(got[LEVELS], expected[LEVELS])
    assert got["n_levels"].tolist() == [1, 1, 0, 0]
    assert got["response"].tolist()[2] == "z"
    assert got["response_error"].tolist()[3] == "there was no text to merge: all values are missing"


def test_levels_count_from_the_leaves(far):
    df = pd.DataFrame({"t": [f"t{i}" for i in range(16)]})
    got = dd.from_pandas(df, npartitions=4).swarm.tree_reduce("t", "{responses}", fanin=2).compute(scheduler="sync")
    assert got[["n_leaves", "n_levels", "n_missing"]].values.tolist() == [[16, 4, 0]]


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda s: s.scatter("{tt}"), sk.UnknownColumnError, "'t'"),
        (lambda s: s.scatter("{t}", temprature=0), TypeError, "temperature"),
        (lambda s: s.scatter("{t}", workers=0), sk.SettingError, "workers=0"),
        (lambda s: s.scatter(pd.Series(["x"])), sk.SettingError, "no partitions"),
        (lambda s: s.scatter("{t}", progress=True), sk.SettingError, "ProgressBar"),
        (lambda s: s.tree_reduce("tt", "{responses}"), sk.UnknownColumnError, "'t'"),
        (lambda s: s.tree_reduce("t", "merge"), sk.PromptError, "{responses}"),
        (lambda s: s.tree_reduce("t", "{responses}", trace=True), sk.SettingError, "trace"),
        (lambda s: s.submit("{t}"), AttributeError, "scatter, embed and tree_reduce"),
    ],
)
def test_mistakes_are_reported_when_the_call_is_made(far, call, error, says):
    with pytest.raises(error) as told:
        call(dd.from_pandas(genes(), npartitions=2).swarm)
    assert says in str(told.value)


def test_keys_do_not_travel(echo, far):
    ddf = dd.from_pandas(genes(), npartitions=2)
    with sk.connect(echo) as pool, pytest.raises(sk.SettingError, match="key_env"):
        ddf.swarm.scatter("{k}", pool=pool)
    graph = cloudpickle.dumps(ddf.swarm.scatter("{k}", pool=far).__dask_graph__())
    assert echo.endpoints[0].key().encode() not in graph


def test_a_second_computation_reads_the_store(far, tmp_path):
    df = pd.DataFrame({"i": range(60)})
    lazy = dd.from_pandas(df, npartitions=6).swarm.scatter("n {i}", store=tmp_path)
    first = lazy.compute(scheduler="threads")
    before = sum(requests_served(far).values())
    pd.testing.assert_frame_equal(lazy.compute(scheduler="threads"), first)
    assert sum(requests_served(far).values()) == before


def test_partitions_do_not_read_the_whole_store_each(far, tmp_path):
    rows = pd.DataFrame({"i": range(4000)})
    kept = sk.open_store(tmp_path, store_prompts=False)
    dd.from_pandas(rows, npartitions=1).swarm.scatter("n {i}", store=kept).compute(scheduler="sync")
    assert kept.to_frame()["prompt"].isna().all(), "the settings of a store travel with it"
    lazy = dd.from_pandas(rows, npartitions=20).swarm.scatter("n {i}", store=kept)
    before = bytes_read()
    assert lazy.compute(scheduler="sync")["response"].notna().all()
    size = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert bytes_read() - before < 10 * size, "once to see what is there; and the answers"


@pytest.mark.long
@pytest.mark.timeout(120)
def test_a_killed_worker_changes_nothing_and_only_what_was_in_flight_goes_out_again(monkeypatch, tmp_path):
    df = pd.DataFrame({"i": range(400)})
    speed = {"tokens_per_s": 20.0, "max_num_seqs": 8}
    with sk.local(1, engine="echo", addresses=4, **speed) as swarm:
        monkeypatch.setenv(KEY, swarm.endpoints[0].key())
        batch = sk.BatchPolicy(max_size=4, max_in_flight=4, hedge=False)  # no copies of stragglers
        with (
            sk.connect(keyless(swarm), batch=batch) as pool,
            LocalCluster(
                n_workers=4, threads_per_worker=1, dashboard_address=LOOPBACK, worker_dashboard_address=LOOPBACK
            ) as cluster,
            Client(cluster) as client,
        ):
            lazy = dd.from_pandas(df, npartitions=8).swarm.scatter("n {i}", store=tmp_path, max_tokens=8)
            future = client.compute(lazy)
            store = sk.open_store(tmp_path)
            while len(store) < 80:
                assert future.status == "pending"
                time.sleep(0.05)
            pids = list(client.run(os.getpid).values())
            assert len(pids) == 4
            os.kill(pids[0], signal.SIGKILL)
            got = future.result(timeout=90)
            prompts = prompts_seen(pool, [e.host for e in pool.endpoints])
    assert got["response"].tolist() == [f"echo: n {i}" for i in range(400)]
    assert got["response_error"].isna().all()
    assert got.index.tolist() == list(range(400))
    # A pool's first run asks three prompts of its own, to learn what its servers can do: four workers, and the one
    # that takes the victim's place. A fourth of the windows was in flight: 4 endpoints x 4 requests x 4 rows.
    again = prompts - 400
    print(f"\n{again} of 400 prompts came on top")
    # The victim's partition asked again from its beginning would be some 40 more than that.
    assert again <= 16 + 5 * 3 + 5


def test_a_deadline_holds_for_all_partitions(monkeypatch):
    speed = {"tokens_per_s": 40.0, "max_num_seqs": 4}
    with sk.local(1, engine="echo", **speed) as swarm:
        monkeypatch.setenv(KEY, swarm.endpoints[0].key())
        with sk.connect(keyless(swarm), batch=sk.BatchPolicy(max_size=4)):
            ddf = dd.from_pandas(pd.DataFrame({"t": [f"a b c d e f {i}" for i in range(240)]}), npartitions=4)
            began = time.monotonic()
            with pytest.warns(sk.SwarmWarning, match="rows are left"):
                got = ddf.swarm.scatter("t", deadline=4.0).compute(scheduler="sync")
            assert time.monotonic() - began < 6.0
    done = got["response"].notna()
    assert 0 < done.sum() < 240
    assert got["response"][done].tolist() == [f"echo: {t}" for t in got["t"][done]]
    assert got["response_error"][~done].str.contains("the deadline .* was reached").all()
    assert not all(done[i : i + 60].any() for i in range(0, 240, 60)), "one of the partitions began after it"


@pytest.mark.slow
def test_a_group_of_which_a_deadline_leaves_a_part_has_no_answer(monkeypatch, tmp_path):
    """The merges of the first partition are in a store; those of the second take longer than there is time."""
    words = " ".join("abcdefghijklmnopqrstuvwxyz" * 6)
    df = pd.DataFrame({"k": ["a", "a", "b", "b", "b", "b", "c", "c"], "t": [f"{i} {words}" for i in range(8)]})
    how = {"by": "k", "fanin": 2, "store": tmp_path, "max_tokens": 512}

    def reduce(rows, swarm, partitions, **more):
        monkeypatch.setenv(KEY, swarm.endpoints[0].key())
        with sk.connect(keyless(swarm)):
            lazy = dd.from_pandas(rows, npartitions=partitions).swarm.tree_reduce("t", "{responses}", **how, **more)
            return lazy.compute(scheduler="sync")

    with sk.local(1, engine="echo") as quick:
        first = reduce(df[:4], quick, 1)
        with sk.local(1, engine="echo", tokens_per_s=20.0) as slow:
            began = time.monotonic()
            with pytest.warns(sk.SwarmWarning, match="the deadline .* was reached"):
                got = reduce(df, slow, 2, deadline=6.0)
            assert time.monotonic() - began < 9.0
        whole = reduce(df, quick, 2)
    assert got["response"].isna().tolist() == [False, True, True]
    assert got["response"][0] == first["response"][0]
    assert got["response_error"][1:].str.contains("the deadline .* was reached").all()
    assert got[["n_leaves", "n_missing"]].values.tolist() == [[2, 0], [0, 4], [0, 2]]
    assert whole["response"].notna().all()
    assert whole["n_leaves"].tolist() == [2, 4, 2]


def test_requests_of_workers_grow_as_those_of_one_process(far):
    ddf = dd.from_pandas(pd.DataFrame({"i": range(6000)}), npartitions=2)
    with sk.connect(far.endpoints[:1], batch=sk.BatchPolicy(max_size="auto", max_in_flight=4)) as pool:
        ddf.swarm.scatter("{i}", pool=pool, max_tokens=1, workers=2).compute(scheduler="sync")
    assert 200 <= max(sk.last_run().stats.batch_sizes) <= 1000
