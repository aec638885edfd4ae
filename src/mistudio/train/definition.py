"""What the kernels of the sparse step compute, in plain torch: the definition, and what runs where numba is missing."""

import torch
from torch import Tensor

from mistudio.sae.code import FeatureCode
from mistudio.train.optimizer import Adam, normalise_rows_, remove_parallel_

ENTRIES = 1 << 12
"""Entries whose rows [entries, D] are gathered at once."""


def reconstruct(
    code: FeatureCode, x: Tensor, W_dec: Tensor, b_dec: Tensor, threshold: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(2/B·(x̂ - x) [B, D], ‖x̂ - x‖² [B], row_l0 [B]) with x̂ = b_dec + Σ over active entries of z·W_dec[j]."""
    residual = b_dec - x
    row_l0 = x.new_zeros(len(x))
    for rows, features, z in _pieces(code):
        active = ~(z <= threshold[features])
        row_l0.index_add_(0, rows, active.to(x.dtype))
        residual.index_add_(0, rows[active], z[active, None] * W_dec[features[active]])
    squares = residual.square().sum(1)
    return residual.mul_(2 / len(x)), squares, row_l0


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
    """(sums [F, 4], d_b_dec [D], touched [F]); the rows of W_enc and W_dec of touched features take their Adam step.

    With d_f = d_x_hat_b·W_dec[j] of every entry (b, j), `sums` of a feature are Σ d_f over active entries, Σ d_f and
    Σ price_b over those in the kernel window, and the number of active entries. A feature with one is touched:

        g_dec = Σ z·d_x_hat_b less its part along W_dec[j],  g_enc = Σ d_f·(x_b - b_dec),  d_b_dec = Σ_j Σ d_f·W_enc[j]

    (b_dec only where the encoder is centred). The row is renormalised. Memory: dense gradients [F, D]; the kernel has
    none.
    """
    W_enc, W_dec, b_dec = parameters["W_enc"], parameters["W_dec"], parameters["b_dec"]
    sums = W_dec.new_zeros(code.n_features, 4)
    g_enc, g_dec = torch.zeros_like(W_dec), torch.zeros_like(W_dec)
    for rows, features, z in _pieces(code):
        d_f = (d_x_hat[rows] * W_dec[features]).sum(1)
        theta = threshold[features]
        active, window = ~(z <= theta), (z - theta).abs() < bandwidth / 2
        columns = (active * d_f, window * d_f, window * price[rows], active.to(z.dtype))
        sums.index_add_(0, features, torch.stack(columns, 1))
        rows, features, z, d_f = rows[active], features[active], z[active], d_f[active]
        g_dec.index_add_(0, features, z[:, None] * d_x_hat[rows])
        g_enc.index_add_(0, features, d_f[:, None] * x[rows])
    touched = sums[:, 3] > 0
    d_b_dec = W_enc @ sums[:, 0]
    if centred:
        g_enc.addr_(sums[:, 0], b_dec, alpha=-1)
    remove_parallel_(g_dec, W_dec)
    adam.update_rows(touched, {"W_enc": g_enc, "W_dec": g_dec}, lr)
    rows_on = W_dec[touched]
    normalise_rows_(rows_on)
    W_dec[touched] = rows_on
    return sums, d_b_dec, touched


def _pieces(code: FeatureCode) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(rows, features, values) of some thousand entries at a time."""
    columns = (code.rows.long(), code.indices().long(), code.values)
    return list(zip(*(column.split(ENTRIES) for column in columns), strict=True))
