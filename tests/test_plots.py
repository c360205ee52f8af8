"""What a viewer of the pictures would notice."""

from __future__ import annotations

import io
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import combinations
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.axis import Axis, Tick
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection, PathCollection, PolyCollection
from matplotlib.colors import same_color
from matplotlib.figure import Figure
from matplotlib.text import Text

import swarmkit as sk
from swarmkit.analysis import plots

pytestmark = pytest.mark.slow

LONG = "https://a-gateway-with-a-very-long-name.example.org:8443/tenant-{}/v1"
RUNS = pd.DataFrame(
    {
        "mode": ["batch"] * 6 + ["single"] * 3,
        "batch_size": [100] * 3 + [10] * 3 + [1] * 3,
        "repeat": [0, 1, 2] * 3,
        "prompts_per_s": [900.0, 1000, 1300, 500, 400, 450, 90, 100, 80],
        "requests": [3] * 3 + [26] * 3 + [256] * 3,
        "client_cpu_s": [0.02, 0.03, 0.04] + [0.1] * 3 + [0.5, 0.4, 0.6],
    }
)


def requests(*rows: tuple[str, float, float, str | None]) -> pd.DataFrame:
    frame = pd.DataFrame(rows, columns=["endpoint", "start_s", "end_s", "failure"])
    return frame.assign(rows=10)


def legend(ax: Axes) -> list[str]:
    found = ax.get_legend()
    return [text.get_text() for text in found.get_texts()] if found else []


def bars(ax: Axes) -> dict[str, PolyCollection]:
    """Bars of a timeline by the first word of what they are."""
    return {str(c.get_label()).split()[0]: c for c in ax.collections if isinstance(c, PolyCollection)}


def boxes(collection: PolyCollection) -> np.ndarray:
    """``left, low, right, high`` of each bar."""
    return np.array([[*path.vertices.min(axis=0), *path.vertices.max(axis=0)] for path in collection.get_paths()])


def marks(ax: Axes) -> dict[str, np.ndarray]:
    """Places of a tree's nodes by what they are."""
    return {
        str(c.get_label()).split()[0]: np.asarray(c.get_offsets())
        for c in ax.collections
        if isinstance(c, PathCollection)
    }


def waits(rows: int) -> pd.DataFrame:
    """Rows with their latencies, at endpoints with long names."""
    rng = np.random.default_rng(0)
    nodes = [LONG.format(i) for i in rng.integers(0, 5, rows)]
    return pd.DataFrame({"x_latency_s": rng.gamma(3, 0.4, rows), "node": nodes})


def labels(rows: int) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    label, truth = rng.choice(["a", "b"], (2, rows))
    return pd.DataFrame({"label": label, "label_p": rng.beta(5, 2, rows), "truth": truth})


def many_requests(count: int, endpoints: int, failing: float) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    start = np.sort(rng.uniform(0, 600, count))
    kinds = rng.choice(["server", "timeout", "cannot connect", "connection lost"], count)
    return pd.DataFrame(
        {
            "endpoint": [LONG.format(i) for i in rng.integers(0, endpoints, count)],
            "rows": rng.integers(1, 100, count), "start_s": start, "end_s": start + rng.gamma(4, 5, count),
            "failure": np.where(rng.random(count) < failing, kinds, None),
        }
    )  # fmt: skip


def groups(count: int, name: str) -> pd.DataFrame:
    """The trace of groups of four leaves, fan-in 3; the third group has failed."""
    nodes = []
    for group in range(count):
        at = 7 * group
        parents = [at + 4, at + 4, at + 4, at + 5, at + 6, at + 6, None]
        for i, (parent, leaves) in enumerate(zip(parents, [1, 1, 1, 1, 3, 1, 4], strict=True)):
            bad = "server" if group == 2 and parent is None else None
            level = 0 if i < 4 else 1 if i < 6 else 2
            nodes.append((name.format(group), at + i, parent, level, group, leaves, None if bad else "text", bad))
    columns = ["name", "node", "parent", "level", "group", "n_leaves", "response", "error"]
    return pd.DataFrame(nodes, columns=columns).astype({"parent": "Int64"})


@pytest.fixture(scope="module")
def answered() -> Iterator[tuple[pd.DataFrame, pd.DataFrame]]:
    """The details and the timeline of a run with failures: one endpoint of three errs at first."""
    faults = ["http_500:first=2,address=127.0.0.2"]
    with (
        sk.local(1, engine="echo", addresses=3, latency_s=0.05, faults=faults) as swarm,
        sk.connect(swarm, batch=sk.BatchPolicy(max_size=5), retry=sk.RetryPolicy(base_s=0.01)) as pool,
    ):
        details = pd.DataFrame({"i": range(60)}).swarm.scatter("number {i}", pool=pool, details=True)
        yield details, sk.last_run().stats.timeline()


@pytest.fixture(scope="module")
def traces() -> Iterator[dict[str, pd.DataFrame]]:
    df = pd.DataFrame({"text": [f"leaf {i:03}" for i in range(40)], "kind": ["a", "b$"] * 20})
    with sk.local(1, engine="echo", faults=["bad_row:marker=leaf 013"]) as swarm, sk.connect(swarm) as pool:
        options: dict[str, Any] = {"pool": pool, "trace": True, "max_tokens": 6}
        with pytest.warns(sk.SwarmWarning, match="1 of|cut off"):
            made = {
                "eight": df.head(8).swarm.tree_reduce("text", "Merge {responses}", fanin=2, **options),
                "failed": df.swarm.tree_reduce("text", "Merge {responses}", fanin=4, **options),
                "grouped": df.swarm.tree_reduce("text", "Merge {responses}", fanin=4, by="kind", **options),
            }
        yield made


# ---- all pictures ------------------------------


def every_picture(answered: tuple[pd.DataFrame, pd.DataFrame], trace: pd.DataFrame) -> list[tuple[Any, pd.DataFrame]]:
    details, timeline = answered
    return [
        (plots.throughput, RUNS), (plots.cost, RUNS), (plots.latency, details),
        (plots.timeline, timeline), (plots.rate, timeline), (plots.tree, trace),
    ]  # fmt: skip


def test_each_has_a_title_and_labels_and_shows_itself(
    answered: tuple[pd.DataFrame, pd.DataFrame], traces: dict[str, pd.DataFrame]
) -> None:
    for draw, frame in every_picture(answered, traces["grouped"]):
        before = frame.copy()
        ax = draw(frame)
        assert ax.get_title(loc="left")
        assert ax.get_ylabel() or ax.get_yticklabels()[0].get_text()
        assert ax.get_xlabel()
        image = mpl.image.imread(io.BytesIO(ax.figure._repr_png_()))
        assert image.shape[0] > 200
        assert (image[..., 3] == 1).all()  # opaque: it is read on a dark page, too
        assert (image[0, :, :3] == 1).all()
        assert len(np.unique(image.reshape(-1, 4), axis=0)) > 20
        pd.testing.assert_frame_equal(frame, before)


def test_each_draws_on_the_axes_it_is_given(
    answered: tuple[pd.DataFrame, pd.DataFrame], traces: dict[str, pd.DataFrame]
) -> None:
    for draw, frame in every_picture(answered, traces["eight"]):
        ax = Figure(facecolor="black").add_subplot()
        ax.yaxis.label.set_color("yellow")
        assert draw(frame, ax=ax) is ax
        assert ax.title.get_text() == ""
        texts = [ax._left_title, *(ax.get_legend().get_texts() if ax.get_legend() else [])]  # type: ignore[attr-defined]
        assert all(same_color(text.get_color(), "yellow") for text in texts)  # as on the user's own figure


def test_texts_stay_dark_on_white_under_a_dark_style(answered: tuple[pd.DataFrame, pd.DataFrame]) -> None:
    dark = {"text.color": "white", "axes.labelcolor": "white", "figure.facecolor": "black", "axes.facecolor": "black"}
    with mpl.rc_context({**dark, "xtick.color": "white", "savefig.transparent": True}):
        image = mpl.image.imread(io.BytesIO(plots.latency(answered[0]).figure._repr_png_()))
    assert (image[0, 0] == 1).all()
    assert (image[..., 3] == 1).all()
    left = image[:, : image.shape[1] // 30, :3]  # the label of the y-axis
    assert left.min() < 0.5


WIDTHS = {"wide": None, "narrow": (4.6, 3.8)}
PICTURES: dict[str, tuple[Any, Any]] = {
    "throughput": (plots.throughput, RUNS.assign(rows_per_request=7.4)),
    "cost": (plots.cost, RUNS),
    "latency": (plots.latency, waits(100)),
    "latency of one row": (plots.latency, waits(1)),
    "latency where none was answered": (plots.latency, waits(3).assign(x_latency_s=None)),
    "latency by long names": (lambda frame, ax: plots.latency(frame, ax=ax, by="node"), waits(100)),
    "calibration": (lambda frame, ax: plots.calibration(frame, "truth", ax=ax), labels(10_000)),
    "calibration of one row": (lambda frame, ax: plots.calibration(frame, "truth", ax=ax), labels(1)),
    "calibration, many bins": (lambda frame, ax: plots.calibration(frame, "truth", ax=ax, bins=50), labels(10_000)),
    "timeline": (plots.timeline, many_requests(10_000, 400, 0.02)),
    "timeline of one request": (plots.timeline, many_requests(1, 1, 0)),
    "timeline, all failed": (plots.timeline, many_requests(40, 12, 1)),
    "timeline without requests": (plots.timeline, many_requests(0, 1, 0)),
    "rate": (plots.rate, many_requests(10_000, 40, 0.02)),
    "rate, all failed": (plots.rate, many_requests(40, 12, 1)),
    "rate without requests": (plots.rate, many_requests(0, 1, 0)),
    "tree of 10 groups": (plots.tree, groups(10, "Escherichia coli K-12 substrain MG{} of a long $name")),
    "tree of 50 groups": (plots.tree, groups(50, "organism {}")),
    "tree of 200 groups": (plots.tree, groups(200, "Escherichia coli K-12 substrain MG{} of a long $name")),
    "tree, all failed": (plots.tree, groups(2, "{}").assign(response=None, error="server")),
    "tree without answers": (plots.tree, groups(2, "{}").assign(response=None)),
}


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", PICTURES)
def test_texts_do_not_run_into_each_other(name: str, width: str) -> None:
    draw, frame = PICTURES[name]
    own = WIDTHS[width] and plots.Figure(figsize=WIDTHS[width], layout="constrained").add_subplot()
    assert_readable(draw(frame, ax=own).figure)


@pytest.mark.parametrize("width", [11, 5.5])
def test_texts_of_panels_do_not_run_into_each_other(width: float) -> None:
    assert_readable(plots.comparison(RUNS.assign(rows_per_request=7.4), width=width))
    stats = sk.RunStats(rows=3, answered=3)
    assert_readable(plots.overview(stats, width=width))


def assert_readable(figure: Any) -> None:
    """No two texts overlap, and none is outside."""
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw(renderer)
    shown = [(t.get_text(), t.get_window_extent(renderer)) for t in texts_of(figure)]
    width, height = figure.bbox.width, figure.bbox.height
    outside = [t for t, b in shown if b.x0 < -1 or b.y0 < -1 or b.x1 > width + 1 or b.y1 > height + 1]
    assert not outside
    clashes = [
        (t, u)
        for (t, a), (u, b) in combinations(shown, 2)
        if min(a.x1, b.x1) - max(a.x0, b.x0) > 1 and min(a.y1, b.y1) - max(a.y0, b.y0) > 1
    ]
    assert shown
    assert not clashes


def texts_of(artist: Any) -> Iterator[Text]:
    """The texts that are seen."""
    if not artist.get_visible():
        return
    if isinstance(artist, Text):
        if artist.get_text().strip():
            yield artist
        return
    hidden = (artist.xaxis, artist.yaxis) if isinstance(artist, Axes) and not artist.axison else ()
    low, high = sorted(artist.get_view_interval()) if isinstance(artist, Axis) else (0, 0)
    for child in artist.get_children():
        if child not in hidden and not (isinstance(child, Tick) and not low <= child.get_loc() <= high):
            yield from texts_of(child)


def test_pyplot_is_left_alone() -> None:
    code = (
        "import sys, pandas as pd, swarmkit as sk\n"
        "assert 'matplotlib' not in sys.modules\n"
        "import swarmkit.analysis.compare\n"
        "assert 'matplotlib' not in sys.modules\n"
        "from swarmkit import plots\n"
        "plots.latency(pd.DataFrame({'a_latency_s': [1.0, 2.0]})).figure._repr_png_()\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize(
    ("draw", "frame", "said"),
    [
        (plots.throughput, RUNS.drop(columns="prompts_per_s"), r"no column prompts_per_s.*compare\(\.\.\.\)\.runs"),
        (
            lambda frame: plots.cost(frame, of="client_cpu_s"),
            RUNS.drop(columns="client_cpu_s"),
            r"no column client_cpu_s.*compare",
        ),
        (plots.latency, RUNS, r"no column <out>_latency_s.*details=True"),
        (plots.timeline, RUNS, r"no column endpoint, rows, start_s.*stats\.timeline\(\)"),
        (plots.rate, RUNS, r"stats\.timeline\(\)"),
        (plots.tree, RUNS, r"no column node, parent.*trace=True"),
        (lambda frame: plots.calibration(frame, "truth"), RUNS, r"no column label, label_p, truth.*classify\("),
        (plots.timeline, 7, r"not int: use .*timeline\(\)"),
        (plots.latency, sk.RunStats(), r"not RunStats: use .*details=True"),
        (plots.overview, RUNS, r"needs a run, not DataFrame: use sk.last_run\(\)"),
        (plots.throughput, RUNS.head(0), "no rows"),
        (plots.latency, pd.DataFrame({"a_latency_s": [1.0], "b_latency_s": [1.0]}), "a_latency_s, b_latency_s"),
    ],
)
def test_a_wrong_frame_is_told_what_is_missing_and_where_it_comes_from(draw: Any, frame: Any, said: str) -> None:
    with pytest.raises(sk.SettingError, match=said):
        draw(frame)


# ---- labels ------------------------------


def test_a_bar_of_a_calibration_is_the_share_that_is_right_and_its_number_the_rows() -> None:
    sure = [0.55, 0.58, 0.95, 0.97, 0.99, 1.0, None, 0.2]
    frame = pd.DataFrame({"x": pd.Categorical(["a", "b"] * 4), "x_p": pd.Series(sure, dtype="Float64")})
    truth = ["a", "a", "a", "b", "a", "a", "a", None]
    ax = plots.calibration(frame, truth, out="x")
    assert [bar.get_height() for bar in ax.patches] == [0.5, 0.75]
    assert [bar.get_x() + bar.get_width() / 2 for bar in ax.patches] == pytest.approx([0.55, 0.95])
    assert [text.get_text() for text in ax.texts] == ["2", "4"]
    assert ax.get_title(loc="left") == "6 rows: 67% are right, sure by 84%"
    marks = next(line for line in ax.lines if line.get_marker() == "D")
    assert np.array(marks.get_ydata(), float) == pytest.approx([0.565, 0.9775])
    with pytest.raises(sk.SettingError, match="truth= has 1 value, and the frame 8 rows"):
        plots.calibration(frame, ["a"], out="x")
    with pytest.raises(sk.SettingError, match="no row has both a probability in x_p and a right label"):
        plots.calibration(frame, [None] * 8, out="x")


# ---- comparisons ------------------------------


def test_a_bar_is_the_median_and_its_whisker_the_range() -> None:
    ax = plots.throughput(RUNS)
    assert [bar.get_width() for bar in ax.patches] == [1000, 450, 90]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["batch of 100", "batch of 10", "single"]
    assert ax.yaxis_inverted()  # the first is on top
    assert [t.get_text() for t in ax.texts] == ["1,000", "450", "90"]
    assert ax.get_xlabel() == "prompts per second"
    whiskers = [c.get_segments()[0][:, 0].tolist() for c in ax.collections if isinstance(c, LineCollection)]
    assert whiskers == [[900, 1300], [400, 500], [80, 100]]
    dots = [sorted(line.get_xdata()) for line in ax.lines if line.get_marker() == "o"]
    assert dots == [[900, 1000, 1300], [400, 450, 500], [80, 90, 100]]
    assert sorted(legend(ax)) == ["median", "range", "repeats"]
    assert ax.patches[0].get_hatch() != ax.patches[2].get_hatch()
    assert ax.get_xlim()[0] == 0


def test_the_title_is_the_verdict() -> None:
    said = " ".join(plots.throughput(RUNS).get_title(loc="left").split())
    assert said.startswith("batch of 100: 11.11 times the throughput of single; batch of 10: 5.00 times")
    few = " ".join(plots.throughput(RUNS[RUNS["repeat"] < 2]).get_title(loc="left").split())
    assert few.startswith("batch of 100, batch of 10: too few repeats to compare with single")


def test_batches_that_were_smaller_than_they_may_be_say_so() -> None:
    real = np.where(RUNS["batch_size"] == 100, 85.3, RUNS["batch_size"])
    names = [t.get_text() for t in plots.throughput(RUNS.assign(rows_per_request=real)).get_yticklabels()]
    assert names == ["batch of 100\n(85 rows a request)", "batch of 10", "single"]


def test_one_repeat_has_no_spread() -> None:
    ax = plots.throughput(RUNS[RUNS["repeat"] == 0])
    assert [bar.get_width() for bar in ax.patches] == [900, 500, 90]
    assert not ax.lines
    assert not ax.collections


def test_each_cost_has_a_panel_and_a_unit_of_its_own() -> None:
    _, requests, cpu = plots.comparison(RUNS).axes
    assert [bar.get_width() for bar in requests.patches] == [3, 26, 256]
    assert [bar.get_width() for bar in cpu.patches] == [0.03, 0.1, 0.5]
    assert [t.get_text() for t in requests.texts] == ["3", "26", "256"]
    assert [t.get_text() for t in cpu.texts] == ["0.03 s", "0.1 s", "0.5 s"]
    assert [ax.get_xlabel() for ax in (requests, cpu)] == ["requests", "client CPU, seconds"]
    assert plots.cost(RUNS).get_title(loc="left").startswith("requests: 3 (batch of 100), 26 (batch of 10)")
    with pytest.raises(sk.SettingError, match="of='time': must be 'requests' or 'client_cpu_s'"):
        plots.cost(RUNS, of="time")  # type: ignore[arg-type] # what is tested


# ---- single runs ------------------------------


def test_latency_marks_the_median_and_the_95th_percentile(answered: tuple[pd.DataFrame, pd.DataFrame]) -> None:
    details, _ = answered
    ax = plots.latency(details)
    times = np.sort(details["response_latency_s"].to_numpy())
    curve, diamonds = ax.lines
    assert curve.get_xdata()[1:].tolist() == times.tolist()
    assert curve.get_ydata()[-1] == 1
    assert list(diamonds.get_ydata()) == [0.5, 0.95]
    assert list(diamonds.get_xdata()) == [times[29], times[56]]
    assert ax.get_title(loc="left").startswith("60 rows: half in ")
    assert [text.get_text().split(":")[0] for text in ax.texts] == ["half", "95%"]
    assert "seconds" in ax.get_xlabel()


def test_latency_by_endpoint_has_a_line_each_told_apart_without_colour(
    answered: tuple[pd.DataFrame, pd.DataFrame],
) -> None:
    ax = plots.latency(answered[0], by="response_endpoint")
    assert len(legend(ax)) == 3
    lines = [line for line in ax.lines if line.get_linestyle() != "None"]
    assert len({(line.get_linestyle(), line.get_color()) for line in lines}) == 3
    assert [text.split(":")[0] for text in legend(ax)] == ["127.0.0.1", "127.0.0.2", "127.0.0.3"]


def test_latency_of_many_groups_stays_readable() -> None:
    ax = plots.latency(pd.DataFrame({"x_latency_s": np.linspace(1, 2, 60), "node": list(range(20)) * 3}), by="node")
    assert legend(ax) == ["each node (20)", "all rows"]
    assert ax.get_title(loc="left") == "60 rows: half in 1.5 s, 95% in 1.9 s"


def test_a_long_tail_of_latencies_gets_a_log_scale() -> None:
    assert plots.latency(pd.DataFrame({"x_latency_s": [0.1] * 50 + [60]})).get_xscale() == "log"
    assert plots.latency(pd.DataFrame({"x_latency_s": [0.1, 0.2, 0.3]})).get_xscale() == "linear"


def test_a_timeline_has_a_lane_per_endpoint_and_a_bar_per_request(answered: tuple[pd.DataFrame, pd.DataFrame]) -> None:
    _, frame = answered
    ax = plots.timeline(frame)
    names = [t.get_text() for t in ax.get_yticklabels()]
    assert names == sorted(frame["endpoint"].unique())
    drawn = boxes(bars(ax)["answered"])
    good = frame[frame["failure"].isna()]
    assert sorted(map(tuple, drawn[:, [0, 2]].tolist())) == sorted(zip(good["start_s"], good["end_s"], strict=True))
    lanes = [names[i] for i in np.round((drawn[:, 1] + drawn[:, 3]) / 2).astype(int)]
    assert sorted(lanes) == sorted(good["endpoint"])


def test_failed_requests_are_hatched_crossed_and_counted(answered: tuple[pd.DataFrame, pd.DataFrame]) -> None:
    frame = requests(("a", 0, 2, None), ("b", 0, 1, "server"), ("b", 1, 2, "server"), ("a", 2, 3, "dropped"))
    ax = plots.timeline(frame)
    assert legend(ax) == ["answered (1, 10 rows)", "dropped at the end (1)", "failed (2 server)"]
    assert ax.get_title(loc="left") == "4 requests to 2 endpoints in 3 s: 2 failed"
    drawn = bars(ax)
    assert drawn["failed"].get_hatch()
    assert not drawn["answered"].get_hatch()
    assert len({tuple(c.get_facecolor()[0]) for c in drawn.values()}) == 3
    (crosses,) = (line for line in ax.lines if line.get_marker() == "x")
    assert crosses.get_xdata().tolist() == [1, 2]
    failures = answered[1]["failure"].notna().sum()
    assert failures >= 1
    assert len(bars(plots.timeline(answered[1]))["failed"].get_paths()) == failures


def test_requests_held_at_the_same_time_do_not_cover_each_other() -> None:
    rng = np.random.default_rng(0)
    start = rng.uniform(0, 10, 300)
    frame = pd.DataFrame(
        {"endpoint": rng.choice(["a", "b"], 300), "start_s": start, "end_s": start + rng.gamma(2, 1, 300)}
    )
    drawn = boxes(bars(plots.timeline(frame.assign(rows=1, failure=None)))["answered"])
    left, low, right, high = drawn.T
    eps = 1e-9
    across = (left[:, None] < right - eps) & (left < right[:, None] - eps)
    along = (low[:, None] < high - eps) & (low < high[:, None] - eps)
    assert (across & along).sum() == 300  # each with itself
    assert set(np.round((low + high) / 2)) == {0, 1}


def test_a_big_timeline_is_drawn_fast_with_some_endpoints_named() -> None:
    rng, n = np.random.default_rng(0), 100_000
    start = np.sort(rng.uniform(0, 600, n))
    frame = pd.DataFrame(
        {
            "endpoint": [f"node{i:04}.a-cluster-with-a-long-name.example:8000" for i in rng.integers(0, 4000, n)],
            "rows": 10, "start_s": start, "end_s": start + rng.gamma(4, 5, n),
            "failure": np.where(rng.random(n) < 0.03, "server", None),
        }
    )  # fmt: skip
    began = time.process_time()
    ax = plots.timeline(frame)
    ax.figure._repr_png_()
    assert time.process_time() - began < 5
    assert sum(len(c.get_paths()) for c in bars(ax).values()) == n
    names = [t.get_text() for t in ax.get_yticklabels()]
    assert 20 < len(names) <= 32
    assert max(map(len, names)) <= 30
    assert "4,000, one in 125 is named" in ax.get_ylabel()


def test_lanes_are_in_the_order_of_their_names_numbers_counted() -> None:
    ax = plots.timeline(requests(*((f"node{i}:8000", 0, 1, None) for i in (10, 2, 1, 9))))
    assert [t.get_text() for t in ax.get_yticklabels()] == [f"node{i}:8000" for i in (1, 2, 9, 10)]


def test_rate_is_rows_over_time() -> None:
    ax = plots.rate(requests(("a", 0, 1, None), ("b", 0, 2, None), ("a", 1, 2, "server")))
    assert ax.lines[0].get_ydata().max() == pytest.approx(15)
    assert rows_drawn(ax) == pytest.approx(20)
    assert ax.get_title(loc="left") == "20 rows answered in 2 s: 10 a second"
    assert legend(ax)[1:] == ["mean", "failed requests (1)"]
    assert ax.get_ylabel() == "rows per second"


def rows_drawn(ax: Axes) -> float:
    """The area below a curve."""
    x, y = (np.asarray(values, float) for values in ax.lines[0].get_data())
    return float((np.diff(x) * (y[1:] + y[:-1]) / 2).sum())


def test_rate_of_requests_that_took_no_time(answered: tuple[pd.DataFrame, pd.DataFrame]) -> None:
    at_once = plots.rate(requests(("a", 0, 0, None), ("a", 5, 5, None), ("b", 5, 5, None)))
    assert rows_drawn(at_once) == pytest.approx(30)
    assert at_once.get_title(loc="left").endswith("20 of them at once")
    plots.rate(requests(("a", 0, 0, None))).figure._repr_png_()
    plots.timeline(requests(("a", 0, 0, None))).figure._repr_png_()
    frame = answered[1]
    assert rows_drawn(plots.rate(frame)) == pytest.approx(frame.loc[frame["failure"].isna(), "rows"].sum())


def test_a_run_is_drawn_as_it_is() -> None:
    df = pd.DataFrame({"text": [f"leaf {i}" for i in range(6)], "truth": ["yes"] * 6})
    with sk.local(1, engine="echo") as swarm, sk.connect(swarm) as pool:
        df.swarm.scatter("{text}", pool=pool, details=True, progress=False)
        run = sk.last_run()
        df.swarm.tree_reduce("text", "{responses}", fanin=3, pool=pool, trace=True, progress=False)
        reduced = sk.last_run()
    for shown in (run.plot(), run.stats.plot()):
        assert [ax.get_ylabel() for ax in shown.axes] == ["rows per second", "endpoint"]
        assert "6 of 6 rows answered" in " ".join(shown.get_suptitle().split())
        assert rows_drawn(shown.axes[0]) == pytest.approx(6)
    assert plots.latency(run).get_title(loc="left").startswith("6 rows: half in")
    assert plots.timeline(run).get_title(loc="left") == plots.timeline(run.stats).get_title(loc="left")
    assert plots.tree(reduced).get_title(loc="left") == "6 of 6 leaves are in 1 result"


def test_a_run_that_sent_nothing_is_drawn_as_such() -> None:
    with sk.local(1, engine="echo") as swarm, sk.connect(swarm) as pool:
        answered = pd.DataFrame({"t": ["a", "b"], "response": ["known", "known"]})
        answered.swarm.scatter("t", pool=pool, only_missing=True, progress=False)
    (ax,) = sk.last_run().plot().axes
    assert not ax.axison
    assert "0 of 2 rows answered" in ax.get_title(loc="left")
    assert plots.timeline(sk.last_run()).get_title(loc="left") == "no request was sent"


# ---- trees ------------------------------


def test_a_tree_shows_every_node_leaves_below_the_result_on_top(traces: dict[str, pd.DataFrame]) -> None:
    trace = traces["eight"]
    ax = plots.tree(trace)
    drawn = marks(ax)
    assert {kind: len(places) for kind, places in drawn.items()} == {"leaf": 8, "merged": 6, "result": 1}
    assert legend(ax) == ["leaf (8)", "merged (6)", "result (1)"]
    assert set(drawn["leaf"][:, 1]) == {0}
    assert drawn["result"][0].tolist() == [3.5, 3]  # amid its leaves
    assert sorted(t.get_text() for t in ax.texts) == sorted(["2"] * 4 + ["4"] * 2 + ["8"])
    (lines,) = (c for c in ax.collections if isinstance(c, LineCollection))
    assert len(lines.get_segments()) == 14
    assert all(a[1] < b[1] for a, b in lines.get_segments())


def test_failed_nodes_are_marked(traces: dict[str, pd.DataFrame]) -> None:
    trace = traces["failed"]
    ax = plots.tree(trace)
    assert trace["error"].notna().sum() == 1
    assert marks(ax)["failed"].tolist() == [[13.5, 1]]  # above leaves 12 to 15
    assert "failed (1)" in legend(ax)
    assert "36" in [t.get_text() for t in ax.texts]
    assert sum(map(len, marks(ax).values())) == len(trace)


def test_groups_stand_apart_under_their_names(traces: dict[str, pd.DataFrame]) -> None:
    ax = plots.tree(traces["grouped"])
    assert [t.get_text() for t in ax.get_xticklabels()] == ["a", r"b\$"]  # no formula
    assert ax.get_xlabel() == "40 leaves, 2 groups"
    assert "are in 2 results" in ax.get_title(loc="left")
    leaves = np.sort(marks(ax)["leaf"][:, 0])
    assert np.diff(leaves).argmax() == 19
    assert np.diff(leaves).max() > 1
    assert len(marks(ax)["result"]) == 2


def test_a_group_without_a_key_has_a_name() -> None:
    trace = groups(3, "organism {}")
    trace["name"] = trace["name"].where(trace["group"] != 1)
    trace.insert(1, 7, [1.5] * len(trace))
    names = [t.get_text() for t in plots.tree(trace).get_xticklabels()]
    assert names == ["organism 0, 1.5", "(missing), 1.5", "organism 2, 1.5"]


@pytest.mark.parametrize("layout", ["constrained", None])
def test_a_picture_may_be_part_of_a_part_of_a_figure(layout: Any) -> None:
    figure = Figure(layout=layout)
    one, two = figure.subfigures(1, 2)
    inner = two.subfigures(2, 1)[0]
    timeline = requests(("a", 0.0, 1.0, None), ("b", 0.1, 0.9, "server"))
    assert plots.timeline(timeline, one.subplots()).get_title(loc="left")
    assert plots.tree(groups(3, "organism {}"), inner.subplots()).get_title(loc="left")
    figure.savefig(io.BytesIO())


def test_the_names_of_many_groups_are_turned_or_stand_in_a_table() -> None:
    turned = plots.tree(groups(50, "organism {}")).get_xticklabels()
    assert [t.get_text() for t in turned] == [f"organism {i}" for i in range(50)]
    assert {t.get_rotation() for t in turned} == {90}
    table = plots.tree(groups(200, "organism {}"))
    assert not table.get_xticklabels()
    assert "3 organism 2 ✗" in table.get_xlabel()
    assert table.get_xlabel().endswith("and 50 more groups")
    few = plots.tree(groups(50, "organism {}"), ax=plots.Figure(figsize=(4, 3)).add_subplot())
    assert "50 groups, one in " in few.get_xlabel()


def test_long_names_of_groups_still_differ() -> None:
    names = [t.get_text() for t in plots.tree(groups(10, "Escherichia coli K-12 substrain MG{} x")).get_xticklabels()]
    assert len(set(names)) == 10
    assert all(f"MG{i}" in name for i, name in enumerate(names))


def test_a_tree_of_500_leaves_keeps_its_nodes_apart() -> None:
    children, nodes = list(range(500)), [(i, None, 0, 1) for i in range(500)]
    level = 0
    while len(children) > 1:
        level += 1
        above = []
        for at in range(0, len(children), 8):
            above.append(len(nodes))
            for child in children[at : at + 8]:
                nodes[child] = (child, above[-1], *nodes[child][2:])
            nodes.append((above[-1], None, level, sum(nodes[c][3] for c in children[at : at + 8])))
        children = above
    trace = pd.DataFrame(nodes, columns=["node", "parent", "level", "n_leaves"])
    ax = plots.tree(trace.assign(group=0, response="text", error=None).astype({"parent": "Int64"}))
    ax.figure._repr_png_()
    assert sum(map(len, marks(ax).values())) == len(nodes)
    for collection in ax.collections:
        if isinstance(collection, PathCollection) and len(collection.get_offsets()) > 1:
            places = ax.transData.transform(np.asarray(collection.get_offsets()))
            row = np.sort(places[places[:, 1] == places[0, 1], 0])
            points = np.diff(row).min() * 72 / ax.figure.dpi
            assert np.sqrt(collection.get_sizes().min()) < points + 1, collection.get_label()


def test_nodes_that_wait_for_their_answer_are_left_out(traces: dict[str, pd.DataFrame]) -> None:
    trace = traces["eight"].copy()
    trace.loc[trace["level"] == 3, "response"] = None
    trace.loc[trace["level"] == 2, "parent"] = pd.NA
    assert {kind: len(places) for kind, places in marks(plots.tree(trace)).items()} == {
        "leaf": 8,
        "merged": 4,
        "result": 2,
    }


def test_a_tree_of_one_leaf_is_its_own_result() -> None:
    trace = pd.DataFrame(
        {"node": [0], "parent": [None], "level": [0], "group": [0], "n_leaves": [1], "response": ["a"], "error": [None]}
    )
    ax = plots.tree(trace)
    ax.figure._repr_png_()
    assert legend(ax) == ["result (1)"]
