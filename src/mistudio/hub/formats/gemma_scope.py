"""Gemma Scope 1: one params.npz an SAE, which is a zip of five float32 arrays and says nothing about itself.

    W_enc [D, F]   b_enc [F]   threshold [F]   W_dec [F, D], rows of norm 1   b_dec [D]

What the SAE belongs to is known from the path alone (repository, layer, width, average L0), and taken from there where
the path tells. Some writers use w_enc and w_dec, or add a scaling_factor of ones; both are understood.

How the arrays are read is in `mistudio.sae.gemma_scope`.
"""

import os
from collections.abc import Sequence
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
    refuse_unfolded,
    the_file,
)
from mistudio.sae import SAE, JumpReLUSAE, SAEConfig, Transcoder, TranscoderConfig
from mistudio.sae.gemma_scope import ARRAYS, array_names, is_transposed, read_weights, structure

WHAT = "Gemma Scope npz"


def matches(path: Path) -> bool:
    """Whether this is a zip whose first member is a .npy array, or a folder with such a file in it."""
    return bool(candidates(path, _is_npz))


def load(path: Path, dtype: torch.dtype = torch.float32) -> SAE:
    """The SAE in a params.npz (or in the folder that holds it), its matrices in `dtype`, its vectors in float32.

    A transposed file (W_enc [F, D], W_dec [D, F]) is recognised by its shapes and turned. A transcoder is one where the
    path says so. SAEError: the arrays are not those of an SAE, or D = F, so that its orientation cannot be told.
    """
    file = the_file(path, _is_npz, WHAT)
    weights = read_weights(file, dtype)
    return _build(file, weights)


def decoder_rows(path: Path, indices: Sequence[int]) -> Float[Tensor, "n D"]:
    """The decoder rows of those features in float32, through a memory map: only their pages are read.

    SAEError: as `load`, as far as the file's structure tells, or there is no such feature.
    """
    npz = structure(the_file(path, _is_npz, WHAT))
    names = array_names(npz)
    transposed = is_transposed(npz, names)
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
