"""Control arms: what else could have made the difference. An effect is what the target does and these do not.

flipped             the same push the other way, where the method has an opposite
random feature      a live feature with about the same maximum, another one for every seed
random direction    a change of equal length at every position, in a direction drawn anew for every seed
prompt              no steering; the prompt asks for it
"""

from collections.abc import Sequence
from dataclasses import replace

import torch

from mistudio.errors import ConfigError, SAEError
from mistudio.lm import Site
from mistudio.steer.apply import Pushes
from mistudio.steer.arms import STEERED, UNSTEERED, Arm
from mistudio.steer.dose import check_strengths
from mistudio.steer.lab import Lab
from mistudio.steer.methods import METHODS
from mistudio.steer.push import Push, flipped

FLIPPED, RANDOM_FEATURE, RANDOM_DIRECTION, PROMPT = "flipped", "random feature", "random direction", "prompt"
CONTROLS = (RANDOM_FEATURE, RANDOM_DIRECTION)
"""What the target's effect is measured against; the flipped and prompt arms are other questions."""

POOL = 4
"""Random features are drawn among this many times as many candidates as are wanted: those of the nearest maxima."""


def comparison_arms(
    lab: Lab, pushes: Pushes, *, seeds: int, draw: int = 0, ask: str | None = None
) -> tuple[list[Arm], list[str]]:
    """The arms unsteered, steered and all controls that these pushes have; and a sentence for each that they have not.

    `ask`: the text that the prompt baseline puts before the prompt. `draw` seeds the choice of random controls.
    """
    arms = [Arm(name=UNSTEERED), Arm(name=STEERED, pushes=(pushes,))]
    left_out: list[str] = []
    other_way = tuple(other for push in pushes if (other := flipped(push)) is not None)
    if len(other_way) == len(pushes):
        arms.append(Arm(name=FLIPPED, pushes=(other_way,)))
    else:
        left_out.append(f"{FLIPPED}: {', '.join(p.method for p in pushes if flipped(p) is None)} has no opposite")
    try:
        arms.append(random_feature_arm(lab, pushes, seeds=seeds, draw=draw))
    except SAEError as error:
        left_out.append(f"{RANDOM_FEATURE}: {error}")
    arms.append(random_direction_arm(pushes, seeds=seeds, draw=draw))
    if ask is not None:
        arms.append(Arm(name=PROMPT, prefix=ask))
    return arms, left_out


def random_direction_arm(pushes: Pushes, *, seeds: int, draw: int = 0) -> Arm:
    """The pushes with their lengths kept and their directions drawn, anew for every seed and push."""
    rows = [
        tuple(replace(push, turned=draw + seed * len(pushes) + n) for n, push in enumerate(pushes))
        for seed in range(seeds)
    ]
    return Arm(name=RANDOM_DIRECTION, pushes=tuple(rows))


def random_feature_arm(lab: Lab, pushes: Pushes, *, seeds: int, draw: int = 0) -> Arm:
    """The pushes by other live features of about equal maximum, drawn without replacement, anew for every seed.

    A strength in residual units is kept in length: c·‖W_dec[i]‖. SAEError: a push by a vector, unknown maxima, or
    too few live features.
    """
    by_push = [_others(lab, push, pushes, seeds, draw + n) for n, push in enumerate(pushes)]
    return Arm(name=RANDOM_FEATURE, pushes=tuple(zip(*by_push, strict=True)))


def sweep_arms(pushes: Pushes, strengths: Sequence[float]) -> list[Arm]:
    """One arm a strength: that of the first push, the others in their proportion to it.

    ConfigError: the first push takes no strength or has 0; or as `check_strengths`.
    """
    first = pushes[0].strength if pushes else None
    if not first:
        raise ConfigError("A sweep varies the first push's strength, which must be there and not 0.")
    check_strengths(strengths)
    return [Arm(name=f"{STEERED} {c:g}", pushes=(_at(pushes, c / first),)) for c in strengths]


def _at(pushes: Pushes, factor: float) -> Pushes:
    return tuple(p if p.strength is None else replace(p, strength=p.strength * factor) for p in pushes)


def _others(lab: Lab, push: Push, pushes: Pushes, n: int, draw: int) -> list[Push]:
    site = lab.site(push)
    if push.feature is None or site not in lab.known:
        raise SAEError("it needs a feature, not a vector, and its statistics (`mistudio eval`).")
    m = lab.maximum(push)
    known = lab.known[site]
    live = ((known.density > 0) & (known.maxima > 0)).cpu()
    live[[p.feature for p in pushes if p.feature is not None and lab.site(p) == site]] = False
    candidates = live.nonzero().flatten()
    if len(candidates) < n:
        raise SAEError(f"{n} controls need as many other live features; this SAE has {len(candidates)}.")
    distance = (known.maxima.cpu()[candidates].log() - torch.tensor(m).log()).abs()
    pool = candidates[distance.argsort(stable=True)[: POOL * n]]
    order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(draw))
    return [_same_length(lab, site, push, int(j)) for j in pool[order[:n]]]


def _same_length(lab: Lab, site: Site, push: Push, feature: int) -> Push:
    """The push by another feature; where decoder rows are not of unit norm, of the same length."""
    if push.method != "add" or push.strength is None or push.unit == "max":
        return replace(push, feature=feature)
    assert METHODS[push.method].unit == "residual"
    assert push.feature is not None
    sae = lab.sae(site)
    ratio = float(sae.feature(push.feature).detach().norm() / sae.feature(feature).detach().norm())
    return replace(push, feature=feature, strength=push.strength * ratio)
