"""The server process: reads its configuration from a pipe, serves, and ends when that pipe closes.

The pipe is its standard input. The parent holds the other end and nobody else does, so end-of-file means that
the parent is gone, however it went.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from typing import Any

from .echo import EchoEngine, Speed
from .engines import Engine
from .faults import Fault
from .listen import bind, run
from .server import App, ServerOptions

__all__ = ["main", "make_engine"]


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


def make_options(options: dict[str, Any]) -> ServerOptions:
    """Build the server's options from plain values."""
    faults = tuple(Fault(**fault) for fault in options.get("faults", ()))
    return ServerOptions(**{**options, "faults": faults})


def main(config: dict[str, Any]) -> None:
    """Serve until the parent is gone or SIGTERM comes.

    Parameters
    ----------
    config : dict
        ``engine``, ``engine_options``, ``server_options``, ``addresses``, ``port`` and ``token``.
    """
    # What the engine prints natively must not get between the lines of the report.
    report = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    sockets = bind(config["addresses"], config["port"])
    engine = make_engine(config["engine"], config["engine_options"])
    app = App(engine, make_options(config["server_options"]), config["token"])

    def ready() -> None:
        ports = [sock.getsockname()[1] for sock in sockets]
        report.write(json.dumps({"ports": ports, "model": engine.model}) + "\n")
        report.close()

    run(app, sockets, ready)


def _end_with_parent() -> None:
    while sys.stdin.buffer.read(4096):
        pass
    os._exit(0)  # at once, whatever the event loop and the engine are at
