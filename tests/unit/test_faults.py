"""Every exception that a storage library may raise, and our error for it."""

from __future__ import annotations

import asyncio
import concurrent.futures
import errno
import http.client
import io
import json
import os
import socket
import ssl
import urllib.error
from types import SimpleNamespace
from typing import Any

import aiohttp
import botocore.exceptions as boto
import fsspec.exceptions
import google.auth.exceptions as google
import obstore.exceptions as obs
import pytest

from imgbatch.errors import (
    BadPath,
    Conflict,
    Exists,
    Forbidden,
    Full,
    NotFound,
    StoreError,
    TimedOut,
    TooLarge,
    Unreachable,
)
from imgbatch.storage.error_mapping import TABLE, classify_error, guarded, of_status, translate

XML = 'Server returned non-2xx status code: {status}: <?xml version="1.0"?><Error><Code>{code}</Code><Message>{message}</Message></Error>'  # fmt: skip # noqa: E501
REQUEST: Any = SimpleNamespace(real_url="https://host/a.jpg", headers={}, method="GET", url="https://host/a.jpg")


def answer(code: str, status: int) -> boto.ClientError:
    return boto.ClientError(
        {"Error": {"Code": code, "Message": "m"}, "ResponseMetadata": {"HTTPStatusCode": status}}, "GetObject"
    )


def azure(name: str, *bases: type[Exception], **attributes: Any) -> Exception:
    """Return an error of a class with this name, in place of a library that is not installed."""
    kind = type(name, bases or (Exception,), {"__module__": "azure.core.exceptions", **attributes})
    return kind("m")


def http_error(status: int) -> aiohttp.ClientResponseError:
    return aiohttp.ClientResponseError(REQUEST, (), status=status)


def caused_by(cause: Exception) -> RuntimeError:
    error = RuntimeError("outer")
    error.__cause__ = cause
    return error


OBSTORE: list[tuple[Exception, type[StoreError]]] = [
    (obs.NotFoundError("m"), NotFound),
    (obs.AlreadyExistsError("m"), Exists),
    (obs.PreconditionError("m"), Conflict),
    (obs.NotModifiedError("m"), Conflict),
    (obs.PermissionDeniedError("m"), Forbidden),
    (obs.UnauthenticatedError("m"), Forbidden),
    (obs.InvalidPathError("m"), BadPath),
    (obs.NotSupportedError("m"), BadPath),
    (obs.UnknownConfigurationKeyError("m"), BadPath),
    (obs.JoinError("m"), Unreachable),
    (obs.BaseError("m"), Unreachable),
    (obs.GenericError("m"), Unreachable),
    (obs.GenericError("HTTP error: operation timed out"), TimedOut),
    (obs.GenericError("error sending request: connection refused"), Unreachable),
    (obs.GenericError("Server returned non-2xx status code: 503 Service Unavailable: "), Unreachable),
    (obs.GenericError("Server returned non-2xx status code: 429 Too Many Requests: "), Unreachable),
    (obs.GenericError("Server returned non-2xx status code: 500 Internal Server Error: "), Unreachable),
    (obs.GenericError("Server returned non-2xx status code: 504 Gateway Timeout: "), TimedOut),
    (obs.GenericError(XML.format(status="400 Bad Request", code="ExpiredToken", message="m")), Forbidden),
    (obs.GenericError(XML.format(status="400 Bad Request", code="InvalidToken", message="m")), Forbidden),
    (obs.GenericError(XML.format(status="403 Forbidden", code="InvalidObjectState", message="m")), Forbidden),
    (obs.GenericError(XML.format(status="409 Conflict", code="PublicAccessNotPermitted", message="m")), Forbidden),
    (obs.GenericError(XML.format(status="400 Bad Request", code="UserProjectMissing", message="m")), Forbidden),
    (obs.GenericError(XML.format(status="400 Bad Request", code="InvalidResourceName", message="m")), BadPath),
    (obs.GenericError(XML.format(status="404 Not Found", code="ContainerNotFound", message="m")), NotFound),
    (obs.AlreadyExistsError(XML.format(status="409 Conflict", code="BlobArchived", message="m")), Forbidden),
    (obs.AlreadyExistsError(XML.format(status="409 Conflict", code="BlobAlreadyExists", message="m")), Exists),
    (obs.AlreadyExistsError("PUT /BlobArchived/x: status code: 409 Conflict: "), Exists),
    (obs.UnauthenticatedError("External GCP credential provider: TransportError: no route to host"), Unreachable),
    (obs.UnauthenticatedError("External GCP credential provider: RefreshError: ('invalid_grant')"), Forbidden),
    (obs.GenericError("GET /AccessDenied.jpg: Server returned non-2xx status code: 503 SlowDown: "), Unreachable),
]

BOTO: list[tuple[Exception, type[StoreError]]] = [
    (boto.NoCredentialsError(), Forbidden),
    (boto.PartialCredentialsError(provider="p", cred_var="v"), Forbidden),
    (boto.CredentialRetrievalError(provider="p", error_msg="m"), Forbidden),
    (boto.ProfileNotFound(profile="p"), Forbidden),
    (boto.TokenRetrievalError(provider="p", error_msg="m"), Forbidden),
    (boto.NoAuthTokenError(), Forbidden),
    (boto.SSOTokenLoadError(error_msg="m"), Forbidden),
    (boto.UnauthorizedSSOTokenError(), Forbidden),
    (boto.LoginRefreshRequired(), Forbidden),
    (boto.RefreshWithMFAUnsupportedError(), Forbidden),
    (boto.UnknownCredentialError(name="n"), Forbidden),
    (boto.ParamValidationError(report="r"), BadPath),
    (boto.ConnectTimeoutError(endpoint_url="u"), TimedOut),
    (boto.ReadTimeoutError(endpoint_url="u"), TimedOut),
    (boto.EndpointConnectionError(endpoint_url="u"), Unreachable),
    (boto.ConnectionClosedError(endpoint_url="u"), Unreachable),
    (boto.ProxyConnectionError(proxy_url="u"), Unreachable),
    (boto.SSLError(endpoint_url="u", error="e"), Unreachable),
    (boto.HTTPClientError(error="e"), Unreachable),
    (boto.ResponseStreamingError(error="e"), Unreachable),
    (boto.IncompleteReadError(actual_bytes=1, expected_bytes=2), Unreachable),
    (boto.MetadataRetrievalError(error_msg="m"), Unreachable),
    (boto.BotoCoreError(), Unreachable),
    (answer("NoSuchKey", 404), NotFound),
    (answer("NoSuchBucket", 404), NotFound),
    (answer("AccessDenied", 403), Forbidden),
    (answer("403", 403), Forbidden),
    (answer("InvalidAccessKeyId", 403), Forbidden),
    (answer("SignatureDoesNotMatch", 403), Forbidden),
    (answer("ExpiredToken", 400), Forbidden),
    (answer("TokenRefreshRequired", 400), Forbidden),
    (answer("RequestTimeTooSkewed", 403), Forbidden),
    (answer("InvalidObjectState", 403), Forbidden),
    (answer("AllAccessDisabled", 403), Forbidden),
    (answer("PreconditionFailed", 412), Exists),
    (answer("ConditionalRequestConflict", 409), Conflict),
    (answer("SlowDown", 503), Unreachable),
    (answer("InternalError", 500), Unreachable),
    (answer("RequestTimeout", 400), Unreachable),
    (boto.ClientError({}, "GetObject"), Unreachable),
]

AIOHTTP: list[tuple[Exception, type[StoreError]]] = [
    (http_error(401), Forbidden),
    (http_error(403), Forbidden),
    (http_error(404), NotFound),
    (http_error(410), NotFound),
    (http_error(408), TimedOut),
    (http_error(504), TimedOut),
    (http_error(429), Unreachable),
    (http_error(500), Unreachable),
    (aiohttp.ContentTypeError(REQUEST, (), status=502), Unreachable),
    (aiohttp.TooManyRedirects(REQUEST, (), status=302), Unreachable),
    (aiohttp.WSServerHandshakeError(REQUEST, (), status=403), Forbidden),
    (aiohttp.InvalidURL("u"), BadPath),
    (aiohttp.NonHttpUrlClientError("u"), BadPath),
    (aiohttp.ServerTimeoutError("m"), TimedOut),
    (aiohttp.ConnectionTimeoutError("m"), TimedOut),
    (aiohttp.SocketTimeoutError("m"), TimedOut),
    (aiohttp.ServerDisconnectedError(), Unreachable),
    (aiohttp.ServerFingerprintMismatch(b"a", b"b", "h", 1), Unreachable),
    (aiohttp.ClientConnectionError("m"), Unreachable),
    (aiohttp.ClientConnectionResetError("m"), Unreachable),
    (aiohttp.ClientOSError(errno.EACCES, "m"), Unreachable),
    (aiohttp.ClientPayloadError("m"), Unreachable),
    (aiohttp.ClientError("m"), Unreachable),
]

OTHERS: list[tuple[Exception, type[StoreError]]] = [
    (google.GoogleAuthError("m"), Forbidden),
    (google.DefaultCredentialsError("m"), Forbidden),
    (google.RefreshError("m"), Forbidden),
    (google.TransportError("m"), Unreachable),
    (google.TimeoutError("m"), TimedOut),
    (azure("ResourceNotFoundError"), NotFound),
    (azure("ResourceExistsError"), Exists),
    (azure("ClientAuthenticationError"), Forbidden),
    (azure("AzureError"), Unreachable),
    (azure("HttpResponseError", type(azure("AzureError")), status_code=404), NotFound),
    (azure("HttpResponseError", type(azure("AzureError")), status_code=403), Forbidden),
    (azure("HttpResponseError", type(azure("AzureError")), status_code=503), Unreachable),
    (type("HttpError", (Exception,), {"__module__": "gcsfs.retry", "code": 404})("m"), NotFound),
    (type("HttpError", (Exception,), {"__module__": "gcsfs.retry", "code": "403"})("m"), Forbidden),
    (fsspec.exceptions.FSTimeoutError("m"), TimedOut),
    (fsspec.exceptions.BlocksizeMismatchError("m"), BadPath),
    (urllib.error.HTTPError("u", 404, "m", {}, io.BytesIO()), NotFound),  # type: ignore[arg-type]
    (urllib.error.URLError("refused"), Unreachable),
    (http.client.IncompleteRead(b""), Unreachable),
]

STANDARD: list[tuple[Exception, type[StoreError]]] = [
    (TimeoutError("m"), TimedOut),
    (TimeoutError("m"), TimedOut),
    (concurrent.futures.TimeoutError("m"), TimedOut),
    (FileNotFoundError("m"), NotFound),
    (NotADirectoryError("m"), NotFound),
    (PermissionError("m"), Forbidden),
    (FileExistsError("m"), Exists),
    (IsADirectoryError("m"), BadPath),
    (ConnectionError("m"), Unreachable),
    (ConnectionResetError(errno.ECONNRESET, "m"), Unreachable),
    (ConnectionRefusedError(errno.ECONNREFUSED, "m"), Unreachable),
    (BrokenPipeError(errno.EPIPE, "m"), Unreachable),
    (socket.gaierror(socket.EAI_NONAME, "m"), Unreachable),
    (socket.herror(1, "HOST_NOT_FOUND"), Unreachable),
    (ssl.SSLError(1, "WRONG_VERSION_NUMBER"), Unreachable),
    (ssl.SSLCertVerificationError(1, "CERTIFICATE_VERIFY_FAILED"), Unreachable),
    (ssl.SSLEOFError(8, "EOF"), Unreachable),
    (EOFError("m"), Unreachable),
    (asyncio.IncompleteReadError(b"", 1), Unreachable),
    (ValueError("embedded null byte"), BadPath),
    (UnicodeEncodeError("utf-8", "\udc80", 0, 1, "m"), BadPath),
    (RuntimeError("m"), Unreachable),
    (caused_by(PermissionError("m")), Forbidden),
    (caused_by(caused_by(FileNotFoundError("m"))), NotFound),
    (KeyError("m"), Unreachable),
    (OSError("pre-condition"), Unreachable),
    (OSError(errno.EINVAL, "At least one of the pre-conditions you specified did not hold"), Exists),
    (OSError(errno.EINVAL, "m"), Unreachable),
]

ERRNOS = {
    errno.ENOENT: NotFound, errno.ENOTDIR: NotFound, errno.EISDIR: BadPath, errno.ELOOP: BadPath, errno.ENXIO: BadPath,
    errno.ENAMETOOLONG: BadPath, errno.EACCES: Forbidden, errno.EPERM: Forbidden, errno.EEXIST: Exists,
    errno.ENOSPC: Full, errno.EDQUOT: Full, errno.EROFS: Full, errno.EFBIG: TooLarge, errno.ETIMEDOUT: TimedOut,
    errno.EIO: Unreachable, errno.ESTALE: Unreachable, errno.EMFILE: Unreachable, errno.ENETUNREACH: Unreachable,
    errno.EHOSTUNREACH: Unreachable, errno.ECONNABORTED: Unreachable, errno.EBUSY: Unreachable,
}  # fmt: skip


def _named(case: Any) -> str | None:
    return f"{type(case).__module__}.{type(case).__name__}" if isinstance(case, Exception) else None


@pytest.mark.parametrize("error, meant", OBSTORE + BOTO + AIOHTTP + OTHERS + STANDARD, ids=_named)
def test_each_exception_is_mapped(error: Exception, meant: type[StoreError]) -> None:
    assert classify_error(error) is meant


@pytest.mark.parametrize("number", ERRNOS, ids=lambda number: errno.errorcode[number])
def test_each_errno_is_mapped(number: int) -> None:
    assert classify_error(OSError(number, os.strerror(number))) is ERRNOS[number]


@pytest.mark.parametrize(
    "status, meant",
    [(401, Forbidden), (403, Forbidden), (404, NotFound), (408, TimedOut), (409, Conflict), (410, NotFound),
     (412, Exists), (429, Unreachable), (500, Unreachable), (502, Unreachable), (503, Unreachable), (504, TimedOut)],
)  # fmt: skip
def test_each_http_status_is_mapped(status: int, meant: type[StoreError]) -> None:
    assert of_status(status) is meant


def test_every_exception_of_obstore_is_in_the_table_and_in_these_tests() -> None:
    named = {f"{kind.__module__}.{kind.__qualname__}" for kind in vars(obs).values() if isinstance(kind, type)}
    assert named
    assert named <= TABLE.keys()
    assert {kind for kind in vars(obs).values() if isinstance(kind, type)} == {type(error) for error, _ in OBSTORE}


def test_every_exception_of_botocore_and_aiohttp_has_a_base_class_in_the_table() -> None:
    unknown = {
        kind.__name__
        for module in (boto, aiohttp.client_exceptions)
        for kind in vars(module).values()
        if isinstance(kind, type)
        and issubclass(kind, Exception)
        and kind.__module__ == module.__name__
        and not any(f"{each.__module__}.{each.__qualname__}" in TABLE for each in kind.__mro__)
    }
    # A deprecation, a bug in a definition, a web socket's: no request raises them.
    assert unknown == {
        "UnsupportedTLSVersionWarning",
        "UndefinedModelAttributeError",
        "WSMessageTypeError",
        "ImminentRemovalWarning",
        "MissingServiceIdError",
    }


@pytest.mark.parametrize("name", [name for name in TABLE if name.partition(".")[0] in ("obstore", "botocore", "aiohttp", "builtins", "fsspec", "ssl", "socket")])  # fmt: skip # noqa: E501
def test_every_entry_for_an_installed_library_names_a_class_that_exists(name: str) -> None:
    module, _, kind = name.rpartition(".")
    exception = getattr(__import__(module, fromlist=[kind]), kind)
    assert f"{exception.__module__}.{exception.__qualname__}" == name


def test_an_error_names_the_operation_the_uri_and_the_cause_in_one_line() -> None:
    error = translate(OSError("first\n  second"), "read", "s3://b/ü x.jpg")
    assert str(error) == "read s3://b/ü x.jpg: first second"


def test_an_error_without_a_text_names_its_class() -> None:
    assert str(translate(aiohttp.ServerTimeoutError(), "read", "u")) == "read u: ServerTimeoutError"


def test_a_request_that_was_not_sent_says_why() -> None:
    debug = """Debug source:
    ConnectError("dns error", Custom { kind: Uncategorized, error: "failed to lookup address information: unknown" })"""
    error = obs.GenericError(
        f"Error performing GET https://host/x in 1ms - HTTP error: error sending request\n\n{debug}"
    )
    assert str(translate(error, "read", "az://c/x")).endswith(
        "sending request: failed to lookup address information: unknown"
    )


def test_an_s3_error_is_reported_by_its_status_and_message() -> None:
    text = "GET http://host/b/x in 1 ms - " + XML.format(status="403 Forbidden", code="AccessDenied", message="Access denied.")  # fmt: skip # noqa: E501
    assert str(translate(obs.PermissionDeniedError(text), "read", "s3://b/x")) == "read s3://b/x: 403 Forbidden: Access denied."  # fmt: skip # noqa: E501


def test_errors_contain_no_signature_and_no_password() -> None:
    uri = "https://me:hunter2@host/a.jpg?X-Amz-Signature=0a1b&X-Amz-Credential=AKIA%2F1&x=1"
    message = str(translate(OSError(f"cannot get {uri}"), "read", uri))
    assert not any(secret in message for secret in ("hunter2", "0a1b", "AKIA"))
    assert "host/a.jpg" in message


def test_our_errors_pass_unchanged() -> None:
    ours = NotFound("as it was")
    with pytest.raises(NotFound) as caught, guarded("read", "u"):
        raise ours
    assert caught.value is ours


def test_a_signal_is_not_a_store_error() -> None:
    with pytest.raises(KeyboardInterrupt), guarded("read", "u"):
        raise KeyboardInterrupt


def test_the_cause_is_kept() -> None:
    cause = json.JSONDecodeError("m", "d", 0)
    with pytest.raises(BadPath) as caught, guarded("read", "u"):
        raise cause
    assert caught.value.__cause__ is cause
