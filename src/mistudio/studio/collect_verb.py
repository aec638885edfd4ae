"""`mistudio collect`: text through a model into an activation store."""

from dataclasses import dataclass

from rich.console import RenderableType

from mistudio.collect import CollectConfig, collect

Config = CollectConfig


@dataclass(frozen=True, kw_only=True)
class Result:
    """What was collected."""

    store: str
    """Folder of the store."""
    rows: int
    """Activation rows a site."""
    scale: dict[str, float]
    """Site → C with E‖x/C‖² = 1."""


def run(config: CollectConfig) -> Result:
    """Collects; the result says where, how much, and each site's scale."""
    store = collect(config)
    return Result(store=str(store.path), rows=store.rows, scale={site: store.scale(site) for site in store.sites})


def show(result: Result) -> RenderableType:
    """Two lines and the command that goes on."""
    scales = ", ".join(f"{site} C = {scale:.4g}" for site, scale in result.scale.items())
    site = next(iter(result.scale))
    return (
        f"{result.rows:,} rows a site in {result.store} ({scales})\n"
        f"Next: mistudio train --store {result.store} --site {site} --width 3072 --out saes/{site}"
    )
