"""Directions of one's own from two sets of texts, by difference of means or by PCA. From files: `vector_files`."""

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from mistudio.errors import ConfigError
from mistudio.lm import LanguageModel, Site

Pooling = Literal["mean", "last"]


def mean_difference(
    lm: LanguageModel, site: Site, positive: Sequence[str], negative: Sequence[str], *, pooling: Pooling = "mean"
) -> Float[Tensor, " D"]:
    """mean over `positive` minus mean over `negative` of the texts' activations, float32, residual units.

    Contrastive activation addition (arXiv 2312.06681). pooling "mean": over a text's tokens without BOS; "last": its
    last token. Sums are in float64. ConfigError: a set is empty, or a text has no token.
    """
    mean = _pooled(lm, site, positive, pooling).mean(0) - _pooled(lm, site, negative, pooling).mean(0)
    return mean.float()


def principal_direction(
    lm: LanguageModel, site: Site, positive: Sequence[str], negative: Sequence[str], *, pooling: Pooling = "last"
) -> Float[Tensor, " D"]:
    """The first principal direction of the pairs' differences, a unit vector that points from negative to positive.

    repeng's `pca_diff`: the i-th texts of both sets are a pair; the differences are not centred. ConfigError: sets of
    different sizes, or as `mean_difference`.
    """
    if len(positive) != len(negative):
        raise ConfigError(f"PCA wants pairs of texts; found {len(positive)} positive and {len(negative)} negative.")
    differences = _pooled(lm, site, positive, pooling) - _pooled(lm, site, negative, pooling)  # [N, D]
    u = torch.linalg.svd(differences, full_matrices=False).Vh[0]
    return (u if (differences @ u).sum() >= 0 else -u).float()


def _pooled(lm: LanguageModel, site: Site, texts: Sequence[str], pooling: Pooling) -> Float[Tensor, "N D"]:
    if not texts:
        raise ConfigError("A direction from texts needs at least one text on each side; found none.")
    return torch.stack([_pool(lm, site, text, pooling) for text in texts])


def _pool(lm: LanguageModel, site: Site, text: str, pooling: Pooling) -> Float[Tensor, " D"]:
    tokens = torch.tensor([lm.to_tokens(text)], device=lm.device)
    if tokens.shape[1] < 2:
        raise ConfigError(f"The text {text!r} has no token besides BOS.")
    h = lm.run(tokens, read=(site,)).activations[site][0, 1:].double()  # [T-1, D]
    return h.mean(0) if pooling == "mean" else h[-1]
