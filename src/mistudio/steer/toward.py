"""Which features would steer towards these words? Each is tried: one forward pass a feature and prompt.

    score_i = mean over prompts of  P(next token begins one of the words | h + s·m_i·d_i) - P(the same | h)

The push is on every position, as in steering. This is the causal cousin of the logit lens (d_i·W_U), which says what a
direction writes if nothing came after its layer, and of the output score of arXiv 2505.20063, which looks for a
feature's own logit-lens tokens where here the words are given. A feature that reads words well need not write them.
"""

from collections.abc import Collection, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from mistudio.errors import ConfigError, SAEError
from mistudio.lm import LanguageModel, Site
from mistudio.progress import progress_bar
from mistudio.steer.apply import steered
from mistudio.steer.lab import Lab
from mistudio.steer.push import Push


@torch.no_grad()
def toward(
    lab: Lab,
    site: Site,
    words: Mapping[str, Collection[str]],
    *,
    prompts: Sequence[str],
    of_max: float = 1.0,
    batch_rows: int = 256,
) -> dict[str, Float[Tensor, " F"]]:
    """For each named set of words the score of every feature, float32, in [-1, 1]; nan for features that never fired.

    `of_max` is s, in multiples of each feature's largest activation. Costs F·P forward passes of a prompt's length, P
    prompts, for all sets together. ConfigError: no words or prompts. SAEError: the maxima are not known.
    """
    if not words or not all(words.values()) or not prompts:
        raise ConfigError("Give at least one word in each set, and at least one prompt that such a word could follow.")
    if site not in lab.known:
        raise SAEError(f"The features' maxima at {site} are not known; run `mistudio eval` on the SAE first.")
    first = {name: torch.tensor(sorted(first_tokens(lab.lm, some))) for name, some in words.items()}
    live = (lab.known[site].maxima > 0).nonzero().flatten().tolist()
    scores = {name: torch.full((lab.sae(site).config.d_sae,), torch.nan) for name in words}
    for of_set in scores.values():
        of_set[live] = 0.0
    with progress_bar("toward", len(live) * len(prompts), "features") as bar:
        for prompt in prompts:
            tokens = torch.tensor([lab.lm.to_tokens(prompt)], device=lab.lm.device)
            plain = _next(lab, tokens)
            for begin in range(0, len(live), batch_rows):
                part = live[begin : begin + batch_rows]
                pushes = [(Push(feature=i, strength=of_max, unit="max", site=str(site)),) for i in part]
                with steered(lab, pushes, [tokens.shape[1]] * len(part)):
                    rise = _next(lab, tokens.expand(len(part), -1)) - plain
                for name, ids in first.items():
                    scores[name][part] += rise[:, ids].sum(-1) / len(prompts)
                bar.advance(len(part))
    return scores


def first_tokens(lm: LanguageModel, words: Collection[str]) -> set[int]:
    """The tokens that begin " word", as a word in the middle of a sentence is written."""
    return {ids[0] for ids in lm.encode([f" {word}" for word in sorted(words)]) if ids}


def _next(lab: Lab, tokens: Tensor) -> Float[Tensor, "n V"]:
    """The probabilities of the next token after each row, on the CPU."""
    logits = lab.lm.run(tokens, logits=True).logits
    assert logits is not None
    return logits[:, -1].float().softmax(-1).cpu()
