"""The first plan's calls give what the lab gives."""

from dataclasses import replace

import pytest

from mistudio.errors import SAEError
from mistudio.steer import FeatureSteering, compare, mistudio_generate
from tiny_lab import PROMPT, SITE, live_sae, tiny_lab


def test_the_views_write_what_compare_writes():
    lab = tiny_lab()
    steering = FeatureSteering(lab.lm, lab.saes[SITE], "blocks.1.hook_resid_post")
    texts = steering.compare_steering(PROMPT, [(5, 9.0), (3, -4.0)], max_new_tokens=6)
    assert list(texts) == ["unsteered", "feature_5_alpha_9.0", "feature_3_alpha_-4.0"]
    for index, strength in ((5, 9.0), (3, -4.0)):
        found = compare(
            lab.lm, lab.saes[SITE], PROMPT, ((index, strength),), max_new_tokens=6, temperature=0.7, seed=16
        )
        assert texts["unsteered"] == found.unsteered[0].text
        assert texts[f"feature_{index}_alpha_{strength}"] == found.steered[0].text
        assert steering.steer(PROMPT, index, strength, max_new_tokens=6) == found.steered[0].text


def test_generating_needs_only_the_sae_where_it_names_its_model():
    lab = tiny_lab()
    sae = lab.saes[SITE]
    text = mistudio_generate(PROMPT, sae, 5, 9.0, model=lab.lm, max_new_tokens=6)
    assert text == FeatureSteering(lab.lm, sae, str(SITE)).steer(PROMPT, 5, 9.0, max_new_tokens=6, temperature=0.5)
    with pytest.raises(SAEError, match="does not say its site and model"):
        mistudio_generate(PROMPT, sae, 5, 9.0)
    demo = live_sae(192, SITE)
    demo.config = replace(demo.config, model="demo")
    assert mistudio_generate("Once upon a time", demo, 5, 9.0, max_new_tokens=3)
