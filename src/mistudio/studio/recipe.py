"""A recipe: the whole chain in one YAML file. Stages that are left out are not run."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mistudio.config import load_file
from mistudio.errors import ConfigError
from mistudio.studio.train_verb import RecipeName


@dataclass(frozen=True, kw_only=True)
class CollectStage:
    """The text and what is read from the model while it reads it."""

    sites: tuple[str, ...]
    """Where to read."""
    tokens: int
    """Activation rows a site."""
    context: int
    """Tokens in a row, BOS included."""
    lm_batch_rows: int = 16
    """Rows in one forward pass."""
    bucket_rows: int = 1_000_000
    """Activation rows in one shuffle bucket."""


@dataclass(frozen=True, kw_only=True)
class SAEStage:
    """One SAE to train."""

    site: str
    """Where; one of the sites collected."""
    width: int
    """Number of features."""
    recipe: RecipeName = "quick"
    """The training recipe."""
    options: dict[str, Any] = field(default_factory=dict)
    """Fields of TrainConfig that differ from the training recipe."""


@dataclass(frozen=True, kw_only=True)
class EvalStage:
    """Held-out text to measure on."""

    rows: int
    """Rows of tokens."""
    context: int
    """Tokens in a row."""


@dataclass(frozen=True, kw_only=True)
class ConceptStage:
    """Labelled stories to match features on; for the text `stories` only."""

    site: str
    """The SAE whose features are matched."""
    documents: int
    """Held-out stories: half to choose on, half to score on."""


@dataclass(frozen=True, kw_only=True)
class SteerStage:
    """A story steered towards the topic whose feature was found best, beside controls."""

    prompt: str
    """The beginning of every story."""
    strength_of_max: float
    """The strength, as a multiple of the feature's largest activation on held-out text."""
    samples: int
    """Stories an arm."""
    max_new_tokens: int
    """Tokens a story at most."""
    temperature: float
    """Of the sampling."""
    seed: int = 16
    """Of the sampling."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The chain: collect → train → evaluate → concepts → steer, all into one workspace."""

    name: str
    """A short name."""
    model: str
    """Language model: demo, a Hugging Face name or a local folder."""
    text: str
    """The text, as for `mistudio collect`."""
    column: str = "text"
    """Column that holds the text."""
    separator: str | None = None
    """What separates the documents of a plain text file."""
    held_out: float = 0.1
    """Fraction of the documents kept for evaluation."""
    seed: int = 0
    """Seed of the shuffle and of every training."""
    collect: CollectStage
    """What to collect."""
    saes: tuple[SAEStage, ...]
    """What to train."""
    evaluate: EvalStage
    """What to measure on."""
    concepts: ConceptStage | None = None
    """What to match features with."""
    steer: SteerStage | None = None
    """What to steer; needs `concepts`."""

    def __post_init__(self) -> None:
        for stage in self.saes:
            if stage.site not in self.collect.sites:
                raise ConfigError(
                    f"saes: {stage.site} is not collected; collect.sites has {', '.join(self.collect.sites)}"
                )
        if self.concepts and self.concepts.site not in {stage.site for stage in self.saes}:
            raise ConfigError(f"concepts: no SAE is trained at {self.concepts.site}")
        if self.steer and not self.concepts:
            raise ConfigError("steer needs the stage concepts, which finds the feature to steer with")


def load_recipe(path: Path) -> Recipe:
    """The recipe in a YAML file. ConfigError: an unknown key, a missing one, or a wrong value, by name."""
    if not path.is_file():
        shipped = sorted(p.name for p in Path("recipes").glob("*.yaml"))
        hint = f" The folder recipes/ has {', '.join(shipped)}." if shipped else ""
        raise ConfigError(f"There is no recipe {path}.{hint}")
    return load_file(Recipe, path)
