"""A `Lab` from an SAE's folder: its model, its site, and the statistics that `mistudio eval` left beside it."""

from collections.abc import Mapping
from pathlib import Path

from jaxtyping import Float
from torch import Tensor

from mistudio.evaluate.report import STATS_FILE
from mistudio.lm import Site
from mistudio.steer import Known, Lab, read_vector
from mistudio.studio.workspace import feature_stats, load_sae


def load_lab(folder: Path, model: str | None, vectors: Mapping[str, Path] | None = None) -> tuple[Lab, Site]:
    """The lab of one SAE, and its site. Without statistics strengths in multiples of the maximum are refused later."""
    lm, sae, site = load_sae(folder, model)
    known: dict[Site, Known] = {}
    if (folder / STATS_FILE).is_file():
        stats = feature_stats(folder)
        known[site] = Known(maxima=stats.max, density=stats.density)
    read: dict[str, Float[Tensor, " D"]] = {name: read_vector(path) for name, path in (vectors or {}).items()}
    return Lab(lm=lm, saes={site: sae}, known=known, vectors=read), site
