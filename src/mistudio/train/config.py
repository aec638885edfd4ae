"""What a training run is: every number that decides its outcome, and what is logged.

Lengths are in steps, sizes in rows. A row is one activation vector, that is one token's. The defaults are Gemma Scope's
(report, section 3.2); `steps` and `sparsity_weight` have none, because no value is right for every run.
`mistudio.recipes` gives whole configurations.
"""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from mistudio.errors import ConfigError

LOGGING_FIELDS = frozenset({"log_every", "checkpoint_every", "spike_factor", "tensorboard", "wandb", "wandb_project"})
"""Fields that a resumed run may change, since the weights do not depend on them."""
LARGEST = 1e30
"""Of a rate, a weight or a width: larger numbers are none in float32 once they are multiplied."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The loss, the optimiser, the schedules and the records of one run."""

    steps: int
    """Number of updates."""
    batch_rows: int = 4096
    """Rows in a batch."""

    architecture: Literal["jumprelu", "relu", "topk", "batchtopk"] = "jumprelu"
    """Which features are on. jumprelu: those above their own trained threshold. relu: those above 0. topk: the k
    largest of a row. batchtopk: the batch_rows * k largest of a batch, and in the finished SAE those above the running
    mean of the smallest that was kept. Transcoders are jumprelu, relu or batchtopk."""
    k: int | None = None
    """How many features a row has on (batchtopk: on average); None with the other architectures."""
    aux_k: int | None = None
    """How many silent features reconstruct, in every row, what the others left over (AuxK), so that they come back to
    life; None: no such loss. Not for relu. A jumprelu feature's threshold stays while it is helped."""
    aux_weight: float = 1 / 32
    """The weight of that loss."""
    aux_after_rows: int | None = None
    """A feature that was silent for this many rows is helped so; None: for dead_after_rows."""
    aux_part: float = 1.0
    """At most this part of all features is helped in a step, in turn: a step costs all rows times these features."""
    prefixes: tuple[float, ...] = ()
    """Matryoshka: parts of the features, such as [0.0625, 0.25], which must each reconstruct without those after it.
    The loss is the mean over these and the whole."""

    sparsity: Literal["l0", "target_mean_l0", "target_token_l0", "l1"] = "l0"
    """The penalty that sparsity_weight multiplies. l0: the batch's mean L0.
    target_mean_l0: (mean L0 / target_l0 - 1)^2. target_token_l0: the mean over rows of
    (2 / target_l0) (L0 - target_l0)^2 (Gemma Scope 2). l1: the mean over rows of the sum of the features, for relu
    alone, which needs it."""
    sparsity_weight: float
    """The final weight of the penalty (lambda). Its size means something only for the penalty it multiplies. topk and
    batchtopk have no penalty: 0."""
    target_l0: float | None = None
    """The L0 that a target penalty aims at; None with l0."""
    sparsity_warmup_steps: int = 10_000
    """The penalty's weight rises linearly from 0 over these steps."""
    frequency_weight: float = 0.0
    """jumprelu: adds to the penalty this times the sum over features of max(0, p - frequency_limit) / frequency_limit,
    where p is the part of the batch's rows in which a feature is on."""
    frequency_limit: float = 0.1
    """How often a feature may be on at no cost. Gemma Scope 2 wants no feature above 0.1."""

    lr: float = 7e-5
    """Adam's learning rate after its warm-up."""
    lr_width: int | None = None
    """lr is meant for activations of this width D; for others that of the matrices is multiplied by sqrt(lr_width / D),
    as the numbers of a row of norm 1 shrink. None: lr is taken as it is."""
    lr_warmup_steps: int = 1000
    """The learning rate rises along a cosine from a tenth to the whole over these steps."""
    lr_decay_fraction: float = 0.0
    """Over this last part of the run the learning rate falls linearly to 0; 0 keeps it constant."""
    lr_changes: tuple[tuple[int, float], ...] = ()
    """Pairs (step, factor): once that many updates are done, the learning rate is multiplied by factor, until the next
    pair. Lower it after step 5000: 5000 0.3. Raise it for a while, to wake dead features: 5000 3 6000 1. A resumed run
    may add pairs from its checkpoint's step on."""
    vector_lr: float = 1.0
    """The learning rate of b_enc, theta and b_dec as a part of lr. Where E|x|^2 = 1 they are small numbers, and below 1
    a high lr lets the weights learn fast while thresholds stay quiet. Gemma Scope's lr is low, and this 1."""
    beta1: float = 0.0
    """Adam's decay of the gradient. 0: no first moment, which saves a third of the optimiser's memory. Above, rows of
    features that did not fire in a batch keep weights and moments as they are (torch.optim.SparseAdam)."""
    beta2: float = 0.999
    """Adam's decay of the squared gradient."""
    adam_eps: float = 1e-8
    """Adam's epsilon."""
    clip_norm: float | None = None
    """Gradients are shortened to this norm, taken over all parameters together, where it is larger; None: never."""
    micro_rows: int | None = None
    """A dense step works through a batch in pieces of so many rows, which bounds its memory and changes rounding only;
    None: as many as suit the device."""

    micro_features: int | None = None
    """jumprelu and relu: a dense step works on so many features at a time. No whole gradient is then in memory, at the
    cost of seven products instead of five; None: on all at once."""

    bandwidth: float = 0.001
    """Width of the kernel window around a threshold (epsilon), where E|x|^2 = 1."""
    threshold_init: float = 0.001
    """Every threshold at the start, where E|x|^2 = 1; not used with start_factor."""
    start_factor: float | None = None
    """jumprelu with a target: thresholds start where, on rows that point anywhere (E|x|^2 = 1), this times target_l0
    features would be on, whatever the width. None: at threshold_init."""
    log_threshold: bool = True
    """Train the logarithm of the threshold. A step of Adam then moves a threshold by at most lr of itself, so a short
    run hardly moves it. The raw threshold is kept at or above half the bandwidth."""
    pre_encoder_bias: bool = True
    """The encoder reads x - b_dec during training."""
    encoder_init: float = 1.0
    """W_enc starts as this times the transpose of W_dec, whose rows have norm 1."""
    b_dec_init: Literal["zero", "mean"] = "zero"
    """Where b_dec starts. mean: the mean given to train(), or else that of the first batch."""
    seed: int = 0
    """Seed of the first weights."""
    engine: Literal["auto", "dense", "sparse"] = "auto"
    """How a step is computed; results differ by rounding only. dense: by matrix products. sparse: on the entries near
    or above their threshold, on a CPU, or on a CUDA GPU with triton (tested in its interpreter, never on a GPU yet).
    auto: on a CPU sparse where numba is installed and the step before had few enough entries, else dense."""

    dead_after_rows: int = 10_000_000
    """A feature that was silent for this many rows counts as dead: it is reported, and starts again where
    resample_every says so."""
    resample_every: int | None = None
    """Every so many steps dead features start again from rows of the batch that are reconstructed badly; None leaves
    them dead. Give those that started again time to fire: at least dead_after_rows / batch_rows."""
    resample_until: int | None = None
    """The last step after which that is done; None is half of steps."""
    spike_factor: float | None = None
    """Stop the run where the loss exceeds its mean over the last 100 steps by this factor (3 is a start), once
    lr_warmup_steps are over; None lets it go on. No checkpoint is written after such a step."""
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
            ("vector_lr", self.vector_lr),
            ("adam_eps", self.adam_eps),
            ("bandwidth", self.bandwidth),
            ("threshold_init", self.threshold_init),
        ):
            _check(name, size, 0 < size <= LARGEST, f"a positive number up to {LARGEST:g}")
        for name, size in (("sparsity_weight", self.sparsity_weight), ("frequency_weight", self.frequency_weight)):
            _check(name, size, 0 <= size <= LARGEST, f"a number from 0 to {LARGEST:g}")
        _check("frequency_limit", self.frequency_limit, 0 < self.frequency_limit < 1, "between 0 and 1")
        _check("lr_decay_fraction", self.lr_decay_fraction, 0 <= self.lr_decay_fraction <= 1, "between 0 and 1")
        _check("beta1", self.beta1, 0 <= self.beta1 < 1, "at least 0 and below 1")
        _check("encoder_init", self.encoder_init, 0 < self.encoder_init < math.inf, "a positive number")
        _check("beta2", self.beta2, 0 < self.beta2 < 1, "between 0 and 1")
        self._check_choices()
        self._check_target()
        self._check_stability()
        self._check_architecture()

    @property
    def trains_threshold(self) -> bool:
        """Whether thresholds follow a gradient: those of jumprelu do, and nothing else has a kernel window."""
        return self.architecture == "jumprelu"

    @property
    def selects(self) -> bool:
        """Whether features are kept by rank instead of by a threshold and a penalty."""
        return self.architecture in ("topk", "batchtopk")

    def _check_choices(self) -> None:
        for name, number in (("k", self.k), ("aux_k", self.aux_k), ("aux_after_rows", self.aux_after_rows),
                             ("micro_rows", self.micro_rows), ("micro_features", self.micro_features)):  # fmt: skip
            if number is not None:
                _check(name, number, number >= 1, "at least 1")
        _check("aux_weight", self.aux_weight, 0 < self.aux_weight < math.inf, "a positive number")
        _check("aux_part", self.aux_part, 0 < self.aux_part <= 1, "above 0 and at most 1")
        if self.lr_width is not None:
            _check("lr_width", self.lr_width, self.lr_width >= 1, "at least 1")
        if self.start_factor is not None:
            _check("start_factor", self.start_factor, 0 < self.start_factor < math.inf, "a positive number")
            if self.target_l0 is None or not self.trains_threshold:
                raise ConfigError(
                    "start_factor multiplies the target_l0 of jumprelu, and there is none; set start_factor to None, "
                    "as the recipes topk, batchtopk and relu do"
                )
        if self.clip_norm is not None:
            _check("clip_norm", self.clip_norm, 0 < self.clip_norm < math.inf, "a positive number")
        ends = (0.0, *self.prefixes, 1.0)
        if not all(a < b for a, b in pairwise(ends)):
            raise ConfigError(f"prefixes must rise from above 0 to below 1, not {list(self.prefixes)}")

    def _check_target(self) -> None:
        aims = self.sparsity in ("target_mean_l0", "target_token_l0")
        if not aims and self.target_l0 is not None:
            raise ConfigError(
                f"target_l0 has no effect with sparsity {self.sparsity}; set target_l0 to None, or for jumprelu use "
                "sparsity target_mean_l0"
            )
        if aims and not (self.target_l0 is not None and 0 < self.target_l0 < math.inf):
            raise ConfigError(f"sparsity {self.sparsity} needs a positive target_l0, not {self.target_l0}")

    def _check_architecture(self) -> None:
        kind = self.architecture
        if self.selects and self.k is None:
            raise ConfigError(f"{kind} needs k, the number of features that are on in a row")
        if self.selects and (self.sparsity != "l0" or self.sparsity_weight > 0):
            raise ConfigError(f"{kind} has no penalty, k alone decides: leave sparsity at l0, with sparsity_weight 0")
        if not self.selects and self.k is not None:
            raise ConfigError(f"k has no effect with {kind}; use topk or batchtopk, or leave k out")
        if self.aux_k is None and self.aux_after_rows is not None:
            raise ConfigError("aux_after_rows has no effect without aux_k; give both, or leave it out")
        if kind == "relu" and self.aux_k is not None:
            raise ConfigError("aux_k is for jumprelu, topk and batchtopk, not relu; set it to None")
        if (kind == "relu") != (self.sparsity == "l1"):
            raise ConfigError(f"relu and sparsity l1 need each other, not {kind} with {self.sparsity}")
        if self.micro_features is not None and (self.selects or self.aux_k is not None or self.clip_norm is not None):
            what = kind if self.selects else "clip_norm" if self.aux_k is None else "aux_k"
            raise ConfigError(f"{what} needs all features at once; leave micro_features out")
        if self.frequency_weight > 0 and kind != "jumprelu":
            raise ConfigError(f"frequency_weight moves thresholds, which {kind} does not train; set it to 0")

    def _check_stability(self) -> None:
        steps = [step for step, _ in self.lr_changes]
        if steps != sorted(set(steps)) or not all(0 <= step < self.steps for step in steps):
            raise ConfigError(
                f"lr_changes must be pairs (step, factor) whose steps rise from 0 to {self.steps - 1}, not "
                f"{self.lr_changes}"
            )
        for _, factor in self.lr_changes:
            _check("a factor of lr_changes", factor, 0 < factor < math.inf, "a positive number")
        if self.resample_every is not None:
            _check("resample_every", self.resample_every, self.resample_every >= 1, "at least 1")
        elif self.resample_until is not None:
            raise ConfigError("resample_until has no effect without resample_every; give both, or leave it out")
        if self.resample_until is not None:
            _check("resample_until", self.resample_until, self.resample_until >= 1, "at least 1")
        if self.spike_factor is not None:
            _check("spike_factor", self.spike_factor, 1 < self.spike_factor < math.inf, "a number above 1")


def _check(name: str, value: float | int, holds: bool, expected: str) -> None:
    if not holds:
        raise ConfigError(f"{name} must be {expected}, not {value}")
