"""The three calls of the project's first plan, as thin views on `compare` and `steered`: features added everywhere."""

from collections.abc import Sequence
from functools import lru_cache

from mistudio.errors import SAEError
from mistudio.lm import LanguageModel, Site
from mistudio.sae import SAE
from mistudio.steer.apply import Pushes
from mistudio.steer.arms import Arm, write_arms
from mistudio.steer.lab import Lab
from mistudio.steer.push import Push


class FeatureSteering:
    """One model and one SAE, for steering by its features: h + strength·W_dec[feature] on every position."""

    def __init__(self, model: LanguageModel, sae: SAE, layer_name: str):
        """`layer_name`: the SAE's site, in any of the ways `Site.parse` reads. SAEError: it is for another one."""
        self.site = Site.parse(layer_name)
        self.lab = Lab(lm=model, saes={self.site: sae})

    def steer(
        self,
        prompt: str,
        feature_idx: int,
        strength: float = 50.0,
        *,
        max_new_tokens: int = 100,
        temperature: float = 0.7,
        seed: int = 16,
    ) -> str:
        """The steered continuation of `prompt`."""
        push = Push(feature=feature_idx, strength=strength, site=str(self.site))
        arms = [Arm(name="steered", pushes=((push,),))]
        [row] = write_arms(
            self.lab, [prompt], arms, seeds=[seed], max_new_tokens=max_new_tokens, temperature=temperature
        )
        return row.text

    def compare_steering(
        self,
        prompt: str,
        feature_configs: Sequence[tuple[int, float]],
        *,
        max_new_tokens: int = 100,
        temperature: float = 0.7,
        seed: int = 16,
    ) -> dict[str, str]:
        """Name → continuation: "unsteered", and "feature_I_alpha_S" for each pair (I, S); one batch, one seed."""
        pushes: dict[str, Pushes] = {"unsteered": ()}
        for index, strength in feature_configs:
            push = Push(feature=index, strength=strength, site=str(self.site))
            pushes[f"feature_{index}_alpha_{strength}"] = (push,)
        arms = [Arm(name=name, pushes=(push,)) for name, push in pushes.items()]
        rows = write_arms(
            self.lab, [prompt], arms, seeds=[seed], max_new_tokens=max_new_tokens, temperature=temperature
        )
        return {row.arm: row.text for row in rows}


def mistudio_generate(
    prompt: str,
    sae: SAE,
    feature_idx: int,
    strength: float,
    *,
    model: LanguageModel | None = None,
    max_new_tokens: int = 256,
    temperature: float = 0.5,
    seed: int = 16,
) -> str:
    """The steered continuation with the settings of Neuronpedia's page, at the SAE's own site.

    model None: the one the SAE names, loaded once. SAEError: it names no site, or no model.
    """
    if sae.config.hook_name is None or (model is None and sae.config.model is None):
        raise SAEError("This SAE does not say its site and model; use FeatureSteering(model, sae, site).")
    lm = model if model is not None else _loaded(str(sae.config.model))
    steering = FeatureSteering(lm, sae.to(lm.device), sae.config.hook_name)
    room = lm.shape.context - len(lm.to_tokens(prompt))
    return steering.steer(
        prompt,
        feature_idx,
        strength,
        max_new_tokens=min(max_new_tokens, max(room, 1)),
        temperature=temperature,
        seed=seed,
    )


@lru_cache(maxsize=1)
def _loaded(name: str) -> LanguageModel:
    return LanguageModel.load(name)
