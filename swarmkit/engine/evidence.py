"""What speaks against a row: faults, crashes and refusals, and when that is enough to fail it.

A row is given up only on evidence that a person would accept:

* it was *refused* (400 and the like) when it was asked alone, by two endpoints, or by the only one that is healthy;
* it was *denied* (403) when it was asked alone, twice, by endpoints that answered others before and after;
* it *crashed* engines: three times one died with it in flight, twice while it was the only row there (once, if none of
  three comes back);
* its requests *failed* again and again at endpoints that answer other rows, also with the row alone. Faults of
  an endpoint that fails for other rows too are not counted, and where faults are frequent more of them are needed, so
  that a row does not fail by chance.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence

from ..records import Failure

__all__ = ["MAX_CRASHES", "Evidence"]

MAX_CRASHES = 3
"""Endpoints that a row may crash, at most."""
_CHANCE = 1e-6  # probability that faults alone fail one good row in a run
_UNLIKELY = 0.01  # probability below which faults of a batch are taken for those of a row in it
_HALVED_AT = 2  # faults at which a batch is halved, where they are rare
_MOST_EXCUSES = 6  # incidents of many endpoints that clear a row; rows that crash engines in step are no accident
_MOST_FAULTS = 8  # times ``max_attempts``: no row is retried more often


class Evidence:
    """The evidence against rows, by position; rows that never failed take no memory.

    Parameters
    ----------
    max_attempts : int
        Counted faults after which a row fails, where faults are rare.
    rows : int
        Rows in the run.

    Attributes
    ----------
    refusals : dict of int to (int, Failure)
        Rows that were refused alone: the endpoint and its message.
    sites : dict of int to tuple of int
        Endpoints whose connections broke with the row in flight, in that order.
    breaks : dict of int to Failure
        What the last of them looked like.
    answered : bool
        Whether any row was answered.
    in_question : dict of int to int
        Rows that an endpoint denied which had answered others, and the endpoint: until its next answer it may as well
        deny everything by now.

    Examples
    --------
    >>> evidence = Evidence(max_attempts=2, rows=10)
    >>> for _ in range(10_000):
    ...     evidence.count_request(0, failed=False)
    >>> evidence.answered = True
    >>> for _ in range(2):
    ...     evidence.count_fault([7], 0, alone=True)
    ...     print(evidence.is_spent(7))
    False
    True
    """

    def __init__(self, max_attempts: int, rows: int) -> None:
        self._max_attempts = max_attempts
        self._chance = _CHANCE / max(1, rows)
        self._faults: dict[int, list[int]] = {}  # the endpoints of a row's faults, as are the next two
        self._failed_alone: dict[int, list[int]] = {}
        self._crashes: dict[int, list[int]] = {}
        self._crashed_alone: dict[int, int] = {}
        self._excuses: dict[int, int] = {}
        self.refusals: dict[int, tuple[int, Failure]] = {}
        self.sites: dict[int, tuple[int, ...]] = {}
        self.breaks: dict[int, Failure] = {}
        self.answered = False
        self.in_question: dict[int, int] = {}
        self._denied: set[int] = set()
        self._failing: set[int] = set()  # endpoints that deny rows in question, and have failed since
        self._counted = 0  # failed requests whose rows were blamed
        self._requests, self._failed = Counter[int](), Counter[int]()  # by endpoint
        self._probes = self._failed_probes = 0

    def count_request(self, endpoint: int, failed: bool, probe: bool = False) -> None:
        """Count a request of rows that nothing speaks against, or a ``probe`` with a prompt that is known to be good,
        and whether it failed by the endpoint's fault."""
        self._requests[endpoint] += 1
        self._probes += probe
        if failed:
            self._failed[endpoint] += 1
            self._failed_probes += probe

    def count_fault(self, rows: Sequence[int], endpoint: int, alone: bool) -> None:
        """Count a fault of an endpoint against each row; ``alone``: the request had this one only."""
        self._counted += 1
        for row in rows:
            self._faults.setdefault(row, []).append(endpoint)
        if alone:
            self._failed_alone.setdefault(rows[0], []).append(endpoint)

    def points_at(self, rows: Iterable[int]) -> bool:
        """Whether rows have failed so often that one of them may be the reason: it is looked for in halves."""
        at = max((self._faults.get(row, []) for row in rows), key=len)
        return len(at) >= min(_HALVED_AT, self._max_attempts) and self._is_no_accident(at, _UNLIKELY)

    def most_faults(self, rows: Iterable[int]) -> int:
        """The most counted faults that one of the rows has."""
        return max((len(self._faults.get(row, ())) for row in rows), default=0)

    def speaks_against(self, rows: Iterable[int]) -> bool:
        """Whether one of the rows has a counted fault or was in a crash."""
        if not (self._faults or self._crashes):
            return False
        return any(row in self._faults or row in self._crashes for row in rows)

    def is_spent(self, row: int) -> bool:
        """Whether the faults of a row are enough to fail it: those in company, and those that it had alone."""
        return self._fails_often(row) and self._is_no_accident(self._failed_alone.get(row, ()), _UNLIKELY)

    def _fails_often(self, row: int) -> bool:
        at = self._faults.get(row, ())
        return len(at) >= self._max_attempts and self._is_no_accident(at, self._chance)

    def _is_no_accident(self, at: Sequence[int], chance: float) -> bool:
        """Whether failures of one row at these endpoints are less likely than ``chance``, by the shares of requests of
        other rows that fail there; those of few requests are closer to that of the fleet. While no row was answered it
        is the share of the plain prompts, to the power of the failures of all rows: chance would have let one through.
        """
        if len(at) >= _MOST_FAULTS * self._max_attempts:
            return True
        if not self.answered:
            return _share(self._failed_probes, self._probes) ** max(len(at), self._counted) <= chance
        usual = _share(self._failed.total(), self._requests.total())
        return math.prod((self._failed[i] + 2 * usual) / (self._requests[i] + 2) for i in at) <= chance

    def meet(self, rows: Iterable[int], endpoint: int, failure: Failure) -> None:
        """Note that a connection to an endpoint broke with these rows in flight."""
        for row in rows:
            self.breaks[row] = failure
            sites = self.sites.get(row, ())
            if endpoint not in sites:
                self.sites[row] = (*sites, endpoint)

    def most_sites(self, rows: Iterable[int]) -> tuple[int, ...]:
        """The endpoints whose connections broke with the one of the rows in flight that has met the most."""
        return max((self.sites[row] for row in rows if row in self.sites), key=len, default=())

    def count_crash(self, rows: Sequence[int], endpoint: int, alone: bool) -> None:
        """Count a crash of an engine against each row that was in flight there; ``alone``: nothing else was."""
        for row in rows:
            self._crashes.setdefault(row, []).append(endpoint)
        if alone:
            self._crashed_alone[rows[0]] = self.crashed_alone(rows[0]) + 1

    def crashed_alone(self, row: int) -> int:
        """Crashes of engines that had nothing but this row."""
        return self._crashed_alone.get(row, 0)

    def is_condemned(self, row: int) -> bool:
        """Whether the crashes of a row are enough to fail it."""
        at = self._crashes.get(row, ())
        return self.crashed_alone(row) > 1 and len(at) >= MAX_CRASHES and self._is_no_accident(at, self._chance)

    def crashes_engines(self, row: int) -> bool:
        """Whether a row was in so many crashes that it meets no further engine."""
        return len(self._crashes.get(row, ())) >= MAX_CRASHES

    def excuse(self, rows: Iterable[int]) -> bool:
        """Note that many endpoints broke at one time with these rows in flight; return whether that clears them."""
        most = 0
        for row in rows:
            self._excuses[row] = count = self._excuses.get(row, 0) + 1
            most = max(most, count)
        return most <= _MOST_EXCUSES

    def question(self, row: int, endpoint: int) -> None:
        """Note that an endpoint denied a row, asked alone."""
        self.in_question[row] = endpoint
        self._failing.discard(endpoint)

    def awaits(self, row: int) -> bool:
        """Whether a row waits for what the endpoint that denied it says next. Where that fails, it may take long."""
        by = self.in_question.get(row)
        return by is not None and by not in self._failing

    def ask_again(self, rows: Iterable[int]) -> None:
        """Note that rows go out once more: what they meet then counts, whatever the endpoint that denied them says."""
        for row in rows:
            self.in_question.pop(row, None)

    def failed(self, endpoint: int) -> None:
        """Note that an endpoint failed, which leaves open whether it denied requests for their rows."""
        if endpoint in self.in_question.values():
            self._failing.add(endpoint)

    def decide(self, endpoint: int, answers: bool) -> list[int]:
        """An endpoint ``answers`` again, so what it denied were these rows; or it denies all, which clears them.
        Return those that were denied for the second time."""
        self._failing.discard(endpoint)
        rows = [row for row, by in self.in_question.items() if by == endpoint]
        for row in rows:
            del self.in_question[row]
        if not answers:
            return []
        again = [row for row in rows if row in self._denied]
        self._denied.update(rows)
        return again

    def is_clean(self, row: int) -> bool:
        """Whether nothing speaks against a row that should keep it from further endpoints."""
        broken = row in self._crashes or len(self.sites.get(row, ())) >= MAX_CRASHES
        return not broken and row not in self.refusals and not self._fails_often(row)


def _share(failed: int, requests: int) -> float:
    """The share of requests that fail: one may be the row's own, and of few no more is known than that not all do."""
    return max(1, failed) / (requests + 2)
