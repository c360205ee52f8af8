"""Typed answers from servers that constrain them, ignore it, or refuse it: every row is valid or carries its error."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import pydantic
import pytest
from scripted import Call, Scripted

import swarmkit as sk

QUICK = sk.RetryPolicy(base_s=0.02, cap_s=0.2)
FIELDS = {"tone": ["pos", "neg"], "n": int, "note": str}
FRAME = pd.DataFrame({"q": [f"row {i} is {'pos' if i % 3 else 'neg'}" for i in range(200)]}, index=range(1000, 1200))


class Finding(pydantic.BaseModel):
    tone: Literal["pos", "neg"]
    n: int
    note: str


def connected(swarm: sk.LocalSwarm, **options: Any) -> sk.VLLMPool:
    return sk.connect(swarm, retry=QUICK, **options)


def stats() -> sk.RunStats:
    return sk.last_run().stats


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::swarmkit.SwarmWarning")
@pytest.mark.parametrize("mode", ["batch", "single"])
@pytest.mark.parametrize("constraints", ["obey", "chat", "old", "ignore", "refuse"])
def test_every_row_is_valid_or_has_its_error(constraints: str, mode: str) -> None:
    with sk.local(1, engine="echo", addresses=2, constraints=constraints) as swarm, connected(swarm):
        answers = FRAME.swarm.scatter("q", schema=FIELDS, mode=mode, schema_retries=1)
    valid = answers["response_error"].isna()
    assert answers.index.equals(FRAME.index)
    assert answers["response_tone"].dtype == pd.CategoricalDtype(["pos", "neg"])
    assert answers["response_n"].dtype == "Int64"
    for column in ("response_tone", "response_n", "response_note"):
        assert (answers[column].notna() == valid).all()
    assert answers["response"].notna().all(), "the text was paid for, valid or not"
    if constraints in ("ignore", "refuse"):
        assert not valid.any()
        assert answers["response_error"].str.startswith("not valid: ").all()
        assert (stats().invalid, stats().given_up) == (400, 200)
    else:
        assert valid.all()
        assert answers["response_n"].tolist() == list(range(200))
        assert answers["response_tone"].tolist() == ["neg" if i % 3 == 0 else "pos" for i in range(200)]


@pytest.mark.parametrize("schema", [Finding, Finding.model_json_schema()], ids=["pydantic", "json"])
def test_a_schema_may_be_a_model_or_json(echo: sk.LocalSwarm, schema: Any) -> None:
    with connected(echo):
        answers = FRAME.swarm.scatter("q", schema=schema)
    fields = FRAME.swarm.scatter("q", schema=FIELDS, pool=echo)
    pd.testing.assert_frame_equal(answers, fields)


@pytest.mark.filterwarnings("ignore:5 of 5 rows failed")
def test_a_server_that_holds_no_model_to_a_schema_is_said_once() -> None:
    with (
        sk.local(1, engine="echo", constraints="ignore") as swarm,
        connected(swarm),
        pytest.warns(sk.SwarmWarning, match="1 of 1 endpoint does not hold the model to the schema") as warned,
    ):
        FRAME[:5].swarm.scatter("q", schema=FIELDS)
    assert len([w for w in warned if "hold the model" in str(w.message)]) == 1


@pytest.mark.parametrize("delivery", ["rows", "batch"])
def test_invalid_answers_are_asked_again_alone_and_repaired(delivery: str) -> None:
    with (
        sk.local(1, engine="echo", addresses=2, faults=["invalid:probability=0.2,seed=1"]) as swarm,
        connected(swarm, delivery=delivery),
    ):
        answers = FRAME.swarm.scatter("q", schema=FIELDS, schema_retries=8)
    assert answers["response_error"].isna().all()
    assert answers["response_n"].tolist() == list(range(200))
    assert stats().repaired > 10
    assert stats().given_up == 0
    assert set(stats().batch_sizes) - {1} == {100}, "an invalid answer is asked again alone, never with its batch"


@pytest.mark.filterwarnings("ignore:.*hold the model to the schema")
@pytest.mark.parametrize(("temperature", "untold"), [(None, 2), (0, 1)])  # greedy, the same question is in vain
def test_what_was_wrong_is_told(temperature: float | None, untold: int) -> None:
    seen: list[str] = []

    def answer(call: Call) -> None:
        seen.extend(call.prompts)
        text = '{"n": 7}' if "not valid" in call.prompts[0] else '{"n": "seven"}'
        call.reply(json.dumps({"choices": [{"index": 0, "text": text, "finish_reason": "stop"}]}).encode())

    with Scripted(answer) as server, sk.VLLMPool([server.address], model="m", retry=QUICK, delivery="batch") as pool:
        answers = pd.DataFrame({"q": ["how many?"]}).swarm.scatter(
            "q", schema={"n": int}, pool=pool, temperature=temperature
        )
    assert answers["response_n"].tolist() == [7]
    asked = [prompt for prompt in seen if "how many" in prompt]
    assert asked[:untold] == ["how many?"] * untold
    assert asked[untold].startswith(
        "how many?\n\nYour last answer was not valid: n must be a whole number; got 'seven'"
    )


@pytest.mark.filterwarnings("ignore:3 of 3 rows failed")
def test_an_answer_cut_short_says_so(echo: sk.LocalSwarm) -> None:
    with connected(echo):
        answers = FRAME[:3].swarm.scatter("q", schema=FIELDS, max_tokens=3, schema_retries=0)
    assert answers["response_error"].tolist() == ["not valid: cut off at max_tokens=3"] * 3


def test_a_lone_label_and_a_lone_number_fill_the_column_itself(echo: sk.LocalSwarm) -> None:
    with connected(echo):
        tones = FRAME.swarm.scatter("q", schema=["pos", "neg"])
        counts = FRAME.swarm.scatter("q", schema=int, out="count")
    assert tones["response"].dtype == pd.CategoricalDtype(["pos", "neg"])
    assert tones["response"].tolist() == ["neg" if i % 3 == 0 else "pos" for i in range(200)]
    assert counts["count"].dtype == "Int64"
    assert counts["count"].notna().all()


def test_rows_that_are_not_valid_are_those_that_are_missing(echo: sk.LocalSwarm) -> None:
    frame = FRAME[:4].assign(response=['{"n": 1}', "junk", None, '{"n": 4}'])
    with connected(echo):
        answers = frame.swarm.scatter("q", schema={"n": int}, only_missing=True)
    assert answers["response_n"].tolist() == [1, 1, 2, 4]
    assert (stats().kept, stats().answered) == (2, 2)


def test_a_run_with_a_schema_is_resumed_and_asks_nothing_twice(echo: sk.LocalSwarm, tmp_path: Any) -> None:
    with connected(echo):
        FRAME[:120].swarm.scatter("q", schema=FIELDS, store=tmp_path)
        answers = FRAME.swarm.scatter("q", schema=FIELDS, store=tmp_path)
        assert (stats().stored, stats().answered) == (120, 80)
        assert answers["response_n"].tolist() == list(range(200))
        FRAME.swarm.scatter("q", schema={"n": int}, store=tmp_path)
        assert stats().stored == 0, "an answer to another schema is another answer"


KILLED = """
    import sys, pandas as pd, swarmkit as sk
    host, port, key, store = sys.argv[1:]
    frame = pd.DataFrame({"q": [f"row {i} is {'pos' if i % 3 else 'neg'}" for i in range(200)]})
    fields = {"tone": ["pos", "neg"], "n": int, "note": str}
    with sk.connect(sk.AgentEndpoint(host, int(port), api_key=key), batch=sk.BatchPolicy(max_size=10)):
        frame.swarm.scatter("q", schema=fields, store=store, progress=False)
"""


@pytest.mark.slow
def test_a_run_with_a_schema_that_was_killed_asks_only_for_what_is_missing(tmp_path: Any) -> None:
    with sk.local(1, engine="echo", tokens_per_s=100.0, max_num_seqs=10) as swarm, connected(swarm):
        end = swarm.endpoints[0]
        child = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(KILLED), end.host, str(end.port), str(end.key()), str(tmp_path)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        deadline = time.monotonic() + 60
        while sum(segment.read_text().count('"key"') for segment in tmp_path.glob("*.jsonl")) < 25:
            assert child.poll() is None, "it was to be killed in the middle"
            assert time.monotonic() < deadline
            time.sleep(0.01)
        child.kill()
        child.wait()
        answers = FRAME.swarm.scatter("q", schema=FIELDS, store=tmp_path)
    assert 25 <= stats().stored < 200
    assert stats().answered == 200 - stats().stored, "what is stored is not asked for again"
    assert answers["response_n"].tolist() == list(range(200))


def test_names_and_backends(echo: sk.LocalSwarm) -> None:
    with connected(echo):
        bare = FRAME.swarm.scatter("q", schema=FIELDS, prefix=False)
        assert bare.columns.tolist() == ["q", "response", "response_error", "tone", "n", "note"]
        arrow = FRAME.swarm.scatter("q", schema=FIELDS, dtype_backend="pyarrow")
        assert str(arrow["response_n"].dtype) == "int64[pyarrow]"
        merged = FRAME.assign(g=1).swarm.tree_reduce("q", "{responses}", by="g", fanin=2, schema=FIELDS)
        assert merged["response_n"].dtype == "Int64"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schema": {"q": int}, "prefix": False}, "prefix=False would overwrite 'q'"),
        ({"schema": {"error": str}}, "would be the column 'response_error'"),
        ({"schema": {"n": int}, "n": 2}, r"schema= works with one sample a row \(n=1\), not with n=2"),
        ({"schema": {"n": int}, "regex": "a"}, "schema= and regex= were given"),
        ({"schema": {"n": int}, "schema_retries": -1}, "schema_retries=-1: must be a whole number"),
        ({"schema": {"q": int}, "prefix": False, "only_missing": True}, "prefix=False would overwrite 'q'"),
        ({"schema": int, "extra_body": {"response_format": {}}}, "extra_body holds response_format, and schema="),
        ({"extra_body": {"guided_json": {}}}, "guided_json in extra_body is ignored by vLLM .*Use schema="),
        ({"schema": {"n": int}, "dtype_backend": "arrow"}, "dtype_backend='arrow'"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_sent(
    echo: sk.LocalSwarm, options: dict[str, Any], message: str
) -> None:
    with connected(echo), pytest.raises(sk.SettingError, match=message):
        FRAME.swarm.scatter("q", **options)


@pytest.mark.filterwarnings("ignore:1 of 2 endpoints does not hold the model")
def test_a_row_is_asked_again_at_a_server_that_holds_the_model_to_the_schema() -> None:
    with (
        sk.local(1, engine="echo") as obeys,
        sk.local(1, engine="echo", constraints="ignore") as ignores,
        sk.connect([*obeys.endpoints, *ignores.endpoints], retry=QUICK),
    ):
        answers = FRAME.swarm.scatter("q", schema=FIELDS, schema_retries=1)
    assert answers["response_error"].isna().all()
    assert stats().repaired > 0


@pytest.mark.filterwarnings("ignore:3 of 3 rows failed")
def test_a_number_that_was_cut_off_is_no_answer(echo: sk.LocalSwarm) -> None:
    with connected(echo):
        cut = FRAME[:3].swarm.scatter("q", schema=int, max_tokens=1, schema_retries=0)
        label = FRAME[:3].swarm.scatter("q", schema=["pos", "neg"], max_tokens=1)
    assert cut["response"].isna().all()
    assert cut["response_error"].tolist() == ["not valid: cut off at max_tokens=1"] * 3
    assert label["response"].notna().all(), "a label that is no other's beginning is whole"


@pytest.mark.filterwarnings("ignore:2 of 4 rows failed")
def test_a_stored_answer_that_is_not_valid_any_more_is_asked_again(echo: sk.LocalSwarm, tmp_path: Any) -> None:
    def model(least: int) -> type[pydantic.BaseModel]:
        class Found(pydantic.BaseModel):
            n: int

            @pydantic.field_validator("n")
            @classmethod
            def check(cls, n: int) -> int:
                if n < least:
                    raise ValueError("it is too small")
                return n

        return Found

    with connected(echo):
        FRAME[:4].swarm.scatter("q", schema=model(0), store=tmp_path)
        answers = FRAME[:4].swarm.scatter("q", schema=model(2), store=tmp_path, schema_retries=0)
    assert (stats().stored, stats().given_up) == (2, 2)
    assert answers["response_n"].tolist() == [pd.NA, pd.NA, 2, 3]
    assert answers["response_error"][1000] == "not valid: n is not valid: it is too small; got 0"


@pytest.mark.filterwarnings("ignore:8 of 8 rows failed")
def test_a_run_over_several_frames_warns_once_and_counts_what_is_not_valid() -> None:
    with (
        sk.local(1, engine="echo", constraints="ignore") as swarm,
        connected(swarm) as pool,
        pytest.warns(sk.SwarmWarning, match="16 of 16 answers were not") as warned,
    ):
        list(sk.iter_scatter([FRAME[:4], FRAME[4:8]], "q", schema=FIELDS, schema_retries=1, pool=pool))
    assert len([w for w in warned if "hold the model" in str(w.message)]) == 1


@pytest.mark.filterwarnings("ignore:1 of the merges failed")
def test_the_only_text_of_a_group_is_valid_or_has_its_error(echo: sk.LocalSwarm) -> None:
    frame = pd.DataFrame({"g": ["a", "a", "b", "c"], "t": ["pos", "neg", "junk", '{"tone": "pos"}']})
    with connected(echo):
        merged = frame.swarm.tree_reduce("t", "{responses}", by="g", schema={"tone": ["pos", "neg"]})
        with pytest.raises(sk.SettingError, match="would be the column 'n_leaves'"):
            frame.swarm.tree_reduce("t", "{responses}", by="g", schema={"n_leaves": int}, prefix=False)
    assert merged["response_tone"].notna().tolist() == [True, False, True]
    assert merged["response_error"].notna().tolist() == [False, True, False]
    assert "the only text of its group" in merged["response_error"][1]


def test_one_bad_answer_to_a_probe_is_chance() -> None:
    with sk.local(1, engine="echo", faults=["invalid:first=1"]) as swarm, connected(swarm):
        FRAME[:4].swarm.scatter("q", schema=int)
    assert any("constrained by structured_outputs" in route for route in stats().routes)
    assert stats().invalid == 0


@pytest.mark.filterwarnings("ignore:.*hold the model to the schema", "ignore:1 of 1 row failed")
def test_an_answer_stays_when_the_row_fails_otherwise_later() -> None:
    seen: list[str] = []

    def answer(call: Call) -> None:
        seen.extend(call.prompts)
        if seen.count("how many?") > 1:
            call.reply(b'{"error": {"message": "no more"}}', status="400 Bad Request")
        else:
            call.reply(json.dumps({"choices": [{"index": 0, "text": "seven", "finish_reason": "stop"}]}).encode())

    with Scripted(answer) as server, sk.VLLMPool([server.address], model="m", retry=QUICK, delivery="batch") as pool:
        answers = pd.DataFrame({"q": ["how many?"]}).swarm.scatter("q", schema={"n": int}, pool=pool)
    assert answers["response"].tolist() == ["seven"]
    assert answers["response_error"].str.contains("no more").all()
    assert answers["response_n"].isna().all()
    assert (stats().invalid, stats().repaired, stats().given_up, stats().failed) == (1, 0, 1, 1)


@pytest.mark.slow
def test_an_endpoint_that_hangs_when_it_is_asked_for_a_form_holds_nothing_up_for_long(echo: sk.LocalSwarm) -> None:
    def answer(call: Call) -> None:
        if {"structured_outputs", "response_format", "guided_regex"} & call.body.keys():
            call.wait_for_the_end()
        else:
            call.answer()

    with Scripted(answer) as server, sk.VLLMPool([server.address, *echo.endpoints], retry=QUICK) as pool:
        began = time.monotonic()
        answers = FRAME[:20].swarm.scatter("q", schema=int, pool=pool)
        first_s = time.monotonic() - began
        FRAME[:20].swarm.scatter("q", schema=int, pool=pool)
        second_s = time.monotonic() - began - first_s
    assert answers["response"].notna().all()
    assert first_s < 15
    assert second_s < 4, "it is not waited for again"


def command(swarm: sk.LocalSwarm, folder: Path, words: str) -> int:
    """Run ``swarmkit scatter`` in a folder."""
    (folder / "hosts").write_text("".join(f"{e.name}\n" for e in swarm.endpoints))
    key = swarm.endpoints[0].api_key.reveal("")
    environment = {**os.environ, "PYTHONPATH": str(Path(sk.__file__).parents[1]), "TEST_KEY": key}
    given = [*f"scatter {words} --prompt q --hostfile hosts --api-key-env TEST_KEY".split()]
    return subprocess.run(
        [sys.executable, "-m", "swarmkit", *given], cwd=folder, env=environment, timeout=90
    ).returncode


@pytest.mark.slow
def test_the_command_line_keeps_the_booleans_of_rows_that_it_does_not_ask(echo: sk.LocalSwarm, tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text('q,response,response_error,response_ok\nrow 0,,,\nrow 1,"{""ok"": true}",,True\n')
    assert command(echo, tmp_path, "in.csv -o out.csv --limit 1 --schema ok=bool") == 0
    assert pd.read_csv(tmp_path / "out.csv")["response_ok"].notna().all()


@pytest.mark.slow
def test_lists_are_written_to_parquet_where_the_first_rows_have_none(tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text("q\nrow 0\nrow 1\n")
    with sk.local(1, engine="echo", faults=["invalid:marker=row 0"]) as swarm:
        assert command(swarm, tmp_path, "in.csv -o out.parquet --chunk-rows 1 --schema words=list[str]") == 1
    found = pd.read_parquet(tmp_path / "out.parquet")
    assert found["response_error"].notna().tolist() == [True, False]
    assert all(isinstance(word, str) for word in found["response_words"][1])
