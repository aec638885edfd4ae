"""A run folder, and checkpoints from which a run goes on as if it had never stopped.

    run.json                         the configuration and the start, written when the first batch was accepted
    metrics.jsonl                    one line every `log_every` steps
    checkpoints/step-*.safetensors   the last two; each file is whole or absent
    sae.json, sae.safetensors        the SAE in released form, when the run is finished

A checkpoint holds the weights, Adam's second moments and up to which step each feature's have decayed, how long each
feature was silent, the entries of the last batch, the sums of the metrics line that is being gathered, and in its
header the step and the position in the data. Schedules are functions of the step,
and training draws no random numbers, so nothing else is needed.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from mistudio.config import to_dict
from mistudio.errors import ConfigError, TrainError
from mistudio.files import read_json, write_json, write_tensors
from mistudio.sae import SAEConfig
from mistudio.train.config import LOGGING_FIELDS, TrainConfig

FORMAT, VERSION = "mistudio-run", 2
KEPT = 2


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
    record = {"format": FORMAT, "version": VERSION, "train": to_dict(cfg), "sae": to_dict(sae), "start": dict(start)}
    write_json(folder / "run.json", record)


def check_same_run(folder: Path, cfg: TrainConfig, sae: SAEConfig) -> None:
    """Nothing; TrainError naming the fields, where the run was started with others (logging fields may change)."""
    path = folder / "run.json"
    try:
        record = read_json(path)
    except ConfigError as error:
        raise TrainError(str(error)) from error
    if not isinstance(record, dict) or (record.get("format"), record.get("version")) != (FORMAT, VERSION):
        raise TrainError(f"{path} is not a run of mistudio (format {FORMAT!r}, version {VERSION}).")
    changed = _differences(record["train"], to_dict(cfg), LOGGING_FIELDS) + _differences(record["sae"], to_dict(sae))
    if changed:
        raise TrainError(
            f"{folder} was started with another configuration: {'; '.join(changed)}. Resume it with the same one, or "
            "start a new run in another folder."
        )


def _differences(was: dict[str, Any], now: dict[str, Any], ignored: frozenset[str] = frozenset()) -> list[str]:
    names = [name for name in {**was, **now} if name not in ignored]
    return [f"{n} was {was.get(n)!r}, is {now.get(n)!r}" for n in names if was.get(n) != now.get(n)]


def save_checkpoint(folder: Path, checkpoint: Checkpoint) -> None:
    """The folder holds this checkpoint and the one before it. TrainError: the position is not plain data."""
    header = {"format": FORMAT, "version": VERSION, "step": checkpoint.step, "position": checkpoint.position}
    try:
        state = json.dumps(header)
    except (TypeError, ValueError) as error:
        raise TrainError(f"The batch source's state() must be plain data for JSON: {error}.") from error
    checkpoints = folder / "checkpoints"
    checkpoints.mkdir(exist_ok=True)
    # one key only: safetensors writes several in no fixed order, and equal runs should leave equal files
    write_tensors(checkpoints / f"step-{checkpoint.step:09d}.safetensors", checkpoint.tensors, {"state": state})
    for old in _paths(folder)[:-KEPT]:
        old.unlink()


def latest_checkpoint(folder: Path) -> Checkpoint | None:
    """The last checkpoint, or None where the run stopped before its first. TrainError: it is damaged."""
    paths = _paths(folder)
    if not paths:
        return None
    try:
        with safe_open(paths[-1], framework="pt") as file:
            state = json.loads((file.metadata() or {})["state"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        if (state["format"], state["version"]) != (FORMAT, VERSION):
            raise TrainError(f"{paths[-1]} is not a checkpoint of mistudio (format {FORMAT!r}, version {VERSION}).")
        return Checkpoint(state["step"], state["position"], tensors)
    except (SafetensorError, OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise TrainError(f"{paths[-1]} is damaged ({error}). Delete it to resume from the one before.") from error


def _paths(folder: Path) -> list[Path]:
    return sorted((folder / "checkpoints").glob("step-*.safetensors"))
