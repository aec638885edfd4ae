"""The BatchTopK SAE (arXiv 2412.06410) at inference: one threshold θ for all features, f = z where z > θ, else 0.

In training the k·B largest of a batch of B rows are kept, so that what a row keeps depends on its neighbours. Inference
must not, and its authors replace the selection by θ, the running mean of the smallest value that was kept. It is a
JumpReLU SAE whose thresholds are equal, and SAELens stores it as one.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mistudio.sae.base import SAE, SAEConfig, affine, check_weights, refuse_training_form


@dataclass(frozen=True, kw_only=True)
class BatchTopKConfig(SAEConfig):
    """The sizes of a BatchTopK SAE and where it belongs."""

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_training_form(self)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every parameter; theta is a scalar."""
        d, f = self.d_model, self.d_sae
        return {"W_enc": (d, f), "b_enc": (f,), "theta": (), "W_dec": (f, d), "b_dec": (d,)}


class BatchTopKSAE(SAE):
    """A BatchTopK SAE in inference form: z = x·W_enc + b_enc, f = z·1[z > θ] with θ ≥ 0, x̂ = f·W_dec + b_dec."""

    Config = BatchTopKConfig

    def __init__(self, config: BatchTopKConfig, weights: Mapping[str, Tensor]):
        """`weights`: tensors by name, of the shapes `config.shapes()`. SAEError: a name or shape is wrong."""
        super().__init__()
        check_weights(config, weights)
        self.config = config
        self.W_enc = nn.Parameter(weights["W_enc"])
        self.b_enc = nn.Parameter(weights["b_enc"])
        self.theta = nn.Parameter(weights["theta"])
        self.W_dec = nn.Parameter(weights["W_dec"])
        self.b_dec = nn.Parameter(weights["b_dec"])

    def encode(self, x: Float[Tensor, "*rows D"]) -> Float[Tensor, "*rows F"]:
        """z where z > θ, else 0."""
        z = affine(x, self.W_enc, self.b_enc)
        return torch.where(z > self.theta, z, 0.0)

    def decode(self, f: Float[Tensor, "*rows F"]) -> Float[Tensor, "*rows D"]:
        """f·W_dec + b_dec."""
        return affine(f, self.W_dec, self.b_dec)

    def forward(self, x: Float[Tensor, "*rows D"]) -> tuple[Float[Tensor, "*rows D"], Float[Tensor, "*rows F"]]:
        """(x̂, f)."""
        f = self.encode(x)
        return self.decode(f).to(x.dtype), f
