"""The formats in which SAEs lie on disk, a file each; which one a path is in is told from its content.

`load_any` reads any of them, `save_as` writes those that have a writer. A format is added by a module with `matches`
and `load` (and `save`) and a row in `FORMATS`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from mistudio.errors import SAEError
from mistudio.hub.formats import dictionary_learning, gemma_scope, gemma_scope_2, native, saelens, sparsify
from mistudio.hub.formats.reading import describe
from mistudio.sae import SAE


@dataclass(frozen=True, kw_only=True)
class Format:
    """One way to write an SAE down."""

    description: str
    """What lies where, in a few words."""
    matches: Callable[[Path], bool]
    """Whether a path's content looks like it. Never raises, and reads no weights."""
    load: Callable[[Path, torch.dtype], SAE]
    """The SAE at a path, its matrices in a dtype. SAEError: anything that is wrong."""
    save: Callable[[SAE, Path], None] | None = None
    """Writes an SAE to a path; None where mistudio does not write the format."""


FORMATS: dict[str, Format] = {
    "native": Format(
        description="mistudio's folder: sae.json and sae.safetensors",
        matches=native.matches,
        load=native.load,
        save=native.save,
    ),
    "gemma_scope": Format(
        description="Gemma Scope's params.npz",
        matches=gemma_scope.matches,
        load=gemma_scope.load,
        save=gemma_scope.save,
    ),
    "gemma_scope_2": Format(
        description="Gemma Scope 2's params.safetensors, with or without config.json",
        matches=gemma_scope_2.matches,
        load=gemma_scope_2.load,
    ),
    "saelens": Format(
        description="SAELens's folder: cfg.json and sae_weights.safetensors",
        matches=saelens.matches,
        load=saelens.load,
        save=saelens.save,
    ),
    "dictionary_learning": Format(
        description="dictionary_learning's ae.pt, with its config.json",
        matches=dictionary_learning.matches,
        load=dictionary_learning.load,
    ),
    "sparsify": Format(
        description="sparsify's folder: cfg.json and sae.safetensors",
        matches=sparsify.matches,
        load=sparsify.load,
    ),
}
"""Every format by name."""


def sniff(path: str | Path) -> str:
    """The name of the format that a file or folder is in, by its content. SAEError: none fits, or several do."""
    path = Path(path)
    found = [name for name, format in FORMATS.items() if format.matches(path)]
    if len(found) > 1:
        raise SAEError(f"{path} holds SAEs in several formats: {', '.join(found)}. Give one of the files.")
    if not found:
        known = "; ".join(format.description for format in FORMATS.values())
        raise SAEError(f"There is no SAE at {path}, which is {describe(path)}. Formats that are read: {known}.")
    return found[0]


def load_any(path: str | Path, dtype: torch.dtype = torch.float32) -> SAE:
    """The SAE at a path, whatever its format: matrices in `dtype`, vectors and thresholds at least in float32.

    SAEError: one sentence on what is wrong.
    """
    return FORMATS[sniff(path)].load(Path(path), dtype)


def save_as(sae: SAE, path: str | Path, format: str) -> None:
    """Writes `sae` to `path` in the format of that name. SAEError: it cannot be written in it, or the SAE is in
    training form."""
    writers = {name: f.save for name, f in FORMATS.items() if f.save is not None}
    if format not in writers:
        raise SAEError(f"SAEs are not written in {format!r}; the formats are {', '.join(writers)}.")
    writers[format](sae, Path(path))
