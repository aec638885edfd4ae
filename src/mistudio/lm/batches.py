"""Rows of tokens to what a model reads in one pass: packed rows, or documents by length; and when to stop."""

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Bool, Int, Int32
from torch import Tensor

from mistudio.lm.pack import TokenRow
from mistudio.lm.text import Document

if TYPE_CHECKING:
    from mistudio.lm.model import LanguageModel

MOST_ROWS = 1 << 16
"""Of one pass. Rows are gathered before the model sees them, so that a slip of the pen would gather for hours."""


@dataclass(frozen=True)
class Batch:
    """What the model reads in one pass."""

    tokens: Int[Tensor, "N T"]
    """Rows shorter than the longest are filled up on the right, where a causal model does not see it."""
    kept: Bool[Tensor, "N T"]
    """Which tokens' activations are wanted."""
    where: Int[Tensor, "B 3"]
    """Token id, document and offset in the document of those."""
    end: int
    """Rows of tokens of the text up to here."""


class FirstDocuments:
    """The first `most` documents of a text (None: all), and whether it was their number that ended them."""

    def __init__(self, docs: Iterator[Document], most: int | None):
        self._docs, self._left = docs, most
        self.spent = False
        """Their number did."""

    def __iter__(self) -> Iterator[Document]:
        return self

    def __next__(self) -> Document:
        if self._left == 0:
            self.spent = True
            raise StopIteration
        document = next(self._docs)
        if self._left is not None:
            self._left -= 1
        return document


class Clock:
    """The time that something may take, from when this is made."""

    def __init__(self, hours: float | None):
        self._end = None if hours is None else time.monotonic() + hours * 3600
        self.over = False
        """It was the time that ended `until_over`."""

    def until_over(self, found: Iterable[Batch]) -> Iterator[Batch]:
        """The batches that are begun in time; one at least."""
        for batch in found:
            yield batch
            if self._end is not None and time.monotonic() >= self._end:
                self.over = True
                return


def packed_groups(rows: Iterable[TokenRow], size: int) -> Iterator[list[TokenRow]]:
    """`size` rows at a time, all of one length."""
    remaining = iter(rows)
    while some := list(islice(remaining, size)):
        yield some


def sorted_groups(rows: Iterable[TokenRow], tokens: int, window: int) -> Iterator[list[TokenRow]]:
    """Rows of about the same length together, as many as fit into `tokens` tokens when they are filled up.

    `window` rows at a time are sorted by length, those of one length staying in their order; memory and the distance
    that a row moves are bounded by it. Each row comes once.
    """
    remaining = iter(rows)
    while some := list(islice(remaining, window)):
        group: list[TokenRow] = []
        for row in sorted(some, key=lambda row: len(row.tokens)):
            if group and (len(group) + 1) * len(row.tokens) > tokens:
                yield group
                group = []
            group.append(row)
        yield group


def batches(lm: "LanguageModel", groups: Iterable[list[TokenRow]], done: int = 0) -> Iterator[Batch]:
    """A batch a group, without BOS, EOS and PAD among the tokens kept, and without the first `done` tokens kept."""
    end = 0
    for group in groups:
        origin = _filled(group, lm.pad_id)
        tokens = torch.from_numpy(origin[..., 0]).long()
        kept = ~lm.is_special(tokens)
        end += len(group)
        past = min(done, int(kept.sum()))
        if past:
            kept.view(-1)[kept.view(-1).nonzero()[:past, 0]] = False
            done -= past
            if not kept.any():
                continue
        # by numpy: torch's mask would start threads of its own, where this runs beside the model's
        yield Batch(tokens, kept, torch.from_numpy(origin[kept.numpy()]), end)


def _filled(group: list[TokenRow], filler: int) -> Int32[np.ndarray, "N T 3"]:
    """Token id, document, offset; a place without a token has the token `filler`."""
    length = max(len(row.tokens) for row in group)
    origin = np.full((len(group), length, 3), (filler, -1, -1), dtype=np.int32)
    for row, values in zip(group, origin, strict=True):
        values[: len(row.tokens)] = np.stack([row.tokens, row.document, row.offset], axis=-1)
    return origin
