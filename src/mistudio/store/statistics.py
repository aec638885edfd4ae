"""Mean, second moment and scale of every site: float64 sums while rows are written, a small file when they are done."""

import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import numpy as np
import torch
from jaxtyping import Float, Float64
from safetensors import SafetensorError
from safetensors.torch import load, load_file
from torch import Tensor

from mistudio.errors import StoreError
from mistudio.files import write_tensors
from mistudio.store.gather import WORTH_BYTES, compiled
from mistudio.store.manifest import Manifest, SiteInfo

FILE = "statistics.safetensors"
ROWS_AT_ONCE: Final = 64
"""Rows summed up before they are added to the sum of all: what rounding loses grows with the longer of both."""


def column_sums(values: Float[Tensor, "B D"]) -> Float64[Tensor, "2 D"]:
    """Sum and sum of squares over the rows, in float64, row after row; not finite exactly where a column is not.

    Larger ones by a compiled loop where numba is installed, on one thread, with the same bits (but for a single column,
    which NumPy adds up in another order): torch's sums use all cores, and its threads go on spinning for a while after.
    """
    array, sums = values.numpy(), np.zeros((2, values.shape[1]))
    if values.nbytes >= WORTH_BYTES and compiled() is not None:
        from mistudio.store.sum_kernels import add_column_sums

        add_column_sums(array, ROWS_AT_ONCE, sums)
        return torch.from_numpy(sums)
    with np.errstate(all="ignore"):
        for start in range(0, len(array), ROWS_AT_ONCE):
            part = array[start : start + ROWS_AT_ONCE].astype(np.float64)
            sums[0] += np.add.reduce(part, axis=0)
            sums[1] += np.add.reduce(part * part, axis=0)
    return torch.from_numpy(sums)


def read_sums(path: Path, widths: Mapping[str, int]) -> dict[str, Tensor]:
    """Site -> sums [2, D] at a checkpoint. StoreError: the file is damaged."""
    try:
        sums = load_file(path)
    except (SafetensorError, OSError) as error:
        raise StoreError(f"{path}, the sums of the last checkpoint, cannot be read: {error}. Collect again.") from error
    if {site: (s.dtype, tuple(s.shape)) for site, s in sums.items()} != {
        site: (torch.float64, (2, width)) for site, width in widths.items()
    }:
        raise StoreError(f"{path} does not hold the sums of the sites {', '.join(widths)}. Collect again.")
    return {site: sums[site] for site in widths}


def write_statistics(folder: Path, sums: Mapping[str, Tensor], rows: int) -> tuple[dict[str, SiteInfo], str]:
    """Each site's width and scale, and the SHA-256 of the file written. StoreError: a site is zero everywhere."""
    tensors, sites = {}, {}
    for site, (total, squares) in sums.items():
        tensors[f"{site}.mean"] = total / rows
        tensors[f"{site}.second_moment"] = squares / rows
        scale = math.sqrt(tensors[f"{site}.second_moment"].sum().item())
        if scale == 0:
            raise StoreError(f"All {rows:,} rows of {site} are zero, so there is nothing to scale by. Leave it out.")
        sites[site] = SiteInfo(width=len(total), scale=scale)
    write_tensors(folder / FILE, tensors)
    return sites, hashlib.sha256((folder / FILE).read_bytes()).hexdigest()


def read_statistics(folder: Path, manifest: Manifest) -> dict[str, tuple[Tensor, Tensor]]:
    """Site -> mean and second moment [D], float64. StoreError: the file is damaged or of another store."""
    path = folder / FILE
    try:
        data = path.read_bytes()
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error}. The store is damaged; copy or collect it again.") from error
    return statistics_of(data, str(path), manifest)


def statistics_of(data: bytes, path: str, manifest: Manifest) -> dict[str, tuple[Tensor, Tensor]]:
    """As `read_statistics`, from the file's bytes; `path` is what a message calls it."""
    try:
        found = load(data)
    except SafetensorError as error:
        raise StoreError(f"{path} cannot be read: {error}. The store is damaged; copy or collect it again.") from error
    names = {
        f"{site}.{kind}": info.width for site, info in manifest.sites.items() for kind in ("mean", "second_moment")
    }
    if {name: (t.dtype, tuple(t.shape)) for name, t in found.items()} != {
        n: (torch.float64, (d,)) for n, d in names.items()
    }:
        raise StoreError(f"{path} does not hold mean and second moment of the sites in manifest.json. Collect again.")
    for site, info in manifest.sites.items():
        scale = math.sqrt(found[f"{site}.second_moment"].sum().item())
        if not math.isclose(scale, info.scale, rel_tol=1e-9):
            raise StoreError(f"{path} gives {site} the scale {scale}; manifest.json says {info.scale}. Collect again.")
    if manifest.statistics_sha256 not in (None, hashlib.sha256(data).hexdigest()):
        raise StoreError(f"{path} is not the file that manifest.json names by its SHA-256. Copy the store again.")
    return {site: (found[f"{site}.mean"], found[f"{site}.second_moment"]) for site in manifest.sites}
