"""The sizes of a language model, known from its configuration alone, before any weights are downloaded."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from mistudio.errors import ConfigError, ModelError
from mistudio.lm.families import Family, family_of
from mistudio.lm.site import KINDS, Site


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """What can be read from a model and how wide it is."""

    name: str
    """The model's name, for messages."""
    family: Family
    """Its row of the family table."""
    n_layers: int
    """Number of layers L."""
    d_model: int
    """Width of the residual stream D."""
    head_width: int
    """n_heads · head_dim, the width of attn_z."""
    context: int
    """Positions the model can read."""

    def width(self, site: Site) -> int:
        """The width W of the activations at `site`: d_model, or n_heads·head_dim for attn_z."""
        self.check(site)
        return self.head_width if site.kind == "attn_z" else self.d_model

    def sites(self, names: Iterable[str]) -> list[Site]:
        """The sites of these names. ConfigError: one is named twice. ModelError: there is none of that name."""
        found = [Site.parse(name) for name in names]
        for site in found:
            self.check(site)
            if found.count(site) > 1:
                raise ConfigError(f"{site} is named more than once among the sites {', '.join(map(str, found))}.")
        return found

    def check(self, site: Site) -> None:
        """ModelError, with the valid layers and kinds: the model has no such site."""
        if site.layer >= self.n_layers or site.kind not in self.family.sites:
            raise ModelError(
                f"{self.name} has no site {site}: its layers are 0 to {self.n_layers - 1}, "
                f"and the kinds are {', '.join(kind for kind in KINDS if kind in self.family.sites)}."
            )


def shape_of(name: str, config: Any) -> ModelShape:
    """The shape a Hugging Face configuration describes. ModelError: unknown family."""
    family = family_of(config.model_type)
    text = config.get_text_config()
    head_dim = text.to_dict().get("head_dim") or text.hidden_size // text.num_attention_heads
    return ModelShape(
        name=name,
        family=family,
        n_layers=text.num_hidden_layers,
        d_model=text.hidden_size,
        head_width=text.num_attention_heads * head_dim,
        context=text.max_position_embeddings,
    )
