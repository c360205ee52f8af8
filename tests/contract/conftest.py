"""One suite, many servers: every test that takes ``target`` runs once against each."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from contract.targets import LOCAL, Target, external, started


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "target" in metafunc.fixturenames:
        names = [*LOCAL, *external(metafunc.config.getoption("hostfile"))]
        metafunc.parametrize("target", names, indirect=True, scope="session")


@pytest.fixture(scope="session")
def target(request: pytest.FixtureRequest) -> Iterator[Target]:
    with started(request.param, request.config.getoption("hostfile")) as ready:
        yield ready
