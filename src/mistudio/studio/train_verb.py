"""`mistudio train`: an SAE on one site of a store, or several on one stream; in raw units when they are done.

Several processes share the work when torchrun starts them:
`torchrun --nproc-per-node 4 -m mistudio train … --mesh.features 2`.
"""

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
from mistudio.mesh import SOLO, Mesh, MeshConfig
from mistudio.sae import SAEConfig, TranscoderConfig
from mistudio.store import FeedOptions, Store
from mistudio.store.served import ServedStore, open_rows
from mistudio.studio import train_sweep
from mistudio.studio.train_sweep import Sweep, SweepResult
from mistudio.studio.workspace import refuse_occupied, refuse_url
from mistudio.train import TrainConfig, initial_sae, plot_training, train

RECIPES: dict[str, Callable[[], TrainConfig]] = {
    "quick": recipes.quick,
    "gemma_scope": recipes.gemma_scope,
    "gemma_scope_2": recipes.gemma_scope_2,
    "topk": recipes.topk,
    "batchtopk": recipes.batchtopk,
    "relu": recipes.relu,
}
RecipeName = Literal["quick", "gemma_scope", "gemma_scope_2", "topk", "batchtopk", "relu"]


@dataclass(frozen=True, kw_only=True)
class Config:
    """What to train on, how wide, and by which recipe."""

    store: str
    """Folder or URL of the activation store, or tcp://HOST:PORT of feed servers, several with commas between."""
    site: str
    """Which of the store's sites, such as layers.3.resid_post; several, joined by commas, are trained together."""
    width: int | None = None
    """Number of features F of the SAE."""
    site_out: str | None = None
    """A second site of the store: a transcoder is trained, which reads `site` and reconstructs this one."""
    skip: bool = False
    """The transcoder also has a linear path from what it reads to what it reconstructs."""
    out: Path
    """Folder of the SAE, or of a sweep's; new or empty, unless --resume."""
    recipe: RecipeName = "quick"
    """quick: runs of minutes, aiming at train.target_l0. topk, batchtopk, relu: the same for these architectures.
    gemma_scope, gemma_scope_2: the reports' numbers, for billions of tokens."""
    train: TrainConfig = dataclasses.field(default_factory=recipes.quick)
    """Every number of the run; what is not given is the recipe's."""
    sweep: Sweep = dataclasses.field(default_factory=Sweep)
    """One SAE for each value, all on the same rows: they share reading, and each is what it would be alone."""
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    """How the processes that torchrun started share the work."""
    key: Path | None = None
    """The trainers.key of the feed servers' pair, where they have one."""
    resume: bool = False
    """Go on from the last checkpoint in `out`; the result is what it would have been."""

    def __post_init__(self) -> None:
        for width in (self.width, *self.sweep.width):
            if width is not None and width < 1:
                raise ConfigError(f"width = {width}, but an SAE has at least one feature.")
        if self.site_out is not None and len(self.sites) > 1:
            raise ConfigError("A transcoder reads one site: give one --site, or leave --site-out out.")
        if len(set(self.sites)) < len(self.sites):
            raise ConfigError(f"site = {self.site} names a site twice; name each once.")
        if self.skip and self.site_out is None:
            raise ConfigError("skip belongs to a transcoder: give --site-out, or leave --skip out.")

    @property
    def sites(self) -> tuple[str, ...]:
        """The sites to train at."""
        return tuple(self.site.split(","))


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


def run(config: Config) -> Result | SweepResult:
    """Trains; the folder then holds the SAE in raw units beside the run's records. The result says how it ended."""
    refuse_url(config.out)
    store = open_rows(config.store, config.key)
    chosen = train_sweep.points(config.sweep, config.sites, config.width, config.train, config.out)
    sae_configs = [_sae_config(store, point.site, point.width, config) for point in chosen]
    with Mesh.from_torchrun(features=config.mesh.features, timeout_s=config.mesh.timeout_s) as mesh:
        if config.sweep.lists() or len(config.sites) > 1:
            if not config.resume and mesh.first:
                refuse_occupied(config.out, "Name another --out, or go on with the sweep in it: --resume.")
            mesh.barrier()
            return train_sweep.run_sweep(store, chosen, sae_configs, config.train, config.out, config.resume, mesh)
        how = FeedOptions(rank=mesh.row_rank, world=mesh.rows)
        rows = mesh.rows_here(config.train.batch_rows)
        seed, sites = config.train.seed, train_sweep.read_by(sae_configs[0])
        feed: Any = store.joint_feed(sites, rows, seed=seed, how=how)
        if len(sites) == 1:
            feed = store.feed(sites[0], rows, seed=seed, how=how)
        return train_on(feed, sae_configs[0], store.mean(sites[-1]), config.train, config.out, config.resume, mesh)


def _sae_config(store: Store | ServedStore, site: str, width: int, config: Config) -> SAEConfig:
    place: dict[str, Any] = {
        "d_model": store.width(site),
        "d_sae": width,
        "hook_name": site,
        "hook_layer": Site.parse(site).layer,
        "model": store.manifest.model,
        "scale": store.scale(site),
    }
    if config.site_out is None:
        return SAEConfig(**place)
    out = config.site_out
    return TranscoderConfig(
        **place, d_out=store.width(out), hook_name_out=out, scale_out=store.scale(out), skip=config.skip
    )


def train_on(
    feed: Iterable[Tensor],
    sae_config: SAEConfig,
    mean: Tensor,
    cfg: TrainConfig,
    out: Path,
    resume: bool,
    mesh: Mesh = SOLO,
) -> Result:
    """Trains on normalised batches; the SAE and the run's records are then in `out`. `mean` is the raw mean of what is
    reconstructed."""
    scale = sae_config.scale_out if isinstance(sae_config, TranscoderConfig) else sae_config.scale
    assert scale is not None
    sae = initial_sae(sae_config, cfg, mesh)
    outcome = train(sae, feed, cfg, folder=out, resume=resume, mean=(mean / scale).float(), mesh=mesh)
    differences = recipes.differences(cfg)
    if mesh.first:
        plot_training(outcome.history, cfg, out / "training.png")
        write_json(out / "differences_from_gemma_scope.json", to_dict(differences))
    return Result(
        sae=str(out),
        site=str(sae_config.hook_name),
        steps=outcome.steps,
        rows=outcome.steps * cfg.batch_rows,
        final=outcome.history[-1] if outcome.history else {},
        differences=differences,
    )


def show(result: Result | SweepResult) -> RenderableType:
    """How the run ended, and the command that measures it."""
    if isinstance(result, SweepResult):
        return train_sweep.show(result)
    last = ", ".join(f"{k} {result.final[k]:.4g}" for k in ("loss", "l0", "fvu", "dead") if k in result.final)
    return f"{result.sae}: {result.steps:,} steps, {last} (training batch)\nNext: mistudio eval --sae {result.sae}"


def failed(result: Result | SweepResult) -> bool:
    """Whether an SAE of a sweep did not come to its end."""
    return isinstance(result, SweepResult) and any(trained.failure for trained in result.runs)
