"""Why a JumpReLU SAE does not train: what users of other trainers met most, told by what a run measures.

- A bandwidth for activations of another scale: hardly an entry lies in the kernel window, so thresholds learn from
  noise (SAELens #494).
- Log thresholds in a short run: a step of Adam moves them by at most lr of themselves (SAELens #382, #718).
- A penalty so large that more of it changes nothing: Adam divides a threshold's gradient by its size, and where the
  penalty makes up nearly all of it the weight cancels (SAELens #719, #720).
- Dead features.

Each is one sentence, with what to type, and is said once a run. The bounds below are far from what healthy runs show;
a sentence that comes too easily is not read.
"""

from dataclasses import dataclass

from mistudio.train.config import TrainConfig
from mistudio.train.log import Metrics

MOVED = 0.01
"""A threshold that moved by less than this part of its start has not trained."""
OFF_TARGET = 0.25
"""L0 is far from target_l0 where it is off by more than this part of it."""
WINDOW = 1e-3
"""Fewer entries in the window than this, for each active one, mean that the bandwidth is too small for z."""
SATURATED = 3
"""A penalty this many times the reconstruction error leaves thresholds nothing else to follow."""
DEAD = 0.1
"""More dead features than this part of all are worth a word."""


@dataclass(frozen=True)
class Measured:
    """What tells the failures apart, beside a line of metrics."""

    moved: float
    """The median over features of |threshold / threshold_init - 1|."""
    window: float
    """Entries in the lower half of the kernel window for each active entry, in the last batch."""


def time_to_look(cfg: TrainConfig, step: int) -> bool:
    """Whether a run has shown enough after this step: half of its steps, and the penalty has its whole weight."""
    return step == cfg.steps or step >= max(cfg.steps // 2, cfg.sparsity_warmup_steps)


def failures(cfg: TrainConfig, line: Metrics, n_features: int, measured: Measured) -> dict[str, str]:
    """A sentence for each failure that the line and `measured` show, by kind."""
    found = _threshold_failures(cfg, line, measured) if cfg.architecture == "jumprelu" else {}
    if line["dead"] > DEAD * n_features:
        every = -(-cfg.dead_after_rows // cfg.batch_rows)
        cure = f"type --train.resample-every {every}, or" if cfg.resample_every is None else "resample longer, or"
        found["dead"] = (
            f"{line['dead']:,} of {n_features:,} features are dead (silent for {cfg.dead_after_rows:,} rows). In a new "
            f"run, {cure} lower threshold_init, or lengthen sparsity_warmup_steps."
        )
    return found


def _threshold_failures(cfg: TrainConfig, line: Metrics, measured: Measured) -> dict[str, str]:
    l0, penalty, target = line["l0"], line["loss"] - line["mse"], cfg.target_l0
    aim = "" if target is None else f", with target_l0 {target:g}"
    found = {}
    if measured.window < WINDOW:
        found["bandwidth"] = (
            f"Only {measured.window:.2g} entries lie in the lower half of the kernel window for each active one: the "
            f"bandwidth of {cfg.bandwidth:g} is too small for these activations, and thresholds follow noise. In a new "
            f"run, type --train.bandwidth {10 * cfg.bandwidth:g} or more."
        )
    far = target is None or abs(l0 / target - 1) > OFF_TARGET
    if measured.moved < MOVED and far:
        cure = (
            f"A step moves a log threshold by at most lr ({cfg.lr:g}) of itself: in a new run, type "
            "--train.no-log-threshold, or raise steps or lr."
            if cfg.log_threshold
            else f"In a new run, raise lr (now {cfg.lr:g}) or sparsity_weight (now {cfg.sparsity_weight:g})."
        )
        found["thresholds"] = (
            f"Thresholds moved by {measured.moved:.2%} since the start, while L0 is {l0:.4g}{aim}. {cure}"
        )
    if cfg.sparsity == "l0" and penalty > SATURATED * line["mse"]:
        found["saturated"] = (
            f"The penalty is {penalty / line['mse']:.3g} times the reconstruction error: a larger sparsity_weight (now "
            f"{cfg.sparsity_weight:g}) will hardly lower L0 ({l0:.4g}). In a new run, lower it, or aim at an L0: "
            "--train.sparsity target_mean_l0 --train.target-l0 N."
        )
    return found
