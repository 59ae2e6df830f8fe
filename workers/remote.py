"""Object stores and other places that a URI names, as filesystems of pyarrow.

A URI may have options behind a question mark, such as s3://bucket/prefix?region=eu-central-1; a store that is not
Amazon's is named by the environment variable AWS_ENDPOINT_URL or by ?endpoint_override=host:port&scheme=http. Keys come
from the environment or the machine's role.
"""

import os
from functools import lru_cache
from urllib.parse import parse_qsl, unquote, urlsplit

import pyarrow as pa
from pyarrow import fs

from workers.config import Mistake, hide_secrets

ATTEMPTS = 10  # of a request to S3, with growing pauses: some 25 s until a store that does not answer is given up
PATIENCE_S = 25  # the same of Google's, which Arrow gives a quarter of an hour
S3_OPTIONS = ("region", "endpoint_override", "scheme")


def open_uri(uri: str) -> tuple[fs.FileSystem, str]:
    """The filesystem at a URI, and the path in it. Raises Mistake where there can be none."""
    if hide_secrets(uri) != uri:
        raise Mistake(
            f"{uri} holds a key, which would end up in logs and files; "
            "leave it out: keys come from the environment (AWS_ACCESS_KEY_ID, ...) or from the machine's role"
        )
    try:
        parts = urlsplit(uri)
        options = dict(parse_qsl(parts.query, keep_blank_values=True))
        if parts.scheme == "hf":
            raise Mistake(f"{uri}: {_explain_hub(parts.netloc, parts.path.strip('/').split('/'))}")
        if parts.scheme in ("gs", "gcs") and "retry_limit_seconds" not in options:
            uri += f"{'&' if parts.query else '?'}retry_limit_seconds={PATIENCE_S}"
        if parts.scheme != "s3":
            return fs.FileSystem.from_uri(uri)
        if unknown := sorted(options.keys() - set(S3_OPTIONS)):
            raise Mistake(f"{uri}: no option {', '.join(unknown)}; valid: {', '.join(S3_OPTIONS)}")
        if not parts.netloc:
            raise Mistake(f"{uri} names no bucket; give s3://bucket/path")
        return _open_s3(parts.netloc, **(_read_s3_endpoint() | options)), parts.netloc + unquote(parts.path).rstrip("/")
    except (pa.ArrowException, OSError, ValueError) as error:
        if isinstance(error, Mistake):
            raise
        raise Mistake(f"{uri} cannot be opened ({error}); give a folder, or a URI such as s3://bucket/path") from error


def _explain_hub(first: str, others: list[str]) -> str:
    if first in ("datasets", "spaces"):
        return explain_download("/".join(others[:2]), f" --repo-type {first.removesuffix('s')}")
    return explain_download("/".join([first, *others[:1]]).strip("/"))


def explain_download(name: str, kind: str = "") -> str:
    """How a repository of the Hugging Face hub, which is not read from here, becomes a folder that is."""
    name = name or "NAME"
    folder = name.rpartition("/")[2]
    return (
        "a repository of the Hugging Face hub is not read from here: "
        f"run hf download {name}{kind} --local-dir {folder}, and give {folder}"
    )


def _read_s3_endpoint() -> dict[str, str]:
    """The address of a store that is not Amazon's, from the environment: what botocore and Arrow read there."""
    if not (url := os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")):
        return {}
    parts = urlsplit(url if "://" in url else f"https://{url}")
    if "@" in parts.netloc:
        raise Mistake(
            f"AWS_ENDPOINT_URL={url} holds a key, which would end up in logs; leave it out: keys come from "
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or from the machine's role"
        )
    return {"endpoint_override": parts.netloc, "scheme": parts.scheme}


@lru_cache
def _open_s3(bucket: str, **options: str) -> fs.FileSystem:
    """S3 as a URI opens it, only more patient. Amazon is asked once for the bucket's region."""
    if "region" not in options:
        here = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
        options["region"] = here if "endpoint_override" in options else fs.resolve_s3_region(bucket)
    patience = fs.AwsDefaultS3RetryStrategy(max_attempts=ATTEMPTS)
    return fs.S3FileSystem(**options, retry_strategy=patience, allow_delayed_open=True)
