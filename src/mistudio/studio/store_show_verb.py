"""`mistudio store show`: what one activation store holds and where it comes from."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Group, RenderableType
from rich.table import Table

from mistudio.store import Store, summary
from mistudio.store.dtypes import site_row_bytes
from mistudio.store.outliers import Outliers
from mistudio.store.upkeep import Summary


@dataclass(frozen=True, kw_only=True)
class Config:
    """Which store."""

    store: Annotated[Path, tyro.conf.Positional]
    """Its folder or URL."""


@dataclass(frozen=True, kw_only=True)
class SiteFacts:
    """One site."""

    width: int
    """D."""
    scale: float
    """C with E‖x/C‖² = 1, in raw units."""
    bytes: int
    """Bytes of its rows."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """What is known of it."""

    store: Summary
    """Rows, model, number type, size."""
    sites: dict[str, SiteFacts]
    """Site → width, scale, size."""
    buckets: int
    """Shuffle buckets, which are files a site."""
    largest_bucket: int
    """Rows of the largest."""
    context: int
    """Tokens in a packed row of text."""
    token_rows: int
    """Packed rows that the model read."""
    ended_by: str | None
    """Which budget ended the collection; None: not known."""
    outliers: Outliers | None
    """Rows far longer than the others; None: not looked for."""
    checksums: bool
    """Whether files can be verified."""
    mistudio_version: str
    """The mistudio that finished it."""
    source: dict[str, Any]
    """The settings of the collection."""


def run(config: Config) -> Result:
    """Reads the manifest and compares the sizes of all files with it; no rows are read."""
    store = Store.open(config.store)
    manifest = store.manifest
    return Result(
        store=summary(config.store),
        sites={
            site: SiteFacts(
                width=info.width,
                scale=info.scale,
                bytes=store.rows * site_row_bytes(info.width, manifest.dtype),
            )
            for site, info in manifest.sites.items()
        },
        buckets=len(manifest.bucket_sizes),
        largest_bucket=max(manifest.bucket_sizes),
        context=manifest.context,
        token_rows=manifest.token_rows,
        ended_by=manifest.ended_by,
        outliers=manifest.outliers,
        checksums=manifest.checksums is not None,
        mistudio_version=manifest.mistudio_version,
        source=manifest.source,
    )


def show(result: Result) -> RenderableType:
    """A line for the store, a table of sites, and the settings it was collected with."""
    store = result.store
    head = (
        f"{store.path}: {store.rows:,} rows a site of {store.model}, {store.dtype}, {store.bytes / 1e9:,.2f} GB in "
        f"{result.buckets} buckets of at most {result.largest_bucket:,} rows; "
        f"{'checksums' if result.checksums else 'no checksums (version 1)'}\n"
    )
    sites = Table("site", "width", "C", "GB", box=None, pad_edge=False)
    for name, site in result.sites.items():
        sites.add_row(name, f"{site.width:,}", f"{site.scale:.5g}", f"{site.bytes / 1e9:,.2f}")
    settings = "\n".join(f"  {name}: {value}" for name, value in result.source.items())
    return Group(
        head, sites, *_notes(result), f"\nfrom {result.token_rows:,} rows of {result.context} tokens:\n{settings}"
    )


def _notes(result: Result) -> list[str]:
    """What ended the collection before its tokens did, and the outliers."""
    notes = []
    if result.ended_by not in (None, "tokens"):
        notes.append(f"ended before {result.store.expected_rows:,} rows by: {result.ended_by}")
    if (found := result.outliers) is not None:
        counts = ", ".join(f"{site} {at.rows:,} (median {at.median:.4g})" for site, at in found.sites.items())
        done = f"{found.dropped:,} rows left out" if found.drop else "none left out"
        notes.append(f"norms beyond {found.factor:g} medians of the first {found.first_rows:,} rows: {counts}; {done}")
    return notes
