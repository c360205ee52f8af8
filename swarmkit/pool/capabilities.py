"""What the servers of a pool really do, route by route, each found by trying it: ``pool.capabilities()``.

Servers of one version differ by how they were launched, and many take a parameter and ignore it. So every endpoint is
asked itself, on each of its routes, and those that behave alike in all are a family. What could not be found out is
None, and is asked again the next time; all else is remembered.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from ..client.capabilities import ServerInfo, probe_capabilities, without_refused
from ..client.chat_template import CannotLearn, ChatTemplate, learn
from ..client.constraints import PROBES, Dialect, fields_of
from ..client.error_replies import Malformed
from ..client.open_files import sockets
from ..client.thinking import find_switch, opens, without_thoughts
from ..client.transport import Transport
from ..client.wire import encode, path_of
from ..errors import EndpointError
from ..records import FailureKind, Reply, RequestSpec, Route
from .constraining import Probe
from .learning import first_answer
from .route_plan import RoutePlan
from .routing import LOOK_S

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["RouteCapabilities", "find_capabilities", "known_words", "to_frame"]

T = TypeVar("T")

_ENDPOINT_S = 120.0  # for all questions to one endpoint
_ANSWER_S = 60.0  # for one: they are all asked at once, and a small machine has its hands full
_AT_ONCE = 32  # endpoints
_SOCKETS = 40  # that the questions to an endpoint take
_WORDS = 12  # tokens of an answer that is only looked at
_LONG = 1025  # prompts: one more than vLLM takes
_RANDOM = "Random letters:"
_KINDS = ("json", "regex", "choice")


@dataclass(frozen=True, slots=True)
class RouteCapabilities:
    """What a route does at the endpoints of a family. None: not known.

    Attributes
    ----------
    family : int
        Number of the family, from 0: endpoints that behave alike on all routes.
    endpoints : int
        How many they are.
    asked : str
        Name of the first of them.
    server, version, model : str or None
        As the endpoints name themselves, and the model that was asked.
    context : int or None
        Tokens of prompt and answer together, as they list it.
    route : str or None
        "completions", "chat-batch" or "chat". Only routes that there are.
    used : bool or None
        Whether runs in batch mode take this route.
    lists : bool or None
        Many prompts in one request.
    rows : bool or None
        Rows of a list are streamed as they finish.
    stream_interval : bool or None
        Streams come without a chunk for every token.
    json, regex, choice : str or None
        The field of a request that holds the model to such a constraint; "no" where none does.
    logprobs, n, seed, stop : bool or None
        Whether these parameters act.
    template : str or None
        "learned" where prompts are wrapped in the chat template here, "applied by the server", or why neither.
    thinking : str or None
        The argument that makes the chat template think, or not; "no" where it has none.
    reasoning : str or None
        Where thoughts are: "apart" from the answer, "in the text" (they are taken out here), or "none" were seen.
    max_list : str or None
        Prompts that a request may hold.
    """

    family: int = 0
    endpoints: int = 1
    asked: str = ""
    server: str | None = None
    version: str | None = None
    model: str | None = None
    context: int | None = None
    route: str | None = None
    used: bool | None = None
    lists: bool | None = None
    rows: bool | None = None
    stream_interval: bool | None = None
    json: str | None = None
    regex: str | None = None
    choice: str | None = None
    logprobs: bool | None = None
    n: bool | None = None
    seed: bool | None = None
    stop: bool | None = None
    template: str | None = None
    thinking: str | None = None
    reasoning: str | None = None
    max_list: str | None = None


async def find_capabilities(
    transport: Transport, infos: Sequence[ServerInfo], model: str | None, memo: MutableMapping[Any, Any]
) -> list[RouteCapabilities]:
    """What each family of some endpoints does, a record a route; families in the order of their first endpoints."""
    gate = asyncio.Semaphore(max(1, min(_AT_ONCE, sockets() // _SOCKETS)))

    async def one(info: ServerInfo) -> tuple[RouteCapabilities, ...]:
        if info.status != "up":
            return (RouteCapabilities(),)
        async with gate:
            return tuple(await _Asked(transport, info, model or info.models[0], memo).routes())

    families: dict[tuple[RouteCapabilities, ...], list[ServerInfo]] = {}
    for info, found in zip(infos, await asyncio.gather(*map(one, infos)), strict=True):
        families.setdefault(found, []).append(info)

    async def longest(number: int, found: Sequence[RouteCapabilities], members: list[ServerInfo]) -> Any:
        asked = _Asked(transport, members[0], model or next(iter(members[0].models), ""), memo)
        whole: dict[str, Any] = {"family": number, "endpoints": len(members), "asked": members[0].endpoint.name}
        return [replace(each, max_list=await asked.max_list(each), **whole) for each in found]

    numbered = [longest(k, found, members) for k, (found, members) in enumerate(families.items())]
    return [each for found in await asyncio.gather(*numbered) for each in found]


class _Asked:
    """The questions to one endpoint."""

    def __init__(self, transport: Transport, info: ServerInfo, model: str, memo: MutableMapping[Any, Any]) -> None:
        self._transport = transport
        self._info = info
        self._endpoint = info.endpoint
        self._model = model
        self._memo = memo
        self._probe = Probe(transport, memo, RequestSpec(model=model))
        self._end = time.monotonic() + _ENDPOINT_S

    async def routes(self) -> list[RouteCapabilities]:
        """What each of its routes does."""
        about = (self._transport, self._endpoint, self._model)

        async def template() -> ChatTemplate | str:
            try:
                return await learn(*about[:2], RequestSpec(model=self._model), LOOK_S)
            except CannotLearn as why:
                return f"not learned: {why}"

        async def switch() -> str | bool:
            for thinking in (True, "low"):
                for name, value in (await find_switch(*about, thinking, LOOK_S) or {}).items():
                    return next(iter(value)) if isinstance(value, dict) else name
            return False

        can, learned, thinking = await asyncio.gather(
            self._know("can", lambda: probe_capabilities(*about, LOOK_S), lambda can: can and can.rows),
            self._know("template", template, lambda found: isinstance(found, ChatTemplate)),
            self._know("thinking", switch, lambda _: True),
        )
        wrapper = learned if isinstance(learned, ChatTemplate) else None
        lists, omit = (can.lists, can.omit) if can else (False, frozenset())
        plans = [
            RoutePlan(Route.COMPLETIONS, wrapper, lists, omit=omit),
            RoutePlan(Route.CHAT_BATCH, lists=True),
            RoutePlan(Route.CHAT),
        ]
        there = dict(zip(plans, await asyncio.gather(*map(self._is_there, plans)), strict=True))
        plans = [plan for plan in plans if there[plan] is not False]
        if not plans:
            return [RouteCapabilities()]
        found = await asyncio.gather(*map(self._acts, plans))
        used = next((p for p in plans if p.route is not Route.COMPLETIONS or (wrapper and p.lists)), None)
        known = None not in (*there.values(), can, learned)
        info = self._info
        routes = []
        for plan, acts in zip(plans, found, strict=True):
            facts: dict[str, Any] = {}
            if there[plan] and plan.route is not Route.COMPLETIONS:
                facts = {"lists": plan.lists, "rows": False, "stream_interval": False}
                facts["template"] = "applied by the server"
            elif plan.route is Route.COMPLETIONS:
                facts = {"template": "learned" if wrapper else learned}
                if can:
                    rows = can.streams and can.lists
                    facts |= {"lists": can.lists, "rows": rows, "stream_interval": can.rows}
            routes.append(
                RouteCapabilities(
                    server=info.kind, version=info.version or None, model=self._model, context=info.context,
                    route=str(plan.route), used=plan is used if known else None, thinking=_or_no(thinking),
                    **facts, **acts,
                )
            )  # fmt: skip
        return routes

    async def max_list(self, route: RouteCapabilities) -> str | None:
        """How many prompts one request to the route may hold."""
        if route.lists is False:
            return "1"
        if not route.lists or route.route != Route.COMPLETIONS:
            return None

        async def longest() -> str | None:
            try:
                await self._ask(RoutePlan(Route.COMPLETIONS, lists=True), {}, 1, ["a"] * _LONG)
            except EndpointError as exc:
                if exc.failure.kind not in (FailureKind.REJECTED, FailureKind.TOO_LARGE):
                    raise
                numbers = [int(word.replace(",", "")) for word in re.findall(r"\d[\d,]*", exc.failure.message)]
                if _LONG not in numbers:
                    return None  # it speaks of something else
                return str(max((k for k in numbers if k < _LONG), default="")) or None
            return f"≥ {_LONG}"

        return await self._know("max list", longest) or None

    async def _know(
        self, name: object, question: Callable[[], Awaitable[T]], good: Callable[[Any], object] = bool
    ) -> T | None:
        """The answer to a question, remembered; None if there is none, and a false value where the server refuses it.
        What is not good must be seen twice, since it may be chance."""
        key = ("capabilities", self._endpoint.url, self._model, name)
        found: Any = self._memo.get(key)
        for _ in range(0 if found is not None else 2):
            try:
                async with asyncio.timeout(self._end - time.monotonic()):
                    found = await first_answer([self._endpoint], lambda _: question())
            except EndpointError as exc:
                if exc.failure.kind is not FailureKind.REJECTED and exc.failure.status not in (404, 405):
                    return None
                found = False
            except Malformed:
                found = False
            except TimeoutError:
                return None
            if found is not None and good(found):
                break
        if found is not None:
            self._memo[key] = found
        return found  # type: ignore[no-any-return] # of the memo

    async def _ask(
        self, plan: RoutePlan, params: dict[str, Any], max_tokens: int, texts: Sequence[str] = ("Hi",), n: int = 1
    ) -> list[Reply]:
        spec = RequestSpec(model=self._model, n=n, params=params)

        async def ask(omit: frozenset[str]) -> list[Reply]:
            how = {"max_tokens": max_tokens, "timeout": _ANSWER_S}
            return await plan.ask(self._transport, self._endpoint, spec, texts, omit=omit, **how)

        return (await without_refused(ask, ("temperature",) if "temperature" in params else ()))[0]

    async def _is_there(self, plan: RoutePlan) -> bool | None:
        texts = ["Hi", "Ho"] if plan.lists else ["Hi"]
        found = await self._know((plan.route, "is there"), lambda: self._ask(plan, {}, 1, texts))
        return None if found is None else bool(found)

    # ---- on one route ------------------------------

    async def _acts(self, plan: RoutePlan) -> dict[str, Any]:
        """What acts on a route, by column."""
        questions: dict[str, Callable[[RoutePlan], Awaitable[Any]]] = {
            **{kind: partial(self._constraint, kind) for kind in _KINDS},
            "logprobs": self._logprobs,
            "n": self._samples,
            "seed": self._seed,
            "stop": self._stop,
            "reasoning": self._reasoning,
        }
        asked = (self._know((plan.route, name), partial(ask, plan)) for name, ask in questions.items())
        found = dict(zip(questions, await asyncio.gather(*asked), strict=True))
        return {**found, **{kind: _or_no(found[kind]) for kind in _KINDS}}

    async def _constraint(self, kind: str, plan: RoutePlan) -> str | bool | None:
        """The field of a request that holds the model to a constraint of this kind."""
        if (dialect := await self._probe.dialect(self._endpoint, plan, kind)) is not None:
            return next(iter(fields_of(dialect, PROBES[kind][0]) or ()))
        return False if self._probe.is_known(self._endpoint, plan, kind) else None

    async def _logprobs(self, plan: RoutePlan) -> bool:
        chat = plan.route is not Route.COMPLETIONS
        spec = RequestSpec(model=self._model, params={"logprobs": True, "top_logprobs": 1} if chat else {"logprobs": 1})
        how: dict[str, Any] = {"wrapped": plan.wrapped, "lists": plan.lists, "omit": plan.left_out(spec)}
        body = encode(plan.route, spec, plan.wrap(["Hi"]), max_tokens=1, **how)
        reply = await self._transport.json(self._endpoint, path_of(plan.route), body, timeout=_ANSWER_S)
        choices = reply.get("choices") or [{}]
        found = choices[0].get("logprobs") if isinstance(choices[0], dict) else None
        return isinstance(found, dict) and any(found.values())

    async def _samples(self, plan: RoutePlan) -> bool:
        return len(await self._ask(plan, {}, 1, n=2)) == 2

    async def _seed(self, plan: RoutePlan) -> bool | None:
        """Whether one seed gives one text, and another seed another one; None if all texts are the same."""
        asks = (self._ask(plan, {"temperature": 2, "seed": seed}, _WORDS, [_RANDOM]) for seed in (1, 1, 2))
        one, same, other = [_said(replies[0]) for replies in await asyncio.gather(*asks)]
        return False if one != same else True if one != other else None

    async def _stop(self, plan: RoutePlan) -> bool | None:
        """Whether a part of what the model says ends the answer when it is a stop string."""
        said = _said((await self._ask(plan, {"temperature": 0}, _WORDS))[0])
        stop = said[len(said) // 2 :][:3]
        if len(said) < 6 or not stop.strip():
            return None
        cut = _said((await self._ask(plan, {"temperature": 0, "stop": [stop]}, _WORDS))[0])
        return stop not in cut and len(cut) < len(said)

    async def _reasoning(self, plan: RoutePlan) -> str:
        reply = (await self._ask(plan, {"temperature": 0}, _WORDS))[0]
        opened = isinstance(plan.template, ChatTemplate) and opens(plan.template.suffix)
        if reply.reasoning:
            return "apart"
        marked = without_thoughts(reply._replace(finish_reason="length"), True, opened)
        return "in the text" if marked.reasoning else "none"


def _said(reply: Reply) -> str:
    return f"{reply.reasoning or ''}{reply.text}"


def _or_no(found: Any) -> Any:
    return None if found is None else found or "no"


def known_words(memo: MutableMapping[Any, Any], info: ServerInfo, model: str | None) -> str:
    """What is known of an endpoint by now, in few words; nothing is asked."""
    model = model or next(iter(info.models), "")
    can = memo.get(("capabilities", info.endpoint.url, model, "can")) or memo.get((*info.family, model, "can"))
    words = [name for name in ("lists", "rows") if can and getattr(can, name)]
    for kind in _KINDS:
        keys = ((info.endpoint.url, model, route, dialect, kind, "{}") for route in Route for dialect in Dialect)
        words += [kind] if any(memo.get(key) == 0 for key in keys) else []
    return ", ".join(words)


def to_frame(found: Sequence[RouteCapabilities]) -> pd.DataFrame:
    """The records as a frame, a column a field."""
    import pandas as pd

    text = pd.Series([""]).dtype
    types = {"int": "int64", "int | None": "Int64", "bool | None": "boolean"}
    columns = {field.name: types.get(str(field.type), text) for field in fields(RouteCapabilities)}
    return pd.DataFrame([asdict(each) for each in found], columns=list(columns)).astype(columns)
