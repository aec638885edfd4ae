"""Files at a URL, through fsspec: read in parallel ranges, written whole, tried again where it helps.

An attempt that fails in a way that may pass (500, 503, a time-out, a broken or short answer) is repeated after each of
`WAITS_S`, seven attempts in about half a minute, unless `PATIENCE_S` have gone; only once where a host that has not
answered yet takes no connection, since then it is the network, or the name. They are all there are for s3://, gs://
and http://; huggingface_hub tries again by itself too. All that the kinds of URLs differ in is in `schemes`.
"""

import logging
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Final, Generic, TypeVar

from mistudio.errors import StoreError
from mistudio.store.schemes import (
    SCHEMES,
    ShortError,
    is_of_credentials,
    is_of_the_network,
    is_refused,
    is_short,
    is_unreachable,
    may_pass,
)

WAITS_S = (0.5, 1, 2, 4, 8, 16)
"""Pauses after failed attempts."""
PATIENCE_S = 90.0
"""No attempt begins when so much time has gone since the first."""
PIECE_BYTES = 1 << 23
"""Bytes asked for in one request."""
AT_ONCE = 8
"""Requests for pieces of one file that are under way at the same time."""
T = TypeVar("T")
log = logging.getLogger(__name__)


def url_of(place: str | Path) -> str | None:
    """The URL that `place` is, without a slash at its end; None for a folder of this machine (see `folder_of`).

    A `Path` made of a URL has one slash where the URL has two; it is understood too, since every flag that names a
    store is a path. StoreError: a URL of a kind that is not known, or with nothing after its kind.
    """
    if str(place).removesuffix("//") in {f"{name}:" for name in SCHEMES} and not Path(place).is_dir():
        name = str(place).removesuffix("//").removesuffix(":")
        raise StoreError(f"{name}:// names no place; write {name}://BUCKET/PATH.")
    match = re.fullmatch(r"([A-Za-z][A-Za-z0-9+]+):/(/?)(.*)", str(place))
    if match is None or match[1] == "file":
        return None
    if match[1] not in SCHEMES:
        if not match[2] and Path(f"{match[1]}:").is_dir():
            return None
        raise StoreError(
            f"{match[1]}://{match[3]}: stores are in folders or at {', '.join(f'{name}://' for name in SCHEMES)}."
        )
    return f"{match[1]}://{match[3].strip('/')}"


def folder_of(place: str | Path) -> Path:
    """The folder that `place`, which is no URL but perhaps a file:// one, names."""
    path = str(place)
    return Path("/" + path.removeprefix("file:").lstrip("/")) if path.startswith("file:/") else Path(place)


class Remote:
    """The files below a URL, by their names relative to it."""

    def __init__(self, url: str):
        """StoreError: the package for this kind of URL is not installed, or the credentials cannot be read."""
        self.url = url
        name = url.split("://", 1)[0]
        self.scheme = SCHEMES[name]
        self._answered = False
        try:
            self._fs, self._root = self.scheme.open(url)
        except ImportError as error:
            raise StoreError(f"{name}:// needs a package: pip install '{self.scheme.install}' ({error}).") from error
        except Exception as error:  # clients share no base class; what is not theirs is raised again
            if not is_of_the_network(error):
                raise
            raise self._explained(error, "", "") from error
        self._fs.invalidate_cache()  # what fsspec has seen before may be old

    def __str__(self) -> str:
        return self.url

    def how_to_remove(self) -> str:
        """The sentence that says what takes these files away; mistudio does not."""
        tool = "the tool of that place" if self.scheme.remove is None else f"`{self.scheme.remove(self._root)}`"
        return f"Use {tool}."

    def for_writing(self) -> "Remote":
        """Itself. StoreError: this kind of URL cannot be written to."""
        if not self.scheme.lists:
            raise StoreError(f"{self.url}: stores cannot be written over http. Write to s3://, gs:// or hf://.")
        return self

    def path(self, name: str) -> str:
        """What a message calls the file."""
        return f"{self.url}/{name}"

    def read(self, name: str) -> bytes:
        """All of a small file. FileNotFoundError: it is not there. StoreError: it cannot be read."""
        return self._patiently(partial(self._fs.cat_file, self._at(name), **self.scheme.reading), name)

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
            raise StoreError(
                f"{self.url} cannot be listed ({_reason(error)}). {self.scheme.make(self._root)}"
            ) from error
        names = {path[len(root) :].lstrip("/"): int(entry["size"]) for path, entry in found.items()}
        return {name: size for name, size in names.items() if name and not name.endswith("/")}  # else marks of folders

    def put(self, name: str, file: Path) -> None:
        """The file is there, whole. StoreError: it cannot be written."""
        self._written(partial(self.scheme.upload, self._fs, self._at(name), file), name)

    def write(self, name: str, data: bytes) -> None:
        """The file holds `data`. StoreError: it cannot be written."""
        self._written(partial(self.scheme.upload, self._fs, self._at(name), data), name)

    def remove(self, name: str) -> None:
        """The file is not there any more."""
        self._written(partial(self._fs.rm_file, self._at(name)), name)

    def _at(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}"

    def _written(self, work: Callable[[], Any], name: str) -> None:
        try:
            self._patiently(work, name)
        except FileNotFoundError as error:
            raise StoreError(
                f"{self.path(name)} cannot be written: {_reason(error)}. {self.scheme.make(self._root)}"
            ) from error

    def _range(self, name: str, start: int, end: int, size: int, stop: threading.Event) -> bytes:
        def ask() -> bytes:
            beyond = 1 if end == size else 0  # a file that is too long shows itself
            data: bytes = self._fs.cat_file(self._at(name), start=start, end=end + beyond, **self.scheme.reading)
            if len(data) < end - start:
                raise ShortError(f"{len(data):,} bytes came of {end - start:,} from byte {start:,} on")
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
                result = work()
                self._answered = True
                return result
            except FileNotFoundError:
                self._answered = True
                raise
            except Exception as error:  # as in __init__
                if not is_of_the_network(error):
                    raise
                failure: Exception = error
            waited = time.monotonic() - begun
            self._answered |= not is_unreachable(failure)
            hopeless = not may_pass(failure) or (not self._answered and attempt == 2)
            if hopeless or pause is None or waited > PATIENCE_S or (stop is not None and stop.is_set()):
                tried = f" after {attempt} attempts in {waited:.0f} s" if attempt > 1 else ""
                raise self._explained(failure, name, tried) from failure
            log.warning("%s: %s; attempt %d follows in %s s", self.path(name), _reason(failure), attempt + 1, pause)
            if stop is not None:
                stop.wait(pause)
            else:
                time.sleep(pause)
        raise AssertionError("unreachable")

    def _explained(self, error: Exception, name: str, tried: str) -> StoreError:
        what, reason = self.path(name) if name else self.url, _reason(error)
        if is_of_credentials(error):
            return StoreError(f"No credentials for {what} ({reason}). Set {self.scheme.credentials}.")
        if is_refused(error):
            return StoreError(
                f"{what} is refused to these credentials ({reason}). Ask for access, or set {self.scheme.credentials}."
            )
        if is_short(error):
            return StoreError(
                f"{what} is shorter than manifest.json says, or its end is lost on the way: {reason}{tried}. {_LOST}"
            )
        if not may_pass(error):
            return StoreError(f"{what} is refused: {reason.rstrip('.')}.")
        if not self._answered:
            return StoreError(f"{what} cannot be reached: {reason}. Check the network and the name.")
        return StoreError(f"{what} failed{tried}: {reason}. Try again later; what is finished is kept.")


_LOST: Final = "Copy the store there again."
_NO_RANGES: Final = "Use a server that answers range requests, or copy the store to a disk."


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


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
