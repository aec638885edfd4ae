"""`mistudio sae verify`: is this file a whole, sound Gemma Scope SAE, and the one it is taken for?"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import RenderableType

from mistudio.hub.names import resolve
from mistudio.hub.verify import Verified, verify_file


@dataclass(frozen=True, kw_only=True)
class Config:
    """Which file, and what it should be."""

    path: Annotated[Path, tyro.conf.Positional]
    """A params.npz or params.safetensors."""
    name: str | None = None
    """The SAE it should be, by any of its names: sizes and kind are compared too."""


def run(config: Config) -> Verified:
    """Checks zip CRCs, array names, shapes, dtypes, finiteness, unit decoder rows, positive thresholds."""
    return verify_file(config.path, None if config.name is None else resolve(config.name))


def show(result: Verified) -> RenderableType:
    """What it holds."""
    kind = "affine transcoder" if result.affine else f"{result.d_in:,} → {result.d_out:,}"
    return (
        f"{result.path} is sound: {result.kind}, {kind}, {result.d_sae:,} features, {result.bytes:,} bytes\n"
        f"largest distance of a decoder row's norm from 1: {result.row_norm_error:.2g}\nsha256 {result.sha256}"
    )
