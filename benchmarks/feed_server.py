"""How fast rows come through a feed server on this machine: bytes a second / those of the local feed on the same rows.

    python benchmarks/feed_server.py [--rows 100000] [--width 2304] [--trainers 4] [--rounds 5] [--small]

The server is a process of its own, reached over loopback TCP; all files are in the page cache and checked. One trainer
with a server and the local feed alternate; then `--trainers` trainers, each a process at another position, share the
server, and their sum is given. A trainer does nothing with its batches of 4096 rows. Medians and ranges of the ratios.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from read_feed import BATCH, SITE, make

from mistudio.store import Position, Store
from mistudio.store.served import open_rows


def rate(place: str, batches: int, start: int) -> float:
    """GB/s of float32 rows that a feed of the store at `place` gives, after a few batches to begin with."""
    store = open_rows(place)
    feed = store.feed(SITE, BATCH, seed=1, start=Position(0, start))
    for _ in range(3):
        next(feed)
    begin = time.perf_counter()
    for _ in range(batches):
        next(feed)
    return batches * BATCH * store.width(SITE) * 4 / (time.perf_counter() - begin) / 1e9


def started(store: Store, readers: int) -> tuple[subprocess.Popen[str], str]:
    """A server and its address."""
    command = [sys.executable, "-m", "mistudio.cli", "feed", "serve", str(store.path), "--bind", "tcp://127.0.0.1:0"]
    server = subprocess.Popen([*command, "--readers", str(readers)], stderr=subprocess.PIPE, text=True)
    assert server.stderr is not None
    line = server.stderr.readline()
    return server, line.split(" at ")[1].split(";")[0]


def together(address: str, batches: int, trainers: int, rows: int) -> float:
    """Sum of the GB/s of trainers at different positions, each a process."""
    command = [sys.executable, __file__, "--trainer", address, "--batches", str(batches), "--start"]
    running = [
        subprocess.Popen([*command, str(rows * n // trainers)], stdout=subprocess.PIPE, text=True)
        for n in range(trainers)
    ]
    return sum(float(process.communicate()[0]) for process in running)


def shown(name: str, values: list[float]) -> None:
    """A line: median and range."""
    print(f"{name}: {np.median(values):.2f} ({min(values):.2f}-{max(values):.2f})", flush=True)


def main() -> None:
    """Prints the rates and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--width", type=int, default=2304)
    parser.add_argument("--trainers", type=int, default=4)
    parser.add_argument("--readers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--small", action="store_true", help="a few seconds, to see that it runs")
    parser.add_argument("--trainer", help=argparse.SUPPRESS)
    parser.add_argument("--batches", type=int, default=40, help=argparse.SUPPRESS)
    parser.add_argument("--start", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.trainer:
        print(rate(args.trainer, args.batches, args.start))
        return
    if args.small:
        args.rows, args.width, args.trainers, args.rounds, args.batches = 20_000, 256, 2, 1, 10
    with tempfile.TemporaryDirectory() as folder:
        store = make(Path(folder) / "s", args.rows, args.width)
        server, address = started(store, args.readers)
        try:
            pairs = [
                (rate(address, args.batches, 0), rate(str(store.path), args.batches, 0)) for _ in range(args.rounds + 1)
            ]
            served, local = map(list, zip(*pairs[1:], strict=True))  # the first reads what the checksums need
            shown("local feed, GB/s", local)
            shown("one trainer over loopback, GB/s", served)
            shown("ratio", [far / near for far, near in pairs[1:]])
            sums = [together(address, args.batches, args.trainers, args.rows) for _ in range(args.rounds)]
            shown(f"{args.trainers} trainers together, GB/s", sums)
        finally:
            server.kill()
            server.wait()


if __name__ == "__main__":
    main()
