"""How a run is drawn and watched, registered by whoever knows: this package has neither plots nor widgets."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .run import Run
    from .stats import RunStats

__all__ = ["monitor", "picture", "register_monitor", "register_picture"]

_pictures: list[Callable[[RunStats], Figure]] = []
_monitors: list[Callable[[Run], object]] = []


def register_picture(draw: Callable[[RunStats], Figure]) -> Callable[[RunStats], Figure]:
    """Register what draws a run."""
    _pictures.append(draw)
    return draw


def picture(stats: RunStats) -> Figure:
    """The picture of a run."""
    return _pictures[-1](stats)


def register_monitor(show: Callable[[Run], object]) -> Callable[[Run], object]:
    """Register ``show`` for the runs that are called with ``monitor=True``; the newest registration is used."""
    _monitors.append(show)
    return show


def monitor() -> Callable[[Run], object] | None:
    """What shows a run that is called with ``monitor=True``."""
    return _monitors[-1] if _monitors else None
