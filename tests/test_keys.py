"""Keys reach the endpoints they are for and nothing else; words of servers are text wherever they are shown."""

import asyncio
import copy
import inspect
import json
import pickle
import re
import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import FrozenInstanceError, asdict, astuple, replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from IPython.core.ultratb import VerboseTB
from scripted import Call, Scripted
from test_cli import environment, run

import swarmkit as sk
from swarmkit.client.error_replies import Malformed, StreamFailed
from swarmkit.client.hostfile import write_hostfile
from swarmkit.client.keys import Key
from swarmkit.records import Failure, FailureKind

HOSTILE = "no such model\x1b]0;owned\x07\x1b[2J\r\u202e\x9b31m"
FAST = sk.RetryPolicy(base_s=0.01, cap_s=0.02)


def listing(call: Call, *names: str) -> None:
    call.reply(json.dumps({"data": [{"id": name} for name in names or ("m",)]}).encode())


def is_harmless(text: str) -> bool:
    return all(c.isprintable() or c == "\n" for c in text)


# ---- words of servers ------------------------------


def test_what_a_server_says_cannot_control_a_terminal() -> None:
    def script(call: Call) -> None:
        if "GET /v1/models" in call.headers:
            listing(call)
        else:
            call.reply(json.dumps({"error": {"message": HOSTILE}}).encode(), "400 Bad Request")

    df = pd.DataFrame({"x": ["a", "b"]})
    with Scripted(script) as server, sk.connect(server.address, chat=None, retry=FAST) as pool:
        with pytest.warns(sk.SwarmWarning, match=r"\\x1b\[2J") as warned:
            frame = df.swarm.scatter("{x}", pool=pool)
        with pytest.raises(sk.ScatterError, match="no such model") as raised:
            df.swarm.scatter("{x}", pool=pool, on_error="raise")
        story = sk.last_run().story().to_csv()
    assert r"no such model\x1b]0;owned\x07\x1b[2J" in frame["response_error"][0]
    for shown in (str(warned[0].message), str(raised.value), *frame["response_error"], story):
        assert is_harmless(shown), shown


def test_names_of_models_are_words_of_servers_too() -> None:
    with Scripted(lambda call: listing(call, f"one{HOSTILE}", f"two{HOSTILE}")) as server:
        with sk.connect(server.address) as pool, pytest.raises(sk.SettingError, match=r"one.*\\x1b\[2J") as several:
            MANY.swarm.scatter("x", pool=pool)
        assert is_harmless(repr(pool))
        with pytest.raises(sk.NoEndpointsError, match=r"it serves one.*\\x1b\[2J") as another:
            sk.connect(server.address, model="mine")
        probed = run("probe", "--format", "csv", "--url", "http://{}:{}".format(*server.address))
        assert "one" in probed.stdout
        assert is_harmless(probed.stdout)
    assert is_harmless(str(several.value))
    assert is_harmless(str(another.value))
    many = [f"m{i}{HOSTILE}" for i in range(60)]
    with Scripted(lambda call: listing(call, *many)) as server:
        with sk.connect(server.address) as pool, pytest.raises(sk.SettingError, match="the nearest of 60: ") as near:
            MANY.swarm.scatter("x", pool=pool, model="m9")
        assert is_harmless(str(near.value))


def test_a_long_message_is_cut_and_one_line() -> None:
    failure = Failure(FailureKind.SERVER, "x" * 100_000 + "\n", "node1:8000")
    assert len(failure.describe()) < 1200
    assert failure.describe().endswith("xxx ...")
    assert Failure(FailureKind.SERVER, failure.message) == Failure(FailureKind.SERVER, failure.message)


# ---- where keys come from ------------------------------

KEY = "sk-a-key-nobody-may-see"
TICKET = "ticket-nobody-may-see"
MANY = pd.DataFrame({"x": [f"row {i}" for i in range(40)]})


def bearer(call: Call) -> str:
    found = re.search(r"^authorization: bearer (.*?)\r?$", call.headers, re.IGNORECASE | re.MULTILINE)
    return found[1] if found else ""


def answering(seen: list[str], then: Callable[[], None] = lambda: None) -> Callable[[Call], None]:
    """A script that notes the keys, and answers."""

    def script(call: Call) -> None:
        seen.append(bearer(call))
        if "GET" in call.headers:
            listing(call)
        else:
            then()  # before the answer, since the next request reads the key at once
            call.answer()

    return script


def test_a_key_may_be_a_text_a_file_a_function_or_a_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "token").write_text(f"\ufeff{KEY}\n")  # as editors of Windows write it
    monkeypatch.setenv("SWARMKIT_TEST_KEY", KEY)
    seen: list[str] = []
    with Scripted(answering(seen)) as server:
        host, port = server.address
        (tmp_path / "h.hostfile").write_text(f"{host} {port} key_env=SWARMKIT_TEST_KEY")
        for target, key in (
            (server.address, KEY),
            (server.address, tmp_path / "token"),
            (server.address, lambda: KEY),
            (sk.AgentEndpoint(host, port, api_key=tmp_path / "token"), None),
            (sk.AgentEndpoint(host, port, api_key=lambda: KEY), "another"),
            (tmp_path / "h.hostfile", "another"),
        ):
            seen.clear()
            with sk.connect(target, api_key=key) as pool:
                assert set(seen) == {KEY}
                (endpoint,) = pool.endpoints
                assert KEY not in f"{endpoint!r} {endpoint!s} {vars(endpoint)} {endpoint._repr_html_()}"
                assert endpoint.key() == KEY
        done = run("probe", "--url", f"http://{host}:{port}", "--api-key-file", tmp_path / "token")
        assert done.returncode == 0, done.stderr
        assert seen[-1] == KEY


@pytest.mark.parametrize("kind", ["file", "function"])
def test_a_token_that_is_renewed_in_mid_run_is_the_one_that_is_sent(tmp_path: Path, kind: str) -> None:
    file = tmp_path / "token"
    file.write_text("first")
    source = file if kind == "file" else file.read_text
    seen: list[str] = []
    with Scripted(answering(seen, lambda: file.write_text("second"))) as server:
        options = {"chat": None, "batch": sk.BatchPolicy(max_size=8, max_in_flight=1), "key_ttl": 0}
        with sk.connect(server.address, api_key=source, **options) as pool:
            assert MANY.swarm.scatter("{x}", pool=pool)["response"].notna().all()
    assert seen[0] == "first"
    assert seen[-1] == "second"


def test_a_token_file_that_is_just_being_rewritten_does_not_end_a_run(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text(KEY)
    seen: list[str] = []
    states = iter([file.unlink, file.touch])
    with Scripted(answering(seen, lambda: next(states, lambda: None)())) as server:
        options = {"chat": None, "batch": sk.BatchPolicy(max_size=8, max_in_flight=1)}
        with sk.connect(server.address, api_key=file, **options) as pool:
            assert MANY.swarm.scatter("{x}", pool=pool)["response"].notna().all()
    assert file.read_text() == ""
    assert set(seen) == {KEY}


class Vault:
    """Where keys are renewed: the server takes only the newest one, and makes a new one every so many answers."""

    def __init__(self, every: int = 3, refusal: str = "401 Unauthorized") -> None:
        self.refusal = refusal
        self.every, self.number, self.answered, self.refused, self.calls = every, 1, 0, 0, 0
        self.threads: set[str] = set()
        self.file: Path | None = None

    @property
    def key(self) -> str:
        return f"sk-number-{self.number}"

    def give(self) -> str:
        self.calls += 1
        self.threads.add(threading.current_thread().name)
        return self.key

    async def give_later(self) -> str:
        await asyncio.sleep(0)
        return self.give()

    def script(self, call: Call) -> None:
        if bearer(call) != self.key:
            self.refused += 1
            words = "Forbidden" if self.refusal.startswith("403") else "Token expired"  # which says what is forbidden
            call.reply(json.dumps({"error": words}).encode(), self.refusal)
        elif "GET" in call.headers:
            listing(call)
        else:
            self.answered += 1
            self.number += self.answered % self.every == 0
            if self.file is not None:
                self.file.write_text(self.key)
            call.answer()


def commands(folder: Path, monkeypatch: pytest.MonkeyPatch, **words: list[str]) -> None:
    """A settings file with these commands."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(folder))
    (folder / "swarmkit").mkdir(exist_ok=True)
    lines = [f"{name} = {json.dumps(words)}" for name, words in words.items()]
    (folder / "swarmkit" / "settings.toml").write_text("\n".join(["[key_commands]", *lines]))


@pytest.mark.parametrize(
    ("kind", "refusal"),
    [
        *(("function", "401 Unauthorized"), ("coroutine", "401 Unauthorized"), ("file", "401 Unauthorized")),
        *(("hostfile: file", "401 Unauthorized"), ("hostfile: command", "401 Unauthorized")),
        *(("function", "403 Forbidden"), ("file", "403 Forbidden"), ("function", "302 Found")),
        *(("function", "400 Bad Request"), ("file", "400 Bad Request"), ("function", "498 Invalid Token")),
    ],
)
def test_a_key_that_is_refused_in_mid_run_is_renewed_and_no_row_notices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, refusal: str
) -> None:
    vault = Vault(refusal=refusal)
    file = vault.file = tmp_path / "token"
    file.write_text(vault.key)
    target: Any
    with Scripted(vault.script) as server:
        host, port = server.address
        target, source = server.address, {"function": vault.give, "coroutine": vault.give_later}.get(kind, file)
        if kind.startswith("hostfile"):
            monkeypatch.setenv("SWARMKIT_KEY_HOSTS", host)
            commands(tmp_path, monkeypatch, printed=["cat", str(file)])
            target, source = tmp_path / "h.hostfile", None
            target.write_text(f"{host} {port} " + ("key_file=./token" if "file" in kind[9:] else "key_cmd=printed"))
        batch = sk.BatchPolicy(max_size=4, max_in_flight=1)
        with sk.connect(target, api_key=source, chat=None, batch=batch, delivery="batch") as pool:
            frame = MANY.swarm.scatter("{x}", pool=pool, progress=False)
            stats = pool.last_run
    assert frame["response"].notna().all()
    assert stats is not None
    assert stats.failed_requests == 0, "a refused request is sent again with the new key"
    assert vault.refused <= vault.number, "once for each key"
    if "vault" in repr(source).lower():
        assert vault.calls <= 2 * vault.number, "a key is used as long as it is accepted"
        assert vault.threads == {"swarmkit-key"}, "off the event loop"


@pytest.mark.filterwarnings("ignore::swarmkit.SwarmWarning")
def test_a_key_is_not_asked_for_again_and_again_for_prompts_that_a_gateway_forbids() -> None:
    vault = Vault(every=10**9, refusal="403 Forbidden")
    expired = threading.Event()

    def script(call: Call) -> None:
        if "POST" in call.headers and any(prompt.endswith("7") for prompt in call.prompts):
            return call.reply(b'{"error": {"message": "flagged"}}', "403 Forbidden")
        if vault.answered == 150 and not expired.is_set():
            expired.set()
            vault.number += 1
        return vault.script(call)

    frame = pd.DataFrame({"x": [f"row {i}" for i in range(200)]})
    with Scripted(script) as server, sk.connect(server.address, api_key=vault.give, chat=None, retry=FAST) as pool:
        answers = frame.swarm.scatter("{x}", pool=pool, mode="single", progress=False, on_error="column")
    failed = answers["response_error"].notna()
    assert frame["x"][failed].tolist() == [x for x in frame["x"] if x.endswith("7")]
    assert answers["response_error"][failed].str.contains("flagged").all()
    assert expired.is_set()
    assert vault.calls <= 6, "at first, when it is in doubt for the first time, and when it had run out"


@pytest.mark.filterwarnings("ignore::swarmkit.SwarmWarning")
@pytest.mark.parametrize(
    ("status", "error", "of_key"),
    [
        (400, {"message": "Incorrect API key provided: sk-1.", "code": "invalid_api_key"}, True),
        (400, {"message": "no", "type": "authentication_error"}, True),
        (400, {"message": "API key not valid. Please pass a valid API key.", "status": "INVALID_ARGUMENT"}, True),
        (400, {"message": "The token has expired"}, True),
        (498, {"message": "no"}, True),
        (400, {"message": "Invalid token id 151645 in the prompt"}, False),
        (400, {"message": "the prompt 'Invalid API key' is too long", "code": "invalid_prompt"}, False),
        (403, {"message": "flagged", "type": "moderation"}, False),
        (422, {"message": "Invalid API key"}, False),
    ],
)
def test_what_says_so_is_of_the_key(status: int, error: dict[str, str], of_key: bool) -> None:
    """Whatever else is refused is that of the one prompt in which it is found."""
    keys = iter(["old"])

    def script(call: Call) -> None:
        if "GET" in call.headers:
            listing(call)
        elif bearer(call) == "old" and call.prompts == ["row 1"]:
            call.reply(json.dumps({"error": error}).encode(), f"{status} no")
        else:
            call.answer()

    def key() -> str:
        return next(keys, "new" if of_key else "old")

    with Scripted(script) as server, sk.connect(server.address, api_key=key, chat=None, retry=FAST) as pool:
        frame = MANY.swarm.scatter("{x}", pool=pool, mode="single", progress=False, on_error="column")
    assert frame["response"].isna().sum() == (0 if of_key else 1)


def test_requests_share_one_call_of_a_slow_key_function() -> None:
    calls: list[float] = []

    def slow() -> str:
        calls.append(time.monotonic())
        time.sleep(0.3)
        return KEY

    seen: list[str] = []
    with (
        Scripted(answering(seen)) as one,
        Scripted(answering(seen)) as two,
        sk.connect([one.address, two.address], api_key=slow, chat=None) as pool,
    ):
        assert MANY.swarm.scatter("{x}", pool=pool, mode="single", progress=False)["response"].notna().all()
    assert len(calls) == 1
    assert set(seen) == {KEY}


def test_a_key_that_stays_refused_ends_the_run_and_says_which_one_and_what_to_do(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text(KEY)
    expires = Vault()

    def script(call: Call) -> None:
        if "GET" in call.headers or expires.answered < 2:
            expires.answered += "POST" in call.headers
            return listing(call) if "GET" in call.headers else call.answer()
        return call.reply(b'{"error": "Token expired."}', "401 Unauthorized")

    retry = sk.RetryPolicy(base_s=0.02, cap_s=0.1, give_up_s=0.6)
    batch = sk.BatchPolicy(max_size=4, max_in_flight=1)
    options: dict[str, Any] = {"api_key": file, "chat": None, "retry": retry, "batch": batch, "delivery": "batch"}
    said = r"Token expired: the key of file .*token is refused; as soon as it holds another one, that is sent"
    with Scripted(script) as server, Scripted(answering([])) as other:
        with sk.connect(server.address, **options) as pool, pytest.raises(sk.NoEndpointsError, match=said):
            MANY.swarm.scatter("{x}", pool=pool, progress=False)
        expires.answered = 0
        with (
            sk.connect([server.address, other.address], **options) as pool,
            pytest.warns(sk.SwarmWarning, match=said + ".*its rows are asked elsewhere"),
        ):
            frame = MANY.swarm.scatter("{x}", pool=pool, progress=False)
        expires.answered = 0
        with sk.connect([server.address, other.address], **options) as pool, pytest.warns(sk.SwarmWarning) as caught:
            MANY.swarm.tree_reduce("x", "{responses}", fanin=2, pool=pool, progress=False)
    assert frame["response"].notna().all()
    assert sum(str(each.message).count("is refused") for each in caught) == 1, "once, not for each level"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "missing",
            r"command missing of .* is not known: write missing = .* below \[key_commands\] in .*settings.toml",
        ),
        ("fails", "command fails of .* ended with exit code 3: run it by hand to see why"),
        ("nowhere", "command nowhere of .* cannot be run: No such file or directory"),
        ("lines", "command lines of .* holds a line break"),
        ("silent", "command silent of .* is empty"),
    ],
)
def test_a_command_that_gives_no_key_is_said_and_not_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, words: str
) -> None:
    shell = {"fails": f"echo {KEY}; echo {KEY} >&2; exit 3", "lines": f"echo {KEY}; echo {KEY}", "silent": "true"}
    found = {key: ["sh", "-c", text] for key, text in shell.items()}
    commands(tmp_path, monkeypatch, nowhere=["/nowhere/program"], **found)
    with pytest.raises(sk.SettingError, match=words) as caught:
        sk.connect(f"127.0.0.1:9 key_cmd={name}")
    assert_hidden(caught.value)


@pytest.mark.parametrize("tag", ["key_file=~/.ssh/token", "key_cmd=globus"])
def test_files_and_commands_of_a_hostfile_are_for_hosts_that_the_user_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tag: str
) -> None:
    file, again = tmp_path / "agents.hostfile", tmp_path / "again.hostfile"
    file.write_text(f"https://gateway.example/llm rack=a {tag}\n")
    with pytest.raises(sk.HostfileError, match=r"line 1: it asks for the key of (file|command) .*SWARMKIT_KEY_HOSTS"):
        sk.parse_hostfile(file)
    monkeypatch.setenv("SWARMKIT_KEY_HOSTS", "*.example")
    (endpoint,) = sk.parse_hostfile(file)
    write_hostfile(again, [endpoint])
    assert sk.parse_hostfile(again)[0].api_key.source == endpoint.api_key.source
    assert pickled(endpoint).api_key.source == endpoint.api_key.source
    for wrong in (f"{tag} key_env=SWARMKIT_X", "key_file=nobody-may-see", "key_cmd=nobody/may/see"):
        file.write_text(f"https://gateway.example/llm {wrong}\n")
        with pytest.raises(sk.HostfileError, match=r"line 1: .*(key_env|path|name of a command)") as caught:
            sk.parse_hostfile(file)
        assert_hidden(caught.value)


def test_an_old_key_is_hidden_too_where_a_server_repeats_it(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text(KEY)

    def script(call: Call) -> None:
        if "GET" in call.headers:
            listing(call)
        else:
            file.write_text("another")  # before the refusal arrives
            call.reply(json.dumps({"error": f"the key {bearer(call)} is too old"}).encode(), "400 Bad Request")

    with (
        Scripted(script) as server,
        sk.connect(server.address, api_key=file, chat=None, retry=FAST) as pool,
        pytest.raises(sk.SettingError, match=r"the key \(the key\) is too old") as refused,
    ):
        MANY[:1].swarm.scatter("{x}", pool=pool)
    assert KEY not in str(refused.value)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (Path("/nowhere/token"), "file /nowhere/token of 127.0.0.1:9 cannot be read: No such file or directory"),
        (Path("/dev/null"), "file /dev/null of 127.0.0.1:9 is empty"),
        (lambda: None, "function of 127.0.0.1:9 is of type NoneType"),
        (lambda: [][0], "function of 127.0.0.1:9 raised IndexError"),
        (b"sk-bytes-nobody-may-see", "api_key of 127.0.0.1:9 is of type bytes: a key is a text, a path"),
        (f"{KEY}\n", "api_key of 127.0.0.1:9 holds a line break"),
        (lambda: f"Bearer {KEY}", "function of 127.0.0.1:9 begins with 'Bearer ', which is written before every key"),
        (f"{KEY}\xe9", "api_key of 127.0.0.1:9 holds a line break or a character that is not ASCII"),
    ],
    ids=["missing", "empty", "none", "raises", "bytes", "line break", "bearer", "not ascii"],
)
def test_a_key_that_cannot_be_read_is_said_and_not_shown(source: Any, words: str) -> None:
    with pytest.raises(sk.SettingError, match=re.escape(words)) as caught:
        sk.connect("127.0.0.1:9", api_key=source)
    assert_hidden(caught.value)


# ---- tracebacks ------------------------------


def chain(exc: BaseException) -> Iterator[BaseException]:
    found = [exc]
    for each in found:
        yield each
        found += [e for e in (each.__cause__, each.__context__) if e is not None and e not in found]


def views(exc: BaseException) -> Iterator[str]:
    """What tools show of an exception, and the variables of all frames of all that is chained to it."""
    trace = exc.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename == __file__:  # the frames of tests hold the keys
        trace = trace.tb_next
    exc = exc.with_traceback(trace)
    yield "".join(traceback.TracebackException.from_exception(exc, capture_locals=True).format())
    yield VerboseTB(theme_name="nocolor").text(type(exc), exc, trace)
    for each in chain(exc):
        yield f"{each} {each!r}"
        for frame, _ in traceback.walk_tb(each.__traceback__):
            yield from (f"{frame.f_code.co_qualname}: {name} = {value!r}" for name, value in frame.f_locals.items())


def assert_hidden(exc: BaseException) -> None:
    for view in views(exc):
        assert not re.search(r"nobody.may.see", view), view[-3000:]


def refusing(call: Call) -> None:
    call.reply(json.dumps({"error": call.headers}).encode(), "401 Unauthorized")


def resetting(call: Call) -> None:
    call.reset()


def babbling(call: Call) -> None:
    call.write(f"HTTP/1.1 {call.headers}\r\n\r\n".encode())


def silent(call: Call) -> None:
    call.wait_for_the_end()


def failing_later(call: Call) -> None:
    if "GET" in call.headers:
        listing(call)
    else:
        call.reply(json.dumps({"error": {"message": call.headers}}).encode(), "500 Internal Server Error")


@pytest.mark.parametrize("script", [refusing, resetting, babbling, silent], ids=lambda script: script.__name__)
def test_no_key_and_no_header_in_the_traceback_of_connect(script: Callable[[Call], None]) -> None:
    with Scripted(script) as server, pytest.raises(sk.NoEndpointsError) as caught:
        sk.connect(server.address, api_key=KEY, headers={"X-Ticket": TICKET}, probe_timeout=0.5)
    assert_hidden(caught.value)


@pytest.mark.parametrize("script", [refusing, resetting, babbling, failing_later], ids=lambda script: script.__name__)
def test_no_key_and_no_header_in_the_traceback_of_a_request(script: Callable[[Call], None]) -> None:
    """What is raised on swarmkit's own thread, with all that is chained to it."""
    from swarmkit.client import io_thread

    async def both(pool: sk.VLLMPool) -> list[BaseException]:
        transport, (endpoint,) = pool._core.transport(), pool.endpoints
        found: list[BaseException] = []
        for send in (
            lambda: transport.post(endpoint, "/v1/completions", b"{}"),
            lambda: transport.get(endpoint, "/nowhere"),
            lambda: anext(transport.stream(endpoint, "/v1/completions", b"{}")),
        ):
            try:
                await send()
            except BaseException as exc:  # noqa: BLE001 - to be looked at
                found.append(exc)
        return found

    headers = {"X-Ticket": TICKET}
    with Scripted(script) as server, sk.VLLMPool([server.address], "m", api_key=KEY, headers=headers) as pool:
        raised = io_thread.call(both(pool))
    assert len(raised) >= 2
    for exc in raised:
        assert isinstance(exc, sk.errors.EndpointError)
        assert_hidden(exc)
    causes = [type(exc.__cause__).__name__ for exc in raised if exc.__cause__]
    assert causes or script in (refusing, babbling, failing_later), "the cause is kept where it shows nothing"


def test_no_key_in_the_traceback_of_a_verb_of_an_interrupt_or_of_a_bug() -> None:
    def broken(row: Any) -> str:
        raise ZeroDivisionError

    with Scripted(failing_later) as server:
        pool = sk.connect(server.address, api_key=KEY, headers={"X-Ticket": TICKET}, chat=None, retry=FAST)
        with pool, pytest.raises((sk.ScatterError, sk.NoEndpointsError)) as failed:
            MANY.swarm.scatter("{x}", pool=pool, on_error="raise")
        with pytest.raises(sk.PoolClosedError) as closed:
            MANY.swarm.scatter("{x}", pool=pool)
        with pytest.raises(sk.PromptError) as bug:
            MANY.swarm.scatter(broken, pool=pool)
    for caught in (failed, closed, bug):
        assert_hidden(caught.value)


@pytest.mark.parametrize(
    "wrong",
    [{"X-Ticket": f"{TICKET}\n"}, {"X-Ticket": TICKET.encode()}, {"X Ticket": TICKET}, {"Connection": TICKET}],
    ids=["line break", "bytes", "name", "not for users"],
)
def test_a_header_that_cannot_be_sent_is_said_and_not_shown(wrong: Any) -> None:
    with pytest.raises(sk.SettingError, match=r"X-Ticket|X Ticket|Connection") as caught:
        sk.connect("127.0.0.1:9", headers=wrong)
    assert_hidden(caught.value)
    with pytest.raises(sk.SettingError) as caught:
        sk.VLLMPool(["127.0.0.1:9"], headers=wrong)
    assert_hidden(caught.value)


def test_no_key_in_the_traceback_of_servers_that_do_not_start() -> None:
    with pytest.raises(sk.server.launch.LocalServerError) as caught, socket.create_server(("127.0.0.1", 0)) as taken:
        sk.local(1, engine="echo", port=taken.getsockname()[1], token=KEY)
    assert_hidden(caught.value)


# ---- hostfiles ------------------------------


@pytest.mark.parametrize(
    "line",
    [
        f"node1 8000 {KEY}",
        f"node1 8000 tag={KEY}",
        f"node1 8000 {KEY}=",
        f"node1 {KEY}",
        f"node1:{KEY}",
        f"node1:8000 {KEY}",
        f"node1 8000 api_key={KEY}",
        f"node1 8000 API-Key={TICKET}",
        f"node1 8000 access_token={TICKET}",
        f"node1 8000 Password={TICKET}",
        f"node1 8000 {TICKET}",
        f"node1 8000 a=1 {TICKET}",
        f"node1 {TICKET}",
        f"node1 8000 key_env={KEY}",
        f"node1 8000 key_env={TICKET}",
        "node1 8000 key_env=AKIANOBODYMAYSEE nobody-may-see",
        f"https://me:{TICKET}@node1",
        f"https://{TICKET}@node1",
        f"https://node1/v1?key={TICKET}",
        f"https://node1#{TICKET}",
        f"node1:8000/{KEY}",
        f"{KEY}",
        f"https://[{TICKET}",
        f"{TICKET}://node1",
        f"node[{KEY}]:8000",
        f"node[1-{TICKET}] 8000",
    ],
)
def test_a_hostfile_with_a_key_in_it_is_refused_and_the_key_is_not_shown(tmp_path: Path, line: str) -> None:
    file = tmp_path / "agents.hostfile"
    file.write_text(f"node0 8000\n{line}\n")
    with pytest.raises(sk.HostfileError, match="line 2") as caught:
        sk.connect(file)
    assert_hidden(caught.value)
    if re.search(r"//.*[@?#]|sk-", line) and " " not in line:
        with pytest.raises(sk.HostfileError) as caught:
            sk.connect(line)
        assert not re.search(r"nobody.may.see", str(caught.value))


def test_a_hostfile_that_is_no_text_shows_nothing_of_it(tmp_path: Path) -> None:
    file = tmp_path / "agents.hostfile"
    file.write_bytes(KEY.encode() + b"\xff\xfe")
    with pytest.raises(sk.HostfileError, match="not a text file") as caught:
        sk.connect(file)
    assert_hidden(caught.value)


HOSTS = {
    "gateway.example": True,
    "other.example, Gateway.Example.": True,
    "*.example": True,
    "": False,
    "*": False,
    "*.": False,
    "example": False,
    "*.gateway.example": False,
    "*gateway.example": False,
    "teway.example": False,
    "gateway.example.org": False,
}


@pytest.mark.parametrize("hosts", HOSTS)
def test_the_openai_key_goes_to_hosts_that_the_user_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hosts: str
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("SWARMKIT_KEY_HOSTS", hosts)
    file = tmp_path / "agents.hostfile"
    file.write_text("node0 8000 key_env=VLLM_API_KEY\nhttps://gateway.example/llm key_env=OPENAI_API_KEY\n")
    if HOSTS[hosts]:
        assert sk.parse_hostfile(file)[1].key() == KEY
        return
    words = r"line 2: .*\$OPENAI_API_KEY.*gateway\.example.*set SWARMKIT_KEY_HOSTS=gateway\.example"
    for read in (sk.parse_hostfile, sk.connect, sk.wait_until_ready, lambda path: sk.connect([path])):
        with pytest.raises(sk.HostfileError, match=words) as caught:
            read(file)
        assert_hidden(caught.value)


def test_hosts_named_in_code_are_named_and_a_key_given_in_code_is_sent_instead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    seen: list[str] = []
    file = tmp_path / "agents.hostfile"
    with Scripted(answering(seen)) as server, Scripted(answering([])) as other:
        host, port = server.address
        file.write_text(f"{host} {port} key_env=OPENAI_API_KEY")
        with pytest.raises(sk.HostfileError, match="SWARMKIT_KEY_HOSTS=127"):
            sk.connect(file)
        assert seen == []
        sk.connect(file, api_key="mine")
        assert set(seen) == {"mine"}
        seen.clear()
        sk.connect([file, f"{host}:{other.address[1]}"])
        assert set(seen) == {KEY}
        seen.clear()
        sk.connect(sk.AgentEndpoint(host, port, key_env="OPENAI_API_KEY"))
        assert set(seen) == {KEY}
        sk.connect(f"{host}:{port} key_env=OPENAI_API_KEY")
        done = run("probe", "--hostfile", file, env=environment(OPENAI_API_KEY=KEY))
        assert done.returncode == 2
        assert "SWARMKIT_KEY_HOSTS=127.0.0.1" in done.stderr


# ---- pools ------------------------------


def test_a_pool_of_one_call_is_never_the_default_of_another_thread(echo: sk.LocalSwarm) -> None:
    asked, go_on = threading.Event(), threading.Event()

    def script(call: Call) -> None:
        asked.set()
        go_on.wait(20)
        if "GET" in call.headers:
            listing(call)
        else:
            call.answer()

    with Scripted(script) as server, sk.connect(echo) as default:
        df = pd.DataFrame({"x": ["a"]})
        verb = threading.Thread(
            target=lambda: df.swarm.scatter("{x}", pool=[server.address], chat=None, progress=False)
        )
        verb.start()
        assert asked.wait(20)
        here = df.swarm.scatter("{x}", details=True)  # while the other call connects
        sk.connect(default)
        go_on.set()
        verb.join(20)
        assert here["response_endpoint"][0] in [e.name for e in echo.endpoints]
        assert repr(default) in repr(df.swarm), "the default is the one that was set last"


# ---- copies and pickles ------------------------------

FAILURE = Failure(FailureKind.BUSY, "queue full", "node1:8000", 503, 2.0)


def pickled(thing: Any) -> Any:
    return pickle.loads(pickle.dumps(thing))


def ours() -> list[type[BaseException]]:
    from swarmkit import errors
    from swarmkit.client import chat_template
    from swarmkit.server import engines, launch, model_file, requests

    places = [errors, chat_template, launch, model_file, requests, engines.base]
    found = {
        kind
        for place in places
        for _, kind in inspect.getmembers(place, inspect.isclass)
        if issubclass(kind, BaseException) and kind.__module__.startswith("swarmkit")
    }
    return sorted({*found, Malformed, StreamFailed}, key=lambda kind: kind.__name__)


@pytest.mark.parametrize("kind", ours(), ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("again", [pickled, copy.copy, copy.deepcopy])
def test_every_exception_survives_pickling_with_its_attributes(kind, again) -> None:
    exc = kind(FAILURE) if issubclass(kind, (sk.errors.EndpointError, StreamFailed)) else kind("what, and what to do")
    if hasattr(exc, "frame"):
        exc.frame = pd.DataFrame({"x": [1]})
    exc.add_note("seen in the night")
    twin = again(exc)
    assert type(twin) is kind
    assert str(twin) == str(exc)
    assert twin.__notes__ == exc.__notes__
    assert getattr(twin, "failure", None) == getattr(exc, "failure", None)
    if hasattr(exc, "frame"):
        pd.testing.assert_frame_equal(twin.frame, exc.frame)


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy])
def test_a_copy_keeps_its_key(again: Callable[[Any], Any]) -> None:
    tags = {"rack": "a"}
    for endpoint in (
        sk.AgentEndpoint("node1", 8000, tags, api_key=KEY),
        sk.AgentEndpoint("node1", 8000, tags, api_key=lambda: KEY),
    ):
        twin = again(endpoint)
        assert (twin, twin.key()) == (endpoint, KEY)
        assert twin.tags == tags
    assert (twin.tags is tags) == (again is copy.copy)


def test_a_pickle_carries_no_key_and_the_name_of_what_holds_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWARMKIT_TEST_KEY", KEY)
    file = tmp_path / "token"
    file.write_text(KEY)
    for given, kept in (
        ({"api_key": KEY}, None),
        ({"api_key": lambda: KEY}, None),
        ({"api_key": file}, KEY),
        ({"key_env": "SWARMKIT_TEST_KEY"}, KEY),
        ({"api_key": KEY, "key_env": "SWARMKIT_TEST_KEY"}, KEY),
    ):
        endpoint = sk.AgentEndpoint("node1", **given)
        endpoint.key()
        data = pickle.dumps(endpoint)
        assert KEY.encode() not in data
        assert pickle.loads(data).key() == kept
    with pytest.raises(sk.SettingError, match="name a file or a variable"):
        pickle.dumps(Key(KEY))


def test_an_endpoint_passes_its_key_on_and_does_not_show_it(tmp_path: Path) -> None:
    (tmp_path / "token").write_text(KEY)
    for given in (KEY, tmp_path / "token", lambda: KEY):
        endpoint = sk.AgentEndpoint("node1", api_key=given)
        for same in (replace(endpoint, port=9), sk.AgentEndpoint("node2", api_key=endpoint.api_key)):
            assert same.key() == KEY
        for shown in (endpoint, endpoint.api_key, asdict(endpoint), astuple(endpoint), vars(endpoint)):
            assert KEY not in repr(shown)
    assert sk.AgentEndpoint("node1").api_key is None
    with pytest.raises(FrozenInstanceError):
        endpoint.api_key = "another"
