"""Who hears of an alarm: a real server and real commands; what fails is told, without the address."""

import json
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from orchestrator.nights import hooks as hooks_module
from orchestrator.nights.hooks import call, find_missing
from orchestrator.nights.suite import Hooks, Mail

MESSAGE = {"text": "Nightly small, 2026-03-01: alarm", "status": 3}


@pytest.fixture
def server() -> Iterator[tuple[str, list[bytes]]]:
    """(address, what was posted to it); it refuses the path /broken, and redirects /moved."""
    heard: list[bytes] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            heard.append(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response({"/broken": 500, "/moved": 302}.get(self.path, 204))
            self.send_header("Location", "/elsewhere")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{http.server_port}", heard
        http.shutdown()
        thread.join()


def test_a_webhook_gets_the_message(server: tuple[str, list[bytes]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NIGHTLY_HOOK", f"{server[0]}/a/secret")
    assert call(Hooks(webhook="NIGHTLY_HOOK"), MESSAGE, "") == [("webhook", "")]
    assert [json.loads(body) for body in server[1]] == [MESSAGE]


def test_a_webhook_that_fails_is_told_without_its_secret(
    server: tuple[str, list[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NIGHTLY_HOOK", f"{server[0]}/broken")
    assert "127.0.0.1 answered 500" in call(Hooks(webhook="NIGHTLY_HOOK"), MESSAGE, "")[0][1]
    monkeypatch.setenv("NIGHTLY_HOOK", "http://127.0.0.1:1/a/secret")
    [(_, why)] = call(Hooks(webhook="NIGHTLY_HOOK"), MESSAGE, "")
    assert "127.0.0.1 cannot be reached" in why and "secret" not in why


def test_commands_and_mail_get_it_as_their_input_and_a_failure_does_not_stop_the_next(tmp_path: Path) -> None:
    def keep(name: str) -> tuple[str, ...]:
        return sys.executable, "-c", f"import sys; open({str(tmp_path / name)!r}, 'w').write(sys.stdin.read())"

    failing = (sys.executable, "-c", "import sys; sys.exit('no space left')")
    mail = Mail(to="team@example.org", command=keep("mail"))
    [(_, why), (_, fine)] = call(Hooks(command=failing, mail=mail), MESSAGE, "# The report ± 1\n")
    assert "ended with status 1: no space left" in why and fine == ""
    assert "Subject: Nightly small, 2026-03-01: alarm" in (tmp_path / "mail").read_text()
    assert "To: team@example.org" in (tmp_path / "mail").read_text()
    assert call(Hooks(command=keep("json")), MESSAGE, "") == [("command", "")]
    assert json.loads((tmp_path / "json").read_text()) == MESSAGE
    assert "could not be run" in call(Hooks(command=("/nothing/there",)), MESSAGE, "")[0][1]


def test_an_address_that_is_not_there_is_a_mistake_beforehand() -> None:
    hooks = Hooks(webhook="NIGHTLY_HOOK")
    assert "NIGHTLY_HOOK is not set" in find_missing(hooks, {})[0]
    [text] = find_missing(hooks, {"NIGHTLY_HOOK": "hooks.example/secret"})
    assert "begins with http:// or https://" in text and "secret" not in text
    assert find_missing(hooks, {"NIGHTLY_HOOK": "https://hooks.example/x"}) == find_missing(Hooks(), {}) == []


# ---- Servers and commands that behave badly --------------------------------------------------------------------


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hooks_module, "TIMEOUT_S", 1.0)


@pytest.fixture
def answering() -> Iterator[Callable[[bytes], str]]:
    """Starts a server that answers whoever calls with these bytes, again and again until the caller leaves."""
    listeners: list[socket.socket] = []

    def serve(listener: socket.socket, answer: bytes) -> None:
        try:
            caller, _ = listener.accept()
            with caller:
                caller.recv(100)
                while True:
                    caller.sendall(answer)
                    time.sleep(0.05)
        except OSError:
            return  # the test is over, or the caller left

    def start(answer: bytes) -> str:
        listener = socket.create_server(("127.0.0.1", 0))
        listeners.append(listener)
        threading.Thread(target=serve, args=(listener, answer), daemon=True).start()
        return f"http://127.0.0.1:{listener.getsockname()[1]}/a/secret"

    yield start
    for listener in listeners:
        listener.close()


def failure(monkeypatch: pytest.MonkeyPatch, url: str) -> str:
    """Why the webhook at this address failed; the address is nowhere in it."""
    monkeypatch.setenv("NIGHTLY_HOOK", url)
    [(hook, why)] = call(Hooks(webhook="NIGHTLY_HOOK"), MESSAGE, "")
    assert hook == "webhook" and why and "secret" not in why and why.isprintable() and len(why) < 500
    return why


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (b"\x00\xff garbage\r\n" * 10, "something else than HTTP"),
        (b"HTTP/1.1 999999 \xff\r\n\r\n", "something else than HTTP"),
        (b"HTTP/1.1 500 " + b"x" * 10_000 + b"\r\n\r\n", "500 xxx"),
        (b"x" * 100_000, "something else than HTTP"),
        (b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * 200 + b"\r\n", "something else than HTTP"),
        (b"H", "did not answer within 1 s"),  # a byte now and then, for ever
    ],
)
@pytest.mark.usefixtures("short")
def test_a_server_that_answers_anything_else_is_a_failed_hook(
    answering: Callable[[bytes], str], monkeypatch: pytest.MonkeyPatch, answer: bytes, told: str
) -> None:
    assert told in failure(monkeypatch, answering(answer))


@pytest.mark.usefixtures("short")
def test_a_server_that_hangs_up_or_says_nothing_is_a_failed_hook(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        assert "did not answer" in failure(monkeypatch, f"http://127.0.0.1:{port}/secret")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        hanging_up = threading.Thread(target=lambda: listener.accept()[0].close())
        hanging_up.start()
        why = failure(monkeypatch, f"http://127.0.0.1:{port}/secret")
        assert why.startswith("127.0.0.1")
        hanging_up.join()


def test_a_redirect_is_a_failed_hook_and_not_followed_without_the_message(
    server: tuple[str, list[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "127.0.0.1 answered 302" in failure(monkeypatch, f"{server[0]}/moved")
    assert [json.loads(body) for body in server[1]] == [MESSAGE]


def test_a_certificate_that_nobody_vouches_for_is_a_failed_hook(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    words = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost", "-days", "2"]
    subprocess.run([*words, "-keyout", str(key), "-out", str(certificate)], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)

    def serve(listener: socket.socket) -> None:
        try:
            context.wrap_socket(listener.accept()[0], server_side=True).close()
        except OSError:
            return  # the caller does not trust it

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, args=(listener,), daemon=True)
        thread.start()
        why = failure(monkeypatch, f"https://localhost:{listener.getsockname()[1]}/secret")
        assert "localhost cannot be reached" in why and "certificate" in why.lower()
        thread.join()


@pytest.mark.parametrize(
    "url",
    ["secret", "ftp://hooks.example/secret", "http://[secret", "http://hooks.example:secret/", "http:///secret",
     "https://hooks.example/a secret", "https://hooks.example/sécret", "https://user:secret@hooks.example/",
     "https://hooks.example/secret\r\nX-Header: 1", "http://" + "a" * 70 + ".example/secret"],
)  # fmt: skip
def test_an_address_that_is_none_is_a_mistake_beforehand_or_a_failed_hook(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for problem in find_missing(Hooks(webhook="NIGHTLY_HOOK"), {"NIGHTLY_HOOK": url}):
        assert "NIGHTLY_HOOK" in problem and "secret" not in problem
    if "a" * 70 not in url:  # that it is no host is only found by looking it up
        assert find_missing(Hooks(webhook="NIGHTLY_HOOK"), {"NIGHTLY_HOOK": url})
    failure(monkeypatch, url)  # the environment may have changed since


def command(*words: str) -> str:
    """Why a hook failed that runs this command."""
    [(_, why)] = call(Hooks(command=words), {**MESSAGE, "more": "x" * 200_000}, "")
    assert why.isprintable() and len(why) < 500
    return why


def python(code: str) -> str:
    return command(sys.executable, "-c", code)


def test_commands_may_print_what_they_like_and_need_not_read() -> None:
    assert python("import sys; sys.stdout.buffer.write(bytes(range(256)) * 4)") == ""
    output = python(r"import sys; sys.stdout.buffer.write(b'a\n\xff\xe4 off\n'); sys.exit(3)")
    assert "status 3: \ufffd\ufffd off" in output
    assert "status 3: xxx" in python("import sys; sys.stdout.write('x' * 50_000_000); sys.exit(3)")
    assert python("import os; os.close(0)") == ""
    assert "by the signal 9" in command("/bin/sh", "-c", "kill -9 $$")
    assert "could not be run" in command("a\0b")


def test_a_command_that_hangs_is_ended_with_all_that_it_has_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hooks_module, "TIMEOUT_S", 3.0)
    script = f"sleep 1000 & echo $$ $! > {tmp_path}/pids; yes"
    assert "did not end within 3 s" in command("/bin/sh", "-c", script)
    [parent, child] = (Path(f"/proc/{pid}/cmdline") for pid in (tmp_path / "pids").read_text().split())
    assert not parent.exists()
    for _ in range(600):
        if not (child.exists() and child.read_bytes()):  # one that nobody has waited for is there without words
            return
        time.sleep(0.05)
    pytest.fail("what it has started still runs")


def test_what_a_command_leaves_behind_is_not_waited_for() -> None:
    assert command("/bin/sh", "-c", "sleep 5 &") == ""


def test_a_mail_to_nobody_is_a_failed_hook() -> None:
    mail = Mail(to="team@example.org\nBcc: all@example.org", command=(sys.executable, "-c", ""))
    [(_, why)] = call(Hooks(mail=mail), MESSAGE, "# The report")
    assert "no mail can be made of it" in why
