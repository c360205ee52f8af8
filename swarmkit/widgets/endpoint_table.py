"""The picker's table: which endpoints are on a page, and the HTML of its rows."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence

from ..client.capabilities import ServerInfo
from ..client.hostfile import AgentEndpoint
from ..client.metrics import Load
from ..text import plural
from .html import BLUE, GREEN, GREY, ORANGE, RED, block, cell, dot, esc, faint, name_cell

__all__ = [
    "SIZE",
    "SORTED_BY",
    "header_html",
    "in_order",
    "matching",
    "page_of",
    "row_html",
    "status_html",
    "table_html",
    "tag_options",
]

SIZE = 20
"""Rows per page."""
SORTED_BY = ("address", "model", "tags", "health", "probe")
"""What the table can be sorted by. Not by requests running and waiting, which are asked for on a page only."""
_MOST_TAGS = 200
_GRID = (
    "display:grid;grid-template-columns:16px minmax(124px,2.4fr) minmax(0,2fr) minmax(0,1.6fr) minmax(0,1.2fr)"
    " 64px 58px 58px;column-gap:10px;align-items:center"
)
_RIGHT = "text-align:right;font-variant-numeric:tabular-nums"
_COLOURS = {"up": GREEN, "slow": ORANGE, "down": RED}
_HEALTH = ("up", "slow", "down", "not probed")

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


def in_order(indexes: Sequence[int], endpoints: Sequence[AgentEndpoint], infos: Infos, by: str) -> list[int]:
    """Indexes of endpoints, sorted by a column; what is not known comes last. "" keeps their order."""

    def key(index: int) -> tuple[object, ...]:
        endpoint = endpoints[index]
        info = infos.get(endpoint.url)
        match by:
            case "address":
                return (_natural(endpoint.name),)
            case "tags":
                return not endpoint.tags, [_natural(tag) for tag in _tags(endpoint)]
            case "model":
                return not _models(info), _models(info)
            case "health":
                return (_HEALTH.index(info.status if info else "not probed"),)
            case _:
                return not (info and info.status == "up"), info.latency_s if info else 0.0

    return sorted(indexes, key=key) if by else list(indexes)


def _natural(text: str) -> list[tuple[int, str]]:
    """A key by which node2 is before node10."""
    return [(int(part) if part.isdecimal() else -1, part) for part in re.split(r"(\d+)", text)]


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


def header_html(by: str = "") -> str:
    """The row with the names of the columns, and a mark at that by which the table is sorted."""
    right = ("probe", "running", "waiting")
    names = ("", "address", "model", "tags", "does", *right)
    marked = "" if by == "health" else by
    cells = [cell(f"{n} ▴" if n and n == marked else n, _RIGHT if n in right else "") for n in names]
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
    return block(mark + name_cell(endpoint.name) + what + tags + cell(does, "opacity:.65") + numbers, _GRID)


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
    if not matches:
        parts.append(faint("no endpoint matches"))
    elif matches != len(endpoints):
        parts.append(faint(f"{matches:,} shown"))
    if asked:
        parts.append(faint(f"probing: {answered:,} of {asked:,}"))
    if problem:
        parts.append(f'<span style="color:{RED}">{esc(problem)}</span>')
    return block(" &nbsp; ".join(parts))


def _healthiest(item: tuple[str, int]) -> int:
    return _HEALTH.index(item[0])


def table_html(status: str, by: str, rows: Sequence[tuple[bool, str]], note: str) -> str:
    """The table as it stays in a saved notebook: its rows, and whether they are selected."""
    mark = f'<span style="color:{BLUE}" title="selected">☑</span>', '<span style="opacity:.5">☐</span>'
    lines = [("", header_html(by)), *((mark[0 if selected else 1], row) for selected, row in rows)]
    parts = '<div style="flex:0 0 16px">{}</div><div style="flex:1 1 0;min-width:0">{}</div>'
    table = "".join(f'<div style="display:flex;gap:6px">{parts.format(*line)}</div>' for line in lines)
    below = block(faint(note)) if note else ""
    return f'{status}<div style="overflow:auto hidden"><div style="min-width:560px">{table}</div></div>{below}'
