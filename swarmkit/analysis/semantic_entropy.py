"""How many different things several answers to one question say."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal, Unpack

import numpy as np
import numpy.typing as npt
import pandas as pd

from ..errors import SettingError, warn
from ..frames.call import arguments
from ..frames.classify import LabelFrame, labelled
from ..frames.options import NOT_OF_LABELS, MeaningOptions
from ..frames.prompts import PromptLike, make_prompts
from ..frames.signatures import takes
from ..frames.typed import text_column
from ..uq.kle import heat_kernel, von_neumann_entropy
from ..uq.semantic_entropy import cluster_embeddings, cluster_entropy, cosines, leader_clusters
from .samples import Samples, beside
from .vectors import check_cosine, vectors_of

__all__ = ["semantic_entropy"]

Floats = npt.NDArray[np.float64]
VectorsOfTexts = str | npt.NDArray[Any] | Callable[[list[str]], npt.ArrayLike]

_USUAL_THRESHOLD = 0.9
_ENTAILMENT = ["entailment", "neutral", "contradiction"]
_NLI = (
    "{asked}Text 1: {one}\n\nText 2: {other}\n\n"
    "Does text 1 entail text 2 (entailment), contradict it (contradiction), or neither (neutral)?"
)
_SAME = ["yes", "no"]
_LLM = "{asked}Answer 1: {one}\n\nAnswer 2: {other}\n\nDo both answers say the same?"


@takes(MeaningOptions, without=NOT_OF_LABELS)
def semantic_entropy(
    df: pd.DataFrame,
    column: str = "response",
    *,
    by: Literal["nli", "embedding", "llm"],
    prompt: PromptLike | None = None,
    vectors: VectorsOfTexts | None = None,
    threshold: float | None = None,
    return_all: bool = False,
    **options: Unpack[MeaningOptions],
) -> pd.DataFrame:
    """Measure how much the answers to each question differ in meaning.

    The answers to a question are the rows that share its index label, as ``scatter(..., n=10, temperature=1)`` returns
    them. Those that mean the same are one cluster; the semantic entropy is that of the clusters [1]_ [2]_. The kernel
    entropy also knows how similar the clusters are [3]_. Both are 0 where all answers are the same, and at most the
    logarithm of their number.

    Answers count by their log-probabilities, divided by their tokens, where both are known: ``scatter(..., logprobs=0,
    details=True)``. Otherwise each counts the same. For the kernel entropy each counts the same.

    Parameters
    ----------
    df : pandas.DataFrame
        The rows. Never changed.
    column : str, default "response"
        The column of answers. Those that differ in white space around them only are one text.
    by : {"nli", "embedding", "llm"}
        What finds out which answers mean the same. "nli": a model is asked of each two different texts whether the
        first entails the second, and the second the first; both must be so. "llm": a model is asked once whether both
        say the same. "embedding": the cosines of their vectors; no model is asked. Of ten different texts "nli" asks 90
        questions, "llm" 45.
    prompt : str, callable or Series, optional
        What was asked, as for ``scatter``: "nli" and "llm" see the question beside the answers, and judge better.
    vectors : str, array or callable, optional
        For "embedding": the column of vectors, an array of shape (rows, n), or a function of a list of texts that
        returns one.
    threshold : float, optional
        For "embedding": the average cosine down to which clusters of answers are merged, 0.9 by default.
    return_all : bool, default False
        Whether the rows of ``df`` are returned, with their clusters.

    Returns
    -------
    pandas.DataFrame
        A row per index label, in order of appearance: ``semantic_entropy`` and ``kernel_entropy``, in nats;
        ``n_clusters`` and ``n_valid``, the answers that count; ``weighted``, whether by their log-probabilities; and
        ``error``, why a question has no entropy though it has answers. Missing answers, those beside an error in
        ``<column>_error``, and those without a vector do not count. With ``return_all`` the rows of ``df`` with
        ``<column>_cluster``, which is replaced: from 0 within each index label, in order of appearance.

    Raises
    ------
    UnknownColumnError, PromptError
        A column does not exist, several have its name, or ``prompt`` cannot be made.
    SettingError, TypeError
        ``by`` is none of these; an argument that means nothing beside it.
    NoEndpointsError, ScatterInterrupted, ScatterError
        As for ``classify``, which asks the model; ``.frame`` has the pairs of texts.

    References
    ----------
    .. [1] L. Kuhn, Y. Gal, S. Farquhar, "Semantic Uncertainty", ICLR 2023.
    .. [2] S. Farquhar, J. Kossen, L. Kuhn, Y. Gal, "Detecting hallucinations in large language models using semantic
       entropy", Nature 630, 2024.
    .. [3] A. Nikitin, J. Kossen, Y. Gal, P. Marttinen, "Kernel Language Entropy", NeurIPS 2024; for "nli" and "llm" the
       heat kernel of the graph of the different texts, for "embedding" the cosines.

    Examples
    --------
    >>> import swarmkit, pandas as pd
    >>> df = pd.DataFrame({"response": ["Paris", "It's Paris", "Rome"], "v": [[1, 0], [1, 0], [0, 1]]}, index=[0, 0, 0])
    >>> found = swarmkit.semantic_entropy(df, by="embedding", vectors="v")
    >>> found[["semantic_entropy", "n_clusters", "n_valid"]]
       semantic_entropy  n_clusters  n_valid
    0          0.636514           2        3
    """
    given = {**arguments(semantic_entropy, options), "out": "label", "details": True, "only_missing": False}
    if by not in ("nli", "embedding", "llm"):
        raise SettingError(f"by={by!r}: must be 'nli', 'embedding' or 'llm'")
    samples = Samples.of(df, column)
    if by == "embedding":
        if prompt is not None or options:
            name = next(iter(options), "prompt")
            raise SettingError(f"{name}= means nothing with by='embedding', which asks no model")
        judged = _by_vectors(df, samples, vectors, threshold)
    else:
        for name, value in (("vectors", vectors), ("threshold", threshold)):
            if value is not None:
                raise SettingError(
                    f"{name}= means nothing with by={by!r}, which asks a model: it is for by='embedding'"
                )
        judged = _by_model(df, samples, by, prompt, given)
    found = [*judged]
    if return_all:
        return _with_clusters(df, column, samples, found)
    return _entropies(samples, found, _log_probabilities(df, column))


@dataclass(frozen=True, slots=True)
class _Judged:
    """The answers to one question.

    Attributes
    ----------
    rows : array of int
        Positions of the answers that count.
    clusters : array of int
        Their clusters, from 1.
    kernel : array
        How similar each two of them are, with a diagonal of ones.
    error : str or None
        Why nothing is known of them.
    """

    rows: npt.NDArray[np.intp]
    clusters: npt.NDArray[np.int64]
    kernel: Floats
    error: str | None = None


def _groups(samples: Samples, counts: npt.NDArray[np.bool_]) -> list[npt.NDArray[np.intp]]:
    """The rows of each question that count."""
    order = np.argsort(samples.question, kind="stable")
    bounds = np.searchsorted(samples.question[order], np.arange(1, len(samples.index)))
    return [rows[counts[rows]] for rows in np.split(order, bounds)] if len(samples.index) else []


def _valid(samples: Samples) -> npt.NDArray[np.bool_]:
    return np.array([answer is not None for answer in samples.answers], bool)


# ---- by vectors ------------------------------


def _by_vectors(
    df: pd.DataFrame, samples: Samples, vectors: VectorsOfTexts | None, threshold: float | None
) -> Iterator[_Judged]:
    valid = _valid(samples)
    least = check_cosine("threshold", _USUAL_THRESHOLD if threshold is None else threshold)
    if vectors is None:
        raise SettingError(
            "by='embedding' needs vectors=: a column of vectors, an array of shape (rows, n), or a function of a list "
            "of texts"
        )
    if callable(vectors):
        texts = [str(answer) for answer in samples.answers if answer is not None]
        distinct = list(dict.fromkeys(texts))
        made = np.asarray(vectors(distinct)) if distinct else np.zeros((0, 1))
        if made.ndim != 2 or len(made) != len(distinct):
            raise SettingError(f"vectors= gave the shape {made.shape} for {len(distinct)} texts: must be (texts, n)")
        place = {text: number for number, text in enumerate(distinct)}
        vectors = np.full((len(df), made.shape[1]), np.nan)
        vectors[valid] = made[[place[text] for text in texts]]
    found, rows = vectors_of(df, vectors)
    place_of = np.full(len(df), -1)
    place_of[rows] = np.arange(len(rows))
    for group in _groups(samples, valid & (place_of >= 0)):
        own = found[place_of[group]]
        yield _Judged(group, cluster_embeddings(own, least), cosines(own))


# ---- by a model ------------------------------


def _by_model(
    df: pd.DataFrame, samples: Samples, by: str, prompt: PromptLike | None, given: dict[str, Any]
) -> Iterator[_Judged]:
    asked = [""] * len(df)
    if prompt is not None:
        asked = ["" if text is None else f"Question: {text}\n\n" for text in make_prompts(df, prompt).texts]
    groups = _groups(samples, _valid(samples))
    texts = [list(dict.fromkeys(str(samples.answers[row]) for row in rows)) for rows in groups]
    template, labels = (_NLI, _ENTAILMENT) if by == "nli" else (_LLM, _SAME)
    questions, prompts = [], []
    for number, (rows, distinct) in enumerate(zip(groups, texts, strict=True)):
        for one, other in combinations(distinct, 2):
            for first, second in [(one, other), (other, one)][: 2 if by == "nli" else 1]:
                questions.append(number)
                prompts.append(template.format(asked=asked[rows[0]], one=first, other=second))
    answers = _ask(prompts, samples.index.take(questions), labels, given)
    start = 0
    for rows, distinct in zip(groups, texts, strict=True):
        size = len(distinct)
        count = size * (size - 1) // (1 if by == "nli" else 2)
        yield _judged_by_model(
            rows, [distinct.index(str(samples.answers[row])) for row in rows], size, answers, start, count
        )
        start += count


@dataclass(frozen=True, slots=True)
class _Answers:
    """What a model said of pairs of texts.

    Attributes
    ----------
    same : array of bool
        Whether it says that the first means, or entails, the second.
    share : array of float
        How much it does: its probability, and half of that of "neutral".
    errors : list of str or None
        Why it says nothing.
    """

    same: npt.NDArray[np.bool_]
    share: Floats
    errors: list[str | None]


class _PairFrame(LabelFrame):
    """Pairs of texts, a row each."""

    def __init__(self, df: pd.DataFrame, prompt: PromptLike, labels: Sequence[str], given: Mapping[str, Any]) -> None:
        super().__init__(df, prompt, labels, given)
        self.label = "semantic_entropy"

    def hint(self) -> str:
        """What to do about failed rows."""
        return (
            "These are pairs of answers, and their index labels have no entropy. The same call asks again; with store= "
            "only these"
        )


def _ask(prompts: Sequence[str], index: pd.Index, labels: Sequence[str], given: dict[str, Any]) -> _Answers:
    if not prompts:
        return _Answers(np.zeros(0, bool), np.zeros(0), [])
    pairs = pd.DataFrame({"pair": text_column(prompts, index)}, index)
    found = labelled(_PairFrame(pairs, "pair", labels, given), given)
    same = (found["label"] == labels[0]).to_numpy(bool)
    shares = found[f"p_{labels[0]}"].to_numpy(np.float64, na_value=np.nan)
    half = found["label"] == "neutral"
    if "neutral" in labels:
        shares = shares + found["p_neutral"].to_numpy(np.float64, na_value=np.nan) / 2
    # Where the answers are held to the labels there are no probabilities: the label is certain then.
    shares = np.where(np.isnan(shares), same + half.to_numpy(bool) / 2, shares)
    errors = [e if isinstance(e, str) else None for e in found["label_error"]]
    return _Answers(same, shares, errors)


def _judged_by_model(
    rows: npt.NDArray[np.intp], text: Sequence[int], size: int, answers: _Answers, start: int, count: int
) -> _Judged:
    """The answers to one question, by what was said of the pairs of its texts; ``text`` has each one's number."""
    part = slice(start, start + count)
    if error := next((e for e in answers.errors[part] if e is not None), None):
        return _Judged(rows, np.zeros(0, np.int64), np.zeros((0, 0)), error)
    same, weights = np.eye(size, dtype=bool), np.zeros((size, size))
    upper, both = np.triu_indices(size, 1), count == size * (size - 1)
    said, share = answers.same[part], answers.share[part]
    if both:  # in both directions, one after the other
        said, share = said[::2] & said[1::2], share[::2] + share[1::2]
    else:
        share = 2 * share
    same[upper], weights[upper] = said, share
    same, weights = same | same.T, weights + weights.T
    return _Judged(rows, leader_clusters(same)[text], heat_kernel(weights)[np.ix_(text, text)])


# ---- what comes of it ------------------------------


def _log_probabilities(df: pd.DataFrame, column: str) -> Floats:
    """By row, the log-probability of the answer divided by its tokens; NaN where one of the two is not known."""
    unknown = np.full(len(df), np.nan)
    sums, tokens, counts = (beside(df, column, name) for name in ("logprob", "token_logprobs", "completion_tokens"))
    if sums is None:
        return unknown
    if tokens is None and counts is None:
        warn(
            f"the answers in {column!r} have log-probabilities, but the number of their tokens is not known: each "
            "counts the same. scatter(..., logprobs=0, details=True) adds both"
        )
        return unknown
    sizes = unknown.copy()
    if counts is not None:
        sizes = counts.to_numpy(np.float64, na_value=np.nan).copy()
    if tokens is not None:
        known = [row for row, value in enumerate(tokens) if isinstance(value, list | np.ndarray)]
        sizes[known] = [len(tokens.iloc[row]) for row in known]
    logs = sums.to_numpy(np.float64, na_value=np.nan)
    return np.where(sizes > 0, logs / np.where(sizes > 0, sizes, 1), np.nan)


def _entropies(samples: Samples, judged: Sequence[_Judged], logs: Floats) -> pd.DataFrame:
    size = len(samples.index)
    meaning, kernel, weighted = np.zeros(size), np.zeros(size), np.zeros(size, bool)
    clusters = np.zeros(size, np.int64)
    for number, one in enumerate(judged):
        if one.error is None and len(one.rows):
            own = logs[one.rows]
            weighted[number] = bool(np.isfinite(own).all())
            meaning[number] = cluster_entropy(one.clusters, own if weighted[number] else None)
            kernel[number] = von_neumann_entropy(one.kernel / len(one.rows))
            clusters[number] = one.clusters.max()
    errors = [one.error for one in judged]
    none = np.array([one.error is not None or not len(one.rows) for one in judged], bool)
    result = pd.DataFrame(index=samples.index)
    result["semantic_entropy"] = pd.arrays.FloatingArray(meaning, none)
    result["kernel_entropy"] = pd.arrays.FloatingArray(kernel, none)
    result["n_clusters"] = pd.arrays.IntegerArray(clusters, none)
    result["n_valid"] = pd.array([len(one.rows) for one in judged], dtype="Int64")
    result["weighted"] = pd.arrays.BooleanArray(weighted, none)
    result["error"] = text_column(errors, samples.index)
    return result


def _with_clusters(df: pd.DataFrame, column: str, samples: Samples, judged: Sequence[_Judged]) -> pd.DataFrame:
    name = f"{column}_cluster"
    clusters = np.zeros(len(df), np.int64)
    for one in judged:
        if one.error is None:
            clusters[one.rows] = one.clusters
    result = df.copy()
    result[name] = pd.Series(pd.arrays.IntegerArray(clusters - 1, clusters == 0), df.index)
    return result
