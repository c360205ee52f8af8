"""Nothing is cut silently: prompts that are too long, answers without tokens left, texts of a tree."""

from __future__ import annotations

import random
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import swarmkit as sk

QUICK = sk.RetryPolicy(base_s=0.02, cap_s=0.2)
CONTEXT, ANSWER = 400, 250


def texts() -> list[str]:
    draw = random.Random(7)
    alphabets = ["abc defg ", "äöü ß é", "遺伝子 の", "👩‍🔬🧬 x", "-<|x|> "]
    return ["".join(draw.choices(draw.choice(alphabets), k=draw.choice([5, 280, 700, 3000]))) for _ in range(60)]


FRAME = pd.DataFrame({"t": texts()}, index=pd.Index(range(500, 560), name="id"))


@pytest.fixture(scope="module")
def small() -> Iterator[sk.LocalSwarm]:
    """Two endpoints with a small context."""
    with sk.local(1, engine="echo", addresses=2, max_model_len=CONTEXT) as swarm:
        yield swarm


@pytest.fixture
def pool(small: sk.LocalSwarm) -> Iterator[sk.VLLMPool]:
    with sk.connect(small, retry=QUICK, max_tokens=ANSWER) as pool:
        yield pool


@pytest.mark.parametrize("too_long", ["truncate", "truncate_left"])
@pytest.mark.parametrize("options", [{"mode": "batch"}, {"mode": "single"}, {"chat": None}], ids=str)
def test_prompts_are_cut_to_what_fits(pool: sk.VLLMPool, too_long: Any, options: dict[str, Any]) -> None:
    with pytest.warns(sk.SwarmWarning) as warned:
        answers = FRAME.swarm.scatter("t", too_long=too_long, details=True, **options)
    cut = answers["response_truncated"]
    assert [str(w.message) for w in warned] == [f"{cut.sum()} of 60 prompts were cut to fit the context of 400 tokens"]
    assert sk.last_run().stats.truncated == cut.sum()
    assert 15 < cut.sum() < 50
    assert cut.dtype == "boolean"
    assert answers["response_error"].isna().all()
    assert answers.index.equals(FRAME.index)
    assert (answers["response_finish_reason"] == "stop").all(), "each answer has its whole max_tokens"
    for text, is_cut, answer in zip(FRAME["t"], cut, answers["response"], strict=True):
        said = answer.removeprefix("echo: ")
        assert (said == text) != is_cut
        assert text.startswith(said) if too_long == "truncate" else text.endswith(said)
    tokens = answers["response_prompt_tokens"]
    assert tokens.max() <= CONTEXT - ANSWER
    assert tokens[cut].min() > CONTEXT - ANSWER - 4, "no more is cut than must be"


def test_by_default_the_row_fails_with_what_the_server_says(pool: sk.VLLMPool) -> None:
    with pytest.warns(sk.SwarmWarning, match="1 of 1 row failed"):
        answers = pd.DataFrame({"t": ["long " * 1000]}).swarm.scatter("t")
    assert "maximum context length is 400 tokens. However, your prompt contains" in answers["response_error"][0]


@pytest.mark.filterwarnings("ignore:.* prompts were cut")
def test_a_resumed_call_cuts_alike_and_asks_nothing(pool: sk.VLLMPool, tmp_path: Path) -> None:
    options: dict[str, Any] = {"too_long": "truncate", "store": tmp_path, "details": True}
    first = FRAME.swarm.scatter("t", **options)
    again = FRAME.swarm.scatter("t", **options)
    assert (sk.last_run().stats.requests, sk.last_run().stats.stored) == (0, 60)
    pd.testing.assert_series_equal(first["response"], again["response"])
    FRAME.swarm.scatter("t", **{**options, "too_long": "truncate_left"})
    cut = int(first["response_truncated"].sum())
    assert sk.last_run().stats.answered == cut, "what was not cut has its answer already"
    holes = first.assign(response=first["response"].where(first.index < 530))
    completed = holes.swarm.scatter("t", too_long="truncate", details=True, only_missing=True)
    pd.testing.assert_series_equal(completed["response_truncated"], first["response_truncated"])


@pytest.mark.parametrize(
    ("server", "options", "message"),
    [
        ({}, {"too_long": "cut"}, "too_long='cut': must be one of 'error', 'truncate', 'truncate_left'"),
        ({}, {"max_tokens": 398}, "the context of 400 tokens has no room for a prompt beside max_tokens=398"),
        ({"tokenize": False}, {}, "too_long='truncate' needs a server that counts tokens"),
    ],
)
def test_what_cannot_be_cut_is_refused(server: dict[str, Any], options: dict[str, Any], message: str) -> None:
    with (
        sk.local(1, engine="echo", max_model_len=CONTEXT, **server) as swarm,
        sk.connect(swarm, retry=QUICK, max_tokens=ANSWER) as pool,
    ):
        with pytest.raises(sk.SettingError, match=re.escape(message)):
            FRAME.swarm.scatter("t", **{"too_long": "truncate", "pool": pool, **options})
        if server:  # a text that fits at the usual length of tokens is sent as it is
            fine = pd.DataFrame({"t": ["word " * 45]}).swarm.scatter("t", too_long="truncate", pool=pool)
            assert fine["response"].notna().all()


def test_answers_that_are_cut_off_are_said_once_and_with_the_failures(echo: sk.LocalSwarm) -> None:
    frame = pd.DataFrame({"t": ["a long text of many words", "another long text of many words", None]})
    with sk.connect(echo, retry=QUICK) as pool:
        with pytest.warns(sk.SwarmWarning) as warned:
            frame.swarm.scatter("t", max_tokens=4, pool=pool)
        (said,) = [str(w.message) for w in warned]
        assert said.startswith("1 of 3 rows failed:")
        assert said.endswith("\n2 of 2 answers were cut off at max_tokens=4: raise max_tokens=")
        with pytest.warns(sk.SwarmWarning, match=r"^1 of 1 answer was cut off at max_tokens=4: raise max_tokens=$"):
            list(sk.iter_scatter([frame[:1]], "t", max_tokens=4, pool=pool))
        run = frame[:2].swarm.submit("t", max_tokens=4, pool=pool)
        with pytest.warns(sk.SwarmWarning, match="2 of 2 answers were cut off"):
            run.result()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            run.result()
            frame[:2].swarm.scatter("t", max_tokens=1, pool=pool)  # one token is what was asked for
            frame[:2].swarm.scatter("t", max_tokens=9, ignore_eos=True, pool=pool)
    assert "2 cut off" in repr(run.stats)


def test_texts_that_a_tree_shortens_are_said(pool: sk.VLLMPool) -> None:
    df = pd.DataFrame({"t": ["x" * 900, "y" * 900]})
    pool.buffer = 10
    with pytest.warns(sk.SwarmWarning) as warned:
        top = df.swarm.tree_reduce("t", "{responses}", max_tokens=100)
    assert top["n_shortened"].tolist() == [2]
    assert sk.last_run().stats.shortened == 2
    (said,) = [str(w.message) for w in warned]
    assert said.endswith("2 texts were shortened to fit the context (column n_shortened)")
