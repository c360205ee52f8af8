"""Aggregators and measures of uncertainty under the names of older code: their signatures, and what they compute."""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swarmkit import Response, SettingError
from swarmkit.aggregators import best_of, concat, failure_report, majority_vote, statistics, structured_merge, top_k
from swarmkit.uq.kle import (
    density_matrix_from_kernel,
    heat_kernel,
    kernel_language_entropy,
    kernel_matrix,
    von_neumann_entropy,
)
from swarmkit.uq.probes import load_probe, predict_semantic_entropy, save_probe, train_probe
from swarmkit.uq.semantic_entropy import cluster_embeddings, cluster_entropy, leader_clusters, semantic_entropy


@pytest.mark.parametrize(
    ("module", "name", "signature"),
    [
        ("aggregators", "majority_vote", "responses, include_failures=False"),
        ("aggregators", "concat", "responses, separator='\\n', include_failures=False"),
        ("aggregators", "best_of", "responses, score_fn, include_failures=False"),
        ("aggregators", "top_k", "responses, k, score_fn, include_failures=False"),
        ("aggregators", "structured_merge", "responses, include_failures=False"),
        ("aggregators", "statistics", "responses, extract_fn=None, include_failures=False"),
        ("aggregators", "failure_report", "responses, include_failures=False"),
        ("uq.semantic_entropy", "cluster_embeddings", "embeddings, similarity_threshold=0.9, method='average'"),
        ("uq.semantic_entropy", "semantic_entropy", "embeddings, similarity_threshold=0.9, linkage_method='average'"),
        ("uq.kle", "kernel_matrix", "embeddings, kernel='cosine', **kwargs"),
        ("uq.kle", "density_matrix_from_kernel", "K"),
        ("uq.kle", "von_neumann_entropy", "rho, eps=1e-10"),
        ("uq.kle", "kernel_language_entropy", "embeddings, kernel='cosine', **kernel_kwargs"),
        ("uq.probes", "train_probe", "hidden_states, target_entropy, ridge_alpha=1.0"),
        ("uq.probes", "predict_semantic_entropy", "hidden_states, coef, intercept"),
        ("uq.probes", "save_probe", "path, coef, intercept, metadata=None"),
        ("uq.probes", "load_probe", "path"),
    ],
)
def test_signatures_are_those_of_older_code(module: str, name: str, signature: str) -> None:
    found = inspect.signature(getattr(importlib.import_module(f"swarmkit.{module}"), name))
    plain = [p.replace(annotation=inspect.Parameter.empty) for p in found.parameters.values()]
    assert str(inspect.Signature(plain)) == f"({signature})"


# ---- aggregators ------------------------------

ANSWERS = [Response(True, " Yes\n"), Response(True, "yes"), Response(True, "no"), Response(False, "no", "cut", 3)]


def test_votes_and_texts_leave_failures_out() -> None:
    assert majority_vote(ANSWERS) == ("yes", pytest.approx(2 / 3))
    assert majority_vote(ANSWERS, include_failures=True) == ("yes", 0.5)
    assert majority_vote([]) == ("", 0.0)
    assert concat(ANSWERS) == " Yes\n\nyes\nno"
    assert concat(ANSWERS, "|", True).endswith("|no|no")
    assert failure_report(ANSWERS) == {
        "total": 4,
        "success_count": 3,
        "failure_count": 1,
        "failures": [{"agent_index": 3, "error": "cut"}],
    }


def test_the_best_are_found_by_their_scores() -> None:
    texts = [Response(True, text) for text in ("bb", "a", "cc", "ddd")]
    assert best_of(texts, lambda r: len(r.text)) is texts[3]
    assert top_k(texts, 3, lambda r: len(r.text)) == [texts[3], texts[0], texts[2]]
    assert not best_of([Response(False, "", "gone")], lambda r: 1.0).success


def test_json_is_merged_and_what_is_none_is_reported() -> None:
    merged, errors = structured_merge([Response(True, "[1, 2]"), Response(True, "{"), Response(True, "3", None, 5)])
    assert merged == [1, 2, 3]
    assert [e["agent_index"] for e in errors] == [-1]


def test_numbers_have_statistics() -> None:
    found = statistics([Response(True, text) for text in ("1", " 2 ", "6")])
    assert found == {"mean": 3.0, "std": pytest.approx(math.sqrt(7)), "median": 2.0, "min": 1.0, "max": 6.0}
    assert statistics([]) == dict.fromkeys(found, 0.0)
    assert statistics([Response(True, "x=4")], lambda r: float(r.text[2:]))["std"] == 0.0
    with pytest.raises(ValueError, match="'x=4' is no number: give extract_fn="):
        statistics([Response(True, "x=4")])


# ---- semantic entropy ------------------------------


def clusters_by_hand(cosines: np.ndarray, threshold: float, method: str) -> set[frozenset[int]]:
    """Merge the two closest clusters, all pairs of members looked at anew each time."""
    how = {"average": np.mean, "single": np.max, "complete": np.min}[method]
    clusters = [frozenset([row]) for row in range(len(cosines))]
    while len(clusters) > 1:
        near = {(a, b): how([cosines[i, j] for i in a for j in b]) for a, b in combinations(clusters, 2)}
        pair = max(near, key=lambda pair: near[pair])
        if near[pair] < threshold:
            break
        clusters = [c for c in clusters if c not in pair] + [pair[0] | pair[1]]
    return set(clusters)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 9),
    st.floats(-0.5, 0.95),
    st.sampled_from(["average", "single", "complete"]),
)
def test_clusters_are_those_found_by_hand(seed: int, rows: int, threshold: float, method: str) -> None:
    embeddings = np.random.default_rng(seed).standard_normal((rows, 3))
    units = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    labels = cluster_embeddings(embeddings, threshold, method)
    found = {frozenset(np.flatnonzero(labels == label).tolist()) for label in labels}
    assert found == clusters_by_hand(units @ units.T, threshold, method)
    assert list(dict.fromkeys(labels.tolist())) == list(range(1, len(found) + 1)), "numbered as they appear"
    shares = [len(cluster) / rows for cluster in found]
    expected = -sum(share * math.log(share) for share in shares)
    assert semantic_entropy(embeddings, threshold, method) == pytest.approx(expected, abs=1e-12)


def test_semantic_entropy_of_cases_known_in_closed_form() -> None:
    assert semantic_entropy(np.zeros((0, 3))) == semantic_entropy(np.ones((1, 3))) == 0.0
    assert semantic_entropy(np.tile([0.3, 0.1], (7, 1)), similarity_threshold=1.0) == 0.0
    assert semantic_entropy(np.repeat(np.eye(4), 5, axis=0), 0.5) == pytest.approx(math.log(4))
    assert cluster_embeddings(np.zeros((0, 3))).tolist() == []
    assert cluster_entropy([1, 2], [-1000.0, -1000.0]) == pytest.approx(math.log(2)), "nothing underflows"
    with pytest.raises(SettingError, match="method='ward': must be 'average', 'single', 'complete'"):
        cluster_embeddings(np.eye(2), method="ward")
    with pytest.raises(SettingError, match=r"the shape \(3,\): must be \(n, d\)"):
        semantic_entropy(np.ones(3))


def test_meaning_is_compared_with_the_first_of_each_cluster() -> None:
    # 0 and 1 mean the same, and 1 and 2 do, but 0 and 2 do not.
    assert leader_clusters([[1, 1, 0], [1, 1, 1], [0, 1, 1]]).tolist() == [1, 1, 2]
    assert leader_clusters(np.zeros((0, 0))).tolist() == []


# ---- kernel language entropy ------------------------------


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.lists(st.integers(1, 4), min_size=1, max_size=4))
def test_a_kernel_of_clusters_at_right_angles_has_the_semantic_entropy(seed: int, sizes: list[int]) -> None:
    axes = np.linalg.qr(np.random.default_rng(seed).standard_normal((6, 6)))[0]
    embeddings = np.repeat(axes[: len(sizes)], sizes, axis=0) * 3
    assert kernel_language_entropy(embeddings) == pytest.approx(semantic_entropy(embeddings), abs=1e-9)


def test_kernel_entropy_of_cases_known_in_closed_form() -> None:
    assert kernel_language_entropy(np.ones((1, 4))) == 0.0
    cosine = 0.6  # of two vectors: the eigenvalues are (1 + c) / 2 and (1 - c) / 2
    expected = -(0.8 * math.log(0.8) + 0.2 * math.log(0.2))
    assert kernel_language_entropy([[1, 0], [cosine, 0.8]]) == pytest.approx(expected)
    kernel = kernel_matrix([[0.0, 0.0], [3.0, 4.0]], "rbf", gamma=0.1)
    assert kernel.tolist() == [[1.0, pytest.approx(math.exp(-2.5))], [pytest.approx(math.exp(-2.5)), 1.0]]
    assert kernel_matrix([[0.0, 0.0], [3.0, 4.0]], "rbf")[0, 1] == pytest.approx(math.exp(-12.5)), "gamma is 1 / d"
    assert von_neumann_entropy(np.diag([0.3, 0.7, 0.0])) == pytest.approx(-(0.3 * math.log(0.3) + 0.7 * math.log(0.7)))
    assert np.trace(density_matrix_from_kernel([[1.0, 0.5], [0.5, 1.0]])) == 1.0
    # A graph of two: the Laplacian's eigenvalues are 0 and 2w.
    heat = math.exp(-0.3 * 2 * 1.5)
    assert heat_kernel([[0, 1.5], [1.5, 0]])[0, 1] == pytest.approx((1 - heat) / (1 + heat))
    assert heat_kernel(np.zeros((3, 3))).tolist() == np.eye(3).tolist()


@pytest.mark.parametrize("measure", [semantic_entropy, kernel_language_entropy, cluster_embeddings])
def test_a_missing_vector_is_no_certainty(measure: Callable[[object], float]) -> None:
    with pytest.raises(SettingError, match="row 1 of the embeddings is not finite"):
        measure([[1.0, 0.0], [np.nan, np.nan], [0.0, 1.0]])


def test_what_no_kernel_is_is_said() -> None:
    with pytest.raises(SettingError, match="kernel='poly': must be 'cosine' or 'rbf'"):
        kernel_matrix(np.eye(2), "poly")
    with pytest.raises(TypeError, match="gamma= is no argument of the kernel 'cosine'"):
        kernel_language_entropy(np.eye(2), gamma=1.0)
    for kernel, message in ((np.zeros((2, 2)), "trace is 0.0"), (np.zeros((2, 3)), "must be \\(n, n\\)")):
        with pytest.raises(SettingError, match=message):
            density_matrix_from_kernel(kernel)


# ---- probes ------------------------------


def test_a_probe_is_ridge_regression_whose_intercept_is_free(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    states, truth = rng.standard_normal((50, 4)) + 3, np.array([1.0, -2.0, 0.0, 0.5])
    coef, intercept = train_probe(states, states @ truth + 7, ridge_alpha=1e-9)
    assert coef == pytest.approx(truth, abs=1e-9)
    assert intercept == pytest.approx(7)
    strong = train_probe(states, states @ truth + 7, ridge_alpha=1e12)
    assert strong[0] == pytest.approx(np.zeros(4), abs=1e-6)
    assert strong[1] == pytest.approx((states @ truth + 7).mean(), abs=1e-6), "nothing pulls it to 0"
    assert predict_semantic_entropy(states, coef, intercept) == pytest.approx(states @ truth + 7)
    assert predict_semantic_entropy(states[0], coef, intercept).shape == (1,)
    for name in ("probe", "folder/probe.npz"):
        save_probe(tmp_path / name, coef, intercept, {"version": 1})
        again = load_probe(tmp_path / name)
        assert (again[0].tolist(), *again[1:]) == (coef.tolist(), intercept, {"version": 1})
    save_probe(str(tmp_path / "probe"), coef, intercept)
    assert load_probe(tmp_path / "probe.npz")[2] is None, "not the notes of the one before"
    with pytest.raises(SettingError, match=r"the shape \(50, 4\) and target_entropy has 2 values"):
        train_probe(states, [1.0, 2.0])


def test_the_package_of_older_code_has_them_as_well() -> None:
    import swarmkit.uq as uq

    assert uq.semantic_entropy is semantic_entropy
    assert {uq.kernel_language_entropy, uq.train_probe, uq.save_probe} == {
        kernel_language_entropy,
        train_probe,
        save_probe,
    }
