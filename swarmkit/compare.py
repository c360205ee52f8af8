"""Batch against single requests, on the user's own endpoints and prompts.

What makes it honest: a sample of the user's rows, a warm-up that is not counted, modes in alternation (so that a
machine that slows down slows all of them), several repeats, a ``cache_salt`` a repeat (so that no mode is
helped by what another left in the servers' prefix caches), and no word of a speed-up within the noise: the ranges
of two modes' repeats must be apart, by half the wider of them where there are fewer than five (the ranges of three
equal draws each are apart one time in ten, and so far apart one in forty), and their medians by 5%. With fewer
than three repeats nothing is said.
"""

from __future__ import annotations

import html
import math
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, Unpack

import pandas as pd

from . import bridge
from .errors import NoEndpointsError, SettingError
from .markup import plural, table_html
from .options import Call, Options, read_options
from .prompts import PromptLike, make_prompts
from .records import Ask, Prompts
from .results import Columns
from .stats import RunStats
from .vllm_pool import VLLMPool, check_one_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Comparison", "compare"]

Mode = Literal["batch", "single"]
_WARM_UP_ROWS = 8
_FEWEST_REPEATS = 3  # below, modes that are equal look different too often
_LEAST_GAIN = 1.05


@dataclass(frozen=True, slots=True)
class _Variant:
    """One of the things compared."""

    mode: Mode
    batch_size: int
    pool: VLLMPool
    ask: Ask


class Comparison:
    """What a comparison found.

    Attributes
    ----------
    frame : pandas.DataFrame
        A row per mode (and batch size): ``mode``, ``batch_size`` (rows a request, at most), ``time_s`` (median over
        the repeats, seconds), ``time_s_min``, ``time_s_max``, ``prompts_per_s``, ``tokens_per_s`` (generated; at
        the median time), ``requests``, ``completion_rate`` (rows answered, 0 to 1), ``client_cpu_s`` (seconds of
        this process, median), ``speed_up`` (of ``prompts_per_s``, over single requests, or over the first row
        without them; missing where the difference is within the noise, or there are too few repeats to tell).
    runs : pandas.DataFrame
        A row per repeat: ``mode, batch_size, repeat, time_s, prompts_per_s, tokens_per_s, requests, answered,
        client_cpu_s``.
    differing : pandas.DataFrame
        The sampled rows whose text is not the same in all modes that answered them (first repeat of each), a
        column per mode.
    """

    def __init__(self, runs: pd.DataFrame, texts: pd.DataFrame, sample: int) -> None:
        self.runs = runs
        self.sample = sample
        self.frame = _summary(runs, sample)
        agree = texts.nunique(axis=1) <= 1  # a row that failed is no other text: the completion rate has it
        self.differing = texts[~agree]

    def verdict(self) -> str:
        """What can be said, in a sentence or two."""
        rows = self.frame.to_dict("records")
        base = next((r for r in rows if r["mode"] == "single"), rows[0])
        against = _name(base["mode"], base["batch_size"])
        few = self.runs.groupby(["mode", "batch_size"]).size().min() < _FEWEST_REPEATS
        unknown = (
            f"too few repeats to compare it with {against}" if few else f"no difference to {against} beyond the noise"
        )
        said = []
        for row in rows:
            name, gain = _name(row["mode"], row["batch_size"]), row["speed_up"]
            if name != against:
                known = f"{gain:.2f} times the throughput of {against}"
                said.append(f"{name}: {unknown if pd.isna(gain) else known}")
        if len(self.differing):
            said.append(f"{len(self.differing)} of {self.sample} texts differ between the modes (see .differing)")
        return "; ".join(said) or "one mode only: nothing to compare"

    def plot(self) -> Figure:
        """Throughput with the spread of the repeats, and what it cost: requests and client CPU."""
        from . import plots

        return plots.comparison(self.runs, title=f"{self.sample} prompts, {self.runs['repeat'].nunique()} repeats")

    def __repr__(self) -> str:
        return f"<Comparison of {self.sample} prompts: {self.verdict()}>"

    def __str__(self) -> str:
        return "\n".join([*(f"{name}: {line}" for name, line in self._lines()), self.verdict()])

    def _repr_html_(self) -> str:
        return table_html(self._lines()) + f"<p>{html.escape(self.verdict())}</p>"

    def _lines(self) -> list[tuple[str, str]]:
        return [(_name(r["mode"], r["batch_size"]), _line(r)) for r in self.frame.to_dict("records")]


def compare(
    df: pd.DataFrame,
    prompt: PromptLike,
    *,
    modes: Sequence[Mode] = ("batch", "single"),
    batch_sizes: Sequence[int] | None = None,
    sample: int = 256,
    repeats: int = 3,
    **options: Unpack[Options],
) -> Comparison:
    """Measure what batching buys on your endpoints, with your prompts.

    Parameters
    ----------
    df : pandas.DataFrame
        The rows.
    prompt : str, callable or Series
        As for ``scatter``.
    modes : sequence of {"batch", "single"}
        What to compare.
    batch_sizes : sequence of int, optional
        Batch mode with each of these bounds on the rows a request, in place of the pool's.
    sample : int, default 256
        Rows to measure on, drawn once (always the same ones): nobody pays for the whole frame many times.
    repeats : int, default 3
        Measured runs of each mode, in alternation. With one or two, no speed-up is named.
    **options
        As for ``scatter``; ``mode`` is set by ``modes``.

    Returns
    -------
    Comparison
        ``.frame``, ``.runs``, ``.differing``, ``.verdict()`` and ``.plot()``.

    Raises
    ------
    SettingError
        A value outside of what is allowed.
    NoEndpointsError
        No endpoint is left.

    Examples
    --------
    >>> import swarmkit, pandas as pd
    >>> df = pd.DataFrame({"i": range(20)})
    >>> with swarmkit.local(1, engine="echo") as swarm:
    ...     found = compare(df, "number {i}", pool=swarmkit.connect(swarm), repeats=1)
    >>> found.frame["requests"].tolist()
    [1, 20]
    """
    if sample < 1 or repeats < 1:
        raise SettingError(f"sample={sample}, repeats={repeats}: must be 1 or more")
    chosen = df if len(df) <= sample else df.sample(sample, random_state=0).sort_index()
    prompts = make_prompts(chosen, prompt)
    if not any(t is not None for t in prompts.texts):
        raise SettingError("there is no row to compare on: the frame is empty, or no prompt could be made")
    call = read_options(options)
    texts: dict[str, list[str | None]] = {}
    runs = []
    try:
        variants = _variants(call, modes, batch_sizes)
        for variant in variants:
            _run(variant, Prompts(prompts.texts[:_WARM_UP_ROWS]), "warm-up")
        for repeat in range(repeats):
            # Forth and back: what drifts during a repeat does not favour the same mode each time.
            for variant in variants if repeat % 2 == 0 else reversed(variants):
                row, columns = _run(variant, prompts, f"compare, repeat {repeat + 1}")
                runs.append({**row, "repeat": repeat})
                texts.setdefault(_name(variant.mode, variant.batch_size), columns.text)
    finally:
        if call.owned:
            bridge.call(call.pool.close())
    frame = pd.DataFrame(runs).sort_values(["mode", "batch_size", "repeat"], ascending=[True, False, True])
    return Comparison(frame.reset_index(drop=True), pd.DataFrame(texts, index=chosen.index), len(chosen))


def _variants(call: Call, modes: Sequence[Mode], sizes: Sequence[int] | None) -> Sequence[_Variant]:
    found = []
    for mode in modes:
        check_one_of("modes", mode, ("batch", "single"))
        ask = replace(call.ask, mode=mode)
        if mode == "single":
            found.append(_Variant(mode, 1, call.pool, ask))
            continue
        for size in sizes or [call.pool.batch.max_size]:
            policy = replace(call.pool.batch, max_size=size)
            found.append(_Variant(mode, size, call.pool.with_batch(policy), ask))
    if len({(v.mode, v.batch_size) for v in found}) != len(found) or not found:
        raise SettingError(f"modes={list(modes)}, batch_sizes={sizes}: name at least one, and none twice")
    return found


def _run(variant: _Variant, prompts: Prompts, label: str) -> tuple[dict[str, Any], Columns]:
    columns, stats = Columns(len(prompts.texts)), RunStats(rows=len(prompts.texts))
    ask = replace(variant.ask, params={**variant.ask.params, "cache_salt": uuid.uuid4().hex})
    cpu = time.process_time()
    failure = bridge.call(variant.pool.run(prompts, ask, columns, stats=stats))
    cpu = time.process_time() - cpu
    if failure is not None:
        raise NoEndpointsError(f"no endpoint is left during the {label}: {failure.describe()}")
    row = {
        "mode": variant.mode,
        "batch_size": variant.batch_size,
        "time_s": stats.time_s,
        "prompts_per_s": stats.rows_per_s,
        "tokens_per_s": stats.completion_tokens / stats.time_s if stats.time_s else 0.0,
        "requests": stats.requests,
        "answered": stats.answered,
        "client_cpu_s": cpu,
    }
    return row, columns


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
                "completion_rate": part["answered"].mean() / sample,
                "client_cpu_s": part["client_cpu_s"].median(),
                "speed_up": 1.0 if part is base else _speed_up(part["prompts_per_s"], base["prompts_per_s"]),
            }
        )
    return pd.DataFrame(rows)


def _speed_up(speeds: pd.Series, base: pd.Series) -> float:
    """How many times as fast, by the medians; NaN within the noise."""
    if len(speeds) < _FEWEST_REPEATS or not (speeds > 0).all() or not (base > 0).all():
        return math.nan
    gain = float(speeds.median() / base.median())
    gap = max(speeds.min() / base.max(), base.min() / speeds.max())
    wider = max(speeds.max() / speeds.min(), base.max() / base.min())
    apart = gap > (wider**0.5 if len(speeds) < 5 else 1.0)
    return gain if apart and max(gain, 1 / gain) >= _LEAST_GAIN else math.nan


def _name(mode: str, batch_size: int) -> str:
    return "single" if mode == "single" else f"batch of {batch_size}"


def _line(row: dict[Any, Any]) -> str:
    gain = "" if pd.isna(row["speed_up"]) else f", {row['speed_up']:.2f}x"
    return (
        f"{row['prompts_per_s']:.1f} prompts/s ({row['time_s']:.2f} s, {row['time_s_min']:.2f} to "
        f"{row['time_s_max']:.2f}), {plural(row['requests'], 'request')}, {row['client_cpu_s']:.2f} s client CPU{gain}"
    )
