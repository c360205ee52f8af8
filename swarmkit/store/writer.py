"""The writing of a segment, by a thread of its own: a disk that stalls holds up no request."""

from __future__ import annotations

import concurrent.futures
import errno
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, Self, get_args

from ..client import io_thread
from ..engine.columns import Columns
from ..errors import SettingError, StoreError
from ..records import RequestSpec
from .keys import SIZE, Keys, ask_of, settings_of
from .segments import encode, encode_prompts, encoded, fsync, header, sync_folder, to_json

__all__ = ["Durability", "Writer", "check_durability"]

Durability = Literal["second", "row", "close"]
"""When rows are brought to the disk itself, so that they outlive a power cut: within a second, at once, at the end."""

_LOOK_S = 0.5
"""Seconds between two looks whether the segment is still there."""
_SYNC_S: dict[Durability, float] = {"second": 1.0, "row": 0.0, "close": float("inf")}
_PACK_S, _PACK_CHARS = 1.0, 1 << 18
"""Seconds, and characters, until prompts are packed and written."""
_LONGEST_PROMPT = 1 << 24  # characters; a longer one is not stored, since its line could not be read
_GONE = {errno.ENOENT, errno.ENOTDIR, errno.ESTALE}
_EXTRAS = ("reasoning", "logprob", "token_logprobs")  # of a line that has them


def check_durability(durability: Durability) -> Durability:
    """Validate ``durability=``."""
    if durability not in get_args(Durability):
        raise SettingError(f"durability={durability!r}: must be 'second', 'row' or 'close'")
    return durability


class Writer:
    """One segment, written by this process for all runs that share it: made by ``Writer.of``.

    Parameters
    ----------
    folder : pathlib.Path
        Made if it is not there.
    durability : {"second", "row", "close"}
        When rows are brought to the disk.

    Raises
    ------
    StoreError
        The disk is full, or the folder cannot be written. So does whatever is called later.
    """

    @classmethod
    def of(cls, folder: Path, durability: Durability) -> Self:
        """The segment of this process in a folder: that which other runs are writing, or a new one. ``release`` it."""
        key = os.path.realpath(folder), durability
        with _shared.lock:
            writer = _shared.writers.get(key)
            if writer is None or writer._failed:
                writer = _shared.writers[key] = cls(folder, durability)
            writer._users += 1
            return writer

    def __init__(self, folder: Path, durability: Durability) -> None:
        self._users = 0
        self._folder = folder
        self._durability = durability
        name = f"{time.time_ns():020d}-{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(3)}.jsonl"
        self._path = folder / name
        self._failed = ""
        self._asks: set[str] = set()
        self._turn = threading.Condition()
        self._waiting: list[bytes] = []
        self._prompts: dict[str, str] = {}  # of rows that are written or waiting
        self._chars = 0
        self._barriers: list[concurrent.futures.Future[None]] = []
        self._closing = self._used = False
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o644)
            try:
                self._put(encode(header()))
            except OSError:  # no line follows on half a header
                os.close(self._file)
                self._path.unlink(missing_ok=True)
                raise
        except OSError as exc:
            raise StoreError(self._unwritable(exc)) from exc
        sync_folder(folder)
        threading.Thread(target=self._work, name="swarmkit-store", daemon=True).start()

    def write(
        self,
        spec: RequestSpec,
        columns: Columns,
        rows: Sequence[int],
        keys: Keys,
        names: Sequence[str],
        texts: Sequence[str | None] | None = None,
    ) -> None:
        """Append finished rows, with their prompts if there are ``texts``. They are on their way to the file when this
        returns; the prompts follow within a second, many together."""
        ask = ask_of(settings := settings_of(spec))
        lines = []
        if ask not in self._asks:
            self._asks.add(ask)
            lines.append(encode({"ask": ask, **settings}))
        extras = [(name, known) for name in _EXTRAS if (known := getattr(columns, name))]
        end = f',"written_at":{round(time.time(), 3)}}}\n'
        written: dict[str | None, str] = {}  # the few finish reasons and endpoints, as JSON
        counted = columns.prompt_tokens, columns.completion_tokens
        for row in rows:
            key, endpoint = keys[row], names[columns.endpoint[row]]
            for sample in range(columns.n):
                slot = row * columns.n + sample
                reason, text = columns.finish_reason[slot], columns.text[slot]
                for value in (reason, endpoint):
                    if value not in written:
                        written[value] = to_json(value)
                prompt, completion = ("null" if (count := counts[slot]) < 0 else count for counts in counted)
                more = "".join(f',"{name}":{to_json(known[slot])}' for name, known in extras if slot in known)
                # As ``encode`` would write it, in a third of the time.
                lines.append(
                    encoded(
                        f'{{"key":"{key}","ask":"{ask}","sample":{sample},"text":{to_json(text)},'
                        f'"finish_reason":{written[reason]},"prompt_tokens":{prompt},"completion_tokens":{completion}{more},'
                        f'"endpoint":{written[endpoint]},"latency_s":{round(columns.latency_s[row], 4)}{end}'
                    )
                )
        self._append(lines, {keys[row]: text for row in rows if (text := texts[row])} if texts else {})

    def retract(self, spec: RequestSpec, rows: Iterable[int], keys: Keys) -> None:
        """Take answers back that were written: an answer counts until a later line of its row."""
        line = {"ask": ask_of(settings_of(spec)), "text": "", "retracted": True, "written_at": round(time.time(), 3)}
        self._append([encode({"key": keys[row], "sample": k, **line}) for row in rows for k in range(spec.n)])

    def check(self) -> None:
        """Raise what has kept rows from being written, as a segment that is not in its folder any more."""
        if self._failed:
            raise StoreError(self._failed)

    def release(self) -> concurrent.futures.Future[None]:
        """Stop sharing this segment. With the last run it ends: all of it is on the disk, or it has no row and is gone.

        Returns
        -------
        Future
            Done when what was given to this writer is in the file; with the ``StoreError`` that kept it from there.
        """
        with _shared.lock:
            self._users -= 1
            if last := not self._users:
                for key in [key for key, writer in _shared.writers.items() if writer is self]:
                    del _shared.writers[key]
        return self._barrier(last)

    def _barrier(self, last: bool = False) -> concurrent.futures.Future[None]:
        barrier: concurrent.futures.Future[None] = concurrent.futures.Future()
        barrier.set_running_or_notify_cancel()
        with self._turn:
            self._barriers.append(barrier)
            self._closing = last
            self._turn.notify()
        return barrier

    def _append(self, lines: Sequence[bytes], prompts: Mapping[str, str] = MappingProxyType({})) -> None:
        self.check()
        with self._turn:
            self._used = True
            self._waiting += lines
            self._prompts |= prompts
            self._chars += sum(len(text) + 2 * SIZE for text in prompts.values())
            self._turn.notify()

    # ---- the thread ------------------------------

    def _work(self) -> None:
        looked = synced = packed = time.monotonic()
        dirty = closing = False
        while not closing:
            with self._turn:
                self._turn.wait_for(lambda: self._waiting or self._barriers, _LOOK_S)
                lines, self._waiting = self._waiting, []
                barriers, self._barriers = self._barriers, []
                closing = self._closing
                now = time.monotonic()
                prompts: dict[str, str] = {}
                if barriers or now >= packed + _PACK_S or self._chars >= _PACK_CHARS:
                    prompts, self._prompts, self._chars, packed = self._prompts, {}, 0, now
            data = b"".join([*lines, *map(encode_prompts, _blocks(prompts))])
            try:
                if not self._failed:
                    self._put(data)
                    dirty = dirty or bool(data)
                    if dirty and (closing or now >= synced + _SYNC_S[self._durability]):
                        fsync(self._file)
                        dirty, synced = False, now
                    if now >= looked + _LOOK_S:
                        self._look()
                        looked = now
                if closing:
                    os.close(self._file)
                    if not self._used:
                        self._path.unlink(missing_ok=True)
            except OSError as exc:
                self._failed = self._failed or self._unwritable(exc)
            for barrier in barriers:
                if self._failed:
                    barrier.set_exception(StoreError(self._failed))
                else:
                    barrier.set_result(None)

    def _put(self, data: bytes) -> None:
        while data:  # full disks and NFS write less than asked
            data = data[os.write(self._file, data) :]

    def _look(self) -> None:
        """Whether the segment is still in the folder: no more is asked of the servers for a store that is gone."""
        try:
            there, mine = os.stat(self._path), os.fstat(self._file)
        except OSError as exc:
            if exc.errno not in _GONE:
                return  # the next write says what is wrong
        else:
            if (there.st_dev, there.st_ino) == (mine.st_dev, mine.st_ino):
                return
        self._failed = (
            f"the store {self._folder} was deleted, moved or replaced while a run was writing {self._path.name} to it; "
            "nothing more can be kept there. The rows so far are in .frame of this error, and in last_run().partial()"
        )

    def _unwritable(self, exc: OSError) -> str:
        return f"cannot write to the store {self._folder}: {exc}. Rows that have finished are in last_run()"


def _blocks(prompts: Mapping[str, str]) -> Iterator[dict[str, str]]:
    """Prompts that are packed together."""
    block: dict[str, str] = {}
    chars = 0
    for key, text in prompts.items():
        if len(text) <= _LONGEST_PROMPT:
            block[key] = text
            chars += len(text)
        if chars >= _PACK_CHARS:
            yield block
            block, chars = {}, 0
    if block:
        yield block


class _Shared:
    """The segments that this process is writing."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Start afresh in a forked child, which has the files, but not the threads that write them."""
        self.lock = threading.Lock()
        self.writers: dict[tuple[str, Durability], Any] = {}


_shared = _Shared()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_shared.forget)


@io_thread.at_exit
def _flush() -> None:
    """Write what runs have left that did not end in time."""
    concurrent.futures.wait([writer._barrier() for writer in _shared.writers.values()], io_thread.GRACE_S)
