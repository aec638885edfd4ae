"""Text from a causal LM: greedy or plain sampling, written out, so that an edit of the forward pass composes.

With the cache, the first forward pass sees the prompt [N, T, W] and every later one a single position [N, 1, W];
without it, every pass sees all positions. The library's own `generate` is left out: its many defaults (top-k,
penalties from a generation_config) would make "the same prompt, unsteered" mean something else for every model.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mistudio.errors import ModelError


@dataclass(frozen=True)
class Generation:
    """What one sample added to the prompt: its new tokens, up to but without the end-of-text token, and their text."""

    tokens: tuple[int, ...]
    text: str


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen."""

    max_new_tokens: int
    temperature: float = 0.0
    """0: the likeliest token; else a sample of softmax(logits / temperature)."""
    frequency_penalty: float = 0.0
    """Subtracted from logits / temperature for every time the token stands in the text so far, prompt included, as
    TransformerLens does; without effect at temperature 0."""


@torch.no_grad()
def new_tokens(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    streams: Sequence[tuple[int, int]],
    stop: frozenset[int],
    sampling: Sampling,
    use_cache: bool,
    tell: Callable[[int, int], None] | None = None,
) -> list[list[int]]:
    """For each prompt its new tokens, without the token of `stop` that ended it; `tell(row, token)` hears of each as
    soon as it is chosen.

    The prompts are rows of one batch; rows that have ended go on being computed, and are cut. A row's random numbers
    depend on its stream (seed, number) alone, so it does not change with its neighbours (up to rounding of the logits
    in other batch sizes). Where lengths differ, the first pass reads as far as the shortest prompt; longer ones are
    then fed token by token while the others already write. So no row is padded, and column t is position t in all.
    """
    device = next(model.parameters()).device
    max_new_tokens = sampling.max_new_tokens
    draws = _uniforms(streams, max_new_tokens).to(device)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    shortest, longest = int(lengths.min()), int(lengths.max())
    given = torch.tensor([[*p, *[0] * (longest - len(p))] for p in prompts], device=device)  # [N, longest]
    stops = torch.tensor(sorted(stop), device=device)
    ended = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    tokens = given[:, :shortest]
    fed, cache = tokens, None
    for position in range(shortest, longest + max_new_tokens):
        output = model(fed, past_key_values=cache, use_cache=use_cache, logits_to_keep=1)
        written = position - lengths  # [N] new tokens so far; below 0 inside a prompt
        draw = draws.gather(1, written.clamp(0, max_new_tokens - 1)[:, None])[:, 0]
        chosen = _choose(output.logits[:, -1], sampling, draw, tokens)  # [N]
        if position < longest:
            chosen = torch.where(written < 0, given[:, position], chosen)
        tokens = torch.cat([tokens, chosen[:, None]], dim=1)
        stopped = (written >= 0) & torch.isin(chosen, stops)
        if tell is not None:
            _tell(tell, chosen, ~ended & ~stopped & (written >= 0))
        ended |= stopped | (written + 1 >= max_new_tokens)
        if bool(ended.all()):
            break
        fed, cache = (chosen[:, None], output.past_key_values) if use_cache else (tokens, None)
    rows = zip(tokens.tolist(), lengths.tolist(), strict=True)
    return [_cut(row[length : length + max_new_tokens], stop) for row, length in rows]


def _tell(tell: Callable[[int, int], None], chosen: Int[Tensor, " N"], news: Bool[Tensor, " N"]) -> None:
    for row, (token, new) in enumerate(zip(chosen.tolist(), news.tolist(), strict=True)):
        if new:
            tell(row, token)


def _choose(
    logits: Float[Tensor, "N V"], sampling: Sampling, draw: Float[Tensor, " N"], before: Int[Tensor, "N T"]
) -> Int[Tensor, " N"]:
    """The most likely token; or a sample of softmax(logits / temperature): its cumulative sum, inverted at `draw`."""
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    scores = logits.double() / sampling.temperature
    if sampling.frequency_penalty:
        counts = torch.zeros_like(scores).scatter_add_(1, before, torch.ones_like(before, dtype=scores.dtype))
        scores = scores - sampling.frequency_penalty * counts
    cumulative = torch.softmax(scores, dim=-1).cumsum(dim=-1)  # [N, V]
    chosen = torch.searchsorted(cumulative, draw[:, None] * cumulative[:, -1:], right=True)
    return chosen[:, 0].clamp(max=logits.shape[-1] - 1)


def _uniforms(streams: Sequence[tuple[int, int]], steps: int) -> Float[Tensor, "N S"]:
    """Numbers in [0, 1), float64; a row is a function of its stream. No global generator is touched."""
    return torch.from_numpy(np.stack([np.random.default_rng(stream).random(steps) for stream in streams]))


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
