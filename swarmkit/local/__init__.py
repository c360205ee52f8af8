"""OpenAI-compatible endpoints on this machine: a small real model, or an echo for tests."""

from __future__ import annotations

from .faults import Fault
from .launch import LocalServerError, LocalSwarm, local

__all__ = ["Fault", "LocalServerError", "LocalSwarm", "local"]
