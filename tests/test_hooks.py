"""Who hears of an alarm: a real server and real commands; what fails is told, without the address."""

import json
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from orchestrator.nights.hooks import call, missing
from orchestrator.nights.suite import Hooks, Mail

MESSAGE = {"text": "Nightly small, 2026-03-01: alarm", "status": 3}


@pytest.fixture
def server() -> Iterator[tuple[str, list[bytes]]]:
    """(address, what was posted to it); it refuses the path /broken."""
    heard: list[bytes] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            heard.append(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(500 if self.path == "/broken" else 204)
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
    assert "NIGHTLY_HOOK is not set" in missing(hooks, {})[0]
    [text] = missing(hooks, {"NIGHTLY_HOOK": "hooks.example/secret"})
    assert "begins with http:// or https://" in text and "secret" not in text
    assert missing(hooks, {"NIGHTLY_HOOK": "https://hooks.example/x"}) == missing(Hooks(), {}) == []
