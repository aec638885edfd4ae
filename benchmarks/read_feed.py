"""How fast a shuffled feed reads, and what the shuffle costs when a store is written.

    python benchmarks/read_feed.py [--rows 200000] [--width 2304] [--rounds 5] [--prefetch 2] [--threads 2] [--small]

Reading: bytes a second of `store.feed` / those of a plain sequential read of the same files. Warm: the files are in the
page cache. Cold: they were dropped from it (posix_fadvise) before each reading. First: a new feed of a store that was
just opened, which checks every shard. Again: warm, a feed that has read an epoch goes on, with the batches it had made
ahead taken before the clock runs; cold, a new feed of a store that was read before. Feeds read whole batches only, and
their time is scaled to all rows. Before a cold read, and before a store is written, memory for it is taken and given
back: a virtual machine returns what is free to its host, and a plain read into memory that must come from the host
again was half as fast.

The plain read takes 4 MiB at a time into one buffer and does nothing with it; a second one ("into batches") reads into
memory of the size of a batch, three in turn, as anybody who hands the rows on must. "Copy": as many threads as the feed
has copy the rows, in order, from a memory map into such batches, which is what any reader has to do at least.

Beside SAELens 6.54.12: rows a second of our feed / those of its ActivationsStore on a cache of the same rows, with its
mixing buffer of 16,384 rows and without any (it checks nothing, and is opened anew each time); in an environment of its
own (`make test-peers` makes .venv-peers; MISTUDIO_SAELENS_PYTHON names another; --no-peer leaves it out).

Writing: seconds of a whole store of `--buckets` buckets / those of one of a single bucket, to which rows go in order;
the one is written first in every other round.

What is compared takes turns in each round, every other round in the opposite order, and the first round is left out;
medians and ranges of the ratios, by the wall's clock and the processor's.
"""

import argparse
import ctypes
import gc
import json
import mmap
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch

from mistudio.store import Feed, FeedOptions, Store, StoreWriter
from mistudio.store.gather import default_threads

SITE, BATCH = "layers.0.resid_post", 4096
ROOT = Path(__file__).parent.parent


def make(path: Path, rows: int, width: int, buckets: int = 5) -> Store:
    """A store of random rows, the same 8,192 over and over."""
    draw = torch.Generator().manual_seed(0)
    values = torch.randn(min(8192, rows), width, generator=draw)
    return written(path, rows, values, buckets)


def written(path: Path, rows: int, values: torch.Tensor, buckets: int) -> Store:
    """A store of `rows` rows that are `values` [B, D] over and over."""
    with StoreWriter.create(
        path,
        widths={SITE: values.shape[1]},
        expected_rows=rows,
        bucket_rows=-(-rows // buckets),
        seed=0,
        model="none",
        context=1,
        source={},
    ) as writer:
        while writer.rows < rows:
            count = min(len(values), rows - writer.rows)
            writer.write({SITE: values[:count]}, torch.zeros(count, 3, dtype=torch.int32))
        return writer.finish()


def shards(store: Store) -> list[Path]:
    """The files of the site."""
    return sorted((store.path / SITE).glob("*.safetensors"))


def drop(store: Store, *, was_read: bool) -> None:
    """The files are not in the page cache, and there is memory at hand for them and for batches."""
    gc.collect()  # a file that is mapped stays in it
    fetch_memory(2 * sum(path.stat().st_size for path in shards(store)))
    if was_read:
        for bucket in range(len(store.manifest.bucket_sizes)):
            store.mapped(SITE, bucket)["rows"].file.madvise(mmap.MADV_DONTNEED)
    for path in shards(store):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            if cached := pages_cached(file):
                sys.exit(f"{cached:,} pages of {path} stay in the page cache: something has it mapped.")


def fetch_memory(size: int) -> None:
    """So many bytes are free without asking a virtual machine's host for them."""
    np.ones(size, dtype=np.uint8)


def pages_cached(file: BinaryIO) -> int:
    """Pages of the file that are in the page cache."""
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        bytes_of = np.frombuffer(mapped, dtype=np.uint8)
        found = np.zeros(-(-len(bytes_of) // mmap.PAGESIZE), dtype=np.uint8)
        told = ctypes.CDLL(None).mincore(
            ctypes.c_void_p(bytes_of.ctypes.data), ctypes.c_size_t(len(bytes_of)), ctypes.c_void_p(found.ctypes.data)
        )
        assert told == 0
        del bytes_of
    return int((found & 1).sum())


def plain(store: Store, buffers: list[np.ndarray]) -> None:
    """Every byte once, in order, into one buffer after the other."""
    number = 0
    for path in shards(store):
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffers[number % len(buffers)]):
                number += 1


def copy(maps: list[np.ndarray], batches: list[np.ndarray], pool: ThreadPoolExecutor, threads: int) -> None:
    """Every row once, in order, into one batch after the other, each shared out to the threads."""
    number = 0
    for rows in maps:
        for start in range(0, len(rows), BATCH):
            piece, number = rows[start : start + BATCH], number + 1
            batch = batches[number % len(batches)].view(np.float32).reshape(BATCH, -1)[: len(piece)]
            parts = zip(np.array_split(batch, threads), np.array_split(piece, threads), strict=True)
            list(pool.map(lambda part: np.copyto(*part), parts))


def reader(path: Path, args: argparse.Namespace, *, cold: bool, first: bool) -> Callable[[], object]:
    """What takes about every row once, in a shuffled order; all is ready for the clock (see the top)."""
    store = Store.open(path)
    count, how = store.rows // BATCH, FeedOptions(prefetch=args.prefetch, threads=args.threads)
    feed = store.feed(SITE, BATCH, seed=1, how=how)
    if not first:
        take(feed, count)
        if cold:
            feed = store.feed(SITE, BATCH, seed=1, how=how)
        else:
            take(feed, args.prefetch + 2)
    if cold:
        drop(store, was_read=not first)
    return lambda: take(feed, count)


def ready(store: Store, way: Callable[[], object], *, cold: bool) -> Callable[[], object]:
    """The way, with the files dropped where it is to be cold."""
    if cold:
        drop(store, was_read=False)
    return way


def take(feed: Feed, batches: int) -> None:
    """The next batches, which nobody uses."""
    for _ in range(batches):
        next(feed)


def seconds(work: Callable[[], object]) -> np.ndarray:
    """Of the wall, and of all threads of this process."""
    start = np.array([time.perf_counter(), time.process_time()])
    work()
    return np.array([time.perf_counter(), time.process_time()]) - start


def shown(name: str, ratios: list[np.ndarray]) -> None:
    """A line: median and range of the ratios by the wall's clock, and by the processor's."""
    of_clock = zip(("wall", "processor"), np.stack(ratios[1:]).T, strict=True)
    texts = [f"{clock} {np.median(r):.2f} ({r.min():.2f}-{r.max():.2f})" for clock, r in of_clock]
    print(f"{name}: {', '.join(texts)}", flush=True)


def measure_reading(path: Path, args: argparse.Namespace) -> None:
    """Prints the feed's rate over plain reads and copies."""
    store = Store.open(path)
    threads = args.threads or default_threads()
    size = store.rows * store.width(SITE) * 4
    once = size / (store.rows // BATCH * BATCH * store.width(SITE) * 4)  # a feed reads whole batches only
    batches = [np.zeros(BATCH * store.width(SITE) * 4, dtype=np.uint8) for _ in range(3)]
    buffer = [np.zeros(1 << 22, dtype=np.uint8)]
    pool = ThreadPoolExecutor(threads)
    for cold in (True, False):
        maps = [] if cold else [store.bucket(SITE, bucket) for bucket in range(len(store.manifest.bucket_sizes))]
        ways = {"plain read": partial(plain, store, buffer), "plain read into batches": partial(plain, store, batches)}
        if not cold:
            ways["copy"] = partial(copy, maps, batches, pool, threads)
        for first in (True, False):
            turns = {"feed": partial(reader, path, args, cold=cold, first=first)}
            turns |= {name: partial(ready, store, way, cold=cold) for name, way in ways.items()}
            times: dict[str, list[np.ndarray]] = {name: [] for name in turns}
            for number in range(args.rounds + 1):
                for name, prepare in list(turns.items())[:: -1 if number % 2 else 1]:
                    times[name].append(seconds(prepare()))
            ours = [of_feed * once for of_feed in times["feed"]]
            rates = [size / of_feed[0] / 1e9 for of_feed in ours]
            kind = f"{'cold' if cold else 'warm'}, {'first' if first else 'again'}"
            print(f"{kind}: feed {np.median(rates[1:]):.2f} GB/s")
            for name in ways:
                shown(f"{kind}: feed / {name}", [way / of_feed for way, of_feed in zip(times[name], ours, strict=True)])


class Peer:
    """SAELens in a process of its own, which answers questions (`peers/read.py`)."""

    def __init__(self, threads: int):
        python = os.environ.get("MISTUDIO_SAELENS_PYTHON", str(ROOT / ".venv-peers/bin/python"))
        if not Path(python).exists():
            sys.exit(f"There is no {python}; `make test-peers` makes it, or set MISTUDIO_SAELENS_PYTHON, or --no-peer.")
        command = [python, str(Path(__file__).parent / "peers/read.py"), str(threads)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self._process = subprocess.Popen(command, text=True, **pipes)

    def ask(self, **question: object) -> dict[str, float]:
        """Its answer."""
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            sys.exit(f"SAELens failed. Try it by hand: {' '.join(self._process.args)}, then {json.dumps(question)}")
        return json.loads(answer)

    def close(self) -> None:
        """It has ended."""
        self._process.stdin.close()
        self._process.wait()


def measure_peer(path: Path, args: argparse.Namespace) -> None:
    """Prints our rows a second over the peer's."""
    store = Store.open(path)
    peer = Peer(args.threads or torch.get_num_threads())
    try:
        peer.ask(files=[str(file) for file in shards(store)], cache=str(path.parent / "cache"), width=store.width(SITE))
        for cold in (True, False):
            for first in (True, False):
                found: dict[float, list[np.ndarray]] = {0.5: [], 0.0: []}
                for _ in range(args.rounds + 1):
                    ours = seconds(reader(path, args, cold=cold, first=first))
                    ours /= store.rows // BATCH * BATCH
                    for mixing, ratios in found.items():
                        answer = peer.ask(mixing=mixing, cold=cold)
                        theirs = np.array([answer["wall"], answer["processor"]]) / answer["rows"]
                        ratios.append(theirs / ours)
                kind = f"{'cold' if cold else 'warm'}, {'first' if first else 'again'}: our rows/s / SAELens's"
                shown(f"{kind}, shuffled in its buffer", found[0.5])
                shown(f"{kind}, not shuffled", found[0.0])
    finally:
        peer.close()


def measure_writing(folder: Path, args: argparse.Namespace) -> None:
    """Prints what scattering rows to buckets costs."""
    values = torch.randn(4096, args.width, generator=torch.Generator().manual_seed(0))
    ratios = []
    for number in range(args.rounds + 1):
        found = {}
        for buckets in (args.buckets, 1) if number % 2 else (1, args.buckets):
            place = folder / f"written{number}_{buckets}"
            fetch_memory(2 * args.rows * args.width * 4)
            found[buckets] = seconds(partial(written, place, args.rows, values, buckets))
            shutil.rmtree(place)
        ratios.append(found[args.buckets] / found[1])
    shown(f"writing with the shuffle into {args.buckets} buckets / without, time", ratios)


def main() -> None:
    """Prints all ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--width", type=int, default=2304)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prefetch", type=int, default=2)
    parser.add_argument("--threads", type=int, help="that gather rows; left out: as many as torch uses, at most 4")
    parser.add_argument("--buckets", type=int, default=20, help="of the store that is written")
    parser.add_argument("--no-peer", action="store_true", help="without SAELens")
    parser.add_argument("--small", action="store_true", help="a few seconds, to see that it runs")
    args = parser.parse_args()
    if args.small:
        args.rows, args.width, args.rounds, args.buckets = 20_000, 256, 1, 5
    print(f"{args.rows:,} rows of {args.width}, {len(os.sched_getaffinity(0))} cores")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "s"
        make(path, args.rows, args.width)
        reader(path, args, cold=False, first=True)()  # loops are compiled before the clock runs
        measure_reading(path, args)
        if not args.no_peer:
            measure_peer(path, args)
        measure_writing(Path(folder), args)


if __name__ == "__main__":
    main()
