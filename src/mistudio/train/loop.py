"""`train(sae, batches, cfg)`: the run, its records, and how it stops and goes on."""

import dataclasses
import math
import signal
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from types import FrameType
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from mistudio.errors import TrainError
from mistudio.progress import Bar, progress_bar
from mistudio.sae import JumpReLUSAE, SAEConfig, initial_weights
from mistudio.train.checkpoint import (
    Checkpoint,
    check_same_run,
    claim_folder,
    latest_checkpoint,
    save_checkpoint,
    write_start,
)
from mistudio.train.config import TrainConfig
from mistudio.train.log import Metrics, Sink, check_sinks, keep_metrics, open_sinks
from mistudio.train.schedules import length_warnings
from mistudio.train.state import TrainState

NORM_RANGE = (0.25, 4.0)
"""Where a first batch's mean ‖x‖² must lie to count as normalised (the truth is 1)."""


@runtime_checkable
class Resumable(Protocol):
    """A source of batches that knows its place: `restore(state())` goes on with the batch after the last one taken."""

    def state(self) -> dict[str, Any]:
        """The place, as plain data for JSON."""

    def restore(self, state: dict[str, Any]) -> None:
        """Go to that place; called before the source is iterated."""


class Interrupted(TrainError):
    """The run was asked to stop (Ctrl-C, SIGTERM) and wrote a checkpoint."""


@dataclass(frozen=True)
class Run:
    """A finished training run."""

    sae: JumpReLUSAE
    """In training form; `sae.fold()` is what other code should use."""
    history: list[Metrics]
    """The lines of metrics.jsonl."""
    steps: int
    folder: Path | None
    warnings: list[str]


def initial_sae(config: SAEConfig, cfg: TrainConfig) -> JumpReLUSAE:
    """The SAE that a run with `cfg` starts from: training form, float32. `train` wants `config.scale` to be set."""
    config = dataclasses.replace(config, pre_encoder_bias=cfg.pre_encoder_bias, log_threshold=cfg.log_threshold)
    return JumpReLUSAE(config, initial_weights(config, seed=cfg.seed, threshold=cfg.threshold_init))


def train(
    sae: JumpReLUSAE,
    batches: Iterable[Tensor],
    cfg: TrainConfig,
    *,
    folder: str | Path | None = None,
    resume: bool = False,
    mean: Float[Tensor, " D"] | None = None,
) -> Run:
    """The finished run; `sae` is trained in place.

    batches: any iterable of normalised rows [batch_rows, D] with E‖x‖² = 1, on any device, enough for every step.
    folder: where run.json, metrics.jsonl, checkpoints and at the end the SAE in released form go; None keeps nothing.
    resume: go on with the run in `folder` (bit-identical to one that never stopped), or start it where there is none.
        A `Resumable` source is put back to its place; from any other, the batches already used are skipped.
    mean: where b_dec starts with b_dec_init "mean", in normalised units; None takes the first batch's.

    TrainError: the rows are not normalised, a batch has another shape or non-finite values, the batches end early, the
    folder is in use or belongs to another configuration. Interrupted: Ctrl-C or SIGTERM, after a checkpoint (only with
    a folder and in the main thread; elsewhere a signal does what it always did).
    """
    _check_pair(sae, cfg)
    place = None if folder is None else Path(folder)
    check_sinks(cfg, place)
    resumed = place is not None and claim_folder(place, resume)
    warnings = length_warnings(cfg)
    for sentence in warnings:
        print(f"Warning: {sentence}", file=sys.stderr)
    state = TrainState(sae, cfg)
    if place is not None and resumed:
        check_same_run(place, cfg, sae.config)
        _restore(state, batches, latest_checkpoint(place))
    source = _batches(batches, cfg, sae, skip=0 if isinstance(batches, Resumable) else state.step)
    if state.step == 0:
        first = next(source, None)
        if first is None:
            raise _ended_early(cfg, 0)
        start = _start(sae, first, cfg, mean)
        if place is not None:
            write_start(place, cfg, sae.config, {**start, "warnings": warnings, "torch": torch.__version__})
        source = chain([first], source)
    history: list[Metrics] = [] if place is None else keep_metrics(place, state.step)
    sinks = open_sinks(cfg, place, state.step + 1)
    try:
        _run_steps(state, source, batches, place, history, sinks)
    finally:
        state.release()
        for sink in sinks:
            sink.close()
    if place is not None:
        sae.fold().save(place)
    return Run(sae, history, state.step, place, warnings)


def _run_steps(
    state: TrainState,
    source: Iterator[Tensor],
    batches: Iterable[Tensor],
    folder: Path | None,
    history: list[Metrics],
    sinks: list[Sink],
) -> None:
    cfg = state.cfg
    rows = cfg.batch_rows
    with (
        _stop_requests(enabled=folder is not None) as stop,
        progress_bar("training", cfg.steps * rows, "tokens", start=state.step * rows) as bar,
    ):
        while state.step < cfg.steps:
            x = next(source, None)
            if x is None:
                _save(state, batches, folder)
                raise _ended_early(cfg, state.step)
            state.update(x)
            if state.step % cfg.log_every == 0 or state.step == cfg.steps:
                _log(state, history, sinks, bar)
            bar.advance(rows)
            if state.step % cfg.checkpoint_every == 0 or state.step == cfg.steps or stop.signal:
                _save(state, batches, folder)
            if stop.signal and state.step < cfg.steps:
                raise Interrupted(
                    f"Stopped by {stop.signal} after step {state.step:,} of {cfg.steps:,}; a checkpoint is in "
                    f"{folder}. Continue with --resume (resume=True)."
                )


def _log(state: TrainState, history: list[Metrics], sinks: list[Sink], bar: Bar) -> None:
    state.check_finite()
    line = state.metrics()
    history.append(line)
    for sink in sinks:
        sink.write(line)
    bar.advance(0, f"loss {line['loss']:.4f} L0 {line['l0']:.1f} FVU {line['fvu']:.3f} dead {line['dead']}")


def _save(state: TrainState, batches: Iterable[Tensor], folder: Path | None) -> None:
    if folder is None:
        return
    state.check_finite()
    position = batches.state() if isinstance(batches, Resumable) else None
    save_checkpoint(folder, Checkpoint(state.step, position, state.tensors()))


def _restore(state: TrainState, batches: Iterable[Tensor], checkpoint: Checkpoint | None) -> None:
    if checkpoint is None:
        return
    state.restore(checkpoint.step, checkpoint.tensors)
    if not isinstance(batches, Resumable):
        return
    if checkpoint.position is None:
        raise TrainError("The run's batches had no state() when it stopped, and now they have; pass the same source.")
    batches.restore(checkpoint.position)


def _start(sae: JumpReLUSAE, first: Tensor, cfg: TrainConfig, mean: Tensor | None) -> dict[str, Any]:
    """What the first batch was, for run.json; b_dec is set. TrainError: the rows are not normalised."""
    norm = first.double().square().sum(1).mean().item()
    if not math.isfinite(norm):
        raise TrainError("The batch of step 1 holds NaN or infinite values. Check the activations.")
    if not NORM_RANGE[0] <= norm <= NORM_RANGE[1]:
        raise TrainError(
            f"The first batch has mean |x|^2 = {norm:.4g}; expected 1. bandwidth and threshold_init mean something "
            f"only for normalised rows: divide the activations by {math.sqrt(norm):.6g} (a store's feed does so) and "
            "set SAEConfig(scale=...) to that number."
        )
    start: dict[str, Any] = {"mean_square_norm": norm, "b_dec": "zero"}
    if cfg.b_dec_init == "mean":
        start["b_dec"] = "mean of the first batch" if mean is None else "given mean"
        chosen = first.mean(0) if mean is None else mean
        if chosen.shape != sae.b_dec.shape or not chosen.isfinite().all():
            raise TrainError(f"mean must be {sae.config.d_model} finite numbers, not {list(chosen.shape)}.")
        with torch.no_grad():
            sae.b_dec.copy_(chosen)
    return start


def _check_pair(sae: JumpReLUSAE, cfg: TrainConfig) -> None:
    advice = "Make the SAE with initial_sae(SAEConfig(..., scale=...), cfg)."
    if sae.W_enc.dtype != torch.float32:
        raise TrainError(f"Training needs float32 weights, not {sae.W_enc.dtype}. {advice}")
    if sae.config.scale is None:
        raise TrainError(
            "SAEConfig.scale is None, so the trained SAE could not be folded to raw units. Set it to what the rows "
            "were divided by (store.scale(site)), or to 1.0 where nothing was done to them."
        )
    for name, mine, wanted in (
        ("pre_encoder_bias", sae.config.pre_encoder_bias, cfg.pre_encoder_bias),
        ("log_threshold", sae.config.log_threshold, cfg.log_threshold),
    ):
        if mine != wanted:
            raise TrainError(f"The SAE has {name} {mine}, the training configuration {wanted}. {advice}")


def _batches(batches: Iterable[Tensor], cfg: TrainConfig, sae: JumpReLUSAE, skip: int) -> Iterator[Tensor]:
    expected = (cfg.batch_rows, sae.config.d_model)
    for x in islice(batches, skip, None):
        if tuple(x.shape) != expected or not x.is_floating_point():
            raise TrainError(
                f"A batch is {x.dtype} {list(x.shape)}; expected floating-point {list(expected)} (batch_rows, d_model)."
            )
        yield x.to(sae.W_enc.device, torch.float32)


def _ended_early(cfg: TrainConfig, step: int) -> TrainError:
    return TrainError(
        f"The batches ended after {step:,} of {cfg.steps:,} steps. Pass an endless source (a store's feed, or "
        "itertools.cycle over a list), or lower steps."
    )


@dataclass
class _Stop:
    signal: str | None = None


@contextmanager
def _stop_requests(enabled: bool) -> Iterator[_Stop]:
    """`.signal` names the first SIGINT or SIGTERM of the block; a second one acts as it did before the block."""
    stop = _Stop()
    if not enabled or threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def request(number: int, _: FrameType | None) -> None:
        stop.signal = signal.Signals(number).name
        restore()

    for number in before:
        signal.signal(number, request)
    try:
        yield stop
    finally:
        restore()
