"""``deadline=``: a run ends in time, with what is done, and the same call again goes on."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import time
import warnings
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from command import command
from scripted import Call, Scripted
from virtual import Server, Virtual

import swarmkit as sk
from swarmkit.cli.parser import parser
from swarmkit.client.job_end import job_end
from swarmkit.records import FailureKind

ROOT = Path(sk.__file__).parents[1]
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


def test_a_submitted_run_and_an_awaited_one(slow: sk.VLLMPool) -> None:
    options: dict[str, Any] = {"pool": slow, "deadline": 1.5, "progress": False}
    run = sk.submit(frame(300), ASK, **options)
    with pytest.warns(sk.SwarmWarning, match="of 300 rows are left"):
        assert len(right(run.result())) < 300
    with pytest.warns(sk.SwarmWarning, match="of 300 rows are left"):
        assert len(right(asyncio.run(sk.ascatter(frame(300), ASK, **options)))) < 300


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


@pytest.mark.slow
@pytest.mark.parametrize("debias", [False, True])
def test_labels_go_on_from_their_store(debias: bool, tmp_path: Path) -> None:
    speed = {"latency_s": 0.2, "max_num_seqs": 4}
    with (
        sk.local(1, engine="echo", tokens_per_s=40, **speed) as swarm,
        sk.connect(swarm, batch=sk.BatchPolicy(max_size=4)) as pool,
    ):
        label: Callable[..., pd.DataFrame] = lambda **more: sk.classify(  # noqa: E731
            frame(30), ASK, ["yes", "no"], debias=debias, pool=pool, progress=False, **more
        )
        whole = label()
        answers, seconds, [said] = timed(lambda: label(store=tmp_path, deadline=1.5))
        stats, asked = sk.last_run().stats, 30 * (1 + debias)
        again, _, warned = timed(lambda: label(store=tmp_path))
        assert sk.last_run().stats.stored == stats.answered
    assert seconds < 1.5 + LATE_S
    assert 0 < stats.answered < asked
    assert (stats.failed, stats.not_asked) == (0, asked - stats.answered)
    noun = "prompts" if debias else "rows"
    assert f"{stats.not_asked} of {asked} {noun} are left. Run the same command again" in said
    assert "failed" not in said
    left = answers["label"].isna()
    assert left.any()
    for error in answers["label_error"][left].unique():
        assert NOT_ASKED.fullmatch(error) or NOT_ANSWERED.fullmatch(error)
    assert answers[["label", "label_p"]][~left].equals(whole[["label", "label_p"]][~left])
    assert (again["label"].tolist(), warned) == (whole["label"].tolist(), [])


def test_labels_of_a_server_that_says_nothing_do_not_hold_up_the_end() -> None:
    def silent(call: Call) -> None:
        call.wait_for_the_end()

    with Scripted(silent) as server, sk.VLLMPool([server.address], model="m") as pool:
        answers, seconds, [said] = timed(
            lambda: sk.classify(frame(5), ASK, ["yes", "no"], pool=pool, deadline=1.0, progress=False)
        )
    assert answers["label_error"].str.fullmatch(NOT_ASKED).all()
    assert seconds < 1.0 + LATE_S
    assert "5 of 5 rows are left" in said


def test_a_deadline_holds_for_all_models_together() -> None:
    with (
        sk.local(1, engine="echo", tokens_per_s=40, max_num_seqs=4, models=["tuned"]) as swarm,
        sk.connect(swarm, batch=sk.BatchPolicy(max_size=4)) as pool,
    ):
        sk.scatter(frame(2).assign(m=["echo", "tuned"]), ASK, model="m", pool=pool, progress=False)  # learned by now
        found, seconds, warned = timed(
            lambda: sk.compare_models(frame(120), ASK, ["echo", "tuned"], pool=pool, deadline=3.0, progress=False)
        )
    assert seconds < 3.0 + LATE_S
    right(found.frame.rename(columns={"response_echo": "response", "response_echo_error": "response_error"}))
    left = found.frame["response_tuned"].isna()
    assert found.frame["response_tuned_error"][left].str.contains("the deadline .* was reached").all()
    assert found.summary.loc["tuned", "answered"] == 120 - left.sum() < 40
    assert found.summary["failed"].tolist() == [0, 0]
    assert found.agreement.loc["echo", "tuned"] == 0 or left.all()
    assert f"{left.sum()} of 120 rows are left" in warned[-1]


# ---- the end of a job ------------------------------


@pytest.fixture
def says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Puts a program on PATH that prints a text if it is called with these words."""
    for name in ("SLURM_JOB_ID", "SLURM_JOB_END_TIME", "PBS_JOBID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    def program(name: str, words: str, text: str, code: int = 0) -> None:
        (tmp_path / "said").write_text(text)
        script = (
            f'#!/bin/sh\n[ "$*" = "{words}" ] || exit 9\ncat {tmp_path}/said {">&2" if code else ""}\nexit {code}\n'
        )
        (tmp_path / name).write_text(script)
        (tmp_path / name).chmod(0o755)

    return program


def left_s(ends: str) -> float:
    return (job_end(ends) - datetime.now(UTC)).total_seconds()


def test_the_end_of_a_slurm_job(says: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 500))
    assert left_s("slurm") == pytest.approx(500, abs=5)
    monkeypatch.delenv("SLURM_JOB_END_TIME")
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    for said, seconds in (("59:30\n", 3570), ("2:00:00\n", 7200), ("1-01:00:01\n", 90_001)):
        says("squeue", "-h -j 17 -o %L", said)
        assert left_s("slurm") == pytest.approx(seconds, abs=5)
    for said, code, words in (("UNLIMITED\n", 0, "'UNLIMITED'"), ("Invalid job id\n", 1, "Invalid job id")):
        says("squeue", "-h -j 17 -o %L", said, code)
        with pytest.raises(sk.SettingError, match=f"{words}.*give seconds or a datetime"):
            job_end("slurm")


@pytest.mark.parametrize("started", ["stime", "start_time"])
def test_the_end_of_a_pbs_job(says: Callable[..., None], monkeypatch: pytest.MonkeyPatch, started: str) -> None:
    monkeypatch.setenv("PBS_JOBID", "17.server")
    began = time.strftime("%a %b %e %H:%M:%S %Y", time.localtime(time.time() - 600))
    job = f"Job Id: 17.server\n    Job_Name = a = b\n    Resource_List.walltime = 01:00:00\n    {started} = {began}\n"
    says("qstat", "-f 17.server", f"{job}    Variable_List = PBS_O_HOME=/home/me,\n\tPBS_O_LANG=C\n")
    assert left_s("pbs") == pytest.approx(3000, abs=5)
    says("qstat", "-f 17.server", "Job Id: 17.server\n    job_state = R\n")
    with pytest.raises(sk.SettingError, match="walltime that can be read"):
        job_end("pbs")


@pytest.mark.parametrize(("ends", "variable"), [("slurm", "SLURM_JOB_ID"), ("pbs", "PBS_JOBID")])
def test_outside_of_a_job(
    says: Callable[..., None], pool: sk.VLLMPool, monkeypatch: pytest.MonkeyPatch, ends: Any, variable: str
) -> None:
    with pytest.raises(sk.SettingError, match=rf"\${variable} is not set: outside of a job, give seconds"):
        sk.scatter(frame(1), ASK, deadline=ends)
    monkeypatch.setenv(variable, "17")
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(sk.SettingError, match="does not say when the job ends"):
        sk.scatter(frame(1), ASK, deadline=ends)


def test_a_run_ends_before_its_job(slow: sk.VLLMPool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 4))  # of which a tenth is kept for the result
    answers, seconds, _ = timed(lambda: sk.scatter(frame(900), ASK, pool=slow, deadline="slurm", progress=False))
    assert 0 < len(right(answers)) < 900
    assert seconds < 4.0


# ---- the command line ------------------------------


@pytest.fixture
def asked(tmp_path: Path, slow: sk.VLLMPool) -> dict[str, Any]:
    """A table of 240 rows, and the words and the environment of commands that ask it."""
    frame(240).to_csv(tmp_path / "in.csv", index=False)
    hosts = tmp_path / "a.hostfile"
    hosts.write_text("".join(f"{e.name}\n" for e in slow.endpoints))
    env = {**os.environ, "TEST_KEY": slow.endpoints[0].key() or "", "NO_COLOR": "1", "PYTHONPATH": str(ROOT)}
    return {"words": ["--hostfile", hosts, "--api-key-env", "TEST_KEY", "--chunk-rows", 60], "env": env}


@pytest.mark.slow
def test_the_command_line_ends_with_a_code_of_its_own(asked: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    words = ["scatter", tmp_path / "in.csv", "--prompt", ASK, "-o", out, "--overwrite", "--store", tmp_path / "store"]
    words += asked["words"]
    first = command(*words, "--deadline", 3, env=asked["env"])
    assert first.returncode == 75, first.stderr
    assert re.search(r"reached: \d+ of 240 rows are left: run the same command again, the store has", first.stderr)
    assert re.search(r"240 rows, 0 failed, .*\d+ not asked", first.stderr)
    written = pd.read_json(out, lines=True)
    assert len(written) == 240
    left = written["response"].isna()
    assert 0 < left.sum() <= 240
    assert all(NOT_ASKED.fullmatch(e) or NOT_ANSWERED.fullmatch(e) for e in written["response_error"][left])
    again = command(*words, "--quiet", "--deadline", datetime.now(UTC).isoformat(), env=asked["env"])
    assert again.returncode == 75
    assert "240 of 240 rows are left" in again.stderr
    done = command(*words, env=asked["env"])
    assert done.returncode == 0, done.stderr
    assert re.search(rf"{240 - left.sum()} stored", done.stderr) or left.all()
    assert pd.read_json(out, lines=True)["response"].tolist() == [f"echo: a b c d e f {i}" for i in range(240)]
    refused = command(*words, "--deadline", "soon", env=asked["env"])
    assert refused.returncode == 2
    assert "'soon' is none of: seconds from now" in refused.stderr


@pytest.mark.slow
def test_a_tree_on_the_command_line(asked: dict[str, Any], tmp_path: Path) -> None:
    pd.DataFrame({"k": [i % 150 for i in range(600)], "t": "text"}).to_csv(tmp_path / "leaves.csv", index=False)
    words = ["tree-reduce", tmp_path / "leaves.csv", "--column", "t", "--by", "k", "--prompt", "{k} {responses}"]
    words += ["--fanin", 2, "-o", tmp_path / "top.csv", *asked["words"][:-2], "--deadline", 4]
    done = command(*words, env=asked["env"])
    assert done.returncode == 75, done.stderr
    assert "merges are left: run the same command again, with --store" in done.stderr
    assert len(pd.read_csv(tmp_path / "top.csv")) == 150


@pytest.mark.slow
def test_lines_of_a_batch_file_expire(asked: dict[str, Any], tmp_path: Path) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    with source.open("w") as file:
        for i in range(300):
            turns = [{"role": "user", "content": f"a b c d e f {i}"}]
            line = {"custom_id": f"task-{i}", "method": "POST", "url": "/v1/chat/completions"}
            file.write(json.dumps({**line, "body": {"messages": turns, "max_tokens": 16, "temperature": 0}}) + "\n")
    words = ["scatter", source, "-o", out, "--overwrite", "--store", tmp_path / "store", *asked["words"]]
    first = command(*words, "--deadline", 3, env=asked["env"])
    assert first.returncode == 75, first.stderr
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["custom_id"] for line in lines] == [f"task-{i}" for i in range(300)]
    assert {line["error"]["code"] for line in lines if line["error"]} == {"batch_expired"}
    assert command(*words, env=asked["env"]).returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize(("page", "number"), [("clusters.md", 0), ("clusters.md", 1), ("batch_files.md", 0)])
def test_the_job_scripts_of_the_docs_go_on_until_all_is_done(tmp_path: Path, page: str, number: int) -> None:
    """The script as it stands on the page; ``swarmkit`` says first that time is up, then that all is answered."""
    scripts = [
        s for s in re.findall(r"```bash\n(#!.*?)```", (ROOT / "docs" / page).read_text(), re.DOTALL) if "75" in s
    ]
    script, bin_, log = tmp_path / "scatter.pbs", tmp_path / "bin", tmp_path / "log"
    script.write_text(scripts[number])
    bin_.mkdir()
    says = {
        "swarmkit": f'echo "$@" >> {log}; [ "$(grep -c deadline {log})" -lt 3 ] && exit 75; exit 0',
        "scontrol": f'[ "$*" = "requeue 17" ] && bash {script}',
        "qsub": f'[ "$*" = scatter.pbs ] && bash {script}',
    }
    for name, text in says.items():
        (bin_ / name).write_text(f"#!/bin/bash\n{text}\n")
        (bin_ / name).chmod(0o755)
    env = {"PATH": f"{bin_}:{os.environ['PATH']}", "SLURM_JOB_ID": "17", "PBS_O_WORKDIR": str(tmp_path)}
    done = subprocess.run(["bash", script], env=env, capture_output=True, text=True, check=False, timeout=30)
    assert done.returncode == 75, done.stderr  # the first job's own; its successors ended well
    calls = log.read_text().splitlines()
    assert len(calls) == 3
    for call in calls:  # the real command takes these words
        words = re.sub(r"Summarise: \{abstract\}", "x", call).split()
        assert parser().parse_args(words).deadline in ("slurm", "pbs")
