"""AuxK (arXiv 2406.04093): dead features reconstruct what the living ones left over, and so learn to be of use.

    L_aux = aux_weight · mean over rows of ‖e - ê‖²,  e = y - x̂ (a constant),  ê = Σ f_j·W_dec[j]

over the aux_k largest f = max(0, z) of the row's dead features; ê has no b_dec. Its gradient reaches W_dec, W_enc and
b_enc of these features, and b_dec only through the encoder. For the kernels of the sparse step these are entries like
all others, in a plane of their own: its residual is aux_weight·(ê - e).

A JumpReLU feature's threshold has no gradient, from this loss or the others, in a step that helps the feature: the
penalty would raise it again, and the kernels, for which an auxiliary entry is on wherever it is positive, know one
level a feature. What such a feature puts out above its threshold counts as ever.
"""

import torch
from torch import Tensor

from mistudio.mesh import Mesh
from mistudio.sae.code import FeatureCode, SparseCode, pointers


def below_the_largest(values: Tensor, aux_k: int, mesh: Mesh) -> Tensor:
    """Which of the values [B, n], each row's n ≤ aux_k largest here, are not among its aux_k largest of all processes;
    equal ones all are."""
    padded = torch.nn.functional.pad(values, (0, aux_k - values.shape[1]))
    everywhere = torch.cat(mesh.join_features(padded).chunk(mesh.features), 1)
    return values < everywhere.topk(aux_k, dim=1).values[:, -1:]


def largest_everywhere(code: SparseCode, aux_k: int, mesh: Mesh) -> SparseCode:
    """The entries, of which each row has its aux_k largest here, that are among its aux_k largest of all processes."""
    rows = code.rows().long()
    place = torch.arange(len(rows), device=rows.device) - code.row_ptr[rows]
    values = code.values.new_zeros(code.n_rows, aux_k)
    values[rows, place] = code.values
    kept = ~below_the_largest(values, aux_k, mesh)[rows, place]
    row_ptr = pointers(torch.bincount(rows[kept], minlength=code.n_rows))
    return SparseCode(code.values[kept], code.indices[kept], row_ptr, code.n_features)


def spread(code: FeatureCode, features: Tensor, n_features: int) -> FeatureCode:
    """The same entries with feature features[i] (ascending) for feature i, among n_features."""
    counts = code.feature_ptr.new_zeros(n_features)
    counts[features] = code.feature_ptr.diff()
    return FeatureCode(code.values, code.rows, pointers(counts), code.n_rows)


def merged(code: FeatureCode, other: FeatureCode, first_row: int) -> FeatureCode:
    """The entries of `code`, and after them in each feature those of `other`, whose rows begin at `first_row`."""
    owners = torch.cat((code.indices(), other.indices()))
    order = owners.argsort(stable=True)
    values = torch.cat((code.values, other.values))[order]
    rows = torch.cat((code.rows, other.rows + first_row))[order]
    return FeatureCode(values, rows, code.feature_ptr + other.feature_ptr, code.n_rows)


def without_window(code: FeatureCode, threshold: Tensor, dead: Tensor) -> tuple[FeatureCode, Tensor]:
    """The entries less those of dead features that are not above θ, and the level [F] that says which are on: 0 for
    dead features, whose entries then all are, and θ for others."""
    owners = code.indices()
    kept = ~(dead[owners] & (code.values <= threshold[owners]))
    counts = torch.bincount(owners[kept], minlength=code.n_features)
    entries = FeatureCode(code.values[kept], code.rows[kept], pointers(counts), code.n_rows)
    return entries, threshold.masked_fill(dead, 0.0)


def active_counts(code: FeatureCode, level: Tensor) -> Tensor:
    """How many entries of each feature are on [F]."""
    owners = code.indices()
    return torch.bincount(owners[~(code.values <= level[owners])], minlength=code.n_features)


def auxiliary_loss(z: Tensor, W_dec: Tensor, residual: Tensor, dead: Tensor, aux_k: int, aux_weight: float) -> Tensor:
    """L_aux with a graph behind z [B, F] and W_dec; `residual` x̂ - y [B, E], `dead` [F] bool. The definition."""
    f, where = z.relu()[:, dead].topk(min(aux_k, int(dead.sum())), dim=1)
    e_hat = (f[..., None] * W_dec[dead][where]).sum(1)
    return aux_weight * (e_hat + residual.detach()).square().sum(1).mean()
