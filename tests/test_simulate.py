"""Plans: what is simulated comes true, and what they say adds up."""

import random
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

import swarmkit as sk

pytestmark = pytest.mark.slow


# A server that reads prompts at a speed of their own, and is slower the more rows run.
SPEED = {"tokens_per_s": 50.0, "max_num_seqs": 32, "prefill_tokens_per_s": 10_000.0, "slowdown": 0.03}


def texts(rows: int, shortest: int, longest: int, seed: int) -> pd.DataFrame:
    """Prompts whose tokens, and whose answers' tokens, are drawn between these."""
    rng = random.Random(seed)
    return pd.DataFrame({"i": range(rows), "t": ["x" * (4 * rng.randint(shortest, longest)) for _ in range(rows)]})


def measured(df: pd.DataFrame, endpoints: int, size: int = 100, delivery: str = "auto") -> sk.RunStats:
    with sk.local(1, engine="echo", addresses=endpoints, **SPEED) as swarm:
        pool = sk.connect(swarm, batch=sk.BatchPolicy(max_size=size))
        df.head(4).swarm.scatter("warm {i}", max_tokens=8, pool=pool, progress=False)
        df.swarm.scatter("{i} {t}", max_tokens=200, pool=pool, delivery=delivery, progress=False)
    return sk.last_run().stats


@pytest.fixture(scope="module")
def pilot() -> sk.RunStats:
    return measured(texts(400, 5, 30, seed=1), 2)


@pytest.mark.parametrize(
    ("rows", "lengths", "endpoints", "size"),
    [
        pytest.param(500, (5, 30), 2, 20, id="smaller requests"),
        pytest.param(800, (5, 30), 4, 100, id="more endpoints"),
        pytest.param(250, (30, 60), 2, 100, id="longer prompts and answers"),
        pytest.param(800, (2, 6), 2, 100, id="shorter prompts and answers"),
    ],
)
def test_a_small_run_foretells_others(pilot, rows, lengths, endpoints, size):
    real = measured(texts(rows, *lengths, seed=2), endpoints, size)
    fleet = (sk.EndpointModel.from_stats(pilot) * 2)[:endpoints]
    work = sk.Workload.from_stats(real, rows)
    plan = sk.simulate(fleet, work, batch=sk.BatchPolicy(max_size=size))
    assert plan.time_s == pytest.approx(real.time_s, rel=0.1)
    assert plan.requests == pytest.approx(real.requests, rel=0.2, abs=2)


def test_whole_replies_foretell_too():
    pilot = measured(texts(400, 5, 30, seed=3), 2, 50, delivery="batch")
    real = measured(texts(700, 5, 30, seed=4), 2, 50, delivery="batch")
    fleet, work, batch = sk.EndpointModel.from_stats(pilot), sk.Workload.from_stats(pilot, 700), sk.BatchPolicy(50)
    plan = sk.simulate(fleet, work, batch=batch, delivery="batch")
    assert plan.time_s == pytest.approx(real.time_s, rel=0.15)


def test_a_plan_tells_the_kinds_of_endpoints_apart():
    # Two kinds of servers on this machine, tokens in real time.
    speed = {"tokens_per_s": 20.0, "max_num_seqs": 32}
    slower = {"127.0.0.3": {"tokens_per_s": 10.0, "max_num_seqs": 32}}
    rows = pd.DataFrame({"i": range(3_000)})
    with sk.local(1, engine="echo", addresses=3, speeds=slower, **speed) as swarm, sk.connect(swarm):
        rows[:600].swarm.scatter("n {i}", max_tokens=4, progress=False)
        pilot = sk.last_run().stats
        rows.swarm.scatter("n {i}", max_tokens=4, progress=False)
        real = sk.last_run().stats
    models = sk.EndpointModel.from_stats(pilot)
    speeds = sorted(model.slots * model.tokens_per_s for model in models)
    assert speeds[0] / speeds[-1] == pytest.approx(0.5, rel=0.2)
    plan = sk.simulate(models, sk.Workload.from_stats(pilot, 3_000))
    assert plan.time_s == pytest.approx(real.time_s, rel=0.15)
    assert plan.requests == pytest.approx(real.requests, rel=0.34)


def test_prompts_and_neighbours_take_time():
    plain = sk.EndpointModel(slots=10, tokens_per_s=10.0)
    work = sk.Workload(100, tokens=20.0, prompt_tokens=50.0)
    assert sk.simulate(plain, work).time_s == pytest.approx(100 * 20 / (10 * 10.0))
    reads = replace(plain, prefill_tokens_per_s=1_000.0)
    assert sk.simulate(reads, work).time_s == pytest.approx(20.0 + 100 * 50 / 1_000.0)
    alone = replace(plain, alone_tokens_per_s=40.0)
    assert sk.simulate(alone, work).time_s == pytest.approx(20.0)
    assert sk.simulate(alone, sk.Workload(1, tokens=20.0)).time_s == pytest.approx(0.5)
    assert alone.speed(10) == pytest.approx(10.0)
    assert 10.0 < alone.speed(5) < 40.0


def test_prompts_that_begin_alike_are_read_once_where_there_is_a_cache():
    model = sk.EndpointModel(slots=10, tokens_per_s=10.0, prefill_tokens_per_s=1_000.0)
    work = sk.Workload(10, tokens=20.0, prompts=["x" * 4 * 160] * 10)
    reads_all = sk.simulate(model, work)
    assert reads_all.time_s == pytest.approx(2.0 + 10 * 160 / 1_000.0) == reads_all.ideal_s
    assert (reads_all.prompt_tokens, reads_all.cached_tokens) == (1_600, 0)
    assert sk.simulate(model, sk.Workload(10, tokens=20.0, prompt_tokens=160.0)).time_s == reads_all.time_s
    reads_once = sk.simulate(replace(model, cache_tokens=320), work)
    assert reads_once.time_s == pytest.approx(2.0 + (160 + 9 * 16) / 1_000.0)  # each reads its last block
    assert (reads_once.prompt_tokens, reads_once.cached_tokens) == (1_600, 9 * 144)


def test_a_run_keeps_a_sample_of_its_lengths(pilot):
    assert len(pilot.lengths) == 400
    assert sum(answer for _, answer in pilot.lengths) == pilot.completion_tokens
    assert sum(prompt for prompt, _ in pilot.lengths) == pilot.prompt_tokens
    record = max(pilot.requests_log, key=lambda r: r.rows)
    assert record.start_s <= record.posted_s < record.first_token_s <= record.first_row_s < record.end_s
    assert record.rows < record.completion_tokens < record.rows * record.longest


def test_losing_endpoints_costs_time_but_no_rows():
    fleet, work = [sk.EndpointModel(slots=32, tokens_per_s=50.0)] * 20, sk.Workload(20_000, [50.0, 100.0, 150.0])
    calm, hurt = sk.simulate(fleet, work), sk.simulate(fleet, work, losing=0.25)
    assert calm.answered == hurt.answered == 20_000
    assert calm.time_s >= calm.ideal_s
    # A quarter is lost half-way: the second half takes 4/3 as long.
    assert 1.05 * calm.time_s < hurt.time_s < 1.35 * calm.time_s
    assert hurt.retries > 0
    assert len(hurt.frame) == hurt.requests
    assert hurt.frame["failure"].notna().any()


def test_the_same_seed_gives_the_same_plan():
    fleet, work = [sk.EndpointModel(slots=8)] * 3, sk.Workload(500, [10.0, 300.0])
    first, second, other = (sk.simulate(fleet, work, seed=seed) for seed in (1, 1, 2))
    assert first == second != other


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: sk.EndpointModel(slots=0),
        lambda: sk.EndpointModel(prefill_tokens_per_s=0.0),
        lambda: sk.EndpointModel(tokens_per_s=40.0, alone_tokens_per_s=30.0),
        lambda: sk.Workload.from_stats(sk.RunStats(), 10),
        lambda: sk.Workload(0),
        lambda: sk.Workload(1, prompts=["a"], prompt_tokens=4.0),
        lambda: sk.Workload(10, []),
        lambda: sk.simulate([], sk.Workload(1)),
        lambda: sk.simulate(sk.EndpointModel(), sk.Workload(1), losing=1.0),
        lambda: sk.EndpointModel.from_stats(sk.RunStats()),
    ],
)
def test_nonsense_is_refused(wrong):
    with pytest.raises(sk.SettingError):
        wrong()


def test_a_plan_shows_itself():
    plan = sk.simulate([sk.EndpointModel(slots=4)] * 2, sk.Workload(100, 20.0))
    assert plan.plot()._repr_png_().startswith(b"\x89PNG")
    assert "100 of 100 rows on 2 endpoints" in repr(plan)
    assert "where no schedule takes less than" in repr(plan)
    shown = plan._repr_html_()
    assert "100 of 100 answered" in shown
    assert "to 2 endpoints" in shown
    assert "color" not in shown


def test_rows_that_finish_at_the_same_instant_are_drawn():
    plan = sk.simulate([sk.EndpointModel(slots=64)] * 10, sk.Workload(300, tokens=50.0))
    (ax,) = plan.plot().axes
    assert "300 of them at once" in ax.get_title(loc="left")
    x, y = ax.lines[0].get_data()
    assert (np.diff(x) * (y[1:] + y[:-1]) / 2).sum() == pytest.approx(300)
