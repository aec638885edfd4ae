"""What changes while a run goes on: weights, optimiser, silent-feature counters, and the metrics line being gathered.

Nothing here synchronises with the device except `metrics` and `check_finite`, which the loop calls at log steps and
before a checkpoint. Non-finite values are caught without reading them: the first bad step is kept on the device.
"""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from mistudio.errors import TrainError
from mistudio.sae import JumpReLUSAE
from mistudio.train.config import TrainConfig
from mistudio.train.log import Metrics
from mistudio.train.loss import Terms, loss_and_gradients
from mistudio.train.optimizer import Adam, normalise_rows_, remove_parallel_
from mistudio.train.schedules import lr_at, sparsity_weight_at
from mistudio.train.sparse import SparseStep, numba_is_there, pays


class TrainState:
    """A run between two steps; `update` takes it through one."""

    def __init__(self, sae: JumpReLUSAE, cfg: TrainConfig):
        device = sae.W_enc.device
        self.sae, self.cfg = sae, cfg
        self.step = 0
        on_cpu = device.type == "cpu"
        if cfg.engine == "sparse" and not on_cpu:
            raise TrainError(f"The sparse engine runs on CPUs, and the SAE is on {device}. Set engine to auto.")
        may_be_sparse = cfg.engine == "sparse" or (cfg.engine == "auto" and on_cpu and numba_is_there())
        if may_be_sparse:  # a feature's encoder weights become one stretch of memory; the shape stays [D, F]
            sae.W_enc.data = sae.W_enc.data.T.contiguous().T
        self.adam = Adam(dict(sae.named_parameters()), cfg.beta2, cfg.adam_eps)
        self.sparse = SparseStep(sae, cfg, self.adam, compiled=numba_is_there()) if may_be_sparse else None
        self.entries = torch.full((), sae.config.d_sae * cfg.batch_rows, dtype=torch.float64, device=device)
        """Entries of the last step's batch that were active or in the kernel window; all before the first step."""
        self.silent_rows = torch.zeros(sae.config.d_sae, dtype=torch.int64, device=device)
        """Rows since each feature was last active."""
        self.sums = torch.zeros(5, dtype=torch.float64, device=device)
        """Since the last metrics line: loss, mse, in-batch variance, L0, steps."""
        self.first_bad = torch.full((2,), -1, dtype=torch.int64, device=device)
        """The first step whose batch, and the first whose loss, was not finite; -1 where all were."""

    @torch.no_grad()
    def update(self, x: Float[Tensor, "B D"]) -> None:
        """One step: gradients, projection, Adam, renormalised decoder, thresholds kept positive."""
        cfg, sae = self.cfg, self.sae
        weight, lr = sparsity_weight_at(cfg, self.step), lr_at(cfg, self.step)
        if self.sparse is not None and (cfg.engine == "sparse" or pays(float(self.entries), len(x), sae.config.d_sae)):
            terms = self.sparse.update(x, weight, lr)
        else:
            terms = self._dense_update(x, weight, lr)
        if not cfg.log_threshold:
            sae.theta.clamp_(min=cfg.bandwidth / 2)  # the whole window of a threshold stays above 0
        self._count(x, terms)
        self.step += 1

    def _dense_update(self, x: Tensor, weight: float, lr: float) -> Terms:
        terms, gradients = loss_and_gradients(self.sae, x, self.cfg, weight)
        remove_parallel_(gradients["W_dec"], self.sae.W_dec)
        self.adam.update(gradients, lr)
        normalise_rows_(self.sae.W_dec)
        if self.sparse is not None:
            self.sparse.stale = True
        return terms

    def release(self) -> None:
        """The SAE's weights lie in memory row by row, as everybody else expects; this state is not used any more."""
        self.sae.W_enc.data = self.sae.W_enc.data.contiguous()

    def _count(self, x: Tensor, terms: Terms) -> None:
        variance = (x - x.mean(0)).square().sum(1).mean()
        batch = torch.stack((terms.loss, terms.mse, variance, terms.l0, torch.ones_like(variance))).double()
        self.sums += batch
        self.entries.copy_(terms.entries)
        self.silent_rows.add_(len(x)).masked_fill_(terms.fired > 0, 0)
        bad = ~torch.stack((variance, terms.loss)).isfinite()
        self.first_bad.copy_(torch.where(bad & (self.first_bad < 0), self.step + 1, self.first_bad))

    def check_finite(self) -> None:
        """Nothing; TrainError naming the first step whose batch or loss was not finite. Synchronises."""
        bad_batch, bad_loss = (int(step) for step in self.first_bad)
        if bad_batch >= 0 and bad_batch <= (bad_loss if bad_loss >= 0 else bad_batch):
            raise TrainError(
                f"The batch of step {bad_batch} holds NaN or infinite values. Check the activations. The weights in "
                "memory are spoiled; the last checkpoint, if there is one, is from before."
            )
        if bad_loss >= 0:
            raise TrainError(
                f"The loss of step {bad_loss} is not finite, though its batch is. Lower lr (now {self.cfg.lr:g}) or "
                "sparsity_weight. The last checkpoint, if there is one, is from before."
            )

    def metrics(self) -> Metrics:
        """The line for the steps since the last one, whose sums start anew. Synchronises.

        loss, mse, l0: means over those steps. fvu: Σ‖x - x̂‖² / Σ‖x - batch mean‖² over them. dead, threshold: now.
        lr, sparsity_weight: those of the last step.
        """
        loss, mse, variance, l0, steps = self.sums.tolist()
        self.sums.zero_()
        return {
            "step": self.step,
            "tokens": self.step * self.cfg.batch_rows,
            "loss": loss / steps,
            "mse": mse / steps,
            "fvu": mse / variance if variance else 0.0,
            "l0": l0 / steps,
            "dead": int((self.silent_rows >= self.cfg.dead_after_rows).sum()),
            "threshold": float(self.sae.threshold.detach().mean()),
            "lr": lr_at(self.cfg, self.step - 1),
            "sparsity_weight": sparsity_weight_at(self.cfg, self.step - 1),
        }

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor a checkpoint needs, by name."""
        named = {f"sae.{name}": p.detach() for name, p in self.sae.named_parameters()}
        named |= {f"adam.{name}": v for name, v in self.adam.second.items()}
        named |= {"adam.row_steps": self.adam.row_steps, "entries": self.entries}
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
        self.adam.behind = True
        if self.sparse is not None:
            self.sparse.stale = True
