"""`mistudio train-live`: an SAE trained on activations as the model makes them, where the disk is short.

A ring buffer in memory takes the store's place; text is read once more when it ends. The model runs again for every
SAE, so where several are wanted a store is cheaper.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from mistudio import recipes
from mistudio.collect import StreamConfig, stream
from mistudio.errors import ConfigError
from mistudio.lm import Site
from mistudio.sae import SAEConfig
from mistudio.studio.train_verb import RecipeName, Result, recipe_default, show, train_on
from mistudio.studio.workspace import refuse_url
from mistudio.train import TrainConfig

__all__ = ["Config", "Result", "recipe_default", "run", "show"]


@dataclass(frozen=True, kw_only=True)
class Config:
    """The model, text and site to read, how wide the SAE is, and by which recipe it is trained."""

    source: StreamConfig
    """What is read, and how many rows are shuffled together."""
    width: int
    """Number of features F of the SAE."""
    out: Path
    """Folder of the SAE; new or empty, unless --resume."""
    recipe: RecipeName = "quick"
    """quick: runs of minutes, aiming at train.target_l0. topk, batchtopk, relu: the same for these architectures.
    gemma_scope, gemma_scope_2: the reports' numbers, for billions of tokens."""
    train: TrainConfig = dataclasses.field(default_factory=recipes.quick)
    """Every number of the run; what is not given is the recipe's."""
    resume: bool = False
    """Go on from the last checkpoint in `out`; the result is what it would have been."""

    def __post_init__(self) -> None:
        if self.width < 1:
            raise ConfigError(f"width = {self.width}, but an SAE has at least one feature.")


def run(config: Config) -> Result:
    """Trains; the scale is that of the first buffer. The result says how it ended."""
    refuse_url(config.out)
    feed = stream(config.source, config.train.batch_rows)
    sae_config = SAEConfig(
        d_model=feed.width,
        d_sae=config.width,
        hook_name=feed.site,
        hook_layer=Site.parse(feed.site).layer,
        model=config.source.model,
        scale=feed.scale,
    )
    return train_on(feed, sae_config, feed.mean, config.train, config.out, config.resume)
