"""What all tests share: echo endpoints and pools, and which servers the contract suite runs against."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from contract.targets import header

import swarmkit as sk


def pytest_addoption(parser: pytest.Parser) -> None:
    # Here and not in contract/conftest.py, which plain `pytest` reads too late for options and headers.
    parser.addoption("--hostfile", help="endpoints that the contract suite runs against too (or $SWARMKIT_HOSTFILE)")


def pytest_report_header(config: pytest.Config) -> list[str]:
    return header(config.getoption("hostfile"))


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """A developer's own swarm must not get into tests that ask for none."""
    for prefix in ("SWARMKIT", "AURORA_SWARM"):
        for name in ("HOSTFILE", "MAX_TOKENS", "MAX_TOKENS_AGGREGATION", "MODEL_MAX_CONTEXT"):
            monkeypatch.delenv(f"{prefix}_{name}", raising=False)


@pytest.fixture(scope="session")
def echo() -> Iterator[sk.LocalSwarm]:
    """Four instant echo endpoints in one process."""
    with sk.local(1, engine="echo", addresses=4) as swarm:
        yield swarm


@pytest.fixture
def pool(echo: sk.LocalSwarm) -> Iterator[sk.VLLMPool]:
    """A pool of the four, and the default one."""
    with sk.connect(echo) as pool:
        yield pool
