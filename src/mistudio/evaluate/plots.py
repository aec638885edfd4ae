"""Pictures of an evaluation. matplotlib is imported when one is drawn, and without its global state."""

import io
import math
from pathlib import Path

import torch

from mistudio.errors import SAEError
from mistudio.evaluate.report import DENSE_ABOVE, FeatureStats
from mistudio.files import write_bytes

BINS_PER_DECADE = 10
INK = "#334155"


def plot_activation_frequency(stats: FeatureStats, path: Path, *, title: str = "") -> Path:
    """The path of a PNG: how many features fire how often, log10 of the share of tokens, bins of a tenth of a decade.

    Dead features have no logarithm; they are left out and their number is stated. SAEError: every feature is dead.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    density = stats.density[stats.count > 0]
    if density.numel() == 0:
        raise SAEError(f"No feature fired on any of {stats.tokens:,} tokens, so there is no frequency to draw.")
    decades = max(1, math.ceil(math.log10(stats.tokens)))  # the rarest live feature fires on one token
    edges = torch.linspace(-decades, 0, decades * BINS_PER_DECADE + 1, dtype=torch.float64)
    exponents = density.log10().clamp(min=-decades)  # a rounded logarithm may fall below the first edge

    figure = Figure(figsize=(7.2, 4.0), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.hist(exponents.numpy(), bins=edges.tolist(), color="#fb923c", edgecolor="white", linewidth=0.5)
    axes.axvline(math.log10(DENSE_ABOVE), color=INK, linestyle="--", linewidth=1, label="dense from here on")
    axes.axvline(exponents.median().item(), color="#0284c7", linestyle=":", linewidth=1.5, label="median")
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False, fontsize=9, borderaxespad=0.2)
    axes.set_title(title or "How often features fire", loc="left", fontsize=11, color=INK)
    axes.set_xlabel(f"log10 of the share of {stats.tokens:,} tokens on which a feature fires")
    axes.set_ylabel("features")
    box = {"facecolor": "white", "edgecolor": "none", "pad": 2}
    axes.text(0.02, 0.96, _counts(stats), transform=axes.transAxes, va="top", fontsize=9, color=INK, bbox=box)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_ylim(top=axes.get_ylim()[1] * 1.3)
    png = io.BytesIO()
    figure.savefig(png, format="png")
    write_bytes(path, png.getvalue())
    return path


def _counts(stats: FeatureStats) -> str:
    dead, dense = int((stats.count == 0).sum()), int((stats.density > DENSE_ABOVE).sum())
    return (
        f"{stats.n_features:,} features\n{dead:,} dead ({dead / stats.n_features:.1%}), not drawn\n"
        f"{dense:,} dense (above {DENSE_ABOVE:.0%})"
    )
