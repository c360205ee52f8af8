"""Scripted faults: what can go wrong between a client and a server, on purpose and on schedule."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from swarmkit.errors import SettingError

from .engines import Increment

__all__ = ["KINDS", "Fault", "FaultPlan", "Tamper"]

KINDS = {
    "http_401": "the key is refused",
    "http_403": "forbidden",
    "http_404": "no such model",
    "http_429": "too many requests, with Retry-After: `seconds`",
    "http_500": "internal error",
    "http_502": "a proxy's error page, not JSON",
    "http_503": "vLLM's queue is full; no Retry-After",
    "reset": "the connection is reset before any answer",
    "cut": "the connection ends after `rows` rows of the answer",
    "hang": "no answer ever",
    "drip": "the answer comes in 64-byte pieces, one each `seconds`",
    "garbage": "status 200 and a body that is not JSON",
    "null_body": "status 200 and the body `null`",
    "shuffle": "choices in arbitrary order",
    "missing_index": "one choice is missing",
    "repeated_index": "one choice has the index of another (a lone one comes twice)",
    "no_done": "the stream ends without [DONE]",
    "abort": "all but the first `rows` rows end with finish_reason abort and half their text",
    "bad_row": "400 for a request that has `marker` in any of its prompts",
    "kill_row": "reset for a request that has `marker` in any of its prompts",
}
_TAMPERS = {"shuffle", "missing_index", "repeated_index", "no_done", "abort", "cut"}


@dataclass(frozen=True, slots=True)
class Fault:
    """A fault, and which requests it hits.

    Parameters
    ----------
    kind : str
        One of `KINDS`.
    probability : float, default 1.0
        Of the requests that are eligible, the share that is hit.
    first : int, optional
        Only the first so many eligible requests are hit.
    after : int, default 0
        The first so many eligible requests are left alone.
    every : int, default 1
        Only each so-manyth eligible request is hit.
    address : str, optional
        Only requests that come in on this local address are eligible.
    path : str, optional
        Only requests to paths that begin so are eligible; by default those that generate text.
    marker : str, optional
        Only requests with this text in a prompt are eligible; ``bad_row`` and ``kill_row`` need one.
    rows : int, default 1
        For ``cut`` and ``abort``: rows that are answered.
    seconds : float, default 1.0
        For ``drip``: between two pieces; for ``http_429``: the Retry-After.
    seed : int, default 0
        Of the draws for ``probability`` and ``shuffle``.

    Raises
    ------
    SettingError
        An unknown kind, or a missing marker.

    Examples
    --------
    >>> Fault.parse("http_500:probability=0.1,address=127.0.0.3").probability
    0.1
    """

    kind: str
    probability: float = 1.0
    first: int | None = None
    after: int = 0
    every: int = 1
    address: str | None = None
    path: str | None = None
    marker: str | None = None
    rows: int = 1
    seconds: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise SettingError(f"unknown fault {self.kind!r}; there are: {', '.join(KINDS)}")
        if self.kind in ("bad_row", "kill_row") and not self.marker:
            raise SettingError(f"the fault {self.kind} needs marker=TEXT, the text of the prompts it hits")
        if self.every < 1 or not 0 <= self.probability <= 1:
            raise SettingError(f"every must be 1 or more and probability between 0 and 1: {self}")

    @classmethod
    def parse(cls, spec: str) -> Fault:
        """Read ``kind`` or ``kind:name=value,name=value``, the names being this record's.

        Parameters
        ----------
        spec : str
            As given to ``--fault``; a value cannot hold a comma.

        Raises
        ------
        SettingError
            What the spec says cannot be understood.
        """
        kind, _, rest = spec.partition(":")
        fields = {f.name: f for f in dataclasses.fields(cls) if f.name != "kind"}
        values: dict[str, object] = {}
        for part in filter(None, rest.split(",")):
            name, equals, value = part.partition("=")
            if name not in fields or not equals:
                raise SettingError(f"fault {spec!r}: {part!r} is not one of {', '.join(fields)} with =value")
            kind_of = str(fields[name].type)
            convert: Callable[[str], object] = (
                int if kind_of.startswith("int") else float if kind_of.startswith("float") else str
            )
            try:
                values[name] = convert(value)
            except ValueError as error:
                raise SettingError(f"fault {spec!r}: {name} must be a number, not {value!r}") from error
        return cls(kind, **values)  # type: ignore[arg-type]  # converted by the fields' own types just above

    @property
    def is_tamper(self) -> bool:
        """Whether the answer is made as usual, and altered."""
        return self.kind in _TAMPERS


class FaultPlan:
    """Decides which fault a request meets. Requests are counted per fault, over all addresses it covers.

    Parameters
    ----------
    faults : sequence of Fault
        The first that hits a request counts.
    """

    def __init__(self, faults: Sequence[Fault] = ()) -> None:
        self._state = [(fault, random.Random(f"{fault.seed}-{i}"), [0]) for i, fault in enumerate(faults)]

    def pick(self, address: str, path: str, texts: Iterable[str] | None) -> Fault | None:
        """Choose the fault of a request; None for the ordinary course.

        Parameters
        ----------
        address : str
            Local address the request came in on.
        path : str
        texts : iterable of str or None
            The prompts; None if the request is not one that generates text.
        """
        hit = None
        for fault, rng, count in self._state:
            if not self._eligible(fault, address, path, texts):
                continue
            count[0] += 1
            k = count[0] - fault.after
            if k < 1 or k % fault.every or (fault.first is not None and k > fault.first):
                continue
            if fault.probability < 1 and rng.random() >= fault.probability:
                continue
            hit = hit or fault
        return hit

    @staticmethod
    def _eligible(fault: Fault, address: str, path: str, texts: Iterable[str] | None) -> bool:
        if fault.address is not None and fault.address != address:
            return False
        if fault.path is None:
            if texts is None:
                return False
        elif not path.startswith(fault.path):
            return False
        return not fault.marker or any(fault.marker in text for text in texts or ())


class Tamper:
    """How a fault alters the rows of one answer.

    Parameters
    ----------
    fault : Fault
        One with `Fault.is_tamper`.
    n_rows : int
    """

    def __init__(self, fault: Fault, n_rows: int) -> None:
        self._fault = fault
        self._rng = random.Random(fault.seed)
        self._victim = (n_rows - 1) // 2
        self._n_rows = n_rows
        self._stumps: set[int] = set()
        self.no_done = fault.kind == "no_done"

    def cut_now(self, n_finished: int) -> bool:
        """Whether the connection ends here, so many rows being finished."""
        return self._fault.kind == "cut" and n_finished >= min(self._fault.rows, self._n_rows)

    def order(self, indices: list[int]) -> list[int]:
        """The order in which rows are written."""
        if self._fault.kind == "shuffle":
            self._rng.shuffle(indices)
        return indices

    def labels(self, index: int) -> tuple[int, ...]:
        """The indices a row is written under."""
        if index != self._victim:
            return (index,)
        if self._fault.kind == "missing_index":
            return ()
        if self._fault.kind == "repeated_index":
            return (index, index) if self._n_rows == 1 else (self._victim + 1,)
        return (index,)

    def alter(self, increments: list[Increment]) -> list[Increment]:
        """Cut rows short, if the fault says so; what comes after the cut is dropped."""
        if self._fault.kind not in ("abort", "cut"):
            return increments
        finish = "abort" if self._fault.kind == "abort" else None
        out = []
        for new in increments:
            if new.index < self._fault.rows:
                out.append(new)
            elif new.index not in self._stumps:
                self._stumps.add(new.index)
                ends = new.ends[: max(1, len(new.ends) // 2)]
                ids = new.ids[: len(ends)] if new.ids is not None else None
                out.append(Increment(new.index, new.text[: ends[-1]] if ends else "", ends, ids, finish))
        return out
