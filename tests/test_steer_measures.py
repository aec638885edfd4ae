"""Judge-free measures against their definitions, written out the long way."""

import math
from dataclasses import replace

import pytest
import torch

from mistudio.errors import ConfigError, SAEError
from mistudio.steer import (
    Arm,
    Lab,
    Push,
    distinct,
    longest_repeat,
    read_again,
    side_effects,
    steered,
    word_share,
    write_arms,
)
from tiny_lab import PROMPT, SITE, tiny_lab

PUSH = Push(feature=5, strength=8.0, site=str(SITE))
SEEDS = (0, 1)


@pytest.fixture(scope="module")
def lab() -> Lab:
    return tiny_lab()


@pytest.fixture(scope="module")
def rows(lab):
    arms = [Arm(name="unsteered"), Arm(name="steered", pushes=((PUSH,),)), Arm(name="prompt", prefix="say it. ")]
    return write_arms(lab, [PROMPT], arms, seeds=SEEDS, max_new_tokens=9, temperature=1.0)


@pytest.fixture(scope="module")
def read(lab, rows):
    return read_again(lab, [PROMPT], rows, site=SITE, target=5, batch_rows=4)


def test_cross_entropy_is_the_unsteered_models_on_the_plain_prompt_and_the_text(lab, rows, read):
    length = len(lab.lm.to_tokens(PROMPT))
    for row, found in zip(rows, read, strict=True):
        tokens = torch.tensor([[*lab.lm.to_tokens(PROMPT), *row.tokens]])
        expected = lab.lm.token_losses(tokens)[0, length - 1 :].mean()
        assert found.measures.ce == pytest.approx(float(expected), rel=1e-4)
        assert found.measures.length == len(row.tokens)


def test_kl_is_zero_unsteered_and_that_of_the_two_models_steered(lab, rows, read):
    length = len(lab.lm.to_tokens(PROMPT))
    for row, found in zip(rows, read, strict=True):
        if row.arm == "unsteered":
            assert found.measures.kl == pytest.approx(0.0, abs=1e-7)
            continue
        plain = torch.tensor([[*lab.lm.to_tokens(PROMPT), *row.tokens]])
        own = torch.tensor([[*row.context, *row.tokens]])
        q = lab.lm.run(plain, logits=True).logits[0, length - 1 : -1].double().softmax(-1)
        with steered(lab, [row.pushes], [len(row.context)]):
            p = lab.lm.run(own, logits=True).logits[0, len(row.context) - 1 : -1].double().softmax(-1)
        assert found.measures.kl == pytest.approx(float((p * (p / q).log()).sum(-1).mean()), rel=1e-3)
        assert found.measures.kl > 0.001


def test_the_target_is_read_without_steering(lab, rows, read):
    for row, found in zip(rows, read, strict=True):
        tokens = torch.tensor([[*lab.lm.to_tokens(PROMPT), *row.tokens]])
        h = lab.lm.run(tokens, read=(SITE,)).activations[SITE][0, len(lab.lm.to_tokens(PROMPT)) :]
        f = lab.saes[SITE].encode(h).detach()
        torch.testing.assert_close(found.features, f.mean(0), rtol=1e-4, atol=1e-5)
        assert found.measures.target_mean == pytest.approx(float(f[:, 5].mean()), rel=1e-4, abs=1e-6)
        assert found.measures.target_max == pytest.approx(float(f[:, 5].max()), rel=1e-4, abs=1e-6)
        assert found.measures.target_share == pytest.approx(float((f[:, 5] > 0).float().mean()))


def test_only_pushed_rows_have_a_size(rows, read):
    assert [found.measures.size is not None for found in read] == [row.arm == "steered" for row in rows]


def test_the_batch_of_reading_changes_nothing(lab, rows, read):
    for one, other in zip(read, read_again(lab, [PROMPT], rows, site=SITE, target=5, batch_rows=1), strict=True):
        assert one.measures.ce == pytest.approx(other.measures.ce, rel=1e-5)
        assert one.measures.kl == pytest.approx(other.measures.kl, rel=1e-3, abs=1e-6)
        torch.testing.assert_close(one.features, other.features, rtol=1e-4, atol=1e-5)


def test_a_text_of_no_tokens_has_no_numbers_rather_than_wrong_ones(lab, rows):
    empty = replace(rows[2], tokens=(), text="", sizes={})
    [found] = read_again(lab, [PROMPT], [empty], site=SITE, target=5, words=["hat"])
    m = found.measures
    assert (m.ce, m.kl, m.distinct_1, m.target_mean, m.words, m.length, m.longest_repeat) == (None,) * 5 + (0, 0)
    assert float(found.features.abs().sum()) == 0


def test_repetition_by_hand():
    assert distinct([1, 2, 1, 2, 1], 1) == 2 / 5
    assert distinct([1, 2, 1, 2, 1], 2) == 2 / 4
    assert distinct([1, 2], 3) is None
    for tokens, expected in (([], 0), ([1, 2, 3], 0), ([1, 2, 3, 1, 2], 2), ([7, 7, 7, 7], 3), ([1, 2, 9, 1, 2, 9], 3)):
        assert longest_repeat(tokens) == expected, tokens
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 3, (40,), generator=generator).tolist()
    spans = {(n, tuple(tokens[i : i + n])) for n in range(1, 40) for i in range(41 - n)}
    twice = [n for n, s in spans if sum(tuple(tokens[i : i + n]) == s for i in range(41 - n)) > 1]
    assert longest_repeat(tokens) == max(twice)


def test_word_shares_ignore_case_and_punctuation():
    assert word_share("The Sea, the sea! waves.", {"sea", "waves"}) == 3 / 5
    assert word_share("… 12", {"sea"}) is None


def test_side_effects_are_the_features_that_rose_and_fell_most(read):
    plain, arm = read[:2], read[2:4]
    risen, fallen = side_effects(arm, plain, top=3)
    change = torch.stack([r.features for r in arm]).mean(0) - torch.stack([r.features for r in plain]).mean(0)
    assert risen[0] == (int(change.argmax()), pytest.approx(float(change.max())))
    assert fallen[0] == (int(change.argmin()), pytest.approx(float(change.min())))
    assert [c for _, c in risen] == sorted((c for _, c in risen), reverse=True)
    assert side_effects(plain, plain) == ([], [])
    with pytest.raises(ConfigError):
        side_effects([], plain)


def test_a_target_that_is_not_there_is_named(lab, rows):
    with pytest.raises(SAEError, match="no feature 99"):
        read_again(lab, [PROMPT], rows, site=SITE, target=99)
    assert all(math.isfinite(r.measures.ce) for r in read_again(lab, [PROMPT], rows, site=SITE))
