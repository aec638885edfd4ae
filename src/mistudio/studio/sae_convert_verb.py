"""`mistudio sae convert`: an SAE from any format that is read into one that is written."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import RenderableType

from mistudio.errors import ConfigError
from mistudio.hub.formats import load_any, save_as, sniff


@dataclass(frozen=True, kw_only=True)
class Config:
    """From where, to where, and into which format."""

    source: Annotated[Path, tyro.conf.Positional]
    """A file or folder in any format; which one is told from its content."""
    target: Annotated[Path, tyro.conf.Positional]
    """The file (gemma_scope: params.npz) or folder (native, saelens) to write; must not exist."""
    to: Literal["native", "gemma_scope", "saelens"] = "native"
    """The format to write."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """What was converted."""

    source: str
    """What was read."""
    source_format: str
    """Its format."""
    target: str
    """What was written."""
    target_format: str
    """Its format."""
    features: int
    """Number of features."""


def run(config: Config) -> Result:
    """Converts. ConfigError: the target exists."""
    if config.target.exists():
        raise ConfigError(f"{config.target} exists; choose another target.")
    sae = load_any(config.source)
    save_as(sae, config.target, config.to)
    return Result(
        source=str(config.source),
        source_format=sniff(config.source),
        target=str(config.target),
        target_format=config.to,
        features=sae.config.d_sae,
    )


def show(result: Result) -> RenderableType:
    """One line."""
    made = f"{result.target} ({result.target_format})"
    return f"{result.source} ({result.source_format}) → {made}, {result.features:,} features"
