"""Chat templates that keep true: checked in each run, and for its own prompts.

A template is learned from one server of a family, and servers are restarted, each with flags of its own. So what each
endpoint makes of the test prompt is compared with what the template was proven by, once before its first rows in a
run, and again after it has failed: what is back may be another server. One that makes something else of it is a
variant of its family from then on, of which all is learned anew.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import hashlib
import json
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from ..client.capabilities import probe
from ..client.chat_template import TEMPLATE_FIELDS, CannotLearn, ChatTemplate, learn, misfit, rendered
from ..client.hostfile import AgentEndpoint
from ..errors import EndpointError, NoEndpointsError, SettingError
from ..records import Failure, FailureKind, RequestSpec

if TYPE_CHECKING:
    from .route_plan import RoutePlan
    from .routing import Family, Router

__all__ = ["TemplateWatch", "family_template", "odd_prompts", "telling_prompts"]

_CHECK_S = 5.0  # rows wait for a check
_SPREAD = 2  # prompts from all over the run
_LOOKED_AT = 1000  # ... and of so many at most those that a template may treat otherwise
_SIGNS = ("/no_think", "/nothink", "/think", "think>")
_SHOWN = 2000  # characters of each end of a long prompt
_WAYS: tuple[Callable[[str], bool], ...] = (
    lambda text: text[:1].isspace(),
    lambda text: text[-1:].isspace(),
    lambda text: not text.strip(),
    *((lambda text, sign=sign: sign in text) for sign in _SIGNS),
)


def odd_prompts(texts: Sequence[str | None], rows: Sequence[int]) -> dict[int, str]:
    r"""Of some prompts the first of each kind that a template may treat otherwise, by kind.

    Examples
    --------
    >>> odd_prompts(["a", "b ", "c /no_think", "d "], range(4))
    {1: 'b ', 3: 'c /no_think'}
    """
    some = _spread(texts, rows)
    odd = {kind: next(filter(way, some), None) for kind, way in enumerate(_WAYS)}
    return {kind: _ends(text) for kind, text in odd.items() if text is not None}


def _spread(texts: Sequence[str | None], rows: Sequence[int]) -> list[str]:
    return [texts[row] or "" for row in rows[:: max(1, len(rows) // _LOOKED_AT)]]


def _ends(text: str) -> str:
    return text if len(text) <= 2 * _SHOWN else text[:_SHOWN] + text[-_SHOWN:]


def telling_prompts(texts: Sequence[str | None], rows: Sequence[int]) -> list[str]:
    r"""A few of a run's prompts, by which a template that does more than stand around them shows: the first with white
    space at each end, the first without a word, those with what some templates read out of the text, and any others.

    Examples
    --------
    >>> telling_prompts(["a", "b", "c /no_think", None, "\nd", "e"], [0, 1, 2, 4, 5])
    ['\nd', 'c /no_think', 'a']
    """
    some = _spread(texts, rows)
    usual = map(_ends, some[:: -(-len(some) // _SPREAD) or 1])
    return list(dict.fromkeys([*odd_prompts(texts, rows).values(), *usual]))


async def family_template(
    router: Router, family: Family, spec: RequestSpec, texts: Sequence[str], look_s: float
) -> tuple[ChatTemplate | None, str]:
    """The template of a family's servers, if it is one for such prompts, and a note.

    One that was learned before is checked at one of the servers first: all of them may have been restarted since.
    """
    transport, memo = router.transport, router.memo

    async def look(endpoint: AgentEndpoint) -> ChatTemplate | CannotLearn:
        try:
            return await learn(transport, endpoint, spec, look_s)
        except CannotLearn as why:
            return why

    async def check(template: ChatTemplate, endpoint: AgentEndpoint) -> tuple[object, str | None]:
        asked = transport, endpoint, spec
        try:
            now = rendered(*asked, timeout=_CHECK_S, as_text=template.as_text)
            return await asyncio.gather(now, misfit(*asked, template, texts, _CHECK_S))
        except EndpointError as exc:
            if exc.failure.kind is not FailureKind.BUSY:
                raise
            return template.proof, None  # the rows do not wait for a full queue to find out

    # Learned again each day: templates may write the date into the prefix.
    today = datetime.date.today().isoformat()
    fields = {name: spec.params[name] for name in TEMPLATE_FIELDS if name in spec.params}
    turns = spec.system, spec.examples, spec.assistant_prefix
    key = (*family.name, spec.model, "template", *turns, json.dumps(fields, sort_keys=True, default=str), today)
    note, known = "chat template learned", key in memo
    while True:
        template, unknown = await router.look(key, family.members, look, lambda found: isinstance(found, CannotLearn))
        if not isinstance(template, ChatTemplate):
            return None, str(template or f"its chat template could not be learned: {unknown}")
        now: object = template.proof
        odd: str | None = None
        if known or texts:
            with contextlib.suppress(EndpointError, TimeoutError):
                async with asyncio.timeout(_CHECK_S):
                    now, odd = await router.first(family.members, partial(check, template))
        if now == template.proof or not known:
            break
        memo.pop(key, None)
        note, known = "chat template learned anew, since it has changed", False
    if odd is not None:
        return None, f"its chat template does more than stand around {_kind(odd)}"
    return template, note


def _kind(prompt: str) -> str:
    """What a prompt is one of, without its words: they may be nobody's business."""
    if sign := next((sign for sign in _SIGNS if sign in prompt), None):
        return f"prompts with {sign}"
    return "prompts with white space at an end" if prompt != prompt.strip() else "some prompts"


class TemplateWatch:
    """Checks whether an endpoint still has the chat template that its rows are wrapped in.

    Parameters
    ----------
    router : Router
        Its findings: an endpoint with another template becomes a variant of its family there, and what was found of it
        before is forgotten.
    spec : RequestSpec
        What the rows of the run have in common.
    plan : callable
        Makes the route plan of an endpoint from all that is known.
    """

    def __init__(
        self, router: Router, spec: RequestSpec, plan: Callable[[AgentEndpoint], Awaitable[RoutePlan]]
    ) -> None:
        self._router = router
        self._spec = spec
        self._plan = plan
        self._turn = asyncio.Lock()

    async def __call__(self, endpoint: AgentEndpoint, plan: RoutePlan) -> RoutePlan:
        """The plan of an endpoint: the same one as long as its template is. Where it does not tell that soon, its rows
        are sent all the same.

        Raises
        ------
        EndpointError
            It refuses connections, or what the run asks for.
        """
        if (template := plan.learned) is None:
            return plan
        now: object = ()
        transport, infos, memo = self._router.transport, self._router.infos, self._router.memo
        for tries in range(2):  # one refusal may be chance
            try:
                asked = transport, endpoint, self._spec
                now = now or await rendered(*asked, timeout=_CHECK_S, as_text=template.as_text)
            except EndpointError as exc:
                if exc.failure.kind is FailureKind.CONNECT:
                    raise
                if exc.failure.kind is not FailureKind.STALE or tries:
                    return plan
        if now == template.proof:
            return plan
        found, url = await probe(transport, endpoint, model=self._spec.model), endpoint.url
        found = found if found.status == "up" else infos.get(url, found)
        infos[url] = replace(found, variant=hashlib.sha256(repr(now).encode()).hexdigest()[:12])
        for key in [key for key in memo if url in key]:
            del memo[key]
        try:
            async with self._turn:  # the first of many that came back with it learns it for all of them
                return await self._plan(endpoint)
        except (NoEndpointsError, SettingError) as exc:  # such as a parameter that is refused by now
            raise EndpointError(Failure(FailureKind.DENIED, str(exc), endpoint.name)) from exc
