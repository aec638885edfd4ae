"""Dead features start again from what the SAE reconstructs worst (after Anthropic, "Towards Monosemanticity", 2023).

Every `resample_every` steps, until `resample_until`, each feature that was silent for `dead_after_rows` is given a row
of the current batch, drawn with probability ∝ (‖y - x̂‖²)², and starts again in its favour:

- the decoder row is the row's residual y - x̂, at norm 1: what is missing there;
- the encoder row is the same direction, 0.2 times as long as a live feature's on average, so that the new feature's
  outputs are small and the loss does not jump. A transcoder reads other activations than it writes; there it is the
  row's x less the batch's mean;
- b_enc is chosen so that it fires on B·L0/F rows of the batch, its part of the L0, or on more where its own row would
  not be among them: z of the last of these is half a window above the threshold (TopK and BatchTopK: a tenth above the
  least value that its row kept). With b_enc = 0 about half of all rows
  would be above a threshold near 0 (L0 and loss would leap, and the penalty would kill it again); with its own row
  below the threshold it would have no gradient there and might stay dead;
- a trained threshold is what it was at the start (`first_threshold`);
- Adam's second moments become the mean of the live features'. At 0, the first update would be 1/√(1-β₂) = 32 lr in
  every coordinate, since bias correction counts the steps of the run: that is more than the whole encoder row.

Rows are drawn without replacement: two features with one direction would have one gradient for ever. So at most as many
features as the batch has rows start again at a time, those silent for longest first. The draw is a function of (seed,
step), hence a resumed run makes the same one.
"""

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from mistudio.train.config import TrainConfig
from mistudio.train.objectives import Trainable, objective_of
from mistudio.train.objectives.transcoder import base_of
from mistudio.train.optimizer import FEATURE_AXIS, Adam
from mistudio.train.start import first_threshold

ENCODER_PART = 0.2
"""Length of a new encoder row, as a part of the live features' mean (Anthropic's number)."""
ABOVE = 1.1
"""How far above the least value that its row keeps a new feature comes in, where features are kept by rank."""
CHUNK_ENTRIES = 1 << 26
"""Pre-activations held at once: 256 MB in float32."""


@dataclass(frozen=True)
class LeftOver:
    """What an SAE makes of a batch, as far as resampling needs it."""

    residual: Float[Tensor, "B E"]
    """y - x̂."""
    least: Float[Tensor, " B"]
    """The least value of an active feature in each row; infinite without one."""
    l0: Float[Tensor, ""]
    """Mean number of active features in a row."""


@dataclass(frozen=True)
class NewFeatures:
    """What n features start again with."""

    W_enc: Float[Tensor, "n D"]
    b_enc: Float[Tensor, " n"]
    W_dec: Float[Tensor, "n E"]


def due(cfg: TrainConfig, step: int) -> bool:
    """Whether dead features start again after update number `step` (the first is 1)."""
    if cfg.resample_every is None:
        return False
    last = cfg.steps // 2 if cfg.resample_until is None else cfg.resample_until
    return step % cfg.resample_every == 0 and step <= last


@torch.no_grad()
def resample(
    sae: Trainable,
    adam: Adam,
    silent_rows: Int64[Tensor, " F"],
    x: Float[Tensor, "B D"],
    y: Float[Tensor, "B E"],
    cfg: TrainConfig,
    step: int,
) -> int:
    """How many dead features started again on this batch, in place. Synchronises, and costs two forward passes.

    Nothing happens where the batch or the weights are not finite; the run is about to be stopped then.
    """
    features = longest_silent(silent_rows, cfg.dead_after_rows, len(x))
    if not len(features):
        return 0
    found = left_over(sae, x, y, cfg)
    squares = found.residual.square().sum(1)
    if not bool(squares.isfinite().all()):
        return 0
    rows = draw_rows(squares, len(features), generator_at(cfg.seed, step)).to(x.device)
    features = features[: len(rows)]
    live = silent_rows < cfg.dead_after_rows
    norms = sae.W_enc.detach().norm(dim=0)
    first = first_threshold(sae.config, cfg) if cfg.trains_threshold else 0.0
    new = new_features(
        x - sae.b_dec if sae.config.pre_encoder_bias else x,
        found.residual,
        rows,
        same_space=x is y,
        norm=ENCODER_PART * (float(norms[live].mean()) if bool(live.any()) else 1.0),
        levels=_levels(found, rows, first, cfg),
        firing_rows=max(1, round(float(found.l0) * len(x) / len(live))),
    )
    theta = (math.log(first) if cfg.log_threshold else first) if cfg.trains_threshold else None
    restart(features, new, dict(sae.named_parameters()), adam, live, theta)
    silent_rows[features] = 0
    return len(features)


def left_over(sae: Trainable, x: Float[Tensor, "B D"], y: Float[Tensor, "B E"], cfg: TrainConfig) -> LeftOver:
    """What the SAE makes of a batch, by pieces of CHUNK_ENTRIES pre-activations."""
    objective, bias, threshold = objective_of(cfg), sae.encoder_bias(), sae.threshold
    size = max(1, CHUNK_ENTRIES // len(bias))

    def pieces() -> Iterator[Tensor]:
        return (torch.addmm(bias, piece, sae.W_enc) for piece in x.split(size))

    cut = objective.cut(pieces(), len(x), cfg)
    residual, least, l0 = [], [], []
    for piece, target, z in zip(x.split(size), y.split(size), pieces(), strict=True):
        on = objective.on(z, threshold, cut, cfg)
        least.append(torch.where(on > 0, z, torch.inf).min(1).values)
        l0.append(on.sum(1))
        residual.append(target - torch.addmm(base_of(sae, piece), z.mul_(on), sae.W_dec))
    return LeftOver(torch.cat(residual), torch.cat(least), torch.cat(l0).mean())


def _levels(found: LeftOver, rows: Int64[Tensor, " n"], first: float, cfg: TrainConfig) -> Float[Tensor, " n"]:
    """The z at which a feature that stands for each of these rows is on; first: the threshold it starts with."""
    least = found.least[rows]
    if cfg.selects:
        fewest = found.least.min()
        return ABOVE * torch.where(least.isfinite(), least, torch.where(fewest.isfinite(), fewest, 0.0))
    return torch.full_like(least, cfg.bandwidth / 2 + first)


def generator_at(seed: int, step: int) -> torch.Generator:
    """The draws of one step: a function of (seed, step) alone, so that no checkpoint need hold a generator."""
    digest = hashlib.sha256(f"resample {seed} {step}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))


def longest_silent(silent_rows: Int64[Tensor, " F"], dead_after_rows: int, most: int) -> Int64[Tensor, " n"]:
    """The dead features, those silent for longest first (then by number), at most `most` of them. Synchronises."""
    dead = (silent_rows >= dead_after_rows).nonzero()[:, 0]
    return dead[silent_rows[dead].argsort(descending=True, stable=True)[:most]]


def draw_rows(squares: Float[Tensor, " B"], count: int, generator: torch.Generator) -> Int64[Tensor, " n"]:
    """Different rows with probability ∝ squares², squares being ‖y - x̂‖²; fewer where fewer are above 0. On the CPU."""
    weights = (squares.double() / squares.max().clamp(min=torch.finfo(squares.dtype).tiny)).square().cpu()
    count = min(count, int(weights.count_nonzero()))
    return torch.multinomial(weights, count, generator=generator) if count else torch.empty(0, dtype=torch.int64)


def new_features(
    x: Float[Tensor, "B D"],
    residual: Float[Tensor, "B E"],
    rows: Int64[Tensor, " n"],
    *,
    same_space: bool,
    norm: float,
    levels: Float[Tensor, " n"],
    firing_rows: int,
) -> NewFeatures:
    """What features start with that stand for the residuals y - x̂ of `rows`.

    x: what the encoder multiplies (less b_dec where it subtracts that). same_space: y is x; false for transcoders.
    norm: of the encoder rows. levels: the z that the last of `firing_rows` rows has; a feature's own row has no less.
    """
    W_dec = _unit(residual[rows])
    W_enc = norm * (W_dec if same_space else _unit(x[rows] - x.mean(0)))
    reached = []
    most = max(1, CHUNK_ENTRIES // len(x))
    for own_rows, directions in zip(rows.split(most), W_enc.split(most), strict=True):
        z = directions @ x.T  # [n, B]
        own = z.gather(1, own_rows[:, None])[:, 0]
        reached.append(torch.minimum(own, z.topk(min(firing_rows, len(x)), dim=1).values[:, -1]))
    return NewFeatures(W_enc, levels - torch.cat(reached), W_dec)


def _unit(rows: Float[Tensor, "n D"]) -> Float[Tensor, "n D"]:
    return rows / rows.norm(dim=1, keepdim=True)


@torch.no_grad()
def restart(
    features: Int64[Tensor, " n"],
    new: NewFeatures,
    parameters: Mapping[str, Tensor],
    adam: Adam,
    live: Tensor,
    theta: float | None,
) -> None:
    """These features have the new weights, thresholds of `theta` (None: left alone), and live features' moments.

    live: [F] boolean, the features whose moments are averaged. The caller resets what else it counts by feature.
    """
    adam.catch_up()
    parameters["W_enc"].data[:, features] = new.W_enc.T
    parameters["W_dec"].data[features] = new.W_dec
    parameters["b_enc"].data[features] = new.b_enc
    if theta is not None:
        parameters["theta"].data[features] = theta
    for name in ("W_enc", "W_dec", "b_enc", "theta"):
        moments = adam.rows(name)[1] if name in FEATURE_AXIS else adam.second[name]
        moments[features] = live_mean(moments, live)
        if adam.first:
            adam.first[name].movedim(FEATURE_AXIS.get(name, 0), 0)[features] = 0


def live_mean(values: Tensor, live: Tensor) -> Tensor:
    """The mean over the features in `live` of values [F, …]; 0 where there are none. Copies no matrix."""
    return (live.to(values.dtype) @ values) / live.sum().clamp(min=1)
