"""The variants of S3: hosts, regions, encryption, access points, directory buckets."""

from __future__ import annotations

import base64
import http.server
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from imgbatch.config.sections import StorageConfig
from imgbatch.errors import BadPath, ConfigError
from imgbatch.storage import s3 as storage
from imgbatch.storage.s3_options import merged_options, obstore_options, style
from imgbatch.storage.stores import Folder, Stores
from tests.servers import serving_http

ROOT = Path(__file__).parents[2]
REGION = {"region": "eu-central-1"}


@contextmanager
def answering(status: int, received: list[tuple[str, dict[str, str]]] | None = None) -> Iterator[str]:
    """Run a server that answers with a status and the region of the bucket, as S3 does; yield its URL.

    Args:
        received: takes the method and the headers of each request.
    """

    class Server(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if received is not None:
                received.append((self.command, {name.lower(): value for name, value in self.headers.items()}))
            self.send_response(status)
            self.send_header("x-amz-bucket-region", "ap-south-1")
            self.send_header("ETag", '"e"')
            self.send_header("Last-Modified", "Fri, 02 Jan 2026 03:04:05 GMT")
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_GET = do_PUT = do_HEAD  # noqa: N815 - the names that http.server calls

        def log_message(self, *_: Any) -> None:
            pass

    with serving_http(Server) as url:
        yield url


@pytest.mark.parametrize(
    "bucket, options, endpoint, virtual",
    [
        ("photos", {}, None, True),
        ("my.photos", {}, None, False),  # no certificate fits its host name
        ("photos", {"addressing_style": "path"}, None, False),
        ("photos", {"use_dualstack_endpoint": True}, "https://photos.s3.dualstack.eu-central-1.amazonaws.com", True),
        ("photos", {"use_fips_endpoint": True}, "https://photos.s3-fips.eu-central-1.amazonaws.com", True),
        (
            "my.photos",
            {"use_fips_endpoint": True, "use_dualstack_endpoint": True},
            "https://s3-fips.dualstack.eu-central-1.amazonaws.com",
            False,
        ),
        ("photos", {"endpoint_url": "https://minio:9000/"}, "https://minio:9000", False),
        (
            "photos",
            {"endpoint_url": "https://minio:9000", "addressing_style": "virtual"},
            "https://photos.minio:9000",
            True,
        ),
    ],
)
def test_the_host_of_a_bucket(bucket: str, options: dict[str, Any], endpoint: str | None, virtual: bool) -> None:
    hosts = style(bucket, {**REGION, **options})
    assert (hosts.get("endpoint"), hosts["virtual_hosted_style_request"]) == (endpoint, virtual)


def test_a_style_of_addresses_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ConfigError, match="auto, path or virtual"):
        style("photos", {**REGION, "addressing_style": "vitrual"})


@pytest.mark.parametrize(
    "options",
    [
        {"use_dualstack_endpoint": True},
        {"config_kwargs": {"use_dualstack_endpoint": True}},
        {"config_kwargs": {"s3": {"use_dualstack_endpoint": True}}},
    ],
)
def test_options_of_botocore_are_understood_where_s3fs_has_them(options: dict[str, Any]) -> None:
    assert merged_options(options, {})["use_dualstack_endpoint"] is True


def test_endpoints_of_the_environment() -> None:
    environment = {"AWS_USE_FIPS_ENDPOINT": "true", "AWS_USE_DUALSTACK_ENDPOINT": "false"}
    assert merged_options({}, environment) == {"use_fips_endpoint": "true"}


@pytest.mark.parametrize("key", ["k" * 32, base64.b64encode(b"k" * 32).decode()])
def test_the_key_of_sse_c_is_32_bytes_or_these_in_base64(key: str) -> None:
    flat = merged_options({"s3_additional_kwargs": {"SSECustomerAlgorithm": "AES256", "SSECustomerKey": key}}, {})
    assert obstore_options(flat) == {
        "server_side_encryption": "sse-c", "sse_customer_key_base64": base64.b64encode(b"k" * 32).decode()
    }  # fmt: skip
    with pytest.raises(ConfigError, match="32 bytes"):
        obstore_options({"SSECustomerKey": key[:-1]})


CUSTOMER = "x-amz-server-side-encryption-customer-"


@pytest.mark.parametrize(
    "options, sent, methods",
    [
        ({"requester_pays": True}, {"x-amz-request-payer": "requester"}, {"GET", "PUT", "HEAD"}),
        ({"ServerSideEncryption": "AES256"}, {"x-amz-server-side-encryption": "AES256"}, {"PUT"}),
        (
            {"s3_additional_kwargs": {"ServerSideEncryption": "aws:kms", "SSEKMSKeyId": "mine"}},
            {"x-amz-server-side-encryption": "aws:kms", "x-amz-server-side-encryption-aws-kms-key-id": "mine"},
            {"PUT"},
        ),
        (
            {"SSECustomerAlgorithm": "AES256", "SSECustomerKey": "k" * 32},
            {f"{CUSTOMER}algorithm": "AES256", f"{CUSTOMER}key": base64.b64encode(b"k" * 32).decode()},
            {"GET", "PUT", "HEAD"},
        ),
    ],
)
def test_the_headers_of_payment_and_encryption_are_sent(
    options: dict[str, Any], sent: dict[str, str], methods: set[str]
) -> None:
    received: list[tuple[str, dict[str, str]]] = []
    with answering(200, received) as endpoint:
        environment = {"AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s", "AWS_ENDPOINT_URL": endpoint}
        folder = Folder(Stores(StorageConfig(options=options, retries=0), environment), "s3://photos")
        folder.put("x", b"1")
        folder.read("x")
        folder.exists("x")
    assert [method for method, _ in received] == ["PUT", "GET", "HEAD"]
    for method, headers in received:
        assert (sent.items() <= headers.items()) == (method in methods), (method, headers)


def test_an_arn_is_refused_with_what_to_write() -> None:
    uri = "s3://arn:aws:s3:us-west-2:123456789012:accesspoint/mine/x.jpg"
    with pytest.raises(BadPath, match="-s3alias"):
        Stores(StorageConfig(), {}).read(uri)


def test_a_directory_bucket_is_not_listed_in_order() -> None:
    options = {"key": "k", "secret": "s", "region": "us-west-2"}
    assert not storage.S3Bucket("photos--usw2-az1--x-s3", options, 1.0, 3).sorted_listing
    assert storage.S3Bucket("photos", {**options, "endpoint_url": "http://127.0.0.1:9"}, 1.0, 3).sorted_listing


@pytest.mark.parametrize("status", [200, 301, 400, 403])
def test_the_region_of_a_bucket_is_in_whatever_s3_answers(status: int) -> None:
    with answering(status) as endpoint:
        assert storage.region_of("photos", endpoint) == "ap-south-1"


def test_a_region_that_cannot_be_found_out_stays_as_it_is() -> None:
    assert storage.region_of("photos", "http://127.0.0.1:9") is None


def test_a_bucket_elsewhere_is_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    with answering(301) as endpoint:
        monkeypatch.setattr(storage, "AMAZON", endpoint)
        bucket = storage.S3Bucket("photos", {"key": "k", "secret": "s", "region": "us-east-1"}, 1.0)
    assert bucket.store.config["region"] == "ap-south-1"


def test_a_run_on_s3_does_not_import_s3fs(s3: Any) -> None:
    name = uuid.uuid4().hex
    code = f"""
import sys
from imgbatch.config.sections import StorageConfig
from imgbatch.storage.stores import Folder, Stores
folder = Folder(Stores(StorageConfig(), {s3.environment!r}), "s3://images/{name}")
folder.create("x.csv", b"1")
with folder.stores.open(folder.at("x.csv")) as file:
    assert file.read() == b"1"
assert folder.names() == ["x.csv"] and len(list(Folder(folder.stores, "s3://images").list_objects()))
folder.delete("x.csv", folder.read_tagged("x.csv")[1])
print([name for name in ("s3fs", "aiobotocore", "gcsfs", "adlfs", "google.auth") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
