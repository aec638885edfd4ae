"""`mistudio concepts`: features scored against the labelled concepts of the demo stories."""

from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from rich.console import RenderableType
from rich.table import Table

from mistudio.config import to_dict
from mistudio.errors import ConfigError
from mistudio.features import Match, label_tokens, match_concepts
from mistudio.files import write_json
from mistudio.lm import documents
from mistudio.studio.workspace import CONCEPTS, feature_stats, load_sae

SHOWN = 24


@dataclass(frozen=True, kw_only=True)
class Config:
    """Which SAE, and how many stories to score it on."""

    sae: Path
    """Folder of the SAE; `mistudio eval` must have run on it."""
    model: str | None = None
    """Language model; None: the one the SAE was trained on."""
    text: str = "stories"
    """A text whose documents carry labels: stories, or stories:SEED. Only its held-out documents are read."""
    held_out: float = 0.1
    """The held-out fraction that the collection left; must be the same number."""
    documents: int = 200
    """Stories to read: features are chosen on the first half of them and scored on the second."""
    context: int = 256
    """Longest story, in tokens; what is beyond is cut."""

    def __post_init__(self) -> None:
        if self.documents < 2:
            raise ConfigError(f"documents = {self.documents}; one half chooses and one half scores, so 2 are needed.")
        if self.context < 2:
            raise ConfigError(f"context = {self.context}, but a story is BOS and at least one more token.")


@dataclass(frozen=True, kw_only=True)
class Result:
    """The best feature of each concept."""

    sae: str
    """Folder of the SAE."""
    matches: list[Match]
    """Best F1 first."""


def run(config: Config) -> Result:
    """Matches; writes concepts.json beside the SAE."""
    lm, sae, site = load_sae(config.sae, config.model)
    stats = feature_stats(config.sae)
    stories = documents(config.text, part="held_out", held_out=config.held_out)
    labelled = label_tokens(lm, islice(stories, config.documents), config.context)
    matches = match_concepts(lm, sae, site, labelled, stats.max)
    write_json(config.sae / CONCEPTS, to_dict(matches))
    return Result(sae=str(config.sae), matches=matches)


def show(result: Result) -> RenderableType:
    """The best matches as a table."""
    good = sum(match.f1 >= 0.8 for match in result.matches)
    table = Table(
        title=f"Features that match labelled concepts ({good} of {len(result.matches)} with F1 ≥ 0.8)",
        caption="chosen on one half of the held-out stories, scored on the other",
    )
    for name in ("concept", "feature", "precision", "recall", "F1", "top tokens"):
        table.add_column(name, justify="left" if name in ("concept", "top tokens") else "right")
    for match in result.matches[:SHOWN]:
        tokens = " ".join(repr(token.strip() or token) for token in match.top_tokens)
        numbers = (f"{value:.2f}" for value in (match.precision, match.recall, match.f1))
        table.add_row(match.concept, str(match.feature), *numbers, tokens)
    return table
