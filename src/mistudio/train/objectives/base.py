"""What an architecture is in training: which entries of z are on, what is charged for them, and who moves θ.

Everything else is shared. The loss of every architecture is

    L = 1/M Σ_m mean over rows of ‖y - x̂_m‖² + w · charge + auxiliary loss

with M = 1 but for Matryoshka prefixes, y = x but for transcoders, and the auxiliary loss of `auxk`. The gradient of an
entry that is on is d_f = dL/dx̂·W_dec[j] + w·bonus; that of one that is off is 0. So one dense step
(`mistudio.train.loss`) and one sparse step (`mistudio.train.sparse`) serve all architectures.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from mistudio.sae import SAE, JumpReLUSAE, SAEConfig, Transcoder
from mistudio.sae.code import FeatureCode, SparseCode
from mistudio.train.config import TrainConfig

Trainable = JumpReLUSAE | Transcoder
"""What is trained: in training every architecture has a JumpReLU SAE's tensors, or a transcoder's."""


class Encoder(Protocol):
    """What finds entries of z for a sparse step."""

    def select(self, x: Tensor, threshold: Tensor, bandwidth: float) -> FeatureCode:
        """The entries with z > θ or |z - θ| < bandwidth/2."""

    def pieces(self, x: Tensor) -> Iterator[Tensor]:
        """z itself, some rows at a time: [b, F] each."""

    def largest(self, x: Tensor, k: int) -> SparseCode:
        """The k largest positive entries of every row of z."""


class Objective(ABC):
    """An architecture in training."""

    wants_smallest: ClassVar[bool] = False
    """Whether `settle` uses the smallest value that was kept."""

    def cut(self, pieces: Iterator[Tensor], rows: int, cfg: TrainConfig) -> Tensor | None:
        """What `on` needs to know of the whole batch, from the pieces [b, F] of its z; most need nothing."""
        return None

    @abstractmethod
    def on(self, z: Tensor, threshold: Tensor, cut: Tensor | None, cfg: TrainConfig) -> Tensor:
        """1 where an entry of z [b, F] is on, else 0, in z's dtype."""

    def cutoff(self, threshold: Tensor, cfg: TrainConfig) -> tuple[Tensor, float] | None:
        """(θ [F], bandwidth) if a batch's entries are all that `Encoder.select` finds by these; None if not."""
        return None

    @abstractmethod
    def entries(self, encoder: Encoder, x: Tensor, threshold: Tensor, cfg: TrainConfig) -> FeatureCode:
        """The entries of a batch that are on or in the kernel window."""

    def level(self, threshold: Tensor) -> Tensor:
        """What a value among the entries must exceed to be on [F]: 0 where `entries` are those alone that are on."""
        return torch.zeros_like(threshold)

    def features(self, z: Tensor, threshold: Tensor, cfg: TrainConfig) -> tuple[Tensor, Tensor]:
        """(f, on) [B, F] of a whole batch with a graph behind them: the definition."""
        on = self.on(z, threshold, self.cut(iter([z.detach()]), len(z), cfg), cfg)
        return torch.where(on > 0, z, 0.0), on

    def charge(self, row_l0: Tensor, fired: Tensor, total: Tensor, cfg: TrainConfig) -> Tensor:
        """What sparsity_weight multiplies, from each row's L0 [B], each feature's count [F] and the sum of all f."""
        return total.new_zeros(())

    def bonus(self, rows: int) -> float:
        """The charge's derivative by an entry that is on."""
        return 0.0

    def smallest(self, row_least: Tensor, row_l0: Tensor, cfg: TrainConfig) -> Tensor:
        """What `settle` is told, from each row's least value that was kept [B] (infinite without one) and its L0."""
        return row_least.min()

    def settle(self, sae: Trainable, smallest: Tensor | None, step: int, cfg: TrainConfig) -> None:  # noqa: B027
        """Changes θ after update `step`, where no gradient does; `smallest` is infinite where nothing was kept."""

    @abstractmethod
    def release(self, sae: Trainable, cfg: TrainConfig) -> SAE:
        """The finished SAE in released form, of the architecture's own class."""


def place_of(sae: SAE) -> dict[str, Any]:
    """The sizes and the place in a model of an SAE: what every architecture's config has."""
    c = sae.config
    return {
        "d_model": c.d_model,
        "d_sae": c.d_sae,
        "hook_name": c.hook_name,
        "hook_layer": c.hook_layer,
        "model": c.model,
    }


def weights_for(config: SAEConfig, sae: SAE) -> dict[str, Tensor]:
    """The tensors of `sae` that an SAE of that config has."""
    return {name: tensor for name, tensor in sae.state_dict().items() if name in config.shapes()}
