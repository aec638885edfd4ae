"""A batch's features as a list of entries instead of a matrix [B, F], and the encoder that makes one.

About 70 of 16,384 features are on in a row, so the list is a hundred times smaller. It exists in two orders: row after
row, which is how a reconstruction is summed, and feature after feature, which is how a feature's gradient is summed.

Training also needs the entries just below a threshold, where the kernel window of the pseudo-derivative lies
(`jumprelu`); so an entry is kept where z > θ - ε/2 and holds z, and whether it is on is z > θ.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

BLOCK_ENTRIES = 1 << 21
"""Entries of [B, F] that exist at once: 2 million are 8 MB in float32."""


@dataclass(frozen=True)
class SparseCode:
    """Entries row after row, and by ascending feature in each: row b has those from row_ptr[b] to row_ptr[b + 1]."""

    values: Float[Tensor, " nnz"]
    indices: Int[Tensor, " nnz"]
    """Features, int32."""
    row_ptr: Int[Tensor, " ends"]
    """int64 [B + 1]."""
    n_features: int

    @property
    def n_rows(self) -> int:
        """B."""
        return len(self.row_ptr) - 1

    def rows(self) -> Int[Tensor, " nnz"]:
        """The row of every entry, int32."""
        return _owners(self.row_ptr)

    def to_dense(self) -> Float[Tensor, "B F"]:
        """The matrix, 0 where there is no entry."""
        dense = self.values.new_zeros(self.n_rows, self.n_features)
        dense[self.rows().long(), self.indices.long()] = self.values
        return dense

    def by_feature(self) -> "FeatureCode":
        """The same entries feature after feature."""
        order, feature_ptr = _regroup(self.indices, self.n_features)
        return FeatureCode(self.values[order], self.rows()[order], feature_ptr, self.n_rows)


@dataclass(frozen=True)
class FeatureCode:
    """Entries feature after feature, and by ascending row in each: feature j has those from feature_ptr[j] to
    feature_ptr[j + 1]."""

    values: Float[Tensor, " nnz"]
    rows: Int[Tensor, " nnz"]
    """int32."""
    feature_ptr: Int[Tensor, " ends"]
    """int64 [F + 1]."""
    n_rows: int

    @property
    def n_features(self) -> int:
        """F."""
        return len(self.feature_ptr) - 1

    def indices(self) -> Int[Tensor, " nnz"]:
        """The feature of every entry, int32."""
        return _owners(self.feature_ptr)

    def by_row(self) -> SparseCode:
        """The same entries row after row."""
        order, row_ptr = _regroup(self.rows, self.n_rows)
        return SparseCode(self.values[order], self.indices()[order], row_ptr, self.n_features)


def stacked(codes: Sequence[SparseCode]) -> SparseCode:
    """The rows of the first code, those of the second, and so on; all have the same features."""
    values, indices = (torch.cat([getattr(code, name) for code in codes]) for name in ("values", "indices"))
    counts = torch.cat([code.row_ptr.diff() for code in codes])
    return SparseCode(values, indices, pointers(counts), codes[0].n_features)


def select(
    x: Float[Tensor, "B D"],
    W_enc: Float[Tensor, "D F"],
    bias: Float[Tensor, " F"],
    threshold: Float[Tensor, " F"],
    bandwidth: float = 0.0,
) -> FeatureCode:
    """The entries of z = x·W_enc + bias with z > θ or |z - θ| < bandwidth/2, their values z; NaN counts as an entry.

    With bandwidth 0 these are the active features. One product of B·D·F multiply-adds in blocks of columns, so that
    [B, F] never exists. This is the definition; `mistudio.train.screen` finds the same entries faster.
    """
    F = W_enc.shape[1]
    width = max(1, BLOCK_ENTRIES // max(1, len(x)))
    values, rows, counts = [], [], []
    for first in range(0, F, width):
        block = slice(first, first + width)
        z = torch.addmm(bias[block], x, W_enc[:, block]).T  # [width, B]
        kept = is_entry(z, threshold[block, None], bandwidth)
        values.append(z[kept])
        rows.append(kept.nonzero()[:, 1])
        counts.append(kept.sum(1))
    return FeatureCode(torch.cat(values), torch.cat(rows).int(), pointers(torch.cat(counts)), len(x))


def is_entry(z: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    """Where z is active or in the kernel window, or not a number: then it must reach the loss and stop the run."""
    return (z > threshold) | ~((z - threshold).abs() >= bandwidth / 2)


def pointers(counts: Int[Tensor, " n"]) -> Int[Tensor, " ends"]:
    """[0, counts[0], counts[0] + counts[1], …], int64."""
    return torch.cat((counts.new_zeros(1, dtype=torch.int64), counts.cumsum(0)))


def _owners(ends: Tensor) -> Tensor:
    owners = torch.arange(len(ends) - 1, dtype=torch.int32, device=ends.device)
    return owners.repeat_interleave(ends.diff())


def _regroup(keys: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """A stable order that sorts `keys`, and where each of the n groups then begins."""
    return keys.argsort(stable=True), pointers(torch.bincount(keys, minlength=n))
