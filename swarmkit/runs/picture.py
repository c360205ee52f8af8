"""The picture of a run, drawn by whoever knows how: this package has no plots."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .stats import RunStats

__all__ = ["picture", "register_picture"]

_drawers: list[Callable[[RunStats], Figure]] = []


def register_picture(draw: Callable[[RunStats], Figure]) -> Callable[[RunStats], Figure]:
    """Register what draws a run."""
    _drawers.append(draw)
    return draw


def picture(stats: RunStats) -> Figure:
    """The picture of a run."""
    return _drawers[-1](stats)
