"""Bad input gets a clear answer: each test reads the message as a person would."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import swarmkit as sk

TEXT = "str" if int(pd.__version__.split(".")[0]) >= 3 else object


@pytest.fixture
def genes() -> pd.DataFrame:
    return pd.DataFrame({"gene": ["lacZ", "recA", "ompF"], "start": [362455, 2822708, 986205]})


def mentions(*words: str) -> str:
    """A pattern of words that the message must have, in this order."""
    return "(?s)" + ".*".join(map(re.escape, words))


# ---- frames ------------------------------


def test_empty_frame_gives_an_empty_result_with_the_right_columns(pool: sk.VLLMPool, genes: pd.DataFrame) -> None:
    plain = genes.iloc[:0].swarm.scatter("{gene}")
    assert plain.dtypes.astype(str).to_dict() == {
        "gene": str(genes["gene"].dtype),
        "start": "int64",
        "response": str(np.dtype(object)) if TEXT is object else "str",
        "response_error": str(np.dtype(object)) if TEXT is object else "str",
    }
    everything = genes.iloc[:0].swarm.scatter("{gene}", out="a", n=2, details=True, temperature=1.0)
    assert len(everything) == 0
    kinds = everything.dtypes.astype(str)
    assert kinds[["a_sample", "a_prompt_tokens", "a_completion_tokens", "a_attempts"]].eq("Int64").all()
    assert kinds["a_latency_s"] == "float64"
    assert list(genes.iloc[:0].swarm.iter_scatter("{gene}")) == []


def test_empty_frame_reduces_to_an_error_or_to_no_groups(pool: sk.VLLMPool, genes: pd.DataFrame) -> None:
    with pytest.warns(sk.SwarmWarning, match="no text to merge"):
        one = genes.iloc[:0].swarm.tree_reduce("gene", "Merge {responses}")
    assert one[["n_leaves", "n_levels", "n_missing"]].to_numpy().tolist() == [[0, 0, 0]]
    assert len(genes.iloc[:0].swarm.tree_reduce("gene", "Merge {responses}", by="start")) == 0


def test_numbers_dates_and_bools_are_formatted(pool: sk.VLLMPool) -> None:
    df = pd.DataFrame({"i": [7], "x": [0.25], "on": [True], "day": [pd.Timestamp("2024-05-01")], "big": [1234567]})
    df = df.astype({"big": "Int64"})
    answers = df.swarm.scatter("{i}, {x:.1f}, {on}, {day:%d.%m.%Y}, {big:,}")
    assert answers["response"][0] == "echo: 7, 0.2, True, 01.05.2024, 1,234,567"
    assert df.swarm.scatter("i")["response"][0] == "echo: 7"


@pytest.mark.parametrize("value", [["a", "b"], {"a": 1}, ("a",), np.array([1, 2]), b"bytes"])
@pytest.mark.parametrize("prompt", ["made", "About {made}"])
def test_lists_and_dicts_are_refused(pool: sk.VLLMPool, value: Any, prompt: str) -> None:
    df = pd.DataFrame({"made": pd.Series(["fine", value], index=["good", "bad"], dtype=object)})
    with pytest.raises(sk.PromptError, match=mentions("column 'made'", type(value).__name__, "'bad'", "lambda row")):
        df.swarm.scatter(prompt)


@pytest.mark.parametrize("missing", [None, np.nan, pd.NA, pd.NaT])
@pytest.mark.parametrize("prompt", ["gene", "About {gene}", lambda row: row.gene])
def test_missing_values_become_errors_and_are_not_sent(pool: sk.VLLMPool, missing: Any, prompt: Any) -> None:
    df = pd.DataFrame({"gene": pd.Series(["lacZ", missing, "recA"], dtype=object)})
    with pytest.warns(sk.SwarmWarning, match=mentions("1 of 3 rows failed", "row 1")):
        answers = df.swarm.scatter(prompt)
    assert answers["response"].notna().to_list() == [True, False, True]
    assert re.search("missing value in column 'gene'|gave no text", answers["response_error"][1])
    assert sk.last_run().stats.batch_sizes == {1: 2}


@pytest.mark.parametrize("dtype", ["Int64", "boolean", "category", "string", "datetime64[ns]"])
def test_missing_values_of_every_dtype_never_become_text(pool: sk.VLLMPool, dtype: str) -> None:
    value = {"Int64": 1, "boolean": True, "datetime64[ns]": pd.Timestamp(2024, 1, 1)}.get(dtype, "a")
    df = pd.DataFrame({"v": pd.Series([value, None], dtype=dtype)})
    with pytest.warns(sk.SwarmWarning):
        answers = df.swarm.scatter("v is {v}")
    assert answers["response"].isna().to_list() == [False, True]
    assert answers["response_error"][1] == "missing value in column 'v'"


@pytest.mark.parametrize("prompt", ["Tell me about {gen}", "gnee", "No placeholder at all"])
def test_an_unknown_column_lists_those_there_are(pool: sk.VLLMPool, genes: pd.DataFrame, prompt: str) -> None:
    with pytest.raises(KeyError, match=mentions("not a column", "gene, start")) as caught:
        genes.swarm.scatter(prompt)
    assert isinstance(caught.value, sk.UnknownColumnError)
    if prompt != "No placeholder at all":
        assert "Did you mean 'gene'?" in str(caught.value)


@pytest.mark.parametrize("template", ["{gene.__class__}", "{gene[0]}", "{gene.__class__.__mro__[1]}"])
def test_reaching_into_values_is_refused(pool: sk.VLLMPool, genes: pd.DataFrame, template: str) -> None:
    with pytest.raises(sk.PromptError, match=mentions("reaches into a value", "callable")):
        genes.swarm.scatter(template)


def test_a_column_with_a_dot_in_its_name_is_a_column(pool: sk.VLLMPool) -> None:
    df = pd.DataFrame({"gene.name": ["lacZ"], "a b": [1]})
    assert df.swarm.scatter("{gene.name}{a b}")["response"].to_list() == ["echo: lacZ1"]


@pytest.mark.parametrize("template", ["{gene", "gene}", "{gene} and {", "{{gene}"])
def test_unbalanced_braces(pool: sk.VLLMPool, genes: pd.DataFrame, template: str) -> None:
    with pytest.raises(sk.PromptError, match=mentions("braces do not balance", "{{ and }}")):
        genes.swarm.scatter(template)


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{}", "empty placeholder"),
        ("{gene!r}", "conversions"),
        ("{start:{gene}}", "nested"),
        ("{gene:,.2f}", "row 0 does not fit the template's format"),
    ],
)
def test_formats_that_cannot_be(pool: sk.VLLMPool, genes: pd.DataFrame, template: str, words: str) -> None:
    with pytest.raises(sk.PromptError, match=words):
        genes.swarm.scatter(template)


def test_duplicate_and_multi_level_indexes_are_kept_and_named(pool: sk.VLLMPool) -> None:
    index = pd.MultiIndex.from_tuples([("a", 1), ("a", 1), ("b", 2)], names=["k", "i"])
    df = pd.DataFrame({"t": ["x", None, "z"]}, index=index)
    with pytest.warns(sk.SwarmWarning, match=mentions("row ('a', 1)")):
        answers = df.swarm.scatter("{t}")
    assert answers.index.identical(index)
    assert answers["response"].fillna("-").to_list() == ["echo: x", "-", "echo: z"]


def test_duplicate_column_names_are_refused_only_where_they_matter(pool: sk.VLLMPool) -> None:
    df = pd.DataFrame([["x", "y", "z"]], columns=["a", "a", "b"])
    for prompt in ("a", "{a} and {b}"):
        with pytest.raises(sk.PromptError, match="2 columns are named 'a'"):
            df.swarm.scatter(prompt)
    answers = df.swarm.scatter("{b}")
    assert list(answers.columns) == ["a", "a", "b", "response", "response_error"]
    again = answers.swarm.scatter("{b}", out="a", overwrite=True)
    assert list(again.columns) == ["b", "response", "response_error", "a", "a_error"]
    assert again["a"][0] == "echo: z"


def test_arrow_and_categorical_columns(pool: sk.VLLMPool) -> None:
    df = pd.DataFrame({"t": ["x", "y", "x"], "n": [1, 2, 3]})
    arrow = df.convert_dtypes(dtype_backend="pyarrow")
    assert "pyarrow" in str(arrow.dtypes["n"])
    categories = df.astype("category")
    for frame in (arrow, categories):
        answers = frame.swarm.scatter("{t}-{n:02d}")
        assert answers["response"].to_list() == ["echo: x-01", "echo: y-02", "echo: x-03"]
        assert answers["response"].dtype == TEXT
        assert frame.swarm.scatter("t")["response"].to_list() == ["echo: x", "echo: y", "echo: x"]
        assert answers[["t", "n"]].dtypes.equals(frame.dtypes)


def test_a_series_that_is_not_aligned(pool: sk.VLLMPool, genes: pd.DataFrame) -> None:
    with pytest.raises(sk.PromptError, match=mentions("Series", "index of the frame (3 rows)")):
        genes.swarm.scatter(pd.Series(["a", "b", "c"], index=[2, 1, 0]))


@pytest.mark.parametrize(("prompt", "words"), [(7, "got a int"), (lambda row: 7, "gave a int on row 0")])
def test_prompts_of_the_wrong_type(pool: sk.VLLMPool, genes: pd.DataFrame, prompt: Any, words: str) -> None:
    with pytest.raises(sk.PromptError, match=words):
        genes.swarm.scatter(prompt)


def test_a_prompt_function_that_fails_names_the_row(pool: sk.VLLMPool, genes: pd.DataFrame) -> None:
    with pytest.raises(sk.PromptError, match=mentions("row 0", "no column 'locus'", "gene, start")):
        genes.swarm.scatter(lambda row: row.locus)


def test_a_prompt_longer_than_the_context_fails_alone(pool: sk.VLLMPool, genes: pd.DataFrame) -> None:
    genes.loc[1, "gene"] = "long " * 10_000
    with pytest.warns(sk.SwarmWarning, match="1 of 3 rows failed"):
        answers = genes.swarm.scatter("{gene}")
    assert answers["response"].notna().to_list() == [True, False, True]
    assert re.search(mentions("maximum context length is 4096", "Please reduce"), answers["response_error"][1])


# ---- keywords ------------------------------


def test_unknown_keyword(pool: sk.VLLMPool, genes: pd.DataFrame) -> None:
    with pytest.raises(TypeError, match=mentions("temprature= is not known", "temperature=?", "extra_body")):
        genes.swarm.scatter("gene", temprature=0.1)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"n": 0}, ["n=0", "1 or more"]),
        ({"n": 1.5}, ["n=1.5", "whole number"]),
        ({"n": "3"}, ["n='3'", "whole number"]),
        ({"on_error": "ignore"}, ["on_error='ignore'", "'column'", "'raise'"]),
        ({"mode": "both"}, ["mode='both'", "'batch', 'single'"]),
        ({"delivery": "fast"}, ["delivery='fast'", "'auto', 'rows', 'batch'"]),
        ({"chat": "chatml"}, ["chat='chatml'", "(prefix, suffix)"]),
        ({"max_tokens": 0}, ["max_tokens=0", "1 or more"]),
        ({"out": ""}, ["out=''", "column's name"]),
        ({"extra_body": {"prompt": "x"}}, ["extra_body", "prompt"]),
        ({"system": "s", "chat": None}, ["system=", "chat='auto'"]),
        ({"pool": 7}, ["int is not a target", "host:port"]),
    ],
)
def test_settings_outside_what_is_allowed(
    pool: sk.VLLMPool, genes: pd.DataFrame, options: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(sk.CallerError, match=mentions(*words)):
        genes.swarm.scatter("gene", **options)


@pytest.mark.parametrize("fanin", [1, 0, -3, True, 2.5, "all"])
def test_a_tree_that_would_never_end(pool: sk.VLLMPool, genes: pd.DataFrame, fanin: Any) -> None:
    with pytest.raises(sk.SettingError, match=mentions(f"fanin={fanin!r}", "2 or more")):
        genes.swarm.tree_reduce("gene", "Merge {responses}", fanin=fanin)


@pytest.mark.parametrize(
    ("column", "prompt", "by", "words"),
    [
        ("gene", "Merge them", None, ["{responses}"]),
        ("gene", "Merge {responses} of {organism}", None, ["organism", "not a column"]),
        ("gnee", "Merge {responses}", None, ["gnee", "'gene'"]),
        ("gene", "Merge {responses}", "strat", ["strat", "'start'"]),
    ],
)
def test_a_tree_prompt_that_cannot_be(
    pool: sk.VLLMPool, genes: pd.DataFrame, column: str, prompt: str, by: Any, words: list[str]
) -> None:
    with pytest.raises((sk.PromptError, sk.UnknownColumnError), match=mentions(*words)):
        genes.swarm.tree_reduce(column, prompt, by=by)


# ---- endpoints ------------------------------


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("node1 80000", ["'80000' is not a port", "1 to 65535"]),
        ("node1:abc", ["'abc' is not a port"]),
        ("node1:8000 9000", ["two ports"]),
        ("node1 8000 rack", ["'rack' is not a tag", "key=value"]),
        ("node1 8000 rack=a rack=b", ["'rack'", "twice"]),
        ("node1 8000 api_key=sk-1", ["must not hold a key", "key_env=SWARMKIT_", "in place of api_key="]),
        ("node1 8000 key_env=AWS_SECRET_ACCESS_KEY", ["AWS_SECRET_ACCESS_KEY is not allowed", "VLLM_API_KEY"]),
        ("https://me:pass@node1", ["no user or password"]),
        ("::1", ["brackets", "[::1]:8000"]),
        ("ftp://node1", ["http:// or https://"]),
        ("node0:8000", ["already on line 2"]),
    ],
)
def test_a_bad_line_of_a_hostfile(tmp_path: Path, line: str, words: list[str]) -> None:
    file = tmp_path / "agents.hostfile"
    file.write_text(f"# the cluster\nnode0 8000 rack=z\n\n{line}\n")
    with pytest.raises(sk.HostfileError, match=mentions("agents.hostfile, line 4", *words)):
        sk.connect(file)


def test_a_hostfile_that_is_empty_or_not_there(tmp_path: Path) -> None:
    (tmp_path / "none.hostfile").write_text("# nobody\n")
    with pytest.raises(sk.HostfileError, match="holds no endpoint"):
        sk.connect(tmp_path / "none.hostfile")
    with pytest.raises(sk.HostfileError, match=mentions("there is no hostfile 'agnets.hostfile'", "host:port")):
        sk.connect("agnets.hostfile")


def test_nothing_to_connect_to(genes: pd.DataFrame) -> None:
    with pytest.raises(sk.HostfileError, match=mentions("$SWARMKIT_HOSTFILE", "swarmkit.connect(")):
        genes.swarm.scatter("gene")


def test_the_same_endpoint_twice(echo: sk.LocalSwarm) -> None:
    with pytest.raises(sk.SettingError, match="given 2 times"):
        sk.connect([echo, echo.endpoints[0]])


def test_no_endpoint_alive() -> None:
    with pytest.raises(sk.NoEndpointsError, match=mentions("none of the 2 endpoints", "127.0.0.1:1: cannot connect")):
        sk.connect(["127.0.0.1:1", "127.0.0.2:1"])


def test_one_endpoint_dead_is_one_warning(echo: sk.LocalSwarm) -> None:
    with pytest.warns(
        sk.SwarmWarning, match=mentions("of 5 endpoints, 1 cannot be used", "127.0.0.1:1: cannot connect")
    ) as heard:
        pool = sk.connect([echo, "127.0.0.1:1"])
    assert len(heard) == 1
    assert heard[0].filename == __file__
    with pool:
        assert pool.size == 4


def test_a_rejected_key(echo: sk.LocalSwarm) -> None:
    with pytest.raises(sk.NoEndpointsError, match=mentions("rejects the key", "401")):
        sk.connect(echo.urls, api_key="wrong")


def test_the_last_endpoint_dies(genes: pd.DataFrame) -> None:
    with (
        sk.local(1, engine="echo") as swarm,
        sk.connect(swarm, retry=sk.RetryPolicy(base_s=0.01, give_up_s=0.5)) as pool,
    ):
        genes.swarm.scatter("gene")
        swarm.stop()
        with pytest.raises(sk.NoEndpointsError, match=mentions("0 of 3 rows", "cannot connect")) as caught:
            genes.swarm.scatter("gene")
        assert caught.value.frame is not None
        assert caught.value.frame["response_error"].notna().all()
        assert pool.size == 1


@pytest.fixture(scope="module")
def two_models() -> Iterator[list[sk.AgentEndpoint]]:
    with sk.local(1, engine="echo", model="parrot") as one, sk.local(1, engine="echo", model="myna") as other:
        yield [*one.endpoints, *other.endpoints]


def test_endpoints_that_serve_different_models(two_models: list[sk.AgentEndpoint], genes: pd.DataFrame) -> None:
    with (
        sk.connect(two_models) as pool,
        pytest.raises(sk.SettingError, match=mentions("2 models", "model=", "parrot (1 endpoint)")),
    ):
        genes.swarm.scatter("gene")
    with pytest.warns(sk.SwarmWarning, match=mentions("it serves parrot, not myna")):
        pool = sk.connect(two_models, model="myna")
    with pool:
        assert pool.size == 1
        assert genes.swarm.scatter("gene")["response"].notna().all()


def test_a_closed_pool(echo: sk.LocalSwarm, genes: pd.DataFrame) -> None:
    with sk.connect(echo) as pool:
        part = pool.select([0])
    assert "closed" in repr(pool)
    for closed in (pool, part):
        with pytest.raises(sk.PoolClosedError, match=mentions("closed", "swarmkit.connect(")):
            genes.swarm.scatter("gene", pool=closed)


def test_a_blocking_call_from_the_loops_own_thread(pool: sk.VLLMPool, genes: pd.DataFrame) -> None:
    """A template function runs on the I/O thread, where waiting for an answer would wait for itself."""
    with pytest.raises(sk.LoopThreadError, match=mentions("would wait for itself", "ascatter")):
        genes.swarm.scatter("gene", chat=lambda text: genes.swarm.scatter("gene")["response"][0])


@pytest.mark.parametrize("indices", [[], [4], [-9]])
def test_a_selection_of_endpoints_that_are_not_there(pool: sk.VLLMPool, indices: list[int]) -> None:
    with pytest.raises(sk.SettingError, match=r"at least one endpoint|counted 0 to 3"):
        pool.select(indices)
    with pytest.raises(sk.SettingError, match=mentions("rack=a", "engine=echo")):
        pool.by_tag("rack", "a")


@pytest.mark.parametrize("text", ["abc", "0", "-5", "1.5"])
@pytest.mark.parametrize("name", ["SWARMKIT_MAX_TOKENS", "AURORA_SWARM_MODEL_MAX_CONTEXT"])
def test_a_setting_of_the_environment(monkeypatch: pytest.MonkeyPatch, name: str, text: str) -> None:
    monkeypatch.setenv(name, text)
    with pytest.raises(sk.SettingError, match=mentions(f"${name}=", text, "whole number")):
        sk.connect("127.0.0.1:1")
