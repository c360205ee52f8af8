"""The keywords that ``connect``, ``wait_until_ready`` and ``VLLMPool`` hand on to the pool below them.

Type checkers read them in ``PoolSettings`` and ``VLLMSettings``, people in the signature that ``hands_on`` makes. What
they mean, and their defaults, is said once: by ``AgentPool`` and ``VLLMPool``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal, TypedDict, TypeVar

if TYPE_CHECKING:
    import os
    import ssl

    import httpx2

    from ..client.dialects import Dialect
    from ..client.http_settings import CertLike
    from ..client.keys import KeyLike
    from ..client.proxy import Proxy
    from ..engine.policy import BatchPolicy, RetryPolicy
    from ..records import Chat

__all__ = ["PoolSettings", "VLLMSettings", "hands_on"]

F = TypeVar("F", bound=Callable[..., Any])


class PoolSettings(TypedDict, total=False):
    """Keywords of ``AgentPool``."""

    batch: BatchPolicy | None
    retry: RetryPolicy | None
    trust_env: bool
    verify: ssl.SSLContext | str | os.PathLike[str] | None
    headers: Mapping[str, str] | None
    http_client: httpx2.AsyncClient | None
    rpm: int | None
    tpm: int | None
    max_connections: int | None
    key_ttl: float
    cert: CertLike | None
    proxy: Proxy | str | None
    via: str | None


class VLLMSettings(PoolSettings, total=False):
    """Keywords of ``VLLMPool``."""

    model: str | None
    max_tokens: int | None
    max_tokens_aggregation: int | None
    model_max_context: int | None
    buffer: int
    use_batch: bool
    concurrency: int | None
    connector_limit: int | None
    timeout: float
    chat: Chat
    delivery: Literal["auto", "rows", "batch"]
    dialect: Dialect
    api_key: KeyLike | None


def hands_on(to: Callable[..., Any], **defaults: Any) -> Callable[[F], F]:
    """Show the keywords that a function takes as ``**settings`` and hands on.

    Parameters
    ----------
    to : callable
        What takes them: those that have a default, and are none of the function's own.
    **defaults
        Their defaults in this function, where these are others.
    """

    def decorate(function: F) -> F:
        signature = inspect.signature(function)
        own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        names = {p.name for p in own}
        taken = [
            p.replace(kind=p.KEYWORD_ONLY, default=defaults.get(p.name, p.default))
            for p in inspect.signature(to).parameters.values()
            if p.default is not p.empty and p.name not in names
        ]
        shown = signature.replace(parameters=[*own, *taken])
        function.__signature__ = shown  # type: ignore[attr-defined] # what inspect.signature looks for
        return function

    return decorate
