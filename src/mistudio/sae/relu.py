"""The ReLU SAE, the "standard" one: f = ReLU(x·W_enc + b_enc), x̂ = f·W_dec + b_dec."""

from collections.abc import Mapping
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor, nn

from mistudio.sae.base import SAE, SAEConfig, affine, check_weights, refuse_training_form


@dataclass(frozen=True, kw_only=True)
class ReLUConfig(SAEConfig):
    """The sizes of a ReLU SAE and where it belongs."""

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_training_form(self)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every parameter."""
        d, f = self.d_model, self.d_sae
        return {"W_enc": (d, f), "b_enc": (f,), "W_dec": (f, d), "b_dec": (d,)}


class ReLUSAE(SAE):
    """A ReLU SAE. Origins that subtract b_dec from x first (SAELens, dictionary_learning's AutoEncoder) are folded:
    b_enc here is their b_enc - b_dec·W_enc."""

    Config = ReLUConfig

    def __init__(self, config: ReLUConfig, weights: Mapping[str, Tensor]):
        """`weights`: tensors by name, of the shapes `config.shapes()`. SAEError: a name or shape is wrong."""
        super().__init__()
        check_weights(config, weights)
        self.config = config
        self.W_enc = nn.Parameter(weights["W_enc"])
        self.b_enc = nn.Parameter(weights["b_enc"])
        self.W_dec = nn.Parameter(weights["W_dec"])
        self.b_dec = nn.Parameter(weights["b_dec"])

    def encode(self, x: Float[Tensor, "*rows D"]) -> Float[Tensor, "*rows F"]:
        """max(0, x·W_enc + b_enc)."""
        return affine(x, self.W_enc, self.b_enc).relu()

    def decode(self, f: Float[Tensor, "*rows F"]) -> Float[Tensor, "*rows D"]:
        """f·W_dec + b_dec."""
        return affine(f, self.W_dec, self.b_dec)

    def forward(self, x: Float[Tensor, "*rows D"]) -> tuple[Float[Tensor, "*rows D"], Float[Tensor, "*rows F"]]:
        """(x̂, f)."""
        f = self.encode(x)
        return self.decode(f).to(x.dtype), f
