"""Values: the table that maps the exceptions of storage libraries to ours.

Exceptions are named by text, so that no library has to be imported, or even installed.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from imgbatch.config.secrets import masked
from imgbatch.errors import (
    BadPath,
    Conflict,
    Exists,
    Forbidden,
    Full,
    ImgbatchError,
    NotFound,
    StoreError,
    TimedOut,
    TooLarge,
    Unreachable,
)

ErrorClass = type[StoreError]

_STATUS_IN_TEXT = re.compile(r"status code: (\d{3})")
_DENIED_CODES = (
    "AccessDenied|InvalidAccessKeyId|SignatureDoesNotMatch|ExpiredToken|InvalidToken|TokenRefreshRequired|"
    "AllAccessDisabled|RequestTimeTooSkewed|InvalidObjectState|"
    "AuthenticationFailed|AuthorizationFailure|AuthorizationPermissionMismatch|InvalidAuthenticationInfo|"
    "NoAuthenticationInformation|PublicAccessNotPermitted|AccountIsDisabled|BlobArchived|BlobBeingRehydrated|"
    "UserProjectMissing|UserProjectInvalid|UserProjectAccountProblem"
)
_DENIED = re.compile(_DENIED_CODES)
_BAD_NAME = re.compile("InvalidResourceName|InvalidBucketName|InvalidUri|OutOfRangeInput")
_LATE = re.compile(r"timed? ?out|timeout", re.IGNORECASE)
_DEBUG = "Debug source"  # after it obstore prints its own settings, `retry_timeout` among them

_ERRNO: dict[int, ErrorClass] = {
    errno.ENOENT: NotFound,
    errno.ENOTDIR: NotFound,
    errno.EISDIR: BadPath,
    errno.ENXIO: BadPath,
    errno.ELOOP: BadPath,
    errno.ENAMETOOLONG: BadPath,
    errno.EACCES: Forbidden,
    errno.EPERM: Forbidden,
    errno.EEXIST: Exists,
    errno.ENOSPC: Full,
    errno.EDQUOT: Full,
    errno.EROFS: Full,
    errno.EFBIG: TooLarge,
    errno.ETIMEDOUT: TimedOut,
}


def of_status(status: int) -> ErrorClass:
    """Return the error class of an HTTP status.

    >>> of_status(404).__name__, of_status(503).__name__
    ('NotFound', 'Unreachable')
    """
    return {
        401: Forbidden, 403: Forbidden, 404: NotFound, 410: NotFound, 408: TimedOut, 409: Conflict, 412: Exists,
        504: TimedOut,
    }.get(status, Unreachable)  # fmt: skip


def _by_text(error: BaseException) -> ErrorClass:
    """Classify an error that has its HTTP status, or its cause, only in its message."""
    text = str(error)
    status = _STATUS_IN_TEXT.search(text)
    # Some servers report expired credentials with status 400, and Azure some missing rights with 409. With another status,
    # the word may be part of a key.
    if (status is None or status[1] in ("400", "409")) and _DENIED.search(text):
        return Forbidden
    if status and status[1] == "400" and _BAD_NAME.search(text):
        return BadPath
    if status:
        return of_status(int(status[1]))
    message, _, debug = text.partition(_DEBUG)
    return TimedOut if _LATE.search(message) or "kind: Timeout" in debug or "TimedOut" in debug else Unreachable


def _by_conflict(error: BaseException) -> ErrorClass:
    """Classify status 409: the object exists, or, on Azure, it is archived or may not be read anonymously."""
    return Forbidden if re.search(f"<Code>({_DENIED_CODES})</Code>", str(error)) else Exists


def _by_credentials(error: BaseException) -> ErrorClass:
    """Classify a request without valid credentials: they may be wrong, or the server that issues tokens unreachable."""
    return Unreachable if re.search("TransportError|ServiceRequestError|ConnectionError", str(error)) else Forbidden


def _by_attribute(error: BaseException) -> ErrorClass:
    """Classify an error that has its HTTP status as an attribute."""
    for name in ("status", "status_code", "code"):
        value = getattr(error, name, None)
        if isinstance(value, int) or (isinstance(value, str) and value.isdigit()):
            return of_status(int(value))
    return _by_text(error)


def _by_response(error: BaseException) -> ErrorClass:
    """Classify a botocore ClientError by the response in it."""
    response = getattr(error, "response", {})
    if _DENIED.search(str(response.get("Error", {}).get("Code", ""))):
        return Forbidden
    return of_status(int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)))


def _by_errno(error: BaseException) -> ErrorClass:
    number = getattr(error, "errno", None)
    if number == errno.EINVAL and "pre-condition" in str(error):  # s3fs raises this when an If-None-Match fails
        return Exists
    return _ERRNO[number] if number in _ERRNO else _by_attribute(error)


def _by_cause(error: BaseException) -> ErrorClass:
    return classify_error(error.__cause__) if error.__cause__ else Unreachable


TABLE: dict[str, ErrorClass | Callable[[BaseException], ErrorClass]] = {
    # obstore
    "obstore.exceptions.AlreadyExistsError": _by_conflict,
    "obstore.exceptions.PreconditionError": Conflict,
    "obstore.exceptions.PermissionDeniedError": Forbidden,
    "obstore.exceptions.UnauthenticatedError": _by_credentials,
    "obstore.exceptions.InvalidPathError": BadPath,
    "obstore.exceptions.NotSupportedError": BadPath,
    "obstore.exceptions.NotFoundError": NotFound,
    "obstore.exceptions.NotModifiedError": Conflict,
    "obstore.exceptions.UnknownConfigurationKeyError": BadPath,
    "obstore.exceptions.JoinError": Unreachable,
    "obstore.exceptions.GenericError": _by_text,
    "obstore.exceptions.BaseError": _by_text,
    "pyo3_runtime.PanicException": BadPath,
    # botocore: s3fs does not translate all of its exceptions
    "botocore.exceptions.NoCredentialsError": Forbidden,
    "botocore.exceptions.PartialCredentialsError": Forbidden,
    "botocore.exceptions.CredentialRetrievalError": Forbidden,
    "botocore.exceptions.ProfileNotFound": Forbidden,
    "botocore.exceptions.TokenRetrievalError": Forbidden,
    "botocore.exceptions.NoAuthTokenError": Forbidden,
    "botocore.exceptions.SSOError": Forbidden,
    "botocore.exceptions.LoginError": Forbidden,
    "botocore.exceptions.RefreshWithMFAUnsupportedError": Forbidden,
    "botocore.exceptions.UnknownCredentialError": Forbidden,
    "botocore.exceptions.ParamValidationError": BadPath,
    "botocore.exceptions.ConnectTimeoutError": TimedOut,
    "botocore.exceptions.ReadTimeoutError": TimedOut,
    "botocore.exceptions.ClientError": _by_response,
    "botocore.exceptions.BotoCoreError": _by_text,
    # aiohttp, which s3fs, gcsfs and the https file system use
    "aiohttp.client_exceptions.ClientResponseError": _by_attribute,
    "aiohttp.client_exceptions.InvalidURL": BadPath,
    "aiohttp.client_exceptions.NonHttpUrlClientError": BadPath,
    "aiohttp.client_exceptions.ServerTimeoutError": TimedOut,
    "aiohttp.client_exceptions.ClientError": Unreachable,
    # gcsfs and adlfs
    "gcsfs.retry.HttpError": _by_attribute,
    "google.auth.exceptions.TransportError": Unreachable,
    "google.auth.exceptions.TimeoutError": TimedOut,
    "google.auth.exceptions.GoogleAuthError": Forbidden,
    "azure.core.exceptions.ResourceNotFoundError": NotFound,
    "azure.core.exceptions.ResourceExistsError": Exists,
    "azure.core.exceptions.ClientAuthenticationError": Forbidden,
    "azure.core.exceptions.AzureError": _by_attribute,
    # fsspec and the standard library
    "fsspec.exceptions.FSTimeoutError": TimedOut,
    "builtins.TimeoutError": TimedOut,
    "builtins.FileNotFoundError": NotFound,
    "builtins.NotADirectoryError": NotFound,
    "builtins.PermissionError": Forbidden,
    "builtins.FileExistsError": Exists,
    "builtins.IsADirectoryError": BadPath,
    "builtins.ConnectionError": Unreachable,
    "ssl.SSLError": Unreachable,  # its errno is a code of the TLS library; that of the next two is a code of the resolver
    "socket.gaierror": Unreachable,
    "socket.herror": Unreachable,
    "builtins.OSError": _by_errno,
    "builtins.EOFError": Unreachable,
    "builtins.ValueError": BadPath,
    "builtins.RuntimeError": _by_cause,
}


def classify_error(error: BaseException) -> ErrorClass:
    """Return our error class for `error`: the entry in `TABLE` of the nearest of its base classes."""
    for kind in type(error).__mro__:
        entry = TABLE.get(f"{kind.__module__}.{kind.__qualname__}")
        if isinstance(entry, type):
            return entry
        if entry is not None:
            return entry(error)
    return Unreachable


def _text(error: Exception) -> str:
    """Return the cause in one line.

    Of a store's response: its status and message, without the signed request around them. Of a request that was not sent:
    the reason, which obstore has in its debug output alone.
    """
    text, _, debug = str(error).partition(_DEBUG)
    text = " ".join(text.split()) or type(error).__name__
    if message := re.search(r"status code: (.*?): <\?xml.*<Message>(.*?)</Message>", text):
        return f"{message[1]}: {message[2].partition(' RequestId:')[0]}"
    if text.endswith("error sending request") and (reasons := re.findall(r'(?:error|message): "([^"]+)"', debug)):
        return f"{text[:300]}: {reasons[-1]}"
    return text[:300]


def translate(error: Exception, operation: str, uri: str) -> StoreError:
    """Return our error for `error`, with a message of one line that names the operation and the URI."""
    return classify_error(error)(masked(f"{operation} {uri}: {_text(error)}"))


@contextmanager
def guarded(operation: str, uri: str) -> Iterator[None]:
    """Translate the exceptions of storage libraries into a `StoreError` that names the operation and the URI."""
    try:
        yield
    except ImgbatchError:
        raise
    except BaseException as error:
        # A panic in a Rust library is a BaseException for Python, although only the call has failed.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise translate(error, operation, uri) from error  # type: ignore[arg-type]
