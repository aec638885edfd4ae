"""`mistudio plan`: rows, bytes, FLOPs, hours and memory of a run, before it is begun."""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Group, RenderableType
from rich.table import Table

from mistudio import recipes
from mistudio.errors import ConfigError
from mistudio.plan import PEAK_FLOPS, Machine, Plan, SAEJob, make_plan, measured_machine, model_size
from mistudio.store.dtypes import RowDtype
from mistudio.studio.recipe import load_recipe
from mistudio.studio.train_verb import train_config


@dataclass(frozen=True, kw_only=True)
class Config:
    """A recipe file, or its main numbers as flags."""

    recipe: Annotated[Path | None, tyro.conf.Positional] = None
    """A recipe; None: the flags say what to plan."""
    model: str | None = None
    """Language model; gemma-2-2b, gemma-2-9b and gemma-2-27b need no network."""
    sites: tuple[str, ...] = ()
    """Sites to collect."""
    tokens: int | None = None
    """Activation rows a site, which every SAE sees once."""
    widths: tuple[int, ...] = ()
    """Numbers of features; one SAE of each at every site."""
    sparsities: int = 1
    """SAEs of each width and site, at different sparsities."""
    batch_rows: int = 4096
    """Rows in a training batch, of the recipe gemma_scope."""
    evaluation_tokens: int = 2048 * 1024
    """Tokens of each evaluation."""
    row_dtype: RowDtype = "float32"
    """Number type of the rows on disk."""
    hardware: Literal["a100", "h100", "h200", "tpu-v3", "tpu-v5p", "here"] = "a100"
    """What runs it; here: this machine, measured."""
    devices: int = 1
    """How many of them."""
    mfu: float = 0.5
    """Share of the peak that is reached; the report's example reached about half."""
    disk_gib_s: float = 1.0
    """GiB a second with which rows are written and read; measured with --hardware here."""
    rate: float | None = None
    """Money for one device and hour; None: no cost is given."""

    def __post_init__(self) -> None:
        if self.recipe is None and (self.model is None or not self.sites or self.tokens is None):
            raise ConfigError("Give a recipe file, or --model, --sites and --tokens.")
        if self.recipe is not None and (self.model or self.sites or self.tokens is not None or self.widths):
            raise ConfigError("A recipe says model, sites, tokens and widths itself; leave these flags out.")
        for name, number in {"devices": self.devices, "mfu": self.mfu, "disk_gib_s": self.disk_gib_s}.items():
            if not 0 < number < math.inf:
                raise ConfigError(f"{name} = {number}, but it must be a number above 0.")
        if self.mfu > 1:
            raise ConfigError(f"mfu = {self.mfu}, but it is a share of the peak, at most 1.")
        if self.rate is not None and not 0 <= self.rate < math.inf:
            raise ConfigError(f"rate = {self.rate}, but it must be a number from 0; leave it out where none is known.")
        counts = {"tokens": self.tokens, "sparsities": self.sparsities, "widths": min(self.widths, default=1),
                  "batch_rows": self.batch_rows, "evaluation_tokens": self.evaluation_tokens}  # fmt: skip
        for name, count in counts.items():
            if count is not None and count < 1:
                raise ConfigError(f"{name} = {count}, but at least 1 is needed.")


def run(config: Config) -> Plan:
    """The plan; nothing is loaded but a model's configuration."""
    if config.hardware == "here":
        machine = measured_machine(Path(), devices=config.devices, mfu=config.mfu)
    else:
        machine = Machine(
            name=config.hardware,
            peak_flops=PEAK_FLOPS[config.hardware],
            disk_bytes_s=config.disk_gib_s * 2**30,
            devices=config.devices,
            mfu=config.mfu,
        )
    if config.recipe is not None:
        return _of_recipe(config, config.recipe, machine)
    assert config.model is not None
    assert config.tokens is not None
    cfg = dataclasses.replace(recipes.gemma_scope(), batch_rows=config.batch_rows)
    saes = [
        SAEJob(site=site, width=width, rows=config.tokens, cfg=cfg)
        for site in config.sites
        for width in config.widths
        for _ in range(config.sparsities)
    ]
    return make_plan(
        model_size(config.model),
        config.sites,
        config.tokens,
        saes,
        machine,
        evaluation_tokens=config.evaluation_tokens,
        row_dtype=config.row_dtype,
        rate=config.rate,
    )


def _of_recipe(config: Config, path: Path, machine: Machine) -> Plan:
    recipe = load_recipe(path)
    saes = []
    for stage in recipe.saes:
        cfg = train_config(stage.recipe, stage.options)
        rows = cfg.steps * cfg.batch_rows
        saes.append(SAEJob(site=stage.site, width=stage.width, rows=rows, cfg=cfg))
    return make_plan(
        model_size(recipe.model),
        recipe.collect.sites,
        recipe.collect.tokens,
        saes,
        machine,
        evaluation_tokens=recipe.evaluate.rows * recipe.evaluate.context,
        row_dtype=config.row_dtype,
        rate=config.rate,
    )


def show(result: Plan) -> RenderableType:
    """A line a stage, the sum, and what it rests on."""
    table = Table("stage", "rows", "GB", "FLOPs", "hours", "memory, GB", box=None, pad_edge=False)
    for line in result.lines:
        size = f"{line.bytes / 1e9:,.1f}" if line.bytes else ""
        memory = f"{line.memory_bytes / 1e9:,.2f}"
        table.add_row(line.what, f"{line.rows:,}", size, f"{line.flops:.3g}", f"{line.hours:,.2f}", memory)
    cost = "" if result.cost is None else f", costing {result.cost:,.2f}"
    total = (
        f"\nIn all {result.flops:.3g} FLOPs ({result.gpt3_share:.2g} of GPT-3's training), {result.hours:,.1f} hours, "
        f"{result.device_hours:,.1f} device hours{cost}; {result.store_bytes / 2**40:,.3g} TiB on disk.\n"
    )
    return Group(table, total, "Assumed:\n" + "\n".join(f"  {sentence}" for sentence in result.assumptions))
