"""The files of a store on this machine: each checked once, and those a feed comes to next read ahead.

What is read ahead is read to the end in one thread a file, so that rows can then be taken at random from memory; a
shard that was not checked yet is checked by that same reading. Telling the system to read ahead by itself
(posix_fadvise) was half as fast on the disk we measured.

Maps of a store that fits into memory are kept from epoch to epoch: to make them anew, a page fault after the other,
takes as long as taking the rows.
"""

import logging
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Final

from mistudio.errors import StoreError
from mistudio.store.background import begun
from mistudio.store.manifest import Manifest, read_manifest
from mistudio.store.shard import Mapped, Shard, bucket_shards

KEPT_FILES: Final = 128
"""Maps kept; each holds two descriptors, of which a process may have 1,024 on many systems."""
KEPT_BYTES: Final = 64 << 30
"""Bytes in maps kept; the system's tables for them take a 512th part of it at most. The first that fit are kept, since
in the cycle of epochs the one used last is the one needed latest."""
log = logging.getLogger(__name__)


class Folder:
    """The files of a store in a folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._sound: dict[Path, tuple[int, ...]] = {}  # shards whose checksum was right, and what they were then
        self._begun: dict[Path, Future[None]] = {}  # by `expect`
        self._kept: dict[Path, tuple[tuple[int, ...] | None, Mapped]] = {}  # with the file's signature

    def __str__(self) -> str:
        return str(self.folder)

    def manifest(self) -> Manifest:
        """The manifest. StoreError: there is none, or it is not valid."""
        return read_manifest(self.folder)

    def read(self, name: str) -> bytes:
        """The bytes of manifest.json or statistics.safetensors. StoreError: they cannot be read."""
        try:
            return (self.folder / name).read_bytes()
        except OSError as error:
            raise StoreError(
                f"{self.folder / name} cannot be read: {error}. The store is damaged; copy or collect it again."
            ) from error

    def check_sizes(self, manifest: Manifest, buckets: Collection[int]) -> None:
        """Nothing. StoreError: a shard of these buckets is missing or has another size."""
        for bucket in buckets:
            for shard in bucket_shards(self.folder, bucket, manifest.plan.widths, manifest.dtype).values():
                shard.check_size(manifest.bucket_sizes[bucket])

    @contextmanager
    def held(self, shard: Shard, rows: int, checksum: str | None) -> Iterator[None]:
        """A block in which the shard's file can be opened and is sound; what `expect` began for it is waited for.

        checksum: None where the manifest has none. StoreError: it is not sound.
        """
        ahead = self._begun.pop(shard.path, None)
        if ahead is not None:
            ahead.result()
        self._check(shard, rows, checksum)
        yield

    def map(self, shard: Shard, rows: int) -> Mapped:
        """The shard's rows, in a map that may be shared with others who read it. StoreError: as `Shard.map`."""
        found = _signature(shard.path)
        signature, kept = self._kept.pop(shard.path, (None, None))
        if kept is None or signature != found:
            kept = shard.map(rows)
        others = list(self._kept.values())
        size = shard.total_bytes(rows) + sum(len(mapped.file) for _, mapped in others)
        if len(others) < KEPT_FILES and size <= KEPT_BYTES:
            self._kept[shard.path] = (found, kept)
        return kept

    def verify(self, shard: Shard, rows: int, checksum: str | None) -> None:
        """Nothing; reads all of the shard. StoreError: it is not what the manifest says."""
        shard.map(rows)
        if checksum is not None:
            shard.check_hash(rows, checksum)

    def expect(self, shards: Sequence[tuple[Shard, int, str | None]]) -> None:
        """Reading these shards (with rows and checksum) into the page cache is begun, each in a thread; those that were
        not checked yet are checked by it, so that no bucket but the first is waited for."""
        for shard, rows, checksum in shards:
            ahead = self._begun.get(shard.path)
            if ahead is None or ahead.done():
                self._begun[shard.path] = begun(partial(self._read, shard, rows, checksum))

    def _read(self, shard: Shard, rows: int, checksum: str | None) -> None:
        if not self._check(shard, rows, checksum) or checksum is None:
            try:
                shard.read_through()
            except OSError as error:  # whether it can be read is found out when it is
                log.debug("%s was not read ahead: %s", shard.path, error)

    def _check(self, shard: Shard, rows: int, checksum: str | None) -> bool:
        """Whether the shard had to be checked: it is new to us, or another file than it was. StoreError: not sound."""
        found = _signature(shard.path)
        if found is not None and self._sound.get(shard.path) == found:
            return False
        mapped = self.map(shard, rows)
        if checksum is not None:
            shard.check_hash(rows, checksum, mapped if shard.path in self._kept else None)
        if found is not None:
            self._sound[shard.path] = found
        return True


def _signature(path: Path) -> tuple[int, ...] | None:
    """What changes when a file is replaced or written to; None: there is no file."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
