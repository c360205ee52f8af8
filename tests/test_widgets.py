"""The widgets without a browser: what is set, pressed and ticked, and what they show then."""

from __future__ import annotations

import asyncio
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ipywidgets
import pandas as pd
import pytest

import swarmkit as sk
from swarmkit.client import io_thread
from swarmkit.client.capabilities import ServerInfo
from swarmkit.engine.breaker import Breaker
from swarmkit.records import Failure, FailureKind
from swarmkit.runs.events import RowFailed, RowsDone, RunEnded, RunStarted
from swarmkit.runs.progress import Bar
from swarmkit.runs.stats import EndpointStats, RunStats
from swarmkit.widgets.endpoint_table import SIZE, in_order, matching, page_of, row_html, tag_options
from swarmkit.widgets.run_view import MAX_ENDPOINTS, Pace, run_html, shown_endpoints

HOSTILE = "<img src=x onerror=alert(1)><script>alert(2)</script>"


def wait_for(seen: Callable[[], bool], patience_s: float = 10.0) -> None:
    deadline = time.monotonic() + patience_s
    while not seen():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.01)


def parts(widget: Any) -> Iterator[Any]:
    """A widget and all that is in it."""
    yield widget
    for child in getattr(widget, "children", ()):
        yield from parts(child)


def button(widget: Any, label: str) -> ipywidgets.Button:
    return next(w for w in parts(widget) if isinstance(w, ipywidgets.Button) and label in (w.description, w.tooltip))


def shown(widget: Any) -> str:
    """The text a person sees."""
    html = " ".join(w.value for w in parts(widget) if isinstance(w, ipywidgets.HTML))
    return " ".join(re.sub("<[^>]*>|&nbsp;", " ", html).split())


def boxes(picker: sk.EndpointPicker) -> list[ipywidgets.Checkbox]:
    return [w for w in parts(picker) if isinstance(w, ipywidgets.Checkbox)]


def hostfile(folder: Path, count: int) -> Path:
    path = folder / "many.hostfile"
    lines = (f"node{i:04}:8000 rack={'abcd'[i % 4]} slot={i}" for i in range(count))
    path.write_text("\n".join(lines))
    return path


@pytest.fixture(scope="module")
def paced() -> Iterator[sk.LocalSwarm]:
    """Three endpoints that take their time, and one of them refuses everything."""
    with sk.local(
        1, engine="echo", addresses=3, tokens_per_s=80, max_num_seqs=4, faults=["http_500:address=127.0.0.3,path=/v1/c"]
    ) as swarm:
        yield swarm


# ---- the picker ------------------------------


def test_selecting_in_code_changes_the_boxes_and_ticking_changes_the_selection(pool: sk.VLLMPool) -> None:
    picker = sk.EndpointPicker(pool)
    heard: list[Any] = []
    picker.observe(heard.append, "selected")
    assert picker.selected == tuple(pool.endpoints)
    picker.selected = [pool.endpoints[2], pool.endpoints[0].name]
    assert [box.value for box in boxes(picker)] == [True, False, True, False]
    boxes(picker)[1].value = True
    boxes(picker)[0].value = False
    assert picker.selected == tuple(pool.endpoints[1:3])
    assert len(heard) == 3
    assert repr(picker) == "<EndpointPicker: 2 of 4 endpoints selected>"
    with pytest.raises(sk.SettingError, match="'nowhere:1' is not one of the 4 endpoints"):
        picker.selected = ["nowhere:1"]


def test_the_pool_of_a_selection_can_be_used_at_once(pool: sk.VLLMPool) -> None:
    picker = sk.EndpointPicker(pool)
    picker.selected = pool.endpoints[1:2]
    assert picker.use().endpoints == pool.endpoints[1:2]
    answers = pd.DataFrame({"t": ["a", "b"]}).swarm.scatter("{t}", details=True)
    assert set(answers["response_endpoint"]) == {pool.endpoints[1].name}
    picker.selected = []
    with pytest.raises(sk.SettingError, match="none was selected"):
        picker.use()


def test_use_these_sets_the_default_pool_and_leaves_a_table(
    pool: sk.VLLMPool, capsys: pytest.CaptureFixture[str]
) -> None:
    picker = sk.EndpointPicker(pool)
    moving = picker._repr_mimebundle_()
    assert moving["text/html"].count("☑") == 4  # where there are no widgets
    picker._ipython_display_()
    capsys.readouterr()
    picker.selected = pool.endpoints[1:3]
    button(picker, "Use these").click()
    left = capsys.readouterr().out
    assert "widget-view" not in left
    assert "2 of 4 endpoints in use as the default pool" in left
    assert (left.count("☑"), left.count("☐")) == (2, 2)
    answers = pd.DataFrame({"t": ["a", "b"]}).swarm.scatter("{t}", details=True)
    assert set(answers["response_endpoint"]) == {e.name for e in pool.endpoints[1:3]}
    picker.selected = pool.endpoints[:1]
    button(picker, "Use these").click()
    assert capsys.readouterr().out == ""  # what was shown stays as it was


def test_the_table_can_be_sorted_and_says_when_nothing_matches(tmp_path: Path) -> None:
    names = ["node10", "node2", "node1", "a-node-of-a-rack-with-a-very-long-name.cluster"]
    (tmp_path / "few.hostfile").write_text("\n".join(f"{name}:8000" for name in names))
    picker = sk.EndpointPicker(tmp_path / "few.hostfile")
    menus = [w for w in parts(picker) if isinstance(w, ipywidgets.Dropdown)]
    assert len(menus) == 1  # no tags, no menu of them
    assert re.findall(r"node\d+", shown(picker)) == names[:3]
    menus[0].value = "address"
    assert re.findall(r"node\d+", shown(picker)) == ["node1", "node2", "node10"]
    assert "address ▴" in shown(picker)
    boxes(picker)[1].value = False  # node1, which is the second now
    assert [e.host for e in picker.selected] == [names[0], names[1], names[3]]
    assert "cluster:8000" in shown(picker)  # the end of a long name is whole
    next(w for w in parts(picker) if isinstance(w, ipywidgets.Text)).value = "nowhere"
    assert "no endpoint matches" in shown(picker)


def test_sorting_puts_what_is_not_known_last() -> None:
    ends = [sk.AgentEndpoint("n", i) for i in range(4)]
    infos = {
        ends[1].url: ServerInfo(ends[1], "down", reason="gone"),
        ends[2].url: ServerInfo(ends[2], "up", models=("b",), latency_s=0.2),
        ends[3].url: ServerInfo(ends[3], "up", models=("a",), latency_s=0.3),
    }
    orders = {by: in_order([0, 1, 2, 3], ends, infos, by) for by in ("", "health", "model", "probe")}
    assert orders == {"": [0, 1, 2, 3], "health": [2, 3, 1, 0], "model": [3, 2, 0, 1], "probe": [2, 3, 0, 1]}


def test_buttons_act_on_what_matches_the_filters(tmp_path: Path) -> None:
    picker = sk.EndpointPicker(hostfile(tmp_path, 100))
    tag = next(w for w in parts(picker) if isinstance(w, ipywidgets.Dropdown))
    text = next(w for w in parts(picker) if isinstance(w, ipywidgets.Text))
    button(picker, "None").click()
    tag.value = "rack=b"
    text.value = "node000"
    assert "3 shown" in shown(picker)
    assert re.findall(r"node\d+", shown(picker)) == ["node0001", "node0005", "node0009"]
    button(picker, "All").click()
    text.value, tag.value = "", ""
    assert [e.host for e in picker.selected] == ["node0001", "node0005", "node0009"]
    assert [box.value for box in boxes(picker)][:7] == [False, True, False, False, False, True, False]


def test_probe_shows_health_and_healthy_selects_by_it(echo: sk.LocalSwarm) -> None:
    dead = sk.AgentEndpoint("127.0.0.1", 9)
    picker = sk.EndpointPicker([dead, *echo.endpoints])
    assert "not probed" in shown(picker)
    button(picker, "Probe").click()
    wait_for(lambda: "4 up" in shown(picker) and "1 down" in shown(picker))
    assert "cannot connect: connection refused" in shown(picker)
    wait_for(lambda: not button(picker, "Probe").disabled)
    assert re.search(r"127\.0\.0\.2:\d+ +echo .* \d+ ms +0 +0 ", shown(picker)), shown(picker)  # running and waiting
    assert picker.selected == tuple(echo.endpoints)  # without the one that is down
    button(picker, "All").click()
    button(picker, "Healthy").click()
    assert picker.selected == tuple(echo.endpoints)


def test_an_endpoint_that_has_been_used_is_up_when_it_is_probed_again(echo: sk.LocalSwarm) -> None:
    with sk.connect(echo.endpoints[:1]) as pool:  # its list of models is the same each time, over any connection
        pd.DataFrame({"i": range(8)}).swarm.scatter("{i}", mode="single", pool=pool)  # which opens several
        picker = sk.EndpointPicker(pool)
        picker.probe().result(10)
        assert len(picker.selected) == 1


def test_what_endpoints_do_is_shown_once_it_is_known(echo: sk.LocalSwarm) -> None:
    with sk.connect(echo) as pool:
        assert "lists" not in shown(sk.EndpointPicker(pool))
        pd.DataFrame({"q": ["a", "b"]}).swarm.scatter("q", pool=pool, schema={"n": int})
        assert shown(sk.EndpointPicker(pool)).count("lists, rows, json") == 4
        pool.capabilities()
        assert shown(sk.EndpointPicker(pool)).count("lists, rows, json, regex, choice") == 4


def test_a_wrong_model_is_not_healthy(echo: sk.LocalSwarm) -> None:
    picker = sk.EndpointPicker(echo, model="other")
    picker.probe().result(10)
    wait_for(lambda: "4 down" in shown(picker))
    assert picker.selected == ()
    assert button(picker, "Use these").disabled
    assert "it serves echo, not other" in shown(picker)


def test_a_probe_that_cannot_begin_says_why(echo: sk.LocalSwarm) -> None:
    with sk.VLLMPool(echo.endpoints) as pool:
        picker = sk.EndpointPicker(pool)
    button(picker, "Probe").click()
    wait_for(lambda: "this pool is closed" in shown(picker))
    assert not button(picker, "Probe").disabled


def test_pages_turn_and_follow_the_filter(tmp_path: Path) -> None:
    picker = sk.EndpointPicker(hostfile(tmp_path, 3 * SIZE + 1))
    assert "of 4" in shown(picker)
    button(picker, "Next page").click()
    assert re.findall(r"node\d+", shown(picker))[0] == f"node{SIZE:04}"
    button(picker, "Previous page").click()
    button(picker, "Previous page").click()  # there is none: it stays
    assert re.findall(r"node\d+", shown(picker))[0] == "node0000"
    number = next(w for w in parts(picker) if isinstance(w, ipywidgets.BoundedIntText))
    number.value = 4
    assert len(boxes(picker)) == 1
    boxes(picker)[0].value = False
    assert picker.selected[-1].host == f"node{3 * SIZE - 1:04}"
    next(w for w in parts(picker) if isinstance(w, ipywidgets.Text)).value = "node0007"
    assert re.findall(r"node\d+", shown(picker)) == ["node0007"]
    assert boxes(picker)[0].value


def test_what_is_on_a_page() -> None:
    assert page_of([], 3) == ([], 1, 1)
    assert page_of(range(SIZE), 1) == (range(SIZE), 1, 1)
    assert page_of(range(SIZE + 1), 2) == (range(SIZE, SIZE + 1), 2, 2)
    ends = [sk.AgentEndpoint("n", i, {"rack": "a" if i < 3 else "b", "slot": str(i)}) for i in range(1, 6)]
    assert matching(ends, {}, "N: rack=B", "") == [2, 3, 4]
    assert matching(ends, {}, "slot=4", "rack=b") == [3]
    assert tag_options(ends)[:3] == [("any tag", ""), ("rack=a (2)", "rack=a"), ("rack=b (3)", "rack=b")]
    many = [sk.AgentEndpoint("n", i, {"slot": str(i)}) for i in range(1, 1000)]
    assert len(tag_options(many)) == 201


def test_4000_endpoints_show_at_once(tmp_path: Path) -> None:
    path = hostfile(tmp_path, 4000)
    began = time.perf_counter()
    picker = sk.EndpointPicker(path)
    bundle = picker._repr_mimebundle_()
    assert time.perf_counter() - began < 2.0
    assert bundle["text/plain"] == "<EndpointPicker: 4,000 of 4,000 endpoints selected>"
    assert "of 200" in shown(picker)
    began = time.perf_counter()
    next(w for w in parts(picker) if isinstance(w, ipywidgets.Text)).value = "slot=3999"
    assert time.perf_counter() - began < 0.5
    assert re.findall(r"node\d+", shown(picker)) == ["node3999"]


def test_probing_them_all_leaves_the_notebook_free(echo: sk.LocalSwarm) -> None:
    """The notebook's thread and the loop of the runs both keep their time while 1,000 endpoints are asked."""
    addresses = [f"127.0.{i // 250}.{i % 250 + 1}" for i in range(1000)]
    with sk.local(1, engine="echo", addresses=addresses, token="t") as swarm:
        picker = sk.EndpointPicker(swarm)
        late: list[float] = []

        async def heartbeat() -> None:
            while True:
                began = time.perf_counter()
                await asyncio.sleep(0.01)
                late.append(time.perf_counter() - began - 0.01)

        beat = io_thread.start(heartbeat())
        began = time.thread_time()  # what the click itself costs; a busy machine may hold it up
        job = picker.probe()
        assert time.thread_time() - began < 0.05
        assert not job.done()  # it returned at once
        waits = []
        while not job.done():
            began = time.perf_counter()
            time.sleep(0.01)
            waits.append(time.perf_counter() - began - 0.01)
        wait_for(lambda: "1,000 up" in shown(picker))
        beat.stop()
        waits.sort()
        late.sort()
        print(f"\nnotebook late by {waits[len(waits) // 2] * 1e3:.1f} ms, {waits[-1] * 1e3:.0f} at most; "
              f"I/O loop {late[len(late) // 2] * 1e3:.1f} ms, {late[-1] * 1e3:.0f} at most")  # fmt: skip
        assert waits[len(waits) // 2] < 0.05
        assert waits[len(waits) * 9 // 10] < 0.3
        assert late[len(late) // 2] < 0.05


def test_hostile_text_in_the_picker_is_text() -> None:
    endpoint = sk.AgentEndpoint("n", 1, {"<b>": HOSTILE})
    line = row_html(endpoint, ServerInfo(endpoint, "up", models=(HOSTILE,)), None)
    line += row_html(endpoint, ServerInfo(endpoint, "down", reason=HOSTILE), None)
    assert "<img" not in line
    assert "<script" not in line
    assert "&lt;img" in line


# ---- the monitor ------------------------------


def run_of(paced: sk.LocalSwarm, rows: int = 60, **options: Any) -> sk.Run:
    df = pd.DataFrame({"t": [f"{HOSTILE} row {i}" for i in range(rows)]})
    return df.swarm.submit("{t}", pool=paced, progress=False, **options)


def test_rows_show_up_as_they_finish_and_the_end_is_a_static_snapshot(
    paced: sk.LocalSwarm, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_of(paced)
    time.sleep(0.5)  # it may come late
    monitor = sk.RunMonitor(run)
    moving = monitor._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in moving
    assert "scatter: running" in moving["text/html"]  # where there are no widgets
    monitor._ipython_display_()  # a cell shows it
    assert "widget-view" in capsys.readouterr().out
    counts: list[int] = []

    def finished() -> bool:
        counts.append(int(re.search(r"([\d,]+) of 60 rows", shown(monitor)).group(1)))  # type: ignore[union-attr]
        return run.done()

    wait_for(finished, 60)
    assert len(set(counts)) > 3
    assert "server error" in shown(monitor)
    run.result()
    assert "scatter: done 60 of 60 rows" in shown(monitor)
    assert "all rows answered" in shown(monitor)
    took_its_place = capsys.readouterr().out
    assert "widget-view" not in took_its_place
    assert "scatter: 60 rows, 60 answered, " in took_its_place
    still = monitor._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" not in still
    assert "60 of 60 rows" in still["text/html"]
    assert repr(monitor) == "<RunMonitor: scatter>"


def test_stop_ends_the_run_and_keeps_its_rows(paced: sk.LocalSwarm) -> None:
    run = run_of(paced, 400)
    monitor = sk.RunMonitor(run)
    wait_for(lambda: run.stats.answered > 0 and button(monitor, "Stop").layout.display != "none", 30)
    began = time.perf_counter()
    button(monitor, "Stop").click()
    with pytest.raises(sk.CancelledError):
        run.result(5)
    assert time.perf_counter() - began < 1.0
    assert "scatter: cancelled" in shown(monitor)
    assert button(monitor, "Stop").layout.display == "none"
    assert 0 < run.partial()["response"].notna().sum() < 400


def test_a_cell_that_waits_is_told_to_interrupt(paced: sk.LocalSwarm) -> None:
    run = run_of(paced)
    monitor = sk.RunMonitor(run)
    waiting = threading.Thread(target=run.finish)
    waiting.start()
    wait_for(lambda: "interrupt the kernel" in shown(monitor))
    assert button(monitor, "Stop").layout.display == "none"
    waiting.join()
    assert "interrupt the kernel" not in shown(monitor)


def test_a_tree_is_one_run_to_its_monitor(echo: sk.LocalSwarm) -> None:
    df = pd.DataFrame({"t": [str(i) for i in range(64)]})
    df.swarm.tree_reduce("t", "{responses}", fanin=4, pool=echo, progress=False)
    assert "tree_reduce: done 21 of 21 merges" in shown(sk.RunMonitor(sk.last_run()))


def test_without_a_notebook_a_monitor_is_the_bar(echo: sk.LocalSwarm, capsys: pytest.CaptureFixture[str]) -> None:
    df = pd.DataFrame({"t": ["a"]})
    df.swarm.scatter("{t}", pool=echo, monitor=True, progress=True)
    said = capsys.readouterr()
    assert "scatter: 100%" in said.err
    assert said.out == ""


def test_hostile_text_in_the_monitor_is_text() -> None:
    stats = RunStats(rows=2, answered=1, endpoints=[EndpointStats(HOSTILE, 1, 1, 1)])
    stats.recent_failures.append(Failure(FailureKind.SERVER, HOSTILE, "n:1").describe())
    picture = run_html(HOSTILE, "running", stats, Pace(), 1.0, [(HOSTILE, HOSTILE)])
    assert "<img" not in picture
    assert "<script" not in picture
    assert picture.count("&lt;img") >= 4


def test_thousands_of_endpoints_are_a_dozen_rows_with_the_failing_ones_among_them() -> None:
    ends = [EndpointStats(f"n{i}", rows=10, in_flight=1) for i in range(4000)]
    ends[3000].breaker, ends[3999].breaker = Breaker.OUT, Breaker.HALF_OPEN
    assert shown_endpoints(ends) == [*range(MAX_ENDPOINTS - 2), 3000, 3999]
    stats = RunStats(rows=40_000, answered=40_000, endpoints=ends)
    began = time.perf_counter()
    picture = run_html("scatter", "running", stats, Pace(), 1.0)
    assert time.perf_counter() - began < 0.1
    assert len(picture) < 20_000
    assert "and 3,988 other endpoints" in picture
    assert "out for this run" in picture


def test_the_pace_of_a_long_run_stays_small_and_true() -> None:
    pace = Pace()
    for i in range(1, 10_001):
        pace.add(0.3 * i, 3 * i)  # ten rows a second for 50 minutes
    rates = pace.rates()
    assert len(rates) <= 130
    assert all(rate == pytest.approx(10.0) for _, rate in rates)
    assert pace.recent() == pytest.approx(10.0)
    assert rates[-1][0] > 2900


def test_the_rate_of_a_run_is_never_above_the_highest_that_is_shown() -> None:
    pace = Pace()
    for at_s, rows in ((0.9, 100), (1.1, 200), (2.2, 300), (3.1, 900), (3.4, 1190)):
        pace.add(at_s, rows)
    stats = RunStats(rows=2000, answered=1190, endpoints=[EndpointStats("n", 1, 1190)])
    for state in ("running", "cancelled"):
        picture = run_html("scatter", state, stats, pace, 3.4)
        rate = float(re.search(r"([\d.]+) rows/s", picture)[1])  # type: ignore[index]
        most = float(re.search(r"second, ([\d.]+) at most", picture)[1])  # type: ignore[index]
        assert rate == pytest.approx(350.0)
        assert most >= rate


def test_a_run_that_is_over_says_what_became_of_its_requests_and_nothing_is_paused() -> None:
    ends = [EndpointStats("a", rows=5, failures=7, breaker=Breaker.OPEN), EndpointStats("b", rows=5)]
    stats = RunStats(rows=10, answered=10, endpoints=ends, requests=9, failed_requests=7, completion_tokens=400)
    stats.recent_failures.append("server error")
    over = run_html("scatter", "done", stats, Pace(), 2.0)
    assert "7 requests failed, all rows answered" in over
    assert "200 tokens/s" in over
    assert "paused" not in over
    assert "in flight" not in over
    running = run_html("scatter", "running", stats, Pace(), 2.0)
    assert "paused after failures" in running
    ends[0].failures = 0
    assert "failures</span>" not in run_html("scatter", "done", stats, Pace(), 2.0)
    assert "0 of 0" not in run_html("scatter", "running", RunStats(), Pace(), 0.0)


def test_less_than_a_second_is_no_time_left() -> None:
    pace = Pace([(0.0, 0), (2.0, 90)])
    stats = RunStats(rows=100, answered=90, endpoints=[EndpointStats("a", rows=90)])
    assert " left" not in run_html("scatter", "running", stats, pace, 2.0)
    stats.rows = 200
    assert "about 2.4 s left" in run_html("scatter", "running", stats, pace, 2.0)


def test_rows_that_fail_take_their_part_of_the_time_and_leave_less(capfd: pytest.CaptureFixture[str]) -> None:
    stats = RunStats(rows=200, answered=10, failed=90, endpoints=[EndpointStats("a", rows=10)])
    assert "about 2.0 s left" in run_html("scatter", "running", stats, Pace([(0.0, 0), (2.0, 10)]), 2.0)

    bar, failure = Bar("scatter", RunStats()), Failure(FailureKind.REJECTED, "no", "a")
    bar(RunStarted(100, 100, ["a"], ["completions"], 0.0))
    for row in range(50):
        time.sleep(0.02)
        bar(RowFailed(row, failure, 0.0) if row % 10 else RowsDone(0, 0, [row], 1, 0.0))
    bar(RunEnded(None, False, 1.0))
    assert re.search(r" 50/100 .*<00:0[012]", capfd.readouterr().err)  # half of the rows, and half of the time


# ---- reprs ------------------------------


def test_what_shows_itself_says_it_in_a_line_and_a_small_table_and_never_a_key(
    echo: sk.LocalSwarm, pool: sk.VLLMPool, tmp_path: Path
) -> None:
    key = echo.endpoints[0].key()
    assert key
    df = pd.DataFrame({"t": ["a", "b"]})
    store = sk.open_store(tmp_path / "<store>")
    run = df.swarm.submit("{t}", store=store, progress=False)
    run.result()
    found = df.swarm.compare("{t}", repeats=1)
    for thing in (pool, pool.endpoints[0], run, run.stats, found, store):
        line, table = repr(thing), thing._repr_html_()
        assert "\n" not in line
        assert table.startswith("<table")
        assert len(table) < 4000
        assert key not in line + table
    assert "4 up" in pool._repr_html_()
    assert "&lt;store&gt;" in store._repr_html_()
    assert "rows of echo>" in repr(store)
    assert "given" in pool.endpoints[0]._repr_html_()


def test_a_hostile_name_in_a_table_is_text() -> None:
    endpoint = sk.AgentEndpoint("n", 1, {"a": HOSTILE})
    assert "<img" not in endpoint._repr_html_()
    assert "<img" not in sk.VLLMPool([endpoint], model=HOSTILE)._repr_html_()
