"""The format of a store on disk: segments of JSON lines.

A store is a folder of append-only segments, one per writing process::

    {"swarmkit_store": 1, "written_by": "0.1.0"}                       first line: the schema's version
    {"ask": "9f...", "model": "...", "system": null, "max_tokens": 64, ...}   the settings of the rows below
    {"key": "3c...", "ask": "9f...", "sample": 0, "text": "...", "finish_reason": "stop", ...}
    {"ask": "prompts", "prompts": "eJy..."}                            prompts of rows above, by key: JSON, zlib, base64

There are no locks and no database: the folder may be on Lustre or NFS, and any number of processes may write at
once, each its own segment. A line is written whole when its row has finished; an incomplete last line is ignored, and
what is damaged is skipped with a warning. Errors are not stored: a failed row is asked again. Of several lines with
one key the last one holds.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import json
import os
import stat
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, TypeGuard

from ..client.json_bytes import read_json
from ..errors import StoreError
from ..text import plural

__all__ = [
    "LONGEST_LINE",
    "ROW",
    "cannot_be_read",
    "encode",
    "encode_prompts",
    "encoded",
    "fsync",
    "header",
    "is_header",
    "is_sound",
    "lines_unreadable",
    "no_header",
    "opened",
    "parsed",
    "prompts_in",
    "read",
    "segments_in",
    "sync_folder",
    "to_json",
]

ROW = b'{"key":"'
"""How the line of an answer begins; its key follows."""
LONGEST_LINE = 64 << 20
"""In bytes."""

_SCHEMA = 1
_PROMPTS = "prompts"
_LEVEL = 3  # 1 to 9: half of a text of words, some 30 MB a second; 6 takes twice the time for a tenth less
_BUFFER = 1 << 16  # not what the file system prefers: of Lustre that is 4 MiB, for one line
_TEXT_OR_NONE = (str, type(None))
_MOST_TOKENS = 1 << 31
_LATEST_S = 9e9  # a time after it does not fit into a datetime64[ns]
_NO_FSYNC = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP}  # of file systems without it


to_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


def segments_in(folder: Path) -> list[Path]:
    """The segments of a folder, and what else has such a name, in order of creation.

    Raises
    ------
    StoreError
        The folder cannot be read.
    """
    try:
        return sorted(folder / name for name in os.listdir(folder) if name.endswith(".jsonl"))
    except FileNotFoundError:
        return []
    except OSError as exc:
        raise StoreError(f"cannot read the store {folder}: {exc}") from exc


def read(segment: Path, damage: dict[str, str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """The lines of a segment but its header, each with its offset; what cannot be read is skipped, and said in
    ``damage`` under the segment's name.

    Raises
    ------
    StoreError
        The segment was written by a newer swarmkit.
    """
    unreadable = at = 0
    try:
        with opened(segment) as file:
            while raw := file.readline(LONGEST_LINE):
                start, at = at, at + len(raw)
                line = None
                if raw.endswith(b"\n"):
                    line = parsed(raw)
                elif len(raw) < LONGEST_LINE:
                    break  # incomplete: the process ended during the write
                else:
                    while (raw := file.readline(LONGEST_LINE)) and not raw.endswith(b"\n"):
                        at += len(raw)
                    at += len(raw)
                if start == 0:
                    if not is_header(segment, line):
                        damage[segment.name] = no_header(segment)
                        return
                elif is_sound(line):
                    yield start, line
                else:
                    unreadable += 1
    except StoreError:
        raise
    except OSError as exc:
        damage[segment.name] = cannot_be_read(segment, exc)
    if unreadable:
        damage[segment.name] = lines_unreadable(segment, unreadable)


def no_header(segment: Path) -> str:
    """What is wrong with a file whose first line is not a header."""
    return f"{segment.name} is not a segment of a store: its first line is not a header"


def cannot_be_read(segment: Path, why: OSError) -> str:
    """What is wrong with a file that cannot be read."""
    return f"{segment.name} cannot be read ({why.strerror or why})"


def lines_unreadable(segment: Path, count: int) -> str:
    """What is wrong with a file of which some lines cannot be read."""
    return f"{plural(count, 'line')} of {segment.name} cannot be read"


def header() -> dict[str, Any]:
    """The first line of a segment."""
    from ..version import __version__

    return {"swarmkit_store": _SCHEMA, "written_by": __version__}


def encode_prompts(prompts: Mapping[str, str]) -> bytes:
    """The line of the prompts of rows, by key: packed together, since what they share is most of them."""
    packed = zlib.compress(encode(prompts), _LEVEL)
    return encode({"ask": "prompts", _PROMPTS: base64.b64encode(packed).decode()})  # an "ask" for earlier readers


def prompts_in(line: Mapping[str, Any]) -> dict[str, str] | None:
    """The prompts of a line that has some, and none where they cannot be read; None of other lines."""
    if _PROMPTS not in line:
        return None
    try:
        found = parsed(zlib.decompress(base64.b64decode(line[_PROMPTS])))
    except (ValueError, TypeError, zlib.error):
        found = None
    return found if isinstance(found, dict) and all(type(text) is str for text in found.values()) else {}


def encode(line: Mapping[str, Any]) -> bytes:
    """A line as it is written."""
    return encoded(to_json(line) + "\n")


def encoded(line: str) -> bytes:
    """A line of JSON as it is written."""
    try:
        return line.encode()
    except UnicodeEncodeError:  # a lone surrogate: it needs a JSON escape, since UTF-8 cannot encode it
        return json.dumps(json.loads(line), separators=(",", ":")).encode() + b"\n"


def fsync(file: int) -> None:
    """Bring what was written to the disk, where the file system can do that."""
    try:
        os.fsync(file)
    except OSError as exc:
        if exc.errno not in _NO_FSYNC:
            raise


def sync_folder(path: Path) -> None:
    """Bring the names of new files to the disk, where the system can do that."""
    with contextlib.suppress(OSError):
        folder = os.open(path, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def opened(segment: Path) -> IO[bytes]:
    """Open a regular file. Others, such as a named pipe without a writer, could block for ever."""
    file = os.open(segment, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise OSError(errno.EINVAL, "it is not a regular file")
    return open(file, "rb", buffering=_BUFFER)


def parsed(raw: bytes) -> Any:
    """The value of a line; None where it is not JSON."""
    try:
        return read_json(raw)
    except ValueError:
        return None


def is_header(segment: Path, line: Any) -> bool:
    """Whether a segment's first line says that it is one. Raises as ``read``."""
    version = line.get("swarmkit_store") if isinstance(line, dict) else None
    if type(version) is not int:
        return False
    if version > _SCHEMA:
        raise StoreError(
            f"{segment} was written by a newer swarmkit ({line.get('written_by')}, schema {version}); this one reads "
            f"up to schema {_SCHEMA}. Upgrade swarmkit, or give another store="
        )
    return True


def is_sound(line: Any) -> TypeGuard[dict[str, Any]]:
    """Whether the fields of a line are of the types that they are written with."""
    if not isinstance(line, dict):
        return False
    field = line.get
    if type(field("ask")) is not str:
        return False
    if "key" not in line:
        return type(field("model")) in _TEXT_OR_NONE
    sample = field("sample")
    if type(line["key"]) is not str or type(field("text")) is not str or type(sample) is not int or sample < 0:
        return False
    for text in (field("finish_reason"), field("endpoint"), field("reasoning")):
        if type(text) not in _TEXT_OR_NONE:
            return False
    if not (_is_number(field("logprob", 0.0)) and _are_tokens(field("token_logprobs"))):
        return False
    for count in (field("prompt_tokens"), field("completion_tokens")):
        if count is not None and (type(count) is not int or not 0 <= count < _MOST_TOKENS):
            return False
    for time_s in (field("latency_s"), field("written_at")):
        if time_s is not None and (type(time_s) not in (int, float) or not 0 <= time_s < _LATEST_S):
            return False
    return True


def _are_tokens(value: Any) -> bool:
    if value is None:
        return True
    return type(value) is list and all(type(token) is dict and _is_number(token.get("logprob")) for token in value)


def _is_number(value: Any) -> bool:
    return type(value) in (float, int)
