"""Batch against single requests, on the user's own endpoints and prompts.

The measurement uses a sample of the user's rows, an uncounted warm-up, modes in alternation (so that drift of the
machine affects all of them), several repeats, and a ``cache_salt`` for each run (so that no mode profits from the
servers' prefix caches of another). A speed-up within the noise is not reported: the ranges of two modes' repeats must
not overlap, with a gap of half the wider range if there are fewer than five repeats (the ranges of three equal draws
do not overlap one time in ten, and have such a gap one time in forty), and their medians must differ by 5%. With
fewer than three repeats no speed-up is reported.
"""

from __future__ import annotations

import html
import math
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, Unpack

import pandas as pd

from ..client import io_thread
from ..engine.columns import Columns
from ..errors import NoEndpointsError, SettingError
from ..frames.call import PreparedCall, arguments, read_options
from ..frames.conversations import row_prompts
from ..frames.options import CompareOptions
from ..frames.prompts import PromptLike, check_frame
from ..frames.signatures import takes
from ..frames.typed import text_column
from ..pool.route_plan import OUR_SALT
from ..pool.vllm_pool import VLLMPool, check_one_of
from ..records import Prompts, RequestSpec
from ..runs.events import Listener
from ..runs.stats import RunStats
from ..text import plural

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Comparison", "compare"]

Mode = Literal["batch", "single"]
_WARM_UP_ROWS = 8
_FEWEST_REPEATS = 3  # with fewer, equal modes look different too often
_LEAST_GAIN = 1.05


@dataclass(frozen=True, slots=True)
class _Variant:
    """One mode with its batch size, and how to run it."""

    mode: Mode
    batch_size: int
    pool: VLLMPool
    spec: RequestSpec

    @property
    def name(self) -> str:
        return mode_name(self.mode, self.batch_size)


class Comparison:
    """The result of a comparison.

    Attributes
    ----------
    frame : pandas.DataFrame
        A row per mode (and batch size): ``mode``, ``batch_size`` (maximum rows per request), ``time_s`` (median over
        the repeats, seconds), ``time_s_min``, ``time_s_max``, ``prompts_per_s``, ``tokens_per_s`` (generated;
        medians), ``requests``, ``rows_per_request`` (mean), ``completion_rate`` (share of rows answered, 0 to 1),
        ``client_cpu_s`` (seconds of this process, median), ``speed_up`` (ratio of ``prompts_per_s`` to that of single
        requests, or of the first row if there are none; missing if the difference is within the noise, or there are
        too few repeats).
    runs : pandas.DataFrame
        A row per repeat: ``mode, batch_size, repeat, time_s, prompts_per_s, tokens_per_s, requests,
        rows_per_request, answered, client_cpu_s``.
    differing : pandas.DataFrame
        The sampled rows whose texts differ between the modes that answered them (first repeat of each), with a
        column per mode.

    Examples
    --------
    >>> found = sk.compare(pd.DataFrame({"i": range(20)}), "number {i}", repeats=1)
    >>> found.verdict()
    'batch of 100: too few repeats to compare with single'
    >>> found.plot()
    <Figure size ...>
    """

    def __init__(self, runs: pd.DataFrame, texts: pd.DataFrame, sample: int) -> None:
        self.runs = runs
        self.sample = sample
        self.frame = _summary(runs, sample)
        agree = texts.nunique(axis=1) <= 1  # a failed row is not a different text; the completion rate counts it
        self.differing = texts[~agree]

    def verdict(self) -> str:
        """The result in a sentence or two."""
        said = [verdict(self.runs)]
        if len(self.differing):
            count, texts = len(self.differing), plural(self.sample, "text")
            verb = "differs" if count == 1 else "differ"
            said.append(f"{count:,} of {texts} {verb} between the modes (see .differing)")
        return "; ".join(said)

    def plot(self) -> Figure:
        """Plot the throughput with the spread of the repeats, and the cost: requests and client CPU."""
        from . import plots

        repeats = plural(self.runs["repeat"].nunique(), "repeat")
        return plots.comparison(self.runs, f"{verdict(self.runs)} ({plural(self.sample, 'prompt')}, {repeats})")

    def __repr__(self) -> str:
        return f"<Comparison of {plural(self.sample, 'prompt')}: {self.verdict()}>"

    def __str__(self) -> str:
        return "\n".join([*(f"{name}: {line}" for name, line in self._lines()), self.verdict()])

    def _repr_html_(self) -> str:
        rows = self.frame.to_dict("records")
        columns = {
            "prompts/s": [f"{r['prompts_per_s']:,.1f}" for r in rows],
            "seconds": [f"{r['time_s']:.2f} ({r['time_s_min']:.2f} to {r['time_s_max']:.2f})" for r in rows],
            "requests": [f"{r['requests']:,}" for r in rows],
            "rows a request": [f"{r['rows_per_request']:,.0f}" for r in rows],
            "client CPU, s": [f"{r['client_cpu_s']:.2f}" for r in rows],
            "answered": [f"{r['completion_rate']:.0%}" for r in rows],
            "speed-up": ["" if pd.isna(r["speed_up"]) else f"{r['speed_up']:.2f}" for r in rows],
        }
        names = [mode_name(r["mode"], r["batch_size"]) for r in rows]
        table = pd.DataFrame(columns, index=names).to_html(border=0)
        return f"{table}<p>{html.escape(self.verdict())}</p>"

    def _lines(self) -> list[tuple[str, str]]:
        return [(mode_name(r["mode"], r["batch_size"]), _line(r)) for r in self.frame.to_dict("records")]


@takes(CompareOptions)
def compare(
    df: pd.DataFrame,
    prompt: PromptLike | None = None,
    *,
    modes: Sequence[Mode] = ("batch", "single"),
    batch_sizes: Sequence[int] | None = None,
    sample: int = 256,
    repeats: int = 3,
    **options: Unpack[CompareOptions],
) -> Comparison:
    """Measure batch against single requests on your endpoints, with your prompts.

    Parameters
    ----------
    df : pandas.DataFrame
        The rows.
    prompt : str, callable or Series, optional
        As for ``scatter``.
    modes : sequence of {"batch", "single"}, default both
        The modes to compare.
    batch_sizes : sequence of int, optional
        Maximum rows per request in batch mode; each is measured. The pool's maximum by default.
    sample : int, default 256
        Number of rows to measure on; the sample of a frame is always the same.
    repeats : int, default 3
        Measured runs of each mode, in alternation. With one or two, no speed-up is reported.

    Returns
    -------
    Comparison
        ``.frame``, ``.runs``, ``.differing``, ``.verdict()`` and ``.plot()``.

    Raises
    ------
    SettingError
        A value is not allowed; the message says what is.
    NoEndpointsError
        No endpoint is left.

    Examples
    --------
    >>> found = compare(pd.DataFrame({"i": range(20)}), "number {i}", repeats=1, pool=pool.select([0]))
    >>> found.frame["requests"].tolist()
    [1, 20]
    """
    given = arguments(compare, options, prompt)
    check_frame(df)
    if sample < 1 or repeats < 1:
        raise SettingError(f"sample={sample}, repeats={repeats}: must be 1 or more")
    chosen = df if len(df) <= sample else df.sample(sample, random_state=0).sort_index()
    prompts = row_prompts(chosen, prompt, given["messages"])
    if not any(t is not None for t in prompts.texts):
        raise SettingError("there are no prompts to compare on: the frame is empty, or no prompt could be made")
    with closing(read_options(given)) as call:
        runs, texts = _measured(call, _variants(call, modes, batch_sizes), prompts, repeats)
    answers = pd.DataFrame(index=chosen.index)
    for name, column in texts.items():
        answers[name] = text_column(column, chosen.index).array
    return Comparison(runs, answers, len(chosen))


def _measured(
    call: PreparedCall, variants: Sequence[_Variant], prompts: Prompts, repeats: int
) -> tuple[pd.DataFrame, dict[str, list[str | None]]]:
    """The runs, a row each; and the texts of the first run of each variant."""
    runs = []
    texts: dict[str, list[str | None]] = {}
    for variant in variants:
        _run(variant, Prompts(prompts.texts[:_WARM_UP_ROWS]), "warm-up", lambda stats: [])
    for repeat in range(repeats):
        # Every second repeat is in reverse order, so that drift does not always favour the same mode.
        for variant in variants if repeat % 2 == 0 else reversed(variants):
            label = f"{variant.name}, repeat {repeat + 1}"
            row, columns = _run(variant, prompts, label, partial(call.listeners, label))
            runs.append({**row, "repeat": repeat})
            texts.setdefault(variant.name, columns.text)
    frame = pd.DataFrame(runs).sort_values(["mode", "batch_size", "repeat"], ascending=[True, False, True])
    return frame.reset_index(drop=True), texts


def _variants(call: PreparedCall, modes: Sequence[Mode], sizes: Sequence[int] | None) -> Sequence[_Variant]:
    found = []
    for mode in modes:
        check_one_of("modes", mode, ("batch", "single"))
        spec = replace(call.spec, mode=mode)
        if mode == "single":
            found.append(_Variant(mode, 1, call.pool, spec))
            continue
        for size in sizes or [call.pool.batch.first_size]:
            policy = replace(call.pool.batch, max_size=size)
            found.append(_Variant(mode, size, call.pool.with_batch(policy), spec))
    if len({(v.mode, v.batch_size) for v in found}) != len(found) or not found:
        raise SettingError(f"modes={list(modes)}, batch_sizes={sizes}: needs at least one, and none twice")
    return found


def _run(
    variant: _Variant, prompts: Prompts, label: str, listeners: Callable[[RunStats], Sequence[Listener]]
) -> tuple[dict[str, Any], Columns]:
    columns, stats = Columns(len(prompts.texts)), RunStats(rows=len(prompts.texts))
    spec = replace(variant.spec, params={**variant.spec.params, "cache_salt": f"{OUR_SALT}{uuid.uuid4().hex}"})
    cpu = time.process_time()
    failure = io_thread.call(variant.pool.run(prompts, spec, columns, listeners(stats), stats=stats))
    cpu = time.process_time() - cpu
    if failure is not None:
        raise NoEndpointsError(f"no endpoint is left during the {label}: {failure.describe()}")
    sizes = stats.batch_sizes
    row = {
        "mode": variant.mode,
        "batch_size": variant.batch_size,
        "time_s": stats.time_s,
        "prompts_per_s": stats.rows_per_s,
        "tokens_per_s": stats.completion_tokens / stats.time_s if stats.time_s else 0.0,
        "requests": stats.requests,
        "rows_per_request": sum(size * count for size, count in sizes.items()) / max(1, sum(sizes.values())),
        "answered": stats.answered,
        "client_cpu_s": cpu,
    }
    return row, columns


def verdict(runs: pd.DataFrame) -> str:
    """What measured runs say of the throughput of their modes."""
    groups = _by_mode(runs)
    few = min(len(part) for part in groups.values()) < _FEWEST_REPEATS
    against, base = next(((n, p) for n, p in groups.items() if n == "single"), next(iter(groups.items())))
    unknown = "too few repeats to compare with" if few else "no difference to"
    said: dict[str, list[str]] = {}
    for name, part in groups.items():
        if name != against:
            gain = _speed_up(part["prompts_per_s"], base["prompts_per_s"])
            beyond = "" if few else " beyond the noise"
            known = f"{gain:.2f} times the throughput of {against}"
            said.setdefault(f"{unknown} {against}{beyond}" if math.isnan(gain) else known, []).append(name)
    lines = [f"{', '.join(names)}: {words}" for words, names in said.items()]
    return "; ".join(lines) or "only one mode: nothing to compare"


def _by_mode(runs: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The runs of each mode and batch size, by name, in their order."""
    groups: Any = runs.groupby(["mode", "batch_size"], sort=False)
    return {mode_name(mode, size): part for (mode, size), part in groups}


def _summary(runs: pd.DataFrame, sample: int) -> pd.DataFrame:
    rows = []
    groups = list(runs.groupby(["mode", "batch_size"], sort=False))
    base = next((part for (mode, _), part in groups if mode == "single"), groups[0][1])
    for (mode, size), part in groups:
        times = part["time_s"]
        rows.append(
            {
                "mode": mode,
                "batch_size": size,
                "time_s": times.median(),
                "time_s_min": times.min(),
                "time_s_max": times.max(),
                "prompts_per_s": part["prompts_per_s"].median(),
                "tokens_per_s": part["tokens_per_s"].median(),
                "requests": int(part["requests"].median()),
                "rows_per_request": part["rows_per_request"].mean(),
                "completion_rate": part["answered"].mean() / sample,
                "client_cpu_s": part["client_cpu_s"].median(),
                "speed_up": 1.0 if part is base else _speed_up(part["prompts_per_s"], base["prompts_per_s"]),
            }
        )
    return pd.DataFrame(rows)


def _speed_up(speeds: pd.Series, base: pd.Series) -> float:
    """The ratio of the medians; NaN within the noise."""
    if len(speeds) < _FEWEST_REPEATS or not (speeds > 0).all() or not (base > 0).all():
        return math.nan
    gain = float(speeds.median() / base.median())
    gap = max(speeds.min() / base.max(), base.min() / speeds.max())
    wider = max(speeds.max() / speeds.min(), base.max() / base.min())
    apart = gap > (wider**0.5 if len(speeds) < 5 else 1.0)
    return gain if apart and max(gain, 1 / gain) >= _LEAST_GAIN else math.nan


def mode_name(mode: str, batch_size: int) -> str:
    """What a mode is called: "single", "batch of 100"."""
    return "single" if mode == "single" else f"batch of {batch_size}"


def _line(row: dict[Any, Any]) -> str:
    gain = "" if pd.isna(row["speed_up"]) else f", {row['speed_up']:.2f} times the throughput"
    real = round(row["rows_per_request"])
    sizes = "" if row["mode"] == "single" else f" of {plural(real, 'row')}"
    return (
        f"{row['prompts_per_s']:.1f} prompts/s ({row['time_s']:.2f} s, {row['time_s_min']:.2f} to "
        f"{row['time_s_max']:.2f}), {plural(row['requests'], 'request')}{sizes}, {row['client_cpu_s']:.2f} s client "
        f"CPU{gain}"
    )
