"""JupyterLab, and the folder for pictures."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="module")  # a second playwright cannot run beside it
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from lab import laboratory  # not at the top: who collects all tests need not have playwright

    with laboratory(tmp_path_factory.mktemp("lab")) as lab:
        yield lab


@pytest.fixture(scope="session")
def shots() -> Path:
    folder = Path(os.environ.get("SWARMKIT_SHOTS") or Path(tempfile.gettempdir()) / "swarmkit-shots")
    folder.mkdir(parents=True, exist_ok=True)
    return folder
