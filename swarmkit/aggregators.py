"""Many responses to one result, under the names of the batch-prompting design.

Each takes a list of ``Response``, and leaves out those that failed unless ``include_failures=True``. On frames:
``swarmkit.vote``, and pandas' own ``groupby``.
"""

from __future__ import annotations

import json
import statistics as stats
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from .records import Response

__all__ = ["best_of", "concat", "failure_report", "majority_vote", "statistics", "structured_merge", "top_k"]


def majority_vote(responses: Sequence[Response], include_failures: bool = False) -> tuple[str, float]:
    """The most frequent text, and its share of the responses.

    Parameters
    ----------
    responses : sequence of Response
        The votes. Case, and white space around a text, do not count.
    include_failures : bool, default False
        Whether failed responses vote, too, with their text.

    Returns
    -------
    (str, float)
        The text in lower case, the first of those that are equally frequent; and its share, 0 to 1. ``("", 0.0)`` if
        there is none.

    Examples
    --------
    >>> majority_vote([Response(True, "Yes"), Response(True, "yes\\n"), Response(True, "no"), Response(False, "")])
    ('yes', 0.6666666666666666)
    """
    votes = [r.text.strip().lower() for r in _chosen(responses, include_failures)]
    if not votes:
        return "", 0.0
    winner, count = Counter(votes).most_common(1)[0]
    return winner, count / len(votes)


def concat(responses: Sequence[Response], separator: str = "\n", include_failures: bool = False) -> str:
    """The texts, one after another.

    Examples
    --------
    >>> concat([Response(True, "a"), Response(False, ""), Response(True, "b")], ", ")
    'a, b'
    """
    return separator.join(r.text for r in _chosen(responses, include_failures))


def best_of(
    responses: Sequence[Response], score_fn: Callable[[Response], float], include_failures: bool = False
) -> Response:
    """The response with the highest score, the first of equal ones; a failed one if there is none.

    Examples
    --------
    >>> best_of([Response(True, "a"), Response(True, "abc")], lambda r: len(r.text)).text
    'abc'
    """
    return max(
        _chosen(responses, include_failures),
        key=score_fn,
        default=Response(success=False, text="", error="there is no response to choose from"),
    )


def top_k(
    responses: Sequence[Response], k: int, score_fn: Callable[[Response], float], include_failures: bool = False
) -> list[Response]:
    """The ``k`` responses with the highest scores, highest first; equal ones in their order.

    Examples
    --------
    >>> texts = [Response(True, "a"), Response(True, "abc"), Response(True, "ab")]
    >>> [r.text for r in top_k(texts, 2, lambda r: len(r.text))]
    ['abc', 'ab']
    """
    return sorted(_chosen(responses, include_failures), key=score_fn, reverse=True)[:k]


def structured_merge(
    responses: Sequence[Response], include_failures: bool = False
) -> tuple[list[Any], list[dict[str, Any]]]:
    """What the texts say as JSON, in one list: the items of lists, and other values as they are.

    Returns
    -------
    (list, list of dict)
        The values; and ``agent_index`` and ``error`` of each response that is no JSON.

    Examples
    --------
    >>> structured_merge([Response(True, "[1, 2]"), Response(True, '{"a": 3}')])
    ([1, 2, {'a': 3}], [])
    """
    merged: list[Any] = []
    errors: list[dict[str, Any]] = []
    for response in _chosen(responses, include_failures):
        try:
            value = json.loads(response.text)
        except ValueError as exc:
            errors.append({"agent_index": response.agent_index, "error": str(exc)})
            continue
        merged += value if isinstance(value, list) else [value]
    return merged, errors


def statistics(
    responses: Sequence[Response], extract_fn: Callable[[Response], float] | None = None, include_failures: bool = False
) -> dict[str, float]:
    """``mean``, ``std`` (of the sample), ``median``, ``min`` and ``max`` of responses that are numbers.

    Parameters
    ----------
    responses : sequence of Response
        The responses.
    extract_fn : callable, optional
        The number of a response; otherwise its text is the number.
    include_failures : bool, default False
        Whether failed responses count.

    Returns
    -------
    dict of str to float
        All 0 where there is no response.

    Raises
    ------
    ValueError
        A text is no number.

    Examples
    --------
    >>> statistics([Response(True, "1"), Response(True, " 3 ")])["mean"]
    2.0
    """
    values = [(extract_fn or _number)(r) for r in _chosen(responses, include_failures)]
    if not values:
        return dict.fromkeys(("mean", "std", "median", "min", "max"), 0.0)
    return {
        "mean": stats.mean(values),
        "std": stats.stdev(values) if len(values) > 1 else 0.0,
        "median": stats.median(values),
        "min": min(values),
        "max": max(values),
    }


def failure_report(responses: Sequence[Response], include_failures: bool = False) -> dict[str, Any]:
    """``total``, ``success_count``, ``failure_count``, and ``failures``: ``agent_index`` and ``error`` of each.

    ``include_failures`` is taken as by the other functions; failures are in a report of failures either way.

    Examples
    --------
    >>> failure_report([Response(True, "a"), Response(False, "", "read timeout", agent_index=3)])["failures"]
    [{'agent_index': 3, 'error': 'read timeout'}]
    """
    failures = [{"agent_index": r.agent_index, "error": r.error} for r in responses if not r.success]
    total, failed = len(responses), len(failures)
    return {"total": total, "success_count": total - failed, "failure_count": failed, "failures": failures}


def _chosen(responses: Sequence[Response], include_failures: bool) -> list[Response]:
    return [r for r in responses if r.success or include_failures]


def _number(response: Response) -> float:
    try:
        return float(response.text)
    except ValueError:
        raise ValueError(
            f"the response {response.text[:80]!r} is no number: give extract_fn=, a function that finds the number"
        ) from None
