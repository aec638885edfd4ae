"""The TopK SAE (arXiv 2406.04093): of z = x·W_enc + b_enc the k largest are kept, if positive; x̂ = f·W_dec + b_dec.

Origins write it in two ways that give the same f. dictionary_learning and sparsify take the k largest of ReLU(z);
SAELens takes the k largest of z and then the ReLU. Where fewer than k entries of z are positive, the first fills up
with zeros and the second with negative values that become zero. What is *not* the same is left out: sparsify's `signed`
(no ReLU) and `groupmax`. SAELens's `rescale_acts_by_decoder_norm` ranks z·‖W_dec‖; that is folded into the weights.

Which of several equal z at the k-th place is kept is torch's choice.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mistudio.errors import ConfigError
from mistudio.sae.base import SAE, SAEConfig, affine, check_weights, refuse_training_form


@dataclass(frozen=True, kw_only=True)
class TopKConfig(SAEConfig):
    """The sizes of a TopK SAE, its k, and where it belongs."""

    k: int
    """How many features at most are active on a row."""

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_training_form(self)
        if not 1 <= self.k <= self.d_sae:
            raise ConfigError(f"k must be between 1 and d_sae ({self.d_sae}), not {self.k}")

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every parameter."""
        d, f = self.d_model, self.d_sae
        return {"W_enc": (d, f), "b_enc": (f,), "W_dec": (f, d), "b_dec": (d,)}


class TopKSAE(SAE):
    """A TopK SAE, L0 ≤ k on every row."""

    Config = TopKConfig

    def __init__(self, config: TopKConfig, weights: Mapping[str, Tensor]):
        """`weights`: tensors by name, of the shapes `config.shapes()`. SAEError: a name or shape is wrong."""
        super().__init__()
        check_weights(config, weights)
        self.config = config
        self.k = config.k
        self.W_enc = nn.Parameter(weights["W_enc"])
        self.b_enc = nn.Parameter(weights["b_enc"])
        self.W_dec = nn.Parameter(weights["W_dec"])
        self.b_dec = nn.Parameter(weights["b_dec"])

    def encode(self, x: Float[Tensor, "*rows D"]) -> Float[Tensor, "*rows F"]:
        """ReLU(z) at the k largest entries of each row of z = x·W_enc + b_enc, 0 elsewhere."""
        values, indices = affine(x, self.W_enc, self.b_enc).relu().topk(self.k, dim=-1, sorted=False)
        f = torch.zeros(*x.shape[:-1], self.config.d_sae, dtype=values.dtype, device=values.device)
        return f.scatter(-1, indices, values)

    def decode(self, f: Float[Tensor, "*rows F"]) -> Float[Tensor, "*rows D"]:
        """f·W_dec + b_dec."""
        return affine(f, self.W_dec, self.b_dec)

    def forward(self, x: Float[Tensor, "*rows D"]) -> tuple[Float[Tensor, "*rows D"], Float[Tensor, "*rows F"]]:
        """(x̂, f)."""
        f = self.encode(x)
        return self.decode(f).to(x.dtype), f
