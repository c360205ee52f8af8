"""Kernel language entropy: uncertainty that knows how similar answers are, not only which mean the same.

The similarities of the answers are a kernel, which is scaled to trace 1; its von Neumann entropy is the uncertainty
(Nikitin, Kossen, Gal and Marttinen, "Kernel Language Entropy", NeurIPS 2024). Where the kernel has ones for answers
that mean the same and zeros elsewhere, it is the semantic entropy. All entropies are in nats.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import SettingError
from .semantic_entropy import cosines, vectors

__all__ = [
    "density_matrix_from_kernel",
    "heat_kernel",
    "kernel_language_entropy",
    "kernel_matrix",
    "von_neumann_entropy",
]


def kernel_matrix(embeddings: npt.ArrayLike, kernel: str = "cosine", **kwargs: Any) -> np.ndarray:
    """The similarity of each two rows.

    Parameters
    ----------
    embeddings : array of shape (n, d)
        A row for each answer.
    kernel : {"cosine", "rbf"}, default "cosine"
        The cosine, or ``exp(-gamma * squared distance)``.
    **kwargs
        ``gamma`` for "rbf", 1 / d by default.

    Returns
    -------
    array of shape (n, n)
        Symmetric, without negative eigenvalues.

    Raises
    ------
    SettingError
        A kernel that is none of these; embeddings of another shape, or that are not finite.

    Examples
    --------
    >>> kernel_matrix([[1.0, 0.0], [0.0, 1.0]], "rbf", gamma=0.5).round(3).tolist()
    [[1.0, 0.368], [0.368, 1.0]]
    """
    if kernel not in ("cosine", "rbf"):
        raise SettingError(f"kernel={kernel!r}: must be 'cosine' or 'rbf'")
    if unknown := sorted(kwargs.keys() - ({"gamma"} if kernel == "rbf" else set())):
        raise TypeError(f"{unknown[0]}= is no argument of the kernel {kernel!r}")
    if kernel == "cosine":
        return cosines(embeddings)
    rows = vectors(embeddings)
    gamma = kwargs.get("gamma")
    squares = (rows**2).sum(axis=1)
    distances = np.maximum(squares[:, None] + squares - 2 * rows @ rows.T, 0.0)
    np.fill_diagonal(distances, 0.0)
    found: np.ndarray = np.exp(-(1 / max(rows.shape[1], 1) if gamma is None else gamma) * distances)
    return found


def heat_kernel(weights: npt.ArrayLike, t: float = 0.3) -> np.ndarray:
    """The heat kernel of a graph of answers, scaled to a diagonal of ones: ``exp(-t * L)``, where L is its Laplacian.

    Parameters
    ----------
    weights : array of shape (n, n)
        How much two answers say the same, 0 or more; symmetric. For entailment between the answers Nikitin et al. take
        the sum of both directions: 1 for an entailment, 1/2 where it is neutral.
    t : float, default 0.3
        How far heat spreads: the larger, the more similar are answers that have anything in common.

    Examples
    --------
    Two answers that entail each other, and one that contradicts both:

    >>> heat_kernel([[0, 2, 0], [2, 0, 0], [0, 0, 0]]).round(2).tolist()
    [[1.0, 0.54, 0.0], [0.54, 1.0, 0.0], [0.0, 0.0, 1.0]]
    """
    edges = np.array(weights, np.float64)
    np.fill_diagonal(edges, 0.0)
    values, vectors = np.linalg.eigh(np.diag(edges.sum(axis=1)) - edges)
    kernel = (vectors * np.exp(-t * values)) @ vectors.T
    scale = np.sqrt(np.diag(kernel))
    found: np.ndarray = kernel / np.outer(scale, scale)
    return found


def density_matrix_from_kernel(K: npt.ArrayLike) -> np.ndarray:  # noqa: N803 - the name of older code
    """A kernel, scaled to trace 1.

    Raises
    ------
    SettingError
        It is not square, or its trace is not above 0.

    Examples
    --------
    >>> density_matrix_from_kernel([[2.0, 1.0], [1.0, 2.0]]).tolist()
    [[0.5, 0.25], [0.25, 0.5]]
    """
    kernel = np.asarray(K, np.float64)
    if kernel.ndim != 2 or kernel.shape[0] != kernel.shape[1]:
        raise SettingError(f"the kernel has the shape {kernel.shape}: must be (n, n)")
    if not (trace := np.trace(kernel)) > 0:
        raise SettingError(f"the kernel's trace is {trace}: must be above 0")
    found: np.ndarray = kernel / trace
    return found


def von_neumann_entropy(rho: npt.ArrayLike, eps: float = 1e-10) -> float:
    """The entropy of the eigenvalues of a density matrix, in nats.

    Parameters
    ----------
    rho : array of shape (n, n)
        Symmetric, of trace 1.
    eps : float, default 1e-10
        Eigenvalues down to here, negative ones by rounding, are 0.

    Examples
    --------
    >>> round(von_neumann_entropy([[0.5, 0.0], [0.0, 0.5]]), 4)
    0.6931
    """
    values = np.linalg.eigvalsh(np.asarray(rho, np.float64))
    values = values[values > eps]
    return float(max(0.0, -(values * np.log(values)).sum()))


def kernel_language_entropy(embeddings: npt.ArrayLike, kernel: str = "cosine", **kernel_kwargs: Any) -> float:
    """The von Neumann entropy of the similarities of some answers' embeddings, in nats.

    Parameters
    ----------
    embeddings : array of shape (n, d)
        A row for each answer to one question; of one or none the entropy is 0.
    kernel, **kernel_kwargs
        As for ``kernel_matrix``.

    Examples
    --------
    >>> round(kernel_language_entropy([[1, 0], [0, 1]]), 4)
    0.6931
    >>> kernel_language_entropy([[1, 2], [2, 4]])
    0.0
    """
    if len(np.asarray(embeddings)) <= 1:
        return 0.0
    return von_neumann_entropy(density_matrix_from_kernel(kernel_matrix(embeddings, kernel, **kernel_kwargs)))
