"""Pools that follow a hostfile: endpoints come and go while runs go on."""

import asyncio
import json
import pickle
import threading
import time
from contextlib import ExitStack

import pandas as pd
import pytest
from scripted import Call, Scripted

import swarmkit as sk
from swarmkit.client.hostfile import AgentEndpoint, write_hostfile
from swarmkit.engine.columns import Columns
from swarmkit.engine.endpoints import Fleet
from swarmkit.engine.messages import Added, Delivered, Ended, Removed, Send, Stop, Tick, Wake
from swarmkit.engine.policy import RetryPolicy
from swarmkit.engine.scheduler import Scheduler
from swarmkit.records import Prompts
from swarmkit.runs.stats import RunStats

LIMIT_S = 60.0  # on a busy machine; all of it takes seconds


class Node(Scripted):
    """A server of the model "m" that can be held: it reads requests of rows, and answers them when it is let go."""

    def __init__(self, busy_s: float = 0.0) -> None:
        self.busy_s = busy_s
        self.model: dict[str, object] = {}
        self.go = threading.Event()
        self.go.set()
        self.asked = 0  # requests of rows
        super().__init__(self.say)

    def say(self, call: Call) -> None:
        if call.headers.startswith("GET "):
            call.reply(json.dumps({"data": [{"id": "m", **self.model}]}).encode())
            return
        if call.prompts[0].startswith("row"):
            self.asked += 1
            self.go.wait(LIMIT_S)
            time.sleep(self.busy_s)
        call.answer()

    def line(self, **tags: str) -> AgentEndpoint:
        return AgentEndpoint(*self.address, tags)

    @property
    def name(self) -> str:
        return "{}:{}".format(*self.address)


@pytest.fixture
def nodes():
    with ExitStack() as stack:
        some = [stack.enter_context(Node()) for _ in range(3)]
        yield some
        for node in some:
            node.go.set()


def until(condition):
    ends = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < ends, "it does not come"
        time.sleep(0.02)


def watched(path, max_size=4):
    batch = sk.BatchPolicy(max_size=max_size, max_in_flight=2)
    return sk.connect(path, watch=True, model="m", chat=None, delivery="batch", batch=batch)


def names(pool):
    return [e.name for e in pool.endpoints]


def check_all(frame):
    assert frame["response"].tolist() == [f"echo: row {i}" for i in frame["i"]]
    assert frame["response_error"].isna().all()


def test_endpoints_come_and_go_while_a_run_goes_on(nodes, tmp_path):
    path, (a, b, c) = tmp_path / "agents.hostfile", nodes
    write_hostfile(path, [a.line(), b.line()])
    df = pd.DataFrame({"i": range(200)})
    with watched(path) as pool:
        a.go.clear()
        b.go.clear()
        run = df.swarm.submit("row {i}", pool=pool, details=True, store=tmp_path / "store", progress=False)
        until(lambda: a.asked and b.asked)
        write_hostfile(path, [b.line(), c.line()])
        until(lambda: c.asked > 1)  # at work, while the others hold what they have
        until(lambda: names(pool) == [b.name, c.name])
        held = a.asked
        a.go.set()
        b.go.set()
        frame = run.result()
        check_all(frame)
        assert a.asked == held, "it was removed, and was sent more"
        assert frame["response_endpoint"].value_counts().to_dict() == {
            e.name: e.rows for e in run.stats.endpoints if e.rows
        }
        assert set(frame["response_endpoint"]) == {a.name, b.name, c.name}, "what it held was finished"
        what = run.story()[["what", "where"]].values.tolist()
        assert ["endpoint removed", a.name] in what
        assert ["endpoint added", c.name] in what
        asked = [node.asked for node in nodes]
        write_hostfile(path, [a.line(), c.line()])
        until(lambda: names(pool) == [c.name, a.name])  # between runs, too
        again = df.swarm.scatter("row {i}", pool=pool, details=True, store=tmp_path / "store", progress=False)
        of_others = (
            frame["response_endpoint"] != b.name
        )  # the name of one that is not in the pool is not known any more
        assert again["response_endpoint"].equals(frame["response_endpoint"].where(of_others))
        assert [node.asked for node in nodes] == asked


def test_a_run_without_endpoints_waits_for_new_ones(nodes, tmp_path):
    path, (a, b, _) = tmp_path / "agents.hostfile", nodes
    write_hostfile(path, [a.line()])
    df = pd.DataFrame({"i": range(40)})
    with watched(path) as pool:
        a.go.clear()
        run = df.swarm.submit("row {i}", pool=pool, progress=False)
        until(lambda: a.asked)
        b.close()  # its model is still being loaded
        write_hostfile(path, [b.line()])
        until(lambda: names(pool) == [])
        assert "1 endpoint not up yet" in repr(pool._repr_html_())
        a.go.set()
        until(lambda: "no endpoint answers; retrying for another" in run.stats.waits)
        assert 0 < run.stats.answered < len(df)
        late = df.swarm.submit("row {i}", pool=pool, progress=False)  # begins while there is none
        until(lambda: "there is no endpoint to send to" in late.stats.waits)
        b.open()
        for each in (run, late):
            until(each.done)  # who waits for it is warned after a second
            check_all(each.result())
        assert names(pool) == [b.name]


def test_a_run_knows_its_endpoints_where_others_have_left():
    def script(call: Call) -> None:
        if call.headers.startswith("GET "):
            call.reply(json.dumps({"data": [{"id": "m"}]}).encode())
        else:
            call.reply(b'{"error": {"message": "no such row"}}', "400 Bad Request")

    with Scripted(script) as server, sk.connect(server.address, model="m", chat=None, retry=sk.RetryPolicy()) as pool:
        stats, columns = RunStats(rows=1), Columns(1)
        for endpoint in (*pool.endpoints, AgentEndpoint("gone.example", 8000)):  # those of a level before
            stats.roster.place(endpoint)
        asyncio.run(pool.run(Prompts(["row 0"]), pool.spec(mode="single"), columns, stats=stats))
        assert "no such row" in columns.errors[0]
        assert stats.roster.names[columns.endpoint[0]] == pool.endpoints[0].name


def test_the_levels_of_a_tree_go_where_endpoints_are(nodes, tmp_path):
    path, (a, b, _) = tmp_path / "agents.hostfile", nodes
    write_hostfile(path, [a.line()])
    df = pd.DataFrame({"note": [str(i) for i in range(8)]})
    with watched(path) as pool:
        rack = pool.by_model("m")
        a.go.clear()
        trees = []

        def reduce() -> None:
            trees.append(df.swarm.tree_reduce("note", "row {responses}", fanin=2, pool=rack, progress=False))

        thread = threading.Thread(target=reduce)
        thread.start()
        until(lambda: a.asked)
        write_hostfile(path, [b.line()])
        until(lambda: names(rack) == [b.name])
        a.go.set()
        thread.join(LIMIT_S)
        assert trees[0]["response_error"].isna().all()
        assert trees[0]["n_levels"].tolist() == [3]
        found = {e.name: e.rows for e in sk.last_run().stats.endpoints}
        assert found == {a.name: 4, b.name: 3}


def test_a_hostfile_that_turns_bad_is_used_again_when_it_is_good(nodes, tmp_path):
    path, (a, b, c) = tmp_path / "agents.hostfile", nodes
    write_hostfile(path, [a.line(rack="x"), b.line(rack="y")])
    df = pd.DataFrame({"i": range(40)})
    with watched(path) as pool:
        x, first, copy = pool.by_tag("rack", "x"), pool.select([0, 1]), pickle.loads(pickle.dumps(pool))
        a.go.clear()
        b.go.clear()
        run = df.swarm.submit("row {i}", pool=pool, progress=False)
        until(lambda: a.asked and b.asked)
        path.write_text(f"{a.name}\nnode 99999 what\n")
        until(lambda: "cannot be used now" in pool._repr_html_())
        path.write_text("")
        time.sleep(1.2)  # it is read twice
        assert names(pool) == [a.name, b.name]
        write_hostfile(path, [a.line(rack="x"), c.line(rack="x")])
        until(lambda: c.asked)
        a.go.set()
        b.go.set()
        with pytest.warns(sk.SwarmWarning) as warned:
            check_all(run.result())
        (text,) = [str(w.message) for w in warned]
        assert "agents.hostfile, line 2: '99999' is not a port" in text
        assert text.endswith("The endpoints stay as they were until the file can be used again")
        assert names(x) == [a.name, c.name], "a sub-pool by tag follows the file"
        assert names(first) == names(copy) == [a.name, b.name], "a selection and a copy elsewhere do not"


def test_new_endpoints_that_cannot_do_what_the_others_do_are_not_used(nodes, tmp_path):
    path, (a, small, other) = tmp_path / "agents.hostfile", nodes
    a.model, small.model, other.model = {"max_model_len": 100_000}, {"max_model_len": 1_000, "by": "x"}, {"id": "n"}
    write_hostfile(path, [a.line()])
    with watched(path) as pool:
        a.go.clear()
        run = pd.DataFrame({"i": range(40)}).swarm.submit("row {i}", pool=pool, progress=False)
        until(lambda: a.asked)
        write_hostfile(path, [node.line() for node in nodes])
        until(lambda: run.stats.notices)
        a.go.set()
        said = f"{small.name} is new .* this run cannot use it: its context is 1,000 tokens; .* counts on 100,000"
        with pytest.warns(sk.SwarmWarning, match=said):
            check_all(run.result())
        assert (small.asked, other.asked) == (0, 0)
        assert names(pool) == [a.name, small.name], "a run with fewer tokens can use it"


@pytest.mark.parametrize("target", ["http://127.0.0.1:9", ["127.0.0.1:9"], AgentEndpoint("127.0.0.1", 9)])
def test_only_a_hostfile_can_be_watched(target):
    with pytest.raises(sk.SettingError, match="watch=True follows one hostfile: give its path"):
        sk.connect(target, watch=True)


def sends(messages):
    return [(m.batch.endpoint, m.batch.rows) for m in messages if isinstance(m, Send)]


def test_rows_of_an_endpoint_that_leaves_go_to_the_one_that_comes():
    fleet = Fleet(1, max_size=10, max_in_flight=1, retry=RetryPolicy(), draw=lambda: 0.0)
    s = Scheduler(fleet, [range(100)], 100)
    (first,) = sends(s.start(0.0))
    assert sends(s.handle(Removed(0), 1.0)) == []
    ((endpoint, rows),) = sends(s.handle(Added(1), 2.0))
    assert endpoint == 1
    assert set(rows).isdisjoint(first[1])
    messages = [*s.handle(Delivered(0, first[1]), 3.0), *s.handle(Ended(0), 3.0)]
    assert sends(messages) == [], "it has left"
    assert [i for i, _ in sends(s.handle(Added(0), 4.0))] == [0], "it is back"
    s.validate()


def test_a_run_that_all_endpoints_have_left_gives_up_when_an_outage_would():
    fleet = Fleet(1, max_size=1, max_in_flight=1, retry=RetryPolicy(give_up_s=50), draw=lambda: 0.0)
    s = Scheduler(fleet, [[0, 1]], 2)
    assert sends(s.start(0.0)) == [(0, (0,))]
    assert s.handle(Removed(0), 1.0) == []
    assert s.handle(Delivered(0, [0]), 2.0) == []
    assert s.handle(Ended(0), 2.0) == [Wake(52.0)]
    assert s.handle(Tick(), 51.9) == []
    (stop,) = s.handle(Tick(), 52.0)
    assert isinstance(stop, Stop)
    assert stop.failure.message == "there is no endpoint"


@pytest.mark.long
def test_a_rolling_fleet_loses_no_row_and_new_endpoints_are_at_work_within_seconds(tmp_path):
    """Three of eight servers at a time: every two seconds for a minute one is added and the oldest is removed, which
    finishes what it has, or is killed at once."""
    path = tmp_path / "agents.hostfile"
    df = pd.DataFrame({"i": range(24_000)})
    with ExitStack() as stack:
        nodes = [stack.enter_context(Node(busy_s=0.25)) for _ in range(8)]
        write_hostfile(path, [node.line() for node in nodes[:3]])
        pool = stack.enter_context(watched(path, max_size=16))
        run = df.swarm.submit("row {i}", pool=pool, progress=False)
        waited, began = [], time.monotonic()
        for step in range(30):
            time.sleep(max(0.0, began + 2.0 * step - time.monotonic()))
            old, new = nodes[step % 8], nodes[(step + 3) % 8]
            if not new.listening:
                new.open()
            before = new.asked
            write_hostfile(path, [nodes[(step + k) % 8].line() for k in (1, 2, 3)])
            at = time.monotonic()
            if step % 2:
                old.close()
                old.hang_up()
            until(lambda: new.asked > before or run.done())  # noqa: B023 - called at once
            assert not run.done(), "the run was too short"
            waited.append(time.monotonic() - at)
        frame = run.result()
    print(f"at work after {max(waited):.1f} s at most; {run.stats!r}")
    check_all(frame)
    assert max(waited) < 5.0
