"""Prompts that are too long for the model's context, cut at one end by the server's own count of tokens.

Only those that may be too long by their characters are counted. The text is cut at the border of a token and counted
again within its chat template, until it fits beside ``max_tokens``.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

from ..client.chat_template import TEMPLATE_FIELDS, CannotLearn
from ..client.hostfile import AgentEndpoint
from ..client.tokenizer import Tokenizer
from ..client.transport import Transport
from ..engine.token_budgets import Sizing
from ..errors import EndpointError, SettingError
from ..records import Prompts, RequestSpec, Route
from ..text import plural
from .learning import first_answer
from .route_plan import RoutePlan
from .routing import LOOK_S

__all__ = ["truncated"]

_AT_ONCE = 32
_DENSER = 2  # a text may have so many times the tokens a character of the densest sample


async def truncated(
    transport: Transport,
    endpoints: Sequence[AgentEndpoint],
    plan: RoutePlan,
    spec: RequestSpec,
    sizing: Sizing,
    prompts: Prompts,
    rows: Sequence[int],
) -> tuple[Prompts, set[int]]:
    """The prompts, cut where they are too long, and the rows whose prompts were.

    Parameters
    ----------
    endpoints : sequence of AgentEndpoint
        Those that are asked to count.
    plan : RoutePlan
        How prompts are wrapped.
    sizing : Sizing
        The context, and the characters of a token.

    Raises
    ------
    SettingError
        The context is not known, no server counts tokens, or the context has no room for a prompt.
    """
    how = f"too_long={spec.too_long!r}"
    if sizing.context is None:
        raise SettingError(
            f"{how} needs the model's context, which the servers do not report: connect(..., model_max_context=...)"
        )
    cutter = _Cutter(transport, plan, spec, sizing.context)
    surely = max(0, int((cutter.room - sizing.overhead) * max(1.0, sizing.chars_per_token / _DENSER)))
    texts = list(prompts.texts)
    long = [row for row in rows if len(texts[row] or "") > surely]
    fits: set[int] = set()
    cut: set[int] = set()
    gate = asyncio.Semaphore(_AT_ONCE)

    async def one(place: int, row: int) -> None:
        text, first = texts[row] or "", place % len(endpoints)
        async with gate:
            try:
                found = await first_answer([*endpoints[first:], *endpoints[:first]], lambda e: cutter.fitted(e, text))
            except (CannotLearn, EndpointError):
                return  # it is sent as it is, and its own answer says what is wrong
        if found is not None:
            texts[row] = found
            fits.add(row)
            if found != text:
                cut.add(row)
        elif len(text) > cutter.room * sizing.chars_per_token:
            raise SettingError(
                f"{how} needs a server that counts tokens, and {endpoints[first].name} has no /tokenize: a prompt of "
                f"{plural(len(text), 'character')} may not fit. Shorten such texts first, e.g. with .str.slice()"
            )

    tasks = [asyncio.ensure_future(one(place, row)) for place, row in enumerate(long)]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
    return Prompts(texts, prompts.errors, frozenset(fits)), cut


class _Cutter:
    """Cuts prompts to the ``room`` that a context has for them."""

    def __init__(self, transport: Transport, plan: RoutePlan, spec: RequestSpec, context: int) -> None:
        self._transport = transport
        self._plan = plan
        self._spec = spec
        params = {name: value for name, value in spec.params.items() if name in TEMPLATE_FIELDS}
        self._bare = replace(spec, n=1, logprobs=None, params=params)  # all that the tokens of a chat depend on
        self._context = context
        self.room = context - spec.max_tokens

    async def fitted(self, endpoint: AgentEndpoint, text: str) -> str | None:
        """The text, or as much of it as there is room for; None where the endpoint does not count tokens."""
        tokens = await self._count(endpoint, text)
        if tokens is None or tokens <= self.room:
            return None if tokens is None else text
        tokenizer, left = self._at(endpoint), self._spec.too_long == "truncate_left"
        ids = await tokenizer.ids(text)
        keep = self.room - (tokens - len(ids))
        while keep > 0:
            short = await tokenizer.end_of(text, ids, keep, left)
            over = (await self._count(endpoint, short) or 0) - self.room
            if over <= 0:
                return short
            keep -= over
        spec, template = self._spec, " and the chat template" if self._plan.wrapped else ""
        raise SettingError(
            f"too_long={spec.too_long!r}: the context of {self._context:,} tokens has no room for a prompt beside "
            f"max_tokens={spec.max_tokens}{template}. Lower max_tokens="
        )

    async def _count(self, endpoint: AgentEndpoint, text: str) -> int | None:
        """The tokens of a prompt as it is sent."""
        plan = self._plan
        if plan.route is not Route.CHAT and plan.route is not Route.CHAT_BATCH:
            return await self._at(endpoint).count(plan.wrap([text])[0], not plan.wrapped)
        return await self._at(endpoint).chat_count(self._bare, text)

    def _at(self, endpoint: AgentEndpoint) -> Tokenizer:
        return Tokenizer(self._transport, endpoint, self._spec.model, LOOK_S)
