"""Effects: buckets that speak S3: their credentials and regions, and the requests that obstore cannot make.

Those requests are made by botocore, which also finds the credentials.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from functools import cached_property
from typing import Any

import obstore
from obstore.store import S3Store

from imgbatch.errors import BadPath, Forbidden
from imgbatch.storage.bucket import CODES_WITHOUT_SUPPORT, Entry, Page, Tag, as_text
from imgbatch.storage.obstore_store import open_client
from imgbatch.storage.s3_options import AMAZON, EXPRESS, boto_config, http_options, obstore_options, style

log = logging.getLogger(__name__)

SCHEMES = ("s3", "s3a")

# The rule of S3, extended by the names of older buckets and of other servers. obstore puts the name into the URL of a signed
# request. Other characters, such as the # in s3://evil.org#/x, could send that request to another host.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,254}")
_PAGE = 1000
_URL_VALID_FOR = timedelta(minutes=10)
# botocore renews credentials 15 minutes before they expire, so these are still valid after 10 minutes.
_CREDENTIALS_VALID_FOR = timedelta(minutes=10)
_REGION_TIMEOUT_S = 5.0


def split(uri: str) -> tuple[str, str]:
    """Return bucket and key of a URI.

    Raises:
        BadPath: the bucket cannot exist.
    """
    bucket, _, key = uri.partition("://")[2].partition("/")
    if bucket.startswith("arn:"):
        raise BadPath(
            f"{uri}: ARNs are not read: write the alias of the access point, s3://ALIAS-s3alias/…, which the console and "
            "`aws s3control get-access-point` show"
        )
    if bucket and not _NAME.fullmatch(bucket):
        raise BadPath(f"{uri}: {bucket!r} is not a valid bucket name")
    return bucket, key


def _region(profile: str | None) -> str:
    """Return the region that the AWS tools use."""
    import botocore.session

    return botocore.session.Session(profile=profile).get_config_variable("region") or "us-east-1"


def region_of(bucket: str, endpoint: str) -> str | None:
    """Ask S3 for the region of a bucket, without credentials; None if it cannot be determined.

    Args:
        endpoint: of any region, path style.
    """
    import urllib.error
    import urllib.request

    request = urllib.request.Request(f"{endpoint}/{bucket}", method="HEAD")
    try:
        with urllib.request.urlopen(request, timeout=_REGION_TIMEOUT_S) as response:
            return response.headers.get("x-amz-bucket-region")  # type: ignore[no-any-return]
    except urllib.error.HTTPError as error:  # 301, 400 and 403 carry it, too
        error.close()
        return error.headers.get("x-amz-bucket-region")
    except OSError:
        return None


class BotoCredentials:
    """Credentials from the sources of the AWS tools (profile, role, container, instance), renewed before they expire."""

    def __init__(self, profile: str | None) -> None:
        import botocore.session

        credentials = botocore.session.Session(profile=profile).get_credentials()
        if credentials is None:
            raise Forbidden(
                "no S3 credentials found: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile or a role, "
                "or --set storage.options.anon=true for a public bucket"
            )
        self._credentials = credentials

    def __call__(self) -> dict[str, Any]:
        """Return the credentials with which obstore signs until they expire."""
        frozen = self._credentials.get_frozen_credentials()
        return {
            "access_key_id": frozen.access_key,
            "secret_access_key": frozen.secret_key,
            "token": frozen.token,
            "expires_at": datetime.now(UTC) + _CREDENTIALS_VALID_FOR,
        }


class S3Bucket:
    """One bucket."""

    codes_without_support = CODES_WITHOUT_SUPPORT

    def __init__(self, bucket: str, options: Mapping[str, Any], timeout_s: float, retries: int = 0) -> None:
        self.name, self._bucket, self._timeout_s = f"s3://{bucket}", bucket, timeout_s
        self.sorted_listing = not bucket.endswith(EXPRESS)
        flat = {**options, "region": str(options.get("region") or _region(options.get("profile")))}
        provider: Any = None if flat.get("anon") or flat.get("key") else BotoCredentials(flat.get("profile"))
        if not flat.get("endpoint_url") and self.sorted_listing:
            flat["region"] = self._actual_region(flat["region"])
        self._flat = flat
        config = obstore_options(flat) | style(bucket, flat) | ({} if self.sorted_listing else {"s3_express": True})
        # A listing that is not sorted cannot resume after its last key: obstore itself repeats its failed requests.
        retries = 0 if self.sorted_listing else retries
        self.store = open_client(
            S3Store, bucket, self.name, config=config, client_options=http_options(flat, timeout_s),
            retry_config={"max_retries": retries}, credential_provider=provider,
        )  # fmt: skip

    def _actual_region(self, region: str) -> str:
        """Return the region of the bucket, whatever the configuration says."""
        actual = region_of(self._bucket, AMAZON.format(bucket="", fips="", dualstack="", region=region))
        if actual and actual != region:
            log.info("%s is in %s, not in %s: its requests go there", self.name, actual, region)
        return actual or region

    def page(self, prefix: str, *, after: str = "", token: str | None = None, folders: bool = False) -> Page:
        """List one page of the keys that begin with `prefix`."""
        request: dict[str, Any] = {"Bucket": self._bucket, "Prefix": prefix, "MaxKeys": _PAGE}
        request |= {"Delimiter": "/"} if folders else {}
        request |= {"ContinuationToken": token} if token else {"StartAfter": after} if after else {}
        if self._flat.get("requester_pays"):
            request["RequestPayer"] = "requester"
        response = self._client.list_objects_v2(**request)
        entries = [
            Entry(entry["Key"], entry["Size"], entry["ETag"], entry["LastModified"])
            for entry in response.get("Contents", [])
        ]
        below = [entry["Prefix"] for entry in response.get("CommonPrefixes", [])]
        return Page.of(entries, below, response.get("NextContinuationToken"))

    def delete(self, path: str, tag: Tag | None) -> int:
        """Remove an object; return the HTTP status.

        With a tag, only that version of it, by a signed URL, since obstore has no conditional deletion (0.12). The status
        is one of `codes_without_support` where that is not available.
        """
        if tag is None or tag.etag is None:
            obstore.delete(self.store, path)
            return 204
        if self._flat.get("anon"):
            return 405
        import ssl  # imported here: needed at most once in a run
        import urllib.error
        import urllib.request

        url = obstore.sign(self.store, "DELETE", path, _URL_VALID_FOR)
        request = urllib.request.Request(url, method="DELETE", headers={"If-Match": tag.etag})
        try:
            with urllib.request.urlopen(request, timeout=self._timeout_s) as response:
                return int(response.status)
        except urllib.error.HTTPError as error:
            error.close()
            if error.code not in (404, 412, *self.codes_without_support):
                raise
            return error.code
        except urllib.error.URLError as error:
            # Python may lack certificates where obstore, with its own, has them.
            if isinstance(error.reason, ssl.SSLError):
                return 405
            raise error.reason if isinstance(error.reason, OSError) else error from None

    @cached_property
    def _client(self) -> Any:
        """A client of botocore. It takes some 0.1 s to make, and few runs need it."""
        import botocore.config
        import botocore.session
        from botocore import UNSIGNED

        flat = self._flat
        signature = {"signature_version": UNSIGNED} if flat.get("anon") else {}
        config = botocore.config.Config(
            connect_timeout=min(self._timeout_s, 10.0), read_timeout=self._timeout_s, retries={"max_attempts": 0},
            **signature, **boto_config(flat),
        )  # fmt: skip
        return botocore.session.Session(profile=flat.get("profile")).create_client(
            "s3", region_name=flat["region"], endpoint_url=flat.get("endpoint_url"), verify=flat.get("verify"),
            aws_access_key_id=as_text(flat.get("key")), aws_secret_access_key=as_text(flat.get("secret")),
            aws_session_token=as_text(flat.get("token")), config=config,
        )  # fmt: skip
