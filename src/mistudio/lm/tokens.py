"""Texts to token ids, and nothing else: a tokenizer's own call also works out where in the text each token lies, which
takes a third of its time."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def token_ids(tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str]) -> list[list[int]]:
    """What `tokenizer(texts, add_special_tokens=False)` gives as "input_ids", whole, however long the texts are."""
    if not texts:
        return []
    if not _is_its_backend(tokenizer):
        found: list[list[int]] = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        return found
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = tokenizer.split_special_tokens
    return [encoding.ids for encoding in backend.encode_batch_fast(list(texts), add_special_tokens=False)]


def _is_its_backend(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether a call does no more to texts and ids than the tokenizers library does; Code Llama's class does."""
    from transformers import PreTrainedTokenizerFast

    return isinstance(tokenizer, PreTrainedTokenizerFast) and all(
        getattr(type(tokenizer), name, None) is getattr(PreTrainedTokenizerFast, name, None)
        for name in ("__call__", "_encode_plus")
    )
