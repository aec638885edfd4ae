"""One step of training that costs about one product: the entries of z that matter, and nothing else.

With L0 ≈ 70 of 16,384 features, four of a dense step's five products are nearly all zeros. Here the encoder's product
finds the entries that are active or in the kernel window; the reconstruction, the gradients of both weight matrices, of
thresholds and biases, and Adam's update then run over these. It is the same step up to the order of sums:

- d_f is needed at entries only: dz is 0 where a feature is off, and θ's gradient is 0 outside the window;
- the gradient of b_dec through the pre-encoder bias is Σ_j (Σ_b dz_bj)·W_enc[j], a matrix times a vector;
- rows of features that did not fire have gradient 0, and Adam with β₁ = 0 leaves them where they are (`optimizer`);
- b_enc, θ and b_dec are vectors and take a dense update.

The penalties reach thresholds through the price of a row at the entries in the window (`loss`), so all three stay
sparse. At a start, about half of all features fire, and a dense step is faster: `pays` decides, from the entries of
the step before.
"""

import functools
import warnings
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from mistudio.sae import JumpReLUSAE
from mistudio.sae.code import FeatureCode, select
from mistudio.train import definition
from mistudio.train.config import TrainConfig
from mistudio.train.loss import Terms, common_price, penalty, row_price
from mistudio.train.optimizer import Adam

if TYPE_CHECKING:
    from mistudio.train.compiled import Screen

CROSSOVER = 0.06
"""The part of [B, F] that may be entries for a sparse step to be taken. At 0.06 it took 0.45 of a dense one at D=2304,
F=16,384 and 0.36 at D=192, F=1,536 (benchmarks/step.py --crossover, one thread); gathers gain less from more cores than
products do, hence the distance to 1. A constant and not a measurement, because a rerun must choose alike."""


def pays(entries: float, rows: int, n_features: int) -> bool:
    """Whether a sparse step of a batch with that many entries is faster than a dense one."""
    return entries < CROSSOVER * rows * n_features


@functools.cache
def numba_is_there() -> bool:
    """Whether the compiled kernels can be used; says once what is missed where they cannot."""
    try:
        import numba  # noqa: F401
    except ImportError:
        warnings.warn(
            "numba is not installed, so the sparse training step is not used (with engine sparse: runs in plain torch, "
            "slowly). Install it with `pip install numba`.",
            stacklevel=2,
        )
        return False
    return True


class SparseStep:
    """Takes a JumpReLU SAE on a CPU through sparse steps; shares parameters and Adam with the dense ones."""

    def __init__(self, sae: JumpReLUSAE, cfg: TrainConfig, adam: Adam, *, compiled: bool):
        """`compiled`: by numba's kernels; else as defined."""
        self.sae, self.cfg, self.adam, self.compiled = sae, cfg, adam, compiled
        self.screen: Screen | None = None
        self.reconstruct, self.visit = definition.reconstruct, definition.visit
        if compiled:
            from mistudio.train import compiled as kernels

            self.reconstruct, self.visit = kernels.reconstruct, kernels.visit
        self.stale = True
        """Whether W_enc may have changed outside this class."""

    @torch.no_grad()
    def update(self, x: Float[Tensor, "B D"], weight: float, lr: float) -> Terms:
        """The terms of the batch; every parameter has taken its step, the decoder's rows have norm 1."""
        cfg, centred = self.cfg, self.sae.config.pre_encoder_bias
        p = {name: parameter.detach() for name, parameter in self.sae.named_parameters()}
        threshold = self.sae.threshold.detach()
        x = x.contiguous()
        code = self.select(x, threshold)
        d_x_hat, squares, row_l0 = self.reconstruct(code, x, p["W_dec"], p["b_dec"], threshold)
        price = row_price(row_l0, len(x), cfg)
        sums, d_centre, touched = self.visit(
            code, x, d_x_hat, p, threshold, price, cfg.bandwidth, centred, self.adam, lr
        )
        d_z, d_f_windowed, price_windowed, fired = sums.unbind(1)
        price_windowed = price_windowed * (weight * common_price(row_l0, cfg))
        d_theta = (threshold * d_f_windowed + price_windowed) / -cfg.bandwidth
        d_theta = d_theta * threshold if self.sae.config.log_threshold else d_theta
        d_b_dec = d_x_hat.sum(0) - d_centre if centred else d_x_hat.sum(0)
        self.adam.update({"b_enc": d_z, "theta": d_theta, "b_dec": d_b_dec}, lr)
        if self.screen is not None:
            self.screen.refresh(touched)
        mse = squares.sum() / len(x)
        entries = mse.new_tensor(len(code.values))
        return Terms(mse + weight * penalty(row_l0, cfg), mse, row_l0.mean(), fired, entries)

    def select(self, x: Tensor, threshold: Tensor) -> FeatureCode:
        """The batch's entries."""
        sae, bandwidth = self.sae, self.cfg.bandwidth
        if not self.compiled:
            return select(x, sae.W_enc.detach(), sae.encoder_bias().detach(), threshold, bandwidth)
        b_dec = sae.b_dec.detach() if sae.config.pre_encoder_bias else None
        return self._fresh_screen().select(x, sae.b_enc.detach(), b_dec, threshold, bandwidth)

    def _fresh_screen(self) -> "Screen":
        from mistudio.train.compiled import Screen

        if self.screen is None:
            self.screen = Screen(self.sae.W_enc.detach().T)
        elif self.stale:
            self.screen.refresh(torch.ones(len(self.screen.W), dtype=torch.bool))
        self.stale = False
        return self.screen
