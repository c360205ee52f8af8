"""Plots of runs and comparisons.

Each function draws a frame on the given Axes, or on new ones, and returns the Axes. A notebook shows Axes as text:
end the cell with ``.figure``. Figures made here are displayed without pyplot, which is never imported (its state is
not safe for cells that run concurrently). They are dark on white in every theme, in the colours of Okabe and Ito
(2008); hatches or markers have the same meaning as the colours.
"""

from __future__ import annotations

import heapq
import io
import re
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.figure import Figure as _Figure
from matplotlib.ticker import MaxNLocator

from ..errors import SettingError
from ..text import plural

__all__ = ["Figure", "calibration", "comparison", "cost", "latency", "rate", "throughput", "timeline", "tree"]

_INK, _GREY, _PALE = "#222222", "#8a8a8a", "#dddddd"
_BLUE, _ORANGE, _GREEN, _RED, _SKY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9"
_LINES = ((_BLUE, "-"), (_RED, "--"), (_GREEN, "-."), (_INK, ":"), ("#CC79A7", "-"), (_ORANGE, "--"), (_SKY, "-."))
_MODES: dict[str, dict[str, Any]] = {
    "batch": {"facecolor": _BLUE, "edgecolor": "white"},
    "single": {"facecolor": _ORANGE, "edgecolor": "white", "hatch": "//"},
}
_NAMED = 32  # endpoints whose lanes have a label, at most
_BINS = 80


class Figure(_Figure):
    """A figure that a notebook displays as an image, without pyplot.

    Examples
    --------
    >>> Figure()._repr_png_()[1:4]
    b'PNG'
    """

    def _repr_png_(self) -> bytes:
        file = io.BytesIO()
        self.savefig(file, format="png", dpi=110, transparent=False)
        return file.getvalue()


# ---- comparisons ------------------------------


def comparison(runs: pd.DataFrame, title: str = "") -> Figure:
    """Throughput and cost side by side: the plot of ``Comparison.plot()``.

    Parameters
    ----------
    runs : pandas.DataFrame
        ``Comparison.runs``, a row per repeat.
    title : str
        The title above both.

    Returns
    -------
    Figure
        With two Axes.

    Examples
    --------
    >>> runs = pd.DataFrame({"mode": ["batch", "single"], "batch_size": [100, 1], "prompts_per_s": [90.0, 30.0],
    ...                      "requests": [3, 256], "client_cpu_s": [0.1, 0.5]})
    >>> len(comparison(runs, "256 prompts").axes)
    2
    """
    axes = _blank(10, 3.9, 2)
    for draw, ax in zip((throughput, cost), axes, strict=True):
        draw(runs, ax)
    figure: Figure = axes[0].figure  # type: ignore[assignment] # made by _blank
    figure.suptitle(_plain(title), color=_INK, fontsize=12)
    return figure


def throughput(runs: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Prompts per second by mode: a bar is the median, its whisker the range, each dot a repeat.

    Parameters
    ----------
    runs : pandas.DataFrame
        ``Comparison.runs``, a row per repeat.
    ax : matplotlib Axes, optional
        Where to draw.

    Returns
    -------
    matplotlib.axes.Axes

    Raises
    ------
    SettingError
        A required column is missing.

    Examples
    --------
    >>> runs = pd.DataFrame({"mode": ["single"] * 3, "batch_size": 1, "prompts_per_s": [28.0, 30.0, 31.0]})
    >>> float(throughput(runs).patches[0].get_height())
    30.0
    """
    _need(runs, ("mode", "batch_size", "prompts_per_s"), "df.swarm.compare(...).runs")
    ax = ax or _blank(5.5, 3.9)[0]
    parts = list(_modes(runs, ax))
    for x, (mode, part) in enumerate(parts):
        speeds = part["prompts_per_s"].to_numpy()
        middle, low, high = float(np.median(speeds)), speeds.min(), speeds.max()
        first = x == 0  # one entry of each kind in the legend
        ax.bar(x, middle, 0.6, **_MODES[mode], label="median" if first else None)
        if len(speeds) > 1:
            ink, span = _ink(ax), [[middle - low], [high - middle]]
            label = "range" if first else None
            ax.errorbar(x, middle, span, fmt="none", ecolor=ink, capsize=7, elinewidth=1.4, capthick=1.4, label=label)
            at = x + np.linspace(-0.13, 0.13, len(speeds))
            ax.plot(at, speeds, "o", ms=5, mfc="white", mec=ink, label="repeats" if first else None)
        _number(ax, x, high, _short(middle), 10, lift=7)
    _finish(ax, "Throughput", "", "prompts per second", legend=any(len(part) > 1 for _, part in parts))
    ax.set_ylim(0, 1.12 * max(float(runs["prompts_per_s"].max()), 1e-9))
    return ax


def cost(runs: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Requests and client CPU seconds by mode.

    Both are drawn as shares of their largest, so that they have one scale; the labels of the bars are the values
    themselves (medians of the repeats).

    Parameters
    ----------
    runs : pandas.DataFrame
        ``Comparison.runs``, a row per repeat.
    ax : matplotlib Axes, optional
        Where to draw.

    Returns
    -------
    matplotlib.axes.Axes

    Raises
    ------
    SettingError
        A required column is missing.

    Examples
    --------
    >>> runs = pd.DataFrame({"mode": ["batch", "single"], "batch_size": [100, 1], "requests": [3, 300],
    ...                      "client_cpu_s": [0.1, 0.5]})
    >>> [float(bar.get_height()) for bar in cost(runs).patches]
    [1.0, 100.0, 20.0, 100.0]
    """
    _need(runs, ("mode", "batch_size", "requests", "client_cpu_s"), "df.swarm.compare(...).runs")
    ax = ax or _blank(5.5, 3.9)[0]
    parts = [part for _, part in _modes(runs, ax)]
    looks: tuple[tuple[str, str, str, dict[str, Any]], ...] = (
        ("requests", "requests", "", {"facecolor": _GREEN, "edgecolor": "white"}),
        ("client_cpu_s", "client CPU, seconds", " s", {"facecolor": _SKY, "edgecolor": "white", "hatch": ".."}),
    )
    for side, (column, label, unit, look) in enumerate(looks):
        values = [float(part[column].median()) for part in parts]
        shares = [100 * v / (max(values) or 1.0) for v in values]
        at = np.arange(len(values)) + 0.4 * side - 0.2
        ax.bar(at, shares, 0.36, **look, label=label)
        for x, share, value in zip(at, shares, values, strict=True):
            _number(ax, x, share, _short(value) + unit, 9)
    _finish(ax, "Cost", "", "% of the largest", legend=True)
    ax.set_ylim(0, 112)
    return ax


# ---- labels ------------------------------


def calibration(
    frame: pd.DataFrame, truth: str | Sequence[Any], out: str = "label", ax: Axes | None = None, *, bins: int = 10
) -> Axes:
    """How often labels are right, by how sure the model is of them: the reliability diagram.

    Rows are binned by the probability of their label. A bar is the share of its rows whose label is right, and its
    number how many they are; the mark in it is their mean probability. On the dashed line both are the same.

    Parameters
    ----------
    frame : pandas.DataFrame
        From ``classify``.
    truth : str or sequence
        The right labels: a column, or a value a row. Rows where they are missing are left out, as those without a
        probability are.
    out : str, default "label"
        The column of labels; ``<out>_p`` has their probabilities.
    ax : matplotlib Axes, optional
        Where to draw.
    bins : int, default 10
        Of the probabilities from 0 to 1.

    Returns
    -------
    matplotlib.axes.Axes

    Raises
    ------
    SettingError
        A required column is missing, or no row has both a probability and a right label.

    Examples
    --------
    >>> frame = pd.DataFrame({"label": ["yes", "no", "yes", "no"], "label_p": [0.95, 0.92, 0.97, 0.61],
    ...                       "truth": ["yes", "no", "no", "no"]})
    >>> ax = calibration(frame, "truth")
    >>> [round(float(bar.get_height()), 2) for bar in ax.patches], ax.get_legend().get_texts()[0].get_text()
    ([1.0, 0.67], '4 rows: 75% are right, sure by 86%')
    """
    _need(frame, (out, f"{out}_p", *([truth] if isinstance(truth, str) else [])), "df.swarm.classify(...)")
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
    ax = ax or _blank(5.2, 4.6)[0]
    bin_of = np.minimum((sure * bins).astype(int), bins - 1)
    counts = np.bincount(bin_of, minlength=bins)
    full = np.flatnonzero(counts)
    share, mean = (np.bincount(bin_of, values, bins)[full] / counts[full] for values in (hits, sure))
    middle = (full + 0.5) / bins
    label = f"{plural(len(sure), 'row')}: {hits.mean():.0%} are right, sure by {sure.mean():.0%}"
    ax.bar(middle, share, 0.92 / bins, facecolor=_SKY, edgecolor="white", label=label)
    ax.plot([0, 1], [0, 1], color=_ink(ax), ls="--", lw=1.2)
    ax.plot(middle, mean, "D", color=_BLUE, mec="white", ms=7, zorder=3)
    for x, y, count in zip(middle.tolist(), share.tolist(), counts[full].tolist(), strict=True):
        _number(ax, x, y, f"{count:,}", 9)
    ax.set_xlim(0, 1)
    ax.set_ylim(0, 1.08)
    _finish(ax, "Calibration", "probability of the label", "share of the rows that are right")
    _legend_within(ax, "upper left")
    return ax


# ---- single runs ------------------------------


def latency(frame: pd.DataFrame, column: str | None = None, ax: Axes | None = None, *, by: str | None = None) -> Axes:
    """Share of the rows answered within a time, with the median and the 95th percentile marked.

    Parameters
    ----------
    frame : pandas.DataFrame
        From ``scatter(..., details=True)``.
    column : str, optional
        The column of seconds; by default the one whose name ends in ``_latency_s``.
    ax : matplotlib Axes, optional
        Where to draw.
    by : str, optional
        Draw a line for each value of this column, such as ``response_endpoint``. If there are more than seven, each is
        a thin grey line, and a blue line shows all rows.

    Returns
    -------
    matplotlib.axes.Axes

    Raises
    ------
    SettingError
        A required column is missing, or no row has a latency.

    Examples
    --------
    >>> ax = latency(pd.DataFrame({"response_latency_s": [0.1, 0.2, 0.4]}))
    >>> ax.get_legend().get_texts()[0].get_text()
    '3 rows: half in 0.2 s, 95% in 0.4 s'
    """
    made_by = "df.swarm.scatter(..., details=True)"
    _need(frame, () if by is None else (by,), made_by)
    found = [str(c) for c in frame.columns if str(c).endswith("_latency_s")] if column is None else [column]
    _need(frame, found[:1] or ("<out>_latency_s",), made_by)
    if len(found) > 1:
        raise SettingError(f"the frame has several columns of latencies, {', '.join(found)}: name one, column=...")
    known = frame.dropna(subset=found)
    if known.empty:
        raise SettingError(f"no row has a value in {found[0]}: none was answered")
    ax = ax or _blank(8, 3.8)[0]
    times = known[found[0]].astype("float64")
    groups = [("", times)] if by is None else [(f"{key}, ", part) for key, part in times.groupby(known[by])]
    if len(groups) > len(_LINES):
        for i, (_, part) in enumerate(groups):
            label = f"each {_plain(str(by))} ({len(groups):,})" if i == 0 else None
            ax.ecdf(part.to_numpy(), color=_GREY, lw=0.7, alpha=0.7, label=label)
        groups = [("all, ", times)]
    for (key, part), (colour, line) in zip(groups, _LINES, strict=False):
        middle, late = (float(q) for q in np.percentile(part, (50, 95), method="inverted_cdf"))  # on the curve
        summary = f"{plural(len(part), 'row')}: half in {middle:.2g} s, 95% in {late:.2g} s"
        ax.ecdf(part.to_numpy(), color=colour, ls=line, lw=2, label=_plain(key) + summary)
        ax.plot([middle, late], [0.5, 0.95], "D", color=colour, mec="white", ms=7, zorder=3)
    if times.min() > 0 and times.max() > 50 * times.median():
        ax.set_xscale("log")  # on a linear scale stragglers leave no room for the others
    else:
        ax.set_xlim(0, float(times.max()) * 1.04 or 1.0)
    ax.set_ylim(0, 1.02)
    _finish(ax, "Latency of the rows", "seconds from request to answer", "share of the rows", grid="both")
    _legend_within(ax, "lower right")
    return ax


def timeline(frame: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Requests of a run over time: a lane per endpoint, a bar per request, failed ones hatched and crossed.

    Concurrent requests of an endpoint share the height of its lane.

    Parameters
    ----------
    frame : pandas.DataFrame
        ``RunStats.timeline()``, a row per request.
    ax : matplotlib Axes, optional
        Where to draw.

    Returns
    -------
    matplotlib.axes.Axes

    Raises
    ------
    SettingError
        A required column is missing, or there are no requests.

    Examples
    --------
    >>> frame = pd.DataFrame({"endpoint": ["a", "b"], "rows": [100, 40], "start_s": [0.0, 0.1], "end_s": [2.0, 1.1],
    ...                       "failure": [None, "server"]})
    >>> [text.get_text() for text in timeline(frame).get_legend().get_texts()]
    ['answered (1)', 'failed (1 server)']
    """
    _need_timeline(frame)
    names = sorted(frame["endpoint"].unique(), key=_natural)
    lane = pd.Index(names).get_indexer(frame["endpoint"])
    start, end = frame["start_s"].to_numpy(float), frame["end_s"].to_numpy(float)
    track, tracks = _tracks(lane, start, end, len(names))
    ax = ax or _blank(9, float(np.clip(max(0.34 * len(names), 0.05 * tracks.sum()) + 1.2, 2.2, 8.5)))[0]
    height = 0.84 / tracks[lane]
    low = lane - 0.42 + track * height
    corners = np.stack([[start, low], [end, low], [end, low + height], [start, low + height]]).transpose(2, 0, 1)
    span = float(end.max()) or 1.0
    # White edges separate neighbours, hatches mark failures; both would cover narrow bars completely.
    seam = np.median(end - start) > span / 150 and tracks.sum() < 400
    kinds = frame["failure"].astype(object)
    dropped = (kinds == "dropped").to_numpy()
    failed = kinds.notna().to_numpy() & ~dropped
    counts = kinds[failed].value_counts()
    label = "failed (" + ", ".join(f"{n:,} {_plain(str(kind))}" for kind, n in counts.items()) + ")"
    for rows, colour, hatch, name in (
        (~(failed | dropped), _BLUE, None, "answered ({:,})"),
        (dropped, _PALE, "\\\\\\\\", "dropped at the end ({:,})"),
        (failed, _RED, "////", label),
    ):
        if not rows.any():
            continue
        look: dict[str, Any] = {"facecolor": colour, "edgecolor": "white" if seam else colour, "linewidth": 0.5}
        look |= {"hatch": hatch if seam else None, "label": name.format(int(rows.sum()))}
        ax.add_collection(PolyCollection(corners[rows], **look), autolim=False)  # type: ignore[arg-type] # quick as an array
    cross = float(np.clip(60 / np.sqrt(failed.sum() or 1), 1.5, 5))
    ax.plot(end[failed], (low + height / 2)[failed], "x", color=_ink(ax), ms=cross, mew=cross / 3.6)
    ax.set_xlim(0, span * 1.02)
    ax.set_ylim(len(names) - 0.4, -0.6)  # the first name on top
    step = -(-len(names) // _NAMED)
    ax.set_yticks(range(0, len(names), step), [_plain(_brief(str(n))) for n in names[::step]], fontsize=8.5)
    which = "" if step == 1 else f" ({len(names):,}, one in {step} is named)"
    _finish(ax, "Requests", "seconds from the start of the run", f"endpoint{which}", grid="x", legend=True)
    return ax


def rate(frame: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Rows per second over the time of a run; a cross is a failed request.

    The rows of a request are spread evenly over its time, since the times of single rows are not recorded; rows of
    failed requests do not count.

    Parameters
    ----------
    frame : pandas.DataFrame
        ``RunStats.timeline()``, a row per request.
    ax : matplotlib Axes, optional
        Where to draw.

    Returns
    -------
    matplotlib.axes.Axes

    Raises
    ------
    SettingError
        A required column is missing, or there are no requests.

    Examples
    --------
    >>> frame = pd.DataFrame({"endpoint": ["a", "a"], "rows": [100, 40], "start_s": [0.0, 1.0], "end_s": [1.0, 2.0],
    ...                       "failure": [None, None]})
    >>> ax = rate(frame)
    >>> ax.get_legend().get_texts()[-1].get_text()
    'mean: 70 rows/s'
    """
    _need_timeline(frame)
    ax = ax or _blank(9, 3)[0]
    good = frame[frame["failure"].isna()]
    start, rows = good["start_s"].to_numpy(float), good["rows"].to_numpy(float)
    span = float(frame["end_s"].max()) or 1.0
    length = np.maximum(good["end_s"].to_numpy(float) - start, span * 1e-6)
    edges = np.linspace(0, span, _BINS + 1)
    done = np.array([(rows * np.clip((t - start) / length, 0, 1)).sum() for t in edges])
    speeds = np.diff(done) / np.diff(edges)
    mean = rows.sum() / span
    ax.stairs(speeds, edges, fill=True, color=_SKY, label="rows answered")
    ax.stairs(speeds, edges, color=_BLUE, lw=1.2)
    ax.axhline(mean, color=_ink(ax), ls="--", lw=1.2, label=f"mean: {_short(mean)} rows/s")
    bad = frame.loc[frame["failure"].notna() & (frame["failure"] != "dropped"), "end_s"]
    if len(bad):
        top = np.full(len(bad), max(speeds.max(), 1.0) * 1.06)
        ax.plot(bad, top, "x", color=_RED, mew=1.6, label=f"failed requests ({len(bad):,})")
    ax.set_xlim(0, span * 1.02)
    ax.set_ylim(0, max(speeds.max(), 1e-9) * 1.14)
    _finish(ax, "Throughput over time", "seconds from the start of the run", "rows per second", legend=True)
    return ax


def tree(trace: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """The fan-in tree: leaves at the bottom, the result of each group at the top.

    The label of a node is the number of leaves in its answer, if there is room; failed nodes are crossed out.

    Parameters
    ----------
    trace : pandas.DataFrame
        From ``tree_reduce(..., trace=True)``, a row per node. Unfinished nodes of an interrupted run are not drawn.
    ax : matplotlib Axes, optional
        Where to draw.

    Returns
    -------
    matplotlib.axes.Axes

    Raises
    ------
    SettingError
        A required column is missing, or there are no nodes.

    Examples
    --------
    >>> trace = pd.DataFrame({"node": [0, 1, 2], "parent": [2, 2, None], "level": [0, 0, 1], "group": 0,
    ...                       "n_leaves": [1, 1, 2], "response": ["a", "b", "ab"], "error": None})
    >>> [text.get_text() for text in tree(trace).get_legend().get_texts()]
    ['leaf (2)', 'result (1)']
    """
    needed = ("node", "parent", "level", "group", "n_leaves", "response", "error")
    _need(trace, needed, "df.swarm.tree_reduce(..., trace=True)")
    nodes = trace[trace["response"].notna() | trace["error"].notna()].set_index("node")
    level, parent = nodes["level"].astype(int), nodes["parent"].astype("Int64")
    place = _places(nodes, level, parent)
    ax = ax or _blank(9, 1.4 + 0.75 * (1 + level.max()))[0]
    below = parent.dropna().astype(int)
    below = below[below.isin(nodes.index)]
    ends = np.array([place[below.index], level[below.index], place[below], level[below]], dtype=float)
    n_leaves = int((level == 0).sum())
    thin = n_leaves > 60
    ax.add_collection(LineCollection(list(ends.T.reshape(-1, 2, 2)), colors=_GREY, lw=0.5 if thin else 1.1, zorder=1))
    failed, top = nodes["error"].notna(), parent.isna()
    leaf = (level == 0) & ~top
    kinds = (
        ("leaf", leaf, "o", _SKY, 110),
        ("merged", ~(failed | top | leaf), "o", _BLUE, 420),
        ("result", top & ~failed, "s", _GREEN, 420),
        ("failed", failed, "X", _RED, 420),
    )
    crowd = level.map(level.value_counts())  # markers shrink with the number of nodes in their level
    size = np.maximum((440 / crowd) ** 2, 3)
    for name, rows, marker, colour, largest in kinds:
        if rows.any():
            area = np.minimum(size[rows], largest)
            label = f"{name} ({int(rows.sum()):,})"
            seam = 0 if thin else 0.5
            ax.scatter(
                place[rows], level[rows], area, colour, marker=marker, ec="white", lw=seam, label=label, zorder=2
            )
    for node in nodes.index[(level > 0) & ~failed & (crowd <= 30)]:
        at: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 9 if crowd[node] <= 22 else 7}
        ax.text(place[node], level[node], str(nodes["n_leaves"][node]), color="white", weight="bold", **at)
    ax.autoscale_view()
    ax.margins(0.03, 0.16)
    ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    _name_groups(ax, nodes, place, [str(c) for c in trace.columns[: trace.columns.get_loc("node")]])
    groups = nodes["group"].nunique()
    x = plural(n_leaves, "leaf", "leaves") + (f", {plural(groups, 'group')}" if groups > 1 else "")
    _finish(ax, "Fan-in tree", x, "level", grid="y", legend=True)
    for handle in ax.get_legend().legend_handles:  # type: ignore[union-attr] # made by _finish
        handle.set_sizes([50])  # type: ignore[union-attr] # they are scatters
    return ax


# ---- helpers ------------------------------


def _need(frame: object, columns: Sequence[str], made_by: str) -> None:
    if not isinstance(frame, pd.DataFrame):
        raise SettingError(f"this plot needs a DataFrame, not {type(frame).__name__}: use {made_by}")
    if missing := [c for c in columns if c not in frame.columns]:
        raise SettingError(f"the frame has no column {', '.join(missing)}: use the frame of {made_by}")
    if frame.empty:
        raise SettingError("there is nothing to draw: the frame has no rows")


def _need_timeline(frame: object) -> None:
    _need(frame, ("endpoint", "rows", "start_s", "end_s", "failure"), "sk.last_run().stats.timeline()")


def _blank(width: float, height: float, count: int = 1) -> list[Axes]:
    """Axes side by side on a new figure. Every colour is set, since the user's defaults may be for a dark theme."""
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white", edgecolor="white")
    axes: list[Axes] = list(figure.subplots(1, count, squeeze=False)[0])
    for ax in axes:
        ax.set_facecolor("white")
        ax.tick_params(which="both", colors=_INK, labelsize=10)
        for spine in ax.spines.values():
            spine.set_color(_INK)
        ax.xaxis.label.set_color(_INK)
        ax.yaxis.label.set_color(_INK)
    return axes


def _ink(ax: Axes) -> Any:
    """The text colour of these Axes, which may be the user's."""
    return ax.yaxis.label.get_color()


def _finish(ax: Axes, title: str, x: str, y: str, grid: Any = "y", legend: bool = False) -> None:
    ax.set_title(title, loc="left", fontsize=11, weight="bold", color=_ink(ax))
    ax.set_xlabel(x)
    ax.set_ylabel(y)
    ax.grid(axis=grid, color=_PALE, lw=0.7)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    if legend:  # on the line of the title, so that it never covers the plot
        anchor: dict[str, Any] = {"loc": "lower right", "bbox_to_anchor": (1.0, 1.0), "borderaxespad": 0.3}
        look: dict[str, Any] = {"frameon": False, "fontsize": 9, "columnspacing": 1.2, "handletextpad": 0.5}
        ax.legend(**anchor, **look, ncols=4, labelcolor=_ink(ax))


def _legend_within(ax: Axes, place: Literal["upper left", "lower right"]) -> None:
    ax.legend(loc=place, fontsize=9, framealpha=0.9, labelcolor=_ink(ax))


def _number(ax: Axes, x: float, y: float, text: str, size: float, lift: float = 3) -> None:
    at: dict[str, Any] = {"xytext": (0, lift), "textcoords": "offset points", "ha": "center", "color": _ink(ax)}
    ax.annotate(text, (x, y), fontsize=size, **at)


def _modes(runs: pd.DataFrame, ax: Axes) -> Iterator[tuple[str, pd.DataFrame]]:
    """The runs of each mode and batch size; sets the labels under the bars."""
    groups = [(str(mode), size, part) for (mode, size), part in runs.groupby(["mode", "batch_size"], sort=False)]
    names = ["single" if mode == "single" else f"batch\nof {size}" for mode, size, _ in groups]
    ax.set_xticks(range(len(names)), names)
    ax.set_xlim(-0.6, len(names) - 0.4)
    return ((mode, part) for mode, _, part in groups)


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.2g}" if value < 10 else f"{value:.3g}"


def _plain(text: str) -> str:
    """Escape dollar signs, which would begin a formula."""
    return text.replace("$", r"\$")


def _natural(name: str) -> list[tuple[str, int]]:
    """A sort key that puts node2 before node10."""
    return [(text, int(number or -1)) for text, number in re.findall(r"(\D*)(\d*)", name)]


def _brief(name: str) -> str:
    return name if len(name) <= 30 else f"{name[:14]}…{name[-15:]}"


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


def _name_groups(ax: Axes, nodes: pd.DataFrame, place: pd.Series, keys: list[str]) -> None:
    """Label each group with its keys, below its leaves, if there is room."""
    ax.set_xticks([])
    groups = nodes.groupby("group")
    if not keys or len(groups) > 10:
        return
    names = groups[keys].first().astype(str).agg(", ".join, axis=1)
    centres = place.groupby(nodes["group"]).agg(["min", "max"]).mean(axis=1)
    ax.set_xticks(centres, [_plain(_brief(name)) for name in names], fontsize=9)
    ax.tick_params(axis="x", length=0)
