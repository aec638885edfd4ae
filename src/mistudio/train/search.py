"""Searches of a batch for the entries of SAEs, by products of rounded numbers: the parts of `screen`, which says why
none is missed.

Features go through in blocks, each of them by one thread, which leaves candidates. Those of many blocks are decided
upon together: they gather rows of x, and where x is larger than a cache they do so from some of its columns after the
other, each read once.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mistudio.pages import empty
from mistudio.sae.code import FeatureCode, pointers
from mistudio.train import products, screen_kernels, vnni
from mistudio.train.threads import column_sums, in_ranges

U_BF16 = 2.0**-8
SLACK = 1e-5
"""By how much, relatively, thresholds are lowered and margins enlarged for the rounding of these themselves."""
CROWDED = {torch.int8: 0.03, torch.bfloat16: 0.15, torch.float32: 1.0}
"""The part of a block's entries that may be false candidates: with more, the next dtype is faster. A candidate costs as
much as 16 entries of the product in bfloat16."""
PENDING = 1 << 20
"""Candidates of a search that may wait to be decided upon, about."""
CACHED = 6 << 20
"""Numbers of x that a cache holds, about. Candidates gather rows of x: where it has more, from tiles of it."""
TILE = 640
"""Columns of such a tile, at most."""
ROUND = {
    torch.float32: screen_kernels.measure,
    torch.bfloat16: screen_kernels.round_bfloat16,
    torch.int8: screen_kernels.round_int8,
}


@dataclass(frozen=True)
class Query:
    """What is asked of a screen: the entries of z = (x - b_dec)·W_enc + b_enc with z > θ or |z - θ| < bandwidth/2."""

    b_enc: Tensor
    """[F]."""
    b_dec: Tensor | None
    """[D]; None where the encoder is not centred."""
    threshold: Tensor
    """[F]."""
    bandwidth: float


class Batch:
    """Rows of x [B, D], and how searches see them."""

    def __init__(self, x: Tensor):
        self.x, self._mean = x, (column_sums(x) / max(1, len(x))).nan_to_num_(0.0, 0.0, 0.0)
        self.seen: dict[torch.dtype, tuple[Tensor, Tensor]] = {}
        """x̃ [B, D], and the unit, kept and lost [3, B] of its rows; sums in float32 count as lost."""
        self.packed: np.ndarray | None = None
        """x̃ in int8 as `vnni` takes it, where this processor multiplies that way."""
        self._memory: dict[tuple[str, int], Tensor] = {}

    def centre(self, dtype: torch.dtype) -> Tensor:
        """c [D]; 0 in float32, where x is taken as it is."""
        return torch.zeros_like(self._mean) if dtype == torch.float32 else self._mean

    def see(self, dtypes: Iterable[torch.dtype]) -> None:
        """Rounds x to those dtypes to which it was not yet."""
        for dtype in set(dtypes) - self.seen.keys():
            rounded = self.x if dtype == torch.float32 else torch.empty_like(self.x, dtype=dtype)
            numbers, centre = self.x.new_empty(3, len(self.x)), self.centre(dtype)
            no_vectors = self.x[:0]
            in_ranges(_rounding(self.x, centre, no_vectors, rounded, numbers, numbers[:0]), len(self.x))
            _, kept, lost = numbers
            lost += 4 * _gamma(self.x.shape[1]) * (kept + lost + 2 * centre.norm())
            self.seen[dtype] = rounded, numbers
            if dtype == torch.int8 and vnni.multiplies(self.x.shape[1]):
                self.packed = vnni.packed(rounded)

    def memory(self, purpose: str, thread: int, n: int, width: int, dtype: torch.dtype) -> Tensor:
        """[n, width], the same memory for every block: new memory from the system costs a quarter of the product's time
        or more."""
        size, key = n * width * dtype.itemsize, (purpose, thread)
        if key not in self._memory or len(self._memory[key]) < size:
            self._memory[key] = empty((size,), torch.uint8)
        return self._memory[key][:size].view(dtype).view(n, width)

    def tiles(self) -> Iterator[tuple[int, np.ndarray]]:
        """(first column, some columns of x without gaps): all of x; where it is large, tile after tile in one memory.

        They depend on nothing but its shape, so that a z has the same bits in every search."""
        x, (B, D) = self.x.numpy(), self.x.shape
        if B * D <= CACHED:
            yield 0, x
            return
        width = -(-D // -(-D // TILE))
        memory = np.empty(B * width, x.dtype)
        for first in range(0, D, width):
            columns = x[:, first : first + width]
            tile = memory[: columns.size].reshape(columns.shape)
            in_ranges(functools.partial(_copy, columns, tile), B)
            yield first, tile


class Search:
    """A query about a batch, and what was found so far."""

    def __init__(self, W: Tensor, query: Query, batch: Batch, dtype: torch.dtype, widened: float):
        """W [F, D]: W_enc with features first. dtype: what products are made in. widened: what margins are multiplied
        by."""
        self.W, self.query, self.batch, self.dtype, self.widened = W, query, batch, dtype, widened
        self.taken = 0
        """Features that blocks were made of."""
        self.crowded = False
        """Whether a block had too many false candidates for this dtype."""
        self.pending: list[tuple[_Part, tuple[np.ndarray, np.ndarray, np.ndarray]]] = []
        """Parts and their candidates (rows, guesses, candidates of each feature), not decided upon, in any order."""
        self.found: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        """(rows, values, entries of each feature)."""
        self.distrusted: torch.dtype | None = None
        """That in which a product was outside its bound."""

    @property
    def left(self) -> bool:
        """Whether there are features that were not looked at."""
        return self.taken < len(self.W)

    @property
    def full(self) -> bool:
        """Whether candidates should be decided upon before others are looked for."""
        return self.crowded or sum(len(found[0]) for _, found in list(self.pending)) > PENDING

    def take(self, part: "_Part", found: tuple[np.ndarray, np.ndarray, np.ndarray], by_margin: int) -> None:
        """Keeps a part's candidates, `by_margin` of which are false."""
        self.pending.append((part, found))
        if by_margin > CROWDED[self.dtype] * len(part) * len(self.batch.x):
            self.crowded = True

    def go_on(self, dtype: torch.dtype) -> None:
        """With what is left in another dtype."""
        self.dtype, self.crowded = dtype, False

    def decide(self) -> None:
        """Computes z of all candidates that are pending, tile by tile of x, and keeps the entries among them."""
        if not self.pending:
            return
        pending = sorted(self.pending, key=lambda each: each[0].first)
        parts = [part for part, _ in pending]
        rows, guesses, counts = (np.concatenate([found[i] for _, found in pending]) for i in range(3))
        W = self.W[parts[0].first : parts[-1].last].numpy()
        ends, z = np.concatenate(([0], counts.cumsum())), np.zeros_like(guesses)
        for first, tile in self.batch.tiles():
            some = functools.partial(screen_kernels.add_products, tile, W, first, rows, ends, z)
            in_ranges(some, len(W))
        features = tuple(np.concatenate(several) for several in zip(*(part.deciding for part in parts), strict=True))
        _, kept, lost = self.batch.seen[self.dtype][1].numpy()
        half, u = (np.float32(n) for n in (self.query.bandwidth / 2, U_BF16 if self.dtype == torch.bfloat16 else 0))
        asked = ((rows, guesses, z, ends), features, (kept, lost), half, u)
        decided = in_ranges(lambda lo, hi: screen_kernels.decide(*asked, lo, hi), len(W))
        self.found += [d[:3] for d in decided]
        if any(d[3] for d in decided):
            self.distrusted = self.dtype
        self.pending = []

    def code(self) -> FeatureCode:
        """All entries."""
        rows, values, counts = (torch.cat([torch.from_numpy(f[i]) for f in self.found]) for i in range(3))
        return FeatureCode(values, rows, pointers(counts), len(self.batch.x))


class _Part:
    """The features [first, last) of a search, which lie together in a block."""

    def __init__(self, search: Search, first: int, last: int):
        self.search, self.first, self.last = search, first, last
        self.W = search.W[first:last]
        self.numbers = self.W.new_empty(3, last - first)
        self.dots = self.W.new_zeros(2, last - first)
        """c·w and b_dec·w."""
        self.deciding: tuple[np.ndarray, ...] = ()
        """What `screen_kernels.decide` is given of the features."""

    def __len__(self) -> int:
        return len(self.W)

    def round(self, out: Tensor) -> None:
        """W_enc of these features, rounded, in `out` [n, D]; and their products with vectors."""
        b_dec, centre = self.search.query.b_dec, self.search.batch.centre(self.search.dtype)
        vectors = torch.stack([centre] if b_dec is None else [centre, b_dec.detach()])
        _rounding(self.W, torch.zeros_like(centre), vectors, out, self.numbers, self.dots)(0, len(self))

    def find(self, look: Callable[..., tuple[Any, ...]]) -> None:
        """The candidates among these features; look: `screen_kernels.candidates` of their product with x̃."""
        search, place = self.search, slice(self.first, self.last)
        shift, along = self.dots
        threshold, bias = search.query.threshold[place].detach(), search.query.b_enc[place].detach() - along
        cut, near, far = self._margins(threshold, bias, shift)
        self.deciding = tuple(t.numpy() for t in (bias, threshold, near, far, shift))
        rows = tuple(t.numpy() for t in search.batch.seen[search.dtype][1])
        features = tuple(t.numpy() for t in (self.numbers[0], cut, near, far))
        *found, by_margin = look(rows, features)
        search.take(self, tuple(found), by_margin)

    def _margins(self, threshold: Tensor, bias: Tensor, shift: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(cut, near, far), each [n]: a candidate has product + near_j·kept_b + far_j·lost_b ≥ cut_j."""
        (_, kept, lost), bandwidth = self.numbers, self.search.query.bandwidth
        at = threshold - bandwidth / 2 - bias - shift
        sizes = threshold.abs() + bandwidth + bias.abs() + shift.abs()
        cut = at - SLACK * sizes - float(screen_kernels.TINY)
        enlarged = (1 + 2 * _gamma(self.W.shape[1]) + SLACK) * self.search.widened
        near, far = lost * enlarged, (kept + lost) * enlarged
        if self.search.dtype == torch.bfloat16:
            return cut - U_BF16 * cut.abs(), near * (1 + U_BF16), far * (1 + U_BF16)
        return cut, near, far


def blocks(searches: Sequence[Search], width: int) -> Iterator[list[_Part]]:
    """All features of all searches, about `width` at a time; those of a block are multiplied in one dtype."""
    block: list[_Part] = []
    for search in searches:
        while search.left:
            room = width - sum(map(len, block))
            if block and (room <= 0 or search.dtype != block[0].search.dtype or search.dtype == torch.float32):
                yield block
                block = []
                continue
            part = _Part(search, search.taken, min(search.taken + room, len(search.W)))
            block.append(part)
            search.taken = part.last
    if block:
        yield block


def look_through(block: list[_Part], batch: Batch, thread: int) -> None:
    """Multiplies a block of `blocks` with x̃ and finds its candidates, in that thread's memory."""
    dtype, sizes = block[0].search.dtype, [len(part) for part in block]
    W, whole = block[0].W, torch.int32 if dtype == torch.int8 else dtype
    if dtype != torch.float32:
        W = batch.memory("rounded", thread, sum(sizes), W.shape[1], dtype)
    for part, rows in zip(block, W.split(sizes), strict=True):
        part.round(rows)
    if dtype == torch.int8 and batch.packed is not None:
        for part, rows in zip(block, W.split(sizes), strict=True):
            part.find(functools.partial(vnni.candidates, rows.numpy(), batch.packed))
        return
    out = batch.memory("product", thread, len(W), len(batch.x), whole)
    product = products.multiply(W, batch.seen[dtype][0], out)
    for part, lines in zip(block, product.split(sizes), strict=True):
        part.find(functools.partial(screen_kernels.candidates, _as_numpy(lines)))


def _rounding(
    rows: Tensor, centre: Tensor, vectors: Tensor, out: Tensor, numbers: Tensor, along: Tensor
) -> Callable[[int, int], None]:
    """A function that rounds a range of rows less `centre` to the dtype of `out` and fills `numbers` [3, n] for it, and
    `along` [k, n] with the products of rows and `vectors` [k, D]."""
    given = [t.numpy() for t in (rows.detach(), centre, vectors)]
    given += [] if out.dtype == torch.float32 else [_as_numpy(out)]
    unit, kept, lost = numbers.numpy()
    kernel = ROUND[out.dtype]
    return lambda lo, hi: kernel(*given, lo, hi, unit, kept, lost, along.numpy())


def _copy(source: np.ndarray, target: np.ndarray, lo: int, hi: int) -> None:
    target[lo:hi] = source[lo:hi]


def _gamma(D: int) -> float:
    return D * 2.0**-24 / (1 - D * 2.0**-24)


def _as_numpy(tensor: Tensor) -> np.ndarray:
    """Its numbers, or the bits of its bfloat16 ones."""
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
