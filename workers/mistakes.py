"""The user's mistakes, and secrets, which no message, log or file of settings holds."""

import re
from typing import Annotated
from urllib.parse import urlsplit

from pydantic import AfterValidator

SECRET_OPTIONS = ("key", "password", "secret", "signature", "token")  # parts of the names of options in URIs


class Mistake(ValueError):
    """The user's mistake. Its message says what to do; a command prints it and exits with its status."""

    status = 2

    def __str__(self) -> str:
        return hide_secrets(super().__str__())


def hide_secrets(text: str) -> str:
    """The text with stars for names and passwords in its URIs, and for the values of options named after a secret."""
    text = re.sub(r"((?:://|[?&]endpoint_override=)(?:https?://)?)[^/@&\s]+(?=@)", r"\1***", text)
    return re.sub(rf"([?&][\w-]*(?:{'|'.join(SECRET_OPTIONS)})[\w-]*=)[^&\s'\"]+", r"\1***", text, flags=re.IGNORECASE)


def _hide_values(text: str) -> str:
    if (shown := hide_secrets(text)) != text:
        raise ValueError(
            f"{shown!r} holds a secret, which would end up in logs and files; leave it out, and set it in the "
            "environment (AWS_ACCESS_KEY_ID, MLFLOW_TRACKING_USERNAME, MLFLOW_TRACKING_PASSWORD, ...)"
        )
    try:
        urlsplit(text)
    except ValueError as error:
        raise ValueError(f"{text!r} is neither a path nor a URI ({error})") from error
    return text


Open = Annotated[str, AfterValidator(_hide_values)]  # a path or URI that anybody may read
