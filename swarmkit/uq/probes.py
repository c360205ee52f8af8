"""Linear probes: the semantic entropy of an answer, predicted from one hidden state of the model.

Many answers to some questions teach the probe; later one state is enough (Kossen et al., "Semantic Entropy Probes",
2024).
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import SettingError

__all__ = ["load_probe", "predict_semantic_entropy", "save_probe", "train_probe"]


def train_probe(
    hidden_states: npt.ArrayLike, target_entropy: npt.ArrayLike, ridge_alpha: float = 1.0
) -> tuple[np.ndarray, float]:
    """Fit a linear probe by ridge regression.

    Parameters
    ----------
    hidden_states : array of shape (n, d)
        A row for each question.
    target_entropy : array of shape (n,)
        The semantic entropy of the answers to it.
    ridge_alpha : float, default 1.0
        Penalty on the squares of the coefficients; the intercept has none.

    Returns
    -------
    (array of shape (d,), float)
        Coefficients and intercept.

    Raises
    ------
    SettingError
        The two differ in length, or are empty.

    Examples
    --------
    >>> coef, intercept = train_probe([[0.0], [1.0], [2.0]], [1.0, 3.0, 5.0], ridge_alpha=0)
    >>> coef.round(6).tolist(), round(intercept, 6)
    ([2.0], 1.0)
    """
    states, target = np.asarray(hidden_states, np.float64), np.asarray(target_entropy, np.float64).ravel()
    if states.ndim != 2 or len(states) != len(target) or not len(target):
        raise SettingError(
            f"hidden_states have the shape {states.shape} and target_entropy has {len(target)} values: must be (n, d) "
            "and n, with n from 1"
        )
    center, mean = states.mean(axis=0), float(target.mean())
    states = states - center
    gram = states.T @ states + ridge_alpha * np.eye(states.shape[1])
    coef = np.linalg.lstsq(gram, states.T @ (target - mean), rcond=None)[0]
    return coef, float(mean - center @ coef)


def predict_semantic_entropy(hidden_states: npt.ArrayLike, coef: npt.ArrayLike, intercept: float) -> np.ndarray:
    """What a probe says of hidden states: an array of shape (n,) for (n, d), of shape (1,) for (d,).

    Examples
    --------
    >>> predict_semantic_entropy([1.0, 2.0], [0.5, 0.25], 1.0).tolist()
    [2.0]
    """
    found: np.ndarray = np.atleast_2d(np.asarray(hidden_states, np.float64)) @ np.asarray(coef, np.float64) + intercept
    return found


def save_probe(
    path: str | os.PathLike[str], coef: npt.ArrayLike, intercept: float, metadata: dict[str, Any] | None = None
) -> None:
    """Write a probe as ``.npz``, and its metadata as ``.npz.json`` beside it.

    Parameters
    ----------
    path : str or path
        The file, to whose name ``.npz`` is added where it is missing. Folders are made.
    coef, intercept
        As ``train_probe`` gives them.
    metadata : dict, optional
        What else is known of it, as JSON can hold it.

    Examples
    --------
    >>> save_probe("probe.npz", [1.0, 2.0], 0.5)
    >>> load_probe("probe.npz")
    (array([1., 2.]), 0.5, None)
    """
    arrays, notes = _files(path)
    arrays.parent.mkdir(parents=True, exist_ok=True)
    np.savez(arrays, coef=np.asarray(coef), intercept=np.asarray(intercept))
    if metadata is None:
        notes.unlink(missing_ok=True)  # those of an earlier probe would be taken for this one's
    else:
        notes.write_text(json.dumps(metadata, indent=2), encoding="utf-8")


def load_probe(path: str | os.PathLike[str]) -> tuple[np.ndarray, float, dict[str, Any] | None]:
    """Read what ``save_probe`` has written: coefficients, intercept, and metadata or None.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_probe(f"{folder}/probe.npz", [1.0, 2.0], 0.5, {"model": "m"})
    ...     coef, intercept, metadata = load_probe(f"{folder}/probe.npz")
    >>> coef.tolist(), intercept, metadata
    ([1.0, 2.0], 0.5, {'model': 'm'})
    """
    arrays, notes = _files(path)
    with np.load(arrays) as data:
        coef, intercept = np.asarray(data["coef"]), float(data["intercept"])
    return coef, intercept, json.loads(notes.read_text(encoding="utf-8")) if notes.exists() else None


def _files(path: str | os.PathLike[str]) -> tuple[Path, Path]:
    name = os.fspath(path)
    arrays = name if name.endswith(".npz") else f"{name}.npz"  # as numpy.savez does
    return Path(arrays), Path(f"{arrays}.json")
