"""Finished rows on disk: what was paid for once is not asked again.

A store is a folder of append-only segments, one per writing process, in JSON lines::

    {"swarmkit_store": 1, "written_by": "0.1.0"}                       first line: the schema's version
    {"ask": "9f...", "model": "...", "system": null, "max_tokens": 64, ...}   what the rows below have in common
    {"key": "3c...", "ask": "9f...", "sample": 0, "text": "...", "finish_reason": "stop", ...}

No locks and no database: the folder may lie on Lustre or NFS, and any number of processes may write at once,
each its own segment. A line is written whole when its row has finished; a torn last line is a row that was not. Keys
hash what the caller asked, not what went over the wire (a chat template may hold today's date): model, prompt,
system prompt, chat setting, parameters, cap, and which occurrence of a repeated prompt it is. Prompts themselves
are not stored, nor are errors: a failed row is asked again.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import socket
import time
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jiter
import numpy as np

from .errors import SettingError, StoreError, warn
from .markup import plural, table_html
from .records import Ask, Reply
from .results import Columns

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Store", "keys_of", "open_store"]

SCHEMA = 1
_ROW = b'{"key":"'
_FIELDS = ("key", "sample", "text", "finish_reason", "prompt_tokens", "completion_tokens", "endpoint", "written_at")


def open_store(path: str | os.PathLike[str] | Store) -> Store:
    """Open a store, or say that there is none.

    Parameters
    ----------
    path : str or path
        The folder; it need not exist yet, but its name must not be a file's.

    Returns
    -------
    Store
        ``.to_frame()`` looks inside, ``.compact()`` makes one segment of many.

    Raises
    ------
    StoreError
        It is a file, or written by a newer swarmkit.

    Examples
    --------
    >>> import tempfile
    >>> open_store(tempfile.mkdtemp()).to_frame().shape
    (0, 9)
    """
    return path if isinstance(path, Store) else Store(path)


class Store:
    """A folder of finished rows; made by ``open_store``.

    Attributes
    ----------
    path : pathlib.Path
        The folder.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path).expanduser()
        if self.path.exists() and not self.path.is_dir():
            raise StoreError(f"{self.path} is a file; a store is a folder of segments")
        self._file: int | None = None
        self._owner = 0
        self._asks: set[str] = set()
        self._old: list[Path] | None = None
        self._earlier: np.ndarray | None = None

    def for_frames(self) -> Store:
        """This store for the frames of one stream: a repeated prompt is told apart over all of them (eight bytes a
        prompt), and what the stream itself writes is not read again."""
        other = Store(self.path)
        other._old, other._earlier = self.segments(), np.empty(0, np.int64)
        return other

    # ---- reading ------------------------------

    def segments(self) -> list[Path]:
        """The segments, in the order they were begun."""
        return sorted(self.path.glob("*.jsonl")) if self.path.exists() else []

    def lines(self, keys: Container[str] | None = None) -> Iterator[dict[str, Any]]:
        """Every readable line of every segment, headers left out; rows with other keys too, if some are given.

        Raises
        ------
        StoreError
            A segment was written by a newer swarmkit, or is no segment.
        """
        for segment in self.segments() if self._old is None else self._old:
            yield from _read(segment, keys)

    def fill(self, columns: Columns, keys: Mapping[str, int], indexes: Mapping[str, int]) -> set[int]:
        """Write what is known into columns.

        Parameters
        ----------
        columns : Columns
            Filled at the rows found.
        keys : mapping of str to int
            Key to row position.
        indexes : mapping of str to int
            Endpoint's name to its index, for the answers of endpoints that are still there.

        Returns
        -------
        set of int
            Rows of which every sample is known.
        """
        found: dict[int, int] = {}
        for line in self.lines(keys):
            row = keys.get(line.get("key", ""))
            if row is None or line["sample"] >= columns.n or columns.text[row * columns.n + line["sample"]] is not None:
                continue
            reply = Reply(row, line["sample"], line["text"], line.get("finish_reason") or "",
                          line.get("prompt_tokens"), line.get("completion_tokens"), line.get("reasoning"))  # fmt: skip
            columns.answer([(row, reply)], indexes.get(line.get("endpoint", ""), -1), line.get("latency_s") or 0.0)
            found[row] = found.get(row, 0) + 1
        return {row for row, samples in found.items() if samples == columns.n}

    def to_frame(self) -> pd.DataFrame:
        """Every stored answer, a row each: ``key, sample, text, finish_reason, prompt_tokens, completion_tokens,
        endpoint, written_at, model``."""
        import pandas as pd

        asks = {line["ask"]: line for line in self.lines() if "key" not in line}
        rows = {(line["key"], line["sample"]): line for line in self.lines() if "key" in line}
        values = [[*(r.get(f) for f in _FIELDS), asks.get(r["ask"], {}).get("model")] for r in rows.values()]
        frame = pd.DataFrame(values, columns=[*_FIELDS, "model"])
        frame["written_at"] = pd.to_datetime(frame["written_at"], unit="s")
        return frame.astype({"sample": "Int64", "prompt_tokens": "Int64", "completion_tokens": "Int64"})

    def __len__(self) -> int:
        return len({(line["key"], line["sample"]) for line in self.lines() if "key" in line})

    def keys(self, ask: Ask, texts: Sequence[str | None], same: bool) -> list[str]:
        """The key of every row. ``same``: whether the same prompt has the same answer, in whichever frame it is."""
        if self._earlier is None or same:
            return keys_of(ask, texts)
        shown = [ask.chat(text) if callable(ask.chat) and text else text for text in texts]
        hashes = np.array([hash(text) for text in shown], np.int64)
        first, last = (np.searchsorted(self._earlier, hashes, side) for side in ("left", "right"))
        self._earlier = np.sort(np.concatenate((self._earlier, hashes)), kind="stable")
        counts = (last - first - 1).tolist()
        return keys_of(ask, texts, {t: count for t, count in zip(shown, counts, strict=True) if t and count >= 0})

    # ---- writing ------------------------------

    def write(self, ask: Ask, columns: Columns, rows: Iterable[int], keys: Sequence[str], names: Sequence[str]) -> None:
        """Append rows that have just finished, whole lines in one write.

        Raises
        ------
        StoreError
            The disk is full, or the folder cannot be written.
        """
        ask_id = ask_hash(ask)
        file = self._segment()
        lines = []
        if ask_id not in self._asks:
            self._asks.add(ask_id)
            lines.append({"ask": ask_id, **_asked(ask)})
        now = round(time.time(), 3)
        for row in rows:
            for sample in range(columns.n):
                slot = row * columns.n + sample
                line: dict[str, Any] = {"key": keys[row], "ask": ask_id, "sample": sample, "text": columns.text[slot]}
                line["finish_reason"] = columns.finish_reason[slot]
                for name, counts in (("prompt", columns.prompt_tokens), ("completion", columns.completion_tokens)):
                    line[f"{name}_tokens"] = counts[slot] if counts[slot] >= 0 else None
                if slot in columns.reasoning:
                    line["reasoning"] = columns.reasoning[slot]
                line |= {"endpoint": names[columns.endpoint[row]], "latency_s": round(columns.latency_s[row], 4)}
                lines.append({**line, "written_at": now})
        self._append(file, lines)

    def _segment(self) -> int:
        """This process's own segment, begun with its first row; a forked child begins another."""
        if self._file is None or self._owner != os.getpid():
            name = f"{time.time_ns():020d}-{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(3)}.jsonl"
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                self._file = os.open(self.path / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o644)
            except OSError as exc:
                raise StoreError(f"cannot write to the store {self.path}: {exc}") from exc
            self._owner = os.getpid()
            self._asks = set()
            self._append(self._file, [_header()])
        return self._file

    def _append(self, file: int, lines: Iterable[Mapping[str, Any]]) -> None:
        data = b"".join(map(_encode, lines))
        try:
            while data:  # a short write happens on full disks and over NFS
                data = data[os.write(file, data) :]
        except OSError as exc:
            raise StoreError(f"cannot write to the store {self.path}: {exc}. Finished rows are in last_run()") from exc

    def close(self) -> None:
        """End this process's segment; writing again begins another."""
        if self._file is not None and self._owner == os.getpid():
            os.fsync(self._file)
            os.close(self._file)
        self._file = None

    def compact(self) -> None:
        """Make one segment of all, each answer once. Not while a run writes to the store."""
        self.close()
        old = self.segments()
        if not old:
            return
        target = self.path / f"{time.time_ns():020d}-compacted-{secrets.token_hex(3)}.jsonl"
        scratch = target.with_suffix(".tmp")
        seen: set[tuple[str, Any]] = set()
        with scratch.open("wb") as out:
            out.write(_encode(_header()))
            for line in self.lines():
                name = (line.get("key") or line["ask"], line.get("sample"))
                if name not in seen:
                    seen.add(name)
                    out.write(_encode(line))
            out.flush()
            os.fsync(out.fileno())
        scratch.rename(target)
        for segment in old:
            segment.unlink()

    def __repr__(self) -> str:
        return f"<Store {str(self.path)!r}: {plural(len(self.segments()), 'segment')}>"

    def _repr_html_(self) -> str:
        size = sum(segment.stat().st_size for segment in self.segments())  # counting rows would read them all
        return table_html([("store", repr(self).strip("<>")), ("size", f"{size / 1e6:,.1f} MB")])

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "_file": None, "_owner": 0, "_asks": set(), "_old": None, "_earlier": None}


def _header() -> dict[str, Any]:
    from . import __version__

    return {"swarmkit_store": SCHEMA, "written_by": __version__}


def _encode(line: Mapping[str, Any]) -> bytes:
    try:
        return json.dumps(line, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"
    except UnicodeEncodeError:  # a lone surrogate: JSON can carry it as an escape, UTF-8 cannot
        return json.dumps(line, separators=(",", ":")).encode() + b"\n"


def _read(segment: Path, keys: Container[str] | None) -> Iterator[dict[str, Any]]:
    unreadable = 0
    with segment.open("rb") as file:
        for number, raw in enumerate(file):
            if not raw.endswith(b"\n"):
                break  # torn: the process ended while it wrote
            if (
                keys is not None
                and raw.startswith(_ROW)
                and raw[len(_ROW) : len(_ROW) + 32].decode("latin-1") not in keys
            ):
                continue  # parsing a line takes ten times as long
            try:
                line = jiter.from_json(raw)
            except ValueError:
                line = None
            if number == 0:
                _check_header(segment, line)
            elif isinstance(line, dict) and ("ask" in line):
                yield line
            else:
                unreadable += 1
    if unreadable:
        warn(f"{segment}: {unreadable} lines cannot be read; their rows are asked again")


def _check_header(segment: Path, line: Any) -> None:
    version = line.get("swarmkit_store") if isinstance(line, dict) else None
    if not isinstance(version, int):
        raise StoreError(f"{segment} is not a segment of a swarmkit store: its first line does not say so")
    if version > SCHEMA:
        raise StoreError(
            f"{segment} was written by a newer swarmkit ({line.get('written_by')}, schema {version}); this one reads "
            f"up to schema {SCHEMA}. Upgrade swarmkit, or give another store="
        )


def _asked(ask: Ask) -> dict[str, Any]:
    chat = "by hand" if callable(ask.chat) else ask.chat
    return {
        "model": ask.model,
        "system": ask.system,
        "chat": chat,
        "max_tokens": ask.max_tokens,
        "params": {**ask.params},
    }


def ask_hash(ask: Ask) -> str:
    """What the rows of a call have in common, as a short hash."""
    try:
        text = json.dumps(_asked(ask), sort_keys=True)
    except TypeError as exc:
        raise SettingError(f"with store=, parameters must be plain JSON values: {exc}") from exc
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


def keys_of(ask: Ask, texts: Sequence[str | None], earlier: Mapping[str, int] | None = None) -> list[str]:
    """The key of every row; "" where there is no prompt. The same prompt again gets another key; ``earlier`` has
    the last occurrence number of prompts that came in earlier frames."""
    common = ask_hash(ask).encode()
    seen = dict(earlier or {})
    keys = []
    for text in texts:
        if text is None:
            keys.append("")
            continue
        # A wrapping function cannot be hashed, what it makes can.
        shown = ask.chat(text) if callable(ask.chat) else text
        times = seen[shown] = seen.get(shown, -1) + 1
        data = b"%s %d %s" % (common, times, shown.encode("utf-8", "surrogatepass"))
        keys.append(hashlib.blake2b(data, digest_size=16).hexdigest())
    return keys
