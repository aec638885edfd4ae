"""`mistudio sae find`: the released SAEs, filtered. Reads the shipped index only; nothing heavy is imported."""

from dataclasses import dataclass

from rich.console import RenderableType
from rich.table import Table

from mistudio.hub.entry import Entry
from mistudio.hub.index import find


@dataclass(frozen=True, kw_only=True)
class Config:
    """What to look for; a filter that is left out lets everything through."""

    model: str | None = None
    """Language model, such as gemma-2-2b or google/gemma-3-4b-it."""
    layer: int | None = None
    """Layer, counted from 0."""
    site: str | None = None
    """residual, mlp, attention, transcoder or embedding (or res, att)."""
    width: str | None = None
    """Number of features: 16k, 65k, 1m or 16384."""
    l0: str | None = None
    """canonical, an average L0 such as 71, near:100, or small, medium, big (Gemma Scope 2)."""
    limit: int = 40
    """Rows of the table at most; --json gives all."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One released SAE, as `--json` gives it."""

    hf_path: str
    """Repository and folder."""
    model: str
    """The language model it was trained on."""
    site: str
    """Where: res, mlp, att, transcoder or embedding."""
    layer: int | None
    """The layer; None for the embedding."""
    width: int
    """Number of features."""
    d_in: int
    """Width of what it reads."""
    l0: int | None
    """Average L0, or the target of training (Gemma Scope 2)."""
    l0_class: str | None
    """small, medium or big (Gemma Scope 2)."""
    canonical: bool
    """The one with average L0 nearest 100."""
    neuronpedia_id: str | None
    """Its dashboards, if there are any."""
    bytes: int
    """Size of the arrays."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """What there is."""

    found: list[Row]
    """All of them."""
    limit: int
    """Rows shown in the table."""


def row(entry: Entry) -> Row:
    """The entry as plain data."""
    return Row(
        hf_path=entry.hf_path,
        model=entry.model,
        site=entry.site,
        layer=entry.layer,
        width=entry.width,
        d_in=entry.d_in,
        l0=entry.l0,
        l0_class=entry.l0_class,
        canonical=entry.canonical,
        neuronpedia_id=entry.neuronpedia_id,
        bytes=entry.bytes_expected,
    )


def run(config: Config) -> Result:
    """Looks them up."""
    found = find(model=config.model, layer=config.layer, site=config.site, width=config.width, l0=config.l0)
    return Result(found=[row(entry) for entry in found], limit=config.limit)


def show(result: Result) -> RenderableType:
    """A table, the first rows of it."""
    shown = result.found[: result.limit]
    more = len(result.found) - len(shown)
    caption = f"and {more:,} more: filter by --model --site --layer --width --l0, or --limit N" if more else None
    table = Table(title=f"{len(result.found):,} released SAEs", caption=caption)
    for name in ("repository and folder", "L0", "size", "Neuronpedia"):
        table.add_column(name, justify="right" if name in ("L0", "size") else "left", overflow="fold")
    for one in shown:
        l0 = str(one.l0) if one.l0_class is None else one.l0_class
        table.add_row(
            one.hf_path, l0 + (" *" if one.canonical else ""), f"{one.bytes / 1e6:,.0f} MB", one.neuronpedia_id or ""
        )
    return table
