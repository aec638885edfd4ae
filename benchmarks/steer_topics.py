"""Does steering steer? For every topic of the little world, the best feature's effect against random controls.

    python benchmarks/steer_topics.py [SAE_FOLDER] [--seeds 24] [--out results.json]    # default: that of `make demo`

For each topic: the features that raise the probability of its words most are found (`toward`); the best of them and its
strength are chosen on one set of seeds, as the largest share of the topic's words at a cross-entropy rise of at most
0.5 nats/token; then both are measured on other seeds, beside random live features of equal maximum and random
directions of equal length. A topic counts if its share is at least 5 times the controls', the 95% intervals are apart,
and the rise in cross-entropy is at most 0.5.
"""

import argparse
import json
from pathlib import Path

import torch

from mistudio.config import to_dict
from mistudio.lm import Site
from mistudio.lm.stories import word_labels
from mistudio.steer import (
    MEASURES,
    Arm,
    Experiment,
    Lab,
    Push,
    by_seed,
    difference,
    read_again,
    run_experiment,
    toward,
    write_arms,
)
from mistudio.studio.steer_lab import load_lab

PROMPT = "Once upon a time"
SLOTS = ("Once upon a time, near the", "Once upon a time there was a girl who loved the", "One day she saw a")
CANDIDATES, CE_BOUND, TOKENS, TEMPERATURE = 16, 0.5, 40, 0.7
ROUGH, STRENGTHS = (1.5, 3.0), (1.0, 1.25, 1.5, 1.75, 2.0, 2.25, 2.5, 3.0, 3.5, 4.0, 5.0)


def topic_words() -> dict[str, set[str]]:
    """Topic → its words, all forms."""
    found: dict[str, set[str]] = {}
    for word, labels in word_labels().items():
        for label in labels:
            if label.startswith("words of "):
                found.setdefault(label.removeprefix("words of "), set()).add(word)
    return found


def tried(lab: Lab, site: Site, words: set[str], pushes: list[Push], seeds: range) -> list[tuple[float, Push]]:
    """(share of the words, push), the largest share first, of the pushes whose price stays under the bound."""
    arms = [Arm(name="plain"), *(Arm(name=str(n), pushes=((push,),)) for n, push in enumerate(pushes))]
    rows = write_arms(lab, [PROMPT], arms, seeds=seeds, max_new_tokens=TOKENS, temperature=TEMPERATURE)
    read = read_again(lab, [PROMPT], rows, site=site, words=words, batch_rows=64)
    plain = by_seed(rows, read, "plain", MEASURES["ce"])
    found = []
    for n, push in enumerate(pushes):
        rise = difference(by_seed(rows, read, str(n), MEASURES["ce"]), [plain])
        shares = by_seed(rows, read, str(n), MEASURES["words"])
        if rise is not None and rise.mean <= 0.8 * CE_BOUND:
            found.append((sum(shares.values()) / max(len(shares), 1), push))
    return sorted(found, key=lambda pair: -pair[0])


def choose(lab: Lab, site: Site, words: set[str], scores: torch.Tensor) -> Push | None:
    """The push with the largest share of the words whose price stays under the bound; None: there is none."""

    def push(feature: int, strength: float) -> Push:
        return Push(feature=feature, strength=strength, unit="max", site=str(site))

    candidates = scores.nan_to_num(-1).topk(CANDIDATES).indices.tolist()
    rough = tried(lab, site, words, [push(i, s) for i in candidates for s in ROUGH], range(1000, 1012))
    best = list(dict.fromkeys(p.feature for _, p in rough))[:3]
    fine = tried(lab, site, words, [push(i, s) for i in best for s in STRENGTHS], range(2000, 2032)) if best else []
    return fine[0][1] if fine else None


def main() -> None:
    """One line a topic, and how many count."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sae", type=Path, nargs="?", default=Path("workspace/demo/saes/layers.2.resid_post"))
    parser.add_argument("--seeds", type=int, default=24)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    lab, site = load_lab(given.sae, None)
    results, good = {}, 0
    scores = toward(lab, site, topic_words(), prompts=SLOTS)
    for topic, words in topic_words().items():
        push = choose(lab, site, words, scores[topic])
        if push is None:
            print(f"{topic:<10} no strength stays under the bound")
            continue
        outcome = run_experiment(
            lab,
            Experiment(
                prompts=(PROMPT,), pushes=(push,), seeds=tuple(range(given.seeds)), max_new_tokens=TOKENS,
                temperature=TEMPERATURE, controls=True, words=tuple(sorted(words)),
            ),
        )  # fmt: skip
        means = {arm.arm: arm.means["words"] for arm in outcome.arms}
        steered, feature, direction = (means[n] for n in ("steered", "random feature", "random direction"))
        worst = max(feature.mean, direction.mean)
        price = outcome.effects["ce_rise"]
        ratio = steered.mean / worst if worst else float("inf")
        counts = ratio >= 5 and steered.low > max(feature.high, direction.high) and price.mean <= CE_BOUND
        good += counts
        results[topic] = {"push": to_dict(push), "shares": to_dict(means), "ce_rise": to_dict(price), "counts": counts}
        print(
            f"{topic:<10} feature {push.feature:>5} × {push.strength:g}: steered {steered.mean:.1%} "
            f"[{steered.low:.1%}, {steered.high:.1%}], unsteered {means['unsteered'].mean:.1%}, random feature "
            f"{feature.mean:.1%} [{feature.low:.1%}, {feature.high:.1%}], direction {direction.mean:.1%} "
            f"[{direction.low:.1%}, {direction.high:.1%}], {ratio:.1f} ×, rise {price.mean:+.2f}"
            f"{'  counts' if counts else ''}",
            flush=True,
        )
    print(f"{good} of {len(topic_words())} topics count")
    if given.out:
        given.out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
