"""One bucket of one site: a safetensors file with a single tensor, appended to while it grows and memory-mapped when
read.

The header has a fixed size, padded with spaces as the format allows, so that it can be rewritten in place once the
number of rows is known; while the file grows it says zero rows. Every safetensors reader can open a finished shard.
"""

import hashlib
import json
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from mistudio.errors import StoreError
from mistudio.store.dtypes import ROW_SCALE, ROWS, TENSORS

PREFIX_BYTES: Final = 256  # 8 bytes of header length, then the header
_DTYPES: Final[dict[str, np.dtype[Any]]] = {
    "F32": np.dtype("<f4"),
    "BF16": np.dtype("<u2"),  # its bits
    "F16": np.dtype("<f2"),
    "I8": np.dtype("i1"),
    "I32": np.dtype("<i4"),
}
_READ_AT_ONCE: Final = 1 << 22


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
        """`left`, as `to_bytes` gives it, is in the file from row `row` on. StoreError: the disk refuses it."""
        try:
            with open(self.path, "r+b", buffering=0) as file:
                file.seek(self.total_bytes(row))
                while left:
                    left = left[file.write(left) :]
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

    def hash(self, rows: int) -> "hashlib._Hash":
        """SHA-256 of the bytes of the first `rows` rows, that is of the file without its header; more can be added.

        The header is left out because it is rewritten at the end; `map` compares it byte by byte.
        """
        found, left = hashlib.sha256(), rows * self.row_bytes
        with open(self.path, "rb", buffering=0) as file:
            file.seek(PREFIX_BYTES)
            while left and (piece := file.read(min(left, _READ_AT_ONCE))):
                found.update(piece)
                left -= len(piece)
        return found

    def check_hash(self, rows: int, expected: str) -> None:
        """Nothing. StoreError: the bytes of the rows are not those that were written; O(size), reads them all."""
        found = self.hash(rows).hexdigest()
        if found != expected:
            raise StoreError(
                f"{self.path}: SHA-256 of its {rows:,} rows is {found[:12]}..., manifest.json says {expected[:12]}... "
                f"{_DAMAGED}"
            )

    def map(self, rows: int) -> np.ndarray:
        """The tensor [rows, width], read-only, memory-mapped. StoreError: size or header is not as expected."""
        self.check_size(rows)
        with open(self.path, "rb") as file:
            found = file.read(PREFIX_BYTES)
        if found != self.prefix(rows):
            shown = found[8:].decode("utf-8", "replace").strip()
            expected = self.prefix(rows)[8:].decode().strip()
            raise StoreError(f"{self.path} has the header {shown!r}; expected {expected!r}. {_DAMAGED}")
        if rows == 0:
            return np.zeros((0, self.width), dtype=_DTYPES[self.dtype])
        return np.asarray(
            np.memmap(self.path, _DTYPES[self.dtype], mode="r", offset=PREFIX_BYTES, shape=(rows, self.width))
        )

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


_DAMAGED: Final = "The store is damaged or mixed with another one; copy it again or collect it again."


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
