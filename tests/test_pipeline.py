"""Pipelines: rows go on to their next step one by one, over sockets and in virtual time."""

from __future__ import annotations

import contextlib
import itertools
import random
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from scripted import Call, Scripted
from test_same_answers import RETRY, always, say, slowly

import swarmkit as sk
from swarmkit.analysis.simulate import Server, VirtualRun
from swarmkit.client.hostfile import AgentEndpoint
from swarmkit.engine import messages
from swarmkit.engine.endpoints import Fleet
from swarmkit.engine.queues import home_queues
from swarmkit.engine.scheduler import Scheduler
from swarmkit.frames.step_run import gather_s

STEPS = [
    sk.Step("role", "What does {gene} do?"),
    sk.Step("check", "Right? {role}", when="{n} > 1"),
    sk.Step("sum", "In short: {role}"),
]


@pytest.fixture
def genes() -> pd.DataFrame:
    return pd.DataFrame({"gene": ["lacZ", "recA", "dnaA"], "n": [1, 2, 3]}, index=["a", "b", "b"])


# ---- what comes back ------------------------------


def test_each_step_has_its_columns_beside_the_frames(pool: sk.VLLMPool, genes: pd.DataFrame) -> None:
    found = genes.swarm.pipeline(STEPS)
    names = [name for step in ("role", "check", "sum") for name in (step, f"{step}_error")]
    assert list(found.columns) == ["gene", "n", *names]
    pd.testing.assert_frame_equal(found[["gene", "n"]], genes)
    assert found["role"].tolist() == [f"echo: What does {gene} do?" for gene in genes["gene"]]
    assert found["sum"].tolist() == [f"echo: In short: {role}" for role in found["role"]]
    assert found["check"].isna().tolist() == [True, False, False]
    assert found["check"].iloc[2] == f"echo: Right? {found['role'].iloc[2]}"
    assert found.filter(like="_error").isna().all(axis=None)
    assert list(genes.columns) == ["gene", "n"]


def test_its_answers_are_those_of_scatters_one_after_another(pool: sk.VLLMPool, genes: pd.DataFrame) -> None:
    steps = [
        sk.Step("one", "About {gene}", details=True, max_tokens=3),
        sk.Step("two", "And {one}?", schema={"kind": ["x", "y"], "n": int}),
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # answers that were cut at three tokens
        one = genes.swarm.scatter("About {gene}", out="one", details=True, max_tokens=3)
        two = one.swarm.scatter("And {one}?", out="two", schema={"kind": ["x", "y"], "n": int}, max_tokens=64)
        found = genes.swarm.pipeline(steps, max_tokens=64)
    assert found["one"].str.len().max() < len("echo: About lacZ")
    measured = ["one_latency_s", "one_endpoint"]
    pd.testing.assert_frame_equal(found.drop(columns=measured), two.drop(columns=measured))


def test_steps_with_their_own_pools_and_functions_as_prompts(pool: sk.VLLMPool, genes: pd.DataFrame) -> None:
    with Scripted(Call.answer) as other, sk.VLLMPool([AgentEndpoint(*other.address)], model="m") as second:
        found = genes.swarm.pipeline(
            [sk.Step("a", "gene"), sk.Step("b", lambda row: f"{row['a']}!", pool=second, chat=None, details=True)]
        )
        assert set(found["b_endpoint"]) == {second.endpoints[0].name}
    assert found["b"].tolist() == [f"echo: echo: {gene}!" for gene in genes["gene"]]


def test_steps_of_one_pool_have_models_of_their_own(genes: pd.DataFrame) -> None:
    small, large = sk.local(1, engine="echo", model="small"), sk.local(1, engine="echo", model="large")
    with small, large:
        addresses = [*small.endpoints, *large.endpoints]
        steps = [sk.Step("a", "gene", model="small", details=True), sk.Step("b", "gene", model="large", details=True)]
        found = genes.swarm.pipeline(steps, pool=addresses)
        assert set(found["a_endpoint"]) == {small.endpoints[0].name}
        assert set(found["b_endpoint"]) == {large.endpoints[0].name}
        assert found[["a", "b"]].notna().all(axis=None)


@pytest.mark.parametrize("frame", [pd.DataFrame({"gene": [], "n": []}), pd.DataFrame({"gene": [None], "n": [2]})])
def test_frames_with_nothing_to_ask(pool: sk.VLLMPool, frame: pd.DataFrame) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = frame.swarm.pipeline(STEPS)
    assert len(found) == len(frame)
    assert found["sum"].isna().all()


def test_a_row_that_fails_at_a_step_has_the_later_ones_missing_and_the_reason(genes: pd.DataFrame) -> None:
    with sk.local(1, engine="echo", faults=["http_400:marker=Is recA"]) as swarm, sk.connect(swarm) as pool:
        steps = [sk.Step("a", "Of {gene}"), sk.Step("b", "Is {gene} it?"), sk.Step("c", "{b}"), sk.Step("d", "{a}")]
        with pytest.warns(sk.SwarmWarning, match=r"1 of 3 rows failed:\n  1 row: b: request refused"):
            found = genes.swarm.pipeline(steps, pool=pool)
        with pytest.raises(sk.ScatterError, match="1 of 3 rows failed") as caught:
            genes.swarm.pipeline(steps, pool=pool, on_error="raise")
    pd.testing.assert_frame_equal(caught.value.frame, found)
    assert found["a"].notna().all()
    assert found[["b", "c", "d"]].notna().all(axis=1).tolist() == [True, False, True]
    assert found["c_error"].iloc[1].startswith("not asked: the step 'b' failed: request refused")
    assert found["d_error"].iloc[1] == found["c_error"].iloc[1]


def test_a_condition_that_does_not_fit_a_value_is_an_error_of_its_row(pool: sk.VLLMPool) -> None:
    frame = pd.DataFrame({"n": pd.Series([5, "many", 1], dtype=object)})
    with pytest.warns(sk.SwarmWarning, match="1 of 3 rows failed"):
        found = frame.swarm.pipeline([sk.Step("a", "{n}", when="{n} > 3")])
    assert found["a"].isna().tolist() == [False, True, True]
    assert "TypeError" in found["a_error"].iloc[1]
    assert pd.isna(found["a_error"].iloc[2])


def test_a_condition_that_fits_some_rows_far_below_is_no_mistake(pool: sk.VLLMPool) -> None:
    frame = pd.DataFrame({"n": pd.Series(["?"] * 150 + [5], dtype=object)})
    with pytest.warns(sk.SwarmWarning, match="150 of 151 rows failed"):
        found = frame.swarm.pipeline([sk.Step("a", "{n}", when="{n} > 3")])
    assert found["a"].dropna().index.tolist() == [150]


def test_one_value_that_does_not_fit_costs_little_beside_many(pool: sk.VLLMPool) -> None:
    values: list[Any] = [i % 7 for i in range(4000)]
    values[1234] = "many"
    frame = pd.DataFrame({"n": pd.Series(values, dtype=object)})
    began = time.process_time()
    with pytest.warns(sk.SwarmWarning, match="1 of 4,000 rows failed"):
        found = frame.swarm.pipeline([sk.Step("a", "{n}", when="{n} > 9")], progress=False)
    assert time.process_time() - began < 2.0, "row by row it is 8 seconds"
    assert found["a_error"].dropna().index.tolist() == [1234]


def test_conditions_over_what_steps_give(pool: sk.VLLMPool, genes: pd.DataFrame) -> None:
    typed = {"n": int, "x": float, "ok": bool, "kind": ["x", "y"], "t": str, "many": list[int]}
    steps = [
        sk.Step("a", "{gene}", schema=typed, details=True, logprobs=0),
        sk.Step("b", "{n}", when="{a_n} > 3 or {a_x} / {a_n} <= 1 or {a_ok} or {a_kind} == 'x' or {a_t} in ['u', 'v']"),
        sk.Step("c", "{n}", when="{a_many} == 1 or {a_latency_s} >= 0 or {a_truncated} or not {a_ok}"),
        sk.Step("d", "{n}", when="{a_attempts} * {n} > 0 and {a_logprob} <= 0 and {a_endpoint} != ''", schema=int),
        sk.Step("e", "{n}", when="{d} != {n}"),
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = genes.swarm.pipeline(steps, max_tokens=64, too_long="truncate")
    assert found[["b_error", "d_error", "e_error"]].isna().all(axis=None)


def test_answers_that_are_not_valid_are_asked_again(genes: pd.DataFrame) -> None:
    asked: list[str] = []

    def script(call: Call) -> None:
        first = [prompt not in asked for prompt in call.prompts]
        asked.extend(call.prompts)
        say(call, ["what?" if new else "7" for new in first])

    steps = [sk.Step("a", "{gene}", schema=int, schema_retries=3), sk.Step("b", "{gene}{a}", schema=int)]
    with (
        Scripted(script) as server,
        sk.VLLMPool([AgentEndpoint(*server.address)], model="m") as pool,
        pytest.warns(sk.SwarmWarning, match="not hold the model to the schema"),
    ):
        found = genes.swarm.pipeline(steps, pool=pool, progress=False)
    assert found[["a", "b"]].eq(7).all(axis=None)
    assert (sk.last_run().stats.invalid, sk.last_run().stats.repaired) == (6, 6)


def test_examples_in_a_frame_have_the_answers_in_the_column_of_the_step(pool: sk.VLLMPool, genes: pd.DataFrame) -> None:
    shown = pd.DataFrame({"gene": ["gyrA"], "role": ["It cuts DNA."]})
    pairs = [("What does gyrA do?", "It cuts DNA.")]
    found = genes.swarm.pipeline([sk.Step("role", "What does {gene} do?", examples=shown)], temperature=0)
    expected = genes.swarm.pipeline([sk.Step("role", "What does {gene} do?", examples=pairs)], temperature=0)
    pd.testing.assert_frame_equal(found, expected)


def test_steps_that_a_row_skips_with_several_levels_of_columns(pool: sk.VLLMPool, genes: pd.DataFrame) -> None:
    frame = pd.concat({"of": genes}, axis=1)
    steps = [
        sk.Step("a", lambda row: row["('of', 'gene')"], when="{('of', 'n')} > 1"),
        sk.Step("b", "a"),
        sk.Step("c", "{('a', '')}?"),
    ]
    found = frame.swarm.pipeline(steps)
    assert found[["b", "c"]].isna().all(axis=1).tolist() == [True, False, False]
    assert found.xs("", axis=1, level=1).filter(like="_error").isna().all(axis=None)


def test_steps_that_use_a_step_that_a_row_skips_skip_it_too(pool: sk.VLLMPool, genes: pd.DataFrame) -> None:
    steps = [*STEPS[:2], sk.Step("more", "And {check}"), sk.Step("yes", "{gene}", when="{check} != ''")]
    found = genes.swarm.pipeline(steps)
    assert found[["more", "yes"]].isna().all(axis=1).tolist() == [True, False, False]
    assert found.filter(like="_error").isna().all(axis=None)
    assert sk.last_run().stats.rows == 3 + 2 + 2 + 2


def test_counts_and_story_are_of_all_steps(pool: sk.VLLMPool, genes: pd.DataFrame) -> None:
    seen = genes.swarm.pipeline(STEPS, progress=False)
    run = sk.last_run()
    assert (run.verb, run.stats.rows, run.stats.answered, run.stats.failed) == ("pipeline", 8, 8, 0)
    assert {route.partition(":")[0] for route in run.stats.routes} == {"role", "check", "sum"}
    assert run.stats.completion_tokens > 0
    assert len(run.newest()) == 3
    pd.testing.assert_frame_equal(run.partial(), seen)
    assert set(run.story(row="a").columns) == {"time", "what", "where", "why"}


def test_equal_prompts_are_asked_once_at_each_step(pool: sk.VLLMPool) -> None:
    frame = pd.DataFrame({"kind": ["a", "b"] * 20})
    found = frame.swarm.pipeline([sk.Step("one", "{kind}"), sk.Step("two", "{one}?")], temperature=0)
    stats = sk.last_run().stats
    assert (stats.answered, stats.reused) == (4, 76)
    assert found["two"].tolist() == ["echo: echo: a?", "echo: echo: b?"] * 20


# ---- stores, incidents, deadlines ------------------------------


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_a_store_resumes_in_the_middle(tmp_path: Path, genes: pd.DataFrame, temperature: float) -> None:
    frame = pd.concat([genes] * 10, ignore_index=True)
    how: dict[str, Any] = {"store": tmp_path / "s", "temperature": temperature, "dedup": False}
    with sk.local(1, engine="echo", addresses=2) as swarm, sk.connect(swarm) as pool:
        first = frame.swarm.pipeline(STEPS[:2], pool=pool, **how)
        whole = frame.swarm.pipeline(STEPS, pool=pool, **how)
        stats = sk.last_run().stats
        assert (stats.stored, stats.answered) == (30 + 20, 30)
        pd.testing.assert_frame_equal(whole[first.columns], first)
        again = frame.swarm.pipeline(STEPS, pool=pool, **how)
        assert (sk.last_run().stats.stored, sk.last_run().stats.requests) == (80, 0)
    pd.testing.assert_frame_equal(again, whole)


def test_alike_steps_have_stored_answers_of_their_own(tmp_path: Path) -> None:
    frame = pd.DataFrame({"gene": ["lacZ", "recA", "lacZ"]})
    count = itertools.count()

    def differently(call: Call) -> None:
        say(call, [f"{prompt} {next(count)}" for prompt in call.prompts])

    drafts = [sk.Step(f"draft{i}", "About {gene}") for i in range(3)]
    drafts += [sk.Step(f"other{i}", lambda row: f"Of {row.gene}") for i in range(2)]
    how: dict[str, Any] = {"store": tmp_path / "s", "temperature": 0.7, "progress": False}
    with Scripted(differently) as server, sk.VLLMPool([AgentEndpoint(*server.address)], model="m") as pool:
        first = frame.swarm.pipeline(drafts, pool=pool, **how)
        names = [step.name for step in drafts]
        assert first[names].stack().nunique() == 15
        again = frame.swarm.pipeline(drafts, pool=pool, **how)
        assert (sk.last_run().stats.stored, sk.last_run().stats.requests) == (15, 0)
        pd.testing.assert_frame_equal(again, first)
        one = frame.swarm.scatter("About {gene}", out="draft0", pool=pool, **how)
        assert sk.last_run().stats.requests == 0, "the first of them is as a scatter"
    assert sorted(one["draft0"]) == sorted(first["draft0"])


def test_a_function_step_in_between_leaves_the_stored_answers_of_the_others(pool: sk.VLLMPool, tmp_path: Path) -> None:
    class Judge:
        __hash__ = None  # type: ignore[assignment]

        def __call__(self, row: Any) -> str:
            return f"Judge {row.gene}"

    frame = pd.DataFrame({"gene": ["lacZ", "recA"]})
    first, last = sk.Step("first", lambda row: f"Sum up {row.gene}"), sk.Step("last", lambda row: f"Rate {row.gene}")
    judge = sk.Step("judge", Judge())
    how: dict[str, Any] = {"pool": pool, "store": tmp_path / "s", "temperature": 0.7}
    before = frame.swarm.pipeline([first, last, judge], **how)
    between = sk.Step("between", lambda row: f"Explain {row.gene}")
    after = frame.swarm.pipeline([first, between, judge, last], **how)
    assert (sk.last_run().stats.stored, sk.last_run().stats.answered) == (6, 2)
    pd.testing.assert_frame_equal(after[before.columns], before)


def test_answers_that_are_taken_back_are_taken_back_from_later_steps() -> None:
    frame = pd.DataFrame({"prompt": [f"row {i}" for i in range(60)]})
    with contextlib.ExitStack() as stack, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        servers = [stack.enter_context(Scripted(script)) for script in (slowly, always(""), slowly, slowly)]
        batch = sk.BatchPolicy(max_size=1, max_in_flight=8)
        endpoints = [AgentEndpoint(*server.address) for server in servers]
        pool = stack.enter_context(sk.VLLMPool(endpoints, model="m", retry=RETRY, batch=batch))
        steps = [sk.Step("one", "{prompt}"), sk.Step("two", "then {one}")]
        found = frame.swarm.pipeline(steps, pool=pool, max_tokens=8, progress=False)
    assert (found["one"] == "echo: " + found["prompt"]).all()
    assert (found["two"] == "echo: then echo: " + found["prompt"]).all()
    stats = sk.last_run().stats
    assert (stats.rows, stats.known, stats.failed) == (120, 120, 0)


@pytest.mark.parametrize("options", [{}, {"temperature": 0}], ids=["", "dedup"])
def test_answers_of_taken_back_ones_are_missing_when_a_deadline_comes_first(options: dict[str, Any]) -> None:
    frame = pd.DataFrame({"prompt": [f"row {i}" for i in range(60)] * 2})

    def hangs_at_the_second(call: Call) -> None:  # but for what the broken endpoint's answers make of it
        if any(prompt.startswith("then echo") for prompt in call.prompts):
            call.wait_for_the_end()
            return
        if any(prompt.startswith("row") for prompt in call.prompts):
            time.sleep(0.15)
        call.answer()

    def broken(call: Call) -> None:
        first = any(prompt.startswith("row") for prompt in call.prompts)
        (always("") if first else hangs_at_the_second)(call)

    with contextlib.ExitStack() as stack, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripts = (hangs_at_the_second, broken, hangs_at_the_second, hangs_at_the_second)
        servers = [stack.enter_context(Scripted(script)) for script in scripts]
        endpoints = [AgentEndpoint(*server.address) for server in servers]
        batch = sk.BatchPolicy(max_size=1, max_in_flight=8)
        pool = stack.enter_context(sk.VLLMPool(endpoints, model="m", retry=RETRY, batch=batch))
        steps = [sk.Step("one", "{prompt}"), sk.Step("two", "then {one}"), sk.Step("other", "{prompt}?")]
        found = frame.swarm.pipeline(steps, pool=pool, max_tokens=8, progress=False, deadline=6.0, **options)
    assert (found["one"].dropna() == "echo: " + found["prompt"][found["one"].notna()]).all()
    assert found["two"].isna().all(), "the answers to 'then ' were those to nothing"
    assert found["two_error"].notna().all()
    stats = sk.last_run().stats
    if not options:  # of answers that are taken back, those to repeated prompts are counted until they have others
        assert stats.known == found[["one", "two", "other"]].notna().sum().sum()
    assert (stats.rows, stats.known + stats.failed + stats.not_asked) == (360, 360)


def test_a_later_step_begins_though_the_requests_of_the_first_take_long() -> None:
    """How long requests take is each step's own; the moment at which all are over is one."""
    frame = pd.DataFrame({"prompt": [f"row {i}" for i in range(8)]})

    def script(call: Call) -> None:
        time.sleep(2.5 if any(prompt.startswith("row") for prompt in call.prompts) else 0.05)
        call.answer()

    with Scripted(script) as server:
        pool = sk.VLLMPool([AgentEndpoint(*server.address)], model="m", batch=sk.BatchPolicy(max_size=4))
        with pool:
            steps = [sk.Step("one", "{prompt}"), sk.Step("two", "then {one}")]
            found = frame.swarm.pipeline(steps, pool=pool, max_tokens=8, progress=False, deadline=4.9)
    assert (found["two"] == "echo: then echo: " + found["prompt"]).all()


def test_a_restart_amid_the_steps_loses_no_row() -> None:
    frame = pd.DataFrame({"prompt": [f"row {i}" for i in range(200)]})
    faults = ["reset:probability=0.1", "http_500:probability=0.1"]
    with sk.local(1, engine="echo", addresses=3, faults=faults) as swarm:
        pool = sk.connect(swarm, retry=sk.RetryPolicy(base_s=0.02), batch=sk.BatchPolicy(max_size=10))
        found = frame.swarm.pipeline([sk.Step("one", "{prompt}"), sk.Step("two", "then {one}")], pool=pool)
    assert (found["two"] == "echo: then echo: " + found["prompt"]).all()
    stats = sk.last_run().stats
    assert (stats.known, stats.failed) == (400, 0)


def test_when_no_endpoint_of_a_step_is_left_what_had_finished_is_kept(pool: sk.VLLMPool, genes: pd.DataFrame) -> None:
    quick = sk.RetryPolicy(base_s=0.01, give_up_s=0.5)
    with (
        sk.VLLMPool([("127.0.0.1", 1)], model="m", retry=quick) as dead,
        pytest.raises(sk.NoEndpointsError, match="cannot connect") as caught,
    ):
        genes.swarm.pipeline([sk.Step("a", "{gene}"), sk.Step("b", "{a}", pool=dead, chat=None)])
    assert caught.value.frame is not None
    assert caught.value.frame["a"].notna().all()
    assert caught.value.frame["b_error"].notna().all()


def test_a_deadline_ends_all_steps() -> None:
    frame = pd.DataFrame({"prompt": ["word " * 3, "word " * 400] * 4})
    with sk.local(1, engine="echo", tokens_per_s=100) as swarm, sk.connect(swarm) as pool:
        began = time.monotonic()
        with pytest.warns(sk.SwarmWarning, match=r"of 16 answers are left"):
            found = frame.swarm.pipeline(
                [sk.Step("one", "{prompt}"), sk.Step("two", "{one}")], pool=pool, deadline=1.5, max_tokens=600
            )
        assert time.monotonic() - began < 4
    assert found["two"].notna().tolist() == [True, False] * 4
    assert found["two_error"].iloc[1].startswith("not asked")


# ---- what is refused ------------------------------


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        ([], "needs one swarmkit.Step"),
        (sk.Step("a", "{gene}"), "must be a list of"),
        (["{gene}"], "holds a str"),
        ([sk.Step("a", "{gene}"), sk.Step("a", "{n}")], "two steps are named 'a'"),
        ([sk.Step("a", "{gene}", schema={"b": int}), sk.Step("a_b", "{n}")], "both have the column 'a_b'"),
        ([sk.Step("a", "{b}"), sk.Step("b", "{gene}")], "{b} is not a column"),
        ([sk.Step("a", pd.Series(["x"]))], "is a Series"),  # type: ignore[arg-type,unused-ignore]
        ([sk.Step("a", "{gene}", when="{m} > 1")], "{m} is not a column"),
        ([sk.Step("a", "{gene}", when="{n} >")], "cannot be read"),
        ([sk.Step("a", "{gene}", when="n > 1")], "n is no column in braces"),
        ([sk.Step("a", "{gene}", when="'{gene}' == 'x'")], "without quotes"),
        ([sk.Step("a", "{gene}", when="{gene}.str.len() > 1")], "it has a Call"),
        ([sk.Step("a", "{gene}", when="{gene}.values")], "it has a Attribute"),
        ([sk.Step("a", "{gene}", when="@pd.read_csv({gene})")], "cannot be read"),
        ([sk.Step("a", "{gene}", when="[{n} for x in 'a']")], "it has a ListComp"),
        ([sk.Step("a", "{gene}", when="{n:.2f} > 1")], "a placeholder has a format"),
        ([sk.Step("a", "{gene}", when="{gene} > 3")], "when='{gene} > 3': TypeError"),
        ([sk.Step("a", "{gene}"), sk.Step("b", "{gene}", when="{a} > 3")], "when='{a} > 3': TypeError"),
        ([sk.Step("a", "{gene}", schema={"t": str}), sk.Step("b", "{n}", when="{n} < {a_t}")], "TypeError"),
        ([sk.Step("a", "{gene}", schema=["x", "y"]), sk.Step("b", "{n}", when="{a} > 'x'")], "TypeError"),
        ([sk.Step("a", "{gene}", when="{n} + 1")], "neither true nor false"),
        ([sk.Step("a", "{gene}", model="other")], "other"),
        (
            [sk.Step("n", "{gene}")],
            "the step 'n' would overwrite 'n' of the frame, which swarmkit did not make: give the step another name, "
            "or Step(..., overwrite=True)",
        ),
        ([sk.Step("gene", "{gene}")], "which the prompt reads: give the step another name, or Step(..., overwrite="),
        ([sk.Step("a", "{gene}", schema={"n": int}, prefix=False)], "the step 'a' would overwrite 'n' of the frame"),
    ],
)
def test_steps_that_cannot_be_are_refused_before_anything_is_asked(
    pool: sk.VLLMPool, genes: pd.DataFrame, steps: Any, words: str
) -> None:
    with pytest.raises(sk.CallerError) as caught:
        genes.swarm.pipeline(steps)
    assert words in str(caught.value)
    assert "out=" not in str(caught.value)


def test_keywords_are_refused_where_they_mean_nothing(pool: sk.VLLMPool, genes: pd.DataFrame) -> None:
    with pytest.raises(TypeError, match=r"schema= belongs to a step: swarmkit\.Step\(name, prompt, schema=\.\.\.\)"):
        genes.swarm.pipeline([sk.Step("a", "{gene}")], schema=int)
    with pytest.raises(TypeError, match="Step takes no store="):
        genes.swarm.pipeline([sk.Step("a", "{gene}", store="s")])
    with pytest.raises(TypeError, match="Did you mean temperature="):
        genes.swarm.pipeline([sk.Step("a", "{gene}", temprature=0)])  # type: ignore[call-arg,unused-ignore]


# ---- time ------------------------------


def skewed(rows: int, long: float, seed: int) -> tuple[list[float], list[float]]:
    """Lengths of the answers of two steps: of one row in ten the first is long, and of one in ten the second."""
    rng = random.Random(seed)
    kinds = [rng.random() for _ in range(rows)]
    usual = [rng.uniform(0.5, 1.5) for _ in range(2 * rows)]
    first = [long if kind < 0.1 else usual[i] for i, kind in enumerate(kinds)]
    second = [long if kind > 0.9 else usual[rows + i] for i, kind in enumerate(kinds)]
    return first, second


@pytest.mark.slow
def test_two_steps_take_three_quarters_of_two_scatters_over_sockets() -> None:
    first, second = skewed(60, 20.0, seed=1)
    frame = pd.DataFrame(
        {name: ["w " * int(8 * n) for n in lengths] for name, lengths in (("a", first), ("b", second))}
    )
    how: dict[str, Any] = {"max_tokens": 600, "progress": False}
    with sk.local(1, engine="echo", addresses=4, tokens_per_s=30, max_num_seqs=32) as swarm, sk.connect(swarm) as pool:
        frame.head(1).swarm.scatter("{a}", pool=pool, max_tokens=1)
        began = time.monotonic()
        one = frame.swarm.scatter("{a}", out="one", pool=pool, **how)
        expected = one.swarm.scatter("{b}", out="two", pool=pool, **how)
        scatters_s = time.monotonic() - began
        began = time.monotonic()
        found = frame.swarm.pipeline([sk.Step("one", "{a}"), sk.Step("two", "{b}")], pool=pool, **how)
        pipeline_s = time.monotonic() - began
    pd.testing.assert_frame_equal(found, expected)
    assert pipeline_s <= 0.75 * scatters_s


def scheduler(servers: int, queues: list[list[int]], rows: int, awaited: int = 0) -> Scheduler:
    fleet = Fleet(servers, max_size=100, max_in_flight=16, retry=sk.RetryPolicy(), draw=lambda: 0.5)
    return Scheduler(fleet, queues, rows, awaited=awaited)


class VirtualSteps(VirtualRun):
    """Two steps on the same servers. Rows and tickets of the second have odd numbers there, those of the first even
    ones; a row joins the second a moment after its answer in the first."""

    def __init__(self, servers: list[Server], lengths: tuple[list[float], list[float]]) -> None:
        self.rows = len(lengths[0])
        homes = home_queues(range(self.rows), len(servers), [1] * self.rows)
        empty: list[list[int]] = [[] for _ in servers]
        self.steps = [scheduler(len(servers), homes, self.rows), scheduler(len(servers), empty, self.rows, self.rows)]
        self.ended, self.joined, self.events = [False, False], 0, 0
        self.gathered: list[int] = []
        self.answered: list[list[int]] = [[], []]
        super().__init__(servers, self.steps[0], lambda row: lengths[row % 2][row // 2])

    def run(self) -> None:
        self.do(1, self.steps[1].start(0.0))
        super().run()

    def carry_out(self, todo: Any) -> None:  # of the start of the first step
        self.do(0, todo)

    def do(self, step: int, todo: Any) -> None:
        for message in todo:
            match message:
                case messages.Send(batch):
                    rows = tuple(2 * row + step for row in batch.rows)
                    self.send(replace(batch, ticket=2 * batch.ticket + step, rows=rows))
                case messages.Drop(ticket):
                    self.close(2 * ticket + step)
                case messages.Wake(at):
                    self.at(max(at, self.now), self.hand, step, messages.Tick())
                case messages.Stop(failure):
                    assert failure is None
                    self.ended[step] = True
                    self.over = all(self.ended)

    def hand(self, step: int, event: Any) -> None:
        self.do(step, self.steps[step].handle(event, self.now))
        self.events += 1
        if self.events % 20 == 0:
            self.steps[step].validate()

    def tell(self, event: Any) -> None:
        step, changes = event.ticket % 2, {"ticket": event.ticket // 2}
        if isinstance(event, messages.Ended | messages.Failed):
            self.close(event.ticket)
        else:
            rows = [row // 2 for row in event.rows]
            new = [row for row in rows if self.steps[step].wants(row)]
            self.answered[step] += new
            if step == 0 and new:
                if not self.gathered:
                    self.at(self.now + gather_s(self.now), self.join)
                self.gathered += new
            changes["rows"] = rows  # type: ignore[assignment]
        self.hand(step, replace(event, **changes))

    def join(self) -> None:
        rows, self.gathered = self.gathered, []
        self.joined += len(rows)
        self.hand(1, messages.Joined(rows, {}, self.rows - self.joined))


def alone(servers: list[Server], lengths: list[float]) -> float:
    """Seconds that a scatter takes."""
    rows = len(lengths)
    run = VirtualRun(servers, scheduler(len(servers), home_queues(range(rows), len(servers), [1] * rows), rows),
                     lengths.__getitem__)  # fmt: skip
    run.run()
    return run.now


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(
    ("servers", "rows"),
    [(4, 100), (20, 600), pytest.param(100, 3000, marks=pytest.mark.slow)],
    ids=["4 servers", "20 servers", "100 servers"],
)
def test_two_steps_take_three_quarters_of_two_scatters_on_simulated_fleets(servers: int, rows: int, seed: int) -> None:
    lengths = skewed(rows, 12.0, seed)
    fleet = [Server(row_s=1.0, slots=64, latency_s=0.01) for _ in range(servers)]
    run = VirtualSteps(fleet, lengths)
    run.run()
    assert [sorted(answered) for answered in run.answered] == [list(range(rows))] * 2
    assert run.now <= 0.75 * (alone(fleet, lengths[0]) + alone(fleet, lengths[1]))


def test_a_server_that_dies_amid_the_steps_costs_no_row() -> None:
    lengths = skewed(600, 12.0, 7)
    fleet = [Server(row_s=1.0, slots=16, latency_s=0.01, dies_at=3.0 if i == 1 else float("inf")) for i in range(6)]
    run = VirtualSteps(fleet, lengths)
    run.run()
    assert [sorted(answered) for answered in run.answered] == [list(range(600))] * 2
