"""`mistudio store merge`: one store with the rows of several."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import RenderableType

from mistudio.store import Store, merge, summary
from mistudio.store.upkeep import Summary


@dataclass(frozen=True, kw_only=True)
class Config:
    """Which stores, and where to."""

    stores: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Folders of the stores, which are only read; of one model, with the same sites and number type."""
    out: Path
    """Folder of the new store; new or empty, unless --resume."""
    bucket_rows: int | None = None
    """Rows in one shuffle bucket; None: as in the first store."""
    seed: int = 0
    """Seed of the scattering of rows to buckets."""
    resume: bool = False
    """Go on with an interrupted merge."""


def run(config: Config) -> Summary:
    """Scatters all rows anew, so that the shuffle is over all of them."""
    stores = [Store.open(path) for path in config.stores]
    merge(stores, config.out, seed=config.seed, bucket_rows=config.bucket_rows, resume=config.resume)
    return summary(config.out)


def show(result: Summary) -> RenderableType:
    """What there is now."""
    return f"{result.path}: {result.rows:,} rows, {result.dtype}, {result.bytes / 1e9:,.2f} GB"
