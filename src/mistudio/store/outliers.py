"""Rows far longer than the others: counted site by site, and left out where that was asked for.

A row is an outlier of a site when its norm, as the model gave it, is more than `factor` times the median norm of the
site's first `FIRST_ROWS` rows of the text (of all asked for, where those are fewer). The rule is a function of the text
alone: where a collection was interrupted, or how its rows were batched, does not bear on it. Rows that are not finite
are no outliers; the writer refuses them.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from typing import Final

import torch
from jaxtyping import Bool, Float
from torch import Tensor

FIRST_ROWS: Final = 4096
FACTOR: Final = 10.0
"""What is counted where nothing was said."""


@dataclass(frozen=True, kw_only=True)
class SiteOutliers:
    """Those of one site."""

    median: float
    """Median norm of the first rows."""
    rows: int = 0
    """Rows with a norm beyond factor * median so far."""


@dataclass(frozen=True, kw_only=True)
class Outliers:
    """The rule, and what it found."""

    factor: float
    """Norms beyond so many medians are outliers."""
    first_rows: int
    """Rows that the medians are of."""
    drop: bool
    """Whether a row that is an outlier of any site is left out of all."""
    dropped: int = 0
    """Rows left out so far."""
    sites: dict[str, SiteOutliers]
    """Site -> its median and count; where rows are dropped, the count is of dropped rows."""

    def beyond(self, rows: Mapping[str, Float[Tensor, "B _"]]) -> Bool[Tensor, "S B"]:
        """Whether each row is an outlier of each site, in the order of `sites`."""
        found = []
        for site, of_site in self.sites.items():
            lengths = norms(rows[site])
            found.append((lengths > self.factor * of_site.median) & lengths.isfinite())
        return torch.stack(found)

    def plus(self, beyond: Bool[Tensor, "S B"]) -> "Outliers":
        """The same with these rows counted."""
        counts = beyond.sum(1).tolist()
        sites = {
            site: replace(of_site, rows=of_site.rows + count)
            for (site, of_site), count in zip(self.sites.items(), counts, strict=True)
        }
        dropped = int(beyond.any(0).sum()) if self.drop else 0
        return replace(self, dropped=self.dropped + dropped, sites=sites)


def rule_of(first: Mapping[str, Float[Tensor, "B _"]], factor: float, drop: bool) -> Outliers:
    """The rule whose medians are those of these rows."""
    rows = {len(values) for values in first.values()}
    assert len(rows) == 1, rows
    sites = {site: SiteOutliers(median=norms(values).double().quantile(0.5).item()) for site, values in first.items()}
    return Outliers(factor=factor, first_rows=rows.pop(), drop=drop, sites=sites)


def norms(rows: Float[Tensor, "B D"]) -> Float[Tensor, " B"]:
    """Length of each row, computed in float32."""
    return torch.linalg.vector_norm(rows, dim=1, dtype=torch.float32)


@dataclass(frozen=True)
class Rows:
    """Rows as a model gave them."""

    rows: dict[str, Tensor]
    """Site -> [B, D]."""
    where: Tensor
    """[B, 3]"""
    end: int
    """Rows of tokens read up to here."""


@dataclass(frozen=True)
class Judged:
    """Rows to be written, and what is to be counted with them."""

    rows: dict[str, Tensor]
    where: Tensor
    end: int
    rule: Outliers
    """What was known before any of these rows."""
    beyond: Tensor
    """For `Outliers.plus`; it may still be being computed on a GPU."""


def judged(found: Iterator[Rows], rule: Outliers | tuple[float, bool], left: int) -> Iterator[Judged]:
    """The rows of `found` without those to be dropped, until `left` rows are left over.

    rule: one that goes on counting; or (factor, drop), and then nothing comes before the first rows are there. A row
    counts when no later one than it is needed, so that where it ends does not matter to one that goes on from there.
    """
    if left == 0:
        return
    pieces: Iterable[Rows] = found
    if isinstance(rule, tuple):
        first = list(_first(found, min(FIRST_ROWS, left)))
        if not first:
            return
        sites = {site: torch.cat([piece.rows[site].float().cpu() for piece in first]) for site in first[0].rows}
        rule = rule_of({site: values[: min(FIRST_ROWS, left)] for site, values in sites.items()}, *rule)
        del sites
        pieces = chain(first, found)
    for piece in pieces:
        beyond = rule.beyond(piece.rows)  # [S, B]
        count = len(piece.where)
        chosen = torch.arange(count)[:left]
        if rule.drop:
            chosen = (~beyond.any(0)).nonzero()[:left, 0].cpu()
        left -= len(chosen)
        last = count if left else int(chosen[-1]) + 1
        rows = piece.rows
        if len(chosen) < count:
            rows = {site: values[chosen.to(values.device)] for site, values in rows.items()}
        yield Judged(rows, piece.where[chosen], piece.end, rule, beyond[:, :last])
        if left == 0:
            return


def _first(found: Iterator[Rows], rows: int) -> Iterator[Rows]:
    """Pieces until there are so many rows."""
    for piece in found:
        yield piece
        rows -= len(piece.where)
        if rows <= 0:
            return
