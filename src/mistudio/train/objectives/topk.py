"""TopK (arXiv 2406.04093): the k largest entries of a row are on, where they are positive. There is no penalty.

Which entry is a row's k-th is not known before the whole row is. But it can be guessed from the batch before, and the
guess be checked: the sparse step asks for the entries above a bound that nearly all rows' k-th values lay above. A row
that has k of them has its k largest among them; the few rows that have not are computed as a whole. In training θ holds
that bound, for all features the same; the finished SAE has no θ.
"""

import torch
from torch import Tensor

from mistudio.errors import TrainError
from mistudio.sae import SAE, TopKConfig, TopKSAE, Transcoder
from mistudio.sae.code import FeatureCode, SparseCode, pointers
from mistudio.train.config import TrainConfig
from mistudio.train.objectives.base import Encoder, Objective, Trainable, place_of, weights_for

SHORT_ROWS = 100
"""One row in so many may have fewer than k entries above the bound."""
MARGIN = 0.95


class TopK(Objective):
    """f = z at the k largest of each row's max(0, z), else 0; a row with fewer positive ones has fewer on."""

    wants_smallest = True

    def on(self, z: Tensor, threshold: Tensor, cut: Tensor | None, cfg: TrainConfig) -> Tensor:
        assert cfg.k is not None
        values, indices = z.detach().relu().topk(cfg.k, dim=1, sorted=False)
        return torch.zeros_like(z).scatter_(1, indices, (~(values <= 0)).to(z.dtype))

    def smallest(self, row_least: Tensor, row_l0: Tensor, cfg: TrainConfig) -> Tensor:
        """What all but a hundredth of the rows' k-th values are above; rows with fewer than k do not count."""
        assert cfg.k is not None
        return row_least.where(row_l0 >= cfg.k, torch.inf).kthvalue(1 + len(row_least) // SHORT_ROWS).values

    def entries(self, encoder: Encoder, x: Tensor, threshold: Tensor, cfg: TrainConfig) -> FeatureCode:
        assert cfg.k is not None
        if not bool(threshold[0] > 0):
            return encoder.largest(x, cfg.k).by_feature()
        found = encoder.select(x, MARGIN * threshold, 0.0).by_row()
        short = (found.row_ptr.diff() < cfg.k).nonzero().squeeze(1)
        kept = _largest_of_code(found, cfg.k)
        if not len(short):
            return kept.by_feature()
        whole = encoder.largest(x[short], cfg.k)
        return _replaced(kept, short, whole).by_feature()

    def settle(self, sae: Trainable, smallest: Tensor | None, step: int, cfg: TrainConfig) -> None:
        assert smallest is not None
        sae.theta.copy_(torch.where(smallest.isfinite(), smallest, sae.theta))

    def release(self, sae: Trainable, cfg: TrainConfig) -> SAE:
        assert cfg.k is not None
        folded = sae.fold()
        if isinstance(folded, Transcoder):
            raise TrainError("There are no TopK transcoders; train it as batchtopk.")
        config = TopKConfig(**place_of(folded), k=cfg.k)
        return TopKSAE(config, weights_for(config, folded))


def largest_of_rows(z: Tensor, k: int) -> SparseCode:
    """The k largest positive entries of every row of z [b, F]."""
    top, where = z.relu().topk(min(k, z.shape[1]), dim=1)
    kept = ~(top <= 0)  # NaN is kept, so that it reaches the loss
    return SparseCode(top[kept], where[kept].int(), pointers(kept.sum(1)), z.shape[1])


def _largest_of_code(code: SparseCode, k: int) -> SparseCode:
    """The k largest entries of every row."""
    order = code.values.argsort(descending=True, stable=True)
    order = order[code.rows()[order].argsort(stable=True)]
    rank = torch.arange(len(order), device=order.device) - code.row_ptr[:-1].repeat_interleave(code.row_ptr.diff())
    kept = order[rank < k].sort().values  # by ascending feature again
    return SparseCode(
        code.values[kept], code.indices[kept], pointers(code.row_ptr.diff().clamp(max=k)), code.n_features
    )


def _replaced(code: SparseCode, rows: Tensor, other: SparseCode) -> SparseCode:
    """The code with the rows of `other` in place of its own `rows`."""
    owners = torch.cat((code.rows(), rows.int()[other.rows().long()]))
    stays = torch.ones(len(owners), dtype=torch.bool, device=owners.device)
    stays[: len(code.values)] = ~torch.isin(code.rows().long(), rows)
    order = stays.nonzero().squeeze(1)
    order = order[owners[order].argsort(stable=True)]
    values, indices = torch.cat((code.values, other.values)), torch.cat((code.indices, other.indices))
    counts = torch.bincount(owners[order], minlength=code.n_rows)
    return SparseCode(values[order], indices[order], pointers(counts), code.n_features)
