"""The demo's proof that steering steers: the share of a topic's words, steered, unsteered and under random features.

Each topic's candidate is the feature that best matches it on labelled text (`topic sea`, …). A feature that detects a
topic need not write it, so a pilot with a few stories a topic picks the one to steer with; what is reported is measured
on other stories, of other seeds. The strength is a fixed multiple of the feature's largest activation. Each control is
a random live feature of about the same maximum and of equal strength, a fresh one for each story. Effects are
differences of shares, story by story.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Group, RenderableType
from rich.text import Text

from mistudio.errors import TextError
from mistudio.features import Match
from mistudio.lm import Site
from mistudio.lm.stories import word_labels
from mistudio.steer import (
    STEERED,
    UNSTEERED,
    Arm,
    Interval,
    Lab,
    Push,
    effect,
    prompt_norm,
    random_feature_arm,
    write_arms,
)
from mistudio.studio.recipe import SteerStage
from mistudio.studio.steer_lab import load_lab
from mistudio.studio.steer_verb import side_by_side

WORD = re.compile(r"[A-Za-z]+")
PILOT_SEEDS = range(1_000_000, 1_000_004)
"""Seeds of the pilot's stories, a few a topic; the stories that are reported have others."""


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
    effect: Interval
    """Share steered minus share under random features, the mean over stories with its 95% interval."""
    unsteered: list[str]
    """The stories."""
    steered: list[str]
    """The stories."""
    random: list[str]
    """The stories."""


def run(folder: Path, matches: Sequence[Match], stage: SteerStage) -> TopicSteering:
    """Steers towards the topic that the pilot picked. TextError: no match is about a topic."""
    candidates = [match for match in matches if match.concept.startswith("topic ")]
    if not candidates:
        raise TextError("No matched concept is a topic; steering the demo needs the labelled text `stories`.")
    lab, site = load_lab(folder, None)
    match = pilot(lab, site, candidates, stage)
    topic = match.concept.removeprefix("topic ")
    push = _push(match, site, stage)
    random = random_feature_arm(lab, (push,), seeds=stage.samples, draw=stage.seed)
    rows = write_arms(
        lab,
        [stage.prompt],
        [Arm(name=UNSTEERED), Arm(name=STEERED, pushes=((push,),)), random],
        seeds=range(stage.seed, stage.seed + stage.samples),
        max_new_tokens=stage.max_new_tokens,
        temperature=stage.temperature,
    )
    unsteered, steered, controlled = (
        [row.text for row in rows if row.arm == arm] for arm in (UNSTEERED, STEERED, random.name)
    )
    strength = lab.number(push)
    by_story = [[topic_share([text], topic) for text in texts] for texts in (steered, controlled)]
    return TopicSteering(
        topic=topic,
        feature=match.feature,
        strength=strength,
        delta_norm=strength * float(lab.direction(push).norm()),
        prompt_norm=prompt_norm(lab.lm, site, stage.prompt),
        samples=stage.samples,
        prompt=stage.prompt,
        share_unsteered=topic_share(unsteered, topic),
        share_steered=topic_share(steered, topic),
        share_random=topic_share(controlled, topic),
        effect=effect(by_story[0], by_story[1:]),
        unsteered=unsteered,
        steered=steered,
        random=controlled,
    )


def pilot(lab: Lab, site: Site, candidates: Sequence[Match], stage: SteerStage) -> Match:
    """The candidate whose feature raises its topic's share most, over one batch with a few stories a candidate."""
    arms = [Arm(name=match.concept, pushes=((_push(match, site, stage),),)) for match in candidates]
    rows = write_arms(
        lab,
        [stage.prompt],
        arms,
        seeds=PILOT_SEEDS,
        max_new_tokens=stage.max_new_tokens,
        temperature=stage.temperature,
    )

    def share(match: Match) -> float:
        texts = [row.text for row in rows if row.arm == match.concept]
        return topic_share(texts, match.concept.removeprefix("topic "))

    return max(candidates, key=share)


def _push(match: Match, site: Site, stage: SteerStage) -> Push:
    return Push(feature=match.feature, strength=stage.strength_of_max, unit="max", site=str(site))


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
            f"steered {result.share_steered:.1%}, random feature of equal strength {result.share_random:.1%}{ratio}; "
            f"effect {result.effect.mean:+.1%} [{result.effect.low:+.1%}, {result.effect.high:+.1%}] a story"
        ),
    )
