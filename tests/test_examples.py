"""Every example in a docstring runs and says what it shows."""

import doctest
import importlib
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest

import swarmkit as sk

PACKAGE = Path(sk.__file__).parent
NAMES = sorted(
    ".".join(["swarmkit", *path.relative_to(PACKAGE).with_suffix("").parts])
    for path in PACKAGE.rglob("*.py")
    if ">>> " in path.read_text()
)


@pytest.fixture(scope="module")
def known() -> Iterator[dict[str, object]]:
    """What docs/reference.md says that each example has."""
    df = pd.DataFrame({"gene": ["lacZ", "recA"]})
    with sk.local(1, engine="echo", addresses=4, token="a-key") as swarm, sk.connect(swarm) as pool:
        yield {"sk": sk, "pd": pd, "swarm": swarm, "pool": pool, "df": df}


@pytest.mark.parametrize("name", NAMES)
def test_examples(name, known, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # for those that write files
    module = importlib.import_module(name.removesuffix(".__init__"))
    tests = [test for test in doctest.DocTestFinder().find(module, extraglobs=known) if test.examples]
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    for test in tests:
        sk.connect(known["pool"])  # the default one again: an example may have made another
        runner.run(test)
    assert tests
    assert runner.failures == 0
