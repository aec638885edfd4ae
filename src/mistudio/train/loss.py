"""The loss, its gradients, and the decoder's constraint.

    L = mean over rows of ‖x - x̂‖² (summed over D) + w · penalty

    sparsity            penalty                                     its derivative by a row's L0 (times B)
    l0                  mean L0                                     1
    target_mean_l0      (mean L0 / L0* - 1)²                        2 (mean L0 / L0* - 1) / L0*
    target_token_l0     mean over rows of (2/L0*) (L0 - L0*)²       4 (L0 - L0*) / L0*

`loss` is the definition, through autograd and the two pseudo-derivatives. `loss_and_gradients` is the same thing
written out for the training loop: it needs one window for both pseudo-derivatives, keeps no [B, F] matrix between
forward and backward, and goes through the rows in chunks that stay in a CPU's cache. A test holds the two equal.

L0 reaches only the thresholds, through the step's window. With p_b the derivative of the penalty by row b's L0:

    dL/dθ_j = -(1/ε) Σ_b K_bj (θ_j dL/df_bj + w p_b)
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mistudio.sae import JumpReLUSAE, jumprelu, step
from mistudio.sae.code import is_entry
from mistudio.train.config import TrainConfig

CPU_CHUNK_ROWS = 256
"""Rows worked on at once on a CPU: 256 rows of 4,096 features are 4 MB."""


@dataclass(frozen=True)
class Terms:
    """What one batch says, as tensors on its device, so that reading nothing costs no synchronisation."""

    loss: Float[Tensor, ""]
    mse: Float[Tensor, ""]
    """Mean over rows of ‖x - x̂‖²."""
    l0: Float[Tensor, ""]
    """Mean number of active features in a row."""
    fired: Float[Tensor, " F"]
    """In how many rows each feature was active."""
    entries: Float[Tensor, ""]
    """How many entries of z are active or in the kernel window, which is what a sparse step costs. A dense step
    counts those below θ in its first chunk of rows only."""


def loss(sae: JumpReLUSAE, x: Float[Tensor, "B D"], cfg: TrainConfig, weight: float) -> Terms:
    """The terms of a batch with a graph behind `loss`: the definition. `weight` is w at this step."""
    z = sae.pre_activations(x)  # [B, F]
    x_hat = sae.decode(jumprelu(z, sae.threshold, cfg.bandwidth))
    active = step(z, sae.threshold, cfg.bandwidth)
    row_l0 = active.sum(1)  # [B]
    mse = (x - x_hat).square().sum(1).mean()
    entries = is_entry(z, sae.threshold, cfg.bandwidth).sum().to(mse.dtype)
    return Terms(mse + weight * penalty(row_l0, cfg), mse, row_l0.mean(), active.detach().sum(0), entries)


@torch.no_grad()
def loss_and_gradients(
    sae: JumpReLUSAE, x: Float[Tensor, "B D"], cfg: TrainConfig, weight: float
) -> tuple[Terms, dict[str, Tensor]]:
    """The terms of a batch and dL/dp of every parameter p: what autograd makes of `loss`, to rounding.

    Cost: five products of B·D·F multiply-adds and about ten passes over [B, F] in cache.
    """
    rows, threshold, bias = len(x), sae.threshold, sae.encoder_bias()
    d_enc, d_dec = torch.zeros_like(sae.W_enc), torch.zeros_like(sae.W_dec)
    d_z_sum, d_f_windowed, price_windowed, fired = (torch.zeros_like(bias) for _ in range(4))
    d_x_hat_sum = torch.zeros_like(sae.b_dec)
    squares: list[Tensor] = []
    row_l0: list[Tensor] = []
    below = bias.new_zeros(())
    for chunk in x.split(CPU_CHUNK_ROWS if x.device.type == "cpu" else rows):
        z = torch.addmm(bias, chunk, sae.W_enc)
        active = torch.gt(z, threshold, out=torch.empty_like(z))  # 0.0 or 1.0: float masks are faster than boolean ones
        window = torch.lt((z - threshold).abs_(), cfg.bandwidth / 2, out=torch.empty_like(z))
        if not squares:
            below = (window > active).sum() * (rows / len(chunk))
        f = z.mul_(active)
        residual = torch.addmm(sae.b_dec, f, sae.W_dec).sub_(chunk)  # x̂ - x
        squares.append(residual.square().sum())
        row_l0.append(active.sum(1))
        fired += active.sum(0)
        d_x_hat = residual.mul_(2 / rows)
        d_x_hat_sum += d_x_hat.sum(0)
        d_dec.addmm_(f.T, d_x_hat)
        d_f = d_x_hat @ sae.W_dec.T
        price_windowed.addmv_(window.T, row_price(row_l0[-1], rows, cfg))
        d_f_windowed += window.mul_(d_f).sum(0)
        d_z = d_f.mul_(active)
        d_enc.addmm_(chunk.T, d_z)
        d_z_sum += d_z.sum(0)
    all_l0 = torch.cat(row_l0)
    mse = torch.stack(squares).sum() / rows
    price_windowed *= weight * common_price(all_l0, cfg)
    d_threshold = (threshold * d_f_windowed + price_windowed) / -cfg.bandwidth
    terms = Terms(mse + weight * penalty(all_l0, cfg), mse, all_l0.mean(), fired, fired.sum() + below)
    return terms, _parameter_gradients(sae, d_enc, d_z_sum, d_threshold, d_dec, d_x_hat_sum)


def _parameter_gradients(
    sae: JumpReLUSAE, d_enc: Tensor, d_z_sum: Tensor, d_threshold: Tensor, d_dec: Tensor, d_x_hat_sum: Tensor
) -> dict[str, Tensor]:
    """The chain from bias to b_enc, b_dec and W_enc (bias = b_enc - b_dec·W_enc), and from θ to log θ."""
    d_b_dec = d_x_hat_sum
    if sae.config.pre_encoder_bias:
        d_b_dec = d_b_dec - sae.W_enc @ d_z_sum
        d_enc.addr_(sae.b_dec, d_z_sum, alpha=-1)
    d_theta = d_threshold * sae.threshold if sae.config.log_threshold else d_threshold
    return {"W_enc": d_enc, "b_enc": d_z_sum, "theta": d_theta, "W_dec": d_dec, "b_dec": d_b_dec}


def penalty(row_l0: Float[Tensor, " B"], cfg: TrainConfig) -> Float[Tensor, ""]:
    """What sparsity_weight multiplies."""
    if cfg.target_l0 is None:
        return row_l0.mean()
    if cfg.sparsity == "target_mean_l0":
        return (row_l0.mean() / cfg.target_l0 - 1).square()
    return (2 / cfg.target_l0) * (row_l0 - cfg.target_l0).square().mean()


def row_price(row_l0: Tensor, rows: int, cfg: TrainConfig) -> Tensor:
    """The part of p_b that differs between rows and is known as soon as the row is."""
    if cfg.target_l0 is not None and cfg.sparsity == "target_token_l0":
        return (row_l0 - cfg.target_l0) * (4 / (cfg.target_l0 * rows))
    return torch.full_like(row_l0, 1 / rows)


def common_price(row_l0: Tensor, cfg: TrainConfig) -> Tensor:
    """The part of p_b that all rows share and that needs the whole batch."""
    if cfg.target_l0 is not None and cfg.sparsity == "target_mean_l0":
        return (row_l0.mean() / cfg.target_l0 - 1) * (2 / cfg.target_l0)
    return row_l0.new_ones(())
