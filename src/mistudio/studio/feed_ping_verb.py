"""`mistudio feed ping`: whether feed servers answer, what they serve and how busy they are."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Group, RenderableType
from rich.table import Table

from mistudio.errors import ConfigError
from mistudio.store.connection import Patience
from mistudio.store.served import Load, ServedStore


@dataclass(frozen=True, kw_only=True)
class Config:
    """Which servers."""

    servers: Annotated[str, tyro.conf.Positional]
    """tcp://HOST:PORT, several with commas between."""
    key: Path | None = None
    """The trainers.key of the servers' pair."""
    wait_s: float = 10.0
    """Longest wait for an answer, seconds."""

    def __post_init__(self) -> None:
        if not 0 < self.wait_s < math.inf:
            raise ConfigError(f"wait_s = {self.wait_s}, but it must be a number of seconds above 0.")


@dataclass(frozen=True, kw_only=True)
class Result:
    """What the servers say."""

    model: str
    """Language model whose rows they have."""
    rows: int
    """Rows a site, of all servers."""
    sites: list[str]
    """Sites."""
    servers: list[Load]
    """Each server."""


def run(config: Config) -> Result:
    """Asks every server. StoreError: one does not answer, or they have not one store between them."""
    patience = Patience(ask_again_s=min(1.0, config.wait_s), give_up_s=config.wait_s)
    store = ServedStore.connect(config.servers, config.key, patience)
    return Result(model=store.manifest.model, rows=store.rows, sites=store.sites, servers=store.load())


def show(result: Result) -> RenderableType:
    """A line for the store and one for each server."""
    table = Table("server", "buckets", "trainers", "waiting", "sent GB", "answer ms", box=None, pad_edge=False)
    for load in result.servers:
        table.add_row(
            load.address,
            f"{load.first_bucket}-{load.end_bucket - 1}",
            f"{load.trainers}",
            f"{load.waiting}",
            f"{load.bytes / 1e9:,.2f}",
            f"{1000 * load.answer_s:.1f}",
        )
    return Group(f"{result.rows:,} rows a site of {result.model}: {', '.join(result.sites)}", table)
