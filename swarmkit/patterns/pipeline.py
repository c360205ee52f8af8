"""Stages of endpoints, each of which gets what the stage before has answered.

Rows of a DataFrame go through their steps by ``swarmkit.pipeline``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import SettingError
from ..pool.agent_pool import AgentPool
from ..records import Response
from .broadcast import broadcast_and_reduce

__all__ = ["Stage", "fan_out_fan_in", "run_pipeline"]


@dataclass
class Stage:
    """A stage of ``run_pipeline``: some endpoints that get one prompt.

    Attributes
    ----------
    name : str
        Its name, for messages.
    prompt_template : str
        The prompt; ``{input}`` is replaced by what the stage before has given.
    n_agents : int
        Endpoints, 1 or more; fewer where the pool has fewer.
    output_transform : callable, optional
        Makes one value of the list of responses, for the next stage; otherwise the texts of those that succeeded, a
        line each.
    output_filter : callable, optional
        Says of a response whether it counts.

    Examples
    --------
    >>> Stage("check", "Is that so? {input}", n_agents=2).output_filter is None
    True
    """

    name: str
    prompt_template: str
    n_agents: int
    output_transform: Callable[[list[Response]], Any] | None = None
    output_filter: Callable[[Response], bool] | None = None


async def run_pipeline(pool: AgentPool, stages: Sequence[Stage], initial_input: Any, reuse_agents: bool = True) -> Any:
    """Send each stage's prompt to its endpoints, one stage after another.

    Parameters
    ----------
    pool : AgentPool
        The endpoints.
    stages : sequence of Stage
        In order.
    initial_input : object
        What replaces ``{input}`` in the first stage.
    reuse_agents : bool, default True
        Whether each stage takes the first endpoints of the pool; otherwise those after the endpoints of the stage
        before.

    Returns
    -------
    object
        What the last stage gives: a text, unless it has an ``output_transform``.

    Raises
    ------
    SettingError
        A stage asks for no endpoint, or none is left for it.

    Examples
    --------
    >>> import asyncio
    >>> stages = [Stage("draft", "Write of {input}", 1), Stage("check", "Check: {input}", 1)]
    >>> asyncio.run(run_pipeline(pool, stages, "phages"))
    'echo: Check: echo: Write of phages'
    """
    value, first = initial_input, 0
    for stage in stages:
        if stage.n_agents < 1 or first >= pool.size:
            raise SettingError(
                f"the stage {stage.name!r} asks for {stage.n_agents} endpoints (1 or more are allowed), and "
                f"{pool.size - first} of {pool.size} are left for it: change n_agents, or use reuse_agents=True"
            )
        agents = pool.slice(first, first + stage.n_agents)
        first += 0 if reuse_agents else agents.size
        responses = await agents.broadcast_prompt(stage.prompt_template.replace("{input}", str(value)))
        responses = [r for r in responses if stage.output_filter is None or stage.output_filter(r)]
        value = (stage.output_transform or _lines)(responses)
    return value


def _lines(responses: list[Response]) -> str:
    return "\n".join(r.text for r in responses if r.success)


async def fan_out_fan_in(pool: AgentPool, prompt: str, collect_prompt: str, n_workers: int | None = None) -> Response:
    """Send one prompt to some endpoints, then have the first one merge their answers.

    Parameters
    ----------
    pool : AgentPool
        The endpoints.
    prompt : str
        The prompt for every worker.
    collect_prompt : str
        The merging prompt; ``{responses}`` is replaced by the answers.
    n_workers : int, optional
        How many endpoints are asked; otherwise all.

    Returns
    -------
    Response
        The merged answer; a failure if no worker answered.

    Raises
    ------
    SettingError
        ``n_workers`` below 1.

    Examples
    --------
    >>> import asyncio
    >>> merged = asyncio.run(fan_out_fan_in(pool, "Who?", "Merge: {responses}", n_workers=2))
    >>> print(merged.text)
    echo: Merge: echo: Who?
    ---
    echo: Who?
    """
    if n_workers is not None and n_workers < 1:
        raise SettingError(f"n_workers={n_workers!r}: must be a whole number, 1 or more")
    workers = pool if n_workers is None else pool.slice(0, n_workers)
    return await broadcast_and_reduce(workers, prompt, collect_prompt)
