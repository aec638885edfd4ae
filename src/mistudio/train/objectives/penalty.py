"""What a JumpReLU SAE is charged for features that are on: the penalty on L0 and that on frequent features.

    sparsity            penalty                                     its derivative by a row's L0 (times B)
    l0                  mean L0                                     1
    target_mean_l0      (mean L0 / L0* - 1)²                        2 (mean L0 / L0* - 1) / L0*
    target_token_l0     mean over rows of (2/L0*) (L0 - L0*)²       4 (L0 - L0*) / L0*

    frequency_weight    Σ_j max(0, p_j - limit) / limit             frequency_weight · 1[p_j > limit] / limit

p_j is the part of the batch's rows in which feature j is on. Gemma Scope 2 says only that it penalises features above
10%; this form of it is ours. L0 and p reach only the thresholds, through the step's window. With p_b the derivative by
row b's L0 and q_j that by feature j's count,

    dL/dθ_j = -(1/ε) Σ_b K_bj (θ_j dL/df_bj + w (p_b + q_j))
"""

import torch
from jaxtyping import Float
from torch import Tensor

from mistudio.train.config import TrainConfig


def penalty(row_l0: Float[Tensor, " B"], cfg: TrainConfig) -> Float[Tensor, ""]:
    """The penalty on L0."""
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


def frequency_penalty(fired: Float[Tensor, " F"], rows: int, cfg: TrainConfig) -> Float[Tensor, ""]:
    """frequency_weight · Σ_j max(0, p_j - limit) / limit with p_j = fired_j / rows."""
    return (cfg.frequency_weight / cfg.frequency_limit) * (fired / rows - cfg.frequency_limit).relu().sum()


def frequency_price(fired: Float[Tensor, " F"], rows: int, cfg: TrainConfig) -> Float[Tensor, " F"]:
    """q_j."""
    over = fired / rows > cfg.frequency_limit
    return over.to(fired.dtype) * (cfg.frequency_weight / (cfg.frequency_limit * rows))


def threshold_gradient(
    threshold: Tensor, sums: tuple[Tensor, Tensor, Tensor], fired: Tensor, row_l0: Tensor, weight: float,
    cfg: TrainConfig
) -> Tensor:  # fmt: skip
    """dL/dθ [F] from each feature's sums over its window entries: Σ d_f, Σ of row prices, their number."""
    d_f, price, number = sums
    price = price * (weight * common_price(row_l0, cfg))
    if cfg.frequency_weight > 0:
        price = price + number * frequency_price(fired, len(row_l0), cfg) * weight
    return (threshold * d_f + price) / -cfg.bandwidth
