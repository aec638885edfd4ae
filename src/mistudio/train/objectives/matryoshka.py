"""Matryoshka prefixes (arXiv 2503.17547): the first features of an SAE must reconstruct without those after them.

With prefixes of p_1 < … < p_M = F features the loss of reconstruction is

    1/M Σ_m ‖r_m‖²,  r_m = base + Σ_{j < p_m} f_j·W_dec[j] - y

and a feature of group g (p_{g-1} ≤ j < p_g) reconstructs in all prefixes from g on. So its gradient is that of a plain
SAE whose residual is the *plane* Σ_{m ≥ g} r_m / M: planes are summed once, and each entry still costs one dot product.
b_dec (and a transcoder's skip) belongs to all prefixes, hence to the first plane.
"""

from itertools import pairwise

import torch
from torch import Tensor

from mistudio.errors import TrainError
from mistudio.mesh import SOLO, Mesh
from mistudio.sae.code import FeatureCode
from mistudio.train.config import TrainConfig


def groups(cfg: TrainConfig, n_features: int, mesh: Mesh = SOLO) -> list[tuple[int, int]]:
    """The features [lo, hi) of every group; one group of all of them without prefixes. TrainError: one is empty.

    On a mesh: what this process's `n_features` have of every group, which may be nothing.
    """
    whole = n_features * mesh.features
    ends = [0, *(round(part * whole) for part in cfg.prefixes), whole]
    if any(lo >= hi for lo, hi in pairwise(ends)):
        raise TrainError(
            f"prefixes {list(cfg.prefixes)} of {whole:,} features end at {ends[1:]}: one would add no feature. "
            "Set them farther apart."
        )
    first = mesh.part(whole).start
    return list(pairwise(min(max(end - first, 0), n_features) for end in ends))


def suffix_sums_(residuals: Tensor) -> Tensor:
    """The planes [M, b, E] of the residuals r_m [M, b, E], in place."""
    for m in range(len(residuals) - 2, -1, -1):
        residuals[m] += residuals[m + 1]
    return residuals.div_(len(residuals))


def group_of(code: FeatureCode, lo: int, hi: int) -> FeatureCode:
    """The entries of features [lo, hi), which become 0 to hi - lo: views."""
    first, last = (int(end) for end in code.feature_ptr[[lo, hi]])
    pointers = code.feature_ptr[lo : hi + 1] - first
    return FeatureCode(code.values[first:last], code.rows[first:last], pointers, code.n_rows)


def on_planes(code: FeatureCode, ranges: list[tuple[int, int]]) -> FeatureCode:
    """The entries with group g's in rows g·B + b, where the kernels then find their plane."""
    if len(ranges) == 1:
        return code
    ends = code.feature_ptr[[lo for lo, _ in ranges] + [ranges[-1][1]]]
    shift = torch.arange(len(ranges), dtype=torch.int32, device=ends.device) * code.n_rows
    return FeatureCode(code.values, code.rows + shift.repeat_interleave(ends.diff()), code.feature_ptr, code.n_rows)
