"""The sparse step's operations by compiled kernels: `definition`'s functions, and a screened `select`.

The encoder product is all that is left of a step's five, so it is done on bfloat16 where the machine multiplies that
faster, and only to find candidates: z of every candidate is computed again in float32, and that z decides. A margin
makes sure that no entry is missed. With x̃, w̃ the rounded row of x and column of W_enc, and eₓ, e_w what was rounded
off, Cauchy and Schwarz give

    |x·w - x̃·w̃| ≤ ‖x̃‖‖e_w‖ + ‖eₓ‖‖w̃‖ + ‖eₓ‖‖e_w‖

where all four norms are measured, not bounded by the unit roundoff (u = 2⁻⁸), which would be three times as much. Sums
of D products in float32, in any order, err by at most γ‖x‖‖w‖ with γ = D·2⁻²⁴/(1 - D·2⁻²⁴), once in the product and
once in the z that decides. The product comes back rounded to bfloat16: a true value t or more is then t - u|t| or more.
With κ the largest ‖eₓ‖/‖x̃‖ of the batch, the margin is ‖x̃_b‖·slope_j with

    slope_j = ‖e_w‖ + κ(‖w̃‖ + ‖e_w‖) + 4γ(‖w̃‖ + ‖e_w‖),  a little enlarged for its own rounding.

The bound presumes sums in float32, as oneDNN and BLAS do them. Every candidate is a test of that: if one z lies farther
from its product than the margin allows, screening goes on in float32 from there, or not at all, and says so.
"""

import math
import time
import warnings

import numpy as np
import torch
from torch import Tensor

from mistudio.sae.code import FeatureCode, pointers
from mistudio.train import kernels
from mistudio.train.optimizer import Adam

BLOCK_ENTRIES = 1 << 22
"""Entries of [F, B] that exist at once."""
SCREEN_UNIT = 64
"""Features of a block that one thread takes at a time."""
U_BF16 = 2.0**-8
SLACK = 1e-5
"""By how much, relatively, thresholds are lowered and margins enlarged for the rounding of these themselves."""


def fast_dtype(D: int) -> torch.dtype:
    """bfloat16 if this machine multiplies it clearly faster than float32 (measured in some ms), else float32. Results
    do not depend on it, so that a measurement may decide."""
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = (torch.ones(512, D, dtype=dtype) for _ in range(2))
        times = []
        for _ in range(4):
            start = time.perf_counter()
            a @ b.T
            times.append(time.perf_counter() - start)
        seconds[dtype] = min(times[1:])
    return torch.bfloat16 if seconds[torch.bfloat16] < 0.8 * seconds[torch.float32] else torch.float32


class Screen:
    """Finds a batch's entries by a product in a cheap dtype; the result does not depend on which."""

    def __init__(self, W: Tensor, dtype: torch.dtype | None = None):
        """W [F, D]: W_enc with features first, kept by reference; call `refresh` when it changed."""
        self.W = W
        self.dtype = fast_dtype(W.shape[1]) if dtype is None else dtype
        F = len(W)
        self.rounded = W if self.dtype == W.dtype else torch.empty_like(W, dtype=self.dtype)
        self.norm, self.error = W.new_empty(F), W.new_zeros(F)
        self.refresh(torch.ones(F, dtype=torch.bool))

    def refresh(self, touched: Tensor) -> None:
        """W changed in the rows of these features: they are rounded and measured again."""
        W, marks, norm, error = (t.numpy() for t in (self.W, touched, self.norm, self.error))
        kernels.in_ranges(lambda lo, hi: kernels.measure(W, marks, norm, lo, hi), len(W))
        if self.rounded is not self.W:
            bits = self.rounded.view(torch.uint16).numpy()
            kernels.in_ranges(lambda lo, hi: kernels.round_rows(W, marks, bits, error, lo, hi), len(W))

    def select(
        self, x: Tensor, b_enc: Tensor, b_dec: Tensor | None, threshold: Tensor, bandwidth: float
    ) -> FeatureCode:
        """`sae.code.select` with bias = b_enc - b_dec·W_enc (b_dec None: b_enc)."""
        bias = b_enc.detach().clone()
        if b_dec is not None:
            self._subtract(b_enc, b_dec, bias)
        x_rounded, norms, cut, slope = self._margins(x, bias, threshold, bandwidth)
        F, width = len(self.W), max(kernels.UNIT, BLOCK_ENTRIES // max(1, len(x)))
        exact = [t.numpy() for t in (x, self.W, bias, threshold)]
        half, loss = (exact[0].dtype.type(n) for n in (bandwidth / 2, U_BF16 if self.dtype == torch.bfloat16 else 0))
        found = []
        for first in range(0, F, width):
            product = _as_numpy(self.rounded[first : first + width] @ x_rounded.T)
            lines = [t[first : first + width].numpy() for t in (cut, slope)]

            def find(lo: int, hi: int, product=product, lines=lines, first=first):  # type: ignore[no-untyped-def]
                return kernels.screen(product, *lines, norms.numpy(), loss, *exact, half, first, lo, hi)

            found += kernels.in_ranges(find, len(product), SCREEN_UNIT)
        if sum(wrong for *_, wrong in found):
            self._distrust()
            return self.select(x, b_enc, b_dec, threshold, bandwidth)
        rows, values, counts = (torch.cat([torch.from_numpy(f[i]) for f in found]) for i in range(3))
        return FeatureCode(values, rows, pointers(counts), len(x))

    def _subtract(self, b_enc: Tensor, b_dec: Tensor, bias: Tensor) -> None:
        arrays = [t.detach().numpy() for t in (self.W, b_enc, b_dec)]
        out = bias.numpy()
        kernels.in_ranges(lambda lo, hi: kernels.encoder_bias(*arrays, lo, hi, out), len(out))

    def _margins(
        self, x: Tensor, bias: Tensor, threshold: Tensor, bandwidth: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(x̃ [B, D], ‖x̃‖ [B], cut [F], slope [F]): a candidate has product + slope_j·‖x̃_b‖ ≥ cut_j."""
        x_rounded = x.to(self.dtype)
        norms = x_rounded.to(x.dtype).norm(dim=1).clamp(min=1e-30)
        kappa = ((x - x_rounded.to(x.dtype)).norm(dim=1) / norms).max() if len(x) else x.new_zeros(())
        D = x.shape[1]
        gamma = D * 2.0**-24 / (1 - D * 2.0**-24)
        length = self.norm + 2 * self.error  # at least ‖w̃‖ + ‖e_w‖
        slope = (self.error + kappa * length + 4 * gamma * (1 + kappa) * length) * (1 + 2 * gamma + SLACK)
        at = threshold - bandwidth / 2 - bias
        cut = at - SLACK * (threshold.abs() + bandwidth + bias.abs()) - float(kernels.TINY)
        if self.dtype == torch.bfloat16:
            cut, slope = cut - U_BF16 * cut.abs(), slope * (1 + U_BF16)
        return x_rounded, norms, cut, slope

    def _distrust(self) -> None:
        """The product is not what its bound presumes: screening in float32 from here on, or computing every z."""
        if self.dtype == torch.bfloat16:
            instead = "screening goes on in float32, which is slower"
            self.dtype, self.rounded = self.W.dtype, self.W
            self.error.zero_()
        else:
            instead = "every entry is computed by itself, which is very slow (is float32_matmul_precision lowered?)"
            self.error.fill_(torch.inf)
        warnings.warn(f"This machine's matrix product is less accurate than float32 sums; {instead}.", stacklevel=2)


def reconstruct(
    code: FeatureCode, x: Tensor, W_dec: Tensor, b_dec: Tensor, threshold: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """`definition.reconstruct`."""
    columns = kernels.by_row(code.values.numpy(), code.rows.numpy(), code.feature_ptr.numpy(), len(x))
    d_x_hat, squares, row_l0 = torch.empty_like(x), x.new_empty(len(x)), x.new_empty(len(x))
    given = [t.detach().numpy() for t in (x, W_dec, b_dec, threshold)]
    out = [t.numpy() for t in (d_x_hat, squares, row_l0)]
    factor = given[0].dtype.type(2 / len(x))
    kernels.in_ranges(lambda lo, hi: kernels.reconstruct(*given, *columns, factor, lo, hi, *out), len(x))
    return d_x_hat, squares, row_l0


def visit(
    code: FeatureCode,
    x: Tensor,
    d_x_hat: Tensor,
    parameters: dict[str, Tensor],
    threshold: Tensor,
    price: Tensor,
    bandwidth: float,
    centred: bool,
    adam: Adam,
    lr: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """`definition.visit`, without dense gradients: a feature's gradients live while its rows are in the cache."""
    F, D = parameters["W_dec"].shape
    sums, touched = x.new_zeros(F, 4), torch.zeros(F, dtype=torch.bool)
    partial = x.new_zeros(-(-F // kernels.UNIT), D)
    entries = tuple(t.numpy() for t in (code.values, code.rows, code.feature_ptr))
    batch = (x.numpy(), d_x_hat.numpy())
    encoder, decoder = (tuple(t.numpy() for t in adam.rows(name)) for name in ("W_enc", "W_dec"))
    vectors = [t.detach().numpy() for t in (parameters["b_dec"], threshold, price, adam.row_decay())]
    correction = math.sqrt(1 - adam.beta2 ** (adam.steps + 1))
    real = batch[0].dtype.type
    numbers = tuple(real(n) for n in (bandwidth / 2, lr, 1 - adam.beta2, correction, adam.eps))
    out, by_range, marks = sums.numpy(), partial.numpy(), touched.numpy()

    def some(lo: int, hi: int) -> None:
        own = by_range[lo // kernels.UNIT]
        kernels.visit(entries, batch, encoder, decoder, *vectors, numbers, centred, lo, hi, out, own, marks)

    kernels.in_ranges(some, F)
    adam.mark(touched)
    return sums, partial.sum(0), touched


def _as_numpy(product: Tensor) -> np.ndarray:
    """Its float32 numbers, or the bits of its bfloat16 ones."""
    return (product.view(torch.uint16) if product.dtype == torch.bfloat16 else product).numpy()
