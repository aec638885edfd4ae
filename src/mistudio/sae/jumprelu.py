"""JumpReLU and the Heaviside step, with the pseudo-derivatives that let a threshold be trained.

Both functions are piecewise constant in θ, so their true derivative tells a threshold nothing. The JumpReLU paper
(arXiv 2407.14435, section 4) replaces it by a kernel density estimate of the derivative of the *expected* loss, with
the rectangle K(u) = 1 where |u| < 1/2 and 0 elsewhere, and the bandwidth ε. Three points decide whether that works,
and the tests hold them: both halves of the window |z-θ| < ε/2 count, so the step must see the pre-activations z and
not the outputs (which are 0 in the lower half); the step sends no gradient to z; and θ's gradient is summed over all
rows.

θ is the threshold itself here. Where log θ is the parameter, `threshold = log_theta.exp()` outside adds the chain
factor θ. ε means something only beside the size of z: 0.001 presumes E‖x‖² = 1.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


def jumprelu(z: Float[Tensor, "*rows F"], threshold: Float[Tensor, " F"], bandwidth: float) -> Float[Tensor, "*rows F"]:
    """z·H(z-θ): z where z > θ, else 0. ∂/∂z = 1[z > θ]; ∂/∂θ = -(θ/ε)·K((z-θ)/ε), summed over rows."""
    return _JumpReLU.apply(z, threshold, bandwidth)


def step(z: Float[Tensor, "*rows F"], threshold: Float[Tensor, " F"], bandwidth: float) -> Float[Tensor, "*rows F"]:
    """H(z-θ): 1 where z > θ, else 0; its sum over F is the L0. ∂/∂z = 0; ∂/∂θ = -(1/ε)·K((z-θ)/ε), summed over rows.

    `z` are pre-activations: given JumpReLU's outputs instead, the lower half of the window would be lost.
    """
    return _Step.apply(z, threshold, bandwidth)


def in_window(z: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    """Where K((z-θ)/ε) is 1: a boolean tensor of z's shape, true for |z-θ| < ε/2 on both sides of θ."""
    return (z - threshold).abs() < bandwidth / 2


class _JumpReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(z, threshold)
        ctx.bandwidth = bandwidth
        return torch.where(z > threshold, z, 0.0)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        (d_out,) = gradients
        z, threshold = ctx.saved_tensors
        d_z = torch.where(z > threshold, d_out, 0.0)
        windowed = torch.where(in_window(z, threshold, ctx.bandwidth), d_out, 0.0)
        return d_z, -(threshold / ctx.bandwidth) * _sum_rows(windowed), None


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(z, threshold)
        ctx.bandwidth = bandwidth
        return (z > threshold).to(z.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor, None]:
        (d_out,) = gradients
        z, threshold = ctx.saved_tensors
        windowed = torch.where(in_window(z, threshold, ctx.bandwidth), d_out, 0.0)
        return None, -_sum_rows(windowed) / ctx.bandwidth, None


def _sum_rows(values: Tensor) -> Tensor:
    return values.reshape(-1, values.shape[-1]).sum(0)
