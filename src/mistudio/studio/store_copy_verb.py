"""`mistudio store copy`: a store to a bucket or another disk, or from there to here."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import RenderableType

from mistudio.store import Store, copy_store
from mistudio.store.transfer import Copied


@dataclass(frozen=True, kw_only=True)
class Config:
    """Which store, and where to."""

    store: Annotated[Path, tyro.conf.Positional]
    """Its folder or URL (s3://BUCKET/PATH, gs://, hf://, http://)."""
    to: Annotated[Path, tyro.conf.Positional]
    """Folder or URL of the copy; new or empty, or with an unfinished copy of this store, which is gone on with."""


def run(config: Config) -> Copied:
    """Copies shard by shard, each checked before it is sent; the manifest last."""
    return copy_store(Store.open(config.store), config.to)


def show(result: Copied) -> RenderableType:
    """What was sent, and the command that checks it there."""
    there = f"; {result.there:,} were there" if result.there else ""
    return (
        f"{result.place}: {result.sent:,} shards sent, {result.bytes / 1e9:,.2f} GB{there}\n"
        f"Next: mistudio store verify {result.place}"
    )
