"""One bucket of one site: a safetensors file with a single tensor, appended to while it grows and memory-mapped when
read.

The header has a fixed size, padded with spaces as the format allows, so that it can be rewritten in place once the
number of rows is known; while the file grows it says zero rows. Every safetensors reader can open a finished shard.

Reading a map at random from a cold disk waits for a page at a time; so a file that is to be mapped is read through
first, in order and in large pieces, which is also how its checksum is worked out.
"""

import ctypes
import functools
import json
import mmap
import os
import struct
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from mistudio.errors import StoreError
from mistudio.store.checksum import Hash, difference, new_hash
from mistudio.store.dtypes import ROW_SCALE, ROWS, TENSORS
from mistudio.store.lease import Lease

PREFIX_BYTES: Final = 256  # 8 bytes of header length, then the header
_DTYPES: Final[dict[str, np.dtype[Any]]] = {
    "F32": np.dtype("<f4"),
    "BF16": np.dtype("<u2"),  # its bits
    "F16": np.dtype("<f2"),
    "I8": np.dtype("i1"),
    "I32": np.dtype("<i4"),
}
_READ_AT_ONCE: Final = 1 << 21  # the buffer stays in the processor's cache, and the disk reads as far ahead as it can
_WRITTEN_AT_ONCE: Final = 1 << 20  # bytes of an append; smaller ones are better written together
_WRITE_ONLY: Final = 2  # SYNC_FILE_RANGE_WRITE
_LOOK_EVERY: Final = 1 << 18  # bytes of a file between places that are asked whether they are in the page cache


@dataclass(frozen=True, kw_only=True)
class Shard:
    """A file that holds one tensor [rows, width]; how many rows is known by the caller (manifest or progress)."""

    path: Path
    tensor: str
    """The tensor's name: rows, row_scale or where."""
    dtype: str
    """As safetensors writes it: F32, BF16, F16, I8 or I32."""
    width: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return self.width * _DTYPES[self.dtype].itemsize

    def total_bytes(self, rows: int) -> int:
        """Size of the file with `rows` rows."""
        return PREFIX_BYTES + rows * self.row_bytes

    def truncate(self, rows: int) -> None:
        """The file holds `rows` rows and nothing after them; new where there are none. StoreError: it has fewer."""
        if rows == 0:
            self.path.write_bytes(self.prefix(0))
            return
        found = self.path.stat().st_size if self.path.is_file() else 0
        if found < self.total_bytes(rows):
            raise StoreError(
                f"{self.path} has {found:,} bytes, but the last checkpoint needs {self.total_bytes(rows):,} "
                f"({rows:,} rows of {self.width}). The file was changed or lost since; collect again into a new folder."
            )
        os.truncate(self.path, self.total_bytes(rows))

    def to_bytes(self, values: np.ndarray) -> memoryview:
        """The bytes of `values` [n, width] in the file."""
        return np.ascontiguousarray(values, dtype=_DTYPES[self.dtype]).reshape(-1).view(np.uint8).data

    def of_bytes(self, data: memoryview, rows: int) -> np.ndarray:
        """The tensor [rows, width] that `to_bytes` made bytes of, a view. StoreError: too many or few bytes."""
        if data.nbytes != rows * self.row_bytes:
            raise StoreError(f"{data.nbytes:,} bytes came for {rows:,} rows of {self.row_bytes:,} bytes each.")
        return np.frombuffer(data, dtype=_DTYPES[self.dtype]).reshape(rows, self.width)

    def write(self, row: int, left: memoryview) -> None:
        """`left`, as `to_bytes` gives it, is in the file from row `row` on. StoreError: the disk refuses it.

        Where it is much the disk begins with it at once, so that the next `sync` has little left to wait for.
        """
        place, size = self.total_bytes(row), left.nbytes
        try:
            with open(self.path, "r+b", buffering=0) as file:
                file.seek(place)
                while left:
                    left = left[file.write(left) :]
                if size >= _WRITTEN_AT_ONCE:
                    _begin_writing(file.fileno(), place, size)
        except OSError as error:
            raise StoreError(
                f"{self.path} cannot be written: {error.strerror}. Put that right (room on the disk, permissions), "
                f"then go on from the last checkpoint with the same command and --resume."
            ) from error

    def sync(self) -> None:
        """What was written is on the disk."""
        with open(self.path, "rb") as file:
            os.fsync(file.fileno())

    def close(self, rows: int) -> None:
        """The header says `rows` rows, and everything is on the disk."""
        with open(self.path, "r+b") as file:
            file.write(self.prefix(rows))
            file.flush()
            os.fsync(file.fileno())

    def check_size(self, rows: int) -> None:
        """Nothing. StoreError: the file is missing, or its size is not that of `rows` rows."""
        if not self.path.is_file():
            raise StoreError(f"{self.path} is missing, but manifest.json says it holds {rows:,} rows. {_DAMAGED}")
        found, expected = self.path.stat().st_size, self.total_bytes(rows)
        if found != expected:
            raise StoreError(
                f"{self.path} has {found:,} bytes; manifest.json says {rows:,} rows of {self.width}, "
                f"which is {expected:,} bytes. {_DAMAGED}"
            )

    def hash(self, rows: int, like: str | None = None, mapped: "Mapped | None" = None) -> Hash:
        """Of the bytes of the first `rows` rows, that is of the file without its header; more can be added.

        like: a checksum of the algorithm to use; None: the one for new shards. mapped: a map of this file that will be
        used later, through which is read what need not come from the disk: that saves a copy, and page faults then. The
        header is left out because it is rewritten at the end; `map` compares it byte by byte.
        """
        found, place, end = new_hash(like), PREFIX_BYTES, self.total_bytes(rows)
        buffer = memoryview(bytearray(_READ_AT_ONCE))
        with open(self.path, "rb", buffering=0) as file:
            while place < end:
                size = min(end - place, _READ_AT_ONCE)
                if mapped is not None and _is_cached(file.fileno(), place, size):
                    with mapped.uncut():
                        found.update(memoryview(mapped.file)[place : place + size])
                    place += size
                    continue
                file.seek(place)
                piece = buffer[: file.readinto(buffer[:size])]
                if not piece:
                    break
                found.update(piece)
                place += len(piece)
        return found

    def check_hash(self, rows: int, expected: str, mapped: "Mapped | None" = None) -> None:
        """Nothing. StoreError: the bytes of the rows are not those that were written; O(size), reads them all."""
        if told := difference(self.hash(rows, expected, mapped), expected, rows):
            raise StoreError(f"{self.path}: {told} {_DAMAGED}")

    def read_through(self) -> None:
        """The file is in the page cache, as far as it fits: what is not there yet is read. OSError: it cannot be read.

        Next to nothing where all is there: a place every `_LOOK_EVERY` bytes is looked at.
        """
        buffer = memoryview(bytearray(_READ_AT_ONCE))
        with open(self.path, "rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            for start in range(0, size, _READ_AT_ONCE):
                if not _is_cached(file.fileno(), start, min(_READ_AT_ONCE, size - start)):
                    file.seek(start)
                    file.readinto(buffer)

    def map(self, rows: int) -> "Mapped":
        """The tensor [rows, width], memory-mapped. StoreError: size or header is not as expected."""
        self.check_size(rows)
        with open(self.path, "rb") as file:
            found = file.read(PREFIX_BYTES)
            if found != self.prefix(rows):
                shown = found[8:].decode("utf-8", "replace").strip()
                expected = self.prefix(rows)[8:].decode().strip()
                raise StoreError(f"{self.path} has the header {shown!r}; expected {expected!r}. {_DAMAGED}")
            mapped = mmap.mmap(file.fileno(), self.total_bytes(rows), access=mmap.ACCESS_READ)
            lease = Lease(file.fileno())
        flat = np.frombuffer(mapped, _DTYPES[self.dtype], offset=PREFIX_BYTES)
        return Mapped(shard=self, rows=flat.reshape(rows, self.width), file=mapped, lease=lease)

    def prefix(self, rows: int) -> bytes:
        """The file's first `PREFIX_BYTES` bytes when it has `rows` rows."""
        header = {
            self.tensor: {
                "dtype": self.dtype,
                "shape": [rows, self.width],
                "data_offsets": [0, rows * self.row_bytes],
            }
        }
        length = PREFIX_BYTES - 8
        text = json.dumps(header, separators=(",", ":")).encode().ljust(length)
        assert len(text) == length
        return struct.pack("<Q", length) + text


@dataclass(frozen=True, kw_only=True, eq=False)
class Mapped:
    """A shard's rows in a memory map, which keeps its file open."""

    shard: Shard
    rows: np.ndarray
    """The tensor [rows, width], read-only."""
    file: mmap.mmap
    lease: Lease

    @contextmanager
    def uncut(self) -> Iterator[None]:
        """A block in which the rows can be read. StoreError: the file has another size than when it was mapped.

        Reading rows that the file has lost would end the process. In the block it can lose none (`Lease`), which costs
        five system calls. A file that was removed, or replaced by another of its name, can be read to the end.
        """
        with self.lease:
            found, expected = self.file.size(), self.shard.total_bytes(len(self.rows))
            if found != expected:
                raise StoreError(
                    f"{self.shard.path} has {found:,} bytes, but had {expected:,} when reading it began: it was "
                    f"changed meanwhile. {_DAMAGED}"
                )
            yield


_DAMAGED: Final = "The store is damaged or mixed with another one; copy it again or collect it again."


def _is_cached(descriptor: int, start: int, size: int) -> bool:
    """Whether a part of a file seems to be in the page cache; False where the system does not say."""
    if sys.platform != "linux":
        return False
    byte = [bytearray(1)]
    try:
        for place in range(start, start + size, _LOOK_EVERY):
            os.preadv(descriptor, byte, place, os.RWF_NOWAIT)
    except OSError:  # it would have to wait for the disk, or the file system cannot tell
        return False
    return True


def _begin_writing(descriptor: int, start: int, size: int) -> None:
    """The disk begins with a part of a file, and nobody waits for it; nothing where the system has no such call.

    An error of the disk is told by the next `fsync`, as without this.
    """
    if sys.platform == "linux":
        _system_calls().sync_file_range(descriptor, ctypes.c_int64(start), ctypes.c_int64(size), _WRITE_ONLY)


@functools.cache
def _system_calls() -> ctypes.CDLL:
    return ctypes.CDLL(None)


def site_shards(folder: Path, site: str, bucket: int, width: int, dtype: str) -> dict[str, Shard]:
    """Tensor -> shard of one site in one bucket: "rows", and for int8 also "row_scale"."""
    names = {ROWS: f"{bucket:05d}.safetensors", ROW_SCALE: f"{bucket:05d}.{ROW_SCALE}.safetensors"}
    widths = {ROWS: width, ROW_SCALE: 1}
    return {
        tensor: Shard(path=folder / site / names[tensor], tensor=tensor, dtype=stored_as, width=widths[tensor])
        for tensor, stored_as in TENSORS[dtype].items()
    }


def where_shard(folder: Path, bucket: int) -> Shard:
    """The shard that says, for each row of one bucket, where it comes from: token id, document, offset."""
    return Shard(path=folder / "where" / f"{bucket:05d}.safetensors", tensor="where", dtype="I32", width=3)


def shard_name(site: str, tensor: str) -> str:
    """What the checksums in manifest.json call a site's shards: the site, or site/row_scale."""
    return site if tensor == ROWS else f"{site}/{tensor}"


def bucket_shards(folder: Path, bucket: int, widths: Mapping[str, int], dtype: str) -> dict[str, Shard]:
    """Name (`shard_name`, or "where") -> shard of everything in one bucket."""
    found = {
        shard_name(site, tensor): shard
        for site, width in widths.items()
        for tensor, shard in site_shards(folder, site, bucket, width, dtype).items()
    }
    return {**found, "where": where_shard(folder, bucket)}
