"""``df.swarm`` and ``series.swarm``: the verbs as methods. One-line delegations, no state.

``frames`` is imported when a verb is used: it brings the HTTP client along, and ``import swarmkit`` is to be quick.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pandas as pd

if TYPE_CHECKING:
    from .compare import Comparison
    from .prompts import PromptLike
    from .run import Run

__all__ = ["FrameSwarm", "SeriesSwarm"]


def _frames() -> Any:
    from . import frames

    return frames


@pd.api.extensions.register_dataframe_accessor("swarm")
class FrameSwarm:
    """The verbs on a DataFrame; parameters are those of the functions they name."""

    def __init__(self, df: pd.DataFrame) -> None:
        self._df = df

    def scatter(self, prompt: PromptLike, **options: Any) -> pd.DataFrame:
        """Send one prompt per row; returns the frame with the answers. See ``swarmkit.scatter``."""
        return _frames().scatter(self._df, prompt, **options)

    async def ascatter(self, prompt: PromptLike, **options: Any) -> pd.DataFrame:
        """``scatter``, to be awaited. See ``swarmkit.ascatter``."""
        return await _frames().ascatter(self._df, prompt, **options)

    def iter_scatter(self, prompt: PromptLike, **options: Any) -> Iterator[pd.DataFrame]:
        """Yield finished rows as they finish. See ``swarmkit.iter_scatter``."""
        return _frames().iter_scatter(self._df, prompt, **options)

    def submit(self, prompt: PromptLike, **options: Any) -> Run:
        """Start a scatter and return at once. See ``swarmkit.submit``."""
        return _frames().submit(self._df, prompt, **options)

    def tree_reduce(self, column: str, prompt: str, **options: Any) -> pd.DataFrame:
        """Merge a column of texts into one answer a group. See ``swarmkit.tree_reduce``."""
        return _frames().tree_reduce(self._df, column, prompt, **options)

    async def atree_reduce(self, column: str, prompt: str, **options: Any) -> pd.DataFrame:
        """``tree_reduce``, to be awaited. See ``swarmkit.atree_reduce``."""
        return await _frames().atree_reduce(self._df, column, prompt, **options)

    def preview(self, prompt: PromptLike, n: int = 3, **options: Any) -> pd.DataFrame:
        """Show what would be sent, before anything is. See ``swarmkit.preview``."""
        return _frames().preview(self._df, prompt, n, **options)

    def compare(self, prompt: PromptLike, **options: Any) -> Comparison:
        """Measure batch against single requests. See ``swarmkit.compare``."""
        from .compare import compare

        return compare(self._df, prompt, **options)


@pd.api.extensions.register_series_accessor("swarm")
class SeriesSwarm:
    """The verbs on a Series of texts: ``{value}`` is the placeholder, and the prompt where none is given."""

    def __init__(self, series: pd.Series) -> None:
        self._df = series.to_frame("value")

    def scatter(self, prompt: PromptLike = "value", **options: Any) -> pd.DataFrame:
        """Send one prompt per row; returns the frame with the answers. See ``swarmkit.scatter``."""
        return _frames().scatter(self._df, prompt, **options)

    async def ascatter(self, prompt: PromptLike = "value", **options: Any) -> pd.DataFrame:
        """``scatter``, to be awaited. See ``swarmkit.ascatter``."""
        return await _frames().ascatter(self._df, prompt, **options)

    def iter_scatter(self, prompt: PromptLike = "value", **options: Any) -> Iterator[pd.DataFrame]:
        """Yield finished rows as they finish. See ``swarmkit.iter_scatter``."""
        return _frames().iter_scatter(self._df, prompt, **options)

    def submit(self, prompt: PromptLike = "value", **options: Any) -> Run:
        """Start a scatter and return at once. See ``swarmkit.submit``."""
        return _frames().submit(self._df, prompt, **options)

    def tree_reduce(self, prompt: str, **options: Any) -> pd.DataFrame:
        """Merge a column of texts into one answer a group. See ``swarmkit.tree_reduce``."""
        return _frames().tree_reduce(self._df, "value", prompt, **options)

    async def atree_reduce(self, prompt: str, **options: Any) -> pd.DataFrame:
        """``tree_reduce``, to be awaited. See ``swarmkit.atree_reduce``."""
        return await _frames().atree_reduce(self._df, "value", prompt, **options)

    def preview(self, prompt: PromptLike = "value", n: int = 3, **options: Any) -> pd.DataFrame:
        """Show what would be sent, before anything is. See ``swarmkit.preview``."""
        return _frames().preview(self._df, prompt, n, **options)

    def compare(self, prompt: PromptLike = "value", **options: Any) -> Comparison:
        """Measure batch against single requests. See ``swarmkit.compare``."""
        from .compare import compare

        return compare(self._df, prompt, **options)
