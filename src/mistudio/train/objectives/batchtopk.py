"""BatchTopK (arXiv 2412.06410): the B·k largest entries of a batch are on, where they are positive.

What a row keeps so depends on its neighbours, and must not when the SAE is used. There a threshold decides: the running
mean of the smallest value that was kept. In training θ holds it, for all features the same; no gradient reaches it.

The sparse step knows about where the cut will be: at that mean. It asks for the entries above nine tenths of it; if
they are B·k or more, the B·k largest of them are those of the batch. If they are fewer, all of z is looked at.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from mistudio.sae import SAE, BatchTopKConfig, BatchTopKSAE, Transcoder
from mistudio.sae.code import FeatureCode, SparseCode, pointers
from mistudio.train.config import TrainConfig
from mistudio.train.objectives.base import Encoder, Objective, Trainable, place_of, weights_for

AVERAGED_STEPS = 100
"""θ is the mean of the smallest kept values of so many steps: of all at first, then decaying by 1/100 a step."""
MARGIN = 0.9


class BatchTopK(Objective):
    """f = z where z is at or above the batch's (B·k)-th largest max(0, z) and positive, else 0."""

    wants_smallest = True

    def cut(self, pieces: Iterator[Tensor], rows: int, cfg: TrainConfig) -> Tensor | None:
        """The (B·k)-th largest positive entry, or 0 where there are fewer."""
        assert cfg.k is not None
        return largest_of_batch(pieces, rows * cfg.k)[0]

    def on(self, z: Tensor, threshold: Tensor, cut: Tensor | None, cfg: TrainConfig) -> Tensor:
        assert cut is not None
        return ((z >= cut) & (z > 0)).to(z.dtype)

    def entries(self, encoder: Encoder, x: Tensor, threshold: Tensor, cfg: TrainConfig) -> FeatureCode:
        assert cfg.k is not None
        wanted = len(x) * cfg.k
        if bool(threshold[0] > 0):
            found = encoder.select(x, MARGIN * threshold, 0.0)
            if len(found.values) >= wanted:
                return at_least(found, found.values.topk(wanted, sorted=True).values[-1])
        _, values, rows, features = largest_of_batch(encoder.pieces(x), wanted)
        row_ptr = pointers(torch.bincount(rows, minlength=len(x)))
        return SparseCode(values, features, row_ptr, len(threshold)).by_feature()

    def settle(self, sae: Trainable, smallest: Tensor | None, step: int, cfg: TrainConfig) -> None:
        assert smallest is not None
        share = max(1 / (step + 1), 1 / AVERAGED_STEPS)
        sae.theta.copy_(torch.where(smallest.isfinite(), sae.theta + share * (smallest - sae.theta), sae.theta))

    def release(self, sae: Trainable, cfg: TrainConfig) -> SAE:
        folded = sae.fold()
        if isinstance(folded, Transcoder):  # its thresholds are a vector: all are equal
            return folded
        config = BatchTopKConfig(**place_of(folded))
        theta = folded.theta.detach()[0].clone()
        return BatchTopKSAE(config, {**weights_for(config, folded), "theta": theta})


def largest_of_batch(pieces: Iterator[Tensor], wanted: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(cut, values, rows, features) of the positive entries that are not below the `wanted`-th largest of all.

    Row after row; cut is 0 where there are fewer. Never more than a piece and some times `wanted` entries exist.
    """
    found: list[tuple[Tensor, ...]] = []
    cut, row = torch.zeros(()), 0
    for z in pieces:
        found.append(_not_below(z, cut.to(z), row))
        row += len(z)
        if sum(len(columns[0]) for columns in found) > wanted:
            kept = tuple(torch.cat(column) for column in zip(*found, strict=True))
            cut = kept[0].topk(wanted).values[-1]
            stays = ~(kept[0] < cut)
            found = [tuple(column[stays] for column in kept)]
    kept = tuple(torch.cat(column) for column in zip(*found, strict=True))
    values, rows, features = kept
    return values.min() if len(values) >= wanted else values.new_zeros(()), values, rows, features


def _not_below(z: Tensor, cut: Tensor, first_row: int) -> tuple[Tensor, ...]:
    """(values, rows, features) of the entries of z that are positive and not below the cut, or not a number."""
    above = (~((z < cut) | (z <= 0))).nonzero().int()
    return z[above[:, 0], above[:, 1]], above[:, 0] + first_row, above[:, 1]


def at_least(code: FeatureCode, cut: Tensor) -> FeatureCode:
    """The entries whose value is not below `cut`."""
    kept = ~(code.values < cut)
    counts = torch.bincount(code.indices()[kept], minlength=code.n_features)
    return FeatureCode(code.values[kept], code.rows[kept], pointers(counts), code.n_rows)
