"""A storage on S3, which is moto's on loopback, and a way to it on which answers get lost."""

from collections.abc import Iterator

import aws
import pytest

from workers.storage import Storage


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    with aws.moto() as url:
        aws.client("s3", url).create_bucket(
            Bucket="bucket", CreateBucketConfiguration={"LocationConstraint": aws.REGION}
        )
        yield url


@pytest.fixture(params=["environment", "uri"])
def storage(request, endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Storage:
    """One whose address is in the environment, and one with all of it in the URI."""
    prefix = f"s3://bucket/{abs(hash(request.node.name))}"
    if request.param == "environment":
        return Storage(prefix)
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    host = endpoint.removeprefix("http://")
    return Storage(f"{prefix}/?endpoint_override={host}&scheme=http&region={aws.REGION}")


@pytest.fixture
def own(endpoint: str, request) -> Storage:
    return Storage(f"s3://bucket/{abs(hash(request.node.name))}")


@pytest.fixture
def proxy(endpoint: str) -> Iterator[aws.Proxy]:
    made = aws.Proxy(int(endpoint.rpartition(":")[2]))
    yield made
    made.close()


def through(proxy: aws.Proxy, storage: Storage) -> Storage:
    return Storage(f"{storage.root}?endpoint_override=127.0.0.1:{proxy.port}&scheme=http")
