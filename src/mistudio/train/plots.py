"""Pictures: a run's loss, L0 and FVU against the step; several runs' FVU against their L0."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mistudio.train.config import TrainConfig
from mistudio.train.log import Metrics


def plot_training(history: Sequence[Metrics], cfg: TrainConfig, path: Path) -> Path:
    """`path`, a PNG with three panels: the loss, the L0 with its target if there is one, and the FVU, in log scale."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    steps = [line["step"] for line in history]
    figure = Figure(figsize=(10, 3), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, name, title in zip(
        figure.subplots(1, 3), ("loss", "l0", "fvu"), ("loss", "L0, features a token", "FVU in the batch"), strict=True
    ):
        axes.plot(steps, [line[name] for line in history], color="#0f766e", marker=".", linewidth=1.2, markersize=4)
        axes.set(title=title, xlabel="step", yscale="log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}" if name == "l0" else "")
        axes.grid(alpha=0.25)
        if name == "l0" and cfg.target_l0 is not None:
            axes.axhline(cfg.target_l0, color="#b45309", linestyle="--", linewidth=1, label=f"target {cfg.target_l0:g}")
            axes.legend(frameon=False)
    figure.savefig(path, dpi=110)
    return path


@dataclass(frozen=True)
class FrontierPoint:
    """One SAE of a frontier."""

    line: str
    """The SAEs that a line joins have this in common."""
    l0: float
    fvu: float


def plot_frontier(points: Sequence[FrontierPoint], path: Path) -> Path:
    """`path`, a PNG: FVU against L0, one line for the SAEs that belong together; below and to the left is better."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for line in dict.fromkeys(point.line for point in points):
        own = sorted((point.l0, point.fvu) for point in points if point.line == line)
        axes.plot([l0 for l0, _ in own], [fvu for _, fvu in own], marker="o", linewidth=1.2, markersize=4, label=line)
    axes.set(xlabel="L0, features a token", ylabel="FVU", xscale="log", yscale="log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter("{x:g}")
    axes.tick_params(which="both", labelsize=8)
    axes.grid(alpha=0.25, which="both")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=110)
    return path
