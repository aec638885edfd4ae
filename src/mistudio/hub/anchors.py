"""Numbers that others measured on released SAEs, to hold ours against.

From SAEBench's published results for Gemma Scope 2B, residual stream, 16k (sae_bench_data, commit 5f2bf51): 250 texts
of 128 tokens of OpenWebText. Its explained variance is the mean over tokens of 1 - ‖x - x̂‖²/‖x - batch mean‖²
(`metrics.explained_variance_by_token`), which is not 1 - FVU.
"""

from dataclasses import dataclass

from mistudio.hub.entry import Entry


@dataclass(frozen=True, kw_only=True)
class Anchor:
    """What was measured on one SAE."""

    l0: float
    """Mean number of active features."""
    explained_variance: float
    """Mean over tokens of 1 - ‖x - x̂‖²/‖x - batch mean‖²."""
    delta_loss: float
    """Rise of the language model's loss with the reconstruction spliced in, nats/token."""


_REPO = "google/gemma-scope-2b-pt-res"
_MEASURED = {  # (layer, average_l0 of the path): (L0, explained variance, delta loss)
    (3, 59): (62.6, 0.812, 0.126),
    (7, 69): (77.5, 0.795, 0.122),
    (7, 285): (310.6, 0.884, 0.110),
    (11, 80): (85.0, 0.774, 0.169),
    (11, 168): (176.7, 0.821, 0.114),
    (15, 41): (41.6, 0.762, 0.291),
    (15, 150): (146.0, 0.844, 0.131),
    (19, 73): (75.6, 0.792, 0.233),
    (19, 137): (141.2, 0.828, 0.165),
}
ANCHORS = {
    f"{_REPO}/layer_{layer}/width_16k/average_l0_{name}": Anchor(l0=l0, explained_variance=variance, delta_loss=delta)
    for (layer, name), (l0, variance, delta) in _MEASURED.items()
}
"""hf_path → what was measured."""


def anchor_of(entry: Entry) -> Anchor | None:
    """What others measured on this SAE; None where nothing is known."""
    return ANCHORS.get(entry.hf_path)
