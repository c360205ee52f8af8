"""Vectors of lists of texts."""

from __future__ import annotations

from collections.abc import Sequence

from ..pool.embedding_pool import EmbeddingPool
from ..records import EmbeddingResponse

__all__ = ["scatter_gather_embeddings"]


async def scatter_gather_embeddings(embed_pool: EmbeddingPool, texts: Sequence[str]) -> list[EmbeddingResponse]:
    """Embed each text at its home endpoint ``i % embed_pool.size``, many per request.

    Parameters
    ----------
    embed_pool : EmbeddingPool
        The endpoints.
    texts : sequence of str
        The texts.

    Returns
    -------
    list of EmbeddingResponse
        In input order.

    Examples
    --------
    >>> import asyncio
    >>> with sk.EmbeddingPool(swarm.endpoints, "echo") as pool:
    ...     vectors = asyncio.run(scatter_gather_embeddings(pool, ["one", "two"]))
    >>> [vector.success for vector in vectors]
    [True, True]
    """
    return await embed_pool.embed_all(texts)
