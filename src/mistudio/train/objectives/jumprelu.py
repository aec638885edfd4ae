"""JumpReLU (arXiv 2407.14435), Gemma Scope's: a feature is on above its own threshold, which a penalty on L0 moves."""

import torch
from torch import Tensor

from mistudio.sae import SAE, jumprelu, step
from mistudio.sae.code import FeatureCode
from mistudio.train.config import TrainConfig
from mistudio.train.objectives.base import Encoder, Objective, Trainable
from mistudio.train.objectives.penalty import frequency_penalty, penalty


class JumpReLU(Objective):
    """f = z·H(z - θ); the charge is the penalty on L0, and the one on frequent features where that is asked for."""

    def features(self, z: Tensor, threshold: Tensor, cfg: TrainConfig) -> tuple[Tensor, Tensor]:
        return jumprelu(z, threshold, cfg.bandwidth), step(z, threshold, cfg.bandwidth)

    def on(self, z: Tensor, threshold: Tensor, cut: Tensor | None, cfg: TrainConfig) -> Tensor:
        return torch.gt(z, threshold, out=torch.empty_like(z))  # float masks are faster than boolean ones

    def level(self, threshold: Tensor) -> Tensor:
        return threshold

    def entries(self, encoder: Encoder, x: Tensor, threshold: Tensor, cfg: TrainConfig) -> FeatureCode:
        return encoder.select(x, *self.cutoff(threshold, cfg))

    def cutoff(self, threshold: Tensor, cfg: TrainConfig) -> tuple[Tensor, float]:
        return threshold, cfg.bandwidth

    def charge(self, row_l0: Tensor, fired: Tensor, total: Tensor, cfg: TrainConfig) -> Tensor:
        charged = penalty(row_l0, cfg)
        return charged + frequency_penalty(fired, len(row_l0), cfg) if cfg.frequency_weight > 0 else charged

    def settle(self, sae: Trainable, smallest: Tensor | None, step: int, cfg: TrainConfig) -> None:
        if not cfg.log_threshold:
            sae.theta.clamp_(min=cfg.bandwidth / 2)  # the whole window of a threshold stays above 0

    def release(self, sae: Trainable, cfg: TrainConfig) -> SAE:
        return sae.fold()
