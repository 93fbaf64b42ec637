"""Effects: the options of S3, named as s3fs names them: from the config and the environment, for obstore, s3fs and botocore."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from imgbatch.errors import ConfigError
from imgbatch.storage.bucket import as_text, client_options, require_known

# The options of s3fs, and their names in obstore.
_OPTIONS = {
    "key": "access_key_id",
    "secret": "secret_access_key",
    "token": "session_token",
    "anon": "skip_signature",
    "endpoint_url": "endpoint",
    "region": "region",
    "requester_pays": "request_payer",
    "ServerSideEncryption": "server_side_encryption",
    "SSEKMSKeyId": "sse_kms_key_id",
}
_OWN = {"profile", "addressing_style", "use_dualstack_endpoint", "use_fips_endpoint", "verify", "SSECustomerKey"}
"""Options that are not simply passed on."""

_ALIASES = {
    "username": "key",
    "password": "secret",
    "aws_access_key_id": "key",
    "aws_secret_access_key": "secret",
    "aws_session_token": "token",
    "region_name": "region",
}
_GROUPS = ("client_kwargs", "config_kwargs", "s3_additional_kwargs")
"""Options of s3fs that hold options themselves."""

_WITHOUT_EFFECT = ("use_ssl", "SSECustomerAlgorithm", "SSECustomerKeyMD5")
"""Options that say what the endpoint's URL, or another option, says already."""

ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "key",
    "AWS_SECRET_ACCESS_KEY": "secret",
    "AWS_SESSION_TOKEN": "token",
    "AWS_ENDPOINT_URL_S3": "endpoint_url",
    "AWS_ENDPOINT_URL": "endpoint_url",
    "AWS_REGION": "region",
    "AWS_DEFAULT_REGION": "region",
    "AWS_PROFILE": "profile",
    "AWS_USE_DUALSTACK_ENDPOINT": "use_dualstack_endpoint",
    "AWS_USE_FIPS_ENDPOINT": "use_fips_endpoint",
}
"""Variables of the driver's environment, and the options that they set."""

_CREDENTIALS = {"key", "secret", "token", "profile", "anon"}
EXPRESS = "--x-s3"  # how the names of directory buckets end
AMAZON = "https://{bucket}s3{fips}{dualstack}.{region}.amazonaws.com"


def merged_options(options: Mapping[str, Any], environment: Mapping[str, str]) -> dict[str, Any]:
    """Return one flat set of options in s3fs's terms: those of the config, then those of the environment.

    Options that name credentials keep those of the environment out.

    Raises:
        ConfigError: an option is unknown.
    """
    flat: dict[str, Any] = {}
    for name, value in options.items():
        flat |= value if name in _GROUPS and isinstance(value, Mapping) else {name: value}
    flat |= flat.pop("s3", {})  # of botocore's Config
    flat = {_ALIASES.get(name, name): value for name, value in flat.items() if value is not None}
    require_known("s3", flat, [*_OPTIONS, *_OWN, *_ALIASES, *_WITHOUT_EFFECT])
    flat = {name: value for name, value in flat.items() if name not in _WITHOUT_EFFECT}
    own_credentials = bool(flat.keys() & _CREDENTIALS)
    for name, option in ENVIRONMENT.items():
        if environment.get(name) and not (own_credentials and option in _CREDENTIALS):
            flat.setdefault(option, environment[name])
    for name in ("use_dualstack_endpoint", "use_fips_endpoint"):
        if str(flat.get(name, "")).lower() in ("", "false"):
            flat.pop(name, None)
    return flat


def for_s3fs(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Return what `merged_options` gave in the form that s3fs takes."""
    names = ("key", "secret", "token", "anon", "endpoint_url", "profile", "requester_pays")
    plain = {name: flat[name] for name in names if name in flat}
    extra = {name: flat[name] for name in ("ServerSideEncryption", "SSEKMSKeyId") if name in flat}
    if "SSECustomerKey" in flat:
        extra |= {"SSECustomerAlgorithm": "AES256", "SSECustomerKey": base64.b64decode(customer_key(flat))}
    client = {"region_name": flat.get("region", "us-east-1")}
    client |= {"verify": flat["verify"]} if "verify" in flat else {}
    return {**plain, "client_kwargs": client, "config_kwargs": boto_config(flat), "s3_additional_kwargs": extra}


def customer_key(flat: Mapping[str, Any]) -> str:
    """Return the key of SSE-C in base64, as obstore takes it; s3fs takes its 32 bytes.

    Raises:
        ConfigError: it has another length.
    """
    key = str(flat["SSECustomerKey"])
    if len(key.encode()) == 32:
        return base64.b64encode(key.encode()).decode()
    try:
        if len(base64.b64decode(key, validate=True)) == 32:
            return key
    except binascii.Error:
        pass
    raise ConfigError("storage.options.s3.SSECustomerKey is not a key of 32 bytes, nor one in base64")


def obstore_options(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that obstore takes as they are, and the key of SSE-C."""
    config = {_OPTIONS[name]: as_text(value) for name, value in flat.items() if name in _OPTIONS}
    if "SSECustomerKey" in flat:
        config |= {"server_side_encryption": "sse-c", "sse_customer_key_base64": customer_key(flat)}
    return config


def style(bucket: str, flat: Mapping[str, Any]) -> dict[str, Any]:
    """Return the endpoint and whether the bucket is in its host name.

    It is for Amazon, whose certificates fit names without dots only, and is not for other servers.
    """
    endpoint, style = str(flat.get("endpoint_url") or "").rstrip("/"), flat.get("addressing_style", "auto")
    if style not in ("auto", "path", "virtual"):
        raise ConfigError(f"storage.options.s3.addressing_style={style!r}: expected auto, path or virtual")
    virtual = style == "virtual" or (style == "auto" and not endpoint and "." not in bucket)
    if bucket.endswith(EXPRESS):
        return {}
    if endpoint:
        protocol, _, host = endpoint.partition("://")
        return {
            "endpoint": f"{protocol}://{bucket}.{host}" if virtual else endpoint,
            "virtual_hosted_style_request": virtual,
        }
    fips, dualstack = flat.get("use_fips_endpoint"), flat.get("use_dualstack_endpoint")
    if not fips and not dualstack:
        return {"virtual_hosted_style_request": virtual}
    host = AMAZON.format(
        bucket=f"{bucket}." if virtual else "", fips="-fips" if fips else "", dualstack=".dualstack" if dualstack else "",
        region=flat["region"],
    )  # fmt: skip
    return {"endpoint": host, "virtual_hosted_style_request": virtual}


def http_options(flat: Mapping[str, Any], timeout_s: float) -> dict[str, Any]:
    """Return obstore's options of the HTTP client, with the certificates of `verify`.

    Raises:
        ConfigError: the file of certificates cannot be read.
    """
    options = client_options(str(flat.get("endpoint_url") or ""), timeout_s)
    verify = flat.get("verify")
    if verify is False:
        options["allow_invalid_certificates"] = True
    elif isinstance(verify, str):
        try:
            options["root_certificate"] = Path(verify).read_bytes()
        except OSError as error:
            raise ConfigError(f"storage.options.s3.verify={verify!r}: {error.strerror}") from error
    return options


def boto_config(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of botocore's Config."""
    names = ("use_dualstack_endpoint", "use_fips_endpoint")
    config: dict[str, Any] = {name: True for name in names if flat.get(name)}
    if "addressing_style" in flat:
        config["s3"] = {"addressing_style": flat["addressing_style"]}
    return config
