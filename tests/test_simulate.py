"""Plans: what is simulated comes true, and what they say adds up."""

import pandas as pd
import pytest

import swarmkit as sk

pytestmark = pytest.mark.slow


def test_a_plan_from_a_small_run_foretells_a_larger_one():
    # Two kinds of servers on this machine, tokens in real time. The machine is noisy: a third either way.
    speed = {"tokens_per_s": 20.0, "max_num_seqs": 32}
    slower = {"127.0.0.3": {"tokens_per_s": 10.0, "max_num_seqs": 32}}
    rows = pd.DataFrame({"i": range(3_000)})
    with sk.local(1, engine="echo", addresses=3, speeds=slower, **speed) as swarm, sk.connect(swarm):
        rows[:600].swarm.scatter("n {i}", max_tokens=4)
        pilot = sk.last_run().stats
        rows.swarm.scatter("n {i}", max_tokens=4)
        real = sk.last_run().stats
    plan = sk.simulate(sk.EndpointModel.from_stats(pilot), sk.Workload(3_000, pilot.completion_tokens / pilot.answered))
    assert plan.time_s == pytest.approx(real.time_s, rel=0.34)
    assert plan.requests == pytest.approx(real.requests, rel=0.34)


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
        lambda: sk.Workload(0),
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
