"""The pool of endpoints with a model of embeddings, for lists of texts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from ..client.hostfile import AgentEndpoint
from ..client.vectors import unpack
from ..records import EmbeddingResponse, RequestSpec, Response
from .vllm_pool import VLLMPool

__all__ = ["EmbeddingPool"]


class EmbeddingPool(VLLMPool):
    """Endpoints that serve ``/v1/embeddings``, used as one.

    For lists; frames are embedded by ``df.swarm.embed``, which takes any pool of such endpoints.

    Parameters
    ----------
    endpoints : iterable of AgentEndpoint, str or (host, port)
        At least one.
    model : str
        The model's name.
    concurrency : int, default 512
        Most requests in flight over the whole pool.
    timeout : float, default 60
        Seconds without a single byte after which a request fails.

    Examples
    --------
    >>> pool = EmbeddingPool([("node001", 8000), ("node002", 8000)], model="minilm")
    >>> pool.size, pool.timeout
    (2, 60.0)
    >>> import asyncio
    >>> with EmbeddingPool(swarm.endpoints, model="echo") as pool:
    ...     one = asyncio.run(pool.embed_one(0, "lacZ"))
    ...     both = asyncio.run(pool.embed_all(["lacZ", "recA"]))
    >>> len(one.embedding), both[0].embedding == one.embedding
    (64, True)
    """

    def __init__(
        self,
        endpoints: Iterable[AgentEndpoint | str | tuple[str, int]],
        model: str,
        concurrency: int = 512,
        timeout: float = 60.0,
    ) -> None:
        super().__init__(endpoints, model, concurrency=concurrency, timeout=timeout)

    @property
    def timeout(self) -> float:
        """Seconds without a single byte after which a request fails."""
        return self._core.http.timeout

    async def embed_one(self, agent_index: int, text: str) -> EmbeddingResponse:
        """Embed one text at one endpoint.

        Returns
        -------
        EmbeddingResponse
            ``success`` False with ``error``, where it failed; ``agent_index`` is the one given.
        """
        pool = self.select([agent_index])._without_waiting()
        return _embedded(await pool._answers([text], self._vector_spec(), agent_index))[0]

    async def embed_all(self, texts: Sequence[str]) -> list[EmbeddingResponse]:
        """Embed texts, many per request, text ``i`` at endpoint ``i % size`` unless one fails; vectors in order."""
        return _embedded(await self._answers(texts, self._vector_spec()))

    def _vector_spec(self) -> RequestSpec:
        return replace(self.spec(), kind="embeddings", max_tokens=0)


def _embedded(responses: Iterable[Response]) -> list[EmbeddingResponse]:
    return [
        EmbeddingResponse(r.success, list(unpack(r.text)) if r.success else None, r.error, r.agent_index)
        for r in responses
    ]
