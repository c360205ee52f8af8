"""Endpoints with roles that write on one board, round by round."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

from ..pool.agent_pool import AgentPool

__all__ = ["Blackboard"]

Board = dict[str, list[str]]


class Blackboard:
    """A board of sections, each written by the endpoints whose tag ``role`` is its name.

    Parameters
    ----------
    sections : iterable of str
        Names of the sections, in the order in which they are written in a round.
    prompt_fn : callable
        Makes the prompt for a section from its name and the board.

    Attributes
    ----------
    board : dict of str to list of str
        The texts of each section.
    round : int
        Rounds that are complete.

    Examples
    --------
    >>> board = Blackboard(["ideas", "critiques"], lambda role, board: f"{role}? So far: {board}")
    >>> board.snapshot()
    {'round': 0, 'board': {'ideas': [], 'critiques': []}}
    >>> import asyncio
    >>> with sk.VLLMPool([f"{swarm.urls[0]} role=ideas"], api_key="a-key") as pool:
    ...     asyncio.run(board.run(pool, max_rounds=1))
    {'ideas': ["echo: ideas? So far: {'ideas': [], 'critiques': []}"], 'critiques': []}
    """

    def __init__(self, sections: Iterable[str], prompt_fn: Callable[[str, Board], str]) -> None:
        self.board: Board = {section: [] for section in sections}
        self.round = 0
        self._prompt_fn = prompt_fn

    def snapshot(self) -> dict[str, Any]:
        """The number of rounds and the board, as a copy."""
        return {"round": self.round, "board": copy.deepcopy(self.board)}

    async def run(
        self, pool: AgentPool, max_rounds: int = 10, convergence_fn: Callable[[Board], bool] | None = None
    ) -> Board:
        """Let the endpoints write on the board, in rounds.

        Parameters
        ----------
        pool : AgentPool
            Endpoints with the tag ``role``; those without, and those of other roles, are not asked. What fails writes
            nothing.
        max_rounds : int, default 10
            Most rounds.
        convergence_fn : callable, optional
            Says of the board, after a round, whether it is done.

        Returns
        -------
        dict of str to list of str
            The board.
        """
        roles = {endpoint.tags.get("role") for endpoint in pool.endpoints}
        for _ in range(max_rounds):
            for section in self.board:
                if section in roles:
                    prompt = self._prompt_fn(section, self.board)
                    responses = await pool.by_tag("role", section).broadcast_prompt(prompt)
                    self.board[section] += [r.text for r in responses if r.success]
            self.round += 1
            if convergence_fn is not None and convergence_fn(self.board):
                break
        return self.board
