"""Effects and their uncertainty: a bootstrap over seeds, paired, as a seed draws the same numbers in all arms."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mistudio.errors import ConfigError

DRAWS = 4000
CONFIDENCE = 0.95


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A mean over seeds and its 95% bootstrap interval."""

    mean: float
    """The mean."""

    low: float
    """2.5% of the resampled means lie below."""

    high: float
    """2.5% of the resampled means lie above."""

    n: int
    """Seeds."""

    def __str__(self) -> str:
        return f"{self.mean:.3g} [{self.low:.3g}, {self.high:.3g}]"


def bootstrap(values: Sequence[float], *, seed: int = 0) -> Interval:
    """The mean of `values`, one a seed, with the percentile interval of the means of resampled seeds.
    ConfigError: there is none, or one is not finite."""
    if not values or not np.isfinite(values).all():
        raise ConfigError("An interval needs at least one value, and finite ones.")
    x = np.asarray(values, dtype=np.float64)
    drawn = np.random.default_rng(seed).integers(0, len(x), size=(DRAWS, len(x)))
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(x[drawn].mean(axis=1), [tail, 1 - tail])
    return Interval(mean=float(x.mean()), low=float(low), high=float(high), n=len(x))


def effect(target: Sequence[float], controls: Sequence[Sequence[float]], *, seed: int = 0) -> Interval:
    """mean over seeds of target_s - mean over controls of control_s, with its interval. ConfigError: no controls."""
    if not controls or any(len(control) != len(target) for control in controls):
        raise ConfigError("An effect needs at least one control, with as many seeds as the target.")
    difference = np.asarray(target, dtype=np.float64) - np.asarray(controls, dtype=np.float64).mean(axis=0)
    return bootstrap(difference.tolist(), seed=seed)
