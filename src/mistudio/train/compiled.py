"""The sparse step's operations by compiled kernels: `definition`'s functions. `screen` has a `select`."""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mistudio.sae.code import FeatureCode
from mistudio.train import kernels
from mistudio.train.definition import Work
from mistudio.train.optimizer import Adam
from mistudio.train.threads import UNIT, in_ranges


def reconstruct(code: FeatureCode, start: Tensor, W_dec: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`definition.reconstruct`."""
    columns = kernels.by_row(code.values.numpy(), code.rows.numpy(), code.feature_ptr.numpy(), len(start))
    squares, row_l0 = start.new_empty(len(start)), start.new_empty(len(start))
    residual, *given = [t.detach().numpy() for t in (start, W_dec, threshold)]
    out = [t.numpy() for t in (squares, row_l0)]
    in_ranges(lambda lo, hi: kernels.reconstruct(residual, *given, *columns, lo, hi, *out), len(start))
    return start, squares, row_l0


def visit(work: Work, adam: Adam, lr: float) -> tuple[Tensor, Tensor, Tensor]:
    """`definition.visit`, without gradients in memory: a feature's live while its rows are in the cache."""
    batch = _Batch(work)
    touched = torch.zeros(work.code.n_features, dtype=torch.bool)
    encoder, decoder, decay, numbers = _adam(adam, lr)
    marks = touched.numpy()

    def some(lo: int, hi: int) -> None:
        kernels.visit(*batch.given, encoder, decoder, decay, numbers, lo, hi, *batch.out, marks)

    in_ranges(some, work.code.n_features)
    adam.mark(touched)
    return batch.sums, batch.partial.sum(0), touched


def row_gradients(work: Work) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`definition.row_gradients`."""
    batch = _Batch(work)
    F = work.code.n_features
    touched = torch.zeros(F, dtype=torch.bool)
    in_ranges(lambda lo, hi: kernels.mark_active(*batch.given[0], batch.given[4], lo, hi, touched.numpy()), F)
    features, place = touched.nonzero().squeeze(1), (touched.cumsum(0) - 1).numpy()
    g_enc, g_dec = (
        work.x.new_empty(len(features), work.x.shape[1]),
        work.x.new_empty(len(features), work.residual.shape[1]),
    )
    rows = (g_enc.numpy(), g_dec.numpy())

    def some(lo: int, hi: int) -> None:
        kernels.row_gradients(*batch.given, touched.numpy(), place, *rows, lo, hi, *batch.out)

    in_ranges(some, F)
    return batch.sums, batch.partial.sum(0), features, g_enc, g_dec


def apply_rows(
    features: Tensor, g_enc: Tensor, g_dec: Tensor, parameters: dict[str, Tensor], adam: Adam, lr: float
) -> None:
    """`definition.apply_rows`."""
    given = [t.numpy() for t in (features, g_enc, g_dec)]
    state = _adam(adam, lr)
    in_ranges(lambda lo, hi: kernels.apply_rows(*given, *state, lo, hi), len(features))
    adam.mark(features)


def _adam(adam: Adam, lr: float) -> tuple[Any, Any, np.ndarray, tuple[Any, ...]]:
    """(encoder, decoder, decay, numbers) of `kernels.visit`: both weights' rows with their moments, and Adam's step."""
    encoder, decoder = (_rows(adam, name) for name in ("W_enc", "W_dec"))
    correction, unbias = math.sqrt(1 - adam.beta2 ** (adam.steps + 1)), 1 - adam.beta1 ** (adam.steps + 1)
    real = decoder[0].dtype.type
    numbers = tuple(real(n) for n in (lr * adam.matrix_lr / unbias, 1 - adam.beta2, correction, adam.eps, adam.beta1))
    return encoder, decoder, adam.row_decay().numpy(), numbers


def _rows(adam: Adam, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A parameter's rows, their second moments and their first; without first moments a row that is not used."""
    (rows, second), first = adam.rows(name), adam.first_rows(name)
    return rows.numpy(), second.numpy(), (rows.new_empty(1, 1) if first is None else first).numpy()


class _Batch:
    """A batch's gradients as the kernels take them, and where they leave sums."""

    def __init__(self, work: Work):
        code, x = work.code, work.x
        entries = tuple(t.numpy() for t in (code.values, code.rows, code.feature_ptr))
        batch = (x.numpy(), work.residual.numpy())
        W_enc = work.parameters["W_enc"].detach().T.numpy()
        W_dec, b_dec = (work.parameters[name].detach().numpy() for name in ("W_dec", "b_dec"))
        real = batch[0].dtype.type
        numbers = tuple(real(n) for n in (work.bandwidth / 2, work.scale, work.bonus))
        self.given = (entries, batch, W_enc, W_dec, work.threshold.detach().numpy(), work.price.numpy(), b_dec,
                      numbers, work.centred)  # fmt: skip
        self.sums = x.new_zeros(code.n_features, 5)
        self.partial = x.new_zeros(-(-code.n_features // UNIT), x.shape[1])
        """Every unit's part of d_b_dec: they are added in one order."""
        self.out = (self.sums.numpy(), self.partial.numpy())
