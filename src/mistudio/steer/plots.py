"""Pictures: a dose–response, and features along a text. matplotlib is imported when one is drawn, and without its
global state."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mistudio.files import write_bytes
from mistudio.steer.dose import DoseResponse
from mistudio.steer.effects import Interval
from mistudio.steer.tracking import Track

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TRACKS_SHOWN = 6
"""Texts in one picture."""
INK, EFFECT, PRICE = "#334155", "#0284c7", "#ea580c"


def plot_dose_response(dose: DoseResponse, path: Path, *, title: str = "") -> Path:
    """The path of a PNG or .html: response above, rise in cross-entropy below, over strength; with 95% intervals."""
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
    return _written(figure, path)


def _written(figure: "Figure", path: Path) -> Path:
    """The path of the picture: .html holds it as a drawing (SVG) that grows with the window, anything else is PNG."""
    html = path.suffix == ".html"
    data = io.BytesIO()
    figure.savefig(data, format="svg" if html else "png")
    drawn = data.getvalue()
    if html:
        svg = drawn[drawn.index(b"<svg") :]
        drawn = b'<!doctype html><meta charset="utf-8"><style>svg{width:100%;height:auto}</style>\n' + svg
    write_bytes(path, drawn)
    return path


def _curve(axes: "Axes", x: Sequence[float], y: Sequence[Interval], colour: str) -> None:
    axes.fill_between(x, [i.low for i in y], [i.high for i in y], color=colour, alpha=0.18, linewidth=0)
    axes.plot(x, [i.mean for i in y], color=colour, marker="o", markersize=4)
    axes.axhline(0, color="#cbd5e1", linewidth=1, zorder=0)
    axes.spines[["top", "right"]].set_visible(False)


def plot_tracks(tracks: Sequence[Track], path: Path, *, title: str = "") -> Path:
    """The path of a PNG or .html: for each text a row of bars, one a token, as high as the followed feature is active.

    With several features, one colour each, side by side. The prompt's tokens stand on grey. All rows share one scale,
    apart from BOS, whose activation is often huge; at most TRACKS_SHOWN texts.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = list(tracks)[:TRACKS_SHOWN]
    longest = max(len(track.pieces) for track in shown)
    figure = Figure(figsize=(max(7.2, 0.24 * longest), 1.7 * len(shown) + 0.6), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    highest = max((value for track in shown for row in track.activations[1:] for value in row), default=0.0)
    for axes, track in zip(figure.subplots(len(shown), squeeze=False)[:, 0], shown, strict=True):
        _bars(axes, track, longest, highest or 1.0)
    figure.suptitle(title or "Activation at every token", x=0.01, ha="left", fontsize=11, color=INK)
    return _written(figure, path)


def _bars(axes: "Axes", track: Track, longest: int, highest: float) -> None:
    width = 0.86 / len(track.features)
    for number, feature in enumerate(track.features):
        heights = [row[number] if position else 0.0 for position, row in enumerate(track.activations)]
        places = [position - 0.43 + width * (number + 0.5) for position in range(len(heights))]
        axes.bar(places, heights, width, color=f"C{number}", label=f"feature {feature}")
    axes.axvspan(-0.5, track.prompt_tokens - 0.5, color="#e2e8f0", zorder=0, linewidth=0)
    axes.set_xlim(-0.5, longest - 0.5)
    axes.set_ylim(0, 1.05 * highest)
    labels = [piece.replace("$", r"\$").strip("\n") or "·" for piece in track.pieces]
    axes.set_xticks(range(len(labels)), labels, rotation=90, fontsize=7)
    axes.tick_params(axis="y", labelsize=7)
    axes.set_title(f"{track.arm}, seed {track.seed}", loc="left", fontsize=9, color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    if len(track.features) > 1:
        axes.legend(fontsize=7, frameon=False, loc="upper right")
