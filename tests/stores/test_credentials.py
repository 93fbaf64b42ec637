"""Credentials and options of each cloud, as its own tools take them, and the errors if they do not suffice."""

from __future__ import annotations

import json
import pickle
import socket
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from imgbatch.config.sections import StorageConfig
from imgbatch.errors import BadPath, ConfigError, Forbidden, StoreError, Unreachable
from imgbatch.storage.stores import Folder, Stores
from tests.azurite import ACCOUNT, KEY, Azurite
from tests.conftest import ROOT
from tests.fake_gcs import TOKEN, FakeGcs
from tests.moto_s3 import MotoServer


def stores(environment: dict[str, str], **options: Any) -> Stores:
    """Return stores with options, and an environment in place of the process's."""
    return Stores(StorageConfig(options=options, retries=0), environment)


def refusals(folder: Folder) -> list[Forbidden]:
    """Return what reading, listing and writing in a folder are refused with."""
    errors = []
    for verb in (lambda: folder.read("x.jpg"), folder.names, lambda: folder.put("y", b"1")):
        with pytest.raises(Forbidden) as caught:
            verb()
        errors.append(caught.value)
    return errors


# Google Cloud Storage


@pytest.fixture
def private(gcs: FakeGcs) -> str:
    """An object in a bucket that only the token opens."""
    gcs.write("private-images", "x.jpg", b"private")
    return "gs://private-images/x.jpg"


def test_a_service_account_file_of_the_environment_travels_to_workers(
    gcs: FakeGcs, private: str, tmp_path: Path
) -> None:
    path = gcs.service_account(tmp_path)
    ours = stores({"GOOGLE_APPLICATION_CREDENTIALS": str(path)}, endpoint_url=gcs.endpoint)
    sent = pickle.dumps(ours)
    path.unlink()
    assert pickle.loads(sent).read(private)[0] == b"private"


@pytest.mark.parametrize("form", ["path", "content", "table", "raw"])
def test_tokens_have_the_forms_of_gcsfs(gcs: FakeGcs, private: str, tmp_path: Path, form: str) -> None:
    path = gcs.service_account(tmp_path)
    token = {"path": str(path), "content": path.read_text(), "table": json.loads(path.read_text()), "raw": TOKEN}[form]
    ours = stores({}, gs={"token": token, "endpoint_url": gcs.endpoint})
    assert ours.read(private)[0] == b"private"
    folder = Folder(ours, "gs://private-images/written")
    folder.put("x", b"1")
    tag = folder.read_tagged("x")[1]
    folder.replace("x", b"2", tag)
    with pytest.raises(StoreError):
        folder.delete("x", tag)
    folder.delete("x", folder.read_tagged("x")[1])
    assert folder.names() == []


def test_default_credentials_of_gcloud_are_used(
    gcs: FakeGcs, private: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "application_default_credentials.json").write_text(gcs.service_account(tmp_path).read_text())
    monkeypatch.setenv("CLOUDSDK_CONFIG", str(tmp_path))
    assert stores({}, endpoint_url=gcs.endpoint).read(private)[0] == b"private"


def test_workload_identity_federation(gcs: FakeGcs, private: str, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("a token of another cloud")
    account = {
        "type": "external_account", "audience": "//iam.googleapis.com/projects/1/locations/global/x",
        "subject_token_type": "urn:ietf:params:oauth:token-type:jwt", "token_url": f"{gcs.endpoint}/token",
        "credential_source": {"file": str(tmp_path / "token")},
    }  # fmt: skip
    assert stores({}, gs={"token": account, "endpoint_url": gcs.endpoint}).read(private)[0] == b"private"


def test_a_service_account_that_is_attached_to_the_machine(gcs: FakeGcs, private: str) -> None:
    """As on Compute Engine, and on GKE with workload identity: a metadata server gives tokens."""
    host = gcs.endpoint.partition("://")[2]
    code = f"""
from imgbatch.config.sections import StorageConfig
from imgbatch.storage.stores import Stores
ours = Stores(StorageConfig(options={{"endpoint_url": {gcs.endpoint!r}}}, retries=0), {{}})
print(ours.read({private!r})[0])
"""
    environment = {"GCE_METADATA_HOST": host, "GCE_METADATA_IP": host, "PATH": "", "HOME": "/nowhere"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "b'private'", done.stderr


def test_without_credentials_the_ways_to_give_them_are_named(gcs: FakeGcs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_GCE_CHECK", "true")
    with pytest.raises(Forbidden, match=r"GOOGLE_APPLICATION_CREDENTIALS.*gcloud.*storage\.options\.gs\.anon"):
        stores({}, endpoint_url=gcs.endpoint).read("gs://images/x")


def test_anonymous_access_reads_what_is_public_and_nothing_else(gcs: FakeGcs, private: str) -> None:
    gcs.write("images", "public.jpg", b"public")
    ours = stores({}, anon=True, endpoint_url=gcs.endpoint)
    assert ours.read("gs://images/public.jpg")[0] == b"public"
    with pytest.raises(Forbidden, match="401"):
        ours.read(private)


def test_expired_and_wrong_credentials_of_google_are_forbidden(gcs: FakeGcs, private: str, tmp_path: Path) -> None:
    expired = str(gcs.service_account(tmp_path, expired=True))
    for token in (expired, "a-wrong-token"):
        folder = Folder(stores({}, token=token, endpoint_url=gcs.endpoint), "gs://private-images")
        for error in refusals(folder):
            assert error.attempts == 1 and "PRIVATE KEY" not in str(error)


@pytest.mark.parametrize("token", ["no-such-file.json", {"type": "authorized_user"}, {"type": "unheard-of"}])
def test_credentials_of_google_that_cannot_be_read_are_refused(token: Any) -> None:
    with pytest.raises(Forbidden, match="no usable Google Cloud credentials"):
        stores({}, gs={"token": token}).read("gs://bucket/x")


def test_rights_that_are_missing_at_google(gcs: FakeGcs) -> None:
    gcs.write("no-listing", "x.jpg", b"1")
    gcs.write("no-writing", "x.jpg", b"1")
    gcs.write("images", "no-reading.jpg", b"1")
    ours = gcs.stores()
    assert ours.read("gs://no-listing/x.jpg")[0] == b"1"
    with pytest.raises(Forbidden, match=r"list gs://no-listing.*403"):
        list(Folder(ours, "gs://no-listing").list_objects())
    for verb in (Folder.put, Folder.create):
        with pytest.raises(Forbidden, match=r"gs://no-writing/y.*403"):
            verb(Folder(ours, "gs://no-writing"), "y", b"1")
    tag = Folder(ours, "gs://no-writing").read_tagged("x.jpg")[1]
    for condition in (tag, None):
        with pytest.raises(Forbidden, match="403"):
            Folder(ours, "gs://no-writing").delete("x.jpg", condition)
    with pytest.raises(Forbidden, match=r"no-reading.jpg.*403"):
        ours.read("gs://images/no-reading.jpg")


def test_the_requester_pays_names_a_project() -> None:
    with pytest.raises(ConfigError, match=r"storage\.options\.gs\.project"):
        stores({}, anon=True, requester_pays=True).read("gs://bucket/x")


# Azure


def sas(azure: Azurite, permission: str, hours: int = 1) -> str:
    """Return a signature for the container `images` with some rights, that ends after so many hours."""
    from azure.storage.blob import generate_container_sas

    end = datetime.now(UTC) + timedelta(hours=hours)
    return generate_container_sas(
        ACCOUNT, "images", account_key=KEY, permission=permission, start=end - timedelta(days=2), expiry=end
    )


def signed(azure: Azurite, permission: str, hours: int = 1) -> Folder:
    """Return a folder that is reached by a signature alone."""
    text = f"BlobEndpoint={azure.endpoint};AccountName={ACCOUNT};SharedAccessSignature={sas(azure, permission, hours)}"
    return Folder(stores({"AZURE_STORAGE_CONNECTION_STRING": text}), "az://images/signed")


@pytest.fixture
def blob(azure: Azurite) -> str:
    """An object."""
    azure.bucket("images").put("signed/x.jpg", b"1")
    return "az://images/signed/x.jpg"


@pytest.mark.parametrize("names", [("_NAME", "_ACCOUNT_KEY"), ("", "_KEY")], ids=["adlfs", "az"])
def test_an_account_key_of_the_environment(azure: Azurite, blob: str, names: tuple[str, str]) -> None:
    account, key = names
    environment = {
        f"AZURE_STORAGE_ACCOUNT{account}": ACCOUNT, f"AZURE_STORAGE{key}": KEY, "AZURITE_BLOB_STORAGE_URL": azure.endpoint
    }  # fmt: skip
    ours = stores(environment)
    assert pickle.loads(pickle.dumps(ours)).read(blob)[0] == b"1"
    assert KEY not in f"{ours!r}"


def test_options_as_adlfs_takes_them(azure: Azurite, blob: str) -> None:
    where = {"AZURITE_BLOB_STORAGE_URL": azure.endpoint}
    for options in (
        {"account_name": ACCOUNT, "account_key": KEY},
        {"account_name": ACCOUNT, "sas_token": "?" + sas(azure, "rl")},
        {"connection_string": azure.connection_string},
    ):
        assert stores(where, **options).read(blob)[0] == b"1"
        assert stores(where, az=options, s3={"key": "of another cloud"}).read(blob)[0] == b"1"


@pytest.mark.parametrize(
    "uri",
    [
        f"abfs://images@{ACCOUNT}.dfs.core.windows.net/signed/x.jpg",
        f"abfss://images@{ACCOUNT}.dfs.core.windows.net/signed/x.jpg",
        f"az://images@{ACCOUNT}.blob.core.windows.net/signed/x.jpg",
        f"abfs://{ACCOUNT}.dfs.core.windows.net/images/signed/x.jpg",
        "abfs://images/signed/x.jpg",
        "abfss://images/signed/x.jpg",
    ],
)
def test_uris_of_azure_are_spelt_as_adlfs_takes_them(azure: Azurite, blob: str, uri: str) -> None:
    ours = azure.stores()
    assert ours.read(uri)[0] == b"1"
    assert Folder(ours, uri.rpartition("/")[0]).names() == ["x.jpg"]


def test_gcs_is_gs(gcs: FakeGcs) -> None:
    gcs.write("images", "spelling/x", b"1")
    assert Folder(gcs.stores(), "gcs://images/spelling").read("x") == b"1"


@pytest.mark.parametrize(
    "uri, instead",
    [("wasbs://c@me.blob.core.windows.net/x", "abfss"), ("wasb://c@me/x", "abfs"), ("adl://me/x", "abfss")],
)
def test_retired_schemes_of_azure_are_refused_with_the_current_ones(uri: str, instead: str) -> None:
    with pytest.raises(BadPath, match=f"write {instead}://CONTAINER@ACCOUNT.dfs.core.windows.net"):
        stores({}).read(uri)


def test_a_signature_gives_only_its_rights(azure: Azurite, blob: str) -> None:
    reader, lister = signed(azure, "r"), signed(azure, "rl")
    assert reader.read("x.jpg") == b"1"
    with pytest.raises(Forbidden, match=r"list az://images/signed"):
        list(reader.list_objects())
    assert lister.names() == ["x.jpg"]
    tag = lister.read_tagged("x.jpg")[1]
    for verb in (
        lambda: lister.put("y", b"1"), lambda: lister.create("y", b"1"), lambda: lister.replace("x.jpg", b"2", tag),
        lambda: lister.delete("x.jpg", tag), lambda: lister.delete("x.jpg"),
    ):  # fmt: skip
        with pytest.raises(Forbidden) as caught:
            verb()
        assert caught.value.attempts == 1
    with pytest.raises(Forbidden):
        signed(azure, "w").read("x.jpg")


def test_expired_and_wrong_credentials_of_azure_are_forbidden(azure: Azurite, blob: str) -> None:
    where = {"AZURITE_BLOB_STORAGE_URL": azure.endpoint, "AZURE_STORAGE_ACCOUNT_NAME": ACCOUNT}
    wrong = Folder(stores({**where, "AZURE_STORAGE_ACCOUNT_KEY": "d3Jvbmc="}), "az://images/signed")
    anonymous = Folder(stores(where, anon=True), "az://images/signed")
    for folder in (wrong, anonymous, signed(azure, "rwdl", hours=-1)):
        for error in refusals(folder):
            assert error.attempts == 1 and "\n" not in str(error)
            assert "sig=" not in str(error) or "sig=***" in str(error)


def test_anonymous_access_to_a_public_container(azure: Azurite) -> None:
    azure.service().create_container("public", public_access="container")
    azure.bucket("public").put("x", b"1")
    where = {"AZURITE_BLOB_STORAGE_URL": azure.endpoint, "AZURE_STORAGE_ACCOUNT_NAME": ACCOUNT}
    assert Folder(stores(where, anon=True), "az://public").names() == ["x"]


def test_an_account_is_needed_and_its_key_fits_no_other(azure: Azurite) -> None:
    with pytest.raises(ConfigError, match=r"AZURE_STORAGE_ACCOUNT_NAME.*abfs://CONTAINER@ACCOUNT"):
        stores({}).read("az://images/x")
    with pytest.raises(BadPath, match="the account 'other'"):
        azure.stores().read("abfs://images@other.dfs.core.windows.net/x")


def test_a_blob_in_the_archive_tier_is_forbidden(azure: Azurite) -> None:
    azure.bucket("images").put("archived.jpg", b"1")
    azure.service().get_blob_client("images", "archived.jpg").set_standard_blob_tier("Archive")
    with pytest.raises(Forbidden, match="archived"):
        azure.stores().read("az://images/archived.jpg")


def test_a_container_with_capitals_is_refused(azure: Azurite) -> None:
    with pytest.raises(BadPath, match=r"'Images' .*lower-case"):
        azure.stores().read("az://Images/x")


def test_an_account_that_does_not_resolve_is_unreachable_and_says_why() -> None:
    ours = stores({}, account_name="no-such-account-of-ours", account_key="d3Jvbmc=")
    with pytest.raises(Unreachable, match=r"az://images/x.*lookup"):
        ours.read("az://images/x")


def test_an_endpoint_where_nobody_listens_is_unreachable_and_says_why() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        with pytest.raises(Unreachable, match=r"gs://images/x.*refused"):
            stores({"STORAGE_EMULATOR_HOST": f"127.0.0.1:{free.getsockname()[1]}"}).read("gs://images/x")


# S3


def test_objects_are_written_and_read_with_the_key_of_sse_c(moto: MotoServer) -> None:
    closed = Folder(stores(moto.environment, SSECustomerKey="k" * 32), "s3://images/closed")
    closed.create("x", b"secret")
    assert closed.read("x") == b"secret"
    tag = closed.read_tagged("x")[1]
    closed.replace("x", b"again", tag)
    assert closed.read("x") == b"again" and closed.names() == ["x"]
