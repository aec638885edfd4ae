"""A sweep: one SAE for every combination of some settings, trained together on one stream of rows.

OUT/width_4096_l0_20/   a run, as `mistudio train` leaves it alone; of several sites OUT/SITE/width_4096_l0_20/
OUT/summary.json        what became of each
OUT/frontier.png        FVU against L0, a line for each width and site
"""

import dataclasses
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table

from mistudio.config import to_dict
from mistudio.errors import ConfigError
from mistudio.files import write_json
from mistudio.mesh import Mesh
from mistudio.sae import SAEConfig, TranscoderConfig
from mistudio.store import FeedOptions, Store
from mistudio.store.served import ServedStore
from mistudio.train import BySite, FrontierPoint, Run, TrainConfig, initial_sae, plot_frontier, plot_training, train

SHORT = {"target_l0": "l0", "sparsity_weight": "lambda"}
"""How a swept field is called in a folder's name, where not by its own name."""


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """Settings to train one SAE for each value of, all on the same rows; with several lists, for each combination."""

    width: tuple[int, ...] = ()
    """Numbers of features, instead of --width."""
    target_l0: tuple[float, ...] = ()
    """Values of train.target_l0."""
    sparsity_weight: tuple[float, ...] = ()
    """Values of train.sparsity_weight."""
    k: tuple[int, ...] = ()
    """Values of train.k."""
    lr: tuple[float, ...] = ()
    """Values of train.lr."""
    seed: tuple[int, ...] = ()
    """Seeds of the first weights. All read the rows in the order of train.seed."""

    def __post_init__(self) -> None:
        for name, values in self.lists().items():
            if len(set(values)) < len(values):
                raise ConfigError(f"sweep.{name} has a value twice: {', '.join(map(str, values))}.")

    def lists(self) -> dict[str, tuple[Any, ...]]:
        """The fields that are swept, in the order of a folder's name."""
        return {f.name: vars(self)[f.name] for f in dataclasses.fields(self) if vars(self)[f.name]}


@dataclass(frozen=True, kw_only=True)
class Point:
    """One SAE of a sweep."""

    folder: Path
    site: str
    width: int
    cfg: TrainConfig


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What became of one SAE of a sweep."""

    sae: str
    """Its folder."""
    site: str
    """Where it was trained."""
    width: int
    """Number of features."""
    swept: dict[str, float | int]
    """The settings that are its own."""
    steps: int
    """Updates made."""
    final: dict[str, float | int]
    """The last line of metrics.jsonl."""
    failure: str | None
    """Why it did not come to its end."""


@dataclass(frozen=True, kw_only=True)
class SweepResult:
    """What was trained; also in OUT/summary.json."""

    out: str
    """The folder of all of them."""
    frontier: str | None
    """The picture of FVU against L0 (training batches); None where no run came to its end."""
    runs: list[Trained]
    """One an SAE, in the order of the sweep."""


def points(sweep: Sweep, sites: tuple[str, ...], width: int | None, cfg: TrainConfig, out: Path) -> list[Point]:
    """The SAEs to train. ConfigError: no width, or a value that the configuration refuses."""
    lists = sweep.lists()
    if width is None and "width" not in lists:
        raise ConfigError("Say how many features: --width, or --sweep.width for several SAEs.")
    if width is not None and "width" in lists:
        raise ConfigError("Give --width or --sweep.width, not both.")
    found = []
    for site, values in itertools.product(sites, itertools.product(*lists.values())):
        own = dict(zip(lists, values, strict=True))
        name = "_".join(f"{SHORT.get(field, field)}_{value:g}" for field, value in own.items())
        its_width = own.pop("width", width)
        folder = out / site if len(sites) > 1 else out
        found.append(Point(folder=folder / name, site=site, width=its_width, cfg=dataclasses.replace(cfg, **own)))
    return found


def run_sweep(
    store: Store | ServedStore,
    chosen: list[Point],
    sae_configs: list[SAEConfig],
    cfg: TrainConfig,
    out: Path,
    resume: bool,
    mesh: Mesh,
) -> SweepResult:
    """Trains all of them; `cfg` says what they share: the size of a batch and the order of rows."""
    sites = tuple(dict.fromkeys(site for config in sae_configs for site in read_by(config)))
    how = FeedOptions(rank=mesh.row_rank, world=mesh.rows)
    rows = mesh.rows_here(cfg.batch_rows)
    if len(sites) == 1:
        feed: Any = store.feed(sites[0], rows, seed=cfg.seed, how=how)
    else:
        feed = BySite(store.joint_feed(sites, rows, seed=cfg.seed, how=how), sites)
    targets = [read_by(config)[-1] for config in sae_configs]
    means = [(store.mean(site) / store.scale(site)).float() for site in targets]
    runs = train(
        [initial_sae(config, point.cfg, mesh) for config, point in zip(sae_configs, chosen, strict=True)],
        feed,
        [point.cfg for point in chosen],
        folder=[point.folder for point in chosen],
        resume=resume,
        mean=means,
        mesh=mesh,
    )
    return _result(chosen, runs, out, mesh)


def read_by(config: SAEConfig) -> tuple[str, ...]:
    """The sites whose rows train such an SAE; the last one is what it reconstructs."""
    assert config.hook_name is not None
    if not isinstance(config, TranscoderConfig):
        return (config.hook_name,)
    assert config.hook_name_out is not None
    return (config.hook_name, config.hook_name_out)


def _result(chosen: list[Point], runs: list[Run], out: Path, mesh: Mesh) -> SweepResult:
    trained = [
        Trained(
            sae=str(point.folder),
            site=point.site,
            width=point.width,
            swept=_swept(point, chosen),
            steps=run.steps,
            final=run.history[-1] if run.history else {},
            failure=run.failure,
        )
        for point, run in zip(chosen, runs, strict=True)
    ]
    done = [t for t in trained if t.failure is None and t.final]
    frontier = out / "frontier.png" if done else None
    result = SweepResult(out=str(out), frontier=None if frontier is None else str(frontier), runs=trained)
    if mesh.first:
        for point, run in zip(chosen, runs, strict=True):
            plot_training(run.history, point.cfg, point.folder / "training.png")
        if frontier is not None:
            lines = [FrontierPoint(_line(t, chosen), float(t.final["l0"]), float(t.final["fvu"])) for t in done]
            plot_frontier(lines, frontier)
        write_json(out / "summary.json", to_dict(result))
    return result


def _swept(point: Point, chosen: list[Point]) -> dict[str, float | int]:
    """The values of those fields in which the points differ."""
    all_of = [{"width": p.width, **dataclasses.asdict(p.cfg)} for p in chosen]
    own = {"width": point.width, **dataclasses.asdict(point.cfg)}
    return {name: value for name, value in own.items() if any(other[name] != value for other in all_of)}


def _line(trained: Trained, chosen: list[Point]) -> str:
    """Which line of the frontier an SAE lies on."""
    site = f"{trained.site}, " if len({point.site for point in chosen}) > 1 else ""
    return f"{site}width {trained.width:,}"


def show(result: SweepResult) -> RenderableType:
    """A table of the SAEs, and where everything lies."""
    table = Table("SAE", "steps", "L0", "FVU", "dead", title="training batches", title_justify="left")
    for t in result.runs:
        cells = [f"{t.final[name]:.4g}" if name in t.final else "" for name in ("l0", "fvu", "dead")]
        table.add_row(str(Path(t.sae).relative_to(result.out)), f"{t.steps:,}", *cells)
    failures = [f"{t.sae} stopped after {t.steps:,} steps: {t.failure}" for t in result.runs if t.failure]
    where = f"Everything is in {result.out}: summary.json and frontier.png say how they compare."
    return Group(table, *failures, f"{where}\nNext: mistudio eval --sae {result.runs[0].sae}")
