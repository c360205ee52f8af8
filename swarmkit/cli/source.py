"""Table files as they are read: in chunks, and without changing their values.

The values of CSV and TSV files stay text: a code such as ``007`` or the answer ``None`` is written as it was read,
and only an empty field is missing. JSON lines and arrays keep numbers and texts as Python reads them.
"""

from __future__ import annotations

import atexit
import contextlib
import csv
import glob
import itertools
import json
import math
import re
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from ..errors import SettingError
from ..frames.prompts import placeholders
from .formats import KNOWN, PACKED, format_of, has_quoted_fields, is_table_in_folder, opened, suffix_of
from .harmless import restored
from .output import Output
from .terminal import say

__all__ = ["Reading", "Source", "find_files", "numbers", "scan"]

_SCANNED = 10_000
"""Rows scanned at a time."""
_SNIFFED = 65_536
"""Bytes by which the format of the standard input is known."""
_NULLABLE = [pd.Int8Dtype(), pd.Int16Dtype(), pd.Int32Dtype(), pd.Int64Dtype(), pd.UInt8Dtype(), pd.UInt16Dtype(),
             pd.UInt32Dtype(), pd.UInt64Dtype()]  # fmt: skip


class Reading(NamedTuple):
    """How tables are read.

    Attributes
    ----------
    na : sequence of str
        Texts that stand for a missing value in CSV and TSV files, besides the empty one.
    sep : str
        What separates the columns of CSV files.
    form : str or None
        The format of all files; None goes by their suffixes.
    raw : bool
        Whether answers in CSV and TSV files are as they were, without what `harmless` adds to them.
    answers : re.Pattern or None
        The names of the columns of answers; others are the user's, and read as they are.
    """

    na: Sequence[str] = ()
    sep: str = ","
    form: str | None = None
    raw: bool = False
    answers: re.Pattern[str] | None = None

    def format_of(self, file: Path) -> str:
        """The format of a file."""
        return self.form or format_of(file)


def find_files(inputs: Iterable[str], form: str | None = None) -> list[Path]:
    """Resolve files, folders and globs to files, each once.

    Parameters
    ----------
    inputs : iterable of str
        A folder stands for the tables directly in it, without .json files; a glob for its matches; both sorted by
        name. "-" is the standard input, which is copied to a temporary file, since tables are read twice.
    form : str, optional
        Their format, where it does not go by their suffixes.

    Raises
    ------
    SettingError
        One of them matches no file, or a file of unknown format.
    """
    found: dict[Path, Path] = {}
    for text in dict.fromkeys(inputs):
        path = Path(text).expanduser()
        if text == "-":
            files = [_standard_input(form)]
        elif path.is_dir():
            inside = (p for p in path.iterdir() if p.is_file() and not p.name.startswith("."))
            files = sorted(filter(is_table_in_folder, inside))
            if not files:
                raise SettingError(
                    f"there is no table in the folder {text}; tables end in {KNOWN}; .json files are read where they "
                    "are named themselves"
                )
        elif path.is_file():
            files = [path]
        else:
            files = sorted(p for p in map(Path, glob.glob(str(path), recursive=True)) if p.is_file())
            if not files:
                raise SettingError(f"there is no input {text!r} here ({Path.cwd()})")
        for file in files:
            Reading(form=form).format_of(file)
            found.setdefault(file.resolve(), file)
    return list(found.values())


def _standard_input(form: str | None) -> Path:
    if sys.stdin.isatty():
        say("reading the table from the terminal; Ctrl-D ends it")
    folder = Path(tempfile.mkdtemp(prefix="swarmkit-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    source = sys.stdin.buffer
    start = source.read(_SNIFFED)
    if not start:
        raise SettingError("the standard input is empty")
    file = folder / f"stdin{f'.{form}' if form else suffix_of(start)}"
    with file.open("wb") as copy:
        copy.write(start)
        shutil.copyfileobj(source, copy)
    if file.suffix in PACKED:
        with PACKED[file.suffix](file, "rt", encoding="utf-8", errors="replace") as text:
            inner = suffix_of(text.read(_SNIFFED).encode())
        file = file.rename(file.with_name(f"stdin{inner}{file.suffix}"))
    return file


@dataclass(slots=True)
class Source:
    """Table files that were scanned once, to be read in chunks; made by ``scan``.

    Attributes
    ----------
    rows : int
        Rows of all files.
    columns : list of str
        Columns of all files, in the order of their first appearance.
    types : dict of str to pyarrow.DataType
        Their types in a Parquet file; empty if the output is another format.
    notes : list of str
        Warnings for the user: files whose columns differ, or that look like one column.
    """

    files: Sequence[Path]
    limit: int | None
    reading: Reading
    rows: int = 0
    columns: list[str] = field(default_factory=list)
    types: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def chunks(self, rows: int) -> Iterator[pd.DataFrame]:
        """The rows in frames of about ``rows`` rows; each has all columns, and one index from 0 runs over all."""
        held: list[pd.DataFrame] = []
        done = count = 0
        for _, part in _parts(self, rows):
            for name in [c for c in self.columns if c not in part.columns]:
                part[name] = pd.Series([None] * len(part), part.index, dtype=object)
            held.append(part if list(part.columns) == self.columns else part[self.columns])
            count += len(part)
            if count >= rows or done + count == self.rows:
                # Frames without rows would affect the dtypes of the result.
                full = [p for p in held if len(p)] or held[:1]
                frame = full[0] if len(full) == 1 else pd.concat(full)
                frame.index = pd.RangeIndex(done, done + count)
                yield frame
                done, count, held = done + count, 0, []
                if done == self.rows:
                    return

    def read(self) -> pd.DataFrame:
        """All rows in one frame."""
        return next(self.chunks(self.rows))


def scan(files: Sequence[Path], output: Output, limit: int | None = None, reading: Reading | None = None) -> Source:
    """Scan files before anything is sent: check that they can be read, and find their rows, columns and types.

    Parameters
    ----------
    files : sequence of Path
        From ``find_files``.
    output : Output
        Where their rows will be written.
    limit : int, optional
        Maximum number of rows to read.
    reading : Reading, optional
        How they are read.

    Raises
    ------
    SettingError
        A file cannot be read, or a column cannot be written as Parquet; the message says which.
    """
    source = Source(files, limit, reading or Reading())
    known: dict[Path, dict[str, None]] = {}
    for file, part in _parts(source, _SCANNED):
        source.rows += len(part)
        known.setdefault(file, {}).update(dict.fromkeys(part.columns))
        if output.format == "parquet":
            _add_types(source.types, part)
    source.columns = list(dict.fromkeys(name for names in known.values() for name in names))
    first, *others = known
    for file in others:
        if odd := sorted({*map(str, known[first])} ^ {*map(str, known[file])}):
            source.notes.append(f"{file} and {first} do not share the columns {', '.join(odd)}")
    for file, names in known.items():
        source.notes += _hints(file, [*map(str, names)], source.reading)
    return source


def _hints(file: Path, columns: Sequence[str], reading: Reading) -> Iterator[str]:
    """What to try where a file has become one column that looks like several."""
    if len(columns) != 1 or reading.format_of(file) != "csv":
        return
    for sep, shown in ((";", "';'"), ("\t", r"'\t'"), ("|", "'|'"), (",", "','")):
        if sep in columns[0]:
            yield f"{file} has one column, {columns[0]!r}; if that should be several, give --sep {shown}"
            return


def _add_types(types: dict[str, Any], part: pd.DataFrame) -> None:
    import pyarrow as pa

    for name in part.columns:
        try:
            schemas = [pa.schema([("", pa.array(part[name], from_pandas=True).type)])]
            schemas += [pa.schema([("", types[name])])] if name in types else []
            types[name] = pa.unify_schemas(schemas, promote_options="permissive").field(0).type
        except (pa.ArrowException, TypeError) as exc:
            raise SettingError(f"column {name!r} cannot be written as Parquet ({exc}); write .jsonl instead") from exc


def _parts(source: Source, rows: int) -> Iterator[tuple[Path, pd.DataFrame]]:
    """The rows of the files in frames of at most ``rows`` rows, up to the limit."""
    left = math.inf if source.limit is None else source.limit
    for file in source.files:
        try:
            for part in _READERS[source.reading.format_of(file)](file, rows, source.reading):
                part = part if len(part) <= left else part.iloc[: int(left)]
                left -= len(part)
                yield file, part
                if left <= 0:
                    return
        except (OSError, ValueError, EOFError) as exc:  # pandas' parser errors are ValueErrors, pyarrow's are too
            raise SettingError(f"cannot read {file}: {exc}") from exc


def _parquet_parts(file: Path, rows: int, reading: Reading) -> Iterator[pd.DataFrame]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    # Otherwise a column of integers would be floats in the parts with a missing value.
    kinds: dict[Any, Any] = {getattr(pa, t.name.lower())(): t for t in _NULLABLE}
    with pq.ParquetFile(file) as table:
        batches: Iterable[Any] = table.iter_batches(rows)
        if not table.metadata.num_rows:
            batches = [pa.RecordBatch.from_pylist([], table.schema_arrow)]
        for batch in batches:
            frame = pa.Table.from_batches([batch]).to_pandas(types_mapper=kinds.get)
            # An index with values becomes columns: the other formats have no index.
            yield frame if isinstance(frame.index, pd.RangeIndex) else frame.reset_index()


def _text_parts(file: Path, rows: int, reading: Reading) -> Iterator[pd.DataFrame]:
    tabs = reading.format_of(file) == "tsv"
    how: dict[str, Any] = {"sep": "\t" if tabs else reading.sep, "na_values": ["", *reading.na]}
    if tabs and not has_quoted_fields(file):
        how["quoting"] = csv.QUOTE_NONE
    with contextlib.ExitStack() as stack:
        zst = file.suffix.lower() == ".zst"  # pandas reads it with a package of its own
        source: Any = stack.enter_context(opened(file, newline="")) if zst else file
        parts = stack.enter_context(
            pd.read_csv(source, dtype=str, keep_default_na=False, encoding="utf-8-sig", chunksize=rows, **how)
        )
        for part in parts:
            if not isinstance(part.index, pd.RangeIndex):
                raise ValueError("its rows have more fields than its header")
            yield part if reading.raw else restored(part, reading.answers)


def _jsonl_parts(file: Path, rows: int, reading: Reading) -> Iterator[pd.DataFrame]:
    with opened(file) as lines:
        records = _records(lines)
        while True:
            part = list(itertools.islice(records, rows))
            yield pd.DataFrame(part, dtype=object)
            if len(part) < rows:
                return


def _records(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(lines, 1):
        if line.isspace():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as exc:
            raise ValueError(f"line {number} is not JSON ({exc}){_array(line)}") from exc
        if not isinstance(record, dict):
            raise ValueError(f"line {number} is not a JSON object{_array(line)}")
        yield record


def _array(line: str) -> str:
    return "; for a JSON array give --input-format json, or name it .json" if line.lstrip().startswith("[") else ""


def _json_parts(file: Path, rows: int, reading: Reading) -> Iterator[pd.DataFrame]:
    """An array of objects, read as a whole; or lines, which often have this suffix, too."""
    with opened(file) as lines:
        start = next((line for line in lines if not line.isspace()), "")
        if not start.lstrip().startswith("["):
            yield from _jsonl_parts(file, rows, reading)
            return
        records = json.loads(start + lines.read())
    for number, record in enumerate(records, 1):
        if not isinstance(record, dict):
            raise ValueError(f"element {number} of its array is not a JSON object")
    for first in range(0, max(1, len(records)), rows):
        yield pd.DataFrame(records[first : first + rows], dtype=object)


_READERS = {"parquet": _parquet_parts, "csv": _text_parts, "tsv": _text_parts, "jsonl": _jsonl_parts,
            "json": _json_parts}  # fmt: skip


def numbers(frame: pd.DataFrame, template: str | None) -> pd.DataFrame:
    """The frame, with text columns converted to numbers where the template formats numbers (``{score:.2f}``).

    Examples
    --------
    >>> numbers(pd.DataFrame({"id": ["007"], "start": ["362455"]}), "{id}: {start:,}").values.tolist()
    [['007', 362455]]
    """
    if template is None or template in frame.columns:
        return frame
    changed = {}
    for _, name, spec in placeholders(template, frame.columns):
        if name is None or not spec or not pd.api.types.is_string_dtype(frame[name]):
            continue
        try:
            format("", spec)
        except ValueError:  # not a format of texts; a column without numbers fails later, with the prompt's error
            with contextlib.suppress(ValueError, TypeError):
                changed[name] = pd.to_numeric(frame[name], dtype_backend="numpy_nullable")
    return frame.assign(**changed)
