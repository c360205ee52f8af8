"""One suite, many servers: every test that takes ``target`` runs once against each."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from contract.targets import LOCAL, Target, external, started


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "target" in metafunc.fixturenames:
        names = [*LOCAL, *external(metafunc.config.getoption("hostfile"))]
        slow = {"openvino": [pytest.mark.slow]}  # the model of the local engine computes for a minute
        targets = [pytest.param(name, marks=slow.get(name, [])) for name in names]
        metafunc.parametrize("target", targets, indirect=True, scope="session")


@pytest.fixture(scope="session")
def target(request: pytest.FixtureRequest) -> Iterator[Target]:
    with started(request.param, request.config.getoption("hostfile")) as ready:
        yield ready
