"""Which feature means which concept, measured: precision, recall and F1 against labels that are true by construction.

A feature predicts a concept at a token where its activation exceeds a threshold. For each concept the feature and the
threshold (a share of the feature's largest activation) with the best F1 are *chosen* on one half of the documents and
*scored* on the other half, so that picking the best of thousands of features does not flatter the figure.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mistudio.errors import TextError
from mistudio.lm import Document, LanguageModel, Site, token_spans
from mistudio.progress import progress_bar
from mistudio.sae import SAE

THRESHOLD_SHARES = (0.0, 0.1, 0.2, 0.3, 0.5)
TOP_TOKENS = 6


@dataclass(frozen=True, kw_only=True)
class LabelledTokens:
    """Documents, one a row, right-padded, with the truth about each token."""

    tokens: Int[Tensor, "N T"]
    """Token ids; rows begin with BOS and are filled up with PAD."""
    labels: Bool[Tensor, "N T K"]
    """Whether concept k holds at a token; false on BOS and PAD."""
    concepts: tuple[str, ...]
    """The K names."""


@dataclass(frozen=True, kw_only=True)
class Match:
    """The feature that best matches one concept."""

    concept: str
    """Name of the concept."""
    feature: int
    """Index of the feature in the SAE."""
    threshold: float
    """The feature predicts the concept where its activation exceeds this (raw activation units)."""
    precision: float
    """Share of the tokens predicted that have the concept, on documents the choice did not see."""
    recall: float
    """Share of the tokens with the concept that were predicted, on the same documents."""
    f1: float
    """Harmonic mean of precision and recall."""
    positives: int
    """Tokens with the concept on those documents."""
    top_tokens: tuple[str, ...]
    """Token types that carry most of the feature's activation there, the first most."""


def label_tokens(lm: LanguageModel, documents: Iterable[Document], context: int) -> LabelledTokens:
    """Tokenised documents with the truth of every token, cut at `context` tokens. TextError: no document has labels.

    A token has a concept if its characters, leading space aside, overlap one of the concept's spans.
    """
    documents = list(documents)
    concepts = tuple(sorted({span.name for document in documents for span in document.labels}))
    if not concepts:
        raise TextError("These documents carry no labels; concepts can be matched on the text `stories` only.")
    index = {name: k for k, name in enumerate(concepts)}
    tokens = torch.full((len(documents), context), lm.pad_id, dtype=torch.long)
    labels = torch.zeros(len(documents), context, len(concepts), dtype=torch.bool)
    for n, document in enumerate(documents):
        ids = lm.to_tokens(document.text)[:context]
        tokens[n, : len(ids)] = torch.tensor(ids)
        starts, ends = torch.tensor(_word_spans(lm, document.text)[:context]).T  # [T]
        for span in document.labels:
            labels[n, : len(ids), index[span.name]] |= (starts < span.end) & (ends > span.start)
    return LabelledTokens(tokens=tokens, labels=labels, concepts=concepts)


def _word_spans(lm: LanguageModel, text: str) -> list[tuple[int, int]]:
    """Each token's characters without leading space; BOS, in front, has none and overlaps nothing."""
    spans = [(0, 0)]
    for start, end in token_spans(lm, text):
        piece = text[start:end]
        spans.append((start + len(piece) - len(piece.lstrip()), end))
    return spans


def match_concepts(
    lm: LanguageModel,
    sae: SAE,
    site: Site,
    labelled: LabelledTokens,
    feature_max: Float[Tensor, " F"],
    *,
    batch_rows: int = 16,
) -> list[Match]:
    """One `Match` a concept, best F1 first. `feature_max`: largest activation of each feature, in raw units.

    Cost: one forward pass to `site` over the documents, and for each threshold a [F, tokens] × [tokens, K] product.
    TextError: fewer than two documents.
    """
    half = len(labelled.tokens) // 2
    if half == 0:
        raise TextError("Matching concepts needs at least two documents: one half to choose, one to score.")
    shares = torch.tensor(THRESHOLD_SHARES)
    thresholds = shares[:, None] * feature_max.cpu()  # [S, F]
    with progress_bar("match concepts", len(labelled.tokens), "documents") as bar:
        chosen_on = _Counts(thresholds, len(labelled.concepts))
        for f, labels, _ in _encoded(lm, sae, site, labelled, range(half), batch_rows):
            chosen_on.add(f, labels)
            bar.advance(min(batch_rows, half))
        best = chosen_on.f1().flatten(0, 1).argmax(0)  # [K] over S·F
        features, share_index = best % len(feature_max), best // len(feature_max)
        used = thresholds[share_index, features]  # [K]
        scored = _Scores(used, lm.model.config.vocab_size)
        for f, labels, ids in _encoded(lm, sae, site, labelled, range(half, len(labelled.tokens)), batch_rows):
            scored.add(f[:, features], labels, ids)
            bar.advance(min(batch_rows, half))
    matches = [scored.match(lm, k, name, int(features[k])) for k, name in enumerate(labelled.concepts)]
    return sorted(matches, key=lambda match: -match.f1)


def _encoded(
    lm: LanguageModel, sae: SAE, site: Site, labelled: LabelledTokens, rows: Sequence[int], batch_rows: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Activations [n, F], labels [n, K] and ids [n] of the ordinary tokens, a batch of documents at a time."""
    for first in range(rows[0], rows[-1] + 1, batch_rows):
        part = slice(first, min(first + batch_rows, rows[-1] + 1))
        tokens = labelled.tokens[part]
        ordinary = ~lm.is_special(tokens)
        x = lm.run(tokens.to(lm.device), read=[site]).activations[site]
        with torch.no_grad():
            f = sae.encode(x[ordinary.to(x.device)]).cpu()
        yield f, labelled.labels[part][ordinary], tokens[ordinary]


class _Counts:
    """True positives, predictions and positives for every threshold, feature and concept."""

    def __init__(self, thresholds: Tensor, n_concepts: int):
        n_shares, n_features = thresholds.shape
        self.thresholds = thresholds
        self.hits = torch.zeros(n_shares, n_features, n_concepts)
        self.predicted = torch.zeros(n_shares, n_features)
        self.positives = torch.zeros(n_concepts)

    def add(self, f: Tensor, labels: Tensor) -> None:
        """Counts one batch: f [n, F], labels [n, K]. Counts stay exact in float32 up to 2²⁴ tokens."""
        truth = labels.float()
        self.positives += truth.sum(0)
        for s, threshold in enumerate(self.thresholds):
            active = (f > threshold).float()
            self.hits[s] += active.T @ truth
            self.predicted[s] += active.sum(0)

    def f1(self) -> Tensor:
        """[S, F, K]; 0 where a feature never fires."""
        return 2 * self.hits / (self.predicted[..., None] + self.positives).clamp(min=1)


class _Scores:
    """The same counts for one chosen feature a concept, and the activation by token type."""

    def __init__(self, thresholds: Tensor, vocabulary: int):
        self.thresholds = thresholds
        n = len(thresholds)
        self.hits, self.predicted, self.positives = torch.zeros(n), torch.zeros(n), torch.zeros(n)
        self.mass = torch.zeros(vocabulary, n)

    def add(self, f: Tensor, labels: Tensor, ids: Tensor) -> None:
        """Counts one batch: f [n, K] of the chosen features, labels [n, K], ids [n]."""
        active = f > self.thresholds
        self.hits += (active & labels).sum(0)
        self.predicted += active.sum(0)
        self.positives += labels.sum(0)
        self.mass.index_add_(0, ids, f)

    def match(self, lm: LanguageModel, k: int, concept: str, feature: int) -> Match:
        """The finished record of concept k."""
        hits, predicted, positives = (float(t[k]) for t in (self.hits, self.predicted, self.positives))
        mass, ids = self.mass[:, k].topk(TOP_TOKENS)
        return Match(
            concept=concept,
            feature=feature,
            threshold=float(self.thresholds[k]),
            precision=hits / predicted if predicted else 0.0,
            recall=hits / positives if positives else 0.0,
            f1=2 * hits / (predicted + positives) if predicted + positives else 0.0,
            positives=int(positives),
            top_tokens=tuple(str(lm.tokenizer.decode([int(i)])) for i, m in zip(ids, mass, strict=True) if m > 0),
        )
