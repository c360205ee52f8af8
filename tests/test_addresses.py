"""Addresses of every kind, in code and in hostfiles, and the ways to them: Unix sockets, zones, Azure, proxies, ssh."""

from __future__ import annotations

import base64
import os
import re
import socket
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from scripted import Call, Scripted
from test_keys import assert_hidden, listing, views

import swarmkit as sk
from swarmkit.client.hostfile import as_endpoint, write_hostfile

FAST = sk.RetryPolicy(max_attempts=1, give_up_s=0.1, base_s=0.01, quiet_s=1)
FRAME = pd.DataFrame({"q": [f"q{i}" for i in range(6)]})
PASSWORD = "pass-nobody-may-see"
AZURE = "https://lab.openai.azure.com/openai/deployments/gpt-4o"
VERSION = "api-version=2024-10-21"

# The text, the endpoint's name, and the URL that a chat is posted to.
ADDRESSES = [
    ("node1:8001", "node1:8001", "http://node1:8001/v1/chat/completions"),
    ("http://node1", "node1:80", "http://node1:80/v1/chat/completions"),
    ("http://node1:8000/v1/", "node1:8000", "http://node1:8000/v1/chat/completions"),
    ("HTTP://Node1:8000//v1//", "node1:8000", "http://node1:8000/v1/chat/completions"),
    ("http://node1:8000/v1/models", "node1:8000", "http://node1:8000/v1/chat/completions"),
    ("https://gate.example/models", "gate.example:443/models", "https://gate.example:443/models/v1/chat/completions"),
    ("https://gate.example/llm", "gate.example:443/llm", "https://gate.example:443/llm/v1/chat/completions"),
    ("https://gate.example/v1/chat/completions", "gate.example:443", "https://gate.example:443/v1/chat/completions"),
    ("https://gate.example/api/v1beta/openai/", "gate.example:443/api/v1beta/openai",
     "https://gate.example:443/api/v1beta/openai/chat/completions"),
    ("https://gate.example/api/chat/completions", "gate.example:443/api/chat/completions",
     "https://gate.example:443/api/chat/completions"),
    (f"{AZURE}?{VERSION}", "lab.openai.azure.com:443/openai/deployments/gpt-4o",
     f"https://lab.openai.azure.com:443/openai/deployments/gpt-4o/chat/completions?{VERSION}"),
    (f"{AZURE}/chat/completions?{VERSION}", "lab.openai.azure.com:443/openai/deployments/gpt-4o",
     f"https://lab.openai.azure.com:443/openai/deployments/gpt-4o/chat/completions?{VERSION}"),
    ("[::1]:8000", "[::1]:8000", "http://[::1]:8000/v1/chat/completions"),
    ("[fe80::1%25eth0]:8000", "[fe80::1%eth0]:8000", "http://[fe80::1%eth0]:8000/v1/chat/completions"),
    ("http://[fe80::1%eth0]:8000/v1", "[fe80::1%eth0]:8000", "http://[fe80::1%eth0]:8000/v1/chat/completions"),
    ("unix:/run/vllm.sock", "unix:/run/vllm.sock", r"http://\w{16}\.localhost/v1/chat/completions"),
    ("unix:///run/vllm.sock:/llm/", "unix:/run/vllm.sock:/llm", r"http://\w{16}\.localhost/llm/v1/chat/completions"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "name", "url"), ADDRESSES)
def test_an_address_in_code_and_in_a_hostfile(tmp_path: Path, text: str, name: str, url: str) -> None:
    endpoint = as_endpoint(text)
    assert endpoint.name == name
    asked = endpoint.address("/v1/chat/completions")
    assert asked == url or ("unix:" in text and re.fullmatch(url, asked))
    file = tmp_path / "a.hostfile"
    file.write_text(f"{text}\track=a proxy=http://squid:3128\n")
    (read,) = sk.parse_hostfile(file)
    assert (read.url, read.query, read.tags) == (endpoint.url, endpoint.query, {"rack": "a"})
    write_hostfile(file, [read])
    assert sk.parse_hostfile(file) == [read]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("unix:vllm.sock", "unix:/path/to.sock, or unix:/path/to.sock:/base"),
        ("http://node1?api_key=nobody-may-see", r"\?query of an address must not hold a key.*key_env=SWARMKIT_"),
        ("http://node1#nobody-may-see", "must not have a #fragment"),
        ("node1:8000?x=nobody-may-see", "as a URL, http://host:port/path"),
        ("[fe80::1%eth 0]:8000", "is not|no bracket that belongs to it"),
        (f"http://node1 proxy=http://me:{PASSWORD}@squid:3128", "must not hold a password.*in code"),
        (
            "http://node1 proxy=socks5://nobody-may-see:1080",
            "proxy= is not the address of an HTTP proxy: write http://",
        ),
        ("gopher://node1", "use http:// or https://, or unix:/path"),
    ],
)
def test_an_address_that_cannot_be(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "a.hostfile").write_text(text)
    for target in (text, tmp_path / "a.hostfile"):
        with pytest.raises(sk.HostfileError, match=words) as caught:
            sk.connect(target)
        assert "may-see" not in str(caught.value)


def model(call: Call) -> None:
    """A server of one model, with chats and lists."""
    listing(call) if call.headers.startswith("GET") else call.answer()


def header(call: Call, name: str) -> str:
    found = re.search(rf"^{name}: (.*?)\r?$", call.headers, re.IGNORECASE | re.MULTILINE)
    return found[1] if found else ""


def answers(pool: sk.VLLMPool) -> list[str]:
    return FRAME.swarm.scatter("q", pool=pool, progress=False)["response"].tolist()


class AtPath(Scripted):
    """A scripted endpoint on a Unix socket."""

    def __init__(self, script: Callable[[Call], None], path: Path) -> None:
        self.path = path
        super().__init__(script)

    def open(self) -> None:
        self._listener = listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(self.path))
        listener.listen(64)
        self._start(self._accept, listener)


# ---- Unix sockets ------------------------------


def test_servers_on_unix_sockets_are_endpoints_like_others(tmp_path: Path) -> None:
    def says(name: str) -> Callable[[Call], None]:
        def script(call: Call) -> None:
            paths[name].add(call.headers.split()[1])
            call.prompts = [f"{name}" for _ in call.prompts]
            model(call)

        return script

    paths: dict[str, set[str]] = {"a": set(), "b": set()}
    with AtPath(says("a"), tmp_path / "a.sock"), AtPath(says("b"), tmp_path / "b.sock"):
        file = tmp_path / "agents.hostfile"
        file.write_text(f"unix:{tmp_path}/a.sock rack=a\nunix:{tmp_path}/b.sock:/llm rack=b\n")
        with sk.connect(file, chat=None, retry=FAST) as pool:
            for name in "abab":  # over the connections that are there, too: none leads to the other server
                assert answers(pool.by_tag("rack", name)) == [f"echo: {name}"] * 6
            names = [endpoint.name for endpoint in sk.last_run().stats.endpoints]
        assert names == [f"unix:{tmp_path}/b.sock:/llm"]
    assert "/v1/models" in paths["a"]
    assert all(path.startswith("/llm/v") for path in paths["b"])
    (tmp_path / "c.sock").touch()
    for name, words in (("none.sock", "no such file or directory"), ("c.sock", "connection refused")):
        with pytest.raises(sk.NoEndpointsError, match=f"unix:.*{name}: cannot connect: {words}"):
            sk.connect(f"unix:{tmp_path / name}")


# ---- zones ------------------------------


class AtLoopback6(Scripted):
    def open(self) -> None:
        self._listener = listener = socket.create_server(("::1", 0), family=socket.AF_INET6, backlog=64)
        self.address = listener.getsockname()[:2]
        self._start(self._accept, listener)


def test_an_address_with_a_zone() -> None:
    try:
        server = AtLoopback6(model)
    except OSError:
        pytest.skip("this machine has no IPv6")
    zone = socket.if_nametoindex("lo")
    with server, sk.connect(f"[::1%25{zone}]:{server.address[1]}", chat=None, retry=FAST) as pool:
        assert answers(pool) == [f"echo: q{i}" for i in range(6)]
        assert pool.endpoints[0].name == f"[::1%{zone}]:{server.address[1]}"


# ---- Azure ------------------------------


@pytest.mark.parametrize("key", ["0123456789abcdef", "eyJ0eXAiOiJKV1QiLCJhbGciOi"])
def test_azure_gets_its_version_with_every_request_and_the_key_in_its_header(key: str) -> None:
    calls: list[Call] = []

    def script(call: Call) -> None:
        calls.append(call)
        if call.headers.startswith("POST /openai/deployments/gpt-4o/chat/completions?"):
            call.answer()
        else:
            call.reply(b'{"error": {"code": "404", "message": "Resource not found"}}', "404 Not Found")

    async def ask(pool: sk.VLLMPool) -> Any:
        client = pool.client(0)
        return await client.chat.completions.create(model="gpt-4o", messages=[{"role": "user", "content": "Hi"}])

    with Scripted(script) as server:
        base = f"http://127.0.0.1:{server.address[1]}/openai/deployments/gpt-4o/?{VERSION}"
        with pytest.warns(sk.SwarmWarning, match="taken on trust"):
            pool = sk.connect(base, api_key=key, model="gpt-4o", retry=FAST)
        with pool:
            assert answers(pool) == [f"echo: q{i}" for i in range(6)]
            from swarmkit.client import io_thread

            assert io_thread.call(ask(pool)).choices[0].message.content == "echo: Hi"
    assert calls
    sent = {(header(call, "api-key"), header(call, "authorization")) for call in calls}
    assert sent == {("", f"Bearer {key}") if key.startswith("eyJ") else (key, "")}
    assert all(call.headers.split()[1].endswith(f"?{VERSION}") for call in calls)


# ---- proxies ------------------------------


LOGIN = "Basic bWU6cGFzcy1ub2JvZHktbWF5LXNlZQ=="  # me:pass-nobody-may-see


def proxying(seen: list[str]) -> Callable[[Call], None]:
    """A proxy that wants a password, and answers in place of all servers."""

    def script(call: Call) -> None:
        seen.append(call.headers)
        if header(call, "proxy-authorization") == LOGIN:
            model(call)
        else:
            call.reply(b"<h1>ERR_CACHE_ACCESS_DENIED</h1>", "407 Proxy Authentication Required", "text/html")

    return script


def test_a_proxy_of_the_pool_of_an_endpoint_and_of_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    with Scripted(proxying(seen)) as server, Scripted(model) as plain:
        place = f"127.0.0.1:{server.address[1]}"
        monkeypatch.setenv("HTTP_PROXY", f"me:{PASSWORD}@{place}")  # as people have it: without a scheme
        for name in ("http_proxy", "no_proxy", "NO_PROXY"):
            monkeypatch.delenv(name, raising=False)
        endpoint = sk.AgentEndpoint("node.invalid", 8000, proxy=f"http://me:{PASSWORD}@{place}")
        for target, options in (
            ("node.invalid:8000", {"proxy": f"http://me:{PASSWORD}@{place}"}),
            (endpoint, {"proxy": "http://127.0.0.1:9"}),
            ("node.invalid:8000", {"trust_env": True}),
        ):
            seen.clear()
            with sk.connect(target, chat=None, retry=FAST, **options) as pool:
                assert answers(pool) == [f"echo: q{i}" for i in range(6)]
                assert "may-see" not in f"{pool!r} {pool.endpoints} {pool._core.http!r} {vars(pool._core.http)}"
            assert any(head.startswith("POST http://node.invalid:8000/v1/completions ") for head in seen)
        (tmp_path / "a.hostfile").write_text(f"node.invalid 8000 proxy=127.0.0.1:{plain.address[1]}\n")
        with sk.connect(tmp_path / "a.hostfile", chat=None, retry=FAST) as pool:
            assert answers(pool) == [f"echo: q{i}" for i in range(6)]


def babbling(call: Call) -> None:
    call.reply(f'{{"error": {{"message": "{call.headers!r}"}}}}'.encode(), "403 Forbidden")


@pytest.mark.parametrize("scheme", ["http", "https"])
@pytest.mark.parametrize("given", ["pool", "endpoint", "environment"])
def test_a_proxy_that_refuses_is_named_without_its_password(
    given: str, scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded = base64.b64encode(f"me:not-{PASSWORD}".encode()).decode()
    asks, says_no = "the proxy http://{} refused .*HTTP 407 .*It wants a user", "403"
    says_no += ".*it may be the proxy http://{} that says so" if scheme == "http" else ""
    for script, says in ((proxying([]), asks), (babbling, says_no)):
        with Scripted(script) as server:
            place = f"127.0.0.1:{server.address[1]}"
            proxy, options = f"http://me:not-{PASSWORD}@{place}", {}
            endpoint = sk.AgentEndpoint("node.invalid", 8000, scheme=scheme)
            if given == "pool":
                options["proxy"] = proxy
            elif given == "endpoint":
                endpoint = replace(endpoint, proxy=proxy)
            else:
                monkeypatch.setenv(f"{scheme}_proxy", proxy)
                options["trust_env"] = True
            with pytest.raises(sk.NoEndpointsError, match=says.format(place)) as caught:
                sk.connect(endpoint, **options)
        trace = caught.value.__traceback__
        while trace is not None and trace.tb_frame.f_code.co_filename == __file__:  # this frame holds the password
            trace = trace.tb_next
        assert_hidden(caught.value.with_traceback(trace))
        assert not [view for view in views(caught.value) if encoded in view]


def test_a_proxy_that_is_not_there_is_named() -> None:
    for proxy, words in (("127.0.0.1:9", "connection refused"), ("no-such.invalid:1", "[Nn]ame|resol")):
        with pytest.raises(
            sk.NoEndpointsError, match=f"cannot connect: the proxy http://{proxy} cannot be reached: .*({words})"
        ):
            sk.connect(["node.invalid:8000", "https://node.invalid"], proxy=f"http://me:{PASSWORD}@{proxy}")


def test_a_key_for_named_hosts_passes_no_proxy_that_is_not_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "nobody-may-see")
    monkeypatch.setenv("SWARMKIT_KEY_HOSTS", "gate.example")
    file = tmp_path / "a.hostfile"
    file.write_text("http://gate.example key_env=OPENAI_API_KEY proxy=http://evil.example:3128\n")
    with pytest.raises(sk.HostfileError, match=r"to be sent to evil\.example, a host that you have not named"):
        sk.parse_hostfile(file)
    file.write_text("https://gate.example key_env=OPENAI_API_KEY proxy=http://evil.example:3128\n")  # sees TLS only
    assert sk.parse_hostfile(file)[0].has_key()


# ---- ssh ------------------------------


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"via": "login-node"}, "must be 'ssh:HOST', where HOST is what you would type after the command ssh"),
        ({"via": "ssh:"}, "must be 'ssh:HOST'"),
        ({"via": "ssh://"}, "must be 'ssh:HOST'"),
        ({"via": "ssh://-oProxyCommand=touch"}, "must be 'ssh:HOST'"),
        ({"via": "ssh:-oProxyCommand=touch /tmp/x"}, "must be 'ssh:HOST'"),
        ({"via": "ssh:login", "proxy": "http://squid:3128"}, "via= and proxy= are two ways"),
        ({"proxy": " "}, "proxy= is not the address of an HTTP proxy"),
        ({"proxy": "squid 3128"}, "proxy= is not the address of an HTTP proxy"),
        ({"proxy": "ftp://nobody-may-see"}, "proxy= is not the address of an HTTP proxy: write http://host:port"),
        ({"cert": "/no/such.pem"}, r"cert='/no/such.pem' cannot be used: .*No such file.*certificate and its key"),
    ],
)
def test_ways_that_cannot_be(
    settings: dict[str, Any], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program(tmp_path / "ssh", "exit 1")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(sk.SettingError, match=words) as caught:
        sk.connect("127.0.0.1:9", **settings)
    assert "may-see" not in str(caught.value)


def program(path: Path, script: str) -> None:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


@pytest.mark.parametrize(
    ("said", "words"),
    [
        (
            "me@login: Permission denied (publickey,password).",
            "access denied: ssh to login: me@login: Permission denied .*ssh-add.*ssh-copy-id login.*BatchMode=yes",
        ),
        ("Host key verification failed.", "access denied: .*trust the host by `ssh login` once by hand"),
        (
            "ssh: connect to host login port 22: Connection refused",
            "cannot connect: ssh to login: ssh: connect to host login port 22: Connection refused",
        ),
    ],
)
def test_what_ssh_says_is_said_once_for_all_endpoints(
    said: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program(tmp_path / "ssh", f"echo asked >>{tmp_path}/asked; echo '{said}' >&2; exit 255")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    before = threading.active_count()
    with pytest.raises(sk.NoEndpointsError, match=f"(?s)none of the 50.*{words}.*and 40 more"):
        sk.connect([("node", port) for port in range(1, 51)], via="ssh:login")
    assert (
        tmp_path / "asked"
    ).read_text() == "asked\n"  # not once for each of them: some hosts lock out who tries often
    assert threading.active_count() <= before + 1
