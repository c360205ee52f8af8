"""Serving: in a child process that ends with its parent, or in the foreground.

A child reads its configuration from a pipe, its standard input. Only the parent holds the other end, so
end-of-file means that the parent has ended, for whatever reason.
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

from .app import App, ServerOptions
from .engines.base import Engine
from .engines.echo import EchoEngine, Speed
from .fault_injection import TrackedProtocol
from .faults import Fault
from .launch import configure
from .listen import BACKLOG, bind

__all__ = ["main", "make_engine", "run", "serve"]

_KEEP_ALIVE_S = 5  # vLLM's


def make_engine(name: str, options: dict[str, Any]) -> Engine:
    """Build an engine from plain values, as read from the pipe.

    Parameters
    ----------
    name : {"echo", "openvino", "wordllama"}
    options : dict
        As `swarmkit.local` takes them.
    """
    if name == "openvino":
        from .engines.openvino import OpenVinoEngine

        return OpenVinoEngine(**options)
    if name == "wordllama":
        from .engines.wordllama import WordLlamaEngine

        return WordLlamaEngine(**options)
    options = dict(options)
    base = {key: options.pop(key) for key in Speed.__slots__ if key in options}
    speeds = {address: Speed(**{**base, **speed}) for address, speed in options.pop("speeds", {}).items()}
    return EchoEngine(**options, speed=Speed(**base), speeds=speeds)


def _make_app(config: dict[str, Any]) -> App:
    options = dict(config["server_options"])
    options["faults"] = tuple(Fault(**fault) for fault in options.get("faults", ()))
    options["models"] = tuple(options.get("models", ()))
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
        # Running requests end with finish_reason "abort", as vLLM's do at a shutdown.
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
        Called as soon as requests are accepted.
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
    """Serve as a child process, until the parent ends or SIGTERM arrives.

    Parameters
    ----------
    config : dict
        From `swarmkit.server.launch.configure`.
    """
    # Native code of an engine prints to stdout, which must not mix with the report.
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
    os._exit(0)  # at once, whatever the event loop and the engine are doing


def serve(
    *,
    engine: Literal["auto", "echo", "openvino", "wordllama"] = "auto",
    model: str | os.PathLike[str] | None = None,
    addresses: int | Sequence[str] = 1,
    port: int = 8000,
    token: str | None = None,
    **options: Any,
) -> None:
    """Serve in the foreground, until Ctrl-C or SIGTERM.

    Prints the addresses to stdout, and the key if it was generated here; a given one is not printed.

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
        The port is in use.
    """
    config = configure(engine, model, addresses, port, 1, options)
    key = token or secrets.token_urlsafe(24)
    sockets = bind(config["addresses"], port)
    app = _make_app({**config, "token": key})

    def ready() -> None:
        first, last = _url(sockets[0]), _url(sockets[-1])
        where = first if first == last else f"{len(sockets)} addresses, {first} to {last}"
        by = "" if config["engine"] == app.engine.model else f" ({config['engine']})"
        print(f"serving {app.engine.model}{by} at {where}")
        shown = "KEY, with the key it was given" if token else key
        print(f"Every request needs the header  Authorization: Bearer {shown}", flush=True)

    try:
        run(app, sockets, ready)
    except KeyboardInterrupt:
        print("stopped")


def _url(sock: socket.socket) -> str:
    host, port = sock.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
