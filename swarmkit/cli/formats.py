"""The formats of table files, which their suffixes tell."""

from __future__ import annotations

import bz2
import gzip
import importlib
import importlib.util
import io
import lzma
import re
import sys
from pathlib import Path
from typing import IO, Any

from ..errors import SettingError

__all__ = ["KNOWN", "PACKED", "format_of", "has_quoted_fields", "is_table_in_folder", "opened", "suffix_of"]

SUFFIXES = {".csv": "csv", ".tsv": "tsv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json",
            ".parquet": "parquet", ".pq": "parquet"}  # fmt: skip
KNOWN = ".csv, .tsv, .jsonl, .ndjson, .json (each also with .gz, .bz2, .xz or .zst) and .parquet"


def _zst(file: Any, mode: str, **how: Any) -> IO[str]:
    """Open a .zst file as text, with what Python has, or with pyarrow."""
    if sys.version_info >= (3, 14):
        found: IO[str] = importlib.import_module("compression.zstd").open(file, mode, **how)
        return found
    import pyarrow as pa

    stream = pa.input_stream if mode.startswith("r") else pa.output_stream
    raw = stream(str(file) if isinstance(file, Path) else file, compression="zstd")
    return io.TextIOWrapper(raw, **how)


PACKED: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": _zst}
"""What opens a compressed file, by its last suffix."""
_BEGINS = {b"PAR1": ".parquet", b"\x1f\x8b": ".gz", b"BZh": ".bz2", b"\xfd7zXZ": ".xz", b"\x28\xb5\x2f\xfd": ".zst"}


def format_of(path: Path) -> str:
    """The format of a file by its suffix: "csv", "tsv", "jsonl", "json" or "parquet".

    Raises
    ------
    SettingError
        The suffix is unknown, or a package that the format needs is not installed.
    """
    found = _named(path)
    packed = path.suffix.lower()
    if found is None or (found == "parquet" and packed in PACKED):
        raise SettingError(f"{path}: unknown suffix; the known ones are {KNOWN}")
    needs = {"parquet": "Parquet needs", ".zst": ".zst needs Python 3.14 or"}
    kind = packed if packed == ".zst" and sys.version_info < (3, 14) else found
    if kind in needs and importlib.util.find_spec("pyarrow") is None:
        raise SettingError(f'{path}: {needs[kind]} pyarrow: pip install "swarmkit-frames[parquet]"')
    return found


def is_table_in_folder(path: Path) -> bool:
    """Whether a file of a folder is one of its tables, by its suffix; .json is as often a schema, or what describes the
    others."""
    return _named(path) not in (None, "json")


def _named(path: Path) -> str | None:
    name = path.stem if path.suffix.lower() in PACKED else path.name
    return SUFFIXES.get(Path(name).suffix.lower())


def opened(file: Path, newline: str | None = None) -> IO[str]:
    """Open a text file for reading, decompressed by its suffix."""
    file_of_text: IO[str] = PACKED.get(file.suffix.lower(), open)(file, "rt", encoding="utf-8-sig", newline=newline)
    return file_of_text


def suffix_of(start: bytes) -> str:
    r"""The suffix for what has no name, by its first bytes; "" where they do not tell.

    Examples
    --------
    >>> suffix_of(b'[{"a": 1}]'), suffix_of(b'{"a": 1}\n'), suffix_of(b"a\tb\n"), suffix_of(b"a,b\n1,2\n")
    ('.json', '.jsonl', '.tsv', '.csv')
    """
    for magic, suffix in _BEGINS.items():
        if start.startswith(magic):
            return suffix
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip()
    if text[:1] in (b"[", b"{"):
        return ".json" if text[:1] == b"[" else ".jsonl"
    header = text.partition(b"\n")[0]
    return ".tsv" if b"\t" in header and b"," not in header else ".csv"


_TO_QUOTE = re.compile(r'((?:[^"]|"")*)"(?=[\t\r\n]|$)')
_INSIDE = re.compile(r'(?:[^"]|"")*')


def has_quoted_fields(file: Path) -> bool:
    r"""Whether quotes in a TSV file enclose fields; otherwise they are part of the values, and to be kept.

    Fields are enclosed where the header's are, or where all quotes at the beginning of a field have their match at its
    end, and one of these fields has what is enclosed by programs: a tab, a line break, a doubled quote, or a comma (by
    Excel).
    """
    inside = needed = False
    with opened(file) as lines:
        for number, line in enumerate(lines):
            place = 0
            while 0 <= place < len(line) and (inside or '"' in line):
                if not inside and line[place] != '"':
                    place = line.find("\t", place) + 1 or -1
                    continue
                place += not inside
                if (found := _TO_QUOTE.match(line, place)) is not None:
                    needed |= inside or number == 0 or any(part in found[1] for part in ('""', "\t", ","))
                    place, inside = found.end() + 1, False
                elif _INSIDE.fullmatch(line, place):
                    place, inside = -1, True
                else:
                    return False
    return needed and not inside
