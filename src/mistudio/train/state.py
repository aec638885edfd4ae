"""What changes while a run goes on: weights, optimiser, silent-feature counters, and the metrics line being gathered.

Nothing here synchronises with the device except `metrics` and `check_finite`, which the loop calls at log steps and
before a checkpoint, and resampling, which is rare. Non-finite values and leaps of the loss are caught without reading
anything (`watch`).
"""

import math
from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from mistudio.errors import TrainError
from mistudio.mesh import SOLO, Mesh
from mistudio.pages import in_large_pages
from mistudio.sae import SAE
from mistudio.sae.code import FeatureCode
from mistudio.train.blocked import blocked_update
from mistudio.train.config import TrainConfig
from mistudio.train.failures import Measured
from mistudio.train.log import Metrics
from mistudio.train.loss import Terms, loss_and_gradients
from mistudio.train.objectives import Trainable, objective_of
from mistudio.train.objectives.matryoshka import groups
from mistudio.train.optimizer import FEATURE_AXIS, SHARED, Adam, clip_factor, normalise_rows_, remove_parallel_
from mistudio.train.resample import due, resample
from mistudio.train.schedules import lr_at, sparsity_weight_at
from mistudio.train.sparse import SparseStep, kernels_are_there, may_be_sparse, pays
from mistudio.train.start import first_threshold, whole_config
from mistudio.train.threads import column_sums, in_rows, leading
from mistudio.train.watch import Watch

CACHED_ROWS = 256
"""Rows of a batch that are looked at together on a CPU, where a copy of all of them would leave the cache."""


class TrainState:
    """A run between two steps; `update` takes it through one."""

    def __init__(self, sae: Trainable, cfg: TrainConfig, mesh: Mesh = SOLO):
        """On a mesh `sae` has this process's features."""
        device = sae.W_enc.device
        self.sae, self.cfg, self.objective, self.mesh = sae, cfg, objective_of(cfg), mesh
        groups(cfg, sae.config.d_sae, mesh)  # says if the prefixes do not fit the width
        if cfg.k is not None and cfg.k > sae.config.d_sae * mesh.features:
            raise TrainError(f"k is {cfg.k}, and the SAE has {sae.config.d_sae * mesh.features} features; lower k.")
        self.step = 0
        sparse = may_be_sparse(cfg, device)
        compiled = sparse and kernels_are_there(device)
        if sparse:  # a feature's encoder weights become one stretch of memory; the shape stays [D, F]
            sae.W_enc.data = sae.W_enc.data.T.contiguous().T
        matrix_lr = 1.0 if cfg.lr_width is None else math.sqrt(cfg.lr_width / sae.config.d_model)
        named = dict(sae.named_parameters())
        self.adam = Adam(named, cfg.beta2, cfg.adam_eps, cfg.vector_lr, cfg.beta1, matrix_lr)
        if sparse:
            gathered = (named, self.adam.second, self.adam.first)
            in_large_pages(tensors[name] for tensors in gathered for name in FEATURE_AXIS if name in tensors)
        self.sparse = SparseStep(sae, cfg, self.adam, compiled=compiled, mesh=mesh) if sparse else None
        in_a_row = sae.config.d_sae * mesh.features if cfg.k is None else min(cfg.k, sae.config.d_sae)
        self.entries = torch.full((), in_a_row * cfg.batch_rows, dtype=torch.float64, device=device)
        """Entries of the last step's batch that were active or in the kernel window; before the first step all, or as
        many as the architecture keeps."""
        self.silent_rows = torch.zeros(sae.config.d_sae, dtype=torch.int64, device=device)
        """Rows since each feature was last active."""
        self.sums = torch.zeros(5, dtype=torch.float64, device=device)
        """Since the last metrics line: loss, mse, in-batch variance, L0, steps."""
        self.resampled = torch.zeros((), dtype=torch.int64, device=device)
        """Since the last metrics line: dead features that started again."""
        self.active = torch.zeros((), dtype=torch.float64, device=device)
        """Active entries of the last step's batch."""
        self.watch = Watch(self.adam.parameters, device)

    def update(
        self, x: Float[Tensor, "B D"], y: Float[Tensor, "B E"] | None = None, code: FeatureCode | None = None
    ) -> None:
        """One step: gradients, projection, Adam, renormalised decoder, thresholds where no gradient moves them.

        y: what to reconstruct; None: x. code: the batch's entries, where they were found already; only if
        `takes_a_sparse_step`.
        """
        is_sparse = self.takes_a_sparse_step(len(x))
        if is_sparse and self.sparse is not None and self.sparse.shares_work:
            leading(self._update, x, y, code, is_sparse)
        else:
            self._update(x, y, code, is_sparse)
        if due(self.cfg, self.step):
            self._resample(x, x if y is None else y)

    @torch.no_grad()
    def _update(self, x: Tensor, y: Tensor | None, code: FeatureCode | None, is_sparse: bool) -> None:
        """All of it but resampling."""
        cfg, sae = self.cfg, self.sae
        weight, lr = sparsity_weight_at(cfg, self.step), lr_at(cfg, self.step)
        dead = self.helped()
        if self.sparse is not None and is_sparse:
            terms = self.sparse.update(x, weight, lr, y, code, dead)
        else:
            terms = self._dense_update(x, weight, lr, y, dead)
        self.objective.settle(sae, terms.smallest, self.step, cfg)
        self.step += 1
        self._count(x if y is None else y, terms, is_sparse)

    def helped(self) -> Tensor | None:
        """The features [F] that AuxK helps in the coming step; None where there are none, here or in other processes'
        parts. A function of `silent_rows` and the step. Synchronises."""
        if self.cfg.aux_k is None:
            return None
        dead = self.silent_rows >= (self.cfg.aux_after_rows or self.cfg.dead_after_rows)
        everywhere = self.mesh.join_features(dead.to(torch.uint8))
        features = everywhere.nonzero().squeeze(1)
        most = max(1, round(self.cfg.aux_part * len(everywhere)))
        if len(features) > most:
            features = features.roll(-(self.step * most % len(features)))[:most]
            dead = torch.zeros_like(everywhere, dtype=torch.bool).index_fill_(0, features, True)
            dead = dead[self.mesh.part(len(everywhere))]
        return dead if len(features) else None

    def takes_a_sparse_step(self, rows: int) -> bool:
        """Whether the coming step on so many rows is a sparse one. Synchronises."""
        if self.sparse is None or self.cfg.engine == "sparse":
            return self.sparse is not None
        return pays(float(self.entries), rows * self.mesh.rows, self.sae.config.d_sae * self.mesh.features)

    def _dense_update(self, x: Tensor, weight: float, lr: float, y: Tensor | None, dead: Tensor | None) -> Terms:
        if self.cfg.micro_features is not None:
            if self.sparse is not None:
                self.sparse.stale = True
            return blocked_update(self.sae, self.adam, x, x if y is None else y, self.cfg, weight, lr, self.mesh)
        terms, gradients = loss_and_gradients(self.sae, x, self.cfg, weight, y, dead, self.mesh)
        remove_parallel_(gradients["W_dec"], self.sae.W_dec)
        if self.cfg.clip_norm is not None:
            mine = [g for name, g in gradients.items() if name not in SHARED]
            shared = [g for name, g in gradients.items() if name in SHARED]
            factor = clip_factor(mine, self.cfg.clip_norm, self.mesh, shared)
            gradients = {name: g.mul_(factor) for name, g in gradients.items()}
        self.adam.update(gradients, lr)
        normalise_rows_(self.sae.W_dec)
        if self.sparse is not None:
            self.sparse.stale = True
        return terms

    def release(self) -> None:
        """The SAE's weights lie in memory row by row, as everybody else expects, and what else is here is given back:
        this state is not used any more."""
        self.sparse = None
        self.adam.second.clear()
        self.adam.first.clear()
        self.sae.W_enc.data = self.sae.W_enc.data.contiguous()

    def finished(self) -> SAE:
        """The SAE in released form, of its architecture's own class; after `release`."""
        return self.objective.release(self.sae, self.cfg)

    @torch.no_grad()
    def _resample(self, x: Tensor, y: Tensor) -> None:
        self.resampled += resample(self.sae, self.adam, self.silent_rows, x, y, self.cfg, self.step)
        if self.sparse is not None:
            self.sparse.stale = True

    def _count(self, y: Tensor, terms: Terms, is_sparse: bool) -> None:
        mean = self.mesh.mean_rows(column_sums(y) / len(y))
        at_once = CACHED_ROWS if y.device.type == "cpu" else len(y)

        def squares(lo: int, hi: int) -> Tensor:
            some = y[lo:hi].split(at_once)
            return torch.cat([torch.linalg.vector_norm(rows - mean, dim=1) for rows in some]).square()

        variance = self.mesh.mean_rows(torch.cat(in_rows(squares, y)).mean())
        batch = torch.stack((terms.loss, terms.mse, variance, terms.l0, torch.ones_like(variance))).double()
        self.sums += batch
        self.entries.copy_(terms.entries)
        self.silent_rows.add_(len(y) * self.mesh.rows).masked_fill_(terms.fired > 0, 0)
        self.active.copy_(terms.l0 * (len(y) * self.mesh.rows))
        adam = self.adam
        self.watch.look(self.step, variance, terms.loss, adam.parameters, adam.second, whole=not is_sparse)
        self.watch.follow(self.cfg, self.step, terms.loss)

    def check_finite(self) -> None:
        """Nothing; TrainError naming the first step and tensor that was not finite, or the first leap of the loss.
        Synchronises."""
        if fault := self.watch.fault(self.cfg, self.step, self.tensors()):
            raise TrainError(fault)

    def measured(self) -> Measured:
        """What tells failures to train apart, of this process's features. Synchronises."""
        first = first_threshold(whole_config(self.sae.config, self.mesh), self.cfg)
        moved = (self.sae.threshold.detach() / first - 1).abs().median()
        window = (self.entries - self.active) / self.active.clamp(min=1)
        return Measured(float(moved), float(window))

    def metrics(self) -> Metrics:
        """The line for the steps since the last one, whose sums start anew. Synchronises.

        loss, mse, l0: means over those steps. fvu: Σ‖x - x̂‖² / Σ‖x - batch mean‖² over them. dead, threshold: now.
        lr, sparsity_weight: those of the last step. resampled, where that is on: features that started again.
        """
        mesh = self.mesh
        dead = mesh.sum_features((self.silent_rows >= self.cfg.dead_after_rows).sum())
        threshold = mesh.sum_features(self.sae.threshold.detach().mean()) / mesh.features
        loss, mse, variance, l0, steps = self.sums.tolist()
        self.sums.zero_()
        resampled = {} if self.cfg.resample_every is None else {"resampled": int(self.resampled)}
        self.resampled.zero_()
        return {
            "step": self.step,
            "tokens": self.step * self.cfg.batch_rows,
            "loss": loss / steps,
            "mse": mse / steps,
            "fvu": mse / variance if variance else 0.0,
            "l0": l0 / steps,
            "dead": int(dead),
            "threshold": float(threshold),
            "lr": lr_at(self.cfg, self.step - 1),
            "sparsity_weight": sparsity_weight_at(self.cfg, self.step - 1),
            **resampled,
        }

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor a checkpoint needs, by name."""
        named = {f"sae.{name}": p.detach() for name, p in self.sae.named_parameters()}
        named |= {f"adam.{name}": v for name, v in self.adam.second.items()}
        named |= {f"adam.first.{name}": m for name, m in self.adam.first.items()}
        named |= {"adam.row_steps": self.adam.row_steps, "entries": self.entries}
        named |= {"resampled": self.resampled, "loss_mean": self.watch.loss_mean}
        return named | {"silent_rows": self.silent_rows, "sums": self.sums}

    @torch.no_grad()
    def restore(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        """The state as it was when `tensors()` gave these. TrainError: a name, shape or dtype differs."""
        mine = self.tensors()
        if set(mine) != set(tensors):
            raise TrainError(f"The checkpoint lacks or adds tensors: {', '.join(sorted(set(mine) ^ set(tensors)))}.")
        for name, tensor in mine.items():
            if tensors[name].shape != tensor.shape or tensors[name].dtype != tensor.dtype:
                raise TrainError(
                    f"The checkpoint's {name} is {tensors[name].dtype} {list(tensors[name].shape)}; this run needs "
                    f"{tensor.dtype} {list(tensor.shape)}."
                )
            tensor.copy_(tensors[name])
        self.step = self.adam.steps = step
        self.adam.behind = not self.adam.first
        if self.sparse is not None:
            self.sparse.stale = True
