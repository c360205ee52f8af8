"""Runs ``swarmkit WORDS`` in real processes that need not import pandas first.

A process that has everything imported forks once for each command: the command has its own memory, descriptors and
environment, and ends as any Python process does. Importing takes a second, and the tests run some hundred commands.
"""

import atexit
import functools
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

FORKS = """
import json, os, socket, sys
import pandas, swarmkit.cli.job, swarmkit.cli.main, swarmkit.frames.verbs

server = socket.socket(socket.AF_UNIX)
server.bind(sys.argv[1])
server.listen(64)
print("ready", flush=True)
while True:
    connection, _ = server.accept()
    if os.fork():
        connection.close()
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            pass
        continue
    words, environment, folder, *paths = json.loads(connection.makefile().readline())
    if child := os.fork():
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        connection.sendall(str(code).encode())
        os._exit(0)
    break
server.close()
connection.close()
os.chdir(folder)
os.environ.clear()
os.environ.update(environment)
for number, path in enumerate(paths):
    os.dup2(os.open(path, os.O_RDONLY if number == 0 else os.O_WRONLY), number)
sys.stdout = open(1, "w", encoding="utf-8", closefd=False)
sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", buffering=1, closefd=False)
sys.argv = ["swarmkit", *words]
sys.exit(swarmkit.cli.main.main())
"""


@functools.cache
def _forking() -> str:
    """The address of the process that forks, which ends with this one."""
    folder = tempfile.TemporaryDirectory(prefix="swarmkit-test-")
    address = str(Path(folder.name) / "socket")
    process = subprocess.Popen([sys.executable, "-c", FORKS, address], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
    atexit.register(folder.cleanup)
    atexit.register(process.kill)
    assert process.stdout
    assert process.stdout.readline() == b"ready\n"
    return address


def command(*words: object, env: dict[str, str], stdin: str = os.devnull) -> subprocess.CompletedProcess[str]:
    """Run ``swarmkit WORDS`` to its end; ``stdin`` is a file."""
    with (
        tempfile.NamedTemporaryFile() as out,
        tempfile.NamedTemporaryFile() as err,
        socket.socket(socket.AF_UNIX) as connection,
    ):
        connection.connect(_forking())
        connection.settimeout(90)
        job = [[*map(str, words)], env, str(Path.cwd()), stdin, out.name, err.name]
        connection.sendall(json.dumps(job).encode() + b"\n")
        code = int(connection.recv(16))
        texts = [Path(file.name).read_text("utf-8") for file in (out, err)]
    return subprocess.CompletedProcess(["swarmkit", *map(str, words)], code, *texts)
