"""Rows whose true features are known: more directions than dimensions, correlated, nested, of power-law frequency.

    x = Σ_i a_i d_i,   d_i: G random unit vectors in D < G dimensions,   a_i = s_i · m_i

- Frequency: feature i's base rate is proportional to (i + 8)^-0.8, and all rates sum to the wanted mean number of
  active features (children count with the rate that is left to them).
- Correlation: s_i = 1 where a Gaussian g_i exceeds its quantile; g = Λu + (1 - ‖Λ_i‖²)^½ ε with 8 shared factors u and
  loadings of length 0.5, so that features come in loose groups.
- Hierarchy: a quarter of the features are children: each has a parent among the eighth that is most frequent, and is
  active only where its parent is (its own draw then succeeds with rate 0.3).
- Size: m_i = |1 + 0.25·n|, n normal.

Everything follows from the seed.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class World:
    """What rows are made of."""

    directions: Tensor
    """[G, D], unit rows."""
    cut: Tensor
    """[G]: g above it means that a feature's own draw succeeds."""
    loadings: Tensor
    """[G, 8]."""
    parent: Tensor
    """[G] int64; a feature without a parent has itself."""

    def draw(self, rows: int, seed: int) -> tuple[Tensor, Tensor]:
        """(x [rows, D], a [rows, G])."""
        generator = torch.Generator().manual_seed(seed)
        G, factors = self.loadings.shape
        own = (1 - self.loadings.square().sum(1)).sqrt()
        shared = torch.randn(rows, factors, generator=generator) @ self.loadings.T
        on = shared + own * torch.randn(rows, G, generator=generator) > self.cut
        on &= on[:, self.parent]
        a = on * (1 + 0.25 * torch.randn(rows, G, generator=generator)).abs()
        return a @ self.directions, a


def world(D: int, G: int, active: float, seed: int = 0) -> World:
    """A world of G features in D dimensions, `active` of them on in a row on average."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.nn.functional.normalize(torch.randn(G, D, generator=generator), dim=1)
    loadings = 0.5 * torch.nn.functional.normalize(torch.randn(G, 8, generator=generator), dim=1)
    parent = torch.arange(G)
    children = torch.randperm(G - G // 8, generator=generator)[: G // 4] + G // 8
    parent[children] = torch.randint(G // 8, (G // 4,), generator=generator)
    rate = (torch.arange(G) + 8.0).pow(-0.8)
    is_child = parent != torch.arange(G)
    rate[is_child] = 0.0
    rate[is_child] = 0.3 * rate[parent[is_child]]
    rate *= active / rate.sum()
    draw = torch.where(is_child, torch.full_like(rate, 0.3), rate)
    return World(directions, math.sqrt(2) * torch.erfinv(1 - 2 * draw), loadings, parent)


def matched_cosine(W_dec: Tensor, directions: Tensor) -> float:
    """MCC: the mean |cosine| of the best one-to-one matching of decoder rows and true directions (Hungarian method)."""
    from scipy.optimize import linear_sum_assignment

    cosine = _cosines(W_dec, directions)
    rows, columns = linear_sum_assignment(cosine.numpy(), maximize=True)
    return cosine[rows, columns].mean().item()


def f1(W_dec: Tensor, f: Tensor, a: Tensor, directions: Tensor) -> float:
    """The mean over SAE features of the F1 with which "on" tells that the true feature nearest in |cosine| is on.

    f: [n, F], a: [n, G]. A feature that is never on has 0. SAELens's definition (synthetic/evals.py).
    """
    nearest = _cosines(W_dec, directions).argmax(1)
    says, true = f > 0, (a > 0)[:, nearest]
    hits = (says & true).sum(0).double()
    return (2 * hits / (says.sum(0) + true.sum(0)).clamp(min=1)).mean().item()


def _cosines(W_dec: Tensor, directions: Tensor) -> Tensor:
    unit = torch.nn.functional.normalize(W_dec.double(), dim=1)
    return (unit @ torch.nn.functional.normalize(directions.double(), dim=1).T).abs()
