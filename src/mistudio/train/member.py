"""One run of a group: its state, its records, its checkpoints, and what is left of it at the end."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mistudio.errors import TrainError
from mistudio.mesh import Mesh
from mistudio.sae import JumpReLUSAE, Transcoder, TranscoderConfig
from mistudio.train.checkpoint import (
    Checkpoint,
    check_same_run,
    claim_folder,
    feature_axis,
    latest_checkpoint,
    record_lr_changes,
    save_checkpoint,
    write_start,
)
from mistudio.train.config import TrainConfig
from mistudio.train.failures import failures, time_to_look
from mistudio.train.log import Metrics, Sink, check_sinks, keep_metrics, open_sinks
from mistudio.train.objectives import Trainable, objective_of
from mistudio.train.schedules import length_warnings
from mistudio.train.start import check_mesh, check_pair, place_b_dec, whole_config
from mistudio.train.state import TrainState
from mistudio.train.together import place_of


@dataclass(frozen=True)
class Run:
    """A finished training run."""

    sae: Trainable
    """In training form; what is in the folder, or for JumpReLU and transcoders `sae.fold()`, is what other code should
    use. On a mesh: this process's features."""
    history: list[Metrics]
    """The lines of metrics.jsonl."""
    steps: int
    folder: Path | None
    warnings: list[str]
    failure: str | None = None
    """Why a run of several stopped before its last step while the others went on; a run by itself raises instead."""


class Member:
    """A run between two steps; the loop gives it batches."""

    def __init__(self, sae: Trainable, cfg: TrainConfig, folder: Path | None, mean: Tensor | None, mesh: Mesh):
        """Nothing is written yet. TrainError: SAE, configuration and folder do not go together."""
        check_pair(sae, cfg)
        check_mesh(cfg, mesh)
        check_sinks(cfg, folder)
        self.sae, self.cfg, self.folder, self.mean, self.mesh = sae, cfg, folder, mean, mesh
        self.warnings = length_warnings(cfg)
        self.state = TrainState(sae, cfg, mesh)
        self.position: dict[str, Any] | None = None
        """The place of the source at the checkpoint it came from."""
        self.saved = -1
        self.history: list[Metrics] = []
        self.sinks: list[Sink] = []
        self.failure: TrainError | None = None
        self.told: set[str] = set()
        """Kinds of failures to train that were warned about."""

    @property
    def step(self) -> int:
        """Updates done."""
        return self.state.step

    @property
    def unfinished(self) -> bool:
        """Whether it takes more steps."""
        return self.failure is None and self.state.step < self.cfg.steps

    def claim(self, resume: bool) -> bool:
        """Whether there is a run in its folder to go on with. TrainError: the folder may not be used."""
        return self.folder is not None and claim_folder(self.folder, resume)

    def restore(self) -> None:
        """It stands where its last checkpoint was written. TrainError: of another configuration, or damaged."""
        assert self.folder is not None
        check_same_run(self.folder, self.cfg, whole_config(self.sae.config, self.mesh))
        checkpoint = latest_checkpoint(self.folder, self.mesh)
        if checkpoint is not None:
            self.state.restore(checkpoint.step, checkpoint.tensors)
            self.position, self.saved = checkpoint.position, checkpoint.step
            self.state.watch.saved = checkpoint.step

    def begin(self, first: tuple[Tensor, ...]) -> dict[str, Any]:
        """What is to be said of the first batch in run.json; b_dec is set."""
        return place_b_dec(self.sae, first, self.cfg, self.mean, self.mesh)

    def write_start(self, start: dict[str, Any]) -> None:
        """The folder holds run.json."""
        if self.folder is not None and self.mesh.first:
            record = {**start, "warnings": self.warnings, "torch": torch.__version__}
            write_start(self.folder, self.cfg, whole_config(self.sae.config, self.mesh), record)

    def open_records(self) -> None:
        """The lines after the checkpoint are dropped, and the sinks open."""
        if self.folder is None:
            return
        self.history = keep_metrics(self.folder, self.step, write=self.mesh.first)
        if self.mesh.first:
            record_lr_changes(self.folder, self.cfg)
            self.sinks = open_sinks(self.cfg, self.folder, self.step + 1)

    def log_if_due(self) -> str | None:
        """The line of metrics.jsonl that is due after this step is written; a few words of it, for the progress."""
        if self.step % self.cfg.log_every and self.step != self.cfg.steps:
            return None
        self._check()
        line = self.state.metrics()
        self.history.append(line)
        for sink in self.sinks:
            sink.write(line)
        self._warn(line)
        return f"loss {line['loss']:.4f} L0 {line['l0']:.1f} FVU {line['fvu']:.3f} dead {line['dead']}"

    def save(self, batches: object) -> None:
        """A checkpoint of this step."""
        if self.folder is None or self.saved == self.step:
            return
        self._check()
        position = place_of(batches, self.sae)
        save_checkpoint(self.folder, Checkpoint(self.step, position, self.state.tensors()), self.mesh)
        self.saved = self.state.watch.saved = self.step

    def _warn(self, line: Metrics) -> None:
        """What the line shows of a failure to train is said once."""
        if not time_to_look(self.cfg, self.step):
            return
        width = whole_config(self.sae.config, self.mesh).d_sae
        for kind, sentence in failures(self.cfg, line, width, self.state.measured()).items():
            if kind in self.told:
                continue
            self.told.add(kind)
            self.warnings.append(sentence)
            if self.mesh.first:
                print(f"Warning: {sentence}", file=sys.stderr)

    def _check(self) -> None:
        """Nothing; TrainError, on every process, where one of them found something that is not finite."""
        found = None
        try:
            self.state.check_finite()
        except TrainError as error:
            found = error
        if self.mesh.any(found is not None):
            raise found or TrainError(f"Another process stopped the run at step {self.step}; it says why.")

    @property
    def save_is_due(self) -> bool:
        """Whether a checkpoint is written after this step."""
        return self.step % self.cfg.checkpoint_every == 0 or self.step == self.cfg.steps

    def fail(self, error: TrainError) -> None:
        """It takes no more steps."""
        self.failure = error
        if self.mesh.first:
            print(f"Warning: {self.folder or 'a run'} stopped, the others go on. {error}", file=sys.stderr)

    def close(self) -> None:
        """Its records are closed, its weights lie as others expect them."""
        self.state.release()
        for sink in self.sinks:
            sink.close()

    def finish(self) -> Run:
        """The run; its folder holds the SAE in released form, of its architecture's own class, unless it failed."""
        if self.folder is not None and self.failure is None:
            from mistudio.hub.formats import native  # all formats, and what they need

            whole = gathered(self.sae, self.mesh)
            if self.mesh.first:
                native.save(objective_of(self.cfg).release(whole, self.cfg), self.folder)
        failure = None if self.failure is None else str(self.failure)
        return Run(self.sae, self.history, self.step, self.folder, self.warnings, failure)


def gathered(sae: Trainable, mesh: Mesh) -> Trainable:
    """At the mesh's first process the whole SAE, on the CPU; elsewhere this process's part."""
    if mesh.features == 1:
        return sae
    weights = {}
    for name, parameter in sae.named_parameters():
        axis = feature_axis(name)
        weights[name] = parameter.detach().cpu() if axis is None else mesh.gather_features(parameter, axis)
    if not mesh.first:
        return sae
    config = whole_config(sae.config, mesh)
    return Transcoder(config, weights) if isinstance(config, TranscoderConfig) else JumpReLUSAE(config, weights)
