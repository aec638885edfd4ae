"""What the kernels of the sparse step compute, in plain torch: the definition, and what runs where numba is missing.

An architecture says which entries are on, and by which threshold; the rest is here, and the same for all of them. x has
D columns and the target E, which may differ (transcoders). The residual may have several planes of B rows one below the
other, and an entry in row r belongs to row r % B of x and to row r of the residual: so a feature's gradient may come
from another reconstruction than its neighbour's (Matryoshka prefixes), or an entry from an auxiliary one.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from mistudio.sae.code import FeatureCode
from mistudio.train.optimizer import Adam, normalise_rows_, remove_parallel_

ENTRIES = 1 << 12
"""Entries whose rows [entries, D] are gathered at once."""


@dataclass(frozen=True)
class Work:
    """What a batch's gradients are made of; `row_gradients` says how."""

    code: FeatureCode
    """The entries, in the rows of their planes."""
    x: Tensor
    """[B, D]."""
    residual: Tensor
    """[K·B, E], K planes."""
    parameters: dict[str, Tensor]
    threshold: Tensor
    """[F]: an entry is active if it is not at or below it."""
    price: Tensor
    """[B]."""
    bandwidth: float
    centred: bool
    """Whether the encoder reads x - b_dec."""
    scale: float
    bonus: float


def reconstruct(code: FeatureCode, start: Tensor, W_dec: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(residual [B, E], its squared norms [B], row_l0 [B]): start + Σ over active entries of z·W_dec[j].

    `start` [B, E] is b_dec less the target, plus what else reconstructs (a skip); it is overwritten.
    """
    row_l0 = start.new_zeros(len(start))
    for rows, features, z in _pieces(code):
        active = ~(z <= threshold[features])
        row_l0.index_add_(0, rows, active.to(start.dtype))
        start.index_add_(0, rows[active], z[active, None] * W_dec[features[active]])
    return start, start.square().sum(1), row_l0


def visit(work: Work, adam: Adam, lr: float) -> tuple[Tensor, Tensor, Tensor]:
    """(sums [F, 5], d_b_dec [D], touched [F]) of `row_gradients`, whose rows take their step by `apply_rows`.

    Memory: the gradients of touched rows; the kernel has none.
    """
    sums, d_b_dec, features, g_enc, g_dec = row_gradients(work)
    apply_rows(features, g_enc, g_dec, work.parameters, adam, lr)
    return sums, d_b_dec, sums[:, 3] > 0


def row_gradients(work: Work) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(sums [F, 5], d_b_dec [D], features [n] int64, g_enc [n, D], g_dec [n, E]), the last three of touched features.

    x [B, D], residual [K·B, E], price [B]; an entry (r, j) has row b = r % B of x, and

        d_f = scale·residual_r·W_dec[j] + bonus

    `sums` of a feature are Σ d_f over active entries (not z ≤ θ), Σ d_f and Σ price_b over those in the kernel window
    (|z - θ| < bandwidth/2), the number of active ones and the number in the window. A feature with an active entry is
    touched; with Σ over its active entries

        g_dec = scale·Σ z·residual_r,  g_enc = Σ d_f·(x_b - b_dec),  d_b_dec = Σ_j Σ d_f·W_enc[j]

    where b_dec enters only if the encoder is centred (then D = E), and d_b_dec is 0 if not.
    """
    code, x, residual, price, threshold = work.code, work.x, work.residual, work.price, work.threshold
    W_enc, W_dec = work.parameters["W_enc"], work.parameters["W_dec"]
    sums = W_dec.new_zeros(code.n_features, 5)
    for rows, features, z in _pieces(code):
        theta = threshold[features]
        d_f = work.scale * (residual[rows] * W_dec[features]).sum(1) + work.bonus
        active, window = ~(z <= theta), (z - theta).abs() < work.bandwidth / 2
        columns = (active * d_f, window * d_f, window * price[rows % len(x)], active.to(z.dtype), window.to(z.dtype))
        sums.index_add_(0, features, torch.stack(columns, 1))
    touched = sums[:, 3] > 0
    chosen, place = touched.nonzero().squeeze(1), touched.cumsum(0) - 1
    g_enc, g_dec = W_enc.new_zeros(len(chosen), x.shape[1]), torch.zeros_like(W_dec[chosen])
    for rows, features, z in _pieces(code):
        active = ~(z <= threshold[features])
        rows, features, z = rows[active], features[active], z[active]
        d_f = work.scale * (residual[rows] * W_dec[features]).sum(1) + work.bonus
        g_dec.index_add_(0, place[features], work.scale * z[:, None] * residual[rows])
        g_enc.index_add_(0, place[features], d_f[:, None] * x[rows % len(x)])
    d_b_dec = x.new_zeros(x.shape[1])
    if work.centred:
        g_enc.addr_(sums[chosen, 0], work.parameters["b_dec"], alpha=-1)
        d_b_dec = W_enc @ sums[:, 0]
    return sums, d_b_dec, chosen, g_enc, g_dec


def apply_rows(
    features: Tensor, g_enc: Tensor, g_dec: Tensor, parameters: dict[str, Tensor], adam: Adam, lr: float
) -> None:
    """Takes Adam's step with the rows of these features [n] int64, which must be distinct.

    g_enc [n, D]; g_dec [n, E] first loses, in place, its part along each decoder row, and that row is renormalised.
    Kernels may leave anything in the gradients.
    """
    W_dec = parameters["W_dec"]
    remove_parallel_(g_dec, W_dec[features])
    adam.update_rows(features, {"W_enc": g_enc, "W_dec": g_dec}, lr)
    rows = W_dec[features]
    normalise_rows_(rows)
    W_dec[features] = rows


def _pieces(code: FeatureCode) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(rows, features, values) of some thousand entries at a time."""
    columns = (code.rows.long(), code.indices().long(), code.values)
    return list(zip(*(column.split(ENTRIES) for column in columns), strict=True))
