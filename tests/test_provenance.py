"""What a frame knows of its answers: nothing is overwritten, each record is true, and rows can be looked at."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import swarmkit as sk

GENES = pd.DataFrame({"gene": ["lacZ", "recA", "BAD"]})
ASK = "What does {gene} do?"
pytestmark = pytest.mark.filterwarnings("ignore:.*rows? failed")


@pytest.fixture(scope="module")
def strict() -> Iterator[sk.LocalSwarm]:
    """An endpoint that refuses prompts with BAD."""
    with sk.local(1, engine="echo", faults=["http_400:marker=BAD"]) as swarm:
        yield swarm


def refused(call: Any) -> str:
    with pytest.raises(sk.SettingError) as caught:
        call()
    return str(caught.value)


# ---- overwriting ------------------------------


def test_a_cell_may_run_again(pool: sk.VLLMPool) -> None:
    df = GENES.swarm.scatter(ASK, details=True, max_tokens=64)
    again = df.swarm.scatter(ASK, details=True, max_tokens=64)
    assert again["response"].tolist() == df["response"].tolist()
    for verb in (
        lambda df: df.swarm.classify(ASK, ["yes", "no"], details=True),
        lambda df: df.swarm.filter(ASK, return_all=True),
        lambda df: df.swarm.embed("gene"),
        lambda df: df.swarm.pipeline([sk.Step("a", ASK), sk.Step("b", "{a}?")]),
        lambda df: df.swarm.scatter(ASK, schema={"n": int}, prefix=False, schema_retries=0),
    ):
        assert list(verb(verb(df)).columns) == list(verb(df).columns)


@pytest.mark.parametrize(
    "lose",
    [
        lambda df, tmp: df.merge(pd.DataFrame({"gene": GENES["gene"], "z": 1}), on="gene"),
        lambda df, tmp: pd.concat([df, pd.DataFrame({"z": range(3)})], axis=1),
        lambda df, tmp: pd.concat([df.iloc[:1], GENES.iloc[1:].swarm.scatter("{gene}")]),
        lambda df, tmp: pd.read_csv((df.to_csv(tmp / "a.csv", index=False), tmp / "a.csv")[1]),
        lambda df, tmp: pd.DataFrame(df.to_dict("list")),
    ],
    ids=["merge", "concat", "rows", "csv", "dict"],
)
@pytest.mark.parametrize("details", [False, True])
def test_it_may_also_where_pandas_has_lost_the_record(
    pool: sk.VLLMPool, tmp_path: Path, lose: Any, details: bool
) -> None:
    df = lose(GENES.swarm.scatter(ASK, details=details), tmp_path)
    df.attrs.clear()
    answers = df.swarm.scatter("Again: {gene}", details=details)
    assert answers["response"].tolist() == ["echo: Again: lacZ", "echo: Again: recA", "echo: Again: BAD"]
    assert list(answers.columns) == list(df.columns)


@pytest.mark.parametrize(
    ("frame", "call", "name"),
    [
        ({"a": 1}, lambda df: df.swarm.scatter(ASK, out="a"), "out='a' would overwrite 'a'"),
        ({"response": "mine"}, lambda df: df.swarm.scatter(ASK), "'response' of the frame"),
        ({"response_error": "mine"}, lambda df: df.swarm.scatter(ASK), "'response_error' of the frame"),
        ({"response_attempts": 1}, lambda df: df.swarm.scatter(ASK, details=True), "'response_attempts' of the frame"),
        ({"mass": 1.0, "mass_error": 0.1}, lambda df: df.swarm.scatter(ASK, out="mass"), "'mass' of the frame"),
        ({"response_n": 1}, lambda df: df.swarm.scatter(ASK, schema={"n": int}), "'response_n' of the frame"),
        ({"n": 1}, lambda df: df.swarm.scatter(ASK, schema={"n": int}, prefix=False), "prefix=False would overwrite"),
        ({"embedding": 1}, lambda df: df.swarm.embed("gene"), "'embedding' of the frame"),
        ({"b": 1}, lambda df: df.swarm.pipeline([sk.Step("b", ASK)]), "'b' of the frame"),
        ({"label": 1}, lambda df: df.swarm.classify(ASK, ["a", "b"]), "'label' of the frame"),
        ({}, lambda df: df.swarm.scatter(ASK, out="gene"), "out='gene' would overwrite 'gene', which the prompt reads"),
        ({}, lambda df: df.swarm.pipeline([sk.Step("gene", ASK)]), "'gene', which the prompt reads"),
        ({}, lambda df: df.swarm.scatter(lambda row: row.gene, out="gene"), "'gene', which the prompt reads"),
        ({}, lambda df: df.swarm.scatter(lambda row: row["gene"], out="gene"), "'gene', which the prompt reads"),
        ({}, lambda df: df.swarm.scatter("Q: " + df["gene"], out="gene"), "'gene', which the prompt reads"),
        ({}, lambda df: list(df.swarm.iter_scatter(ASK, out="gene")), "'gene', which the prompt reads"),
        ({}, lambda df: df.swarm.submit("gene", out="gene"), "'gene', which the prompt reads"),
    ],
)
def test_columns_of_others_are_not_overwritten(pool: sk.VLLMPool, frame: Any, call: Any, name: str) -> None:
    df = GENES.assign(**frame)
    words = refused(lambda: call(df))
    assert name in words
    assert "overwrite=True" in words


def test_answers_that_the_prompt_reads_are_not_overwritten(pool: sk.VLLMPool) -> None:
    df = GENES.swarm.scatter(ASK)
    for prompt in ("Shorten: {response}", "response", lambda row: f"Shorten: {row['response']}", df["response"]):
        assert "'response', which the prompt reads" in refused(lambda prompt=prompt: df.swarm.scatter(prompt))
    assert (
        df.swarm.scatter("Shorten: {response}", overwrite=True)["response"][0] == "echo: Shorten: " + df["response"][0]
    )
    assert df.swarm.scatter("Shorten: {response}", out="short")["short"][0] == "echo: Shorten: " + df["response"][0]


@pytest.mark.parametrize(
    "prompt",
    [
        lambda row: "Shorten: {response}".format(**row),
        lambda row: f"Shorten: {dict(row)['response']}",
        lambda row: "; ".join(f"{name}={value}" for name, value in row.items()),
        lambda row: "; ".join(map(str, row.values())),
        lambda row: "; ".join(str(row[name]) for name in row),
        lambda row: json.dumps(row),
        lambda row: f"Shorten: {row}",
        lambda row: f"Shorten: {(row | {'gene': ''})['response']}",
        lambda row: f"Shorten: {row.copy()['response']}",
    ],
    ids=["**", "dict", "items", "values", "iter", "json", "repr", "|", "copy"],
)
def test_a_function_may_read_all_columns_at_once(pool: sk.VLLMPool, prompt: Any) -> None:
    df = GENES.swarm.scatter(ASK)
    assert "'response', which the prompt reads" in refused(lambda: df.swarm.scatter(prompt))
    assert df.swarm.scatter(prompt, out="b")["b"].notna().all()


def test_a_column_of_ones_own_may_be_completed_or_given_up(pool: sk.VLLMPool) -> None:
    df = GENES.assign(response=["mine", None, None])
    completed = df.swarm.scatter(ASK, only_missing=True)
    assert completed["response"].tolist()[0] == "mine"
    assert completed["response"].notna().all()
    assert df.swarm.scatter(ASK, overwrite=True)["response"][0] == "echo: What does lacZ do?"
    assert GENES.assign(keep=1).swarm.filter(ASK).columns.tolist() == ["gene", "keep"], "it adds no column"


def test_a_column_beside_known_answers_that_someone_else_made_stays(pool: sk.VLLMPool) -> None:
    df = GENES.swarm.scatter(ASK)
    df["response_n"] = df["response"].str.len()
    assert "'response_n'" in refused(lambda: df.swarm.scatter(ASK, schema={"n": int}, schema_retries=0))


@pytest.mark.parametrize(
    "lose",
    [
        lambda df, tmp: pd.read_csv((df.to_csv(tmp / "a.csv", index=False), tmp / "a.csv")[1]),
        lambda df, tmp: pd.concat([df[:2], df[2:].set_axis([2]).assign(response=None)]),
    ],
    ids=["csv", "concat"],
)
def test_fields_without_a_prefix_may_be_completed_where_pandas_has_lost_the_record(
    pool: sk.VLLMPool, tmp_path: Path, lose: Any
) -> None:
    typed: dict[str, Any] = {"schema": {"tone": ["pos", "neg"]}, "prefix": False}
    df = GENES.swarm.scatter(ASK, **typed)
    df.loc[2, ["response", "tone"]] = None
    df = lose(df, tmp_path)
    df.attrs.clear()
    answers = df.swarm.scatter(ASK, only_missing=True, **typed)
    assert answers["tone"].notna().all()
    assert list(answers.columns) == list(df.columns)
    mine = GENES.swarm.scatter(ASK, prefix=False).assign(tone="mine")
    assert "'tone'" in refused(lambda: mine.swarm.scatter(ASK, only_missing=True, schema_retries=0, **typed))


# ---- the record ------------------------------


def test_the_record_says_who_was_asked_what_and_how_and_holds_no_key(echo: sk.LocalSwarm, tmp_path: Path) -> None:
    key = echo.endpoints[0].key()
    secret = {"api_key": "abcdefgh", "seed_text": "sk-proj-0123456789", "min_p": 0.1}
    with sk.connect(echo) as pool:
        how: dict[str, Any] = {"temperature": 0, "max_tokens": 64, "store": tmp_path / "s", "extra_body": secret}
        df = GENES.swarm.scatter(ASK, pool=pool, system="Be brief.", **how)
        df = df.swarm.scatter("{gene}", out="other", pool=pool)
    known = df.attrs["swarmkit"]
    assert set(known) == {"response", "other"}
    one = known["response"]
    assert (one["model"], one["endpoints"], one["template"]) == ("echo", 4, ASK)
    assert one["server"].startswith("swarmkit ")
    assert one["columns"] == ["response", "response_error"]
    assert one["parameters"]["temperature"] == 0
    assert one["store"] == str(tmp_path / "s")
    text = json.dumps(df.attrs)
    assert json.loads(text) == df.attrs, "it is plain data"
    assert len(text) < 3000
    assert "abcdefgh" not in text
    assert "sk-proj" not in text
    assert key is not None
    assert key not in text
    assert GENES.attrs == {}, "the caller's frame stays as it is"


def test_the_record_tells_answers_that_were_kept_from_new_ones(pool: sk.VLLMPool) -> None:
    df = GENES.swarm.scatter(ASK, temperature=0)
    df.loc[2, "response"] = None
    df = df.swarm.scatter(ASK, temperature=1, only_missing=True)
    one = df.attrs["swarmkit"]["response"]
    assert (one["parameters"]["temperature"], one["kept"]) == (1, 2)
    assert [call["parameters"]["temperature"] for call in one["earlier"]] == [0]
    assert "2 answers of an earlier call were kept. Earlier call: model echo" in sk.methods(df)


def test_long_values_are_hashed(pool: sk.VLLMPool) -> None:
    record = GENES.swarm.scatter("x" * 20_000 + "{gene}", logit_bias={str(i): 0.5 for i in range(999)}).attrs[
        "swarmkit"
    ]
    assert len(json.dumps(record)) < 2000
    assert record["response"]["parameters"]["logit_bias"].startswith("sha256:")


def test_the_record_goes_through_parquet_and_parts_of_one_call_have_the_same(pool: sk.VLLMPool, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    df = GENES.swarm.scatter(ASK)
    df.to_parquet(tmp_path / "a.parquet")
    assert pd.read_parquet(tmp_path / "a.parquet").attrs == df.attrs
    parts = list(sk.iter_scatter(iter([GENES, GENES]), ASK))
    assert pd.concat(parts).attrs["swarmkit"]["response"]["model"] == "echo"
    assert sk.methods(pd.concat(GENES.swarm.iter_scatter(ASK)))


def test_the_records_of_others_are_left_alone(pool: sk.VLLMPool) -> None:
    df = GENES.copy()
    df.attrs.update(swarmkit="not ours", source="a file")
    answers = df.swarm.scatter(ASK)
    assert answers.attrs["source"] == "a file"
    assert answers.attrs["swarmkit"]["response"]["verb"] == "scatter"
    assert df.attrs == {"swarmkit": "not ours", "source": "a file"}


def test_the_paragraph_for_the_paper(strict: sk.LocalSwarm) -> None:
    df = GENES.swarm.scatter(ASK, pool=sk.connect(strict), temperature=0, max_tokens=64)
    words = sk.methods(df)
    for part in ("swarmkit", "by the model echo", "on 1 endpoint", "UTC", ASK, "temperature = 0", "2 of 3 rows have"):
        assert part in words
    tree = df.swarm.tree_reduce("response", "Merge:\n{responses}", pool=sk.connect(strict))
    assert "tree_reduce" in sk.methods(tree)
    assert "1 of 1 row has an answer" in sk.methods(tree)
    assert "no record of answers" in refused(lambda: sk.methods(GENES))
    assert "no record of out='b'" in refused(lambda: sk.methods(df, "b"))


# ---- before and after ------------------------------


def test_a_preview_shows_whole_prompts_and_nothing_that_acts(pool: sk.VLLMPool) -> None:
    hostile = "<script>alert(1)</script>\x1b[2J " + "word " * 200
    df = pd.DataFrame({"t": [hostile, None, "short"]}, index=["<b>", "y", "z"])
    shown = df.swarm.preview("About {t}", rows=2, system="Be brief.")
    page = shown._repr_html_()
    assert "<script>" not in page
    assert "\x1b" not in page
    assert "<b>'" not in page
    assert page.count("word ") == 200, "the whole prompt"
    assert "2 of 3 rows" in page
    assert "not sent</b>: missing value in column &#x27;t&#x27;" in page
    dimmed = page.split('opacity:.5">')
    assert any("Be brief." in part.split("</span>")[0] for part in dimmed), "the template is dimmed"
    assert all("word" not in part.split("</span>")[0] for part in dimmed[1:]), "the prompt is not"
    assert type(shown[["sent"]]) is pd.DataFrame
    assert type(shown.iloc[:1]) is pd.DataFrame
    assert shown.columns.tolist() == ["sent", "tokens", "error"]


def test_n_is_samples(pool: sk.VLLMPool) -> None:
    with pytest.raises(TypeError, match="rows=3"):
        GENES.swarm.preview(ASK, n=2)  # type: ignore[call-arg]
    assert "rows=-1" in refused(lambda: GENES.swarm.preview(ASK, rows=-1))


def test_one_prompt_and_its_answer_as_a_page(strict: sk.LocalSwarm) -> None:
    pool = sk.connect(strict)
    df = GENES.set_index(pd.Index(["x", "y", "z"])).swarm.scatter(ASK, pool=pool, system="Be brief.", details=True)
    page = str(df.swarm.show("y"))
    for part in ("Be brief.", "What does recA do?", "echo: What does recA do?", "response_finish_reason: stop"):
        assert part in page
    assert re.search(r"response_latency_s: \S{1,8}\n", page), "not 17 digits"
    assert "request refused" in str(df.swarm.show("z"))
    df.loc["y", "response"] = "<script>\x1b[2J"
    assert "\x1b" not in str(df.swarm.show("y"))
    assert "<script>" not in df.swarm.show("y")._repr_html_()
    df.attrs.clear()
    assert "give the template" in str(df.swarm.show("y"))
    assert "Is it recA?" in str(df.swarm.show("y", "Is it {gene}?"))
    assert "not in the index" in refused(lambda: df.swarm.show("nope"))
    assert "it has no answers" in refused(lambda: GENES.swarm.show(0))
    assert "out='other'" in refused(lambda: df.swarm.show("y", out="other"))


def test_all_samples_of_a_row_are_on_its_page(pool: sk.VLLMPool) -> None:
    page = str(GENES.swarm.scatter(ASK, n=3).swarm.show(1))
    assert page.count("What does recA do?") == 4, "the prompt once, and three answers"
    assert "lacZ" not in page


def test_failed_rows_say_why_and_where(strict: sk.LocalSwarm) -> None:
    pool = sk.connect(strict)
    df = pd.concat([GENES.assign(kind="mine"), pd.DataFrame({"gene": [None]})], ignore_index=True)
    lost = df.swarm.scatter(ASK, pool=pool, details=True).swarm.failed()
    assert lost.index.tolist() == [2, 3]
    assert lost.columns.tolist() == ["gene", "kind", "endpoint", "message"]
    assert lost["kind"].tolist() == ["request refused", "no prompt"]
    assert lost["endpoint"].tolist()[0] == strict.endpoints[0].name
    assert pd.isna(lost["endpoint"].tolist()[1])
    assert lost["message"].tolist()[0].startswith("(HTTP 400) ")
    assert "request refused" not in lost["message"].tolist()[0]
    two = GENES.swarm.scatter(ASK, pool=pool, out="a").swarm.scatter("{gene}", pool=pool, out="b")
    assert len(two.swarm.failed(out="a")) == len(two.swarm.failed()) == 1
    assert len(GENES[:2].swarm.scatter(ASK, pool=pool).swarm.failed()) == 0


def test_the_newest_call_is_the_one_that_was_made_last(strict: sk.LocalSwarm) -> None:
    pool = sk.connect(strict)
    df = GENES.swarm.scatter(ASK, pool=pool, out="a").swarm.scatter("{gene}?", pool=pool, out="b")
    df["b_error"] = None
    df.loc[0, "a"] = None
    newest = df.swarm.scatter(ASK, pool=pool, out="a", only_missing=True)
    assert newest.swarm.failed().index.tolist() == [2]
    assert "What does lacZ do?" in str(newest.swarm.show(0))


def test_a_page_without_the_prompt_says_so(pool: sk.VLLMPool) -> None:
    df = GENES.swarm.scatter(ASK)
    tree = df.swarm.tree_reduce("response", "Merge {responses}")
    improved = df.swarm.scatter("Improve: {response}", overwrite=True)
    for frame in (tree, df[["response", "response_error"]], improved):
        page = str(frame.swarm.show(0))
        assert "not known here: this frame does not have what was filled into the template" in page
        assert str(frame["response"][0]).splitlines()[0] in page
        assert page.count("Improve: echo") == (frame is improved), "only the answer"
    with pytest.raises(sk.UnknownColumnError, match="genes"):
        df.swarm.show(0, "{genes}")


def test_frames_in_turn_do_not_say_how_many_answers_the_first_has_kept(pool: sk.VLLMPool) -> None:
    df = pd.concat([GENES] * 2, ignore_index=True).swarm.scatter(ASK, temperature=0)
    df.loc[3:, "response"] = None
    parts = pd.concat(sk.iter_scatter(iter([df[:3], df[3:]]), ASK, temperature=1, only_missing=True))
    assert "kept" not in parts.attrs["swarmkit"]["response"]
    words = sk.methods(parts)
    assert "3 answers" not in words
    assert "Answers of an earlier call were kept. Earlier call: model echo" in words


# ---- trees ------------------------------


@pytest.mark.parametrize(
    "keys",
    [
        ["b", None, "a", np.nan],
        pd.Categorical(["b", None, "a", None]),
        pd.array([2, None, 1, None], dtype="Int64"),
        [2.0, np.nan, 1.0, np.nan],
        pd.to_datetime(["2022", None, "2021", None]),
    ],
    ids=["text", "category", "Int64", "float", "dates"],
)
def test_missing_keys_are_counted_or_kept_as_groupby_does(pool: sk.VLLMPool, keys: Any) -> None:
    df = pd.DataFrame({"k": keys, "t": list("wxyz")})
    with pytest.warns(sk.SwarmWarning, match="2 rows without the key 'k', in no group: dropna=False"):
        top = df.swarm.tree_reduce("t", "{k}: {responses}", by="k")
    expected = df.groupby("k", observed=True)["t"].count()
    assert top["n_leaves"].tolist() == expected.tolist()
    kept = df.swarm.tree_reduce("t", "{k}: {responses}", by="k", dropna=False)
    expected = df.groupby("k", observed=True, dropna=False)["t"].count()
    assert kept["n_leaves"].tolist() == expected.tolist() == [1, 1, 2]
    assert pd.isna(kept["k"].iloc[2])
    assert kept["k"].dtype == df["k"].dtype
    assert kept["response"][2].startswith("echo: (missing): x")


def test_results_never_take_the_place_of_keys(pool: sk.VLLMPool) -> None:
    for name in ("response", "response_error", "n_leaves", "n_levels", "n_missing", "n_shortened"):
        df = pd.DataFrame({name: ["a", "a"], "t": ["x", "y"]})
        assert "would take the place of the key" in refused(
            lambda df=df, name=name: df.swarm.tree_reduce("t", "{responses}", by=name)
        )


# ---- small words ------------------------------


def test_a_series_has_its_name(pool: sk.VLLMPool) -> None:
    series = pd.Series(["x", "y"], name="abstract")
    for prompt in (
        "Sum: {abstract}",
        "Sum: {value}",
        lambda row: f"Sum: {row.value}",
        lambda row: f"Sum: {row.abstract}",
    ):
        answers = series.swarm.scatter(prompt)
        assert answers.columns.tolist() == ["abstract", "response", "response_error"]
        assert answers["response"].tolist() == ["echo: Sum: x", "echo: Sum: y"]
    assert series.swarm.scatter()["response"].tolist() == ["echo: x", "echo: y"]
    assert series.swarm.scatter("value")["response"].tolist() == ["echo: x", "echo: y"]
    assert series.swarm.tree_reduce("Merge {responses}")["n_leaves"].tolist() == [2]
    assert "abstract" in series.swarm.pipeline([sk.Step("a", "{value}?"), sk.Step("b", "{a}", when="{value} == 'x'")])
    for name in (None, 3, "a{b", ""):
        assert series.rename(name).swarm.scatter("{value}").columns[0] == "value"


def test_a_series_of_answers_is_asked_on(pool: sk.VLLMPool) -> None:
    df = GENES.swarm.scatter(ASK)
    for prompt in ("Shorten: {value}", "Shorten: {response}", lambda row: f"Shorten: {row.response}"):
        answers = df["response"].swarm.scatter(prompt)
        assert answers.columns.tolist() == ["value", "response", "response_error"]
        assert answers["response"][0] == "echo: Shorten: echo: What does lacZ do?"
    series = pd.Series(["x", "y"], name="label")
    assert series.swarm.classify("{value}", ["a", "b"]).columns.tolist()[:2] == ["value", "label"]
    assert "label" in series.swarm.scatter("{value}", out="b")
    assert "'label'" in refused(lambda: series.to_frame().swarm.classify("{label}", ["a", "b"]))
    steps = series.swarm.pipeline([sk.Step("label", "{value}?"), sk.Step("b", "{label} {value}")])
    assert steps["b"][0] == "echo: echo: x? x"
    assert df["response"].swarm.tree_reduce("Merge {responses}")["n_leaves"].tolist() == [3]


@pytest.mark.parametrize(
    "template", ['{"t": {"a": 1}} {t}', "{} {t}", '{"a.b": 1} {t}', '{"t": "{t}"}', "{t} }", "{t!r}"]
)
def test_braces_that_are_meant_literally(pool: sk.VLLMPool, template: str) -> None:
    with pytest.raises((sk.PromptError, sk.UnknownColumnError), match=r"\{\{ and \}\}"):
        pd.DataFrame({"t": ["a"]}).swarm.scatter(template)


def test_rows_that_are_no_pandas_frame(pool: sk.VLLMPool) -> None:
    class Polars:
        def to_pandas(self) -> pd.DataFrame:
            return GENES

    for rows, hint in (([1], "pandas.DataFrame("), (GENES["gene"], "series.swarm"), (Polars(), "df.to_pandas()")):
        for verb in (sk.scatter, sk.classify, sk.embed, sk.preview, sk.estimate, sk.submit):
            extra = (["a", "b"],) if verb is sk.classify else ()
            assert hint in refused(lambda v=verb, rows=rows, extra=extra: v(rows, "{gene}", *extra))
