"""One bucket of one site: a safetensors file with a single tensor, appended to while it grows and memory-mapped when
read.

The header has a fixed size, padded with spaces as the format allows, so that it can be rewritten in place once the
number of rows is known; while the file grows it says zero rows. Every safetensors reader can open a finished shard.
"""

import json
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from mistudio.errors import StoreError

PREFIX_BYTES: Final = 256  # 8 bytes of header length, then the header
_DTYPES: Final = {"F32": np.dtype("<f4"), "I32": np.dtype("<i4")}


@dataclass(frozen=True, kw_only=True)
class Shard:
    """A file that holds one tensor [rows, width]; how many rows is known by the caller (manifest or progress)."""

    path: Path
    tensor: str
    """The tensor's name: "rows" or "where"."""
    dtype: str
    """As safetensors writes it: F32 or I32."""
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
            self.path.write_bytes(self._prefix(0))
            return
        found = self.path.stat().st_size if self.path.is_file() else 0
        if found < self.total_bytes(rows):
            raise StoreError(
                f"{self.path} has {found:,} bytes, but the last checkpoint needs {self.total_bytes(rows):,} "
                f"({rows:,} rows of {self.width}). The file was changed or lost since; collect again into a new folder."
            )
        os.truncate(self.path, self.total_bytes(rows))

    def write(self, row: int, values: np.ndarray) -> None:
        """`values` [n, width] are rows row ... row+n-1. StoreError: the disk refuses them."""
        try:
            with open(self.path, "r+b", buffering=0) as file:
                file.seek(self.total_bytes(row))
                left = np.ascontiguousarray(values, dtype=_DTYPES[self.dtype]).data.cast("B")
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
            file.write(self._prefix(rows))
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

    def map(self, rows: int) -> np.ndarray:
        """The tensor [rows, width], read-only, memory-mapped. StoreError: size or header is not as expected."""
        self.check_size(rows)
        with open(self.path, "rb") as file:
            found = file.read(PREFIX_BYTES)
        if found != self._prefix(rows):
            shown = found[8:].decode("utf-8", "replace").strip()
            expected = self._prefix(rows)[8:].decode().strip()
            raise StoreError(f"{self.path} has the header {shown!r}; expected {expected!r}. {_DAMAGED}")
        if rows == 0:
            return np.zeros((0, self.width), dtype=_DTYPES[self.dtype])
        return np.asarray(
            np.memmap(self.path, _DTYPES[self.dtype], mode="r", offset=PREFIX_BYTES, shape=(rows, self.width))
        )

    def _prefix(self, rows: int) -> bytes:
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


def site_shard(folder: Path, site: str, bucket: int, width: int) -> Shard:
    """The shard with the rows of one site in one bucket."""
    return Shard(path=folder / site / f"{bucket:05d}.safetensors", tensor="rows", dtype="F32", width=width)


def where_shard(folder: Path, bucket: int) -> Shard:
    """The shard that says, for each row of one bucket, where it comes from: token id, document, offset."""
    return Shard(path=folder / "where" / f"{bucket:05d}.safetensors", tensor="where", dtype="I32", width=3)
