"""Documents to rows of tokens: BOS, then the next T-1 tokens of one endless stream of documents joined by EOS.

Nothing is padded and nothing is thrown away but the last, unfinished row: a document that does not fit goes on in the
next row, without what came before it. Every token knows the document and the place it came from.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Int, Int32
from torch import Tensor

from mistudio.errors import ModelError, TextError
from mistudio.lm.text import Document

if TYPE_CHECKING:
    from mistudio.lm.model import LanguageModel

DOCUMENTS_AT_ONCE = 64  # tokenised together, in parallel by the tokenizer


@dataclass(frozen=True)
class TokenRow:
    """One row: token ids; the ordinal in the stream of each token's document; its index among that document's tokens.

    BOS has document -1 and offset -1. An EOS between two documents belongs to the first, after its last token.
    """

    tokens: Int32[np.ndarray, " T"]
    document: Int32[np.ndarray, " T"]
    offset: Int32[np.ndarray, " T"]


def pack(lm: "LanguageModel", docs: Iterable[Document], context: int) -> Iterator[TokenRow]:
    """Rows of `context` tokens. ModelError: the context is too long for the model; TextError: too little text."""
    _check_context(lm, context)
    return _rows(lm, docs, context)


def separate(lm: "LanguageModel", docs: Iterable[Document], context: int) -> Iterator[TokenRow]:
    """Rows of 2 to `context` tokens: BOS, then tokens of one document; a longer one goes on in the next row, without
    what came before it. ModelError: as `pack`; TextError: no token at all."""
    _check_context(lm, context)
    return _separate(lm, docs, context)


def token_rows(lm: "LanguageModel", docs: Iterable[Document], context: int, rows: int) -> Int[Tensor, "N T"]:
    """The first `rows` packed rows, or fewer where the text ends, as one tensor. Errors as `pack`."""
    packed = islice(pack(lm, docs, context), rows)
    return torch.from_numpy(np.stack([row.tokens for row in packed])).long()


def token_spans(lm: "LanguageModel", text: str) -> list[tuple[int, int]]:
    """The characters (start, end) of each token of a document; entry i is the token that `pack` calls offset i."""
    encoded = lm.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    kept = len(lm.encode([text])[0])
    if lm.bos_id == lm.eos_id:  # only leading BOS are dropped
        return list(encoded["offset_mapping"])[len(encoded["input_ids"]) - kept :]
    pairs = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
    return [span for token, span in pairs if token != lm.bos_id]


def _rows(lm: "LanguageModel", docs: Iterable[Document], context: int) -> Iterator[TokenRow]:
    step, made = context - 1, 0
    stream = np.empty((3, 0), dtype=np.int32)  # token, document, offset
    for piece in _stream(lm, docs):
        stream = np.concatenate([stream, piece], axis=1)
        whole = stream.shape[1] // step * step
        for start in range(0, whole, step):
            made += 1
            yield _row(lm.bos_id, stream[:, start : start + step])
        stream = stream[:, whole:]
    if made == 0:
        raise TextError(
            f"The text is too short: {stream.shape[1]} tokens, and one row of context {context} takes {step}. "
            "Give more text or a shorter context."
        )


def _check_context(lm: "LanguageModel", context: int) -> None:
    if not 2 <= context <= lm.shape.context:
        raise ModelError(f"The context must be 2 to {lm.shape.context} tokens for {lm.name}; found {context}.")


def _separate(lm: "LanguageModel", docs: Iterable[Document], context: int) -> Iterator[TokenRow]:
    step, remaining, ordinal, made = context - 1, iter(docs), 0, 0
    while batch := list(islice(remaining, DOCUMENTS_AT_ONCE)):
        for ids in lm.encode([document.text for document in batch]):
            body = np.stack([ids, np.full(len(ids), ordinal), np.arange(len(ids))]).astype(np.int32)
            for start in range(0, len(ids), step):
                made += 1
                yield _row(lm.bos_id, body[:, start : start + step])
            ordinal += 1
    if made == 0:
        raise TextError("The text has no token. Give more text.")


def _row(bos_id: int, body: np.ndarray) -> TokenRow:
    start = np.array([[bos_id], [-1], [-1]], dtype=np.int32)
    tokens, document, offset = np.concatenate([start, body], axis=1)
    return TokenRow(tokens, document, offset)


def _stream(lm: "LanguageModel", docs: Iterable[Document]) -> Iterator[np.ndarray]:
    """Pieces [3, n] of the stream, one for every `DOCUMENTS_AT_ONCE` documents."""
    remaining, ordinal, last = iter(docs), 0, (-1, 0)  # last: the ordinal and length of the last document with tokens
    while batch := list(islice(remaining, DOCUMENTS_AT_ONCE)):
        columns: list[np.ndarray] = []
        for ids in lm.encode([document.text for document in batch]):
            if ids:
                if last[0] >= 0:
                    columns.append(np.array([[lm.eos_id], [last[0]], [last[1]]], dtype=np.int32))
                columns.append(np.stack([ids, np.full(len(ids), ordinal), np.arange(len(ids))]).astype(np.int32))
                last = (ordinal, len(ids))
            ordinal += 1
        if columns:
            yield np.concatenate(columns, axis=1)
