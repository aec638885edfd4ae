"""One step of training that costs about one product: the entries of z that matter, and nothing else.

With L0 ≈ 70 of 16,384 features, four of a dense step's five products are nearly all zeros. Here the encoder's product
finds the entries that are active or in the kernel window; the reconstruction, the gradients of both weight matrices, of
thresholds and biases, and Adam's update then run over these. It is the same step up to the order of sums:

- d_f is needed at entries only: dz is 0 where a feature is off, and θ's gradient is 0 outside the window;
- the gradient of b_dec through the pre-encoder bias is Σ_j (Σ_b dz_bj)·W_enc[j], a matrix times a vector;
- rows of features that did not fire have gradient 0, and Adam leaves them where they are (`optimizer`);
- b_enc, θ and b_dec are vectors and take a dense update, as does a transcoder's W_skip, which has D·E numbers.

The penalties reach thresholds through the price of a row at the entries in the window (`objectives.penalty`), so they
stay sparse. Architectures differ in which entries there are (`objectives`). Matryoshka prefixes and AuxK give entries
another residual, in planes of the same shape. At a start, about half of all features of a JumpReLU or ReLU SAE fire,
and a dense step is faster: `pays` decides, from the entries of the step before.
"""

import functools
import importlib.util
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mistudio.errors import TrainError
from mistudio.mesh import SOLO, Mesh
from mistudio.pages import empty
from mistudio.sae.code import FeatureCode, SparseCode, select, stacked
from mistudio.train import definition
from mistudio.train.config import TrainConfig
from mistudio.train.definition import Work
from mistudio.train.loss import Terms
from mistudio.train.objectives import Trainable, objective_of
from mistudio.train.objectives.auxk import active_counts, largest_everywhere, merged, spread, without_window
from mistudio.train.objectives.matryoshka import group_of, groups, on_planes, suffix_sums_
from mistudio.train.objectives.penalty import row_price, threshold_gradient
from mistudio.train.objectives.topk import largest_of_rows
from mistudio.train.objectives.transcoder import base_of, has_skip
from mistudio.train.optimizer import SHARED, Adam, clip_factor, remove_parallel_
from mistudio.train.threads import column_sums, in_rows, shared

if TYPE_CHECKING:
    from mistudio.train.cuda_screen import Screen as CudaScreen
    from mistudio.train.screen import Query, Screen

CROSSOVER = 0.06
"""The part of [B, F] that may be entries for a sparse step to be taken. At 0.06 it took 0.45 of a dense one at D=2304,
F=16,384 and 0.36 at D=192, F=1,536 (benchmarks/step.py --crossover, one thread); gathers gain less from more cores than
products do, hence the distance to 1. A constant and not a measurement, because a rerun must choose alike."""
PIECE_ENTRIES = 1 << 22
"""Entries of z that exist at once, in each thread, where an architecture looks at all of them."""
SHARED_ROWS = 256
"""Rows of it that a thread looks at together. Fixed, so that no bit depends on threads."""


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


def may_be_sparse(cfg: TrainConfig, device: torch.device) -> bool:
    """Whether any step of a run is a sparse one; on a GPU only where that is asked for."""
    return cfg.engine == "sparse" or (cfg.engine == "auto" and device.type == "cpu" and numba_is_there())


def kernels_are_there(device: torch.device) -> bool:
    """Whether there are compiled kernels: numba's for a CPU, Triton's for a CUDA GPU. TrainError: a GPU without triton,
    or another device."""
    if device.type == "cpu":
        return numba_is_there()
    if device.type != "cuda":
        where = f"on CPUs and CUDA GPUs, and the SAE is on {device}"
        raise TrainError(f"The sparse engine runs {where}. Set engine to auto.")
    if importlib.util.find_spec("triton") is None:
        raise TrainError(
            "The sparse engine needs triton on a GPU, and it is not installed. Install it with `pip install triton` "
            "(Linux), or set engine to auto."
        )
    return True


def _bodies(device: torch.device) -> tuple[ModuleType, ModuleType]:
    """The modules of compiled kernels for this device: one with `definition`'s functions, one with a `Screen`."""
    if device.type == "cuda":
        from mistudio.train import cuda, cuda_screen

        return cuda, cuda_screen
    from mistudio.train import compiled, screen

    return compiled, screen


@dataclass(frozen=True)
class _Reconstruction:
    """What a batch's entries reconstruct, as the kernels take it."""

    code: FeatureCode
    """Every entry in the rows of its plane, auxiliary ones too."""
    planes: Tensor
    """[K·B, E]: the residual of every plane."""
    mse: Tensor
    """Of all features."""
    loss: Tensor
    """Mean over prefixes, and the auxiliary loss."""
    row_l0: Tensor
    """Of this process's rows; all_l0: of the whole batch."""
    all_l0: Tensor


class SparseStep:
    """Takes an SAE through sparse steps; shares parameters and Adam with the dense ones."""

    def __init__(self, sae: Trainable, cfg: TrainConfig, adam: Adam, *, compiled: bool, mesh: Mesh = SOLO):
        """`compiled`: by compiled kernels; else as defined. On a mesh `sae` has this process's features."""
        self.sae, self.cfg, self.adam, self.compiled = sae, cfg, adam, compiled
        self.mesh, self.objective, self.ranges = mesh, objective_of(cfg), groups(cfg, sae.config.d_sae, mesh)
        self.bandwidth = cfg.bandwidth if cfg.trains_threshold else 0.0
        self.screen: Screen | CudaScreen | None = None
        self.reconstruct, self.visit = definition.reconstruct, definition.visit
        self.row_gradients, self.apply_rows = definition.row_gradients, definition.apply_rows
        if compiled:
            kernels, _ = _bodies(sae.W_enc.device)
            self.reconstruct, self.visit = kernels.reconstruct, kernels.visit
            self.row_gradients, self.apply_rows = kernels.row_gradients, kernels.apply_rows
        self.shares_work = compiled and sae.W_enc.device.type == "cpu"
        """Whether `threads` do the work."""
        self.stale = True
        """Whether W_enc may have changed outside this class."""

    @torch.no_grad()
    def update(
        self,
        x: Float[Tensor, "B D"],
        weight: float,
        lr: float,
        y: Float[Tensor, "B E"] | None = None,
        code: FeatureCode | None = None,
        dead: Bool[Tensor, " F"] | None = None,
    ) -> Terms:
        """The terms of the batch; every parameter has taken its step, the decoder's rows have norm 1.

        y: what to reconstruct; None: x. code: the batch's entries, where they were found already. dead: the features
        that count as dead, for AuxK.
        """
        cfg, x = self.cfg, x.contiguous()
        threshold = self.sae.threshold.detach()
        if code is None:
            code = self.objective.entries(self, x, threshold, cfg)
        level, dead = self.objective.level(threshold), dead if cfg.aux_k is not None else None
        if dead is not None and cfg.trains_threshold:
            code, level = without_window(code, threshold, dead)
        done = self._reconstruct(code, x, x if y is None else y, level, dead)
        sums, touched = self._step(done, x, threshold, level, weight, lr, dead)
        if self.screen is not None:
            self.screen.refresh(touched)
        fired = sums[:, 3]
        if dead is not None:  # not their auxiliary entries
            fired = self.mesh.sum_rows(active_counts(code, level).to(x.dtype))
        charge = self.objective.charge(done.all_l0, self.mesh.join_features(fired), self._total(code), cfg)
        entries = self._sum_everywhere(done.mse.new_tensor(len(code.values)))
        loss = done.loss + weight * charge
        return Terms(loss, done.mse, done.all_l0.mean(), fired, entries, self._smallest(code, done.all_l0))

    def _step(
        self, done: _Reconstruction, x: Tensor, threshold: Tensor, level: Tensor, weight: float, lr: float,
        dead: Tensor | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """(sums [F, 5], touched [F]) of `definition.row_gradients`; every parameter has taken its step."""
        cfg, rows, centred = self.cfg, len(done.all_l0), self.sae.config.pre_encoder_bias
        p = {name: parameter.detach() for name, parameter in self.sae.named_parameters()}
        price, scale = row_price(done.row_l0, rows, cfg), 2 / rows
        bonus = weight * self.objective.bonus(rows)
        work = Work(done.code, x, done.planes, p, level, price, self.bandwidth, centred, scale, bonus)
        if cfg.clip_norm is None and self.mesh.rows == 1:
            sums, d_centre, touched = self.visit(work, self.adam, lr)
            self.adam.update(self._vector_gradients(done, x, sums, d_centre, threshold, weight, dead), lr)
            return sums, touched
        sums, d_centre, features, g_enc, g_dec = self._over_replicas(*self.row_gradients(work))
        vectors = self._vector_gradients(done, x, sums, d_centre, threshold, weight, dead)
        if cfg.clip_norm is None:
            self.apply_rows(features, g_enc, g_dec, p, self.adam, lr)
            self.adam.update(vectors, lr)
            return sums, sums[:, 3] > 0
        remove_parallel_(g_dec, p["W_dec"][features])
        mine = [g_enc, g_dec, *(g for name, g in vectors.items() if name not in SHARED)]
        shared = [g for name, g in vectors.items() if name in SHARED]
        factor = clip_factor(mine, cfg.clip_norm, self.mesh, shared)
        self.apply_rows(features, g_enc.mul_(factor), g_dec.mul_(factor), p, self.adam, lr)
        self.adam.update({name: g * factor for name, g in vectors.items()}, lr)
        return sums, sums[:, 3] > 0

    def _over_replicas(
        self, sums: Tensor, d_centre: Tensor, features: Tensor, g_enc: Tensor, g_dec: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """What `row_gradients` gives for the rows of all replicas: only rows that one of them touched are sent."""
        mesh = self.mesh
        if mesh.rows == 1:
            return sums, d_centre, features, g_enc, g_dec
        mine = features
        sums, d_centre = mesh.sum_rows(sums), mesh.sum_rows(d_centre)
        features = (sums[:, 3] > 0).nonzero().squeeze(1)
        places = torch.searchsorted(features, mine)
        whole = [g.new_zeros(len(features), g.shape[1]).index_copy_(0, places, g) for g in (g_enc, g_dec)]
        return sums, d_centre, features, mesh.sum_rows(whole[0]), mesh.sum_rows(whole[1])

    def _vector_gradients(
        self, done: _Reconstruction, x: Tensor, sums: Tensor, d_centre: Tensor, threshold: Tensor, weight: float,
        dead: Tensor | None,
    ) -> dict[str, Tensor]:  # fmt: skip
        """The gradients of b_enc, b_dec, θ and W_skip."""
        d_z, d_f_windowed, price_windowed, fired, number_windowed = sums.unbind(1)
        first_plane, scale = done.planes[: len(x)], 2 / len(done.all_l0)
        d_b_dec, d_centre = scale * self.mesh.sum_rows(column_sums(first_plane)), self.mesh.sum_features(d_centre)
        found = {"b_enc": d_z, "b_dec": d_b_dec - d_centre if self.sae.config.pre_encoder_bias else d_b_dec}
        if self.cfg.trains_threshold:
            windowed = (d_f_windowed, price_windowed, number_windowed)
            d_theta = threshold_gradient(threshold, windowed, fired, done.all_l0, weight, self.cfg)
            d_theta = d_theta if dead is None else d_theta.masked_fill(dead, 0.0)
            found["theta"] = d_theta * threshold if self.sae.config.log_threshold else d_theta
        if has_skip(self.sae):
            found["W_skip"] = scale * self.mesh.sum_rows(x.T @ first_plane)
        return found

    def _reconstruct(
        self, code: FeatureCode, x: Tensor, y: Tensor, level: Tensor, dead: Tensor | None
    ) -> _Reconstruction:
        W_dec, M, mesh = self.sae.W_dec.detach(), len(self.ranges), self.mesh
        rows = len(x) * mesh.rows
        residual = empty(tuple(y.shape), y.dtype) if y.device.type == "cpu" else torch.empty_like(y)
        if mesh.feature_rank == 0:
            base = base_of(self.sae, x).detach().expand_as(y)
            in_rows(lambda lo, hi: torch.sub(base[lo:hi], y[lo:hi], out=residual[lo:hi]), y)
        else:
            residual.zero_()
        auxiliary = self._auxiliary(x, dead)
        if M == 1 and auxiliary is None:
            residual, squares, row_l0 = self.reconstruct(code, residual, W_dec, level)
            if mesh.features > 1:
                residual, row_l0 = mesh.sum_features(residual), mesh.sum_features(row_l0)
                squares = residual.square().sum(1)
            mse = mesh.sum_rows(squares.sum()) / rows
            return _Reconstruction(code, residual, mse, mse, row_l0, mesh.join_rows(row_l0))
        planes = residual.new_empty(M + (auxiliary is not None), *residual.shape)
        losses, row_l0 = [], residual.new_zeros(len(x))
        for plane, (lo, hi) in zip(planes, self.ranges, strict=False):
            part = group_of(code, lo, hi)
            residual, squares, l0 = self.reconstruct(part, residual, W_dec[lo:hi], level[lo:hi])
            plane.copy_(residual)
            if mesh.features > 1:
                squares = mesh.sum_features(plane).square().sum(1)
            row_l0 += mesh.sum_features(l0)
            losses.append(mesh.sum_rows(squares.sum()) / rows)
        suffix_sums_(planes[:M])
        mse, loss, code = losses[-1], torch.stack(losses).mean(), on_planes(code, self.ranges)
        if auxiliary is not None:
            left_over, squares, _ = self.reconstruct(auxiliary, residual, W_dec, level)
            if mesh.features > 1:
                squares = mesh.sum_features(left_over).square().sum(1)
            torch.mul(left_over, self.cfg.aux_weight, out=planes[M])
            loss = loss + self.cfg.aux_weight * mesh.sum_rows(squares.sum()) / rows
            code = merged(code, auxiliary, M * len(x))
        return _Reconstruction(code, planes.flatten(0, 1), mse, loss, row_l0, mesh.join_rows(row_l0))

    def _auxiliary(self, x: Tensor, dead: Tensor | None) -> FeatureCode | None:
        """The entries of dead features that AuxK chooses; None where none is dead."""
        if self.cfg.aux_k is None or dead is None:
            return None
        features = dead.nonzero().squeeze(1)
        chosen = self.largest(x, self.cfg.aux_k, features)
        if self.mesh.features > 1:
            chosen = largest_everywhere(chosen, self.cfg.aux_k, self.mesh)
        return spread(chosen.by_feature(), features, len(dead))

    def _total(self, code: FeatureCode) -> Tensor:
        """Σ f, which only a penalty on f needs."""
        if self.cfg.sparsity != "l1":
            return code.values.new_zeros(())
        return self._sum_everywhere(code.values.sum())

    def _sum_everywhere(self, tensor: Tensor) -> Tensor:
        return self.mesh.sum_rows(self.mesh.sum_features(tensor))

    def _smallest(self, code: FeatureCode, all_l0: Tensor) -> Tensor | None:
        if not self.objective.wants_smallest:
            return None
        row_least = code.values.new_full((code.n_rows,), torch.inf)
        row_least.scatter_reduce_(0, code.rows.long(), code.values, "amin")
        return self.objective.smallest(self.mesh.join_rows(row_least), all_l0, self.cfg)

    def select(self, x: Tensor, threshold: Tensor, bandwidth: float) -> FeatureCode:
        """The batch's entries with z > θ or |z - θ| < bandwidth/2."""
        sae = self.sae
        if not self.compiled:
            return select(x, sae.W_enc.detach(), sae.encoder_bias().detach(), threshold, bandwidth)
        b_dec = sae.b_dec.detach() if sae.config.pre_encoder_bias else None
        return self._fresh_screen().select(x, sae.b_enc.detach(), b_dec, threshold, bandwidth)

    def question(self) -> "tuple[Screen, Query] | None":
        """What the coming step asks of its screen, for `screen.select_many`; None where it asks otherwise."""
        sae, cutoff = self.sae, self.objective.cutoff(self.sae.threshold.detach(), self.cfg)
        if not self.shares_work or cutoff is None:
            return None
        from mistudio.train.screen import Query, Screen

        screen = self._fresh_screen()
        assert isinstance(screen, Screen)
        b_dec = sae.b_dec.detach() if sae.config.pre_encoder_bias else None
        return screen, Query(sae.b_enc.detach(), b_dec, *cutoff)

    def pieces(self, x: Tensor) -> Iterator[Tensor]:
        """All of z, some rows at a time."""
        W_enc, bias = self.sae.W_enc.detach(), self.sae.encoder_bias().detach()
        for chunk in x.split(max(1, PIECE_ENTRIES // max(1, len(bias)))):
            yield torch.addmm(bias, chunk, W_enc)

    def largest(self, x: Tensor, k: int, features: Tensor | None = None) -> SparseCode:
        """The k largest positive entries of every row of z, or of its columns of those features."""
        W_enc, bias = self.sae.W_enc.detach(), self.sae.encoder_bias().detach()
        if features is not None:
            W_enc, bias = W_enc[:, features], bias[features]
        rows = min(PIECE_ENTRIES // max(1, len(bias)), SHARED_ROWS if self.shares_work else len(x))

        def of(some: Tensor) -> SparseCode:
            return largest_of_rows(torch.addmm(bias, some, W_enc), k)

        chunks = x.split(max(1, rows))
        return stacked(shared(of, chunks) if self.shares_work else [of(chunk) for chunk in chunks])

    def _fresh_screen(self) -> "Screen | CudaScreen":
        if self.screen is None:
            _, screens = _bodies(self.sae.W_enc.device)
            self.screen = screens.Screen(self.sae.W_enc.detach().T)
        elif self.stale:
            self.screen.refresh(torch.ones(len(self.screen.W), dtype=torch.bool, device=self.screen.W.device))
        self.stale = False
        return self.screen
