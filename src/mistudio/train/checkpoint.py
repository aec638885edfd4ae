"""A run folder, and checkpoints from which a run goes on as if it had never stopped.

    run.json                         the configuration and the start, written when the first batch was accepted
    metrics.jsonl                    one line every `log_every` steps
    checkpoints/step-*.safetensors   the last two; each file is whole or absent
    checkpoints/step-*.json          with features split over N processes: the parts step-*.part-R-of-N.safetensors,
                                     written when all of them are there, so that it means "whole"
    sae.json, sae.safetensors        the SAE in released form, when the run is finished

A checkpoint holds the weights, Adam's moments and up to which step the second ones have decayed, how long each
feature was silent, the entries of the last batch, the sums of the metrics line that is being gathered, the running mean
of the loss, and in its header the step and the position in the data. Schedules are functions of the step, and the draws
of resampling of seed and step, so nothing else is needed. What is not finite is never written (`watch`). A run may go
on with another number of processes: each reads the features it holds from whatever parts there are.
"""

import dataclasses
import json
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mistudio.config import to_dict
from mistudio.errors import ConfigError, TrainError
from mistudio.files import read_json, write_json, write_tensors
from mistudio.mesh import SOLO, Mesh
from mistudio.sae import SAEConfig
from mistudio.train.config import LOGGING_FIELDS, TrainConfig

FORMAT, VERSION = "mistudio-run", 3
KEPT = 2
FEATURE_AXES = {"W_enc": 1, "W_dec": 0, "b_enc": 0, "theta": 0, "row_steps": 0, "silent_rows": 0}
"""Tensors of a checkpoint (the last part of their names) that have one entry or row for each feature, and its axis."""
_HEAD = {"format": FORMAT, "version": VERSION}


@dataclass(frozen=True)
class Checkpoint:
    """What one checkpoint file says."""

    step: int
    """Updates done."""
    position: dict[str, Any] | None
    """The batch source's own state; None where it has none, and `step` batches are skipped instead."""
    tensors: dict[str, Tensor]


def claim_folder(folder: Path, resume: bool) -> bool:
    """Whether there is a run in `folder` to go on with. TrainError: it holds anything that may not be written over."""
    if folder.exists() and not folder.is_dir():
        raise TrainError(f"{folder} is a file; a run needs a folder.")
    if not folder.exists() or not any(folder.iterdir()):
        return False
    has_run = (folder / "run.json").is_file()
    if has_run and not resume:
        raise TrainError(
            f"{folder} holds a run already. Continue it with --resume (resume=True), or name another folder."
        )
    if not has_run:
        raise TrainError(f"{folder} is not empty and holds no run (no run.json). Name another folder.")
    return True


def write_start(folder: Path, cfg: TrainConfig, sae: SAEConfig, start: Mapping[str, Any]) -> None:
    """The folder holds run.json; from now on the run can be resumed."""
    folder.mkdir(parents=True, exist_ok=True)
    record = {**_HEAD, "train": to_dict(cfg), "sae": to_dict(sae), "start": dict(start)}
    write_json(folder / "run.json", record)


def check_same_run(folder: Path, cfg: TrainConfig, sae: SAEConfig) -> None:
    """Nothing; TrainError naming the fields, where the run was started with others. Logging fields may change, and the
    learning rate from the last checkpoint's step on (lr_changes). Fields that came to be since have their defaults,
    which mean what was done before."""
    record = _read_start(folder)
    now = json.loads(json.dumps(to_dict(cfg)))  # a tuple is a list in JSON
    added = {
        f.name: now[f.name] for f in dataclasses.fields(cfg) if f.name not in record["train"] and _is_default(f, cfg)
    }
    was = {**record["train"], **added}
    done = max(_complete_steps(folder / "checkpoints"), default=0)
    for config in (was, now):
        config["lr_changes"] = [pair for pair in config.get("lr_changes", []) if pair[0] < done]
    changed = _differences(was, now, LOGGING_FIELDS) + _differences(record["sae"], to_dict(sae))
    if was["lr_changes"] != now["lr_changes"]:
        changed.append(f"its last checkpoint is of step {done}, and only lr_changes from there on may be new")
    if changed:
        raise TrainError(
            f"{folder} was started with another configuration: {'; '.join(changed)}. Resume it with the same one, or "
            "start a new run in another folder."
        )


def record_lr_changes(folder: Path, cfg: TrainConfig) -> None:
    """run.json says the learning-rate changes of a run that goes on with others."""
    record = _read_start(folder)
    pairs = [list(pair) for pair in cfg.lr_changes]
    if record["train"]["lr_changes"] != pairs:
        record["train"]["lr_changes"] = pairs
        write_json(folder / "run.json", record)


def _read_start(folder: Path) -> dict[str, Any]:
    path = folder / "run.json"
    try:
        record = read_json(path)
    except ConfigError as error:
        raise TrainError(str(error)) from error
    if not isinstance(record, dict) or (record.get("format"), record.get("version")) != (FORMAT, VERSION):
        raise TrainError(f"{path} is not a run of mistudio (format {FORMAT!r}, version {VERSION}).")
    return record


def _is_default(field: "dataclasses.Field[Any]", cfg: TrainConfig) -> bool:
    return bool(getattr(cfg, field.name) == field.default)


def _differences(was: dict[str, Any], now: dict[str, Any], ignored: frozenset[str] = frozenset()) -> list[str]:
    names = [name for name in {**was, **now} if name not in ignored]
    return [f"{n} was {was.get(n)!r}, is {now.get(n)!r}" for n in names if was.get(n) != now.get(n)]


def save_checkpoint(folder: Path, checkpoint: Checkpoint, mesh: Mesh = SOLO) -> None:
    """The folder holds this checkpoint and the one before it. TrainError: the position is not plain data."""
    header = {**_HEAD, "step": checkpoint.step, "position": checkpoint.position}
    try:
        state = json.dumps(header)
    except (TypeError, ValueError) as error:
        raise TrainError(f"The batch source's state() must be plain data for JSON: {error}.") from error
    checkpoints = folder / "checkpoints"
    checkpoints.mkdir(exist_ok=True)
    if mesh.row_rank == 0:  # replicas hold the same numbers
        # one key only: safetensors writes several in no fixed order, and equal runs should leave equal files
        path = checkpoints / _file_name(checkpoint.step, mesh.feature_rank, mesh.features)
        write_tensors(path, checkpoint.tensors, {"state": state})
    mesh.barrier()
    if not mesh.first:
        return
    if mesh.features > 1:
        names = [_file_name(checkpoint.step, rank, mesh.features) for rank in range(mesh.features)]
        write_json(checkpoints / f"step-{checkpoint.step:09d}.json", {**_HEAD, "step": checkpoint.step, "parts": names})
    _tidy(checkpoints)


def latest_checkpoint(folder: Path, mesh: Mesh = SOLO) -> Checkpoint | None:
    """This process's part of the last checkpoint, or None where the run stopped before its first.

    The checkpoint may have been written by another number of processes. TrainError: it is damaged.
    """
    steps = _complete_steps(folder / "checkpoints")
    if not steps:
        return None
    marker = steps[max(steps)]
    damaged = f"{marker} is damaged ({{}}). Delete it to resume from the one before."
    try:
        with ExitStack() as stack:
            files = [stack.enter_context(safe_open(path, framework="pt")) for path in _files_of(marker)]
            state = json.loads((files[0].metadata() or {})["state"])
            tensors = {name: _read_part(files, name, mesh) for name in files[0].keys()}  # noqa: SIM118 (not a mapping)
        if (state["format"], state["version"]) != (FORMAT, VERSION):
            raise TrainError(f"{marker} is not a checkpoint of mistudio (format {FORMAT!r}, version {VERSION}).")
        return Checkpoint(state["step"], state["position"], tensors)
    except ConfigError as error:
        raise TrainError(damaged.format(error)) from error
    except (SafetensorError, OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise TrainError(damaged.format(error)) from error


def feature_axis(name: str) -> int | None:
    """Along which axis of a checkpoint's tensor features lie; None where it is the same for all of them."""
    return FEATURE_AXES.get(name.rpartition(".")[2])


def _read_part(files: list[Any], name: str, mesh: Mesh) -> Tensor:
    """A tensor, or of one by feature those that this process holds."""
    axis = feature_axis(name)
    if axis is None:
        return files[0].get_tensor(name)
    slices = [file.get_slice(name) for file in files]
    ends = [0, *accumulate(piece.get_shape()[axis] for piece in slices)]
    wanted = mesh.part(ends[-1])
    pieces = []
    for piece, first, last in zip(slices, ends[:-1], ends[1:], strict=True):
        lo, hi = max(wanted.start, first) - first, min(wanted.stop, last) - first
        if lo < hi:
            pieces.append(piece[:, lo:hi] if axis == 1 else piece[lo:hi])
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, axis)


def _file_name(step: int, rank: int, of: int) -> str:
    part = f".part-{rank}-of-{of}" if of > 1 else ""
    return f"step-{step:09d}{part}.safetensors"


def _complete_steps(checkpoints: Path) -> dict[int, Path]:
    """Step -> the file that says a checkpoint is whole: the only one, or the list of its parts."""
    found = [*checkpoints.glob("step-?????????.safetensors"), *checkpoints.glob("step-?????????.json")]
    return {int(path.stem.removeprefix("step-")): path for path in sorted(found)}


def _files_of(marker: Path) -> list[Path]:
    if marker.suffix == ".safetensors":
        return [marker]
    return [marker.parent / name for name in read_json(marker)["parts"]]


def _tidy(checkpoints: Path) -> None:
    """Only the last checkpoints are left; the file that says a checkpoint is whole goes first."""
    steps = _complete_steps(checkpoints)
    kept = sorted(steps)[-KEPT:]
    for path in sorted(checkpoints.glob("step-*"), key=lambda path: path.suffix != ".json"):
        if not any(path.name.startswith(f"step-{step:09d}") for step in kept):
            path.unlink()
