"""What speaks against a row: faults, crashes and refusals, and when that is enough to fail it.

A row is given up only on evidence that a person would accept:

* it was *refused* (400 and the like) when it was asked alone, by two endpoints, or by the only one that is healthy;
* it was *denied* (403) when it was asked alone, twice, by endpoints that answered others before and after;
* it *crashed* engines: three times one died with it in flight, twice while it was the only row there (once, if none of
  three comes back);
* its requests *failed* again and again at endpoints that answer other rows, also with the row alone. Faults of
  an endpoint that fails for other rows too are not counted, and where faults are frequent on the whole fleet more of
  them are needed, so that a row does not fail by chance.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from ..records import Failure

__all__ = ["MAX_CRASHES", "Evidence"]

MAX_CRASHES = 3
"""Endpoints that a row may crash, at most."""
_CHANCE = 1e-3  # probability that faults alone fail one good row in a run
_UNLIKELY = 0.01  # probability below which faults of a batch are taken for those of a row in it
_HALVED_AT = 2  # faults at which a batch is halved, where they are rare
_MOST_EXCUSES = 6  # incidents of many endpoints that clear a row; rows that crash engines in step are no accident
_MOST_FAULTS = 4  # times ``max_attempts``: no row is retried more often


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
    >>> for _ in range(1000):
    ...     evidence.count_request(failed=False)
    >>> evidence.answered = True
    >>> for _ in range(2):
    ...     evidence.count_fault([7], alone=True)
    ...     print(evidence.is_spent(7))
    False
    True
    """

    def __init__(self, max_attempts: int, rows: int) -> None:
        self._max_attempts = max_attempts
        self._chance = _CHANCE / max(1, rows)
        self._faults: dict[int, int] = {}
        self._crashes: dict[int, int] = {}
        self._failed_alone: dict[int, int] = {}
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
        self._requests = self._failed = 0
        self._probes = self._failed_probes = 0

    def count_request(self, failed: bool, probe: bool = False) -> None:
        """Count a request of rows that nothing speaks against, or a ``probe`` with a prompt that is known to be good,
        and whether it failed by an endpoint's fault."""
        if probe:
            self._probes += 1
            self._failed_probes += failed
        else:
            self._requests += 1
            self._failed += failed

    def count_fault(self, rows: Sequence[int], alone: bool) -> None:
        """Count a fault against each row; ``alone``: the request had this one only."""
        self._counted += 1
        for row in rows:
            self._faults[row] = self._faults.get(row, 0) + 1
        if alone:
            self._failed_alone[rows[0]] = self._failed_alone.get(rows[0], 0) + 1

    def points_at(self, rows: Iterable[int]) -> bool:
        """Whether rows have failed so often that one of them may be the reason: it is looked for in halves."""
        most = self.most_faults(rows)
        return most >= min(_HALVED_AT, self._max_attempts) and self._is_no_accident(most, _UNLIKELY)

    def most_faults(self, rows: Iterable[int]) -> int:
        """The most counted faults that one of the rows has."""
        return max((self._faults.get(row, 0) for row in rows), default=0)

    def speaks_against(self, rows: Iterable[int]) -> bool:
        """Whether one of the rows has a counted fault or was in a crash."""
        if not (self._faults or self._crashes):
            return False
        return any(row in self._faults or row in self._crashes for row in rows)

    def is_spent(self, row: int) -> bool:
        """Whether the faults of a row are enough to fail it: those in company, and those that it had alone."""
        return self._fails_often(row) and self._is_no_accident(self._failed_alone.get(row, 0), _UNLIKELY)

    def _fails_often(self, row: int) -> bool:
        count = self._faults.get(row, 0)
        return count >= self._max_attempts and self._is_no_accident(count, self._chance)

    def _is_no_accident(self, count: int, chance: float) -> bool:
        """Whether so many failures of one row are less likely than ``chance``: the share of requests of other rows
        that fail, to the power of their number. While no row was answered it is that of the plain prompts, to the power
        of the failures of all rows: chance would have let one through."""
        if count >= _MOST_FAULTS * self._max_attempts:
            return True
        requests, failed = self._probes, self._failed_probes
        if self.answered:
            requests, failed = requests + self._requests, failed + self._failed
        else:
            count = max(count, self._counted)
        # One failure may be the row's own; of few requests no more is known than that not all fail.
        failing = max(1, failed) / (requests + 2)
        return count * math.log(failing) <= math.log(chance)

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

    def count_crash(self, rows: Sequence[int], alone: bool) -> None:
        """Count a crash of an engine against each row that was in flight there; ``alone``: nothing else was."""
        for row in rows:
            self._crashes[row] = self._crashes.get(row, 0) + 1
        if alone:
            self._crashed_alone[rows[0]] = self.crashed_alone(rows[0]) + 1

    def crashed_alone(self, row: int) -> int:
        """Crashes of engines that had nothing but this row."""
        return self._crashed_alone.get(row, 0)

    def is_condemned(self, row: int) -> bool:
        """Whether the crashes of a row are enough to fail it."""
        alone, crashes = self.crashed_alone(row), self._crashes.get(row, 0)
        return alone > 1 and crashes >= MAX_CRASHES and self._is_no_accident(crashes, self._chance)

    def crashes_engines(self, row: int) -> bool:
        """Whether a row was in so many crashes that it meets no further engine."""
        return self._crashes.get(row, 0) >= MAX_CRASHES

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
