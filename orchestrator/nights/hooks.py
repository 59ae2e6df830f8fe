"""Telling somebody of an alarm: a webhook, a command, a mail. What fails is told, and changes nothing else."""

import json
import os
import subprocess
import urllib.error
import urllib.request
from collections.abc import Mapping
from email.message import EmailMessage
from typing import Any
from urllib.parse import urlsplit

from orchestrator.nights.suite import Hooks

TIMEOUT_S = 60.0


def missing(hooks: Hooks, environment: Mapping[str, str]) -> list[str]:
    """What the hooks need and the environment does not give."""
    if hooks.webhook is None:
        return []
    url = environment.get(hooks.webhook, "")
    if not url:
        return [f"hooks.webhook: the environment variable {hooks.webhook} is not set; it holds the address to call"]
    if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).hostname:
        return [f"hooks.webhook: {hooks.webhook} does not hold an address that begins with http:// or https://"]
    return []


def call(hooks: Hooks, message: Mapping[str, Any], text: str) -> list[tuple[str, str]]:
    """(hook, why it failed or "") of every hook of the suite.

    `message` is plain data, with a line of its own under `text` as chats show it; `text` is the whole report.
    """
    called = []
    if hooks.webhook:
        called.append(("webhook", _webhook(os.environ.get(hooks.webhook, ""), message)))
    if hooks.command:
        called.append(("command", _command(hooks.command, json.dumps(message))))
    if hooks.mail:
        mail = EmailMessage()
        mail["To"], mail["Subject"] = hooks.mail.to, str(message["text"]).splitlines()[0]
        mail.set_content(text)
        called.append(("mail", _command(hooks.mail.command, mail.as_string())))
    return called


def _webhook(url: str, message: Mapping[str, Any]) -> str:
    """Says nothing of the address but its host: the rest may be a secret."""
    headers = {"Content-Type": "application/json"}
    try:
        request = urllib.request.Request(url, json.dumps(message).encode(), headers, method="POST")
        with urllib.request.urlopen(request, timeout=TIMEOUT_S):
            return ""
    except urllib.error.HTTPError as error:
        return f"{urlsplit(url).hostname} answered {error.code} {error.reason}"
    except urllib.error.URLError as error:
        return f"{urlsplit(url).hostname} cannot be reached: {error.reason}"
    except OSError as error:
        return f"{urlsplit(url).hostname} did not answer: {error}"


def _command(words: tuple[str, ...], given: str) -> str:
    try:
        done = subprocess.run(words, input=given, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{words[0]} could not be run to its end: {error}"
    said = (done.stderr or done.stdout).strip().splitlines()[-1:]
    return f"{words[0]} ended with status {done.returncode}: {''.join(said)}" if done.returncode else ""
