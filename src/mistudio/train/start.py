"""How a run starts: its first weights, what must hold of them and of the first batch, and where b_dec begins."""

import dataclasses
import math
from statistics import NormalDist
from typing import Any, overload

import torch
from torch import Tensor

from mistudio.errors import TrainError
from mistudio.mesh import SOLO, Mesh
from mistudio.sae import (
    JumpReLUSAE,
    SAEConfig,
    Transcoder,
    TranscoderConfig,
    initial_transcoder_weights,
    initial_weights,
)
from mistudio.train.config import TrainConfig
from mistudio.train.memory import available_bytes, training_bytes
from mistudio.train.objectives import Trainable

NORM_RANGE = (0.25, 4.0)
"""Where a first batch's mean ‖x‖² must lie to count as normalised (the truth is 1)."""


@overload
def initial_sae(config: TranscoderConfig, cfg: TrainConfig, mesh: Mesh = SOLO) -> Transcoder: ...


@overload
def initial_sae(config: SAEConfig, cfg: TrainConfig, mesh: Mesh = SOLO) -> Trainable: ...


def initial_sae(config: SAEConfig, cfg: TrainConfig, mesh: Mesh = SOLO) -> Trainable:
    """The SAE or transcoder that a run with `cfg` starts from: training form, float32. `train` wants `config.scale`
    (and a transcoder's `scale_out`) to be set.

    On a mesh, the features of this process, which `train` expects there, of the same first weights. ConfigError:
    the width does not divide over the processes. TrainError: there is too little memory for the weights alone.
    """
    part = mesh.part(config.d_sae)
    _check_weights(dataclasses.replace(config, d_sae=part.stop - part.start), cfg)
    threshold = first_threshold(config, cfg) if cfg.trains_threshold else 0.0
    config = training_form(config, cfg)
    if isinstance(config, TranscoderConfig):
        weights = initial_transcoder_weights(config, seed=cfg.seed, threshold=threshold, part=part)
    else:
        weights = initial_weights(config, seed=cfg.seed, threshold=threshold, part=part)
    weights["W_enc"] *= cfg.encoder_init
    config = dataclasses.replace(config, d_sae=part.stop - part.start)
    return Transcoder(config, weights) if isinstance(config, TranscoderConfig) else JumpReLUSAE(config, weights)


def _check_weights(config: SAEConfig, cfg: TrainConfig) -> None:
    cpu = torch.device("cpu")
    needed, there = training_bytes(config, cfg, cpu)["weights"], available_bytes(cpu)
    if there is not None and needed > there:
        raise TrainError(
            f"{config.d_sae:,} features have {needed / 1e9:,.1f} GB of weights, and {there / 1e9:,.1f} GB of memory "
            "are there. Lower the width."
        )


def first_threshold(config: SAEConfig, cfg: TrainConfig) -> float:
    """Every threshold at the start; `config` is of the whole SAE.

    With start_factor: a row x with E‖x‖² = 1 that points anywhere has z = x·w ~ N(0, ‖w‖²/D), so a share p of features
    is on above ‖w‖/√D times the quantile 1 - p of the normal distribution. At least half the bandwidth.
    """
    if cfg.start_factor is None or cfg.target_l0 is None:
        return cfg.threshold_init
    quantile = NormalDist().inv_cdf(1 - min(0.5, cfg.start_factor * cfg.target_l0 / config.d_sae))
    return max(cfg.bandwidth / 2, cfg.encoder_init / math.sqrt(config.d_model) * quantile)


def training_form(config: SAEConfig, cfg: TrainConfig) -> SAEConfig:
    """The configuration with what a run with `cfg` says of it. A transcoder's encoder has no b_dec to subtract."""
    centred = cfg.pre_encoder_bias and not isinstance(config, TranscoderConfig)
    log_threshold = cfg.log_threshold and cfg.trains_threshold
    return dataclasses.replace(config, pre_encoder_bias=centred, log_threshold=log_threshold)


def whole_config(config: SAEConfig, mesh: Mesh) -> SAEConfig:
    """The configuration of the whole SAE, where that of this process's part is `config`."""
    return dataclasses.replace(config, d_sae=config.d_sae * mesh.features)


def check_pair(sae: Trainable, cfg: TrainConfig) -> None:
    """Nothing; TrainError: the SAE is not one that `initial_sae` makes for this configuration."""
    advice = "Make the SAE with initial_sae(SAEConfig(..., scale=...), cfg)."
    if sae.W_enc.dtype != torch.float32:
        raise TrainError(f"Training needs float32 weights, not {sae.W_enc.dtype}. {advice}")
    if sae.config.scale is None:
        raise TrainError(
            "SAEConfig.scale is None, so the trained SAE could not be folded to raw units. Set it to what the rows "
            "were divided by (store.scale(site)), or to 1.0 where nothing was done to them."
        )
    if isinstance(sae, Transcoder) and cfg.architecture == "topk":
        raise TrainError("There are no TopK transcoders; train it as batchtopk.")
    wanted = training_form(sae.config, cfg)
    for name in ("pre_encoder_bias", "log_threshold"):
        mine, theirs = vars(sae.config)[name], vars(wanted)[name]
        if mine != theirs:
            raise TrainError(f"The SAE has {name} {mine}, the training configuration {theirs}. {advice}")


def check_mesh(cfg: TrainConfig, mesh: Mesh) -> None:
    """Nothing; TrainError: the run uses what processes do not share yet."""
    if mesh.size == 1:
        return
    for there, what in (
        (cfg.architecture == "batchtopk", "batchtopk ranks the features of a whole batch, which are"),
        (cfg.selects and mesh.features > 1, "topk ranks the features of a whole row, which are"),
        (cfg.resample_every is not None, "resample_every looks at all features and rows, which are"),
    ):
        if there:
            raise TrainError(f"{what} spread over {mesh.size} processes. Train it on one process, or without that.")


def place_b_dec(
    sae: Trainable, first: tuple[Tensor, ...], cfg: TrainConfig, mean: Tensor | None, mesh: Mesh = SOLO
) -> dict[str, Any]:
    """What the first batch was, for run.json; b_dec is set. TrainError: the rows are not normalised.

    first: (x,), or (x, y), of which y is what b_dec reconstructs.
    """
    norm = mesh.mean_rows(first[0].double().square().sum(1).mean()).item()
    if not math.isfinite(norm):
        raise TrainError("The batch of step 1 holds NaN or infinite values. Check the activations.")
    if not NORM_RANGE[0] <= norm <= NORM_RANGE[1]:
        raise TrainError(
            f"The first batch has mean |x|^2 = {norm:.4g}; expected 1. bandwidth and threshold_init mean something "
            f"only for normalised rows: divide the activations by {math.sqrt(norm):.6g} (a store's feed does so) and "
            "set SAEConfig(scale=...) to that number."
        )
    for y in first[1:]:
        norm_out = mesh.mean_rows(y.double().square().sum(1).mean()).item()
        if not NORM_RANGE[0] <= norm_out <= NORM_RANGE[1]:
            raise TrainError(
                f"In the first batch the target's mean |y|^2 = {norm_out:.4g}; expected 1. Divide the target's rows by "
                f"{math.sqrt(norm_out):.6g} (a store's joint feed does so) and set scale_out to that number."
            )
    start: dict[str, Any] = {"mean_square_norm": norm, "b_dec": "zero"}
    if cfg.b_dec_init == "mean":
        start["b_dec"] = "mean of the first batch" if mean is None else "given mean"
        chosen = mesh.mean_rows(first[-1].mean(0)) if mean is None else mean
        if chosen.shape != sae.b_dec.shape or not chosen.isfinite().all():
            raise TrainError(f"mean must be {len(sae.b_dec)} finite numbers, not {list(chosen.shape)}.")
        with torch.no_grad():
            sae.b_dec.copy_(chosen)
    return start
