"""Real endpoints on this machine: child processes that serve on loopback and never outlive their parent."""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import importlib.util
import json
import os
import secrets
import selectors
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import IO, Any, Literal, Self

import swarmkit
from swarmkit.errors import SettingError, SwarmError
from swarmkit.hostfile import AgentEndpoint

from .faults import Fault

__all__ = ["LocalServerError", "LocalSwarm", "local"]

_START_S = 180.0
_STOP_S = 3.0
# The path is the parent's, so that the child finds the same swarmkit; -I keeps the folder it starts in,
# which may hold a json.py of the user's, out of it until then. The package is set up bare, without running its
# __init__: that imports pandas, which takes half a second and 70 MB that a server has no use for.
_BOOT = """
import sys, json, types
config = json.loads(sys.stdin.readline())
sys.path[:] = config["path"]
package = sys.modules["swarmkit"] = types.ModuleType("swarmkit")
package.__path__, package.__version__ = config["package"], config["version"]
from swarmkit.local.serve import main
main(config)
"""
_OPTIONS = {
    "echo": ("latency_s", "tokens_per_s", "max_num_seqs", "speeds", "max_model_len", "bos", "trim"),
    "openvino": ("max_model_len", "max_num_seqs", "cache_gb", "threads", "exact"),
    "server": ("lists", "tokenize", "stream_interval", "batch_chat", "faults"),
}


class LocalServerError(SwarmError, RuntimeError):
    """A local server did not start; the message has the last lines it wrote."""


class _Process:
    """One child and the pipes to it."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        # Open as long as the child may run; a file never fills up, as a pipe that nobody reads would.
        self.log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed by close()
        self.popen = subprocess.Popen(
            [sys.executable, "-I", "-c", _BOOT],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            start_new_session=True,
        )
        assert self.popen.stdin is not None
        boot = {
            "path": [entry or os.getcwd() for entry in sys.path],
            "package": list(swarmkit.__path__),
            "version": swarmkit.__version__,
        }
        with contextlib.suppress(BrokenPipeError):  # it died at once: waiting for its report says why
            self.popen.stdin.write(json.dumps({**config, **boot}).encode() + b"\n")
            self.popen.stdin.flush()

    def report(self, deadline: float) -> dict[str, Any]:
        """Wait for the line that says it serves, and on which ports."""
        assert self.popen.stdout is not None
        with selectors.DefaultSelector() as selector:  # select() itself ends at file number 1024
            selector.register(self.popen.stdout, selectors.EVENT_READ)
            ready = selector.select(max(0.0, deadline - time.monotonic()))
        line = self.popen.stdout.readline() if ready else b""
        if line:
            return dict(json.loads(line))
        why = "did not start in time" if not ready else "ended before it served"
        raise LocalServerError(f"a local server {why}. It wrote:\n{self.last_lines()}")

    def last_lines(self, count: int = 15) -> str:
        """End of what it wrote to stderr."""
        self.log.seek(0, os.SEEK_END)
        self.log.seek(max(0, self.log.tell() - 8192))
        text = self.log.read().decode(errors="replace").strip()
        return "\n".join(text.splitlines()[-count:]) or "(nothing)"

    def close(self) -> None:
        """Close our ends of the pipes; end-of-file alone would end the child."""
        for file in (self.popen.stdin, self.popen.stdout, self.log):
            if file:
                with contextlib.suppress(BrokenPipeError):
                    file.close()


class LocalSwarm:
    """Running local servers; made by `local`.

    A context manager that stops them at its end; without it they run until ``stop()`` or the end of this
    process, in whatever way it ends. A forked child of this process leaves them alone.

    Attributes
    ----------
    endpoints : list of AgentEndpoint
        One for each address listened on, key included.
    urls : list of str
        Their base addresses, without ``/v1``.
    processes : list of subprocess.Popen
        The servers.
    engine, model : str
        What answers, and the id it is served under.
    """

    def __init__(self, processes: Sequence[_Process], endpoints: Sequence[AgentEndpoint]) -> None:
        self._processes = list(processes)
        self._owner = os.getpid()
        self.endpoints = list(endpoints)
        self.engine = endpoints[0].tags["engine"]
        self.model = endpoints[0].tags["model"]
        _running.add(self)

    @property
    def urls(self) -> list[str]:
        """Base addresses of the endpoints."""
        return [endpoint.url for endpoint in self.endpoints]

    @property
    def processes(self) -> list[subprocess.Popen[bytes]]:
        """The child processes; empty once stopped."""
        return [process.popen for process in self._processes]

    def stop(self) -> None:
        """Stop the servers. Does nothing the second time, nor in a forked child."""
        if os.getpid() == self._owner:
            processes, self._processes = self._processes, []
            _running.discard(self)
            _stop(processes)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def __repr__(self) -> str:
        state = f"{len(self._processes)} processes" if self._processes else "stopped"
        what = f"{self.engine}, {len(self.endpoints)} endpoints from {self.urls[0]}"
        return f"LocalSwarm({what}, {state})"


# Held strongly: who has only the endpoints, or a pool made of them, still needs the servers.
_running: set[LocalSwarm] = set()


def _stop(processes: Sequence[_Process]) -> None:
    """Terminate, then kill."""
    for process in processes:
        process.popen.terminate()
    deadline = time.monotonic() + _STOP_S
    for process in processes:
        try:
            process.popen.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.popen.kill()
            process.popen.wait()
        process.close()


@atexit.register
def _stop_all() -> None:
    for swarm in list(_running):
        swarm.stop()


def _let_go() -> None:
    """In a forked child: close the pipes, else the servers would wait for the end of the child, too."""
    for swarm in list(_running):
        processes, swarm._processes = swarm._processes, []
        for process in processes:
            process.close()
            process.popen.returncode = 0  # not our child: nobody here may wait for it


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)


def local(
    n: int = 1,
    *,
    engine: Literal["auto", "echo", "openvino"] = "auto",
    model: str | os.PathLike[str] | None = None,
    addresses: int | Sequence[str] = 1,
    port: int = 0,
    token: str | None = None,
    **options: Any,
) -> LocalSwarm:
    """Start real OpenAI-compatible servers on this machine.

    Parameters
    ----------
    n : int, default 1
        Processes, one server each.
    engine : {"auto", "echo", "openvino"}
        ``openvino`` runs SmolLM2-135M-Instruct on the CPU; ``echo`` answers with the user's own text;
        ``auto`` takes openvino if it is installed.
    model : str or path, optional
        For openvino a GGUF file (fetched once and kept, if not given); for echo the id to serve under.
    addresses : int or sequence of str, default 1
        Loopback addresses that **each** process listens on: 127.0.0.1 and the following, or the ones given.
        Each is an endpoint of its own, so ``local(addresses=100)`` plays 100 endpoints with one process.
    port : int, default 0
        0 takes free ones; another needs ``n=1``.
    token : str, optional
        The API key; a random one by default.
    **options
        echo: ``latency_s``, ``tokens_per_s``, ``max_num_seqs`` and ``speeds`` (of single addresses:
        ``{"127.0.0.3": {"tokens_per_s": 5}}``), see `Speed`; ``max_model_len``, ``bos``, ``trim``, see
        `EchoEngine`. openvino: ``max_model_len``, ``max_num_seqs``, ``cache_gb``, ``threads``, ``exact``, see
        `OpenVinoEngine`. Both:
        ``lists``, ``tokenize``, ``stream_interval``, ``batch_chat``, see `ServerOptions`; ``faults``, a list
        of `Fault` or of texts for `Fault.parse`.

    Returns
    -------
    LocalSwarm
        With ``n`` times the number of addresses as ``endpoints``, process by process.

    Raises
    ------
    SettingError
        An unknown option, or an address that is not a loopback address.
    LocalServerError
        A server did not start, or this is Windows.

    Examples
    --------
    >>> with local(engine="echo") as swarm:
    ...     len(swarm.endpoints)
    1
    """
    if sys.platform == "win32":
        raise LocalServerError("local servers need Linux or macOS; on Windows, run them in WSL")
    if n < 1 or (port and n > 1):
        raise SettingError(f"n must be 1 or more, and 1 if a port is given: n={n}, port={port}")
    token = token or secrets.token_urlsafe(24)
    config = configure(engine, model, addresses, port, token, n, options)
    processes: list[_Process] = []
    try:
        processes += (_Process(config) for _ in range(n))
        deadline = time.monotonic() + _START_S
        reports = [process.report(deadline) for process in processes]
    except BaseException:
        for process in processes:
            process.popen.kill()
        _stop(processes)
        raise
    tags = {"engine": config["engine"], "model": reports[0]["model"]}
    endpoints = [
        AgentEndpoint(host, at, {**tags, "process": str(i)}, api_key=token)
        for i, report in enumerate(reports)
        for host, at in zip(config["addresses"], report["ports"], strict=True)
    ]
    return LocalSwarm(processes, endpoints)


def configure(
    engine: str,
    model: str | os.PathLike[str] | None,
    addresses: int | Sequence[str],
    port: int,
    token: str,
    n: int,
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """Check what was asked for, and make of it what goes through the pipe: plain values.

    Raises
    ------
    SettingError
        An unknown engine or option, or an address that is not a loopback address.
    ImportError
        The extra ``local`` is not installed.
    ModelFileError
        The model could not be fetched.
    """
    if not all(importlib.util.find_spec(module) for module in ("starlette", "uvicorn", "platformdirs")):
        raise ImportError('local endpoints need more packages: pip install "swarmkit-frames[local]"')
    from .listen import loopback_addresses

    hosts = loopback_addresses(addresses)
    name = _choose(engine)
    engine_options, server_options = _split(name, options)
    if name == "openvino":
        if not importlib.util.find_spec("openvino_genai"):
            raise ImportError('the openvino engine needs openvino-genai: pip install "swarmkit-frames[local]"')
        from .model import model_file

        engine_options = {"threads": max(1, _cores() // n), **engine_options, "model": str(model_file(model))}
    elif model is not None:
        engine_options["model"] = os.fspath(model)
    return {
        "engine": name,
        "engine_options": engine_options,
        "server_options": server_options,
        "addresses": hosts,
        "port": port,
        "token": token,
    }


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _choose(engine: str) -> str:
    if engine not in ("auto", "echo", "openvino"):
        raise SettingError(f"engine must be 'auto', 'echo' or 'openvino', not {engine!r}")
    if engine != "auto":
        return engine
    if importlib.util.find_spec("openvino_genai"):
        return "openvino"
    warnings.warn(
        "openvino-genai is not installed, so the local endpoints only echo their prompts; "
        'for a real model: pip install "swarmkit-frames[local]"',
        stacklevel=3,
    )
    return "echo"


def _split(engine: str, options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Tell the engine's options from the server's, as plain values."""
    known = (*_OPTIONS[engine], *_OPTIONS["server"])
    for name in options:
        if name not in known:
            raise SettingError(f"the {engine} engine has no option {name!r}; there are: {', '.join(known)}")
    of_server = {key: options[key] for key in _OPTIONS["server"] if key in options}
    if "faults" in of_server:
        of_server["faults"] = [dataclasses.asdict(fault) for fault in _faults(of_server["faults"])]
    of_engine = {key: value for key, value in options.items() if key not in of_server}
    if "speeds" in of_engine:
        of_engine["speeds"] = {address: _plain(speed) for address, speed in of_engine["speeds"].items()}
    return of_engine, of_server


def _plain(value: Any) -> dict[str, Any]:
    if dataclasses.is_dataclass(value):
        return dataclasses.asdict(value)  # type: ignore[arg-type] # an instance here, never the class
    return dict(value)


def _faults(faults: Iterable[Fault | str]) -> list[Fault]:
    return [Fault.parse(fault) if isinstance(fault, str) else fault for fault in faults]
