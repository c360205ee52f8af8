"""Every example in a docstring runs and says what it shows."""

import doctest
import importlib
from pathlib import Path

import pytest

import swarmkit

PACKAGE = Path(swarmkit.__file__).parent
NAMES = sorted(
    ".".join(["swarmkit", *path.relative_to(PACKAGE).with_suffix("").parts])
    for path in PACKAGE.rglob("*.py")
    if ">>> " in path.read_text()
)


@pytest.mark.parametrize("name", NAMES)
def test_examples(name):
    module = importlib.import_module(name.removesuffix(".__init__"))
    result = doctest.testmod(module)
    assert result.attempted
    assert result.failed == 0
