"""The demo's proof that steering steers: the share of a topic's words, steered, unsteered and under random features.

The feature is the one that best matches a topic (`topic sea`, …), chosen on labelled text before anything is
generated; its strength is a fixed multiple of its largest activation. Each control is a random live feature of equal
strength, a fresh one for each story.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Group, RenderableType
from rich.text import Text

from mistudio.errors import TextError
from mistudio.features import Match
from mistudio.lm import Edit
from mistudio.lm.stories import word_labels
from mistudio.progress import progress_bar
from mistudio.sae import SAE
from mistudio.steer import Features, compare, random_controls, steering_vector
from mistudio.studio.recipe import SteerStage
from mistudio.studio.steer_verb import side_by_side
from mistudio.studio.workspace import feature_stats, load_sae

WORD = re.compile(r"[A-Za-z]+")


@dataclass(frozen=True, kw_only=True)
class TopicSteering:
    """Three arms of stories, and the share of the topic's words in each."""

    topic: str
    """The topic steered towards."""
    feature: int
    """The feature added."""
    strength: float
    """How much of it, in raw activation units."""
    delta_norm: float
    """Norm of what was added at each position."""
    prompt_norm: float | None
    """Mean norm of the activations at the site over the prompt."""
    samples: int
    """Stories an arm."""
    prompt: str
    """The beginning of every story."""
    share_unsteered: float
    """Share of all words that are the topic's words, without steering."""
    share_steered: float
    """The same with the feature."""
    share_random: float
    """The same with a random live feature of equal strength."""
    unsteered: list[str]
    """The stories."""
    steered: list[str]
    """The stories."""
    random: list[str]
    """The stories."""


def run(folder: Path, matches: Sequence[Match], stage: SteerStage) -> TopicSteering:
    """Steers towards the topic that has the best-matching feature. TextError: no match is about a topic."""
    match = next((m for m in sorted(matches, key=lambda m: -m.f1) if m.concept.startswith("topic ")), None)
    if match is None:
        raise TextError("No matched concept is a topic; steering the demo needs the labelled text `stories`.")
    topic = match.concept.removeprefix("topic ")
    lm, sae, site = load_sae(folder, None)
    stats = feature_stats(folder)
    strength = stage.strength_of_max * float(stats.max[match.feature])
    wanted = ((match.feature, strength),)
    controls = random_controls(sae, stats.density, wanted, n=stage.samples, seed=stage.seed)
    with progress_bar("steer", 3, "arms of stories") as bar:
        arms = compare(
            lm,
            sae,
            stage.prompt,
            wanted,
            site=site,
            max_new_tokens=stage.max_new_tokens,
            temperature=stage.temperature,
            seed=stage.seed,
            samples=stage.samples,
        )
        bar.advance(2)
        with lm.editing({site: one_control_a_row(sae, controls)}):
            random = lm.generate(
                stage.prompt,
                max_new_tokens=stage.max_new_tokens,
                samples=stage.samples,
                temperature=stage.temperature,
                seed=stage.seed,
            )
        bar.advance()
    unsteered, steered, controlled = ([g.text for g in arm] for arm in (arms.unsteered, arms.steered, random))
    return TopicSteering(
        topic=topic,
        feature=match.feature,
        strength=strength,
        delta_norm=arms.delta_norm,
        prompt_norm=arms.prompt_norm,
        samples=stage.samples,
        prompt=stage.prompt,
        share_unsteered=topic_share(unsteered, topic),
        share_steered=topic_share(steered, topic),
        share_random=topic_share(controlled, topic),
        unsteered=unsteered,
        steered=steered,
        random=controlled,
    )


def one_control_a_row(sae: SAE, controls: Sequence[Features]) -> Edit:
    """An edit that steers row i of the batch by `controls[i]`."""
    vectors = torch.stack([steering_vector(sae, control) for control in controls])[:, None]  # [N, 1, D]
    return lambda h: h + vectors.to(h)


def topic_share(texts: Sequence[str], topic: str) -> float:
    """Share of the words of all texts together that belong to the topic's lexicon; 0 without words."""
    lexicon = word_labels()
    words = [word.lower() for text in texts for word in WORD.findall(text)]
    hits = sum(f"words of {topic}" in lexicon.get(word, ()) for word in words)
    return hits / len(words) if words else 0.0


def show(result: TopicSteering) -> RenderableType:
    """One pair of stories, and the three shares."""
    ratio = "" if result.share_random == 0 else f" ({result.share_steered / result.share_random:.1f} × random)"
    norm = "" if result.prompt_norm is None else f", activations' mean norm {result.prompt_norm:.3g}"
    return Group(
        Text(
            f"Steered towards: {result.topic} (feature {result.feature}, strength {result.strength:.3g}{norm})",
            style="bold",
        ),
        side_by_side(result.prompt, result.unsteered[0], result.steered[0]),
        Text(
            f"Share of {result.topic} words over {result.samples} stories an arm: "
            f"unsteered {result.share_unsteered:.1%}, "
            f"steered {result.share_steered:.1%}, random feature of equal strength {result.share_random:.1%}{ratio}"
        ),
    )
