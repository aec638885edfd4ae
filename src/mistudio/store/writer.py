"""Writes a store so that a kill at any moment loses only what came after the last checkpoint.

`write` scatters rows to buckets and appends them to one file a bucket and site. `checkpoint` brings the files to the
disk and then replaces progress.json, which holds the sizes of all files, the float64 sums and the caller's cursor.
`resume` cuts every file back to these sizes. Since nothing depends on time, host or the places of the checkpoints, a
store that was interrupted equals one that was not, byte for byte, as long as the caller writes the same rows in the
same portions (the portions enter the float64 sums, not the rows).
"""

import errno
import fcntl
import json
import logging
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from jaxtyping import Float, Float64, Int
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mistudio import __version__
from mistudio.errors import StoreError
from mistudio.files import write_tensors
from mistudio.store.manifest import (
    FORMAT,
    VERSION,
    Manifest,
    Plan,
    Progress,
    SiteInfo,
    read_manifest,
    read_progress,
    refuse_difference,
    write_manifest,
    write_progress,
)
from mistudio.store.order import buckets_of_rows
from mistudio.store.reader import Store
from mistudio.store.shard import Shard, site_shard, where_shard

log = logging.getLogger(__name__)


class StoreWriter:
    """Appends rows to a store; made by `create` or `resume`. One process at a time may write to a store."""

    def __init__(self, path: Path, plan: Plan, lock: IO[str], *, cursor: int, sizes: tuple[int, ...], complete: bool):
        self.path, self.plan = path, plan
        self.cursor = cursor
        """Packed rows of tokens done at the last checkpoint, as the caller counts them."""
        self.sizes = np.array(sizes, dtype=np.int64)  # [K] rows of each bucket
        self._sums = {site: torch.zeros(2, width, dtype=torch.float64) for site, width in plan.widths.items()}
        self._touched: set[int] = set()  # buckets written to since the last checkpoint
        self.complete = complete
        """The store is finished; there is nothing to write."""
        self._lock = lock

    @classmethod
    def create(
        cls,
        path: str | Path,
        *,
        widths: dict[str, int],
        expected_rows: int,
        bucket_rows: int,
        seed: int,
        model: str,
        context: int,
        source: dict[str, Any],
    ) -> "StoreWriter":
        """A writer for a new store in the folder `path`, which must be absent or empty.

        widths: site -> width D. expected_rows / bucket_rows gives the number of buckets. source: plain data about
        where the rows come from, kept in the manifest and compared on resume. StoreError: the folder holds something,
        or the disk has too little room.
        """
        plan = _plan(widths, expected_rows, bucket_rows, seed, model, context, source)
        return cls._start(Path(path), plan)

    @classmethod
    def resume(
        cls,
        path: str | Path,
        *,
        widths: dict[str, int],
        expected_rows: int,
        bucket_rows: int,
        seed: int,
        model: str,
        context: int,
        source: dict[str, Any],
    ) -> "StoreWriter":
        """A writer that goes on from the last checkpoint; a new one where nothing was started; one whose `finish`
        returns the store where all is done.

        StoreError: the store was started with other settings (naming the first), is damaged, or another process
        writes to it.
        """
        plan = _plan(widths, expected_rows, bucket_rows, seed, model, context, source)
        path = Path(path)
        if not _entries(path):
            return cls._start(path, plan)
        if not any((path / name).is_file() for name in ("manifest.json", "progress.json")):
            raise StoreError(f"{path} holds files, but no collection that could go on. Choose another folder.")
        lock = _lock(path)
        if (path / "manifest.json").is_file():
            manifest = read_manifest(path)
            refuse_difference(path, manifest.plan, plan)
            return cls(path, plan, lock, cursor=manifest.token_rows, sizes=manifest.bucket_sizes, complete=True)
        progress = read_progress(path)
        refuse_difference(path, progress.plan, plan)
        refuse_small_disk(path, plan.row_bytes * max(plan.expected_rows - progress.rows, 0))
        writer = cls(path, plan, lock, cursor=progress.cursor, sizes=progress.bucket_sizes, complete=False)
        writer._sums = _read_sums(path / progress.statistics, plan.widths)
        writer._cut_back()
        return writer

    @classmethod
    def _start(cls, path: Path, plan: Plan) -> "StoreWriter":
        refuse_occupied(path)
        refuse_small_disk(path, plan.row_bytes * plan.expected_rows)
        path.mkdir(parents=True, exist_ok=True)
        writer = cls(path, plan, _lock(path), cursor=0, sizes=(0,) * plan.n_buckets, complete=False)
        writer.checkpoint(0)  # before anything else is there, so that a kill from here on can be resumed
        writer._cut_back()
        return writer

    @property
    def rows(self) -> int:
        """Rows written so far, those after the last checkpoint included."""
        return int(self.sizes.sum())

    def write(self, rows: Mapping[str, Float[Tensor, "B _"]], where: Int[Tensor, "B 3"]) -> None:
        """Appends B rows of every site, stored as float32; `where` says for each: token id, document, offset in the
        document.

        StoreError: a NaN or an infinity (naming site, row and shard; nothing of this call is written), or a full disk.
        """
        assert not self.complete, "this store is finished"
        assert rows.keys() == self.plan.widths.keys(), f"{list(rows)} are not the sites {list(self.plan.widths)}"
        buckets = buckets_of_rows(self.plan.seed, self.rows, len(where), self.plan.n_buckets)
        cpu = {site: values.detach().to("cpu", torch.float32) for site, values in rows.items()}
        sums = {site: _column_sums(values) for site, values in cpu.items()}
        for site, values in cpu.items():
            assert values.shape == (len(where), self.plan.widths[site]), f"{site}: {tuple(values.shape)}"
            if not torch.isfinite(sums[site]).all():
                raise self._non_finite(site, values, where, buckets)
        self._append(cpu, where.cpu(), buckets)
        for site in self._sums:
            self._sums[site] += sums[site]

    def checkpoint(self, cursor: int) -> None:
        """A kill from now on loses nothing that is written: files on the disk first, then progress.json in one step."""
        for bucket in sorted(self._touched):
            for shard in self._shards(bucket).values():
                shard.sync()
        self._touched.clear()
        self.cursor = cursor
        statistics = f"statistics-{self.rows}.safetensors"
        write_tensors(self.path / statistics, self._sums)
        progress = Progress(
            format=FORMAT,
            version=VERSION,
            plan=self.plan,
            cursor=cursor,
            bucket_sizes=tuple(self.sizes.tolist()),
            statistics=statistics,
        )
        write_progress(self.path, progress)
        self._delete_leftovers(keep=statistics)

    def finish(self) -> Store:
        """The finished store: headers closed, statistics and, last of all, manifest.json written. StoreError: it has
        no rows, or all rows of a site are zero, so that there is no scale."""
        if not self.complete:
            if self.rows == 0:
                raise StoreError(f"No row was written to {self.path}, so there is nothing to finish.")
            for bucket, size in enumerate(self.sizes.tolist()):
                for shard in self._shards(bucket).values():
                    shard.close(size)
            self._write_results()
            self.complete = True
        (self.path / "progress.json").unlink(missing_ok=True)
        self._delete_leftovers(keep=None)
        self.close()
        (self.path / ".lock").unlink(missing_ok=True)
        return Store.open(self.path)

    def close(self) -> None:
        """Lets go of the folder, so that another writer may resume; what came after the last checkpoint is lost."""
        self._lock.close()

    def __enter__(self) -> "StoreWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _shards(self, bucket: int) -> dict[str, Shard]:
        """Site -> shard of one bucket, and "where" -> its where shard."""
        shards = {site: site_shard(self.path, site, bucket, width) for site, width in self.plan.widths.items()}
        return {**shards, "where": where_shard(self.path, bucket)}

    def _append(self, rows: Mapping[str, Tensor], where: Tensor, buckets: np.ndarray) -> None:
        """Each row goes to the end of its bucket; `sizes` grows only when all files have them."""
        tensors = {site: values.numpy() for site, values in rows.items()} | {"where": where.numpy()}
        order = np.argsort(buckets, kind="stable")
        counts = np.bincount(buckets, minlength=self.plan.n_buckets)
        starts = np.cumsum(counts) - counts
        for bucket in counts.nonzero()[0].tolist():
            chosen = order[starts[bucket] : starts[bucket] + counts[bucket]]
            for name, shard in self._shards(bucket).items():
                shard.write(int(self.sizes[bucket]), tensors[name][chosen])
            self._touched.add(bucket)
        self.sizes += counts

    def _cut_back(self) -> None:
        """Every shard has the rows of the last checkpoint and no more; missing empty ones are made."""
        for name in (*self.plan.widths, "where"):
            (self.path / name).mkdir(exist_ok=True)
        for bucket, size in enumerate(self.sizes.tolist()):
            for shard in self._shards(bucket).values():
                shard.truncate(size)
        for folder in (*(self.path / name for name in (*self.plan.widths, "where")), self.path):
            _sync_folder(folder)
        self._delete_leftovers(keep=f"statistics-{self.rows}.safetensors")

    def _delete_leftovers(self, keep: str | None) -> None:
        """Sums of earlier checkpoints and half-written temporary files."""
        for path in (*self.path.glob("statistics-*.safetensors"), *self.path.glob(".*.tmp")):
            if path.name != keep:
                path.unlink()

    def _write_results(self) -> None:
        tensors, sites = {}, {}
        for site, (total, squares) in self._sums.items():
            tensors[f"{site}.mean"] = total / self.rows
            tensors[f"{site}.second_moment"] = squares / self.rows
            scale = math.sqrt(tensors[f"{site}.second_moment"].sum().item())
            if scale == 0:
                raise StoreError(
                    f"All {self.rows:,} rows of {site} are zero, so there is nothing to scale by. Leave it out."
                )
            sites[site] = SiteInfo(width=self.plan.widths[site], scale=scale)
        write_tensors(self.path / "statistics.safetensors", tensors)
        manifest = Manifest(
            format=FORMAT,
            version=VERSION,
            mistudio_version=__version__,
            dtype="float32",
            model=self.plan.model,
            context=self.plan.context,
            seed=self.plan.seed,
            expected_rows=self.plan.expected_rows,
            bucket_rows=self.plan.bucket_rows,
            rows=self.rows,
            token_rows=self.cursor,
            bucket_sizes=tuple(self.sizes.tolist()),
            sites=sites,
            source=self.plan.source,
        )
        write_manifest(self.path, manifest)

    def _non_finite(self, site: str, values: Tensor, where: Tensor, buckets: np.ndarray) -> StoreError:
        bad = (~torch.isfinite(values)).sum(1)  # [B]
        row = int(bad.nonzero()[0])
        bucket = int(buckets[row])
        place = int(self.sizes[bucket] + (buckets[:row] == bucket).sum())
        _, document, offset = where[row].tolist()
        return StoreError(
            f"{site} has {int(bad[row])} NaN or infinite values in row {self.rows + row} (document {document}, token "
            f"{offset} of it), which would be row {place} of {self._shards(bucket)[site].path}. Load the model in a "
            f"number type with a larger range, such as --dtype float32, and collect into another folder."
        )


def refuse_occupied(path: Path) -> None:
    """Nothing. StoreError: the folder holds a store, finished or not, or something else."""
    if path.exists() and not path.is_dir():
        raise StoreError(f"{path} is a file; a store needs a folder. Choose another one.")
    found = _entries(path)
    if not found:
        return
    if "manifest.json" in found:
        raise StoreError(
            f"{path} already holds a finished store. Choose another folder, or add --resume to use this one."
        )
    if "progress.json" in found:
        raise StoreError(f"{path} holds an unfinished collection. Continue it with --resume, or choose another folder.")
    raise StoreError(f"{path} is not empty (it holds {found[0]}). Choose another folder.")


def _entries(path: Path) -> list[str]:
    """Names in the folder, without what a kill in the first moment of a collection leaves behind."""
    if not path.is_dir():
        return []
    names = (entry.name for entry in path.iterdir())
    return sorted(name for name in names if name != ".lock" and not (name.startswith(".") and name.endswith(".tmp")))


def _plan(
    widths: dict[str, int],
    expected_rows: int,
    bucket_rows: int,
    seed: int,
    model: str,
    context: int,
    source: dict[str, Any],
) -> Plan:
    return Plan(
        widths=widths,
        expected_rows=expected_rows,
        bucket_rows=bucket_rows,
        seed=seed,
        model=model,
        context=context,
        source=json.loads(json.dumps(source)),  # as it will be read back: tuples are lists
    )


def refuse_small_disk(path: Path, needed: int) -> None:
    """Nothing. StoreError: fewer than `needed` bytes are free where `path` is, or will be."""
    existing = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.is_dir())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise StoreError(
            f"The rows still to be collected need {needed / 1e9:,.1f} GB at {path}, where {free / 1e9:,.1f} GB "
            f"are free. Ask for fewer tokens or sites, or choose a folder on another disk."
        )


def _lock(path: Path) -> IO[str]:
    """An open file that holds the folder's lock until it is closed, or the process ends."""
    file = open(path / ".lock", "w")  # noqa: SIM115 (held open by the writer)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise StoreError(
            f"Another process is collecting into {path}. Wait for it, or choose another folder."
        ) from error
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
        log.warning("%s is on a file system without locks: see to it that no other process writes there.", path)
    return file


def _column_sums(values: Float[Tensor, "B D"]) -> Float64[Tensor, "2 D"]:
    """Sum and sum of squares over the rows, in float64; not finite exactly where a column is not."""
    sums = torch.zeros(2, values.shape[1], dtype=torch.float64)
    for part in values.split(64):  # a float64 copy that stays in the cache: ten times as fast as one go
        double = part.double()
        sums[0] += double.sum(0)
        sums[1] += double.square().sum(0)
    return sums


def _read_sums(path: Path, widths: dict[str, int]) -> dict[str, Tensor]:
    try:
        sums = load_file(path)
    except (SafetensorError, OSError) as error:
        raise StoreError(f"{path}, the sums of the last checkpoint, cannot be read: {error}. Collect again.") from error
    if {site: (s.dtype, tuple(s.shape)) for site, s in sums.items()} != {
        site: (torch.float64, (2, width)) for site, width in widths.items()
    }:
        raise StoreError(f"{path} does not hold the sums of the sites {', '.join(widths)}. Collect again.")
    return {site: sums[site] for site in widths}


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
