"""Semantic entropy: how many different things several answers to one question say.

Answers that mean the same are one cluster, and the entropy is that of the clusters, not that of the texts
(Kuhn, Gal and Farquhar, "Semantic Uncertainty", ICLR 2023; Farquhar, Kossen, Kuhn and Gal, "Detecting hallucinations in
large language models using semantic entropy", Nature 630, 2024). All entropies are in nats.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from ..errors import SettingError
from ..text import plural

__all__ = ["cluster_embeddings", "cluster_entropy", "cosines", "leader_clusters", "semantic_entropy"]

_ROUNDING = 1e-9  # cosines of equal vectors differ from 1 by less

# What becomes of the distances of two clusters that are merged, by their sizes (Lance and Williams, 1967).
_LINKAGES: dict[str, Callable[[np.ndarray, np.ndarray, int, int], np.ndarray]] = {
    "average": lambda a, b, size_a, size_b: (size_a * a + size_b * b) / (size_a + size_b),
    "single": lambda a, b, *_: np.minimum(a, b),
    "complete": lambda a, b, *_: np.maximum(a, b),
}


def vectors(embeddings: npt.ArrayLike) -> np.ndarray:
    """Embeddings as an array of shape (n, d), all of whose numbers are finite; raises SettingError otherwise.

    Examples
    --------
    >>> vectors([[1, 0], [0, 2]]).shape
    (2, 2)
    """
    rows = np.asarray(embeddings, np.float64)
    if rows.ndim != 2:
        raise SettingError(f"embeddings have the shape {rows.shape}: must be (n, d), a row for each answer")
    if (bad := np.flatnonzero(~np.isfinite(rows).all(axis=1))).size:
        raise SettingError(
            f"row {bad[0]} of the embeddings is not finite, as a missing vector is: leave out such answers "
            f"({plural(bad.size, 'row')})"
        )
    return rows


def cosines(embeddings: npt.ArrayLike) -> np.ndarray:
    """The cosine similarity of each two rows, -1 to 1; that of a row of zeros is 0.

    Examples
    --------
    >>> cosines([[1, 0], [0, 2], [3, 4]]).round(1).tolist()
    [[1.0, 0.0, 0.6], [0.0, 1.0, 0.8], [0.6, 0.8, 1.0]]
    """
    rows = vectors(embeddings)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    units = rows / np.where(norms == 0, 1.0, norms)
    return np.clip(units @ units.T, -1.0, 1.0)


def cluster_embeddings(
    embeddings: npt.ArrayLike, similarity_threshold: float = 0.9, method: str = "average"
) -> npt.NDArray[np.int64]:
    """Cluster answers by the cosine similarity of their embeddings, from the bottom up.

    The two clusters that are closest are merged, as long as their similarity is not below the threshold.

    Parameters
    ----------
    embeddings : array of shape (n, d)
        A row for each answer.
    similarity_threshold : float, default 0.9
        Cosine similarity down to which clusters are merged.
    method : {"average", "single", "complete"}, default "average"
        What is the similarity of two clusters: that of their members on average, of the most similar ones, or of the
        least similar ones.

    Returns
    -------
    array of int64
        The cluster of each row, from 1, in order of appearance.

    Raises
    ------
    SettingError
        A ``method`` that is none of these, or embeddings of another shape.

    Examples
    --------
    >>> cluster_embeddings([[0, 1], [1, 0], [0.1, 1]]).tolist()
    [1, 2, 1]
    """
    if method not in _LINKAGES:
        raise SettingError(f"method={method!r}: must be {', '.join(map(repr, _LINKAGES))}")
    if len(np.asarray(embeddings)) == 0:
        return np.array([], np.int64)
    distance = 1.0 - cosines(embeddings)
    np.fill_diagonal(distance, np.inf)
    clusters = {row: [row] for row in range(len(distance))}  # by first row
    while True:
        one, other = sorted(divmod(int(distance.argmin()), len(distance)))
        if distance[one, other] > 1.0 - similarity_threshold + _ROUNDING:
            break
        merged = _LINKAGES[method](distance[one], distance[other], len(clusters[one]), len(clusters[other]))
        distance[one], distance[:, one] = merged, merged
        distance[[one, other], [one, other]] = distance[other] = distance[:, other] = np.inf
        clusters[one] += clusters.pop(other)
    labels = np.zeros(len(distance), np.int64)
    for number, first in enumerate(sorted(clusters), 1):
        labels[clusters[first]] = number
    return labels


def leader_clusters(same: npt.ArrayLike) -> npt.NDArray[np.int64]:
    """Cluster answers of which is known which two mean the same.

    Each is compared with the first member of each cluster, and joins the first that means the same (algorithm 1 of Kuhn
    et al.).

    Parameters
    ----------
    same : array of bool, shape (n, n)
        Whether two answers mean the same; symmetric.

    Returns
    -------
    array of int64
        The cluster of each answer, from 1, in order of appearance.

    Examples
    --------
    >>> leader_clusters([[1, 0, 1], [0, 1, 0], [1, 0, 1]]).tolist()
    [1, 2, 1]
    """
    means = np.asarray(same, bool)
    labels = np.zeros(len(means), np.int64)
    leaders: list[int] = []
    for answer in range(len(means)):
        found = np.flatnonzero(means[answer][leaders])
        if found.size:
            labels[answer] = found[0] + 1
        else:
            leaders.append(answer)
            labels[answer] = len(leaders)
    return labels


def cluster_entropy(labels: npt.ArrayLike, log_probabilities: npt.ArrayLike | None = None) -> float:
    """The entropy of clusters of answers, in nats.

    Parameters
    ----------
    labels : array of int, shape (n,)
        The cluster of each answer.
    log_probabilities : array of float, shape (n,), optional
        The log-probability of each answer, divided by its number of tokens. A cluster's probability is the sum of those
        of its answers, and all together are 1 (Farquhar et al., equation 5). Otherwise each answer counts the same
        ("discrete semantic entropy").

    Examples
    --------
    The example of Kuhn et al., table 1: "Paris" (0.5), "It's Paris" (0.4) and "London" (0.1).

    >>> round(cluster_entropy([1, 1, 2], np.log([0.5, 0.4, 0.1])), 2)
    0.33
    >>> round(cluster_entropy([1, 2, 3], np.log([0.5, 0.4, 0.1])), 2)
    0.94
    """
    _, clusters = np.unique(np.asarray(labels), return_inverse=True)
    if len(clusters) == 0:
        return 0.0
    logs = np.zeros(len(clusters)) if log_probabilities is None else np.asarray(log_probabilities, np.float64)
    weights = np.exp(logs - logs.max())  # the likeliest is 1, so that none of all underflows
    shares = np.bincount(clusters.ravel(), weights) / weights.sum()
    shares = shares[shares > 0]
    return float(max(0.0, -(shares * np.log(shares)).sum()))


def semantic_entropy(
    embeddings: npt.ArrayLike, similarity_threshold: float = 0.9, linkage_method: str = "average"
) -> float:
    """The entropy of the clusters of some answers' embeddings, in nats: 0 where all mean the same.

    Parameters
    ----------
    embeddings : array of shape (n, d)
        A row for each answer to one question.
    similarity_threshold, linkage_method
        As ``cluster_embeddings`` takes them, there ``method``.

    Examples
    --------
    >>> round(semantic_entropy([[1, 0], [1, 0.1], [0, 1], [0.1, 1]]), 4)  # two of two
    0.6931
    """
    return cluster_entropy(cluster_embeddings(embeddings, similarity_threshold, linkage_method))
