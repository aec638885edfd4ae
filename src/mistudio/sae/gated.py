"""The gated SAE (arXiv 2404.16014): one linear map decides which features are on, a rescaled copy of it how much.

    gate      = x·W_enc + b_gate              [*rows, F]
    magnitude = exp(r_mag)·(x·W_enc) + b_mag  [*rows, F]
    f = 1[gate > 0]·ReLU(magnitude),  x̂ = f·W_dec + b_dec

r_mag and both biases have one entry a feature.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mistudio.sae.base import SAE, SAEConfig, affine, check_weights, refuse_training_form


@dataclass(frozen=True, kw_only=True)
class GatedConfig(SAEConfig):
    """The sizes of a gated SAE and where it belongs."""

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_training_form(self)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every parameter."""
        d, f = self.d_model, self.d_sae
        return {"W_enc": (d, f), "b_gate": (f,), "r_mag": (f,), "b_mag": (f,), "W_dec": (f, d), "b_dec": (d,)}


class GatedSAE(SAE):
    """A gated SAE. Origins subtract b_dec from x first; here that is folded into b_gate and b_mag."""

    Config = GatedConfig

    def __init__(self, config: GatedConfig, weights: Mapping[str, Tensor]):
        """`weights`: tensors by name, of the shapes `config.shapes()`. SAEError: a name or shape is wrong."""
        super().__init__()
        check_weights(config, weights)
        self.config = config
        self.W_enc = nn.Parameter(weights["W_enc"])
        self.b_gate = nn.Parameter(weights["b_gate"])
        self.r_mag = nn.Parameter(weights["r_mag"])
        self.b_mag = nn.Parameter(weights["b_mag"])
        self.W_dec = nn.Parameter(weights["W_dec"])
        self.b_dec = nn.Parameter(weights["b_dec"])

    def encode(self, x: Float[Tensor, "*rows D"]) -> Float[Tensor, "*rows F"]:
        """ReLU(magnitude) where gate > 0, else 0."""
        z = affine(x, self.W_enc, torch.zeros_like(self.b_gate))
        magnitude = self.r_mag.exp() * z + self.b_mag
        return torch.where(z + self.b_gate > 0, magnitude.relu(), 0.0)

    def decode(self, f: Float[Tensor, "*rows F"]) -> Float[Tensor, "*rows D"]:
        """f·W_dec + b_dec."""
        return affine(f, self.W_dec, self.b_dec)

    def forward(self, x: Float[Tensor, "*rows D"]) -> tuple[Float[Tensor, "*rows D"], Float[Tensor, "*rows F"]]:
        """(x̂, f)."""
        f = self.encode(x)
        return self.decode(f).to(x.dtype), f
