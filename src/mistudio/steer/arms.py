"""Arms: the same prompts and seeds under several steerings, all rows of one batch, so that they differ by that alone.

    rows = prompts × arms × seeds

A seed's random numbers are the same in every arm. The model runs once for all rows, which costs little more than one
row does (memory traffic, not arithmetic, is what a decoding step waits for).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

from mistudio.errors import ConfigError
from mistudio.progress import progress_bar
from mistudio.steer.apply import Pushes, Trace, steered
from mistudio.steer.lab import Lab

UNSTEERED, STEERED = "unsteered", "steered"


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way of writing."""

    name: str
    """As it is called in tables."""

    pushes: tuple[Pushes, ...] = ((),)
    """Its steering: one for all seeds, or one for each seed, such as a fresh random control. () is the plain model."""

    prefix: str = ""
    """What is put before the prompt: for the baseline that asks instead of steering."""

    def of(self, seed_number: int) -> Pushes:
        """The steering of the seed with that number."""
        return self.pushes[0] if len(self.pushes) == 1 else self.pushes[seed_number]


@dataclass(frozen=True, kw_only=True)
class Written:
    """What one row wrote."""

    arm: str
    """The arm's name."""

    prompt: int
    """Number of the prompt."""

    seed: int
    """Its seed."""

    context: tuple[int, ...]
    """The tokens that it continued: BOS, the arm's prefix, the prompt."""

    tokens: tuple[int, ...]
    """The new tokens, up to but without the end-of-text token."""

    text: str
    """Their text."""

    ended: bool
    """Whether it ended of itself, before `max_new_tokens`."""

    pushes: Pushes
    """Its steering."""

    sizes: dict[str, tuple[float | None, ...]]
    """Per site, for each token of context and text, ‖h' - h‖/‖h‖; None where no push acted. The last token that is
    written is never fed back."""


def write_arms(
    lab: Lab,
    prompts: Sequence[str],
    arms: Sequence[Arm],
    *,
    seeds: Sequence[int],
    max_new_tokens: int,
    temperature: float = 0.5,
    frequency_penalty: float = 0.0,
    double_bos: bool = False,
    use_cache: bool = True,
    batch_rows: int = 256,
    tell: Callable[[str, int, int, str], None] | None = None,
) -> list[Written]:
    """The rows of every prompt, arm and seed, in that order; at most `batch_rows` at a time.

    `frequency_penalty` as in `lm.Sampling`; with `double_bos` a second BOS stands before every prompt (both are of
    servers that are to be imitated). `tell(arm, prompt, seed, piece)` hears of the texts while they are written.
    ConfigError: arms of one name, an arm with another number of steerings than 1 or seeds, or several seeds at
    temperature 0, which would write one text. Errors of `steered` and `LanguageModel.generate_rows`.
    """
    _check(prompts, arms, seeds, temperature)
    rows = [
        (number, arm, index, seed)
        for (number, _), arm, (index, seed) in product(enumerate(prompts), arms, enumerate(seeds))
    ]
    written: list[Written] = []
    with progress_bar("steer", len(rows), "texts") as bar:
        for first in range(0, len(rows), batch_rows):
            part = rows[first : first + batch_rows]
            more = [lab.lm.bos_id] if double_bos else []
            contexts = [[*more, *lab.lm.to_tokens(arm.prefix + prompts[number])] for number, arm, _, _ in part]
            pushes = [arm.of(index) for _, arm, index, _ in part]
            with steered(lab, pushes, [len(context) for context in contexts]) as trace:
                texts = lab.lm.generate_rows(
                    contexts,
                    streams=[(seed, 0) for *_, seed in part],
                    max_new_tokens=max_new_tokens,
                    temperature=temperature,
                    frequency_penalty=frequency_penalty,
                    use_cache=use_cache,
                    tell=None if tell is None else _teller(tell, part),
                )
            sizes = _sizes(trace, [len(c) + len(t.tokens) for c, t in zip(contexts, texts, strict=True)])
            written += [
                Written(
                    arm=arm.name,
                    prompt=number,
                    seed=seed,
                    context=tuple(contexts[row]),
                    tokens=texts[row].tokens,
                    text=texts[row].text,
                    ended=len(texts[row].tokens) < max_new_tokens,
                    pushes=pushes[row],
                    sizes=sizes[row],
                )
                for row, (number, arm, _, seed) in enumerate(part)
            ]
            bar.advance(len(part))
    return written


def _teller(
    tell: Callable[[str, int, int, str], None], part: list[tuple[int, Arm, int, int]]
) -> Callable[[int, str], None]:
    def hear(row: int, piece: str) -> None:
        number, arm, _, seed = part[row]
        tell(arm.name, number, seed, piece)

    return hear


def _sizes(trace: Trace, lengths: list[int]) -> list[dict[str, tuple[float | None, ...]]]:
    found: list[dict[str, tuple[float | None, ...]]] = [{} for _ in lengths]
    for site in trace.sites():
        for row, (values, length) in enumerate(zip(trace.sizes(site).tolist(), lengths, strict=True)):
            whole = tuple(None if math.isnan(value) else value for value in [*values, *[math.nan] * length][:length])
            if any(value is not None for value in whole):
                found[row][str(site)] = whole
    return found


def _check(prompts: Sequence[str], arms: Sequence[Arm], seeds: Sequence[int], temperature: float) -> None:
    if not (prompts and arms and seeds):
        raise ConfigError(f"{len(prompts)} prompts × {len(arms)} arms × {len(seeds)} seeds are no texts.")
    names = [arm.name for arm in arms]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ConfigError(f"Several arms are called {', '.join(sorted(twice))}; give each its own name.")
    for arm in arms:
        if len(arm.pushes) not in (1, len(seeds)):
            raise ConfigError(f"The arm {arm.name!r} has {len(arm.pushes)} steerings for {len(seeds)} seeds.")
    if temperature == 0 and len(seeds) > 1:
        raise ConfigError(f"{len(seeds)} greedy texts an arm would all be the same; give a temperature above 0.")
