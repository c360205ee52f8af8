"""Models of endpoints from the requests of a small real run.

The requests are played again, from the times at which they were sent, on servers with a pace (``pace.py``), and the
numbers of the pace are fitted by least squares (Gauss-Newton), until first tokens, first rows and ends come when they
did. The number of slots is tried out. Where requests are all alike, several paces fit as well: then the smallest part
that fits is given to latency, prompts and neighbours, and the largest number of slots is taken.
"""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median

import numpy as np

from ..errors import SettingError
from ..runs.stats import RequestRecord, RunStats
from .models import EndpointModel
from .pace import Pace, PacedServer

__all__ = ["Calibration", "calibrate"]

_GROUPS = 16  # lengths that the answers of one request are taken to have, at most
_PIECES = 1_500  # such groups of answers that are played again of one endpoint, at most
_ENDPOINTS = 8  # endpoints whose requests are fitted; for the others their speed is found beside these
_CHUNK = 2_048  # prompt tokens that vLLM reads in a step, by default: then the first rows get their first tokens
_WEIGHTS = np.array([0.5, 0.15, 1.0])  # of the first token, the first row (which answer that is is a guess), the end
_OUTLIER = 0.15  # of a request's time: what is off by more counts less
# How much it counts against a pace that neighbours, prompts, or the latency are all of the time. Latency is little.
_PRIOR = np.array([0.0, 0.04, 0.04, 0.2])
_AS_GOOD = 1.1  # errors up to this ratio are equal
# Rows waited for slots if the errors would be so many times as large without, and that many requests were compared.
_CLEARLY = 1.5
_ENOUGH = 4
_LEAST_STEP_S = 1e-7
_GOLDEN = 0.6180339887498949

_Groups = list[tuple[float, int]]
"""Tokens of answers, and how many have so many."""


@dataclass(frozen=True, slots=True)
class _Request:
    """A request to be played again: when it was sent, its answers as (tokens, how many), the tokens of its prompts, and
    when its first token and its first row came, and its end; not a number where that is not known."""

    start_s: float
    answers: _Groups
    prompt_tokens: float
    seen: tuple[float, float, float]

    @property
    def size(self) -> int:
        return sum(count for _, count in self.answers)


@dataclass(frozen=True, slots=True)
class Calibration:
    """Models of endpoints, and how well they fit.

    Attributes
    ----------
    models : list of EndpointModel
        One for each endpoint that answered.
    full : bool
        Whether rows were seen to wait for slots; otherwise slots are as many as there were rows at once.
    error : float
        Of the time of a request, relative: the root of the mean square.
    requests : int
        Requests that were compared.
    """

    models: list[EndpointModel]
    full: bool
    error: float
    requests: int


def calibrate(runs: Sequence[RunStats], slots: int | None = None) -> Calibration:
    """Models of the endpoints of some runs; see ``EndpointModel.from_stats``."""
    found: dict[str, list[list[_Request]]] = defaultdict(list)  # by endpoint, a list for each run
    for stats in runs:
        for name, requests in _requests(stats).items():
            found[name].append(requests)
    if not found:
        raise SettingError(f"no plan from {runs[-1]!r}: it needs answered rows whose tokens were counted")
    chosen = sorted(found, key=lambda name: -sum(map(len, found[name])))[:_ENDPOINTS]
    plays = [_Play(found[name]) for name in chosen]
    pace, full, scales = _best(plays, slots)
    errors = np.concatenate([p.errors(pace, f)[2::3] for p, f in zip(plays, scales, strict=True)])
    known = dict(zip(chosen, scales, strict=True))
    models = [_model(pace, known[n] if n in known else _Play(found[n]).scale(pace)) for n in found]
    errors = errors[~np.isnan(errors)]
    error = float(np.sqrt(np.mean(np.minimum(errors**2, 1.0)))) if len(errors) else 1.0
    return Calibration(models, full, error, len(errors))


def _requests(stats: RunStats) -> dict[str, list[_Request]]:
    """The requests of a run that can be played again, by endpoint, in the order in which they were sent."""
    usual = stats.tokens_an_answer
    if not usual:
        return {}
    lengths = [answer for _, answer in stats.lengths] or [round(usual)]
    span = min(lengths) / usual, max(lengths) / usual
    long_first = _go_together(stats.lengths)
    prompts = [prompt for prompt, _ in stats.lengths if prompt > 0]
    prompt = sum(prompts) / len(prompts) if prompts else 0.0
    found: dict[str, list[_Request]] = defaultdict(list)
    for r in sorted(stats.requests_log, key=lambda r: r.start_s):
        if r.rows and r.end_s > r.start_s and (r.failure is None or r.failure == "dropped"):
            found[r.endpoint].append(_request(r, stats.samples, usual, prompt, span, long_first))
    return {name: requests for name, requests in found.items() if any(r.seen[2] == r.seen[2] for r in requests)}


def _go_together(lengths: Sequence[tuple[int, int]]) -> bool:
    """Whether long prompts have long answers. Long prompts are sent first."""
    prompts, answers = np.array(lengths, float).reshape(-1, 2).T
    if len(prompts) < _GROUPS or not prompts.std() or not answers.std():
        return False
    return bool(np.corrcoef(prompts, answers)[0, 1] > 0.5)


def _request(
    r: RequestRecord, samples: int, usual: float, prompt: float, span: tuple[float, float], long_first: bool
) -> _Request:
    count = r.rows * samples
    whole = r.failure is None and r.completion_tokens
    mean = r.completion_tokens / count if whole else usual
    ends = (r.shortest, r.longest) if whole and r.longest else (mean * span[0], mean * span[1])
    seen = (r.first_token_s, r.first_row_s, r.end_s) if whole else (None, None, None)
    times = [math.nan if at is None else at for at in seen]
    tokens = r.prompt_tokens if whole and r.prompt_tokens else prompt * r.rows
    return _Request(
        r.start_s if r.posted_s is None else r.posted_s,
        _profile(count, mean, ends[0], ends[1], long_first),
        tokens,
        (times[0], times[1], times[2]),
    )


def _profile(count: int, mean: float, shortest: float, longest: float, long_first: bool = False) -> _Groups:
    """So many answers with this mean, from the shortest to the longest, in some order: of all curves that have these
    three, a power of the rank."""
    if count == 1 or longest - shortest < 0.05 * mean or not shortest < mean < longest:
        return [(mean, count)]
    bend = (longest - mean) / (mean - shortest)
    parts = min(_GROUPS, count)
    curve = [shortest + (longest - shortest) * (i / (parts - 1)) ** bend for i in range(parts)]
    sizes = [count * (i + 1) // parts - count * i // parts for i in range(parts)]
    groups = list(zip(curve, sizes, strict=True))
    if long_first:
        return groups[::-1]
    return [groups[i] for i in sorted(range(parts), key=lambda i: i * _GOLDEN % 1)]


# ---- the requests of one endpoint, played again ------------------------------


class _Play:
    """The requests of one endpoint in some runs."""

    def __init__(self, runs: Sequence[Sequence[_Request]]) -> None:
        self.runs = [_some(run, _PIECES // len(runs)) for run in runs]
        requests = [r for run in self.runs for r in run]
        self.requests = requests
        took = [r.seen[2] - r.start_s for r in requests if r.seen[2] == r.seen[2]]
        self.typical_s = median(took) if took else 1.0
        self._norm = np.array([max(r.seen[2] - r.start_s, self.typical_s / 10) for r in requests])
        self._seen = np.array([r.seen for r in requests])
        self.at_once = max(map(_at_once, self.runs))

    def errors(self, pace: Pace, scale: float = 1.0) -> np.ndarray:
        """What first tokens, first rows and ends are off, as parts of a request's time; not a number where unknown."""
        played = np.array([times for run in self.runs for times in _replay(run, _scaled(pace, scale))])
        seen = self._seen
        early, late = played[:, 0], played[:, 1]  # between these the first token comes
        token = np.where(seen[:, 0] < early, early - seen[:, 0], np.where(seen[:, 0] > late, late - seen[:, 0], 0.0))
        token[np.isnan(seen[:, 0])] = np.nan
        off = np.column_stack([token, played[:, 2] - seen[:, 1], played[:, 3] - seen[:, 2]])
        errors: np.ndarray = (off / self._norm[:, None]).ravel()
        return errors

    def scale(self, pace: Pace) -> float:
        """How much slower this endpoint is than the pace."""
        scale = 1.0
        for _ in range(3):
            ratios = 1.0 - self.errors(pace, scale)[2::3]
            scale *= float(np.clip(np.nanmedian(ratios), 0.2, 5.0))
        return scale


def _some(requests: Sequence[_Request], most: int) -> list[_Request]:
    """The first requests, with so many groups of answers together at most."""
    found, pieces = [], 0
    for request in requests:
        found.append(request)
        pieces += len(request.answers)
        if pieces >= most:
            break
    return found


def _at_once(requests: Sequence[_Request]) -> int:
    """Most answers in flight at a time."""
    moves = [(r.start_s, 1, r.size) for r in requests]
    # What is sent as one ends comes after it.
    moves += [(r.seen[2] - 0.01 * (r.seen[2] - r.start_s), 0, -r.size) for r in requests if r.seen[2] == r.seen[2]]
    most = now = 0
    for _, _, change in sorted(moves):
        now += change
        most = max(most, now)
    return most


def _scaled(pace: Pace, by: float) -> Pace:
    times = (pace.step_s, pace.row_s, pace.prefill_s, pace.latency_s)
    return Pace(pace.slots, *(t * by for t in times))


def _replay(requests: Sequence[_Request], pace: Pace) -> list[tuple[float, float, float, float]]:
    """When each request gets its first token (at the earliest, and at the latest), its first row, and ends."""
    server = PacedServer(pace=pace)
    times = [[math.nan] * 4 for _ in requests]
    left = [r.size for r in requests]
    waiting: deque[tuple[int, float, int]] = deque()  # request, tokens, answers
    coming = deque((r.start_s + pace.latency_s, i) for i, r in enumerate(requests))
    while coming or server.busy:
        now = min(coming[0][0] if coming else math.inf, server.next_at())
        server.advance(now)
        if coming and coming[0][0] <= now:
            _, i = coming.popleft()
            waiting.extend((i, tokens, count) for tokens, count in requests[i].answers)
        else:
            i, rows = server.pop()
            server.running[i] -= len(rows)
            server.busy -= len(rows)
            left[i] -= len(rows)
            if math.isnan(times[i][2]):
                times[i][2] = now
            if not left[i]:
                times[i][3] = now
                del server.running[i]
        _fill(server, requests, waiting, times)
    return [(t[0], t[1], t[2], t[3]) for t in times]


def _fill(
    server: PacedServer, requests: Sequence[_Request], waiting: deque[tuple[int, float, int]], times: list[list[float]]
) -> None:
    """Put waiting answers into free slots."""
    before = server.reading_s
    new: dict[int, float] = {}  # requests whose first answers begin now, and the tokens of their prompts
    while waiting and (free := server.slots - server.busy):
        i, tokens, count = waiting.popleft()
        if count > free:
            waiting.appendleft((i, tokens, count - free))
            count = free
        read = requests[i].prompt_tokens * count / requests[i].size
        if i in new or math.isnan(times[i][0]):
            new[i] = new.get(i, 0.0) + read
            times[i][0] = 0.0
        server.begin(i, range(count), server.clock + tokens, read)
    step = server.pace.step(server.busy) if server.busy else 0.0
    for i, read in new.items():
        times[i][0] = server.at + before + server.pace.prefill_s * min(read, _CHUNK) + step
        before += server.pace.prefill_s * read
        times[i][1] = server.at + (before if read <= _CHUNK else server.reading_s) + step


# ---- the fit ------------------------------


def _best(plays: Sequence[_Play], slots: int | None) -> tuple[Pace, bool, list[float]]:
    """The pace that fits best, whether its slots were seen to be full, and how much slower each endpoint is."""
    most = max(play.at_once for play in plays)
    if slots is not None:
        tried = [_fit(plays, slots, None)]
    else:
        sizes = [most, *(2**k for k in range(most.bit_length()) if most / 64 < 2**k < 0.9 * most)]
        tried = []
        for size in sorted(sizes, reverse=True):
            tried.append(_fit(plays, size, tried[-1][1] if tried else None))
        near = min(tried, key=lambda fit: fit[0])[1]
        if near.slots < most:
            finer = {round(near.slots * by) for by in (0.7, 0.8, 0.9, 1.12, 1.25, 1.4)} - {near.slots}
            tried += [_fit(plays, size, near) for size in finer if 1 <= size < most]
    least = min(error for error, _, _ in tried)
    if slots is None and (tried[0][0] < _CLEARLY * least or sum(len(play.requests) for play in plays) < _ENOUGH):
        tried = tried[:1]  # which is that of as many slots as there were rows at once
    else:
        tried = [fit for fit in tried if fit[0] <= _AS_GOOD * least + 1e-9]
    _, pace, scales = max(tried, key=lambda fit: fit[1].slots)
    return pace, pace.slots < most, scales


def _fit(plays: Sequence[_Play], slots: int, start: Pace | None) -> tuple[float, Pace, list[float]]:
    """The pace with so many slots that fits best: its error, itself, and how much slower each endpoint is."""
    units = _units(plays)
    pace = replace(start, slots=slots) if start else Pace(slots, units[0])
    scales = [1.0] * len(plays)
    for round_ in range(2 if len(plays) > 1 else 1):
        if round_ or (start and len(plays) > 1):
            scales = [play.scale(pace) for play in plays]
        pace, error = _gauss_newton(plays, scales, pace, units)
    return error, pace, scales


def _units(plays: Sequence[_Play]) -> np.ndarray:
    """For each number of a pace: what it would be, if it were the reason of all of a request's time."""
    requests = [r for play in plays for r in play.requests]
    typical = median(play.typical_s for play in plays)
    longest = sum(max(tokens for tokens, _ in r.answers) for r in requests) / len(requests)
    answers = sum(tokens * count for r in requests for tokens, count in r.answers) / len(requests)
    prompts = sum(r.prompt_tokens for r in requests) / len(requests)
    parts = (longest, answers, prompts, 1.0)
    return np.array([typical / part if part else 0.0 for part in parts])


def _gauss_newton(plays: Sequence[_Play], scales: Sequence[float], pace: Pace, units: np.ndarray) -> tuple[Pace, float]:
    """Least squares for ``step_s``, ``row_s``, ``prefill_s`` and ``latency_s``, none of which is below 0."""

    def errors(values: np.ndarray) -> np.ndarray:
        tried = Pace(pace.slots, max(_LEAST_STEP_S, float(values[0])), *map(float, values[1:]))
        parts = [play.errors(tried, scale) for play, scale in zip(plays, scales, strict=True)]
        found: np.ndarray = np.concatenate(parts)
        return found

    usable = [j for j in range(4) if units[j] > 0]
    values = np.array([pace.step_s, pace.row_s, pace.prefill_s, pace.latency_s])
    off = errors(values)
    known = ~np.isnan(off)
    base = np.tile(_WEIGHTS, len(off) // 3)[known]
    best, cost = values, math.inf
    for _ in range(8):
        weights = base / np.sqrt(np.maximum(1.0, np.abs(off[known]) / _OUTLIER))
        prior = _PRIOR * math.sqrt(base @ base) * values / np.where(units > 0, units, 1.0)
        now = float(np.sum((weights * off[known]) ** 2) + prior @ prior)
        if now < cost:
            best, improved, cost = values, cost - now, now
            if improved < 1e-4 * now or now < 1e-18:
                break
        slopes = np.zeros((int(known.sum()), 4))
        for j in usable:
            step = max(0.03 * values[j], 0.01 * units[j])
            moved = values.copy()
            moved[j] += step
            slopes[:, j] = (errors(moved)[known] - off[known]) / step
        aim = _solve(slopes * weights[:, None], weights * (slopes @ values - off[known]), units, usable, base)
        values = aim if now <= cost else (best + aim) / 2
        off = errors(values)
    rest = errors(best)[known]
    error = math.sqrt(float(np.sum((base * np.clip(rest, -1, 1)) ** 2) / np.sum(base**2)))
    return Pace(pace.slots, max(_LEAST_STEP_S, float(best[0])), *map(float, best[1:])), error


def _solve(slopes: np.ndarray, aims: np.ndarray, units: np.ndarray, usable: list[int], base: np.ndarray) -> np.ndarray:
    """Least squares with the prior, none of the values below 0: what would be below is left out, one by one."""
    free = list(usable)
    strengths = _PRIOR * math.sqrt(base @ base)
    while True:
        rows = [np.array([strengths[j] if j == k else 0.0 for k in free]) for j in free if j]
        part = np.vstack([slopes[:, free] * units[free], *rows]) if rows else slopes[:, free] * units[free]
        found = np.linalg.lstsq(part, np.concatenate([aims, np.zeros(len(rows))]), rcond=None)[0]
        if found.min() >= 0 or len(free) == 1:
            values = np.zeros(4)
            values[free] = np.maximum(found, 0.0) * units[free]
            return values
        free.pop(int(found.argmin()))


def _model(pace: Pace, scale: float) -> EndpointModel:
    pace = _scaled(pace, scale)
    alone, full = pace.step(1), pace.step(pace.slots)
    return EndpointModel(
        pace.slots,
        1 / full,
        pace.latency_s,
        1 / pace.prefill_s if pace.prefill_s > 0 else math.inf,
        alone_tokens_per_s=1 / alone if full > alone * 1.000001 else None,
    )
