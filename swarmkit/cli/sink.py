"""A file whose bytes are not lost: what cannot be written to it goes to a file in the folder for temporary files."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import select
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

__all__ = ["Sink"]

_NO_FSYNC = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EROFS}  # pipes, terminals, some file systems


class Sink(io.RawIOBase):
    """Takes bytes for a file, or for the standard output.

    If they cannot be written there (a full disk, a quota, a closed pipe), a file in the folder for temporary files is
    made, with mode 0600. It gets all bytes from the first on if there is room, and then replaces the file, which is
    removed; else only those that follow, so that both files together have all.

    Parameters
    ----------
    path : Path or None
        The file, which is made; None is the standard output.
    suffix : str
        Suffix of the temporary file.
    like : Path, optional
        A file whose mode and owner the new one gets, if it exists.
    rescue : Exception, optional
        Write to a temporary file from the start, for this reason.

    Attributes
    ----------
    problem : Exception or None
        Why a temporary file was made.
    path : Path or None
        The temporary file.
    whole : bool
        Whether it has all bytes.

    Raises
    ------
    OSError
        The file cannot be made. ``write`` raises it if the temporary file cannot be written either.
    """

    def __init__(
        self, path: Path | None, suffix: str, like: Path | None = None, rescue: Exception | None = None
    ) -> None:
        super().__init__()
        self.problem: Exception | None = None
        self.path: Path | None = None
        self.whole = True
        self._source, self._suffix, self._size, self._copied = path, suffix, 0, 0
        self._file = -1
        if rescue is not None:
            self._use_temporary(rescue)
        elif path is None:
            sys.stdout.flush()
            self._file = os.dup(sys.stdout.fileno())
        else:
            self._file = _made(path, like)

    def writable(self) -> bool:
        """Yes."""
        return True

    def tell(self) -> int:
        """Number of bytes so far."""
        return self._size

    def write(self, data: Any) -> int:
        """Write all bytes."""
        left = memoryview(data).cast("B")
        size = len(left)
        while left:
            try:
                done = os.write(self._file, left)
            except BlockingIOError:  # a pipe that another process has set so
                select.select([], [self._file], [])
                continue
            except OSError as exc:
                if self._without_copy():
                    continue
                if self.problem is not None:
                    lost = f"neither the output nor {self.path} can be written, and the rows from here on are lost"
                    raise OSError(exc.errno, f"{exc.strerror}: {lost}") from exc
                self._use_temporary(exc)
                continue
            self._size += done
            left = left[done:]
        return size

    def finish(self) -> None:
        """Bring all bytes to the disk, and close the file."""
        if self._file < 0:
            return
        try:
            self._end()
        except OSError as exc:
            if self.problem is not None:
                raise
            self._use_temporary(exc)
            self._end()
        if self.problem is not None and self.whole and self._source is not None:
            self._source.unlink(missing_ok=True)
        self.close()

    def _end(self) -> None:
        """Errors of writes that were accepted come here, from network file systems above all."""
        try:
            os.fsync(self._file)
        except OSError as exc:
            if exc.errno not in _NO_FSYNC:
                raise
        file, self._file = self._file, -1
        os.close(file)

    def _use_temporary(self, exc: Exception) -> None:
        self.problem = exc
        file, name = tempfile.mkstemp(prefix="swarmkit-", suffix=self._suffix)
        self.path = Path(name)
        try:
            if self._size:
                if self._source is None:
                    raise OSError("the standard output cannot be read")
                with self._source.open("rb") as source, open(file, "wb", closefd=False) as target:
                    shutil.copyfileobj(source, target)
                if self._source.stat().st_size != self._size:
                    raise OSError("it is not as it was written")
                self._copied = self._size
        except OSError:
            os.ftruncate(file, 0)
            os.lseek(file, 0, os.SEEK_SET)
            self.whole = False
        if self._file >= 0:
            with contextlib.suppress(OSError):
                os.close(self._file)
        self._file = file

    def _without_copy(self) -> bool:
        """Make room in the temporary file: take out the copy of what the file has. False if there is none."""
        if not self._copied:
            return False
        start, place = self._copied, 0
        self._copied, self.whole = 0, False
        while data := os.pread(self._file, 1 << 20, start + place):
            place += os.pwrite(self._file, data, place)
        os.ftruncate(self._file, place)
        os.lseek(self._file, place, os.SEEK_SET)
        return True


def _made(path: Path, like: Path | None) -> int:
    """Make a new file for writing; the one of a killed process is replaced."""
    path.unlink(missing_ok=True)
    try:
        old = like.stat() if like else None
    except OSError:
        old = None
    mode = 0o666 if old is None else old.st_mode & 0o600  # not open to others before it has the owner of the old one
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, mode)
    if old is not None:
        with contextlib.suppress(OSError):
            os.fchown(file, old.st_uid, old.st_gid)
        with contextlib.suppress(OSError):
            os.fchmod(file, old.st_mode & 0o7777)
    return file
