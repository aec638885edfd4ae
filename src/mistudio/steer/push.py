"""`Push`: one step of a steering, as plain data. A steering is a tuple of them, each reading what the ones before left.

A push says which equation (`method`), along which direction (a feature of an SAE, or a vector by name), how much, at
which site, on which positions, and under which condition. It holds no tensors: those are the `Lab`'s.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

from mistudio.errors import ConfigError
from mistudio.lm import Site
from mistudio.steer.methods import METHODS
from mistudio.steer.positions import check_positions


@dataclass(frozen=True, kw_only=True)
class When:
    """A condition on another feature, read at the same site and position, before the push."""

    feature: int
    """Index of the feature looked at."""

    above: float = 0.0
    """The push acts where the feature's activation is greater than this, in raw activation units."""


@dataclass(frozen=True, kw_only=True)
class Push:
    """One change of the residual: a method, a direction, a number, and where."""

    feature: int | None = None
    """The feature of the site's SAE whose decoder row is the direction; or else give `vector`."""

    vector: str | None = None
    """The name of a vector of one's own; or else give `feature`."""

    strength: float | None = None
    """The equation's c, in the method's unit; None for the methods that take no number."""

    method: str = "add"
    """A key of METHODS."""

    unit: Literal["own", "max"] = "own"
    """What `strength` counts in: the method's own unit, or multiples of the feature's largest activation."""

    site: str | None = None
    """Where, such as layers.3.resid_post; None: at the lab's SAE, if it has one only."""

    positions: str = "all"
    """On which positions: all, no-bos, no-special, prompt, generated, last-prompt, from:12, at:3,5."""

    when: When | None = None
    """Only where another feature is active."""

    turned: int | None = None
    """A seed: the change keeps its length at every position, but points in a random direction. For controls."""

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ConfigError(f"There is no method {self.method!r}; the methods are {', '.join(METHODS)}.")
        if self.site is not None:
            Site.parse(self.site)
        check_positions(self.positions)
        _check_direction(self)
        _check_strength(self)


def flipped(push: Push) -> Push | None:
    """The push the other way; None where the method has no opposite."""
    if not METHODS[push.method].signed or push.strength is None:
        return None
    return replace(push, strength=-push.strength)


def _check_direction(push: Push) -> None:
    if (push.feature is None) == (push.vector is None):
        raise ConfigError("A push needs a direction: either `feature` (an index) or `vector` (a name), not both.")
    for index in (push.feature, push.when.feature if push.when else None):
        if index is not None and index < 0:
            raise ConfigError(f"{index} is not the index of a feature; indices start at 0.")
    if push.vector is not None and METHODS[push.method].reads != "direction":
        raise ConfigError(f"{push.method} reads a feature's activation, which a vector has not; give `feature`.")


def _check_strength(push: Push) -> None:
    unit = METHODS[push.method].unit
    if unit is None and push.strength is not None:
        raise ConfigError(f"{push.method} takes no strength.")
    if unit is not None and push.strength is None:
        raise ConfigError(f"{push.method} needs a strength: c in {METHODS[push.method].equation}.")
    if push.strength is not None and not math.isfinite(push.strength):
        raise ConfigError(f"The strength is {push.strength}; it must be a finite number.")
    if push.unit == "max" and (unit not in ("residual", "activation") or push.feature is None):
        raise ConfigError(f"Multiples of the maximum are for features and activations; {push.method} has unit {unit}.")
