"""The entries of a batch found by a product of rounded numbers: `sae.code.select`, screened.

The encoder product is all that is left of a step's five, so it is done on int8 or bfloat16 where the machine multiplies
those faster, and only to find candidates: z of every candidate is computed again in float32, and that z decides. A
margin makes sure that no entry is missed. With x̃, w̃ the rounded row of x and column of W_enc, and eₓ, e_w what was
rounded off, Cauchy and Schwarz give

    |x·w - x̃·w̃| ≤ ‖x̃‖‖e_w‖ + ‖eₓ‖(‖w̃‖ + ‖e_w‖)

where all four norms are measured, not bounded by the unit roundoff, which would be three times as much. What the rows
have in common need not be rounded: x is centred on the batch's mean c, and c·w is added as a number in float32, so that
x̃ + eₓ = x - c. Sums of D products in float32, in any order, err by at most γ‖x‖‖w‖ with γ = D·2⁻²⁴/(1 - D·2⁻²⁴), once
in the product (in int8 it is exact), once in c·w and once in the z that decides. So the margin is

    ‖x̃_b‖·‖e_w‖ + (‖eₓ_b‖ + 4γ(‖x̃_b‖ + ‖eₓ_b‖ + 2‖c‖))·(‖w̃‖ + ‖e_w‖)

a little enlarged for its own rounding. A product in bfloat16 comes back rounded to it: a true value t or more is then
t - u|t| or more, u = 2⁻⁸.

int8 has a scale for each row, the largest number being 127. Its margin is about seven times that of bfloat16 where
numbers are spread like normal ones, and leaves a few times as many candidates as entries, which costs less than it
saves. Where a few numbers are far larger than the others it leaves too many: then the next dtype does the rest of the
batch and the batches that follow, and int8 is tried again later.

The bound presumes sums in float32, as oneDNN and BLAS do them. Every candidate is a test of that: if one z lies farther
from its product than the margin allows, that dtype is not used again, and a warning says so; after float32 every z is
computed.

W_enc is rounded block by block where it is multiplied, which is quick beside the product. So there is no copy of it to
keep, and a block may hold features of several SAEs. Candidates of all blocks are decided upon together: they gather
rows of x, and where x is larger than a cache they do so from some of its columns after the other, each read once.
"""

import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mistudio.sae.code import FeatureCode, pointers
from mistudio.train import kernels, products, screen_kernels

BLOCK_ENTRIES = 1 << 22
"""Entries of [F, B] that exist at once."""
BLOCK_FEATURES = 1 << 13
"""Rounded rows of W_enc that exist at once, at most."""
SCREEN_UNIT = 64
"""Features of a block that one thread takes at a time."""
U_BF16 = 2.0**-8
SLACK = 1e-5
"""By how much, relatively, thresholds are lowered and margins enlarged for the rounding of these themselves."""
CROWDED = {torch.int8: 0.03, torch.bfloat16: 0.15, torch.float32: 1.0}
"""The part of a block's entries that may be false candidates: with more, the next dtype is faster. A candidate costs as
much as 16 entries of the product in bfloat16."""
PENDING = 1 << 20
"""Candidates of a search that may wait to be decided upon."""
CACHED = 6 << 20
"""Numbers of x that a cache holds, about. Candidates gather rows of x: where it has more, from tiles of it."""
TILE = 640
"""Columns of such a tile, at most."""
DECIDE_UNIT = 256
"""Features whose candidates one thread decides upon at a time."""
REST = 50
"""Batches after which a dtype that was crowded is tried again."""
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


class Screen:
    """Finds a batch's entries by a product of rounded numbers; the result does not depend on how they are rounded."""

    def __init__(self, W: Tensor, dtype: torch.dtype | None = None):
        """W [F, D] float32: W_enc with features first, kept by reference."""
        assert W.dtype == torch.float32, f"screening computes in float32, not {W.dtype}"
        self.W = W
        self.dtypes = list(products.fast_dtypes(W.shape[1])) if dtype is None else [dtype]
        """From fast to accurate."""
        self.widened = 1.0
        """What margins are multiplied by."""
        self.level, self.rest = 0, 0
        """Which of them a batch begins with, and for how many batches if it is not the first."""

    def refresh(self, touched: Tensor) -> None:
        """W changed in the rows of these features: nothing to do here, where they are rounded for every batch."""

    def select(
        self, x: Tensor, b_enc: Tensor, b_dec: Tensor | None, threshold: Tensor, bandwidth: float
    ) -> FeatureCode:
        """`sae.code.select` with bias = b_enc - b_dec·W_enc (b_dec None: b_enc)."""
        return select_many([self], x, [Query(b_enc, b_dec, threshold, bandwidth)])[0]

    def begin(self) -> torch.dtype:
        """The dtype of the next batch's first block."""
        self.rest -= 1
        if self.rest <= 0:
            self.level = 0
        return self.dtypes[self.level]

    def refine(self, dtype: torch.dtype) -> torch.dtype:
        """What to go on with where this one left too many candidates: the next, if there is one."""
        level = self.dtypes.index(dtype) + 1
        if level == len(self.dtypes):
            return dtype
        self.level, self.rest = level, REST
        return self.dtypes[level]

    def distrust(self, dtype: torch.dtype) -> None:
        """A product in this dtype was not what the bound presumes: it is not used again."""
        self.dtypes, self.level = [d for d in self.dtypes if d != dtype] or [torch.float32], 0
        instead = f"screening goes on in {str(self.dtypes[0]).removeprefix('torch.')}, which is slower"
        if dtype == torch.float32:
            instead = "every entry is computed by itself, which is very slow (is float32_matmul_precision lowered?)"
            self.widened = torch.inf
        warnings.warn(f"This machine's matrix product is less accurate than float32 sums; {instead}.", stacklevel=2)


def select_many(screens: Sequence[Screen], x: Tensor, queries: Sequence[Query]) -> list[FeatureCode]:
    """What each screen's `select` finds in the same batch x [B, D], to the bit, for less.

    All have x's width D; F and queries may differ. x is rounded and measured once, and the SAEs are multiplied with it
    in blocks that do not end where one of them does.
    """
    batch = _Batch(x.detach().contiguous())
    searches = [_Search(*each, batch) for each in zip(screens, queries, strict=True)]
    for parts in _blocks(searches, min(max(kernels.UNIT, BLOCK_ENTRIES // max(1, len(x))), BLOCK_FEATURES)):
        _look_through(parts, batch)
    return [search.code() for search in searches]


def _look_through(parts: "list[_Part]", batch: "_Batch") -> None:
    """Multiplies a block and finds its candidates."""
    dtype, sizes = parts[0].dtype, [len(part) for part in parts]
    W, whole = parts[0].W, torch.int32 if dtype == torch.int8 else dtype
    if dtype != torch.float32:
        W = batch.memory("rounded", sum(sizes), W.shape[1], dtype)
    for part, rows in zip(parts, W.split(sizes), strict=True):
        part.round(rows)
    product = products.multiply(W, batch.seen_in(dtype)[0], batch.memory("product", len(W), len(batch.x), whole))
    for part, lines in zip(parts, product.split(sizes), strict=True):
        part.find(lines)


class _Batch:
    """Rows of x [B, D], and how screens see them."""

    def __init__(self, x: Tensor):
        self.x, self._mean = x, x.mean(0).nan_to_num_(0.0, 0.0, 0.0) if len(x) else x.new_zeros(x.shape[1])
        self._seen: dict[torch.dtype, tuple[Tensor, Tensor]] = {}
        self._memory: dict[str, Tensor] = {}

    def centre(self, dtype: torch.dtype) -> Tensor:
        """c [D]; 0 in float32, where x is taken as it is."""
        return torch.zeros_like(self._mean) if dtype == torch.float32 else self._mean

    def seen_in(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """x̃ [B, D], and the unit, kept and lost [3, B] of its rows; sums in float32 count as lost."""
        if dtype not in self._seen:
            rounded = self.x if dtype == torch.float32 else torch.empty_like(self.x, dtype=dtype)
            numbers, centre = self.x.new_empty(3, len(self.x)), self.centre(dtype)
            kernels.in_ranges(_rounding(self.x, centre, rounded, numbers), len(self.x))
            _, kept, lost = numbers
            lost += 4 * _gamma(self.x.shape[1]) * (kept + lost + 2 * centre.norm())
            self._seen[dtype] = rounded, numbers
        return self._seen[dtype]

    def memory(self, purpose: str, n: int, width: int, dtype: torch.dtype) -> Tensor:
        """[n, width], the same memory for every block: new memory from the system costs a quarter of the product's time
        or more."""
        size = n * width * dtype.itemsize
        if purpose not in self._memory or len(self._memory[purpose]) < size:
            self._memory[purpose] = torch.empty(size, dtype=torch.uint8)
        return self._memory[purpose][:size].view(dtype).view(n, width)

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
            kernels.in_ranges(functools.partial(_copy, columns, tile), B, DECIDE_UNIT)
            yield first, tile


class _Search:
    """A screen's query about a batch, and what was found so far."""

    def __init__(self, screen: Screen, query: Query, batch: _Batch):
        self.screen, self.query, self.batch = screen, query, batch
        self.dtype = screen.begin()
        self.pending: list[tuple[_Part, list[tuple[np.ndarray, np.ndarray, np.ndarray, int]]]] = []
        """Parts whose candidates were found, in this dtype, but not decided upon."""
        self.found: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        """(rows, values, entries of each feature)."""
        self.distrusted: torch.dtype | None = None

    def take(self, part: "_Part", found: list[tuple[np.ndarray, np.ndarray, np.ndarray, int]]) -> None:
        """Keeps a part's candidates, and changes the dtype for the next where this was too coarse."""
        self.pending.append((part, found))
        if sum(f[3] for f in found) > CROWDED[self.dtype] * len(part) * len(self.batch.x):
            self.decide()
            self.dtype = self.screen.refine(self.dtype)
        elif sum(len(f[0]) for _, several in self.pending for f in several) > PENDING:
            self.decide()

    def decide(self) -> None:
        """Computes z of all candidates that are pending, tile by tile of x, and keeps the entries among them."""
        if not self.pending:
            return
        parts = [part for part, _ in self.pending]
        found = [f for _, several in self.pending for f in several]
        rows, guesses, counts = (np.concatenate([f[i] for f in found]) for i in range(3))
        W = self.screen.W[parts[0].place.start : parts[-1].place.stop].numpy()
        ends = np.concatenate(([0], counts.cumsum()))
        z = np.zeros_like(guesses)
        for first, tile in self.batch.tiles():
            some = functools.partial(screen_kernels.add_products, tile, W, first, rows, ends, z)
            kernels.in_ranges(some, len(W), DECIDE_UNIT)
        features = tuple(np.concatenate(several) for several in zip(*(part.deciding for part in parts), strict=True))
        _, kept, lost = self.batch.seen_in(self.dtype)[1].numpy()
        half, u = (np.float32(n) for n in (self.query.bandwidth / 2, U_BF16 if self.dtype == torch.bfloat16 else 0))
        asked = ((rows, guesses, z, ends), features, (kept, lost), half, u)
        decided = kernels.in_ranges(lambda lo, hi: screen_kernels.decide(*asked, lo, hi), len(W), DECIDE_UNIT)
        self.found += [d[:3] for d in decided]
        if any(d[3] for d in decided):
            self.distrusted = self.dtype
        self.pending = []

    def code(self) -> FeatureCode:
        """All entries; searched for again if a candidate was outside its bound."""
        self.decide()
        if self.distrusted is not None:
            self.screen.distrust(self.distrusted)
            return select_many([self.screen], self.batch.x, [self.query])[0]
        rows, values, counts = (torch.cat([torch.from_numpy(f[i]) for f in self.found]) for i in range(3))
        return FeatureCode(values, rows, pointers(counts), len(self.batch.x))


class _Part:
    """The features [first, last) of a search, which lie together in a block."""

    def __init__(self, search: _Search, first: int, last: int):
        self.search, self.dtype, self.place = search, search.dtype, slice(first, last)
        self.W = search.screen.W[self.place]
        self.numbers = self.W.new_empty(3, last - first)
        self.along, self.shift = self.W.new_zeros(2, last - first)
        """b_dec·w and c·w."""
        self.deciding: tuple[np.ndarray, ...] = ()
        """What `screen_kernels.decide` is given of the features."""

    def __len__(self) -> int:
        return len(self.W)

    def round(self, out: Tensor) -> None:
        """W_enc of these features, rounded, in `out` [n, D]; and their products with vectors."""
        b_dec, centre = self.search.query.b_dec, self.search.batch.centre(self.dtype)
        some, W = _rounding(self.W, torch.zeros_like(centre), out, self.numbers), self.W.numpy()
        given = [(centre.numpy(), self.shift.numpy())]
        if b_dec is not None:
            given.append((b_dec.detach().numpy(), self.along.numpy()))

        def all_three(lo: int, hi: int) -> None:
            for vector, dots in given:
                screen_kernels.along(W, vector, lo, hi, dots)
            some(lo, hi)

        kernels.in_ranges(all_three, len(self))

    def find(self, product: Tensor) -> None:
        """The candidates among these features, whose product with x̃ is given [n, B]."""
        query, batch = self.search.query, self.search.batch
        threshold, bias = query.threshold[self.place].detach(), query.b_enc[self.place].detach() - self.along
        cut, near, far = self._margins(threshold, bias)
        self.deciding = tuple(t.numpy() for t in (bias, threshold, near, far, self.shift))
        rows = tuple(t.numpy() for t in batch.seen_in(self.dtype)[1])
        given = (_as_numpy(product), rows, tuple(t.numpy() for t in (self.numbers[0], cut, near, far)))
        found = kernels.in_ranges(lambda lo, hi: screen_kernels.candidates(*given, lo, hi), len(self), SCREEN_UNIT)
        self.search.take(self, found)

    def _margins(self, threshold: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(cut, near, far), each [n]: a candidate has product + near_j·kept_b + far_j·lost_b ≥ cut_j."""
        (_, kept, lost), bandwidth = self.numbers, self.search.query.bandwidth
        at = threshold - bandwidth / 2 - bias - self.shift
        sizes = threshold.abs() + bandwidth + bias.abs() + self.shift.abs()
        cut = at - SLACK * sizes - float(screen_kernels.TINY)
        enlarged = (1 + 2 * _gamma(self.W.shape[1]) + SLACK) * self.search.screen.widened
        near, far = lost * enlarged, (kept + lost) * enlarged
        if self.dtype == torch.bfloat16:
            return cut - U_BF16 * cut.abs(), near * (1 + U_BF16), far * (1 + U_BF16)
        return cut, near, far


def _blocks(searches: list[_Search], width: int) -> Iterator[list[_Part]]:
    """All features of all searches, about `width` at a time; those of a block are multiplied in one dtype."""
    block: list[_Part] = []
    for search in searches:
        first, F = 0, len(search.screen.W)
        while first < F:
            room = width - sum(map(len, block))
            if block and (room <= 0 or search.dtype != block[0].dtype or search.dtype == torch.float32):
                yield block
                block = []
                continue
            last = min(first + room, F)
            block.append(_Part(search, first, last))
            first = last
    if block:
        yield block


def _rounding(rows: Tensor, centre: Tensor, out: Tensor, numbers: Tensor) -> Callable[[int, int], None]:
    """A function that rounds a range of rows less `centre` to the dtype of `out` and fills `numbers` [3, n] for it."""
    given = [t.numpy() for t in (rows.detach(), centre)] + ([] if out.dtype == torch.float32 else [_as_numpy(out)])
    unit, kept, lost = numbers.numpy()
    kernel = ROUND[out.dtype]
    return lambda lo, hi: kernel(*given, lo, hi, unit, kept, lost)


def _copy(source: np.ndarray, target: np.ndarray, lo: int, hi: int) -> None:
    target[lo:hi] = source[lo:hi]


def _gamma(D: int) -> float:
    return D * 2.0**-24 / (1 - D * 2.0**-24)


def _as_numpy(tensor: Tensor) -> np.ndarray:
    """Its numbers, or the bits of its bfloat16 ones."""
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
