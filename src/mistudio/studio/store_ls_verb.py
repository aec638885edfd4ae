"""`mistudio store ls`: the activation stores below a folder."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import RenderableType
from rich.table import Table

from mistudio.store import stores_in
from mistudio.store.upkeep import Summary


@dataclass(frozen=True, kw_only=True)
class Config:
    """Where to look."""

    folder: Annotated[Path, tyro.conf.Positional] = Path()
    """Searched with all folders in it; or the URL of a bucket, or of a part of it."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """What was found."""

    stores: tuple[Summary, ...]
    """One a store, by path."""


def run(config: Config) -> Result:
    """Looks for manifests; no rows are read."""
    return Result(stores=tuple(stores_in(config.folder)))


def show(result: Result) -> RenderableType:
    """A line each."""
    if not result.stores:
        return "No activation store here. Make one with: mistudio collect --sites ... --tokens ... --out ..."
    table = Table("store", "rows", "GB", "type", "model", "sites", "state", box=None, pad_edge=False)
    for store in result.stores:
        rows = f"{store.rows:,}" if store.state != "unfinished" else f"{store.rows:,} of {store.expected_rows:,}"
        size = f"{store.bytes / 1e9:,.2f}"
        table.add_row(store.path, rows, size, store.dtype, store.model, ", ".join(store.sites), store.state)
    return table
