"""Where in a model: a layer and one of three kinds of activation, as Gemma Scope defines them (report, section 3.1).

| kind       | activation                                                                   | width            |
|------------|------------------------------------------------------------------------------|------------------|
| resid_post | the residual stream after the layer's MLP was added                          | d_model          |
| mlp_out    | what the MLP adds to it, *after* the post-feed-forward norm where there is one | d_model          |
| attn_z     | the attention heads' outputs, concatenated, *before* the output matrix W_O   | n_heads·head_dim |

Names that look alike but are another tensor (`attn.hook_result`, `mlp.hook_post`) are refused with the reason.
"""

import re
from dataclasses import dataclass

from mistudio.errors import ModelError

KINDS = ("resid_post", "mlp_out", "attn_z")

_HOOKS = {"resid_post": "hook_resid_post", "mlp_out": "hook_mlp_out", "attn_z": "attn.hook_z"}  # TransformerLens
_SCOPE = {"res": "resid_post", "mlp": "mlp_out", "att": "attn_z"}  # Neuronpedia: 20-gemmascope-res-16k
_LOOK_ALIKES = {
    "attn.hook_result": "that is each head's output after W_O; Gemma Scope reads attn.hook_z, before it",
    "hook_attn_out": "that is after W_O and the post-attention norm; Gemma Scope reads attn.hook_z, before both",
    "mlp.hook_post": "that is the hidden layer of the MLP; Gemma Scope reads hook_mlp_out, what it adds to the stream",
    "mlp.hook_out": "that may be before the post-feed-forward norm; Gemma Scope reads hook_mlp_out, after it",
    "hook_resid_pre": "Gemma Scope reads hook_resid_post; it equals hook_resid_pre of the next layer",
}


@dataclass(frozen=True, order=True)
class Site:
    """`Site(20, "resid_post")` is written `layers.20.resid_post`. Sites sort as a forward pass meets them."""

    layer: int
    kind: str

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ModelError(f"There is no site kind {self.kind!r}; the kinds are {', '.join(KINDS)}.")
        if self.layer < 0:
            raise ModelError(f"Layers count from 0; found {self.layer}.")

    def __str__(self) -> str:
        return f"layers.{self.layer}.{self.kind}"

    @property
    def hook_name(self) -> str:
        """TransformerLens's name: `blocks.20.hook_resid_post`, `blocks.20.hook_mlp_out`, `blocks.20.attn.hook_z`."""
        return f"blocks.{self.layer}.{_HOOKS[self.kind]}"

    @staticmethod
    def parse(name: str) -> "Site":
        """The site of our own name, a TransformerLens hook name, or a Neuronpedia SAE name. ModelError: it is none.

        `layers.20.resid_post` = `blocks.20.hook_resid_post` = the site of `20-gemmascope-res-16k`.
        """
        if match := re.fullmatch(r"layers\.(\d+)\.(\w+)", name):
            return Site(int(match[1]), match[2])
        if match := re.fullmatch(r"blocks\.(\d+)\.([\w.]+)", name):
            return Site(int(match[1]), _kind_of_hook(name, match[2]))
        if match := re.fullmatch(r"(\d+)-gemmascope(?:-2)?-(res|mlp|att)-\w+", name):
            return Site(int(match[1]), _SCOPE[match[2]])
        raise ModelError(
            f"{name!r} names no site. Write layers.LAYER.KIND with KIND one of {', '.join(KINDS)}, such as "
            "layers.20.resid_post; blocks.20.hook_resid_post and 20-gemmascope-res-16k are understood too."
        )


def _kind_of_hook(name: str, hook: str) -> str:
    for kind, known in _HOOKS.items():
        if hook == known:
            return kind
    reason = _LOOK_ALIKES.get(hook, "the hooks that are sites are " + ", ".join(_HOOKS.values()))
    raise ModelError(f"{name} is not a site: {reason}.")
