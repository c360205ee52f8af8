"""Whether a server takes the parameters of a run: it is sent one short prompt with them, in the way that rows are sent.

A parameter that every server refuses, or the system prompt of chats, would otherwise only show when rows are refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from ..client.capabilities import without_refused
from ..client.error_replies import Malformed
from ..client.hostfile import AgentEndpoint
from ..client.row_stream import RowStream
from ..client.transport import Transport
from ..errors import EndpointError, SettingError
from ..records import Failure, FailureKind, RequestSpec, Route
from ..text import printable
from .route_plan import OUR_SALT, RoutePlan, fields_of_caller

__all__ = ["Trial"]

_NOTHING = frozenset[str]()


class Trial:
    """The short prompt, and what it is sent with, by the plan of the rows.

    ``key`` is all that the answer depends on, but for the server and its model; empty where there is nothing to try.
    """

    def __init__(
        self, transport: Transport, plan: RoutePlan, spec: RequestSpec, is_known: bool, timeout: float
    ) -> None:
        self._transport, self._plan, self._timeout = transport, plan, timeout
        self._spec = spec = replace(spec, conversations=False)  # the short prompt is none
        salt = spec.params.get("cache_salt")
        ours = isinstance(salt, str) and salt.startswith(OUR_SALT)
        given = {k: v for k, v in spec.params.items() if not (ours and k == "cache_salt")}
        system = None if plan.route is Route.COMPLETIONS else spec.system
        self._token_ids = spec.details and not plan.rows and (plan.lists or spec.n > 1) and is_known
        self._optional = {"return_token_ids", *(["cache_salt"] if ours else [])} - fields_of_caller(spec)
        self._shown: dict[str, Any] = {**given, **({"n": spec.n} if spec.n > 1 else {})}
        self._about = self._shown if system is None else {**self._shown, "system": system}
        most = spec.max_tokens if "min_tokens" in given else 0
        asked = (spec.n, system, plan.route, plan.lists, plan.rows, self._token_ids, ours, most)
        matters = given or ours or spec.n > 1 or self._token_ids or system is not None
        self.key = ("params", json.dumps(given, sort_keys=True, default=str), *asked) if matters else ()

    async def at(self, endpoint: AgentEndpoint) -> frozenset[str] | Failure:
        """The fields that an endpoint wants left out, or a failure that is of the parameters. Raises ``SettingError``
        where it refuses one, and ``EndpointError`` where it failed for another reason."""
        found = await self._tried(endpoint, self._spec, self._optional)
        if not isinstance(found, Failure):
            return found
        rejected = found.kind is FailureKind.REJECTED
        if not (rejected and any(name in found.message for name in self._shown)):
            plain = replace(self._spec, params={}, n=1, system=None)
            bare = await self._tried(endpoint, plain, (), frozenset(self._optional))
            if isinstance(bare, Failure) and bare.kind is not FailureKind.REJECTED:
                raise EndpointError(bare)
            if isinstance(bare, Failure):
                return _NOTHING  # it refuses this prompt whatever the parameters are; the rows will show why
        again = await self._tried(endpoint, self._spec, self._optional)  # once more, since one refusal may be chance
        if not isinstance(again, Failure):
            return again
        words = "refuses" if rejected else "answers, but not with"
        text = f"{endpoint.name} {words} these parameters ({printable(str(self._about), 500)}): {found.message}"
        if rejected:
            raise SettingError(text)
        return replace(found, message=text)

    async def _tried(
        self, endpoint: AgentEndpoint, spec: RequestSpec, may_omit: Iterable[str], omit: frozenset[str] = _NOTHING
    ) -> frozenset[str] | Failure:
        """The fields that are left out, or a failure that may be of the parameters."""
        try:
            return (await without_refused(lambda omit: self._ask(endpoint, spec, omit), may_omit, omit))[1]
        except EndpointError as exc:
            # Some servers fail where others refuse, or answer as if they were not there.
            kind, status = exc.failure.kind, exc.failure.status
            if kind not in (FailureKind.REJECTED, FailureKind.MALFORMED) and status != 500:
                raise
            return exc.failure

    async def _ask(self, endpoint: AgentEndpoint, spec: RequestSpec, omit: frozenset[str]) -> None:
        plan, least = self._plan, spec.params.get("min_tokens", 1)
        texts = ["Hi", "Ho"] if self._token_ids and plan.lists else ["Hi"]
        try:
            replies = await plan.ask(
                self._transport, endpoint, spec, texts, omit=omit, timeout=self._timeout, token_ids=self._token_ids,
                wrapped=plan.wrapped and self._spec.chat == "auto",
                rows=RowStream(len(texts), spec.n) if plan.rows else None,
                max_tokens=min(max(1, least), self._spec.max_tokens) if isinstance(least, int) else 1,
            )  # fmt: skip
            came, wanted = len(replies), len(texts) * spec.n
            words = f"{came} of {wanted} answers came" if came < wanted else ""
        except Malformed as exc:
            words = "" if plan.rows else self._transport.without_secrets(endpoint, str(exc))
        if spec.n > 1 and words:  # it may not give so many answers; whatever else is odd, the rows will show it
            raise EndpointError(Failure(FailureKind.MALFORMED, words, endpoint.name))
