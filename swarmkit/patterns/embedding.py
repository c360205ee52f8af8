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
    """
    return await embed_pool.embed_all(texts)
