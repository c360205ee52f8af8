"""Estimates: what they say of a run before it comes true, and what they cost."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest

import swarmkit as sk
from swarmkit.analysis.estimate import _Rows, _simulated

QUIET = {"progress": False, "max_tokens": 64}


@pytest.fixture(scope="module")
def pool():
    with sk.local(1, engine="echo", addresses=2, tokens_per_s=2_000.0) as swarm, sk.connect(swarm) as found:
        yield found


def frame(rows):
    """Rows of which each is longer than the one before: prompts and answers of 1 to 50 tokens."""
    return pd.DataFrame({"t": [f"{i:06d}" + "x" * (200 * i // rows) for i in range(rows)]})


@pytest.mark.slow
def test_an_estimate_comes_true(tmp_path):
    df = frame(900)
    speed = {"tokens_per_s": 40.0, "max_num_seqs": 32, "prefill_tokens_per_s": 8_000.0, "slowdown": 0.03}
    with sk.local(1, engine="echo", addresses=3, **speed) as swarm, sk.connect(swarm) as pool:
        options = {"pool": pool, "store": tmp_path, **QUIET}
        found = df.swarm.estimate("t", slots=32, price=(1.0, 2.0), **options)
        df.swarm.scatter("t", **options)
        real = sk.last_run().stats
    assert (found.rows, found.sampled) == (900 - 64, 64) == (real.answered, real.stored)
    assert found.time_s == pytest.approx(real.time_s, rel=0.25)  # of 64 rows, on a machine that others use
    assert found.time_band[0] < found.time_s < found.time_band[1]
    assert found.prompt_tokens == pytest.approx(real.prompt_tokens, rel=0.02)
    assert found.completion_tokens == pytest.approx(real.completion_tokens, rel=0.05)
    assert found.requests == pytest.approx(real.requests, abs=3)
    paid = (real.prompt_tokens + 2 * real.completion_tokens) / 1e6
    assert found.money == pytest.approx(paid, rel=0.05)


@pytest.mark.slow
def test_a_sample_is_spread_over_the_lengths_of_prompts_and_kept(pool, tmp_path):
    df = frame(400)
    df["index"] = df["t"].str.len()
    found = df.swarm.estimate("t", sample=16, pool=pool, store=tmp_path, **QUIET)
    assert found.sampled == len(sk.open_store(tmp_path)) == 16
    lengths = sorted(len(text) for text in sk.open_store(tmp_path).to_frame()["prompt"])
    assert lengths[0] < 20
    assert lengths[-1] > 190
    assert max(b - a for a, b in pairwise(lengths)) < 30
    again = df.swarm.estimate("t", sample=16, pool=pool, store=tmp_path, **QUIET)
    assert again.rows == found.rows - 16, "other rows are asked, and kept as well"


@pytest.mark.slow
def test_what_a_run_would_not_ask_is_not_estimated(pool):
    df = frame(40)
    whole = df.swarm.estimate("t", sample=8, pool=pool, **QUIET)
    assert whole.rows == 40
    twice = pd.concat([df, df], ignore_index=True).swarm.estimate("t", sample=8, pool=pool, temperature=0, **QUIET)
    assert (twice.rows, twice.completion_tokens) == (40, whole.completion_tokens)
    answered = df.assign(response=["known"] * 30 + [None] * 10, response_error=None)
    assert answered.swarm.estimate("t", sample=8, pool=pool, only_missing=True, **QUIET).rows == 10
    nothing = answered.head(30).swarm.estimate("t", pool=pool, only_missing=True, price=(1, 1), **QUIET)
    assert (nothing.rows, nothing.sampled, nothing.time_s, nothing.money) == (0, 0, 0.0, 0.0)


@pytest.mark.slow
def test_samples_of_a_row_cost_answers_but_no_prompts(pool):
    df = frame(40)
    one = df.swarm.estimate("t", sample=16, pool=pool, **QUIET)
    three = df.swarm.estimate("t", sample=16, pool=pool, n=3, **QUIET)
    assert three.prompt_tokens == one.prompt_tokens
    assert three.completion_tokens == pytest.approx(3 * one.completion_tokens, rel=0.1)
    assert (one.requests, three.requests) == (2, 2)


@pytest.mark.slow
def test_a_large_run_is_simulated_by_a_part_of_it():
    fleet = [sk.EndpointModel(slots=8, tokens_per_s=20.0)] * 2

    def simulated(rows: int) -> tuple[float, float]:
        drawn = _Rows([[8.0], [24.0]], np.ones(rows), np.random.default_rng(0))
        return _simulated(fleet, drawn, sk.BatchPolicy(), True, 10_000)

    (small_s, small), (large_s, large) = simulated(10_000), simulated(1_000_000)
    assert large_s == pytest.approx(100 * small_s, rel=0.02)
    assert large == pytest.approx(100 * small, rel=0.05)


def test_an_estimate_shows_itself(pool):
    found = frame(40).swarm.estimate("t", sample=4, pool=pool, price=(1e6, 1e6), **QUIET)
    assert repr(found).startswith("<Estimate: 40 rows on 2 endpoints in ")
    assert f"{found.completion_tokens:,} out, {found.money:,.2f} to pay>" in repr(found)
    assert "assumed; slots= sets them" in found._repr_html_()
    assert "failed" not in found._repr_html_()
    small = replace(found, time_s=0.42, time_band=(0.42, 0.42), money=0.00028, money_band=(0.00028, 0.00028))
    assert " in 0.42 s, " in repr(small), "neither 0 s, nor a band of one number"
    assert repr(small).endswith(", 0.00028 to pay>")
    assert ("to pay", "0.00028") in small.summary()


def test_a_series_is_estimated_as_its_texts(pool):
    assert frame(10)["t"].swarm.estimate(sample=4, pool=pool, **QUIET).rows == 10


def test_an_estimate_writes_nothing_so_no_column_is_in_its_way(pool):
    df = frame(10).assign(response="mine")
    assert df.swarm.estimate("t", sample=4, pool=pool, **QUIET).rows == 10
    assert df["response"].tolist() == ["mine"] * 10


def test_no_answer_is_no_estimate():
    with sk.local(1, engine="echo", max_model_len=64) as swarm, sk.connect(swarm, buffer=0) as pool:
        df = pd.DataFrame({"t": ["x" * 2_000] * 3})
        with pytest.warns(sk.SwarmWarning), pytest.raises(sk.ScatterError, match="no row of the sample") as caught:
            df.swarm.estimate("t", pool=pool, **QUIET)
    assert caught.value.frame["response_error"].notna().all()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"sample": 0}, "sample=0"),
        ({"slots": 1.5}, "slots=1.5"),
        ({"price": 0.5}, "two numbers"),
        ({"price": (1, -1)}, "two numbers"),
        ({"price": (1, None)}, "two numbers"),
    ],
)
def test_nonsense_is_refused(pool, options, said):
    with pytest.raises(sk.SettingError, match=said):
        frame(4).swarm.estimate("t", pool=pool, **options)
