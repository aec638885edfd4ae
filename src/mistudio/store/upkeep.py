"""Looking after stores: which there are, whether they are sound, and taking one away."""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mistudio.errors import StoreError
from mistudio.progress import progress_bar
from mistudio.store.folder import lock
from mistudio.store.manifest import FORMAT, Plan, read_manifest, read_progress
from mistudio.store.mirror import COPYING, files_at
from mistudio.store.remote import Remote, folder_of, url_of
from mistudio.store.shard import bucket_shards
from mistudio.store.statistics import FILE, statistics_of


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


def stores_in(place: str | Path) -> Iterator[Summary]:
    """Every store in a folder, or at a URL, or below it, by path. StoreError: no such folder, or files cannot be
    listed."""
    if (url := url_of(place)) is not None:
        yield from _stores_at(Remote(url))
        return
    folder = folder_of(place)
    if not folder.is_dir():
        raise StoreError(f"There is no folder {folder}.")
    for below, folders, files in os.walk(folder):
        folders.sort()
        path = Path(below)
        name = next((name for name in ("manifest.json", "progress.json") if name in files), None)
        if name is not None and _is_ours((path / name).read_bytes()):
            folders.clear()
            yield summary(path)


def summary(place: str | Path) -> Summary:
    """What a folder or URL holds, finished or not; a manifest that cannot be read is told in `state`."""
    url, path = url_of(place), folder_of(place)
    try:
        if url is not None or (path / "manifest.json").is_file():
            manifest = files_at(place).manifest()
            return _summary(url or str(path), "finished", manifest.plan, manifest.rows)
        progress = read_progress(path)
        return _summary(str(path), "unfinished", progress.plan, progress.rows)
    except StoreError as error:
        shown = url or str(path)
        return Summary(path=shown, state=str(error), rows=0, expected_rows=0, model="", sites=(), dtype="", bytes=0)


def verify(place: str | Path) -> Verification:
    """Sizes, headers and checksums of all files of a finished store; reads every byte, from a URL too.

    StoreError: there is no finished store whose manifest can be read.
    """
    files = files_at(place)
    manifest = files.manifest()
    seen, total, problems = 1, 0, []
    with progress_bar("verify", manifest.rows * manifest.plan.row_bytes, "bytes") as bar:
        for bucket, rows in enumerate(manifest.bucket_sizes):
            for name, shard in bucket_shards(files.folder, bucket, manifest.plan.widths, manifest.dtype).items():
                seen, total = seen + 1, total + shard.total_bytes(rows)
                try:
                    files.verify(shard, rows, None if manifest.checksums is None else manifest.checksums[name][bucket])
                except StoreError as error:
                    problems.append(str(error))
                bar.advance(rows * shard.row_bytes)
    try:
        statistics_of(files.read(FILE), f"{files}/{FILE}", manifest)
    except StoreError as error:
        problems.append(str(error))
    return Verification(files=seen, bytes=total, checksums=manifest.checksums is not None, problems=tuple(problems))


def remove(path: Path) -> tuple[str, ...]:
    """Takes away the store at `path`, finished or not, and the folder where nothing else is in it.

    Returns the names of what is left because it is not the store's. The manifest goes first, so that a kill never
    leaves something that looks whole. StoreError: there is no store, another process writes to it, or it is at a URL.
    """
    if (url := url_of(path)) is not None:
        raise StoreError(f"{url} is not removed by mistudio. {Remote(url).how_to_remove()}")
    names = [name for name in ("manifest.json", "progress.json") if (path / name).is_file()]
    if not any(_is_ours((path / name).read_bytes()) for name in names):
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


def _stores_at(remote: Remote) -> Iterator[Summary]:
    names = ("manifest.json", COPYING)
    found = sorted({name.rpartition("/")[0] for name in remote.sizes() if name.rpartition("/")[2] in names})
    for folder in found:
        manifest = f"{folder}/manifest.json".lstrip("/")
        try:
            ours = _is_ours(remote.read(manifest))
        except FileNotFoundError:
            ours = True  # an unfinished copy
        if ours:
            yield summary(f"{remote.url}/{folder}".rstrip("/"))


def _summary(path: str, state: str, plan: Plan, rows: int) -> Summary:
    return Summary(
        path=path,
        state=state,
        rows=rows,
        expected_rows=plan.expected_rows,
        model=plan.model,
        sites=tuple(plan.widths),
        dtype=plan.row_dtype,
        bytes=rows * plan.row_bytes,
    )


def _is_ours(data: bytes) -> bool:
    """Whether the file says it is a store's; other programs have manifests too."""
    try:
        plain = json.loads(data)
    except ValueError:
        return False
    return isinstance(plain, dict) and plain.get("format") == FORMAT
