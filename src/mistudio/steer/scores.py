"""Is a feature good for steering? Its output score and its input score (arXiv 2505.20063), without a judge.

A feature's *logit lens* is d·W_U: what its direction would write if nothing came after its layer. With T the k tokens
on top of it:

    output score   (1 - r/V)·p   where the feature is added to the last token of a neutral prompt, s times its maximum;
                                 r the best rank and p the largest probability that a token of T then has
    input score    the share of the k tokens on which the feature is most active that are in T

A high output score says that the direction does write what it points at; in the paper, leaving out features of low
output score makes steering two to three times better. A high input score says that it fires on the words that it
points at. Few features have both. W_U is the raw unembedding, without the final norm's gain.
"""

from collections.abc import Iterable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mistudio.errors import ConfigError
from mistudio.lm import LanguageModel, Site
from mistudio.progress import progress_bar
from mistudio.steer.apply import steered
from mistudio.steer.lab import Lab
from mistudio.steer.push import Push

NEUTRAL = "From my experience,"
"""The paper's prompt."""


def logit_lens(lm: LanguageModel, directions: Float[Tensor, "n D"], k: int) -> Int[Tensor, "n k"]:
    """The k tokens on top of d·W_U for each direction, the likeliest first. ConfigError: another width than W_U's."""
    W_U = lm.model.get_output_embeddings().weight.detach()  # [V, D]
    if directions.shape[1] != W_U.shape[1]:
        raise ConfigError(f"The logit lens reads directions of width {W_U.shape[1]}, not {directions.shape[1]}.")
    logits = directions.to(W_U.device, torch.float32) @ W_U.float().T
    return logits.topk(k, dim=1).indices.cpu()


@torch.no_grad()
def output_scores(
    lab: Lab,
    site: Site,
    *,
    features: Iterable[int] | None = None,
    prompt: str = NEUTRAL,
    of_max: float = 10.0,
    k: int = 20,
    batch_rows: int = 128,
) -> Float[Tensor, " F"]:
    """Each feature's output score, float32, in [0, 1); nan for features not asked for or that never fired.

    `of_max` is s. Costs a forward pass of the prompt for each feature. SAEError: the maxima are not known.
    """
    sae = lab.sae(site)
    wanted = range(sae.config.d_sae) if features is None else features
    live = [i for i in wanted if site in lab.known and float(lab.known[site].maxima[i]) > 0]
    scores = torch.full((sae.config.d_sae,), torch.nan)
    tokens = torch.tensor([lab.lm.to_tokens(prompt)], device=lab.lm.device)
    with progress_bar("output scores", len(live), "features") as bar:
        for begin in range(0, len(live), batch_rows):
            part = live[begin : begin + batch_rows]
            lens = logit_lens(lab.lm, sae.W_dec.detach()[part], k)  # [n, k]
            pushes = [
                (Push(feature=i, strength=of_max, unit="max", site=str(site), positions="last-prompt"),) for i in part
            ]
            with steered(lab, pushes, [tokens.shape[1]] * len(part)):
                logits = lab.lm.run(tokens.expand(len(part), -1), logits=True).logits
            assert logits is not None
            scores[part] = _output_score(logits[:, -1].float().cpu(), lens)
            bar.advance(len(part))
    return scores


def _output_score(logits: Float[Tensor, "n V"], lens: Int[Tensor, "n k"]) -> Float[Tensor, " n"]:
    best = logits.gather(1, lens).amax(1, keepdim=True)  # the best-ranked token is the likeliest
    rank = (logits > best).sum(1)
    p = (best[:, 0] - logits.logsumexp(1)).exp()
    return (1 - rank / logits.shape[1]) * p


@torch.no_grad()
def input_scores(lab: Lab, site: Site, rows: Iterable[Int[Tensor, "n T"]], *, k: int = 20) -> Float[Tensor, " F"]:
    """Each feature's input score over rows of tokens, float32, in [0, 1]; nan where it was active on fewer than k.

    BOS and other special tokens are left out. Costs a forward pass a row.
    """
    sae = lab.sae(site)
    F = sae.config.d_sae
    values, tokens = torch.zeros(0, F), torch.zeros(0, F, dtype=torch.long)
    for row in rows:
        row = row.to(lab.lm.device)
        h = lab.lm.run(row, read=(site,)).activations[site]
        kept = ~lab.lm.is_special(row)
        f, ids = sae.encode(h[kept]).float().cpu(), row[kept].cpu()
        values = torch.cat([values, f])
        tokens = torch.cat([tokens, ids[:, None].expand(-1, F)])
        values, order = values.topk(min(k, len(values)), dim=0)
        tokens = tokens.gather(0, order)
    lens = logit_lens(lab.lm, sae.W_dec.detach(), k)  # [F, k]
    inside = (tokens.T[:, :, None] == lens[:, None, :]).any(2)  # [F, n]
    enough = (len(values) == k) & (values > 0).all(0)
    return torch.where(enough, inside.float().mean(1), torch.nan)
