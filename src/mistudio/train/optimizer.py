"""Adam without a first moment (β₁ = 0), and the constraint that decoder rows have norm 1.

Gemma Scope uses β = (0, 0.999); dropping the first moment then saves a third of the optimiser's memory. The arithmetic
is `torch.optim.Adam`'s (a test compares them), in the parameters' dtype, float32.
"""

import math
from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor


class Adam:
    """p ← p - lr · g / (√(v / (1 - β₂ᵗ)) + eps) with v ← β₂·v + (1 - β₂)·g²."""

    def __init__(self, parameters: Mapping[str, Tensor], beta2: float, eps: float):
        self.parameters, self.beta2, self.eps = parameters, beta2, eps
        self.second = {name: torch.zeros_like(p) for name, p in parameters.items()}
        self.steps = 0

    @torch.no_grad()
    def update(self, gradients: Mapping[str, Tensor], lr: float) -> None:
        """One step, in place; `gradients` are by parameter name."""
        self.steps += 1
        correction = math.sqrt(1 - self.beta2**self.steps)
        for name, p in self.parameters.items():
            g, v = gradients[name], self.second[name]
            v.mul_(self.beta2).addcmul_(g, g, value=1 - self.beta2)
            p.addcdiv_(g, v.sqrt().div_(correction).add_(self.eps), value=-lr)


@torch.no_grad()
def remove_parallel_(gradient: Float[Tensor, "F D"], W_dec: Float[Tensor, "F D"]) -> None:
    """In place: each row of the gradient loses its component along the decoder row, which renormalising would undo
    anyway."""
    along = (gradient * W_dec).sum(1, keepdim=True) / W_dec.square().sum(1, keepdim=True)
    gradient.addcmul_(along, W_dec, value=-1)


@torch.no_grad()
def normalise_rows_(W_dec: Float[Tensor, "F D"]) -> None:
    """In place: each decoder row is divided by its norm."""
    W_dec.div_(W_dec.norm(dim=1, keepdim=True))
