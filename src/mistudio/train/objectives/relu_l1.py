"""ReLU with an L1 penalty (arXiv 2309.08600): a feature is on above 0, and its size is charged.

Decoder rows have norm 1, so that features cannot escape the penalty by small f and long rows.
"""

import torch
from torch import Tensor

from mistudio.sae import SAE, ReLUConfig, ReLUSAE, Transcoder
from mistudio.sae.code import FeatureCode
from mistudio.train.config import TrainConfig
from mistudio.train.objectives.base import Encoder, Objective, Trainable, place_of, weights_for


class ReLU(Objective):
    """f = max(0, z); the charge is the mean over rows of Σ_j f_j. θ stays 0."""

    def on(self, z: Tensor, threshold: Tensor, cut: Tensor | None, cfg: TrainConfig) -> Tensor:
        return torch.gt(z, 0, out=torch.empty_like(z))

    def entries(self, encoder: Encoder, x: Tensor, threshold: Tensor, cfg: TrainConfig) -> FeatureCode:
        return encoder.select(x, *self.cutoff(threshold, cfg))

    def cutoff(self, threshold: Tensor, cfg: TrainConfig) -> tuple[Tensor, float]:
        return torch.zeros_like(threshold), 0.0

    def charge(self, row_l0: Tensor, fired: Tensor, total: Tensor, cfg: TrainConfig) -> Tensor:
        return total / len(row_l0)

    def bonus(self, rows: int) -> float:
        return 1 / rows

    def release(self, sae: Trainable, cfg: TrainConfig) -> SAE:
        folded = sae.fold()
        if isinstance(folded, Transcoder):
            return folded
        config = ReLUConfig(**place_of(folded))
        return ReLUSAE(config, weights_for(config, folded))
