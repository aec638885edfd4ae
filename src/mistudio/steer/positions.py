"""Which positions a push acts on, written as a word: `all`, `no-bos`, `generated`, `from:12`, `at:3,5`.

    all            every position, BOS and generated tokens included (Neuronpedia's completion)
    no-bos         all but position 0
    no-special     all but the prompt's special tokens; generated tokens always (Neuronpedia's chat without them)
    prompt         the prompt, BOS included
    generated      only tokens that were generated
    last-prompt    the prompt's last token, which the first generated one is predicted from
    from:N         position N and those after it; BOS is position 0
    at:N,M,…       these positions

A token's own position counts, not the one it is predicted from: `generated` leaves the pass that chooses the first new
token as it was.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from mistudio.errors import ConfigError


@dataclass(frozen=True)
class Place:
    """What a rule may look at: positions [1, T], prompt lengths [N, 1], and which tokens are special [N, T]."""

    position: Int[Tensor, "1 T"]
    prompt_length: Int[Tensor, "N 1"]
    special: Bool[Tensor, "N T"]


RULES: dict[str, Callable[[Place], Bool[Tensor, "N T"]]] = {
    "all": lambda at: torch.ones_like(at.special),
    "no-bos": lambda at: (at.position > 0).expand_as(at.special),
    "no-special": lambda at: ~at.special | (at.position >= at.prompt_length),
    "prompt": lambda at: at.position < at.prompt_length,
    "generated": lambda at: at.position >= at.prompt_length,
    "last-prompt": lambda at: at.position == at.prompt_length - 1,
}
"""Rules of one word. `from:N` and `at:N,M` take numbers."""

_NUMBERED = re.compile(r"from:(\d+)|at:(\d+(?:,\d+)*)")


def check_positions(rule: str) -> None:
    """ConfigError: it is none of the rules above."""
    if rule not in RULES and not _NUMBERED.fullmatch(rule):
        raise ConfigError(f"{rule!r} says no positions; the choices are {', '.join(RULES)}, from:12 and at:3,5,7.")


def positions_mask(rule: str, place: Place) -> Bool[Tensor, "N T"]:
    """True where a push with that rule acts. ConfigError: no such rule."""
    check_positions(rule)
    if rule in RULES:
        return RULES[rule](place)
    match = _NUMBERED.fullmatch(rule)
    assert match is not None
    if match[1] is not None:
        return (place.position >= int(match[1])).expand_as(place.special)
    wanted = torch.tensor([int(n) for n in match[2].split(",")], device=place.position.device)
    return torch.isin(place.position, wanted).expand_as(place.special)
