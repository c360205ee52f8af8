"""Merge many answers into one, level by level.

The nodes of a level are sent together, over all groups, in one scatter. A node whose request fails for good is not
part of the levels above; its leaves count as missing, and the rest of the tree continues.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, Literal

from ..errors import SettingError
from ..pool.agent_pool import AgentPool
from ..pool.vllm_pool import VLLMPool
from ..records import Response
from .broadcast import SEPARATOR

__all__ = ["Node", "ScatterLevel", "Settle", "bundles", "check_fanin", "reduce_groups", "roots", "tree_reduce"]

UNKNOWN_CONTEXT_FANIN = 50
_ELLIPSIS = " [...]"

Settle = Callable[[int, Response | None], None]
"""Takes the response to one of a level's prompts, by its number; None takes it back."""
ScatterLevel = Callable[[list[str], int, Settle], Awaitable[None]]
"""Sends the prompts of one level (counted from 1), and settles each of them."""
Render = Callable[[int, int, str], str]
"""Makes a node's prompt from the number of its group, its level and the joined answers of its children."""


@dataclass(slots=True)
class Node:
    """A node of the tree.

    Attributes
    ----------
    node, parent : int, int or None
        Numbers, from 0, leaves first; the root of a group and nodes that failed have no parent.
    level : int
        0 for leaves; otherwise one more than the highest of its children.
    group : int
        Number of its group.
    n_leaves : int
        Number of leaves that are part of its answer.
    response, error : str or None
        The answer, or why there is none.
    n_shortened : int
        Children whose answers were cut so that all together fit the model's context.
    """

    node: int
    level: int
    group: int
    n_leaves: int
    response: str | None
    error: str | None = None
    parent: int | None = None
    n_shortened: int = 0


def check_fanin(fanin: int | Literal["auto"]) -> int | Literal["auto"]:
    """Validate a fan-in: 2 or more, or "auto"."""
    if fanin == "auto" or (isinstance(fanin, int) and not isinstance(fanin, bool) and fanin >= 2):
        return fanin
    raise SettingError(f"fanin={fanin!r}: must be 'auto' or a whole number, 2 or more; with less a tree never ends")


def bundles(lengths: Sequence[int], fanin: int | None, room: int | None) -> list[range]:
    """Divide the children of a level into bundles, one for each node of the level above.

    Parameters
    ----------
    lengths : sequence of int
        Characters of each child's answer.
    fanin : int or None
        Children per node; None packs as many as fit ``room``, and at least two.
    room : int or None
        Characters that the children of a node may have together.

    Returns
    -------
    list of range
        Positions in ``lengths``, in order; of equal size, to within one, if ``fanin`` is a number.

    Examples
    --------
    >>> bundles([1] * 7, 3, None)
    [range(0, 3), range(3, 5), range(5, 7)]
    >>> bundles([400, 400, 400, 100], None, 1000)
    [range(0, 2), range(2, 4)]
    """
    count = len(lengths)
    if fanin is None and room is None:
        fanin = UNKNOWN_CONTEXT_FANIN
    if fanin is not None:
        nodes = -(-count // fanin)
        small, larger = divmod(count, nodes)
        cuts = [0]
        for i in range(nodes):
            cuts.append(cuts[-1] + small + (i < larger))
    else:
        cuts, used = [0], 0
        for place, length in enumerate(lengths):
            needed = length + len(SEPARATOR)
            if place - cuts[-1] >= 2 and used + needed > (room or 0):
                cuts.append(place)
                used = 0
            used += needed
        cuts.append(count)
    return [range(a, b) for a, b in pairwise(cuts)]


def shorten(texts: Sequence[str], room: int | None) -> tuple[list[str], int]:
    """Cut the longest of some texts so that all together fit ``room`` characters; the texts, and how many were cut.

    Examples
    --------
    >>> texts, cut = shorten(["short", "x" * 100], 60)
    >>> texts[0], cut
    ('short', 1)
    """
    free = None if room is None else room - len(SEPARATOR) * (len(texts) - 1)
    if free is None or sum(map(len, texts)) <= free:
        return list(texts), 0
    # The largest equal share: texts shorter than it leave their remainder to the longer ones.
    left, share = max(free, len(texts)), 0
    for rank, length in enumerate(sorted(map(len, texts))):
        share = left // (len(texts) - rank)
        if length > share:
            break
        left -= length
    keep = max(1, share - len(_ELLIPSIS))
    return [t if len(t) <= share else t[:keep] + _ELLIPSIS for t in texts], sum(len(t) > share for t in texts)


async def reduce_groups(
    nodes: list[Node],
    groups: int,
    scatter_level: ScatterLevel,
    render: Render,
    *,
    fanin: int | None,
    room: int | None = None,
) -> None:
    """Reduce each group of leaves to one answer.

    Parameters
    ----------
    nodes : list of Node
        The leaves. Nodes are appended to this list, so that an interrupted reduction keeps its finished nodes;
        ``roots`` finds the answers.
    groups : int
        Number of groups.
    scatter_level : callable
        Sends a level's prompts. What it has settled is part of the nodes at once, also if it raises.
    render : callable
        Makes a node's prompt.
    fanin : int or None
        Children per node; None packs by ``room``.
    room : int, optional
        Characters the children of a node may have together.
    """
    tops: list[list[Node]] = [[] for _ in range(groups)]
    for leaf in nodes:
        tops[leaf.group].append(leaf)
    rounds = 0
    while any(len(top) > 1 for top in tops):
        rounds += 1
        grown: list[tuple[Node, list[Node]]] = []
        prompts: list[str] = []
        for group, top in enumerate(tops):
            if len(top) < 2:
                continue
            tops[group] = []
            level = 1 + max(n.level for n in top)
            for places in bundles([len(n.response or "") for n in top], fanin, room):
                children = [top[i] for i in places]
                if len(children) == 1:  # a single child moves on to the next level
                    tops[group].append(children[0])
                    continue
                texts, cut = shorten([n.response or "" for n in children], room)
                prompts.append(render(group, level, SEPARATOR.join(texts)))
                node = Node(len(nodes), level, group, sum(n.n_leaves for n in children), None, n_shortened=cut)
                nodes.append(node)
                grown.append((node, children))
                tops[group].append(node)
        await scatter_level(prompts, rounds, partial(_settle, grown))
        tops = [[n for n in top if n.error is None] for top in tops]


def _settle(grown: Sequence[tuple[Node, Sequence[Node]]], number: int, reply: Response | None) -> None:
    node, children = grown[number]
    node.response = reply.text if reply and reply.success else None
    node.error = (reply.error or "no answer") if reply and not reply.success else None
    node.n_leaves = sum(child.n_leaves for child in children) if node.error is None else 0
    for child in children:
        child.parent = node.node if reply else None


def roots(nodes: Sequence[Node], groups: int) -> list[Node | None]:
    """The node with each group's answer; None for a group without one."""
    found: list[Node | None] = [None] * groups
    tops = [0] * groups
    for node in nodes:
        if node.parent is None and node.response is not None:
            found[node.group] = node
            tops[node.group] += 1
    return [node if count == 1 else None for node, count in zip(found, tops, strict=True)]


async def tree_reduce(
    pool: AgentPool, prompt: str, reduce_prompt: str, fanin: int = 50, items: list[Any] | None = None
) -> Response:
    """Ask the leaves, then merge their answers until one is left.

    Parameters
    ----------
    pool : AgentPool
        The endpoints, for leaves and nodes.
    prompt : str
        The leaves' prompt. With ``items``, ``{item}`` is replaced by each item; without, every endpoint is a leaf.
    reduce_prompt : str
        The nodes' prompt; ``{responses}`` is replaced by their children's answers, ``{level}`` by their level.
    fanin : int, default 50
        Children per node, 2 or more.
    items : list, optional
        One leaf for each item.

    Returns
    -------
    Response
        The merged answer; a failure if no leaf or no node answered.

    Raises
    ------
    SettingError
        ``fanin`` below 2, or ``{responses}`` is not in ``reduce_prompt``.

    Examples
    --------
    >>> import asyncio
    >>> merged = asyncio.run(tree_reduce(pool, "Read {item}.", "Merge: {responses}", items=["a", "b"]))
    >>> print(merged.text)
    echo: Merge: echo: Read a.
    ---
    echo: Read b.
    """
    check_fanin(fanin)
    if "{responses}" not in reduce_prompt:
        raise SettingError("reduce_prompt must contain {responses}, which is replaced by the answers to merge")
    if items is None:
        answers = await pool.broadcast_prompt(prompt)
    else:
        answers = await pool.send_all_batched([prompt.replace("{item}", str(item)) for item in items])
    leaves = [r.text for r in answers if r.success]
    if not leaves:
        error = next((r.error for r in answers), "there were no prompts")
        return Response(False, "", error=f"no leaf answered; the first error: {error}")
    cap = pool.max_tokens_aggregation if isinstance(pool, VLLMPool) else None

    async def scatter_level(prompts: list[str], level: int, settle: Settle) -> None:
        for number, reply in enumerate(await pool.send_all_batched(prompts, max_tokens=cap)):
            settle(number, reply)

    def render(group: int, level: int, responses: str) -> str:
        values = {"{responses}": responses, "{level}": str(level)}
        return re.sub(r"\{responses\}|\{level\}", lambda m: values[m[0]], reduce_prompt)

    nodes = [Node(i, 0, 0, 1, text) for i, text in enumerate(leaves)]
    await reduce_groups(nodes, 1, scatter_level, render, fanin=int(fanin))
    root = roots(nodes, 1)[0]
    if root is None:
        return Response(False, "", error=next((n.error for n in reversed(nodes) if n.error), "no answer"))
    return Response(True, root.response or "")
