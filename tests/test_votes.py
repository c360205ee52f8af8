"""Several answers to one question: votes, what they mean, how sure they are; and the rows of which a model says yes."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted import Call, Scripted

import swarmkit as sk

QUICK = sk.RetryPolicy(base_s=0.02, cap_s=0.2)


def entropy(shares: list[float]) -> float:
    return -sum(share * math.log(share) for share in shares if share)


# ---- vote ------------------------------


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("xyz"), st.sampled_from(["a", "b", " a\n", "c", None])), max_size=20))
def test_votes_are_counted_as_by_hand(rows: list[tuple[str, str | None]]) -> None:
    answers = pd.Series([r for _, r in rows], [label for label, _ in rows], dtype=object)
    frame = answers.to_frame("response")
    found = sk.vote(frame)
    assert found.index.tolist() == list(dict.fromkeys(label for label, _ in rows))
    for label, answer, agreement, spread, n_valid in found.itertuples():
        given_ = [r for own, r in rows if own == label and r is not None]
        counts = Counter(r.strip() for r in given_)
        assert n_valid == len(given_)
        if not given_:
            assert [pd.isna(answer), agreement, spread] == [True, pd.NA, pd.NA]
            continue
        winner, most = counts.most_common(1)[0]
        assert answer == next(r for r in given_ if r.strip() == winner)
        assert agreement == pytest.approx(most / len(given_))
        assert spread == pytest.approx(entropy([count / len(given_) for count in counts.values()]), abs=1e-12)


@pytest.mark.parametrize(
    "values",
    [
        pd.Series(["yes", "no", "no", None], dtype=pd.CategoricalDtype(["yes", "no"])),
        pd.Series([7, 8, 8, None], dtype="Int64"),
        pd.Series([0.5, 1.5, 1.5, np.nan], dtype="Float64"),
        pd.Series([0.5, 1.5, 1.5, np.nan]),
        pd.Series([True, False, False, None], dtype="boolean"),
        pd.Series(["a", "b", "b", None]),
        pd.Series([["a"], ["b", "c"], ["b", "c"], None]),
        pd.Series([np.array([1.5]), np.array([1, 2]), np.array([1.0, 2.0]), None]),
        pd.Series([{"a": [1]}, {"b": [1]}, {"b": [1]}, None]),
        pd.to_datetime(pd.Series(["2020-01-01", "2021-01-01", "2021-01-01", None])),
        pd.Series([7, 8, 8, None], dtype="int64[pyarrow]"),
    ],
    ids=lambda values: str(values.dtype),
)
def test_typed_answers_keep_their_dtype(values: pd.Series) -> None:
    frame = pd.DataFrame({"response_x": values.to_list()}, index=[3, 3, 3, 5])
    frame["response_x"] = values.array
    found = sk.vote(frame, "response_x")
    assert found["answer"].dtype == values.dtype
    assert np.all(found["answer"].iloc[0] == values[1])
    assert pd.isna(found["answer"].iloc[1])
    assert found["agreement"].tolist() == [pytest.approx(2 / 3), pd.NA]
    assert found["n_valid"].tolist() == [3, 0]
    assert {name: str(found[name].dtype) for name in ("agreement", "entropy", "n_valid")} == {
        **dict.fromkeys(("agreement", "entropy"), "Float64"), "n_valid": "Int64",
    }  # fmt: skip


def test_normalize_makes_the_answer_and_its_dtype() -> None:
    frame = pd.DataFrame({"response": ["It is 7.", "7", "8!", "who knows", "9"]}, index=["a"] * 4 + ["b"])

    def number(text: str) -> int | None:
        digits = "".join(filter(str.isdigit, text))
        return int(digits) if digits else None

    found = frame.swarm.vote(normalize=number)
    assert (found["answer"].tolist(), str(found["answer"].dtype)) == ([7, 9], "Int64")
    assert found["n_valid"].tolist() == [3, 1]
    lower = pd.Series(["Yes", "yes", "no"], index=[0, 0, 0]).swarm.vote(normalize=str.lower)
    assert lower["answer"].tolist() == ["yes"]
    with pytest.raises(sk.SettingError, match=r"normalize= failed on row 'a', 'It is 7.': ValueError"):
        frame.swarm.vote(normalize=int)


def test_answers_of_a_scatter_are_voted_on_by_row(pool: sk.VLLMPool) -> None:
    frame = pd.DataFrame({"q": ["a", None, "b"]}, index=pd.Index([30, 10, 20], name="id"))
    with pytest.warns(sk.SwarmWarning, match="1 of 3 rows failed"):
        answers = frame.swarm.scatter("q", n=3, temperature=1)
    found = answers.swarm.vote(normalize=lambda text: text.replace("#1", "").replace("#2", "").replace(" ", ""))
    assert found.index.equals(frame.index)
    assert found["n_valid"].tolist() == [3, 0, 3]
    assert found["answer"].tolist()[::2] == ["echo:a", "echo:b"]
    assert frame.join(found)["agreement"].tolist() == [1.0, pd.NA, 1.0]
    apart = answers.swarm.vote()
    assert apart["entropy"].tolist() == [pytest.approx(math.log(3)), pd.NA, pytest.approx(math.log(3))]


def test_what_is_not_valid_has_no_vote() -> None:
    frame = pd.DataFrame({"response": ["a", "b", "b"], "response_error": [None, "not valid: ...", None]}, index=[0] * 3)
    assert sk.vote(frame)[["n_valid", "agreement"]].values.tolist() == [[2, 0.5]]
    measured = pd.DataFrame({"std": [1.0, 1.0], "std_error": [0.1, 0.2]}, index=[0, 0])
    assert sk.vote(measured, "std")["n_valid"].tolist() == [2], "numbers are no errors"


def test_what_stands_beside_answers_is_found_with_several_levels_of_columns(pool: sk.VLLMPool) -> None:
    frame = pd.DataFrame({("of", "q"): ["a", "b"], ("of", "n"): [1, 2]})
    answers = frame.swarm.scatter(lambda row: row["('of', 'q')"], n=2)
    assert sk.vote(answers, "response")["n_valid"].tolist() == [2, 2]
    answers["response_error"] = ["not valid: ...", None, None, None]
    assert sk.vote(answers, "response")["n_valid"].tolist() == [1, 2]
    with pytest.warns(sk.SwarmWarning, match="stands for several rows with samples"):
        sk.vote(pd.concat([answers, answers]), "response")


def test_labels_of_several_rows_are_pointed_out() -> None:
    frame = pd.DataFrame({"response": list("aabb"), "response_sample": [0, 1, 0, 1]}, index=[7, 7, 7, 7])
    with pytest.warns(sk.SwarmWarning, match=r"the index label 7 stands for several rows .* df.reset_index\(\)"):
        assert sk.vote(frame)["n_valid"].tolist() == [4]


def test_labels_of_several_levels_and_missing_ones_are_labels() -> None:
    index = pd.MultiIndex.from_tuples([("a", 1), ("a", 2), ("a", 1)], names=["x", "y"])
    found = sk.vote(pd.DataFrame({"response": ["p", "q", "r"]}, index=index))
    assert found.index.equals(index[:2])
    assert found.index.names == ["x", "y"]
    found = sk.vote(pd.DataFrame({"response": ["p", "q", "p"]}, index=[np.nan, 1.0, np.nan]))
    assert found["n_valid"].tolist() == [2, 1]
    empty = sk.vote(pd.DataFrame({"response": pd.Series([], dtype=object)}))
    assert list(empty.columns) == ["answer", "agreement", "entropy", "n_valid"]
    with pytest.raises(sk.UnknownColumnError, match="Did you mean 'response'"):
        sk.vote(pd.DataFrame({"response": ["p"]}), "respons")


# ---- semantic entropy ------------------------------

FRANCE = pd.DataFrame(
    {"response": ["Paris", "It's Paris", "Paris", "Rome", "Oslo", None], "q": ["France"] * 5 + ["Norway"]},
    index=["fr"] * 4 + ["no"] * 2,
)
TOWNS = ("Paris", "Rome", "Oslo")


def judge(call: Call) -> None:
    """A model that knows towns: texts say the same if they name the same. It is sure to 0.9."""
    if not call.prompts:
        return call.reply(b'{"detail": "Not Found"}', "404 Not Found")
    told = []
    for prompt in call.prompts:
        texts, _, asked = prompt.partition("\n\nAnswer with exactly one")
        one, _, other = ([t for t in TOWNS if t in part] for part in texts.partition("2:"))
        places = (
            ["yes", "no"] if "yes, no" in asked or "A. yes" in asked else ["entailment", "neutral", "contradiction"]
        )
        letters = "A. " in asked
        right = 0 if one == other else len(places) - 1
        names = [("ABC"[i] if letters else name) for i, name in enumerate(places)]
        top = {name: math.log(0.9 if i == right else 0.1 / (len(names) - 1)) for i, name in enumerate(names)}
        told.append((names[right], top))
    choices = [
        {
            "index": i,
            "text": token,
            "finish_reason": "length",
            "logprobs": {"tokens": [token], "token_logprobs": [top[token]], "top_logprobs": [top]},
        }
        for i, (token, top) in enumerate(told)
    ]
    return call.reply(json.dumps({"choices": choices}).encode())


@pytest.fixture
def judges() -> Iterator[tuple[Scripted, sk.VLLMPool]]:
    with Scripted(judge) as server, sk.VLLMPool([server.address], model="m", delivery="batch", retry=QUICK) as pool:
        yield server, pool


@pytest.mark.filterwarnings("ignore:the labels are asked for as letters")
@pytest.mark.parametrize(("by", "weight"), [("nli", 2 * (0.9 + 0.05 / 2)), ("llm", 2 * 0.9)])
def test_answers_that_a_model_finds_the_same_are_one_cluster(
    judges: tuple[Scripted, sk.VLLMPool], by: Any, weight: float
) -> None:
    _, pool = judges
    found = FRANCE.swarm.semantic_entropy(by=by, prompt="q", pool=pool)
    assert found.index.tolist() == ["fr", "no"]
    assert found["n_clusters"].tolist() == [2, 1]
    assert found["n_valid"].tolist() == [4, 1]
    assert found["semantic_entropy"].tolist() == [pytest.approx(entropy([0.75, 0.25])), 0.0]
    assert found["weighted"].tolist() == [False, False]
    assert found["error"].isna().all()
    # The kernel of three texts by hand: exp(-0.3 L), where "Paris" counts twice.
    other = 2 * (0.05 + 0.05 / 2 if by == "nli" else 0.1)
    weights = np.array([[0, weight, other], [weight, 0, other], [other, other, 0]])
    laplacian = np.diag(weights.sum(axis=1)) - weights
    term, heat = np.eye(3), np.eye(3)
    for power in range(1, 40):
        term = term @ (-0.3 * laplacian) / power
        heat = heat + term
    kernel = heat / np.sqrt(np.outer(np.diag(heat), np.diag(heat)))
    kernel = kernel[np.ix_([0, 1, 0, 2], [0, 1, 0, 2])] / 4
    expected = entropy([value for value in np.linalg.eigvalsh(kernel) if value > 1e-10])
    assert found["kernel_entropy"].tolist() == [pytest.approx(expected), 0.0]
    every = FRANCE.swarm.semantic_entropy(by=by, return_all=True, pool=pool)
    assert every["response_cluster"].tolist() == [0, 0, 0, 1, 0, pd.NA]
    pd.testing.assert_frame_equal(every[["response", "q"]], FRANCE)


@pytest.mark.filterwarnings("ignore:the labels are asked for as letters")
def test_equal_texts_are_not_asked_about_and_a_resumed_call_asks_nothing(
    judges: tuple[Scripted, sk.VLLMPool], tmp_path: Any
) -> None:
    _, pool = judges
    first = FRANCE.swarm.semantic_entropy(by="nli", pool=pool, store=tmp_path)
    assert sk.last_run().stats.answered == 6, "three texts, in both directions"
    again = FRANCE.swarm.semantic_entropy(by="nli", pool=pool, store=tmp_path)
    assert (sk.last_run().stats.stored, sk.last_run().stats.answered) == (6, 0)
    pd.testing.assert_frame_equal(again, first)
    FRANCE.swarm.semantic_entropy(by="llm", pool=pool)
    assert sk.last_run().stats.answered == 3


@pytest.mark.filterwarnings("ignore:the labels are asked for as letters")
def test_a_question_whose_answers_cannot_be_compared_says_why() -> None:
    def script(call: Call) -> None:
        if any("Rome" in prompt for prompt in call.prompts):
            return call.reply(b'{"error": {"message": "no Rome"}}', "400 Bad Request")
        return judge(call)

    frame = pd.DataFrame({"response": ["Paris", "Rome", "Oslo", "in Oslo"]}, index=[0, 0, 1, 1])
    with (
        Scripted(script) as server,
        sk.VLLMPool([server.address], model="m", delivery="batch", retry=QUICK) as pool,
        pytest.warns(sk.SwarmWarning, match="1 of 2 rows failed(.|\n)*their index labels have no entropy"),
    ):
        found = frame.swarm.semantic_entropy(by="llm", pool=pool)
    assert found["semantic_entropy"].tolist() == [pd.NA, 0.0]
    assert found["n_valid"].tolist() == [2, 2]
    assert "no Rome" in found["error"].iloc[0]
    assert pd.isna(found["error"].iloc[1])


def test_log_probabilities_weigh_answers_by_their_length() -> None:
    """Kuhn et al. 2023, table 1: 0.5 + 0.4 for Paris, 0.1 for London; here of answers of 1, 2 and 4 tokens."""
    frame = pd.DataFrame(
        {
            "response": ["Paris", "It's Paris", "London"],
            "response_logprob": [math.log(0.5), 2 * math.log(0.4), 4 * math.log(0.1)],
            "response_completion_tokens": [1, 2, 4],
            "v": [[1, 0], [1, 0.1], [0, 1]],
        },
        index=[0, 0, 0],
    )
    found = sk.semantic_entropy(frame, by="embedding", vectors="v")
    assert found["semantic_entropy"].tolist() == [pytest.approx(entropy([0.9, 0.1]))]
    assert found["semantic_entropy"].round(2).tolist() == [0.33]
    assert found["weighted"].tolist() == [True]
    each = sk.semantic_entropy(frame, by="embedding", vectors="v", threshold=0.9999)
    assert each["semantic_entropy"].round(2).tolist() == [0.94]
    gap = frame.assign(response_logprob=[-1.0, None, -1.0])
    assert sk.semantic_entropy(gap, by="embedding", vectors="v")["semantic_entropy"].tolist() == [
        pytest.approx(entropy([2 / 3, 1 / 3]))
    ]
    with pytest.warns(sk.SwarmWarning, match=r"the number of their tokens is not known.*details=True"):
        sk.semantic_entropy(frame.drop(columns="response_completion_tokens"), by="embedding", vectors="v")


def test_a_scatter_with_log_probabilities_has_what_is_needed(pool: sk.VLLMPool) -> None:
    answers = pd.DataFrame({"q": ["a", "b b b"]}).swarm.scatter("q", n=3, temperature=1, logprobs=0, details=True)
    hot = dict(zip(answers["response"], np.eye(6), strict=True))
    found = answers.swarm.semantic_entropy(by="embedding", vectors=lambda texts: np.array([hot[t] for t in texts]))
    assert found["weighted"].all()
    tokens = answers["response_token_logprobs"].map(len)
    logs = (answers["response_logprob"] / tokens).astype(float)
    for label in (0, 1):
        weights = np.exp(logs[label])
        assert found["semantic_entropy"][label] == pytest.approx(entropy(list(weights / weights.sum())))
    assert found["kernel_entropy"].tolist() == pytest.approx([math.log(3)] * 2), "each counts the same here"


def test_vectors_say_what_means_the_same(pool: sk.VLLMPool) -> None:
    frame = FRANCE.assign(v=[[1, 0], [2, 0], [1, 0], [0, 1], [1, 1], [1, 1]])
    towns = {"Paris": 0, "Rome": 1, "Oslo": 2}

    def embed(texts: list[str]) -> list[list[float]]:
        assert len(texts) == len(set(texts)), "each text once"
        return [list(np.eye(3)[next(n for town, n in towns.items() if town in text)]) for text in texts]

    expected = [pytest.approx(entropy([0.75, 0.25])), 0.0]
    for vectors in ("v", np.array(frame["v"].tolist()), embed):
        found = frame.swarm.semantic_entropy(by="embedding", vectors=vectors)
        assert found["semantic_entropy"].tolist() == expected
        assert found["kernel_entropy"].tolist() == [expected[0], pytest.approx(0, abs=1e-12)], "all at right angles"
    every = frame["response"].swarm.semantic_entropy(by="embedding", vectors=embed, return_all=True)
    assert every["response_cluster"].tolist() == [0, 0, 0, 1, 0, pd.NA]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"by": "words"}, "by='words': must be 'nli', 'embedding' or 'llm'"),
        ({"by": "embedding"}, "by='embedding' needs vectors="),
        ({"by": "embedding", "vectors": "v", "pool": "h"}, "pool= means nothing with by='embedding'"),
        ({"by": "embedding", "vectors": "v", "prompt": "q"}, "prompt= means nothing with by='embedding'"),
        ({"by": "embedding", "vectors": lambda texts: np.zeros((1, 2))}, r"gave the shape \(1, 2\) for 4 texts"),
        ({"by": "embedding", "vectors": "v", "threshold": 9}, "threshold=9: must be a cosine"),
        ({"by": "nli", "vectors": "v"}, "vectors= means nothing with by='nli'"),
        ({"by": "llm", "threshold": 0.5}, "threshold= means nothing with by='llm'"),
        ({"by": "llm", "n": 2}, "semantic_entropy takes no n="),
    ],
)
def test_what_semantic_entropy_cannot_do_is_said(options: dict[str, Any], message: str) -> None:
    with pytest.raises((sk.SettingError, TypeError), match=message):
        FRANCE.assign(v=[[1, 0]] * 6).swarm.semantic_entropy(**options)


# ---- filter ------------------------------

ROWS = pd.DataFrame({"q": [f"is item {i} any good" for i in range(60)]}, index=range(100, 160))


def test_rows_are_kept_by_the_probability_of_yes(pool: sk.VLLMPool) -> None:
    known = ROWS.swarm.classify("q", ["yes", "no"], details=True)["p_yes"]
    for threshold in (0.0, 0.3, 0.5, 0.9, 1.0):
        kept = ROWS.swarm.filter("q", threshold)
        pd.testing.assert_frame_equal(kept, ROWS[known >= threshold])
    rows = ROWS.swarm.filter("{q}", threshold=0.3, return_all=True)
    assert list(rows.columns) == ["q", "keep", "keep_error", "keep_p"]
    assert rows.index.equals(ROWS.index)
    assert rows["keep_p"].to_numpy(float) == pytest.approx(known.to_numpy(float))
    assert (str(rows["keep"].dtype), str(rows["keep_p"].dtype)) == ("boolean", "Float64")
    assert rows["keep"].tolist() == (known >= 0.3).tolist()
    assert 0 < rows["keep"].sum() < 60
    texts = ROWS["q"].swarm.filter("{value}", threshold=0.3, out="good", return_all=True)
    assert texts["good"].tolist() == rows["keep"].tolist()


@pytest.mark.parametrize("name", ["keep", "keep_error", "keep_p"])
def test_columns_of_the_frame_are_in_nobodys_way_where_only_rows_are_returned(pool: sk.VLLMPool, name: str) -> None:
    frame = ROWS[:10].assign(**{name: range(10)})
    kept = frame.swarm.filter("q")
    pd.testing.assert_frame_equal(kept, frame.loc[ROWS[:10].swarm.filter("q").index])
    levels = pd.concat({name: ROWS[:10]}, axis=1)
    assert levels.swarm.filter(lambda row: row["('" + name + "', 'q')"]).equals(levels.loc[kept.index])


def test_rows_that_failed_are_left_out_and_said(pool: sk.VLLMPool, tmp_path: Any) -> None:
    frame = ROWS[:10].assign(q=[None, *ROWS["q"][1:10]])
    with pytest.warns(sk.SwarmWarning, match="1 of 10 rows failed(.|\n)*They are left out; return_all=True"):
        kept = frame.swarm.filter("q", threshold=0, debias=True, store=tmp_path)
    assert kept.index.tolist() == list(range(101, 110))
    with pytest.warns(sk.SwarmWarning, match="1 of 10 rows failed"):
        rows = frame.swarm.filter("q", threshold=0, debias=True, store=tmp_path, return_all=True)
    assert sk.last_run().stats.answered == 0, "stored"
    assert rows["keep"].tolist() == [pd.NA] + [True] * 9
    assert "missing value" in rows["keep_error"].iloc[0]
    with pytest.raises(sk.ScatterError, match="1 of 10 rows failed") as error:
        frame.swarm.filter("q", on_error="raise")
    assert list(error.value.frame.columns) == ["q", "keep", "keep_error", "keep_p"]


def test_without_log_probabilities_the_answer_decides() -> None:
    frame = pd.DataFrame({"q": [f"row {i}: {'no' if i % 3 else 'yes'}" for i in range(12)]})
    with (
        sk.local(1, engine="echo", logprobs="ignore") as swarm,
        sk.connect(swarm, retry=QUICK) as pool,
        pytest.warns(sk.SwarmWarning, match="keep_p is missing, and the answers are held to the labels"),
    ):
        rows = frame.swarm.filter("q", 0.9, instruction=None, return_all=True, pool=pool)
    assert rows["keep"].tolist() == [i % 3 == 0 for i in range(12)]
    assert rows["keep_p"].isna().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": 1.5}, "threshold=1.5: must be a probability"),
        ({"out": "q", "return_all": True}, "out='q' would overwrite 'q', which the prompt reads"),
        ({"details": True}, "filter takes no details="),
        ({"only_missing": True}, "filter takes no only_missing="),
        ({"labels": ["a", "b"]}, "filter takes no labels=, which classify takes"),
    ],
)
def test_what_filter_cannot_do_is_said(pool: sk.VLLMPool, options: dict[str, Any], message: str) -> None:
    with pytest.raises((sk.SettingError, TypeError), match=message):
        ROWS.swarm.filter("q", **options)
