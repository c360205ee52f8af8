"""A folder of finished rows, so that no row is paid for twice."""

from __future__ import annotations

import contextlib
import os
import secrets
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..engine.columns import Columns
from ..errors import StoreError, warn
from ..records import Reply, RequestSpec
from ..text import few, plural, table_html
from .index import Index, Places
from .keys import SIZE, Keys, ask_of, keys_of, settings_of
from .segments import (
    LONGEST_LINE,
    ROW,
    cannot_be_read,
    encode,
    fsync,
    header,
    is_sound,
    lines_unreadable,
    opened,
    parsed,
    prompts_in,
    read,
    segments_in,
    sync_folder,
)
from .writer import Durability, Writer, check_durability

__all__ = ["Folder"]

_AT_ONCE = 1 << 16  # lines


class Folder:
    """A folder of finished rows.

    Parameters
    ----------
    path : str or path
        It need not exist.
    durability : {"second", "row", "close"}
        When rows are flushed to the disk.
    store_prompts : bool
        Whether prompts are written with their rows.

    Raises
    ------
    StoreError
        The path is a file.
    """

    def __init__(
        self, path: str | os.PathLike[str], durability: Durability = "second", store_prompts: bool = True
    ) -> None:
        self.path = Path(path).expanduser()
        if os.path.lexists(self.path) and not os.path.isdir(self.path):
            raise StoreError(f"{self.path} is a file; a store is a folder of segments")
        self.durability = check_durability(durability)
        self.store_prompts = store_prompts
        self._index: Index | None = None
        self._earlier: np.ndarray | None = None
        self._held: Writer | None = None
        self._lock = threading.Lock()  # the models of one call are runs at once

    def for_frames(self) -> Folder:
        """This folder, for the frames of one stream, to be closed after it.

        Occurrences of a repeated prompt are counted over all frames (eight bytes per prompt), what is stored is looked
        up once, and all frames are written to one segment.
        """
        other = Folder(self.path, self.durability, self.store_prompts)
        other._earlier = np.empty(0, np.int64)
        return other

    # ---- reading ------------------------------

    def segments(self) -> list[Path]:
        """The segments, in order of creation."""
        return [path for path in segments_in(self.path) if path.is_file()]

    @property
    def index(self) -> Index:
        """The index, as it was when keys were last asked for: every look at all segments is an open file each."""
        return self._index or self._fresh()

    def _fresh(self) -> Index:
        """The index, which knows all that is in the segments now; in a stream, what was in them when it began."""
        if self._index is None:
            self._index = Index(self.path)
            self._index.refresh()
        elif self._earlier is None:
            self._index.refresh()
        return self._index

    def _warn(self, damage: Sequence[str]) -> None:
        if damage:
            warn(f"the store {self.path}: {few(damage, len(damage))}; rows that were in it are asked again")

    def keys(self, spec: RequestSpec, texts: Sequence[str | None], same: bool) -> list[Keys]:
        """The keys of every row: those that rows are written with, then those that earlier versions wrote here.

        Parameters
        ----------
        spec : RequestSpec
            The settings of the call.
        texts : sequence of str or None
            The prompts.
        same : bool
            Whether equal prompts have equal answers, so that keys repeat over frames.

        Raises
        ------
        StoreError
            The store was written by a newer swarmkit, or cannot be read.
        """
        shown = [spec.chat(text) if text is not None else None for text in texts] if callable(spec.chat) else texts
        ask = ask_of(settings_of(spec))
        with self._lock:
            others = [other for other, meaning in self._fresh().meanings() if meaning == ask != other]
            earlier = None if same or self._earlier is None else self._counted(spec.model, shown)
        return [keys_of(a, shown, earlier) for a in (ask, *others)]

    def _counted(self, model: str, texts: Sequence[str | None]) -> dict[str, int]:
        """Count prompts of a stream's frame; the number of the last occurrence of each in earlier frames, from 0."""
        assert self._earlier is not None
        hashes = np.array([hash((model, text)) for text in texts], np.int64)
        first, last = (np.searchsorted(self._earlier, hashes, side) for side in ("left", "right"))
        self._earlier = np.sort(np.concatenate((self._earlier, hashes)), kind="stable")
        counts = (last - first - 1).tolist()
        return {text: count for text, count in zip(texts, counts, strict=True) if text is not None and count >= 0}

    def find(self, keys: Keys, rows: Places | None = None) -> list[tuple[Path, Places, Places]]:
        """The lines that may have the keys of these rows (by default, of all): for each segment its path, the offsets
        of lines in order, and the row of each."""
        digests = keys.digests()
        if rows is None:
            return self.index.find(digests)
        found = self.index.find(digests[rows])
        return [(path, offsets, rows[positions]) for path, offsets, positions in found]

    def fill(
        self, columns: Columns, keys: Sequence[Keys], rows: Sequence[int], indexes: Mapping[str, int]
    ) -> npt.NDArray[np.bool_]:
        """Fill columns with stored answers.

        Parameters
        ----------
        columns : Columns
            Filled at the rows found.
        keys : sequence of Keys
            Those of all rows, in the order in which they are looked up.
        rows : sequence of int
            Positions of those that are wanted.
        indexes : mapping of str to int
            Endpoint's name to its index, for answers of the pool's endpoints.

        Returns
        -------
        ndarray of bool
            By row: whether all its samples are stored.
        """
        wanted, damage, index = np.asarray(rows, np.int64), list[str](), self.index
        complete = np.zeros(columns.size, bool)
        for each in keys:
            for _ in range(2):
                found, unreadable = np.zeros((columns.size, columns.n), bool), list[str]()
                stale = self._fill(columns, each, wanted, indexes, found, unreadable)
                if not stale:
                    break
                index.forget(stale)
                index.refresh()
            damage += unreadable
            complete |= found.all(axis=1)
            wanted = wanted[~complete[wanted]]
        self._warn([*index.damage().values(), *damage])
        return complete

    def _fill(
        self,
        columns: Columns,
        keys: Keys,
        rows: Places,
        indexes: Mapping[str, int],
        found: npt.NDArray[np.bool_],
        damage: list[str],
    ) -> set[str]:
        """Fill columns with what is stored under these keys; return the names of segments that are not what the index
        takes them for."""
        stale: set[str] = set()
        for path, offsets, found_rows in self.find(keys, rows):
            unreadable = at = 0
            try:
                with opened(path) as file:
                    for start in range(0, len(offsets), _AT_ONCE):
                        part = slice(start, start + _AT_ONCE)
                        for offset, row in zip(offsets[part].tolist(), found_rows[part].tolist(), strict=True):
                            if offset != at:
                                file.seek(offset)
                            raw, key = file.readline(LONGEST_LINE), keys[row]
                            line, at = parsed(raw), offset + len(raw)
                            if not is_sound(line):
                                if raw.startswith(ROW + key[:SIZE].encode()):
                                    unreadable += 1
                                else:
                                    stale.add(path.name)
                            elif line.get("key") == key:  # of a row that was asked again the later answer is taken
                                self._take(columns, row, line, indexes, found)
                            elif not line.get("key", "").startswith(key[:SIZE]):
                                stale.add(path.name)
            except OSError as exc:
                damage.append(cannot_be_read(path, exc))
            if unreadable:
                damage.append(lines_unreadable(path, unreadable))
        return stale

    @staticmethod
    def _take(
        columns: Columns, row: int, line: dict[str, Any], indexes: Mapping[str, int], found: npt.NDArray[np.bool_]
    ) -> None:
        sample = line["sample"]
        if sample >= columns.n:
            return
        found[row, sample] = not line.get("retracted")
        if line.get("retracted"):
            return
        known = line.get
        reply = Reply(
            row, sample, line["text"], known("finish_reason") or "", known("prompt_tokens"),
            known("completion_tokens"), known("reasoning"), None, known("token_logprobs"),
        )  # fmt: skip
        columns.answer([(row, reply)], indexes.get(line.get("endpoint", ""), -1), line.get("latency_s") or 0.0)
        if "logprob" in line:
            columns.logprob[row * columns.n + sample] = line["logprob"]

    def _of_all(self) -> Index:
        """An index for who reads everything anyway: not taken from a file, and not left in one."""
        index = Index(self.path, load=False, save_after=sys.maxsize)
        index.refresh()
        return index

    def _lines(self, index: Index, damage: dict[str, str]) -> Iterator[dict[str, Any]]:
        """The lines that hold, in order: the settings of answers once each, prompts, the last line of an answer. What
        cannot be read is said in ``damage``."""
        last: dict[tuple[str, int], tuple[Path, int]] = {}
        for path, offsets in index.repeated():
            with contextlib.suppress(OSError), opened(path) as file:  # ``read`` will say it
                for offset in offsets.tolist():
                    file.seek(offset)
                    if is_sound(line := parsed(file.readline(LONGEST_LINE))):
                        last[line["key"], line["sample"]] = path, offset
        asks = set[str]()
        for path in segments_in(self.path):
            for offset, line in read(path, damage):
                if "prompts" in line:
                    new = True
                elif "key" not in line:
                    new = line["ask"] not in asks
                    asks.add(line["ask"])
                else:
                    here = path, offset
                    new = last.get((line["key"], line["sample"]), here) == here
                if new:
                    yield line

    def answers(self, prompts: bool = False) -> Iterator[dict[str, Any]]:
        """All answers: the fields of their lines, and ``model``; with ``prompts``, ``prompt``, where it is stored. They
        come about in the order in which they were written, and few are held back. One warning sums up what could not
        be read."""
        damage: dict[str, str] = {}
        index = self._of_all()
        waiting: dict[tuple[str, int], dict[str, Any]] = {}  # prompts stand below the rows that have them
        for line in self._lines(index, damage):
            if prompts and (found := prompts_in(line)) is not None:
                for name, answer in waiting.items():
                    answer["prompt"] = found.get(name[0], answer.get("prompt"))
                ready = [name for name, answer in waiting.items() if answer["prompt"] is not None]
            elif "key" in line and not line.get("retracted"):
                line["model"] = index.asks.get(line["ask"], {}).get("model")
                waiting[line["key"], line["sample"]] = line
                ready = list(waiting) if not prompts or len(waiting) > _AT_ONCE else []
            else:
                continue
            yield from map(waiting.pop, ready)
        yield from waiting.values()
        self._warn(list(damage.values()))

    # ---- writing ------------------------------

    def writer(self) -> Writer:
        """This process's segment, for one run; ``release`` it.

        Raises
        ------
        StoreError
            The disk is full, or the folder cannot be written.
        """
        if self._earlier is not None and self._held is None:  # all frames of a stream share one
            self._held = Writer.of(self.path, self.durability)
        return Writer.of(self.path, self.durability)

    def close(self) -> None:
        """End the segment of a stream.

        Raises
        ------
        StoreError
            What was written may not be on the disk.
        """
        held, self._held = self._held, None
        if held is not None:
            held.release().result()

    def compact(self) -> None:
        """Merge all segments into one, with each answer once. Must not be called while a run writes to the store.

        Segments with damage stay as they are, beside the new one.

        Raises
        ------
        StoreError
            The merged segment cannot be written; the store is as it was.
        """
        old = segments_in(self.path)
        if not old:
            return
        target = self.path / f"{time.time_ns():020d}-compacted-{secrets.token_hex(3)}.jsonl"
        scratch = target.with_suffix(".tmp")
        damage: dict[str, str] = {}
        lines = self._lines(self._of_all(), damage)
        try:
            with scratch.open("wb") as out:
                out.write(encode(header()))
                out.writelines(map(encode, lines))
                out.flush()
                fsync(out.fileno())
            scratch.rename(target)
            sync_folder(self.path)
        except OSError as exc:
            with contextlib.suppress(OSError):
                scratch.unlink(missing_ok=True)
            if isinstance(exc, StoreError):
                raise
            raise StoreError(f"cannot write to the store {self.path}: {exc}. It is as it was") from exc
        for segment in old:
            if segment.name not in damage:
                segment.unlink(missing_ok=True)
        self._warn(list(damage.values()))

    def __len__(self) -> int:
        return sum(1 for _ in self.answers())

    def __repr__(self) -> str:
        with contextlib.suppress(StoreError):
            names = sorted({str(ask.get("model", "")) for ask in self._fresh().asks.values()} - {""})
            of = f" of {few(names, len(names), 3)}" if names else ""
            return f"<Store {str(self.path)!r}: {plural(self.index.size, 'row')}{of}>"
        return f"<Store {str(self.path)!r}: cannot be read>"

    def _repr_html_(self) -> str:
        segments = self.segments()
        size = sum(segment.stat().st_size for segment in segments)
        shown = f"{size / 1e6:,.1f} MB" if size >= 1e5 else f"{size / 1e3:,.1f} kB"
        return table_html([("store", repr(self).strip("<>")), ("files", f"{plural(len(segments), 'file')}, {shown}")])

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.path, self.durability, self.store_prompts)
