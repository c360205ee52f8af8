"""Endpoints of several models, LoRA adapters too: each call, or each row, goes to those that have its model."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import swarmkit as sk

QUICK = sk.RetryPolicy(base_s=0.02, cap_s=0.2, give_up_s=3)
INDEX = pd.Index([f"row {i}" for i in range(90)], name="key")
FRAME = pd.DataFrame({"q": [f"question {i % 30}" for i in range(90)], "who": ["echo", "sql", "myna"] * 30}, INDEX)
ANSWERS = [f"{'echo' if who == 'myna' else who}: {q}" for q, who in zip(FRAME["q"], FRAME["who"], strict=True)]


@pytest.fixture(scope="module")
def swarms() -> Iterator[list[sk.LocalSwarm]]:
    """Two endpoints of a model with two adapters, and one of another model."""
    with (
        sk.local(1, engine="echo", addresses=2, models=["sql", "poems"]) as one,
        sk.local(1, engine="echo", model="myna") as other,
    ):
        yield [one, other]


@pytest.fixture
def pool(swarms: list[sk.LocalSwarm]) -> Iterator[sk.VLLMPool]:
    with sk.connect(swarms, retry=QUICK) as pool:
        yield pool


def test_the_pool_says_which_models_there_are(pool: sk.VLLMPool) -> None:
    listed = "echo (2 endpoints), sql (2 endpoints), poems (2 endpoints), myna (1 endpoint)"
    assert pool.models == {"echo": 2, "sql": 2, "poems": 2, "myna": 1}
    assert listed in repr(pool)
    assert listed in pool._repr_html_()
    with pytest.raises(
        sk.SettingError, match=re.escape(f"list 4 models; say which one to use, as model=...: {listed}")
    ):
        FRAME.swarm.scatter("q")


@pytest.mark.parametrize("mode", ["batch", "single"])
@pytest.mark.parametrize(("model", "said", "size"), [("sql", "sql", 2), ("echo", "echo", 2), ("myna", "echo", 1)])
def test_a_call_goes_to_the_endpoints_that_have_its_model(
    pool: sk.VLLMPool, model: str, said: str, size: int, mode: str
) -> None:
    answers = FRAME.swarm.scatter("q", model=model, mode=mode, temperature=0)
    assert answers["response"].tolist() == (f"{said}: " + FRAME["q"]).tolist()
    assert len(sk.last_run().stats.endpoints) == size
    assert FRAME.swarm.preview("q", rows=1, model=model)["tokens"].notna().all()
    assert len(sk.broadcast("Hi", model=model)) == size
    merged = FRAME.swarm.tree_reduce("q", "{responses}", model=model)
    assert merged["response"][0].startswith(said)


@pytest.mark.parametrize("mode", ["batch", "single"])
def test_rows_of_several_models_come_back_as_one_frame(pool: sk.VLLMPool, mode: str) -> None:
    answers = FRAME.swarm.scatter("q", model="who", mode=mode, temperature=0, details=True)
    one = FRAME.swarm.scatter("q", model="echo", mode=mode, temperature=0, details=True)
    assert answers["response"].tolist() == ANSWERS
    assert answers["response_error"].isna().all()
    assert answers.index.equals(FRAME.index)
    assert answers.dtypes.equals(one.dtypes)
    of_myna = answers["response_endpoint"] == pool.endpoints[2].name
    assert of_myna.tolist() == (FRAME["who"] == "myna").tolist(), "the endpoints are those of the whole pool"
    assert answers["response_attempts"].tolist() == one["response_attempts"].tolist()
    FRAME.swarm.scatter("q", model="who", mode=mode, temperature=0)
    stats = sk.last_run().stats
    assert (stats.rows, stats.answered, stats.reused, stats.failed) == (90, 30, 60, 0), "each prompt once a model"
    assert sum(e.rows for e in stats.endpoints) == 30
    assert [e.name for e in stats.endpoints] == [e.name for e in pool.endpoints]
    assert {route.split(":")[0] for route in stats.routes} == {"echo", "sql", "myna"}
    assert sk.last_run().story(row="row 0")["what"].isin(["run started", "sent", "answered", "reused"]).all()


def test_rows_come_as_they_finish_and_in_pieces_whatever_their_model(pool: sk.VLLMPool) -> None:
    rows = pd.concat(FRAME.swarm.iter_scatter("q", model="who"))
    assert rows.loc[INDEX, "response"].tolist() == ANSWERS
    pieces = list(sk.iter_scatter([FRAME[:40], FRAME[40:]], "q", model="who"))
    assert pd.concat(pieces)["response"].tolist() == ANSWERS


def test_rows_without_a_prompt_are_counted_whatever_their_model(pool: sk.VLLMPool) -> None:
    frame = FRAME[:3].assign(q=["one", None, "three"])
    with pytest.warns(sk.SwarmWarning, match="1 of 3 rows failed"):
        frame.swarm.scatter("q", model="who")
    stats = sk.last_run().stats
    assert (stats.answered, stats.failed, stats.skipped) == (2, 1, 1)


def test_rows_without_a_model_that_is_served_say_so(pool: sk.VLLMPool) -> None:
    frame = FRAME[:6].assign(who=["echo", None, "sqk", "myna", 7, "sql"])
    with pytest.warns(sk.SwarmWarning, match="3 of 6 rows failed"):
        answers = frame.swarm.scatter("q", model="who")
    assert answers["response"].notna().tolist() == [True, False, False, True, False, True]
    errors = answers["response_error"].tolist()
    assert errors[1] == "missing value in column 'who', which names the model"
    assert errors[2] == "model='sqk': no server lists it; the nearest of 4: sql, poems, echo"
    assert errors[4].startswith("model='7': no server lists it; the nearest of 4: ")
    assert sk.last_run().stats.failed == 3
    kept = answers.assign(who="echo").swarm.scatter("q", model="who", only_missing=True)
    assert kept["response"].tolist()[4:] == ["echo: question 4", "sql: question 5"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "mina"}, "model='mina': no server lists it; the nearest of 4: myna, "),
        ({"model": "mina"}, "and no column of the frame is called so"),
        ({"model": ""}, "model='': must be the name of a model"),
        ({"model": 3}, "model=3: must be the name of a model"),
    ],
)
def test_a_model_that_is_not_there_is_refused(pool: sk.VLLMPool, options: dict[str, Any], message: str) -> None:
    with pytest.raises(sk.SettingError, match=re.escape(message)):
        FRAME.swarm.scatter("q", **options)
    if "frame" not in message:
        with pytest.raises(sk.SettingError, match=re.escape(message)):
            FRAME.swarm.tree_reduce("q", "{responses}", **options)


def test_a_model_is_preferred_to_a_column_of_its_name(pool: sk.VLLMPool) -> None:
    answers = FRAME.rename(columns={"who": "sql"}).swarm.scatter("q", model="sql")
    assert answers["response"].str.startswith("sql: ").all()


def test_models_that_share_endpoints_are_not_asked_at_once(swarms: list[sk.LocalSwarm]) -> None:
    with sk.connect(swarms, retry=QUICK) as pool:
        FRAME.swarm.scatter("q", model="who", pool=pool, dedup=False)
    requests = sk.last_run().stats.timeline()
    shared = requests[requests["endpoint"] != pool.endpoints[2].name]
    assert len(shared) == 4
    first, second = shared.sort_values("start_s").iloc[[0, 1]], shared.sort_values("start_s").iloc[[2, 3]]
    assert first["end_s"].max() <= second["start_s"].min()


def test_a_resumed_call_asks_nothing_twice(pool: sk.VLLMPool, tmp_path: Path) -> None:
    first = FRAME.swarm.scatter("q", model="who", store=tmp_path)
    assert sk.last_run().stats.answered == 90
    again = FRAME.swarm.scatter("q", model="who", store=tmp_path)
    assert (sk.last_run().stats.requests, sk.last_run().stats.stored) == (0, 90)
    pd.testing.assert_frame_equal(first, again)
    FRAME[FRAME["who"] == "sql"].swarm.scatter("q", model="sql", store=tmp_path)
    assert sk.last_run().stats.requests == 0, "the model by name has the answers of the model by row"
    FRAME[:30].swarm.scatter("q", model="poems", store=tmp_path)
    assert sk.last_run().stats.answered == 30


@pytest.mark.filterwarnings("ignore:30 of 90 rows failed")
def test_a_model_whose_endpoints_are_gone_costs_its_rows_only(swarms: list[sk.LocalSwarm]) -> None:
    with sk.local(1, engine="echo", model="myna") as other, sk.connect([swarms[0], other], retry=QUICK) as pool:
        other.stop()
        answers = FRAME.swarm.scatter("q", model="who", pool=pool)
    lost = FRAME["who"] == "myna"
    assert answers["response"].isna().tolist() == lost.tolist()
    assert answers.loc[lost, "response_error"].str.startswith("no endpoint is left that has the model myna: ").all()


def test_the_command_line_takes_the_model_of_each_row_from_a_column(tmp_path: Path) -> None:
    FRAME[:3].assign(who=["echo", "sql", "sql"]).to_csv(tmp_path / "in.csv", index=False)
    with sk.local(1, engine="echo", models=["sql"], token="k") as swarm:
        words = ["in.csv", "-o", "out.csv", "--prompt", "q", "--model", "who", "--url", swarm.urls[0]]
        command = [sys.executable, "-m", "swarmkit", "scatter", *words, "--api-key-env", "THE_KEY"]
        env = {**os.environ, "THE_KEY": "k", "PYTHONPATH": str(Path(sk.__file__).parents[1])}
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    answers = pd.read_csv(tmp_path / "out.csv")["response"].tolist()
    assert answers == ["echo: question 0", "sql: question 1", "sql: question 2"]


def test_models_are_compared_by_their_values(pool: sk.VLLMPool, tmp_path: Path) -> None:
    frame = FRAME[:20].assign(q=[f"row {i} is {'pos' if i % 4 else 'neg'}" for i in range(20)])
    options: dict[str, Any] = {"schema": {"tone": ["pos", "neg"], "n": int}, "store": tmp_path}
    found = sk.compare_models(frame, "q", ["echo", "sql", "myna"], **options)
    assert found.frame.index.equals(frame.index)
    assert found.frame["response_sql_n"].dtype == "Int64"
    assert found.frame["response_myna_tone"].dtype == pd.CategoricalDtype(["pos", "neg"])
    assert (found.agreement == 1).all(axis=None)
    assert found.differing.empty
    assert found.summary["answered"].tolist() == [20] * 3
    assert (found.summary["completion_tokens"] > 0).all()
    again = sk.compare_models(frame, "q", ["echo", "sql", "myna"], **options)
    assert again.summary["completion_tokens"].tolist() == [0] * 3
    pd.testing.assert_frame_equal(again.frame, found.frame)
    texts = sk.compare_models(frame, "q", ["echo", "sql", "myna"], out="a", progress=False)
    assert texts.agreement.loc["echo"].tolist() == [1, 0, 1]
    assert texts.differing.columns.tolist() == ["echo", "sql", "myna"]
    assert len(texts.differing) == 20
    assert repr(texts) == "<ModelComparison of 3 models on 20 rows; 20 rows answered differently>"
    assert "completion_tokens" in texts._repr_html_()


@pytest.mark.parametrize(
    ("models", "message"),
    [
        (["echo"], "models=['echo']: must be a list of two models or more, none of them twice"),
        (["echo", "echo"], "none of them twice"),
        ("echo", "models='echo': must be a list"),
        (["echo", "mina"], "model='mina': no server lists it"),
        (["a", "a_error"], "the models 'a' and 'a_error' would both have the column 'response_a_error'"),
    ],
)
def test_models_that_cannot_be_compared_are_refused(pool: sk.VLLMPool, models: Any, message: str) -> None:
    with pytest.raises(sk.SettingError, match=re.escape(message)):
        sk.compare_models(FRAME, "q", models)
    with pytest.raises(TypeError, match="compare_models takes no n=, which"):
        sk.compare_models(FRAME, "q", models, n=2)  # type: ignore[call-arg]


def test_no_model_is_asked_where_a_name_of_another_is_taken(pool: sk.VLLMPool) -> None:
    run = FRAME[:2].swarm.submit("q", model="echo")
    run.result()
    with pytest.raises(sk.SettingError, match="would overwrite 'response_sql' of the frame"):
        sk.compare_models(FRAME[:2].assign(response_sql="mine"), "q", ["echo", "sql"])
    assert sk.last_run() is run, "nothing was asked"
    found = sk.compare_models(FRAME[:2].assign(response_sql="mine"), "q", ["echo", "sql"], overwrite=True)
    assert found.frame["response_sql"].iloc[0].startswith("sql: ")


def test_labels_are_asked_of_the_model_of_the_call(pool: sk.VLLMPool) -> None:
    labels = FRAME.swarm.classify("q", ["yes", "no"], model="myna")
    assert labels["label"].notna().all()
    assert len(sk.last_run().stats.endpoints) == 1


@pytest.mark.filterwarnings("ignore:1 of 2 rows failed")
def test_a_model_that_cannot_be_asked_so_costs_its_own_rows_alone() -> None:
    df = pd.DataFrame({"q": ["a", "b"], "who": ["deep", "flat"]})
    with (
        sk.local(1, engine="echo", model="deep", thinking=True) as one,
        sk.local(1, engine="echo", model="flat") as other,
        sk.connect([one, other], retry=QUICK) as pool,
    ):
        answers = df.swarm.scatter("q", model="who", thinking=False, pool=pool)
        with pytest.raises(sk.SettingError, match="has no switch"):
            df.iloc[1:].swarm.scatter("q", model="who", thinking=False, pool=pool)
    assert answers["response"].tolist()[0] == "echo: a"
    assert "model flat: thinking=False: the chat template of flat has no switch" in answers["response_error"][1]
