"""Whether a file of weights is what its name says: size, structure, shapes, dtypes, CRCs, and the numbers themselves.

Two passes over the file, both in blocks of 16 MiB, so that 19 GB take no more memory than 300 MB: one for the sha256,
one for the CRCs (npz), NaN and infinities, thresholds that are not positive, decoder rows that do not have norm 1.

The norm of the decoder rows is a rule of the first generation (Gemma Scope report, section 3.2; folding leaves W_dec
as it is). Nothing that we have read says it of the second generation's files, whose input and output may be scaled by
different constants, so there it is measured and reported, not required.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from safetensors import SafetensorError, safe_open

from mistudio.errors import HubError
from mistudio.hub.entry import Entry
from mistudio.sae.npz import BLOCK_BYTES, read_structure

Kind = Literal["npz", "safetensors"]
UNIT_ROW_TOLERANCE = 1e-3
READ_BYTES = 2**20
SKIP = "affine_skip_connection"


@dataclass(frozen=True, kw_only=True)
class Verified:
    """A file that passed, and what it holds."""

    path: Path
    """The file."""
    kind: Kind
    """Its container, by content."""
    bytes: int
    """Its size."""
    sha256: str
    """Of the whole file, in hexadecimal."""
    d_in: int
    """Width of the activations it reads."""
    d_sae: int
    """Number of features F."""
    d_out: int
    """Width of what it writes."""
    affine: bool
    """Has a linear skip connection (Gemma Scope 2 transcoders)."""
    row_norm_error: float
    """The largest |‖W_dec[i]‖ - 1|."""


@dataclass(frozen=True, kw_only=True)
class _Arrays:
    """An opened file: declarations now, numbers on demand."""

    kind: Kind
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]
    blocks: Callable[[str], Iterator[np.ndarray]]


def verify_file(path: str | Path, entry: Entry | None = None) -> Verified:
    """What the file holds, after everything about it has been checked; `entry`: also that it is that entry's.

    HubError: one sentence on the first thing that is wrong. Reads the file twice; 302 MB take about a second.
    """
    path = Path(path)
    if not path.is_file():
        raise HubError(f"There is no file {path}.")
    if entry is not None:
        check_size(path.stat().st_size, entry, str(path))
    arrays = _open(path)
    if entry is not None and arrays.kind != Path(entry.filename).suffix.removeprefix("."):
        raise HubError(f"{path} is a file of kind {arrays.kind}; {entry.hf_path} is a {entry.filename}.")
    d_in, d_sae, d_out = _check_declarations(path, arrays, entry)
    row_norm_error = _check_numbers(path, arrays)
    return Verified(
        path=path,
        kind=arrays.kind,
        bytes=path.stat().st_size,
        sha256=file_sha256(path),
        d_in=d_in,
        d_sae=d_sae,
        d_out=d_out,
        affine=SKIP in arrays.shapes,
        row_norm_error=row_norm_error,
    )


def check_size(size: int, entry: Entry, place: str, advice: str = "") -> None:
    """Returns where a file of `size` bytes can be the entry's, whole. HubError: it is cut short, or too long."""
    if entry.size_fits(size):
        return
    fault = "is cut short" if size < entry.bytes_expected else "is another file, too long"
    raise HubError(
        f"{place} {fault}: {size:,} bytes, where {entry.hf_path} has {entry.bytes_expected:,} bytes of weights{advice}."
    )


def file_sha256(path: Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _open(path: Path) -> _Arrays:
    with open(path, "rb") as file:
        start = file.read(4)
    if start == b"PK\x03\x04":
        npz = read_structure(path)
        shapes = {name: array.shape for name, array in npz.arrays.items()}
        dtypes = {name: array.dtype for name, array in npz.arrays.items()}
        return _Arrays(kind="npz", shapes=shapes, dtypes=dtypes, blocks=npz.blocks)
    if start[:2] == b"PK":
        raise HubError(f"{path} is an empty zip.")
    return _open_safetensors(path)


def _open_safetensors(path: Path) -> _Arrays:
    try:
        with safe_open(path, framework="numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
            shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
            dtypes = {name: {"F32": "float32"}.get(part.get_dtype(), part.get_dtype()) for name, part in slices.items()}
    except (SafetensorError, OSError, ValueError) as error:
        raise HubError(
            f"{path} is neither an npz nor a whole safetensors file: {' '.join(str(error).split())}."
        ) from error

    def blocks(name: str) -> Iterator[np.ndarray]:
        row_bytes = 4 * int(np.prod(shapes[name][1:], dtype=object))
        step = max(1, BLOCK_BYTES // max(row_bytes, 1))
        with safe_open(path, framework="numpy") as file:
            part, rows = file.get_slice(name), shapes[name][0]
            for start in range(0, rows, step):
                yield part[start : min(start + step, rows)]

    return _Arrays(kind="safetensors", shapes=shapes, dtypes=dtypes, blocks=blocks)


def _expected_shapes(kind: Kind, d_in: int, d_sae: int, d_out: int, affine: bool) -> dict[str, tuple[int, ...]]:
    if kind == "npz":
        W_enc, W_dec = "W_enc", "W_dec"
    else:
        W_enc, W_dec = "w_enc", "w_dec"
    shapes: dict[str, tuple[int, ...]] = {W_enc: (d_in, d_sae), W_dec: (d_sae, d_out)}
    shapes |= {"b_enc": (d_sae,), "b_dec": (d_out,), "threshold": (d_sae,)}
    return shapes | ({SKIP: (d_in, d_out)} if affine else {})


def _check_declarations(path: Path, arrays: _Arrays, entry: Entry | None) -> tuple[int, int, int]:
    """(d_in, d_sae, d_out), after names, shapes and dtypes were compared with what they must be."""
    affine = entry.affine if entry is not None else arrays.kind == "safetensors" and SKIP in arrays.shapes
    names = set(_expected_shapes(arrays.kind, 1, 1, 1, affine))
    if missing := sorted(names - set(arrays.shapes)):
        raise HubError(f"{path} lacks {', '.join(missing)}; the file of an SAE holds {', '.join(sorted(names))}.")
    if extra := sorted(set(arrays.shapes) - names):
        raise HubError(f"{path} also holds {', '.join(extra)}; the file of an SAE holds {', '.join(sorted(names))}.")
    if entry is not None:
        sizes = entry.d_in, entry.width, entry.d_out
    else:
        sizes = _sizes(path, arrays)
    for name, shape in _expected_shapes(arrays.kind, *sizes, affine).items():
        if arrays.shapes[name] != shape:
            whose = "its other arrays" if entry is None else entry.hf_path
            raise HubError(f"{path}: {name} has shape {list(arrays.shapes[name])}; {whose} want {list(shape)}.")
        if arrays.dtypes[name] != "float32":
            raise HubError(f"{path}: {name} is {arrays.dtypes[name]}; the released arrays are float32.")
    return sizes


def _sizes(path: Path, arrays: _Arrays) -> tuple[int, int, int]:
    """d_sae and d_out from the vectors, d_in from the encoder's other dimension."""
    encoder, vectors = "W_enc" if arrays.kind == "npz" else "w_enc", ("threshold", "b_dec")
    ranks = {encoder: 2} | dict.fromkeys(vectors, 1)
    for name, rank in ranks.items():
        if len(arrays.shapes[name]) != rank or 0 in arrays.shapes[name]:
            raise HubError(f"{path}: {name} has shape {list(arrays.shapes[name])}; it must have {rank} dimensions.")
    (d_sae,), (d_out,) = arrays.shapes["threshold"], arrays.shapes["b_dec"]
    rows, columns = arrays.shapes[encoder]
    return columns if rows == d_sae != columns else rows, d_sae, d_out


def _check_numbers(path: Path, arrays: _Arrays) -> float:
    """The largest distance of a decoder row's norm from 1."""
    worst = 0.0
    for name in arrays.shapes:
        for block in arrays.blocks(name):
            if not np.isfinite(block).all():
                raise HubError(f"{path}: {name} holds NaN or infinite values.")
            if name == "threshold" and (block <= 0).any():
                raise HubError(f"{path}: thresholds must be positive; the lowest is {block.min():.3g}.")
            if name in ("W_dec", "w_dec"):
                with np.errstate(over="ignore"):
                    worst = max(worst, float(np.abs(np.linalg.norm(block, axis=1) - 1).max()))
        if name == "W_dec" and worst > UNIT_ROW_TOLERANCE:
            raise HubError(f"{path}: decoder rows must have norm 1, one is off by {worst:.3g}.")
    return worst
