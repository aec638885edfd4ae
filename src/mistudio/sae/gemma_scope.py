"""The five arrays of Gemma Scope's params.npz as the weights of an SAE: strictly, and without a second copy.

Stored arrays are read in blocks straight into their place: in float32 there is no second copy, in a narrower dtype one
block. (A memory map would do the same for the map's own pages, but a file cut short while it is read would kill the
process instead of raising.) CRCs are `mistudio.hub.verify`'s work; shapes, finiteness, unit rows and positive
thresholds are checked here, on the fly.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mistudio.errors import HubError, SAEError
from mistudio.sae.base import UNIT_ROW_TOLERANCE
from mistudio.sae.npz import Npz, read_structure

ARRAYS = ("W_enc", "b_enc", "threshold", "W_dec", "b_dec")
BLOCK_BYTES = 2**20
"""Small enough that a block is still in the processor's cache when it is checked."""


def read_weights(file: Path, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """W_enc [D, F], b_enc [F], theta [F], W_dec [F, D], b_dec [D]: matrices in `dtype`, vectors in float32 at least.

    A transposed file (W_enc [F, D], W_dec [D, F]) is recognised by its shapes and turned. SAEError: the arrays are not
    those of an SAE, or D = F, so that their orientation cannot be told.
    """
    npz = structure(file)
    names = array_names(npz)
    transposed = is_transposed(npz, names)
    vectors = {name: torch.from_numpy(_read_all(npz, names[name])) for name in ("b_enc", "threshold", "b_dec")}
    _check_vectors(file, vectors)
    wide = torch.promote_types(dtype, torch.float32)
    weights = {name.replace("threshold", "theta"): vector.to(wide) for name, vector in vectors.items()}
    refuse = _refuse_non_finite(file, names["W_enc"])
    weights["W_enc"] = _read_matrix(npz, names["W_enc"], transposed, dtype, refuse)
    weights["W_dec"] = _read_unit_rows(npz, names["W_dec"], transposed, dtype)
    return weights


def structure(file: Path) -> Npz:
    """The file's arrays, declared sizes checked. SAEError: it is damaged, or no npz."""
    try:
        return read_structure(file)
    except HubError as error:
        raise SAEError(str(error)) from error
    except OSError as error:
        raise SAEError(f"{file} is damaged: {error}.") from error


def array_names(npz: Npz) -> dict[str, str]:
    """Our name → the file's, of the five arrays. SAEError: missing or further arrays, or one that is not float32."""
    names = {"W_" + name[2:] if name.startswith("w_") else name: name for name in npz.arrays}
    if len(names) < len(npz.arrays) or set(names) - {"scaling_factor"} != set(ARRAYS):
        found = ", ".join(sorted(npz.arrays)) or "no array"
        raise SAEError(f"{npz.path} holds {found}; a Gemma Scope SAE has {', '.join(ARRAYS)}.")
    for name, array in npz.arrays.items():
        if array.dtype != "float32":
            raise SAEError(f"{npz.path}: {name} is {array.dtype}; Gemma Scope's arrays are float32.")
    scaling = names.pop("scaling_factor", None)
    if scaling is not None and not (_read_all(npz, scaling) == 1).all():
        raise SAEError(f"{npz.path} has a scaling_factor other than 1, whose meaning is not known.")
    return names


def is_transposed(npz: Npz, names: dict[str, str]) -> bool:
    """Whether the matrices lie as W_enc [F, D] and W_dec [D, F]. SAEError: they fit neither way, or both."""
    shapes = {name: npz.arrays[stored].shape for name, stored in names.items()}
    listed = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
    if any(len(shapes[name]) != 1 for name in ("b_enc", "b_dec")) or shapes["threshold"] != shapes["b_enc"]:
        raise SAEError(f"{npz.path} has the shapes {listed}; b_enc and threshold must be [F], b_dec [D].")
    (f,), (d,) = shapes["b_enc"], shapes["b_dec"]
    if d == 0 or f == 0:
        raise SAEError(f"{npz.path} holds an empty SAE: {listed}.")
    if d == f and shapes["W_enc"] == shapes["W_dec"] == (d, d):
        raise SAEError(
            f"{npz.path} has D = F = {d}: whether its matrices are transposed cannot be told, so it is refused."
        )
    for transposed, (encoder, decoder) in ((False, ((d, f), (f, d))), (True, ((f, d), (d, f)))):
        if (shapes["W_enc"], shapes["W_dec"]) == (encoder, decoder):
            return transposed
    raise SAEError(f"{npz.path} has the shapes {listed}; W_enc must be [{d}, {f}] and W_dec [{f}, {d}].")


def _read_all(npz: Npz, name: str) -> np.ndarray:
    try:
        return npz.read(name)
    except HubError as error:
        raise SAEError(str(error)) from error


def _check_vectors(file: Path, vectors: dict[str, Tensor]) -> None:
    for name, vector in vectors.items():
        if not vector.isfinite().all():
            raise SAEError(f"{file}: {name} holds NaN or infinite values.")
    if not (vectors["threshold"] > 0).all():
        raise SAEError(f"{file}: {int((vectors['threshold'] <= 0).sum())} thresholds are not positive.")


def _read_matrix(
    npz: Npz, name: str, transposed: bool, dtype: torch.dtype, inspect: Callable[[slice, Tensor], None]
) -> Tensor:
    """A matrix in `dtype`, turned where `transposed`. `inspect` sees every block of stored rows, in float32."""
    array = npz.arrays[name]
    rows, columns = array.shape
    whole = torch.empty((columns, rows) if transposed else (rows, columns), dtype=dtype)
    target = whole.T if transposed else whole
    if array.offset is None:  # compressed, which no released file is
        stored = torch.from_numpy(_read_all(npz, name))
        inspect(slice(0, rows), stored)
        target.copy_(stored)
        return whole
    step = max(1, BLOCK_BYTES // (4 * columns))
    direct = dtype == torch.float32 and not transposed
    scratch = torch.empty(0 if direct else min(step, rows), columns)
    with open(npz.path, "rb", buffering=0) as file:
        file.seek(array.offset)
        for start in range(0, rows, step):
            part = slice(start, min(start + step, rows))
            block = whole[part] if direct else scratch[: part.stop - part.start]
            _fill(file, block, npz.path)
            inspect(part, block)
            if not direct:
                target[part].copy_(block)
    return whole


def _fill(file: Any, block: Tensor, path: Path) -> None:
    view = memoryview(block.numpy().data).cast("B")
    while view:
        n = file.readinto(view)
        if not n:
            raise SAEError(f"{path} ended while it was read.")
        view = view[n:]


def _refuse_non_finite(file: Path, name: str) -> Callable[[slice, Tensor], None]:
    def inspect(_: slice, block: Tensor) -> None:
        flat = block.flatten()
        if not flat.dot(flat).isfinite() and not flat.isfinite().all():  # the first is cheap, and may overflow
            raise SAEError(f"{file}: {name} holds NaN or infinite values.")

    return inspect


def _read_unit_rows(npz: Npz, name: str, transposed: bool, dtype: torch.dtype) -> Tensor:
    """W_dec. SAEError: it holds NaN or infinite values, or a decoder row has another norm than 1."""
    rows, columns = npz.arrays[name].shape
    squares = torch.zeros(columns if transposed else rows)

    def inspect(part: slice, block: Tensor) -> None:
        if transposed:
            squares.add_(block.square().sum(0))
        else:
            squares[part] = torch.linalg.vector_norm(block, dim=1).square()

    W_dec = _read_matrix(npz, name, transposed, dtype, inspect)
    off = (squares.sqrt() - 1).abs().max()
    if not off.isfinite():
        raise SAEError(f"{npz.path}: {name} holds NaN or infinite values.")
    if off > UNIT_ROW_TOLERANCE:
        raise SAEError(f"{npz.path}: decoder rows must have norm 1, one is off by {off.item():.3g}.")
    return W_dec
