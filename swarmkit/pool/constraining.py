"""Where the servers hold the model to a schema: the route of each endpoint, and the words it heeds.

Several routes take a constraint and ignore it, and of two servers of one version only one may be launched so. So every
endpoint is asked itself, on the very route, for what no model would say unless it had to (``client/constraints.py``).
A finding that makes runs slow or loose needs to be seen twice; one that says nothing is asked for again in the next
run.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from dataclasses import replace
from typing import Any

from ..client.capabilities import without_refused
from ..client.constraints import PROBES, UNCONSTRAINED, Dialect, fields_of
from ..client.error_replies import Malformed
from ..client.hostfile import AgentEndpoint
from ..client.open_files import sockets
from ..client.transport import Transport
from ..errors import EndpointError
from ..records import FailureKind, Reply, RequestSpec, Route
from ..schema import Schema
from .learning import first_answer
from .route_plan import RoutePlan, joined
from .routing import LOOK_S, Family, Router

__all__ = ["Probe", "at_each", "constrained", "filled"]

_OTHERS_S = 5.0  # for the other endpoints, once one has shown what it heeds
_PATIENCE_S = 60.0  # for that one
_SILENT_S = 60.0  # in which an endpoint that showed nothing is not asked again
_TOKENS = {Route.COMPLETIONS: 24}  # that an answer may have
_MOST_TOKENS = 512  # ... on chat routes, where a model may think first
_NOT_KNOWN = "whether the answers are constrained is not known: they are checked here"
_SWITCHES = ("chat_template_kwargs",)  # parameters that change whether a constraint acts


async def constrained(router: Router, plans: Sequence[RoutePlan], spec: RequestSpec, schema: Schema) -> list[RoutePlan]:
    """The plans with which the answers are held to the schema, by endpoint, where that was seen to act.

    Raises
    ------
    SettingError
        A server that constrains answers refuses this schema.
    """
    probe, kind = Probe(router.transport, router.memo, spec), next(iter(schema.constraint))
    found = await at_each(router, plans, lambda endpoint, plan: probe.acting(endpoint, plan, kind))
    return await _checked(router, filled(plans, found), spec, schema)


async def at_each(
    router: Router, plans: Sequence[RoutePlan], ask: Callable[[AgentEndpoint, RoutePlan], Awaitable[RoutePlan]]
) -> list[RoutePlan | None]:
    """The plans that ``ask`` makes of those of all endpoints, which are asked side by side; None for those that do not
    answer, or not soon after the first."""
    endpoints, memo = router.endpoints, router.memo
    gate = asyncio.Semaphore(max(1, sockets() // 2))
    loop = asyncio.get_running_loop()

    def is_silent(endpoint: AgentEndpoint) -> bool:
        until: float = memo.get((endpoint.url, "silent until"), 0.0)
        return loop.time() < until

    all_silent = all(map(is_silent, endpoints))

    async def acting(endpoint: AgentEndpoint, plan: RoutePlan) -> RoutePlan | None:
        if is_silent(endpoint) and not all_silent:
            return None  # not each frame of a stream waits for an endpoint that hangs
        try:
            async with gate:
                return await first_answer([endpoint], lambda e: ask(e, plan))
        except EndpointError:
            return None
        except asyncio.CancelledError:
            memo[endpoint.url, "silent until"] = loop.time() + _SILENT_S
            raise

    tasks = [loop.create_task(acting(e, p)) for e, p in zip(endpoints, plans, strict=True)]
    try:
        done, left = await asyncio.wait(tasks, timeout=_OTHERS_S)
        if left and not any(task.result() for task in done):  # all are busy, or slow
            await asyncio.wait(left, timeout=_PATIENCE_S, return_when=asyncio.FIRST_COMPLETED)
        return [task.result() if task.done() else None for task in tasks]
    finally:
        for task in tasks:
            task.cancel()


def filled(plans: Sequence[RoutePlan], found: Sequence[RoutePlan | None], unknown: str = _NOT_KNOWN) -> list[RoutePlan]:
    """The plans that were found; an endpoint that could not be asked gets that of most of its like. Where some act with
    many prompts a request and others only with one, the latter keep their route: they would slow the whole run."""
    like: dict[RoutePlan, Counter[RoutePlan]] = {}
    for plan, acts in zip(plans, found, strict=True):
        if acts is not None:
            like.setdefault(plan, Counter())[acts] += 1
    lists = any(acts is not None and acts.lists for acts in found)
    filled = []
    for plan, acts in zip(plans, found, strict=True):
        if acts is None:
            acts = like[plan].most_common(1)[0][0] if plan in like else _noted(plan, unknown)
        filled.append(_noted(plan, UNCONSTRAINED) if lists and plan.lists and not acts.lists else acts)
    return filled


async def _checked(router: Router, plans: Sequence[RoutePlan], spec: RequestSpec, schema: Schema) -> list[RoutePlan]:
    """The plans, after each that constrains was shown the schema itself at the endpoints that have it."""
    checked = {}
    for plan in dict.fromkeys(plan for plan in plans if plan.dialect is not None):
        members = [e for e, p in zip(router.endpoints, plans, strict=True) if p == plan]
        given = replace(spec, params={**spec.params, **(plan.constraint(schema) or {})})
        checked[plan] = await router.checked(plan, Family(("at", members[0].url), members), given)
    return [checked.get(plan, plan) for plan in plans]


def _noted(plan: RoutePlan, note: str) -> RoutePlan:
    return replace(plan, note=joined(plan.note, note))


class Probe:
    """Asks endpoints for what no model would say by itself."""

    def __init__(self, transport: Transport, memo: MutableMapping[Any, Any], spec: RequestSpec) -> None:
        self._transport = transport
        self._memo = memo
        self._spec = spec
        self._switches = {name: spec.params[name] for name in _SWITCHES if name in spec.params}

    async def acting(self, endpoint: AgentEndpoint, plan: RoutePlan, kind: str) -> RoutePlan:
        """The first way to constrain answers so that acts at an endpoint; else the plan itself."""
        routes = [plan]
        if self._spec.chat == "auto" and plan.route is not Route.CHAT:
            chat = plan.as_chat()
            batch = [replace(chat, route=Route.CHAT_BATCH, lists=True)] if plan.route is Route.COMPLETIONS else []
            routes += [*batch, chat]
        for route in [*routes, plan]:  # its own route once more, since one answer may be chance
            if (dialect := await self.dialect(endpoint, route, kind)) is not None:
                return _noted(replace(route, dialect=dialect), f"constrained by {dialect}")
        return _noted(plan, UNCONSTRAINED)

    async def dialect(self, endpoint: AgentEndpoint, plan: RoutePlan, kind: str) -> Dialect | None:
        """The first field that acts on a route."""
        for dialect in Dialect:
            if await self._acts(endpoint, plan, dialect, kind):
                return dialect
        return None

    def is_known(self, endpoint: AgentEndpoint, plan: RoutePlan, kind: str) -> bool:
        """Whether an answer has shown of each field whether it acts on a route."""
        there = [dialect for dialect in Dialect if fields_of(dialect, PROBES[kind][0])]
        return all(self._key(endpoint, plan, dialect, kind) in self._memo for dialect in there)

    def _key(self, endpoint: AgentEndpoint, plan: RoutePlan, dialect: Dialect, kind: str) -> tuple[Any, ...]:
        return (endpoint.url, self._spec.model, plan.route, dialect, kind, str(self._switches))

    async def _acts(self, endpoint: AgentEndpoint, plan: RoutePlan, dialect: Dialect, kind: str) -> bool:
        """Whether a server answers as no model would unless it had to.

        Raises ``EndpointError`` where it failed for a reason that says nothing about that.
        """
        wanted, is_met = PROBES[kind]
        fields = fields_of(dialect, wanted)
        if fields is None:
            return False
        key = self._key(endpoint, plan, dialect, kind)
        misses: int | None = self._memo.get(key)  # how often it did not act; 0 where it does
        if misses is not None and misses != 1:
            return misses == 0
        try:
            reply = await self._ask(endpoint, plan, {"temperature": 0, **self._switches, **fields})
        except Malformed:
            return False
        except EndpointError as exc:
            failed, status = exc.failure.kind, exc.failure.status
            if failed is FailureKind.SERVER:  # some say so to fields that they do not know
                return False
            if failed is not FailureKind.REJECTED and status not in (404, 405):
                raise
            reply = None
        met = reply is not None and is_met(reply.text)
        if met or reply is None or reply.text:  # else it may still have been thinking
            self._memo[key] = 0 if met else (misses or 0) + 1
        return met

    async def _ask(self, endpoint: AgentEndpoint, plan: RoutePlan, params: dict[str, Any]) -> Reply:
        spec = RequestSpec(model=self._spec.model, system=self._spec.system, params=params)

        async def ask(omit: frozenset[str]) -> list[Reply]:
            most = _TOKENS.get(plan.route, _MOST_TOKENS)
            return await plan.ask(self._transport, endpoint, spec, max_tokens=most, omit=omit, timeout=LOOK_S)

        return (await without_refused(ask, ("temperature",)))[0][0]
