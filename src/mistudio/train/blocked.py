"""A dense step that never holds a whole gradient: it works on some features at a time (`micro_features`).

With 393,216 features of 2,304 numbers the gradients of W_enc and W_dec take 7.2 GB, as much as the weights. But a
feature's rows need nothing from other features once the residual is known. So there are two passes over blocks of
features: the first sums the reconstruction, the second computes a block's gradients and takes Adam's step with them.
z is computed in both, which makes seven products of B·D·F multiply-adds instead of five.

For architectures whose features are on by a threshold, jumprelu and relu: only these have dense steps at first.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from mistudio.mesh import SOLO, Mesh
from mistudio.train.config import TrainConfig
from mistudio.train.definition import apply_rows
from mistudio.train.loss import Terms, chunk_rows
from mistudio.train.objectives import Trainable, objective_of
from mistudio.train.objectives.matryoshka import groups, suffix_sums_
from mistudio.train.objectives.penalty import row_price, threshold_gradient
from mistudio.train.objectives.transcoder import base_of, has_skip
from mistudio.train.optimizer import Adam, with_gradient


@torch.no_grad()
def blocked_update(
    sae: Trainable,
    adam: Adam,
    x: Tensor,
    y: Tensor,
    cfg: TrainConfig,
    weight: float,
    lr: float,
    mesh: Mesh = SOLO,
) -> Terms:
    """The terms of a batch x [B, D], y [B, E]; every parameter has taken its step, the decoder's rows have norm 1.

    The same as a dense step but for rounding. Memory: residuals [M, B, E], and of the features in a block gradients
    [n, D] and [n, E] and some matrices [b, n].
    """
    step = _BlockedStep(sae, cfg, x, y, weight, mesh)
    terms = step.reconstruct()
    return step.descend(adam, lr, terms)


class _BlockedStep:
    """What both passes over the features share."""

    def __init__(self, sae: Trainable, cfg: TrainConfig, x: Tensor, y: Tensor, weight: float, mesh: Mesh):
        assert cfg.micro_features is not None
        self.sae, self.cfg, self.x, self.y, self.weight = sae, cfg, x, y, weight
        self.mesh, self.objective, self.ranges = mesh, objective_of(cfg), groups(cfg, sae.config.d_sae, mesh)
        self.batch_rows = len(x) * mesh.rows
        """Of all replicas."""
        self.threshold, self.bias = sae.threshold.detach(), sae.encoder_bias().detach()
        self.p = {name: parameter.detach() for name, parameter in sae.named_parameters()}
        self.rows = chunk_rows(cfg, len(x), min(cfg.micro_features, sae.config.d_sae), x.device)
        self.planes = y.new_empty(len(self.ranges), *y.shape)
        self.all_l0 = x.new_zeros(0)
        self.row_l0, self.fired = x.new_zeros(len(x)), torch.zeros_like(self.bias)
        sums = (torch.zeros_like(self.bias) for _ in range(4))
        self.d_z_sum, self.d_f_windowed, self.price_windowed, self.number_windowed = sums

    def _blocks(self, lo: int, hi: int) -> Iterator[slice]:
        """The blocks of the features [lo, hi)."""
        assert self.cfg.micro_features is not None
        for first in range(lo, hi, self.cfg.micro_features):
            yield slice(first, min(first + self.cfg.micro_features, hi))

    def _chunks(self) -> Iterator[slice]:
        for first in range(0, len(self.x), self.rows):
            yield slice(first, first + self.rows)

    def _encode(self, rows: slice, block: slice) -> tuple[Tensor, Tensor]:
        """(z, on) of some rows and features."""
        z = torch.addmm(self.bias[block], self.x[rows], self.p["W_enc"][:, block])
        return z, self.objective.on(z, self.threshold[block], None, self.cfg)

    def reconstruct(self) -> Terms:
        """The first pass: what the batch says. `planes` then are dL/dx̂, group by group."""
        total, entries = self.x.new_zeros(()), self.x.new_zeros(())
        mesh, rows_of_all = self.mesh, self.batch_rows
        residual = base_of(self.sae, self.x).detach() - self.y if mesh.feature_rank == 0 else torch.zeros_like(self.y)
        for plane, (lo, hi) in zip(self.planes, self.ranges, strict=True):
            for block in self._blocks(lo, hi):
                for rows in self._chunks():
                    z, on = self._encode(rows, block)
                    if self.cfg.trains_threshold:
                        near = (z - self.threshold[block]).abs_() < self.cfg.bandwidth / 2
                        entries += (near & (on == 0)).sum()
                    f = z.mul_(on)
                    total += f.sum()
                    residual[rows].addmm_(f, self.p["W_dec"][block])
                    self.row_l0[rows] += on.sum(1)
                    self.fired[block] += on.sum(0)
            plane.copy_(residual)
        mesh.sum_features(self.planes)
        squares = mesh.sum_rows(self.planes.square().sum((1, 2))) / rows_of_all
        suffix_sums_(self.planes).mul_(2 / rows_of_all)
        self.all_l0 = mesh.join_rows(mesh.sum_features(self.row_l0))
        mesh.sum_rows(self.fired)
        total, entries = (mesh.sum_rows(mesh.sum_features(t)) for t in (total, entries))
        charge = self.objective.charge(self.all_l0, mesh.join_features(self.fired), total, self.cfg)
        loss = squares.mean() + self.weight * charge
        entries += mesh.sum_features(self.fired.sum())
        return Terms(loss, squares[-1], self.all_l0.mean(), self.fired, entries)

    def descend(self, adam: Adam, lr: float, terms: Terms) -> Terms:
        """The second pass: every parameter takes its step."""
        mesh, d_b_dec, d_centre = self.mesh, self.planes[0].sum(0), torch.zeros_like(self.p["b_dec"])
        vectors = {"W_skip": mesh.sum_rows(self.x.T @ self.planes[0])} if has_skip(self.sae) else {}
        centred, W_enc = self.sae.config.pre_encoder_bias, self.p["W_enc"]
        for plane, (lo, hi) in zip(self.planes, self.ranges, strict=True):
            for block in self._blocks(lo, hi):
                d_enc, d_dec = self._gradients(block, plane)
                if centred:
                    d_centre += W_enc[:, block] @ self.d_z_sum[block]
                    d_enc.addr_(self.d_z_sum[block], self.p["b_dec"], alpha=-1)
                features = torch.arange(block.start, block.stop, device=self.x.device)
                if adam.first:
                    some = with_gradient(d_enc, d_dec)
                    features, d_enc, d_dec = features[some], d_enc[some], d_dec[some]
                apply_rows(features, d_enc, d_dec, self.p, adam, lr)
        d_b_dec = mesh.sum_rows(d_b_dec) - mesh.sum_features(d_centre)
        if self.cfg.trains_threshold:
            windowed = (self.d_f_windowed, self.price_windowed, self.number_windowed)
            d_theta = threshold_gradient(self.threshold, windowed, self.fired, self.all_l0, self.weight, self.cfg)
            vectors["theta"] = d_theta * self.threshold if self.sae.config.log_threshold else d_theta
        adam.update({"b_enc": self.d_z_sum, "b_dec": d_b_dec, **vectors}, lr)
        return terms

    def _gradients(self, block: slice, plane: Tensor) -> tuple[Tensor, Tensor]:
        """(dL/dW_enc [n, D], dL/dW_dec [n, E]) of a block's rows, b_dec in the encoder left out; its sums are added."""
        W_dec = self.p["W_dec"][block]
        d_enc, d_dec = W_dec.new_zeros(len(W_dec), self.x.shape[1]), torch.zeros_like(W_dec)
        bonus = self.weight * self.objective.bonus(self.batch_rows)
        for rows in self._chunks():
            z, on = self._encode(rows, block)
            d_f = plane[rows] @ W_dec.T
            if self.cfg.trains_threshold:
                near = ((z - self.threshold[block]).abs_() < self.cfg.bandwidth / 2).to(z.dtype)
                price = row_price(self.row_l0[rows], self.batch_rows, self.cfg)
                self.price_windowed[block].addmv_(near.T, price)
                self.number_windowed[block] += near.sum(0)
                self.d_f_windowed[block] += near.mul_(d_f).sum(0)
            d_dec.addmm_(z.mul_(on).T, plane[rows])
            d_z = d_f.add_(bonus).mul_(on)
            d_enc.addmm_(d_z.T, self.x[rows])
            self.d_z_sum[block] += d_z.sum(0)
        sums = (self.d_z_sum, self.d_f_windowed, self.price_windowed, self.number_windowed)
        for gradient in (d_enc, d_dec, *(t[block] for t in sums)):
            self.mesh.sum_rows(gradient)
        return d_enc, d_dec
