"""Text while it is written: tokens in, the characters that each one adds out."""

from collections.abc import Callable, Sequence

HALF = "�"
"""What decoders write for bytes that are not yet a whole character."""


class TextStream:
    """The text of one row, piece by piece; the pieces together are the continuation's text.

    A character may take several tokens: it comes with the last of them.
    """

    def __init__(self, to_text: Callable[[Sequence[int]], str], prompt: Sequence[int]):
        """`to_text` decodes token ids; `prompt` is what the row continues."""
        self.to_text, self.tokens = to_text, list(prompt)
        self.shown = to_text(self.tokens)

    def feed(self, token: int) -> str:
        """What the text gains by this token; nothing while a character is incomplete."""
        self.tokens.append(token)
        text = self.to_text(self.tokens)
        if text.endswith(HALF) or not text.startswith(self.shown):
            return ""
        piece, self.shown = text[len(self.shown) :], text
        return piece
