"""`compare`: the same prompt continued with and without steering, each arm from the same seed."""

from dataclasses import dataclass

import torch

from mistudio.errors import ConfigError, SAEError
from mistudio.lm import Generation, LanguageModel, Site
from mistudio.sae import SAE, Transcoder
from mistudio.steer.features import Features, steering_edit, steering_vector


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two arms of text, and how hard the push was."""

    prompt: str
    """The text both arms continue."""

    site: str
    """Where the steering vector was added."""

    features: Features
    """Pairs of feature index and strength."""

    delta_norm: float
    """‖Σ c_i W_dec[i]‖, raw activation units: the length added to every position."""

    prompt_norm: float | None
    """Mean ‖h‖ at the site over the prompt, unsteered, without BOS, EOS and PAD; None where nothing else is in it. A
    delta_norm above it usually breaks the text."""

    edits_fired: int
    """Forward passes of the steered arm on which the edit acted: proof that it did."""

    unsteered: list[Generation]
    """Continuations of the untouched model."""

    steered: list[Generation]
    """Continuations of the steered model, from the same seed."""


def compare(
    lm: LanguageModel,
    sae: SAE,
    prompt: str,
    features: Features,
    *,
    site: Site | None = None,
    max_new_tokens: int = 64,
    temperature: float = 0.5,
    seed: int = 16,
    samples: int = 1,
    use_cache: bool = True,
) -> Comparison:
    """Unsteered and steered continuations of `prompt`; temperature and seed default to Neuronpedia's, 0 is greedy.

    Both arms draw the same random numbers, so they differ by the steering alone: all strengths 0 gives equal texts.
    `site` None takes the one that the SAE names. ConfigError: several greedy samples, which would be one text.
    SAEError: no site, a width that does not fit, or a feature that does not exist. ModelError: the site is not in the
    model.
    """
    site = _site_of(sae) if site is None else site
    _check(lm, sae, site, temperature, samples)
    edit = steering_edit(sae, features)

    def continue_prompt() -> list[Generation]:
        return lm.generate(
            prompt,
            max_new_tokens=max_new_tokens,
            samples=samples,
            temperature=temperature,
            seed=seed,
            use_cache=use_cache,
        )

    unsteered = continue_prompt()
    with lm.editing({site: edit}) as edits:
        steered = continue_prompt()
    return Comparison(
        prompt=prompt,
        site=str(site),
        features=features,
        delta_norm=steering_vector(sae, features).double().norm().item(),
        prompt_norm=prompt_norm(lm, site, prompt),
        edits_fired=edits.fired[site],
        unsteered=unsteered,
        steered=steered,
    )


def _site_of(sae: SAE) -> Site:
    if sae.config.hook_name is None:
        raise SAEError("This SAE does not say where in the model it belongs; give `site`, such as layers.3.resid_post.")
    return Site.parse(sae.config.hook_name)


def _check(lm: LanguageModel, sae: SAE, site: Site, temperature: float, samples: int) -> None:
    lm.check(site)
    if isinstance(sae, Transcoder):
        raise SAEError("A transcoder writes another place than it reads; give an SAE of one site.")
    if sae.config.d_model != lm.width(site):
        raise SAEError(
            f"The SAE's features have width {sae.config.d_model}, but {lm.name} has {lm.width(site)} at {site}."
        )
    if temperature == 0 and samples > 1:
        raise ConfigError(
            f"{samples} greedy samples would all be the same text; give a temperature above 0, such as 0.5."
        )


def prompt_norm(lm: LanguageModel, site: Site, prompt: str) -> float | None:
    """Mean ‖h‖ at `site` over the prompt, unsteered, without BOS, EOS and PAD; None where nothing else is in it."""
    tokens = torch.tensor([lm.to_tokens(prompt)], device=lm.device)
    ordinary = ~lm.is_special(tokens)
    if not bool(ordinary.any()):
        return None
    h = lm.run(tokens, read=(site,)).activations[site]
    return h[ordinary].double().norm(dim=-1).mean().item()
