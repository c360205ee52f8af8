"""A table as it is written: frame by frame, and whatever becomes of the disk."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import pandas as pd

from ..frames.prompts import missing_in, values_of
from ..store.segments import sync_folder
from .formats import PACKED
from .harmless import TerminalFile, secured
from .output import Output
from .sink import Sink

if TYPE_CHECKING:
    from ..schema import Schema

__all__ = ["Writer", "list_types"]


class Writer:
    """Writes a table frame by frame, each as soon as it is added.

    A file is written under the name ``OUTPUT.part``, and renamed to OUTPUT when it is complete and on the disk. The
    ``.part`` file of a killed process can be read up to its last line; a Parquet file cannot be read, since its
    metadata is at its end, nor a JSON array, which ends with a bracket.

    What cannot be written there goes to a file in the folder for temporary files, which only the user can read.

    Parameters
    ----------
    output : Output
        Where the table is written.
    types : dict of str to pyarrow.DataType
        Types of columns in a Parquet file, where the first frame alone does not determine them.

    Attributes
    ----------
    secured : int
        Values of servers that were changed for spreadsheets and terminals, see `harmless`.
    """

    def __init__(self, output: Output, types: Mapping[str, Any] | None = None) -> None:
        self._output = output
        self._types = types or {}
        self.secured = 0
        self._columns: list[str] = []
        self._rows = 0
        self._format = output.format
        self._sink: Sink | None = None
        self._file: Any = None
        self._problem: Exception | None = None

    @property
    def problem(self) -> Exception | None:
        """Why OUTPUT is not, or not wholly, written."""
        return self._problem or (self._sink.problem if self._sink else None)

    def add(self, frame: pd.DataFrame) -> None:
        """Append a frame. All frames have the columns of the first.

        If it cannot be converted to the format, this frame and all later ones are written as JSON lines.

        Raises
        ------
        OSError
            Neither OUTPUT nor a file in the folder for temporary files can be written.
        """
        try:
            self._add(frame)
        except Exception as exc:  # any error: the rows must be written somewhere
            if self._problem or self._sink is None or isinstance(exc, OSError):
                raise
            self._problem = exc
            with contextlib.suppress(Exception):  # writes the end of a Parquet file, so that its part can be read
                self._file.close()
                self._sink.finish()
            self._sink, self._file, self._format = Sink(None, ".jsonl", rescue=exc), None, "jsonl"
            self._add(frame)

    def _add(self, frame: pd.DataFrame) -> None:
        if self._file is None:
            self._columns = list(frame.columns)
            self._open(frame)
        if self._format == "parquet":
            import pyarrow as pa

            self._file.write_table(pa.Table.from_pandas(frame, self._file.schema, preserve_index=False))
        else:
            if self._format in ("csv", "tsv"):
                if not self._output.raw:
                    frame, changed = secured(frame, self._output.answers)
                    self.secured += changed
                sep = "\t" if self._format == "tsv" else self._output.sep
                _write_text(frame, self._file, sep, header=self._columns)
            else:
                _write_json(frame, self._file, self._rows if self._format == "json" else None)
            self._columns, self._rows = [], self._rows + len(frame)
            self._file.flush()

    def _open(self, frame: pd.DataFrame) -> None:
        path, named = self._output.part, self._output.path
        if self._sink is None:
            suffix = "".join(named.suffixes[-2:]) if named else f".{self._format}"
            self._sink = Sink(path, suffix, like=named)
        if self._format == "parquet":
            import pyarrow as pa
            import pyarrow.parquet as pq

            schema = pa.Schema.from_pandas(frame, preserve_index=False)
            for i, name in enumerate(schema.names):
                found = pa.string() if schema.types[i] == pa.null() else schema.types[i]
                schema = schema.set(i, pa.field(name, self._types.get(name, found)))
            self._file = pq.ParquetWriter(self._sink, schema)
        else:
            packed = named if self._format == self._output.format else None
            self._file = _text_file(self._sink, packed, named is None and not self._output.raw)

    def close(self, incomplete: str = "") -> str:
        """Complete the file, and rename it to OUTPUT.

        Parameters
        ----------
        incomplete : str, optional
            Why rows are missing in it: then it keeps the name ``OUTPUT.part``.

        Returns
        -------
        str
            Where the table was written. ``problem`` is None if that is OUTPUT, and all of it.
        """
        if incomplete and self.problem is None:
            self._problem = RuntimeError(incomplete)
        if self._sink is None:
            return str(self._output)
        if self._format == "json":
            self._file.write("\n]\n" if self._rows else "[\n]\n")
        self._file.close()
        self._sink.finish()
        part, path = self._output.part, self._output.path
        if self.problem is None and part and path:
            try:
                if self._output.has_changed():
                    raise OSError(f"{path.name} was changed by something else in the meantime")
                part.replace(path)
                sync_folder(path.parent)
            except OSError as exc:
                self._problem = exc
        return self._where()

    def _where(self) -> str:
        part, sink = self._output.part, self._sink
        if self.problem is None or sink is None:
            return str(self._output)
        if sink.path is None:
            return f"{part or self._output}, and not to {self._output}: {self.problem}"
        why = f"{sink.path}, since {self._output} could not be written ({self.problem})"
        if self._format != self._output.format:
            return f"{why}; the rows before these are in {part}"
        if sink.whole:
            return why
        return f"{why}. It continues {part}: cat {part} {sink.path} > OUTPUT" if part else f"{why}. It has the rest"


def list_types(schema: Schema | None, out: str) -> dict[str, Any]:
    """The types in a Parquet file of columns of lists, which its first rows may not show: they may have none."""
    properties = schema.constraint.get("json", {}).get("properties", {}) if schema else {}
    types = {f"{out}_{name}": _list_type(node) for name, node in properties.items()}
    return {name: type_ for name, type_ in types.items() if type_ is not None}


def _list_type(node: Mapping[str, Any], inner: bool = False) -> Any:
    """The type of lists of texts, numbers or booleans, or of lists of these; None for all else."""
    import pyarrow as pa

    branches = [b for b in node.get("anyOf", [node]) if b.get("type") != "null"]
    if len(branches) != 1:
        return None
    kind = branches[0].get("type")
    if kind == "array" and (items := _list_type(branches[0].get("items") or {}, inner=True)) is not None:
        return pa.list_(items)
    if not inner or "format" in branches[0]:
        return None
    scalars = {"string": pa.string(), "integer": pa.int64(), "number": pa.float64(), "boolean": pa.bool_()}
    return scalars.get(kind) if isinstance(kind, str) else None


def _text_file(sink: Sink, packed: Path | None, to_terminal: bool) -> IO[str]:
    """A text file over a sink, compressed by the suffix of its name."""
    # A lone surrogate in one answer must not make the whole table unwritable.
    how: dict[str, Any] = {"encoding": "utf-8", "errors": "replace", "newline": ""}
    if packed and (packing := PACKED.get(packed.suffix.lower())):
        file: IO[str] = packing(sink, "wt", **how)
        return file
    kind = TerminalFile if to_terminal and sys.stdout.isatty() else io.TextIOWrapper
    return kind(io.BufferedWriter(sink), **how)


def _write_json(frame: pd.DataFrame, file: IO[str], before: int | None) -> None:
    """Write rows as JSON lines, or as elements of an array that has so many ``before`` them."""
    columns = [_values(frame.iloc[:, i]) for i in range(frame.shape[1])]
    names = [str(name) for name in frame.columns]
    for number, row in enumerate(zip(*columns, strict=True)):
        line = json.dumps(dict(zip(names, row, strict=True)), ensure_ascii=False, default=_plain)
        file.write(f"{line}\n" if before is None else f"{',' if before + number else '['}\n{line}")


def _write_text(frame: pd.DataFrame, file: IO[str], sep: str, header: Sequence[str]) -> None:
    flat = {c: frame[c].map(_flat) for c in frame.columns if frame[c].dtype == object}
    # The terminator of lines decides what is quoted. Older Pythons write a lone \r bare where lines end in \n, and the
    # row would be two rows when it is read.
    frame.assign(**flat).to_csv(_Lines(file), sep=sep, index=False, header=bool(header), lineterminator="\r\n")  # type: ignore[call-overload] # it needs write() only


class _Lines:
    """A file that is given lines that end in ``\\r\\n``, and ends them in ``\\n``."""

    def __init__(self, file: IO[str]) -> None:
        self._file = file

    def write(self, line: str) -> int:
        return self._file.write(line[:-2] + "\n")


def _values(column: pd.Series) -> list[Any]:
    return [None if absent else value for value, absent in zip(values_of(column), missing_in(column), strict=True)]


def _flat(value: Any) -> Any:
    return json.dumps(value, ensure_ascii=False, default=_plain) if isinstance(value, (dict, list)) else value


def _plain(value: Any) -> Any:
    """Values without a form in JSON: arrays become lists, dates and others text."""
    return value.tolist() if hasattr(value, "tolist") else str(value)
