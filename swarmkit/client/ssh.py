"""Endpoints behind a login node: forwards of the system's ``ssh``, a Unix socket for each endpoint.

One connection carries all of them (``ssh -M``), so a login asks for one key and counts once on the login node. The
sockets lie in a folder that only this user can enter, where ports on 127.0.0.1 would be open to everybody on this
machine. ``ssh`` runs below a shell that waits for the end of a pipe: when this process ends, however it ends, the shell
ends ``ssh`` and removes the folder.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import shutil
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from ..errors import EndpointError, SettingError
from ..records import Failure, FailureKind
from .hostfile import AgentEndpoint

__all__ = ["Forwards", "host_of"]

_START_S = 30.0  # for a login, and for a command to the connection
_END_S = 5.0
_AT_ONCE = 256  # forwards of one command
_POLL_S = 0.02
_LONGEST_PAUSE_S = 60.0  # between two logins that fail: some hosts lock out who tries often
_LONGEST_FOLDER = 60  # characters: the path of a socket has 104 at most, of which ssh wants 17 for itself

# $1 is the folder; the rest is the command. The pipe is closed by the end of the process that holds its other end.
_UNDER_WATCH = """
folder=$1; shift
exec 3<&0
"$@" 3<&- </dev/null &
ssh=$!
{ read -r _ <&3; rm -rf -- "$folder"; kill "$ssh"; } 2>/dev/null &
watcher=$!
exec 3<&-
wait "$ssh"; code=$?
kill "$watcher" 2>/dev/null
exit "$code"
"""
_MASTER = (
    *("ssh", "-M", "-N"),
    *("-o", "BatchMode=yes"),  # nobody could answer a question
    *("-o", "ConnectTimeout=10", "-o", "ServerAliveInterval=5", "-o", "ServerAliveCountMax=3"),
    *("-o", "ControlPersist=no", "-o", "ClearAllForwardings=yes", "-o", "LogLevel=ERROR"),
)
_ASKS = ("Permission denied", "verification failed", "authentication", "passphrase")


class Forwards:
    """The forwards of a pool. They are made when they are first needed, and again when the connection was lost.

    Parameters
    ----------
    host : str
        Where endpoints are reached from, as the command ``ssh`` takes it.
    """

    def __init__(self, host: str) -> None:
        self.host = host
        self._thread = ThreadPoolExecutor(1, "swarmkit-ssh")  # where one waits for ssh: its jobs are done in turn
        self._closed = False
        self._folder: Path | None = None
        self._master: subprocess.Popen[bytes] | None = None
        self._sockets: dict[str, str] = {}  # by the address of a server as the login node knows it
        self._wanted: dict[str, None] = {}
        self._numbers = itertools.count(1)
        self._failed: Failure | None = None
        self._failures = 0  # since the last login
        self._not_before = 0.0

    async def socket_to(self, endpoint: AgentEndpoint) -> str:
        """The path of a socket that leads to an endpoint.

        Raises
        ------
        EndpointError
            There is no connection to the host, or it refuses the forward.
        """
        target = endpoint.host if endpoint.scheme == "unix" else endpoint.place
        if self._lives() and (path := self._sockets.get(target)):
            return path
        self._wanted[target] = None
        found = await asyncio.get_running_loop().run_in_executor(self._thread, self._make, target)
        if isinstance(found, Failure):
            raise EndpointError(replace(found, endpoint=endpoint.name))
        return found

    async def aclose(self) -> None:
        """End the connection and all forwards."""
        self._closed = True
        if (master := self._hang_up()) is not None:  # no other thread waits: at the end of the interpreter none starts
            for _ in range(round(_END_S / _POLL_S)):
                if master.poll() is not None:
                    break
                await asyncio.sleep(_POLL_S)
        self._thread.shutdown(wait=False)

    # ---- in the thread ------------------------------

    def _make(self, target: str) -> str | Failure:
        if not self._lives():
            self._sockets.clear()
            if (failure := self._log_in()) is not None:
                return failure
        if target not in self._sockets and (failure := self._forward(target)) is not None:
            return failure
        return self._sockets[target]

    def _lives(self) -> bool:
        return self._master is not None and self._master.poll() is None

    def _log_in(self) -> Failure | None:
        if self._failed and time.monotonic() < self._not_before:
            return self._failed
        self._end()
        self._folder = folder = _folder()
        command = [*_MASTER, "-S", str(folder / "control"), "--", self.host]
        with (folder / "errors").open("wb") as errors:
            self._master = subprocess.Popen(
                ["sh", "-c", _UNDER_WATCH, "swarmkit-ssh", str(folder), *command],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                start_new_session=True,  # Ctrl-C in a terminal interrupts the run, not its connection
            )
        end = time.monotonic() + _START_S
        while self._lives() and not self._closed and time.monotonic() < end:
            if (folder / "control").exists():
                self._failed, self._failures = None, 0
                return None
            time.sleep(_POLL_S)
        self._failed = self._why(folder)
        self._failures += 1
        self._not_before = time.monotonic() + min(_LONGEST_PAUSE_S, 2.0**self._failures)
        self._end()
        return self._failed

    def _why(self, folder: Path) -> Failure:
        """What a login failed with, and what to do about it."""
        host, said = self.host, ""
        with contextlib.suppress(OSError):  # the folder is removed when the pool is closed
            said = (folder / "errors").read_bytes()[-2000:].decode(errors="replace").strip()
        words = said.splitlines()[-1].strip() if said else f"no answer within {_START_S:g} s"
        if any(sign in words for sign in _ASKS):
            advice = (
                f"Nobody can answer a question here: load your key (ssh-add), put it there (ssh-copy-id {host}), or "
                f"trust the host by `ssh {host}` once by hand, until `ssh -o BatchMode=yes {host} true` works"
            )
            return Failure(FailureKind.DENIED, f"ssh to {host}: {words}. {advice}")
        return Failure(FailureKind.CONNECT, f"ssh to {host}: {words}")

    def _forward(self, target: str) -> Failure | None:
        """Make the forward to a server, and those that are wanted meanwhile."""
        assert self._folder is not None
        targets = list(dict.fromkeys([target, *list(self._wanted)[: _AT_ONCE - 1]]))
        made = {each: str(self._folder / str(next(self._numbers))) for each in targets}
        command = ["ssh", "-F", "none", "-S", str(self._folder / "control"), "-O", "forward"]
        for each, path in made.items():
            self._wanted.pop(each, None)
            command += ["-L", f"{path}:{each}"]
        try:
            done = subprocess.run(
                [*command, "--", self.host],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=_START_S,
                check=False,
            )
            why = done.stderr.decode(errors="replace").strip() or "it does not say why"
        except subprocess.TimeoutExpired:
            why = f"no answer within {_START_S:g} s"
        self._sockets |= {each: path for each, path in made.items() if os.path.exists(path)}
        if target in self._sockets:
            return None
        return Failure(FailureKind.CONNECT, f"ssh to {self.host} makes no forward to {target}: {why}")

    def _hang_up(self) -> subprocess.Popen[bytes] | None:
        """Close the pipe, upon which the shell ends ssh and removes the folder."""
        master, self._master = self._master, None
        if master is not None and master.stdin is not None:
            master.stdin.close()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)  # the shell is gone where ssh had ended before
            self._folder = None
        return master

    def _end(self) -> None:
        if (master := self._hang_up()) is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                master.wait(_END_S)


def host_of(via: object) -> str:
    """The host of a ``via=``, as the command ``ssh`` takes it.

    Raises
    ------
    SettingError
        It names none, or there is no such command.

    Examples
    --------
    >>> host_of("ssh:login-node")
    'login-node'
    """
    text = via if isinstance(via, str) else ""
    host = text if text.startswith("ssh://") else text.removeprefix("ssh:")
    named = host.removeprefix("ssh://")
    if named == "" or not text.startswith("ssh:") or named.startswith("-") or not host.isprintable() or " " in host:
        raise SettingError(
            f"via={via!r}: must be 'ssh:HOST', where HOST is what you would type after the command ssh: a name of your "
            "~/.ssh/config, user@host, or ssh://user@host:port"
        )
    if shutil.which("ssh") is None:
        raise SettingError(f"via={via!r} needs the command ssh, which is not in $PATH: install OpenSSH's client")
    return host


def _folder() -> Path:
    usual = tempfile.gettempdir()
    place = usual if len(usual) <= _LONGEST_FOLDER else "/tmp"
    return Path(tempfile.mkdtemp(prefix="swarmkit-ssh-", dir=place))
