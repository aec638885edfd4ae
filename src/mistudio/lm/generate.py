"""Text from a causal LM: greedy or plain sampling, written out, so that an edit of the forward pass composes.

With the cache, the first forward pass sees the prompt [N, T, W] and every later one a single position [N, 1, W];
without it, every pass sees all positions. The library's own `generate` is left out: its many defaults (top-k,
penalties from a generation_config) would make "the same prompt, unsteered" mean something else for every model.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mistudio.errors import ModelError


@dataclass(frozen=True)
class Generation:
    """What one sample added to the prompt: its new tokens, up to but without the end-of-text token, and their text."""

    tokens: tuple[int, ...]
    text: str


@torch.no_grad()
def new_tokens(
    model: nn.Module,
    prompt: Sequence[int],
    *,
    stop: frozenset[int],
    max_new_tokens: int,
    samples: int,
    temperature: float,
    seed: int,
    use_cache: bool,
) -> list[list[int]]:
    """For each sample its new tokens, without the token of `stop` that ended it.

    All samples are rows of one batch; rows that have ended go on being computed, and are cut. A row's random numbers
    depend on (seed, row) alone, so a sample does not change with `samples` (up to rounding of the logits in other batch
    sizes).
    """
    device = next(model.parameters()).device
    draws = _uniforms(seed, samples, max_new_tokens).to(device)
    tokens = torch.tensor([list(prompt)] * samples, device=device)  # [N, T]
    stops = torch.tensor(sorted(stop), device=device)
    ended = torch.zeros(samples, dtype=torch.bool, device=device)
    fed, cache = tokens, None
    for step in range(max_new_tokens):
        output = model(fed, past_key_values=cache, use_cache=use_cache, logits_to_keep=1)
        chosen = _choose(output.logits[:, -1], temperature, draws[:, step])  # [N]
        tokens = torch.cat([tokens, chosen[:, None]], dim=1)
        ended |= torch.isin(chosen, stops)
        if bool(ended.all()):
            break
        fed, cache = (chosen[:, None], output.past_key_values) if use_cache else (tokens, None)
    return [_cut(row, stop) for row in tokens[:, len(prompt) :].tolist()]


def _choose(logits: Float[Tensor, "N V"], temperature: float, draw: Float[Tensor, " N"]) -> Int[Tensor, " N"]:
    """The most likely token; or a sample of softmax(logits / temperature): its cumulative sum, inverted at `draw`."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    cumulative = torch.softmax(logits.double() / temperature, dim=-1).cumsum(dim=-1)  # [N, V]
    chosen = torch.searchsorted(cumulative, draw[:, None] * cumulative[:, -1:], right=True)
    return chosen[:, 0].clamp(max=logits.shape[-1] - 1)


def _uniforms(seed: int, samples: int, steps: int) -> Float[Tensor, "N S"]:
    """Numbers in [0, 1), float64; row i is a function of (seed, i). No global generator is touched."""
    rows = [np.random.default_rng((seed, row)).random(steps) for row in range(samples)]
    return torch.from_numpy(np.stack(rows))


def _cut(tokens: list[int], stop: frozenset[int]) -> list[int]:
    ends = [index for index, token in enumerate(tokens) if token in stop]
    return tokens[: ends[0]] if ends else tokens


def check_request(
    prompt_tokens: int, context: int, *, max_new_tokens: int, samples: int, temperature: float, seed: int
) -> None:
    """ModelError: a number is out of range, or prompt and continuation do not fit into the model's context."""
    for name, value, least in (("max_new_tokens", max_new_tokens, 1), ("samples", samples, 1), ("seed", seed, 0)):
        if value < least:
            raise ModelError(f"{name} must be at least {least}; found {value}.")
    if not 0 <= temperature < float("inf"):
        raise ModelError(f"temperature must be 0 (greedy) or a positive number; found {temperature}.")
    if prompt_tokens + max_new_tokens > context:
        raise ModelError(
            f"A prompt of {prompt_tokens} tokens and {max_new_tokens} new ones exceed the context of {context}; "
            f"ask for at most {max(context - prompt_tokens, 0)} new ones, or shorten the prompt."
        )
