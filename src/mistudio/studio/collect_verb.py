"""`mistudio collect`: text through a model into an activation store."""

from dataclasses import dataclass, fields
from typing import Literal

from rich.console import RenderableType

from mistudio.cluster import ClusterConfig, collect_with_ray
from mistudio.collect import CollectConfig, collect
from mistudio.store import Store


@dataclass(frozen=True, kw_only=True)
class Config(CollectConfig):
    """What to collect, where to, and by how many workers."""

    engine: Literal["process", "ray"] = "process"
    """process: this one. ray: workers on this machine or others, through Ray; the store is the same."""
    workers: int = ClusterConfig.workers
    """With --engine ray: processes that read, each with a copy of the model and a GPU if there are any."""
    slice_tokens: int = ClusterConfig.slice_tokens
    """With --engine ray: tokens that a worker reads at a time, and may read twice when one dies."""
    ray_address: str | None = None
    """With --engine ray: the cluster, HOST:PORT or auto; None: one is started on this machine."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """What was collected."""

    store: str
    """Folder or URL of the store."""
    rows: int
    """Activation rows a site."""
    scale: dict[str, float]
    """Site → C with E‖x/C‖² = 1."""


def run(config: CollectConfig) -> Result:
    """Collects; the result says where, how much, and each site's scale."""
    store = _collect(config)
    return Result(store=store.place, rows=store.rows, scale={site: store.scale(site) for site in store.sites})


def _collect(config: CollectConfig) -> Store:
    plain = CollectConfig(**{field.name: vars(config)[field.name] for field in fields(CollectConfig)})
    if not isinstance(config, Config) or config.engine == "process":
        return collect(plain)
    how = ClusterConfig(workers=config.workers, slice_tokens=config.slice_tokens, address=config.ray_address)
    return collect_with_ray(plain, how)


def show(result: Result) -> RenderableType:
    """Two lines and the command that goes on."""
    scales = ", ".join(f"{site} C = {scale:.4g}" for site, scale in result.scale.items())
    site = next(iter(result.scale))
    return (
        f"{result.rows:,} rows a site in {result.store} ({scales})\n"
        f"Next: mistudio train --store {result.store} --site {site} --width 3072 --out saes/{site}"
    )
