"""`mistudio steer`: the same prompt continued with and without features added to the model."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.columns import Columns
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.text import Text

from mistudio.errors import ConfigError
from mistudio.steer import Comparison, compare
from mistudio.studio.workspace import load_sae


@dataclass(frozen=True, kw_only=True)
class Config:
    """The prompt, the SAE, and which of its features to add how strongly."""

    prompt: Annotated[str, tyro.conf.Positional]
    """The beginning that both texts continue."""
    sae: Path
    """Folder of the SAE."""
    feature: tuple[int, ...]
    """Features to add, one or more."""
    strength: tuple[float, ...]
    """One strength a feature, in raw activation units: h + strength · W_dec[feature] on every position."""
    model: str | None = None
    """Language model; None: the one the SAE was trained on."""
    max_new_tokens: int = 64
    """Tokens to write at most."""
    temperature: float = 0.5
    """0: always the likeliest token; else sampled from softmax(logits / temperature)."""
    seed: int = 16
    """Seed of the sampling, the same for both texts."""
    samples: int = 1
    """Continuations of each kind."""

    def __post_init__(self) -> None:
        if len(self.feature) != len(self.strength):
            raise ConfigError(
                f"There are {len(self.feature)} features and {len(self.strength)} strengths; give each its own: "
                "--feature 12 40 --strength 30 15."
            )


def run(config: Config) -> Comparison:
    """Both arms of text."""
    lm, sae, site = load_sae(config.sae, config.model)
    return compare(
        lm,
        sae,
        config.prompt,
        tuple(zip(config.feature, config.strength, strict=True)),
        site=site,
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        seed=config.seed,
        samples=config.samples,
    )


def show(result: Comparison) -> RenderableType:
    """The two texts side by side, sample by sample, and how hard the push was."""
    rows: list[RenderableType] = []
    for plain, steered in zip(result.unsteered, result.steered, strict=True):
        rows.append(side_by_side(result.prompt, plain.text, steered.text))
    norm = (
        "" if result.prompt_norm is None else f"; mean norm at {result.site} over the prompt {result.prompt_norm:.3g}"
    )
    rows.append(Text(f"steering vector norm {result.delta_norm:.3g}{norm}", style="dim"))
    return Group(*rows)


def side_by_side(prompt: str, unsteered: str, steered: str) -> Columns:
    """Two panels: the continuation of the untouched model, and the steered one."""
    panels = [
        Panel(Text.assemble((prompt, "dim"), text), title=title, width=58)
        for title, text in (("unsteered", unsteered), ("steered", steered))
    ]
    return Columns(panels)
