"""The learning rate and the penalty's weight as pure functions of the step, so that a checkpoint need not hold them.

`step` counts the updates done before this one: the first update is step 0, the last `steps - 1`.
"""

import math

from mistudio.train.config import TrainConfig

FIRST_LR = 0.1
"""The warm-up starts at this part of the learning rate."""


def lr_at(cfg: TrainConfig, step: int) -> float:
    """lr · warm-up · decay · change. Warm-up: 0.1 + 0.9·(1 - cos(π·step/T))/2 for step < T (Gemma Scope, 3.2), then 1.
    Change: the factor of the last pair of lr_changes whose step has come, 1 before the first."""
    warm = 1.0
    if step < cfg.lr_warmup_steps:
        warm = FIRST_LR + (1 - FIRST_LR) * (1 - math.cos(math.pi * step / cfg.lr_warmup_steps)) / 2
    decay_steps = round(cfg.lr_decay_fraction * cfg.steps)
    decay = min(1.0, (cfg.steps - step) / decay_steps) if decay_steps else 1.0
    return cfg.lr * warm * decay * lr_factor(cfg, step)


def lr_factor(cfg: TrainConfig, step: int) -> float:
    """What lr_changes multiply the learning rate by at this step."""
    return next((factor for start, factor in reversed(cfg.lr_changes) if start <= step), 1.0)


def sparsity_weight_at(cfg: TrainConfig, step: int) -> float:
    """sparsity_weight · min(1, step/T): 0 at the first update, whole from step T on."""
    if step >= cfg.sparsity_warmup_steps:
        return cfg.sparsity_weight
    return cfg.sparsity_weight * step / cfg.sparsity_warmup_steps


def length_warnings(cfg: TrainConfig) -> list[str]:
    """One sentence for each warm-up that is longer than the run."""
    found = []
    if cfg.steps < cfg.lr_warmup_steps:
        found.append(
            f"The run has {cfg.steps:,} steps, fewer than its learning-rate warm-up of {cfg.lr_warmup_steps:,}: the "
            "learning rate never reaches lr. Raise steps or lower lr_warmup_steps."
        )
    if cfg.sparsity_weight > 0 and cfg.steps < cfg.sparsity_warmup_steps:
        found.append(
            f"The run has {cfg.steps:,} steps, fewer than its sparsity warm-up of {cfg.sparsity_warmup_steps:,}: the "
            "penalty never has its full weight. Raise steps or lower sparsity_warmup_steps."
        )
    return found
