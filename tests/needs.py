"""What a machine may lack: a test is skipped then, but in CI it fails, so that nothing is hidden there."""

import os

import pytest


def need(there: object, what: str) -> None:
    """Go on if ``there`` is true."""
    if not there and os.environ.get("CI", "").lower() in ("1", "true"):
        pytest.fail(f"CI needs {what}")
    if not there:
        pytest.skip(f"needs {what}")
