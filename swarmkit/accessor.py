"""``df.swarm`` and ``series.swarm``: the verbs as methods.

The methods are made of the functions, signature and docstring included, when they are first used: the functions'
modules import the HTTP client, and ``import swarmkit`` must be quick.
"""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any, Concatenate, Generic, Literal, ParamSpec, Protocol, TypeVar, Unpack, overload

import pandas as pd

from .runs.notebook import show_warnings_in_boxes
from .runs.registered import register_monitor, register_picture
from .text import plural

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from matplotlib.figure import Figure

    from .analysis import compare as comparison
    from .analysis import estimate as estimation
    from .analysis import semantic_entropy as meaning
    from .analysis import similar as likeness
    from .analysis import votes
    from .frames import classify as classification
    from .frames import embed as embedding
    from .frames import filter as filtering
    from .frames import look as looking
    from .frames import pipeline as pipelines
    from .frames import verbs
    from .frames.options import EmbedOptions
    from .frames.prompts import PromptLike
    from .runs.run import Run
    from .runs.stats import RunStats

__all__ = ["FrameSwarm", "SeriesSwarm", "overview"]

P = ParamSpec("P")
R_co = TypeVar("R_co", covariant=True)
M = TypeVar("M")
F_co = TypeVar("F_co", covariant=True)
A_co = TypeVar("A_co", covariant=True)


show_warnings_in_boxes()


@register_monitor
def _show(run: Run) -> None:
    from .widgets import show  # slow to import, and only monitor=True needs it

    show(run)


@register_picture
def _draw(stats: RunStats) -> Figure:
    from .analysis.plots import overview as draw  # slow to import, too

    return draw(stats)


class _Module:
    """A module that is imported when something of it is used."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> Any:
        return getattr(import_module(self._name, __package__), name)


if not TYPE_CHECKING:
    verbs, comparison = _Module(".frames.verbs"), _Module(".analysis.compare")
    classification, estimation = _Module(".frames.classify"), _Module(".analysis.estimate")
    filtering, likeness = _Module(".frames.filter"), _Module(".analysis.similar")
    votes, meaning = _Module(".analysis.votes"), _Module(".analysis.semantic_entropy")
    pipelines = _Module(".frames.pipeline")
    embedding = _Module(".frames.embed")
    looking = _Module(".frames.look")


class _Verb(Generic[M]):
    """A verb as a method of a class, made when it is first used; for arguments see ``as_method``."""

    def __init__(self, load: Callable[[], Callable[..., Any]], *fixed: Any, **defaults: Any) -> None:
        self._load = load
        self._how = fixed, defaults
        self._method: Any = None

    def __get__(self, instance: object, owner: type) -> M:
        if self._method is None:
            from .frames.signatures import as_method

            fixed, defaults = self._how
            self._method = as_method(self._load(), owner, *fixed, **defaults)
        method: M = self._method.__get__(instance, owner)
        return method


class _DefaultPrompt(Protocol[P, R_co]):
    """A method whose prompt has a default."""

    def __call__(self, prompt: PromptLike | None = "value", *args: P.args, **options: P.kwargs) -> R_co: ...


class _Embeds(Protocol[F_co, A_co]):
    """``embed`` as a method, which returns a frame or an array; that of a frame needs its prompt."""

    @overload
    def __call__(
        self, prompt: PromptLike = "value", *, as_array: Literal[False] = False, **options: Unpack[EmbedOptions]
    ) -> F_co: ...
    @overload
    def __call__(
        self, prompt: PromptLike = "value", *, as_array: Literal[True], **options: Unpack[EmbedOptions]
    ) -> A_co: ...


if TYPE_CHECKING:
    Embeds = _Embeds[pd.DataFrame, npt.NDArray[np.float32]]
    AwaitedEmbeds = _Embeds[Awaitable[pd.DataFrame], Awaitable[npt.NDArray[np.float32]]]


def _of_frame(load: Callable[[], Callable[Concatenate[pd.DataFrame, P], R_co]]) -> _Verb[Callable[P, R_co]]:
    return _Verb(load)


def _of_values(
    load: Callable[[], Callable[Concatenate[pd.DataFrame, PromptLike | None, P], R_co]],
) -> _Verb[_DefaultPrompt[P, R_co]]:
    return _Verb(load, prompt="value")


def _of_column(load: Callable[[], Callable[Concatenate[pd.DataFrame, str, P], R_co]]) -> _Verb[Callable[P, R_co]]:
    return _Verb(load, "value")


@pd.api.extensions.register_dataframe_accessor("swarm")
class FrameSwarm:
    """The verbs on a DataFrame: the functions of the same names, called with the frame.

    Examples
    --------
    >>> df.swarm.scatter("What does {gene} do?")["response"].tolist()
    ['echo: What does lacZ do?', 'echo: What does recA do?']
    """

    scatter = _of_frame(lambda: verbs.scatter)
    ascatter = _of_frame(lambda: verbs.ascatter)
    iter_scatter = _of_frame(lambda: verbs.iter_scatter)
    submit = _of_frame(lambda: verbs.submit)
    tree_reduce = _of_frame(lambda: verbs.tree_reduce)
    atree_reduce = _of_frame(lambda: verbs.atree_reduce)
    classify = _of_frame(lambda: classification.classify)
    filter = _of_frame(lambda: filtering.filter)
    vote = _of_frame(lambda: votes.vote)
    semantic_entropy = _of_frame(lambda: meaning.semantic_entropy)
    similar = _of_frame(lambda: likeness.similar)
    dedupe = _of_frame(lambda: likeness.dedupe)
    pipeline = _of_frame(lambda: pipelines.pipeline)
    embed: _Verb[Embeds] = _Verb(lambda: embedding.embed)
    aembed: _Verb[AwaitedEmbeds] = _Verb(lambda: embedding.aembed)
    preview = _of_frame(lambda: verbs.preview)
    show = _of_frame(lambda: looking.show)
    failed = _of_frame(lambda: looking.failed)
    compare = _of_frame(lambda: comparison.compare)
    estimate = _of_frame(lambda: estimation.estimate)

    def __init__(self, df: pd.DataFrame) -> None:
        self._df = df

    def __repr__(self) -> str:
        return overview(self, f"a DataFrame of {plural(len(self._df), 'row')}")


@pd.api.extensions.register_series_accessor("swarm")
class SeriesSwarm:
    """The verbs on a Series of texts: ``{value}`` is the placeholder, as is the Series' own name, and the text
    itself the prompt by default.

    Examples
    --------
    >>> df["gene"].swarm.scatter()["response"].tolist()
    ['echo: lacZ', 'echo: recA']
    >>> df["gene"].swarm.scatter("What does {value} do?")["response"].tolist()
    ['echo: What does lacZ do?', 'echo: What does recA do?']
    """

    scatter = _of_values(lambda: verbs.scatter)
    ascatter = _of_values(lambda: verbs.ascatter)
    iter_scatter = _of_values(lambda: verbs.iter_scatter)
    submit = _of_values(lambda: verbs.submit)
    tree_reduce = _of_column(lambda: verbs.tree_reduce)
    atree_reduce = _of_column(lambda: verbs.atree_reduce)
    classify = _of_frame(lambda: classification.classify)
    filter = _of_frame(lambda: filtering.filter)
    vote = _of_column(lambda: votes.vote)
    semantic_entropy = _of_column(lambda: meaning.semantic_entropy)
    similar = _of_column(lambda: likeness.similar)
    dedupe = _of_column(lambda: likeness.dedupe)
    pipeline = _of_frame(lambda: pipelines.pipeline)
    embed: _Verb[Embeds] = _Verb(lambda: embedding.embed, prompt="value")
    aembed: _Verb[AwaitedEmbeds] = _Verb(lambda: embedding.aembed, prompt="value")
    preview = _of_values(lambda: verbs.preview)
    compare = _of_values(lambda: comparison.compare)
    estimate = _of_values(lambda: estimation.estimate)

    def __init__(self, series: pd.Series) -> None:
        self._series = series

    @property
    def _df(self) -> pd.DataFrame:
        # Made anew each time: pandas 2 keeps the accessor of a Series, which may have been changed in place.
        return self._series.to_frame(self._name)

    @property
    def _name(self) -> str:
        """The name of its column: its own, where a template can have it."""
        name = self._series.name
        return name if isinstance(name, str) and name and not set(name) & set("{}:!.[]") else "value"

    def _named(self, args: list[Any], options: dict[str, Any]) -> tuple[pd.DataFrame, list[Any], dict[str, Any]]:
        """The frame and the arguments of a verb. The texts have the Series' own name, unless the answers have it, and
        the prompt may use the other name, too."""
        from .frames.prompts import with_alias

        own, options = self._name, dict(options)
        steps = options.get("steps", args[0] if args else None)
        of_steps = [getattr(step, "name", None) for step in steps] if isinstance(steps, list | tuple) else []
        name, alias = ("value", own) if own in (options.get("out"), *of_steps) else (own, "value")
        frame = self._series.to_frame(name)
        if name == alias or own in of_steps:
            return frame, args, options
        for option in options.keys() & {"prompt", "messages", "steps", "examples"}:
            options[option] = with_alias(options[option], alias, name)
        return frame, [with_alias(value, alias, name) for value in args[:1]] + args[1:], options

    def __repr__(self) -> str:
        return overview(self, f"a Series of {plural(len(self._df), 'value')}")


def overview(accessor: object, what: str) -> str:
    """The verbs of an accessor, a line each, and the default pool; connects to nothing."""
    from .pool.connect import current_pool

    pool = current_pool() or "none yet; sk.connect(...) makes one, or the first verb connects to $SWARMKIT_HOSTFILE"
    names = [name for name in vars(type(accessor)) if not name.startswith("_")]
    widest = max(map(len, names))
    lines = [f"<swarm: verbs on {what}", f"  pool: {pool}"]
    for name in names:
        summary = (inspect.getdoc(getattr(accessor, name)) or "").partition("\n")[0].replace("``", "")
        lines.append(f"  .{name:<{widest}} {summary}")
    return "\n".join(lines) + ">"
