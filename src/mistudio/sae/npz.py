"""The arrays of a params.npz, read strictly: nothing is unpickled, and nothing is read before its size is known.

An npz is a zip of .npy files. `read_structure` looks only at the zip's directory and at the first bytes of every
member, and refuses whatever Gemma Scope's files are not: names with folders in them, two members of one name, members
that overlap or leave the file, sizes no honest compression reaches, encrypted members, object or structured dtypes,
big-endian numbers, Fortran order, headers whose shape does not account for every byte. `np.load` is not used, because
it decides for itself what to allocate.

A released file is *stored*, not compressed, so every array lies in the file as it lies in memory: `NpzArray.offset` is
where, and `Npz.map` maps it. Compressed members are read in blocks, never more than their declared size. Blocks come
through `zipfile`, which compares the CRC at the end of each member.
"""

import ast
import math
import re
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol, runtime_checkable

import numpy as np

from mistudio.errors import HubError

BLOCK_BYTES = 16 * 2**20
HEADER_BYTES_MAX = 10_000
MEMBERS_MAX = 64
SMALL_BYTES, RATIO_MAX = 64 * 2**20, 20
"""Declared sizes may come to 64 MiB, or to 20 times the file: float32 weights compress by a tenth, not twentyfold."""

_DTYPES = {"<f2": "float16", "<f4": "float32", "<f8": "float64"}
_LOCAL_HEADER = struct.Struct("<4s5H3L2H")
_BROKEN = (
    zipfile.BadZipFile,
    zlib.error,
    EOFError,
    NotImplementedError,
    OverflowError,
    RuntimeError,
    ValueError,
    struct.error,
)
"""What `zipfile` raises on damaged or exotic input."""


@runtime_checkable
class _Readable(Protocol):
    """An open file, or a member of a zip file."""

    def read(self, n: int, /) -> bytes: ...


@dataclass(frozen=True, kw_only=True)
class NpzArray:
    """One array as its header declares it; the declaration has been checked against the member's size."""

    name: str
    """Without `.npy`."""
    dtype: str
    """float16, float32 or float64, little-endian, rows first."""
    shape: tuple[int, ...]
    """Its shape."""
    offset: int | None
    """Where the numbers begin in the npz file; None where the member is compressed."""
    header_bytes: int
    """Bytes of the .npy header before the numbers."""

    @property
    def bytes(self) -> int:
        """Bytes of the numbers."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


@dataclass(frozen=True, kw_only=True)
class Npz:
    """The structure of an npz file; `read_structure` makes it."""

    path: Path
    """The file."""
    arrays: dict[str, NpzArray]
    """Array name → its declaration, in the file's order."""

    def map(self, name: str) -> np.ndarray:
        """A read-only memory map of a stored array; costs nothing until it is read. No CRC is checked, and the offset
        need not be a multiple of the item size. HubError: the array is compressed."""
        array = self.arrays[name]
        if array.offset is None:
            raise HubError(f"{self.path}: {name} is compressed and cannot be mapped; read it in blocks.")
        if not array.bytes:
            return np.empty(array.shape, array.dtype)
        return np.memmap(self.path, dtype=array.dtype, mode="r", offset=array.offset, shape=array.shape)

    def blocks(self, name: str, block_bytes: int = BLOCK_BYTES) -> Iterator[np.ndarray]:
        """The rows of an array in order, [rows, ...], about `block_bytes` at a time and read-only. HubError: the data
        end early, or after the last block the CRC is wrong."""
        array = self.arrays[name]
        row_shape = array.shape[1:]
        row_bytes = math.prod(row_shape) * np.dtype(array.dtype).itemsize
        step = max(1, block_bytes // max(row_bytes, 1)) * row_bytes
        with (
            _refusing_damage(self.path, name),
            zipfile.ZipFile(self.path) as zip_file,
            zip_file.open(f"{name}.npy") as member,
        ):
            _exactly(member, array.header_bytes)
            for start in range(0, array.bytes, max(step, 1)):
                data = _exactly(member, min(step, array.bytes - start))
                yield np.frombuffer(data, array.dtype).reshape(-1, *row_shape)
            member.read(1)

    def read(self, name: str) -> np.ndarray:
        """The whole array in its stored dtype, CRC checked; one copy, plus one block."""
        array = self.arrays[name]
        whole, done = np.empty(array.shape, array.dtype), 0
        for block in self.blocks(name):
            whole[done : done + len(block)] = block
            done += len(block)
        return whole


def read_structure(path: str | Path) -> Npz:
    """The arrays an npz file declares, in milliseconds whatever its size. HubError: one sentence on the first thing
    that is wrong; numbers and CRCs have not been looked at."""
    path = Path(path)
    with _refusing_damage(path), zipfile.ZipFile(path) as zip_file, open(path, "rb") as file:
        members = zip_file.infolist()
        _check_names(path, members)
        _check_sizes(path, members)
        offsets = _data_offsets(path, file, members, zip_file.start_dir)
        arrays = [_read_header(path, zip_file, m, offsets[m.filename]) for m in members]
    return Npz(path=path, arrays={array.name: array for array in arrays})


@contextmanager
def _refusing_damage(path: Path, name: str | None = None) -> Iterator[None]:
    place = str(path) if name is None else f"{path}: {name}"
    try:
        yield
    except _BROKEN as error:
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        if isinstance(error, zipfile.BadZipFile) and "CRC" in reason:
            reason = "its data do not match their CRC"
        elif isinstance(error, zipfile.BadZipFile) and "not a zip" in reason:
            reason = "the zip's directory, at the end of the file, is missing: the file is cut short, or is no npz"
        raise HubError(f"{place} is damaged: {reason}.") from error


def _check_names(path: Path, members: list[zipfile.ZipInfo]) -> None:
    if len(members) > MEMBERS_MAX:
        raise HubError(f"{path} declares {len(members)} members; an SAE's npz has five arrays.")
    seen: set[str] = set()
    for member in members:
        name = member.orig_filename
        if re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*\.npy", name) is None:
            raise HubError(f"{path} holds a member named {name[:80]!r}; members must be NAME.npy, without any folder.")
        if name in seen:
            raise HubError(f"{path} holds two members named {name}.")
        seen.add(name)


def _check_sizes(path: Path, members: list[zipfile.ZipInfo]) -> None:
    for m in members:
        if m.flag_bits & 0x1:
            raise HubError(f"{path}: {m.filename} is encrypted.")
        if m.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise HubError(f"{path}: {m.filename} is compressed by method {m.compress_type}; only deflate is read.")
        if m.compress_type == zipfile.ZIP_STORED and m.compress_size != m.file_size:
            raise HubError(f"{path}: {m.filename} is stored, yet its two sizes differ.")
    declared, size = sum(m.file_size for m in members), path.stat().st_size
    if declared > max(SMALL_BYTES, RATIO_MAX * size):
        raise HubError(
            f"{path} is {size:,} bytes and declares {declared:,} bytes of content: it is a zip bomb, not weights."
        )


def _data_offsets(path: Path, file: IO[bytes], members: list[zipfile.ZipInfo], directory: int) -> dict[str, int]:
    """Where each member's bytes begin. HubError: members overlap, or reach into the zip's directory."""
    offsets: dict[str, int] = {}
    free = 0
    for member in sorted(members, key=lambda m: m.header_offset):
        file.seek(max(member.header_offset, 0))  # a wrong directory makes it negative
        header = file.read(_LOCAL_HEADER.size)
        if len(header) < _LOCAL_HEADER.size or header[:4] != b"PK\x03\x04":
            raise HubError(f"{path}: the zip's directory points at no member for {member.filename}.")
        name_bytes, extra_bytes = _LOCAL_HEADER.unpack(header)[-2:]
        start = member.header_offset + _LOCAL_HEADER.size + name_bytes + extra_bytes
        if member.header_offset < free or start + member.compress_size > directory:
            raise HubError(f"{path}: {member.filename} overlaps another part of the file.")
        free = start + member.compress_size
        offsets[member.filename] = start
    return offsets


def _read_header(path: Path, zip_file: zipfile.ZipFile, member: zipfile.ZipInfo, offset: int) -> NpzArray:
    name = member.filename.removesuffix(".npy")
    with _refusing_damage(path, name), zip_file.open(member) as data:
        start = _exactly(data, 8)
        if start[:6] != b"\x93NUMPY" or tuple(start[6:8]) not in ((1, 0), (2, 0)):
            raise HubError(f"{path}: {name} is no .npy array of version 1 or 2.")
        length_format = "<H" if start[6] == 1 else "<I"
        (length,) = struct.unpack(length_format, _exactly(data, struct.calcsize(length_format)))
        if length > HEADER_BYTES_MAX:
            raise HubError(f"{path}: the header of {name} is {length:,} bytes long; the limit is {HEADER_BYTES_MAX:,}.")
        text = _exactly(data, length)
    header_bytes = len(start) + struct.calcsize(length_format) + length
    dtype, shape = _parse_header(path, name, text)
    array = NpzArray(
        name=name,
        dtype=dtype,
        shape=shape,
        offset=offset + header_bytes if member.compress_type == zipfile.ZIP_STORED else None,
        header_bytes=header_bytes,
    )
    if array.bytes + header_bytes != member.file_size:
        raise HubError(
            f"{path}: {name} has shape {list(shape)}, which is {array.bytes:,} bytes of {dtype}; "
            f"the file holds {member.file_size - header_bytes:,}."
        )
    return array


def _parse_header(path: Path, name: str, text: bytes) -> tuple[str, tuple[int, ...]]:
    try:
        header: Any = ast.literal_eval(text.decode("latin-1").strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError) as error:
        raise HubError(f"{path}: the header of {name} does not parse.") from error
    if not isinstance(header, dict) or set(header) != {"descr", "fortran_order", "shape"}:
        raise HubError(f"{path}: the header of {name} has other fields than descr, fortran_order and shape.")
    descr, shape = header["descr"], header["shape"]
    if not isinstance(descr, str) or "O" in descr:
        raise HubError(f"{path}: {name} holds Python objects or structures; only plain numbers are read.")
    if descr not in _DTYPES:
        known = ", ".join(_DTYPES)
        raise HubError(f"{path}: {name} has dtype {descr[:20]!r}; an SAE's are little-endian floats, one of {known}.")
    if header["fortran_order"] is not False:
        raise HubError(f"{path}: {name} is stored columns first (Fortran order); it must be stored rows first.")
    if not isinstance(shape, tuple) or not all(type(n) is int and n >= 0 for n in shape) or not 1 <= len(shape) <= 4:
        raise HubError(f"{path}: {name} has no shape that can be read.")
    return _DTYPES[descr], shape


def _exactly(member: _Readable, n: int) -> bytes:
    data = member.read(n)
    if len(data) != n:
        raise EOFError(f"it ends {n - len(data):,} bytes early")
    return data
