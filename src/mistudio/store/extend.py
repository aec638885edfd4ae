"""A finished store made an unfinished one again, so that more rows can follow.

A row's bucket is floor(draw * K) and K, the number of buckets, depends on the rows asked for; it is kept, so that the
rows that are there stay where they are. The extended store is then the one that a single collection with the larger
`bucket_rows` would have made: rows, origins, buckets and checksums are equal byte for byte, scale and mean to the last
bits of float64, since the sums begin from rounded moments.
"""

from pathlib import Path

import torch

from mistudio.errors import StoreError
from mistudio.files import write_tensors
from mistudio.store.folder import sync_folder
from mistudio.store.manifest import (
    FORMAT,
    VERSION,
    Manifest,
    Plan,
    Progress,
    read_manifest,
    read_progress,
    write_progress,
)
from mistudio.store.order import bucket_count
from mistudio.store.statistics import FILE, read_statistics

MAY_GROW = ("tokens", "documents", "disk_gb", "expected_rows", "bucket_rows")
"""Settings in which an extension may differ from the store it goes on with."""


def bucket_rows_to_extend(path: Path, rows: int) -> int | None:
    """The `bucket_rows` with which `rows` rows in all take as many buckets as the store at `path` has; None where
    nothing is there yet. Buckets then hold more rows each.

    StoreError: no number does; the message gives the nearest number of rows that has one. Only where buckets are many
    and small.
    """
    if (path / "manifest.json").is_file():
        buckets = read_manifest(path).plan.n_buckets
    elif (path / "progress.json").is_file():
        buckets = read_progress(path).plan.n_buckets
    else:
        return None
    size = -(-rows // buckets)
    if bucket_count(rows, size) != buckets:
        raise StoreError(
            f"{path} has {buckets} buckets, and {rows:,} rows cannot be divided among them evenly. Ask for "
            f"{size * buckets:,} rows."
        )
    return size


def reopen(path: Path, manifest: Manifest, plan: Plan) -> None:
    """The finished store is an unfinished one of `plan`, at the end of its rows."""
    statistics = read_statistics(path, manifest)
    sums = {site: torch.stack(moments) * manifest.rows for site, moments in statistics.items()}
    progress = Progress(
        format=FORMAT,
        version=VERSION,
        plan=plan,
        cursor=manifest.token_rows,
        bucket_sizes=manifest.bucket_sizes,
        statistics=f"statistics-{manifest.rows}.safetensors",
        outliers=manifest.outliers,
    )
    write_tensors(path / progress.statistics, sums)
    write_progress(path, progress)
    (path / "manifest.json").unlink()
    (path / FILE).unlink()
    sync_folder(path)
