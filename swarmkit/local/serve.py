"""Serving: in a child process that ends with its parent, or in the foreground.

A child reads its configuration from a pipe, its standard input. The parent holds the other end and nobody
else does, so end-of-file means that the parent is gone, however it went.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any, Literal

import uvicorn

from .echo import EchoEngine, Speed
from .engines import Engine
from .faults import Fault
from .launch import configure
from .listen import BACKLOG, bind
from .misbehave import TrackedProtocol
from .server import App, ServerOptions

__all__ = ["main", "make_engine", "run", "serve"]

_KEEP_ALIVE_S = 5  # vLLM's


def make_engine(name: str, options: dict[str, Any]) -> Engine:
    """Build an engine from plain values, as they come through the pipe.

    Parameters
    ----------
    name : {"echo", "openvino"}
    options : dict
        As `swarmkit.local` takes them.
    """
    if name == "openvino":
        from .openvino import OpenVinoEngine

        return OpenVinoEngine(**options)
    options = dict(options)
    base = {key: options.pop(key) for key in Speed.__slots__ if key in options}
    speeds = {address: Speed(**{**base, **speed}) for address, speed in options.pop("speeds", {}).items()}
    return EchoEngine(**options, speed=Speed(**base), speeds=speeds)


def _make_app(config: dict[str, Any]) -> App:
    options = dict(config["server_options"])
    options["faults"] = tuple(Fault(**fault) for fault in options.get("faults", ()))
    engine = make_engine(config["engine"], config["engine_options"])
    return App(engine, ServerOptions(**options), config["token"])


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, engine: Engine, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._engine = engine
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        # What still runs ends with finish_reason "abort", as a vLLM that is told to stop does it.
        self._engine.abort()
        await super().shutdown(sockets)


def run(app: App, sockets: Sequence[socket.socket], ready: Callable[[], None]) -> None:
    """Serve until SIGTERM or SIGINT.

    Parameters
    ----------
    app : App
    sockets : sequence of socket.socket
        From `bind`.
    ready : callable
        Called once requests are accepted.
    """
    config = uvicorn.Config(
        app,
        http=TrackedProtocol,
        ws="none",
        loop="asyncio",
        lifespan="off",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        date_header=False,
        backlog=BACKLOG,
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=1,
    )
    try:
        _Server(config, app.engine, ready).run(list(sockets))
    finally:
        app.engine.close()


def main(config: dict[str, Any]) -> None:
    """Serve as a child, until the parent is gone or SIGTERM comes.

    Parameters
    ----------
    config : dict
        From `swarmkit.local.launch.configure`.
    """
    # What the engine prints natively must not get between the lines of the report.
    report = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    sockets = bind(config["addresses"], config["port"])
    app = _make_app(config)

    def ready() -> None:
        ports = [sock.getsockname()[1] for sock in sockets]
        report.write(json.dumps({"ports": ports, "model": app.engine.model}) + "\n")
        report.close()

    run(app, sockets, ready)


def _end_with_parent() -> None:
    while sys.stdin.buffer.read(4096):
        pass
    os._exit(0)  # at once, whatever the event loop and the engine are at


def serve(
    *,
    engine: Literal["auto", "echo", "openvino"] = "auto",
    model: str | os.PathLike[str] | None = None,
    addresses: int | Sequence[str] = 1,
    port: int = 8000,
    token: str | None = None,
    **options: Any,
) -> None:
    """Serve in the foreground, until Ctrl-C or SIGTERM.

    Prints the addresses to stdout, and the key if it was made here; one that is given is not printed.

    Parameters
    ----------
    engine, model, addresses, token, **options
        As in `swarmkit.local`.
    port : int, default 8000
        0 takes a free one.

    Raises
    ------
    SettingError
        An unknown option, or an address that is not a loopback address.
    OSError
        The port is taken.
    """
    config = configure(engine, model, addresses, port, token or secrets.token_urlsafe(24), 1, options)
    sockets = bind(config["addresses"], port)
    app = _make_app(config)

    def ready() -> None:
        first, last = _url(sockets[0]), _url(sockets[-1])
        where = first if first == last else f"{len(sockets)} addresses, {first} to {last}"
        print(f"{app.engine.model} ({config['engine']}) serves at {where}")
        key = "the given token" if token else config["token"]
        print(f"Every request needs the header  Authorization: Bearer {key}", flush=True)

    try:
        run(app, sockets, ready)
    except KeyboardInterrupt:
        print("stopped")


def _url(sock: socket.socket) -> str:
    host, port = sock.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
