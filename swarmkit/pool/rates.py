"""The rates of a pool's gateways: shared by its sub-pools, and by runs one after another or side by side."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from ..client.hostfile import RATE_TAGS, AgentEndpoint
from ..engine.rates import Rate
from ..errors import SettingError
from ..records import Quota

__all__ = ["Rates", "gateway_of"]


class Rates:
    """What may be sent to each gateway: the endpoints of one scheme, host and port, whatever their paths.

    Parameters
    ----------
    rpm, tpm, max_connections : int, optional
        For each gateway; an endpoint whose tags have these names says it for its own.

    Raises
    ------
    SettingError
        One of them is no whole number above 0.
    """

    def __init__(self, rpm: int | None = None, tpm: int | None = None, max_connections: int | None = None) -> None:
        limits = {"rpm": rpm, "tpm": tpm, "max_connections": max_connections}
        self._given = {name: value for name, value in limits.items() if value is not None}
        for name, value in self._given.items():
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise SettingError(f"{name}={value!r}: must be a whole number, 1 or more, or None for no limit")
        self._rates: dict[str, Rate] = {}
        self.share = 1.0
        """The part of all limits that this process may use, where several work together."""

    def of(self, endpoint: AgentEndpoint) -> Rate | None:
        """The rate of an endpoint's gateway; None where nothing limits it."""
        own = RATE_TAGS & endpoint.tags.keys() if endpoint.tags else None
        if not (own or self._given or self._rates):
            return None
        gateway = gateway_of(endpoint)
        if gateway not in self._rates and (own or self._given):
            limits = self._given | _numbers(endpoint.tags)
            part = {name: max(1, int(value * self.share)) for name, value in limits.items()}
            self._rates[gateway] = Rate(part.get("rpm"), part.get("tpm"), part.get("max_connections"))
        return self._rates.get(gateway)

    def restart(self) -> None:
        """This is a fork of the process whose requests are counted."""
        self._rates.clear()

    def asked(self, endpoint: AgentEndpoint) -> None:
        """A question goes out that belongs to no run: it is counted, and waits for nothing."""
        if (rate := self.of(endpoint)) is not None:
            rate.sent(time.monotonic()).over()

    def told(self, endpoint: AgentEndpoint, quota: Quota, asked_at: float) -> None:
        """A gateway has said what is left."""
        rate = self.of(endpoint) or self._rates.setdefault(gateway_of(endpoint), Rate())
        rate.told(quota, asked_at, time.monotonic())

    def __reduce__(self) -> tuple[Any, ...]:
        return Rates, tuple(self._given.get(name) for name in ("rpm", "tpm", "max_connections"))


def gateway_of(endpoint: AgentEndpoint) -> str:
    """The URL of an endpoint without its path, which the endpoints of a gateway have in common."""
    return endpoint.url.removesuffix(endpoint.path)


def _numbers(tags: Mapping[str, str]) -> dict[str, int]:
    found = {name: str(tags[name]) for name in RATE_TAGS & tags.keys()}
    return {name: int(text) for name, text in found.items() if text.isdecimal() and int(text)}
