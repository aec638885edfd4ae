"""Numbers that are not finite, and a loss that leaps: which tensor, at which step, and how to go on.

Both are looked for at every step without reading anything from the device: the first bad step of each tensor is kept
there, and read at log steps and before a checkpoint (`fault`). So a checkpoint is always from before, and the run can
go on from the last one.

A tensor is looked at through its sum, which is not finite where an entry is not. Gradients are looked at through Adam's
second moments, where they all end, however they were computed. A sparse step spoils whole rows of W_enc and W_dec, so
one entry of every feature is enough there, in a column that wanders; the tensors that go into a checkpoint are looked
at in full.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from mistudio.train.config import TrainConfig
from mistudio.train.optimizer import FEATURE_AXIS
from mistudio.train.schedules import lr_factor

SPIKE_STEPS = 100
"""The loss is compared with its mean over about so many steps."""
LOWER = 0.3
"""What the sentences propose to multiply the learning rate by."""


class Watch:
    """The first step at which each tensor of a run was not finite, and the first at which the loss leapt."""

    def __init__(self, names: Iterable[str], device: torch.device):
        """`names`: of the parameters."""
        names = list(names)
        gradients = [f"the gradient of {name}" for name in names]
        self.places = ["batch", "loss", *gradients, *names]
        """What is looked at, causes before effects."""
        self.first_bad = torch.full((len(self.places),), -1, dtype=torch.int64, device=device)
        """For each place the first step at which it was not finite, counted from 1; -1 where it always was."""
        self.loss_mean = torch.zeros(2, dtype=torch.float64, device=device)
        """The running mean of the loss, and the number of losses in it, at most SPIKE_STEPS. Part of a checkpoint."""
        self.spike = torch.full((3,), -1, dtype=torch.float64, device=device)
        """The first leap: step, loss, mean before it; -1 where there was none."""
        self.saved = 0
        """Step of the last checkpoint; 0 where there is none."""

    @torch.no_grad()
    def look(
        self,
        step: int,
        batch: Tensor,
        loss: Tensor,
        parameters: Mapping[str, Tensor],
        moments: Mapping[str, Tensor],
        *,
        whole: bool,
    ) -> None:
        """Remembers what is not finite after update number `step`.

        batch: a number that is finite where the batch is. moments: Adam's, by parameter. whole: look at every entry of
        W_enc and W_dec (costs reading them), not at one of each feature.
        """
        found = {"batch": batch, "loss": loss}
        for name, p in parameters.items():
            found[name] = _sample(name, p.detach(), None if whole else step).sum()
            if name in moments:
                found[f"the gradient of {name}"] = _sample(name, moments[name], None if whole else step).sum()
        numbers = torch.stack([found.get(place, torch.zeros_like(loss)) for place in self.places])
        bad = ~numbers.isfinite() & (self.first_bad < 0)
        self.first_bad.masked_fill_(bad, step)

    @torch.no_grad()
    def follow(self, cfg: TrainConfig, step: int, loss: Tensor) -> None:
        """Compares the loss of update number `step` with its running mean, which then takes it in."""
        if cfg.spike_factor is None:
            return
        mean, count = self.loss_mean.unbind()
        value = loss.double()
        if step > cfg.lr_warmup_steps:
            leapt = (count >= SPIKE_STEPS) & (value > cfg.spike_factor * mean) & (self.spike[0] < 0)
            now = torch.stack((torch.full_like(value, step), value, mean))
            self.spike.copy_(torch.where(leapt, now, self.spike))
        count = (count + 1).clamp(max=SPIKE_STEPS)
        self.loss_mean.copy_(torch.stack((mean + (value - mean) / count, count)))

    def fault(self, cfg: TrainConfig, step: int, tensors: Mapping[str, Tensor]) -> str | None:
        """What was not finite, or leapt, first, and how to go on; None where all is well. Synchronises.

        `tensors`: those that a checkpoint of this step would hold.
        """
        spiked, loss, mean = self.spike.tolist()
        seen = [(first, place) for first, place in zip(self.first_bad.tolist(), self.places, strict=True) if first > 0]
        first, place = min(seen, key=lambda pair: pair[0], default=(0, ""))
        if spiked > 0 and not 0 < first <= spiked:
            return (
                f"The loss of step {spiked:.0f} is {loss:.4g}, {loss / mean:.3g} times its mean over the last "
                f"{SPIKE_STEPS} steps, {mean:.4g} (spike_factor is {cfg.spike_factor:g}). {self._lower(cfg)} If it "
                "leaps there again, look at that batch, or raise spike_factor."
            )
        if place == "batch":
            return f"The batch of step {first} holds NaN or infinite values. Check the activations. {self._before()}"
        if place:
            return f"{_blame(place, first)} {self._lower(cfg)}"
        spoiled = [name for name, t in tensors.items() if t.is_floating_point() and not bool(t.sum().isfinite())]
        if spoiled:
            return f"{', '.join(spoiled)} held NaN or infinite values after step {step}. {self._lower(cfg)}"
        return None

    def _before(self) -> str:
        if not self.saved:
            return "There is no checkpoint from before; start again."
        return f"The checkpoint of step {self.saved} is from before: go on from it with --resume (resume=True)."

    def _lower(self, cfg: TrainConfig) -> str:
        """How to go on from the last checkpoint with a lower learning rate: what to type."""
        if not self.saved:
            return f"Lower lr (now {cfg.lr:g}) or sparsity_weight; there is no checkpoint from before, start again."
        factor = float(f"{LOWER * lr_factor(cfg, self.saved):.3g}")
        pairs = (*((s, f) for s, f in cfg.lr_changes if s < self.saved), (self.saved, factor))
        typed = " ".join(f"{s} {f:g}" for s, f in pairs)
        return (
            f"The checkpoint of step {self.saved} is from before. Lower lr from there on: --resume --train.lr-changes "
            f"{typed} (resume=True, lr_changes={pairs})."
        )


def _sample(name: str, tensor: Tensor, step: int | None) -> Tensor:
    """One entry of every feature of W_enc or W_dec, another at another step; all of it where step is None."""
    if step is None or name not in FEATURE_AXIS:
        return tensor
    axis = 1 - FEATURE_AXIS[name]
    return tensor.select(axis, step % tensor.shape[axis])


def _blame(place: str, step: int) -> str:
    if place == "loss":
        return f"The loss of step {step} is not finite, though its batch is."
    if place.startswith("the gradient"):
        return f"T{place[1:]} is not finite at step {step}, though batch and loss are."
    return f"{place} is not finite after step {step}, though its gradient is."
