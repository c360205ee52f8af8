"""Numbers and values are true: what was spent, what is kept, and what a prompt holds."""

from __future__ import annotations

import json
import time
from collections import Counter
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scripted import Call, Scripted

import swarmkit as sk

TEXT = "str" if int(pd.__version__.split(".")[0]) >= 3 else object


def stats() -> sk.RunStats:
    """Counts of the newest run."""
    return sk.last_run().stats


def spent() -> tuple[int, int]:
    return stats().prompt_tokens, stats().completion_tokens


# ---- spent, reused, stored, kept ------------------------------


@pytest.fixture
def many(echo: sk.LocalSwarm) -> sk.VLLMPool:
    """A pool that asks all rows in one request."""
    with sk.connect(echo.endpoints[0]) as pool:
        yield pool


def cost_of(pool: sk.VLLMPool, text: str, **options: Any) -> tuple[int, int]:
    """Tokens of one row alone, as the server counts them."""
    one = pd.DataFrame({"t": [text]}).swarm.scatter("t", pool=pool, details=True, **options)
    return int(one["response_prompt_tokens"][0]), int(one["response_completion_tokens"][0])


def test_a_hundred_identical_prompts_cost_one(many: sk.VLLMPool) -> None:
    prompt, completion = cost_of(many, "the same prompt")
    answers = pd.DataFrame({"t": ["the same prompt"] * 100}).swarm.scatter("t", pool=many, temperature=0, details=True)
    assert (stats().requests, stats().answered, stats().reused) == (1, 1, 99)
    assert spent() == (prompt, completion)
    assert stats().reused_prompt_tokens == 99 * prompt
    assert stats().reused_completion_tokens == 99 * completion
    assert answers["response_prompt_tokens"].tolist() == [prompt] * 100
    lines = dict(stats().summary())
    assert lines["tokens"] == f"{prompt} in, {completion} out"
    free = f"{99 * prompt:,} in, {99 * completion:,} out"
    assert lines["reused"] == f"99 rows with the prompt of another row; {free} not spent"
    assert "99 reused" in repr(stats())


def test_stored_rows_are_not_spent(many: sk.VLLMPool, tmp_path: Any) -> None:
    df = pd.DataFrame({"t": [f"row {i}" for i in range(30)]})
    df.swarm.scatter("t", pool=many, store=tmp_path)
    first = spent()
    assert min(first) > 0
    df.swarm.scatter("t", pool=many, store=tmp_path)
    assert spent() == (0, 0)
    assert (stats().answered, stats().reused, stats().stored, stats().known) == (0, 0, 30, 30)
    assert (stats().stored_prompt_tokens, stats().stored_completion_tokens) == first
    assert "30 rows answered before, in the store" in dict(stats().summary())["stored"]
    more = pd.concat([df, df, pd.DataFrame({"t": ["new"]})])
    more.swarm.scatter("t", pool=many, store=tmp_path, temperature=None, dedup=True)
    assert (stats().answered, stats().reused, stats().stored) == (1, 30, 30)
    assert spent() == cost_of(many, "new")


def test_samples_share_their_prompt(many: sk.VLLMPool) -> None:
    prompt, completion = cost_of(many, "sampled", temperature=1.0)
    pd.DataFrame({"t": ["sampled"] * 5}).swarm.scatter("t", pool=many, n=4, temperature=1.0)
    assert stats().answered == 5
    assert stats().prompt_tokens == 5 * prompt
    assert stats().completion_tokens >= 5 * 4 * completion  # the echo marks samples


def test_kept_rows_are_counted_apart_and_the_run_is_complete(many: sk.VLLMPool) -> None:
    df = pd.DataFrame({"t": list("abcd"), "response": ["kept", None, "kept", "kept"]})
    df.swarm.scatter("t", pool=many, only_missing=True)
    assert (stats().answered, stats().kept, stats().known, stats().rows) == (1, 3, 4, 4)
    assert spent() == cost_of(many, "b")


def test_answers_cut_off_are_counted(many: sk.VLLMPool) -> None:
    df = pd.DataFrame({"t": ["a", "one two three four five six"]})
    with pytest.warns(sk.SwarmWarning, match="1 of 2 answers was cut off at max_tokens=3"):
        df.swarm.scatter("t", pool=many, max_tokens=3)
    assert stats().cut == 1
    assert dict(stats().summary())["cut off"] == "1 answer ended for want of tokens"
    df.swarm.scatter("t", pool=many)
    assert stats().cut == 0


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("details", [False, True])
def test_a_whole_reply_is_counted_as_a_whole(many: sk.VLLMPool, n: int, details: bool) -> None:
    df = pd.DataFrame({"t": ["a", "b c", "d e f", "g"]})
    df.swarm.scatter("t", pool=many, delivery="rows", n=n, temperature=1.0)
    rows, tokens = spent(), stats().tokens_an_answer
    answers = df.swarm.scatter("t", pool=many, delivery="batch", n=n, temperature=1.0, details=details)
    assert spent() == rows
    assert min(rows) > 0
    assert stats().tokens_an_answer == tokens
    assert "not counted" not in dict(stats().summary())["tokens"]
    if details:
        assert answers["response_completion_tokens"].sum() == rows[1]


@pytest.mark.parametrize("usage", [None, {}, {"prompt_tokens": 2, "completion_tokens": 3}, {"prompt_tokens": "9"}])
def test_answers_whose_tokens_are_not_counted_are_said(usage: Any) -> None:
    """Some servers count the first prompt and answer only (llama-server): too few tokens for the texts."""

    def script(call: Call) -> None:
        choices = [{"index": i, "text": f"echo: {p}", "finish_reason": "stop"} for i, p in enumerate(call.prompts)]
        call.reply(json.dumps({"choices": choices, "usage": usage}).encode())

    df = pd.DataFrame({"t": [f"a prompt of some length {i}" for i in range(3)]})
    with Scripted(script) as server, sk.VLLMPool([sk.AgentEndpoint(*server.address)], model="m") as pool:
        df.swarm.scatter("t", pool=pool, delivery="batch", max_tokens=8, progress=False)
    assert dict(stats().summary())["tokens"].startswith("0 in, 0 out; 3 answers not counted by the server")


def test_frames_of_a_stream_are_counted_together(many: sk.VLLMPool, tmp_path: Any) -> None:
    from swarmkit.frames.call import arguments, read_options
    from swarmkit.frames.chunks import ChunkedScatter
    from swarmkit.frames.scatter import ScatterFrame

    df = pd.DataFrame({"t": [f"row {i % 7}" for i in range(40)]})
    df.iloc[:5].swarm.scatter("t", pool=many, store=tmp_path, temperature=0)
    given = arguments(sk.scatter, {"pool": many, "store": tmp_path, "temperature": 0})
    call = read_options(given)
    frames = (df.iloc[i : i + 10] for i in range(0, 40, 10))
    stream = ChunkedScatter(frames, lambda part: ScatterFrame(part, "t", given), call)
    assert sum(map(len, stream)) == 40
    found = stream.stats
    assert found.answered + found.reused + found.stored == found.known == 40
    assert found.stored >= 5
    assert "not counted" not in dict(found.summary())["tokens"]
    assert found.stored_prompt_tokens > 0


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(st.sampled_from(["a", "b b", "c c c", "d d d d", None]), max_size=30),
    before=st.lists(st.sampled_from(["a", "b b", "x"]), max_size=4),
    n=st.integers(1, 3),
    dedup=st.booleans(),
    delivery=st.sampled_from(["rows", "batch"]),
)
@pytest.mark.filterwarnings("ignore::swarmkit.SwarmWarning")
def test_every_row_and_token_is_counted_once(
    echo: sk.LocalSwarm,
    tmp_path_factory: pytest.TempPathFactory,
    rows: list[str | None],
    before: list[str],
    n: int,
    dedup: bool,
    delivery: Any,
) -> None:
    """The servers' own counts over answered rows are what was spent; the rest is reused, stored, or has no prompt."""
    store = tmp_path_factory.mktemp("store")
    options: dict[str, Any] = {"n": n, "details": True, "dedup": dedup, "delivery": delivery, "temperature": 1.0}
    with sk.connect(echo) as pool:
        options |= {"pool": pool, "store": store, "chat": None}
        pd.DataFrame({"t": pd.Series(before, dtype=TEXT)}).swarm.scatter("t", **options)
        df = pd.DataFrame({"t": pd.Series(rows, dtype=TEXT)})
        answers = df.swarm.scatter("t", **options)
    found, texts = stats(), [t for t in rows if t is not None]
    distinct, known = Counter(texts), Counter(before)
    if dedup:
        stored = sum(1 for t in distinct if known[t])
        reused = len(texts) - len(distinct)
    else:
        stored, reused = sum(min(count, known[t]) for t, count in distinct.items()), 0
    assert (found.stored, found.reused, found.failed) == (stored, reused, len(rows) - len(texts))
    assert found.answered + found.reused + found.stored + found.failed == found.rows == len(rows)
    first = answers.iloc[::n] if n > 1 else answers
    total = found.prompt_tokens + found.reused_prompt_tokens + found.stored_prompt_tokens
    assert total == first["response_prompt_tokens"].sum()
    total = found.completion_tokens + found.reused_completion_tokens + found.stored_completion_tokens
    assert total == answers["response_completion_tokens"].sum()
    assert (found.prompt_tokens > 0) == (found.answered > 0)


# ---- plans from runs ------------------------------


@settings(max_examples=25, deadline=None)
@given(
    slots=st.integers(4, 40),
    tokens=st.integers(1, 200),
    tokens_per_s=st.floats(5, 200),
    n=st.integers(1, 4),
    not_asked=st.integers(0, 500),
)
def test_a_plan_says_what_the_endpoints_did(
    slots: int, tokens: int, tokens_per_s: float, n: int, not_asked: int
) -> None:
    """Endpoints that answer ``slots`` answers at once are measured as such, whatever else the run had for free."""
    from swarmkit.engine.breaker import Breaker
    from swarmkit.engine.columns import Columns
    from swarmkit.records import Reply
    from swarmkit.runs.events import RequestEnded, RequestSent, RowsDone, RowsReused, RunEnded, RunStarted

    rows_at_once, requests = slots, 12
    rows = rows_at_once * requests
    columns, found = Columns(rows + 2 * not_asked, n), sk.RunStats(rows=rows + 2 * not_asked)
    found.follow(columns)
    row_s = tokens / tokens_per_s
    found(RunStarted(rows + 2 * not_asked, rows, ["a:1"], ["completions"], 0.0))
    if not_asked:
        for stored in (True, False):
            found(RowsReused(range(not_asked), 0, None, stored, 10 * not_asked, tokens * not_asked * n))
    for ticket in range(requests):
        batch, at = range(ticket * rows_at_once, (ticket + 1) * rows_at_once), ticket * row_s
        found(RequestSent(ticket, 0, batch, Breaker.CLOSED, at, bytes(len(batch))))
        answers = [(row, Reply(0, k, "x", "stop", 7, tokens, None)) for row in batch for k in range(n)]
        columns.answer(answers, 0, row_s)
        found(RowsDone(ticket, 0, batch, 1, at + row_s))
        found(RequestEnded(ticket, 0, None, Breaker.CLOSED, 1, at + row_s))
    found(RunEnded(None, False, requests * row_s))
    (model,) = sk.EndpointModel.from_stats(found)
    assert model.tokens_per_s == pytest.approx(tokens_per_s)
    assert model.slots == slots * n
    assert found.prompt_tokens == 7 * rows
    plan = sk.simulate(model, sk.Workload(rows * n, float(tokens)))
    assert plan.time_s == pytest.approx(found.time_s, rel=0.1)


@pytest.mark.filterwarnings("ignore:.* cut off at max_tokens")
def test_an_answer_cut_by_a_smaller_context_is_asked_again_where_there_is_room(
    echo: sk.LocalSwarm, tmp_path: Any
) -> None:
    long = "word " * 200
    df = pd.DataFrame({"t": [long, "short"]})
    options: dict[str, Any] = {"store": tmp_path, "chat": None, "max_tokens": 900, "details": True, "progress": False}
    with sk.connect(echo, model_max_context=350, buffer=0) as small:
        first = df.swarm.scatter("t", pool=small, **options)
        assert first["response_finish_reason"].tolist() == ["length", "stop"]
        df.swarm.scatter("t", pool=small, **options)
        assert (stats().answered, stats().stored) == (0, 2), "there is no more room than before"
    with sk.connect(echo, model_max_context=4000, buffer=0) as large:
        again = df.swarm.scatter("t", pool=large, **options)
        assert (stats().answered, stats().stored) == (1, 1)
        assert again["response"].tolist() == [f"echo: {long}", "echo: short"]
        assert again["response_finish_reason"].tolist() == ["stop", "stop"]
        third = df.swarm.scatter("t", pool=large, **options)
        assert (stats().answered, stats().stored) == (0, 2)
        assert third["response"].tolist() == again["response"].tolist()
    opened = sk.open_store(tmp_path)
    assert f"echo: {long}" in set(opened.to_frame()["text"])
    opened.compact()
    assert len(opened) == 2
    assert f"echo: {long}" in set(opened.to_frame()["text"]), "the later answer is the one that is kept"


def test_a_row_whose_samples_are_stored_in_part_is_asked_as_a_whole(many: sk.VLLMPool, tmp_path: Any) -> None:
    df = pd.DataFrame({"t": ["a", "b"]})
    options: dict[str, Any] = {"pool": many, "store": tmp_path, "n": 3, "temperature": 1.0, "details": True}
    first = df.swarm.scatter("t", **options)
    (segment,) = tmp_path.glob("*.jsonl")
    lines = segment.read_text().splitlines(keepends=True)
    segment.write_text("".join(lines[:-2]))
    again = df.swarm.scatter("t", **options)
    assert (stats().answered, stats().stored) == (1, 1)
    assert again["response"].tolist() == first["response"].tolist()


def test_lengths_of_a_workload_come_from_a_frame_as_they_are() -> None:
    counts = pd.Series([10, None, 30], dtype="Int64")
    assert sk.Workload(10, counts).sample() == sk.Workload(10, counts.tolist()).sample() == [(0.0, 10.0), (0.0, 30.0)]
    assert sk.Workload(10, counts.astype("float64")).sample() == [(0.0, 10.0), (0.0, 30.0)]
    assert sk.Workload(10, counts.max()).sample() == sk.Workload(10, np.float32(30)).sample() == [(0.0, 30.0)]


# ---- the result is planned, and never lost ------------------------------


def asked(pool: sk.VLLMPool) -> bool:
    """Whether the pool has sent anything."""
    return pool.last_run is not None


def test_forbidden_duplicate_labels_are_found_before_anything_is_sent(pool: sk.VLLMPool) -> None:
    df = pd.DataFrame({"t": ["a", "b"]}).set_flags(allows_duplicate_labels=False)
    with pytest.raises(sk.SettingError, match=r"n=2 .*duplicate labels.*n=1"):
        df.swarm.scatter("t", n=2, temperature=1.0)
    assert not asked(pool)
    answers = df.swarm.scatter("t", details=True)
    assert answers["response"].tolist() == ["echo: a", "echo: b"]
    assert not answers.flags.allows_duplicate_labels
    assert pd.concat([p.set_flags(allows_duplicate_labels=True) for p in df.swarm.iter_scatter("t")])["t"].size == 2
    assert df.swarm.tree_reduce("t", "{responses}", by="t")["n_leaves"].tolist() == [1, 1]


def test_frames_of_a_stream_may_share_labels_that_each_forbids(echo: sk.LocalSwarm) -> None:
    df = pd.DataFrame({"t": ["a", "b"]}).set_flags(allows_duplicate_labels=False)
    with sk.local(1, engine="echo") as swarm, sk.connect(swarm, retry=sk.RetryPolicy(base_s=0.01)) as pool:
        df.swarm.scatter("t", pool=pool)
        parts = sk.iter_scatter((df for _ in range(3)), "t", pool=pool, on_error="raise")
        assert [len(part) for part in parts] == [2, 2, 2]


COLUMNS = {
    "two levels": pd.MultiIndex.from_tuples([("t", ""), ("response", "mean")]),
    "three levels": pd.MultiIndex.from_tuples([("a", 1, "x"), ("response", "", "y")]),
    "categories": pd.CategoricalIndex(["t", "x"]),
    "twice": pd.Index(["t", "t"]),
    "days": pd.date_range("2024-01-01", periods=2),
    "intervals": pd.interval_range(0, 2),
    "missing": pd.Index([None, np.nan], dtype=object),
    "numbers": pd.Index([1, 2], dtype="Int64"),
}


@pytest.mark.parametrize("labels", COLUMNS.values(), ids=COLUMNS)
@pytest.mark.parametrize("details", [False, True])
def test_column_labels_of_all_kinds(pool: sk.VLLMPool, labels: pd.Index, details: bool) -> None:
    df = pd.DataFrame([["a", 1.5], ["b", 2.5]])
    df.columns = labels
    answers = df.swarm.scatter(pd.Series(["a", "b"]), details=details)
    pd.testing.assert_frame_equal(pd.DataFrame(answers.iloc[:, :2].to_numpy()), pd.DataFrame(df.to_numpy()))
    assert answers.iloc[:, 2].tolist() == ["echo: a", "echo: b"]
    assert answers.columns[2] == "response" if labels.nlevels == 1 else answers.columns[2][0] == "response"
    again = answers.swarm.scatter(pd.Series(["a", "b"]), only_missing=True, details=details)
    pd.testing.assert_frame_equal(again, answers)
    assert stats().kept == 2


class Sealed(pd.DataFrame):
    """A frame that takes no more columns."""

    @property
    def _constructor(self) -> type[Sealed]:
        return Sealed

    def __setitem__(self, key: Any, value: Any) -> None:
        raise TypeError("this frame is sealed")


def test_a_frame_that_takes_no_answers_is_found_before_anything_is_sent(pool: sk.VLLMPool) -> None:
    df = Sealed({"t": ["a"]})
    with pytest.raises(sk.SettingError, match=r"\(Sealed\) cannot take.*'response'.*is sealed.*pandas.DataFrame\(df\)"):
        df.swarm.scatter("t")
    assert not asked(pool)
    assert pd.DataFrame(df).swarm.scatter("t")["response"].tolist() == ["echo: a"]


@pytest.mark.parametrize(
    "index",
    [
        pd.Index([3, 3, 1]),
        pd.MultiIndex.from_tuples([("a", 1), ("a", 1), ("b", 2)]),
        pd.MultiIndex.from_tuples([("a", np.nan), (None, 1), ("a", np.nan)]),
        pd.Index([None, np.nan, "x"], dtype=object),
        pd.CategoricalIndex(["k", "k", "l"]),
        pd.date_range("2024-01-01", periods=3, tz="Europe/Berlin"),
        pd.interval_range(0, 3),
        pd.Index([1.5, np.nan, np.nan], name="response"),
        pd.RangeIndex(10, 40, 10),
    ],
)
@pytest.mark.parametrize("n", [1, 2])
def test_indexes_of_all_kinds(pool: sk.VLLMPool, index: pd.Index, n: int) -> None:
    df = pd.DataFrame({"t": ["a", None, "c"]}, index=index)
    with pytest.warns(sk.SwarmWarning, match="missing value"):
        answers = df.swarm.scatter("t", n=n, details=True, temperature=1.0)
    assert answers.index.equals(index.repeat(n))
    assert answers.index.names == index.names
    assert answers["response"].isna().tolist() == [False] * n + [True] * n + [False] * n
    assert answers["response"].iloc[0] == "echo: a"


def test_half_a_surrogate_pair_is_an_answer_too(pool: sk.VLLMPool, tmp_path: Any) -> None:
    """A model may stop within a character; pandas 3 cannot hold the half, and all rows would be lost with it."""
    df = pd.DataFrame({"t": pd.Series(["good", "half \ud83d", "back\\slash \ud83d"], dtype=object)})
    answers = df.swarm.scatter("t", details=True)
    escaped = TEXT == "str"
    assert answers["response"].tolist() == [
        "echo: good",
        "echo: half \\ud83d" if escaped else "echo: half \ud83d",
        "echo: back\\slash \\ud83d" if escaped else "echo: back\\slash \ud83d",
    ]
    assert answers["response"].dtype == TEXT
    tree = df.swarm.tree_reduce("t", "{responses}", fanin=3)
    assert tree["n_leaves"].tolist() == [3]
    assert tree["response"][0].startswith("echo: good")
    assert len(list(df.swarm.iter_scatter("t"))) >= 1
    assert len(df.swarm.compare("t", repeats=1).differing) == 0
    df.swarm.scatter("t", store=tmp_path)
    again = df.swarm.scatter("t", store=tmp_path)
    assert stats().stored == 3
    assert again["response"].tolist() == answers["response"].tolist()
    assert len(sk.open_store(tmp_path).to_frame()) == 3


# ---- what is kept stays as it is ------------------------------

DETAILS = ["finish_reason", "endpoint", "prompt_tokens", "completion_tokens", "latency_s", "attempts"]


@pytest.mark.parametrize("details", [False, True])
@pytest.mark.parametrize("from_file", [False, True])
def test_kept_rows_keep_their_details_and_asked_ones_get_new_ones(
    pool: sk.VLLMPool, tmp_path: Any, details: bool, from_file: bool
) -> None:
    df = pd.DataFrame({"t": ["a", "b", "c", "d"]})
    first = df.swarm.scatter("t", details=True)
    names = [f"response_{name}" for name in DETAILS]
    first.loc[1, "response"] = None
    first.loc[1, names] = None
    first.loc[1, "response_attempts"] = 9
    dtypes = first[names].dtypes
    earlier = first.copy()
    if from_file:
        first.to_csv(tmp_path / "first.csv", index=False)
        first = pd.read_csv(tmp_path / "first.csv")
    again = first.swarm.scatter("t", only_missing=True, details=details)
    kept = [0, 2, 3]
    pd.testing.assert_frame_equal(again.loc[kept, names], earlier.loc[kept, names])
    assert again[names].dtypes.equals(dtypes)
    assert again["response_finish_reason"][1] == "stop"
    assert again["response_attempts"][1] == 1, "not that of the earlier answer"
    assert again["response_endpoint"].notna().all()
    assert stats().kept == 3


@pytest.mark.filterwarnings("ignore:1 of 2 answers was cut off")
def test_details_are_never_those_of_an_answer_that_was_replaced(pool: sk.VLLMPool) -> None:
    first = pd.DataFrame({"t": ["one two three four", "b"]}).swarm.scatter("t", details=True, max_tokens=3)
    assert first["response_finish_reason"].tolist() == ["length", "stop"]
    again = first.swarm.scatter("t")
    assert again["response_finish_reason"].tolist() == ["stop", "stop"]
    assert list(again.columns) == list(first.columns)


def test_a_users_own_column_beside_the_answers_is_left_alone(pool: sk.VLLMPool) -> None:
    df = pd.DataFrame({"t": ["a"], "response_endpoint": ["mine"], "response_sample": [7]})
    answers = df.swarm.scatter("t")
    assert answers[["response_endpoint", "response_sample"]].to_numpy().tolist() == [["mine", 7]]


@pytest.mark.parametrize(
    ("kept", "texts"),
    [
        (pd.Series([1.0, None, 7.0]), ["1", "7"]),
        (pd.Series([0.5, None, 7.0], dtype="float32"), ["0.5", "7"]),
        (pd.Series([1, None, 7], dtype="Int64"), ["1", "7"]),
        (pd.Series([True, None, False], dtype="boolean"), ["True", "False"]),
        (pd.Series([True, None, False], dtype=object), ["True", "False"]),
    ],
)
def test_answers_that_pandas_read_as_numbers_are_warned_of(
    pool: sk.VLLMPool, kept: pd.Series, texts: list[str]
) -> None:
    df = pd.DataFrame({"t": list("abc"), "response": kept})
    with pytest.warns(sk.SwarmWarning, match=r"'response' is not text.*2 answers.*007.*'response': str"):
        answers = df.swarm.scatter("t", only_missing=True)
    assert answers["response"].tolist() == [texts[0], "echo: b", texts[1]]


@pytest.mark.parametrize("dtype", [object, "string", "category", "string[pyarrow]"])
def test_answers_that_are_text_are_kept_without_a_word(pool: sk.VLLMPool, dtype: Any) -> None:
    df = pd.DataFrame({"t": list("abc"), "response": pd.Series(["1.0", None, "007"], dtype=dtype)})
    answers = df.swarm.scatter("t", only_missing=True)
    assert answers["response"].tolist() == ["1.0", "echo: b", "007"]


def test_answers_that_were_parsed_are_not_turned_into_their_repr(pool: sk.VLLMPool) -> None:
    df = pd.DataFrame({"t": list("ab"), "response": pd.Series([{"a": 1}, None], dtype=object)})
    with pytest.raises(sk.PromptError, match="the column of answers 'response' holds a dict"):
        df.swarm.scatter("t", only_missing=True)
    assert not asked(pool)


# ---- values are sent as pandas shows them ------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16", "Float32", "float[pyarrow]", "object", "Sparse[float32]"])
def test_short_floats_have_their_own_digits(pool: sk.VLLMPool, dtype: str) -> None:
    column = pd.Series([0.1, 2.5], dtype="float32")
    df = pd.DataFrame({"v": pd.Series(list(column.array), dtype=object) if dtype == "object" else column.astype(dtype)})
    shown = ["echo: 0.1", "echo: 2.5"]
    for prompt in ("{v}", "v", lambda row: str(row.v), lambda row: f"{row['v']}"):
        assert df.swarm.scatter(prompt)["response"].tolist() == shown
    assert df.swarm.scatter("{v:.2f}")["response"].tolist() == ["echo: 0.10", "echo: 2.50"]
    tree = df.assign(t="x").loc[[0, 0, 1, 1]].swarm.tree_reduce("t", "{v}: {responses}", by="v", fanin=2)
    assert tree["response"].tolist() == ["echo: 0.1: x\n---\nx", "echo: 2.5: x\n---\nx"]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), max_size=5), st.sampled_from([32, 64]))
def test_the_text_of_a_float_is_that_of_its_csv(values: list[float], width: int) -> None:
    from swarmkit.frames.prompts import make_prompts

    column = pd.Series(values, dtype=f"float{width}")
    texts = make_prompts(pd.DataFrame({"v": column}), "{v}").texts
    assert [np.dtype(f"float{width}").type(text) for text in texts] == column.tolist()
    assert texts == [str(float(v)) for v in column.to_csv(index=False, header=False).split()]


@pytest.mark.parametrize("dtype", ["float64", "Float64", "Float32", "double[pyarrow]", "Sparse[float64]"])
def test_nan_is_missing_in_every_dtype(pool: sk.VLLMPool, dtype: str) -> None:
    zero = pd.Series([0.0, 1.0], dtype=dtype)
    with np.errstate(all="ignore"):
        df = pd.DataFrame({"share": zero / zero, "t": "x"})
    with pytest.warns(sk.SwarmWarning, match="missing value"):
        answers = df.swarm.scatter("{share}")
    assert answers["response"].isna().tolist() == [True, False]
    assert answers["response"][1] == "echo: 1.0"
    with pytest.warns(sk.SwarmWarning, match="1 row without the key 'share'"):
        assert len(df.swarm.tree_reduce("t", "{responses}", by="share")) == 1


def arrow(values: list[Any], kind: Any) -> pd.Series:
    import pyarrow as pa

    return pd.Series(values, dtype=pd.ArrowDtype(kind(pa)))


CONTAINERS = {
    "list": lambda: arrow([["a"], None], lambda pa: pa.list_(pa.string())),
    "fixed list": lambda: arrow([[1, 2], None], lambda pa: pa.list_(pa.int64(), 2)),
    "struct": lambda: arrow([{"a": 1}, None], lambda pa: pa.struct([("a", pa.int64())])),
    "map": lambda: arrow([[("a", 1)], None], lambda pa: pa.map_(pa.string(), pa.int64())),
    "binary": lambda: arrow([b"abc", None], lambda pa: pa.binary()),
    "categories": lambda: pd.Series(pd.Categorical([("a", 1), None])),
    "memoryview": lambda: pd.Series([memoryview(b"abc"), None], dtype=object),
    "an object without a text": lambda: pd.Series([object(), None], dtype=object),
}


@pytest.mark.parametrize("make", CONTAINERS.values(), ids=CONTAINERS)
@pytest.mark.parametrize("prompt", ["v", "About {v}"])
def test_containers_are_refused_in_every_dtype(pool: sk.VLLMPool, make: Any, prompt: str) -> None:
    df = pd.DataFrame({"v": make()}, index=["bad", "none"])
    df["v"] = make().to_numpy() if df["v"].isna().all() and make().dtype == object else make().set_axis(df.index)
    with pytest.raises(sk.PromptError, match=r"column 'v' holds a \w+ \(row 'bad'\)"):
        df.swarm.scatter(prompt)
    assert not asked(pool)


@pytest.mark.parametrize(
    ("column", "shown"),
    [
        (lambda: arrow([1, None], lambda pa: pa.int64()), "1"),
        (lambda: arrow(["1.10", None], lambda pa: pa.string()).astype("string"), "1.10"),
        (lambda: arrow([pd.Timestamp("2024-05-01").date(), None], lambda pa: pa.date32()), "2024-05-01"),
        (lambda: pd.Series([pd.Timestamp("2024-05-01"), None]), "2024-05-01 00:00:00"),
        (lambda: pd.Series([pd.Timedelta("1h"), None]), "0 days 01:00:00"),
        (lambda: pd.Series([pd.Period("2024-05"), None], dtype="period[M]"), "2024-05"),
        (lambda: pd.Series([pd.Interval(0.5, 1.0), None]), "(0.5, 1.0]"),
        (lambda: pd.Series(pd.Categorical(["x", None])), "x"),
        (lambda: pd.Series(pd.Categorical([1.5, None])), "1.5"),
        (lambda: pd.Series([1 + 2j, None]), "(1+2j)"),
    ],
)
def test_values_of_every_dtype_are_sent_as_pandas_shows_them(pool: sk.VLLMPool, column: Any, shown: str) -> None:
    df = pd.DataFrame({"v": column()})
    for prompt in ("v", "{v}"):
        with pytest.warns(sk.SwarmWarning, match="missing value"):
            answers = df.swarm.scatter(prompt)
        assert answers["response"][0] == f"echo: {shown}"
        assert pd.isna(answers["response"][1])


def test_columns_named_like_methods_are_columns(pool: sk.VLLMPool) -> None:
    df = pd.DataFrame({"values": ["v"], "items": ["i"], "get": ["g"], "q": ["a"]})
    answers = df.swarm.scatter(lambda row: f"{row.q} {row.values} {row.items} {row.get} {dict(row)['keys' and 'q']}")
    assert answers["response"].tolist() == ["echo: a v i g a"]


def test_a_name_that_two_columns_share_as_text_is_refused(pool: sk.VLLMPool) -> None:
    df = pd.DataFrame([["number", "text"]], columns=pd.Index([1, "1"], dtype=object))
    with pytest.raises(sk.PromptError, match=r"\{1\} may be the column '1' and 1"):
        df.swarm.scatter("{1}")
    assert df.swarm.scatter("1")["response"].tolist() == ["echo: text"]


def test_a_series_is_seen_as_it_is_now(pool: sk.VLLMPool) -> None:
    s = pd.Series(["a", "b"])
    s.swarm.scatter()
    s.loc[9] = "added"
    s.loc[0] = "changed"
    assert s.swarm.scatter()["value"].to_dict() == s.to_dict()
    assert s.swarm.preview(rows=9)["sent"].size == 3


# ---- wrapping by hand ------------------------------


@pytest.fixture(scope="module")
def with_bos() -> Any:
    """A model with a first token, which its server puts before prompts."""
    with sk.local(1, engine="echo", bos=True) as swarm:
        yield swarm


@pytest.mark.parametrize("delivery", ["auto", "rows", "batch"])
@pytest.mark.parametrize("chat", [("Q: ", "\nA:"), lambda text: f"Q: {text}\nA:"])
def test_what_is_wrapped_by_hand_begins_as_what_is_sent_as_it_is(with_bos: Any, chat: Any, delivery: Any) -> None:
    options: dict[str, Any] = {"details": True, "delivery": delivery}
    with sk.connect(with_bos) as pool:
        plain = pd.DataFrame({"t": ["Q: why\nA:"]}).swarm.scatter("t", pool=pool, chat=None, **options)
        asked = pd.DataFrame({"t": ["why"]})
        by_hand = asked.swarm.scatter("t", pool=pool, chat=chat, **options)
        same = ["response", "response_prompt_tokens"]
        pd.testing.assert_frame_equal(by_hand[same], plain[same])
        shown = asked.swarm.preview("t", pool=pool, chat=chat)
        assert shown["tokens"].tolist() == by_hand["response_prompt_tokens"].tolist()
        options["extra_body"] = {"add_special_tokens": False}  # it has the last word
        without = asked.swarm.scatter("t", pool=pool, chat=chat, **options)
        assert (without["response_prompt_tokens"] < by_hand["response_prompt_tokens"]).all(), (
            "extra_body has the last word"
        )


def test_a_first_token_in_the_wrapping_is_not_doubled(with_bos: Any) -> None:
    with sk.connect(with_bos) as pool:
        asked = pd.DataFrame({"t": ["why"]})
        learned = asked.swarm.scatter("t", pool=pool, details=True)
        prefix, suffix = asked.assign(t="SENTINEL").swarm.preview("t", pool=pool)["sent"][0].split("SENTINEL")
        for chat in ((prefix, suffix), lambda text: prefix + text + suffix):
            by_hand = asked.swarm.scatter("t", pool=pool, chat=chat, details=True)
            assert by_hand["response_prompt_tokens"].tolist() == learned["response_prompt_tokens"].tolist()


@pytest.mark.parametrize("field", ["reasoning_effort", "tools"])
def test_what_goes_to_the_chat_template_is_not_dropped(pool: sk.VLLMPool, field: str) -> None:
    """Completions are wrapped here, by the template without these arguments; others are learned into it
    (``test_templates.py``)."""
    df = pd.DataFrame({"t": ["a", "b"]})
    body = {field: {"enable_thinking": False}}
    answers = df.swarm.scatter("t", extra_body=body)
    assert answers["response"].tolist() == ["echo: a", "echo: b"]
    route = f"{'chat' if field == 'tools' else 'chat-batch'} (for {field})"
    assert [*stats().routes] == [route]
    df.swarm.scatter("t")
    assert [*stats().routes] != [route]
    for chat in (None, ("Q: ", "A:")):
        with pytest.raises(sk.SettingError, match=rf"{field} in extra_body needs chat='auto'"):
            df.swarm.scatter("t", extra_body=body, chat=chat)


# ---- parameters ------------------------------


def test_numpy_numbers_are_numbers(pool: sk.VLLMPool) -> None:
    df = pd.DataFrame({"q": ["1 2"]})
    numbers: dict[str, Any] = {"temperature": np.float32(0.7), "seed": np.int64(5)}
    answers = df.swarm.scatter("{q}", **numbers, max_tokens=np.int64(8), n=np.int8(2))
    assert len(answers) == 2
    shown = df.swarm.scatter("{q}", stop=np.array(["2"]), extra_body={"x": {"y": [np.float32(0.1)]}})
    assert shown["response"].tolist() == ["echo: 1 "]
    from swarmkit.frames.call import arguments, read_options

    call = read_options(arguments(sk.scatter, {"pool": pool, **numbers}))
    assert dict(call.spec.params) == {"temperature": 0.7, "seed": 5}
    with sk.connect(pool.endpoints[0], max_tokens=np.int64(3)) as other:
        assert other.max_tokens == 3


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"stop": pd.Series(["a"])}, r"stop= is a Series.*\.tolist\(\)"),
        ({"temperature": float("nan")}, "temperature= is nan"),
        ({"top_p": np.float64("inf")}, "top_p= is inf"),
        ({"extra_body": {"a": [{"b": {1}}]}}, r"a\[0\]\['b'\]= is a set"),
        ({"extra_body": ["a"]}, "extra_body=.*must be a dict"),
        ({"max_tokens": True}, "max_tokens=True"),
    ],
)
def test_parameters_that_cannot_be_sent_are_named(pool: sk.VLLMPool, options: dict[str, Any], words: str) -> None:
    with pytest.raises(sk.SettingError, match=words):
        pd.DataFrame({"q": ["a"]}).swarm.scatter("q", **options)


@pytest.mark.parametrize("rows", [["a", "b"], pd.Series(["a"]), {"t": ["a"]}, "text", 7, None, np.array(["a"])])
@pytest.mark.parametrize("verb", ["scatter", "submit", "iter_scatter", "tree_reduce", "preview", "compare"])
def test_rows_that_are_no_frame(pool: sk.VLLMPool, rows: Any, verb: str) -> None:
    arguments = ("t", "{responses}") if verb == "tree_reduce" else ("{t}",)
    call = getattr(sk, verb)
    with pytest.raises(sk.SettingError, match="must be a pandas DataFrame; got a"):
        list(call(rows, *arguments))  # iter_scatter begins with its first row


def test_braces_of_json_are_explained(pool: sk.VLLMPool) -> None:
    with pytest.raises(sk.UnknownColumnError, match=r"Write \{\{ and \}\} for literal braces"):
        pd.DataFrame({"q": ["a"]}).swarm.scatter('Answer as {"a": 1}: {q}')


# ---- trees ------------------------------


@pytest.mark.parametrize("trace", [False, True])
@pytest.mark.parametrize(
    "name",
    [
        *("response", "response_error", "n_leaves", "n_levels", "n_missing", "n_shortened"),
        *("group", "level", "parent", "node", "error", "shortened"),
    ],
)
def test_keys_are_never_replaced_by_columns_of_the_result(pool: sk.VLLMPool, name: str, trace: bool) -> None:
    notes = pd.DataFrame({name: ["yeast", "yeast", "mouse", "mouse"], "note": list("abcd")})
    free = notes.rename(columns={name: "k"}).swarm.tree_reduce("note", "Merge {responses}", by="k", trace=trace)
    if name in free.columns:
        sent = pool.last_run
        with pytest.raises(sk.SettingError, match=rf"by='{name}': the result has a column of this name.*rename"):
            notes.swarm.tree_reduce("note", "Merge {responses}", by=name, fanin=2, trace=trace)
        assert pool.last_run is sent
    else:
        top = notes.swarm.tree_reduce("note", "Merge {responses}", by=name, fanin=2, trace=trace)
        assert set(top[name]) == {"yeast", "mouse"}
    if not trace and name.startswith("response"):
        other = notes.swarm.tree_reduce("note", "Merge {responses}", by=name, fanin=2, out="merged")
        assert other[name].tolist() == ["mouse", "yeast"], "out= helps, as the message says"


def test_a_key_named_like_a_placeholder_of_the_tree(pool: sk.VLLMPool) -> None:
    notes = pd.DataFrame({"level": ["species", "species"], "responses": "r", "note": list("ab")})
    with pytest.raises(sk.PromptError, match=r"\{level\} is a placeholder.*rename"):
        notes.swarm.tree_reduce("note", "About the {level}: {responses}", by="level")
    with pytest.raises(sk.PromptError, match=r"\{responses\} is a placeholder.*rename"):
        notes.swarm.tree_reduce("note", "Merge {responses}", by="responses")
    top = notes.swarm.tree_reduce("note", "Merge {responses}", by="level", fanin=2)
    assert top["level"].tolist() == ["species"]
    assert not top["response"].str.contains("species")[0]


@pytest.mark.parametrize("out", ["n_leaves", "n_missing", "", 7])
def test_answers_of_a_tree_are_not_replaced_by_counts(pool: sk.VLLMPool, out: Any) -> None:
    with pytest.raises(sk.SettingError, match=f"out={out!r}"):
        pd.DataFrame({"t": list("ab")}).swarm.tree_reduce("t", "{responses}", out=out)


@pytest.mark.parametrize(
    "keys",
    [
        pd.Series([1.5, 2.5, 2.5, None], dtype="float32"),
        pd.Series([1, 2, 2, None], dtype="Int64"),
        pd.Series(pd.Categorical(["b", "a", "a", None], categories=["b", "a", "c"], ordered=True)),
        pd.Series(pd.to_datetime(["2024-01-01", "2024-01-02", "2024-01-02", None])).dt.tz_localize("UTC"),
        pd.Series(["b", "a", "a", None], dtype=TEXT),
        pd.Series([True, False, False, None], dtype="boolean"),
    ],
)
def test_keys_keep_their_dtype_and_order(pool: sk.VLLMPool, keys: pd.Series) -> None:
    df = pd.DataFrame({"k": keys, "t": ["x", "y", "z", "lost"]}).set_axis([5, 5, 1, 5])
    with pytest.warns(sk.SwarmWarning, match="1 row without the key 'k'"):
        tree = df.swarm.tree_reduce("t", "{k}: {responses}", by="k", fanin=2)
    expected = df.groupby("k", observed=True)["t"].agg(list).reset_index()
    pd.testing.assert_series_equal(tree["k"], expected["k"])
    assert tree["n_leaves"].tolist() == expected["t"].map(len).tolist()
    merged = next(label for label, texts in zip(expected["k"], expected["t"], strict=True) if len(texts) == 2)
    assert f"echo: {merged}: y\n---\nz" in tree["response"].tolist()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["a", "b", None]), st.integers(0, 2)), max_size=12))
def test_groups_are_those_of_groupby(rows: list[tuple[str | None, int]]) -> None:
    from swarmkit.frames.tree_reduce import ReductionTrees

    df = pd.DataFrame({"k": pd.Series([k for k, _ in rows], dtype=TEXT), "i": [i for _, i in rows]})
    df["t"] = [f"t{i}" for i in range(len(df))]
    trees = ReductionTrees(df, "t", "{responses}", ["k", "i"], "auto", "out")
    leaves: dict[tuple[Any, ...], list[str | None]] = {key: [] for key in trees.groups}
    for node in trees.nodes:
        leaves[trees.groups[node.group]].append(node.response)
    expected = {key: part["t"].tolist() for key, part in df.groupby(["k", "i"])} if len(df) else {}
    assert list(leaves.items()) == list(expected.items())


def test_what_is_shortened_is_counted(pool: sk.VLLMPool) -> None:
    df = pd.DataFrame({"g": list("aaab"), "t": ["first " * 2000, "second " * 2000, "third", "alone"]})
    with pytest.warns(sk.SwarmWarning, match="2 texts were shortened to fit the context"):
        top = df.swarm.tree_reduce("t", "{responses}", by="g", max_tokens=200)
    assert top["n_shortened"].dtype == "Int64"
    assert top["n_shortened"].tolist()[1] == 0
    assert top["n_shortened"].tolist()[0] >= 2
    fine = df.swarm.tree_reduce("t", "{responses}", by="t", max_tokens=200)
    assert fine["n_shortened"].tolist() == [0] * 4


def test_a_prompt_that_leaves_no_room_is_an_error_before_anything_is_sent(echo: sk.LocalSwarm) -> None:
    df = pd.DataFrame({"t": ["first text", "second text"]})
    with sk.connect(echo, model_max_context=1000) as pool:
        words = r"no room for texts to merge.*max_tokens=400.*template alone has.*Lower max_tokens="
        with pytest.raises(sk.SettingError, match=words):
            df.swarm.tree_reduce("t", "word " * 400 + "{responses}", max_tokens=400, pool=pool)
        assert not asked(pool)
        assert df.swarm.tree_reduce("t", "{responses}", max_tokens=100, pool=pool)["n_shortened"].tolist() == [0]


def test_errors_of_many_groups_are_found_in_one_pass(pool: sk.VLLMPool) -> None:
    """A pass over all nodes for each group took minutes here."""
    df = pd.DataFrame({"g": range(40_000), "t": "the only text of its group"})
    began = time.perf_counter()
    top = df.swarm.tree_reduce("t", "{responses}", by="g")
    assert time.perf_counter() - began < 15
    assert (top["response"] == df["t"]).all()
