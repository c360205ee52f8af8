"""A run as a picture: its totals, its endpoints, what it says and what goes wrong, as HTML made of values."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from ..markup import plural
from ..policy import Breaker
from ..stats import EndpointStats, RunStats
from .pieces import BLUE, GREEN, GREY, ORANGE, RED, SKY, block, cut, dot, esc, faint

__all__ = ["LANES", "Pace", "lanes_of", "scene_html"]

LANES = 12
"""Endpoints that get a line of their own, at most."""
_POINTS = 120
_RECENT_S = 20.0
_CAUSES = 4
_CHARS = 160
_CELL = "padding:1px 12px 1px 0;text-align:left;border:0"
_NUMBER = "padding:1px 12px 1px 0;text-align:right;font-variant-numeric:tabular-nums;border:0"
_TABLE = "border-collapse:collapse;table-layout:auto;border:0;margin:2px 0"


@dataclass
class Pace:
    """Rows known over time: ``(seconds, rows)`` points, so few that a run of days can be drawn."""

    points: list[tuple[float, int]] = field(default_factory=lambda: [(0.0, 0)])

    def add(self, at_s: float, rows: int) -> None:
        """Note how many rows are known by now."""
        self.points.append((at_s, rows))
        if len(self.points) > 2 * _POINTS:
            del self.points[1:-1:2]

    def rates(self) -> list[tuple[float, float]]:
        """``(seconds, rows a second)`` over steps of a second or more, ``_POINTS`` of them at most.

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
        """Rows a second, lately."""
        now, rows = self.points[-1]
        then, before = next((t, r) for t, r in self.points if t >= now - _RECENT_S)
        if then == now:
            then, before = self.points[0]
        return (rows - before) / (now - then) if now > then else 0.0


def scene_html(
    verb: str, state: str, stats: RunStats, pace: Pace, elapsed_s: float, newest: Sequence[tuple[object, str]] = ()
) -> str:
    """All of it.

    Parameters
    ----------
    verb, state : str
        Of the run.
    stats : RunStats
        What it has cost so far.
    pace : Pace
        How it went.
    elapsed_s : float
        Seconds since it began.
    newest : sequence of (label, text)
        The rows answered last.
    """
    going = state in ("running", "cancelling")
    parts = [_headline(verb, state, stats), _bar(stats)]
    if stats.endpoints:
        parts += [_figures(stats, pace, elapsed_s, going), _curve(pace), _lanes(stats.endpoints, going)]
    else:
        parts.append(block(faint("asking the endpoints what they can do" if going else "nothing was asked")))
    if going:
        parts.append(_answers(newest))
    return block("".join([*parts, _failures(stats.recent_failures)]), "max-width:900px")


def _headline(verb: str, state: str, stats: RunStats) -> str:
    settled = f"{stats.known:,} of {plural(stats.rows, 'row')}"
    reused = faint(f"{stats.reused:,} not asked: stored, or the same as another") if stats.reused else ""
    failed = f'<b style="color:{RED}">{stats.failed:,} failed</b>' if stats.failed else ""
    return block(" &nbsp; ".join(p for p in (f"<b>{esc(verb)}: {esc(state)}</b>", settled, failed, reused) if p))


def _bar(stats: RunStats) -> str:
    """Answered, reused and failed, of all."""
    shares = ((BLUE, stats.answered, "answered"), (SKY, stats.reused, "not asked"), (RED, stats.failed, "failed"))
    filled = "".join(
        f'<div style="width:{100 * count / stats.rows:.2f}%;background:{colour}" title="{count:,} {what}"></div>'
        for colour, count, what in shares
        if count
    )
    style = "display:flex;height:10px;border-radius:5px;overflow:hidden;background:rgba(128,128,128,.25);margin:3px 0"
    return f'<div style="{style}">{filled}</div>'


def _figures(stats: RunStats, pace: Pace, elapsed_s: float, going: bool) -> str:
    left = stats.rows - stats.known - stats.failed
    rate = pace.recent() if going else stats.known / elapsed_s if elapsed_s > 0 else 0.0
    said = [f"{rate:,.1f} rows/s", f"{duration(elapsed_s)} so far" if going else f"in {duration(elapsed_s)}"]
    if going and left and rate > 0:
        said.append(f"about {duration(left / rate)} left")
    failed = f", {stats.failed_requests:,} failed" if stats.failed_requests else ""
    said.append(plural(stats.requests, "request") + failed)
    return block(faint(" · ".join(said)))


def duration(seconds: float) -> str:
    """Seconds as people say them.

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
    """Rows a second over time; nothing before there is a line to draw."""
    rates = pace.rates()
    if len(rates) < 3:
        return ""
    rates = [(0.0, rates[0][1]), *rates]
    width, height = 600, 36
    end, top = rates[-1][0], max(rate for _, rate in rates) or 1.0
    line = " ".join(f"{width * t / end:.1f},{height - 1 - (height - 2) * rate / top:.1f}" for t, rate in rates)
    area = f"0,{height} {line} {width},{height}"
    svg = (
        f'<svg viewBox="0 0 {width} {height}" preserveAspectRatio="none" role="img" aria-label="rows a second" '
        f'style="display:block;width:100%;height:{height}px"><polygon points="{area}" fill="{BLUE}" opacity=".2"/>'
        f'<polyline points="{line}" fill="none" stroke="{BLUE}" stroke-width="1.5" vector-effect="non-scaling-stroke"/>'
        "</svg>"
    )
    return svg + block(faint(f"rows a second, {top:,.1f} at the most"), "font-size:11px")


def lanes_of(endpoints: Sequence[EndpointStats]) -> list[int]:
    """Indexes of the endpoints that get a line: those in trouble before the others, all in their own order."""
    ranked = sorted(range(len(endpoints)), key=lambda i: (endpoints[i].breaker is Breaker.CLOSED, i))
    return sorted(ranked[:LANES])


def _lanes(endpoints: Sequence[EndpointStats], going: bool) -> str:
    shown = lanes_of(endpoints)
    most = max(e.rows for e in endpoints) or 1
    lines = [_lane(endpoints[i], most, going) for i in shown]
    if rest := len(endpoints) - len(shown):
        told = set(shown)
        others = [e for i, e in enumerate(endpoints) if i not in told]
        sums = (sum(getattr(e, number) for e in others) for number in ("rows", "in_flight", "failures"))
        lines.append(_line(faint(f"and {plural(rest, 'other endpoint')}"), "", _numbers(*sums), ""))
    head = _line(faint("endpoint"), "", [*map(faint, ("rows", "in flight" if going else "", "failures"))], "")
    return f'<table style="{_TABLE};width:100%">{head}{"".join(lines)}</table>'


def _lane(e: EndpointStats, most: int, going: bool) -> str:
    colour, words = _condition(e, going)
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


def _condition(e: EndpointStats, going: bool) -> tuple[str, str]:
    """Colour and words for the state of an endpoint."""
    if e.breaker is Breaker.OUT:
        return RED, "out for this run"
    if e.breaker is Breaker.OPEN:
        return ORANGE, "resting after faults"
    if e.breaker is Breaker.HALF_OPEN:
        return ORANGE, "on trial again"
    if not going:
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
    """What went wrong last, each once, the newest first."""
    counts = Counter(reversed(list(recent)))
    lines = [
        f'<div style="overflow-wrap:anywhere"><span style="color:{RED}">✖</span> '
        f"{esc(cut(text, 2 * _CHARS))}{faint(f' ({n} times)') if n > 1 else ''}</div>"
        for text, n in list(counts.items())[:_CAUSES]
    ]
    return block(faint("what went wrong last") + "".join(lines), "margin-top:4px") if lines else ""
