"""What chosen features do at every token, as the arm's own model had them: after its pushes, at the SAE's site.

One forward pass over the finished text, with the arm's steering in place: causal attention makes it what the model saw
while it wrote, up to rounding. To read a text as the unsteered model would: `measures.read_again`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mistudio.errors import ConfigError
from mistudio.lm import LanguageModel, Site
from mistudio.steer.apply import steered
from mistudio.steer.arms import Written
from mistudio.steer.lab import Lab


@dataclass(frozen=True, kw_only=True)
class Track:
    """The activations along one text, prompt included."""

    arm: str
    """The arm that wrote it."""
    prompt: int
    """Number of the prompt."""
    seed: int
    """Its seed."""
    pieces: list[str]
    """The text of each token; BOS and the like are empty."""
    prompt_tokens: int
    """How many of them are the prompt."""
    features: list[int]
    """The features followed."""
    activations: list[list[float]]
    """For each token, the activation of each feature, raw units."""


@torch.no_grad()
def track(
    lab: Lab, rows: Sequence[Written], *, site: Site, features: Sequence[int] = (), top: int | None = None
) -> list[Track]:
    """The activations of `features` along every row; or, with `top`, of the row's strongest features apart from BOS.

    ConfigError: neither or both are given. SAEError: no such feature.
    """
    if bool(features) == (top is not None):
        raise ConfigError("Say which features to follow: a list of them, or how many of the strongest.")
    sae = lab.sae(site)
    for feature in features:
        sae.feature(feature)
    found = []
    for row in rows:
        ids = [*row.context, *row.tokens]
        with steered(lab, [row.pushes], [len(row.context)], insist=False):
            h = lab.lm.run(torch.tensor([ids], device=lab.lm.device), read=(site,)).activations[site][0]
        f = sae.encode(h)  # [T, F]
        chosen = list(features) if top is None else f[1:].amax(0).topk(top).indices.tolist()
        found.append(
            Track(
                arm=row.arm,
                prompt=row.prompt,
                seed=row.seed,
                pieces=pieces(lab.lm, ids),
                prompt_tokens=len(row.context),
                features=chosen,
                activations=f[:, chosen].float().tolist(),
            )
        )
    return found


def pieces(lm: LanguageModel, ids: Sequence[int]) -> list[str]:
    """What each token adds to the text; together they are the text, but for characters split over tokens."""
    texts = [lm.to_text(ids[: n + 1]) for n in range(len(ids))]
    return [text.removeprefix(before) for before, text in zip(["", *texts], texts, strict=False)]
