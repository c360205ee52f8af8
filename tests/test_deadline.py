"""``deadline=``: a run ends in time, with what is done, and the same call again goes on."""

from __future__ import annotations

import re
import time
import warnings
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from scripted import Call, Scripted
from virtual import Server, Virtual

import swarmkit as sk
from swarmkit.records import FailureKind

ASK = "a b c d e f {i}"  # with "echo:" eight tokens: 0.2 s
NOT_ASKED = re.compile(r"not asked: the deadline \d\d:\d\d:\d\d was reached")
NOT_ANSWERED = re.compile(r"not answered: the deadline \d\d:\d\d:\d\d was reached")
LATE_S = 1.0


@pytest.fixture(scope="module")
def slow() -> Iterator[sk.VLLMPool]:
    """Eight rows at a time, each for a fifth of a second: some forty rows a second."""
    with (
        sk.local(1, engine="echo", tokens_per_s=40, max_num_seqs=8) as swarm,
        sk.connect(swarm, batch=sk.BatchPolicy(max_size=8)) as pool,
    ):
        sk.scatter(frame(1), ASK, pool=pool, progress=False)  # what is learned about a server takes a while
        yield pool


def frame(rows: int) -> pd.DataFrame:
    return pd.DataFrame({"i": range(rows)}, index=[f"row {i}" for i in range(rows)])


def right(answers: pd.DataFrame) -> pd.DataFrame:
    """The rows with an answer, which must be the right one; the others must have been left by the deadline."""
    assert answers.index.tolist() == frame(len(answers)).index.tolist()
    done = answers["response"].notna()
    assert answers["response"][done].tolist() == [f"echo: a b c d e f {i}" for i in answers["i"][done]]
    assert answers["response_error"][done].isna().all()
    for error in answers["response_error"][~done].unique():
        assert NOT_ASKED.fullmatch(error) or NOT_ANSWERED.fullmatch(error)
    return answers[done]


def timed(call: Callable[[], Any]) -> tuple[Any, float, list[str]]:
    """What a call returns, its seconds, and its warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        began = time.monotonic()
        found = call()
        return found, time.monotonic() - began, [str(w.message) for w in caught]


# ---- the decision, in virtual time ------------------------------


@pytest.mark.parametrize("by_rows", [True, False])
def test_requests_stop_in_time_for_what_is_out(by_rows: bool) -> None:
    servers = [Server(row_s=1.0, slots=10) for _ in range(4)]
    run = Virtual(servers, 5000, max_size=10, max_in_flight=2, by_rows=by_rows, deadline=30.0).run()
    assert run.failure is not None
    assert run.failure.kind is FailureKind.DEADLINE
    assert set(run.met) == set(run.answered), "what was asked is answered"
    assert len(run.answered) >= 0.85 * 4 * 10 * 30


def test_a_slow_endpoint_is_closed_before_a_quick_one() -> None:
    servers = [Server(row_s=0.1, slots=10), Server(row_s=6.0, slots=10)]
    run = Virtual(servers, 5000, max_size=10, max_in_flight=2, deadline=20.0).run()
    assert set(run.met) == set(run.answered)
    assert len([row for row, index in run.answered.items() if index == 0]) >= 0.9 * 100 * 20
    assert 10 <= len([row for row, index in run.answered.items() if index == 1]) <= 30


def test_a_deadline_that_is_far_away_changes_nothing() -> None:
    ends = [
        Virtual([Server(row_s=0.5, slots=8) for _ in range(3)], 700, deadline=deadline).run()
        for deadline in (None, 10_000.0)
    ]
    assert ends[0] == ends[1]


def test_while_no_endpoint_is_up_the_run_waits_until_the_deadline() -> None:
    run = Virtual([Server(down=[(0.0, 1000.0)])], 10, deadline=50.0).run()
    assert run.time_s == 50.0
    assert run.failure is not None
    assert run.failure.kind is FailureKind.DEADLINE
    back = Virtual([Server(row_s=0.1, down=[(0.0, 40.0)])], 10, deadline=50.0).run()
    assert len(back.answered) == 10


def test_what_is_out_at_the_deadline_is_dropped() -> None:
    run = Virtual([Server(row_s=100.0, slots=5)], 20, deadline=50.0).run()
    assert (run.time_s, run.answered, bool(run.met)) == (50.0, {}, True)


# ---- scatter ------------------------------


@pytest.mark.parametrize("delivery", ["rows", "batch"])
def test_a_scatter_ends_in_time_with_what_is_done(slow: sk.VLLMPool, delivery: Any) -> None:
    ask: Callable[[], pd.DataFrame] = lambda: sk.scatter(  # noqa: E731
        frame(400), ASK, pool=slow, delivery=delivery, deadline=3.0, progress=False
    )
    answers, seconds, warned = timed(ask)
    done, stats = len(right(answers)), sk.last_run().stats
    assert seconds < 3.0 + LATE_S
    assert 20 <= done <= 200
    assert (stats.answered, stats.failed, stats.not_asked) == (done, 0, 400 - done)
    assert sk.last_run().state == "done"
    [said] = warned
    assert f"{400 - done} of 400 rows are left. Run the same command again" in said
    assert "only_missing=True asks only these rows" in said
    assert f"{400 - done} not asked" in repr(stats)
    assert sk.last_run().story()["why"].iloc[-1] in said


def test_with_a_store_the_same_call_goes_on(slow: sk.VLLMPool, tmp_path: Path) -> None:
    kept = 0
    for _ in range(10):
        ask: Callable[[], pd.DataFrame] = lambda: sk.scatter(  # noqa: E731
            frame(160), ASK, pool=slow, store=tmp_path, deadline=2.5, progress=False
        )
        answers, _, warned = timed(ask)
        stats = sk.last_run().stats
        assert stats.stored == kept, "what was answered before is not asked again"
        kept += stats.answered
        assert len(right(answers)) == kept
        if not stats.not_asked:
            break
        assert warned
    assert kept == 160


def test_only_missing_asks_what_is_left(slow: sk.VLLMPool) -> None:
    first, _, _ = timed(lambda: sk.scatter(frame(200), ASK, pool=slow, deadline=2.0, progress=False))
    done = len(right(first))
    assert 0 < done < 200
    answers = sk.scatter(first, ASK, pool=slow, only_missing=True, progress=False)
    assert (len(right(answers)), sk.last_run().stats.answered) == (200, 200 - done)


def test_moments(slow: sk.VLLMPool) -> None:
    for zone in (None, UTC):
        moment = datetime.now(zone) + timedelta(seconds=2)
        answers, seconds, _ = timed(
            lambda m=moment: sk.scatter(frame(300), ASK, pool=slow, deadline=m, progress=False)  # type: ignore[misc]
        )
        assert 0 < len(right(answers)) < 300
        assert seconds < 2.0 + LATE_S
    answers, _, [said] = timed(
        lambda: sk.scatter(frame(9), ASK, pool=slow, deadline=datetime(2026, 1, 2, 3, 4, 5), progress=False)
    )
    assert sk.last_run().stats.requests == 0
    assert "the deadline 2026-01-02 03:04:05 was reached: 9 of 9 rows are left" in said


def test_a_call_that_wants_all_rows_or_an_error_gets_one(slow: sk.VLLMPool) -> None:
    with pytest.raises(sk.ScatterError, match="rows are left") as caught:
        sk.scatter(frame(300), ASK, pool=slow, deadline=2.0, on_error="raise", progress=False)
    assert caught.value.frame is not None
    assert 0 < len(right(caught.value.frame)) < 300


@pytest.mark.parametrize("deadline", [0, -1.0, float("nan"), True, "tomorrow", timedelta(minutes=1)], ids=repr)
def test_what_is_no_deadline_is_refused(pool: sk.VLLMPool, deadline: Any) -> None:
    with pytest.raises(sk.SettingError, match=r"must be seconds above 0, a datetime, or \"slurm\" or \"pbs\""):
        sk.scatter(frame(1), ASK, deadline=deadline)


def test_rows_that_fail_are_not_those_that_are_left(slow: sk.VLLMPool) -> None:
    df = frame(300)
    df["i"] = [None, *range(299)]
    answers, _, [said] = timed(lambda: sk.scatter(df, ASK, pool=slow, deadline=2.0, progress=False))
    stats = sk.last_run().stats
    assert stats.failed == 1
    assert stats.not_asked == answers["response"].isna().sum() - 1
    assert "1 of 300 rows failed" in said
    assert f"{stats.not_asked} of 300 rows are left" in said


def test_a_server_that_says_nothing_does_not_hold_up_the_end() -> None:
    def silent(call: Call) -> None:
        call.wait_for_the_end()

    with Scripted(silent) as server, sk.VLLMPool([server.address]) as pool:
        answers, seconds, _ = timed(lambda: sk.scatter(frame(5), ASK, pool=pool, deadline=1.0, progress=False))
    assert right(answers).empty
    assert seconds < 1.0 + LATE_S


# ---- the other verbs ------------------------------


def test_iter_scatter_gives_each_row_once(slow: sk.VLLMPool) -> None:
    parts, seconds, warned = timed(
        lambda: list(sk.iter_scatter(frame(300), ASK, pool=slow, deadline=2.0, progress=False))
    )
    assert seconds < 2.0 + LATE_S
    answers = pd.concat(parts)
    assert sorted(answers.index) == sorted(frame(300).index)
    assert 0 < len(right(answers.loc[frame(300).index])) < 300
    assert "rows are left" in warned[0]


def test_a_deadline_holds_for_all_of_several_frames(slow: sk.VLLMPool) -> None:
    df = frame(300)
    pieces = [df.iloc[i : i + 30] for i in range(0, 300, 30)]
    parts, seconds, [said] = timed(
        lambda: list(sk.iter_scatter(iter(pieces), ASK, pool=slow, deadline=3.0, progress=False))
    )
    assert seconds < 3.0 + LATE_S
    assert [len(part) for part in parts] == [30] * 10
    done = len(right(pd.concat(parts)))
    assert 15 <= done < 300
    assert f"{300 - done} of 300 rows are left" in said
    assert parts[-1]["response_error"].str.fullmatch(NOT_ASKED).all()


def test_a_tree_goes_on_from_its_store(slow: sk.VLLMPool, tmp_path: Path) -> None:
    df = pd.DataFrame({"k": [i % 75 for i in range(300)], "t": [f"text {i}" for i in range(300)]})
    tree: Callable[..., pd.DataFrame] = lambda **more: sk.tree_reduce(  # noqa: E731
        df, "t", "{k} {responses}", by="k", fanin=2, pool=slow, store=tmp_path, progress=False, max_tokens=8, **more
    )
    first, seconds, [said, *_] = timed(lambda: tree(deadline=2.0))
    assert seconds < 2.0 + LATE_S
    assert first["response"].isna().any()
    assert first["response_error"].dropna().str.fullmatch(NOT_ASKED).all()
    assert re.search(r"[1-9]\d* of [1-9]\d* merges are left", said)
    answered = sk.last_run().stats.answered
    assert answered
    whole, _, _ = timed(tree)
    assert whole["response"].notna().all()
    assert sk.last_run().stats.stored == answered


def test_rows_of_several_models_end_together(tmp_path: Path) -> None:
    df = pd.DataFrame({"i": range(80), "who": ["a", "b"] * 40})
    with (
        sk.local(1, engine="echo", tokens_per_s=20, max_num_seqs=4, models=["a", "b"]) as swarm,
        sk.connect(swarm, model="a", batch=sk.BatchPolicy(max_size=4)) as pool,
    ):
        answers, seconds, warned = timed(
            lambda: sk.scatter(df, ASK, model="who", pool=pool, deadline=4.0, progress=False)
        )
    assert seconds < 4.0 + LATE_S
    stats = sk.last_run().stats
    assert 0 < stats.answered < 80
    assert stats.not_asked == answers["response"].isna().sum() == 80 - stats.answered
    assert "rows are left" in warned[-1]
