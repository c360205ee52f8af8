"""OpenAI-compatible endpoints on this machine: a small real model, or an echo for tests.

Knows nothing of pandas, pools and runs. Imports ``client``, ``errors`` and ``version``; what a server itself needs
(starlette, uvicorn, OpenVINO: the extra ``local``) is imported in the child process that serves.
"""

from __future__ import annotations

from .faults import Fault
from .launch import LocalServerError, LocalSwarm, local

__all__ = ["Fault", "LocalServerError", "LocalSwarm", "local"]
