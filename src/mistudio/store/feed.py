"""Endless shuffled batches from a store, made ahead in a thread, that resume exactly.

A place in a feed is a `Position`, two numbers; where a batch begins is a function of the batches taken, not of those
made ahead. With `world` trainers, rank r gets the r-th part of each batch that one trainer would have got of
`world * batch_rows` rows: the position is the same on all ranks, and a run can go on with another number of them.
"""

import weakref
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Protocol

import numpy as np
import torch
from jaxtyping import Float32
from torch import Tensor

from mistudio.errors import StoreError
from mistudio.store import order
from mistudio.store.background import Ahead
from mistudio.store.gather import Batches, default_threads, gather, row_order, row_order_ahead

if TYPE_CHECKING:
    from mistudio.store.reader import Store
    from mistudio.store.shard import Mapped


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
    threads: int | None = None
    """Threads that copy rows into batches; None: as many as torch uses, at most 4."""
    pinned: bool = False
    """Batches in page-locked memory, from which a GPU copies without waiting."""

    def __post_init__(self) -> None:
        if self.prefetch < 0:
            raise StoreError(f"prefetch = {self.prefetch}, but it is a number of batches from 0.")
        if self.threads is not None and self.threads < 1:
            raise StoreError(f"threads = {self.threads}, but at least 1 is needed.")
        if not 0 <= self.rank < self.world:
            raise StoreError(f"rank = {self.rank} of world = {self.world}, but ranks are 0 to world - 1.")
        if self.pinned and not torch.cuda.is_available():
            raise StoreError("pinned=True needs a CUDA GPU, and there is none here. Leave it out.")


class RowSource(Protocol):
    """What a feed needs of a store: of one on this machine's disk, or behind a feed server."""

    @property
    def rows(self) -> int:
        """Number of rows, the same for every site."""

    def batches(
        self, sites: tuple[str, ...], batch_rows: int, *, seed: int, start: Position, how: FeedOptions
    ) -> Iterator[tuple[tuple[Float32[Tensor, "B _"], ...], Position]]:
        """(A batch of every site, where the next one begins), without end."""


START: Final = Position(0, 0)
BUCKETS_AHEAD: Final = 1
"""Buckets that are fetched, read from the disk and checked while rows of the present one are taken."""
DEFAULTS: Final = FeedOptions()
STOP_WAIT_S: Final = 1.0
"""How long the end of a feed, or a seek, waits for its thread."""


class JointFeed:
    """Endless tuples of batches x/C [batch_rows, D], float32, one a site, rows of the same tokens in the same order.

    Every row comes exactly once an epoch, batches running on over bucket and epoch ends. The division is in float32, by
    C rounded from float64. The order is a function of (store, seed); `state` and `restore` are O(number of buckets) and
    continue it exactly, with any batch size. Rows are gathered from the page cache through a memory map, a bucket at a
    time and the next one read ahead: where two buckets fit into free memory, each is read from the disk once an epoch,
    from its beginning to its end.
    """

    def __init__(
        self,
        store: RowSource,
        sites: tuple[str, ...],
        batch_rows: int,
        *,
        seed: int,
        start: Position,
        how: FeedOptions,
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
        batches = self.store.batches(self.sites, self.batch_rows, seed=self.seed, start=self.position, how=self.how)
        if self.how.prefetch == 0:
            return batches
        ahead = Ahead(batches, self.how.prefetch)
        # nothing in the thread refers to this feed; one that runs on while the interpreter ends would abort the process
        self._stop_thread = weakref.finalize(self, ahead.stop, STOP_WAIT_S)
        return ahead

    def _checked(self, position: Position) -> Position:
        if position.epoch < 0 or not 0 <= position.offset < self.store.rows:
            raise StoreError(f"{position} is not in a store of {self.store.rows:,} rows: offset is from 0 to rows - 1.")
        return position


class Feed:
    """Endless batches x/C [batch_rows, D] of one site, float32; everything else as `JointFeed` says."""

    def __init__(self, store: RowSource, site: str, batch_rows: int, *, seed: int, start: Position, how: FeedOptions):
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


def local_batches(
    store: "Store", sites: tuple[str, ...], batch_rows: int, seed: int, start: Position, how: FeedOptions
) -> Iterator[tuple[tuple[Tensor, ...], Position]]:
    """(a batch of every site, where the next batch begins), without end."""
    rows = _Rows(store, sites, seed, start, how.threads or default_threads())
    memory = [Batches(batch_rows, store.width(site), how.prefetch + 3) for site in sites]
    while True:
        if how.pinned:
            batches = tuple(torch.empty(batch_rows, store.width(site), pin_memory=True) for site in sites)
        else:
            batches = tuple(of_site.take() for of_site in memory)
        arrays = [batch.numpy() for batch in batches]
        rows.skip(how.rank * batch_rows)
        filled = 0
        while filled < batch_rows:
            filled += rows.fill([array[filled:] for array in arrays])
        rows.skip((how.world - 1 - how.rank) * batch_rows)
        del arrays
        yield batches, rows.position
        del batches  # so that the memory may be used again as soon as it is given back


class _Rows:
    """The rows of some sites in the order of a feed, taken any number at a time."""

    def __init__(self, store: "Store", sites: tuple[str, ...], seed: int, start: Position, threads: int):
        self.store, self.sites, self.seed, self.position, self.threads = store, sites, seed, start, threads
        self._scales = [np.float32(store.scale(site)) for site in sites]
        self._sizes = np.array(store.manifest.bucket_sizes, dtype=np.int64)
        self._mapped: list[dict[str, Mapped]] = []  # of each site, the bucket being read
        self._ahead = np.empty(0, dtype=np.int64)  # rows of it still to come, in order
        self._orders: dict[tuple[int, int], Future[np.ndarray]] = {}  # (epoch, bucket) -> its order

    def fill(self, out: list[np.ndarray]) -> int:
        """Copies as many rows, over C, to the heads of `out` as the present bucket still has, and says how many.

        StoreError: a shard of it was cut since it was mapped (`Mapped.uncut`).
        """
        if not len(self._ahead):
            self._enter_bucket()
        chosen = self._ahead[: len(out[0])]
        dtype = self.store.manifest.dtype
        for mapped, scale, values in zip(self._mapped, self._scales, out, strict=True):
            stored = {tensor: of_tensor.rows for tensor, of_tensor in mapped.items()}
            with ExitStack() as uncut:
                for of_tensor in mapped.values():
                    uncut.enter_context(of_tensor.uncut())
                gather(stored, dtype, chosen, scale, values[: len(chosen)], self.threads)
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
        size = int(self._sizes[bucket])
        self._mapped = []  # the last bucket may leave memory
        self.store.expect(self.sites, [bucket])  # the first of a feed was not announced yet
        self._mapped = [self.store.mapped(site, bucket) for site in self.sites]
        ahead = self._orders.pop((epoch, bucket), None)
        self._look_ahead(size - done)  # not before: two files at a time come slower from a cold disk than one by one
        self._ahead = (row_order(self.seed, epoch, bucket, size) if ahead is None else ahead.result())[done:]

    def _look_ahead(self, left: int) -> None:
        """What the buckets after the `left` rows of this one need is begun: reading them, and with several threads
        their order."""
        self._orders.clear()
        place, buckets = self.position, []
        for _ in range(min(BUCKETS_AHEAD, len(self._sizes) - 1)):
            epochs, offset = divmod(place.offset + left, self.store.rows)
            place = Position(place.epoch + epochs, offset)
            bucket, _ = order.locate(self._sizes, self.seed, place.epoch, place.offset)
            left = int(self._sizes[bucket])
            buckets.append(bucket)
            if self.threads > 1:
                begun = row_order_ahead(self.seed, place.epoch, bucket, left, self.threads)
                self._orders[place.epoch, bucket] = begun
        self.store.expect(self.sites, buckets)


def _state(store: RowSource, of: dict[str, Any], seed: int, position: Position) -> dict[str, Any]:
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
