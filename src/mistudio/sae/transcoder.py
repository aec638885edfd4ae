"""Transcoders: a JumpReLU encoder that reads one activation and reconstructs another, with or without a linear skip.

    f = z·1[z > θ] with z = x·W_enc + b_enc;   ŷ = f·W_dec + b_dec (+ x·W_skip)

x [*rows, D] is what the MLP reads and ŷ [*rows, E] what it writes (Gemma Scope report, appendix B). W_enc [D, F],
W_dec [F, E], W_skip [D, E]: rows multiply from the left as everywhere here, so W_skip is Gemma Scope 2's
`affine_skip_connection` as it lies and the transpose of SAELens's `W_skip`. θ = 0 is a ReLU transcoder.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mistudio.errors import ConfigError
from mistudio.sae.base import SAE, SAEConfig, affine, check_weights, refuse_training_form


@dataclass(frozen=True, kw_only=True)
class TranscoderConfig(SAEConfig):
    """The sizes of a transcoder and the two places in a model that it connects."""

    d_out: int
    """Width E of the activations it reconstructs."""
    hook_name_out: str | None = None
    """The site it reconstructs, such as layers.20.mlp_out; `hook_name` is the one it reads."""
    skip: bool = False
    """It has a linear skip connection W_skip."""

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_training_form(self)
        if self.d_out < 1:
            raise ConfigError(f"d_out must be at least 1, not {self.d_out}")

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every parameter."""
        d, f, e = self.d_model, self.d_sae, self.d_out
        shapes: dict[str, tuple[int, ...]] = {"W_enc": (d, f), "b_enc": (f,), "theta": (f,), "W_dec": (f, e)}
        return shapes | {"b_dec": (e,)} | ({"W_skip": (d, e)} if self.skip else {})


class Transcoder(SAE):
    """A transcoder. `decode` is the features' part alone; calling it adds the skip, which needs x."""

    Config = TranscoderConfig
    config: TranscoderConfig

    def __init__(self, config: TranscoderConfig, weights: Mapping[str, Tensor]):
        """`weights`: tensors by name, of the shapes `config.shapes()`. SAEError: a name or shape is wrong."""
        super().__init__()
        check_weights(config, weights)
        self.config = config
        self.W_enc = nn.Parameter(weights["W_enc"])
        self.b_enc = nn.Parameter(weights["b_enc"])
        self.theta = nn.Parameter(weights["theta"])
        self.W_dec = nn.Parameter(weights["W_dec"])
        self.b_dec = nn.Parameter(weights["b_dec"])
        self.W_skip = nn.Parameter(weights["W_skip"]) if config.skip else None

    def encode(self, x: Float[Tensor, "*rows D"]) -> Float[Tensor, "*rows F"]:
        """z where z > θ, else 0."""
        z = affine(x, self.W_enc, self.b_enc)
        return torch.where(z > self.theta, z, 0.0)

    def decode(self, f: Float[Tensor, "*rows F"]) -> Float[Tensor, "*rows E"]:
        """f·W_dec + b_dec, without the skip."""
        return affine(f, self.W_dec, self.b_dec)

    def forward(self, x: Float[Tensor, "*rows D"]) -> tuple[Float[Tensor, "*rows E"], Float[Tensor, "*rows F"]]:
        """(ŷ, f), the skip included."""
        f = self.encode(x)
        y = self.decode(f)
        if self.W_skip is not None:
            y = affine(x, self.W_skip, y.new_zeros(())) + y
        return y.to(x.dtype), f
