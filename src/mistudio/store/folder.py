"""The folder of a store: whether it is free, large enough and not in another process's hands."""

import errno
import fcntl
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from mistudio.errors import StoreError
from mistudio.store.remote import url_of

_FIRST = (".lock", "statistics-0.safetensors")  # written before there is a progress.json

log = logging.getLogger(__name__)


def refuse_occupied(path: Path) -> None:
    """Nothing. StoreError: the folder holds a store, finished or not, or something else; or it is a URL."""
    if (url := url_of(path)) is not None:
        raise StoreError(f"{url} is not a folder. Write to a folder, then: mistudio store copy FOLDER {url}")
    if path.exists() and not path.is_dir():
        raise StoreError(f"{path} is a file; a store needs a folder. Choose another one.")
    found = entries(path)
    if not found:
        return
    if "manifest.json" in found:
        raise StoreError(
            f"{path} already holds a finished store. Choose another folder, or add --resume to use this one."
        )
    if "progress.json" in found:
        raise StoreError(f"{path} holds an unfinished collection. Continue it with --resume, or choose another folder.")
    raise StoreError(f"{path} is not empty (it holds {found[0]}). Choose another folder.")


def refuse_small_disk(path: Path, needed: int) -> None:
    """Nothing. StoreError: fewer than `needed` bytes are free where `path` is, or will be."""
    existing = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.is_dir())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise StoreError(
            f"The rows still to be collected need {needed / 1e9:,.1f} GB at {path}, where {free / 1e9:,.1f} GB "
            f"are free. Ask for fewer tokens or sites, for --row-dtype bfloat16 or int8, or choose another disk."
        )


def entries(path: Path) -> list[str]:
    """Names in the folder, without what a kill in the first moment of a collection leaves behind."""
    if not path.is_dir():
        return []
    names = (entry.name for entry in path.iterdir())
    return sorted(name for name in names if name not in _FIRST and not (name[0] == "." and name.endswith(".tmp")))


def lock(path: Path) -> IO[str]:
    """An open file that holds the folder's lock until it is closed, or the process ends. StoreError: another process
    has it."""
    file = open(path / ".lock", "w")  # noqa: SIM115 (held open by the writer)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise StoreError(f"Another process is writing to {path}. Wait for it, or choose another folder.") from error
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
        log.warning("%s is on a file system without locks: see to it that no other process writes there.", path)
    return file


@contextmanager
def written_in(path: Path) -> Iterator[None]:
    """A block that writes in the folder. StoreError: the disk refuses it, naming the file and how to go on."""
    try:
        yield
    except OSError as error:
        file = path if error.filename is None else error.filename
        raise StoreError(
            f"{file} cannot be written: {error.strerror or error}. Put that right (room on the disk, permissions), "
            f"then go on from the last checkpoint with the same command and --resume."
        ) from error


def sync_folder(folder: Path) -> None:
    """The folder's entries are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
