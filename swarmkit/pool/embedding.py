"""How texts are embedded by the servers of a family: found by one small request."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING

from ..client.capabilities import without_refused
from ..client.error_replies import Malformed
from ..client.hostfile import AgentEndpoint
from ..client.text_routes import NO_ROUTE
from ..client.vectors import length_of
from ..errors import EndpointError, SettingError
from ..records import Failure, FailureKind, Reply, RequestSpec, Route
from ..text import printable
from .route_plan import RoutePlan

if TYPE_CHECKING:
    from .routing import Family, Router

__all__ = ["embedding_plan"]

_LOOK_S = 20.0
_BASE64 = ("encoding_format",)  # where it is refused, vectors come as lists of numbers


async def embedding_plan(router: Router, family: Family, spec: RequestSpec) -> RoutePlan:
    """The plan for the embeddings of a family's servers: whether they take lists, and refuse base64.

    Raises
    ------
    SettingError
        They have no embeddings, or refuse the parameters.
    """

    async def tried(endpoint: AgentEndpoint, plan: RoutePlan) -> RoutePlan | Failure:
        async def ask(omit: frozenset[str]) -> list[Reply]:
            texts = ["Hi", "Ho"] if plan.lists else ["Hi"]
            how = {"timeout": _LOOK_S, "max_tokens": 0}
            return await plan.ask(router.transport, endpoint, spec, texts, omit=omit, **how)

        try:
            replies, omit = await without_refused(ask, _BASE64)
        except EndpointError as exc:
            if exc.failure.kind is not FailureKind.REJECTED and exc.failure.status not in NO_ROUTE:
                raise
            return exc.failure
        except Malformed as exc:
            return Failure(FailureKind.MALFORMED, router.transport.without_secrets(endpoint, str(exc)), endpoint.name)
        asked, length = spec.params.get("dimensions"), length_of(reply.text for reply in replies)
        if asked not in (None, length):
            words = f"its vectors have {length:,} numbers whatever is asked for"
            return Failure(FailureKind.REJECTED, words, endpoint.name)
        return replace(plan, omit=omit, note="" if plan.lists else "the server takes no lists of texts")

    plan = RoutePlan(Route.EMBEDDINGS, lists=True, length=spec.params.get("dimensions"))

    async def look(endpoint: AgentEndpoint) -> RoutePlan | Failure:
        found = await tried(endpoint, plan)
        return found if isinstance(found, RoutePlan) else await tried(endpoint, replace(plan, lists=False))

    params = json.dumps({**spec.params}, sort_keys=True, default=str)
    key = (*family.name, spec.model, "embeddings", params)

    def poor(found: RoutePlan | Failure | None) -> bool:
        return not (isinstance(found, RoutePlan) and found.lists)

    found, unknown = await router.look(key, family.members, look, poor)
    if isinstance(found, Failure):
        del router.memo[key]
        given = f" and the parameters {printable(params, 500)}" if spec.params else ""
        need = "" if spec.params else "; that needs a model of embeddings, such as `vllm serve MODEL --runner pooling`"
        words = found.message.rstrip(".")
        raise SettingError(f"{found.endpoint} does not embed texts with the model {spec.model}{given}: {words}{need}")
    return found or replace(plan, note=f"it could not be tried: {unknown}")
