"""Looking after stores on disk: which there are, whether they are sound, and taking one away."""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mistudio.errors import StoreError
from mistudio.progress import progress_bar
from mistudio.store.folder import lock
from mistudio.store.manifest import FORMAT, Manifest, Plan, read_manifest, read_progress
from mistudio.store.shard import bucket_shards
from mistudio.store.statistics import FILE, read_statistics


@dataclass(frozen=True, kw_only=True)
class Summary:
    """One store, as a line of a list."""

    path: str
    """Its folder."""
    state: str
    """finished, unfinished, or what is wrong with it."""
    rows: int
    """Rows a site that are there."""
    expected_rows: int
    """Rows asked for."""
    model: str
    """Name of the language model."""
    sites: tuple[str, ...]
    """Its sites."""
    dtype: str
    """Number type of the rows."""
    bytes: int
    """Bytes of its rows."""


@dataclass(frozen=True, kw_only=True)
class Verification:
    """What `verify` found."""

    files: int
    """Files looked at."""
    bytes: int
    """Bytes read."""
    checksums: bool
    """Whether the store has any; without (version 1), only sizes, headers and the scales were compared."""
    problems: tuple[str, ...]
    """One sentence for each file that is not as it was written."""


def stores_in(folder: Path) -> Iterator[Summary]:
    """Every store in `folder` or below it, by path. StoreError: there is no such folder."""
    if not folder.is_dir():
        raise StoreError(f"There is no folder {folder}.")
    for place, folders, files in os.walk(folder):
        folders.sort()
        path = Path(place)
        name = next((name for name in ("manifest.json", "progress.json") if name in files), None)
        if name is not None and _is_ours(path / name):
            folders.clear()
            yield summary(path)


def summary(path: Path) -> Summary:
    """What `path` holds, finished or not; a manifest that cannot be read is told in `state`."""
    try:
        if (path / "manifest.json").is_file():
            manifest = read_manifest(path)
            return _summary(path, "finished", manifest.plan, manifest.rows)
        progress = read_progress(path)
        return _summary(path, "unfinished", progress.plan, progress.rows)
    except StoreError as error:
        return Summary(path=str(path), state=str(error), rows=0, expected_rows=0, model="", sites=(), dtype="", bytes=0)


def verify(path: Path) -> Verification:
    """Sizes, headers and checksums of all files of a finished store; reads every byte.

    StoreError: there is no finished store whose manifest can be read.
    """
    manifest = read_manifest(path)
    files, total, problems = 1, 0, []
    with progress_bar("verify", manifest.rows * manifest.plan.row_bytes, "bytes") as bar:
        for bucket, size in enumerate(manifest.bucket_sizes):
            for name, shard in bucket_shards(path, bucket, manifest.plan.widths, manifest.dtype).items():
                files, total = files + 1, total + shard.total_bytes(size)
                try:
                    shard.map(size)
                    if manifest.checksums is not None:
                        shard.check_hash(size, manifest.checksums[name][bucket])
                except StoreError as error:
                    problems.append(str(error))
                bar.advance(size * shard.row_bytes)
    problems += _statistics_problem(path, manifest)
    return Verification(files=files, bytes=total, checksums=manifest.checksums is not None, problems=tuple(problems))


def remove(path: Path) -> tuple[str, ...]:
    """Takes away the store at `path`, finished or not, and the folder where nothing else is in it.

    Returns the names of what is left because it is not the store's. The manifest goes first, so that a kill never
    leaves something that looks whole. StoreError: there is no store, or another process writes to it.
    """
    names = [name for name in ("manifest.json", "progress.json") if (path / name).is_file()]
    if not any(_is_ours(path / name) for name in names):
        raise StoreError(f"There is no activation store at {path}, so nothing was removed.")
    sites = _plan_of(path).widths
    with lock(path):
        for name in names:
            (path / name).unlink()
        for name in (*sites, "where"):
            for file in (path / name).glob("[0-9]*.safetensors"):
                file.unlink()
            if (path / name).is_dir() and not any((path / name).iterdir()):
                (path / name).rmdir()
        for pattern in (FILE, "statistics-*.safetensors", ".*.tmp"):
            for file in path.glob(pattern):
                file.unlink()
        (path / ".lock").unlink()
    left = tuple(sorted(entry.name for entry in path.iterdir()))
    if not left:
        path.rmdir()
    return left


def _plan_of(path: Path) -> Plan:
    return (read_manifest(path) if (path / "manifest.json").is_file() else read_progress(path)).plan


def _statistics_problem(path: Path, manifest: Manifest) -> list[str]:
    try:
        read_statistics(path, manifest)
    except StoreError as error:
        return [str(error)]
    return []


def _summary(path: Path, state: str, plan: Plan, rows: int) -> Summary:
    return Summary(
        path=str(path),
        state=state,
        rows=rows,
        expected_rows=plan.expected_rows,
        model=plan.model,
        sites=tuple(plan.widths),
        dtype=plan.row_dtype,
        bytes=rows * plan.row_bytes,
    )


def _is_ours(path: Path) -> bool:
    """Whether the file says it is a store's; other programs have manifests too."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError):
        return False
    return isinstance(data, dict) and data.get("format") == FORMAT
