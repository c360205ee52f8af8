"""The route to each server of a pool: what is learned of its family, and the route plan that follows from it.

All of it is optional: what cannot be learned is done without, by the route that needs no such knowledge, and the plan's
note says so. Only parameters that a server refuses end a call before its first row.
"""

from __future__ import annotations

import asyncio
import contextlib
import operator
from collections.abc import Awaitable, Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

from ..client.aiohttp_transport import Bounds
from ..client.capabilities import LITELLM, Capabilities, ServerInfo, probe, probe_capabilities
from ..client.chat_template import FOR_CHATS, TEMPLATE_FIELDS, ChatTemplate, understands_batch_chat
from ..client.hostfile import AgentEndpoint
from ..client.text_routes import has_route, why_no_text
from ..client.thinking import find_switch, writes_marks
from ..client.tokenizer import Tokenizer
from ..client.transport import SMALL_REPLY, Transport
from ..errors import EndpointError, NoEndpointsError, SettingError
from ..records import Chat, Failure, FailureKind, RequestSpec, Route
from ..runs.stats import BARE
from ..text import none_of
from .embedding import embedding_plan
from .learning import first_answer
from .parameters import Trial
from .route_plan import RoutePlan, joined
from .templates import family_template

__all__ = ["LOOK_S", "Family", "Router"]

T = TypeVar("T")

LOOK_S = 20.0
"""Seconds for one request that only asks what a server can do."""

_HEALTH_S = 3.0


@dataclass(frozen=True, slots=True)
class Family:
    """Servers that are taken to be alike: what one of them can do, all can.

    Attributes
    ----------
    name : tuple of str
        What findings about them are remembered by; empty where nothing is known of them.
    members : sequence of AgentEndpoint
        Those of this pool.
    """

    name: tuple[str, ...]
    members: Sequence[AgentEndpoint]


class Router:
    """Finds the routes to the endpoints of a pool. One server of each family is probed for all of its family.

    Parameters
    ----------
    endpoints : sequence of AgentEndpoint
        The pool's.
    transport : Transport
        The pool's HTTP client.
    infos : mapping of str to ServerInfo
        Findings about endpoints, by URL; added to.
    memo : mapping
        Findings about families, by family and question; added to.
    facts : mapping, optional
        What the servers are said to be like, by field of ``Capabilities``: it is not asked for.
    tries : bool, default True
        Whether the parameters are tried, so that a refusal is an error.
    """

    def __init__(
        self,
        endpoints: Sequence[AgentEndpoint],
        transport: Transport,
        infos: MutableMapping[str, ServerInfo],
        memo: MutableMapping[Any, Any],
        facts: Mapping[str, Any] | None = None,
        tries: bool = True,
    ) -> None:
        self.endpoints = endpoints
        self.transport = transport
        self.infos = infos
        self.memo = memo
        self._facts = facts or {}
        self._tries = tries

    async def known(self, model: str = "") -> list[ServerInfo]:
        """Findings about this pool's endpoints. If there are none yet, the first endpoint that answers is taken for
        all: a pool made without ``connect`` is assumed to have servers of one kind.

        Returns
        -------
        list of ServerInfo
            Empty where the model's name is known, and the endpoints are too busy to say more.

        Raises
        ------
        NoEndpointsError
            No endpoint answers.
        """
        infos = self.infos
        if not any(e.url in infos for e in self.endpoints):

            async def look(endpoint: AgentEndpoint) -> ServerInfo:
                info = await probe(self.transport, endpoint, model=model or None)
                if info.status == "up":
                    return info
                kind = FailureKind.HANG if info.status == "slow" else FailureKind.CONNECT
                raise EndpointError(Failure(kind, info.reason, endpoint.name))

            try:
                found = await first_answer(self.endpoints, look)
            except EndpointError as exc:
                if model and exc.failure.kind is FailureKind.HANG:
                    return []
                last = f"{exc.failure.endpoint}: {exc.failure.message}"
                raise NoEndpointsError(
                    f"{none_of(len(self.endpoints), 'endpoint')} answers; the last one tried was {last}"
                ) from exc
            for endpoint in self.endpoints:
                infos[endpoint.url] = replace(found, endpoint=endpoint)
        return [infos[e.url] for e in self.endpoints if e.url in infos]

    async def plans(self, spec: RequestSpec, texts: Sequence[str] = ()) -> list[RoutePlan]:
        """The route plan of every endpoint, by index; ``texts`` are some of the prompts.

        Raises
        ------
        NoEndpointsError
            No endpoint answers.
        SettingError
            A server refuses a parameter.
        """
        if _needs_servers(spec):
            infos = await self.known(spec.model)
        else:
            infos = [self.infos[e.url] for e in self.endpoints if e.url in self.infos]
        members: dict[tuple[str, ...], list[AgentEndpoint]] = {}
        for info in infos:
            if info.status == "up":
                members.setdefault(info.family, []).append(info.endpoint)
        if not members:  # nothing is known of any: the route that needs no knowledge
            plan = await self._checked_plan(Family((), self.endpoints), spec, texts)
            return [plan] * len(self.endpoints)
        families = [Family(name, endpoints) for name, endpoints in members.items()]
        made = await asyncio.gather(*(self._plan(family, spec, texts) for family in families))
        # An endpoint that has not answered yet gets the route of most of the others.
        usual = made[max(range(len(families)), key=lambda i: len(families[i].members))]
        plan_of = {e.url: plan for family, plan in zip(families, made, strict=True) for e in family.members}
        return [plan_of.get(e.url, usual) for e in self.endpoints]

    async def with_first_tokens(self, plans: Sequence[RoutePlan], spec: RequestSpec) -> list[RoutePlan]:
        """The plans of a template made by hand, which know whether it begins with the model's first tokens. Where no
        server tokenizes, the server's own default holds, as for prompts without a template."""
        by_hand = _by_hand(spec.chat)
        if by_hand is None:
            return list(plans)
        text = RoutePlan(Route.COMPLETIONS, by_hand).wrap(["Hi"])[0]
        found, _ = await self.look(
            ("first tokens", spec.model, text),
            self.endpoints,
            lambda e: Tokenizer(self.transport, e, spec.model, LOOK_S).has_first_tokens(text),
        )
        return [replace(plan, first_tokens=bool(found)) for plan in plans]

    async def _plan(self, family: Family, spec: RequestSpec, texts: Sequence[str]) -> RoutePlan:
        async def marked() -> bool:
            if spec.kind == "embeddings" or not self._facts.get("template", True):
                return False
            found, _ = await self.look(
                (*family.name, spec.model, "marks"),
                family.members,
                lambda e: writes_marks(self.transport, e, spec.model, LOOK_S),
            )
            return bool(found) and spec.chat == "auto"

        plan = self._checked_plan(family, spec, texts)
        found, health, marks = await asyncio.gather(plan, self._health(family), marked())
        return replace(found, health=health, marked=marks)

    async def _checked_plan(self, family: Family, spec: RequestSpec, texts: Sequence[str]) -> RoutePlan:
        refused = self.memo.setdefault((*family.name, spec.model, "refused"), {})
        if spec.kind == "embeddings":
            return replace(await embedding_plan(self, family, spec), refused=refused)
        known = family.name or self._facts
        plan = await self._planned(family, spec, texts) if known else _default_plan(spec)
        return await self.checked(replace(plan, refused=refused), family, spec)

    async def switch(self, spec: RequestSpec) -> dict[str, Any]:
        """The fields of a chat that make the model think as ``spec.thinking`` says.

        Raises
        ------
        SettingError
            The template has no such switch, or no server says how it renders chats.
        """
        thinking = spec.thinking
        assert thinking is not None
        found, unknown = await self.look(
            (spec.model, "switch", thinking),
            self.endpoints,
            lambda e: find_switch(self.transport, e, spec.model, thinking, LOOK_S),
            lambda found: found is None,
        )
        if found is None:
            why = unknown or "the prompt is the same with it and without it"
            raise SettingError(
                f"thinking={thinking!r}: the chat template of {spec.model} has no switch for that ({why}). If it has "
                "one under another name, give it as extra_body={'chat_template_kwargs': {...}}"
            )
        return found

    async def check_prefix(self, model: str) -> None:
        """Check that the servers go on with an answer that has begun.

        Raises
        ------
        SettingError
            They do not, or do not say.
        """
        acts, unknown = await self.look(
            (model, "goes on"),
            self.endpoints,
            lambda e: Tokenizer(self.transport, e, model, LOOK_S).goes_on(),
            operator.not_,
        )
        if not acts:
            why = unknown or "they end the words as an answer of their own, and begin another one"
            raise SettingError(
                f"assistant_prefix=: the servers of {model} do not go on with an answer that has begun ({why}). Ask "
                "for these words in the prompt instead"
            )

    async def _planned(self, family: Family, spec: RequestSpec, texts: Sequence[str]) -> RoutePlan:
        """The plan of a family's servers, in either mode. Where they have no chats prompts can only be sent as they
        are."""
        can = await self._can(family, spec) if spec.mode == "batch" else None

        async def planned(spec: RequestSpec) -> RoutePlan:
            plan = await self._learned(family, spec, texts, can) if can else _default_plan(spec)
            return replace(plan, omit=plan.omit | self._facts.get("omit", frozenset()))

        found = await planned(spec)
        there = self._facts.get("chats")
        unlisted = any(e.url in self.infos and self.infos[e.url].reason for e in family.members)
        if found.route is Route.CHAT and there is None and (unlisted or (can and can.lists)):
            there, _ = await self.look(
                (*family.name, spec.model, "chats"),
                family.members,
                lambda e: has_route(self.transport, e, Route.CHAT, spec.model, LOOK_S),
                operator.not_,
            )
        if found.route is not Route.CHAT or there is not False:
            return found
        if turns := _turns(spec):
            raise SettingError(
                f"{turns[0]} needs chats, and the servers of {spec.model} have none: write it into the prompt instead"
            )
        found = await planned(replace(spec, chat=None))
        return replace(found, note=joined(BARE, found.note))

    async def _can(self, family: Family, spec: RequestSpec) -> Capabilities:
        """What the servers of a family can do: as it is said, else as it was learned.

        Raises
        ------
        SettingError
            They answer no prompt.
        """
        facts, transport = self._facts, self.transport
        if {"lists", "rows", "streams"} <= facts.keys():
            return Capabilities(**facts)
        learned = await self.look(
            (*family.name, spec.model, "can"),
            family.members,
            lambda e: probe_capabilities(transport, e, spec.model, LOOK_S),
            _lacks_some,
        )
        found, unknown = learned
        if found and not found.lists:
            silent, _ = await self.look(
                (*family.name, spec.model, "no text"),
                family.members,
                lambda e: why_no_text(transport, e, spec.model, LOOK_S),
                bool,
            )
            if silent:
                raise SettingError(silent)
        not_known = f"whether it takes lists of prompts is not known: {unknown}"
        return replace(found or Capabilities(False, False, False, note=not_known), **facts)

    async def _learned(self, family: Family, spec: RequestSpec, texts: Sequence[str], can: Capabilities) -> RoutePlan:
        """The plan that follows from what the servers of a family can do."""
        proven = can.streams and "streams" not in self._facts
        wanted = {"rows": can.streams, "batch": not can.whole, "auto": can.rows or not can.whole}[spec.delivery]
        rows = wanted and can.streams and can.lists
        # Only streams count the tokens of each row at no cost.
        either = rows and can.whole and spec.delivery == "auto" and not (spec.details or spec.counted)
        how: dict[str, Any] = {"lists": can.lists, "rows": rows, "either": either, "proven": proven}
        if spec.chat != "auto":
            return RoutePlan(Route.COMPLETIONS, _by_hand(spec.chat), note=can.note, omit=can.omit, **how)
        note, given = can.note, [name for name in FOR_CHATS if name in spec.params]
        if given:
            note = joined(f"for {', '.join(given)}", note)
        elif can.lists and can.template and not spec.conversations:  # one template has room for one prompt
            template, why = await family_template(self, family, spec, texts, LOOK_S)
            note = joined(why, can.note)
            if template is not None:
                omit = can.omit | set(TEMPLATE_FIELDS)  # they are in the template
                return RoutePlan(Route.COMPLETIONS, template, note=note, omit=omit, **how)
        # Batches of chats ignore tools.
        if spec.n == 1 and can.template and not {"tools", "tool_choice"}.intersection(given):
            batch_chat, _ = await self.look(
                (*family.name, spec.model, "batch chat"),
                family.members,
                lambda e: understands_batch_chat(self.transport, e, spec.model, LOOK_S),
                operator.not_,
            )
            if batch_chat:
                return RoutePlan(Route.CHAT_BATCH, lists=True, note=note)
        return RoutePlan(Route.CHAT, note=note)

    async def look(
        self,
        key: tuple[Any, ...],
        members: Sequence[AgentEndpoint],
        look: Callable[[AgentEndpoint], Awaitable[T]],
        poor: Callable[[T], bool] = lambda found: False,
    ) -> tuple[T | None, str]:
        """What ``look`` finds at one of a family's servers, remembered for the next run; or None, and why.

        A ``poor`` finding makes runs slow, and one refusal may be chance. So it holds only if another server of the
        family, or the only one again, says the same.
        """
        if key not in self.memo:
            try:
                found = await self.first(members, look)
                if poor(found):
                    found = await self.first(members, look, again=True)
            except EndpointError as exc:
                return None, exc.failure.describe()
            self.memo[key] = found
        remembered: T = self.memo[key]
        return remembered, ""

    async def first(
        self, members: Sequence[AgentEndpoint], look: Callable[[AgentEndpoint], Awaitable[T]], again: bool = False
    ) -> T:
        """What ``look`` finds at the first of some servers that answers. The one that has just answered is asked first,
        since another may be stuck; the last with ``again``."""

        async def noted(endpoint: AgentEndpoint) -> T:
            found = await look(endpoint)
            self.memo["the last to answer"] = endpoint
            return found

        last = self.memo.get("the last to answer")
        return await first_answer(sorted(members, key=lambda e: (e == last) == again), noted)

    async def _health(self, family: Family) -> Literal["unknown", "well", "never"]:
        """What ``/health`` is worth at a family's servers."""
        if LITELLM in family.name[:1] or not self._facts.get("health", True):
            return "never"
        key = (*family.name, "health")
        if key not in self.memo:

            async def look(endpoint: AgentEndpoint) -> bool:
                with contextlib.suppress(EndpointError):
                    limits = Bounds(SMALL_REPLY, _HEALTH_S)
                    answer = await self.transport.ask(endpoint, "/health", timeout=_HEALTH_S, limits=limits)
                    self.memo[key] = "never" if b"healthy_endpoints" in answer.data else "well"  # LiteLLM's own words
                return key in self.memo

            await asyncio.gather(*map(look, family.members[:3]))
        found: Literal["unknown", "well", "never"] = self.memo.get(key, "unknown")
        return found

    async def checked(self, plan: RoutePlan, family: Family, spec: RequestSpec) -> RoutePlan:
        """The plan, less the fields that the servers want left out, once its parameters were tried (``parameters.py``).

        Raises
        ------
        SettingError
            The server refuses a parameter.
        """
        trial = Trial(self.transport, plan, spec, bool(family.name), LOOK_S)
        if not (self._tries and trial.key):
            return plan
        key = (*family.name, spec.model, *trial.key)
        found, unknown = await self.look(key, family.members, trial.at, lambda found: isinstance(found, Failure))
        if isinstance(found, Failure):
            del self.memo[key]
            raise SettingError(found.message)
        if found is None:
            return replace(plan, note=joined(plan.note, f"parameters could not be tried: {unknown}"))
        return replace(plan, omit=plan.omit | found) if found else plan


def _turns(spec: RequestSpec) -> list[str]:
    """What is asked for that only chats can have."""
    kwargs = "chat_template_kwargs" in spec.params
    given = {"system=": spec.system is not None, "messages=": spec.conversations, "examples=": spec.examples,
             "assistant_prefix=": spec.assistant_prefix is not None, "chat_template_kwargs": kwargs}  # fmt: skip
    return [name for name, is_given in given.items() if is_given]


def _needs_servers(spec: RequestSpec) -> bool:
    return spec.mode == "batch" and (spec.chat == "auto" or spec.delivery == "auto")


def _lacks_some(can: Capabilities) -> bool:
    return not (can.lists and can.rows)


def _default_plan(spec: RequestSpec) -> RoutePlan:
    """The route plan that needs no knowledge of the servers."""
    if spec.chat == "auto":
        return RoutePlan(Route.CHAT, note="one chat a prompt")
    lists = spec.mode == "batch"
    return RoutePlan(Route.COMPLETIONS, _by_hand(spec.chat), lists=lists, rows=lists and spec.delivery == "rows")


def _by_hand(chat: Chat) -> ChatTemplate | Callable[[str], str] | None:
    if isinstance(chat, tuple):
        return ChatTemplate(*chat)
    return chat if callable(chat) else None
