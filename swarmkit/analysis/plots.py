"""Plots of runs, comparisons and trees.

Each function takes a run, what ``last_run()`` returns, or the frame that is named. It draws on the given Axes, or on
new ones, and returns the Axes; the title says what came out. A notebook shows Axes as text: end the cell with
``.figure``. Hatches, markers or words have the same meaning as the colours.
"""

from __future__ import annotations

import heapq
import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.ticker import MaxNLocator

from ..errors import SettingError
from ..runs.run import Run
from ..runs.stats import RunStats
from ..text import few, plural
from .drawing import (
    BLUE,
    GREEN,
    GREY,
    INK,
    LINES,
    ORANGE,
    PALE,
    RED,
    SKY,
    Figure,
    blank,
    brief,
    figure_of,
    head,
    ink,
    label_numbers,
    natural,
    nothing,
    plain,
    settle,
    short,
    shortened,
    size_pt,
    width_pt,
    wrapped,
)

if TYPE_CHECKING:
    from .compare import Comparison
    from .simulate import Simulation

__all__ = [
    "Figure", "calibration", "comparison", "cost", "latency", "overview", "rate", "throughput", "timeline", "tree",
]  # fmt: skip

F = TypeVar("F", bound=Callable[..., Any])


def __dir__() -> list[str]:
    return __all__  # what Tab offers after "sk.plots."


_MODES: dict[str, dict[str, Any]] = {
    "batch": {"facecolor": BLUE, "edgecolor": "white"},
    "single": {"facecolor": ORANGE, "edgecolor": "white", "hatch": "//"},
}
_COSTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "requests": ("requests", "", {"facecolor": GREEN, "edgecolor": "white"}),
    "client_cpu_s": ("client CPU, seconds", " s", {"facecolor": SKY, "edgecolor": "white", "hatch": ".."}),
}
_BINS = 300  # moments at which a rate is drawn
_SMOOTH = 6  # of these: the standard deviation of the kernel
_NAMED = 32  # endpoints whose lanes have a label, at most
_TURNED = 60  # groups of a tree that are named below their leaves, at most; more of them stand in a table
_TABLE = 150  # groups that this table has, at most


def _documented(draw: F) -> F:
    """Add what the docstrings of all plots share."""
    shared = """\
Returns
-------
matplotlib.axes.Axes

Raises
------
SettingError
    It is given something else, or a frame without a column that it needs.

Examples
"""
    draw.__doc__ = inspect.cleandoc(draw.__doc__ or "").replace("Examples\n", shared, 1)
    return draw


# ---- comparisons ------------------------------


def comparison(runs: pd.DataFrame | Comparison, title: str = "", *, width: float = 11) -> Figure:
    """Throughput, requests and client CPU of each mode, a panel each: the plot of ``Comparison.plot()``.

    Parameters
    ----------
    runs : Comparison or pandas.DataFrame
        What ``compare`` returned, or its ``.runs``, a row per repeat.
    title : str
        The title above all; by default what the comparison found.
    width : float, default 11
        Inches. The panels are side by side from 8 on, and below each other otherwise.

    Returns
    -------
    Figure
        With three Axes.

    Examples
    --------
    >>> runs = pd.DataFrame({"mode": ["batch", "single"], "batch_size": [100, 1], "prompts_per_s": [90.0, 30.0],
    ...                      "requests": [3, 256], "client_cpu_s": [0.1, 0.5]})
    >>> len(comparison(runs, "256 prompts").axes)
    3
    """
    frame = _measured(runs, ("prompts_per_s", *_COSTS))
    lines = 1.1 + 0.5 * frame.groupby(["mode", "batch_size"]).ngroups
    beside = width >= 8
    axes = blank(width, 0.9 + lines * (1 if beside else 3), *((1, 3) if beside else (3, 1)), sharey=beside)
    _speeds(frame, axes[0])
    for column, ax in zip(_COSTS, axes[1:], strict=True):
        _costs(frame, ax, column)
    figure = figure_of(axes[0])
    text = figure.suptitle(plain(title or _verdict(frame)), x=0.01, ha="left", color=INK, fontsize=11, weight="bold")
    text.set_text(wrapped(text.get_text(), text, 72 * width - 12))
    return figure


@_documented
def throughput(runs: pd.DataFrame | Comparison, ax: Axes | None = None) -> Axes:
    """Prompts per second by mode: a bar is the median, its whisker the range, each dot a repeat.

    Parameters
    ----------
    runs : Comparison or pandas.DataFrame
        What ``compare`` returned, or its ``.runs``, a row per repeat.
    ax : matplotlib Axes, optional
        Where to draw.

    Examples
    --------
    >>> runs = pd.DataFrame({"mode": ["single"] * 3, "batch_size": 1, "prompts_per_s": [28.0, 30.0, 31.0]})
    >>> float(throughput(runs).patches[0].get_width())
    30.0
    """
    frame = _measured(runs, ("prompts_per_s",))
    ax = ax or _bars(frame)
    _speeds(frame, ax, _verdict(frame))
    return ax


@_documented
def cost(
    runs: pd.DataFrame | Comparison, ax: Axes | None = None, *, of: Literal["requests", "client_cpu_s"] = "requests"
) -> Axes:
    """Requests, or seconds of client CPU, by mode: medians of the repeats.

    Parameters
    ----------
    runs : Comparison or pandas.DataFrame
        What ``compare`` returned, or its ``.runs``, a row per repeat.
    ax : matplotlib Axes, optional
        Where to draw.
    of : {"requests", "client_cpu_s"}, default "requests"
        Which of them.

    Examples
    --------
    >>> runs = pd.DataFrame({"mode": ["batch", "single"], "batch_size": [100, 1], "requests": [3, 300],
    ...                      "client_cpu_s": [0.1, 0.5]})
    >>> [float(bar.get_width()) for bar in cost(runs, of="client_cpu_s").patches]
    [0.1, 0.5]
    """
    if of not in _COSTS:
        raise SettingError(f"of={of!r}: must be {' or '.join(map(repr, _COSTS))}")
    frame = _measured(runs, (of,))
    ax = ax or _bars(frame)
    _costs(frame, ax, of, titled=True)
    return ax


def _measured(runs: object, columns: Sequence[str]) -> pd.DataFrame:
    if not isinstance(runs, pd.DataFrame):
        from .compare import Comparison  # slow to import, and there if there is one

        runs = runs.runs if isinstance(runs, Comparison) else runs
    frame = _checked(runs, ("mode", "batch_size", *columns), "df.swarm.compare(...).runs")
    if frame.empty:
        raise SettingError("there is nothing to draw: the frame has no rows")
    return frame


def _verdict(runs: pd.DataFrame) -> str:
    from .compare import verdict

    return verdict(runs)


def _bars(runs: pd.DataFrame) -> Axes:
    return blank(7, 1.6 + 0.5 * runs.groupby(["mode", "batch_size"]).ngroups)[0]


def _modes(runs: pd.DataFrame, ax: Axes) -> list[tuple[str, str, pd.DataFrame]]:
    """Mode, name, and runs of each mode and batch size; sets the labels of the bars."""
    from .compare import mode_name

    found: Any = runs.groupby(["mode", "batch_size"], sort=False)
    groups = [(str(mode), mode_name(mode, size), part) for (mode, size), part in found]
    labels = []
    for mode, name, part in groups:
        real = part["rows_per_request"].mean() if "rows_per_request" in part and mode == "batch" else np.nan
        told = np.isnan(real) or round(real) == part["batch_size"].iloc[0]
        labels.append(name if told else f"{name}\n({plural(round(real), 'row')} a request)")
    ax.set_yticks(range(len(labels)), labels)
    ax.set_ylim(len(labels) - 0.4, -0.6)  # the first on top
    return groups


def _speeds(runs: pd.DataFrame, ax: Axes, title: str = "") -> None:
    groups = _modes(runs, ax)
    ends, texts = [], []
    for y, (mode, _, part) in enumerate(groups):
        speeds = part["prompts_per_s"].to_numpy(float)
        middle, low, high = float(np.median(speeds)), speeds.min(), speeds.max()
        first = y == 0  # one entry of each kind in the legend
        ax.barh(y, middle, 0.6, **_MODES[mode], label="median" if first else None)
        if len(speeds) > 1:
            span, look = [[middle - low], [high - middle]], {"ecolor": ink(ax), "capsize": 6, "elinewidth": 1.4}
            ax.errorbar(middle, y, xerr=span, fmt="none", **look, label="range" if first else None)
            at = y + np.linspace(-0.13, 0.13, len(speeds))
            ax.plot(speeds, at, "o", ms=5, mfc="white", mec=ink(ax), label="repeats" if first else None)
        ends.append((high, float(y)))
        texts.append(short(middle))
    label_numbers(ax, ends, texts, beside=True)
    ax.set_xlim(0, 1.2 * max(float(runs["prompts_per_s"].max()), 1e-9))
    head(ax, title, "prompts per second", grid="x", legend=any(len(part) > 1 for _, _, part in groups))


def _costs(runs: pd.DataFrame, ax: Axes, column: str, titled: bool = False) -> None:
    groups = _modes(runs, ax)
    label, unit, look = _COSTS[column]
    values = [float(part[column].median()) for _, _, part in groups]
    ax.barh(range(len(values)), values, 0.6, **look)
    texts = [short(value) + unit for value in values]
    label_numbers(ax, [(value, float(y)) for y, value in enumerate(values)], texts, beside=True)
    ax.set_xlim(0, 1.25 * max([*values, 1e-9]))
    ax.locator_params(axis="x", nbins=5)
    said = f"{label}: " + ", ".join(f"{text} ({name})" for (_, name, _), text in zip(groups, texts, strict=True))
    head(ax, said if titled else "", label, grid="x", legend=False)


# ---- labels ------------------------------


@_documented
def calibration(
    frame: pd.DataFrame | Run, truth: str | Sequence[Any], out: str = "label", ax: Axes | None = None, *, bins: int = 10
) -> Axes:
    """How often labels are right, by how sure the model is of them: the reliability diagram.

    Rows are binned by the probability of their label. A bar is the share of its rows whose label is right, and its
    number how many they are; the mark in it is their mean probability. On the dashed line both are the same.

    Parameters
    ----------
    frame : pandas.DataFrame or Run
        From ``classify``.
    truth : str or sequence
        The right labels: a column, or a value a row. Rows where they are missing are left out, as those without a
        probability are; there must be some left.
    out : str, default "label"
        The column of labels; ``<out>_p`` has their probabilities.
    ax : matplotlib Axes, optional
        Where to draw.
    bins : int, default 10
        Of the probabilities from 0 to 1.

    Examples
    --------
    >>> frame = pd.DataFrame({"label": ["yes", "no", "yes", "no"], "label_p": [0.95, 0.92, 0.97, 0.61],
    ...                       "truth": ["yes", "no", "no", "no"]})
    >>> ax = calibration(frame, "truth")
    >>> [round(float(bar.get_height()), 2) for bar in ax.patches], ax.get_title(loc="left")
    ([1.0, 0.67], '4 rows: 75% are right, sure by 86%')
    """
    needed = (out, f"{out}_p", *([truth] if isinstance(truth, str) else []))
    frame = _checked(_rows_of(frame), needed, "df.swarm.classify(...)")
    right = frame[truth] if isinstance(truth, str) else pd.Series(list(truth), dtype=object)
    if len(right) != len(frame):
        raise SettingError(f"truth= has {plural(len(right), 'value')}, and the frame {plural(len(frame), 'row')}")
    if not isinstance(bins, int) or bins < 1:
        raise SettingError(f"bins={bins!r}: must be a whole number, 1 or more")
    sure = frame[f"{out}_p"].to_numpy(float, na_value=np.nan)
    known = ~np.isnan(sure) & right.notna().to_numpy()
    if not known.any():
        raise SettingError(f"no row has both a probability in {out}_p and a right label")
    hits = (frame[out].astype(object).to_numpy() == right.astype(object).to_numpy())[known].astype(float)
    sure = sure[known]
    ax = ax or blank(5.2, 4.6)[0]
    bin_of = np.minimum((sure * bins).astype(int), bins - 1)
    counts = np.bincount(bin_of, minlength=bins)
    full = np.flatnonzero(counts)
    share, mean = (np.bincount(bin_of, values, bins)[full] / counts[full] for values in (hits, sure))
    middle = (full + 0.5) / bins
    ax.bar(middle, share, 0.92 / bins, facecolor=SKY, edgecolor="white", label="right")
    ax.plot([0, 1], [0, 1], color=ink(ax), ls="--", lw=1.2)
    ax.plot(middle, mean, "D", color=BLUE, mec="white", ms=7, zorder=3, label="mean probability")
    ax.set_xlim(0, 1)
    ax.set_ylim(0, 1.08)
    title = f"{plural(len(sure), 'row')}: {hits.mean():.0%} are right, sure by {sure.mean():.0%}"
    head(ax, title, "probability of the label", "share of the rows that are right")
    numbers = [f"{count:,}" for count in counts[full].tolist()]
    if width_pt(ax, numbers, 9) < 0.95 * size_pt(ax)[0] / bins:
        label_numbers(ax, list(zip(middle.tolist(), share.tolist(), strict=True)), numbers)
    return ax


# ---- single runs ------------------------------


def overview(run: Run | RunStats, *, width: float = 9) -> Figure:
    """A run at a look: rows per second above, requests by endpoint below. The plot of ``run.plot()``.

    Parameters
    ----------
    run : Run or RunStats
        What ``last_run()`` returns, also while it goes on; or its ``.stats``.
    width : float, default 9
        Inches.

    Returns
    -------
    Figure
        With two Axes; with one that says so, if the run has sent no request.

    Raises
    ------
    SettingError
        It is given something else.

    Examples
    --------
    >>> df = df.swarm.scatter("What does {gene} do?")
    >>> [ax.get_ylabel() for ax in overview(sk.last_run()).axes]
    ['rows per second', 'endpoint']
    """
    stats = run.stats if isinstance(run, Run) else run
    if not isinstance(stats, RunStats):
        raise SettingError(f"this plot needs a run, not {type(run).__name__}: use sk.last_run()")
    frame = stats.timeline()
    said = repr(stats).removeprefix("<RunStats: ").removesuffix(">")
    if frame.empty:
        return figure_of(nothing(blank(width, 1)[0], said))
    lanes = float(np.clip(0.34 * frame["endpoint"].nunique() + 1.2, 2.2, 6.5))
    above, below = blank(width, 2.6 + lanes, 2, 1, height_ratios=(2.2, lanes), sharex=True)
    timeline(frame, below)
    rate(frame, above)
    below.set_title("", loc="left")
    above.set_xlabel("")
    figure = figure_of(above)
    text = figure.suptitle(plain(said), x=0.01, ha="left", color=INK, fontsize=11, weight="bold")
    text.set_text(wrapped(text.get_text(), text, 72 * width - 12))
    above.set_title("", loc="left")
    return figure


@_documented
def latency(
    frame: pd.DataFrame | Run, column: str | None = None, ax: Axes | None = None, *, by: str | None = None
) -> Axes:
    """Share of the rows answered within a time, with the median and the 95th percentile marked.

    Parameters
    ----------
    frame : pandas.DataFrame or Run
        From ``scatter(..., details=True)``.
    column : str, optional
        The column of seconds; by default the one whose name ends in ``_latency_s``.
    ax : matplotlib Axes, optional
        Where to draw.
    by : str, optional
        Draw a line for each value of this column, such as ``response_endpoint``. If there are more than seven, each is
        a thin grey line, and a blue line shows all rows.

    Examples
    --------
    >>> ax = latency(pd.DataFrame({"response_latency_s": [0.1, 0.2, 0.4]}))
    >>> ax.get_title(loc="left"), [text.get_text() for text in ax.texts]
    ('3 rows: half in 0.2 s, 95% in 0.4 s', ['half: 0.2 s', '95%: 0.4 s'])
    """
    made_by = "df.swarm.scatter(..., details=True)"
    frame = _checked(_rows_of(frame), () if by is None else (by,), made_by)
    found = [str(c) for c in frame.columns if str(c).endswith("_latency_s")] if column is None else [column]
    _checked(frame, found[:1] or ("<out>_latency_s",), made_by)
    if len(found) > 1:
        raise SettingError(f"the frame has several columns of latencies, {', '.join(found)}: name one, column=...")
    known = frame.dropna(subset=found)
    times = known[found[0]].astype("float64")
    groups = [] if by is None else [(str(key), part) for key, part in times.groupby(known[by], sort=False)]
    groups.sort(key=lambda group: natural(group[0]))
    ax = ax or blank(8, 3.6 + 0.2 * (len(groups) if len(groups) <= len(LINES) else 2))[0]
    if known.empty:
        return nothing(ax, f"none of {plural(len(frame), 'row')} was answered")
    if len(groups) > len(LINES):
        for i, (_, part) in enumerate(groups):
            label = f"each {plain(brief(str(by)))} ({len(groups):,})" if i == 0 else None
            ax.ecdf(part.to_numpy(), color=GREY, lw=0.7, alpha=0.7, label=label)
        groups = []
    names = shortened([key for key, _ in groups]) or ["all rows"]
    drawn = list(zip(names, [part for _, part in groups] or [times], LINES, strict=False))
    for name, part, (colour, line) in drawn:
        label = plain(name) + (f", {_quantiles(part)[2]}" if len(drawn) > 1 else "")
        ax.ecdf(part.to_numpy(), color=colour, ls=line, lw=2, label=label if by else None)
        ax.plot(_quantiles(part)[:2], [0.5, 0.95], "D", color=colour, mec="white", ms=7, zorder=3)
    if times.min() > 0 and times.max() > 50 * times.median():
        ax.set_xscale("log")  # on a linear scale stragglers leave no room for the others
    else:
        ax.set_xlim(0, float(times.max()) * 1.04 or 1.0)
    ax.set_ylim(0, 1.02)
    *marks, said = _quantiles(times)
    head(ax, said, "seconds from request to answer", "share of the rows", grid="both")
    if len(drawn) == 1:
        _label_quantiles(ax, marks)
    return ax


def _quantiles(times: pd.Series) -> tuple[float, float, str]:
    """The median and the 95th percentile, both on the curve; and what they say."""
    middle, late = (float(q) for q in np.percentile(times, (50, 95), method="inverted_cdf"))
    took = f"half in {short(middle)} s, 95% in {short(late)} s" if len(times) > 1 else f"in {short(middle)} s"
    return middle, late, f"{plural(len(times), 'row')}{':' if len(times) > 1 else ''} {took}"


def _label_quantiles(ax: Axes, marks: Sequence[float]) -> None:
    """Write the times beside their marks: where no curve is, left above it, or right below where that is outside."""
    for x, y, name in zip(marks, (0.5, 0.95), ("half", "95%"), strict=True):
        right = ax.transAxes.inverted().transform(ax.transData.transform((x, y)))[0] < 0.4
        at: dict[str, Any] = {"xytext": (8 if right else -8, -3 if right else 3), "textcoords": "offset points"}
        at |= {"ha": "left" if right else "right", "va": "top" if right else "center", "color": ink(ax)}
        ax.annotate(f"{name}: {short(x)} s", (x, y), fontsize=9, **at)


@_documented
def timeline(run: pd.DataFrame | Run | RunStats | Simulation, ax: Axes | None = None) -> Axes:
    """Requests of a run over time: a lane per endpoint, a bar per request, failed ones hatched and crossed.

    Concurrent requests of an endpoint share the height of its lane.

    Parameters
    ----------
    run : Run, RunStats, Simulation or pandas.DataFrame
        What ``last_run()`` or ``simulate`` returned, or ``RunStats.timeline()``, a row per request.
    ax : matplotlib Axes, optional
        Where to draw.

    Examples
    --------
    >>> frame = pd.DataFrame({"endpoint": ["a", "b"], "rows": [100, 40], "start_s": [0.0, 0.1], "end_s": [2.0, 1.1],
    ...                       "failure": [None, "server"]})
    >>> ax = timeline(frame)
    >>> ax.get_title(loc="left"), [text.get_text() for text in ax.get_legend().get_texts()]
    ('2 requests to 2 endpoints in 2 s: 1 failed', ['answered (1, 100 rows)', 'failed (1 server)'])
    """
    frame = _requests_of(run)
    names = sorted(frame["endpoint"].unique(), key=natural)
    lane = pd.Index(names).get_indexer(frame["endpoint"])
    start, end = frame["start_s"].to_numpy(float), frame["end_s"].to_numpy(float)
    track, tracks = _tracks(lane, start, end, len(names))
    ax = ax or blank(9, float(np.clip(max(0.34 * len(names), 0.05 * tracks.sum()) + 1.5, 2.4, 8.5)))[0]
    if frame.empty:
        return nothing(ax, "no request was sent")
    height = 0.84 / tracks[lane]
    low = lane - 0.42 + track * height
    corners = np.stack([[start, low], [end, low], [end, low + height], [start, low + height]]).transpose(2, 0, 1)
    span = float(end.max()) or 1.0
    # White edges separate neighbours, hatches mark failures; both would cover narrow bars completely.
    seam = np.median(end - start) > span / 150 and tracks.sum() < 400
    kinds = frame["failure"].astype(object)
    dropped = (kinds == "dropped").to_numpy()
    failed = kinds.notna().to_numpy() & ~dropped
    counts = [f"{n:,} {plain(brief(str(kind)))}" for kind, n in kinds[failed].value_counts().items()]
    good = ~(failed | dropped)
    for rows, colour, hatch, name in (
        (good, BLUE, None, f"answered ({good.sum():,}{_sizes(frame.loc[good, 'rows'])})"),
        (dropped, PALE, "\\\\\\\\", f"dropped at the end ({dropped.sum():,})"),
        (failed, RED, "////", f"failed ({few(counts, len(counts), 3)})"),
    ):
        if not rows.any():
            continue
        look: dict[str, Any] = {"facecolor": colour, "edgecolor": "white" if seam else colour, "linewidth": 0.5}
        look |= {"hatch": hatch if seam else None, "label": name}
        ax.add_collection(PolyCollection(corners[rows], **look), autolim=False)  # type: ignore[arg-type] # quick as an array
    cross = float(np.clip(60 / np.sqrt(failed.sum() or 1), 1.5, 5))
    ax.plot(end[failed], (low + height / 2)[failed], "x", color=ink(ax), ms=cross, mew=cross / 3.6)
    ax.set_xlim(0, span * 1.02)
    ax.set_ylim(len(names) - 0.4, -0.6)  # the first name on top
    label = _name_lanes(ax, list(map(str, names)))
    bad = f": {failed.sum():,} failed" if failed.any() else ""
    title = f"{plural(len(frame), 'request')} to {plural(len(names), 'endpoint')} in {short(float(end.max()))} s{bad}"
    head(ax, title, "seconds from the start of the run", label, grid="x")
    ax.set_ylabel(_name_lanes(ax, list(map(str, names))))  # now that title and legend have their room
    return ax


def _sizes(rows: pd.Series) -> str:
    """How many rows requests really had."""
    if rows.empty:
        return ""
    low, high = rows.min(), rows.max()
    return (
        f", {low:,} to {high:,} rows each" if low < high else f", {plural(int(high), 'row')}{' each' * (len(rows) > 1)}"
    )


def _name_lanes(ax: Axes, names: list[str]) -> str:
    """Name as many lanes as there is room for; return the label of their axis."""
    settle(ax)
    room = max(1, min(_NAMED, int(size_pt(ax)[1] / 11)))
    step = -(-len(names) // room)
    wide = size_pt(ax)[0] / 15  # characters on a third of the width
    ax.set_yticks(range(0, len(names), step), [plain(n) for n in shortened(names[::step], int(np.clip(wide, 8, 30)))])
    ax.tick_params(axis="y", labelsize=8.5)
    return "endpoint" if step == 1 else f"endpoint ({len(names):,}, one in {step} is named)"


@_documented
def rate(run: pd.DataFrame | Run | RunStats | Simulation, ax: Axes | None = None) -> Axes:
    """Rows per second over the time of a run; a cross is a failed request.

    The rows of a request are spread evenly over its time, since the times of single rows are not recorded, and the
    curve is smoothed by a Gaussian kernel, so that rows that finish at the same instant are a hill of so many rows.
    Rows of failed requests do not count. Of a simulation, the times of the rows are known.

    Parameters
    ----------
    run : Run, RunStats, Simulation or pandas.DataFrame
        What ``last_run()`` or ``simulate`` returned, or ``RunStats.timeline()``, a row per request.
    ax : matplotlib Axes, optional
        Where to draw.

    Examples
    --------
    >>> frame = pd.DataFrame({"endpoint": ["a", "a"], "rows": [100, 40], "start_s": [0.0, 1.0], "end_s": [1.0, 2.0],
    ...                       "failure": [None, None]})
    >>> rate(frame).get_title(loc="left")
    '140 rows answered in 2 s: 70 a second'
    """
    frame = _moments_of(run)
    ax = ax or blank(9, 3)[0]
    if frame.empty:
        return nothing(ax, "no request was sent")
    good = frame[frame["failure"].isna()]
    start, end, rows = (good[name].to_numpy(float) for name in ("start_s", "end_s", "rows"))
    span = float(frame["end_s"].max()) or 1.0
    middle, speeds = _smooth_rate(start, end, rows, span)
    total = rows.sum()
    high = float(max(speeds.max(), total / span))
    width = 2 * _SMOOTH * span / _BINS
    ax.fill_between(middle, speeds, color=SKY, lw=0, label=f"rows answered, smoothed over {short(width)} s")
    ax.plot(middle, speeds, color=BLUE, lw=1.2)
    ax.axhline(total / span, color=ink(ax), ls="--", lw=1.2, label="mean")
    bad = frame.loc[frame["failure"].notna() & (frame["failure"] != "dropped"), "end_s"]
    if len(bad):
        top = np.full(len(bad), (high or 1.0) * 1.08)
        ax.plot(bad, top, "x", color=RED, mew=1.6, label=f"failed requests ({len(bad):,})", clip_on=False)
    ax.set_xlim(0, span * 1.02)
    ax.set_ylim(0, (high or 1.0) * 1.16)
    whole = f"{plural(int(total), 'row')} answered in {short(span)} s: {short(total / span)} a second"
    most = pd.Series(rows).groupby(end).sum().max() if len(rows) and (end - start).max() == 0 else 0
    whole += f", {most:,.0f} of them at once" if most > 0.2 * total else ""
    head(ax, whole if total else f"no row was answered in {short(span)} s", "seconds from the start of the run",
         "rows per second")  # fmt: skip
    return ax


def _smooth_rate(start: np.ndarray, end: np.ndarray, rows: np.ndarray, span: float) -> tuple[np.ndarray, np.ndarray]:
    """Times, and rows a second there. The kernel is reflected at both ends, so that no row is lost."""
    edges = np.linspace(0, span, _BINS + 1)
    long = end - start > span / _BINS / 10
    begun, length = start[long], (end - start)[long]
    done = [float((rows[long] * np.clip((t - begun) / length, 0, 1)).sum()) for t in edges]
    counts = np.diff(done) + np.histogram(end[~long], edges, weights=rows[~long])[0]
    reach = 4 * _SMOOTH
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / _SMOOTH) ** 2)
    smooth = np.convolve(np.pad(counts, reach, mode="symmetric"), kernel / kernel.sum(), mode="valid")
    return np.concatenate([[0.0], (edges[1:] + edges[:-1]) / 2, [span]]), np.pad(smooth, 1, "edge") * _BINS / span


# ---- trees ------------------------------


@_documented
def tree(trace: pd.DataFrame | Run, ax: Axes | None = None) -> Axes:
    """The fan-in tree: leaves at the bottom, the result of each group at the top.

    The label of a node is the number of leaves in its answer, if there is room; failed nodes are crossed out. Groups
    have their names below their leaves: turned where they are many, in a table where they are more than that.

    Parameters
    ----------
    trace : pandas.DataFrame or Run
        From ``tree_reduce(..., trace=True)``, a row per node. Unfinished nodes of an interrupted run are not drawn.
    ax : matplotlib Axes, optional
        Where to draw.

    Examples
    --------
    >>> trace = pd.DataFrame({"node": [0, 1, 2], "parent": [2, 2, None], "level": [0, 0, 1], "group": 0,
    ...                       "n_leaves": [1, 1, 2], "response": ["a", "b", "ab"], "error": None})
    >>> ax = tree(trace)
    >>> ax.get_title(loc="left"), [text.get_text() for text in ax.get_legend().get_texts()]
    ('2 of 2 leaves are in 1 result', ['leaf (2)', 'result (1)'])
    """
    needed = ("node", "parent", "level", "group", "n_leaves", "response", "error")
    trace = _checked(_rows_of(trace), needed, "df.swarm.tree_reduce(..., trace=True)")
    keys = list(trace.columns[: trace.columns.get_loc("node")])
    nodes = trace[trace["response"].notna() | trace["error"].notna()].set_index("node")
    if nodes.empty:
        return nothing(ax or blank(9, 1)[0], "no node was answered")
    level, parent = nodes["level"].astype(int), nodes["parent"].astype("Int64")
    place = _places(nodes, level, parent)
    groups = _Groups(nodes, place, keys)
    table_fits = ax is None
    ax = ax or blank(9, 1.4 + 0.75 * (1 + level.max()) + groups.height)[0]
    below = parent.dropna().astype(int)
    below = below[below.isin(nodes.index)]
    ends = np.array([place[below.index], level[below.index], place[below], level[below]], dtype=float)
    n_leaves = int((level == 0).sum())
    thin = n_leaves > 60
    ax.add_collection(LineCollection(list(ends.T.reshape(-1, 2, 2)), colors=GREY, lw=0.5 if thin else 1.1, zorder=1))
    failed, top = nodes["error"].notna(), parent.isna()
    leaf = (level == 0) & ~top
    kinds = (
        ("leaf", leaf, "o", SKY, 10.5),
        ("merged", ~(failed | top | leaf), "o", BLUE, 20.5),
        ("result", top & ~failed, "s", GREEN, 20.5),
        ("failed", failed, "X", RED, 20.5),
    )
    ax.set_xlim(place.min() - 0.5 - 0.03 * np.ptp(place), place.max() + 0.5 + 0.03 * np.ptp(place))
    ax.set_ylim(-0.3, level.max() + 0.45)
    ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    drawn = []
    for name, rows, marker, colour, largest in kinds:
        if rows.any():
            label = f"{name} ({int(rows.sum()):,})"
            marks = ax.scatter(place[rows], level[rows], 50, colour, marker=marker, ec="white", label=label, zorder=2)
            drawn.append((marks, rows, 6.0 if name == "failed" else 1.7, largest))
    results = top & ~failed
    title = f"{int(nodes['n_leaves'][results].sum()):,} of {plural(n_leaves, 'leaf', 'leaves')} are in "
    title += plural(int(results.sum()), "result")
    title += f"; {plural(int(failed.sum()), 'node')} failed" if failed.any() else ""
    groups.name(ax, table_fits)
    head(ax, title, None, "level")
    wide = _room(place, level) * size_pt(ax)[0] / np.ptp(ax.get_xlim())
    for marks, rows, least, most in drawn:
        marks.set_sizes(np.clip(wide[rows], least, most) ** 2)
        marks.set_linewidth(np.where(wide[rows] > 4, 0.5, 0.0).tolist())
    for node in nodes.index[(level > 0) & ~failed]:
        text, room = f"{nodes['n_leaves'][node]:,}", min(wide[node], 20.5)
        if (size := min(9.0, 0.9 * room / (0.7 * len(text)))) >= 6:
            at: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": size, "zorder": 3}
            ax.text(place[node], level[node], text, color="white", weight="bold", **at)
    return ax


class _Groups:
    """The names of the groups of a tree, below it.

    Attributes
    ----------
    height : float
        Inches that they take, turned or in a table.
    """

    def __init__(self, nodes: pd.DataFrame, place: pd.Series, keys: list[Any]) -> None:
        groups = nodes.groupby("group")
        self.leaves, self.count = int((nodes["level"] == 0).sum()), len(groups)
        self._names: list[str] = []
        if keys:
            first = groups[keys].first()
            names = first.astype(str).where(first.notna(), "(missing)").agg(", ".join, axis=1).tolist()
            self._names = shortened(names, 24)
            self._centres = place.groupby(nodes["group"]).agg(["min", "max"]).mean(axis=1).to_numpy()
        self._failed = (nodes["error"].notna() & nodes["parent"].isna()).groupby(nodes["group"]).any().to_numpy()
        widest = max(map(len, self._names), default=0)
        self._columns = max(1, min(6, 118 // (widest + 9)))
        lines = -(-min(self.count, _TABLE) // self._columns)
        turned = 0.075 * widest if self.count > 6 else 0.0
        self.height = turned if self.count <= _TURNED else 0.155 * lines

    def name(self, ax: Axes, table_fits: bool) -> None:
        """Name them on these Axes: beside each other, turned, in a table, or only some where that does not fit."""
        ax.set_xticks([])
        ax.tick_params(axis="x", length=0)
        label = plural(self.leaves, "leaf", "leaves") + (f", {plural(self.count, 'group')}" if self.count > 1 else "")
        ax.set_xlabel(label)
        if not self._names:
            return
        settle(ax)
        width, height = size_pt(ax)
        gap = np.diff(self._centres).min() if self.count > 1 else np.ptp(ax.get_xlim())
        room = gap * width / np.ptp(ax.get_xlim())
        names = [plain(name) for name in self._names]
        size = 9.0 if room > 12 else 7.5
        if width_pt(ax, names, 9) < 0.92 * room:
            ax.set_xticks(self._centres, names, fontsize=9)
        elif table_fits and room < 1.15 * size:
            ax.set_xlabel(
                f"{label}\n{self._table()}", loc="left", family="monospace", fontsize=7.5, multialignment="left"
            )
        else:
            step = int(np.ceil(1.15 * size / room))
            names = shortened(self._names[::step], 24 if table_fits else max(4, int(0.5 * height / size)))
            ax.set_xticks(self._centres[::step], list(map(plain, names)), fontsize=size, rotation=90)
            ax.set_xlabel(label if step == 1 else f"{label}, one in {step} is named")

    def _table(self) -> str:
        """The names with their numbers from the left, in columns; where there are too many, those that failed first."""
        order = np.arange(self.count)
        if self.count > _TABLE:
            order = np.sort(np.argsort(~self._failed, kind="stable")[:_TABLE])
        cells = [f"{i + 1:>4} {plain(self._names[i])}{' ✗' if self._failed[i] else ''}" for i in order]
        lines = -(-len(cells) // self._columns)
        wide = max(map(len, cells)) + 2
        rows = ["".join(cell.ljust(wide) for cell in cells[line::lines]).rstrip() for line in range(lines)]
        more = [f"and {plural(self.count - _TABLE, 'more group')}"] if self.count > _TABLE else []
        return "\n".join(rows + more)


# ---- helpers ------------------------------


def _checked(frame: object, columns: Sequence[str], made_by: str) -> pd.DataFrame:
    if not isinstance(frame, pd.DataFrame):
        raise SettingError(f"this plot needs a DataFrame, not {type(frame).__name__}: use {made_by}")
    if missing := [c for c in columns if c not in frame.columns]:
        raise SettingError(f"the frame has no column {', '.join(missing)}: use the frame of {made_by}")
    return frame


def _rows_of(source: object) -> object:
    """The frame of a run, as far as it is."""
    return source.partial() if isinstance(source, Run) else source


def _requests_of(source: object) -> pd.DataFrame:
    """The requests of a run, of its statistics, or of a simulation."""
    from .simulate import Simulation

    source = source.stats if isinstance(source, Run) else source
    if isinstance(source, RunStats):
        return source.timeline()
    needed = ("endpoint", "rows", "start_s", "end_s", "failure")
    return _checked(
        source.frame if isinstance(source, Simulation) else source, needed, "sk.last_run().stats.timeline()"
    )


def _moments_of(source: object) -> pd.DataFrame:
    """The same for a rate: a simulation knows when each row came."""
    from .simulate import Simulation

    if not isinstance(source, Simulation):
        return _requests_of(source)
    moments = [("", rows, at, at, None) for at, rows in source._delivered]
    failed = source.frame[source.frame["failure"].notna()]
    moments += [("", 0, at, at, kind) for at, kind in zip(failed["end_s"], failed["failure"], strict=True)]
    return pd.DataFrame(moments, columns=["endpoint", "rows", "start_s", "end_s", "failure"])


def _room(place: pd.Series, level: pd.Series) -> pd.Series:
    """The smallest distance of two nodes of each node's level."""
    least = place.groupby(level).agg(lambda places: np.diff(np.sort(places)).min(initial=np.inf))
    return level.map(least) * 0.92


def _tracks(lane: np.ndarray, start: np.ndarray, end: np.ndarray, lanes: int) -> tuple[np.ndarray, np.ndarray]:
    """The track of each request within its endpoint's lane, from 0, and the number of tracks of each lane."""
    track, needed = np.zeros(len(lane), int), np.ones(lanes, int)
    held: list[list[tuple[float, int]]] = [[] for _ in range(lanes)]  # heaps of (end, place)
    free: list[list[int]] = [[0] for _ in range(lanes)]
    for i in np.lexsort((end, start)).tolist():
        at = int(lane[i])
        while held[at] and held[at][0][0] <= start[i]:
            heapq.heappush(free[at], heapq.heappop(held[at])[1])
        if not free[at]:
            free[at].append(int(needed[at]))
            needed[at] += 1
        track[i] = heapq.heappop(free[at])
        heapq.heappush(held[at], (end[i], int(track[i])))
    return track, needed


def _places(nodes: pd.DataFrame, level: pd.Series, parent: pd.Series) -> pd.Series:
    """The horizontal position of each node: leaves in the order of the trace, others centred above their children.

    The leaves of a group are adjacent, with a gap to the next group.
    """
    leaves = nodes.index[level == 0]
    groups = nodes.loc[leaves, "group"].astype(int).to_numpy()
    gap = 0.0 if len(leaves) < 2 else max(1.0, len(leaves) / 60)
    place = pd.Series(np.arange(len(leaves)) + gap * np.unique(groups, return_inverse=True)[1], leaves, dtype=float)
    for height in range(1, int(level.max()) + 1):
        above = nodes.index[level == height]
        children = place.groupby(parent.reindex(place.index)).agg(["min", "max"]).mean(axis=1)
        place = pd.concat([place, children.reindex(above)])
    return place
