"""A store that is elsewhere, read shard by shard into a cache, with the methods of one that is here (`local`).

A shard is fetched when it is first needed, in parallel ranges, and gets its name in the cache only when its size,
header and checksum are those of the manifest. The folder in the cache is named after the URL and the manifest, so that
a store that was replaced is never mixed with the old one. Shards a feed will need next are fetched in a thread.
"""

import fcntl
import hashlib
import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import IO

from mistudio.errors import StoreError
from mistudio.store.cache import Cache, default_cache
from mistudio.store.checksum import difference, new_hash
from mistudio.store.local import Folder
from mistudio.store.manifest import Manifest, manifest_of
from mistudio.store.remote import Remote, folder_of, url_of
from mistudio.store.shard import PREFIX_BYTES, Mapped, Shard, bucket_shards

COPYING = "copy.json"
"""What an unfinished copy has in the place of a manifest."""
log = logging.getLogger(__name__)


class Mirror:
    """The files of a store at a URL."""

    def __init__(self, url: str, cache: Cache):
        self.remote, self.cache = Remote(url), cache
        try:
            self._manifest = self.remote.read("manifest.json")
        except FileNotFoundError as error:
            raise self._no_manifest(error) from error
        name = hashlib.sha256(url.encode() + b"\n" + self._manifest).hexdigest()[:16]
        self.folder = cache.folder / name
        self._sound: set[Path] = set()  # shards that were checked since this object was made
        self._lock = threading.Lock()
        self._expected: deque[tuple[Shard, int, str | None]] = deque()
        self._fetching = False

    def __str__(self) -> str:
        return self.remote.url

    def manifest(self) -> Manifest:
        """The manifest. StoreError: it is not valid."""
        return manifest_of(self._manifest, self.remote.path("manifest.json"))

    def read(self, name: str) -> bytes:
        """As `Folder.read`. StoreError: the server has no such file, does not answer or refuses."""
        if name == "manifest.json":
            return self._manifest
        try:
            return self.remote.read(name)
        except FileNotFoundError as error:
            raise StoreError(f"{self.remote.path(name)} is missing. Copy the store there again.") from error

    def check_sizes(self, manifest: Manifest, buckets: Collection[int]) -> None:
        """Nothing. StoreError: a shard of these buckets is missing or has another size. Where files cannot be listed,
        that is found out when they are fetched."""
        if not self.remote.scheme.lists:
            return
        sizes = self.remote.sizes()
        for bucket in buckets:
            for shard in bucket_shards(Path(), bucket, manifest.plan.widths, manifest.dtype).values():
                found, size = sizes.get(str(shard.path)), shard.total_bytes(manifest.bucket_sizes[bucket])
                if found != size:
                    there = "is missing" if found is None else f"has {found:,} bytes"
                    raise StoreError(
                        f"{self.remote.path(str(shard.path))} {there}; manifest.json says {size:,} bytes. The store is "
                        f"damaged; copy it there again."
                    )

    @contextmanager
    def held(self, shard: Shard, rows: int, checksum: str | None) -> Iterator[None]:
        """As `Folder.held`: the file is fetched where the cache does not have it, or has it damaged, and stays there
        for the block."""
        while True:
            fetched = self._fetch(shard, rows, checksum)
            try:
                file = open(shard.path, "rb")  # noqa: SIM115 (closed by the block below)
            except FileNotFoundError:  # another process has put it away
                continue
            with file:
                fcntl.flock(file, fcntl.LOCK_SH)
                if os.fstat(file.fileno()).st_nlink == 0:
                    continue
                os.utime(file.fileno())
                try:
                    _check(shard, rows, checksum, fetched or shard.path in self._sound)
                except StoreError:
                    if fetched:
                        raise
                    log.warning("%s in the cache is damaged and is fetched again.", shard.path)
                    shard.path.unlink()
                    continue
                self._sound.add(shard.path)
                yield
                return

    def map(self, shard: Shard, rows: int) -> Mapped:
        """As `Folder.map`, but a map of its own: one that is kept would keep the room of a file taken away."""
        return shard.map(rows)

    def verify(self, shard: Shard, rows: int, checksum: str | None) -> None:
        """As `Folder.verify`, of the file at the URL; the cache has no part in it."""
        receive(self.remote, self._name(shard), shard, rows, checksum, len)

    def expect(self, shards: Sequence[tuple[Shard, int, str | None]]) -> None:
        """A thread fetches these shards (with rows and checksum), in their order, as many as fit into the cache; what
        the cache has is read into memory.

        It says nothing of a failure: the shard is fetched again when it is needed, and then the failure is told.
        """
        ends = accumulate(shard.total_bytes(rows) for shard, rows, _ in shards)
        fitting = [some for some, end in zip(shards, ends, strict=True) if end <= self.cache.max_bytes]
        with self._lock:
            self._expected = deque(fitting)
            if self._fetching or not fitting:
                return
            self._fetching = True
        threading.Thread(target=self._fetch_expected, name="prefetch", daemon=True).start()

    def _fetch_expected(self) -> None:
        while True:
            with self._lock:
                if not self._expected:
                    self._fetching = False
                    return
                shard, rows, checksum = self._expected.popleft()
            try:
                if not self._fetch(shard, rows, checksum):
                    shard.read_through()
            except (StoreError, OSError) as error:
                log.debug("not fetched ahead: %s", error)

    def _fetch(self, shard: Shard, rows: int, checksum: str | None) -> bool:
        """Whether the file was fetched now; it is in the cache in any case."""
        if shard.path.exists():
            return False
        part = shard.path.with_name(f"{shard.path.name}.part")
        try:
            part.parent.mkdir(parents=True, exist_ok=True)
            with _alone(part) as file:
                if shard.path.exists():
                    part.unlink(missing_ok=True)
                    return False
                try:
                    self.cache.make_room(file, shard.total_bytes(rows))
                    self._receive(shard, rows, checksum, file)
                    os.replace(part, shard.path)
                except BaseException:  # whatever it was: no half of a file is left, and it is raised again
                    part.unlink(missing_ok=True)
                    raise
        except OSError as error:
            raise _no_cache(self.cache, error) from error
        return True

    def _receive(self, shard: Shard, rows: int, checksum: str | None, file: IO[bytes]) -> None:
        """`file` holds the shard. One that comes damaged is asked for once more."""
        name = self._name(shard)
        try:
            receive(self.remote, name, shard, rows, checksum, _from_start(file))
        except DamagedError as error:
            log.warning("%s It is asked for once more.", error)
            receive(self.remote, name, shard, rows, checksum, _from_start(file))
        file.flush()

    def _name(self, shard: Shard) -> str:
        return shard.path.relative_to(self.folder).as_posix()

    def _no_manifest(self, error: FileNotFoundError) -> StoreError:
        try:
            self.remote.read(COPYING)
        except FileNotFoundError:
            return StoreError(
                f"There is no activation store at {self.remote.url}: manifest.json is not there "
                f"({' '.join(str(error).split())}). Make one with `mistudio store copy FOLDER {self.remote.url}`."
            )
        return StoreError(
            f"{self.remote.url} has no manifest.json, so copying it there did not finish. Run the same "
            f"`mistudio store copy ... {self.remote.url}` again: it goes on where it stopped."
        )


Files = Folder | Mirror


class DamagedError(StoreError):
    """What came is not what the manifest says."""


def files_at(place: str | Path, cache: Cache | None = None) -> Files:
    """The files of the store at a folder or URL. StoreError: there is no finished store at the URL."""
    url = url_of(place)
    if url is None:
        return Folder(folder_of(place))
    chosen = cache or default_cache()
    try:
        chosen.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _no_cache(chosen, error) from error
    return Mirror(url, chosen)


def _no_cache(cache: Cache, error: OSError) -> StoreError:
    return StoreError(
        f"The cache at {cache.folder} cannot be written: {error.strerror}. Make room there, or set MISTUDIO_CACHE to "
        f"another folder and MISTUDIO_CACHE_GB to its size."
    )


def receive(
    remote: Remote, name: str, shard: Shard, rows: int, checksum: str | None, write: Callable[[bytes], object]
) -> None:
    """`write` has got every byte of the shard, in order; its size, header and checksum are those expected.

    DamagedError: header or checksum are not. StoreError: it does not come, or has another size.
    """
    found, header = new_hash(checksum), b""
    for piece in remote.pieces(name, shard.total_bytes(rows)):
        write(piece)
        of_header = PREFIX_BYTES - len(header)
        header += piece[:of_header]
        found.update(memoryview(piece)[of_header:])
    if header != shard.prefix(rows):
        raise DamagedError(f"{remote.path(name)} has another header than its place in the store asks for.")
    if checksum is not None and (told := difference(found, checksum, rows)):
        raise DamagedError(f"{remote.path(name)}: {told} The store is damaged; copy it there again.")


@contextmanager
def _alone(part: Path) -> Iterator[IO[bytes]]:
    """The file open for writing, in a block that only one thread of one process is in."""
    while True:
        descriptor = os.open(part, os.O_RDWR | os.O_CREAT, 0o644)
        with os.fdopen(descriptor, "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if _is_still(part, file):  # else another one has finished it, or given up, while this one waited
                yield file
                return


def _is_still(part: Path, file: IO[bytes]) -> bool:
    try:
        return os.path.samestat(part.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def _from_start(file: IO[bytes]) -> Callable[[bytes], object]:
    file.seek(0)
    return file.write


def _check(shard: Shard, rows: int, checksum: str | None, known: bool) -> None:
    shard.map(rows)
    if checksum is not None and not known:
        shard.check_hash(rows, checksum)
