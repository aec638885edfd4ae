"""Transcoders: a JumpReLU encoder that reads one activation and reconstructs another, with or without a linear skip.

    f = z·1[z > θ] with z = x·W_enc + b_enc;   ŷ = f·W_dec + b_dec (+ x·W_skip)

x [*rows, D] is what the MLP reads and ŷ [*rows, E] what it writes (Gemma Scope report, appendix B). W_enc [D, F],
W_dec [F, E], W_skip [D, E]: rows multiply from the left as everywhere here, so W_skip is Gemma Scope 2's
`affine_skip_connection` as it lies and the transpose of SAELens's `W_skip`. θ = 0 is a ReLU transcoder.

In the training form x and y are normalised each by its own scale, and theta may be log θ. `fold` leaves decoder rows
at norm 1, so that released features are in units of what is written: C_out times those in training.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mistudio.errors import ConfigError
from mistudio.sae.base import SAE, SAEConfig, affine, check_weights
from mistudio.sae.model import unit_rows


@dataclass(frozen=True, kw_only=True)
class TranscoderConfig(SAEConfig):
    """The sizes of a transcoder and the two places in a model that it connects."""

    d_out: int
    """Width E of the activations it reconstructs."""
    hook_name_out: str | None = None
    """The site it reconstructs, such as layers.20.mlp_out; `hook_name` is the one it reads."""
    skip: bool = False
    """It has a linear skip connection W_skip."""
    scale_out: float | None = None
    """C of the activations it reconstructs, where it reads and writes normalised rows (training form)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.d_out < 1:
            raise ConfigError(f"d_out must be at least 1, not {self.d_out}")
        if self.pre_encoder_bias:
            raise ConfigError("a transcoder has no pre_encoder_bias: b_dec lies where it writes, not where it reads")
        if (self.scale is None) != (self.scale_out is None):
            raise ConfigError(f"scale and scale_out go together, not {self.scale} and {self.scale_out}")
        if self.scale_out is not None and not (math.isfinite(self.scale_out) and self.scale_out > 0):
            raise ConfigError(f"scale_out must be a positive number or None, not {self.scale_out}")

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every parameter."""
        d, f, e = self.d_model, self.d_sae, self.d_out
        shapes: dict[str, tuple[int, ...]] = {"W_enc": (d, f), "b_enc": (f,), "theta": (f,), "W_dec": (f, e)}
        return shapes | {"b_dec": (e,)} | ({"W_skip": (d, e)} if self.skip else {})


def initial_transcoder_weights(
    config: TranscoderConfig, *, seed: int = 0, threshold: float = 0.001, part: slice | None = None
) -> dict[str, Tensor]:
    """A starting point in float32: encoder columns and decoder rows drawn apart from U(-1, 1) and rescaled to norm 1,
    everything else 0. They are not tied, since they lie in two spaces. `part`: of these features alone."""
    generator = torch.Generator().manual_seed(seed)
    encoder, decoder = (unit_rows(config.d_sae, n, generator, part) for n in (config.d_model, config.d_out))
    start = math.log(threshold) if config.log_threshold else threshold
    weights = {
        "W_enc": encoder.T.contiguous(),
        "b_enc": torch.zeros(len(decoder)),
        "theta": torch.full((len(decoder),), start),
        "W_dec": decoder,
        "b_dec": torch.zeros(config.d_out),
    }
    return weights | ({"W_skip": torch.zeros(config.d_model, config.d_out)} if config.skip else {})


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

    @property
    def threshold(self) -> Float[Tensor, " F"]:
        """θ, in the units of the pre-activations."""
        return self.theta.exp() if self.config.log_threshold else self.theta

    def encoder_bias(self) -> Float[Tensor, " F"]:
        """What is added to x·W_enc: b_enc."""
        return self.b_enc

    def pre_activations(self, x: Float[Tensor, "*rows D"]) -> Float[Tensor, "*rows F"]:
        """z = x·W_enc + b_enc, in float32 or the parameters' wider dtype."""
        return affine(x, self.W_enc, self.b_enc)

    def encode(self, x: Float[Tensor, "*rows D"]) -> Float[Tensor, "*rows F"]:
        """z where z > θ, else 0."""
        z = self.pre_activations(x)
        return torch.where(z > self.threshold, z, 0.0)

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

    @torch.no_grad()
    def fold(self) -> "Transcoder":
        """The same transcoder in released form: f and ŷ of raw x are C_out times those of x/C_in (in float64).

        W_enc' = (C_out/C_in)·W_enc, b_enc' = C_out·b_enc, θ' = C_out·θ, b_dec' = C_out·b_dec,
        W_skip' = (C_out/C_in)·W_skip; W_dec as it was.
        """
        C_in = 1.0 if self.config.scale is None else self.config.scale
        C_out = 1.0 if self.config.scale_out is None else self.config.scale_out
        theta = self.theta.double().exp() if self.config.log_threshold else self.theta.double()
        weights = {
            "W_enc": self.W_enc.double() * (C_out / C_in),
            "b_enc": C_out * self.b_enc.double(),
            "theta": C_out * theta,
            "W_dec": self.W_dec,
            "b_dec": C_out * self.b_dec.double(),
        }
        if self.W_skip is not None:
            weights["W_skip"] = self.W_skip.double() * (C_out / C_in)
        config = dataclasses.replace(self.config, log_threshold=False, scale=None, scale_out=None)
        return Transcoder(config, {name: w.detach().to(self.W_enc.dtype, copy=True) for name, w in weights.items()})
