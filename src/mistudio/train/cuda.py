"""The sparse step's operations on a CUDA GPU, by Triton kernels: `definition`'s functions. `cuda_screen` has `select`.

Everything is float32. Nothing here waits for the GPU but `row_gradients`, whose result has as many rows as features
were touched; so a step waits once, where `select` learns how many entries there are. Rows of weights must be one
stretch of memory each, as `state` lays them out.

None of this has run on a GPU yet: its tests run under Triton's interpreter, and its kernels compile for sm_80 and
sm_90 (`tests/triton_compile.py`). Block sizes are reasoned, not measured.
"""

import contextlib
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mistudio.sae.code import FeatureCode
from mistudio.train import triton_kernels as kernels
from mistudio.train.definition import Work
from mistudio.train.optimizer import Adam

FUSION: dict[str, Any] = {"enable_fp_fusion": True}
"""Multiply-adds are one instruction; said because Triton's default is about to change."""
IN_A_THREAD = 32
"""Numbers of an [entries, D] tile that each thread has in registers."""
MOST_PARTS = 1 << 11
"""About so many parts the entries of frequent features are cut into, if parts may have a length of 256 to 4,096."""
SORT_COUNTS = 1 << 24
"""About so many counts [rows, chunks] a sort by rows makes, if chunks may have a length of 256 to 4,096."""


def on_device(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Launches go to this device; on a CPU, where Triton's interpreter runs, there is nothing to choose."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def reconstruct(code: FeatureCode, start: Tensor, W_dec: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`definition.reconstruct`."""
    n_rows, E = start.shape
    block = min(256, kernels.triton.next_power_of_2(E))
    blocks = -(-E // block)
    squares, row_l0 = start.new_empty(n_rows, blocks), start.new_empty(n_rows)
    with on_device(start.device):
        features, values, row_ptr = by_row(code, n_rows)
        kernels.reconstruct[(n_rows, blocks)](
            _lines(start), _lines(W_dec), threshold, features, values, row_ptr, squares, row_l0, E, blocks,
            BLOCK_E=block, K=8, num_warps=4, **FUSION,
        )  # fmt: skip
    return start, squares.sum(1), row_l0


def by_row(code: FeatureCode, n_rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """(features int32, values, row_ptr) of the entries row after row, by ascending feature in each: a counting sort.

    Memory: 12 bytes for each pair of a row and a chunk of entries, of which there are about SORT_COUNTS.
    """
    n, device = len(code.values), code.values.device
    chunk = _between(256, n * n_rows / SORT_COUNTS, 4096)
    chunks = max(1, -(-n // chunk))
    counts = torch.zeros(n_rows * chunks, dtype=torch.int32, device=device)
    features = torch.searchsorted(code.feature_ptr, torch.arange(n, device=device), right=True, out_int32=True) - 1
    kernels.count_rows[(-(-n // 256) or 1,)](code.rows, counts, n, chunks, CHUNK=chunk, BLOCK=256, **FUSION)
    before = torch.cat((counts.new_zeros(1, dtype=torch.int64), counts.cumsum(0)))
    sorted_features, sorted_values = torch.empty_like(features), torch.empty_like(code.values)
    kernels.place_by_row[(chunks, chunk // 256)](
        code.rows, features, code.values, before, sorted_features, sorted_values, n, chunks,
        CHUNK=chunk, BLOCK=256, PIECE=16, num_warps=4, **FUSION,
    )  # fmt: skip
    return sorted_features, sorted_values, before[::chunks].contiguous()


def visit(work: Work, adam: Adam, lr: float) -> tuple[Tensor, Tensor, Tensor]:
    """`definition.visit`, without gradients in memory but for features that fire on very many rows."""
    state = _Moments(adam, lr)
    batch = _Batch(work)
    with on_device(work.x.device):
        batch.launch(state, None)
    touched = batch.sums[:, 3] > 0
    adam.mark(touched)
    return batch.sums, batch.d_b_dec(), touched


def row_gradients(work: Work) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`definition.row_gradients`. Waits for the number of touched features."""
    batch, code, x = _Batch(work), work.code, work.x
    owners = torch.searchsorted(code.feature_ptr, torch.arange(len(code.values), device=x.device), right=True) - 1
    active = ~(code.values <= work.threshold[owners])
    ends = torch.cat((code.feature_ptr.new_zeros(1), active.cumsum(0)))[code.feature_ptr]
    touched = ends.diff() > 0
    features, place = touched.nonzero().squeeze(1), touched.cumsum(0) - 1
    g_enc, g_dec = x.new_empty(len(features), x.shape[1]), x.new_empty(len(features), work.residual.shape[1])
    with on_device(work.x.device):
        batch.launch(None, (place, g_enc, g_dec))
    return batch.sums, batch.d_b_dec(), features, g_enc, g_dec


def apply_rows(
    features: Tensor, g_enc: Tensor, g_dec: Tensor, parameters: dict[str, Tensor], adam: Adam, lr: float
) -> None:
    """`definition.apply_rows`."""
    if len(features):
        state, shape = _Moments(adam, lr), _Shape.of(g_enc.shape[1], g_dec.shape[1])
        with on_device(g_enc.device):
            kernels.apply_rows[(len(features),)](
                features, g_enc, g_dec, *state.rows, state.decay, shape.D, shape.E, *state.numbers,
                MOMENTUM=state.momentum, **shape.blocks(),
            )  # fmt: skip
    adam.mark(features)


def _between(least: int, wanted: float, most: int) -> int:
    """The power of two from `wanted` on, within two others."""
    return min(most, max(least, kernels.triton.next_power_of_2(math.ceil(wanted))))


def _lines(rows: Tensor) -> Tensor:
    """Itself, detached; its rows must be stretches of memory one after the other."""
    assert rows.is_contiguous(), "rows must lie in memory one after the other, weights feature by feature"
    assert rows.dtype == torch.float32, f"the CUDA bodies compute in float32, not {rows.dtype}"
    return rows.detach()


class _Moments:
    """What Adam's step takes: (W_enc, v_enc, m_enc, W_dec, v_dec, m_dec) with features first, their decay, and numbers.
    Without momentum a first moment is any memory."""

    def __init__(self, adam: Adam, lr: float):
        self.momentum = adam.beta1 > 0
        self.rows = [_lines(t) for name in ("W_enc", "W_dec") for t in self._of(adam, name)]
        self.decay = adam.row_decay()
        correction, unbias = math.sqrt(1 - adam.beta2 ** (adam.steps + 1)), 1 - adam.beta1 ** (adam.steps + 1)
        self.numbers = (
            float(lr) * adam.matrix_lr / unbias,
            1 - adam.beta2,
            correction,
            float(adam.eps),
            float(adam.beta1),
        )

    @staticmethod
    def _of(adam: Adam, name: str) -> tuple[Tensor, Tensor, Tensor]:
        (rows, second), first = adam.rows(name), adam.first_rows(name)
        return rows, second, second if first is None else first


@dataclass(frozen=True)
class _Shape:
    """D and E, and the blocks that hold a row of each."""

    D: int
    E: int
    block_d: int
    block_e: int

    @classmethod
    def of(cls, D: int, E: int) -> "_Shape":
        """Blocks are powers of two, at least 16."""
        return cls(D, E, *(max(16, kernels.triton.next_power_of_2(n)) for n in (D, E)))

    def blocks(self) -> dict[str, Any]:
        """Constants of a launch."""
        return {"BLOCK_D": self.block_d, "BLOCK_E": self.block_e, "num_warps": self._warps(), **FUSION}

    def _warps(self) -> int:
        return min(16, max(4, max(self.block_d, self.block_e) // 512))

    def entries(self) -> dict[str, Any]:
        """The same, how many entries a program works on at once, and a limit of registers that lets a multiprocessor
        run two programs of 8 warps."""
        at_once = 32 * self._warps() * IN_A_THREAD // max(self.block_d, self.block_e)
        limit = {"maxnreg": 128} if self._warps() == 8 else {}
        return {**self.blocks(), "K": min(16, max(1, at_once)), **limit}


class _Batch:
    """A batch's gradients as the kernels take them, and where they leave sums."""

    def __init__(self, work: Work):
        code, x, residual, parameters = work.code, work.x, work.residual, work.parameters
        numbers = (work.bandwidth / 2, work.scale, work.bonus)
        self.code, self.centred, self.numbers = code, work.centred, tuple(float(n) for n in numbers)
        self.batch = (x.contiguous(), residual.contiguous())
        self.W_enc, self.W_dec = _lines(parameters["W_enc"].T), _lines(parameters["W_dec"])
        self.vectors = (parameters["b_dec"].detach(), work.threshold.detach().contiguous(), work.price.contiguous())
        self.shape = _Shape.of(x.shape[1], residual.shape[1])
        F = code.n_features
        self.group = _between(4, F / 4096, 32)
        """Features a program visits: their part of d_b_dec is one row."""
        self.sums = x.new_zeros(F, 5)
        self.centre = x.new_empty(-(-F // self.group) if work.centred else 0, x.shape[1])

    def launch(self, state: _Moments | None, out: tuple[Tensor, Tensor, Tensor] | None) -> None:
        """Gradients of all features: taken as a step of `state`, or written to `out` (place, g_enc, g_dec)."""
        code, (x, residual), (b_dec, threshold, price) = self.code, self.batch, self.vectors
        sizes = (code.n_features, len(x), self.shape.D, self.shape.E)
        part_ptr, parts = self._parts(sizes)
        rows = state.rows if state else [self.W_enc] * 3 + [self.W_dec] * 3
        place, g_enc, g_dec = out or (part_ptr, self.sums, self.sums)
        decay, adam = (state.decay, state.numbers) if state else (self.sums, (0.0,) * 5)
        kernels.visit[(-(-code.n_features // self.group),)](
            code.values, code.rows, code.feature_ptr, part_ptr, *parts, x, residual, *rows, b_dec, threshold, price,
            decay, place, g_enc, g_dec, self.sums, self.centre, *sizes, *self.numbers, *adam,
            STEP=state is not None, MOMENTUM=state is not None and state.momentum,
            CENTRED=self.centred, GROUP=self.group, **self.shape.entries(),
        )  # fmt: skip

    def d_b_dec(self) -> Tensor:
        """The sum of the programs' parts of it."""
        return self.centre.sum(0)

    def _parts(self, sizes: tuple[int, int, int, int]) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        """(part_ptr [F + 1], sums of every part of the features that have more entries than a part): where no feature
        has, part_ptr is 0. How many parts there are is known on the GPU alone; here is a bound."""
        code, (x, residual), (_, threshold, price) = self.code, self.batch, self.vectors
        n = len(code.values)
        part = _between(256, n / MOST_PARTS, 4096)
        entries = code.feature_ptr.diff()
        per_feature = torch.where(entries > part, (entries + part - 1) // part, 0)
        part_ptr = torch.cat((entries.new_zeros(1), per_feature.cumsum(0)))
        bound = min(2 * n // part, code.n_features * -(-len(residual) // part)) if len(residual) > part else 0
        parts = tuple(x.new_empty(bound, width) for width in (sizes[2], sizes[3], 5))
        if bound:
            owners = torch.searchsorted(part_ptr, torch.arange(bound, device=x.device), right=True) - 1
            kernels.gradient_parts[(bound,)](
                code.values, code.rows, code.feature_ptr, part_ptr, owners, x, residual, self.W_dec, threshold, price,
                *parts, *sizes, *self.numbers, PART=part, **self.shape.entries(),
            )  # fmt: skip
        return part_ptr, (parts[0], parts[1], parts[2])
