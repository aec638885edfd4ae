"""Pairs of features and strengths, the plainest steering: decoder rows added on every position.

    h' = h + Σ c_i · W_dec[i]      on every position, BOS and generated tokens included

This is Neuronpedia's additive steering. A strength c_i is in raw activation units: with unit decoder rows, as trained
and released SAEs have, it is the length added to the residual stream. Not multiplied by the feature's maximum. Other
equations, positions, sites and vectors: `Push`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mistudio.errors import ConfigError, SAEError
from mistudio.sae import SAE

Features = tuple[tuple[int, float], ...]
"""Pairs of a feature's index and its strength."""


@dataclass(frozen=True, kw_only=True)
class Steering:
    """Which features to add, and how much of each."""

    features: Features
    """Pairs of a feature's index and its strength in raw activation units; a negative strength steers away."""

    def __post_init__(self) -> None:
        if not self.features:
            raise ConfigError(
                "Steering needs at least one feature: a pair of an index and a strength, such as (12, 40.0)."
            )
        for index, strength in self.features:
            if index < 0:
                raise ConfigError(f"{index} is not the index of a feature; indices start at 0.")
            if not math.isfinite(strength):
                raise ConfigError(f"The strength of feature {index} is {strength}; it must be a finite number.")


def steering_vector(sae: SAE, features: Features) -> Float[Tensor, " D"]:
    """Σ c_i · W_dec[i] in the SAE's dtype: what is added to every position.

    ConfigError: no features, a negative index, a strength that is not finite. SAEError: an index the SAE does not have.
    """
    for index, _ in Steering(features=features).features:
        if index >= sae.config.d_sae:
            raise SAEError(f"There is no feature {index}; this SAE has features 0 to {sae.config.d_sae - 1}.")
    indices = torch.tensor([index for index, _ in features], device=sae.W_dec.device)
    strengths = torch.tensor([strength for _, strength in features]).to(sae.W_dec)
    return strengths @ sae.W_dec.detach()[indices]


def steering_edit(sae: SAE, features: Features) -> Callable[[Float[Tensor, "N T D"]], Float[Tensor, "N T D"]]:
    """A function for `lm.editing({site: …})` that adds the steering vector, in h's dtype, at all positions.

    Errors as `steering_vector`; SAEError, when it runs: h has another width than the SAE.
    """
    vector = steering_vector(sae, features)

    def add(h: Float[Tensor, "N T D"]) -> Float[Tensor, "N T D"]:
        if h.shape[-1] != vector.shape[0]:
            raise SAEError(f"The SAE's features have width {vector.shape[0]}, but the site has {h.shape[-1]}.")
        return h + vector.to(h)

    return add


def random_controls(sae: SAE, density: Float[Tensor, " F"], features: Features, *, n: int, seed: int) -> list[Features]:
    """`n` steerings by random live features of equal strength: what *any* push of that length does.

    Each feature of `features` is replaced by one that fires (`density` > 0), drawn without replacement and never one of
    `features`, with the strength at which c·‖W_dec‖ is unchanged. SAEError: too few live features.
    """
    steering_vector(sae, features)
    if density.shape != (sae.config.d_sae,):
        raise SAEError(f"density has the shape {tuple(density.shape)}; this SAE has {sae.config.d_sae} features.")
    live = (density > 0).cpu()
    live[[index for index, _ in features]] = False
    candidates = live.nonzero().flatten()
    wanted = n * len(features)
    if len(candidates) < wanted:
        raise SAEError(f"{n} controls need {wanted} other live features, but this SAE has {len(candidates)}.")
    order = torch.randperm(len(candidates), generator=torch.Generator().manual_seed(seed))
    drawn = candidates[order[:wanted]].view(n, len(features)).tolist()
    norms = sae.W_dec.detach().norm(dim=1).tolist()
    return [
        tuple((j, c * norms[i] / norms[j]) for j, (i, c) in zip(control, features, strict=True)) for control in drawn
    ]
