"""`mistudio sae self-check`: does a released SAE, as loaded here, behave as it is known to?

Its L0 is compared with the one in its name, and where others published numbers (`mistudio.hub.anchors`) L0 and
explained variance with theirs, on real text through the real model. The bands are wide, because text, context and dtype
differ; a wrong site, layer, scale or BOS treatment falls far outside them.
"""

from dataclasses import dataclass
from typing import Annotated

import torch
import tyro
from rich.console import RenderableType
from rich.table import Table
from torch import Tensor

from mistudio.errors import HubError
from mistudio.evaluate import evaluate
from mistudio.hub.anchors import anchor_of
from mistudio.hub.load import load_sae
from mistudio.hub.names import resolve
from mistudio.lm import LanguageModel, Site, documents, token_rows
from mistudio.metrics import explained_variance_by_token
from mistudio.sae import SAE

ANCHOR_BAND = 0.10
NAME_BAND = 0.25
BATCH_ROWS = 16


@dataclass(frozen=True, kw_only=True)
class Config:
    """Which SAE, on which text."""

    name: Annotated[str, tyro.conf.Positional]
    """Any name of a released SAE."""
    text: str
    """Ordinary English text, as for collect; all of it may be read, since nothing is trained."""
    column: str = "text"
    """Column that holds the text."""
    separator: str | None = None
    """What separates the documents of a plain text file (blank-line: blank lines)."""
    rows: int = 250
    """Rows of tokens to read."""
    context: int = 128
    """Tokens in a row, BOS included."""
    device: str | None = None
    """Where the model runs; None: a GPU if there is one."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """One number against what is known."""

    quantity: str
    """What was measured."""
    measured: float
    """Here."""
    known: float
    """By the source."""
    source: str
    """Who says so."""
    band: float
    """Allowed relative difference."""
    passed: bool
    """Whether the difference lies within the band."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """The checks."""

    sae: str
    """Repository and folder."""
    tokens: int
    """Tokens measured on."""
    delta_loss: float
    """Rise of the loss with the reconstruction spliced in, nats/token; for reading, not checked."""
    checks: list[Check]
    """Each number."""


def run(config: Config) -> Result:
    """Measures and compares. HubError: transcoders and embedding SAEs have no site of a single activation."""
    entry = resolve(config.name)
    if not isinstance(entry.site_name, str):
        raise HubError(f"{entry.hf_path} is no SAE of one site; residual, MLP and attention SAEs can be checked.")
    lm = LanguageModel.load(entry.model, device=config.device)
    sae = load_sae(entry.hf_path).to(lm.device)
    site = Site.parse(entry.site_name)
    text = documents(config.text, column=config.column, separator=config.separator)
    rows = token_rows(lm, text, config.context, config.rows)
    report, _ = evaluate(lm, sae, site, rows, batch_rows=BATCH_ROWS)
    checks = []
    if entry.l0 is not None:
        checks.append(check("L0", report.l0, entry.l0, "the SAE's name", NAME_BAND))
    if (anchor := anchor_of(entry)) is not None:
        variance = explained_variance(lm, sae, site, rows)
        checks.append(check("L0", report.l0, anchor.l0, "SAEBench", ANCHOR_BAND))
        checks.append(check("explained variance", variance, anchor.explained_variance, "SAEBench", ANCHOR_BAND))
    return Result(sae=entry.hf_path, tokens=report.tokens, delta_loss=report.delta_loss, checks=checks)


def check(quantity: str, measured: float, known: float, source: str, band: float) -> Check:
    """The verdict on one number."""
    passed = abs(measured - known) <= band * abs(known)
    return Check(quantity=quantity, measured=measured, known=known, source=source, band=band, passed=passed)


@torch.no_grad()
def explained_variance(lm: LanguageModel, sae: SAE, site: Site, rows: Tensor) -> float:
    """`explained_variance_by_token` over batches of rows, weighted by their tokens."""
    total, tokens = 0.0, 0
    for batch in rows.split(BATCH_ROWS):
        ordinary = ~lm.is_special(batch)
        x = lm.run(batch.to(lm.device), read=[site]).activations[site][ordinary.to(lm.device)]
        total += explained_variance_by_token(x, sae(x)[0]) * len(x)
        tokens += len(x)
    return total / tokens


def failed(result: Result) -> bool:
    """Whether a number lies outside its band: the exit code is then 1."""
    return not all(check.passed for check in result.checks)


def show(result: Result) -> RenderableType:
    """A table of the checks."""
    table = Table(title=f"{result.sae} on {result.tokens:,} tokens (delta loss {result.delta_loss:.3f} nats/token)")
    for name in ("quantity", "measured", "known", "from", "band", ""):
        table.add_column(name)
    for one in result.checks:
        verdict = "[green]within[/green]" if one.passed else "[red]OUTSIDE[/red]"
        table.add_row(one.quantity, f"{one.measured:.4g}", f"{one.known:.4g}", one.source, f"±{one.band:.0%}", verdict)
    return table
