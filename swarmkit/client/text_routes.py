"""Whether a server answers prompts at all: the shortest prompt, on both routes that take text."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Sequence

from ..errors import EndpointError
from ..records import Failure, FailureKind, RequestSpec, Route
from .ask import ask
from .error_replies import Malformed
from .hostfile import AgentEndpoint
from .transport import Transport

__all__ = ["NO_ROUTE", "gives_vectors", "has_route", "refusals_of_text", "unknown_model", "why_no_text"]

NO_ROUTE = (404, 405, 501)
"""Statuses of routes that a server does not have."""
_UNKNOWN = re.compile(r"not (be )?found|not exist|unknown|invalid|no such|not available|not allowed", re.IGNORECASE)


async def has_route(
    transport: Transport, endpoint: AgentEndpoint, route: Route, model: str, timeout: float | None = None
) -> bool:
    """Whether a server has a route for this model. Raises ``EndpointError`` where it failed for a reason that says
    nothing about it."""
    refused = await _refusal(transport, endpoint, route, model, timeout)
    return refused is None or refused.status not in NO_ROUTE


async def refusals_of_text(
    transport: Transport, endpoint: AgentEndpoint, model: str, timeout: float | None = None
) -> list[Failure]:
    """How a server refuses the shortest prompt, as a chat and as a completion, or what it says that is no answer; empty
    if it answers one of them. Raises as ``has_route``."""
    refused = []
    for route in (Route.CHAT, Route.COMPLETIONS):
        if (failure := await _refusal(transport, endpoint, route, model, timeout)) is None:
            return []
        refused.append(failure)
    return refused


async def _refusal(
    transport: Transport, endpoint: AgentEndpoint, route: Route, model: str, timeout: float | None
) -> Failure | None:
    spec = RequestSpec(model=model)
    try:
        await ask(transport, endpoint, route, spec, ["Hi"], timeout=timeout, max_tokens=1, lists=False)
    except Malformed as exc:
        return Failure(FailureKind.MALFORMED, transport.without_secrets(endpoint, str(exc)), endpoint.name)
    except EndpointError as exc:
        if exc.failure.kind is not FailureKind.REJECTED and exc.failure.status not in NO_ROUTE:
            raise
        return exc.failure
    return None


def unknown_model(model: str, refused: Sequence[Failure]) -> str:
    """The words with which a server says that it does not know the model; "" if it does not say so.

    Examples
    --------
    >>> unknown_model("gpt-9", [Failure(FailureKind.DENIED, "The model `gpt-9` does not exist.", status=404)])
    'The model `gpt-9` does not exist.'
    """
    return next((f.message for f in refused if model in f.message and _UNKNOWN.search(f.message)), "")


async def gives_vectors(
    transport: Transport, endpoint: AgentEndpoint, model: str, timeout: float | None = None
) -> bool:
    """Whether a server answers the shortest text with its vector."""
    body = json.dumps({"model": model, "input": ["Hi"]}).encode()
    with contextlib.suppress(EndpointError):
        return "data" in await transport.json(endpoint, "/v1/embeddings", body, timeout=timeout)
    return False


async def why_no_text(transport: Transport, endpoint: AgentEndpoint, model: str, timeout: float | None = None) -> str:
    """Why a server answers no prompt, as one of embeddings or without a tokenizer; "" where it may answer some.

    Raises
    ------
    EndpointError
        It failed for a reason that says nothing about that.
    """
    refused = await refusals_of_text(transport, endpoint, model, timeout)
    odd = any(f.kind is FailureKind.MALFORMED for f in refused)  # the rows will show it
    if not refused or odd or unknown_model(model, refused) or any("max_" in f.message for f in refused):
        return ""  # it takes others
    if await gives_vectors(transport, endpoint, model, timeout):
        return (
            f"{endpoint.name} serves embeddings, no text: ask for those by df.swarm.embed(...), and for text at "
            "another server"
        )
    words = next((f.message for f in refused if f.status not in NO_ROUTE), "")
    return words and f"{endpoint.name} refuses every prompt, also the shortest one: {words}"
