"""What a pool shares with its sub-pools: the HTTP client, and what is known of the servers."""

from __future__ import annotations

import concurrent.futures
import weakref
from dataclasses import dataclass, field
from typing import Any

from ..client import io_thread
from ..client.capabilities import ServerInfo
from ..client.http_settings import HttpSettings
from ..client.transport import Transport
from ..engine.sharing import Places
from ..errors import PoolClosedError, SettingError
from .rates import Rates
from .watch import Watch

__all__ = ["SharedState"]


@dataclass(eq=False)
class SharedState:
    """What a pool shares with its sub-pools: the HTTP client, and what is known of the servers.

    Pickled it is a recipe: settings only, no keys, no connections, no findings.
    """

    http: HttpSettings
    rates: Rates = field(default_factory=Rates)
    closed: bool = False
    infos: dict[str, ServerInfo] = field(default_factory=dict)
    watch: Watch | None = None
    places: Places = field(default_factory=Places)
    memo: dict[Any, Any] = field(default_factory=dict)
    _transport: Transport | None = None
    _generation: int = -1

    def check_open(self) -> None:
        """Raise ``PoolClosedError`` once the pool is closed."""
        if self.closed:
            raise PoolClosedError("this pool is closed; make a new one with swarmkit.connect(...)")

    def transport(self) -> Transport:
        """The client of the loop in use; a forked child's loop gets one of its own."""
        self.check_open()
        if self._transport is None or self._generation != io_thread.generation():
            if self._transport is not None and self.http.http_client is not None:
                raise SettingError(
                    "http_client= belongs to the process that made it, and this is a fork of that process: make a new "
                    "client and a new pool here"
                )
            if self._transport is not None:
                self.rates.restart()
                self.places = Places()
            self._transport = Transport(self.http, self.rates)
            self._generation = io_thread.generation()
            # A pool that is collected, or that is left when the interpreter ends, has its connections closed.
            weakref.finalize(self, _close_transport, self._transport, self._generation).atexit = False
            _living.add(self)
        return self._transport

    async def close(self, http_client: bool = False) -> None:
        """Close all connections; the pool and its sub-pools cannot be used afterwards."""
        self.closed = True
        if self.watch is not None:
            self.watch.end()
        if self._transport is not None and self._generation == io_thread.generation():
            await self._transport.aclose()
        self._transport = None
        if http_client and self.http.http_client is not None:
            await self.http.http_client.aclose()

    def __getstate__(self) -> dict[str, Any]:
        return {"http": self.http, "rates": self.rates, "closed": self.closed}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc] # connections and findings are made anew


_living: weakref.WeakSet[SharedState] = weakref.WeakSet()


def _close_transport(transport: Transport, generation: int) -> None:
    if io_thread.is_running(generation):
        io_thread.start(transport.aclose())


@io_thread.at_exit
def _close_all() -> None:
    closing = [io_thread.start(core.close()) for core in _living if io_thread.is_running(core._generation)]
    concurrent.futures.wait(closing, timeout=1.0)
