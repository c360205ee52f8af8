"""What every endpoint of a swarm is, and what each family of them can do: ``swarmkit probe``."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from .chat import CannotLearn, learn, understands_batch_chat
from .errors import EndpointError
from .probe import ServerInfo, judged, probe_all, probe_capabilities
from .tables import clean, text_table
from .transport import Transport
from .vllm_pool import VLLMPool

__all__ = ["Family", "Survey", "survey"]

LOOK_S = 60.0
"""Seconds a server is given to show what it can do: it generates a few tokens for that."""
_LOOKS_AT_ONCE = 64


@dataclass(slots=True)
class Family:
    """Endpoints that behave alike, so that one of them was asked for all.

    Attributes
    ----------
    server, model : str
        Kind and version; the model they were asked for.
    endpoints : int
        How many they are.
    asked : str
        The one that was asked.
    lists, rows, batch_chat : bool or None
        Many prompts a request; rows as they finish; ``/v1/chat/completions/batch``. None if it did not say.
    chat_template : str
        "learned", or why not.
    error : str
        Why it could not be found out.
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
class Survey:
    """What was found: ``endpoints`` in the order given, ``families`` of those that are up."""

    endpoints: list[ServerInfo]
    families: list[Family]

    def count(self, status: str) -> int:
        """How many endpoints are "up", "slow" or "down"."""
        return sum(info.status == status for info in self.endpoints)

    def as_dict(self) -> dict[str, Any]:
        """The same for JSON."""
        endpoints = []
        for info in self.endpoints:
            fields = {name: getattr(info, name) for name in ("status", "reason", "models", "context", "latency_s")}
            names = {"endpoint": info.endpoint.name, "url": info.endpoint.url}
            endpoints.append({**names, **fields, "server": _server(info)})
        return {"endpoints": endpoints, "families": [asdict(family) for family in self.families]}

    def text(self, width: int) -> str:
        """The same for a terminal of so many characters."""
        rows: list[tuple[object, ...]] = []
        for i in self.endpoints:
            latency, served = f"{i.latency_s * 1000:.0f} ms", ", ".join(i.models)
            up = (i.endpoint.name, i.status, latency, i.context or "?", _server(i), served)
            rows.append(up if i.status == "up" else (i.endpoint.name, i.status, i.reason))
        lines = [text_table(rows, ("endpoint", "status", "latency", "context", "server", "models"), width)]
        counts = ", ".join(f"{n:,} {status}" for status in ("up", "slow", "down") if (n := self.count(status)))
        lines += ["", f"{len(rows):,} endpoint{'s' * (len(rows) != 1)}: {counts}"]
        for f in self.families:
            lines += ["", clean(f"{f.server}, {f.model} ({f.endpoints:,} like this, {f.asked} was asked)")]
            said = [
                ("many prompts a request", _yes(f.lists)),
                ("rows as they finish", _yes(f.rows)),
                ("chat template", f.chat_template),
                ("batch chat", _yes(f.batch_chat)),
            ]
            lines += [
                f"  {label:<24}{clean(value)}" for label, value in ([("not known", f.error)] if f.error else said)
            ]
        models = Counter(name for info in self.endpoints if info.status == "up" for name in info.models)
        if len(models) > 1:
            lines += ["", f"They serve {len(models)} models, and a run needs one: say which with --model"]
        return "\n".join(lines)


def _server(info: ServerInfo) -> str:
    return f"{info.kind} {info.version}".strip()


def _yes(value: bool | None) -> str:
    return "yes" if value else "no"


async def survey(pool: VLLMPool, timeout: float) -> Survey:
    """Probe all endpoints of a pool, and find out what one of each family can do.

    Parameters
    ----------
    pool : VLLMPool
        Made by hand; ``connect`` would have left out what is down. Endpoints without its ``model``, if it has
        one, count as down.
    timeout : float
        Seconds an endpoint is given to say what it is.
    """
    transport = pool._core.transport()
    infos = [judged(info, pool.model) for info in await probe_all(transport, pool.endpoints, timeout)]
    families: dict[tuple[Any, ...], list[ServerInfo]] = {}
    for info in infos:
        if info.status == "up":
            families.setdefault((info.family, info.models), []).append(info)
    gate = asyncio.Semaphore(_LOOKS_AT_ONCE)

    async def one(members: list[ServerInfo]) -> Family:
        info = members[0]
        family = Family(_server(info), pool.model or info.models[0], len(members), info.endpoint.name)
        async with gate:
            try:
                await asyncio.wait_for(_ask(transport, info, family), LOOK_S)
            except EndpointError as exc:
                family.error = str(exc)
            except TimeoutError:
                family.error = f"it did not show within {LOOK_S:.0f} s what it can do"
        return family

    return Survey(infos, list(await asyncio.gather(*map(one, families.values()))))


async def _ask(transport: Transport, info: ServerInfo, family: Family) -> None:
    can = await probe_capabilities(transport, info.endpoint, family.model)
    family.lists, family.rows = can.lists, can.rows
    try:
        await learn(transport, info.endpoint, family.model)
        family.chat_template = "learned"
    except CannotLearn as why:
        family.chat_template = f"not learned: {why}"
    family.batch_chat = await understands_batch_chat(transport, info.endpoint, family.model)
