"""Draws the figures of docs/steering.md from the demo's SAE and the results of benchmarks/steer_topics.py.

make demo && python benchmarks/steer_topics.py --seeds 48 --out topics.json
python tools/steering_figures.py topics.json [--sae workspace/demo/saes/layers.2.resid_post] [--out docs/figures]
"""

import argparse
import json
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from mistudio.config import from_dict
from mistudio.lm import Site
from mistudio.lm.stories import word_labels
from mistudio.steer import Experiment, Lab, Push, plot_dose_response, plot_tracks, run_experiment
from mistudio.studio.steer_lab import load_lab

PROMPT = "Once upon a time"
ARMS = {"steered": "#0284c7", "unsteered": "#94a3b8", "random feature": "#ea580c", "random direction": "#a16207"}


def topics(results: dict[str, dict], path: Path) -> None:
    """The share of each topic's words in four arms, with 95% intervals."""
    figure = Figure(figsize=(8.4, 5.2), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    order = sorted(results, key=lambda topic: results[topic]["shares"]["steered"]["mean"])
    for number, (arm, colour) in enumerate(ARMS.items()):
        shares = [results[topic]["shares"][arm] for topic in order]
        places = [row + 0.27 - 0.18 * number for row in range(len(order))]
        errors = [[s["mean"] - s["low"] for s in shares], [s["high"] - s["mean"] for s in shares]]
        axes.barh(places, [s["mean"] for s in shares], 0.17, color=colour, label=arm)
        axes.errorbar([s["mean"] for s in shares], places, xerr=errors, fmt="none", ecolor="#334155", elinewidth=0.8)
    names = [f"{topic}{'' if results[topic]['counts'] else ' (fails)'}" for topic in order]
    axes.set_yticks(range(len(order)), names)
    axes.xaxis.set_major_formatter("{x:.0%}")
    axes.set_xlabel("share of the topic's words; 95% intervals")
    axes.legend(frameon=False, loc="lower right")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def words_of(topic: str) -> tuple[str, ...]:
    """The topic's words."""
    return tuple(sorted(w for w, labels in word_labels().items() if f"words of {topic}" in labels))


def dose(lab: Lab, site: Site, push: Push, topic: str, path: Path) -> None:
    """Dose and response of the push's feature on the topic's words."""
    experiment = Experiment(
        prompts=(PROMPT,), pushes=(push,), seeds=tuple(range(24)), max_new_tokens=40, temperature=0.7,
        sweep=(0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0), words=words_of(topic),
    )  # fmt: skip
    found = run_experiment(lab, experiment).dose
    assert found is not None
    plot_dose_response(found, path, title=f"Feature {push.feature} at {site}, multiples of its maximum: {topic}")


def track(lab: Lab, push: Push, path: Path) -> None:
    """The feature along two texts, unsteered and steered."""
    assert push.feature is not None
    experiment = Experiment(
        prompts=(PROMPT,), pushes=(push,), seeds=(3,), max_new_tokens=40, temperature=0.7, track=(push.feature,)
    )
    plot_tracks(run_experiment(lab, experiment).tracks, path, title=f"Feature {push.feature} at every token")


def main() -> None:
    """All three figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--sae", type=Path, default=Path("workspace/demo/saes/layers.2.resid_post"))
    parser.add_argument("--out", type=Path, default=Path("docs/figures"))
    given = parser.parse_args()
    results = json.loads(given.results.read_text())
    given.out.mkdir(parents=True, exist_ok=True)
    topics(results, given.out / "steering_topics.png")
    best = max(results, key=lambda topic: results[topic]["shares"]["steered"]["mean"])
    push = from_dict(Push, results[best]["push"], source=str(given.results))
    lab, site = load_lab(given.sae, None)
    dose(lab, site, push, best, given.out / "steering_dose.png")
    track(lab, push, given.out / "steering_track.png")


if __name__ == "__main__":
    main()
