"""The kinds of URLs: how each is opened with its own package's retries off, written to, and what its failures mean.

scheme               needs                       lists   writes
s3://BUCKET/PATH     s3fs, in mistudio[s3]       yes     yes
gs://BUCKET/PATH     gcsfs, in mistudio[gcs]     yes     yes     its JSON API, which Rapid (zonal) buckets do not have
hf://datasets/O/N    huggingface_hub             yes     yes     a commit for each file; HF buckets are not tested by us
http(s)://HOST/PATH  aiohttp                     no      no      the server must answer range requests
memory://PATH        nothing                     yes     yes     of this process only, for tests

huggingface_hub's retries cannot be turned off: six attempts in 23 s, for all requests but the commit itself.
"""

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

TIMEOUT_S = 60.0
"""A server that says nothing for so long is asked again."""
_GS_SMALL_BYTES: Final = 5 << 20
"""Below this, gcsfs's `put_file` sends a file between marks, which may be a part of the file."""


def _open(url: str) -> tuple[Any, str]:
    import fsspec

    fs, path = fsspec.core.url_to_fs(url)
    return fs, path


def _open_s3(url: str) -> tuple[Any, str]:
    import fsspec

    once = {"total_max_attempts": 1, "mode": "standard"}
    timeouts = {"connect_timeout": TIMEOUT_S, "read_timeout": TIMEOUT_S}
    fs, path = fsspec.core.url_to_fs(url, config_kwargs={"retries": once, **timeouts}, use_listings_cache=False)
    fs.retries = 1
    return fs, path


def _open_gs(url: str) -> tuple[Any, str]:
    """Through gcsfs's JSON client. Its default one asks over gRPC before every read what kind of bucket it is, for up
    to a minute where that is not answered, and is only needed for Rapid buckets. Credentials that are named must be
    there: gcsfs's own rules go on to none at all, which the server then refuses."""
    from gcsfs.core import GCSFileSystem

    named = {"token": "google_default"} if "GOOGLE_APPLICATION_CREDENTIALS" in os.environ else {}
    fs = GCSFileSystem(requests_timeout=_http_timeout(), consistency="md5", **named)
    fs._request = partial(getattr(GCSFileSystem._request, "__wrapped__", GCSFileSystem._request), fs)
    return fs, str(fs._strip_protocol(url))


def _open_http(url: str) -> tuple[Any, str]:
    import fsspec

    fs, path = fsspec.core.url_to_fs(url, client_kwargs={"timeout": _http_timeout()})
    return fs, path


def _http_timeout() -> Any:
    import aiohttp

    return aiohttp.ClientTimeout(total=None, sock_connect=TIMEOUT_S, sock_read=TIMEOUT_S)


def _upload(fs: Any, path: str, source: Path | bytes) -> None:
    if isinstance(source, bytes):
        fs.pipe_file(path, source)
    else:
        fs.put_file(str(source), path)


def _upload_gs(fs: Any, path: str, source: Path | bytes) -> None:
    """Always as a resumable upload, if of one piece."""
    if isinstance(source, Path) and source.stat().st_size >= _GS_SMALL_BYTES:
        fs.put_file(str(source), path)
    else:
        data = source if isinstance(source, bytes) else source.read_bytes()
        fs.pipe_file(path, data, chunksize=len(data))


def _upload_hf(fs: Any, path: str, source: Path | bytes) -> None:
    """One commit. (fsspec's way would copy the file first, and leave the copy behind after a failure.)"""
    from huggingface_hub import get_token
    from huggingface_hub.errors import LocalTokenNotFoundError

    if not (fs.token or get_token()):
        raise LocalTokenNotFoundError("writing needs a token")
    place = fs.resolve_path(path)
    try:
        with _without_bars():
            _commit(fs, place, source)
    except RuntimeError as error:  # what happened to the bytes comes wrapped in one
        raise error.__cause__ or OSError(str(error)) from error
    except ValueError as error:
        raise RefusedError(str(error)) from error
    fs.invalidate_cache(path)


def _commit(fs: Any, place: Any, source: Path | bytes) -> None:
    from huggingface_hub.hf_file_system import HfFileSystemResolvedBucketPath

    if isinstance(place, HfFileSystemResolvedBucketPath):
        fs._api.batch_bucket_files(place.bucket_id, add=[(source, place.path)])
        return
    where = {"repo_id": place.repo_id, "repo_type": place.repo_type, "revision": place.revision}
    fs._api.upload_file(path_or_fileobj=source, path_in_repo=place.path_in_repo, **where)


@contextmanager
def _without_bars() -> Iterator[None]:
    """huggingface_hub shows no progress of its own beside ours."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def _make_bucket(tool: str, path: str) -> str:
    return f"Make the bucket first: `{tool}{path.split('/')[0]}`."


def _make_repository(path: str) -> str:
    kind, name, _, _ = _repository(path)
    return f"Make the repository first: `hf repos create {name} --type {kind}`."


def _remove_from_repository(path: str) -> str:
    kind, name, branch, below = _repository(path)
    return f"hf repos delete-files {name} '{below or '*'}' --type {kind}" + (f" --revision {branch}" if branch else "")


def _repository(path: str) -> tuple[str, str, str, str]:
    """(dataset, owner/name, branch, path in it) of datasets/owner/name@branch/path."""
    first, *rest = path.split("/")
    kind, names = (first[:-1], rest) if first in ("datasets", "models", "spaces") else ("model", [first, *rest])
    name, _, branch = "/".join(names[:2]).partition("@")
    return kind, name, branch, "".join(f"{name}/" for name in names[2:])


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """One kind of URL."""

    install: str
    """What to install where its package is missing."""
    credentials: str
    """What to set where the server wants to know who asks."""
    open: Callable[[str], tuple[Any, str]] = _open
    """URL -> fsspec's file system, and what the URL is called there. ImportError: its package is not installed."""
    upload: Callable[[Any, str, Path | bytes], None] = _upload
    """(file system, path, file or bytes): the path holds them."""
    reading: dict[str, Any] = field(default_factory=dict)
    """What else `cat_file` is told."""
    make: Callable[[str], str] = "Make {} first.".format
    """Path -> what to do where its bucket or repository is not there."""
    remove: Callable[[str], str] | None = None
    """Path -> the command that takes away the files below it."""
    lists: bool = True
    """Whether it can be asked which files there are; one that cannot is not written to either."""


_HTTP: Final = Scheme(install="aiohttp", credentials="a password", open=_open_http, lists=False)
SCHEMES: dict[str, Scheme] = {
    "s3": Scheme(
        install="mistudio[s3]",
        credentials="AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or for a public bucket "
        "FSSPEC_S3='{\"anon\": true}'; AWS_ENDPOINT_URL names a server that is not Amazon's",
        open=_open_s3,
        make=partial(_make_bucket, "aws s3 mb s3://"),
        remove="aws s3 rm --recursive s3://{}".format,
    ),
    "gs": Scheme(
        install="mistudio[gcs]",
        credentials="GOOGLE_APPLICATION_CREDENTIALS to a key file, or run `gcloud auth application-default login`",
        open=_open_gs,
        upload=_upload_gs,
        make=partial(_make_bucket, "gcloud storage buckets create gs://"),
        remove="gcloud storage rm --recursive gs://{}".format,
    ),
    "hf": Scheme(
        install="huggingface_hub",
        credentials="HF_TOKEN, or run `hf auth login`",
        upload=_upload_hf,
        reading={"cache_type": "none"},  # else 5 MiB more come with every piece
        make=_make_repository,
        remove=_remove_from_repository,
    ),
    "http": _HTTP,
    "https": _HTTP,
    "memory": Scheme(install="fsspec", credentials="nothing"),
}

# ---- what a failure is

_NETWORK_PACKAGES: Final = {
    *("aiohttp", "aiobotocore", "asyncio", "botocore", "fsspec", "gcsfs", "google", "hf_xet", "httpcore", "httpcore2"),
    *("httpx", "httpx2", "huggingface_hub", "requests", "s3fs", "urllib3"),
}
_CREDENTIAL_ERRORS: Final = {
    *("NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "ProfileNotFound"),
    *("DefaultCredentialsError", "MalformedError", "TokenRetrievalError", "LocalTokenNotFoundError"),
}
_CONNECTION_ERRORS: Final = {
    *("ClientConnectorError", "ClientConnectorDNSError", "ConnectError", "EndpointConnectionError"),
}
_GS_TEXTS: Final = {"Forbidden: ": 403, "Bad Request: ": 400}
"""How the text of a plain OSError or ValueError of gcsfs begins -> the HTTP status that it stands for."""


class RefusedError(OSError):
    """The server does not take this."""


class ShortError(OSError):
    """Fewer bytes came than were asked for."""


def is_of_the_network(error: BaseException) -> bool:
    """Whether it is a failure of the connection or the server. Told by the package that it comes from, since none of
    them can be imported here."""
    package = type(error).__module__.split(".")[0]
    return isinstance(error, (OSError, EOFError)) or package in _NETWORK_PACKAGES or status_of(error) is not None


def is_unreachable(error: BaseException) -> bool:
    """Whether nothing answers at all: the host has no address, or takes no connection."""
    return type(error).__name__ in _CONNECTION_ERRORS


def is_of_credentials(error: BaseException) -> bool:
    """Whether no credentials were found, before any were refused."""
    return type(error).__name__ in _CREDENTIAL_ERRORS


def is_refused(error: BaseException) -> bool:
    """Whether the server refuses these credentials."""
    return isinstance(error, PermissionError) or status_of(error) in (401, 403)


def is_short(error: BaseException) -> bool:
    """Whether the file ends before the bytes that were asked for."""
    return isinstance(error, ShortError) or status_of(error) == 416 or "InvalidRange" in str(error)


def may_pass(error: BaseException) -> bool:
    """Whether asking again may help."""
    if isinstance(error, (PermissionError, RefusedError, ValueError)) or is_of_credentials(error):
        return False
    if isinstance(error, OSError) and error.errno in (errno.EINVAL, errno.ENOSPC):
        return False
    status = status_of(error)
    if status == 401 and "Invalid Credentials" in str(error):  # gcsfs could not renew its token just now
        return True
    return status is None or status in (408, 429) or status >= 500


def status_of(error: BaseException) -> int | None:
    """The answer's HTTP status, where the error tells it."""
    fields = vars(error)
    status = fields.get("status", fields.get("code", getattr(fields.get("response"), "status_code", None)))
    if isinstance(status, int):
        return status
    if type(error) in (OSError, ValueError):
        return next((code for text, code in _GS_TEXTS.items() if str(error).startswith(text)), None)
    return None
