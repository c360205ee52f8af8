"""The state of every endpoint, and the capabilities of each family of them: ``swarmkit probe``."""

from __future__ import annotations

import asyncio
import csv
import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from ..client.capabilities import ServerInfo, probe_all, probe_capabilities, require_model
from ..client.chat_template import CannotLearn, learn, understands_batch_chat
from ..client.transport import Transport
from ..errors import EndpointError
from ..pool.capabilities import RouteCapabilities
from ..pool.vllm_pool import VLLMPool
from ..records import RequestSpec
from ..text import plural
from .harmless import cell
from .terminal import clean, text_table

__all__ = ["Family", "Inventory", "take_inventory"]

CAPABILITIES_S = 60.0
"""Seconds for finding out what a server can do: it generates a few tokens for that."""
_MAX_IN_FLIGHT = 64
_NAMES = [field.name for field in fields(RouteCapabilities)]
_DEEP = _NAMES[_NAMES.index("route") + 1 :]  # what a route does


@dataclass(slots=True)
class Family:
    """Endpoints of the same server and models, one of which was asked for all.

    Attributes
    ----------
    server, model : str
        Kind and version of the server; the model that was used.
    endpoints : int
        Number of endpoints.
    asked : str
        Name of the endpoint that was asked.
    lists, rows, batch_chat : bool or None
        Whether it takes many prompts per request, sends rows as they finish, has ``/v1/chat/completions/batch``;
        None if that could not be found out.
    chat_template : str
        "learned", or why not.
    error : str
        Why the capabilities could not be found out.
    """

    server: str
    model: str
    endpoints: int
    asked: str
    lists: bool | None = None
    rows: bool | None = None
    batch_chat: bool | None = None
    chat_template: str = ""
    error: str = ""


@dataclass(frozen=True, slots=True)
class Inventory:
    """The result of a probe: ``endpoints`` in the given order, ``families`` of those that are up; or what their
    ``routes`` do, if that was asked for."""

    endpoints: list[ServerInfo]
    families: list[Family]
    routes: list[RouteCapabilities]

    def count(self, status: str) -> int:
        """Number of endpoints that are "up", "slow" or "down"."""
        return sum(info.status == status for info in self.endpoints)

    def as_dict(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        endpoints = []
        for info in self.endpoints:
            fields = {name: getattr(info, name) for name in ("status", "reason", "models", "context", "latency_s")}
            names = {"endpoint": info.endpoint.name, "url": info.endpoint.url}
            endpoints.append({**names, **fields, "server": _server(info)})
        more = {"capabilities": self.routes} if self.routes else {"families": self.families}
        return {"endpoints": endpoints, **{name: [asdict(each) for each in found] for name, found in more.items()}}

    def csv(self) -> str:
        """What the routes do, if that was asked for, else the endpoints, as CSV."""
        found = [asdict(each) for each in self.routes] or self.as_dict()["endpoints"]
        file = io.StringIO()
        writer = csv.DictWriter(file, list(found[0]))
        writer.writeheader()
        shown = ({**row, "models": " ".join(row["models"])} if "models" in row else row for row in found)
        writer.writerows({k: cell(clean(v)) if isinstance(v, str) else v for k, v in row.items()} for row in shown)
        return file.getvalue()

    def text(self, width: int) -> str:
        """As text, for a terminal of this many characters per line."""
        rows: list[tuple[object, ...]] = []
        for i in self.endpoints:
            latency, served = f"{i.latency_s * 1000:.0f} ms", ", ".join(i.models)
            up = (i.endpoint.name, i.status, latency, i.context or "?", _server(i), served)
            rows.append(up if i.status == "up" else (i.endpoint.name, i.status, i.reason))
        lines = [text_table(rows, ("endpoint", "status", "latency", "context", "server", "models"), width)]
        counts = ", ".join(f"{n:,} {status}" for status in ("up", "slow", "down") if (n := self.count(status)))
        lines += ["", f"{plural(len(rows), 'endpoint')}: {counts}"]
        for f in self.families:
            lines += ["", clean(f"{f.server}, {f.model} ({plural(f.endpoints, 'endpoint')}, {f.asked} was asked)")]
            capabilities = [
                ("many prompts per request", _yes(f.lists)),
                ("rows as they finish", _yes(f.rows)),
                ("chat template", f.chat_template),
                ("batch chat", _yes(f.batch_chat)),
            ]
            shown = [("not known", f.error)] if f.error else capabilities
            lines += [f"  {label:<26}{clean(value)}" for label, value in shown]
        for number in sorted({route.family for route in self.routes}):
            lines += ["", *_family_text([route for route in self.routes if route.family == number], width)]
        models = Counter(name for info in self.endpoints if info.status == "up" for name in info.models)
        if len(models) > 1:
            lines += ["", f"The endpoints serve {len(models)} models, and a run uses one: choose it with --model"]
        return "\n".join(lines)


def _server(info: ServerInfo) -> str:
    return f"{info.kind} {info.version}".strip()


def _yes(value: bool | None) -> str:
    return "yes" if value else "no"


def _family_text(routes: Sequence[RouteCapabilities], width: int) -> list[str]:
    first, *_ = routes
    what = ", ".join(filter(None, (f"{first.server or 'not known'} {first.version or ''}".strip(), first.model)))
    lines = [clean(f"{what} ({plural(first.endpoints, 'endpoint')}, first {first.asked})")]
    if first.route is None:
        return lines
    rows = [(name.replace("_", " "), *(_word(getattr(route, name)) for route in routes)) for name in _DEEP]
    return [*lines, text_table(rows, ("", *(route.route or "" for route in routes)), width)]


def _word(value: object) -> str:
    return "?" if value is None else _yes(value) if isinstance(value, bool) else str(value)


async def take_inventory(pool: VLLMPool, timeout: float, deep: bool = False) -> Inventory:
    """Probe all endpoints of a pool, and find out what one of each family can do, or (``deep``) what each does.

    Parameters
    ----------
    pool : VLLMPool
        A pool with all endpoints, also those that are down. Endpoints without the pool's ``model``, if it has one,
        count as down.
    timeout : float
        Seconds each endpoint has to answer.
    """
    transport = pool._core.transport()
    infos = [require_model(info, pool.model) for info in await probe_all(transport, pool.endpoints, timeout)]
    if deep:
        pool._core.infos.update({info.endpoint.url: info for info in infos})
        return Inventory(infos, [], await pool._capabilities())
    families: dict[tuple[Any, ...], list[ServerInfo]] = {}
    for info in infos:
        if info.status == "up":
            families.setdefault((info.family, info.models), []).append(info)
    gate = asyncio.Semaphore(_MAX_IN_FLIGHT)

    async def one(members: list[ServerInfo]) -> Family:
        info = members[0]
        family = Family(_server(info), pool.model or info.models[0], len(members), info.endpoint.name)
        async with gate:
            try:
                await asyncio.wait_for(_ask(transport, info, family), CAPABILITIES_S)
            except EndpointError as exc:
                family.error = str(exc)
            except TimeoutError:
                family.error = f"no result within {CAPABILITIES_S:.0f} s"
        return family

    return Inventory(infos, list(await asyncio.gather(*map(one, families.values()))), [])


async def _ask(transport: Transport, info: ServerInfo, family: Family) -> None:
    can = await probe_capabilities(transport, info.endpoint, family.model)
    family.lists, family.rows = can.lists, can.rows
    try:
        await learn(transport, info.endpoint, RequestSpec(model=family.model))
        family.chat_template = "learned"
    except CannotLearn as why:
        family.chat_template = f"not learned: {why}"
    family.batch_chat = await understands_batch_chat(transport, info.endpoint, family.model)
