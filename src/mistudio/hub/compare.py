"""Are these two SAEs the same? Tensor by tensor, feature by feature."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mistudio.errors import SAEError
from mistudio.sae import SAE

BLOCK = 2048
SAME_DIRECTION = 0.9
"""Cosine from which two decoder rows count as the same feature."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """How two SAEs differ."""

    same_architecture: bool
    """Both are of one class."""
    same_bits: bool
    """Every tensor of one is equal to that of the other, bit for bit."""
    largest_difference: dict[str, float]
    """Tensor → largest |a - b|; only tensors that both have in one shape."""
    only_in_one: tuple[str, ...]
    """Tensors that the other lacks, or has in another shape."""
    cosine_same_index_mean: float | None
    """Mean cosine of decoder rows of the same index; None where the widths differ."""
    cosine_same_index_min: float | None
    """The smallest of them."""
    cosine_best_match_mean: float
    """Mean over A's decoder rows of the cosine with the nearest row of B: near 1 also where features are permuted."""
    matched_share: float
    """Share of A's decoder rows with a row of B at cosine 0.9 or more."""


@torch.no_grad()
def compare_saes(a: SAE, b: SAE) -> Comparison:
    """The differences of two SAEs. Cost: all cosines of decoder rows, in blocks. SAEError: they write other widths."""
    if a.d_out != b.d_out:
        raise SAEError(f"These SAEs write activations of widths {a.d_out} and {b.d_out}; they cannot be compared.")
    mine, theirs = a.state_dict(), b.state_dict()
    shared = [name for name in mine if name in theirs and mine[name].shape == theirs[name].shape]
    alone = tuple(sorted((set(mine) | set(theirs)) - set(shared)))
    rows_a, rows_b = _unit(a.W_dec), _unit(b.W_dec)
    index = (rows_a * rows_b).sum(1) if rows_a.shape == rows_b.shape else None
    best = torch.cat([(block @ rows_b.T).amax(1) for block in rows_a.split(BLOCK)])
    return Comparison(
        same_architecture=type(a) is type(b),
        same_bits=not alone and all(torch.equal(mine[name], theirs[name]) for name in shared),
        largest_difference={name: _largest(mine[name], theirs[name]) for name in shared},
        only_in_one=alone,
        cosine_same_index_mean=None if index is None else index.mean().item(),
        cosine_same_index_min=None if index is None else index.min().item(),
        cosine_best_match_mean=best.mean().item(),
        matched_share=(best >= SAME_DIRECTION).float().mean().item(),
    )


def _unit(rows: Tensor) -> Float[Tensor, "F D"]:
    rows = rows.detach().float()
    return rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-12)


def _largest(a: Tensor, b: Tensor) -> float:
    return (a.double() - b.double()).abs().max().item() if a.numel() else 0.0
