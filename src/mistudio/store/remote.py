"""Files at a URL: the one place that knows fsspec. Read in parallel ranges, written whole, tried again where it helps.

scheme               needs                       lists   writes
s3://BUCKET/PATH     s3fs, in mistudio[s3]       yes     yes
gs://BUCKET/PATH     gcsfs, in mistudio[gcs]     yes     yes     not tested by us
hf://datasets/O/N    huggingface_hub             yes     yes     a commit for each file; writing is not tested by us
http(s)://HOST/PATH  aiohttp                     no      no      the server must answer range requests
memory://PATH        nothing                     yes     yes     of this process only, for tests

An attempt that fails in a way that may pass (500, 503, a time-out, a broken or short answer) is repeated after each of
`WAITS_S`: seven attempts in about half a minute. s3fs's own retries are turned off, so that these are all there are;
gcsfs and huggingface_hub try again by themselves too.
"""

import errno
import logging
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, Generic, TypeVar

from mistudio.errors import StoreError

WAITS_S = (0.5, 1, 2, 4, 8, 16)
"""Pauses after failed attempts."""
TIMEOUT_S = 60.0
"""A server that says nothing for so long is asked again."""
PIECE_BYTES = 1 << 23
"""Bytes asked for in one request."""
AT_ONCE = 8
"""Requests for pieces of one file that are under way at the same time."""
T = TypeVar("T")
log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """One kind of URL."""

    install: str
    """What to install where its package is missing."""
    credentials: str
    """What to set where the server wants to know who asks."""
    options: Callable[[], dict[str, Any]]
    """What fsspec is told."""
    lists: bool = True
    """Whether it can be asked which files there are; one that cannot is not written to either."""


def _s3_options() -> dict[str, Any]:
    once = {"total_max_attempts": 1, "mode": "standard"}
    timeouts = {"connect_timeout": TIMEOUT_S, "read_timeout": TIMEOUT_S}
    return {"config_kwargs": {"retries": once, **timeouts}, "use_listings_cache": False}


def _http_options() -> dict[str, Any]:
    import aiohttp

    return {
        "client_kwargs": {"timeout": aiohttp.ClientTimeout(total=None, sock_connect=TIMEOUT_S, sock_read=TIMEOUT_S)}
    }


_HTTP: Final = Scheme(install="aiohttp", credentials="a password", options=_http_options, lists=False)
SCHEMES: dict[str, Scheme] = {
    "s3": Scheme(
        install="mistudio[s3]",
        credentials="AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or for a public bucket "
        "FSSPEC_S3='{\"anon\": true}'; AWS_ENDPOINT_URL names a server that is not Amazon's",
        options=_s3_options,
    ),
    "gs": Scheme(
        install="mistudio[gcs]",
        credentials="GOOGLE_APPLICATION_CREDENTIALS, or run `gcloud auth application-default login`",
        options=dict,
    ),
    "hf": Scheme(install="huggingface_hub", credentials="HF_TOKEN, or run `hf auth login`", options=dict),
    "http": _HTTP,
    "https": _HTTP,
    "memory": Scheme(install="fsspec", credentials="nothing", options=dict),
}
_NETWORK_PACKAGES: Final = {
    *("aiohttp", "aiobotocore", "asyncio", "botocore", "fsspec", "gcsfs", "google", "httpcore", "httpcore2"),
    *("httpx", "httpx2", "huggingface_hub", "requests", "s3fs", "urllib3"),
}
_CREDENTIAL_ERRORS: Final = (
    "NoCredentialsError",
    "PartialCredentialsError",
    "CredentialRetrievalError",
    "DefaultCredentialsError",
    "ProfileNotFound",
    "TokenRetrievalError",
)


def url_of(place: str | Path) -> str | None:
    """The URL that `place` is, without a slash at its end; None for a folder of this machine (see `folder_of`).

    A `Path` made of a URL has one slash where the URL has two; it is understood too, since every flag that names a
    store is a path. StoreError: a URL of a kind that is not known.
    """
    match = re.fullmatch(r"([A-Za-z][A-Za-z0-9+]+):/(/?)(.*)", str(place))
    if match is None or match[1] == "file":
        return None
    if match[1] not in SCHEMES:
        if not match[2]:
            return None
        raise StoreError(f"{place}: stores are in folders or at {', '.join(f'{name}://' for name in SCHEMES)}.")
    return f"{match[1]}://{match[3].strip('/')}"


def folder_of(place: str | Path) -> Path:
    """The folder that `place`, which is no URL but perhaps a file:// one, names."""
    path = str(place)
    return Path("/" + path.removeprefix("file:").lstrip("/")) if path.startswith("file:/") else Path(place)


class Remote:
    """The files below a URL, by their names relative to it."""

    def __init__(self, url: str):
        """StoreError: the package for this kind of URL is not installed."""
        import fsspec

        self.url = url
        name = url.split("://", 1)[0]
        self.scheme = SCHEMES[name]
        try:
            self._fs, self._root = fsspec.core.url_to_fs(url, **self.scheme.options())
        except ImportError as error:
            raise StoreError(f"{name}:// needs a package: pip install '{self.scheme.install}' ({error}).") from error
        if name == "s3":
            self._fs.retries = 1

    def __str__(self) -> str:
        return self.url

    def path(self, name: str) -> str:
        """What a message calls the file."""
        return f"{self.url}/{name}"

    def read(self, name: str) -> bytes:
        """All of a small file. FileNotFoundError: it is not there. StoreError: it cannot be read."""
        return self._patiently(partial(self._fs.cat_file, self._at(name)), name)

    def pieces(self, name: str, size: int) -> Iterator[bytes]:
        """The `size` bytes of a file in order, `PIECE_BYTES` at a time, `AT_ONCE` of them under way in threads.

        StoreError: it is not there, cannot be read, or has another size. Memory: AT_ONCE * PIECE_BYTES.
        """
        stop = threading.Event()
        under_way: deque[_Task[bytes]] = deque()
        try:
            for start in range(0, size, PIECE_BYTES):
                under_way.append(_Task(partial(self._range, name, start, min(start + PIECE_BYTES, size), size, stop)))
                if len(under_way) == AT_ONCE:
                    yield under_way.popleft().result()
            while under_way:
                yield under_way.popleft().result()
        finally:
            stop.set()

    def sizes(self) -> dict[str, int]:
        """Name -> bytes of every file that is there, in one listing; empty where nothing is.

        StoreError: this kind of URL cannot list, or the bucket is not there.
        """
        if not self.scheme.lists:
            raise StoreError(f"{self.url}: files cannot be listed over http. Name a store itself.")
        root = self._root.rstrip("/")
        self._fs.invalidate_cache()  # what fsspec has seen before may be a part, or old
        try:
            found = self._patiently(partial(self._fs.find, root, detail=True), "")
        except FileNotFoundError as error:
            raise StoreError(f"{self.url} cannot be listed ({_reason(error)}). Make the bucket first.") from error
        return {path[len(root) :].lstrip("/"): int(entry["size"]) for path, entry in found.items()}

    def put(self, name: str, file: Path) -> None:
        """The file is there, whole. StoreError: it cannot be written."""
        self._written(partial(self._fs.put_file, str(file), self._at(name)), name)

    def write(self, name: str, data: bytes) -> None:
        """The file holds `data`. StoreError: it cannot be written."""
        self._written(partial(self._fs.pipe_file, self._at(name), data), name)

    def remove(self, name: str) -> None:
        """The file is not there any more."""
        self._written(partial(self._fs.rm_file, self._at(name)), name)

    def _at(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}"

    def _written(self, work: Callable[[], Any], name: str) -> None:
        if not self.scheme.lists:
            raise StoreError(f"{self.url}: stores cannot be written over http. Write to s3://, gs:// or hf://.")
        try:
            self._patiently(work, name)
        except FileNotFoundError as error:
            raise StoreError(
                f"{self.path(name)} cannot be written: {_reason(error)}. Make the bucket first."
            ) from error

    def _range(self, name: str, start: int, end: int, size: int, stop: threading.Event) -> bytes:
        def ask() -> bytes:
            beyond = 1 if end == size else 0  # a file that is too long shows itself
            data: bytes = self._fs.cat_file(self._at(name), start=start, end=end + beyond)
            if len(data) < end - start:
                raise _ShortError(f"{len(data):,} bytes came of {end - start:,} from byte {start:,} on")
            return data

        try:
            data = self._patiently(ask, name, stop)
        except FileNotFoundError as error:
            raise StoreError(f"{self.path(name)} is not there ({_reason(error)}). {_LOST}") from error
        if len(data) > end - start:
            if len(data) == size:
                raise StoreError(f"{self.url} answers with whole files when it is asked for a part. {_NO_RANGES}")
            raise StoreError(f"{self.path(name)} has more than the {size:,} bytes that manifest.json says. {_LOST}")
        return data

    def _patiently(self, work: Callable[[], T], name: str, stop: threading.Event | None = None) -> T:
        """`work()`, again after a pause where that may help. FileNotFoundError, or StoreError: it does not."""
        begun = time.monotonic()
        for attempt, pause in enumerate((*WAITS_S, None), start=1):
            try:
                return work()
            except FileNotFoundError:
                raise
            except Exception as error:
                if not _is_of_the_network(error):
                    raise
                failure: Exception = error
            if not _may_pass(failure) or pause is None or (stop is not None and stop.is_set()):
                tried = f" after {attempt} attempts in {time.monotonic() - begun:.0f} s" if attempt > 1 else ""
                raise self._explained(failure, name, tried) from failure
            log.warning("%s: %s; attempt %d follows in %s s", self.path(name), _reason(failure), attempt + 1, pause)
            if stop is not None:
                stop.wait(pause)
            else:
                time.sleep(pause)
        raise AssertionError("unreachable")

    def _explained(self, error: Exception, name: str, tried: str) -> StoreError:
        what = self.path(name) if name else self.url
        if type(error).__name__ in _CREDENTIAL_ERRORS:
            return StoreError(f"No credentials for {what} ({_reason(error)}). Set {self.scheme.credentials}.")
        if isinstance(error, PermissionError) or _status(error) in (401, 403):
            return StoreError(
                f"{what} is refused to these credentials ({_reason(error)}). Ask for access, or set "
                f"{self.scheme.credentials}."
            )
        if isinstance(error, _ShortError) or "InvalidRange" in str(error):
            return StoreError(
                f"{what} is shorter than manifest.json says, or its end is lost on the way: {_reason(error)}{tried}. "
                f"{_LOST}"
            )
        return StoreError(f"{what} failed{tried}: {_reason(error)}. Try again later; what is finished is kept.")


_LOST: Final = "Copy the store there again."
_NO_RANGES: Final = "Use a server that answers range requests, or copy the store to a disk."


class _ShortError(OSError):
    """Fewer bytes came than were asked for."""


class _Task(Generic[T]):
    """A call in a thread of its own, which does not keep the process alive."""

    def __init__(self, work: Callable[[], T]):
        self._work = work
        self._value: list[T] = []
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="piece", daemon=True)
        self._thread.start()

    def result(self) -> T:
        """What it returned, waited for; what it raised is raised."""
        self._thread.join()
        if self._failure is not None:
            raise self._failure
        return self._value[0]

    def _run(self) -> None:
        try:
            self._value.append(self._work())
        except BaseException as failure:  # handed to the thread that asks
            self._failure = failure


def _is_of_the_network(error: BaseException) -> bool:
    """Whether it is a failure of the connection or the server. Told by the package that it comes from, since none of
    them can be imported here."""
    return isinstance(error, (OSError, EOFError)) or type(error).__module__.split(".")[0] in _NETWORK_PACKAGES


def _may_pass(error: BaseException) -> bool:
    """Whether asking again may help."""
    if isinstance(error, PermissionError) or type(error).__name__ in _CREDENTIAL_ERRORS:
        return False
    if isinstance(error, OSError) and error.errno in (errno.EINVAL, errno.ENOSPC):
        return False
    status = _status(error)
    return status is None or status in (408, 429) or status >= 500


def _status(error: BaseException) -> int | None:
    """The answer's HTTP status, where the error tells it."""
    status = vars(error).get("status", vars(error).get("code"))
    return status if isinstance(status, int) else None


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
