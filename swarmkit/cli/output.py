"""Where a table is written, which is checked before anything is sent."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import SettingError
from .formats import format_of

__all__ = ["Output", "plan_output"]


@dataclass(frozen=True, slots=True)
class Output:
    """Where a table is written.

    Attributes
    ----------
    path : Path or None
        None is the standard output.
    format : str
        "csv", "tsv", "jsonl", "json" or "parquet".
    stamp : tuple of int or None
        What the file was like that is replaced in place: it is not replaced if it has changed since.
    sep : str
        What separates the columns of a CSV file.
    raw : bool
        Whether answers are written as they are, also where they act on spreadsheets or terminals, see `harmless`.
    answers : re.Pattern or None
        The names of the columns of this command's answers; others are the user's, and written as they are.
    """

    path: Path | None
    format: str
    stamp: tuple[int, ...] | None = None
    sep: str = ","
    raw: bool = False
    answers: re.Pattern[str] | None = None

    @property
    def part(self) -> Path | None:
        """The name of the file while it is being written."""
        return self.path and self.path.with_name(self.path.name + ".part")

    def has_changed(self) -> bool:
        """Whether the file that is to be replaced in place is another one by now."""
        return self.stamp is not None and self.path is not None and _stamp(self.path) != self.stamp

    def __str__(self) -> str:
        return "the standard output" if self.path is None else str(self.path)


def plan_output(
    target: str | None,
    files: Sequence[Path],
    *,
    stdout: str = "csv",
    overwrite: bool = False,
    in_place: bool | None = None,
    stored: bool = False,
    form: str | None = None,
) -> Output:
    """Check where a table is to be written, before anything is sent.

    Parameters
    ----------
    target : str or None
        A file, or "-" for the standard output; None is the input, with ``in_place``.
    files : sequence of Path
        The inputs.
    stdout : str, default "csv"
        Format for the standard output.
    overwrite : bool, default False
        Whether an existing file may be replaced. It must not be an input.
    in_place : bool, optional
        Whether the one input is to be replaced; None for tables that do not have the rows of the input.
    stored : bool, default False
        Whether answers are also in a store: then the ``.part`` file of a killed process may be replaced.
    form : str, optional
        The format of the inputs, where it does not go by their suffixes.

    Raises
    ------
    SettingError
        The table cannot or must not be written there.
    """
    if in_place:
        if len(files) > 1:
            raise SettingError(
                f"--in-place takes one input, and {len(files)} were given; write to another file with -o"
            )
        if target is not None and not _is_same(Path(target).expanduser(), files[0]):
            raise SettingError(f"--in-place replaces {files[0]}, and -o names another file: give one of the two")
        target = str(files[0])
    if target is None:
        raise SettingError("where does the table go? -o OUTPUT, or --in-place to write the answers into the input")
    if target == "-":
        return Output(None, stdout)
    path = Path(target).expanduser().resolve()
    form = form if form and in_place else format_of(path)
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise SettingError(f"cannot write {target}: the folder {path.parent} does not exist or is not writable")
    if path.is_dir():
        raise SettingError(f"cannot write {target}: it is a folder")
    if not in_place and any(_is_same(path, file) for file in files):
        other = " --in-place writes the answers into it, and keeps its rows" if in_place is False else ""
        raise SettingError(f"{target} is an input, which is not overwritten: write to another file.{other}")
    if path.exists() and not overwrite and not in_place:
        complete = (
            "" if in_place is None else ", and to complete it, give it as the input with --only-missing --in-place"
        )
        raise SettingError(f"{target} already exists; --overwrite replaces it{complete}")
    output = Output(path, form, _stamp(path) if in_place else None)
    if output.part and output.part.exists() and not overwrite and not stored:
        raise SettingError(
            f"{target}.part already exists: the unfinished output of a killed process. Save its answers and remove it, "
            "or --overwrite replaces it"
        )
    return output


def _is_same(a: Path, b: Path) -> bool:
    try:
        return a.samefile(b)  # also by another link, or in another case
    except OSError:
        return a.resolve() == b.resolve()


def _stamp(path: Path) -> tuple[int, ...] | None:
    """What changes when a file is written or replaced."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
