"""From rows and their measures to one line an arm: means over seeds with intervals, effects, and the sweep."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from mistudio.errors import ConfigError
from mistudio.lm import Site
from mistudio.steer.arms import STEERED, UNSTEERED, Written
from mistudio.steer.compare import prompt_norm
from mistudio.steer.controls import CONTROLS
from mistudio.steer.dose import Dose, DoseResponse, dose_response
from mistudio.steer.effects import Interval, bootstrap
from mistudio.steer.lab import Lab
from mistudio.steer.measures import Measures, Read, side_effects
from mistudio.steer.methods import METHODS
from mistudio.steer.push import Push

Value = Callable[[Measures], float | None]

MEASURES: dict[str, Value] = {
    "ce": lambda m: m.ce,
    "kl": lambda m: m.kl,
    "target": lambda m: m.target_mean,
    "words": lambda m: m.words,
    "distinct_2": lambda m: m.distinct_2,
    "longest_repeat": lambda m: float(m.longest_repeat),
    "length": lambda m: float(m.length),
    "size": lambda m: m.size,
}
"""What is averaged for each arm, by name."""

RESPONSES = {
    "words": "share of the given words",
    "target": "target's mean activation",
    "kl": "KL from the unsteered model",
}
"""What a sweep may look at, and how that is called."""


@dataclass(frozen=True, kw_only=True)
class Strengths:
    """One push's strength in the three units that it can be said in; None where it cannot."""

    residual: float | None
    """The length added to the residual, raw units; of a clamp, the length the feature writes at that activation."""
    of_max: float | None
    """In multiples of the feature's largest activation."""
    relative: float | None
    """As a share of the residual's mean norm over the prompt."""


@dataclass(frozen=True, kw_only=True)
class ArmSummary:
    """What one arm's texts are like."""

    arm: str
    """Its name."""
    means: dict[str, Interval | None]
    """A key of MEASURES → mean over seeds; None where no text has the number."""
    risen: list[tuple[int, float]]
    """Features whose mean activation rose most against the unsteered arm, raw units."""
    fallen: list[tuple[int, float]]
    """Features that fell most."""


def strengths(lab: Lab, push: Push, prompt: str) -> Strengths:
    """The push's strength in all units."""
    unit, c, site = METHODS[push.method].unit, lab.number(push), lab.site(push)
    norm = prompt_norm(lab.lm, site, prompt)
    if unit is None or unit == "factor":
        return Strengths(residual=None, of_max=None, relative=None)
    d = float(lab.direction(push).norm())
    if unit == "share":
        residual = None if norm is None else c * norm
    else:
        residual = c * d if push.method in ("add", *_OF_FEATURES) else c
    relative = c if unit == "share" else None if norm is None or residual is None else residual / norm
    known = lab.known.get(site)
    m = 0.0 if known is None or push.feature is None else float(known.maxima[push.feature])
    of_max = residual / (m * d) if m > 0 and residual is not None else None
    return Strengths(residual=residual, of_max=of_max, relative=relative)


_OF_FEATURES = tuple(name for name, method in METHODS.items() if method.unit == "activation")


def by_seed(rows: Sequence[Written], read: Sequence[Read], arm: str, value: Value) -> dict[int, float]:
    """Seed → the mean over prompts of a measure; seeds whose texts all lack it are left out."""
    found: dict[int, list[float]] = {}
    for row, r in zip(rows, read, strict=True):
        number = value(r.measures) if row.arm == arm else None
        if number is not None:
            found.setdefault(row.seed, []).append(number)
    return {seed: sum(numbers) / len(numbers) for seed, numbers in found.items()}


def difference(target: Mapping[int, float], controls: Sequence[Mapping[int, float]]) -> Interval | None:
    """target less the mean control over the seeds that all of them have, with its interval; None: there are none."""
    shared = [seed for seed in target if all(seed in control for control in controls)]
    if not shared or not controls:
        return None
    return bootstrap([target[s] - sum(c[s] for c in controls) / len(controls) for s in shared])


def refuse_overflow(rows: Sequence[Written], read: Sequence[Read]) -> None:
    """Nothing; ConfigError: a measure of some row is not finite, as pushes near the end of a number type make them."""
    for row, r in zip(rows, read, strict=True):
        for name, value in MEASURES.items():
            number = value(r.measures)
            if number is not None and not math.isfinite(number):
                raise ConfigError(
                    f"The push of arm {row.arm!r} is so large that numbers overflow ({name} is {number}). Lower its "
                    "strength."
                )


def summaries(rows: Sequence[Written], read: Sequence[Read]) -> list[ArmSummary]:
    """One summary an arm, in the rows' order."""
    plain = [r for row, r in zip(rows, read, strict=True) if row.arm == UNSTEERED]
    found = []
    for arm in dict.fromkeys(row.arm for row in rows):
        own = [r for row, r in zip(rows, read, strict=True) if row.arm == arm]
        risen, fallen = side_effects(own, plain) if plain else ([], [])
        means = {name: _mean(by_seed(rows, read, arm, value)) for name, value in MEASURES.items()}
        found.append(ArmSummary(arm=arm, means=means, risen=risen, fallen=fallen))
    return found


def effects(rows: Sequence[Written], read: Sequence[Read]) -> dict[str, Interval]:
    """Of each measure, the steered arm less the mean of the random controls; "ce_rise": less the unsteered arm."""
    arms = {row.arm for row in rows}
    present = [name for name in CONTROLS if name in arms]
    found = {
        name: difference(by_seed(rows, read, STEERED, value), [by_seed(rows, read, c, value) for c in present])
        for name, value in MEASURES.items()
        if name in ("ce", "kl", "target", "words")
    }
    ce = MEASURES["ce"]
    found["ce_rise"] = difference(by_seed(rows, read, STEERED, ce), [by_seed(rows, read, UNSTEERED, ce)])
    return {name: interval for name, interval in found.items() if interval is not None}


def sweep_response(
    rows: Sequence[Written], read: Sequence[Read], strengths: Sequence[float], *, response: str, ce_bound: float
) -> DoseResponse:
    """The doses of a sweep against the unsteered arm; `response` is a key of RESPONSES.

    ConfigError: a strength wrote no text at all, so that there is nothing to measure.
    """

    def rise(c: float, name: str) -> Interval:
        value = MEASURES[name]
        found = difference(by_seed(rows, read, f"{STEERED} {c:g}", value), [by_seed(rows, read, UNSTEERED, value)])
        if found is None:
            raise ConfigError(f"No text at strength {c:g} has a number for {name!r}; take more tokens or more seeds.")
        return found

    doses = [Dose(strength=c, response=rise(c, response), ce_rise=rise(c, "ce")) for c in strengths]
    return dose_response(doses, measure=RESPONSES[response], ce_bound=ce_bound)


def _mean(values: Mapping[int, float]) -> Interval | None:
    return bootstrap(list(values.values())) if values else None


def first_target(lab: Lab, pushes: Sequence[Push]) -> tuple[Site, int | None]:
    """Where texts are re-read and for which feature: those of the first push by a feature, else the first SAE."""
    for push in pushes:
        if push.feature is not None and lab.site(push) in lab.saes:
            return lab.site(push), push.feature
    return next(iter(lab.saes)), None
