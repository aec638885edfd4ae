"""A folder of bounded size that holds files fetched from elsewhere; those used longest ago go first.

Several processes may share it. Every step that adds or takes away is made under one lock; a file that is being fetched
or looked at is locked itself, and stays. A file taken away while a process still has it mapped lives on, unseen, until
that process lets go of it.
"""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from mistudio.errors import StoreError

DEFAULT_GB = 50.0
LOOK_AGAIN_S = 0.05


@dataclass(frozen=True, kw_only=True)
class Cache:
    """Where and how large."""

    folder: Path
    """Made when it is needed."""
    max_bytes: int
    """What all files in it may have together."""

    def __post_init__(self) -> None:
        if self.max_bytes < 1:
            raise StoreError(f"max_bytes = {self.max_bytes}, but a cache needs room: give it at least that of a shard.")

    def make_room(self, file: IO[bytes], size: int) -> None:
        """`file`, which is in the cache and locked by the caller, has `size` bytes, and the cache is within its bound.

        Waits where other processes are fetching so much that there is no room. StoreError: there never will be.
        """
        if size > self.max_bytes:
            raise StoreError(
                f"A shard of {size:,} bytes does not fit into the cache of {self.max_bytes:,} bytes at {self.folder}. "
                f"Set MISTUDIO_CACHE_GB to more."
            )
        while True:
            with self._locked():
                if self._is_room(size):
                    file.truncate(size)
                    return
            time.sleep(LOOK_AGAIN_S)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with open(self.folder / ".lock", "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _is_room(self, size: int) -> bool:
        """Whether `size` bytes fit, after as much was taken away as is needed and possible."""
        files = []
        for path in self.folder.glob("*/*/*.safetensors*"):
            try:
                found = path.stat()
            except FileNotFoundError:  # another process has just given it its name
                continue
            files.append((found.st_mtime_ns, found.st_size, path))
        excess = sum(bytes for _, bytes, _ in files) + size - self.max_bytes
        for _, bytes, path in sorted(files):
            if excess <= 0:
                break
            if _taken_away(path):
                excess -= bytes
        return excess <= 0


def default_cache() -> Cache:
    """What MISTUDIO_CACHE (a folder) and MISTUDIO_CACHE_GB say; else ~/.cache/mistudio and 50 GB. StoreError: no
    number."""
    said = os.environ.get("MISTUDIO_CACHE_GB", str(DEFAULT_GB))
    try:
        size = int(float(said) * 1e9)
    except ValueError:
        raise StoreError(f"MISTUDIO_CACHE_GB is {said!r}, but it is a number of gigabytes such as 50.") from None
    return Cache(folder=cache_home() / "stores", max_bytes=size)


def cache_home() -> Path:
    """The folder for what can be fetched or made again."""
    if said := os.environ.get("MISTUDIO_CACHE"):
        return Path(said)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mistudio"


def _taken_away(path: Path) -> bool:
    """Whether the file is gone; one that is in use is left."""
    try:
        with open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
    except FileNotFoundError:
        return True
    except BlockingIOError:
        return False
    return True
