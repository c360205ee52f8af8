"""The state of a run as HTML: totals, endpoints, newest answers and failures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from ..engine.breaker import Breaker
from ..runs.counts import took
from ..runs.notebook import bar_html
from ..runs.progress import shares
from ..runs.stats import EndpointStats, RunStats
from ..text import plural
from .html import BLUE, GREEN, GREY, ORANGE, RED, block, cut, dot, esc, faint, name_cell

__all__ = ["MAX_ENDPOINTS", "Pace", "run_html", "shown_endpoints"]

MAX_ENDPOINTS = 12
"""Endpoints with a row of their own, at most."""
_POINTS = 120
_RECENT_S = 20.0
_CAUSES = 4
_CHARS = 160
_CELL = "padding:1px 12px 1px 0;text-align:left;border:0"
_NUMBER = "padding:1px 12px 1px 0;text-align:right;font-variant-numeric:tabular-nums;border:0"
_TABLE = "border-collapse:collapse;table-layout:auto;border:0;margin:2px 0"


@dataclass
class Pace:
    """Answered rows over time: ``(seconds, rows)`` points, thinned out so that their number is bounded."""

    points: list[tuple[float, int]] = field(default_factory=lambda: [(0.0, 0)])

    def add(self, at_s: float, rows: int) -> None:
        """Add the number of rows that are answered at a time."""
        self.points.append((max(at_s, self.points[-1][0]), rows))
        if len(self.points) > 2 * _POINTS:
            del self.points[1:-1:2]

    def rates(self) -> list[tuple[float, float]]:
        """``(seconds, rows per second)`` over steps of a second or more; at most ``_POINTS`` of them. They cover all of
        the time, so the mean over all of it is not above the largest.

        Examples
        --------
        >>> Pace([(0.0, 0), (0.5, 10), (1.0, 20), (3.0, 20)]).rates()
        [(1.0, 20.0), (3.0, 0.0)]
        """
        step = max(1.0, self.points[-1][0] / _POINTS)
        ends = self.points[:1]
        for point in self.points:
            if point[0] - ends[-1][0] >= step:
                ends.append(point)
        if len(ends) > 1:
            ends[-1] = self.points[-1]
        return [(now, (rows - before) / (now - then)) for (then, before), (now, rows) in pairwise(ends)]

    def recent(self) -> float:
        """Rows per second, over the last ``_RECENT_S`` seconds."""
        now, rows = self.points[-1]
        then, before = next((t, r) for t, r in self.points if t >= now - _RECENT_S)
        if then == now:
            then, before = self.points[0]
        return (rows - before) / (now - then) if now > then else 0.0


def run_html(
    verb: str, state: str, stats: RunStats, pace: Pace, elapsed_s: float, newest: Sequence[tuple[object, str]] = ()
) -> str:
    """The whole view.

    Parameters
    ----------
    verb, state : str
        The run's.
    stats : RunStats
        Its statistics so far.
    pace : Pace
        Its known rows over time.
    elapsed_s : float
        Seconds since it began.
    newest : sequence of (label, text)
        The rows answered last.
    """
    running = state in ("running", "cancelling")
    parts = [_headline(verb, state, stats), bar_html(stats.rows, shares(stats.counts()))]
    if running and stats.waits:
        parts.append(block(faint(stats.waits)))
    if stats.endpoints:
        rate = pace.recent() if running else stats.answered / elapsed_s if elapsed_s > 0 else 0.0
        parts.append(_figures(stats, rate, elapsed_s, running))
        parts += [_curve(pace, rate, stats.noun), _endpoints(stats.endpoints, running)]
    else:
        parts.append(block(faint("probing the endpoints" if running else "nothing was sent")))
    if running:
        parts.append(_answers(newest))
    return block("".join([*parts, _failures(stats, running)]), "max-width:900px")


def _headline(verb: str, state: str, stats: RunStats) -> str:
    parts = [f"<b>{esc(verb)}: {esc(state)}</b>"]
    if stats.rows or state not in ("running", "cancelling"):
        parts.append(f"{stats.known:,} of {plural(stats.rows, stats.noun)}")
    if stats.failed:
        without = faint(f" ({stats.skipped:,} without a prompt)") if stats.skipped else ""
        parts.append(f'<b style="color:{RED}">{stats.failed:,} failed</b>{without}')
    if apart := stats.apart():
        parts.append(faint(", ".join(f"{count:,} {what}" for what, count in apart.items())))
    return block(" &nbsp; ".join(parts))


def _figures(stats: RunStats, rate: float, elapsed_s: float, running: bool) -> str:
    parts = [f"{rate:,.1f} {stats.noun}s/s"]
    if stats.completion_tokens and elapsed_s > 0:
        parts.append(f"{stats.completion_tokens / elapsed_s:,.0f} tokens/s")
    parts.append(f"{took(elapsed_s)} so far" if running else f"in {took(elapsed_s)}")
    if running and stats.answered and rate > 0:
        settled = stats.answered + stats.reused + stats.failed - stats.skipped  # while so many were answered
        if (left_s := stats.counts().left / rate * stats.answered / settled) >= 1.0:
            parts.append(f"about {took(left_s)} left")
    failed = f", {stats.failed_requests:,} of them failed" if stats.failed_requests else ""
    parts.append(plural(stats.requests, "request") + failed)
    return block(faint(" · ".join(parts)))


def _curve(pace: Pace, rate: float, noun: str) -> str:
    """Rows per second over time; nothing as long as there are fewer than three points."""
    rates = pace.rates()
    if len(rates) < 3:
        return ""
    rates = [(0.0, rates[0][1]), *rates]
    width, height = 600, 36
    end, top = rates[-1][0], max(each for _, each in rates) or 1.0
    line = " ".join(f"{width * t / end:.1f},{height - 1 - (height - 2) * each / top:.1f}" for t, each in rates)
    area = f"0,{height} {line} {width},{height}"
    name = f"{noun}s per second"
    svg = (
        f'<svg viewBox="0 0 {width} {height}" preserveAspectRatio="none" role="img" aria-label="{name}" '
        f'style="display:block;width:100%;height:{height}px"><polygon points="{area}" fill="{BLUE}" opacity=".2"/>'
        f'<polyline points="{line}" fill="none" stroke="{BLUE}" stroke-width="1.5" vector-effect="non-scaling-stroke"/>'
        "</svg>"
    )
    return svg + block(faint(f"{name}, {max(top, rate):,.1f} at most"), "font-size:11px")


def shown_endpoints(endpoints: Sequence[EndpointStats]) -> list[int]:
    """Indexes of the endpoints with a row of their own, ascending. Those with an open breaker take precedence; those
    that were removed are the last to get one."""
    last = {Breaker.CLOSED: 1, Breaker.REMOVED: 2}
    ranked = sorted(range(len(endpoints)), key=lambda i: (last.get(endpoints[i].breaker, 0), i))
    return sorted(ranked[:MAX_ENDPOINTS])


def _endpoints(endpoints: Sequence[EndpointStats], running: bool) -> str:
    """A row an endpoint; no columns of numbers that are all 0."""
    columns = {"rows": "rows", "in flight": "in_flight", "failures": "failures"}
    columns = {name: field for name, field in columns.items() if any(getattr(e, field) for e in endpoints)}
    shown = shown_endpoints(endpoints)
    most = max(e.rows for e in endpoints) or 1
    lines = []
    for e in (endpoints[i] for i in shown):
        colour, words = _condition(e, running)
        name = f'<span style="display:flex;gap:6px;min-width:0">{dot(colour, words)} {name_cell(e.name)}</span>'
        numbers = [getattr(e, field) for field in columns.values()]
        lines.append(_line(name, _share(e.rows / most), [f"{n:,}" if n else "" for n in numbers], faint(words)))
    if rest := len(endpoints) - len(shown):
        others = [endpoints[i] for i in sorted(set(range(len(endpoints))).difference(shown))]
        sums = [sum(getattr(e, field) for e in others) for field in columns.values()]
        lines.append(
            _line(faint(f"and {plural(rest, 'other endpoint')}"), "", [f"{n:,}" if n else "" for n in sums], "")
        )
    head = _line(faint("endpoint"), "", [*map(faint, columns)], "")
    return f'<table style="{_TABLE};width:100%">{head}{"".join(lines)}</table>'


def _share(share: float) -> str:
    track = "height:8px;border-radius:4px;background:rgba(128,128,128,.18);min-width:60px"
    fill = f'<div style="height:8px;border-radius:4px;width:{100 * share:.1f}%;background:{BLUE}"></div>'
    return f'<div style="{track}">{fill}</div>'


def _line(name: str, bar: str, numbers: Sequence[str], words: str) -> str:
    return (
        f'<tr style="background:none"><td style="{_CELL};max-width:320px">{name}</td>'
        f'<td style="{_CELL};width:40%">{bar}</td>'
        + "".join(f'<td style="{_NUMBER};white-space:nowrap">{number}</td>' for number in numbers)
        + f'<td style="{_CELL};white-space:nowrap">{words}</td></tr>'
    )


def _condition(e: EndpointStats, running: bool) -> tuple[str, str]:
    """The state of an endpoint as a colour and a text. After the end none is paused, or about to be retried."""
    if e.breaker is Breaker.OUT:
        return RED, "out for this run"
    if e.breaker is Breaker.REMOVED:
        return GREY, "finishing" if running and e.in_flight else "removed"
    if not running:
        return (GREEN if e.rows else GREY), ""
    if e.breaker is Breaker.OPEN:
        return ORANGE, "paused after failures"
    if e.breaker is Breaker.HALF_OPEN:
        return ORANGE, "being retried"
    return (BLUE, "working") if e.in_flight else (GREY, "idle")


def _answers(newest: Sequence[tuple[object, str]]) -> str:
    lines = [
        f'<tr style="background:none"><td style="{_CELL};white-space:nowrap">{faint(cut(str(label), 40))}</td>'
        f'<td style="{_CELL};overflow-wrap:anywhere">{esc(cut(text, _CHARS))}</td></tr>'
        for label, text in reversed(newest)
    ]
    if not lines:
        return ""
    return block(faint("newest answers"), "margin-top:4px") + f'<table style="{_TABLE}">{"".join(lines)}</table>'


def _failures(stats: RunStats, running: bool) -> str:
    """The last failures, each message once, the newest first."""
    counts = Counter(reversed(list(stats.recent_failures)))
    lines = [
        f'<div style="overflow-wrap:anywhere"><span style="color:{RED}">✖</span> '
        f"{esc(cut(text, 2 * _CHARS))}{faint(f' ({n} times)') if n > 1 else ''}</div>"
        for text, n in list(counts.items())[:_CAUSES]
    ]
    if not lines:
        return ""
    all_answered = stats.known == stats.rows and not running
    said = f"{plural(stats.failed_requests, 'request')} failed, all {stats.noun}s answered"
    return block(faint(said if all_answered else "last failures") + "".join(lines), "margin-top:4px")
