"""Different prompts to different endpoints, answers in input order."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from ..pool.agent_pool import AgentPool
from ..records import Response

__all__ = ["map_gather", "scatter_gather"]


async def scatter_gather(pool: AgentPool, prompts: Sequence[str]) -> list[Response]:
    """Send each prompt to its home endpoint ``i % pool.size``, many per request if the pool batches.

    Parameters
    ----------
    pool : AgentPool
        The endpoints.
    prompts : sequence of str
        The prompts.

    Returns
    -------
    list of Response
        In input order.

    Examples
    --------
    >>> import asyncio
    >>> answers = asyncio.run(sk.scatter_gather(pool, ["lacZ?", "recA?"]))
    >>> [answer.text for answer in answers]
    ['echo: lacZ?', 'echo: recA?']
    """
    return await pool.send_all_batched(prompts)


async def map_gather(pool: AgentPool, items: Iterable[Any], prompt_template: str) -> list[Response]:
    """Fill ``{item}`` of a template with each item, and scatter the prompts.

    Only ``{item}`` is replaced; other braces, as in a JSON example, are kept.

    Examples
    --------
    >>> import asyncio
    >>> answers = asyncio.run(sk.map_gather(pool, ["lacZ", "recA"], "What is {item}?"))
    >>> [answer.text for answer in answers]
    ['echo: What is lacZ?', 'echo: What is recA?']
    """
    return await scatter_gather(pool, [prompt_template.replace("{item}", str(item)) for item in items])
