"""What a pandas user relies on, over the echo endpoints."""

from __future__ import annotations

import asyncio
import concurrent.futures
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import swarmkit as sk

TEXT = "str" if int(pd.__version__.split(".")[0]) >= 3 else object


@pytest.fixture
def genes() -> pd.DataFrame:
    return pd.DataFrame({"gene": ["lacZ", "recA", "ompF", "dnaK"], "start": [362455, 2822708, 986205, 12163]})


@pytest.fixture(scope="module")
def odd() -> Iterator[list[sk.AgentEndpoint]]:
    """A slow endpoint; one that shuffles its choices; two that refuse any request that holds a POISON."""
    slow = {"latency_s": 0.05, "tokens_per_s": 40, "max_num_seqs": 2}
    hosts = [f"127.0.0.{i}" for i in range(1, 5)]
    faults = ["shuffle:address=127.0.0.2", *(f"bad_row:marker=POISON,address={host}" for host in hosts[2:])]
    with sk.local(1, engine="echo", addresses=hosts, speeds={"127.0.0.1": slow}, faults=faults) as swarm:
        yield swarm.endpoints


@pytest.fixture
def slow(odd: list[sk.AgentEndpoint]) -> Iterator[sk.VLLMPool]:
    """Two rows at a time, a few seconds for a hundred."""
    with sk.connect(odd[:1], batch=sk.BatchPolicy(max_size=4)) as pool:
        yield pool


@pytest.fixture(scope="module")
def two_picky(odd: list[sk.AgentEndpoint]) -> Iterator[sk.VLLMPool]:
    """Both refuse a request with a POISON in it, as servers refuse one that is too long."""
    with sk.connect(odd[2:]) as pool:
        yield pool


@pytest.fixture
def picky(two_picky: sk.VLLMPool) -> sk.VLLMPool:
    """The same, and the default pool."""
    return sk.connect(two_picky)


# ---- the frame that comes back ------------------------------


def test_the_callers_frame_is_never_changed(pool: sk.VLLMPool, genes: pd.DataFrame) -> None:
    genes["response"], genes["response_error"] = "old", None
    before = genes.copy(deep=True)
    answers = genes.swarm.scatter("{gene}", details=True)
    answers.loc[:, "gene"] = "changed"
    genes.swarm.tree_reduce("gene", "Merge {responses}", by="start")
    list(genes.swarm.iter_scatter("{gene}"))
    genes.swarm.preview("{gene}")
    pd.testing.assert_frame_equal(genes, before)


@pytest.mark.parametrize(
    "index",
    [
        pd.Index([5, 5, 1, 5]),
        pd.Index(["b", "a", "b", "c"], name="key"),
        pd.MultiIndex.from_tuples([("x", 2), ("x", 1), ("x", 2), ("w", 0)], names=["k", None]),
        pd.date_range("2024-01-01", periods=4, freq="-1D"),
        pd.CategoricalIndex(["b", "a", "b", "a"]),
    ],
    ids=["duplicates", "text", "multi", "dates", "categories"],
)
@pytest.mark.parametrize("n", [1, 2])
def test_index_and_order_survive(pool: sk.VLLMPool, genes: pd.DataFrame, index: pd.Index, n: int) -> None:
    genes.index = index
    answers = genes.swarm.scatter("{gene}", n=n, temperature=1.0)
    pd.testing.assert_index_equal(answers.index, index.repeat(n) if n > 1 else index)
    assert answers["gene"].to_list() == [gene for gene in genes["gene"] for _ in range(n)]
    assert [text.split()[-1] for text in answers["response"]] == answers["gene"].to_list()


def test_dtypes_are_fixed_and_columns_in_order(pool: sk.VLLMPool, genes: pd.DataFrame) -> None:
    genes.loc[1, "gene"] = None
    with pytest.warns(sk.SwarmWarning):
        answers = genes.swarm.scatter("{gene}", out="a", details=True)
    text, count = np.dtype(object) if TEXT is object else pd.Series(dtype="str").dtype, pd.Int64Dtype()
    assert answers.dtypes.iloc[2:].to_dict() == {
        "a": text,
        "a_error": text,
        "a_finish_reason": text,
        "a_endpoint": text,
        "a_prompt_tokens": count,
        "a_completion_tokens": count,
        "a_latency_s": np.dtype("float64"),
        "a_attempts": count,
    }
    assert list(answers.columns[:2]) == ["gene", "start"]
    assert answers["a_prompt_tokens"].isna().to_list() == answers["a_latency_s"].isna().to_list()
    assert answers["a_attempts"].to_list() == [1, 0, 1, 1]
    assert answers["a"].isna().to_list() == answers["a_error"].notna().to_list() == [False, True, False, False]


def test_out_is_replaced_where_it_stands(pool: sk.VLLMPool, genes: pd.DataFrame) -> None:
    genes.insert(1, "answer", [1.5, 2.5, 3.5, 4.5])
    once = genes.swarm.scatter("{gene}", out="answer", overwrite=True)
    again = once.swarm.scatter("gene {gene}", out="answer")
    assert list(once.columns) == list(again.columns) == ["gene", "answer", "start", "answer_error"]
    assert again["answer"].to_list() == [f"echo: gene {gene}" for gene in genes["gene"]]
    assert again["answer"].dtype == TEXT


def test_only_missing_asks_only_the_missing(pool: sk.VLLMPool, genes: pd.DataFrame) -> None:
    first = genes.swarm.scatter("{gene}", only_missing=True)
    assert first["response"].notna().all()
    first.loc[[1, 3], "response"] = None
    first.loc[0, "response"] = "kept as it is"
    second = first.swarm.scatter("again {gene}", only_missing=True)
    assert second["response"].to_list() == ["kept as it is", "echo: again recA", "echo: ompF", "echo: again dnaK"]
    assert sum(size * count for size, count in sk.last_run().stats.batch_sizes.items()) == 2
    third = second.swarm.scatter("again {gene}", only_missing=True)
    pd.testing.assert_frame_equal(third, second)


def test_samples_stand_under_their_rows(pool: sk.VLLMPool, genes: pd.DataFrame) -> None:
    answers = genes.swarm.scatter("{gene}", n=3, temperature=0.7, details=True)
    assert answers["response_sample"].dtype == "Int64"
    assert answers["response_sample"].to_list() == [0, 1, 2] * 4
    expected = [f"echo{mark}: {gene}" for gene in genes["gene"] for mark in ("", " #1", " #2")]
    assert answers["response"].to_list() == expected
    assert answers["start"].to_list() == genes["start"].repeat(3).to_list()


def test_what_a_prompt_can_be(pool: sk.VLLMPool, genes: pd.DataFrame) -> None:
    expected = [f"echo: About {gene}" for gene in genes["gene"]]
    series = ("About " + genes["gene"]).rename("anything")
    for prompt in ("About {gene}", lambda row: f"About {row['gene']}", lambda row: "About " + row.gene, series):
        assert genes.swarm.scatter(prompt)["response"].to_list() == expected
    assert genes.assign(p=series).swarm.scatter("p")["response"].to_list() == expected
    braces = genes.swarm.scatter('{{"gene": "{gene}"}}')["response"]
    assert braces[0] == 'echo: {"gene": "lacZ"}'
    tricky = genes.assign(gene="{start} {{x}} %s")  # what was filled in is not read again
    assert tricky.swarm.scatter("About {gene}")["response"][0] == "echo: About {start} {{x}} %s"


def test_series_have_the_verbs_too(pool: sk.VLLMPool, genes: pd.DataFrame) -> None:
    genes.index = [3, 3, 1, 0]
    answers = genes["gene"].swarm.scatter("Tell me about {value}")
    assert answers.index.to_list() == [3, 3, 1, 0]
    assert answers["response"].to_list() == [f"echo: Tell me about {gene}" for gene in genes["gene"]]
    assert genes["gene"].swarm.scatter()["response"].to_list() == [f"echo: {gene}" for gene in genes["gene"]]
    merged = genes["gene"].swarm.tree_reduce("Merge {responses}")
    assert all(gene in merged["response"][0] for gene in genes["gene"])
    assert genes["start"].swarm.preview(rows=1)["sent"].str.contains("362455").all()


def test_preview_sends_nothing_and_shows_what_would_be(pool: sk.VLLMPool, genes: pd.DataFrame) -> None:
    genes.loc[1, "gene"] = None
    shown = genes.swarm.preview("About {gene}", 2, system="Be brief.")
    assert shown.index.to_list() == [0, 1]
    assert shown["sent"][0].index("Be brief.") < shown["sent"][0].index("About lacZ")
    assert shown["error"].to_list()[1] == "missing value in column 'gene'"
    assert pool.last_run is None


def test_broadcast_asks_every_endpoint(pool: sk.VLLMPool) -> None:
    answers = sk.broadcast("Who are you? {not a placeholder}", pool=pool)
    assert answers["endpoint"].to_list() == [endpoint.name for endpoint in pool.endpoints]
    assert answers["response"].to_list() == ["echo: Who are you? {not a placeholder}"] * 4
    assert answers["response_error"].isna().all()


# ---- errors ------------------------------


def test_raising_hands_back_everything(picky: sk.VLLMPool, genes: pd.DataFrame) -> None:
    genes.loc[2, "gene"] = "POISON"
    with pytest.raises(sk.ScatterError, match=r"(?s)1 of 4 rows failed.*row 2") as caught:
        genes.swarm.scatter("{gene}", on_error="raise")
    assert caught.value.frame is not None
    assert caught.value.frame["response"].isna().to_list() == [False, False, True, False]
    assert "maximum context length" in caught.value.frame["response_error"][2]


def test_one_warning_sums_up_and_points_at_the_caller(picky: sk.VLLMPool) -> None:
    df = pd.DataFrame({"t": ["a", "POISON 1", None, "b", "POISON 2"]}, index=list("abcde"))
    with pytest.warns(sk.SwarmWarning) as heard:
        answers = df.swarm.scatter("{t}")
    assert len(heard) == 1
    assert heard[0].filename == __file__
    message = str(heard[0].message)
    assert message.startswith("3 of 5 rows failed")
    assert "2 rows: request refused (HTTP 400): This model's maximum context length" in message
    asked = "|".join(endpoint.name for endpoint in picky.endpoints)
    assert re.search(rf"rows 'b', 'e'; at ({asked})", message)
    assert answers["response"].notna().to_list() == [True, False, False, True, False]
    assert message.endswith("on the result: df.swarm.scatter(..., out='response', only_missing=True)")
    with pytest.warns(sk.SwarmWarning, match="1 of 5 rows failed"):  # the call it names, on the result
        again = answers.assign(t=["a", "mended", None, "b", "mended"]).swarm.scatter("{t}", only_missing=True)
    assert again["response"].notna().to_list() == [True, True, False, True, True]


def test_the_summary_names_endpoints_and_counts_what_it_leaves_out() -> None:
    with sk.local(1, engine="echo", addresses=7, faults=["http_400:marker=POISON"]) as swarm:
        df = pd.DataFrame({"t": [f"POISON {i}" for i in range(40)]})
        with pytest.warns(sk.SwarmWarning) as heard:
            df.swarm.scatter("{t}", pool=swarm)
    message = str(heard[0].message)
    assert message.startswith("40 of 40 rows failed:\n  40 rows: request refused (HTTP 400)")  # but for numbers
    assert re.search(r"rows 0, 1, 2, 3, 4 and 35 more; at 127\.0\.0\.\d:\d+, 127", message)


def test_no_retry_is_promised_where_it_would_not_work(picky: sk.VLLMPool) -> None:
    with pytest.warns(sk.SwarmWarning) as heard:
        pd.DataFrame({"t": ["a", "POISON 1"]}).swarm.scatter("{t}", n=2, temperature=1.0)
    assert "only_missing" not in str(heard[0].message)


# ---- while it runs ------------------------------


def many(count: int) -> pd.DataFrame:
    return pd.DataFrame({"t": [f"row {i}" for i in range(count)]}, index=[i % 3 for i in range(count)])


def test_iter_scatter_yields_each_row_once_as_they_finish(slow: sk.VLLMPool) -> None:
    df = many(12)
    df.iloc[5, 0] = None
    parts = []
    with pytest.warns(sk.SwarmWarning, match="1 of 12"):
        parts += df.swarm.iter_scatter("{t}", details=True)
    assert len(parts) > 2
    whole = pd.concat(parts)
    assert sorted(whole["t"].dropna()) == sorted(df["t"].dropna())
    answered = whole.dropna(subset="t")
    assert (answered["response"] == "echo: " + answered["t"]).all()
    assert whole["response_error"].dropna().to_list() == ["missing value in column 't'"]


def test_leaving_the_loop_stops_the_run(slow: sk.VLLMPool) -> None:
    parts = many(200).swarm.iter_scatter("{t}")
    next(parts)
    parts.close()
    with pytest.raises(sk.CancelledError):
        sk.last_run().result(timeout=10)
    assert sk.last_run().stats.answered < 200


def test_submit_partial_cancel(slow: sk.VLLMPool) -> None:
    df = many(200)
    run = df.swarm.submit("{t}")
    assert not run.done()
    with pytest.raises(TimeoutError, match="not over after"):
        run.result(timeout=0.01)
    early = run.partial()
    pd.testing.assert_index_equal(early.index, df.index)
    assert early["response_error"].iloc[-1] == "not finished"
    assert "running" in repr(run)
    run.cancel()
    with pytest.raises(sk.CancelledError, match=r"of 200 rows.*run.partial\(\)"):
        run.result(timeout=10)
    assert run.done()
    assert "cancelled" in repr(run)
    assert sk.last_run() is run
    late = run.partial()
    assert late["response"].notna().sum() == run.stats.answered < 200
    got = late.dropna(subset="response")
    assert (got["response"] == "echo: " + got["t"]).all()


def test_a_frame_changed_during_a_run_gets_no_answer_on_a_wrong_row(slow: sk.VLLMPool) -> None:
    df = pd.DataFrame({"t": [f"row {i}" for i in (3, 1, 2, 0, 5, 4)]})
    run = df.swarm.submit("{t}")
    df["t"] = sorted(df["t"])
    df["more"] = 1
    df.loc[99] = ["one row more", 2]
    answers = run.result()
    assert list(answers.columns) == ["t", "response", "response_error"]
    assert (answers["response"] == "echo: " + answers["t"]).all()
    assert answers["t"].to_list() == [f"row {i}" for i in (3, 1, 2, 0, 5, 4)]


def test_a_run_is_awaited_and_asked_again(pool: sk.VLLMPool, genes: pd.DataFrame) -> None:
    async def main() -> tuple[pd.DataFrame, pd.DataFrame]:
        run = genes.swarm.submit("{gene}")
        return await run, await run

    first, second = asyncio.run(main())
    pd.testing.assert_frame_equal(first, second)
    assert first["response"].to_list() == [f"echo: {gene}" for gene in genes["gene"]]


def test_awaiting_code_goes_on_meanwhile(slow: sk.VLLMPool, genes: pd.DataFrame) -> None:
    async def main() -> tuple[Any, int]:
        task = asyncio.create_task(genes.swarm.ascatter("{gene}"))
        beats = 0
        while not task.done():
            await asyncio.wait([task], timeout=0.005)
            beats += 1
        tree = await genes.swarm.atree_reduce("gene", "Merge {responses}", fanin=4, pool=slow)
        assert tree["n_leaves"][0] == 4
        return await task, beats

    answers, beats = asyncio.run(main())
    assert answers["response"].to_list() == [f"echo: {gene}" for gene in genes["gene"]]
    assert beats > 3


def test_cancelling_the_awaiting_task_stops_the_run(slow: sk.VLLMPool) -> None:
    async def main() -> None:
        run = many(200).swarm.submit("{t}")
        task = asyncio.ensure_future(run)
        await asyncio.wait([task], timeout=0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert run.done()

    asyncio.run(main())


def test_threads_share_a_pool(pool: sk.VLLMPool) -> None:
    frames = [pd.DataFrame({"t": [f"{k}-{i}" for i in range(50)]}) for k in range(8)]
    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        results = list(threads.map(lambda df: df.swarm.scatter("{t}", pool=pool), frames))
    for df, answers in zip(frames, results, strict=True):
        assert answers["response"].to_list() == ("echo: " + df["t"]).to_list()


def test_a_pool_made_for_one_call(echo: sk.LocalSwarm, pool: sk.VLLMPool, genes: pd.DataFrame) -> None:
    answers = genes.swarm.scatter("{gene}", pool=echo.endpoints[3], details=True)
    assert set(answers["response_endpoint"]) == {echo.endpoints[3].name}
    assert set(genes.swarm.scatter("{gene}", details=True)["response_endpoint"]) > {echo.endpoints[3].name}


# ---- properties ------------------------------

anything = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
pieces = st.lists(
    st.sampled_from(["{", "}", "{{t}}", "\n", "\r\n", "\t", " ", "{i}", "<|im_end|", "🧬", "é", "\0", "a"])
)
texts = st.one_of(anything, pieces.map("".join))


@pytest.fixture(scope="module")
def pools(odd: list[sk.AgentEndpoint], echo: sk.LocalSwarm) -> Iterator[list[sk.VLLMPool]]:
    """Batches of 1 to 7 rows, on sound endpoints and on one that returns choices in arbitrary order."""
    made = []
    for size in range(1, 8):
        batch = sk.BatchPolicy(max_size=size)
        made += [sk.connect(echo, batch=batch), sk.connect(odd[1:2], batch=batch, delivery="batch")]
        made += [sk.connect(odd[1:2], batch=batch, delivery="rows")]
    yield made
    for pool in made:
        with pool:
            pass


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(rows=st.lists(st.tuples(texts, st.integers(-2, 2)), max_size=20), which=st.integers(0, 20), n=st.integers(1, 3))
def test_every_answer_lands_on_its_own_row(
    pools: list[sk.VLLMPool], rows: list[tuple[str, int]], which: int, n: int
) -> None:
    df = pd.DataFrame({"t": pd.Series([t for t, _ in rows], dtype=TEXT), "i": range(len(rows))})
    df.index = pd.Index([label for _, label in rows])
    answers = df.swarm.scatter("{i}|{t}|", pool=pools[which], n=n, temperature=1.0)
    expected = [f"echo{f' #{k}' if k else ''}: {i}|{t}|" for i, (t, _) in enumerate(rows) for k in range(n)]
    assert answers["response"].to_list() == expected
    assert answers.index.to_list() == [label for _, label in rows for _ in range(n)]


# ---- tree_reduce ------------------------------

COUNTS = ["n_leaves", "n_levels", "n_missing", "n_shortened"]


def levels_of(leaves: int, fanin: int) -> int:
    """Levels above the leaves: the logarithm of their number to the base of the fan-in, rounded up."""
    levels = 0
    while leaves > 1:
        leaves, levels = -(-leaves // fanin), levels + 1
    return levels


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    rows=st.lists(
        st.tuples(st.sampled_from("abc"), st.sampled_from(["leaf", "leaf", "leaf", "leaf", "leaf", None, "POISON"])),
        max_size=30,
    ),
    fanin=st.integers(2, 6),
)
@pytest.mark.filterwarnings("ignore::swarmkit.SwarmWarning")
def test_no_leaf_is_lost_or_merged_twice(two_picky: sk.VLLMPool, rows: list[tuple[str, Any]], fanin: int) -> None:
    df = pd.DataFrame(
        {
            "g": [group for group, _ in rows],
            "t": pd.Series([text and f"<{text}{i}>" for i, (_, text) in enumerate(rows)], dtype=TEXT),
        }
    )
    options: dict[str, Any] = {"by": "g", "fanin": fanin, "max_tokens": 1500, "pool": two_picky}
    tops = df.swarm.tree_reduce("t", "{level}: {responses}", **options)
    assert tops["g"].to_list() == sorted(set(df["g"]))
    for top in tops.itertuples():
        texts = df.loc[df["g"] == top.g, "t"]
        assert top.n_leaves + top.n_missing == len(texts)
        assert isinstance(top.response, str) != isinstance(top.response_error, str)
        if isinstance(top.response, str):
            assert sum(top.response.count(leaf) for leaf in texts.dropna()) == top.n_leaves >= 1
            assert all(top.response.count(leaf) <= 1 for leaf in texts.dropna())
        if not texts.str.contains("POISON", na=False).any():
            assert top.n_missing == texts.isna().sum()
            assert top.n_levels == levels_of(texts.notna().sum(), fanin)
    check_tree(df.swarm.tree_reduce("t", "{level}: {responses}", trace=True, **options), tops)


def check_tree(nodes: pd.DataFrame, tops: pd.DataFrame) -> None:
    """Every node has a parent above it, in its own group, up to the root; what failed has neither parent nor leaves."""
    assert nodes["node"].to_list() == list(range(len(nodes)))
    by_node = nodes.set_index("node")
    for node in nodes.itertuples():
        if pd.notna(node.parent):
            parent = by_node.loc[node.parent]
            assert parent["level"] > node.level
            assert parent["group"] == node.group
            assert parent["g"] == node.g
        assert isinstance(node.response, str) != isinstance(node.error, str)
        children = nodes[nodes["parent"] == node.node]
        if isinstance(node.error, str):
            assert node.n_leaves == 0
            assert pd.isna(node.parent)
        elif node.level:
            assert len(children) >= 2
            assert node.n_leaves == children["n_leaves"].sum()
            assert all(child in node.response for child in children["response"])
        else:
            assert node.n_leaves == 1
            assert len(children) == 0
    roots = nodes[nodes["parent"].isna() & nodes["response"].notna()]
    assert sorted(roots["g"]) == tops.loc[tops["response"].notna(), "g"].to_list()


def test_a_failed_node_is_counted_and_the_rest_goes_on(picky: sk.VLLMPool) -> None:
    df = pd.DataFrame({"t": ["one", "two", "POISON", "four", "five", "six", None]})
    said = r"(?s)^1 of the merges failed:.*maximum context length.* \.\.\.\n +group 'all'"
    with pytest.warns(sk.SwarmWarning, match=said):
        tree = df.swarm.tree_reduce("t", "{responses}", fanin=2)
    assert tree["response"].notna().all()
    assert tree[["n_leaves", "n_levels", "n_missing"]].to_numpy().tolist() == [[4, 2, 3]]
    assert "four" not in tree["response"][0]  # it went down with its neighbour, and is counted
    with pytest.warns(sk.SwarmWarning):
        nodes = df.swarm.tree_reduce("t", "{responses}", fanin=2, trace=True)
    assert nodes["error"].dropna().str.contains("maximum context length").to_list() == [True]


def test_groups_as_groupby_has_them(pool: sk.VLLMPool) -> None:
    df = pd.DataFrame(
        {
            "k": pd.Categorical(["b", "a", None, "b"], categories=["a", "b", "c"]),
            "year": [2024, 2023, 2024, 2024],
            "t": ["x", "y", "lost", "z"],
        },
        index=[9, 9, 9, 9],
    )
    with pytest.warns(sk.SwarmWarning, match="1 row without a key"):
        tree = df.swarm.tree_reduce("t", "{k} in {year}, level {level}: {responses}", by=["k", "year"], out="merged")
    expected = df.groupby(["k", "year"], observed=True)["t"].size().reset_index()
    assert (
        tree[["k", "year"]].astype(str).to_numpy().tolist() == expected[["k", "year"]].astype(str).to_numpy().tolist()
    )
    assert tree["merged"].to_list() == ["y", "echo: b in 2024, level 1: x\n---\nz"]
    assert tree["n_levels"].to_list() == [0, 1]
    assert list(tree.columns) == ["k", "year", "merged", "merged_error", *COUNTS]


def test_answers_with_braces_are_not_read_as_templates(pool: sk.VLLMPool) -> None:
    df = pd.DataFrame({"t": ["{level}", "{responses}", "{{x}}", "}{"]})
    tree = df.swarm.tree_reduce("t", "{level}: {responses}", fanin=4)
    assert tree["response"][0] == "echo: 1: " + "\n---\n".join(df["t"])


def test_what_does_not_fit_together_is_shortened_and_said(pool: sk.VLLMPool) -> None:
    df = pd.DataFrame({"t": ["first " * 2000, "second " * 2000, "third"]})
    with pytest.warns(sk.SwarmWarning, match="2 texts were shortened to fit the context"):
        nodes = df.swarm.tree_reduce("t", "{responses}", max_tokens=200, trace=True)
    assert nodes["error"].isna().all()
    assert nodes["shortened"].any()
