"""The same prompts to several models: their answers side by side, how often they agree, and what each has cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Unpack

import pandas as pd

from ..client import io_thread
from ..errors import SettingError
from ..frames.answers import TypedAnswers
from ..frames.call import arguments
from ..frames.options import ModelsOptions
from ..frames.prompts import PromptLike, check_frame, values_of
from ..frames.scatter import ScatterFrame
from ..frames.signatures import takes
from ..frames.verbs import scatter
from ..pool.connect import use_pool
from ..runs.run import last_run
from ..runs.stats import RunStats
from ..text import plural

__all__ = ["ModelComparison", "compare_models"]


class ModelComparison:
    """The result of ``compare_models``.

    Attributes
    ----------
    frame : pandas.DataFrame
        The rows, with the columns of ``scatter`` for each model: ``<out>_<model>``, ``<out>_<model>_error``, and those
        of the schema's fields.
    summary : pandas.DataFrame
        A row per model: ``answered``, ``failed``, ``cut_off`` (rows), ``prompt_tokens``, ``completion_tokens`` (spent
        in these runs), ``time_s`` (seconds; the models were asked one after another).
    agreement : pandas.DataFrame
        Models by models: the share of the rows answered by both, 0 to 1, whose answers are the same: all fields of the
        schema, or the whole text without one.
    differing : pandas.DataFrame
        The texts of the rows whose answers are not all the same, a column per model.

    Examples
    --------
    >>> with sk.local(1, engine="echo", models=["tuned"]) as swarm, sk.connect(swarm) as pool:
    ...     found = sk.compare_models(df, "What does {gene} do?", ["echo", "tuned"], pool=pool)
    >>> found, found.summary["answered"].tolist()
    (<ModelComparison of 2 models on 2 rows; 2 rows answered differently>, [2, 2])
    """

    def __init__(self, frame: pd.DataFrame, summary: pd.DataFrame, answers: dict[str, TypedAnswers]) -> None:
        self.frame = frame
        self.summary = summary
        keys = {name: _keys(frame, typed) for name, typed in answers.items()}
        shares = {a: {b: _agree(keys[a], keys[b]) for b in keys} for a in keys}
        self.agreement = pd.DataFrame(shares, index=list(keys), columns=list(keys), dtype="float64")
        differ = [len({*row} - {None}) > 1 for row in zip(*keys.values(), strict=True)]
        texts = frame.loc[:, [typed.out for typed in answers.values()]].set_axis(list(answers), axis=1)
        self.differing = texts[pd.Series(differ, frame.index, dtype=bool).to_numpy()]

    def __repr__(self) -> str:
        what = f"{plural(len(self.summary), 'model')} on {plural(len(self.frame), 'row')}"
        return f"<ModelComparison of {what}; {plural(len(self.differing), 'row')} answered differently>"

    def _repr_html_(self) -> str:
        return str(self.summary.to_html()) + str(self.agreement.to_html())


@takes(ModelsOptions)
def compare_models(
    df: pd.DataFrame,
    prompt: PromptLike,
    models: Sequence[str],
    *,
    out: str = "response",
    **options: Unpack[ModelsOptions],
) -> ModelComparison:
    """Ask several models the same, one after another.

    Parameters
    ----------
    df : pandas.DataFrame
        The rows. Never changed.
    prompt : str, callable or Series
        As for ``scatter``.
    models : sequence of str
        Names of models that the endpoints serve, two or more.
    out : str, default "response"
        The columns of answers are ``<out>_<model>``.

    Returns
    -------
    ModelComparison
        ``.frame``, ``.summary``, ``.agreement`` and ``.differing``.

    Raises
    ------
    SettingError
        A model is not served, or a column of the frame has the name of one of the answers; nothing was asked then.
    NoEndpointsError, ScatterInterrupted, ScatterError
        As for ``scatter``; ``.frame`` has the answers of the models so far.

    Notes
    -----
    ``deadline=`` holds for all models together: rows that it leaves are those of the last models, and no share of
    ``agreement`` counts them.

    Examples
    --------
    >>> with sk.local(1, engine="echo", models=["tuned"]) as swarm, sk.connect(swarm) as pool:
    ...     found = sk.compare_models(df, "What does {gene} do?", ["echo", "tuned"], pool=pool)
    >>> found.frame["response_tuned"].tolist(), found.agreement["echo"].tolist()
    (['tuned: What does lacZ do?', 'tuned: What does recA do?'], [1.0, 0.0])
    """
    given = arguments(compare_models, {"out": out, **options})
    check_frame(df)
    names = [] if isinstance(models, str) else list(models)
    if len(names) < 2 or len({*map(repr, names)}) < len(names):
        raise SettingError(f"models={models!r}: must be a list of two models or more, none of them twice")
    whose: dict[str, str] = {}
    for name in names:  # no column is in the way, or nothing is asked
        for column in ScatterFrame(df, prompt, {**given, "out": f"{out}_{name}"})._adds:
            if (other := whose.setdefault(column, name)) != name:
                raise SettingError(
                    f"the models {other!r} and {name!r} would both have the column {column!r}: ask one of them in a "
                    "call of its own, with another out="
                )
    pool, owned = use_pool(given["pool"])
    costs: list[dict[str, Any]] = []
    answers: dict[str, TypedAnswers] = {}
    frame = df
    try:
        for name in names:
            pool.by_model(name)  # it is there, or nothing is asked
        for name in names:
            answers[name] = TypedAnswers(given["schema"], f"{out}_{name}", True, "numpy_nullable")
            own: Any = {**options, "pool": pool, "model": name, "out": answers[name].out, "deadline": given["deadline"]}
            frame = scatter(frame, prompt, **own)
            costs.append(_cost(last_run().stats))
    finally:
        if owned:
            io_thread.call(pool.close())
    return ModelComparison(frame, pd.DataFrame(costs, index=pd.Index(names, name="model")), answers)


def _cost(stats: RunStats) -> dict[str, Any]:
    """A row of the summary."""
    return {
        "answered": stats.known,
        "failed": stats.failed,
        "cut_off": stats.cut,
        "prompt_tokens": stats.prompt_tokens,
        "completion_tokens": stats.completion_tokens,
        "time_s": stats.time_s,
    }


def _keys(frame: pd.DataFrame, typed: TypedAnswers) -> list[str | None]:
    """What is compared of each row's answer; None where there is none."""
    columns = [values_of(frame[name]) for name in typed.names or [typed.out]]
    failed = frame[f"{typed.out}_error"].notna()
    return [None if f else repr(values) for f, *values in zip(failed, *columns, strict=True)]


def _agree(one: Sequence[str | None], other: Sequence[str | None]) -> float:
    both = [a == b for a, b in zip(one, other, strict=True) if a is not None and b is not None]
    return sum(both) / len(both) if both else float("nan")
