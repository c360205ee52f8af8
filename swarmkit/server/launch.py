"""Real endpoints on this machine: child processes that serve on loopback, and end with their parent."""

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
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal, Self, get_args

from ..client.hostfile import AgentEndpoint
from ..client.keys import Key
from ..errors import SettingError, SwarmError
from ..text import plural
from ..version import __version__
from .faults import Fault
from .requests import Base64, Constraints, Logprobs

__all__ = ["LocalServerError", "LocalSwarm", "local"]

_START_S = 180.0
_STOP_S = 3.0
# The child uses the parent's sys.path, so that it imports the same swarmkit. Until then -I keeps the working folder
# off the path, since it may hold a json.py of the user's. The package is made without running its __init__: that
# imports pandas, which costs half a second and 70 MB that a server does not need.
_BOOT = """
import sys, json, types
config = json.loads(sys.stdin.readline())
sys.path[:] = config["path"]
package = sys.modules["swarmkit"] = types.ModuleType("swarmkit")
package.__path__, package.__version__ = config["package"], config["version"]
from swarmkit.server.serve import main
main(config)
"""
_OPTIONS = {
    "echo": (
        *("latency_s", "tokens_per_s", "max_num_seqs", "prefill_tokens_per_s", "slowdown", "speeds"),
        *("max_model_len", "bos", "trim", "thinking"),
    ),
    "openvino": ("max_model_len", "max_num_seqs", "cache_gb", "threads", "exact"),
    "wordllama": ("max_model_len",),
    "server": (
        *("lists", "tokenize", "stream_interval", "batch_chat", "constraints", "reasoning_parser", "logprobs"),
        *("models", "base64", "faults"),
    ),
}


class LocalServerError(SwarmError, RuntimeError):
    """A local server did not start; the message has the last lines of its output.

    Examples
    --------
    >>> try:
    ...     local(engine="echo", port=swarm.endpoints[0].port)  # which is in use
    ... except LocalServerError as error:
    ...     print(str(error).splitlines()[0])
    a local server ended before it was ready. Its last output:
    """


class _Process:
    """One child process and its pipes."""

    def __init__(self, config: Mapping[str, Any], key: Key) -> None:
        # A file, not a pipe: a pipe that nothing reads fills up and blocks the child.
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
            "package": [str(Path(__file__).parent.parent)],
            "version": __version__,
        }
        with contextlib.suppress(BrokenPipeError):  # the child ended at once: report() says why
            self.popen.stdin.write(json.dumps({**config, **boot, "token": key.reveal("a server")}).encode() + b"\n")
            self.popen.stdin.flush()

    def report(self, deadline: float) -> dict[str, Any]:
        """Wait for the line with the ports it listens on."""
        assert self.popen.stdout is not None
        with selectors.DefaultSelector() as selector:  # select() is limited to 1024 file descriptors
            selector.register(self.popen.stdout, selectors.EVENT_READ)
            ready = selector.select(max(0.0, deadline - time.monotonic()))
        line = self.popen.stdout.readline() if ready else b""
        if line:
            return dict(json.loads(line))
        why = "did not start in time" if not ready else "ended before it was ready"
        raise LocalServerError(f"a local server {why}. Its last output:\n{self.last_lines()}")

    def last_lines(self, count: int = 15) -> str:
        """The last lines of its stderr."""
        self.log.seek(0, os.SEEK_END)
        self.log.seek(max(0, self.log.tell() - 8192))
        text = self.log.read().decode(errors="replace").strip()
        return "\n".join(text.splitlines()[-count:]) or "(nothing)"

    def close(self) -> None:
        """Close this side of the pipes; the child ends at end-of-file."""
        for file in (self.popen.stdin, self.popen.stdout, self.log):
            if file:
                with contextlib.suppress(BrokenPipeError):
                    file.close()


class LocalSwarm:
    """Running local servers; made by `local`.

    A context manager that stops them on exit; otherwise they run until ``stop()``, or until this process ends,
    however it ends. A forked child of this process does not stop them.

    Attributes
    ----------
    endpoints : list of AgentEndpoint
        One for each address, with its key.
    urls : list of str
        Their base addresses, without ``/v1``.
    processes : list of subprocess.Popen
        The servers.
    engine, model : str
        The engine's name, and the id of its model.

    Examples
    --------
    >>> swarm = local(engine="echo", addresses=2)
    >>> swarm
    LocalSwarm(echo, 2 endpoints from http://127.0.0.1:..., 1 process)
    >>> len(swarm.urls), len(swarm.processes)
    (2, 1)
    >>> swarm.stop()
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
        state = plural(len(self._processes), "process", "processes") if self._processes else "stopped"
        what = f"{self.engine}, {plural(len(self.endpoints), 'endpoint')} from {self.urls[0]}"
        return f"LocalSwarm({what}, {state})"


# Strong references: a caller that keeps only the endpoints, or a pool of them, still needs the servers.
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


def _close_in_child() -> None:
    """In a forked child: close its copies of the pipes, or the servers would outlive the parent."""
    for swarm in list(_running):
        processes, swarm._processes = swarm._processes, []
        for process in processes:
            process.close()
            process.popen.returncode = 0  # not a child of this process: it must not be waited for


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)


def local(
    n: int = 1,
    *,
    engine: Literal["auto", "echo", "openvino", "wordllama"] = "auto",
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
        Number of processes, one server each.
    engine : {"auto", "echo", "openvino", "wordllama"}
        ``openvino`` runs SmolLM2-135M-Instruct on the CPU; ``echo`` answers with the user's own text, and draws vectors
        from its hash; ``wordllama`` gives vectors of 256 numbers, the mean of those of a text's tokens, and no text;
        ``auto`` is openvino if it is installed, else echo.
    model : str or path, optional
        For openvino a GGUF file (by default one that is downloaded once and kept); for echo the model's id.
    addresses : int or sequence of str, default 1
        Loopback addresses that **each** process listens on: 127.0.0.1 and the following, or the given ones.
        Each is an endpoint of its own, so ``local(addresses=100)`` makes 100 endpoints with one process.
    port : int, default 0
        0 takes free ports; another value needs ``n=1``.
    token : str, optional
        The API key; a random one by default.
    **options
        echo: ``latency_s``, ``tokens_per_s``, ``max_num_seqs``, ``prefill_tokens_per_s``, ``slowdown`` and ``speeds``
        (for single addresses: ``{"127.0.0.3": {"tokens_per_s": 5}}``), see `Speed`; ``max_model_len``, ``bos``,
        ``trim``, ``thinking``, see `EchoEngine`. openvino: ``max_model_len``, ``max_num_seqs``, ``cache_gb``,
        ``threads``, ``exact``, see `OpenVinoEngine`. wordllama: ``max_model_len``. All: ``lists``, ``tokenize``,
        ``stream_interval``, ``batch_chat``, ``constraints``, ``reasoning_parser``, ``logprobs``, ``models``,
        ``base64``, see `ServerOptions`;
        ``faults``, a list of `Fault` or of strings for `Fault.parse`.

    Returns
    -------
    LocalSwarm
        Its ``endpoints`` are ``n`` times the number of addresses, process by process.

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
    key, token = Key(token or secrets.token_urlsafe(24)), None  # tracebacks may show variables
    config = configure(engine, model, addresses, port, n, options)
    processes: list[_Process] = []
    try:
        processes += (_Process(config, key) for _ in range(n))
        deadline = time.monotonic() + _START_S
        reports = [process.report(deadline) for process in processes]
    except BaseException:
        for process in processes:
            process.popen.kill()
        _stop(processes)
        raise
    tags = {"engine": config["engine"], "model": reports[0]["model"]}
    endpoints = [
        AgentEndpoint(host, at, {**tags, "process": str(i)}, api_key=key)
        for i, report in enumerate(reports)
        for host, at in zip(config["addresses"], report["ports"], strict=True)
    ]
    return LocalSwarm(processes, endpoints)


def configure(
    engine: str,
    model: str | os.PathLike[str] | None,
    addresses: int | Sequence[str],
    port: int,
    n: int,
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """Check the arguments, and turn them into plain values for the pipe to the child.

    Raises
    ------
    SettingError
        An unknown engine or option, or an address that is not a loopback address.
    ImportError
        The extra ``local`` is not installed.
    ModelFileError
        The model could not be downloaded.
    """
    if not all(importlib.util.find_spec(module) for module in ("starlette", "uvicorn", "platformdirs")):
        raise ImportError('local endpoints need the extra "local": pip install "swarmkit-frames[local]"')
    from .listen import loopback_addresses

    hosts = loopback_addresses(addresses)
    name = _choose(engine)
    engine_options, server_options = _split(name, options)
    if name == "openvino":
        if not importlib.util.find_spec("openvino_genai"):
            raise ImportError('the openvino engine needs openvino-genai: pip install "swarmkit-frames[local]"')
        from .model_file import model_file

        engine_options = {"threads": max(1, _cores() // n), **engine_options, "model": str(model_file(model))}
    elif name == "wordllama":
        if model is not None:
            raise SettingError(f"the wordllama engine has one model; model={os.fspath(model)!r} is for the others")
        if missing := [m for m in ("wordllama", "safetensors", "tokenizers") if not importlib.util.find_spec(m)]:
            needed = ", ".join(missing)
            raise ImportError(f'the wordllama engine needs {needed}: pip install "swarmkit-frames[local]"')
    elif model is not None:
        engine_options["model"] = os.fspath(model)
    return {
        "engine": name,
        "engine_options": engine_options,
        "server_options": server_options,
        "addresses": hosts,
        "port": port,
    }


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _choose(engine: str) -> str:
    if engine not in ("auto", "echo", "openvino", "wordllama"):
        raise SettingError(f"engine must be 'auto', 'echo', 'openvino' or 'wordllama', not {engine!r}")
    if engine != "auto":
        return engine
    if importlib.util.find_spec("openvino_genai"):
        return "openvino"
    warnings.warn(
        "openvino-genai is not installed, so the local endpoints echo their prompts; "
        'for a real model: pip install "swarmkit-frames[local]"',
        stacklevel=3,
    )
    return "echo"


def _split(engine: str, options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Separate the engine's options from the server's, as plain values."""
    known = (*_OPTIONS[engine], *_OPTIONS["server"])
    for name in options:
        if name not in known:
            raise SettingError(f"the {engine} engine has no option {name!r}; its options are: {', '.join(known)}")
    of_server = {key: options[key] for key in _OPTIONS["server"] if key in options}
    for key, kind in (("constraints", Constraints), ("logprobs", Logprobs), ("base64", Base64)):
        allowed = get_args(kind)
        asked = of_server.get(key, "obey")
        if asked not in allowed:
            raise SettingError(f"{key} must be one of {', '.join(allowed)}, not {asked!r}")
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
