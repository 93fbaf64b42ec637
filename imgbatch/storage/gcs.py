"""Effects: Google Cloud Storage: its options and credentials, and the requests that obstore cannot make.

Credentials are those of google-auth, as Google's own tools find them. Object names and ETags are those of the XML API, which
obstore uses; the JSON API has other ETags.
"""

from __future__ import annotations

import json
import os
import re
import xml.etree.ElementTree as ET
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime
from functools import cached_property, partial
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote_plus

from obstore.store import GCSStore

from imgbatch.errors import BadPath, ConfigError, Forbidden, Unreachable
from imgbatch.storage.bucket import Entry, Page, Tag, as_text, client_options, require_known
from imgbatch.storage.error_mapping import of_status
from imgbatch.storage.obstore_store import open_client

SCHEMES = ("gs", "gcs")
ENVIRONMENT = ("STORAGE_EMULATOR_HOST", "GOOGLE_APPLICATION_CREDENTIALS", "GOOGLE_CLOUD_PROJECT")
"""Variables of the driver's environment that travel to the workers."""

_OPTIONS = ("token", "anon", "project", "requester_pays", "endpoint_url")
_GOOGLE = "https://storage.googleapis.com"
_SCOPES = ["https://www.googleapis.com/auth/devstorage.read_write"]
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]")
_PAGE = 1000
_NO_TOKEN = {"disable_oauth": True, "client_email": "", "private_key": "", "private_key_id": ""}
_GENERATION = "x-goog-if-generation-match"


def travelling(environment: Mapping[str, str]) -> dict[str, str]:
    """Return what of the driver's environment the workers need.

    The file that GOOGLE_APPLICATION_CREDENTIALS names may be missing there, so its content travels in place of its name.
    """
    variables = {name: environment[name] for name in ENVIRONMENT if environment.get(name)}
    path = variables.get("GOOGLE_APPLICATION_CREDENTIALS")
    if path:
        with suppress(OSError, UnicodeDecodeError):  # reported when it is used
            variables["GOOGLE_APPLICATION_CREDENTIALS"] = Path(path).read_text(encoding="utf-8")
    return variables


def merged_options(options: Mapping[str, Any], environment: Mapping[str, str]) -> dict[str, Any]:
    """Return one set of options in gcsfs's terms: those of the config, then those of the environment.

    Raises:
        ConfigError: an option is unknown.
    """
    require_known("gs", options, _OPTIONS)
    flat = {name: as_text(value) for name, value in options.items() if value is not None}
    if flat.get("token") in ("browser", "cache"):
        raise ConfigError(
            f"storage.options.gs.token={flat['token']!r} needs a person: run `gcloud auth application-default login`, "
            "and omit the option"
        )
    if flat.get("token") == "anon":
        flat["anon"] = True
    if emulator := environment.get("STORAGE_EMULATOR_HOST"):
        flat.setdefault("endpoint_url", emulator if "://" in emulator else f"http://{emulator}")
        if "token" not in flat:
            flat["anon"] = True
    flat.setdefault("token", environment.get("GOOGLE_APPLICATION_CREDENTIALS") or "google_default")
    flat.setdefault("project", environment.get("GOOGLE_CLOUD_PROJECT", ""))
    return flat


def for_gcsfs(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Return what `merged_options` gave in the form that gcsfs takes."""
    # Otherwise gcsfs asks a second service for the kind of each bucket, which may take a minute.
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    token = "anon" if flat.get("anon") else flat["token"]
    if isinstance(token, str) and token.lstrip().startswith("{"):
        token = json.loads(token)
    options = {"token": token, "requester_pays": flat.get("requester_pays", False)}
    if flat.get("project"):
        options["project"] = flat["project"]
    if flat.get("endpoint_url"):
        options["endpoint_url"] = flat["endpoint_url"]
    return options


def split(uri: str) -> tuple[str, str]:
    """Return bucket and key of a URI.

    Raises:
        BadPath: the bucket cannot exist.
    """
    bucket, _, key = uri.partition("://")[2].partition("/")
    if bucket and not _NAME.fullmatch(bucket):
        raise BadPath(
            f"{uri}: {bucket!r} is not a valid bucket name: 3 to 222 lower-case letters, digits, '-', '_' and '.'"
        )
    return bucket, key


def credentials(flat: Mapping[str, Any], timeout_s: float) -> Any:
    """Return credentials of google-auth; None: anonymous.

    Raises:
        Forbidden: there are none, or they cannot be used.
    """
    if flat.get("anon"):
        return None
    import google.auth
    import google.auth.exceptions

    try:
        return _credentials(flat["token"], timeout_s)
    except (google.auth.exceptions.GoogleAuthError, ValueError, OSError) as error:
        if isinstance(error, google.auth.exceptions.TransportError):
            raise
        raise Forbidden(
            f"no usable Google Cloud credentials ({' '.join(str(error).split())[:200]}): set "
            "GOOGLE_APPLICATION_CREDENTIALS, run `gcloud auth application-default login`, attach a service account, or "
            "--set storage.options.gs.anon=true for a public bucket"
        ) from error


def _credentials(token: Any, timeout_s: float) -> Any:
    import google.auth
    from google.auth import compute_engine
    from google.oauth2 import credentials as oauth2

    if isinstance(token, Mapping) or (isinstance(token, str) and token.lstrip().startswith("{")):
        info = dict(token) if isinstance(token, Mapping) else json.loads(token)
        return _of_info(info)
    if token == "google_default":
        return google.auth.default(scopes=_SCOPES, request=_request(timeout_s))[0]
    if token == "cloud":
        return compute_engine.Credentials()
    if "/" in token or token.endswith(".json"):
        return _of_info(json.loads(Path(token).expanduser().read_text(encoding="utf-8")))
    return oauth2.Credentials(token=token)


def _of_info(info: dict[str, Any]) -> Any:
    """Return the credentials that a file of Google's tools describes.

    Raises:
        ValueError: it describes none, or their type is not supported.
    """
    from google.auth import aws, identity_pool, impersonated_credentials
    from google.oauth2 import credentials as oauth2
    from google.oauth2 import service_account

    kind = info.get("type")
    if kind == "service_account":
        return service_account.Credentials.from_service_account_info(info, scopes=_SCOPES)
    if kind == "authorized_user":
        return oauth2.Credentials.from_authorized_user_info(info, scopes=_SCOPES)
    if kind == "impersonated_service_account":
        return impersonated_credentials.Credentials.from_impersonated_service_account_info(info, scopes=_SCOPES)
    if kind == "external_account":  # workload identity federation
        of_aws = str(info.get("subject_token_type", "")).endswith("aws4_request")
        return (aws if of_aws else identity_pool).Credentials.from_info(info, scopes=_SCOPES)
    raise ValueError(f"credentials of the type {kind!r}")


def _request(timeout_s: float) -> Any:
    """Return what google-auth makes its requests with; its own timeout is two minutes."""
    from google.auth.transport.requests import Request

    return partial(Request(), timeout=timeout_s)


class GcsBucket:
    """One bucket."""

    sorted_listing = True
    codes_without_support: tuple[int, ...] = ()

    def __init__(self, bucket: str, flat: Mapping[str, Any], timeout_s: float) -> None:
        self.name = f"gs://{bucket}"
        self._endpoint = str(flat.get("endpoint_url") or _GOOGLE).rstrip("/")
        self._bucket, self._timeout_s = bucket, timeout_s
        self._credentials = credentials(flat, timeout_s)
        self._headers = _payer(flat)
        config: Any = {"base_url": self._endpoint}
        provider: Any = None
        client: Any = {**client_options(self._endpoint, timeout_s), "default_headers": self._headers}
        if self._credentials is None:
            # Reads are not signed at all. obstore (0.12) signs writes nevertheless: with an empty token then.
            config["skip_signature"] = True
            config["service_account_key"] = json.dumps({"gcs_base_url": self._endpoint, **_NO_TOKEN})
        elif not hasattr(self._credentials, "refresh_token") or self._credentials.refresh_token:
            from obstore.auth.google import GoogleCredentialProvider

            provider = GoogleCredentialProvider(self._credentials, request=_request(timeout_s))
        else:  # a token that cannot be renewed
            config["bearer_token"] = self._credentials.token
        self.store = open_client(
            GCSStore, bucket, self.name, config=config, client_options=client, credential_provider=provider
        )

    def page(self, prefix: str, *, after: str = "", token: str | None = None, folders: bool = False) -> Page:
        """List one page of the keys that begin with `prefix`."""
        query: dict[str, Any] = {"list-type": 2, "max-keys": _PAGE, "encoding-type": "url", "prefix": prefix}
        query |= {"delimiter": "/"} if folders else {}
        query |= {"continuation-token": token} if token else {"start-after": after} if after else {}
        answer = self._session.get(
            f"{self._endpoint}/{self._bucket}", params=query, headers=self._headers, timeout=self._timeout_s
        )
        if answer.status_code >= 300:
            raise of_status(answer.status_code)(f"list {self.name}: status code: {answer.status_code}")
        return _page(answer.content)

    def delete(self, path: str, tag: Tag | None) -> int:
        """Remove an object, with a tag only that generation of it; return the HTTP status."""
        url = f"{self._endpoint}/{self._bucket}/{quote(path, safe='')}"
        condition = {_GENERATION: tag.version} if tag is not None and tag.version else {}
        answer = self._session.delete(url, headers={**self._headers, **condition}, timeout=self._timeout_s)
        return int(answer.status_code)

    @cached_property
    def _session(self) -> Any:
        """An HTTP session that signs its requests."""
        import requests
        from google.auth.transport.requests import AuthorizedSession

        return requests.Session() if self._credentials is None else AuthorizedSession(self._credentials)


def _payer(flat: Mapping[str, Any]) -> dict[str, str]:
    """Return the header that names the project which pays, where that is not the bucket's."""
    payer = flat.get("requester_pays")
    if not payer or payer == "False":
        return {}
    project = flat.get("project") if payer is True else payer
    if not project:
        raise ConfigError("storage.options.gs.requester_pays needs a project: set storage.options.gs.project")
    return {"x-goog-user-project": str(project)}


def _page(content: bytes) -> Page:
    """Read a page of the XML API."""
    try:
        root = ET.fromstring(content)
    except ET.ParseError as error:
        raise Unreachable(f"a listing that is not XML: {error}") from error
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
    entries = [
        Entry(
            unquote_plus(entry.findtext("Key", "")),
            int(entry.findtext("Size", "0")),
            entry.findtext("ETag"),
            datetime.fromisoformat(entry.findtext("LastModified", "")),
        )
        for entry in root.iter("Contents")
    ]
    folders = [unquote_plus(entry.findtext("Prefix", "")) for entry in root.iter("CommonPrefixes")]
    return Page.of(entries, folders, root.findtext("NextContinuationToken"))
