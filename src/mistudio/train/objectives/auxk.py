"""AuxK (arXiv 2406.04093): dead features reconstruct what the living ones left over, and so learn to be of use.

    L_aux = aux_weight · mean over rows of ‖e - ê‖²,  e = y - x̂ (a constant),  ê = Σ f_j·W_dec[j]

over the aux_k largest f = max(0, z) of the row's dead features; ê has no b_dec. Its gradient reaches W_dec, W_enc and
b_enc of these features, and b_dec only through the encoder. For the kernels of the sparse step these are entries like
all others, in a plane of their own: its residual is aux_weight·(ê - e).
"""

import torch
from torch import Tensor

from mistudio.sae.code import FeatureCode, pointers


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


def auxiliary_loss(z: Tensor, W_dec: Tensor, residual: Tensor, dead: Tensor, aux_k: int, aux_weight: float) -> Tensor:
    """L_aux with a graph behind z [B, F] and W_dec; `residual` x̂ - y [B, E], `dead` [F] bool. The definition."""
    f, where = z.relu()[:, dead].topk(min(aux_k, int(dead.sum())), dim=1)
    e_hat = (f[..., None] * W_dec[dead][where]).sum(1)
    return aux_weight * (e_hat + residual.detach()).square().sum(1).mean()
