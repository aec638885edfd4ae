"""A feed without a store: rows come from a source as they are made, through a buffer of N rows in memory.

The rows of the source are shuffled in blocks of N, uniformly, as a store shuffles its buckets, and each comes exactly
once. While block k goes out in its permuted order, row i of block k+1 takes the slot that the i-th row out of block k
has left: N rows of memory hold what is left of one block and what has come of the next, and a row is copied once in
and once out. The rows out are a function of (source, seed, N) alone, so a place is the number of rows taken; going back
to it reads at most 2 N rows of the source again, from the beginning of its block.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from mistudio.errors import StoreError
from mistudio.store import order
from mistudio.store.statistics import column_sums

Source = Callable[[int], Iterator[Float[Tensor, "B D"]]]
"""The first row wanted -> that row and all after it, in pieces of any size, the same ones at every call."""


class RingFeed:
    """Endless batches x/C [batch_rows, D], float32, with the interface of a store's `Feed`.

    C and the mean are those of the first block, in float64: the source is not known further. They are read when first
    asked for; `state` has C, so that a restored feed does not read the first block again.
    """

    def __init__(
        self,
        source: Source,
        *,
        site: str,
        width: int,
        buffer_rows: int,
        batch_rows: int,
        seed: int,
        settings: dict[str, Any],
    ):
        """settings: plain data that says what the source is; compared on restore."""
        for name, count in (("buffer_rows", buffer_rows), ("batch_rows", batch_rows)):
            if count < 1:
                raise StoreError(f"{name} = {count}, but at least 1 is needed.")
        order.check_seed(seed)
        self.site, self.width, self.buffer_rows, self.batch_rows, self.seed = site, width, buffer_rows, batch_rows, seed
        self.taken = 0
        """Rows given so far."""
        self._source, self._settings = source, settings
        self._scale: float | None = None
        self._mean: Tensor | None = None
        self._incoming: _Incoming | None = None  # None: the buffer does not hold what it should at `taken`
        self._buffer = np.empty((0, width), dtype=np.float32)
        self._slots = self._next_slots = self._order = np.empty(0, dtype=np.int64)

    @property
    def scale(self) -> float:
        """C with E||x/C||^2 = 1 over the first block."""
        if self._scale is None:
            self._measure()
        assert self._scale is not None
        return self._scale

    @property
    def mean(self) -> Float32[Tensor, " D"]:
        """E[x] in raw units over the first block."""
        if self._mean is None:
            self._measure()
        assert self._mean is not None
        return self._mean

    def __iter__(self) -> Iterator[Float32[Tensor, "B D"]]:
        return self

    def __next__(self) -> Float32[Tensor, "B D"]:
        scale = np.float32(self.scale)
        if self._incoming is None:
            self._fill()
        batch, place = np.empty((self.batch_rows, self.width), dtype=np.float32), self.taken
        filled = 0
        try:
            while filled < self.batch_rows:
                filled += self._exchange(batch[filled:])
        except BaseException:  # raised again: the rows of a batch that was not given are still to come
            self.taken, self._incoming = place, None
            raise
        np.divide(batch, scale, out=batch)
        return torch.from_numpy(batch)

    def state(self) -> dict[str, Any]:
        """Plain data from which `restore` goes on with the row that would have come next."""
        mine = {"site": self.site, "seed": self.seed, "buffer_rows": self.buffer_rows, "settings": self._settings}
        return {**mine, "taken": self.taken, "scale": self.scale}

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on where `state` was taken; the buffer is filled when the next batch is asked for.

        StoreError: it is of another site, seed, buffer or source, or not a state at all.
        """
        names = ("site", "seed", "buffer_rows", "settings", "taken", "scale")
        if state.keys() != set(names):
            raise StoreError(f"The state of a feed without a store has {', '.join(names)}, not {', '.join(state)}.")
        mine = {"site": self.site, "seed": self.seed, "buffer_rows": self.buffer_rows, **self._settings}
        theirs = {**state, **state["settings"]}
        for name in mine:
            if theirs.get(name) != mine[name]:
                raise StoreError(
                    f"The saved place is of a feed with {name} = {theirs.get(name)!r}; this one has {mine[name]!r}. "
                    f"Resume with the settings the run began with."
                )
        if state["taken"] < 0 or not (math.isfinite(state["scale"]) and state["scale"] > 0):
            raise StoreError(f"taken = {state['taken']} and scale = {state['scale']} are not the state of a feed.")
        self._incoming = None
        self.taken, self._scale = state["taken"], state["scale"]

    def _measure(self) -> None:
        """Scale and mean of the first block. At the beginning the buffer is then filled for the first batch too."""
        before = self.taken
        if before or self._incoming is None:
            self._incoming = None
            self.taken = 0
            self._fill()
        total, squares = column_sums(torch.from_numpy(self._buffer)) / self.buffer_rows
        self._mean = total.float()
        if self._scale is None:
            self._scale = math.sqrt(squares.sum().item())
            if self._scale == 0:
                raise StoreError(f"The first {self.buffer_rows:,} rows of {self.site} are zero: nothing to scale by.")
        if before:
            self._incoming = None
            self.taken = before

    def _fill(self) -> None:
        """The buffer is what it was when `taken` rows had been given."""
        block, gone = divmod(self.taken, self.buffer_rows)
        self._incoming = _Incoming(self._source(block * self.buffer_rows), self.site, block * self.buffer_rows)
        self._buffer = np.empty((self.buffer_rows, self.width), dtype=np.float32)
        self._slots, self._next_slots = np.arange(self.buffer_rows), np.empty(self.buffer_rows, dtype=np.int64)
        self._order = order.row_order(self.seed, 0, block, self.buffer_rows)
        self._incoming.put(self._buffer, self._slots)
        self._replace(self._slots[self._order[:gone]], 0)

    def _exchange(self, out: Float[np.ndarray, "B D"]) -> int:
        """Rows of the present block to the head of `out`, and as many of the next block into their slots."""
        block, gone = divmod(self.taken, self.buffer_rows)
        slots = self._slots[self._order[gone : gone + len(out)]]
        np.take(self._buffer, slots, axis=0, out=out[: len(slots)], mode="clip")
        self._replace(slots, gone)
        self.taken += len(slots)
        if gone + len(slots) == self.buffer_rows:
            self._slots, self._next_slots = self._next_slots, self._slots
            self._order = order.row_order(self.seed, 0, block + 1, self.buffer_rows)
        return len(slots)

    def _replace(self, slots: Int64[np.ndarray, " B"], first: int) -> None:
        """Rows first ... first+B-1 of the next block are in `slots`."""
        assert self._incoming is not None
        self._incoming.put(self._buffer, slots)
        self._next_slots[first : first + len(slots)] = slots


class _Incoming:
    """Rows of a source, put where they are wanted."""

    def __init__(self, pieces: Iterator[Tensor], site: str, first: int):
        self._pieces = pieces
        self._site, self._row = site, first
        self._piece = np.empty((0, 0), dtype=np.float32)

    def put(self, buffer: Float[np.ndarray, "N D"], slots: Int64[np.ndarray, " B"]) -> None:
        """The next B rows are in these slots. StoreError: one is not finite, or the source has ended."""
        done = 0
        while done < len(slots):
            if not len(self._piece):
                self._piece = self._next_piece()
            count = min(len(slots) - done, len(self._piece))
            buffer[slots[done : done + count]] = self._piece[:count]
            self._piece = self._piece[count:]
            done += count
            self._row += count

    def _next_piece(self) -> np.ndarray:
        piece = next(self._pieces, None)
        if piece is None:
            raise StoreError(f"The source of {self._site} ended after {self._row:,} rows, but it must be endless.")
        finite = torch.isfinite(piece).all(1)
        if not finite.all():
            row = self._row + int((~finite).nonzero()[0])
            raise StoreError(
                f"{self._site} has NaN or infinite values in row {row:,}. Load the model in a number type with a "
                f"larger range, such as --dtype float32."
            )
        return piece.detach().to("cpu", torch.float32).numpy()
