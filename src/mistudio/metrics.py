"""Streaming sums of which every reported number is a quotient: the sums of two batches add up to those of both.

A mean of per-batch quotients is not the quotient of the whole (batches differ in rows and in spread), so nothing is
divided before the end: each class holds sums over rows, `of` makes them from one batch, `+` joins them, and
properties divide. Counts are exact integers; everything else is accumulated in float64, whatever dtype the rows have.

The denominator of FVU needs the mean of the *data set*, which is known only at the end. Σ‖x‖² − n‖mean‖² would cancel
where the mean is large beside the spread (residual streams are like that), so the mean and the squared distances to it
are carried instead and joined by the rule of Chan, Golub & LeVeque (1979).
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True)
class ReconstructionSums:
    """Squared errors of a reconstruction, and the squared distances of the data to their own mean."""

    rows: int
    """Rows seen."""

    error: float
    """Σ‖x − x_hat‖² over rows; the norm sums over D."""

    mean: Float[Tensor, " D"]
    """Mean of x over the rows, float64."""

    spread: float
    """Σ‖x − mean‖² over rows."""

    @classmethod
    def empty(cls, width: int) -> "ReconstructionSums":
        """The sums of no rows."""
        return cls(rows=0, error=0.0, mean=torch.zeros(width, dtype=torch.float64), spread=0.0)

    @classmethod
    def of(cls, x: Float[Tensor, "B D"], x_hat: Float[Tensor, "B D"]) -> "ReconstructionSums":
        """The sums of one batch. Costs one float64 copy of `x` and one of `x_hat`."""
        if x.shape[0] == 0:
            return cls.empty(x.shape[1])
        x64 = x.to(torch.float64)
        mean = x64.mean(0)
        error = (x64 - x_hat.to(torch.float64)).square().sum().item()
        return cls(rows=x.shape[0], error=error, mean=mean.cpu(), spread=(x64 - mean).square().sum().item())

    def __add__(self, other: "ReconstructionSums") -> "ReconstructionSums":
        rows = self.rows + other.rows
        apart = other.mean - self.mean
        share = other.rows / max(rows, 1)
        return ReconstructionSums(
            rows=rows,
            error=self.error + other.error,
            mean=self.mean + share * apart,
            spread=self.spread + other.spread + self.rows * share * apart.square().sum().item(),
        )

    @property
    def varies(self) -> bool:
        """Whether the rows differ by more than the rounding of their mean (a standard deviation of 1e-14 times it)."""
        return self.spread > 1e-28 * self.rows * self.mean.square().sum().item()

    @property
    def fvu(self) -> float:
        """Fraction of variance unexplained, E‖x − x_hat‖² / E‖x − E[x]‖² with E[x] the mean over *all* rows seen.

        0 is exact, 1 is as good as always answering the mean; Gemma Scope (arXiv 2408.05147). ValueError: the rows do
        not vary, so that the quotient is not defined.
        """
        if not self.varies:
            raise ValueError(f"FVU is not defined: the {self.rows} rows seen do not vary")
        return self.error / self.spread


@dataclass(frozen=True)
class FeatureSums:
    """How often and how strongly each feature fires. Features are non-negative; a feature fires where it is above 0."""

    tokens: int
    """Rows seen."""

    count: Int[Tensor, " F"]
    """Rows on which the feature fired, int64."""

    total: Float[Tensor, " F"]
    """Sum of the feature over rows, float64."""

    max: Float[Tensor, " F"]
    """Largest value of the feature, float32; 0 for one that never fired."""

    @classmethod
    def empty(cls, n_features: int) -> "FeatureSums":
        """The sums of no rows."""
        zeros = torch.zeros(n_features)
        return cls(tokens=0, count=zeros.to(torch.int64), total=zeros.to(torch.float64), max=zeros)

    @classmethod
    def of(cls, f: Float[Tensor, "B F"]) -> "FeatureSums":
        """The sums of one batch. Costs a float64 copy of `f` on a CPU, so give wide dictionaries few rows at a time."""
        if f.shape[0] == 0:
            return cls.empty(f.shape[1])
        return cls(
            tokens=f.shape[0],
            count=(f > 0).sum(0).cpu(),
            total=f.sum(0, dtype=torch.float64).cpu(),
            max=f.amax(0).to(torch.float32).cpu(),
        )

    def __add__(self, other: "FeatureSums") -> "FeatureSums":
        return FeatureSums(
            tokens=self.tokens + other.tokens,
            count=self.count + other.count,
            total=self.total + other.total,
            max=torch.maximum(self.max, other.max),
        )

    @property
    def l0(self) -> float:
        """Mean number of features that fire on a row."""
        return self.count.sum().item() / self.tokens

    @property
    def density(self) -> Float[Tensor, " F"]:
        """Share of rows on which each feature fires, float64, in [0, 1]."""
        return self.count.to(torch.float64) / self.tokens

    @property
    def mean_active(self) -> Float[Tensor, " F"]:
        """Mean of each feature over the rows on which it fires, float64; 0 for one that never fired."""
        return self.total / self.count.clamp(min=1)


@dataclass(frozen=True)
class LossSums:
    """Cross-entropy of next-token predictions."""

    predictions: int
    """Predictions counted."""

    total: float
    """Sum of their cross-entropies, nats."""

    @classmethod
    def empty(cls) -> "LossSums":
        """The sums of no predictions."""
        return cls(predictions=0, total=0.0)

    @classmethod
    def of(cls, losses: Float[Tensor, "N P"], counted: Bool[Tensor, "N P"]) -> "LossSums":
        """The sums of the losses (nats) where `counted` is true; P predictions in each of N rows of tokens."""
        return cls(predictions=int(counted.sum()), total=losses[counted].sum(dtype=torch.float64).item())

    def __add__(self, other: "LossSums") -> "LossSums":
        return LossSums(predictions=self.predictions + other.predictions, total=self.total + other.total)

    @property
    def mean(self) -> float:
        """Mean cross-entropy, nats per token predicted."""
        return self.total / self.predictions


def explained_variance_by_token(x: Float[Tensor, "B D"], x_hat: Float[Tensor, "B D"]) -> float:
    """Mean over tokens of 1 - ‖x_t - x̂_t‖² / ‖x_t - batch mean‖²: what SAEBench and Neuronpedia published.

    A mean of ratios with the batch's own mean, so tokens near the mean dominate: not 1 - FVU. For comparisons only.
    """
    x64 = x.to(torch.float64)
    error = (x64 - x_hat.to(torch.float64)).square().sum(1)  # [B]
    return (1 - error / (x64 - x64.mean(0)).square().sum(1)).mean().item()
