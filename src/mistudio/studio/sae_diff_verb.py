"""`mistudio sae diff`: are these the same weights?"""

from dataclasses import dataclass
from typing import Annotated

import tyro
from rich.console import RenderableType

from mistudio.hub.compare import Comparison, compare_saes
from mistudio.hub.load import load_sae


@dataclass(frozen=True, kw_only=True)
class Config:
    """Two SAEs, each a path or a released one's name."""

    a: Annotated[str, tyro.conf.Positional]
    """The first."""
    b: Annotated[str, tyro.conf.Positional]
    """The second."""


def run(config: Config) -> Comparison:
    """Compares them."""
    return compare_saes(load_sae(config.a), load_sae(config.b))


def show(result: Comparison) -> RenderableType:
    """The verdict, and what it rests on."""
    if result.same_bits:
        return "The same weights, bit for bit."
    lines = ["Not the same weights."]
    lines += [f"  largest difference in {name}: {value:.3g}" for name, value in result.largest_difference.items()]
    if result.only_in_one:
        lines.append(f"  only in one, or of other shapes: {', '.join(result.only_in_one)}")
    if result.cosine_same_index_mean is not None and result.cosine_same_index_min is not None:
        mean, least = result.cosine_same_index_mean, result.cosine_same_index_min
        lines.append(f"  decoder rows of the same index: cosine {mean:.4f} on average, {least:.4f} at least")
    lines.append(
        f"  nearest decoder rows: cosine {result.cosine_best_match_mean:.4f} on average; "
        f"{result.matched_share:.1%} of A's features have one in B at 0.9 or more"
    )
    return "\n".join(lines)
