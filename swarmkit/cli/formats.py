"""The formats of table files, which their suffixes tell."""

from __future__ import annotations

import bz2
import gzip
import importlib.util
import lzma
from pathlib import Path
from typing import IO, Any

from ..errors import SettingError

__all__ = ["KNOWN", "PACKED", "format_of", "is_table", "opened"]

FORMATS = {".csv": "csv", ".tsv": "tsv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet", ".pq": "parquet"}
PACKED: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
"""What opens a compressed file, by its last suffix."""
KNOWN = ".csv, .tsv, .jsonl, .ndjson (each also with .gz, .bz2 or .xz) and .parquet"


def format_of(path: Path) -> str:
    """The format of a file by its suffix: "csv", "tsv", "jsonl" or "parquet".

    Raises
    ------
    SettingError
        The suffix is unknown, or pyarrow, which Parquet needs, is not installed.
    """
    found = _named(path)
    if found is None or (found == "parquet" and path.suffix.lower() in PACKED):
        raise SettingError(f"{path}: unknown suffix; the known ones are {KNOWN}")
    if found == "parquet" and importlib.util.find_spec("pyarrow") is None:
        raise SettingError(f'{path}: Parquet needs pyarrow: pip install "swarmkit-frames[parquet]"')
    return found


def is_table(path: Path) -> bool:
    """Whether a file has the suffix of a table."""
    return _named(path) is not None


def _named(path: Path) -> str | None:
    name = path.stem if path.suffix.lower() in PACKED else path.name
    return FORMATS.get(Path(name).suffix.lower())


def opened(file: Path) -> IO[str]:
    """Open a text file for reading, decompressed by its suffix."""
    file_of_text: IO[str] = PACKED.get(file.suffix.lower(), open)(file, "rt", encoding="utf-8-sig")
    return file_of_text
