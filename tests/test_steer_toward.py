"""Features that steer towards given words, against steering with each of them in turn."""

from dataclasses import replace

import pytest
import torch

from mistudio.errors import ConfigError, SAEError
from mistudio.steer import Push, first_tokens, steered, toward
from tiny_lab import PROMPT, SITE, F, tiny_lab


def test_a_features_score_is_the_rise_in_the_words_probability_when_it_is_added():
    lab = tiny_lab()
    maxima = lab.known[SITE].maxima.clone()
    maxima[3] = 0.0
    lab = replace(lab, known={SITE: replace(lab.known[SITE], maxima=maxima)})
    prompts, words = (PROMPT, "the hat"), ["a", "zoo"]
    found = toward(lab, SITE, {"some": words, "other": ["x"]}, prompts=prompts, of_max=3.0, batch_rows=7)
    scores = found["some"]
    assert not torch.equal(found["other"], scores)
    assert scores.shape == (F,)
    assert bool(scores[3].isnan())
    ids = sorted(first_tokens(lab.lm, words))
    for feature in (0, 9, F - 1):
        rises = []
        for prompt in prompts:
            tokens = torch.tensor([lab.lm.to_tokens(prompt)])
            push = Push(feature=feature, strength=3.0 * float(maxima[feature]), site=str(SITE))
            plain = lab.lm.run(tokens, logits=True).logits[0, -1].softmax(-1)[ids].sum()
            with steered(lab, [(push,)], [tokens.shape[1]]):
                moved = lab.lm.run(tokens, logits=True).logits[0, -1].softmax(-1)[ids].sum()
            rises.append(float(moved - plain))
        assert float(scores[feature]) == pytest.approx(sum(rises) / 2, rel=1e-3, abs=1e-6)


def test_words_are_looked_for_as_they_stand_in_a_sentence():
    lm = tiny_lab().lm
    assert first_tokens(lm, ["a", "and"]) == {lm.encode([" a"])[0][0]}
    assert first_tokens(lm, ["x"]) == {lm.encode([" x"])[0][0]}


def test_nothing_to_look_for_and_unknown_maxima_are_refused():
    lab = tiny_lab()
    with pytest.raises(ConfigError, match="at least one word"):
        toward(lab, SITE, {"none": []}, prompts=[PROMPT])
    with pytest.raises(SAEError, match="mistudio eval"):
        toward(replace(lab, known={}), SITE, {"one": ["a"]}, prompts=[PROMPT])
