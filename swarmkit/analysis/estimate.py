"""What a run will take, from a few of its rows.

A sample of the rows is asked, spread over the lengths of their prompts, in two runs of different size on as few
endpoints as it can keep busy: so prompts, answers, and a row's neighbours can be told apart (``calibrate``). The rest
is simulated (``simulate``), with answers drawn from those of sampled rows whose prompts are about as long. The band is
that of twenty such simulations, each with a sample drawn anew from the answers (a bootstrap), and with what the model
of the endpoints may be off.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any, Unpack

import numpy as np
import numpy.typing as npt
import pandas as pd

from ..client import io_thread
from ..engine.columns import Columns
from ..engine.policy import BatchPolicy
from ..errors import ScatterError, SettingError
from ..frames.call import PreparedCall, arguments, is_whole, read_options
from ..frames.options import ScatterOptions
from ..frames.prompts import PromptLike
from ..frames.scatter import ScatterFrame
from ..frames.signatures import takes
from ..frames.verbs import scatter
from ..pool.vllm_pool import VLLMPool
from ..runs.run import Run, finished
from ..runs.stats import RunStats
from ..store.reuse import duplicates_in
from ..text import duration, plural, table_html
from .calibrate import calibrate
from .models import EndpointModel
from .pace import pace_of
from .simulate import play

__all__ = ["Estimate", "estimate", "rows_to_ask"]

_ROWS_AN_ENDPOINT = 32  # of the sample: fewer at once show little of how an endpoint works when it is busy
_FIRST = 8  # a part of the sample, one in so many, is asked by itself: the second point of the speed
_SLOTS = EndpointModel().slots  # where no endpoint was seen to be full
_WORLDS = 20  # simulations for the band
_SIMULATED = 10_000  # rows of the estimate's simulation, at most
_SIMULATED_FOR_BAND = 1_500
_LEAST_ENDPOINTS = 4  # simulated ones
_NEAR = 2.0  # sampled rows to either side, from which the length of an answer is drawn
_MODEL_ERROR = 0.03  # of the time, whatever the sample
_BAND = (0.05, 0.95)
_CHARS_A_TOKEN = 4.0  # where the servers count nothing

Band = tuple[float, float]


@dataclass(frozen=True, slots=True, repr=False)
class Estimate:
    """What a run will take.

    Attributes
    ----------
    rows : int
        Rows that the run will ask: none that are stored (with ``store``, those of the sample are), that have their
        answer, or that have the prompt of another one.
    sampled, failed : int
        Rows that were asked for this, and how many of them failed.
    endpoints : int
        Endpoints of the run.
    requests : int
        Requests.
    prompt_tokens, completion_tokens : int
        Tokens in and out.
    time_s : float
        Seconds, from the first request to the last answer.
    time_band, completion_band : (float, float)
        Between these are nine in ten of the simulated runs; and one with no more slots than were seen to be used.
    slots : int
        Rows that an endpoint is taken to work on at once.
    full : bool
        Whether endpoints were seen to be full with so many, or ``slots=`` said so; otherwise they are an assumption.
    money, money_band : float and (float, float), or None
        What the tokens cost, with ``price``.

    Examples
    --------
    >>> plan = Estimate(5_000, 64, 0, 4, 52, 145_000, 40_000, 51.0, (45.0, 58.0), (38_000.0, 42_000.0))
    >>> plan
    <Estimate: 5,000 rows on 4 endpoints in 51 s (45 s to 58 s), 52 requests, 145,000 tokens in, 40,000 out>
    >>> plan.summary()[1]
    ('time', '51 s (45 s to 58 s)')
    """

    rows: int
    sampled: int
    failed: int
    endpoints: int
    requests: int
    prompt_tokens: int
    completion_tokens: int
    time_s: float
    time_band: Band
    completion_band: Band
    slots: int = _SLOTS
    full: bool = False
    money: float | None = None
    money_band: Band | None = None

    def __repr__(self) -> str:
        cost = "" if self.money is None else f", {_money(self.money)} to pay"
        return (
            f"<Estimate: {plural(self.rows, 'row')} on {plural(self.endpoints, 'endpoint')} in "
            f"{_banded(self.time_s, self.time_band, duration)}, {plural(self.requests, 'request')}, "
            f"{self.prompt_tokens:,} tokens in, {self.completion_tokens:,} out{cost}>"
        )

    def _repr_html_(self) -> str:
        return table_html(self.summary())

    def summary(self) -> list[tuple[str, str]]:
        """Label and value, for what is worth showing."""
        out = _banded(self.completion_tokens, self.completion_band, _count)
        money = []
        if self.money is not None and self.money_band is not None:
            money = [("to pay", _banded(self.money, self.money_band, _money))]
        known = "" if self.full else " (assumed; slots= sets them)"
        failed = f", {self.failed:,} failed" if self.failed else ""
        where = f"{plural(self.endpoints, 'endpoint')}, {self.slots:,} rows at once each{known}"
        return [
            ("rows", f"{self.rows:,}, by {self.sampled:,} that were asked{failed}"),
            ("time", _banded(self.time_s, self.time_band, duration)),
            ("requests", f"{self.requests:,} to {where}"),
            ("tokens in", f"{self.prompt_tokens:,}"),
            ("tokens out", out),
            *money,
        ]


def _banded(value: float, band: Band, shown: Callable[[float], str]) -> str:
    """A value and its band, if that shows as more than one number."""
    low, high = map(shown, band)
    return shown(value) if low == high else f"{shown(value)} ({low} to {high})"


def _money(amount: float) -> str:
    return f"{amount:,.2f}" if amount >= 0.1 or not amount else f"{amount:.2g}"


def _count(number: float) -> str:
    return f"{number:,.0f}"


@takes(ScatterOptions, like=scatter)
def estimate(
    df: pd.DataFrame,
    prompt: PromptLike | None = None,
    *,
    sample: int = 64,
    price: tuple[float, float] | None = None,
    slots: int | None = None,
    **options: Unpack[ScatterOptions],
) -> Estimate:
    """Say what a ``scatter`` will take before it runs: time with a band, requests, tokens, and money.

    Asks a few of the rows, at most one endpoint for each 32 of them, and simulates the run with what they show. With
    ``store`` their answers are kept, so that the run does not pay for them again. Rates of gateways (``rpm``, ``tpm``)
    and endpoints that fail are not simulated.

    Parameters
    ----------
    sample : int, default 64
        Rows to ask, spread over the lengths of prompts.
    price : (float, float), optional
        What a million tokens cost, of prompts and of answers, in any currency.
    slots : int, optional
        Rows that an endpoint works on at once (vLLM's ``--max-num-seqs``). Otherwise what was seen, or 256 where no
        endpoint was full.

    Returns
    -------
    Estimate
        ``time_s`` and ``time_band``, ``requests``, ``prompt_tokens``, ``completion_tokens``, ``money``.

    Raises
    ------
    UnknownColumnError, PromptError, NoEndpointsError, ScatterInterrupted
        As for ``scatter``.
    SettingError, TypeError
        A keyword that ``scatter`` does not take, or a value that is not allowed.
    ScatterError
        No row of the sample was answered; ``.frame`` has their errors.

    Examples
    --------
    >>> df = pd.DataFrame({"i": range(5_000)})
    >>> with sk.local(1, engine="echo", tokens_per_s=500) as swarm, sk.connect(swarm) as pool:
    ...     plan = df.swarm.estimate("number {i}", pool=pool, max_tokens=16, price=(0.15, 0.60))
    >>> plan.rows, plan.sampled, plan.money > 0
    (5000, 64, True)
    """
    given = arguments(estimate, options, prompt)
    given["overwrite"] = True  # nothing is written
    if not is_whole(sample, 1) or (slots is not None and not is_whole(slots, 1)):
        raise SettingError(f"sample={sample!r}, slots={slots!r}: must be whole numbers, 1 or more")
    price = _checked(price)
    frame = ScatterFrame(df, prompt, given)
    with closing(read_options(given, by_row=True)) as call:
        call = replace(call, owned=False, pool=call.pool._still(), spec=replace(call.spec, details=True))
        rows = rows_to_ask(frame, call)
        if not rows:
            return Estimate(0, 0, 0, call.pool.size, 0, 0, 0, 0.0, (0.0, 0.0), (0.0, 0.0), money=price and 0.0)
        rows.sort(key=lambda row: len(frame.prompts.texts[row] or ""))
        chosen = [rows[int((i + 0.5) * len(rows) / sample)] for i in range(sample)] if len(rows) > sample else rows
        asked = _Asked(frame, prompt, given, call)
        asked.ask(chosen)
        policy = _policy(call.pool.batch, call.spec.mode == "single", call.spec.n)
        left = [row for row in rows if row not in asked.answered] if call.store is not None else rows
        return _estimate(asked, left, policy, call.pool.size, slots, price)


def _checked(price: Any) -> tuple[float, float] | None:
    if price is None:
        return None
    pair = isinstance(price, tuple | list) and len(price) == 2 and all(isinstance(p, Real) for p in price)
    if not pair or not all(0 <= float(p) < math.inf for p in price):
        raise SettingError(
            f"price={price!r}: must be two numbers, what a million tokens of prompts and of answers cost: (0.15, 0.60)"
        )
    return float(price[0]), float(price[1])


def _policy(batch: BatchPolicy, single: bool, n: int) -> BatchPolicy:
    """The policy of a simulation, whose rows are the run's answers."""
    if single:
        return replace(batch, max_size=min(1024, n), max_in_flight=batch.single_in_flight)
    return batch if n == 1 else replace(batch, max_size=min(1024, batch.first_size * n))


def rows_to_ask(frame: ScatterFrame, call: PreparedCall) -> list[int]:
    """Rows that a run would send: not those without a prompt, that have their answer, or whose prompt repeats."""
    prompts = frame.prompts
    pending = range(len(prompts.texts)) if frame.pending is None else frame.pending
    rows = [row for row in pending if prompts.texts[row] is not None]
    same = call.spec.params.get("temperature") == 0 and call.spec.n == 1 if call.dedup == "auto" else call.dedup
    if same:
        repeats = {row for others in duplicates_in(rows, prompts).values() for row in others}
        rows = [row for row in rows if row not in repeats]
    if call.store is not None and rows and call.model is None:
        spec = io_thread.call(call.pool.complete(call.spec))
        stored = Columns(len(prompts.texts), spec.n)
        found = call.store.fill(stored, call.store.keys(spec, prompts.texts, same), rows, {})
        rows = [row for row in rows if not found[row]]
    return rows


class _Asked:
    """Rows that are asked for an estimate.

    Attributes
    ----------
    stats : list of RunStats
        Of the runs that asked them.
    answered : dict of int to (float, list of float)
        By row: tokens of its prompt, and of its answers.
    failed : int
        Rows that failed.
    """

    def __init__(
        self, frame: ScatterFrame, prompt: PromptLike | None, given: dict[str, Any], call: PreparedCall
    ) -> None:
        self._frame, self._prompt, self._call = frame, prompt, call
        self._given = {**given, "only_missing": False}
        self.stats: list[RunStats] = []
        self.answered: dict[int, tuple[float, list[float]]] = {}
        self.failed = 0
        self._result = frame.df.iloc[:0]

    def ask(self, rows: Sequence[int]) -> None:
        """Ask rows, a few of them first."""
        pool = self._call.pool
        if self._call.model is None:
            pool = _few(pool, math.ceil(len(rows) / _ROWS_AN_ENDPOINT))
        call = replace(self._call, pool=pool)
        first = rows[_FIRST // 2 :: _FIRST]
        rest = [row for i, row in enumerate(rows) if i % _FIRST != _FIRST // 2]
        for part in filter(None, (first, rest)):
            self._run(part, call)
        if not self.answered:
            raise ScatterError("no row of the sample was answered, so there is no estimate", self._result)

    def _run(self, rows: Sequence[int], call: PreparedCall) -> None:
        prompt = self._prompt.iloc[list(rows)] if isinstance(self._prompt, pd.Series) else self._prompt
        part = ScatterFrame(self._frame.df.iloc[list(rows)], prompt, self._given)
        part.label = "estimate"

        def start() -> Run:
            run = part.start(call)
            self.stats.append(run.stats)
            return run

        self._result = finished(start)
        columns, n = part.columns, part.columns.n
        for i, row in enumerate(rows):
            if columns.text[i * n] is None or i in columns.errors:
                self.failed += 1
                continue
            texts, counts = columns.text[i * n : i * n + n], columns.completion_tokens[i * n : i * n + n]
            answers = [
                float(max(1, count if count >= 0 else len(text or "") / _CHARS_A_TOKEN))
                for text, count in zip(texts, counts, strict=True)
            ]
            prompts = columns.prompt_tokens[i * n]
            self.answered[row] = (float(prompts) if prompts >= 0 else self._chars(row) / _CHARS_A_TOKEN, answers)

    def _chars(self, row: int) -> int:
        return len(self._frame.prompts.texts[row] or "")

    def prompt_tokens(self, rows: Sequence[int]) -> npt.NDArray[np.float64]:
        """Tokens of prompts, by a line through those that were counted."""
        chars = np.array([self._chars(row) for row in self.answered], float)
        tokens = np.array([prompt for prompt, _ in self.answered.values()])
        slope = float(np.polyfit(chars, tokens, 1)[0]) if np.ptp(chars) > 0.1 * chars.mean() else 0.0
        slope = max(0.0, slope)
        wanted = np.array([self._chars(row) for row in rows], float)
        found: npt.NDArray[np.float64] = np.maximum(1.0, tokens.mean() + slope * (wanted - chars.mean()))
        return found


def _few(pool: VLLMPool, count: int) -> VLLMPool:
    """So many endpoints of a pool that are up, evenly chosen."""
    up = [i for i, endpoint in enumerate(pool.endpoints) if pool._status(endpoint) == "up"] or range(pool.size)
    count = min(count, len(up))
    return pool.select([up[i * len(up) // count] for i in range(count)])


# ---- the rest, simulated ------------------------------


def _estimate(
    asked: _Asked,
    rows: Sequence[int],
    policy: BatchPolicy,
    endpoints: int,
    slots: int | None,
    price: tuple[float, float] | None,
) -> Estimate:
    found = calibrate(asked.stats, slots)
    full = found.full or slots is not None
    models = found.models if full else [_with_slots(model, max(model.slots, _SLOTS)) for model in found.models]
    fleet = [models[i % len(models)] for i in range(endpoints)]
    by_rows = any(r.first_row_s is not None for stats in asked.stats for r in stats.requests_log)
    rng = np.random.default_rng(0)
    order = sorted(asked.answered, key=asked._chars)
    answers = [asked.answered[row][1] for row in order]
    prompts = asked.prompt_tokens(rows)

    def world(picked: Sequence[int], most: int, fleet: Sequence[EndpointModel] = fleet) -> tuple[float, float, float]:
        drawn = _Rows([answers[i] for i in picked], prompts, rng)
        return (*_simulated(fleet, drawn, policy, by_rows, most), drawn.tokens)

    slow = 0.0, 0.0, 0.0
    if not rows:
        time_s, requests, tokens = slow
        worlds = np.zeros((1, 3))
    else:
        time_s, requests, tokens = world(range(len(answers)), _SIMULATED)
        draws = [sorted(rng.integers(0, len(answers), len(answers)).tolist()) for _ in range(_WORLDS)]
        worlds = np.array([world(picked, _SIMULATED_FOR_BAND) for picked in draws])
        if not full:  # they may have no more slots than were seen
            few = [found.models[i % len(models)] for i in range(endpoints)]
            slow = world(range(len(answers)), _SIMULATED_FOR_BAND, few)
    off = _MODEL_ERROR + found.error / math.sqrt(max(1, found.requests))
    times = worlds[:, 0] * np.exp(off * rng.standard_normal(len(worlds)))
    prompt_tokens = float(prompts.sum())
    money = money_band = None
    completion_band = _band(worlds[:, 2], tokens)
    if price is not None:
        money, *ends = ((prompt_tokens * price[0] + out * price[1]) / 1e6 for out in (tokens, *completion_band))
        money_band = (ends[0], ends[1])
    return Estimate(
        rows=len(rows),
        sampled=len(asked.answered) + asked.failed,
        failed=asked.failed,
        endpoints=endpoints,
        requests=round(requests),
        prompt_tokens=round(prompt_tokens),
        completion_tokens=round(tokens),
        time_s=time_s,
        time_band=_band(times, time_s, *([slow[0]] if slow[0] else [])),
        completion_band=completion_band,
        slots=max(model.slots for model in models),
        full=full,
        money=money,
        money_band=money_band,
    )


def _with_slots(model: EndpointModel, slots: int) -> EndpointModel:
    """The same endpoint with more slots, at the speed that its pace foretells."""
    pace = pace_of(model)
    alone = model.alone_tokens_per_s or model.tokens_per_s
    return replace(model, slots=slots, tokens_per_s=min(alone, 1 / pace.step(slots)), alone_tokens_per_s=alone)


def _band(values: npt.NDArray[np.float64], *others: float) -> Band:
    """Between these are nine in ten of the values, and the others."""
    low, high = (float(v) for v in np.quantile(values, _BAND))
    return min(low, *others), max(high, *others)


class _Rows:
    """The rows of a run, sorted by their prompts, with answers drawn from those of a sample, which is sorted so, too.

    Attributes
    ----------
    tokens : float
        Of all answers together.
    """

    def __init__(
        self, answers: Sequence[Sequence[float]], prompts: npt.NDArray[np.float64], rng: np.random.Generator
    ) -> None:
        size = len(prompts)
        places = (np.arange(size) + 0.5) / size * len(answers) + rng.uniform(-_NEAR, _NEAR, size)
        self._drawn = np.clip(places.astype(np.int64), 0, len(answers) - 1)
        self._answers, self._prompts = answers, prompts
        self.tokens = float(np.array([sum(each) for each in answers])[self._drawn].sum())

    def __len__(self) -> int:
        return len(self._prompts)

    def some(self, count: int) -> list[tuple[float, float]]:
        """Tokens of prompt and answer, an answer each, of so many rows: evenly chosen, in an order of chance."""
        places = ((np.arange(count) + 0.5) * (len(self) / count)).astype(np.int64)
        np.random.default_rng(0).shuffle(places)
        pairs = zip(self._drawn[places].tolist(), self._prompts[places].tolist(), strict=True)
        # The samples of a row share its prompt.
        return [(prompt / len(self._answers[i]), answer) for i, prompt in pairs for answer in self._answers[i]]


def _simulated(
    fleet: Sequence[EndpointModel], rows: _Rows, policy: BatchPolicy, by_rows: bool, most: int
) -> tuple[float, float]:
    """Seconds and requests. A large run is simulated on a part of its fleet, and where that is not enough, its
    beginning: the rest goes on as the second half of that."""
    size, count = len(rows), len(fleet)
    kept = max(min(count, _LEAST_ENDPOINTS), min(count, count * most // size))
    part = size * kept / count
    some = [fleet[i * count // kept] for i in range(kept)]

    def run(number: int) -> tuple[float, float]:
        plan = play(some, rows.some(number), policy, by_rows=by_rows, draw=random.Random(0).random)
        return plan.time_s, plan.requests

    if part <= most:
        time_s, requests = run(max(1, round(part)))
    else:
        (half_s, half), (whole_s, whole) = run(most // 2), run(most)
        more = (part - most) / (most - most // 2)
        time_s, requests = whole_s + more * (whole_s - half_s), whole + more * (whole - half)
    return time_s, requests * count / kept
