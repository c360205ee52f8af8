"""One prompt to every endpoint."""

from __future__ import annotations

from ..pool.agent_pool import AgentPool
from ..records import Response
from ..text import none_of

__all__ = ["broadcast", "broadcast_and_reduce"]

SEPARATOR = "\n---\n"


async def broadcast(pool: AgentPool, prompt: str) -> list[Response]:
    """Send one prompt to every endpoint of a pool; responses by endpoint index.

    Examples
    --------
    >>> import asyncio
    >>> answers = asyncio.run(broadcast(pool.select([0, 1]), "Who are you?"))
    >>> [answer.text for answer in answers]
    ['echo: Who are you?', 'echo: Who are you?']
    """
    return await pool.broadcast_prompt(prompt)


async def broadcast_and_reduce(
    pool: AgentPool, prompt: str, reduce_prompt: str, reducer_agent_index: int = 0
) -> Response:
    """Broadcast a prompt, then have one endpoint merge the answers.

    Parameters
    ----------
    pool : AgentPool
        The endpoints.
    prompt : str
        The prompt for every endpoint.
    reduce_prompt : str
        The merging prompt; ``{responses}`` is replaced by the answers.
    reducer_agent_index : int, default 0
        The endpoint that merges.

    Returns
    -------
    Response
        The merged answer; a failure if no endpoint answered.

    Examples
    --------
    >>> import asyncio
    >>> merged = asyncio.run(sk.broadcast_and_reduce(pool.select([0, 1]), "Who?", "Merge: {responses}"))
    >>> print(merged.text)
    echo: Merge: echo: Who?
    ---
    echo: Who?
    """
    answers = [r.text for r in await broadcast(pool, prompt) if r.success]
    if not answers:
        return Response(False, "", error=f"{none_of(pool.size, 'endpoint')} answered the broadcast")
    return await pool.post(reducer_agent_index, reduce_prompt.replace("{responses}", SEPARATOR.join(answers)))
