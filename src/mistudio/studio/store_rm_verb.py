"""`mistudio store rm`: an activation store taken away, and nothing else."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import RenderableType

from mistudio.errors import ConfigError
from mistudio.store import remove, summary
from mistudio.store.upkeep import Summary


@dataclass(frozen=True, kw_only=True)
class Config:
    """Which store."""

    store: Annotated[Path, tyro.conf.Positional]
    """Its folder; files in it that are not the store's are left alone."""
    yes: bool = False
    """Do it; without this the store is only named."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """What was removed."""

    removed: Summary
    """The store that was there."""
    left: tuple[str, ...]
    """Names in the folder that are not the store's."""


def run(config: Config) -> Result:
    """Removes the store. ConfigError: --yes is missing."""
    found = [name for name in ("manifest.json", "progress.json") if (config.store / name).is_file()]
    if found and not config.yes:
        store = summary(config.store)
        raise ConfigError(
            f"This removes the store {store.path} ({store.state}, {store.rows:,} rows, {store.bytes / 1e9:,.2f} GB) "
            f"for good. Add --yes to do it."
        )
    removed = summary(config.store) if found else None
    left = remove(config.store)
    assert removed is not None, "remove refuses a folder without a store"
    return Result(removed=removed, left=left)


def show(result: Result) -> RenderableType:
    """What is gone, and what was left."""
    left = f"; left there: {', '.join(result.left)}" if result.left else ""
    return f"Removed {result.removed.path} ({result.removed.rows:,} rows, {result.removed.bytes / 1e9:,.2f} GB){left}"
