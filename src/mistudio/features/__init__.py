"""What features mean: matched against the labelled concepts of the demo stories."""

from mistudio.features.concepts import LabelledTokens, Match, label_tokens, match_concepts

__all__ = ["LabelledTokens", "Match", "label_tokens", "match_concepts"]
