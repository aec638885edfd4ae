"""`mistudio store convert`: the same rows in another number type, or of fewer sites."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import RenderableType

from mistudio.store import Store, convert, summary
from mistudio.store.dtypes import RowDtype
from mistudio.store.upkeep import Summary


@dataclass(frozen=True, kw_only=True)
class Config:
    """Which store, into what, and where to."""

    store: Annotated[Path, tyro.conf.Positional]
    """Folder of the store, which is only read."""
    out: Path
    """Folder of the new store; new or empty, unless --resume."""
    row_dtype: RowDtype | None = None
    """Number type of the rows; None: as in the store."""
    sites: tuple[str, ...] | None = None
    """Sites to keep; None: all."""
    resume: bool = False
    """Go on with an interrupted conversion."""


def run(config: Config) -> Summary:
    """Converts bucket by bucket; feeds of the new store have the order of the old one's."""
    store = Store.open(config.store)
    convert(store, config.out, dtype=config.row_dtype, sites=config.sites, resume=config.resume)
    return summary(config.out)


def show(result: Summary) -> RenderableType:
    """What there is now."""
    return f"{result.path}: {result.rows:,} rows, {result.dtype}, {result.bytes / 1e9:,.2f} GB"
