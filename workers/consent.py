"""Consent to run code that merely lies in a storage, or in the folder of a model.

What a file of settings names by its `code` is run by whoever runs the command with that file. What lies in a storage
may be anybody's: it runs where this user has run the same on this machine before, or consents by --trust-code.
"""

import os
from collections.abc import Iterable
from contextlib import suppress
from functools import partial

from workers import code
from workers.bundles import find_bundle
from workers.code import Bundle, CodeError
from workers.data.cache import find_default_cache
from workers.layout import name_code_file
from workers.storage import Storage

TRUST = "ORCHESTRATOR_TRUST_CODE"  # in the environment: consent to all, for the length of a process


def give_consent() -> None:
    """From here on this process runs what it finds."""
    os.environ[TRUST] = "1"


def remember(digests: Iterable[str]) -> None:
    """Code of these digests runs on this machine from here on, wherever it lies."""
    with suppress(OSError):  # without a cache it is asked for again
        folder = find_default_cache() / "trusted"
        folder.mkdir(parents=True, exist_ok=True)
        for digest in digests:
            (folder / digest).touch()


def look_in(storage: Storage) -> None:
    """Names that are pinned to code which this process does not know are looked for in the storage, with consent."""
    code.add_store(storage.root, partial(_find_with_consent, storage))


def _find_with_consent(storage: Storage, digest: str) -> Bundle | None:
    bundle = find_bundle(storage, digest)
    if bundle and os.environ.get(TRUST) == "1":
        remember([digest])
    elif bundle and not (find_default_cache() / "trusted" / digest).exists():
        raise CodeError(
            f"the code at {storage.find_url(name_code_file(digest, ''))} was never run from this machine; look at it, "
            f"and run it by --trust-code (in Python trust_code=True, for MLflow {TRUST}=1 in the environment)"
        )
    return bundle
