"""`mistudio store split`: a part of the documents into a store of their own, the rest into another."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import RenderableType

from mistudio.store import Store, split, summary
from mistudio.store.upkeep import Summary


@dataclass(frozen=True, kw_only=True)
class Config:
    """Which store, what part of it, and where to."""

    store: Annotated[Path, tyro.conf.Positional]
    """Folder of the store, which is only read."""
    out: Path
    """Folder of the store with the rest; new or empty, unless --resume."""
    held_out: Path
    """Folder of the store with the chosen documents; new or empty, unless --resume."""
    fraction: float = 0.1
    """Fraction of the documents that is chosen; each goes to one side with all its rows."""
    seed: int = 0
    """Seed of the choice."""
    resume: bool = False
    """Go on with an interrupted split."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """The two stores."""

    rest: Summary
    """Without the chosen documents."""
    held_out: Summary
    """With them."""


def run(config: Config) -> Result:
    """Reads the store twice, once for each part."""
    store = Store.open(config.store)
    split(store, config.out, config.held_out, fraction=config.fraction, seed=config.seed, resume=config.resume)
    return Result(rest=summary(config.out), held_out=summary(config.held_out))


def show(result: Result) -> RenderableType:
    """What there is now."""
    return "\n".join(f"{part.path}: {part.rows:,} rows" for part in (result.rest, result.held_out))
