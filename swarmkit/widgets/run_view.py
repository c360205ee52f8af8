"""The state of a run as HTML: totals, endpoints, newest answers and failures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from ..engine.breaker import Breaker
from ..runs.stats import EndpointStats, RunStats
from ..text import plural
from .html import BLUE, GREEN, GREY, ORANGE, RED, SKY, block, cut, dot, esc, faint

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
    """Known rows over time: ``(seconds, rows)`` points, thinned out so that their number is bounded."""

    points: list[tuple[float, int]] = field(default_factory=lambda: [(0.0, 0)])

    def add(self, at_s: float, rows: int) -> None:
        """Add the number of rows known at a time."""
        self.points.append((at_s, rows))
        if len(self.points) > 2 * _POINTS:
            del self.points[1:-1:2]

    def rates(self) -> list[tuple[float, float]]:
        """``(seconds, rows per second)`` over steps of a second or more; at most ``_POINTS`` of them.

        Examples
        --------
        >>> Pace([(0.0, 0), (0.5, 10), (1.0, 20), (3.0, 20)]).rates()
        [(1.0, 20.0), (3.0, 0.0)]
        """
        step = max(1.0, self.points[-1][0] / _POINTS)
        (then, before), found = self.points[0], []
        for at_s, rows in self.points:
            if at_s - then >= step:
                found.append((at_s, (rows - before) / (at_s - then)))
                then, before = at_s, rows
        return found

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
    parts = [_headline(verb, state, stats), _bar(stats)]
    if running and stats.waits:
        parts.append(block(faint(stats.waits)))
    if stats.endpoints:
        parts += [_figures(stats, pace, elapsed_s, running), _curve(pace), _endpoints(stats.endpoints, running)]
    else:
        parts.append(block(faint("probing the endpoints" if running else "nothing was sent")))
    if running:
        parts.append(_answers(newest))
    return block("".join([*parts, _failures(stats.recent_failures)]), "max-width:900px")


def _headline(verb: str, state: str, stats: RunStats) -> str:
    settled = f"{stats.known:,} of {plural(stats.rows, 'row')}"
    apart = faint(", ".join(f"{count:,} {what}" for what, count in stats.apart().items())) if stats.apart() else ""
    failed = f'<b style="color:{RED}">{stats.failed:,} failed</b>' if stats.failed else ""
    return block(" &nbsp; ".join(p for p in (f"<b>{esc(verb)}: {esc(state)}</b>", settled, failed, apart) if p))


def _bar(stats: RunStats) -> str:
    """A bar with the shares of rows that were answered, that need not be asked, and that failed."""
    not_asked = stats.known - stats.answered
    shares = ((BLUE, stats.answered, "answered"), (SKY, not_asked, "not asked"), (RED, stats.failed, "failed"))
    filled = "".join(
        f'<div style="width:{100 * count / stats.rows:.2f}%;background:{colour}" title="{count:,} {what}"></div>'
        for colour, count, what in shares
        if count
    )
    style = "display:flex;height:10px;border-radius:5px;overflow:hidden;background:rgba(128,128,128,.25);margin:3px 0"
    return f'<div style="{style}">{filled}</div>'


def _figures(stats: RunStats, pace: Pace, elapsed_s: float, running: bool) -> str:
    left = stats.rows - stats.known - stats.failed
    rate = pace.recent() if running else stats.answered / elapsed_s if elapsed_s > 0 else 0.0
    parts = [f"{rate:,.1f} rows/s", f"{duration(elapsed_s)} so far" if running else f"in {duration(elapsed_s)}"]
    if running and left and rate > 0:
        parts.append(f"about {duration(left / rate)} left")
    failed = f", {stats.failed_requests:,} failed" if stats.failed_requests else ""
    parts.append(plural(stats.requests, "request") + failed)
    return block(faint(" · ".join(parts)))


def duration(seconds: float) -> str:
    """A number of seconds in readable units.

    Examples
    --------
    >>> duration(8.26), duration(95), duration(3 * 3600 + 120)
    ('8.3 s', '1 min 35 s', '3 h 02 min')
    """
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60:,} h {minutes % 60:02d} min"


def _curve(pace: Pace) -> str:
    """Rows per second over time; nothing as long as there are fewer than three points."""
    rates = pace.rates()
    if len(rates) < 3:
        return ""
    rates = [(0.0, rates[0][1]), *rates]
    width, height = 600, 36
    end, top = rates[-1][0], max(rate for _, rate in rates) or 1.0
    line = " ".join(f"{width * t / end:.1f},{height - 1 - (height - 2) * rate / top:.1f}" for t, rate in rates)
    area = f"0,{height} {line} {width},{height}"
    svg = (
        f'<svg viewBox="0 0 {width} {height}" preserveAspectRatio="none" role="img" aria-label="rows per second" '
        f'style="display:block;width:100%;height:{height}px"><polygon points="{area}" fill="{BLUE}" opacity=".2"/>'
        f'<polyline points="{line}" fill="none" stroke="{BLUE}" stroke-width="1.5" vector-effect="non-scaling-stroke"/>'
        "</svg>"
    )
    return svg + block(faint(f"rows per second, {top:,.1f} at most"), "font-size:11px")


def shown_endpoints(endpoints: Sequence[EndpointStats]) -> list[int]:
    """Indexes of the endpoints with a row of their own, ascending. Those with an open breaker take precedence; those
    that were removed are the last to get one."""
    last = {Breaker.CLOSED: 1, Breaker.REMOVED: 2}
    ranked = sorted(range(len(endpoints)), key=lambda i: (last.get(endpoints[i].breaker, 0), i))
    return sorted(ranked[:MAX_ENDPOINTS])


def _endpoints(endpoints: Sequence[EndpointStats], running: bool) -> str:
    shown = shown_endpoints(endpoints)
    most = max(e.rows for e in endpoints) or 1
    lines = [_endpoint(endpoints[i], most, running) for i in shown]
    if rest := len(endpoints) - len(shown):
        indexes = set(shown)
        others = [e for i, e in enumerate(endpoints) if i not in indexes]
        sums = (sum(getattr(e, number) for e in others) for number in ("rows", "in_flight", "failures"))
        lines.append(_line(faint(f"and {plural(rest, 'other endpoint')}"), "", _numbers(*sums), ""))
    head = _line(faint("endpoint"), "", [*map(faint, ("rows", "in flight" if running else "", "failures"))], "")
    return f'<table style="{_TABLE};width:100%">{head}{"".join(lines)}</table>'


def _endpoint(e: EndpointStats, most: int, running: bool) -> str:
    colour, words = _condition(e, running)
    track = "height:8px;border-radius:4px;background:rgba(128,128,128,.18);min-width:60px"
    fill = f'<div style="height:8px;border-radius:4px;width:{100 * e.rows / most:.1f}%;background:{BLUE}"></div>'
    name = f'{dot(colour, words)} <span title="{esc(e.name)}">{esc(cut(e.name, 40))}</span>'
    bar = f'<div style="{track}">{fill}</div>'
    return _line(name, bar, _numbers(e.rows, e.in_flight, e.failures), faint(words))


def _numbers(rows: int, in_flight: int, failures: int) -> list[str]:
    return [f"{rows:,}", *(f"{number:,}" if number else "" for number in (in_flight, failures))]


def _line(name: str, bar: str, numbers: Sequence[str], words: str) -> str:
    return (
        f'<tr style="background:none"><td style="{_CELL};white-space:nowrap">{name}</td>'
        f'<td style="{_CELL};width:40%">{bar}</td>'
        + "".join(f'<td style="{_NUMBER};white-space:nowrap">{number}</td>' for number in numbers)
        + f'<td style="{_CELL};white-space:nowrap">{words}</td></tr>'
    )


def _condition(e: EndpointStats, running: bool) -> tuple[str, str]:
    """The state of an endpoint as a colour and a text."""
    if e.breaker is Breaker.OUT:
        return RED, "out for this run"
    if e.breaker is Breaker.REMOVED:
        return GREY, "finishing" if e.in_flight else "removed"
    if e.breaker is Breaker.OPEN:
        return ORANGE, "paused after failures"
    if e.breaker is Breaker.HALF_OPEN:
        return ORANGE, "being retried"
    if not running:
        return GREEN, ""
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


def _failures(recent: Iterable[str]) -> str:
    """The last failures, each message once, the newest first."""
    counts = Counter(reversed(list(recent)))
    lines = [
        f'<div style="overflow-wrap:anywhere"><span style="color:{RED}">✖</span> '
        f"{esc(cut(text, 2 * _CHARS))}{faint(f' ({n} times)') if n > 1 else ''}</div>"
        for text, n in list(counts.items())[:_CAUSES]
    ]
    return block(faint("last failures") + "".join(lines), "margin-top:4px") if lines else ""
