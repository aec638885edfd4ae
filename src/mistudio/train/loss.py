"""The loss of a batch and its gradients.

    L = 1/M Σ_m mean over rows of ‖y - x̂_m‖² (summed over the width) + w · charge + auxiliary loss

For a plain SAE M = 1 and y = x, and the charge of JumpReLU is the penalty on L0 (`objectives.penalty`); the other
architectures, Matryoshka prefixes, AuxK and transcoders are in `mistudio.train.objectives`.

`loss` is the definition, through autograd and the two pseudo-derivatives. `loss_and_gradients` is the same thing
written out for the training loop: it needs one window for both pseudo-derivatives, keeps no [B, F] matrix between
forward and backward, and goes through the rows in chunks that stay in a CPU's cache. A test holds the two equal for
every architecture and option.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mistudio.mesh import SOLO, Mesh
from mistudio.sae.code import is_entry
from mistudio.train.config import TrainConfig
from mistudio.train.objectives import Trainable, objective_of
from mistudio.train.objectives.auxk import auxiliary_loss, below_the_largest
from mistudio.train.objectives.matryoshka import groups, suffix_sums_
from mistudio.train.objectives.penalty import row_price, threshold_gradient
from mistudio.train.objectives.transcoder import base_of, has_skip

CPU_CHUNK_ROWS = 256
"""Rows worked on at once on a CPU: 256 rows of 4,096 features are 4 MB."""
CHUNK_ENTRIES = 1 << 26
"""Entries of [b, F] at most, where F is so large that fewer rows must do: 256 MB in float32."""
GPU_CHUNK_ENTRIES = 1 << 29
"""The same on a GPU, which wants large products: 2 GB, the whole batch of 4,096 rows up to 131,072 features."""


@dataclass(frozen=True)
class Terms:
    """What one batch says, as tensors on its device, so that reading nothing costs no synchronisation."""

    loss: Float[Tensor, ""]
    mse: Float[Tensor, ""]
    """Mean over rows of ‖y - x̂‖², by all features."""
    l0: Float[Tensor, ""]
    """Mean number of active features in a row."""
    fired: Float[Tensor, " F"]
    """In how many rows each feature was active."""
    entries: Float[Tensor, ""]
    """How many entries of z are active or in the kernel window, which is what a sparse step costs. A dense step
    counts those below θ in its first chunk of rows only."""
    smallest: Float[Tensor, ""] | None = None
    """How small the values are that were kept, for architectures whose θ follows that (`Objective.smallest`)."""


def loss(
    sae: Trainable,
    x: Float[Tensor, "B D"],
    cfg: TrainConfig,
    weight: float,
    y: Float[Tensor, "B E"] | None = None,
    dead: Bool[Tensor, " F"] | None = None,
) -> Terms:
    """The terms of a batch with a graph behind `loss`: the definition.

    weight: w at this step. y: what to reconstruct; None: x. dead: the features that count as dead, for AuxK, whose
    thresholds have no gradient.
    """
    objective, target, base = objective_of(cfg), x if y is None else y, base_of(sae, x)
    z = sae.pre_activations(x)  # [B, F]
    threshold = sae.threshold
    if cfg.aux_k is not None and dead is not None:
        threshold = torch.where(dead, threshold.detach(), threshold)
    f, active = objective.features(z, threshold, cfg)
    ends = [hi for _, hi in groups(cfg, f.shape[1])]
    residuals = [f[:, :end] @ sae.W_dec[:end] + base - target for end in ends]
    squares = [residual.square().sum(1).mean() for residual in residuals]
    row_l0, fired = active.sum(1), active.sum(0)
    total = torch.stack(squares).mean() + weight * objective.charge(row_l0, fired, f.sum(), cfg)
    if cfg.aux_k is not None and dead is not None and bool(dead.any()):
        total = total + auxiliary_loss(z, sae.W_dec, residuals[-1], dead, cfg.aux_k, cfg.aux_weight)
    entries = is_entry(z, sae.threshold, cfg.bandwidth).sum() if cfg.trains_threshold else active.sum()
    smallest = None
    if objective.wants_smallest:
        smallest = objective.smallest(torch.where(active > 0, z, torch.inf).amin(1), row_l0, cfg).detach()
    return Terms(total, squares[-1], row_l0.mean(), fired.detach(), entries.to(total.dtype), smallest)


@torch.no_grad()
def loss_and_gradients(
    sae: Trainable,
    x: Float[Tensor, "B D"],
    cfg: TrainConfig,
    weight: float,
    y: Float[Tensor, "B E"] | None = None,
    dead: Bool[Tensor, " F"] | None = None,
    mesh: Mesh = SOLO,
) -> tuple[Terms, dict[str, Tensor]]:
    """The terms of a batch and dL/dp of every parameter p: what autograd makes of `loss`, to rounding.

    On a mesh x and y are this process's rows and sae has its features; terms and gradients are of the whole batch.

    Cost: five products of B·D·F multiply-adds (BatchTopK: six) and about ten passes over [B, F] in cache.
    """
    step = _DenseStep(sae, x, cfg, weight, dead, mesh)
    pieces = [x.split(step.chunk_rows), (x if y is None else y).split(step.chunk_rows)]
    for chunk, target in zip(*pieces, strict=True):
        step.add(chunk, target)
    step.sum_over_replicas()
    return step.terms(), step.gradients()


def chunk_rows(cfg: TrainConfig, rows: int, n_features: int, device: torch.device) -> int:
    """How many rows a dense step works on at once."""
    if cfg.micro_rows is not None:
        return min(rows, cfg.micro_rows)
    if device.type != "cpu":
        return max(1, min(rows, GPU_CHUNK_ENTRIES // n_features))
    return max(1, min(CPU_CHUNK_ROWS, CHUNK_ENTRIES // n_features))


class _DenseStep:
    """The sums over the chunks of a batch that make up the loss and its gradients."""

    def __init__(self, sae: Trainable, x: Tensor, cfg: TrainConfig, weight: float, dead: Tensor | None, mesh: Mesh):
        self.sae, self.cfg, self.weight, self.mesh = sae, cfg, weight, mesh
        self.rows = len(x) * mesh.rows
        self.objective, self.ranges = objective_of(cfg), groups(cfg, sae.config.d_sae, mesh)
        self.threshold, self.bias = sae.threshold, sae.encoder_bias()
        self.chunk_rows = chunk_rows(cfg, len(x), sae.config.d_sae, x.device)
        self.cut = self.objective.cut(self._pre_activations(x), len(x), cfg)
        self.dead = None if dead is None or cfg.aux_k is None else dead.nonzero().squeeze(1)
        self.d_enc, self.d_dec = torch.zeros_like(sae.W_enc), torch.zeros_like(sae.W_dec)
        sums = (torch.zeros_like(self.bias) for _ in range(5))
        self.d_z_sum, self.d_f_windowed, self.price_windowed, self.number_windowed, self.fired = sums
        self.d_x_hat_sum = torch.zeros_like(sae.b_dec)
        self.d_skip = torch.zeros_like(dict(sae.named_parameters())["W_skip"]) if has_skip(sae) else None
        self.squares: list[Tensor] = []
        """Of the whole reconstruction, chunk by chunk."""
        self.row_l0: list[Tensor] = []
        self.total, self.prefix_squares, self.aux = (self.bias.new_zeros(()) for _ in range(3))
        self.below = self.bias.new_zeros(())
        self.row_least: list[Tensor] = []

    def _pre_activations(self, x: Tensor) -> Iterator[Tensor]:
        return (torch.addmm(self.bias, chunk, self.sae.W_enc) for chunk in x.split(self.chunk_rows))

    def add(self, x: Tensor, y: Tensor) -> None:
        """A chunk of rows and what they are to become."""
        sae, cfg = self.sae, self.cfg
        z = torch.addmm(self.bias, x, sae.W_enc)
        active = self.objective.on(z, self.threshold, self.cut, cfg)
        window = self._window(z, active) if cfg.trains_threshold else None
        auxiliary = self._dead_features(z)
        if self.objective.wants_smallest:
            self.row_least.append(torch.where(active > 0, z, torch.inf).amin(1))
        f = z.mul_(active)
        if not cfg.trains_threshold:
            self.total += f.sum()
        planes = self._planes(f, x, y, auxiliary)
        self.row_l0.append(self.mesh.sum_features(active.sum(1)))
        self.fired += active.sum(0)
        d_x_hat = planes.mul_(2 / self.rows)
        self.d_x_hat_sum += d_x_hat[0].sum(0)
        if self.d_skip is not None:
            self.d_skip.addmm_(x.T, d_x_hat[0])
        d_f = self._through_decoder(f, d_x_hat)
        if window is not None:
            self.price_windowed.addmv_(window.T, row_price(self.row_l0[-1], self.rows, cfg))
            self.d_f_windowed += window.mul_(d_f).sum(0)
        d_z = d_f.mul_(active)
        if bonus := self.weight * self.objective.bonus(self.rows):
            d_z.add_(active, alpha=bonus)
        self.d_enc.addmm_(x.T, d_z)
        self.d_z_sum += d_z.sum(0)
        if auxiliary is not None:
            self._add_auxiliary(x, auxiliary, d_x_hat[-1])

    def _window(self, z: Tensor, active: Tensor) -> Tensor:
        window = torch.lt((z - self.threshold).abs_(), self.cfg.bandwidth / 2, out=torch.empty_like(z))
        if self.dead is not None:
            window[:, self.dead] = 0.0
        if not self.squares:
            self.below = (window > active).sum() * (self.rows / self.mesh.rows / len(z))
        if self.cfg.frequency_weight > 0:
            self.number_windowed += window.sum(0)
        return window

    def _dead_features(self, z: Tensor) -> Tensor | None:
        """The auxiliary f of the dead features [b, n], where there are any."""
        if self.dead is None or self.cfg.aux_k is None:
            return None
        z = z[:, self.dead].relu_()
        values, where = z.topk(min(self.cfg.aux_k, z.shape[1]), dim=1)
        if self.mesh.features > 1:
            values = values.masked_fill(below_the_largest(values, self.cfg.aux_k, self.mesh), 0.0)
        return torch.zeros_like(z).scatter_(1, where, values)

    def _planes(self, f: Tensor, x: Tensor, y: Tensor, auxiliary: Tensor | None) -> Tensor:
        """Every group's plane [M, b, E], and one more for the auxiliary features."""
        sae, base = self.sae, base_of(self.sae, x)
        lo, hi = self.ranges[0]
        if self.mesh.feature_rank == 0:
            residuals = [torch.addmm(base, f[:, lo:hi], sae.W_dec[lo:hi]).sub_(y)]  # x̂ - y
        else:
            residuals = [f[:, lo:hi] @ sae.W_dec[lo:hi]]
        for lo, hi in self.ranges[1:]:
            residuals.append(torch.addmm(residuals[-1], f[:, lo:hi], sae.W_dec[lo:hi]))
        for residual in residuals:
            self.mesh.sum_features(residual)
        self.squares.append(residuals[-1].square().sum())
        if len(residuals) == 1 and auxiliary is None:
            return residuals[0][None]
        left_over = None
        if auxiliary is not None:
            left_over = residuals[-1] + self.mesh.sum_features(auxiliary @ sae.W_dec[self.dead])
        stacked = torch.stack(residuals)
        self.prefix_squares += stacked[:-1].square().sum()
        planes = suffix_sums_(stacked)
        if left_over is None:
            return planes
        self.aux += left_over.square().sum() * self.cfg.aux_weight
        return torch.cat((planes, left_over[None] * self.cfg.aux_weight))

    def _through_decoder(self, f: Tensor, d_x_hat: Tensor) -> Tensor:
        """d_f [b, F]; the decoder's gradient is added to."""
        d_dec, W_dec = self.d_dec, self.sae.W_dec
        if len(self.ranges) == 1:
            d_dec.addmm_(f.T, d_x_hat[0])
            return d_x_hat[0] @ W_dec.T
        d_f = torch.empty_like(f)
        for plane, (lo, hi) in zip(d_x_hat, self.ranges, strict=False):
            d_dec[lo:hi].addmm_(f[:, lo:hi].T, plane)
            d_f[:, lo:hi] = plane @ W_dec[lo:hi].T
        return d_f

    def _add_auxiliary(self, x: Tensor, f: Tensor, d_e_hat: Tensor) -> None:
        dead = self.dead
        # f.T @ d_e_hat would have other bits with other numbers of threads where f is thin
        self.d_dec[dead] += (d_e_hat.T @ f).T
        d_z = (d_e_hat @ self.sae.W_dec[dead].T).mul_(f > 0)
        self.d_enc[:, dead] += x.T @ d_z
        self.d_z_sum[dead] += d_z.sum(0)

    def sum_over_replicas(self) -> None:
        """What was added up over this process's rows becomes the sum over all rows."""
        mesh = self.mesh
        self.row_l0 = [mesh.join_rows(torch.cat(self.row_l0))]
        self.squares = [mesh.sum_rows(torch.stack(self.squares).sum())]
        if mesh.rows == 1:
            return
        by_feature = (self.d_enc, self.d_dec, self.d_z_sum, self.d_f_windowed, self.price_windowed, self.fired)
        for tensor in (*by_feature, self.number_windowed, self.d_x_hat_sum, self.total, self.prefix_squares, self.aux):
            mesh.sum_rows(tensor)
        if self.d_skip is not None:
            mesh.sum_rows(self.d_skip)
        self.below = mesh.sum_rows(self.below.to(self.fired.dtype))

    def terms(self) -> Terms:
        """What the batch said."""
        mesh, row_l0, M = self.mesh, torch.cat(self.row_l0), len(self.ranges)
        mse = torch.stack(self.squares).sum() / self.rows
        reconstruction = mse if M == 1 else (mse + self.prefix_squares / self.rows) / M
        total_f, entries = mesh.sum_features(self.total), mesh.sum_features(self.fired.sum() + self.below)
        charge = self.objective.charge(row_l0, mesh.join_features(self.fired), total_f, self.cfg)
        total = reconstruction + self.weight * charge
        if self.cfg.aux_k is not None:
            total = total + self.aux / self.rows
        smallest = None
        if self.row_least:
            smallest = self.objective.smallest(mesh.join_rows(torch.cat(self.row_least)), row_l0, self.cfg)
        return Terms(total, mse, row_l0.mean(), self.fired, entries, smallest)

    def gradients(self) -> dict[str, Tensor]:
        """The chain from bias to b_enc, b_dec and W_enc (bias = b_enc - b_dec·W_enc), and from θ to log θ."""
        sae, d_b_dec = self.sae, self.d_x_hat_sum
        if sae.config.pre_encoder_bias:
            d_b_dec = d_b_dec - self.mesh.sum_features(sae.W_enc @ self.d_z_sum)
            self.d_enc.addr_(sae.b_dec, self.d_z_sum, alpha=-1)
        found = {"W_enc": self.d_enc, "b_enc": self.d_z_sum, "W_dec": self.d_dec, "b_dec": d_b_dec}
        if self.cfg.trains_threshold:
            windowed = (self.d_f_windowed, self.price_windowed, self.number_windowed)
            row_l0 = torch.cat(self.row_l0)
            d_theta = threshold_gradient(self.threshold, windowed, self.fired, row_l0, self.weight, self.cfg)
            found["theta"] = d_theta * self.threshold if sae.config.log_threshold else d_theta
        return found if self.d_skip is None else {**found, "W_skip": self.d_skip}
