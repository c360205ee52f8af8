"""The picker's table: which endpoints are on a page, and the HTML of its rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from ..client.capabilities import ServerInfo
from ..client.hostfile import AgentEndpoint
from ..client.metrics import Load
from ..text import plural
from .html import GREEN, GREY, ORANGE, RED, block, cell, dot, esc, faint

__all__ = ["SIZE", "header_html", "matching", "page_of", "row_html", "status_html", "tag_options"]

SIZE = 20
"""Rows per page."""
_MOST_TAGS = 200
_GRID = (
    "display:grid;grid-template-columns:16px minmax(0,2.4fr) minmax(0,2fr) minmax(0,1.6fr) minmax(0,1.2fr)"
    " 64px 58px 58px;column-gap:10px;align-items:center"
)
_RIGHT = "text-align:right;font-variant-numeric:tabular-nums"
_COLOURS = {"up": GREEN, "slow": ORANGE, "down": RED}

Infos = Mapping[str, ServerInfo]
"""The results of the last probe, by URL."""


def matching(endpoints: Sequence[AgentEndpoint], infos: Infos, text: str, tag: str) -> list[int]:
    """Indexes of the endpoints with a tag (any, if "") and with every word of a text in address, tags or models."""
    words = text.lower().split()
    found = []
    for index, endpoint in enumerate(endpoints):
        if tag and tag not in _tags(endpoint):
            continue
        if words:
            info = infos.get(endpoint.url)
            there = " ".join([endpoint.name, *_tags(endpoint), *(info.models if info else ())]).lower()
            if not all(word in there for word in words):
                continue
        found.append(index)
    return found


def page_of(matches: Sequence[int], page: int) -> tuple[Sequence[int], int, int]:
    """The content of a page (counted from 1; the nearest existing one), its number, and the number of pages.

    Examples
    --------
    >>> page_of(range(45), 9)
    (range(40, 45), 3, 3)
    """
    pages = max(1, -(-len(matches) // SIZE))
    page = min(max(1, page), pages)
    return matches[(page - 1) * SIZE : page * SIZE], page, pages


def tag_options(endpoints: Sequence[AgentEndpoint]) -> list[tuple[str, str]]:
    """Labels and values of the tag filter: all tags, or the most common ones if there are too many."""
    counts = Counter(tag for endpoint in endpoints for tag in _tags(endpoint))
    common = sorted(tag for tag, _ in counts.most_common(_MOST_TAGS))
    return [("any tag", ""), *((f"{tag} ({counts[tag]:,})", tag) for tag in common)]


def _tags(endpoint: AgentEndpoint) -> list[str]:
    return [f"{key}={value}" for key, value in endpoint.tags.items()]


def header_html() -> str:
    """The row with the names of the columns."""
    right = ("probe", "running", "waiting")
    cells = [cell(name, _RIGHT if name in right else "") for name in ("", "address", "model", "tags", "does", *right)]
    return block("".join(cells), f"{_GRID};opacity:.65;border-bottom:1px solid rgba(128,128,128,.4)")


def row_html(endpoint: AgentEndpoint, info: ServerInfo | None, load: Load | None, does: str = "") -> str:
    """The row of one endpoint: health, address, models (or why it is not usable), tags, what it does, latency,
    requests."""
    status = info.status if info else "not probed"
    mark = dot(_COLOURS.get(status, GREY), f"{status}: {info.reason}" if info and info.reason else status)
    what = cell(info.reason, f"color:{_COLOURS[info.status]}") if info and info.reason else cell(_models(info))
    latency = f"{info.latency_s * 1000:,.0f} ms" if info and info.status == "up" else "–"
    running, waiting = (f"{n:,}" for n in load) if load else ("–", "–")
    numbers = "".join(cell(text, _RIGHT) for text in (latency, running, waiting))
    tags = cell(" ".join(_tags(endpoint)), "opacity:.65")
    return block(mark + cell(endpoint.name) + what + tags + cell(does, "opacity:.65") + numbers, _GRID)


def _models(info: ServerInfo | None) -> str:
    return ", ".join(info.models) if info else ""


def status_html(
    endpoints: Sequence[AgentEndpoint],
    infos: Infos,
    selected: int,
    matches: int,
    asked: int,
    answered: int,
    problem: str,
) -> str:
    """How many endpoints are selected, match the filter and are healthy; the progress of a probe, or its error."""
    counts = Counter(infos[e.url].status if e.url in infos else "not probed" for e in endpoints)
    health = [f"{dot(_COLOURS.get(s, GREY), s)} {n:,} {s}" for s, n in sorted(counts.items(), key=_healthiest)]
    parts = [f"<b>{selected:,} of {plural(len(endpoints), 'endpoint')} selected</b>", *health]
    if matches != len(endpoints):
        parts.append(faint(f"{matches:,} shown"))
    if asked:
        parts.append(faint(f"probing: {answered:,} of {asked:,}"))
    if problem:
        parts.append(f'<span style="color:{RED}">{esc(problem)}</span>')
    return block(" &nbsp; ".join(parts))


def _healthiest(item: tuple[str, int]) -> int:
    return ("up", "slow", "down", "not probed").index(item[0])
