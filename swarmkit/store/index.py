"""Where the answer to a key stands: an index of the lines of all segments, beside them.

An entry is half of the key, and the place of its line. Segments only grow, so the index knows how far it has read each
of them, and reads on from there: it makes no difference whether one is finished, still written by another process, or
torn. The file is a cache of that reading. It is written by whoever has read much that no file had, whole and under its
name at once, so several processes need not know of each other; one that is missing, torn, of other segments or older
than they are costs the time to read on. It is never trusted over the segments: an answer is taken from its line, which
has the whole key, and a line that is not where it should be has the segment read anew.
"""

from __future__ import annotations

import binascii
import contextlib
import json
import os
import secrets
import threading
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from ..errors import StoreError
from .keys import SIZE, ask_of
from .segments import (
    LONGEST_LINE,
    ROW,
    cannot_be_read,
    fsync,
    is_header,
    is_sound,
    lines_unreadable,
    no_header,
    opened,
    parsed,
    segments_in,
)

__all__ = ["FILE", "Index", "Places"]

FILE = "index.npz"
"""Name of the index in the folder of its segments."""

_VERSION = 1
_BLOCK = 8 << 20
_TAIL = 64
_AT_ONCE = 1 << 20  # keys: what is made for each is only there for so many
_OFFSET_BITS = np.uint64(44)  # of a place; the others are the segment's number
_HEX = 2 * SIZE

_OFFSET = (np.uint64(1) << _OFFSET_BITS) - np.uint64(1)

Numbers = npt.NDArray[np.uint64]
Places = npt.NDArray[np.int64]


@dataclass
class _Segment:
    """How far a segment was read."""

    number: int
    end: int = 0
    tail: str = ""  # the bytes before the end: a file in which others stand there is another file
    unreadable: int = 0
    problem: str = ""


class Index:
    """The index of a folder of segments. May be used from several threads.

    Parameters
    ----------
    folder : pathlib.Path
        It need not exist.
    load : bool, default True
        Whether the file is read, if there is one.
    save_after : int, optional
        Bytes to read before the file is written again; by default they take a tenth of a second.

    Attributes
    ----------
    asks : dict of str to dict
        The settings of the answers, as the segments have them, by their hash there.
    """

    def __init__(self, folder: Path, load: bool = True, save_after: int = 64 << 20) -> None:
        self._folder = folder
        self._save_after = save_after
        self._lock = threading.RLock()
        self._segments: dict[str, _Segment] = {}
        self._numbers = 0
        nothing = np.empty(0, np.uint64)
        self._parts = [(nothing, nothing)]  # digests in order, and places; each part far smaller than the one before
        self._unsaved = 0
        self._in_file = False
        self.asks: dict[str, dict[str, Any]] = {}
        if load:
            self._load()

    def refresh(self) -> None:
        """Read on in all segments.

        Raises
        ------
        StoreError
            A segment was written by a newer swarmkit, or the folder cannot be read.
        """
        with self._lock:
            paths = segments_in(self._folder)
            self.forget(self._segments.keys() - {path.name for path in paths})
            for path in paths:
                self._read_on(path)
            if self._unsaved > self._save_after:
                self._save()

    @property
    def size(self) -> int:
        """Stored rows: those with several samples, and those that were asked again, count once."""
        with self._lock:
            self._merge(len(self._parts))
            ((digests, _),) = self._parts
            return len(digests) and 1 + int(np.count_nonzero(digests[1:] != digests[:-1]))

    def damage(self) -> dict[str, str]:
        """What could not be read, by the segment's name."""
        with self._lock:
            found = {
                name: segment
                for name, segment in sorted(self._segments.items())
                if segment.problem or segment.unreadable
            }
        return {n: s.problem or lines_unreadable(self._folder / n, s.unreadable) for n, s in found.items()}

    def meanings(self) -> list[tuple[str, str]]:
        """What the settings in the segments are hashed to there, and what they are hashed to now."""
        with self._lock:
            return [(ask, _meaning(line)) for ask, line in self.asks.items()]

    def find(self, digests: Numbers) -> list[tuple[Path, Places, Places]]:
        """The lines that may have the keys of these digests.

        Returns
        -------
        list of (path, offsets, positions)
            The lines of a segment, in order, each with the position in ``digests``. Segments are in their order.
        """
        with self._lock:
            order = np.argsort(digests, kind="stable")
            blocks = [order[start : start + _AT_ONCE] for start in range(0, len(order), _AT_ONCE)]
            found = [_hits(part, digests[block], block) for part in self._parts for block in blocks]
            del order, blocks
            return self._by_segment(found)

    def repeated(self) -> list[tuple[Path, Places]]:
        """The lines of digests that are there more than once: segments, and offsets in them, in order."""
        with self._lock:
            self._merge(len(self._parts))
            ((digests, places),) = self._parts
            same = digests[1:] == digests[:-1]
            places = (
                places[np.concatenate((same, [False])) | np.concatenate(([False], same))] if len(same) else places[:0]
            )
            return [
                (path, offsets) for path, offsets, _ in self._by_segment([(places, np.zeros(len(places), np.int64))])
            ]

    def _by_segment(self, found: list[tuple[Numbers, Places]]) -> list[tuple[Path, Places, Places]]:
        """Places, and what belongs to each, in the order of segments and lines. Each array is let go when the next is
        made, ``found`` too: there may be ten millions."""
        names = sorted(self._segments)
        ranks = np.zeros(self._numbers + 1, np.uint64)
        for rank, name in enumerate(names):
            ranks[self._segments[name].number] = np.uint64(rank) << _OFFSET_BITS
        places = np.concatenate([np.empty(0, np.uint64), *(places for places, _ in found)])
        positions = np.concatenate([np.empty(0, np.int64), *(positions for _, positions in found)])
        found.clear()
        places = ranks[places >> _OFFSET_BITS] | places & _OFFSET
        order = np.argsort(places, kind="stable")
        places = places[order]
        positions = positions[order]
        del order
        ends = np.searchsorted(places, np.arange(1, len(names) + 1, dtype=np.uint64) << _OFFSET_BITS).tolist()
        places &= _OFFSET
        offsets = places.view(np.int64)
        return [
            (self._folder / name, offsets[start:end], positions[start:end])
            for name, start, end in zip(names, [0, *ends], ends, strict=False)
            if end > start
        ]

    def forget(self, names: set[str]) -> None:
        """Take out segments: those that are gone, or are not what was read."""
        with self._lock:
            gone = [self._segments.pop(name).number for name in names if name in self._segments]
            if gone:
                self._unsaved += self._in_file * self._save_after  # what is in the file is wrong
                for i, (digests, places) in enumerate(self._parts):
                    keep = ~np.isin(places >> _OFFSET_BITS, np.array(gone, np.uint64))
                    self._parts[i] = digests[keep], places[keep]

    # ---- reading ------------------------------

    def _new(self, path: Path) -> _Segment:
        self._segments[path.name] = segment = _Segment(self._numbers)
        self._numbers += 1
        return segment

    def _read_on(self, path: Path) -> None:
        segment = self._segments.get(path.name) or self._new(path)
        try:
            with opened(path) as file:
                segment.problem = ""
                size = os.fstat(file.fileno()).st_size
                if segment.end:
                    file.seek(max(0, segment.end - _TAIL))
                    if size < segment.end or file.read(min(_TAIL, segment.end)).hex() != segment.tail:
                        self.forget({path.name})
                        segment = self._new(path)
                if size > segment.end:
                    self._scan(path, file, segment)
        except OSError as exc:
            if isinstance(exc, StoreError):
                raise
            segment.problem = cannot_be_read(path, exc)

    def _scan(self, path: Path, file: IO[bytes], segment: _Segment) -> None:
        """Read the whole lines of a segment from where it was read to."""
        file.seek(segment.end)
        began, at, rest = segment.end, segment.end, b""
        digests: list[Numbers] = []
        offsets: list[Numbers] = []
        while block := file.read(_BLOCK):
            cut = block.rfind(b"\n") + 1
            if not cut and len(rest) + len(block) < LONGEST_LINE:
                rest += block
                continue
            if not cut:  # too long a line: it is skipped, however long it is
                at += len(rest) + len(block)
                while (raw := file.readline(_BLOCK)) and not raw.endswith(b"\n"):
                    at += len(raw)
                if not raw:
                    break
                at, rest = at + len(raw), b""
                if began == segment.end == 0:
                    segment.problem = no_header(path)
                    return
                segment.unreadable += 1
                segment.end = at
                continue
            data, rest = rest + block[:cut], block[cut:]
            if at == 0:
                first = data.index(b"\n") + 1
                if not is_header(path, parsed(data[:first])):
                    segment.problem = no_header(path)
                    return
                data, at = data[first:], first
            if data:
                found, starts, unreadable = self._lines(data)
                digests.append(found)
                offsets.append(starts + np.uint64(at))
                segment.unreadable += unreadable
            at += len(data)
            segment.end = at
        if segment.end > began:
            file.seek(max(0, segment.end - _TAIL))
            segment.tail = file.read(min(_TAIL, segment.end)).hex()
            self._unsaved += segment.end - began
        if digests:
            self._add(np.concatenate(digests), np.concatenate(offsets) | np.uint64(segment.number) << _OFFSET_BITS)

    def _lines(self, data: bytes) -> tuple[Numbers, Numbers, int]:
        """The digests and the offsets of the answers among whole lines, and how many lines cannot be read.

        Lines that begin as an answer's are not parsed, which would take ten times as long: that is left to whoever
        wants the answer.
        """
        letters = np.frombuffer(data, np.uint8)
        ends = np.flatnonzero(letters == ord("\n"))
        starts = np.concatenate((np.zeros(1, ends.dtype), ends[:-1] + 1))
        is_row = ends - starts > len(ROW) + _HEX
        if len(data) > len(ROW) + _HEX:
            roomy = starts[is_row]
            quotes = letters[roomy + len(ROW) + _HEX] == ord('"')
            is_row[is_row] = quotes & (_words(data, len(ROW))[roomy] == ROW)
        rows = starts[is_row]
        try:
            raw = binascii.unhexlify(_words(data, _HEX)[rows + len(ROW)].tobytes()) if len(rows) else b""
        except binascii.Error:  # some keys are none: each is looked at
            sound = [_is_key(data[row + len(ROW) : row + len(ROW) + _HEX]) for row in rows.tolist()]
            is_row[is_row] = sound
            rows = starts[is_row]
            raw = binascii.unhexlify(b"".join(data[row + len(ROW) : row + len(ROW) + _HEX] for row in rows.tolist()))
        unreadable = 0
        more: list[tuple[int, int]] = []
        for start, end in zip(starts[~is_row].tolist(), ends[~is_row].tolist(), strict=True):
            line = parsed(data[start : end + 1])
            if not is_sound(line):
                unreadable += 1
            elif "key" not in line and "prompts" not in line:
                self.asks[line["ask"]] = line
            elif _is_key(line.get("key", "").encode("utf-8", "replace")):
                more.append((int(line["key"][:SIZE], 16), start))
        digests = np.frombuffer(raw, ">u8")[::2].astype(np.uint64)
        if not more:
            return digests, rows.astype(np.uint64), unreadable
        others = np.array(more, np.uint64)
        return (
            np.concatenate((digests, others[:, 0])),
            np.concatenate((rows, others[:, 1])).astype(np.uint64),
            unreadable,
        )

    def _add(self, digests: Numbers, places: Numbers) -> None:
        """Add entries: a part of their own, which is merged with those that are not far larger."""
        self._parts.append((digests, places))
        count = 1
        while len(self._parts) > count and len(self._parts[-count - 1][0]) < 2 * sum(
            len(part[0]) for part in self._parts[-count:]
        ):
            count += 1
        self._merge(count)

    def _merge(self, count: int) -> None:
        digests = np.concatenate([part[0] for part in self._parts[-count:]])
        places = np.concatenate([part[1] for part in self._parts[-count:]])
        del self._parts[-count:]
        order = np.argsort(digests, kind="stable")
        self._parts.append((digests[order], places[order]))

    # ---- the file ------------------------------

    def _load(self) -> None:
        """Begin with what the file knows, if it is whole."""
        with contextlib.suppress(Exception), opened(self._folder / FILE) as raw:  # a torn file may fail in any way
            with np.load(raw, allow_pickle=False) as file:  # which checks the sums of what it reads
                about = json.loads(file["about"].tobytes())
                digests, places = file["digests"], file["places"]
            if about["version"] == _VERSION:
                self._segments = {name: _Segment(**known) for name, known in about["segments"].items()}
                self._numbers, self.asks = about["numbers"], about["asks"]
                self._parts, self._in_file = [(digests, places)], True

    def _save(self) -> None:
        """Write the file, whole or not at all. What cannot be written is read again the next time."""
        self._merge(len(self._parts))
        ((digests, places),) = self._parts
        segments = {name: asdict(segment) for name, segment in self._segments.items()}
        about = {"version": _VERSION, "segments": segments, "numbers": self._numbers, "asks": self.asks}
        scratch = self._folder / f"{FILE}.{secrets.token_hex(3)}.tmp"
        try:
            with scratch.open("wb") as file:
                np.savez(
                    file, about=np.frombuffer(json.dumps(about).encode(), np.uint8), digests=digests, places=places
                )
                file.flush()
                fsync(file.fileno())
            scratch.replace(self._folder / FILE)
            self._in_file = True
        except OSError:
            with contextlib.suppress(OSError):
                scratch.unlink(missing_ok=True)
        self._unsaved = 0


def _hits(part: tuple[Numbers, Numbers], asked: Numbers, order: Places) -> tuple[Numbers, Places]:
    """The places in a part of those that are asked, which are in order, and their positions before they were."""
    digests, places = part
    first = np.searchsorted(digests, asked, "left")
    counts = np.searchsorted(digests, asked, "right") - first
    ends = np.cumsum(counts)
    within = np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - counts, counts)
    return places[np.repeat(first, counts) + within], np.repeat(order, counts)


def _words(data: bytes, size: int) -> npt.NDArray[np.bytes_]:
    """All texts of ``size`` bytes in data, by where they begin, without a copy."""
    return np.ndarray((len(data) - size + 1,), f"S{size}", data, strides=(1,))


def _is_key(text: bytes) -> bool:
    return len(text) == _HEX and not text.strip(b"0123456789abcdef")


def _meaning(line: dict[str, Any]) -> str:
    """What the settings of a line are hashed to now; what they were hashed to when they are not what they must be."""
    try:
        return ask_of({name: value for name, value in line.items() if name != "ask"})
    except (KeyError, AttributeError, ValueError):
        return str(line["ask"])
