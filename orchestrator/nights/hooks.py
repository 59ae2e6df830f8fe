"""Telling somebody of an alarm: a webhook, a command, a mail. What fails is told, and changes nothing else."""

import http.client
import json
import os
import signal
import subprocess
import tempfile
import threading
import urllib.error
import urllib.request
from collections.abc import Mapping
from email.message import EmailMessage
from typing import IO, Any
from urllib.parse import urlsplit

from orchestrator.nights.suite import Hooks, Mail

TIMEOUT_S = 60.0  # for a hook to end
TAIL = 4096  # bytes of what a command prints last that are looked at
SHOWN = 300  # characters of what a hook says


def find_missing(hooks: Hooks, environment: Mapping[str, str]) -> list[str]:
    """What the hooks need and the environment does not give."""
    if hooks.webhook is None:
        return []
    where, url = f"hooks.webhook: {hooks.webhook}", environment.get(hooks.webhook, "")
    if not url:
        return [f"hooks.webhook: the environment variable {hooks.webhook} is not set; it holds the address to call"]
    try:
        parts = urlsplit(url)
        whole = parts.scheme in ("http", "https") and parts.hostname and (parts.port is None or parts.port > 0)
    except ValueError:
        whole = False
    if not whole:
        return [f"{where} does not hold an address that begins with http:// or https:// and a host"]
    if not (url.isascii() and url.isprintable()) or " " in url:
        return [f"{where} holds an address with signs that none has; write others than ASCII's as %xx"]
    if "@" in parts.netloc:
        return [
            f"{where} holds a user's name, which is not sent; take an address with a token in its path, or a command"
        ]
    return []


def call(hooks: Hooks, message: Mapping[str, Any], text: str) -> list[tuple[str, str]]:
    """(hook, why it failed or "") of every hook of the suite, each at its end after TIMEOUT_S seconds.

    `message` is plain data, with a line of its own under `text` as chats show it; `text` is the whole report.
    """
    content, called = json.dumps(message).encode(), list[tuple[str, str]]()
    if hooks.webhook:
        called.append(("webhook", _call_webhook(os.environ.get(hooks.webhook, ""), content)))
    if hooks.command:
        called.append(("command", _run_command(hooks.command, content)))
    if hooks.mail:
        called.append(("mail", _send_mail(hooks.mail, str(message["text"]), text)))
    return called


# ---- The webhook -----------------------------------------------------------------------------------------------


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Takes a redirect for a failure: followed, the message would become a GET without its content."""

    def redirect_request(self, *_: Any) -> None:
        return None


def _call_webhook(url: str, content: bytes) -> str:
    """Says nothing of the address but its host: the rest may be a secret."""
    answers: list[str] = []
    calling = threading.Thread(target=lambda: answers.append(_post(url, content)), name="webhook", daemon=True)
    calling.start()
    calling.join(TIMEOUT_S)
    return answers[0] if answers else f"{_find_host(url)} did not answer within {TIMEOUT_S:g} s"


def _post(url: str, content: bytes) -> str:
    host, headers = _find_host(url), {"Content-Type": "application/json"}
    try:
        request = urllib.request.Request(url, content, headers, method="POST")
        with urllib.request.build_opener(_NoRedirect).open(request, timeout=TIMEOUT_S):
            return ""
    except urllib.error.HTTPError as error:
        with error:
            elsewhere = "; it points elsewhere, and what it points to is not called: give that address" * (
                300 <= error.code < 400
            )
            return f"{host} answered {error.code} {_make_readable(str(error.reason))}{elsewhere}"
    except urllib.error.URLError as error:
        return f"{host} cannot be reached: {_make_readable(str(error.reason))}"
    except (http.client.InvalidURL, ValueError):  # whose texts hold the address
        return f"{host}: this is no address that can be called"
    except http.client.HTTPException as error:
        return f"{host} answered something else than HTTP ({_make_readable(repr(error))})"
    except OSError as error:
        return f"{host} did not answer: {_make_readable(str(error))}"


def _find_host(url: str) -> str:
    try:
        return urlsplit(url).hostname or "the webhook"
    except ValueError:
        return "the webhook"


# ---- Commands --------------------------------------------------------------------------------------------------


def _send_mail(mail: Mail, subject: str, text: str) -> str:
    message = EmailMessage()
    try:
        message["To"], message["Subject"] = mail.to, " ".join(subject.split())
        message.set_content(text)
        content = message.as_bytes()
    except ValueError as error:  # an address of several lines, or signs that are none
        return f"no mail can be made of it: {_make_readable(str(error))}"
    return _run_command(mail.command, content)


def _run_command(words: tuple[str, ...], given: bytes) -> str:
    """Runs a command in a session of its own; all that it has started there ends with its time."""
    with tempfile.TemporaryFile() as stdin:  # not a pipe: whether the command reads all of it is its own affair
        stdin.write(given)
        stdin.seek(0)
        try:
            process = subprocess.Popen(
                words, stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
            )
        except (OSError, ValueError) as error:
            return _make_readable(f"{words[0]} could not be run: {error}")
    assert process.stdout
    tail = bytearray()
    reading = threading.Thread(target=_keep_tail, args=(process.stdout, tail), name="hook", daemon=True)
    reading.start()
    try:
        status = process.wait(TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return f"{words[0]} did not end within {TIMEOUT_S:g} s, and was ended"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        reading.join(1)  # what the command has left running may keep the pipe open
    if status == 0:
        return ""
    how = f"by the signal {-status}" if status < 0 else f"with status {status}"
    lines = [line for line in bytes(tail).decode(errors="replace").splitlines() if line.strip()]
    return f"{words[0]} ended {how}" + "".join(f": {_make_readable(line)}" for line in lines[-1:])


def _keep_tail(stream: IO[bytes], tail: bytearray) -> None:
    with stream:
        while chunk := os.read(stream.fileno(), 2**16):
            tail += chunk
            del tail[:-TAIL]


def _make_readable(text: str) -> str:
    """A line of a stranger's words."""
    line = "".join(c if c.isprintable() else " " for c in text).strip()
    return line if len(line) <= SHOWN else f"{line[: SHOWN - 3]}..."
