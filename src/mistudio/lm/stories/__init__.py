"""The little world: an unbounded, seeded source of labelled stories, which the bundled model was trained on."""

from mistudio.lm.stories.lexicon import word_labels, world
from mistudio.lm.stories.tell import stories, story

__all__ = ["stories", "story", "word_labels", "world"]
