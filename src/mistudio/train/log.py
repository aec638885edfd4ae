"""The records of a run: metrics.jsonl always, TensorBoard and Weights & Biases where asked for.

A line of metrics.jsonl is a pure function of the weights and the data (no clock, no rate), so that a resumed run writes
the same lines as one that never stopped. On resume the lines after the checkpoint are dropped first.
"""

import json
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from mistudio.config import to_dict
from mistudio.errors import TrainError
from mistudio.files import write_bytes
from mistudio.train.config import TrainConfig

Metrics = dict[str, float | int]


@runtime_checkable
class Sink(Protocol):
    """Somewhere that metrics go."""

    def write(self, metrics: Metrics) -> None:
        """Record one line; `metrics["step"]` is its place."""

    def close(self) -> None:
        """Nothing more will come."""


class JsonLines:
    """One JSON object a line, flushed as it is written."""

    def __init__(self, path: Path):
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (closed by close())

    def write(self, metrics: Metrics) -> None:
        self._file.write(json.dumps(metrics, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class TensorBoard:
    """Scalars for TensorBoard under `folder`/tensorboard. TrainError: it is not installed."""

    def __init__(self, folder: Path, first_step: int):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise TrainError("TensorBoard is not installed; type pip install 'mistudio[tensorboard]'.") from error
        self._writer: Any = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step)

    def write(self, metrics: Metrics) -> None:
        for name, value in metrics.items():
            if name != "step":
                self._writer.add_scalar(name, value, metrics["step"])

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A Weights & Biases run named after the folder; each start or resume is one. TrainError: it is not installed, or
    refuses."""

    def __init__(self, folder: Path, cfg: TrainConfig):
        try:
            import wandb
        except ImportError as error:
            raise TrainError("Weights & Biases is not installed; type pip install 'mistudio[wandb]'.") from error
        try:
            self._run: Any = wandb.init(
                project=cfg.wandb_project,
                name=folder.name,
                dir=str(folder),
                mode="offline" if cfg.wandb == "offline" else "online",
                config=to_dict(cfg),
            )
        except wandb.Error as error:
            raise TrainError(
                f"Weights & Biases refuses: {str(error).strip().rstrip('.')}. Put that right, or type --train.wandb "
                "offline; then go on with --resume."
            ) from error

    def write(self, metrics: Metrics) -> None:
        self._run.log(metrics, step=metrics["step"])

    def close(self) -> None:
        self._run.finish()


def check_sinks(cfg: TrainConfig, folder: Path | None) -> None:
    """Nothing; TrainError where a sink is asked for without a folder to write into."""
    if folder is None and (cfg.tensorboard or cfg.wandb != "off"):
        raise TrainError("TensorBoard and Weights & Biases write into the run folder; pass folder= to train().")


def open_sinks(cfg: TrainConfig, folder: Path | None, first_step: int) -> list[Sink]:
    """The sinks that the configuration asks for; none without a folder."""
    if folder is None:
        return []
    sinks: list[Sink] = []
    if cfg.tensorboard:
        sinks.append(TensorBoard(folder, first_step))
    if cfg.wandb != "off":
        sinks.append(WeightsAndBiases(folder, cfg))
    return [JsonLines(folder / "metrics.jsonl"), *sinks]


def read_metrics(folder: Path) -> list[Metrics]:
    """The whole lines of metrics.jsonl; a last line that was cut off is left out."""
    path = folder / "metrics.jsonl"
    if not path.is_file():
        return []
    whole = path.read_text(encoding="utf-8").rpartition("\n")[0]
    return [json.loads(line) for line in whole.splitlines()]


def keep_metrics(folder: Path, step: int, *, write: bool = True) -> list[Metrics]:
    """The lines up to `step`, which metrics.jsonl then holds and no others (unless another process writes it)."""
    kept = [line for line in read_metrics(folder) if line["step"] <= step]
    if write:
        write_bytes(folder / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in kept).encode())
    return kept
