"""A picture of a run: loss, L0 and FVU against the step."""

from collections.abc import Sequence
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
