"""`mistudio sae index`: what the index of released SAEs holds, and how the hub differs from it."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table

from mistudio.errors import ConfigError
from mistudio.files import write_bytes
from mistudio.hub import index
from mistudio.hub.refresh import refresh
from mistudio.studio.workspace import refuse_unwritable


@dataclass(frozen=True, kw_only=True)
class Config:
    """Show the index, or compare it with the hub's file listing."""

    refresh: bool = False
    """Ask the hub what there is now, and print what changed."""
    out: Path | None = None
    """With --refresh: write the new index here; the environment variable MISTUDIO_HUB_INDEX makes it the one in use."""

    def __post_init__(self) -> None:
        if self.out is not None and not self.refresh:
            raise ConfigError("--out writes a refreshed index; add --refresh.")


@dataclass(frozen=True, kw_only=True)
class Result:
    """What the index holds."""

    entries: int
    """Released SAEs and transcoders."""
    by_repository: dict[str, int]
    """Repository → how many."""
    added: list[str] | None
    """With --refresh: on the hub, and not in the index before."""
    removed: list[str] | None
    """With --refresh: in the index before, and no longer on the hub."""
    wrong_size: list[str] | None
    """With --refresh: files on the hub that cannot be whole."""


def run(config: Config) -> Result:
    """Counts; with `refresh` compares, and writes where `out` says."""
    if not config.refresh:
        known = index.entries()
        return Result(entries=len(known), by_repository=_counts(known), added=None, removed=None, wrong_size=None)
    refuse_unwritable(config.out)
    fresh = refresh()
    if config.out is not None:
        write_bytes(config.out, index.encode(fresh.entries))
    return Result(
        entries=len(fresh.entries),
        by_repository=_counts(fresh.entries),
        added=[entry.hf_path for entry in fresh.added],
        removed=[entry.hf_path for entry in fresh.removed],
        wrong_size=[f"{entry.hf_path}: {size:,} bytes" for entry, size in fresh.wrong_size],
    )


def _counts(entries: tuple[index.Entry, ...]) -> dict[str, int]:
    return dict(Counter(entry.repo_id for entry in entries))


def show(result: Result) -> RenderableType:
    """A table by repository, and what changed."""
    table = Table(title=f"{result.entries:,} released SAEs and transcoders")
    table.add_column("repository")
    table.add_column("files", justify="right")
    for repo_id, count in result.by_repository.items():
        table.add_row(repo_id, f"{count:,}")
    parts: list[RenderableType] = [table]
    changes = {"new": result.added, "gone": result.removed, "of a wrong size": result.wrong_size}
    for word, names in changes.items():
        if names is not None:
            parts.append(f"{len(names):,} {word}" + "".join(f"\n  {name}" for name in names))
    return Group(*parts)
