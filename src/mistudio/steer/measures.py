"""What can be said of a text without a judge: read again by the unsteered model, and by the SAE.

Of a row's new tokens, given the *plain* prompt (so an arm that asks in its prompt is measured as the others are):

    ce          mean -log p(token | before) under the unsteered model, nats/token: how odd the text is
    kl          mean KL(p_arm ‖ p_unsteered), nats/token: how much another writer the arm was
    distinct_n  different n-grams of tokens over all; longest_repeat: tokens of the longest span that comes twice
    target      activation of the feature aimed at when the text is re-read unsteered: mean, max, share of tokens
    words       share of the words that are among given ones
"""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mistudio.errors import ConfigError
from mistudio.lm import Site
from mistudio.steer.apply import steered
from mistudio.steer.arms import Written
from mistudio.steer.lab import Lab

WORD = re.compile(r"[^\W\d_]+")


@dataclass(frozen=True, kw_only=True)
class Measures:
    """The numbers of one row; None where its text is too short to have them."""

    ce: float | None
    """Cross-entropy under the unsteered model, nats/token."""
    kl: float | None
    """KL of the arm's next-token distributions from the unsteered model's, nats/token."""
    distinct_1: float | None
    """Different tokens over tokens."""
    distinct_2: float | None
    """Different pairs over pairs."""
    distinct_3: float | None
    """Different triples over triples."""
    longest_repeat: int
    """Tokens in the longest span that occurs twice."""
    target_mean: float | None
    """Mean activation of the target when re-read, raw units."""
    target_max: float | None
    """Its maximum."""
    target_share: float | None
    """Share of the tokens on which it is active."""
    words: float | None
    """Share of the words that are among the given ones; None without words given."""
    length: int
    """New tokens."""
    ended: bool
    """Whether the text ended of itself."""
    size: float | None
    """Mean ‖h' - h‖/‖h‖ over the positions pushed."""


@dataclass(frozen=True, kw_only=True)
class Read:
    """A row's measures, and the mean activation of every feature over its new tokens."""

    measures: Measures
    features: Float[Tensor, " F"]


@torch.no_grad()
def read_again(
    lab: Lab,
    prompts: Sequence[str],
    rows: Sequence[Written],
    *,
    site: Site,
    target: int | None = None,
    words: Collection[str] = (),
    batch_rows: int = 8,
) -> list[Read]:
    """The measures of every row: two forward passes on its text. Logits [batch_rows, T, V] must fit into memory."""
    sae = lab.sae(site)
    if target is not None:
        sae.feature(target)
    wanted = frozenset(word.lower() for word in words)
    found: list[Read] = []
    for first in range(0, len(rows), batch_rows):
        part = rows[first : first + batch_rows]
        plain = [tuple(lab.lm.to_tokens(prompts[row.prompt])) for row in part]
        base, h = _logits(lab, plain, part, steer=False, site=site)
        arm, _ = _logits(lab, [row.context for row in part], part, steer=True, site=site)
        for number, row in enumerate(part):
            f = sae.encode(h[number]) if row.tokens else torch.zeros(0, sae.config.d_sae)
            measures = _measures(row, base[number], arm[number], None if target is None else f[:, target], wanted)
            found.append(Read(measures=measures, features=f.double().sum(0).float().cpu() / max(len(row.tokens), 1)))
    return found


def distinct(tokens: Sequence[int], n: int) -> float | None:
    """Different n-grams over all; 1 is without repetition. None: fewer than n tokens."""
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return len(set(grams)) / len(grams) if grams else None


def longest_repeat(tokens: Sequence[int]) -> int:
    """The length of the longest span that occurs at two places, which may overlap; 0 if no token comes twice."""
    before, longest = [0] * (len(tokens) + 1), 0
    for i in range(len(tokens)):  # row i of the table of common suffixes of tokens[:i+1] and tokens[:j+1], j < i
        row = [0] * (len(tokens) + 1)
        for j in range(i):
            if tokens[i] == tokens[j]:
                row[j + 1] = before[j] + 1
        before, longest = row, max(longest, *row)
    return longest


def word_share(text: str, words: Collection[str]) -> float | None:
    """Share of the text's words, in lower case, that are among `words`; None: it has none."""
    found = [word.lower() for word in WORD.findall(text)]
    return sum(word in words for word in found) / len(found) if found else None


def side_effects(
    arm: Sequence[Read], plain: Sequence[Read], *, top: int = 10
) -> tuple[list[tuple[int, float]], list[tuple[int, float]]]:
    """(risen, fallen): the features whose mean activation per token differs most from the unsteered arm's.

    Pairs of feature and difference, largest first; raw units, the mean over rows of the mean over tokens. ConfigError:
    one of the arms has no rows.
    """
    if not arm or not plain:
        raise ConfigError("Side effects compare an arm with the unsteered one; one of them has no rows.")
    change = torch.stack([r.features for r in arm]).mean(0) - torch.stack([r.features for r in plain]).mean(0)
    order = change.argsort(descending=True, stable=True).tolist()
    risen = [(i, float(change[i])) for i in order[:top] if change[i] > 0]
    fallen = [(i, float(change[i])) for i in order[::-1][:top] if change[i] < 0]
    return risen, fallen


def _logits(
    lab: Lab, contexts: Sequence[tuple[int, ...]], rows: Sequence[Written], *, steer: bool, site: Site
) -> tuple[list[Tensor], list[Tensor]]:
    """Per row the log-probabilities [n, V] that chose its n new tokens, and the activations [n, D] at them."""
    whole = [[*context, *row.tokens] for context, row in zip(contexts, rows, strict=True)]
    longest = max(map(len, whole))
    tokens = torch.tensor([[*row, *[lab.lm.pad_id] * (longest - len(row))] for row in whole], device=lab.lm.device)
    pushes = [row.pushes if steer else () for row in rows]
    with steered(lab, pushes, [len(context) for context in contexts], insist=False):
        readout = lab.lm.run(tokens, read=(site,), logits=True)
    assert readout.logits is not None
    logits, h = [], []
    for number, (context, row) in enumerate(zip(contexts, rows, strict=True)):
        first, end = len(context), len(context) + len(row.tokens)
        logits.append(readout.logits[number, first - 1 : end - 1].float().log_softmax(-1))
        h.append(readout.activations[site][number, first:end])
    return logits, h


def _measures(
    row: Written, base: Float[Tensor, "n V"], arm: Float[Tensor, "n V"], f: Tensor | None, words: frozenset[str]
) -> Measures:
    n = len(row.tokens)
    chosen = torch.tensor(row.tokens, dtype=torch.long, device=base.device)[:, None]
    sizes = [size for by_site in row.sizes.values() for size in by_site if size is not None]
    f = None if f is None or not n else f.double()
    return Measures(
        ce=float(-base.gather(1, chosen).double().mean()) if n else None,
        kl=float((arm.exp() * (arm - base)).sum(-1).double().mean()) if n else None,
        distinct_1=distinct(row.tokens, 1),
        distinct_2=distinct(row.tokens, 2),
        distinct_3=distinct(row.tokens, 3),
        longest_repeat=longest_repeat(row.tokens),
        target_mean=None if f is None else float(f.mean()),
        target_max=None if f is None else float(f.max()),
        target_share=None if f is None else float((f > 0).double().mean()),
        words=word_share(row.text, words) if words else None,
        length=n,
        ended=row.ended,
        size=sum(sizes) / len(sizes) if sizes else None,
    )
