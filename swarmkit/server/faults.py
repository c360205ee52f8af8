"""Scripted faults: what a local server does wrong on purpose, and for which requests."""

from __future__ import annotations

import dataclasses
import random
import re
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

from ..errors import SettingError
from .engines.base import Increment

__all__ = ["KINDS", "Fault", "FaultPlan", "Tamper", "spoilt"]

KINDS = {
    "http_307": "redirected to another host",
    "http_400": "every request is refused",
    "http_401": "the key is refused",
    "http_402": "the credits are used up",
    "http_403": "forbidden",
    "http_404": "no such model",
    "http_405": "method not allowed",
    "http_413": "too large for a proxy; its error page, not JSON",
    "http_422": "refused, as by TGI",
    "http_429": "too many requests, with Retry-After: `seconds`",
    "http_500": "internal error",
    "http_502": "a proxy's error page, not JSON",
    "http_503": "vLLM's queue is full; no Retry-After",
    "http_504": "a proxy's error page, not JSON",
    "queue_full": "503 for a request with more than `rows` prompts; no Retry-After",
    "wait": "503 with Retry-After: `seconds`",
    "reset": "the connection is reset before any answer",
    "cut": "the connection ends after `rows` rows of the answer",
    "half_close": "the server's half of the connection ends after `rows` rows; the other stays open",
    "hang": "no answer ever",
    "silence": "nothing more after the headers and `rows` rows; the connection stays open",
    "drip": "the answer comes in 64-byte pieces, one each `seconds`",
    "garbage": "status 200 and a body that is not JSON",
    "null_body": "status 200 and the body `null`",
    "empty_body": "status 200 and no body",
    "error_body": "status 200 and an error object",
    "half_json": "status 200 and the first half of the body, without a sign that it is incomplete",
    "late_400": "refused after the headers: in a stream an error event after status 200, then [DONE]",
    "late_500": "the same for an internal error",
    "shuffle": "choices in arbitrary order",
    "missing_index": "one choice is missing",
    "repeated_index": "one choice has the index of another (a single choice is sent twice)",
    "unknown_index": "one choice has an index that was not asked for",
    "wrong_type": "one choice's text is a number",
    "no_finish": "one choice never gets a finish_reason",
    "no_done": "the stream ends without [DONE]",
    "abort": "all but the first `rows` rows end with finish_reason abort and half their text",
    "invalid": "rows whose answer must be of some form are not: all but white space in it is question marks",
    "bad_row": "400 for a request that has `marker` in any of its prompts",
    "kill_row": "reset for a request that has `marker` in any of its prompts",
}
_ENDS_EARLY = {"cut", "half_close", "silence"}
_TAMPERS = _ENDS_EARLY | {
    "shuffle", "missing_index", "repeated_index", "unknown_index", "wrong_type", "no_finish", "no_done", "abort",
    "half_json",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Fault:
    """A fault, and the requests it applies to.

    Parameters
    ----------
    kind : str
        One of `KINDS`.
    probability : float, default 1.0
        Share of the eligible requests that have the fault; of ``invalid``, of the eligible rows.
    first : int, optional
        Only this many eligible requests have the fault (after ``after``).
    after : int, default 0
        This many eligible requests come before the first that has the fault.
    every : int, default 1
        Every ``every``-th eligible request has the fault.
    address : str, optional
        Only requests on this local address are eligible.
    path : str, optional
        Only requests to paths with this prefix are eligible; by default those that generate text.
    marker : str, optional
        Only requests with this text in a prompt are eligible; ``bad_row`` and ``kill_row`` need one.
    rows : int, default 1
        For ``cut``, ``half_close``, ``silence`` and ``abort``: rows that are answered; for ``queue_full``: prompts
        that are accepted.
    seconds : float, default 1.0
        For ``drip``: time between two pieces; for ``http_429`` and ``wait``: the Retry-After.
    seed : int, default 0
        Seed of the draws for ``probability`` and ``shuffle``.

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
            raise SettingError(f"unknown fault {self.kind!r}; the faults are: {', '.join(KINDS)}")
        if self.kind in ("bad_row", "kill_row") and not self.marker:
            raise SettingError(f"the fault {self.kind} needs marker=TEXT, a text in the prompts it applies to")
        if self.every < 1 or not 0 <= self.probability <= 1:
            raise SettingError(f"every must be 1 or more and probability between 0 and 1: {self}")

    @classmethod
    def parse(cls, spec: str) -> Fault:
        """Read ``kind`` or ``kind:name=value,name=value``, with the names of this record's fields.

        Parameters
        ----------
        spec : str
            The value of ``--fault``; a field's value cannot hold a comma.

        Raises
        ------
        SettingError
            The spec cannot be parsed.
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
        """Whether the answer is generated as usual, and then altered."""
        return self.kind in _TAMPERS


class FaultPlan:
    """Decides which fault a request has. Eligible requests are counted per fault, over all its addresses.

    ``invalid`` is decided for each row by itself: its rows are counted like other faults' requests, and whether
    ``probability`` hits one depends on its prompt, the seed, and how often the fault has seen that prompt before.
    The same run therefore has the same invalid rows, however they are batched, and a row that is asked again may
    be valid.

    Parameters
    ----------
    faults : sequence of Fault
        If several apply to a request, it has the first of them.
    """

    def __init__(self, faults: Sequence[Fault] = ()) -> None:
        self._state = [
            (fault, random.Random(f"{fault.seed}-{i}"), [0])
            for i, fault in enumerate(faults)
            if fault.kind != "invalid"
        ]
        self._invalid = [(fault, Counter[str](), [0]) for fault in faults if fault.kind == "invalid"]

    def pick(self, address: str, path: str, texts: Collection[str] | None) -> Fault | None:
        """Choose the fault of a request; None if it is answered normally.

        Parameters
        ----------
        address : str
            Local address the request was received on.
        path : str
        texts : collection of str or None
            The prompts; None if the request is not one that generates text.
        """
        chosen = None
        for fault, rng, count in self._state:
            if not self._eligible(fault, address, path, texts):
                continue
            count[0] += 1
            if not _is_turn(fault, count[0]):
                continue
            if fault.probability < 1 and rng.random() >= fault.probability:
                continue
            chosen = chosen or fault
        return chosen

    def invalid_rows(self, address: str, path: str, texts: Sequence[str]) -> set[int]:
        """The rows of a constrained request whose answers are spoilt.

        Parameters
        ----------
        address : str
        path : str
        texts : sequence of str
            The prompt of each row.
        """
        hit = set()
        for fault, seen, count in self._invalid:
            for row, text in enumerate(texts):
                if not self._eligible(fault, address, path, [text]):
                    continue
                count[0] += 1
                seen[text] += 1
                draw = random.Random(f"{fault.seed}-{seen[text]}-{text}".encode("utf-8", "surrogatepass")).random()
                if _is_turn(fault, count[0]) and draw < fault.probability:
                    hit.add(row)
        return hit

    @staticmethod
    def _eligible(fault: Fault, address: str, path: str, texts: Collection[str] | None) -> bool:
        if fault.address is not None and fault.address != address:
            return False
        if fault.path is None:
            if texts is None:
                return False
        elif not path.startswith(fault.path):
            return False
        if fault.kind == "queue_full" and len(texts or ()) <= fault.rows:
            return False
        return not fault.marker or any(fault.marker in text for text in texts or ())


def _is_turn(fault: Fault, count: int) -> bool:
    """Whether the fault has its turn at the ``count``-th eligible request."""
    k = count - fault.after
    return k >= 1 and not k % fault.every and (fault.first is None or k <= fault.first)


def spoilt(increment: Increment) -> Increment:
    """The same tokens with a text that is no JSON, nor any choice."""
    return replace(increment, text=re.sub(r"\S", "?", increment.text))


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
        self._target = (n_rows - 1) // 2
        self._n_rows = n_rows
        self._shortened: set[int] = set()
        self.kind = fault.kind
        self.no_done = fault.kind in ("no_done", "half_json")

    def ends_now(self, n_finished: int) -> bool:
        """Whether writing stops after this many finished rows."""
        return self.kind in _ENDS_EARLY and n_finished >= min(self._fault.rows, self._n_rows)

    def applies_to(self, index: int, kind: str) -> bool:
        """Whether the fault is of this kind, and alters this row."""
        return self.kind == kind and index == self._target

    def order(self, indices: list[int]) -> list[int]:
        """The order in which rows are written."""
        if self._fault.kind == "shuffle":
            self._rng.shuffle(indices)
        return indices

    def labels(self, index: int) -> tuple[int, ...]:
        """The choice indices that a row is written with."""
        if index != self._target:
            return (index,)
        if self._fault.kind == "missing_index":
            return ()
        if self._fault.kind == "unknown_index":
            return (self._n_rows + 7,)
        if self._fault.kind == "repeated_index":
            return (index, index) if self._n_rows == 1 else (self._target + 1,)
        return (index,)

    def alter(self, increments: list[Increment]) -> list[Increment]:
        """Cut rows short, if the fault does that; later tokens of a row that was cut are dropped."""
        if self._fault.kind != "abort" and self._fault.kind not in _ENDS_EARLY:
            return increments
        finish = "abort" if self._fault.kind == "abort" else None
        out = []
        for new in increments:
            if new.index < self._fault.rows:
                out.append(new)
            elif new.index not in self._shortened:
                self._shortened.add(new.index)
                ends = new.ends[: max(1, len(new.ends) // 2)]
                ids = new.ids[: len(ends)] if new.ids is not None else None
                out.append(Increment(new.index, new.text[: ends[-1]] if ends else "", ends, ids, finish))
        return out
