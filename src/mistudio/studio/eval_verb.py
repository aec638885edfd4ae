"""`mistudio eval`: an SAE measured on held-out text, and what is known of each feature saved beside it."""

import logging
from dataclasses import dataclass
from pathlib import Path

from rich.console import RenderableType
from rich.table import Table

from mistudio.errors import ConfigError
from mistudio.evaluate import EvalReport, evaluate, plot_activation_frequency
from mistudio.lm import documents, token_rows
from mistudio.studio.workspace import load_sae

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Which SAE, on which held-out text."""

    sae: Path
    """Folder of the SAE."""
    model: str | None = None
    """Language model; None: the one the SAE was trained on."""
    text: str = "stories"
    """Text, as for collect. Only its held-out documents are read."""
    column: str = "text"
    """Column that holds the text, in .jsonl, .parquet and Hugging Face data sets."""
    separator: str | None = None
    """What separates the documents of a plain text file (blank-line: blank lines)."""
    held_out: float = 0.1
    """The held-out fraction that the collection left; must be the same number."""
    rows: int = 128
    """Rows of `context` tokens to read. Gemma Scope's report: 2,048."""
    context: int = 256
    """Tokens in a row, BOS included. Gemma Scope's report: 1,024."""
    batch_rows: int = 16
    """Rows in one forward pass."""

    def __post_init__(self) -> None:
        if self.rows < 1 or self.context < 2:
            raise ConfigError(f"rows = {self.rows} and context = {self.context}; at least 1 and 2 are needed.")


def run(config: Config) -> EvalReport:
    """Measures; writes evaluation.json, feature_stats.safetensors and activation_frequency.png beside the SAE."""
    lm, sae, site = load_sae(config.sae, config.model)
    held_out = documents(
        config.text, column=config.column, separator=config.separator, part="held_out", held_out=config.held_out
    )
    context = min(config.context, lm.shape.context)
    if context < config.context:
        log.warning("%s reads rows of %s tokens at most, not of %s.", lm.name, context, config.context)
    rows = token_rows(lm, held_out, context, config.rows)
    report, stats = evaluate(lm, sae, site, rows, batch_rows=config.batch_rows)
    report.save(config.sae)
    stats.save(config.sae)
    plot_activation_frequency(stats, config.sae / "activation_frequency.png", title=f"{report.model} {report.site}")
    return report


def show(result: EvalReport) -> RenderableType:
    """The table of numbers."""
    return evaluation_table([result])


def evaluation_table(reports: list[EvalReport]) -> Table:
    """One row an SAE."""
    tokens = max(report.tokens for report in reports)
    caption = "delta loss in nats/token; recovered against mean ablation"
    table = Table(title=f"Held-out text, {tokens:,} tokens", caption=caption)
    for name in ("site", "features", "L0", "FVU", "delta loss", "recovered", "dead", "dense > 10%"):
        table.add_column(name, justify="left" if name == "site" else "right")
    for r in reports:
        recovered = "N/A" if r.recovered_mean is None else f"{r.recovered_mean:.4f}"
        table.add_row(
            r.site, f"{r.n_features:,}", f"{r.l0:.1f}", f"{r.fvu:.4f}", f"{r.delta_loss:.4f}", recovered,
            f"{r.dead:,}", f"{r.dense:,}",
        )  # fmt: skip
    return table
