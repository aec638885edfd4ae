"""The picture of a dose–response. matplotlib is imported when it is drawn, and without its global state."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mistudio.files import write_bytes
from mistudio.steer.dose import DoseResponse
from mistudio.steer.effects import Interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, EFFECT, PRICE = "#334155", "#0284c7", "#ea580c"


def plot_dose_response(dose: DoseResponse, path: Path, *, title: str = "") -> Path:
    """The path of a PNG: response above, rise in cross-entropy below, over strength; 95% intervals shaded."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 5.4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, sharex=True)
    strengths = [d.strength for d in dose.doses]
    _curve(upper, strengths, [d.response for d in dose.doses], EFFECT)
    _curve(lower, strengths, [d.ce_rise for d in dose.doses], PRICE)
    lower.axhline(dose.ce_bound, color=INK, linestyle="--", linewidth=1, label=f"bound {dose.ce_bound:g}")
    if dose.recommended is not None:
        for axes in (upper, lower):
            axes.axvline(dose.recommended, color=INK, linestyle=":", linewidth=1.2)
        lower.plot([], [], color=INK, linestyle=":", linewidth=1.2, label=f"recommended {dose.recommended:g}")
    lower.legend(loc="upper left", frameon=False, fontsize=9)
    upper.set_title(title or "Dose and response", loc="left", fontsize=11, color=INK)
    upper.set_ylabel(f"rise of the {dose.measure}")
    lower.set_ylabel("rise in cross-entropy,\nnats/token")
    lower.set_xlabel(f"strength; means over {dose.doses[0].response.n} seeds, 95% intervals")
    png = io.BytesIO()
    figure.savefig(png, format="png")
    write_bytes(path, png.getvalue())
    return path


def _curve(axes: "Axes", x: Sequence[float], y: Sequence[Interval], colour: str) -> None:
    axes.fill_between(x, [i.low for i in y], [i.high for i in y], color=colour, alpha=0.18, linewidth=0)
    axes.plot(x, [i.mean for i in y], color=colour, marker="o", markersize=4)
    axes.axhline(0, color="#cbd5e1", linewidth=1, zorder=0)
    axes.spines[["top", "right"]].set_visible(False)
