"""Endless shuffled batches from a store, made ahead in a thread, that resume exactly.

A place in a feed is a `Position`, two numbers; where a batch begins is a function of the batches taken, not of those
made ahead. With `world` trainers, rank r gets the r-th part of each batch that one trainer would have got of
`world * batch_rows` rows: the position is the same on all ranks, and a run can go on with another number of them.
"""

import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from mistudio.errors import StoreError
from mistudio.store import order
from mistudio.store.background import Ahead
from mistudio.store.dtypes import ROWS, decode

if TYPE_CHECKING:
    from mistudio.store.reader import Store


@dataclass(frozen=True, order=True)
class Position:
    """A place in a feed: `offset` rows of epoch `epoch` are read."""

    epoch: int
    offset: int


@dataclass(frozen=True, kw_only=True)
class FeedOptions:
    """How batches are made; none of it bears on which rows come when, but `rank` and `world`."""

    prefetch: int = 2
    """Batches made before they are asked for, by a thread; 0: none, and no thread."""
    rank: int = 0
    """Which of `world` trainers this is."""
    world: int = 1
    """Trainers that share the rows; all use the same seed and batch_rows and are at the same position."""
    pinned: bool = False
    """Batches in page-locked memory, from which a GPU copies without waiting."""

    def __post_init__(self) -> None:
        if self.prefetch < 0:
            raise StoreError(f"prefetch = {self.prefetch}, but it is a number of batches from 0.")
        if not 0 <= self.rank < self.world:
            raise StoreError(f"rank = {self.rank} of world = {self.world}, but ranks are 0 to world - 1.")
        if self.pinned and not torch.cuda.is_available():
            raise StoreError("pinned=True needs a CUDA GPU, and there is none here. Leave it out.")


START: Final = Position(0, 0)
DEFAULTS: Final = FeedOptions()


class JointFeed:
    """Endless tuples of batches x/C [batch_rows, D], float32, one a site, rows of the same tokens in the same order.

    Every row comes exactly once an epoch, batches running on over bucket and epoch ends. The division is in float32, by
    C rounded from float64. The order is a function of (store, seed); `state` and `restore` are O(number of buckets) and
    continue it exactly, with any batch size. Rows are gathered from the page cache through a memory map: a bucket that
    fits into free memory is read from the disk once an epoch.
    """

    def __init__(
        self, store: "Store", sites: tuple[str, ...], batch_rows: int, *, seed: int, start: Position, how: FeedOptions
    ):
        if batch_rows < 1:
            raise StoreError(f"batch_rows = {batch_rows}, but a batch has at least 1 row.")
        order.check_seed(seed)
        self.store, self.sites, self.batch_rows, self.seed, self.how = store, sites, batch_rows, seed, how
        self.position = self._checked(start)
        """Where the next batch begins."""
        self._ahead: Iterator[tuple[tuple[Tensor, ...], Position]] | None = None
        self._stop_thread: weakref.finalize[..., Any] | None = None

    def __iter__(self) -> Iterator[tuple[Float32[Tensor, "B _"], ...]]:
        return self

    def __next__(self) -> tuple[Float32[Tensor, "B _"], ...]:
        if self._ahead is None:
            self._ahead = self._start()
        batches, self.position = next(self._ahead)
        return batches

    def state(self) -> dict[str, Any]:
        """Plain data from which `restore` goes on with the row that would have come next."""
        return _state(self.store, {"sites": list(self.sites)}, self.seed, self.position)

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on where `state` was taken. StoreError: it is of other sites, seed or store, or not a state at all."""
        self.seek(_restored(state, self.state()))

    def seek(self, position: Position) -> None:
        """The next batch begins at `position`; batches made ahead are dropped. StoreError: there is no such place."""
        self.position = self._checked(position)
        if self._stop_thread is not None:
            self._stop_thread()
        self._ahead = None

    def _start(self) -> Iterator[tuple[tuple[Tensor, ...], Position]]:
        batches = _batches(self.store, self.sites, self.batch_rows, self.seed, self.position, self.how)
        if self.how.prefetch == 0:
            return batches
        ahead = Ahead(batches, self.how.prefetch)
        self._stop_thread = weakref.finalize(self, ahead.stop)  # nothing in the thread refers to this feed
        return ahead

    def _checked(self, position: Position) -> Position:
        if position.epoch < 0 or not 0 <= position.offset < self.store.rows:
            raise StoreError(f"{position} is not in a store of {self.store.rows:,} rows: offset is from 0 to rows - 1.")
        return position


class Feed:
    """Endless batches x/C [batch_rows, D] of one site, float32; everything else as `JointFeed` says."""

    def __init__(self, store: "Store", site: str, batch_rows: int, *, seed: int, start: Position, how: FeedOptions):
        self.store, self.site, self.batch_rows, self.seed = store, site, batch_rows, seed
        self._joint = JointFeed(store, (site,), batch_rows, seed=seed, start=start, how=how)

    @property
    def position(self) -> Position:
        """Where the next batch begins."""
        return self._joint.position

    def __iter__(self) -> Iterator[Float32[Tensor, "B D"]]:
        return self

    def __next__(self) -> Float32[Tensor, "B D"]:
        return next(self._joint)[0]

    def state(self) -> dict[str, Any]:
        """Plain data from which `restore` goes on with the row that would have come next."""
        return _state(self.store, {"site": self.site}, self.seed, self.position)

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on where `state` was taken. StoreError: it is of another site, seed or store, or not a state at all."""
        self._joint.seek(_restored(state, self.state()))


def _batches(
    store: "Store", sites: tuple[str, ...], batch_rows: int, seed: int, start: Position, how: FeedOptions
) -> Iterator[tuple[tuple[Tensor, ...], Position]]:
    """(a batch of every site, where the next batch begins), without end."""
    rows = _Rows(store, sites, seed, start)
    scales = [np.float32(store.scale(site)) for site in sites]
    while True:
        batches = tuple(torch.empty(batch_rows, store.width(site), pin_memory=how.pinned) for site in sites)
        arrays = [batch.numpy() for batch in batches]
        rows.skip(how.rank * batch_rows)
        filled = 0
        while filled < batch_rows:
            filled += rows.fill([array[filled:] for array in arrays])
        rows.skip((how.world - 1 - how.rank) * batch_rows)
        for array, scale in zip(arrays, scales, strict=True):
            np.divide(array, scale, out=array)
        yield batches, rows.position


class _Rows:
    """The rows of some sites in the order of a feed, taken any number at a time."""

    def __init__(self, store: "Store", sites: tuple[str, ...], seed: int, start: Position):
        self.store, self.sites, self.seed, self.position = store, sites, seed, start
        self._sizes = np.array(store.manifest.bucket_sizes, dtype=np.int64)
        self._stored: list[dict[str, np.ndarray]] = []  # of each site, the bucket being read
        self._ahead = np.empty(0, dtype=np.int64)  # rows of it still to come, in order

    def fill(self, out: list[np.ndarray]) -> int:
        """Copies as many rows to the heads of `out` as the present bucket still has, and says how many."""
        if not len(self._ahead):
            self._enter_bucket()
        chosen = self._ahead[: len(out[0])]
        for stored, values in zip(self._stored, out, strict=True):
            self._gather(stored, chosen, values[: len(chosen)])
        self._advance(len(chosen))
        return len(chosen)

    def skip(self, rows: int) -> None:
        """Passes over `rows` rows without reading them."""
        if rows:
            self._advance(rows)

    def _advance(self, rows: int) -> None:
        self._ahead = self._ahead[rows:]  # none are left where the place is in another bucket
        epochs, offset = divmod(self.position.offset + rows, self.store.rows)
        self.position = Position(self.position.epoch + epochs, offset)

    def _enter_bucket(self) -> None:
        epoch, offset = self.position.epoch, self.position.offset
        bucket, done = order.locate(self._sizes, self.seed, epoch, offset)
        self._stored = [self.store.stored(site, bucket) for site in self.sites]
        self._ahead = order.row_order(self.seed, epoch, bucket, int(self._sizes[bucket]))[done:]

    def _gather(
        self, stored: dict[str, np.ndarray], chosen: Int64[np.ndarray, " B"], out: Float[np.ndarray, "B D"]
    ) -> None:
        if self.store.manifest.dtype == "float32":
            np.take(stored[ROWS], chosen, axis=0, out=out, mode="clip")  # "raise" would buffer the copy
        else:
            decode({tensor: rows[chosen] for tensor, rows in stored.items()}, self.store.manifest.dtype, out)


def _state(store: "Store", of: dict[str, Any], seed: int, position: Position) -> dict[str, Any]:
    return {**of, "seed": seed, "rows": store.rows, "epoch": position.epoch, "offset": position.offset}


def _restored(state: dict[str, Any], mine: dict[str, Any]) -> Position:
    """The place in `state`. StoreError: it is not of a feed that says `mine` of itself."""
    if state.keys() != mine.keys():
        raise StoreError(f"A feed's state has {', '.join(mine)}, not {', '.join(map(str, state))}.")
    for name in mine.keys() - {"epoch", "offset"}:
        if state[name] != mine[name]:
            raise StoreError(
                f"The saved place is of a feed with {name} = {state[name]!r}; this one has {mine[name]!r}. "
                f"Resume with the store and the seed the run began with."
            )
    return Position(state["epoch"], state["offset"])
