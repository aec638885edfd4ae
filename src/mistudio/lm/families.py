"""Model families: for each site kind, the Hugging Face module that holds it, and whether it is its output or its input.

One row a family, found by `config.model_type`. A module path is relative to the causal LM; `{}` stands for the layer.
The attention site is always the *input* of the attention's output matrix; that of the MLP is the last module before the
residual add: in Gemma 2 and 3 the post-feed-forward RMSNorm, elsewhere the MLP itself.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from mistudio.errors import ModelError
from mistudio.lm.site import Site

Side = Literal["input", "output"]


@dataclass(frozen=True)
class Family:
    """A row: the name of the family and, for each site kind, (module path, side)."""

    name: str
    sites: Mapping[str, tuple[str, Side]]

    def locate(self, site: Site) -> tuple[str, Side]:
        """The module path of `site` and whether the activation is the module's input or its output."""
        path, side = self.sites[site.kind]
        return path.format(site.layer), side


FAMILIES: dict[str, Family] = {
    "gemma2": Family(
        "Gemma 2",
        {
            "resid_post": ("model.layers.{}", "output"),
            "mlp_out": ("model.layers.{}.post_feedforward_layernorm", "output"),
            "attn_z": ("model.layers.{}.self_attn.o_proj", "input"),
        },
    ),
    "gemma3_text": Family(
        "Gemma 3",
        {
            "resid_post": ("model.layers.{}", "output"),
            "mlp_out": ("model.layers.{}.post_feedforward_layernorm", "output"),
            "attn_z": ("model.layers.{}.self_attn.o_proj", "input"),
        },
    ),
    "gemma3": Family(
        "Gemma 3 with images",
        {
            "resid_post": ("model.language_model.layers.{}", "output"),
            "mlp_out": ("model.language_model.layers.{}.post_feedforward_layernorm", "output"),
            "attn_z": ("model.language_model.layers.{}.self_attn.o_proj", "input"),
        },
    ),
    "llama": Family(
        "Llama",
        {
            "resid_post": ("model.layers.{}", "output"),
            "mlp_out": ("model.layers.{}.mlp", "output"),
            "attn_z": ("model.layers.{}.self_attn.o_proj", "input"),
        },
    ),
    "qwen2": Family(
        "Qwen 2",
        {
            "resid_post": ("model.layers.{}", "output"),
            "mlp_out": ("model.layers.{}.mlp", "output"),
            "attn_z": ("model.layers.{}.self_attn.o_proj", "input"),
        },
    ),
    "qwen3": Family(
        "Qwen 3",
        {
            "resid_post": ("model.layers.{}", "output"),
            "mlp_out": ("model.layers.{}.mlp", "output"),
            "attn_z": ("model.layers.{}.self_attn.o_proj", "input"),
        },
    ),
    "gpt2": Family(
        "GPT-2",
        {
            "resid_post": ("transformer.h.{}", "output"),
            "mlp_out": ("transformer.h.{}.mlp", "output"),
            "attn_z": ("transformer.h.{}.attn.c_proj", "input"),
        },
    ),
    "gpt_neox": Family(
        "GPT-NeoX",
        {
            "resid_post": ("gpt_neox.layers.{}", "output"),
            "mlp_out": ("gpt_neox.layers.{}.mlp", "output"),
            "attn_z": ("gpt_neox.layers.{}.attention.dense", "input"),
        },
    ),
}


def family_of(model_type: str) -> Family:
    """The row of `model_type`. ModelError: there is none; the message shows the row to add."""
    if model_type not in FAMILIES:
        row = FAMILIES["llama"].sites
        raise ModelError(
            f"mistudio does not know the model family {model_type!r}; it knows {', '.join(FAMILIES)}. "
            "If its layers are laid out as Llama's, this adds it (else, change the module paths): "
            f'from mistudio.lm import FAMILIES, Family; FAMILIES["{model_type}"] = Family("{model_type}", {dict(row)})'
        )
    return FAMILIES[model_type]
