"""Processes that train one SAE together, in a grid: along one axis the features are split, along the other the rows.

    process = row_rank · features + feature_rank

A *feature rank* holds F/N features: columns of W_enc, rows of W_dec, their thresholds and optimiser state. All it
needs from the others of its axis are sums: the reconstruction [B, E] and a number a row. A *row rank* is a replica that
reads its own part of every batch; replicas sum gradients and counts. Every process calls every collective, in the same
order, and every sum comes out with the same bits on all of them, so that they decide alike.

On one process each method returns what it was given: the same code runs there, at no cost.

The processes are started by `torchrun`. CPU tensors go through gloo, CUDA tensors through NCCL. A process that ends or
hangs makes the others stop with a sentence, at the latest after the timeout.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mistudio.errors import ConfigError, TrainError

TIMEOUT_S = 600.0
"""How long one process waits for the others."""


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """How the processes that torchrun started share the work."""

    features: int = 1
    """Processes that split an SAE's features between them; it must divide their number, and the width. With the rest
    of them rows are split: `torchrun --nproc-per-node 8` with 4 makes 2 replicas of 4 processes."""
    timeout_s: float = TIMEOUT_S
    """Seconds that a process waits for the others before it stops the run."""

    def __post_init__(self) -> None:
        if self.features < 1:
            raise ConfigError(f"mesh.features is {self.features}, but at least 1 process holds features.")
        if not self.timeout_s > 0:
            raise ConfigError(f"mesh.timeout_s must be a positive number of seconds, not {self.timeout_s}.")


@dataclass(frozen=True)
class Mesh:
    """A place in the grid, and the collectives along its axes; `SOLO` is the grid of one process."""

    feature_rank: int = 0
    features: int = 1
    """Processes along the feature axis."""
    row_rank: int = 0
    rows: int = 1
    """Processes along the row axis."""
    timeout_s: float = TIMEOUT_S
    _feature_group: Any = field(default=None, repr=False)
    _row_group: Any = field(default=None, repr=False)

    @staticmethod
    def from_torchrun(*, features: int = 1, timeout_s: float = TIMEOUT_S) -> "Mesh":
        """The mesh of all the processes that torchrun started; SOLO where it started none.

        Use it as a context manager, so that the connections are closed. ConfigError: `features` does not divide their
        number. TrainError: not all of them came within `timeout_s`.
        """
        size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
        MeshConfig(features=features, timeout_s=timeout_s)
        if size == 1 and features > 1:
            raise ConfigError(
                f"mesh.features is {features}, but this is one process. Start {features} of them: "
                f"torchrun --nproc-per-node {features} -m mistudio train ..."
            )
        if size % features:
            raise ConfigError(f"mesh.features is {features}, which does not divide torchrun's {size} processes.")
        if size == 1:
            return SOLO
        cuda = torch.cuda.is_available() and torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", size))
        if cuda:  # a GPU each, as NCCL needs it
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        wait = timedelta(seconds=timeout_s)
        row_rank, feature_rank = divmod(rank, features)
        rows = size // features
        try:
            dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=wait)
            # every process takes part in making every group
            across = [dist.new_group([r * features + f for f in range(features)], timeout=wait) for r in range(rows)]
            along = [dist.new_group([r * features + f for r in range(rows)], timeout=wait) for f in range(features)]
        except RuntimeError as error:
            raise TrainError(
                f"Process {rank} of {size} waited {timeout_s:g} s, and not all of them came. What the others say tells "
                f"why. ({str(error).splitlines()[0]})"
            ) from error
        return Mesh(feature_rank, features, row_rank, rows, timeout_s, across[row_rank], along[feature_rank])

    @property
    def size(self) -> int:
        """Number of processes."""
        return self.features * self.rows

    @property
    def first(self) -> bool:
        """Whether this is the process that writes what all share: records, logs, the finished SAE."""
        return self.feature_rank == 0 and self.row_rank == 0

    def part(self, n_features: int) -> slice:
        """Which of `n_features` features this process holds. ConfigError: they do not divide."""
        if n_features % self.features:
            near = n_features - n_features % self.features
            fits = " or ".join(f"{n:,}" for n in (near, near + self.features) if n)
            raise ConfigError(
                f"A width of {n_features:,} does not divide over {self.features} processes; take {fits}, or another "
                "mesh.features."
            )
        size = n_features // self.features
        return slice(self.feature_rank * size, (self.feature_rank + 1) * size)

    def rows_here(self, batch_rows: int) -> int:
        """How many of a batch's rows this process reads. ConfigError: they do not divide."""
        if batch_rows % self.rows:
            raise ConfigError(
                f"A batch of {batch_rows:,} rows does not divide over {self.rows} replicas; take a multiple of "
                f"{self.rows} for batch_rows."
            )
        return batch_rows // self.rows

    def sum_features(self, tensor: Tensor) -> Tensor:
        """The sum over the feature axis, in place."""
        return tensor if self.features == 1 else self._reduce(tensor, dist.ReduceOp.SUM, self._feature_group)

    def sum_rows(self, tensor: Tensor) -> Tensor:
        """The sum over the row axis, in place."""
        return tensor if self.rows == 1 else self._reduce(tensor, dist.ReduceOp.SUM, self._row_group)

    def mean_rows(self, tensor: Tensor) -> Tensor:
        """The mean over the row axis, in place: of each replica's mean, the mean of the whole batch."""
        return tensor if self.rows == 1 else self.sum_rows(tensor).div_(self.rows)

    def max_rows(self, tensor: Tensor) -> Tensor:
        """The largest over the row axis, in place."""
        return tensor if self.rows == 1 else self._reduce(tensor, dist.ReduceOp.MAX, self._row_group)

    def join_rows(self, tensor: Tensor) -> Tensor:
        """[B]: what every replica has of its rows, in the order of the rows of the whole batch."""
        return tensor if self.rows == 1 else self._join(tensor, self.rows, self._row_group)

    def join_features(self, tensor: Tensor) -> Tensor:
        """[F]: what every feature rank has of its features, in their order."""
        return tensor if self.features == 1 else self._join(tensor, self.features, self._feature_group)

    def any(self, flag: bool) -> bool:
        """Whether it is true on any process."""
        if self.size == 1:
            return flag
        return bool(self._reduce(torch.tensor(int(flag)), dist.ReduceOp.MAX, None))

    def barrier(self) -> None:
        """Returns when every process has come here."""
        self.any(False)

    def gather_features(self, tensor: Tensor, axis: int) -> Tensor:
        """The parts of all feature ranks joined along `axis`, on the CPU, at feature rank 0; elsewhere the own part."""
        own = tensor.detach().cpu().contiguous()
        if self.features == 1:
            return own
        parts = [torch.empty_like(own) for _ in range(self.features)] if self.feature_rank == 0 else None
        first = self.row_rank * self.features
        self._run(lambda: dist.gather(own, parts, dst=first, group=self._feature_group))
        return own if parts is None else torch.cat(parts, axis)

    def _reduce(self, tensor: Tensor, op: Any, group: Any) -> Tensor:
        whole = tensor.contiguous()
        self._run(lambda: dist.all_reduce(whole, op=op, group=group))
        return tensor if whole is tensor else tensor.copy_(whole)

    def _join(self, tensor: Tensor, count: int, group: Any) -> Tensor:
        parts = [torch.empty_like(tensor) for _ in range(count)]
        self._run(lambda: dist.all_gather(parts, tensor.contiguous(), group=group))
        return torch.cat(parts)

    def _run(self, collective: Callable[[], Any]) -> None:
        try:
            collective()
        except RuntimeError as error:
            place = self.row_rank * self.features + self.feature_rank
            raise TrainError(
                f"Process {place} of {self.size} has lost another one: it has ended, or did not answer for "
                f"{self.timeout_s:g} s. Its own message says why. Continue from the last checkpoint with --resume "
                f"(resume=True). ({str(error).splitlines()[0]})"
            ) from error

    def __enter__(self) -> "Mesh":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.size > 1:
            dist.destroy_process_group()


SOLO = Mesh()
"""The mesh of one process."""
