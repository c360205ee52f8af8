"""Rows whose vectors are close: what comes is what comparing all pairs gives, in far less memory."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import swarmkit as sk
from swarmkit.analysis.nearest import Vectors


def all_cosines(rows: np.ndarray) -> np.ndarray:
    """The cosines of all pairs, each by itself."""
    rows = rows.astype(np.float32).astype(float)
    found = np.empty((len(rows), len(rows)))
    for i, one in enumerate(rows):
        for j, other in enumerate(rows):
            cosine = (one * other).sum() / np.sqrt((one * one).sum() * (other * other).sum())
            found[i, j] = 1.0 if (one == other).all() else np.clip(cosine, -1, 1)
    return found


def leaders(cosines: np.ndarray, threshold: float) -> list[int]:
    kept: list[int] = []
    found = []
    for row in range(len(cosines)):
        leader = next((one for one in kept if cosines[row, one] >= threshold), row)
        if leader == row:
            kept.append(row)
        found.append(leader)
    return found


def neighbours(cosines: np.ndarray, k: int) -> list[tuple[int, int, int, float]]:
    found = []
    for row, own in enumerate(cosines):
        others = sorted((other for other in range(len(own)) if other != row), key=lambda other: (-own[other], other))
        found += [(row, rank, other, own[other]) for rank, other in enumerate(others[:k], 1)]
    return found


@st.composite
def frames(draw: st.DrawFn) -> np.ndarray:
    """Vectors with equal ones, ties and opposite ones among them, of few or of many coordinates."""
    rows = draw(st.integers(1, 16))
    size = draw(st.sampled_from([1, 2, 3, 130]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    made = rng.integers(-2, 3, (rows, size)) if draw(st.booleans()) else rng.standard_normal((rows, size))
    made = made + draw(st.sampled_from([0, 5]))  # all in one direction: many pairs are near the threshold
    made = (made * draw(st.sampled_from([1, 1e-40, 1e37]))).astype(np.float32)
    some = rng.integers(0, rows, rows) if draw(st.booleans()) else np.arange(rows)
    return made[some][made[some].any(axis=1)]


@settings(max_examples=40, deadline=None)
@given(frames(), st.sampled_from([-1.0, 0.0, 0.5, 0.9, 0.999, 1.0]))
def test_dedupe_is_what_comparing_all_pairs_gives(rows: np.ndarray, threshold: float) -> None:
    frame = pd.DataFrame({"v": list(rows)}, index=[f"r{i}" for i in range(len(rows))])
    cosines = all_cosines(rows) if len(rows) else np.zeros((0, 0))
    expected = leaders(cosines, threshold)
    kept = [row for row, leader in enumerate(expected) if row == leader]
    found = frame.swarm.dedupe("v", threshold, return_all=True)
    assert found["cluster_first"].tolist() == [f"r{leader}" for leader in expected]
    assert found["cluster"].tolist() == [kept.index(leader) for leader in expected]
    assert found["cluster_similarity"].tolist() == [cosines[row, leader] for row, leader in enumerate(expected)]
    pd.testing.assert_frame_equal(frame.swarm.dedupe("v", threshold), frame.iloc[kept])


@settings(max_examples=40, deadline=None)
@given(frames(), st.integers(1, 30))
def test_similar_is_what_comparing_all_pairs_gives(rows: np.ndarray, k: int) -> None:
    frame = pd.DataFrame({"v": list(rows)}, index=np.arange(len(rows)) + 100)
    expected = neighbours(all_cosines(rows), k)
    found = sk.similar(frame, "v", k=k)
    assert found.index.tolist() == [100 + row for row, *_ in expected]
    assert found["rank"].tolist() == [rank for _, rank, *_ in expected]
    assert found["other"].tolist() == [100 + other for *_, other, _ in expected]
    assert found["position"].tolist() == [other for *_, other, _ in expected]
    assert found["similarity"].tolist() == [cosine for *_, cosine in expected]


@settings(max_examples=40, deadline=None)
@given(frames(), st.sampled_from([0.0, 0.5, 0.9, 1.0]), st.integers(1, 20), st.integers(1, 7))
def test_blocks_of_any_size_give_the_same(rows: np.ndarray, threshold: float, k: int, block: int) -> None:
    rows = rows.astype(np.float32)
    one, other = Vectors(rows), Vectors(rows, block)
    assert other.leaders(threshold).tolist() == one.leaders(threshold).tolist()
    for found, expected in zip(other.nearest(k), one.nearest(k), strict=True):
        assert found.tolist() == expected.tolist()


# ---- size ------------------------------


def spread(rows: int, size: int, copies: int = 0) -> np.ndarray:
    rng = np.random.default_rng(0)
    made = rng.standard_normal((rows, size), np.float32)
    made[rows - copies :] = made[:copies] + 0.01 * rng.standard_normal((copies, size), np.float32)
    return made


def test_memory_is_that_of_blocks_not_of_all_pairs() -> None:
    rows = spread(6000, 100, copies=500)
    frame = pd.DataFrame(index=range(len(rows)))
    of_all_pairs = 4 * len(rows) ** 2
    tracemalloc.start()
    kept = frame.swarm.dedupe(rows, 0.9)
    of_dedupe = tracemalloc.get_traced_memory()[1]
    tracemalloc.reset_peak()
    near = sk.similar(frame, rows, k=3)
    of_similar = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert kept.index.tolist() == list(range(5500))
    assert near.loc[range(5500, 6000)].query("rank == 1")["position"].tolist() == list(range(500))
    assert of_dedupe < of_all_pairs / 8
    assert of_similar < of_all_pairs / 8


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_hundred_thousand_rows_take_little_memory() -> None:
    rows = spread(100_000, 384, copies=5000)
    frame = pd.DataFrame(index=range(len(rows)))
    tracemalloc.start()
    kept = frame.swarm.dedupe(rows, 0.9)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert kept.index.tolist() == list(range(95_000))
    assert peak < 2 * rows.nbytes


# ---- columns of vectors ------------------------------


VECTORS = [[1.0, 0.0], None, [0.0, 1.0], [1.0, 0.0], [0.0, 0.0]]


@pytest.mark.parametrize(
    "column",
    [
        pd.Series(VECTORS),
        pd.Series([None if v is None else np.array(v, np.float32) for v in VECTORS]),
        pd.Series([None if v is None else tuple(v) for v in VECTORS]),
        pd.Series(VECTORS, dtype=pd.ArrowDtype(pa.list_(pa.float32()))),
        pd.Series(VECTORS, dtype=pd.ArrowDtype(pa.list_(pa.float64()))),
        pd.Series(VECTORS, dtype=pd.ArrowDtype(pa.list_(pa.float32(), 2))),
        pd.Series(VECTORS, dtype=pd.ArrowDtype(pa.list_(pa.float32(), 2)))[::-1][::-1],
        pd.concat([pd.Series(VECTORS[:2], dtype=pd.ArrowDtype(pa.list_(pa.float32(), 2)))] * 1
                  + [pd.Series(VECTORS[2:], dtype=pd.ArrowDtype(pa.list_(pa.float32(), 2)))], ignore_index=True),
    ],
    ids=lambda column: str(column.dtype),
)  # fmt: skip
def test_any_column_of_vectors_will_do_and_rows_without_one_are_kept(column: pd.Series) -> None:
    frame = pd.DataFrame({"v": column})
    assert frame.swarm.dedupe("v").index.tolist() == [0, 1, 2, 4]
    every = frame.swarm.dedupe("v", return_all=True, out="group")
    assert every["group"].tolist() == [0, pd.NA, 1, 0, pd.NA]
    assert every["group_first"].tolist() == [0, pd.NA, 2, 0, pd.NA]
    near = frame["v"].swarm.similar(k=1)
    assert near["other"].to_dict() == {0: 3, 2: 0, 3: 0}
    array = np.array([[np.nan] * 2 if v is None else v for v in VECTORS])
    assert frame.swarm.dedupe(array).index.tolist() == [0, 1, 2, 4]
    assert "group" not in frame


def test_labels_of_several_levels_and_frames_without_rows() -> None:
    frame = pd.DataFrame(
        {"v": [[1, 0], [2, 0]]}, index=pd.MultiIndex.from_tuples([("a", 1), ("a", 2)], names=["x", "y"])
    )
    near = sk.similar(frame, "v", k=4)
    assert near.index.equals(frame.index)
    assert near["other"].tolist() == [("a", 2), ("a", 1)]
    assert near["similarity"].tolist() == [1.0, 1.0]
    assert sk.similar(frame[:0], "v").empty
    assert sk.similar(frame[:1], "v").empty
    assert frame[:0].swarm.dedupe("v").empty
    assert frame[:0].swarm.dedupe("v", return_all=True).columns.tolist() == [
        *("v", "cluster", "cluster_first", "cluster_similarity")
    ]


@pytest.mark.parametrize(
    ("column", "options", "message"),
    [
        (["a text", "another"], {}, r"column 'v' holds a str \(row 7\): must be vectors"),
        ([[1, 2], [1, 2, 3]], {}, r"a vector of 3 numbers \(row 8\) beside one of 2"),
        ([[1, 2], [1, np.nan]], {}, "the vector of row 8 holds NaN or infinity"),
        ([[1, 2], [1, 1e300]], {}, "the vector of row 8 holds NaN or infinity"),
        ([[[1], [2]], [[1], [2]]], {}, "must be vectors"),
        ([1.0, 2.0], {}, "holds a float"),
        ([[1], [2]], {"k": 0}, "k=0: must be a whole number"),
        ([[1], [2]], {"threshold": 1.5}, "threshold=1.5: must be a cosine"),
        ([[1], [2]], {"out": "v", "return_all": True}, "would overwrite the column 'v'"),
    ],
)
def test_what_cannot_be_compared_is_said(column: list[Any], options: dict[str, Any], message: str) -> None:
    frame = pd.DataFrame({"v": column}, index=[7, 8])
    with pytest.raises(sk.SettingError, match=message):
        (sk.similar if "k" in options else sk.dedupe)(frame, "v", **options)


def test_arrays_and_arrow_columns_that_do_not_fit_are_refused() -> None:
    frame = pd.DataFrame({"v": pd.Series([[1.0], [1.0, 2.0]], dtype=pd.ArrowDtype(pa.list_(pa.float32())))})
    with pytest.raises(sk.SettingError, match=r"a vector of 2 numbers \(row 1\) beside one of 1"):
        sk.similar(frame, "v")
    for dtype in (pa.list_(pa.string()), pa.string()):
        texts = pd.DataFrame({"v": pd.Series([["a"]] if dtype != pa.string() else ["a"], dtype=pd.ArrowDtype(dtype))})
        with pytest.raises(sk.SettingError, match=r"must be (lists of numbers|vectors)"):
            sk.similar(texts, "v")
    for array in (np.zeros((3, 2)), np.zeros(2), np.array([["a"], ["b"]])):
        with pytest.raises(sk.SettingError, match=r"must be numbers of shape \(2, n\)"):
            sk.similar(frame, array)
    with pytest.raises(sk.UnknownColumnError, match="vv"):
        sk.similar(frame, "vv")
