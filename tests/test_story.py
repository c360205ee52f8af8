"""What a user can find out about a run afterwards: its story, its log, and listeners that raise."""

from __future__ import annotations

import asyncio
import io
import logging
import re
import resource
import subprocess
import sys
import textwrap
import threading
import time
import warnings

import pandas as pd
import pytest
from scripted import Scripted

import swarmkit as sk
from swarmkit.engine.columns import Columns
from swarmkit.records import Prompts
from swarmkit.runs.events import RequestEnded, RowsDone

RETRY = sk.RetryPolicy(base_s=0.02, cap_s=0.1)
LOGGER = logging.getLogger("swarmkit")


@pytest.fixture
def swarm():
    """Make a pool of echo endpoints with faults, the default one; the same endpoints for the whole test."""
    made = []

    def make(*faults, addresses=1, size=100, **settings):
        made.append(sk.local(1, engine="echo", addresses=addresses, faults=list(faults), **settings))
        made.append(sk.connect(made[-1], retry=RETRY, batch=sk.BatchPolicy(max_size=size)))
        return made[-1]

    yield make
    for opened in reversed(made):
        opened.__exit__(None, None, None)


@pytest.fixture
def log(caplog):
    """Sets the level of the log, and gives its lines."""

    def lines(level=None):
        if level:
            caplog.set_level(level, "swarmkit")
        return [f"{r.levelname} {r.getMessage()}" for r in caplog.records if r.name == "swarmkit"]

    return lines


def texts(n, **others):
    return pd.DataFrame({"t": [f"row {i}" for i in range(n)]}, **others)


def scatter(df, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", sk.SwarmWarning)  # of failed rows, which these tests look at by other means
        df.swarm.scatter("{t}", progress=False, **options)
    return sk.last_run()


def whats(story):
    return story["what"].tolist()


# ---- the story of a row ------------------------------


def test_a_row_that_was_retried(swarm):
    pool = swarm("http_500:first=1,marker=row")
    story = scatter(texts(3)).story(row=1)
    assert whats(story) == ["sent", "request failed", "to be retried", "sent", "answered"]
    assert story["where"].tolist() == [pool.endpoints[0].name] * 5
    assert story["why"][0] == "attempt 1, with 2 other rows"
    assert story["why"][1].startswith("server error (HTTP 500): EngineCore")
    assert story["why"][2] == "at another endpoint, if one is ready"
    assert story["why"][3] == "attempt 2, with 1 other row"  # halved: no other row could tell who is at fault
    assert story["time"].is_monotonic_increasing
    assert 0 <= story["time"][0] < story["time"][4] < 30


def test_a_row_that_every_server_refuses_and_one_that_was_with_it(swarm):
    swarm("bad_row:marker=POISON", addresses=2)
    df = texts(8, index=list("abcdefgh"))
    df.loc["c", "t"] = "POISON"
    run = scatter(df)
    story = run.story(row="c")
    assert whats(story)[:4] == ["sent", "request failed", "halved", "sent"]
    assert whats(story)[-5:] == ["request failed", "to be retried", "sent", "request failed", "row failed"]
    assert story["why"].tolist()[-3] == f"attempt {whats(story).count('sent')}, alone"
    assert len(set(story["where"][-5:])) == 2, "the second opinion is another endpoint's"
    assert "(HTTP 400)" in story["why"].iloc[-1]
    neighbour = run.story(row="a")
    assert whats(neighbour)[:3] == ["sent", "request failed", "halved"]
    assert whats(neighbour)[-1] == "answered"
    assert "row failed" not in whats(neighbour)


def test_rows_that_succeed_at_once_are_in_it_under_debug_only(swarm, log):
    pool = swarm()
    assert scatter(texts(3)).story(row=0).empty
    log("DEBUG")
    story = scatter(texts(3)).story(row=0)
    assert whats(story) == ["sent", "answered"]
    assert story["where"].tolist() == [pool.endpoints[0].name] * 2
    assert story["why"][0] == "attempt 1, with 2 other rows"


def test_a_row_that_a_slow_endpoint_held(swarm, log):
    log("DEBUG")
    with Scripted(lambda call: call.wait_for_the_end()) as silent:
        fast = swarm(addresses=2)
        pool = sk.VLLMPool(
            [*fast.endpoints, "{}:{}".format(*silent.address)],
            model=fast.model,
            delivery="rows",
            batch=sk.BatchPolicy(max_size=4),
        )
        with pool:
            run = scatter(texts(60), pool=pool)
    story = run.story(endpoint="{}:{}".format(*silent.address))
    assert set(whats(story)) == {"sent", "request dropped"}
    assert whats(story).count("sent") == whats(story).count("request dropped")
    held = int(story["why"][0].split(": ")[1].split(",")[0])
    row = run.story(row=held)
    assert whats(row) == ["sent", "duplicated", "answered", "request dropped"]
    assert row["why"][1].startswith("attempt 2")
    assert row["where"][1] == row["where"][2] != row["where"][0] == row["where"][3]
    assert row["time"][1] >= 0.5


def test_labels_are_those_of_the_frame(swarm):
    swarm("http_500:first=1,marker=row", size=10)
    index = pd.MultiIndex.from_tuples([("a", 1), ("a", 2), ("b", 1)])
    run = scatter(texts(3, index=index))
    assert whats(run.story(row=("b", 1)))[-1] == "answered"
    twice = scatter(texts(3, index=["x", "y", "x"]))
    for label in ("x", "y"):
        assert twice.story(row=label).empty
    for wrong in ("z", ("b", 7), ["x"], 0):
        with pytest.raises(sk.SettingError, match="not in the index of the frame, which has 3 rows"):
            twice.story(row=wrong)


def test_rows_that_share_a_prompt_share_a_story(swarm):
    swarm("bad_row:marker=POISON")
    df = pd.DataFrame({"t": ["POISON", "good", "POISON"]}, index=["x", "y", "z"])
    story = scatter(df, temperature=0).story(row="z")
    assert whats(story) == ["row failed"]
    assert story["why"][0] == "row 'x' has the same prompt, and failed"


def test_words_of_a_server_are_escaped_and_cut(swarm):
    def refuse(call):
        call.reply(("\x1b[2J\u202e" + "no " * 1000).encode(), "500 Internal Server Error")

    with (
        Scripted(refuse) as server,
        sk.VLLMPool(["{}:{}".format(*server.address)], model="m", retry=RETRY) as pool,
        pytest.raises(sk.NoEndpointsError, match=r"\\x1b\[2J\\u202eno no") as raised,
    ):
        pd.DataFrame({"t": ["a"]}).swarm.scatter("{t}", pool=pool, chat=None, delivery="batch", progress=False)
    assert "\x1b" not in str(raised.value)
    why = sk.last_run().story()["why"].str.cat(sep="\n")
    assert "\\x1b[2J\\u202eno no" in why
    assert "\x1b" not in why
    assert max(map(len, why.split("\n"))) < 500


# ---- the story of an endpoint ------------------------------


def test_an_endpoint_that_is_lost(swarm):
    pool = swarm("http_401:address=127.0.0.2,path=/v1/completions,marker=row", addresses=2, size=5)
    run = scatter(texts(200))
    name = pool.endpoints[1].name
    story = run.story(endpoint=name)
    assert set(story["where"]) == {name}
    assert whats(story)[-1] == "to be retried" or "endpoint lost" in whats(story)
    lost = story[story["what"] == "endpoint lost"]
    assert len(lost) == 1
    assert "HTTP 401" in lost["why"].iloc[0]
    assert "endpoint back" not in whats(story)
    pd.testing.assert_frame_equal(run.story(endpoint=1), story)
    assert run.stats.answered == 200


def test_an_endpoint_that_comes_back(swarm):
    swarm("http_500:first=16,marker=row", size=5)
    story = scatter(texts(90)).story(endpoint=0)
    states = [what for what in whats(story) if what.startswith("endpoint")]
    assert states == ["endpoint paused", "endpoint back"]


def test_both_a_row_and_an_endpoint(swarm):
    pool = swarm("http_500:address=127.0.0.1,first=1,marker=row", addresses=2)
    run = scatter(texts(2), delivery="batch")
    for endpoint in pool.endpoints:
        story = run.story(row=0, endpoint=endpoint.name)
        assert set(story["where"]) <= {endpoint.name}
    assert len(run.story(row=0)) == sum(len(run.story(row=0, endpoint=i)) for i in (0, 1))


@pytest.mark.parametrize("endpoint", ["nowhere:1", 4, -1, 1.5])
def test_an_endpoint_that_is_not_of_the_run(swarm, endpoint):
    swarm()
    run = scatter(texts(1))
    with pytest.raises(sk.SettingError, match=r"must be a name or an index, 0 to 0; the names are: 127"):
        run.story(endpoint=endpoint)


# ---- the story of a run ------------------------------


def test_the_frame_has_the_same_dtypes_when_it_is_empty(swarm):
    swarm("http_500:first=1,marker=row")
    run = scatter(texts(2))
    empty, full = run.story(row=0, endpoint=0)[:0], run.story()
    assert list(full.columns) == ["time", "what", "where", "why"]
    assert full["time"].dtype == "float64"
    pd.testing.assert_series_equal(scatter(texts(2)).story(row=0).dtypes, empty.dtypes)
    assert whats(full)[0] == "run started"
    assert whats(full)[-1] == "run ended"
    assert full["where"].isna().tolist() == [what.startswith("run ") for what in whats(full)]


def test_while_it_runs_and_after_it_was_cancelled(swarm, log):
    log("DEBUG")
    swarm(tokens_per_s=20.0)
    run = texts(40).swarm.submit("{t}", progress=False, max_tokens=50)
    deadline = time.monotonic() + 20
    while run.story().empty or "sent" not in whats(run.story()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert "run ended" not in whats(run.story())
    run.cancel()
    with pytest.raises(sk.CancelledError):
        run.result()
    assert whats(run.story())[-2:] == ["request dropped", "run cancelled"]
    assert whats(run.story(row=39))[-1] == "request dropped"
    assert log()[-1].startswith("INFO run ")
    assert "cancelled after" in log()[-1]


def test_a_tree_has_stories_of_endpoints_only(swarm):
    swarm("http_500:first=1,marker=row")
    texts(4).swarm.tree_reduce("t", "Merge:\n{responses}", fanin=2, progress=False)
    run = sk.last_run()
    story = run.story(endpoint=0)
    assert whats(story)[:3] == ["sent", "request failed", "to be retried"]
    assert story["why"][0] == "2 rows; attempt 1"
    assert whats(run.story()).count("run started") == 2, "one a level"
    assert run.story()["time"].is_monotonic_increasing
    with pytest.raises(sk.SettingError, match="use endpoint="):
        run.story(row=0)


@pytest.mark.slow
def test_the_oldest_entries_are_dropped_first_and_the_story_says_so(swarm):
    swarm("bad_row:marker=row")
    run = scatter(texts(3600), mode="single")
    story = run.story()
    assert len(story) == 10_001
    assert whats(story)[0] == "entries dropped"
    assert "older ones" in story["why"][0]
    assert whats(story)[-1] == "run ended"


# ---- the log ------------------------------


def test_the_log_at_each_level(swarm, log):
    swarm("http_500:first=1,marker=row", addresses=2, size=5)
    log("WARNING")
    scatter(texts(10))
    assert log() == []
    log("INFO")
    scatter(texts(10))
    started, ended = log()
    assert "started, 10 rows to send; completions" in started
    assert "10 rows answered, 0 rows failed, 2 requests" in ended
    log("DEBUG")
    scatter(texts(10))
    lines = log()[2:]
    assert [line.split()[0] for line in lines] == ["INFO", *["DEBUG"] * 4, "INFO"]
    assert sum("sent, 5 rows" in line for line in lines) == 2
    assert sum("answered after" in line for line in lines) == 2


def test_lost_endpoints_are_warnings_and_no_key_is_in_the_log(swarm, log):
    pool = swarm("http_401:address=127.0.0.2,path=/v1/completions,marker=row", addresses=2, size=5)
    log("DEBUG")
    scatter(texts(200))
    warned = [line for line in log() if line.startswith("WARNING")]
    assert len(warned) == 1
    assert f"endpoint {pool.endpoints[1].name} is lost: access denied at" in warned[0]
    assert pool.endpoints[1].key() not in "\n".join(log())


def test_endpoints_that_are_paused_and_back_are_information(swarm, log):
    swarm("http_500:first=16,marker=row", size=5)
    log("INFO")
    scatter(texts(90))
    states = [line.split(" is ")[1].split(":")[0] for line in log() if " endpoint 127" in line]
    assert states == ["paused", "back"]


def test_the_log_is_silent_until_it_is_turned_on():
    code = """
        import pandas as pd, swarmkit as sk
        if __name__ == "__main__":
            faults = ["http_500:address=127.0.0.2,path=/v1/completions,marker=row"]
            with sk.local(1, engine="echo", addresses=2, faults=faults) as swarm:
                pool = sk.connect(swarm, batch=sk.BatchPolicy(max_size=5))
                pd.DataFrame({"i": range(200)}).swarm.scatter("row {i}", progress=False)
            assert "endpoint paused" in sk.last_run().story()["what"].tolist()
    """
    ran = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    assert (ran.stdout, ran.stderr) == ("", "")


# ---- listeners that raise ------------------------------


class BrokenPipe:
    """What stderr is when the terminal is gone: here after the first line of the bar."""

    def write(self, text):
        if "0/" not in text and text.strip():
            raise BrokenPipeError("the terminal is gone")

    def flush(self):
        pass

    def isatty(self):
        return True


def test_a_listener_that_raises_is_removed_and_named_once(swarm, log):
    pool = swarm(size=5)
    calls, seen, threads = [], [], set()

    def broken(event):
        threads.add(threading.current_thread().name)
        if isinstance(event, RowsDone):
            calls.append(event)
            raise ZeroDivisionError("on purpose\x1b")

    columns = Columns(20)
    spec = pool.spec(max_tokens=16)
    with pytest.warns(sk.SwarmWarning, match=r"broken raised ZeroDivisionError: on purpose\\x1b") as warned:
        failure = asyncio.run(pool.run(Prompts(texts(20)["t"].tolist()), spec, columns, [broken, seen.append]))
    assert failure is None
    assert not columns.errors
    assert all(columns.text)
    assert len(calls) == len(warned) == 1
    assert sum(isinstance(event, RequestEnded) for event in seen) == 4, "others hear all of it"
    assert [line for line in log() if line.startswith("ERROR")] == [
        "ERROR the listener test_story.test_a_listener_that_raises_is_removed_and_named_once.<locals>.broken raised "
        "ZeroDivisionError: on purpose\\x1b"
    ]


def test_a_progress_bar_that_cannot_write(swarm, monkeypatch):
    swarm()
    monkeypatch.setattr(sys, "stderr", BrokenPipe())
    with pytest.warns(sk.SwarmWarning, match=r"Bar raised BrokenPipeError: the terminal is gone") as warned:
        df = texts(5).swarm.scatter("{t}", progress=True)
    assert (df["response"] == "echo: " + df["t"]).all()
    assert len(warned) == 1
    monkeypatch.setattr(sys, "stderr", shown := io.StringIO())
    sk.last_run().result()  # warns once only
    texts(5).swarm.scatter("{t}", progress=True)
    assert "5/5" in shown.getvalue()


def test_a_progress_bar_that_cannot_write_over_several_frames(swarm, monkeypatch):
    swarm()
    monkeypatch.setattr(sys, "stderr", BrokenPipe())
    frames = [texts(5), texts(3)]
    with pytest.warns(sk.SwarmWarning, match="Bar raised BrokenPipeError") as warned:
        parts = list(sk.iter_scatter(frames, "{t}", progress=True))
    assert [len(part) for part in parts] == [5, 3]
    assert pd.concat(parts)["response_error"].isna().all()
    assert len(warned) == 1


def test_the_rate_of_a_bar_is_that_of_the_servers(swarm, monkeypatch, tmp_path):
    old = [pd.DataFrame({"t": [f"{k} {i}" for i in range(1000)]}) for k in range(3)]
    swarm()
    for _ in sk.iter_scatter(old, "{t}", max_tokens=20, store=tmp_path, progress=False):
        pass
    swarm(tokens_per_s=60, max_num_seqs=4)
    new = [pd.concat([df, pd.DataFrame({"t": [f"new {k} {i}" for i in range(8)]})]) for k, df in enumerate(old)]
    monkeypatch.setattr(sys, "stderr", shown := io.StringIO())
    began = time.monotonic()
    for _ in sk.iter_scatter(new, "{t}", max_tokens=20, store=tmp_path, progress=True):
        pass
    took_s = time.monotonic() - began
    last = shown.getvalue().split("\r")[-1]
    assert "3024/3024" in last
    rate = re.search(r"([\d.]+)(row/s|s/row)", last)
    rows_per_s = float(rate[1]) if rate[2] == "row/s" else 1 / float(rate[1])
    assert 24 / took_s / 2 < rows_per_s < 10 * 24 / took_s, "of 24 rows, not of 3,024"


def test_frames_that_are_in_the_store_are_in_the_bar_while_others_are_asked(swarm, monkeypatch, tmp_path):
    old = [pd.DataFrame({"t": [f"{k} {i}" for i in range(500)]}) for k in range(2)]
    swarm()
    for _ in sk.iter_scatter(old, "{t}", max_tokens=20, store=tmp_path, progress=False):
        pass
    swarm(tokens_per_s=20, max_num_seqs=1)
    new = pd.DataFrame({"t": [f"new {i} and some more words" for i in range(8)]})
    monkeypatch.setattr(sys, "stderr", shown := io.StringIO())
    for _ in sk.iter_scatter([new, *old], "{t}", max_tokens=20, store=tmp_path, progress=True):
        pass
    assert re.search(r" 100[0-7]/1008 ", shown.getvalue())
    assert " 1008/1008 " in shown.getvalue().split("\r")[-1]


@pytest.fixture
def small_files():
    """Files may not grow beyond 4 KiB in this process, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_the_stores_errors_end_a_run(swarm, tmp_path, small_files):
    swarm(size=5)
    small_files()
    with pytest.raises(sk.StoreError, match="cannot write to the store"):
        texts(200).swarm.scatter("{t}", store=tmp_path / "store", progress=False)
    run = sk.last_run()
    ended = run.story().iloc[-1]
    assert ended["what"] == "run ended"
    assert ended["why"].startswith("StoreError: cannot write to the store")
    assert 0 < run.partial()["response"].notna().sum() < 200
