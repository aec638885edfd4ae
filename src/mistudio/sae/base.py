"""What every SAE is: rows in, sparse features, rows out. One contract; the architectures are final classes beside it.

Architectures differ in `encode` alone, but for transcoders, which also write another activation than they read. They
share the orientation of Gemma Scope's files: W_enc [D, F], W_dec [F, E] and x̂ = f·W_dec + b_dec, where E = D in all but
transcoders. JumpReLU SAEs and transcoders have a training form. Others are trained in a JumpReLU SAE's tensors
(`mistudio.train.objectives`) or read from elsewhere, and as classes exist in released form only: raw units, and b_dec
folded into the encoder's bias where the origin subtracts it from x.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mistudio.errors import ConfigError, SAEError

UNIT_ROW_TOLERANCE = 1e-3
"""How far from 1 the norm of a released SAE's decoder row may be."""


@dataclass(frozen=True, kw_only=True)
class SAEConfig:
    """The sizes of an SAE, where in a model it belongs, and the units and parametrisation of its weights."""

    d_model: int
    """Width D of the activations it reads (for attn_z: heads times head size)."""
    d_sae: int
    """Number of features F."""
    hook_name: str | None = None
    """The site it was trained on, such as layers.20.resid_post."""
    hook_layer: int | None = None
    """The site's layer, counted from 0."""
    model: str | None = None
    """The language model's name."""
    pre_encoder_bias: bool = False
    """The encoder reads x - b_dec (training form)."""
    log_threshold: bool = False
    """The parameter theta is the logarithm of the threshold (training form)."""
    scale: float | None = None
    """C, where the weights read normalised rows x/C (training form); None where they read raw activations."""

    def __post_init__(self) -> None:
        if self.d_model < 1 or self.d_sae < 1:
            raise ConfigError(f"d_model and d_sae must be at least 1, not {self.d_model} and {self.d_sae}")
        if self.scale is not None and not (math.isfinite(self.scale) and self.scale > 0):
            raise ConfigError(f"scale must be a positive number or None, not {self.scale}")

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every parameter."""
        d, f = self.d_model, self.d_sae
        return {"W_enc": (d, f), "b_enc": (f,), "theta": (f,), "W_dec": (f, d), "b_dec": (d,)}


def refuse_training_form(config: SAEConfig) -> None:
    """ConfigError: the config describes a training form. For the architectures that have none."""
    if config.scale is not None or config.pre_encoder_bias or config.log_threshold:
        raise ConfigError("scale, pre_encoder_bias and log_threshold are for training JumpReLU SAEs only")


class SAE(nn.Module, ABC):
    """A sparse autoencoder or transcoder; calling it gives (x̂, f).

    `x` may have any leading axes. Everything is computed in the parameters' dtype and never below float32; x̂ comes back
    in x's dtype and f in the dtype of the computation.
    """

    Config: ClassVar[type[SAEConfig]]
    """The dataclass of its sizes and settings; `Config.shapes` are its parameters."""

    config: SAEConfig
    W_enc: nn.Parameter
    W_dec: nn.Parameter
    b_dec: nn.Parameter

    @abstractmethod
    def encode(self, x: Float[Tensor, "*rows D"]) -> Float[Tensor, "*rows F"]:
        """Feature activations f, 0 where a feature is off."""

    @abstractmethod
    def decode(self, f: Float[Tensor, "*rows F"]) -> Float[Tensor, "*rows E"]:
        """f·W_dec + b_dec."""

    @abstractmethod
    def forward(self, x: Float[Tensor, "*rows D"]) -> tuple[Float[Tensor, "*rows E"], Float[Tensor, "*rows F"]]:
        """(x̂, f)."""

    @property
    def d_in(self) -> int:
        """Width D of what it reads."""
        return self.W_enc.shape[0]

    @property
    def d_out(self) -> int:
        """Width E of what it reconstructs: D, but for transcoders."""
        return self.W_dec.shape[1]

    @property
    def folded(self) -> bool:
        """Whether this is the released form: raw units, no pre-encoder bias, raw threshold."""
        return self.config.scale is None and not self.config.pre_encoder_bias and not self.config.log_threshold

    def feature(self, i: int) -> Float[Tensor, " E"]:
        """The decoder row of feature i: the direction it writes. SAEError: there is no such feature."""
        if not 0 <= i < self.config.d_sae:
            raise SAEError(f"There is no feature {i}; this SAE has features 0 to {self.config.d_sae - 1}.")
        return self.W_dec[i]


def affine(
    x: Float[Tensor, "*rows D"], W: Float[Tensor, "D F"], b: Float[Tensor, " F"] | Float[Tensor, ""]
) -> Float[Tensor, "*rows F"]:
    """x·W + b in W's dtype, or in float32 where W's is narrower."""
    dtype = torch.promote_types(W.dtype, torch.float32)
    return x.to(dtype) @ W.to(dtype) + b


def check_weights(config: SAEConfig, weights: Mapping[str, Tensor]) -> None:
    """SAEError: the names or shapes are not those of `config.shapes()`."""
    expected = config.shapes()
    if set(weights) != set(expected):
        raise SAEError(f"An SAE has the weights {', '.join(expected)}; found {', '.join(sorted(weights))}.")
    for name, shape in expected.items():
        if tuple(weights[name].shape) != shape:
            raise SAEError(
                f"{name} has shape {list(weights[name].shape)}; d_model {config.d_model} and d_sae {config.d_sae} "
                f"want {list(shape)}."
            )
