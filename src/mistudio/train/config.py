"""What a training run is: every number that decides its outcome, and what is logged.

Lengths are in steps, sizes in rows. A row is one activation vector, that is one token's. The defaults are Gemma Scope's
(report, section 3.2); `steps` and `sparsity_weight` have none, because no value is right for every run.
`mistudio.recipes` gives whole configurations.
"""

import math
from dataclasses import dataclass
from typing import Literal

from mistudio.errors import ConfigError

LOGGING_FIELDS = frozenset({"log_every", "checkpoint_every", "tensorboard", "wandb", "wandb_project"})
"""Fields that a resumed run may change, since the weights do not depend on them."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The loss, the optimiser, the schedules and the records of one run."""

    steps: int
    """Number of updates."""
    batch_rows: int = 4096
    """Rows in a batch."""

    sparsity: Literal["l0", "target_mean_l0", "target_token_l0"] = "l0"
    """The penalty that sparsity_weight multiplies. l0: the batch's mean L0.
    target_mean_l0: (mean L0 / target_l0 - 1)^2. target_token_l0: the mean over rows of
    (2 / target_l0) (L0 - target_l0)^2 (Gemma Scope 2)."""
    sparsity_weight: float
    """The final weight of the penalty (lambda). Its size means something only for the penalty it multiplies."""
    target_l0: float | None = None
    """The L0 that a target penalty aims at; None with l0."""
    sparsity_warmup_steps: int = 10_000
    """The penalty's weight rises linearly from 0 over these steps."""

    lr: float = 7e-5
    """Adam's learning rate after its warm-up."""
    lr_warmup_steps: int = 1000
    """The learning rate rises along a cosine from a tenth to the whole over these steps."""
    lr_decay_fraction: float = 0.0
    """Over this last part of the run the learning rate falls linearly to 0; 0 keeps it constant."""
    beta2: float = 0.999
    """Adam's decay of the squared gradient. There is no first moment: beta1 is 0."""
    adam_eps: float = 1e-8
    """Adam's epsilon."""

    bandwidth: float = 0.001
    """Width of the kernel window around a threshold (epsilon), where E|x|^2 = 1."""
    threshold_init: float = 0.001
    """Every threshold at the start, where E|x|^2 = 1."""
    log_threshold: bool = True
    """Train the logarithm of the threshold. A step of Adam then moves a threshold by at most lr of itself, so a short
    run hardly moves it. The raw threshold is kept at or above half the bandwidth."""
    pre_encoder_bias: bool = True
    """The encoder reads x - b_dec during training."""
    b_dec_init: Literal["zero", "mean"] = "zero"
    """Where b_dec starts. mean: the mean given to train(), or else that of the first batch."""
    seed: int = 0
    """Seed of the first weights."""
    engine: Literal["auto", "dense", "sparse"] = "auto"
    """How a step is computed; results differ by rounding only. dense: by matrix products. sparse: on the entries near
    or above their threshold, on a CPU. auto: sparse where numba is installed and the step before had few enough."""

    dead_after_rows: int = 10_000_000
    """A feature that was silent for this many rows counts as dead. It is only reported."""
    log_every: int = 100
    """A line of metrics.jsonl is written every so many steps."""
    checkpoint_every: int = 1000
    """A checkpoint is written every so many steps; the last two are kept."""
    tensorboard: bool = False
    """Also write TensorBoard files into the run folder."""
    wandb: Literal["off", "online", "offline"] = "off"
    """Also log to Weights & Biases. offline writes into the run folder."""
    wandb_project: str = "mistudio"
    """The Weights & Biases project."""

    def __post_init__(self) -> None:
        for name, count in (
            ("steps", self.steps),
            ("batch_rows", self.batch_rows),
            ("log_every", self.log_every),
            ("checkpoint_every", self.checkpoint_every),
            ("dead_after_rows", self.dead_after_rows),
        ):
            _check(name, count, count >= 1, "at least 1")
        for name, count in (
            ("sparsity_warmup_steps", self.sparsity_warmup_steps),
            ("lr_warmup_steps", self.lr_warmup_steps),
        ):
            _check(name, count, count >= 0, "at least 0")
        for name, size in (
            ("lr", self.lr),
            ("adam_eps", self.adam_eps),
            ("bandwidth", self.bandwidth),
            ("threshold_init", self.threshold_init),
        ):
            _check(name, size, 0 < size < math.inf, "a positive number")
        _check("sparsity_weight", self.sparsity_weight, 0 <= self.sparsity_weight < math.inf, "a number of at least 0")
        _check("lr_decay_fraction", self.lr_decay_fraction, 0 <= self.lr_decay_fraction <= 1, "between 0 and 1")
        _check("beta2", self.beta2, 0 < self.beta2 < 1, "between 0 and 1")
        self._check_target()

    def _check_target(self) -> None:
        if self.sparsity == "l0" and self.target_l0 is not None:
            raise ConfigError("target_l0 has no effect with sparsity l0; use target_mean_l0, or leave target_l0 out")
        if self.sparsity != "l0" and not (self.target_l0 is not None and 0 < self.target_l0 < math.inf):
            raise ConfigError(f"sparsity {self.sparsity} needs a positive target_l0, not {self.target_l0}")


def _check(name: str, value: float | int, holds: bool, expected: str) -> None:
    if not holds:
        raise ConfigError(f"{name} must be {expected}, not {value}")
