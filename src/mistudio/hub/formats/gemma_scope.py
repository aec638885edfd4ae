"""Gemma Scope 1: one params.npz an SAE, which is a zip of five float32 arrays and says nothing about itself.

    W_enc [D, F]   b_enc [F]   threshold [F]   W_dec [F, D], rows of norm 1   b_dec [D]

What the SAE belongs to is known from the path alone (repository, layer, width, average L0), and taken from there where
the path tells. Some writers use w_enc and w_dec, or add a scaling_factor of ones; both are understood.

Stored arrays are read in blocks straight into their place: in float32 there is no second copy, in a narrower dtype one
block. (A memory map would do the same for the map's own pages, but a file cut short while it is read would kill the
process instead of raising; single decoder rows are mapped.) CRCs are `mistudio.hub.verify`'s work; shapes, finiteness,
unit rows and positive thresholds are checked here, on the fly.
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mistudio.errors import HubError, SAEError
from mistudio.hub.formats.reading import (
    candidates,
    entry_of,
    first_member,
    has_unit_rows,
    in_dtype,
    refuse_unfolded,
    the_file,
)
from mistudio.hub.npz import Npz, read_structure
from mistudio.sae import SAE, JumpReLUSAE, SAEConfig, Transcoder, TranscoderConfig
from mistudio.sae.model import UNIT_ROW_TOLERANCE

WHAT = "Gemma Scope npz"
ARRAYS = ("W_enc", "b_enc", "threshold", "W_dec", "b_dec")
BLOCK_BYTES = 2**20
"""Small enough that a block is still in the processor's cache when it is checked."""


def matches(path: Path) -> bool:
    """Whether this is a zip whose first member is a .npy array, or a folder with such a file in it."""
    return bool(candidates(path, _is_npz))


def load(path: Path, dtype: torch.dtype = torch.float32) -> SAE:
    """The SAE in a params.npz (or in the folder that holds it), its matrices in `dtype`, its vectors in float32.

    A transposed file (W_enc [F, D], W_dec [D, F]) is recognised by its shapes and turned. A transcoder is one where the
    path says so. SAEError: the arrays are not those of an SAE, or D = F, so that its orientation cannot be told.
    """
    file = the_file(path, _is_npz, WHAT)
    npz = _structure(file)
    names = _names(npz)
    transposed = _is_transposed(npz, names)
    vectors = {name: torch.from_numpy(_read_all(npz, names[name])) for name in ("b_enc", "threshold", "b_dec")}
    _check_vectors(file, vectors)
    W_enc = _read_matrix(npz, names["W_enc"], transposed, dtype, _refuse_non_finite(file, names["W_enc"]))
    W_dec = _read_unit_rows(npz, names["W_dec"], transposed, dtype)
    weights = in_dtype(vectors, torch.float32) | {"W_enc": W_enc, "W_dec": W_dec}
    weights["theta"] = weights.pop("threshold")
    if dtype == torch.float64:
        weights = in_dtype(weights, dtype)
    return _build(file, weights)


def decoder_rows(path: Path, indices: Sequence[int]) -> Float[Tensor, "n D"]:
    """The decoder rows of those features in float32, through a memory map: only their pages are read.

    SAEError: as `load`, as far as the file's structure tells, or there is no such feature.
    """
    npz = _structure(the_file(path, _is_npz, WHAT))
    names = _names(npz)
    transposed = _is_transposed(npz, names)
    d_sae = npz.arrays[names["b_enc"]].shape[0]
    for i in indices:
        if not 0 <= i < d_sae:
            raise SAEError(f"There is no feature {i}; {npz.path} has features 0 to {d_sae - 1}.")
    try:
        W_dec = npz.map(names["W_dec"])
    except HubError as error:
        raise SAEError(str(error)) from error
    wanted = list(indices)
    return torch.from_numpy(np.array(W_dec[:, wanted].T if transposed else W_dec[wanted], order="C"))


def save(sae: SAE, path: Path) -> None:
    """Writes `path` where it ends in .npz, else `path`/params.npz; equal SAEs give equal bytes.

    The arrays are stored uncompressed, as `np.savez` does. SAEError: not a JumpReLU SAE in released form with unit
    decoder rows and positive thresholds, or D = F, which no reader could tell from its transpose.
    """
    refuse_unfolded(sae)
    if not isinstance(sae, JumpReLUSAE):
        raise SAEError(f"Gemma Scope's format holds JumpReLU SAEs; this is a {type(sae).__name__}.")
    if sae.d_in == sae.config.d_sae:
        raise SAEError(f"With D = F = {sae.d_in} the file's orientation could not be told; save it in another format.")
    if not has_unit_rows(sae.W_dec) or not bool((sae.theta > 0).all()):
        raise SAEError("Gemma Scope's format wants decoder rows of norm 1 and thresholds above 0; this SAE has others.")
    file = path if path.suffix == ".npz" else path / "params.npz"
    file.parent.mkdir(parents=True, exist_ok=True)
    parameters = {
        "threshold": sae.theta,
        "W_enc": sae.W_enc,
        "b_enc": sae.b_enc,
        "W_dec": sae.W_dec,
        "b_dec": sae.b_dec,
    }
    arrays = {name: parameters[name].detach().float().cpu().contiguous().numpy() for name in ARRAYS}
    _write(file, arrays)


def _write(file: Path, arrays: dict[str, np.ndarray]) -> None:
    """Streamed to a temporary name, then renamed: the arrays may be tens of gigabytes."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as stream:
            np.savez(stream, **arrays)  # type: ignore[arg-type]
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


def _is_npz(file: Path) -> bool:
    return first_member(file).endswith(".npy")


def _structure(file: Path) -> Npz:
    try:
        return read_structure(file)
    except HubError as error:
        raise SAEError(str(error)) from error
    except OSError as error:
        raise SAEError(f"{file} is damaged: {error}.") from error


def _names(npz: Npz) -> dict[str, str]:
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


def _is_transposed(npz: Npz, names: dict[str, str]) -> bool:
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


def _build(file: Path, weights: dict[str, Tensor]) -> SAE:
    """What the path names: an SAE, or a transcoder."""
    d_sae, d_model = weights["W_dec"].shape
    entry = entry_of(file)
    if entry is None:
        return JumpReLUSAE(SAEConfig(d_model=d_model, d_sae=d_sae), weights)
    known: dict[str, Any] = {"d_model": d_model, "d_sae": d_sae, "hook_layer": entry.layer, "model": entry.model}
    if isinstance(entry.site_name, tuple):
        reads, writes = entry.site_name
        return Transcoder(TranscoderConfig(**known, hook_name=reads, hook_name_out=writes, d_out=d_model), weights)
    return JumpReLUSAE(SAEConfig(**known, hook_name=entry.site_name), weights)
