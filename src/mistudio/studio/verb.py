"""The table of verbs. A verb is a module with `Config` (a frozen dataclass), `run(config)` and `show(result)`.

The table names modules rather than importing them, so that `mistudio --help` does not load torch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from rich.console import RenderableType


@dataclass(frozen=True, kw_only=True)
class Verb:
    """One thing mistudio can do."""

    name: str
    """The subcommand."""
    config: type
    """Its settings: a frozen dataclass with a docstring on every field."""
    run: Callable[[Any], Any]
    """Does it: an instance of `config` in, a result dataclass out."""
    show: Callable[[Any], RenderableType]
    """The result as a person reads it."""
    default: Callable[[str], Any] | None
    """For verbs with `--recipe NAME`: the settings that the flags start from."""
    failed: Callable[[Any], bool] | None
    """For verbs that go on after failures: whether the result holds any, which makes the exit code 1."""


VERBS: dict[str, str] = {
    "demo": "the whole pipeline on the bundled model, offline, in minutes",
    "run": "a recipe file: collect, train, evaluate, find features, steer",
    "plan": "rows, bytes, FLOPs, hours and memory of a run, before it is begun",
    "collect": "activations of a language model on a text, into a store",
    "store ls": "the activation stores below a folder",
    "store show": "what a store holds and where it comes from",
    "store verify": "whether every file of a store is what was written",
    "store convert": "a store in another number type or with fewer sites",
    "store merge": "several stores as one",
    "store split": "a store as two, by document",
    "store copy": "a store to a bucket or another disk, or from there to here",
    "store rm": "a store taken away",
    "feed serve": "a store for trainers elsewhere, until Ctrl-C",
    "feed ping": "whether feed servers answer, and what they serve",
    "feed key": "keys for feed servers that other machines can reach",
    "train": "an SAE on a site of a store, or a sweep of them on one stream",
    "train-live": "an SAE straight from the model, with no store between",
    "eval": "L0, FVU, delta loss and feature statistics of an SAE on held-out text",
    "concepts": "which features match the labelled concepts of the demo stories",
    "steer": "text written with features added to the model, beside text without",
    "steer-find": "which features steer towards given words, and how well each is suited to it",
    "steer-vector": "a direction of one's own, from texts or from what steering was seen to do",
    "steer-run": "a recorded steering experiment again, and whether it gives the same tokens",
    "steer-replay": "a steer request of Neuronpedia run here, and its recorded answer compared",
    "sae find": "the released Gemma Scope SAEs, filtered by model, layer, site, width and L0",
    "sae download": "released SAEs by any name they go by, verified",
    "sae verify": "whether a weights file is whole, sound, and the SAE it is taken for",
    "sae show": "what an SAE is: site, shapes, L0, revision, what it was trained on",
    "sae convert": "an SAE from any format that is read into one that is written",
    "sae diff": "whether two SAEs are the same weights, and how they differ",
    "sae self-check": "L0 and explained variance of a released SAE on real text, against what is known of it",
    "sae index": "what the index of released SAEs holds, and how the hub differs",
}
"""Verb → what it does, in the order of a pipeline."""


def load_verb(name: str) -> Verb:
    """The verb of that name, its module imported now. `name` is a key of `VERBS`."""
    module = import_module(f"mistudio.studio.{name.replace(' ', '_').replace('-', '_')}_verb")
    return Verb(
        name=name,
        config=module.Config,
        run=module.run,
        show=module.show,
        default=vars(module).get("recipe_default"),
        failed=vars(module).get("failed"),
    )
