"""What a comparison says, and what it refuses to say."""

from __future__ import annotations

import html
import itertools
import re
from collections.abc import Sequence
from typing import Any

import pandas as pd
import pytest

import swarmkit as sk

pytestmark = pytest.mark.slow

ROWS = pd.DataFrame({"i": range(40)}, index=[f"r{i}" for i in range(40)])
ASK = "number {i:03}"


def runs(**speeds: Sequence[float]) -> pd.DataFrame:
    """Measured runs of 100 rows, by mode, from their prompts a second."""
    rows = [
        {
            "mode": mode, "batch_size": 1 if mode == "single" else 100, "repeat": i, "time_s": 100 / speed,
            "prompts_per_s": speed, "tokens_per_s": 4 * speed, "requests": 100 if mode == "single" else 1,
            "rows_per_request": 1.0 if mode == "single" else 100.0, "answered": 100, "client_cpu_s": 0.1 * (i + 1),
        }
        for mode, values in speeds.items()
        for i, speed in enumerate(values)
    ]  # fmt: skip
    return pd.DataFrame(rows)


def found(batch: Sequence[float], single: Sequence[float], texts: pd.DataFrame | None = None) -> sk.Comparison:
    same = pd.DataFrame({"batch of 100": ["a"] * 100, "single": ["a"] * 100})
    return sk.Comparison(runs(batch=batch, single=single), same if texts is None else texts, 100)


def speed_up(comparison: sk.Comparison) -> float:
    return float(comparison.frame.set_index("mode").loc["batch", "speed_up"])


# ---- on endpoints ------------------------------


def test_where_requests_are_what_takes_the_time_batching_wins() -> None:
    policy = sk.BatchPolicy(single_in_flight=4)
    with sk.local(1, engine="echo", latency_s=0.1) as swarm, sk.connect(swarm, batch=policy) as pool:
        comparison = ROWS.swarm.compare(ASK, pool=pool)
    frame = comparison.frame.set_index("mode")
    assert list(frame.index) == ["batch", "single"]
    assert frame["speed_up"]["batch"] > 2  # ten rounds of 0.1 s against one or two
    assert frame["speed_up"]["single"] == 1
    assert frame["requests"]["single"] == 40
    assert frame["requests"]["batch"] <= 3
    assert (frame["completion_rate"] == 1).all()
    assert (frame["time_s_min"] <= frame["time_s"]).all()
    assert (frame["time_s"] <= frame["time_s_max"]).all()
    assert (frame["client_cpu_s"] > 0).all()
    assert (frame["tokens_per_s"] > frame["prompts_per_s"]).all()  # more than a token a row
    assert comparison.differing.empty
    assert "times the throughput of single" in comparison.verdict()


def test_where_the_engine_is_the_limit_no_speed_up_is_claimed() -> None:
    # One row at a time, 0.1 s each: how they came does not matter.
    with sk.local(1, engine="echo", tokens_per_s=60, max_num_seqs=1) as swarm, sk.connect(swarm) as pool:
        comparison = ROWS.swarm.compare(ASK, pool=pool, sample=12)
    # A difference that a busy machine makes may be named; a gain from batching, worth the name, is not there.
    assert not speed_up(comparison) > 1.2, comparison.runs
    assert comparison.frame["requests"].tolist() == [1, 12]


def test_every_batch_size_and_repeat_is_a_row(pool: sk.VLLMPool) -> None:
    comparison = ROWS.swarm.compare(ASK, pool=pool, batch_sizes=[1, 10], sample=20, repeats=2)
    counted = comparison.runs.groupby(["mode", "batch_size"])["repeat"].apply(list).to_dict()
    assert counted == {("batch", 1): [0, 1], ("batch", 10): [0, 1], ("single", 1): [0, 1]}
    requests = comparison.frame.set_index(["mode", "batch_size"])["requests"]
    assert requests["batch", 1] == requests["single", 1] == 20
    assert requests["batch", 10] < 20
    assert comparison.sample == 20
    assert (comparison.runs["answered"] == 20).all()


def test_texts_that_differ_are_counted_and_shown(echo: sk.LocalSwarm) -> None:
    # A template that is another each time it is used stands for a model whose answers depend on the batch.
    tick = itertools.count()
    with sk.connect(echo, chat=lambda text: f"{next(tick):05} {text}") as pool:
        comparison = ROWS.swarm.compare(ASK, pool=pool, repeats=1)
    assert "40 of 40 texts differ" in comparison.verdict()
    texts = comparison.differing.loc["r7"]
    assert list(texts.index) == ["batch of 100", "single"]
    assert texts.nunique() == 2
    assert texts.str.endswith("number 007").all()


def test_failed_rows_lower_the_completion_rate_and_are_no_other_texts() -> None:
    with sk.local(1, engine="echo", faults=["bad_row:marker=007"]) as swarm, sk.connect(swarm) as pool:
        comparison = ROWS.swarm.compare(ASK, pool=pool, repeats=1)
    assert comparison.frame["completion_rate"].tolist() == [39 / 40, 39 / 40]
    assert comparison.differing.empty


def test_a_pool_of_its_own_is_closed_also_after_a_wrong_argument(echo: sk.LocalSwarm) -> None:
    assert ROWS.swarm.compare(ASK, pool=echo, repeats=1, sample=5).sample == 5
    with pytest.raises(sk.CallerError, match="none twice"):
        ROWS.swarm.compare(ASK, pool=echo, batch_sizes=[5, 5])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"sample": 0}, "sample=0"),
        ({"repeats": 0}, "repeats=0"),
        ({"modes": ["batches"]}, "batches"),
        ({"modes": []}, "at least one"),
        ({"batch_sizes": [0]}, "max_size=0"),
        ({"batch_sizes": [2000]}, "1,024"),
    ],
)
def test_wrong_arguments_are_reported(pool: sk.VLLMPool, options: dict[str, Any], said: str) -> None:
    with pytest.raises(sk.CallerError, match=said):
        ROWS.swarm.compare(ASK, pool=pool, **options)


def test_an_empty_frame_has_nothing_to_compare(pool: sk.VLLMPool) -> None:
    with pytest.raises(sk.CallerError, match="the frame is empty"):
        ROWS.head(0).swarm.compare(ASK, pool=pool)
    with pytest.raises(sk.CallerError, match="no prompt could be made"):
        pd.DataFrame({"t": [None, None]}).swarm.compare("t", pool=pool)


def test_no_endpoint_left_is_an_error_that_says_when() -> None:
    with (
        sk.local(1, engine="echo", faults=["http_401"]) as swarm,
        sk.connect(swarm) as pool,
        pytest.raises(sk.NoEndpointsError, match="warm-up"),
    ):
        ROWS.swarm.compare(ASK, pool=pool)


# ---- what is said of measured runs ------------------------------


@pytest.mark.parametrize(
    ("batch", "single", "expected"),
    [
        ([30, 31, 32], [10, 10, 11], 3.1),
        ([10, 10, 11], [30, 31, 32], 10 / 31),  # slower is told as well
        ([30, 31, 32], [29, 30, 33], None),  # overlapping
        ([110, 112, 115], [100, 104, 109], None),  # barely apart, as equal ones are one time in ten
        ([110, 112, 115, 113, 112], [100, 104, 109, 104, 103], 112 / 104),  # ... but hardly ever five by five
        ([102.0, 102.1, 102.2], [100.0, 100.1, 100.2], None),  # apart, and not worth a word
        ([30, 31], [10, 10], None),  # too few to know
    ],
)
def test_a_difference_within_the_noise_is_no_speed_up(
    batch: list[float], single: list[float], expected: float | None
) -> None:
    comparison = found(batch, single)
    assert speed_up(comparison) == (pytest.approx(expected) if expected else pytest.approx(float("nan"), nan_ok=True))
    said = comparison.verdict()
    assert ("times the throughput" in said) == (expected is not None)
    assert ("too few repeats" in said) == (len(batch) < 3)


def test_the_frame_has_the_medians() -> None:
    row = found([30, 50, 40], [10, 11, 12]).frame.iloc[0]
    assert row["prompts_per_s"] == 40
    assert row["time_s"] == pytest.approx(2.5)
    assert (row["time_s_min"], row["time_s_max"]) == (2, pytest.approx(100 / 30))
    assert row["client_cpu_s"] == pytest.approx(0.2)
    assert row["requests"] == 1


def test_speed_counts_answers_not_time() -> None:
    # Half of the rows refused at once is not twice as fast.
    measured = runs(batch=[10, 10.1, 10.2], single=[10, 10.1, 10.2])
    half = measured["mode"] == "batch"
    measured.loc[half, ["time_s", "answered"]] = [[5, 50]] * 3
    comparison = sk.Comparison(measured, pd.DataFrame({"a": ["x"]}), 100)
    assert pd.isna(comparison.frame["speed_up"][0])
    assert comparison.frame["completion_rate"].tolist() == [0.5, 1]


def test_texts_are_compared_only_where_there_are_some() -> None:
    texts = pd.DataFrame({"batch of 100": ["a", None, "b"], "single": ["a", "a", "c"]}, index=["x", "y", "z"])
    comparison = found([30] * 3, [10] * 3, texts)
    assert comparison.differing.index.tolist() == ["z"]
    assert "1 of 100 texts differs" in comparison.verdict()


def test_one_mode_alone_has_nothing_to_compare(pool: sk.VLLMPool) -> None:
    comparison = ROWS.swarm.compare(ASK, pool=pool, modes=["batch"], repeats=1)
    assert "only one mode" in comparison.verdict()
    assert comparison.frame["speed_up"].tolist() == [1]


def test_it_shows_what_it_found() -> None:
    texts = pd.DataFrame({"batch of 100": ["<b>"], "single": ["c"]})
    comparison = found([30, 31, 32], [10, 10, 11], texts)
    assert repr(comparison) == f"<Comparison of 100 prompts: {comparison.verdict()}>"
    shown = comparison._repr_html_()
    cells = re.findall("<t[hd]>([^<]*)</t[hd]>", shown)
    batch, single = cells.index("batch of 100"), cells.index("single")
    assert cells[batch:single] == ["batch of 100", "31.0", "3.23 (3.12 to 3.33)", "1", "100", "0.20", "100%", "3.10"]
    assert cells[single + 3 : single + 5] == ["100", "1"]
    assert html.escape(comparison.verdict()) in shown
    assert "color" not in shown, "a table is as the page is, light or dark"
    assert "1 of 100 texts differs" in shown
    assert "1 request of 100 rows" in str(comparison)
    assert "3.10 times the throughput" in str(comparison)


def test_it_draws_itself() -> None:
    comparison = found([30, 31, 32], [10, 10, 11])
    figure = comparison.plot()
    said = " ".join(figure.get_suptitle().split())
    assert said == "batch of 100: 3.10 times the throughput of single (100 prompts, 3 repeats)"
    assert [ax.get_xlabel() for ax in figure.axes] == ["prompts per second", "requests", "client CPU, seconds"]
    assert len(sk.plots.comparison(comparison, width=5).axes) == 3
    assert sk.plots.throughput(comparison).get_title(loc="left").startswith("batch of 100: 3.10 times")
