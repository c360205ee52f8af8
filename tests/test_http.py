"""What users may set of HTTP: certificates, headers, a client of their own; and openai clients of endpoints."""

import asyncio
import contextlib
import http.server
import pickle
import re
import shutil
import socket
import ssl
import subprocess
import threading

import openai
import pandas as pd
import pytest
from needs import need
from scripted import Call, Scripted

import swarmkit as sk
from swarmkit.client import io_thread

KEY = "key-0123456789"
TICKET = "ticket-0123456789"
FAST = sk.RetryPolicy(max_attempts=1, give_up_s=0.1, quiet_s=1)


class Recorder(http.server.BaseHTTPRequestHandler):
    """Answers every GET with a list of one model, every POST with 401 and the headers it was sent."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.reply(200, b'{"object": "list", "data": [{"id": "m", "object": "model", "max_model_len": 100}]}')

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        words = " ".join(f"{name}={value}" for name, value in self.headers.items()).replace('"', "")
        self.reply(401, f'{{"error": {{"message": "refused: {words}"}}}}'.encode())

    def reply(self, status, body):
        self.server.seen.append({name.lower(): value for name, value in self.headers.items()})
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Set-Cookie", "server=7; Path=/")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def recorder():
    yield from serve()


def serve(context=None):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Recorder)
    server.seen = []
    server.url = f"{'https' if context else 'http'}://localhost:{server.server_port}"
    if context:
        server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


# ---- verify= ------------------------------


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """A certificate for localhost that only its own file vouches for, and its key."""
    return tls_files(tmp_path_factory.mktemp("tls"))


def tls_files(folder):
    need(shutil.which("openssl"), "the openssl command, to make a certificate")
    crt, key = folder / "server.pem", folder / "server.key"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost",
         "-addext", "subjectAltName=DNS:localhost", "-keyout", key, "-out", crt],
        check=True, capture_output=True,
    )  # fmt: skip
    return crt, key


@pytest.fixture
def https(certificate):
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(*certificate)
    yield from serve(context)


def as_path(crt):
    return crt


def as_text(crt):
    return str(crt)


def as_context(crt):
    return ssl.create_default_context(cafile=crt)


@pytest.mark.parametrize("given", [as_path, as_text, as_context])
def test_verify_says_which_certificates_are_trusted(https, certificate, given):
    with sk.connect(https.url, verify=given(certificate[0])) as pool:
        assert pool.model == "m"
    assert https.seen


def test_a_certificate_that_nobody_vouches_for_is_refused_in_words(https):
    with pytest.raises(sk.NoEndpointsError, match="certificate verify failed"):
        sk.connect(https.url)
    assert https.seen == []


# ---- cert=, proxy= ------------------------------


@pytest.fixture
def wants_a_certificate(certificate):
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=certificate[0])
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_cert_chain(*certificate)
    yield from serve(context)


def test_a_client_certificate_is_shown_to_servers_that_ask_for_it(wants_a_certificate, certificate, tmp_path):
    crt, key = certificate
    both = tmp_path / "both.pem"
    both.write_text(crt.read_text() + key.read_text())
    for cert in (certificate, (str(crt), str(key)), both):
        pool = sk.VLLMPool([wants_a_certificate.url], model="m", verify=crt, cert=cert)
        with pool, pickle.loads(pickle.dumps(pool)) as there:  # paths travel to workers
            assert asyncio.run(list_models(pool)) == asyncio.run(list_models(there)) == ["m"]
    with pytest.raises(sk.NoEndpointsError, match=r"(?i)certificate.required|closed the connection|reset|broken pipe"):
        sk.connect(wants_a_certificate.url, verify=crt)


def test_a_certificate_whose_key_is_encrypted_is_refused_and_nothing_is_asked_for(certificate, tmp_path):
    locked = tmp_path / "locked.key"
    subprocess.run(
        ["openssl", "rsa", "-aes256", "-passout", "pass:secret", "-in", certificate[1], "-out", locked],
        check=True, capture_output=True,
    )  # fmt: skip
    with pytest.raises(sk.errors.SettingError, match="the key must not be encrypted"):
        sk.VLLMPool(["https://localhost"], cert=(certificate[0], locked))
    with pytest.raises(sk.errors.SettingError, match="load_cert_chain"):
        sk.VLLMPool(["https://localhost"], cert=certificate, verify=ssl.create_default_context())


def tunnel(call: Call) -> None:
    """What a proxy does for https: it connects, and passes on what it does not understand."""
    host, port = re.match(r"CONNECT (\S+):(\d+) ", call.headers).groups()
    call.server.logins.append(re.findall(r"(?i)^proxy-authorization: (.*?)\r?$", call.headers, re.MULTILINE))
    if host != "localhost":
        call.reply(b"no", "503 Service Unavailable")
        return
    with socket.create_connection((host, int(port))) as there:
        call.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
        back = threading.Thread(target=pour, args=(there, call.connection))
        back.start()
        pour(call.connection, there)
        back.join()


def pour(one: socket.socket, other: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := one.recv(65536):
            other.sendall(data)
        other.shutdown(socket.SHUT_WR)


def test_https_passes_a_proxy_which_sees_its_own_password_only(https, certificate):
    with Scripted(tunnel) as proxy:
        proxy.logins = []
        address = f"http://me:secret@127.0.0.1:{proxy.address[1]}"
        with sk.connect(https.url, verify=certificate[0], proxy=address, api_key=KEY) as pool:
            assert asyncio.run(list_models(pool)) == ["m"]
        assert proxy.logins
        assert all(login == ["Basic bWU6c2VjcmV0"] for login in proxy.logins)
        assert {h["authorization"] for h in https.seen} == {f"Bearer {KEY}"}
        assert not [h for h in https.seen if "proxy-authorization" in h]
        words = (
            rf"cannot connect: the proxy http://127.0.0.1:{proxy.address[1]} could not connect to the server \(HTTP 503"
        )
        with pytest.raises(sk.NoEndpointsError, match=words):
            sk.connect("https://node.invalid", proxy=address)


# ---- headers= ------------------------------


def test_headers_are_sent_with_every_request_and_shown_nowhere(recorder):
    headers = {"X-Ticket": TICKET, "User-Agent": "campaign-7"}
    with sk.connect(recorder.url, headers=headers, api_key=KEY, chat=None, retry=FAST) as pool:
        with pytest.raises(sk.NoEndpointsError) as caught:
            pd.DataFrame({"x": ["a"]}).swarm.scatter("{x}", pool=pool)
        assert {h["x-ticket"] for h in recorder.seen} == {TICKET}
        assert {h["user-agent"] for h in recorder.seen} == {"campaign-7"}
        assert {h["authorization"] for h in recorder.seen} == {f"Bearer {KEY}"}
        assert "refused: " in str(caught.value)
        assert "x-ticket=(a header)" in str(caught.value)
        errors = [caught.value, *iter_causes(caught.value)]
        shown = [pool, pool._core, pool.client(0), pool._repr_html_(), caught.value.frame.to_csv(), *errors]
        assert not [s for s in shown if TICKET in repr(s) or TICKET in str(s) or KEY in repr(s) or KEY in str(s)]


def iter_causes(exc):
    while exc := exc.__cause__ or exc.__context__:
        yield exc


def test_an_authorization_of_the_headers_stands_in_for_keys(recorder):
    with sk.connect(recorder.url, headers={"authorization": "Basic abc"}, api_key=KEY) as pool:
        asyncio.run(list_models(pool))
    assert {h["authorization"] for h in recorder.seen} == {"Basic abc"}


def test_nothing_says_which_machine_asks_and_cookies_are_not_kept(recorder):
    async def twice():
        client = pool.client(0)
        return [await client.models.list() for _ in range(2)]

    with sk.connect(recorder.url) as pool:
        asyncio.run(twice())
    assert len(recorder.seen) >= 4
    for headers in recorder.seen:
        assert not [name for name in headers if name.startswith(("x-stainless", "openai", "authorization", "cookie"))]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"headers": {"X-A": "a\nb"}}, "the value of the header X-A holds a line break"),
        ({"headers": {"X A": "a"}}, "headers= has the name 'X A'"),
        ({"headers": {"X-A": 1}}, "the value of 'X-A' has the type int"),
        ({"headers": {"content-length": "1"}}, "headers= has content-length, which swarmkit sets itself: remove it"),
        ({"headers": "X-A: a"}, "headers= is a str"),
        ({"verify": "/no/such/file.pem"}, "verify='/no/such/file.pem' cannot be read as CA certificates"),
        ({"verify": False}, "verify=False: must be an ssl.SSLContext, the path"),
        ({"http_client": openai}, "http_client= is a module: must be an httpx2.AsyncClient"),
    ],
)
def test_settings_that_mean_nothing_are_refused_in_words(settings, words):
    with pytest.raises(sk.errors.SettingError, match=words):
        sk.VLLMPool(["127.0.0.1:9"], **settings)


def test_a_client_brings_its_own_trust():
    with pytest.raises(sk.errors.SettingError, match="give them to your http_client"):
        sk.VLLMPool(["127.0.0.1:9"], http_client=openai.DefaultAioHttpClient(), trust_env=True)


@pytest.mark.parametrize("settings", [{"headers": {"X-Ticket": TICKET}}, {"verify": ssl.create_default_context()}])
def test_what_belongs_to_this_process_is_not_pickled(settings):
    with pytest.raises(sk.errors.SettingError, match="cannot be sent to another process"):
        pickle.dumps(sk.VLLMPool(["127.0.0.1:9"], **settings))


# ---- http_client= ------------------------------


@pytest.mark.parametrize("make", [openai.DefaultAioHttpClient, openai.DefaultAsyncHttpxClient])
@pytest.mark.parametrize("delivery", ["rows", "batch"])
def test_a_client_of_the_users_is_used_and_left_open(echo, make, delivery):
    paths = []

    async def note(request):
        paths.append(request.url.path)

    mine = make(event_hooks={"request": [note]}, trust_env=False)
    with sk.connect(echo, http_client=mine, delivery=delivery) as pool:
        answers = pd.DataFrame({"i": range(20)}).swarm.scatter("n {i}", pool=pool)
        assert answers["response"].to_list() == [f"echo: n {i}" for i in range(20)]
        assert asyncio.run(list_models(pool)) == ["echo"]
    assert {"/v1/models", "/v1/completions"} <= set(paths)
    assert not mine.is_closed
    asyncio.run(pool.close(http_client=True))
    assert mine.is_closed


@pytest.mark.parametrize("make", [openai.DefaultAioHttpClient, openai.DefaultAsyncHttpxClient])
def test_failures_of_a_client_of_the_users_are_told_apart(make):
    mine = make(trust_env=False)
    with pytest.raises(sk.NoEndpointsError, match=r"cannot connect: .*(refused|failed)"):
        sk.connect("127.0.0.1:9", http_client=mine)
    io_thread.call(mine.aclose())


# ---- pool.client ------------------------------


async def list_models(pool):
    async with pool.client(0) as client:
        return [model.id async for model in client.models.list()]


def test_a_pool_gives_openai_clients_that_work_on_any_loop(echo):
    async def ask():
        client = pool.client(1)
        message = [{"role": "user", "content": "Hi"}]
        whole = await client.chat.completions.create(model="echo", messages=message)
        text = ""
        async for chunk in await client.chat.completions.create(model="echo", messages=message, stream=True):
            text += chunk.choices[0].delta.content or "" if chunk.choices else ""
        await client.close()
        return whole.choices[0].message.content, text

    with sk.connect(echo) as pool:
        for _ in range(2):  # a loop of its own each time
            assert asyncio.run(ask()) == ("echo: Hi", "echo: Hi")
            assert asyncio.run(list_models(pool)) == ["echo"]
        assert io_thread.call(list_models(pool)) == ["echo"]
        answers = pd.DataFrame({"i": range(3)}).swarm.scatter("n {i}", pool=pool)
        assert answers["response"].notna().all(), "closing a client leaves the pool's connections open"
        with pytest.raises(sk.errors.SettingError, match="endpoints are counted 0 to"):
            pool.client(99)
        left = pool.client(0)
    with pytest.raises(sk.PoolClosedError):
        asyncio.run(left.models.retrieve("echo"))


def test_openai_clients_raise_what_openai_raises():
    async def ask():
        await pool.client(0).models.list()

    with sk.VLLMPool(["127.0.0.1:9"]) as pool, pytest.raises(openai.APIConnectionError):
        asyncio.run(ask())


def test_nothing_of_the_openai_environment_reaches_an_endpoint_by_a_client(recorder, monkeypatch):
    for name in ("API_KEY", "ADMIN_KEY", "ORG_ID", "PROJECT_ID", "BASE_URL"):
        monkeypatch.setenv(f"OPENAI_{name}", "http://secret.invalid")
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", "X-Custom: secret\nAuthorization: secret")
    with sk.VLLMPool([recorder.url], headers={"X-Ticket": TICKET}) as pool:
        assert asyncio.run(list_models(pool)) == ["m"]
    with sk.VLLMPool([sk.AgentEndpoint("localhost", recorder.server_port, api_key=KEY)]) as pool:
        assert asyncio.run(list_models(pool)) == ["m"]
    assert "secret" not in repr(recorder.seen)
    first, second = recorder.seen
    assert first["x-ticket"] == TICKET
    assert "authorization" not in first
    assert second["authorization"] == f"Bearer {KEY}"
