"""A finished store copied as it is to a URL or a folder: shard by shard, the manifest last.

While it is under way there is a copy.json where the manifest will be: the SHA-256 of that manifest, and with it of
every shard. Run again, the copy goes on: a shard that is there with its size is left, since an object of a bucket is
whole or absent (in a folder: since it gets its name when it is whole), and copy.json says that it is of this very
store. Every shard is checked against its checksum before it is sent. (A kill may leave the parts of a large S3 object
that was under way, which cost room until the bucket's own rule for unfinished uploads takes them away.)
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mistudio.errors import StoreError
from mistudio.files import write_bytes
from mistudio.progress import progress_bar
from mistudio.store.cache import cache_home
from mistudio.store.folder import lock, refuse_small_disk
from mistudio.store.manifest import Plan
from mistudio.store.mirror import COPYING
from mistudio.store.reader import Store
from mistudio.store.remote import Remote, folder_of, url_of
from mistudio.store.shard import bucket_shards
from mistudio.store.statistics import FILE
from mistudio.store.upkeep import remove

MANIFEST = "manifest.json"
log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Copied:
    """What `copy_store` did."""

    place: str
    """Folder or URL of the copy."""
    sent: int
    """Shards sent."""
    there: int
    """Shards that were there already."""
    bytes: int
    """Bytes sent."""


class _Disk:
    """A folder, with those methods of `Remote` that a copy needs."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __str__(self) -> str:
        return str(self.folder)

    def sizes(self) -> dict[str, int]:
        return {
            path.relative_to(self.folder).as_posix(): path.stat().st_size
            for path in self.folder.rglob("*")
            if path.is_file() and path.suffix != ".tmp" and path.name != ".lock"
        }

    def read(self, name: str) -> bytes:
        return (self.folder / name).read_bytes()

    def put(self, name: str, file: Path) -> None:
        target = self.folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.tmp")
        try:
            shutil.copyfile(file, temporary)
            with open(temporary, "rb") as copied:
                os.fsync(copied.fileno())
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise StoreError(
                f"{target} cannot be written: {error.strerror}. Put that right and run the same copy again: it goes on."
            ) from error
        os.replace(temporary, target)

    def write(self, name: str, data: bytes) -> None:
        write_bytes(self.folder / name, data)

    def remove(self, name: str) -> None:
        (self.folder / name).unlink()


def copy_store(store: Store, to: str | Path) -> Copied:
    """The same store, byte for byte, at the folder or URL `to`; one that was begun there is gone on with.

    StoreError: something else is there; the server refuses or does not answer; a shard of `store` is damaged; the disk
    is too small.
    """
    url = url_of(to)
    if url is not None:
        return _copied(store, Remote(url).for_writing())
    folder = folder_of(to)
    if not folder.exists():
        refuse_small_disk(folder, store.manifest.rows * store.manifest.plan.row_bytes)
    folder.mkdir(parents=True, exist_ok=True)
    with lock(folder):
        copied = _copied(store, _Disk(folder))
        for left in folder.rglob(".*.tmp"):  # by a kill
            left.unlink()
    (folder / ".lock").unlink()
    return copied


def collected_to(
    url: str, collect: Callable[[Path], Store], refuse_other: Callable[[Plan], None], *, resume: bool
) -> Store:
    """The store that `collect` makes in a folder, at `url`: rows are collected on a disk of this machine and copied
    when they are complete; then the folder is removed.

    With `resume` an interrupted collection or copy goes on; where both are done nothing is, if `refuse_other` lets the
    plan of the store at `url` pass. StoreError: without `resume`, something is at `url` or a collection for it was
    begun; `collect`'s own.
    """
    spool = cache_home() / "spool" / hashlib.sha256(url.encode()).hexdigest()[:16]
    there = Remote(url).for_writing().sizes()
    if there and not resume:
        raise StoreError(f"{url} is not empty (it holds {min(there)}). Choose another place, or add --resume.")
    if MANIFEST in there:
        store = Store.open(url)
        refuse_other(store.manifest.plan)
        if spool.exists():  # a kill came when all was copied
            shutil.rmtree(spool)
        return store
    spool.parent.mkdir(parents=True, exist_ok=True)
    log.info("rows are collected at %s and copied to %s when they are complete", spool, url)
    copy_store(collect(spool), url)
    remove(spool)
    return Store.open(url)


def _copied(store: Store, target: Remote | _Disk) -> Copied:
    manifest = store.file(MANIFEST)
    there = target.sizes()
    if not _begun(target, there, manifest):
        of_a_bucket = bucket_shards(store.path, 0, store.manifest.plan.widths, store.manifest.dtype)
        shards_there = len(of_a_bucket) * len(store.manifest.bucket_sizes)
        return Copied(place=str(target), sent=0, there=shards_there, bytes=0)
    sent = skipped = moved = 0
    with progress_bar("copy", store.rows * store.manifest.plan.row_bytes, "bytes") as bar:
        for bucket, rows in enumerate(store.manifest.bucket_sizes):
            shards = bucket_shards(store.path, bucket, store.manifest.plan.widths, store.manifest.dtype)
            for name, shard in shards.items():
                path, size = shard.path.relative_to(store.path).as_posix(), shard.total_bytes(rows)
                if there.get(path) == size:
                    skipped += 1
                else:
                    with store.held(name, shard, bucket):
                        target.put(path, shard.path)
                    sent, moved = sent + 1, moved + size
                bar.advance(rows * shard.row_bytes)
    target.write(FILE, store.file(FILE))
    target.write(MANIFEST, manifest)
    target.remove(COPYING)
    return Copied(place=str(target), sent=sent, there=skipped, bytes=moved)


def _begun(target: Remote | _Disk, there: dict[str, int], manifest: bytes) -> bool:
    """Whether there is something left to copy; copy.json is there then. StoreError: the place is not free."""
    if MANIFEST in there:
        if target.read(MANIFEST) != manifest:
            raise StoreError(f"{target} holds another store. Choose another place.")
        if COPYING in there:
            target.remove(COPYING)
        return False
    mine = json.dumps({"copying": hashlib.sha256(manifest).hexdigest()}).encode()
    if COPYING in there:
        if target.read(COPYING) != mine:
            raise StoreError(f"{target} holds the unfinished copy of another store. Choose another place.")
    elif there:
        raise StoreError(f"{target} is not empty (it holds {min(there)}). Choose another place.")
    else:
        target.write(COPYING, mine)
    return True
