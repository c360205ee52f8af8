"""Health checks of endpoints that have requests in flight and send nothing."""

from __future__ import annotations

from collections import Counter

from ..client.aiohttp_transport import Bounds
from ..client.hostfile import AgentEndpoint
from ..client.transport import SMALL_REPLY, Transport
from ..errors import EndpointError
from ..records import FailureKind
from .route_plan import RoutePlan

__all__ = ["HealthChecks"]

_MAX_MISSED = 4  # health checks in a row; a busy vLLM may take 30 s to answer /health


class HealthChecks:
    """What the health checks of a run have shown.

    Parameters
    ----------
    transport : Transport
        The pool's HTTP client.
    timeout : float
        Seconds that an endpoint has to answer.
    """

    def __init__(self, transport: Transport, timeout: float) -> None:
        self._transport = transport
        self._timeout = timeout
        self._missed: Counter[int] = Counter()  # by endpoint: checks in a row without an answer
        self._well: set[RoutePlan] = set()  # those of endpoints that were seen to answer /health

    async def problem(self, index: int, endpoint: AgentEndpoint, plan: RoutePlan) -> str:
        """Ask a silent endpoint for its health; return why its requests are lost, else "".

        They are if it refuses the connection, whatever their timeout is; and if it fails, or does not answer several
        checks in a row, provided that ``/health`` was seen to be well at an endpoint of the same plan: at a gateway a
        bad one says nothing. Any answer means that it is busy.
        """
        path = "/v1/models" if plan.health == "never" else "/health"
        limits = Bounds(SMALL_REPLY, self._timeout)
        try:
            await self._transport.get(endpoint, path, timeout=self._timeout, limits=limits)
        except EndpointError as exc:
            kind = exc.failure.kind
            self._missed[index] = self._missed[index] + 1 if kind is FailureKind.HANG else 0
            trusted = path == "/health" and (plan.health == "well" or plan in self._well)
            bad = kind is FailureKind.SERVER or self._missed[index] >= _MAX_MISSED
            return exc.failure.describe() if kind is FailureKind.CONNECT or (trusted and bad) else ""
        self._missed[index] = 0
        if path == "/health":
            self._well.add(plan)
        return ""
