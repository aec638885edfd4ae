"""`mistudio store verify`: is every file of a store what was written?"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import RenderableType

from mistudio.store import verify
from mistudio.store.upkeep import Verification


@dataclass(frozen=True, kw_only=True)
class Config:
    """Which store."""

    store: Annotated[Path, tyro.conf.Positional]
    """Its folder, or its URL: then every byte is read from there."""


def run(config: Config) -> Verification:
    """Compares sizes, headers and checksums of every file with the manifest; goes on after a bad one."""
    return verify(config.store)


def show(result: Verification) -> RenderableType:
    """The verdict, and a line for every bad file."""
    seen = f"{result.files:,} files, {result.bytes / 1e9:,.2f} GB"
    if result.problems:
        return "\n".join([f"{len(result.problems)} of {seen} are not as they were written:", *result.problems])
    how = "sizes, headers and checksums" if result.checksums else "sizes and headers; version 1 has no checksums"
    return f"Sound: {seen} ({how})."


def failed(result: Verification) -> bool:
    """Whether anything is wrong."""
    return bool(result.problems)
