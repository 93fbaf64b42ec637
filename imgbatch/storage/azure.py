"""Effects: Azure Blob Storage: its options and credentials, and the requests that obstore cannot make.

Azure's own packages make those requests, and find credentials other than keys and signatures. The extra `azure` installs
them.
"""

from __future__ import annotations

import importlib.util
import logging
import re
from collections.abc import Mapping
from typing import Any

from obstore.store import AzureStore

from imgbatch.errors import BadPath, ConfigError, Forbidden
from imgbatch.storage.bucket import Entry, Page, Tag, as_text, client_options, require_known
from imgbatch.storage.obstore_store import open_client

SCHEMES = ("az", "abfs", "abfss")
REFUSED = {
    "wasb": "abfs", "wasbs": "abfss", "adl": "abfss",
}  # fmt: skip
"""Older schemes, and what to write instead."""

ENVIRONMENT = {
    "AZURE_STORAGE_CONNECTION_STRING": "connection_string",
    "AZURE_STORAGE_ACCOUNT_NAME": "account_name",
    "AZURE_STORAGE_ACCOUNT": "account_name",
    "AZURE_STORAGE_ACCOUNT_KEY": "account_key",
    "AZURE_STORAGE_KEY": "account_key",
    "AZURE_STORAGE_SAS_TOKEN": "sas_token",
    "AZURE_STORAGE_CLIENT_ID": "client_id",
    "AZURE_CLIENT_ID": "client_id",
    "AZURE_STORAGE_CLIENT_SECRET": "client_secret",
    "AZURE_CLIENT_SECRET": "client_secret",
    "AZURE_STORAGE_TENANT_ID": "tenant_id",
    "AZURE_TENANT_ID": "tenant_id",
    "AZURE_STORAGE_ANON": "anon",
    "AZURITE_BLOB_STORAGE_URL": "endpoint",
}
"""Variables of the driver's environment, and the options that they set."""

_OPTIONS = {
    "account_name", "account_key", "connection_string", "sas_token", "client_id", "client_secret", "tenant_id", "anon",
    "account_host",
}  # fmt: skip
_CREDENTIALS = {"account_key", "connection_string", "sas_token", "client_id", "client_secret", "tenant_id", "anon"}
_PACKAGE = "pip install imgbatch[azure]"
_HOST = re.compile(
    r"(?P<account>[^./@]+)\.(dfs|blob)\.(core\.windows\.net|core\.chinacloudapi\.cn|core\.usgovcloudapi\.net)"
)
_NAME = re.compile(r"\$root|\$web|\$logs|(?!.*--)[a-z0-9](?:[a-z0-9-]{1,61})[a-z0-9]")
_PAGE = 1000
_EMULATOR = {  # the account that Azurite and its predecessors have by default; it is public knowledge
    "account_name": "devstoreaccount1",
    "account_key": "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw==",
    "endpoint": "http://127.0.0.1:10000/devstoreaccount1",
}


def merged_options(options: Mapping[str, Any], environment: Mapping[str, str]) -> dict[str, Any]:
    """Return one set of options in adlfs's terms: those of the config, then those of the environment.

    A connection string is taken apart into them; `endpoint` is the URL of the account.

    Raises:
        ConfigError: an option is unknown, or the connection string cannot be read.
    """
    require_known("az", options, _OPTIONS)
    flat = {name: as_text(value) for name, value in options.items() if value is not None}
    own_credentials = bool(flat.keys() & _CREDENTIALS)
    for name, option in ENVIRONMENT.items():
        if environment.get(name) and not (own_credentials and option in _CREDENTIALS):
            flat.setdefault(option, environment[name])
    if str(flat.get("anon", "")).lower() in ("false", "0", "f", ""):
        flat.pop("anon", None)
    if host := flat.pop("account_host", None):
        flat["endpoint"] = f"https://{host}"
        flat.setdefault("account_name", host.partition(".")[0])
    if text := flat.pop("connection_string", None):
        for option, value in _parts(text).items():
            flat.setdefault(option, value)
    return flat


def _parts(text: str) -> dict[str, str]:
    """Return a connection string as options.

    >>> _parts("DefaultEndpointsProtocol=https;AccountName=a;AccountKey=b==;EndpointSuffix=core.windows.net")
    {'account_name': 'a', 'account_key': 'b==', 'endpoint': 'https://a.blob.core.windows.net'}
    """
    pairs = [part.partition("=") for part in text.split(";") if part.strip()]
    parts = {name.strip().lower(): value.strip() for name, _, value in pairs}
    if parts.get("usedevelopmentstorage", "").lower() == "true":
        return dict(_EMULATOR)
    account, endpoint = parts.get("accountname"), parts.get("blobendpoint")
    if not account and endpoint:
        account = endpoint.partition("://")[2].partition(".")[0]
    if not account:
        raise ConfigError("storage.options.az.connection_string names no account (AccountName=… or BlobEndpoint=…)")
    protocol, suffix = parts.get("defaultendpointsprotocol", "https"), parts.get("endpointsuffix", "core.windows.net")
    options = {"account_name": account}
    options |= {"account_key": parts["accountkey"]} if "accountkey" in parts else {}
    options |= {"sas_token": parts["sharedaccesssignature"]} if "sharedaccesssignature" in parts else {}
    return {**options, "endpoint": (endpoint or f"{protocol}://{account}.blob.{suffix}").rstrip("/")}


def split(uri: str) -> tuple[str, str]:
    """Return container and key of a URI; the container with `@ACCOUNT` where the URI names the account.

    >>> split("az://photos/a.jpg"), split("abfss://photos@me.dfs.core.windows.net/a.jpg")
    (('photos', 'a.jpg'), ('photos@me', 'a.jpg'))
    >>> split("abfs://me.dfs.core.windows.net/photos/a.jpg")
    ('photos@me', 'a.jpg')

    Raises:
        BadPath: the container cannot exist.
    """
    first, _, key = uri.partition("://")[2].partition("/")
    container, at, host = first.rpartition("@")
    account = ""
    if at or _HOST.fullmatch(first):
        match = _HOST.fullmatch(host)
        if match is None:
            raise BadPath(f"{uri}: {host!r} is no account: write CONTAINER@ACCOUNT.dfs.core.windows.net")
        account = match["account"]
        if not at:
            container, _, key = key.partition("/")
    else:
        container = first
    if container and not _NAME.fullmatch(container):
        raise BadPath(
            f"{uri}: {container!r} is not a valid container name: 3 to 63 lower-case letters, digits and single hyphens"
        )
    return (f"{container}@{account}" if account else container), key


def of_account(flat: Mapping[str, Any], account: str) -> dict[str, Any]:
    """Return the options for the account that a URI names.

    Raises:
        ConfigError: there is no account.
        BadPath: the options' key or signature belongs to another one. A row of a manifest may name any account.
    """
    own = flat.get("account_name")
    if not account or account == own:
        if not own:
            raise ConfigError(
                "az:// needs an account: set AZURE_STORAGE_ACCOUNT_NAME, AZURE_STORAGE_CONNECTION_STRING or "
                "storage.options.az.account_name, or write abfs://CONTAINER@ACCOUNT.dfs.core.windows.net/…"
            )
        return dict(flat)
    if own and flat.keys() & {"account_key", "sas_token"}:
        raise BadPath(f"the URI names the account {account!r}, but storage.options.az has the key of {own!r}")
    return {**{name: value for name, value in flat.items() if name != "endpoint"}, "account_name": account}


def for_adlfs(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Return what `of_account` gave in the form that adlfs takes."""
    options = {name: value for name, value in flat.items() if name in _OPTIONS}
    host, _, account = _endpoint(flat).partition("://")[2].partition("/")
    if account:  # an emulator, whose URLs have the account in the path
        key = (
            f"SharedAccessSignature={flat['sas_token']}"
            if "sas_token" in flat
            else f"AccountKey={flat.get('account_key')}"
        )
        return {"connection_string": f"BlobEndpoint={_endpoint(flat)};AccountName={flat['account_name']};{key}"}
    return {**options, "account_host": host}


def _endpoint(flat: Mapping[str, Any]) -> str:
    return str(flat.get("endpoint") or f"https://{flat['account_name']}.blob.core.windows.net")


class AzureBucket:
    """One container."""

    sorted_listing = True
    codes_without_support: tuple[int, ...] = ()

    def __init__(self, bucket: str, flat: Mapping[str, Any], timeout_s: float) -> None:
        if importlib.util.find_spec("azure") is None or importlib.util.find_spec("azure.storage.blob") is None:
            raise ConfigError(f"az:// needs Azure's packages: {_PACKAGE}")
        logging.getLogger("azure").setLevel(logging.WARNING)  # below it, every request is logged
        container, _, account = bucket.partition("@")
        self._flat = of_account(flat, account)
        self.name = f"az://{container}"
        self._container, self._timeout_s, self._endpoint = container, timeout_s, _endpoint(self._flat)
        self._identity = _identity(self._flat)
        provider: Any = None
        client: Any = client_options(self._endpoint, timeout_s)
        if self._identity is not None:
            from obstore.auth.azure import AzureCredentialProvider

            provider = AzureCredentialProvider(self._identity)
        config: Any = {"account_name": self._flat["account_name"], "endpoint": self._endpoint}
        if self._flat.get("anon"):
            config["skip_signature"] = True
        elif "account_key" in self._flat:
            config["account_key"] = self._flat["account_key"]
        elif "sas_token" in self._flat:
            config["sas_key"] = str(self._flat["sas_token"]).removeprefix("?")
        self.store = open_client(
            AzureStore, container, self.name, config=config, client_options=client, credential_provider=provider
        )

    def page(self, prefix: str, *, after: str = "", token: str | None = None, folders: bool = False) -> Page:
        """List one page of the blobs that begin with `prefix`."""
        from azure.storage.blob import BlobPrefix

        query: dict[str, Any] = {"name_starts_with": prefix or None, "results_per_page": _PAGE}
        query |= {"start_from": after} if after and not token else {}
        with self._client() as client:
            listing = client.walk_blobs(delimiter="/", **query) if folders else client.list_blobs(**query)
            pages = listing.by_page(token)
            page = list(next(pages, ()))
        entries = [
            Entry(blob.name, blob.size, blob.etag, blob.last_modified)
            for blob in page
            if not isinstance(blob, BlobPrefix) and blob.name != after and not _is_folder(blob)
        ]
        return Page.of(entries, [blob.name for blob in page if isinstance(blob, BlobPrefix)], pages.continuation_token)

    def delete(self, path: str, tag: Tag | None) -> int:
        """Remove a blob, with a tag only that version of it; return the HTTP status."""
        from azure.core import MatchConditions
        from azure.core.exceptions import HttpResponseError

        condition: dict[str, Any] = {}
        if tag is not None and tag.etag:
            condition = {"etag": tag.etag, "match_condition": MatchConditions.IfNotModified}
        with self._client() as client:
            try:
                client.delete_blob(path, **condition)
            except HttpResponseError as error:
                if error.status_code is None:
                    raise
                return int(error.status_code)
        return 202

    def _client(self) -> Any:
        """Return a client of Azure's package; it is needed seldom."""
        from azure.core.credentials import AzureSasCredential
        from azure.storage.blob import ContainerClient

        credential: Any = self._identity or self._flat.get("account_key")
        if credential is None and "sas_token" in self._flat:
            credential = AzureSasCredential(str(self._flat["sas_token"]).removeprefix("?"))
        return ContainerClient(
            self._endpoint, self._container, credential=None if self._flat.get("anon") else credential, retry_total=0,
            connection_timeout=min(self._timeout_s, 10.0), read_timeout=self._timeout_s,
        )  # fmt: skip


def _is_folder(blob: Any) -> bool:
    """Return whether an empty blob marks a folder, in an account with a hierarchical namespace."""
    return bool((blob.metadata or {}).get("hdi_isfolder") == "true")


def _identity(flat: Mapping[str, Any]) -> Any:
    """Return a credential of azure-identity; None where there is a key or signature, or nothing is signed.

    Raises:
        ConfigError: a part of a service principal is missing.
        Forbidden: there are no credentials.
    """
    if flat.get("anon") or flat.keys() & {"account_key", "sas_token"}:
        return None
    from azure.core.exceptions import ClientAuthenticationError
    from azure.identity import ClientSecretCredential, DefaultAzureCredential

    if "client_secret" in flat:
        if not flat.keys() >= {"client_id", "tenant_id"}:
            raise ConfigError("storage.options.az: client_secret requires client_id and tenant_id")
        identity: Any = ClientSecretCredential(flat["tenant_id"], flat["client_id"], flat["client_secret"])
    else:
        identity = DefaultAzureCredential(managed_identity_client_id=flat.get("client_id"))
    try:
        identity.get_token("https://storage.azure.com/.default")
    except ClientAuthenticationError as error:
        raise Forbidden(
            f"no usable Azure credentials ({str(error).strip().splitlines()[0][:200]}): set AZURE_STORAGE_ACCOUNT_KEY, "
            "AZURE_STORAGE_CONNECTION_STRING or AZURE_STORAGE_SAS_TOKEN, log in with `az login`, attach a managed "
            "identity, or --set storage.options.az.anon=true for a public container"
        ) from error
    return identity
