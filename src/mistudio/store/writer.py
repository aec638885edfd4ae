"""Writes a store so that a kill at any moment loses only what came after the last checkpoint.

`write` scatters rows to buckets and appends them to one file a bucket and site. `checkpoint` brings the files to the
disk and then replaces progress.json, which holds the sizes of all files, the float64 sums and the caller's cursor.
`resume` cuts every file back to these sizes. Since nothing depends on time, host or the places of the checkpoints, a
store that was interrupted equals one that was not, byte for byte, as long as the caller writes the same rows in the
same portions (the portions enter the float64 sums, not the rows).

Checksums grow with the files, so that no row is read again for them; a resume reads what is there once.
"""

import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, Final

import numpy as np
import torch
from jaxtyping import Float, Int, Int64
from torch import Tensor

from mistudio import __version__
from mistudio.errors import StoreError
from mistudio.files import write_tensors
from mistudio.store.checksum import new_hash, written
from mistudio.store.dtypes import RowDtype, encode, stored_values
from mistudio.store.extend import MAY_GROW, reopen
from mistudio.store.folder import entries, lock, refuse_occupied, refuse_small_disk, sync_folder, written_in
from mistudio.store.gather import default_threads
from mistudio.store.manifest import (
    FORMAT,
    VERSION,
    Manifest,
    Plan,
    Progress,
    read_manifest,
    read_progress,
    refuse_difference,
    write_manifest,
    write_progress,
)
from mistudio.store.order import buckets_of_rows
from mistudio.store.outliers import Outliers
from mistudio.store.reader import Store
from mistudio.store.shard import Shard, bucket_shards, shard_name
from mistudio.store.statistics import column_sums, read_sums, write_statistics

WORTH_THREADS: Final = 4 << 20
"""Bytes of a portion that is written by several threads, each to other files."""


class StoreWriter:
    """Appends rows to a store; made by `create` or `resume`. One process at a time may write to a store."""

    def __init__(self, path: Path, plan: Plan, lock: IO[str], *, cursor: int, sizes: tuple[int, ...], complete: bool):
        self.path, self.plan = path, plan
        self.cursor = cursor
        """Packed rows of tokens done at the last checkpoint, as the caller counts them."""
        self.sizes = np.array(sizes, dtype=np.int64)  # [K] rows of each bucket
        self._kept = self.rows  # at the last checkpoint
        self._sums = {site: torch.zeros(2, width, dtype=torch.float64) for site, width in plan.widths.items()}
        self._hashes = {name: [new_hash() for _ in sizes] for name in self._shards(0)}
        self._touched: set[int] = set()  # buckets written to since the last checkpoint
        self.outliers: Outliers | None = None
        """What the manifest will say of them; kept at checkpoints."""
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
        row_dtype: RowDtype = "float32",
    ) -> "StoreWriter":
        """A writer for a new store in the folder `path`, which must be absent or empty.

        widths: site -> width D. expected_rows / bucket_rows gives the number of buckets. source: plain data about
        where the rows come from, kept in the manifest and compared on resume. StoreError: the folder holds something,
        or the disk has too little room.
        """
        plan = make_plan(widths, expected_rows, bucket_rows, seed, model, context, source, row_dtype)
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
        row_dtype: RowDtype = "float32",
    ) -> "StoreWriter":
        """A writer that goes on from the last checkpoint; a new one where nothing was started; one whose `finish`
        returns the store where all is done.

        StoreError: the store was started with other settings (naming the first), is damaged, or another process
        writes to it.
        """
        plan = make_plan(widths, expected_rows, bucket_rows, seed, model, context, source, row_dtype)
        return cls.of_plan(Path(path), plan, resume=True)

    @classmethod
    def of_plan(cls, path: Path, plan: Plan, *, resume: bool) -> "StoreWriter":
        """As `create`, or as `resume`."""
        if not resume or not entries(path):
            return cls._start(path, plan)
        if not any((path / name).is_file() for name in ("manifest.json", "progress.json")):
            raise StoreError(f"{path} holds files, but no collection that could go on. Choose another folder.")
        held = lock(path)
        if (path / "manifest.json").is_file():
            manifest = read_manifest(path)
            refuse_difference(path, manifest.plan, plan)
            return cls(path, plan, held, cursor=manifest.token_rows, sizes=manifest.bucket_sizes, complete=True)
        progress = read_progress(path)
        refuse_difference(path, progress.plan, plan)
        refuse_small_disk(path, plan.row_bytes * max(plan.expected_rows - progress.rows, 0))
        writer = cls(path, plan, held, cursor=progress.cursor, sizes=progress.bucket_sizes, complete=False)
        writer.outliers = progress.outliers
        writer._sums = read_sums(path / progress.statistics, plan.widths)
        writer._cut_back()
        return writer

    @classmethod
    def extend(cls, path: Path, plan: Plan) -> "StoreWriter":
        """A writer that goes on into the finished store at `path`, up to `plan.expected_rows` rows in all; where there
        is none, or where an extension was interrupted, as `resume`.

        Until it is finished again the store is unfinished; a kill while it is made so leaves the one or the other.
        The sums are those of the finished store, so that scale and mean may differ in the last bits of float64 from
        those of one long collection. StoreError: as `resume`; the store has other settings, another number of buckets
        (see `bucket_rows_to_extend`) or more rows already.
        """
        if (path / "manifest.json").is_file():
            with lock(path):
                manifest = read_manifest(path)
                refuse_difference(path, manifest.plan, plan, besides=MAY_GROW)
                if manifest.plan.n_buckets != plan.n_buckets or manifest.rows > plan.expected_rows:
                    raise StoreError(
                        f"{path} has {manifest.rows:,} rows in {manifest.plan.n_buckets} buckets; it cannot become one "
                        f"of {plan.expected_rows:,} in {plan.n_buckets}. Ask for more rows and the same buckets."
                    )
                if manifest.plan != plan or manifest.ended_by == "hours":
                    reopen(path, manifest, plan)
        return cls.of_plan(path, plan, resume=True)

    @classmethod
    def _start(cls, path: Path, plan: Plan) -> "StoreWriter":
        refuse_occupied(path)
        refuse_small_disk(path, plan.row_bytes * plan.expected_rows)
        path.mkdir(parents=True, exist_ok=True)
        writer = cls(path, plan, lock(path), cursor=0, sizes=(0,) * plan.n_buckets, complete=False)
        writer.checkpoint(0)  # before anything else is there, so that a kill from here on can be resumed
        writer._cut_back()
        return writer

    @property
    def rows(self) -> int:
        """Rows written so far, those after the last checkpoint included."""
        return int(self.sizes.sum())

    def write(
        self,
        rows: Mapping[str, Float[Tensor, "B _"]],
        where: Int[Tensor, "B 3"],
        buckets: Int64[np.ndarray, " B"] | None = None,
    ) -> None:
        """Appends B rows of every site; `where` says for each: token id, document, offset in the document.

        buckets: where each row goes; None draws it, as every collection does, and a copy that keeps the buckets of
        another store does not. StoreError: a number that is NaN or infinite or does not fit the store's row dtype
        (naming site, row and shard; nothing of this call is written), or a full disk.
        """
        assert not self.complete, "this store is finished"
        assert rows.keys() == self.plan.widths.keys(), f"{list(rows)} are not the sites {list(self.plan.widths)}"
        if buckets is None:
            buckets = buckets_of_rows(self.plan.seed, self.rows, len(where), self.plan.n_buckets)
        arrays, sums = {"where": where.cpu().numpy()}, {}
        for site, given in rows.items():
            assert given.shape == (len(where), self.plan.widths[site]), f"{site}: {tuple(given.shape)}"
            values = given.detach().to("cpu", torch.float32)
            stored = encode(values, self.plan.row_dtype)
            read_back = stored_values(values, stored, self.plan.row_dtype)
            sums[site] = column_sums(read_back)
            if not torch.isfinite(sums[site]).all():
                raise self._unfit(site, values, read_back, where, buckets)
            arrays |= {shard_name(site, tensor): array for tensor, array in stored.items()}
        self._append(arrays, buckets)
        for site in self._sums:
            self._sums[site] += sums[site]

    def checkpoint(self, cursor: int) -> None:
        """A kill from now on loses nothing that is written: files on the disk first, then progress.json in one step.

        StoreError: the disk refuses it.
        """
        with written_in(self.path):
            self._checkpoint(cursor)

    def _checkpoint(self, cursor: int) -> None:
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
            outliers=self.outliers,
        )
        write_progress(self.path, progress)
        self._kept = self.rows
        self._delete_leftovers(keep=statistics)

    def finish(self, token_rows: int | None = None, ended_by: str | None = None) -> Store:
        """The finished store: headers closed, statistics and, last of all, manifest.json written.

        token_rows: packed rows that the model read; None: the cursor. ended_by: as the manifest says it. StoreError:
        the store has no rows, all rows of a site are zero, so that there is no scale, or the disk refuses it.
        """
        with written_in(self.path):
            self._finish(token_rows, ended_by)
        self.close()
        (self.path / ".lock").unlink(missing_ok=True)
        return Store.open(self.path)

    def _finish(self, token_rows: int | None, ended_by: str | None) -> None:
        if not self.complete:
            if self.rows == 0:
                raise StoreError(f"No row was written to {self.path}, so there is nothing to finish.")
            for bucket, size in enumerate(self.sizes.tolist()):
                for shard in self._shards(bucket).values():
                    shard.close(size)
            self._write_results(self.cursor if token_rows is None else token_rows, ended_by)
            self.complete = True
        (self.path / "progress.json").unlink(missing_ok=True)
        self._delete_leftovers(keep=None)

    def close(self) -> None:
        """Lets go of the folder, so that another writer may resume; what came after the last checkpoint is lost."""
        self._lock.close()

    def __enter__(self) -> "StoreWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close()
        if kind is KeyboardInterrupt and not self.complete:
            raise KeyboardInterrupt(
                f"interrupted; {self._kept:,} of {self.plan.expected_rows:,} rows are safe in {self.path}. Go on with "
                "the same command and --resume."
            )

    def _shards(self, bucket: int) -> dict[str, Shard]:
        """Name -> shard of one bucket (`bucket_shards`)."""
        return bucket_shards(self.path, bucket, self.plan.widths, self.plan.row_dtype)

    def _append(self, arrays: Mapping[str, np.ndarray], buckets: np.ndarray) -> None:
        """Each row goes to the end of its bucket; `sizes` grows only when all files have them.

        A failed write leaves checksums that do not fit; the writer must not be used after it, and a resume reads the
        files anew.
        """
        order = np.argsort(buckets, kind="stable")
        counts = np.bincount(buckets, minlength=self.plan.n_buckets)
        starts = np.cumsum(counts) - counts

        def append(bucket: int) -> None:
            chosen = order[starts[bucket] : starts[bucket] + counts[bucket]]
            for name, shard in self._shards(bucket).items():
                array = arrays[name]
                data = shard.to_bytes(array if len(chosen) == len(array) else array[chosen])
                shard.write(int(self.sizes[bucket]), data)
                self._hashes[name][bucket].update(data)

        touched = counts.nonzero()[0].tolist()
        if len(touched) > 1 and sum(array.nbytes for array in arrays.values()) >= WORTH_THREADS:
            with ThreadPoolExecutor(default_threads()) as pool:  # which waits for all, also where one fails
                list(pool.map(append, touched))
        else:
            for bucket in touched:
                append(bucket)
        self._touched.update(touched)
        self.sizes += counts

    def _cut_back(self) -> None:
        """Every shard has the rows of the last checkpoint and no more; missing empty ones are made."""
        for name in (*self.plan.widths, "where"):
            (self.path / name).mkdir(exist_ok=True)
        for bucket, size in enumerate(self.sizes.tolist()):
            for name, shard in self._shards(bucket).items():
                shard.truncate(size)
                self._hashes[name][bucket] = shard.hash(size)
        for folder in (*(self.path / name for name in (*self.plan.widths, "where")), self.path):
            sync_folder(folder)
        self._delete_leftovers(keep=f"statistics-{self.rows}.safetensors")

    def _delete_leftovers(self, keep: str | None) -> None:
        """Sums of earlier checkpoints and half-written temporary files."""
        for path in (*self.path.glob("statistics-*.safetensors"), *self.path.glob(".*.tmp")):
            if path.name != keep:
                path.unlink()

    def _write_results(self, token_rows: int, ended_by: str | None) -> None:
        sites, statistics_sha256 = write_statistics(self.path, self._sums, self.rows)
        manifest = Manifest(
            format=FORMAT,
            version=VERSION,
            mistudio_version=__version__,
            dtype=self.plan.row_dtype,
            model=self.plan.model,
            context=self.plan.context,
            seed=self.plan.seed,
            expected_rows=self.plan.expected_rows,
            bucket_rows=self.plan.bucket_rows,
            rows=self.rows,
            token_rows=token_rows,
            bucket_sizes=tuple(self.sizes.tolist()),
            sites=sites,
            source=self.plan.source,
            checksums={name: tuple(map(written, hashes)) for name, hashes in self._hashes.items()},
            statistics_sha256=statistics_sha256,
            ended_by=ended_by,
            outliers=self.outliers,
        )
        write_manifest(self.path, manifest)

    def _unfit(self, site: str, values: Tensor, read_back: Tensor, where: Tensor, buckets: np.ndarray) -> StoreError:
        """The error for rows that are not finite: as the model gave them, or only as the row dtype keeps them."""
        given = bool(torch.isfinite(values).all())
        bad = (~torch.isfinite(read_back if given else values)).sum(1)  # [B]
        row = int(bad.nonzero()[0])
        bucket = int(buckets[row])
        place = int(self.sizes[bucket] + (buckets[:row] == bucket).sum())
        _, document, offset = where[row].tolist()
        found = f"{int(bad[row])} NaN or infinite values"
        advice = "Load the model in a number type with a larger range, such as --dtype float32,"
        if given:
            found = f"{int(bad[row])} values beyond the range of {self.plan.row_dtype}"
            advice = "Use --row-dtype bfloat16 or float32,"
        return StoreError(
            f"{site} has {found} in row {self.rows + row} (document {document}, token "
            f"{offset} of it), which would be row {place} of {self._shards(bucket)[site].path}. {advice} "
            f"and collect into another folder."
        )


def make_plan(
    widths: dict[str, int],
    expected_rows: int,
    bucket_rows: int,
    seed: int,
    model: str,
    context: int,
    source: dict[str, Any],
    row_dtype: str = "float32",
) -> Plan:
    """The plan of a store; `source` becomes what it will be read back as (tuples become lists)."""
    return Plan(
        widths=widths,
        expected_rows=expected_rows,
        bucket_rows=bucket_rows,
        seed=seed,
        model=model,
        context=context,
        source=json.loads(json.dumps(source)),
        row_dtype=row_dtype,
    )
