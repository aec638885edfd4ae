"""`Lab`: the model, SAEs and vectors that pushes refer to, and what a push's names and numbers come to in them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from mistudio.errors import ConfigError, SAEError
from mistudio.lm import LanguageModel, Site
from mistudio.sae import SAE, Transcoder
from mistudio.steer.methods import METHODS
from mistudio.steer.push import Push


@dataclass(frozen=True, kw_only=True)
class Known:
    """What an evaluation found out about the features of one SAE."""

    maxima: Float[Tensor, " F"]
    """Largest activation of each feature, raw units; 0 for one that never fired."""

    density: Float[Tensor, " F"]
    """Share of tokens on which each feature fires."""


@dataclass(frozen=True, kw_only=True)
class Lab:
    """A model with what it can be steered by. SAEError: an SAE does not fit its site."""

    lm: LanguageModel
    """The model."""

    saes: Mapping[Site, SAE]
    """The SAE of each site, in raw units."""

    known: Mapping[Site, Known] = field(default_factory=dict)
    """Statistics of the features, for strengths in multiples of the maximum and for random controls."""

    vectors: Mapping[str, Float[Tensor, " D"]] = field(default_factory=dict)
    """Directions of one's own, by name."""

    def __post_init__(self) -> None:
        for site, sae in self.saes.items():
            self.lm.check(site)
            _check_sae(self.lm, site, sae)

    def site(self, push: Push) -> Site:
        """Where the push acts. ConfigError: it names no site and there is not exactly one SAE."""
        if push.site is not None:
            site = Site.parse(push.site)
            self.lm.check(site)
            return site
        if len(self.saes) != 1:
            raise ConfigError(f"There are {len(self.saes)} SAEs, so the push must say its site.")
        return next(iter(self.saes))

    def sae(self, site: Site) -> SAE:
        """The SAE at `site`. SAEError: there is none."""
        if site not in self.saes:
            raise SAEError(f"There is no SAE at {site}; the lab has {', '.join(map(str, self.saes)) or 'none'}.")
        return self.saes[site]

    def direction(self, push: Push) -> Float[Tensor, " D"]:
        """d: the decoder row or vector, float32 or wider. SAEError: no such feature. ConfigError: no such vector."""
        site = self.site(push)
        if push.when is not None:
            self.sae(site).feature(push.when.feature)
        if push.feature is not None:
            return _wide(self.sae(site).feature(push.feature).detach())
        assert push.vector is not None
        if push.vector not in self.vectors:
            have = ", ".join(self.vectors) or "none"
            raise ConfigError(f"There is no vector {push.vector!r}; the lab has {have}.")
        vector = _wide(self.vectors[push.vector]).to(self.lm.device)
        if vector.shape != (self.lm.width(site),):
            raise ConfigError(
                f"The vector {push.vector!r} has shape {list(vector.shape)}; {site} has width {self.lm.width(site)}."
            )
        if not bool(vector.isfinite().all()) or not bool(vector.any()):
            raise ConfigError(f"The vector {push.vector!r} is zero or not finite, so it is no direction.")
        return vector

    def number(self, push: Push) -> float:
        """c in the method's own unit; nan where it takes none. ConfigError: too large for the model's dtype."""
        if push.strength is None:
            return math.nan
        c = push.strength * (self.maximum(push) if push.unit == "max" else 1.0)
        limit = torch.finfo(self.lm.dtype).max
        if METHODS[push.method].unit in ("residual", "activation") and abs(c) > limit:
            raise ConfigError(f"A strength of {c:.3g} overflows {self.lm.dtype}, which ends at {limit:.3g}.")
        return c

    def maximum(self, push: Push) -> float:
        """m_i of the push's feature. SAEError: not known, or the feature never fired."""
        site = self.site(push)
        if push.feature is None or site not in self.known:
            raise SAEError(f"The features' maxima at {site} are not known; run `mistudio eval` on the SAE first.")
        self.sae(site).feature(push.feature)
        m = float(self.known[site].maxima[push.feature])
        if m <= 0:
            raise SAEError(f"Feature {push.feature} never fired in the evaluation, so its maximum is no unit.")
        return m

    def check(self, push: Push) -> None:
        """An error of `direction` or `number`, or none."""
        self.direction(push)
        self.number(push)


def _check_sae(lm: LanguageModel, site: Site, sae: SAE) -> None:
    if isinstance(sae, Transcoder):
        raise SAEError("A transcoder writes another place than it reads; give an SAE of one site.")
    if not sae.folded:
        raise SAEError("This SAE is in its training form; fold() it into raw units before steering with it.")
    if sae.config.d_model != lm.width(site):
        raise SAEError(
            f"The SAE's features have width {sae.config.d_model}, but {lm.name} has {lm.width(site)} at {site}."
        )
    if sae.config.hook_name is not None and Site.parse(sae.config.hook_name) != site:
        raise SAEError(f"The SAE is for {sae.config.hook_name}, not for {site}.")


def _wide(vector: Tensor) -> Tensor:
    return vector.to(torch.promote_types(vector.dtype, torch.float32))
