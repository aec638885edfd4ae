"""How fast a shuffled feed reads: bytes a second of `store.feed` / those of a plain sequential read of the same files.

    python benchmarks/read_feed.py [--rows 200000] [--width 576] [--rounds 5] [--prefetch 2] [--threads 2]

Warm: the files are in the page cache. Cold: they were dropped from it (posix_fadvise) before each reading. The plain
read takes 4 MiB at a time into one buffer and does nothing with it. The feed checks SHA-256 at the first read of a
store that was just opened (first), and not again (again). Rounds alternate; medians and ranges of the ratios.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from mistudio.store import FeedOptions, Store, StoreWriter

SITE, BATCH = "layers.0.resid_post", 4096


def make(path: Path, rows: int, width: int) -> Store:
    """A store of random rows in about five buckets."""
    draw = torch.Generator().manual_seed(0)
    with StoreWriter.create(
        path,
        widths={SITE: width},
        expected_rows=rows,
        bucket_rows=rows // 5,
        seed=0,
        model="none",
        context=1,
        source={},
    ) as writer:
        while writer.rows < rows:
            count = min(8192, rows - writer.rows)
            where = torch.zeros(count, 3, dtype=torch.int32)
            writer.write({SITE: torch.randn(count, width, generator=draw)}, where)
        return writer.finish()


def shards(store: Store) -> list[Path]:
    """The files of the site."""
    return sorted((store.path / SITE).glob("*.safetensors"))


def drop(store: Store) -> None:
    """The files are not in the page cache."""
    for path in shards(store):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def plain(store: Store) -> None:
    """Every byte once, in order."""
    buffer = bytearray(1 << 22)
    for path in shards(store):
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def feed(store: Store, prefetch: int, threads: int | None) -> None:
    """About every row once, in a shuffled order."""
    batches = store.feed(SITE, BATCH, seed=1, how=FeedOptions(prefetch=prefetch, threads=threads))
    for _ in range(store.rows // BATCH):
        next(batches)


def seconds(work: Callable[[], None]) -> float:
    """Of the wall."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    """Prints the rates and their ratio, cold and warm, with the first read of a store and the next."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prefetch", type=int, default=2)
    parser.add_argument("--threads", type=int, help="that gather rows; left out: as many as torch uses, at most 4")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "s"
        store = make(path, args.rows, args.width)
        size = store.rows * args.width * 4
        feed(store, 0, args.threads)  # loops are compiled before the clock runs
        for cold in (True, False):
            for first in (True, False):
                rates = []
                for _ in range(args.rounds + 1):
                    store = Store.open(path)
                    if not first:
                        feed(store, 0, args.threads)
                    if cold:
                        drop(store)
                    shuffled = seconds(lambda store=store: feed(store, args.prefetch, args.threads))
                    if cold:
                        drop(store)
                    rates.append((size / shuffled / 1e9, size / seconds(lambda store=store: plain(store)) / 1e9))
                ours, theirs = np.array(rates[1:]).T
                ratio = ours / theirs
                print(
                    f"{'cold' if cold else 'warm'}, {'first' if first else 'again'}: feed {np.median(ours):.2f} GB/s, "
                    f"plain {np.median(theirs):.2f} GB/s, ratio {np.median(ratio):.2f} "
                    f"({ratio.min():.2f}-{ratio.max():.2f})",
                    flush=True,
                )


if __name__ == "__main__":
    main()
