"""What transcoders add to a step: a target of another width, and an affine skip from x to it.

    ŷ = f·W_dec + b_dec (+ x·W_skip),  f of x alone; no b_dec in the encoder, since it lies where y does.

The skip, like b_dec, belongs to every reconstruction: dL/dW_skip = xᵀ·dL/dŷ, a product of D·E, dense in every engine.
"""

import torch
from torch import Tensor

from mistudio.train.objectives.base import Trainable


def base_of(sae: Trainable, x: Tensor) -> Tensor:
    """What is reconstructed without features: b_dec [E], or b_dec + x·W_skip [B, E]."""
    W_skip = dict(sae.named_parameters()).get("W_skip")
    return sae.b_dec if W_skip is None else torch.addmm(sae.b_dec, x, W_skip)


def has_skip(sae: Trainable) -> bool:
    """Whether there is a W_skip."""
    return "W_skip" in dict(sae.named_parameters())
