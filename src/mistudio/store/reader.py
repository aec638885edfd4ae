"""Reads a finished store: scale, mean, rows as stored, and an endless shuffled feed that resumes exactly."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float32, Int32
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mistudio.errors import StoreError
from mistudio.store import order
from mistudio.store.manifest import Manifest, read_manifest
from mistudio.store.shard import site_shard, where_shard


@dataclass(frozen=True, order=True)
class Position:
    """A place in a feed: `offset` rows of epoch `epoch` are read."""

    epoch: int
    offset: int


class Store:
    """Activation rows of one or more sites of one model, on disk; made by `open`."""

    def __init__(self, path: Path, manifest: Manifest, means: dict[str, Tensor]):
        self.path, self.manifest = path, manifest
        self._means = means

    @classmethod
    def open(cls, path: str | Path) -> "Store":
        """The store in the folder `path`, its files checked against the manifest by size (headers are checked when
        read).

        StoreError: no store, an unfinished one (it says how far it got and how to go on), a damaged or an unknown one.
        """
        path = Path(path)
        manifest = read_manifest(path)
        for bucket, size in enumerate(manifest.bucket_sizes):
            where_shard(path, bucket).check_size(size)
            for site, info in manifest.sites.items():
                site_shard(path, site, bucket, info.width).check_size(size)
        return cls(path, manifest, _read_means(path / "statistics.safetensors", manifest))

    @property
    def rows(self) -> int:
        """Number of rows, the same for every site."""
        return self.manifest.rows

    @property
    def sites(self) -> list[str]:
        """Names of the sites, in the order they were asked for."""
        return list(self.manifest.sites)

    def width(self, site: str) -> int:
        """D of a site. StoreError: the store does not have it."""
        return self.manifest.sites[self._known(site)].width

    def scale(self, site: str) -> float:
        """C of a site, with E||x/C||^2 = 1: sqrt(mean over rows of the sum over D of x^2), from float64 sums."""
        return self.manifest.sites[self._known(site)].scale

    def mean(self, site: str) -> Float32[Tensor, " D"]:
        """E[x] of a site in raw units: float64 sums, rounded to float32 here."""
        return self._means[self._known(site)].clone()

    def bucket(self, site: str, bucket: int) -> Float32[np.ndarray, "B D"]:
        """One bucket's rows in raw units, as they were written; read-only and memory-mapped."""
        size = self.manifest.bucket_sizes[bucket]
        return site_shard(self.path, self._known(site), bucket, self.width(site)).map(size)

    def where(self, bucket: int) -> Int32[np.ndarray, "B 3"]:
        """Token id, document and offset in the document of each row of `bucket(site, bucket)`; read-only."""
        return where_shard(self.path, bucket).map(self.manifest.bucket_sizes[bucket])

    def feed(self, site: str, batch_rows: int, *, seed: int, start: Position = Position(0, 0)) -> "Feed":
        """Endless shuffled batches of a site in normalised units; see `Feed`."""
        return Feed(self, self._known(site), batch_rows, seed=seed, start=start)

    def _known(self, site: str) -> str:
        if site not in self.manifest.sites:
            raise StoreError(f"{self.path} has no site {site!r}; it has {', '.join(self.sites)}.")
        return site


class Feed:
    """Endless batches x/C [batch_rows, D], float32, every row exactly once an epoch, batches running on over bucket
    and epoch ends.

    The division is in float32, by C rounded from float64. The order is a function of (store, seed); `state` and
    `restore` are O(number of buckets) and continue it exactly, with any batch size. Rows are gathered from the page
    cache through a memory map: a bucket that fits into free memory is read from the disk once an epoch.
    """

    def __init__(self, store: Store, site: str, batch_rows: int, *, seed: int, start: Position):
        if batch_rows < 1:
            raise StoreError(f"batch_rows = {batch_rows}, but a batch has at least 1 row.")
        order.check_seed(seed)
        self.store, self.site, self.batch_rows, self.seed = store, site, batch_rows, seed
        self._sizes = np.array(store.manifest.bucket_sizes, dtype=np.int64)
        self._scale = np.float32(store.scale(site))
        self._rows = np.empty((0, store.width(site)), dtype=np.float32)  # of the bucket being read
        self._ahead = np.empty(0, dtype=np.int64)  # rows of it still to come, in order
        self.position = self._checked(start)
        """Where the next batch begins."""

    def __iter__(self) -> Iterator[Float32[Tensor, "B D"]]:
        return self

    def __next__(self) -> Float32[Tensor, "B D"]:
        batch = np.empty((self.batch_rows, self.store.width(self.site)), dtype=np.float32)
        filled = 0
        while filled < self.batch_rows:
            filled += self._fill(batch[filled:])
        np.divide(batch, self._scale, out=batch)
        return torch.from_numpy(batch)

    def state(self) -> dict[str, Any]:
        """Plain data from which `restore` goes on with the row that would have come next."""
        position = {"epoch": self.position.epoch, "offset": self.position.offset}
        return {"site": self.site, "seed": self.seed, "rows": self.store.rows, **position}

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on where `state` was taken. StoreError: it is of another site, seed or store, or not a state at all."""
        mine = self.state()
        if state.keys() != mine.keys():
            raise StoreError(f"A feed's state has {', '.join(mine)}, not {', '.join(map(str, state))}.")
        for name in ("site", "seed", "rows"):
            if state[name] != mine[name]:
                raise StoreError(
                    f"The saved place is of a feed with {name} = {state[name]!r}; this one has {mine[name]!r}. "
                    f"Resume with the store and the seed the run began with."
                )
        self.position = self._checked(Position(state["epoch"], state["offset"]))
        self._ahead = self._ahead[:0]

    def _fill(self, out: Float[np.ndarray, "B D"]) -> int:
        """Copies as many rows to the head of `out` as the present bucket still has, and says how many."""
        if not len(self._ahead):
            self._enter_bucket()
        chosen, self._ahead = self._ahead[: len(out)], self._ahead[len(out) :]
        np.take(self._rows, chosen, axis=0, out=out[: len(chosen)], mode="clip")  # "raise" would buffer the copy
        self.position = self._normal(self.position.epoch, self.position.offset + len(chosen))
        return len(chosen)

    def _enter_bucket(self) -> None:
        epoch, offset = self.position.epoch, self.position.offset
        bucket, done = order.locate(self._sizes, self.seed, epoch, offset)
        self._rows = self.store.bucket(self.site, bucket)
        self._ahead = order.row_order(self.seed, epoch, bucket, len(self._rows))[done:]

    def _normal(self, epoch: int, offset: int) -> Position:
        return Position(epoch, offset) if offset < self.store.rows else Position(epoch + 1, 0)

    def _checked(self, position: Position) -> Position:
        if position.epoch < 0 or not 0 <= position.offset < self.store.rows:
            raise StoreError(f"{position} is not in a store of {self.store.rows:,} rows: offset is from 0 to rows - 1.")
        return position


def _read_means(path: Path, manifest: Manifest) -> dict[str, Tensor]:
    try:
        found = load_file(path)
    except (SafetensorError, OSError) as error:
        raise StoreError(f"{path} cannot be read: {error}. The store is damaged; copy or collect it again.") from error
    names = {
        f"{site}.{kind}": info.width for site, info in manifest.sites.items() for kind in ("mean", "second_moment")
    }
    if {name: (t.dtype, tuple(t.shape)) for name, t in found.items()} != {
        n: (torch.float64, (d,)) for n, d in names.items()
    }:
        raise StoreError(f"{path} does not hold mean and second moment of the sites in manifest.json. Collect again.")
    for site, info in manifest.sites.items():
        scale = math.sqrt(found[f"{site}.second_moment"].sum().item())
        if not math.isclose(scale, info.scale, rel_tol=1e-9):
            raise StoreError(f"{path} gives {site} the scale {scale}; manifest.json says {info.scale}. Collect again.")
    return {site: found[f"{site}.mean"].float() for site in manifest.sites}
