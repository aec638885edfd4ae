"""`mistudio feed key`: a pair of keys for feed servers that other machines can reach."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import RenderableType

from mistudio.store.curve import make_keys


@dataclass(frozen=True, kw_only=True)
class Config:
    """Where to."""

    folder: Annotated[Path, tyro.conf.Positional]
    """Folder for server.key and trainers.key."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """The files."""

    server: str
    """The server's: it stays where `feed serve` runs."""
    trainers: str
    """The trainers': copied to every machine that trains."""


def run(config: Config) -> Result:
    """Writes both files, readable by their owner only. StoreError: there are some already."""
    server, trainers = make_keys(config.folder)
    return Result(server=str(server), trainers=str(trainers))


def show(result: Result) -> RenderableType:
    """What to do with them."""
    return (
        f"On the server: mistudio feed serve STORE --bind tcp://0.0.0.0:5555 --key {result.server}\n"
        f"Copy {result.trainers} to the machines that train: mistudio train --store tcp://HOST:5555 --key trainers.key"
    )
