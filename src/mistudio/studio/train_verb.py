"""`mistudio train`: a JumpReLU SAE on one site of a store, folded to raw units when it is done."""

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import RenderableType
from torch import Tensor

from mistudio import recipes
from mistudio.config import from_dict, to_dict
from mistudio.errors import ConfigError
from mistudio.files import write_json
from mistudio.lm import Site
from mistudio.sae import SAEConfig
from mistudio.store import Store
from mistudio.train import TrainConfig, initial_sae, plot_training, train

RECIPES: dict[str, Callable[[], TrainConfig]] = {"quick": recipes.quick, "gemma_scope": recipes.gemma_scope}


@dataclass(frozen=True, kw_only=True)
class Config:
    """What to train on, how wide, and by which recipe."""

    store: Path
    """Folder of the activation store."""
    site: str
    """Which of the store's sites, such as layers.3.resid_post."""
    width: int
    """Number of features F of the SAE."""
    out: Path
    """Folder of the SAE; new or empty, unless --resume."""
    recipe: Literal["quick", "gemma_scope"] = "quick"
    """quick: runs of minutes, aiming at train.target_l0. gemma_scope: the report's numbers, for billions of tokens."""
    train: TrainConfig = dataclasses.field(default_factory=recipes.quick)
    """Every number of the run; what is not given is the recipe's."""
    resume: bool = False
    """Go on from the last checkpoint in `out`; the result is what it would have been."""

    def __post_init__(self) -> None:
        if self.width < 1:
            raise ConfigError(f"width = {self.width}, but an SAE has at least one feature.")


@dataclass(frozen=True, kw_only=True)
class Result:
    """What was trained."""

    sae: str
    """Folder of the SAE."""
    site: str
    """Where it was trained."""
    steps: int
    """Updates made."""
    rows: int
    """Activation rows seen, repeats included."""
    final: dict[str, float | int]
    """The last line of metrics.jsonl."""
    differences: dict[str, tuple[Any, Any]]
    """Where the run is not Gemma Scope's recipe: field → (here, there)."""


def recipe_default(name: str) -> dict[str, Any]:
    """The default of `train` under `--recipe NAME`. ConfigError: there is no such recipe."""
    if name not in RECIPES:
        raise ConfigError(f"There is no training recipe {name!r}; the choices are {', '.join(RECIPES)}.")
    return {"recipe": name, "train": RECIPES[name]()}


def train_config(recipe: str, options: dict[str, Any]) -> TrainConfig:
    """The recipe's configuration with `options` over it. ConfigError: an unknown recipe, option or value."""
    base = recipe_default(recipe)["train"]
    return from_dict(TrainConfig, {**to_dict(base), **options}, source=f"options of the recipe {recipe}")


def run(config: Config) -> Result:
    """Trains; the folder then holds the SAE in raw units beside the run's records. The result says how it ended."""
    store = Store.open(config.store)
    sae_config = SAEConfig(
        d_model=store.width(config.site),
        d_sae=config.width,
        hook_name=config.site,
        hook_layer=Site.parse(config.site).layer,
        model=store.manifest.model,
        scale=store.scale(config.site),
    )
    feed = store.feed(config.site, config.train.batch_rows, seed=config.train.seed)
    return train_on(feed, sae_config, store.mean(config.site), config.train, config.out, config.resume)


def train_on(
    feed: Iterable[Tensor], sae_config: SAEConfig, mean: Tensor, cfg: TrainConfig, out: Path, resume: bool
) -> Result:
    """Trains on normalised batches, whose raw mean is `mean`; the SAE and the run's records are then in `out`."""
    assert sae_config.scale is not None
    sae = initial_sae(sae_config, cfg)
    outcome = train(sae, feed, cfg, folder=out, resume=resume, mean=(mean / sae_config.scale).float())
    plot_training(outcome.history, cfg, out / "training.png")
    differences = recipes.differences(cfg)
    write_json(out / "differences_from_gemma_scope.json", to_dict(differences))
    return Result(
        sae=str(out),
        site=str(sae_config.hook_name),
        steps=outcome.steps,
        rows=outcome.steps * cfg.batch_rows,
        final=outcome.history[-1] if outcome.history else {},
        differences=differences,
    )


def show(result: Result) -> RenderableType:
    """How the run ended, and the command that measures it."""
    last = ", ".join(f"{k} {result.final[k]:.4g}" for k in ("loss", "l0", "fvu", "dead") if k in result.final)
    return f"{result.sae}: {result.steps:,} steps, {last} (training batch)\nNext: mistudio eval --sae {result.sae}"
