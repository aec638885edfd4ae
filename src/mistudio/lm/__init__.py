"""Language models and text: read and edit the inside of a Hugging Face causal LM; turn text into rows of tokens."""

from mistudio.lm.editing import Edit, Edits, Pass
from mistudio.lm.families import FAMILIES, Family
from mistudio.lm.generate import Generation
from mistudio.lm.load import load_shape
from mistudio.lm.model import LanguageModel, Readout
from mistudio.lm.pack import TokenRow, pack, separate, token_rows, token_spans
from mistudio.lm.shape import ModelShape
from mistudio.lm.site import KINDS, Site
from mistudio.lm.text import Document, Span, documents, is_held_out

__all__ = [
    "FAMILIES",
    "KINDS",
    "Document",
    "Edit",
    "Edits",
    "Family",
    "Generation",
    "LanguageModel",
    "ModelShape",
    "Pass",
    "Readout",
    "Site",
    "Span",
    "TokenRow",
    "documents",
    "is_held_out",
    "load_shape",
    "pack",
    "separate",
    "token_rows",
    "token_spans",
]
