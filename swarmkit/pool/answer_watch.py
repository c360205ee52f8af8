"""Endpoints that give one answer to every prompt: an empty text, or always the same.

A broken server, or a gateway without a model behind it, may answer at once and with status 200, and so draw the work of
the whole fleet. Short answers that are often the same may be right, too, as those of a classification. So an endpoint
is doubted only if

* its latest ten answers, to different prompts, are one text,
* of the answers of the other endpoints, ten or more, at most one in twenty is that text, and
* more endpoints give other answers than that one (as many, if it is empty).

Until that can be told, the answers of such a streak are held. The rows of a doubted endpoint are asked again elsewhere,
and that decides: if the answers there differ, it is not believed; if they are the same, it was right.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum

__all__ = ["ENOUGH", "AnswerWatch", "Verdict"]

ENOUGH = 10
"""Answers of an endpoint that are one text before it is doubted, and of the others before they are compared."""
_RARE = 0.05  # share of the others' answers
_DECIDES = 3  # rows that are answered elsewhere in another way, or in the same


class Verdict(Enum):
    """Whether the latest answers of an endpoint can be believed."""

    GOOD = "good"
    UNSURE = "unsure"
    """The others have not answered enough to compare."""
    DOUBTED = "doubted"


@dataclass(slots=True)
class _Endpoint:
    answers: int = 0
    varied: bool = False  # it has given different answers
    text: str = ""  # its latest answer
    streak: int = 0  # latest answers that are this text, to different prompts; counted up to ENOUGH
    prompts: set[int] = field(default_factory=set)  # hashes of the prompts of a streak that is shorter
    requests: int = 0  # in flight
    held_since: float = math.inf
    doubted: bool = False
    not_believed: str | None = None  # the text for which it was doubted, unless that was right
    wrong: bool = False
    differ: int = 0  # of its rows, those that are answered elsewhere in another way
    same: int = 0


class AnswerWatch:
    """Compares what the endpoints of a run answer. It decides only; the executor acts.

    Parameters
    ----------
    prompts : sequence of str or None
        By row.
    share : callable
        Of a text and the endpoints that give it: how many answers the others have given so far, and how many of them
        are that text. It is called a few times in a run.
    patience_s : float
        Seconds for which an endpoint's answers are held at most, for want of others to compare them with.

    Attributes
    ----------
    found_wrong : list of (int, str)
        Endpoints that were doubted and their text, where their rows are answered elsewhere in another way. Each
        endpoint is added once.

    Examples
    --------
    >>> watch = AnswerWatch([f"prompt {i}" for i in range(30)], lambda text, by: (20, 0), patience_s=30.0)
    >>> for endpoint in (0, 1, 2):
    ...     watch.sent(endpoint)
    >>> watch.see(0, range(10), [""] * 10)
    >>> watch.verdict(0, now=0.0)
    <Verdict.UNSURE: 'unsure'>
    >>> watch.see(1, range(10, 20), [f"answer {i}" for i in range(10)])
    >>> watch.newly_doubted(now=1.0)
    [0]
    """

    def __init__(
        self, prompts: Sequence[str | None], share: Callable[[str, Collection[int]], tuple[int, int]], patience_s: float
    ) -> None:
        self._endpoints: defaultdict[int, _Endpoint] = defaultdict(_Endpoint)
        self._prompts = prompts
        self._share = share
        self._patience_s = patience_s
        self._answers = 0
        self._answered = 0  # endpoints that have answered
        self._silent = 0  # endpoints that have not, with requests in flight
        self._busy = 0  # endpoints with requests in flight
        self._streaks: dict[str, set[int]] = {}  # by text: the endpoints that give nothing else at present
        self._common: set[str] = set()  # texts that the others give, too
        self._rare: set[str] = set()  # texts that they do not
        self._asked: dict[int, tuple[int, str]] = {}  # rows that are asked again: who was doubted for which text
        self.found_wrong: list[tuple[int, str]] = []

    # ---- what is seen ------------------------------

    def sent(self, endpoint: int) -> None:
        """A request goes out."""
        e = self._endpoints[endpoint]
        if not e.requests:
            self._busy += 1
            self._silent += not e.answers
        e.requests += 1

    def ended(self, endpoint: int) -> None:
        """A request has its reply, or has failed."""
        e = self._endpoints[endpoint]
        e.requests -= 1
        if not e.requests:
            self._busy -= 1
            self._silent -= not e.answers

    def see(self, endpoint: int, rows: Sequence[int], texts: Sequence[str]) -> None:
        """An endpoint answers rows. White space at the ends of ``texts`` does not make them different."""
        if not texts:
            return
        e = self._endpoints[endpoint]
        if not e.answers:
            self._answered += 1
            self._silent -= e.requests > 0
        e.answers += len(texts)
        self._answers += len(texts)
        last = texts[-1].strip()
        # Looked at from the end: most endpoints give another text just before, and then this one tells all.
        alike = 0
        for text in reversed(texts):
            if text.strip() != last:
                break
            alike += 1
        if last != e.text or alike < len(texts):
            e.varied = e.varied or e.answers > len(texts) or alike < len(texts)
            self._end_streak(endpoint)
            e.text = last
        if e.streak < ENOUGH:
            e.prompts.update(hash(self._prompts[row]) for row in rows[-alike:][:ENOUGH])
            e.streak = len(e.prompts)
            if e.streak >= ENOUGH:
                e.prompts.clear()
                self._streaks.setdefault(last, set()).add(endpoint)
        if self._asked:
            self._compare(endpoint, rows, [text.strip() for text in texts])

    def _end_streak(self, endpoint: int) -> None:
        e = self._endpoints[endpoint]
        if e.streak >= ENOUGH:
            alike = self._streaks[e.text]
            alike.discard(endpoint)
            if not alike:
                del self._streaks[e.text]
        e.prompts.clear()
        e.streak, e.doubted = 0, False

    def _compare(self, endpoint: int, rows: Sequence[int], texts: Sequence[str]) -> None:
        """Compare answers to rows that are asked again with those of the endpoint that is doubted."""
        for row, text in zip(rows, texts, strict=True):
            by, doubted = self._asked.get(row, (endpoint, ""))
            if by == endpoint:
                continue
            del self._asked[row]
            e = self._endpoints[by]
            e.same += text == doubted and self._endpoints[endpoint].varied
            e.differ += text != doubted
            if e.same == _DECIDES > e.differ:
                e.doubted, e.not_believed = False, None
                self._common.add(doubted)
            elif e.differ == _DECIDES > e.same and not e.wrong:
                e.wrong = True
                self.found_wrong.append((by, doubted))

    # ---- what follows ------------------------------

    def verdict(self, endpoint: int, now: float) -> Verdict:
        """Whether the latest answers of an endpoint can be believed, at time ``now``."""
        e = self._endpoints[endpoint]
        if e.text == e.not_believed:  # also where a good answer, which was long under way, has ended its streak
            return Verdict.DOUBTED
        if e.streak < ENOUGH:
            return Verdict.GOOD
        verdict = Verdict.DOUBTED if e.doubted else self._verdict(e.text)
        if verdict is Verdict.UNSURE and (self._busy <= (e.requests > 0) or now >= e.held_since + self._patience_s):
            return Verdict.GOOD
        return verdict

    def _verdict(self, text: str) -> Verdict:
        """Whether this is the right answer to all that it was given to."""
        if text in self._common:
            return Verdict.GOOD
        if self._silent > self._answered:
            return Verdict.UNSURE
        alike = self._streaks[text]
        others, needed = self._answered - len(alike), len(alike) + bool(text)
        if len(alike) > max(1, others) or others + self._silent < needed:
            return Verdict.GOOD
        if others < needed:
            return Verdict.UNSURE
        if self._answers - sum(self._endpoints[i].answers for i in alike) < ENOUGH:
            return Verdict.UNSURE
        if text not in self._rare:
            answers, same = self._share(text, alike)
            if answers < ENOUGH:
                return Verdict.UNSURE
            if same > _RARE * answers:
                self._common.add(text)
                return Verdict.GOOD
            self._rare.add(text)
        return Verdict.DOUBTED

    def newly_doubted(self, now: float) -> list[int]:
        """The endpoints that are to be doubted and are not yet."""
        if not self._streaks or self._silent > self._answered:
            return []
        found = []
        for text, alike in self._streaks.items():
            if self._verdict(text) is Verdict.DOUBTED:
                found += [i for i in alike if not self._endpoints[i].doubted]
        return found

    def patience(self, endpoint: int, now: float) -> float:
        """Seconds for which an endpoint's answers may be held, from now on."""
        e = self._endpoints[endpoint]
        e.held_since = min(e.held_since, now)
        return e.held_since + self._patience_s - now

    def doubt(self, endpoint: int) -> str:
        """Doubt an endpoint for as long as it gives the same text; return that."""
        e = self._endpoints[endpoint]
        e.doubted, e.not_believed = True, e.text
        return e.text

    def ask_again(self, endpoint: int, rows: Iterable[int]) -> str:
        """These rows of a doubted endpoint are asked again elsewhere; return the text that it gives."""
        e = self._endpoints[endpoint]
        if not e.wrong:
            self._asked.update(dict.fromkeys(rows, (endpoint, e.text)))
        return e.text
