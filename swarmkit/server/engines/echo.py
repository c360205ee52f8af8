"""An engine without a model: it answers with the user's own text, deterministically.

It exists for tests, benchmarks and notebooks that must give the same output everywhere. The answer of a
sequence is ``echo: <the user's text>``; with a seed (and a temperature above 0) it is ``echo 7: ...``, and
that of sample k > 0 is ``echo #k: ...``, so that answers can be distinguished. A chat is rendered by the template
first, and the template is stripped again to find the user's text, so a chat and the same text wrapped in a
completion run the same way. A raw prompt, one that is not wrapped in the template, is echoed unchanged.
The answer does not depend on first words that it is given (``continue_final_message``): it follows them.
A constrained answer is made from the user's text too, by the rules of `swarmkit.server.engines.constrained`.
Vectors are drawn from a hash of the text.

With ``thinking`` it plays a model like Qwen3, which thinks before it answers unless its prompt ends with closed
thoughts, ``<think>\n\n</think>\n\n``. The template writes these if its switch ``enable_thinking`` is false.
"""

from __future__ import annotations

import asyncio
import hashlib
import heapq
import itertools
import math
import re
import sys
import zlib
from bisect import bisect_left
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from . import constrained
from .base import (
    THOUGHTS_BEGIN,
    THOUGHTS_END,
    Constraint,
    Increment,
    Job,
    Message,
    Prompt,
    PromptRefusedError,
    Sampling,
    Switches,
    TokenLogprobs,
)

__all__ = ["DIMENSIONS", "EchoEngine", "Speed", "detokenize", "hash_vectors", "tokenize"]

DIMENSIONS = 64
"""Numbers of a vector, where a request does not ask for others."""
_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", THOUGHTS_BEGIN, THOUGHTS_END)
_SPECIAL_IDS = {text: i for i, text in enumerate(_SPECIAL)}
_EOS, _BEGIN, _END = 2, 3, 4
# The marks of thoughts are tokens of thinking models only.
_SPLIT, _SPLIT_THINKING = (
    re.compile("(" + "|".join(map(re.escape, marks)) + ")") for marks in (_SPECIAL[:3], _SPECIAL)
)
_SYSTEM = "You are an echo: you answer with the user's own words."
_USER = "user\n"
_BEGIN_TURN = "<|im_start|>"
_TURN = _BEGIN_TURN + _USER
_TAIL = f"<|im_end|>\n{_BEGIN_TURN}assistant\n"
_CLOSED = f"{THOUGHTS_BEGIN}\n\n{THOUGHTS_END}\n\n"
_WIDE = 1 << 44
_SHORT_WORD = re.compile(r"\b[a-zA-Z0-9]{1,4}\b", re.ASCII)
_MOST_LIKELY = 24


def _width(text: str) -> int:
    """Characters a token. An id has to stay below 2**53, else some JSON readers round it."""
    return 4 if text.isascii() else 2


def _id(piece: str, width: int) -> int:
    """Id of a token's text, computed from its characters: no vocabulary is stored, and all processes agree."""
    if width == 4:
        return int.from_bytes(b"\1" + piece.encode("ascii"), "big")
    first, second = ord(piece[0]), ord(piece[1]) if len(piece) == 2 else 0
    return len(piece) * _WIDE + (first << 21) + second


def _text(token: int) -> str:
    """Text of a token; "" if there is no such token."""
    if token < len(_SPECIAL):
        return _SPECIAL[token]
    size, points = divmod(token, _WIDE)
    if size == 0:
        data = token.to_bytes(6, "big").lstrip(b"\0")
        return data[1:].decode("ascii") if data[0] == 1 and data.isascii() and len(data) <= 5 else ""
    chars = divmod(points, 1 << 21)[:size]
    return "".join(map(chr, chars)) if size <= 2 and max(chars) <= sys.maxunicode else ""


def tokenize(text: str, *, thinking: bool = False) -> list[int]:
    """Token ids of a text: each four characters are a token, or each two where the text is not ASCII.

    The marks of the chat template are tokens of their own, and the text between them is cut on its own. So are
    the marks of thoughts if ``thinking``.

    Examples
    --------
    >>> tokenize("<|im_start|>user"), detokenize(tokenize("Grüße, 世界"))
    ([1, 6265464178], 'Grüße, 世界')
    """
    ids: list[int] = []
    for i, part in enumerate((_SPLIT_THINKING if thinking else _SPLIT).split(text)):
        if i % 2:
            ids.append(_SPECIAL_IDS[part])
        else:
            ids += _ids(part, _width(part))
    return ids


def _ids(text: str, width: int) -> list[int]:
    return [_id(text[i : i + width], width) for i in range(0, len(text), width)]


def _count(text: str, thinking: bool = False) -> int:
    """The number of tokens that `tokenize` returns."""
    if "<|" not in text and not (thinking and "think>" in text):
        return -(-len(text) // _width(text))
    parts = (_SPLIT_THINKING if thinking else _SPLIT).split(text)
    return len(parts) // 2 + sum(-(-len(part) // _width(part)) for part in parts[::2])


_count_cached = lru_cache(maxsize=256)(_count)


def detokenize(ids: Sequence[int]) -> str:
    """Text of token ids; the inverse of `tokenize`.

    Raises
    ------
    PromptRefusedError
        An id that is no token's.
    """
    texts = [_text(token) for token in ids]
    if "" in texts:
        raise PromptRefusedError(f"Token id {ids[texts.index('')]} is out of vocabulary")
    return "".join(texts)


@dataclass(frozen=True, slots=True)
class Speed:
    """The simulated speed of an address.

    Attributes
    ----------
    latency_s : float
        Seconds from a sequence's start to its first token.
    tokens_per_s : float
        Tokens per second of one sequence that runs alone; 0 means no limit.
    max_num_seqs : int
        Sequences that run at once; others wait for a slot. Ignored if the address is instant.
    prefill_tokens_per_s : float
        Prompt tokens that it reads per second, during which no sequence advances; a first token takes as long as the
        others then. 0 means that prompts and first tokens take no time.
    slowdown : float
        By how much each sequence that runs beside a sequence lengthens the latter's time: with 0.01 the tokens of 101
        sequences take twice the time of one's.
    """

    latency_s: float = 0.0
    tokens_per_s: float = 0.0
    max_num_seqs: int = 256
    prefill_tokens_per_s: float = 0.0
    slowdown: float = 0.0

    @property
    def first_s(self) -> float:
        """Seconds from a sequence's start to its first token, but for reading prompts."""
        is_a_step = self.prefill_tokens_per_s and self.tokens_per_s
        return self.latency_s + (1 / self.tokens_per_s if is_a_step else 0.0)

    @property
    def instant(self) -> bool:
        """Whether answers take no time at all."""
        return not (self.latency_s or self.tokens_per_s or self.prefill_tokens_per_s)


@dataclass(slots=True, eq=False)
class _Sequence:
    """One answer in progress: its tokens are known from the start, and are reported as time passes."""

    job: Job
    answer: Increment
    prompt_tokens: int
    start: float = 0.0  # on the clock of its address
    sent: int = 0


@dataclass(slots=True)
class _Slots:
    """The sequences of one address, and its clock: seconds of a sequence that runs alone. It stands still while prompts
    are read, and is slower the more sequences run."""

    speed: Speed
    running: int = 0
    waiting: deque[_Sequence] = field(default_factory=deque)
    # (clock of the next report, tie-break, sequence) of what runs
    due: list[tuple[float, int, _Sequence]] = field(default_factory=list)
    clock: float = 0.0
    at: float = 0.0  # the loop's time when the clock was set
    reading_s: float = 0.0  # seconds that prompts are still being read

    @property
    def _stretch(self) -> float:
        return 1.0 + self.speed.slowdown * max(0, self.running - 1)

    def advance(self, now: float) -> None:
        """Set the clock. Before the number of sequences changes, and before prompts come."""
        passed = max(0.0, now - self.at)
        read = min(passed, self.reading_s)
        self.reading_s -= read
        self.clock += (passed - read) / self._stretch
        self.at = max(self.at, now)

    def next_at(self) -> float:
        """The loop's time of the next report."""
        if not self.due:
            return math.inf
        return self.at + self.reading_s + (self.due[0][0] - self.clock) * self._stretch


class EchoEngine:
    """Answers with the user's text.

    Parameters
    ----------
    model : str, default "echo"
        The id it is served under.
    max_model_len : int, default 4096
        Context in tokens; a prompt that leaves no room for an answer is refused.
    speed : Speed, optional
        Speed of all addresses that ``speeds`` does not name; instant by default.
    speeds : mapping of str to Speed, optional
        Speed of single addresses, so that one of many endpoints can be slow.
    bos : bool, default False
        Begin prompts with a token of their own, like models whose template holds it: then
        ``add_special_tokens`` doubles it.
    trim : bool, default False
        Let the template trim the messages, as some do.
    thinking : bool, default False
        Think before answering: ``<think>\\nabout: TEXT\\n</think>\\n\\necho: TEXT``.

    Examples
    --------
    >>> engine = EchoEngine()
    >>> text = engine.render([{"role": "user", "content": "hello"}])
    >>> got = []
    >>> prompt = engine.prompt(text, add_special_tokens=False)
    >>> engine.submit(Job([prompt], 1, Sampling(), "127.0.0.1", got.extend))
    >>> got[0].text, got[0].finish
    ('echo: hello', 'stop')
    """

    def __init__(
        self,
        model: str = "echo",
        *,
        max_model_len: int = 4096,
        speed: Speed | None = None,
        speeds: Mapping[str, Speed] | None = None,
        bos: bool = False,
        trim: bool = False,
        thinking: bool = False,
    ) -> None:
        self.model = model
        self.max_model_len = max_model_len
        self.max_logprobs = 20
        self.generates, self.dimensions = True, DIMENSIONS
        self._bos = _SPECIAL[0] if bos else ""
        self._trim = trim
        self._thinking = thinking
        self._speed = speed or Speed()
        self._speeds = dict(speeds or {})
        self._slots: dict[str, _Slots] = {}
        self._tie = itertools.count()
        self._timer: asyncio.TimerHandle | None = None

    @property
    def alive(self) -> bool:
        """See `Engine.alive`."""
        return True

    def prompt(self, value: str | list[int], *, add_special_tokens: bool) -> Prompt:
        """See `Engine.prompt`."""
        ids = None if isinstance(value, str) else value
        text = value if isinstance(value, str) else detokenize(value)
        if self._bos and add_special_tokens and ids is None:
            text = self._bos + text
        closed = _CLOSED if self._thinking and text.endswith(_CLOSED) else ""
        shown = text.removesuffix(closed)
        chat, tail, begun = shown.rpartition(_TAIL)  # ``begun``: the answer's first words, where these are given
        before, mark, user = chat.rpartition(_TURN)
        if not tail or not mark or _BEGIN_TURN in begun:
            return Prompt(text, ids, _count(text, self._thinking), shown)
        # The counts of the parts that all prompts share are cached. No token ends between "user" and the user's text.
        shared = sum(_count_cached(part, self._thinking) for part in (before, tail + begun, closed) if part)
        return Prompt(text, ids, 1 + shared + _count(_USER + user, self._thinking), user)

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """See `Engine.encode`."""
        return tokenize(self._bos + text if add_special_tokens else text, thinking=self._thinking)

    def decode(self, ids: Sequence[int]) -> str:
        """See `Engine.decode`."""
        return detokenize(ids)

    def render(self, messages: Sequence[Message], switches: Switches | None = None, *, reply: bool = True) -> str:
        """See `Engine.render`."""
        turns = [(m["role"], m["content"].strip() if self._trim else m["content"]) for m in messages]
        if turns[0][0] != "system":
            turns.insert(0, ("system", _SYSTEM))
        text = self._bos + "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in turns)
        if not reply:
            return text
        closed = self._thinking and (switches or {}).get("enable_thinking") is False
        return text + "<|im_start|>assistant\n" + (_CLOSED if closed else "")

    def check(self, constraint: Constraint) -> None:
        """See `Engine.check`."""
        constrained.answer(constraint, "")

    async def embed(self, prompts: Sequence[Prompt], dimensions: int, address: str) -> list[bytes]:
        """See `Engine.embed`."""
        speed = self._speeds.get(address, self._speed)
        if not speed.instant:
            rate = speed.prefill_tokens_per_s
            read_s = sum(prompt.n_tokens for prompt in prompts) / rate if rate else 0.0
            await asyncio.sleep(speed.latency_s + read_s)
        return hash_vectors([prompt.text for prompt in prompts], dimensions)

    def submit(self, job: Job) -> None:
        """See `Engine.submit`."""
        speed = self._speeds.get(job.address, self._speed)
        answers = [
            self._answer(prompt, i * job.n + k, k, job.sampling)
            for i, prompt in enumerate(job.prompts)
            for k in range(job.n)
        ]
        if speed.instant:
            job.sink(answers)
            return
        slots = self._slots.setdefault(job.address, _Slots(speed))
        # The samples of a prompt share it: it is read once.
        read = [prompt.n_tokens if k == 0 else 0 for prompt in job.prompts for k in range(job.n)]
        slots.waiting.extend(_Sequence(job, *each) for each in zip(answers, read, strict=True))
        self._admit(slots)
        self._set_timer()

    def cancel(self, job: Job) -> None:
        """See `Engine.cancel`."""
        job.cancelled = True
        slots = self._slots.get(job.address)
        if slots is None:
            return
        slots.advance(asyncio.get_running_loop().time())
        slots.waiting = deque(s for s in slots.waiting if s.job is not job)
        kept = [entry for entry in slots.due if entry[2].job is not job]
        slots.running -= len(slots.due) - len(kept)
        heapq.heapify(kept)
        slots.due = kept
        self._admit(slots)
        self._set_timer()

    def abort(self) -> None:
        """See `Engine.abort`."""
        left = []
        for slots in self._slots.values():
            left += [*(entry[2] for entry in slots.due), *slots.waiting]
            slots.waiting.clear()
            slots.due.clear()
            slots.running = 0
        for sequence in left:
            sequence.job.sink([Increment(sequence.answer.index, "", (), finish="abort")])

    def load(self, address: str) -> tuple[int, int]:
        """See `Engine.load`."""
        slots = self._slots.get(address)
        return (slots.running, len(slots.waiting)) if slots else (0, 0)

    def close(self) -> None:
        """See `Engine.close`."""
        if self._timer:
            self._timer.cancel()

    def _answer(self, prompt: Prompt, index: int, sample: int, sampling: Sampling) -> Increment:
        """The whole answer of a sequence, as one increment."""
        seed = "" if sampling.seed is None or not sampling.temperature else f" {sampling.seed}"
        name = sampling.adapter or "echo"
        head = f"{name}{seed} #{sample}: " if sample else f"{name}{seed}: "
        constraint = sampling.constraint
        text = constrained.answer(constraint, prompt.user, head) if constraint else head + prompt.user
        room = self.max_model_len - prompt.n_tokens
        limit = room if sampling.max_tokens is None else min(sampling.max_tokens, room)
        least = limit if sampling.ignore_eos else min(sampling.min_tokens, limit)
        if constraint:
            least = 0  # nothing may follow an answer that is complete
        thoughts = self._thoughts(prompt, sampling)
        if thoughts:
            least -= len(thoughts)
            text = text if constraint else "\n\n" + text
        width = _width(text)
        if len(text) < least * width:
            text = (text * (least * width // len(text) + 1))[: least * width]
        ends: Sequence[int] = range(width, width * (-(-len(text) // width) + 1) + 1, width)
        ids = [*thoughts, *_ids(text, width), _EOS] if sampling.want_ids or sampling.logprobs is not None else None
        if thoughts:
            before = list(itertools.accumulate(len(_text(token)) for token in thoughts))
            text, ends = detokenize(thoughts) + text, [*before, *(before[-1] + end for end in ends)]
        finish = "stop"
        if len(ends) > limit:
            text, ends, finish = text[: ends[limit - 1]], ends[:limit], "length"
        reason = None
        shown = text
        if sampling.stop:
            start = ends[min(sampling.min_tokens, len(ends)) - 1] if sampling.min_tokens else 0
            found = [(text.find(stop, start), stop) for stop in sampling.stop]
            hits = [hit for hit in found if hit[0] >= 0]
            if hits:
                at, reason = min(hits)
                shown, ends, finish = text[:at], ends[: bisect_left(ends, at + len(reason)) + 1], "stop"
        ids = ids[: len(ends)] if ids is not None else None
        logprobs = None if sampling.logprobs is None else _logprobs(prompt.user, ids or [], sampling)
        return Increment(index, shown, ends, ids if sampling.want_ids else None, finish, reason, logprobs)

    def _thoughts(self, prompt: Prompt, sampling: Sampling) -> list[int]:
        """Token ids of the thoughts before an answer, with their marks; none if it is answered at once."""
        constraint = sampling.constraint
        if not self._thinking or prompt.text.endswith(_CLOSED) or (constraint and not constraint.after_thoughts):
            return []
        text = f"\nabout: {prompt.user}\n"
        return [_BEGIN, *_ids(text, _width(text))[: sampling.thinking_budget], _END]

    def _admit(self, slots: _Slots) -> None:
        """Start waiting sequences in free slots."""
        slots.advance(asyncio.get_running_loop().time())
        while slots.waiting and slots.running < slots.speed.max_num_seqs:
            sequence = slots.waiting.popleft()
            sequence.start = slots.clock
            slots.running += 1
            if rate := slots.speed.prefill_tokens_per_s:
                slots.reading_s += sequence.prompt_tokens / rate
            self._schedule(sequence, slots)

    def _schedule(self, sequence: _Sequence, slots: _Slots) -> None:
        """Schedule the next report of a sequence."""
        speed = slots.speed
        interval, total = sequence.job.sampling.interval, len(sequence.answer.ends)
        if not interval or not speed.tokens_per_s:
            target = total
        else:
            target = min(total, sequence.sent + interval if sequence.sent else 1)
        wait = speed.first_s + ((target - 1) / speed.tokens_per_s if speed.tokens_per_s else 0.0)
        heapq.heappush(slots.due, (sequence.start + wait, next(self._tie), sequence))

    def _set_timer(self) -> None:
        if self._timer:
            self._timer.cancel()
        at = min((slots.next_at() for slots in self._slots.values()), default=math.inf)
        self._timer = asyncio.get_running_loop().call_at(at, self._report) if at < math.inf else None

    def _report(self) -> None:
        """Report the tokens that are due, in one call of each job's sink."""
        # A millisecond of slack lets sequences that were started together report together.
        now = asyncio.get_running_loop().time() + 0.001
        out: dict[Job, list[Increment]] = {}
        for slots in self._slots.values():
            if slots.next_at() <= now:
                slots.advance(now)
                self._collect(slots, out)
                self._admit(slots)
        self._set_timer()
        for job, increments in out.items():
            job.sink(increments)

    def _collect(self, slots: _Slots, out: dict[Job, list[Increment]]) -> None:
        """Take the tokens of an address that are due by its clock."""
        while slots.due and slots.due[0][0] <= slots.clock + 1e-9:
            sequence = heapq.heappop(slots.due)[2]
            job, answer = sequence.job, sequence.answer
            done = self._due_tokens(sequence, slots.speed, slots.clock + 1e-9)
            last = done >= len(answer.ends)
            out.setdefault(job, []).append(_part(answer, sequence.sent, done, last))
            sequence.sent = done
            if last:
                slots.running -= 1
            else:
                self._schedule(sequence, slots)

    @staticmethod
    def _due_tokens(sequence: _Sequence, speed: Speed, now: float) -> int:
        total = len(sequence.answer.ends)
        if not speed.tokens_per_s:
            return total
        return min(total, 1 + int((now - sequence.start - speed.first_s) * speed.tokens_per_s))


def hash_vectors(texts: Sequence[str], dimensions: int = DIMENSIONS) -> list[bytes]:
    """Vectors of unit length that are drawn from a hash of each text: the same on every machine, to the last bit.

    Whole numbers of 16 bits from SHAKE-128, divided by their length, as float32 numbers, little-endian.

    Examples
    --------
    >>> hash_vectors(["lacZ"], 2)[0].hex()
    '96ed173f190b4ebf'
    """
    import numpy as np  # only here: the servers start sooner without it

    drawn = [hashlib.shake_128(text.encode("utf-8", "surrogatepass")).digest(2 * dimensions) for text in texts]
    numbers = np.frombuffer(b"".join(drawn), "<i2").reshape(len(texts), dimensions).astype(np.float64)
    squares = (numbers * numbers).sum(axis=1, keepdims=True)  # whole numbers, so exact
    vectors = (numbers / np.sqrt(np.maximum(squares, 1.0))).astype("<f4")
    return [vector.tobytes() for vector in vectors]


def _part(answer: Increment, start: int, end: int, last: bool) -> Increment:
    """Some of the tokens of a whole answer."""
    first = answer.ends[start - 1] if start else 0
    return Increment(
        answer.index,
        answer.text[first : answer.ends[end - 1]],
        [at - first for at in answer.ends[start:end]],
        answer.ids[start:end] if answer.ids is not None else None,
        answer.finish if last else None,
        answer.stop_reason if last else None,
        answer.logprobs[start:end] if answer.logprobs is not None else None,
    )


def _logprobs(user: str, ids: Sequence[int], sampling: Sampling) -> list[TokenLogprobs]:
    """Made-up log-probabilities. Likely are the token that is chosen and the last short words of the user's text."""
    words = list(dict.fromkeys(_SHORT_WORD.findall(user)[::-1]))[:_MOST_LIKELY]
    likely = [_id(word, _width(word)) for word in words]
    seed, found = user.encode("utf-8", "surrogatepass"), []
    for place, chosen in enumerate(ids):

        def weight(token: int, place: int = place) -> float:
            return zlib.crc32(b"%d %d %s" % (place, token, seed)) / (1 << 32)

        weights = {token: weight(token) for token in likely} | {chosen: 1.0}
        total = 1.0 + sum(weights.values())
        told = sampling.logprob_ids or sorted(weights, key=lambda t: -weights[t])[: sampling.logprobs]
        by_id = {t: math.log(weights.get(t, 1e-6 + 1e-6 * weight(t)) / total) for t in dict.fromkeys((chosen, *told))}
        found.append(TokenLogprobs(chosen, by_id))
    return found
