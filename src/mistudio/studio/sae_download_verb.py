"""`mistudio sae download`: released SAEs onto this machine, verified; several at once, and going on after failures."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import RenderableType
from rich.table import Table

from mistudio.errors import ConfigError
from mistudio.hub.download import Downloaded, Failure, download_many
from mistudio.hub.index import find


@dataclass(frozen=True, kw_only=True)
class Config:
    """Which ones, and where to."""

    names: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Names: Neuronpedia ids, Hugging Face paths, SAELens release:id pairs."""
    all_neuronpedia: bool = False
    """Every SAE that has dashboards on Neuronpedia, instead of names; narrow it with the filters below."""
    model: str | None = None
    """With --all-neuronpedia: only this language model."""
    site: str | None = None
    """With --all-neuronpedia: residual, mlp, attention or transcoder."""
    width: str | None = None
    """With --all-neuronpedia: only this width, such as 16k."""
    folder: Path | None = None
    """Where to; None: Hugging Face's cache."""
    revision: str | None = None
    """Branch, tag or commit; None: main. The commit is recorded either way."""
    jobs: int = 4
    """Files at once."""
    offline: bool = False
    """Use only what is on this machine."""
    force: bool = False
    """Download again what is here already."""

    def __post_init__(self) -> None:
        if bool(self.names) == self.all_neuronpedia:
            raise ConfigError("Give names, such as gemma-2-2b/20-gemmascope-res-16k, or --all-neuronpedia.")


@dataclass(frozen=True, kw_only=True)
class Row:
    """What became of one."""

    name: str
    """What was asked for."""
    path: str | None
    """The file; None where it failed."""
    bytes: int | None
    """Its size."""
    revision: str | None
    """The commit it is from."""
    sha256: str | None
    """Of the file."""
    error: str | None
    """Why it is not here."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """What became of each, in the order asked for."""

    files: list[Row]
    """One each."""


def run(config: Config) -> Result:
    """Downloads and verifies, going on after failures. ConfigError: the filters leave nothing to download."""
    wanted = list(config.names)
    if config.all_neuronpedia:
        known = find(model=config.model, site=config.site, width=config.width)
        wanted = [entry.hf_path for entry in known if entry.neuronpedia_id is not None]
        if not wanted:
            raise ConfigError("None of the released SAEs that these filters leave has dashboards on Neuronpedia.")
    outcomes = download_many(
        wanted,
        folder=config.folder,
        revision=config.revision,
        offline=config.offline,
        force=config.force,
        jobs=config.jobs,
    )
    return Result(files=[_row(name, outcome) for name, outcome in zip(wanted, outcomes, strict=True)])


def _row(name: str, outcome: Downloaded | Failure) -> Row:
    if isinstance(outcome, Failure):
        return Row(name=name, path=None, bytes=None, revision=None, sha256=None, error=str(outcome.error))
    return Row(
        name=name,
        path=str(outcome.path),
        bytes=outcome.bytes,
        revision=outcome.revision,
        sha256=outcome.sha256,
        error=None,
    )


def failed(result: Result) -> bool:
    """Whether any is missing: the exit code is then 1."""
    return any(file.error is not None for file in result.files)


def show(result: Result) -> RenderableType:
    """A table, failures with their reasons."""
    lost = sum(file.error is not None for file in result.files)
    table = Table(title=f"{len(result.files) - lost} of {len(result.files)} downloaded and verified")
    for name in ("name", "size", "commit", "file, or why not"):
        table.add_column(name, overflow="fold")
    for file in result.files:
        if file.error is not None:
            table.add_row(file.name, "", "", f"[red]{file.error}[/red]")
        else:
            table.add_row(file.name, f"{(file.bytes or 0) / 1e6:,.0f} MB", (file.revision or "")[:10], file.path or "")
    return table
