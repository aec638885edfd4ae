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
keep, and a block may hold features of several SAEs (`search`).
"""

import threading
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from mistudio.sae.code import FeatureCode
from mistudio.train import products, threads
from mistudio.train.search import Batch, Query, Search, blocks, look_through

BLOCK_ENTRIES = 1 << 21
"""Entries of [F, B] that exist at once in each thread."""
BLOCK_FEATURES = 1 << 12
"""Rounded rows of W_enc that exist at once in each thread, at most."""
REST = 50
"""Batches after which a dtype that was crowded is tried again."""


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
    in blocks that do not end where one of them does. A thread rounds, multiplies and looks through a block by itself.
    """
    batch = Batch(x.detach().contiguous())
    pairs = zip(screens, queries, strict=True)
    searches = [Search(screen.W, query, batch, screen.begin(), screen.widened) for screen, query in pairs]
    share = -(-sum(len(screen.W) for screen in screens) // threads.number())
    width = min(max(threads.UNIT, min(share, BLOCK_ENTRIES // max(1, len(x)))), BLOCK_FEATURES)
    left, lock = blocks(searches, width), threading.Lock()

    def work(thread: int) -> None:
        while not any(search.full for search in searches):
            with lock:
                block = next(left, None)
            if block is None:
                return
            look_through(block, batch, thread)

    while any(search.left for search in searches):
        batch.see(search.dtype for search in searches)
        threads.on_threads(work)
        for screen, search in zip(screens, searches, strict=True):
            search.decide()
            if search.crowded:
                search.go_on(screen.refine(search.dtype))
    return [_code(screen, search) for screen, search in zip(screens, searches, strict=True)]


def _code(screen: Screen, search: Search) -> FeatureCode:
    """What was found; searched for again if a candidate was outside its bound."""
    if search.distrusted is None:
        return search.code()
    screen.distrust(search.distrusted)
    return select_many([screen], search.batch.x, [search.query])[0]
